"""What a recipe will do, worked out without training: resolved values, size, tokens, memory, and what looks wrong."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..data.settings import TokenizerSettings
from .estimates import Disk, Memory, count_parameters, count_saved_parameters, estimate_disk, estimate_memory
from .recipe import Recipe, to_yaml
from .recipe_model import GPU_ONLY, ModelSettings

GIB = 2**30
_FILE_ENDINGS = (".jsonl", ".json", ".parquet", ".txt", ".gz")


def describe(recipe: Recipe) -> str:
    """The resolved recipe and a summary of the run, for a person to read.

    Reads no network and neither builds a model nor prepares data; what it cannot know without them, it says.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    vocabulary, origin = vocabulary_size(recipe.model, recipe.tokenizer)
    if recipe.model.from_ is not None:
        parameters = count_saved_parameters(Path(recipe.model.from_))
    else:
        parameters = None if vocabulary is None else count_parameters(recipe.model, vocabulary)
    memory, disk = None, estimate_disk(recipe, parameters) if parameters else None
    if parameters and recipe.model.from_ is None:
        memory = estimate_memory(recipe, parameters, vocabulary, processes)
    lines = [
        ("run folder", str(recipe.run.directory)),
        ("model", _model_line(recipe.model)),
        ("vocabulary", origin if vocabulary is None else f"{vocabulary:,} ({origin})"),
        ("parameters", _parameters_line(parameters, recipe.model)),
        *_token_lines(recipe, parameters, processes),
        *(_memory_lines(memory) if memory else [("memory", "unknown without the number of parameters")]),
        *(_disk_lines(disk) if disk else []),
    ]
    found = [f"  - {warning}" for warning in warnings(recipe, vocabulary, memory, disk)]
    summary = "\n".join(f"{name:<18}{value}" for name, value in lines)
    return f"{to_yaml(recipe.resolved())}\n{summary}\n\n" + (
        "What looks wrong:\n" + "\n".join(found) if found else "Nothing looks wrong."
    )


def vocabulary_size(model: ModelSettings, tokenizer: TokenizerSettings) -> tuple[int | None, str]:
    """Rows of the embedding as far as they are known offline, and where that is known from."""
    if model.vocab_size is not None:
        return model.vocab_size, "model.vocab_size"
    if tokenizer.train_bpe is not None:
        return tokenizer.train_bpe, "tokenizer.train_bpe"
    path = Path(tokenizer.from_) / "tokenizer.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        ids = list(saved["model"]["vocab"].values()) if isinstance(saved["model"]["vocab"], dict) else []
        ids += [token["id"] for token in saved["added_tokens"]]
        return len(set(ids)), str(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None, f"unknown until {tokenizer.from_} is loaded; model.vocab_size would say it"


def _model_line(model: ModelSettings) -> str:
    if model.from_ is not None:
        return f"{model.normalizer}, goes on from {model.from_}"
    heads, shared = model.num_attention_heads, model.num_key_value_heads or model.num_attention_heads
    return (
        f"{model.normalizer}, {model.num_hidden_layers} layers of {model.hidden_size}, {heads} heads"
        f"{f' over {shared} key heads' if shared != heads else ''}, MLP {model.intermediate_size}"
    )


def _parameters_line(parameters: int | None, model: ModelSettings) -> str:
    if parameters is None:
        return "unknown until the " + ("model" if model.from_ else "tokenizer") + " is loaded"
    return f"{parameters:,} ({parameters / 1e6:.1f} million)"


def _token_lines(recipe: Recipe, parameters: int | None, processes: int) -> Iterator[tuple[str, str]]:
    given = recipe.training.written
    rows, accumulated = given.get("per_device_train_batch_size", 8), given.get("gradient_accumulation_steps", 1)
    per_step = rows * accumulated * processes * recipe.data.seq_len
    yield (
        "tokens per step",
        f"{per_step:,} = {rows} rows x {accumulated} accumulated x {processes} process{'es' if processes > 1 else ''}"
        f" x {recipe.data.seq_len} tokens",
    )
    if "max_steps" not in given:
        yield "tokens in total", f"{given['num_train_epochs']:g} times the prepared data; steps follow from its size"
        return
    total = per_step * given["max_steps"]
    ratio = f", {total / parameters:.3g} per parameter" if parameters else ""
    yield "tokens in total", f"{total:,} in {given['max_steps']:,} steps{ratio}"


def _memory_lines(memory: Memory) -> Iterator[tuple[str, str]]:
    state = "the optimizer's state not counted"
    if memory.optimizer is not None:
        state = f"{memory.optimizer / GIB:.2f} optimizer state"
    yield "memory", f"about {memory.total / GIB:.2f} GiB for each process, of this:"
    yield "", f"{memory.weights / GIB:.2f} weights, {memory.gradients / GIB:.2f} gradients, {state}"
    yield "", f"{memory.activations / GIB:.2f} kept for the backward pass, {memory.logits / GIB:.2f} logits and loss"
    yield "", "not counted: libraries, allocator, communication buffers, and what torch.compile saves or adds"


def _disk_lines(disk: Disk) -> Iterator[tuple[str, str]]:
    each = f"{disk.checkpoint / GIB:.2f} GiB for each checkpoint, {disk.final / GIB:.2f} for final/"
    if disk.total is None:
        yield "disk", f"about {each}; all checkpoints are kept"
    else:
        yield "disk", f"about {disk.total / GIB:.2f} GiB at most: {disk.checkpoints} x {each}"


def warnings(recipe: Recipe, vocabulary: int | None, memory: Memory | None, disk: Disk | None = None) -> Iterator[str]:
    """What is allowed but probably not meant, one sentence each."""
    given = recipe.training.written
    if "max_steps" in given:
        yield from _step_warnings(recipe, given["max_steps"])
    if recipe.data.validation == 0:
        yield "data.validation is 0: no text is held out, so there is no validation loss."
    elif recipe.eval.every == 0:
        yield "eval.every is 0: validation runs only at the end."
    if not recipe.eval.prompts:
        yield "eval.prompts is empty: no sample is generated."
    yield from _batch_warnings(recipe)
    yield from disk_warnings(disk)
    yield from _machine_warnings(recipe, given, memory)
    if not recipe.data.isolate_documents:
        yield "data.isolate_documents is false: documents in a row see each other."
    tokens = recipe.tokenizer.train_bpe
    if vocabulary is not None and tokens is not None and vocabulary > 2 * tokens:
        yield f"model.vocab_size = {vocabulary} is more than twice what the tokenizer has; most rows are never used."


def _step_warnings(recipe: Recipe, steps: int) -> Iterator[str]:
    given = recipe.training.written
    warmup = given.get("warmup_steps", 0)
    if warmup >= 1 and warmup >= steps:
        yield f"training.warmup_steps = {warmup:g} never ends in {steps} steps: the full learning rate is not reached."
    elif warmup == 0 and given.get("lr_scheduler_type") != "constant":
        yield "training.warmup_steps is 0: training begins at the full learning rate."
    if recipe.eval.every > steps:
        yield f"eval.every = {recipe.eval.every} is beyond the last step, {steps}: validation runs only at the end."
    if recipe.eval.generate_every > steps:
        yield f"eval.generate_every = {recipe.eval.generate_every} is beyond the last step, {steps}: only at the end."
    if recipe.eval.statistics > steps:
        yield f"eval.statistics = {recipe.eval.statistics} is beyond the last step, {steps}: only at both ends."
    saves = given.get("save_steps", 500)
    if given.get("save_strategy") == "no" or (given.get("save_strategy", "steps") == "steps" and saves > steps):
        yield "no checkpoint is written before the end: an interruption loses everything (training.save_steps)."
    if given.get("logging_steps", 0) > steps:
        yield f"training.logging_steps = {given['logging_steps']:g} is beyond the last step: no loss is logged."


def _batch_warnings(recipe: Recipe) -> Iterator[str]:
    given = recipe.training.written
    rows, accumulated = given.get("per_device_train_batch_size", 8), given.get("gradient_accumulation_steps", 1)
    if "per_device_train_batch_size" not in given:
        yield "training.per_device_train_batch_size is not set; transformers uses 8."
    if "learning_rate" not in given:
        yield "training.learning_rate is not set; transformers uses 5e-5, which is for fine-tuning."
    elif given["learning_rate"] > 0.05:
        yield f"training.learning_rate = {given['learning_rate']:g} is far above what AdamW trains with."
    tokens = rows * accumulated * recipe.data.seq_len
    if tokens < 1024:
        yield f"a step sees only {tokens} tokens on each process (seq_len x batch): gradients will be noisy."
    if rows * recipe.data.seq_len > 2**17:
        yield f"one micro-batch has {rows * recipe.data.seq_len:,} tokens; where memory ends, halve it."


def disk_warnings(disk: Disk | None) -> Iterator[str]:
    """Whether the disk will be full before the run ends."""
    if disk and disk.missing:
        yield (
            f"run.root lacks {disk.missing / GIB:.2f} GiB: {disk.checkpoints} checkpoints (those kept, and the one "
            f"being written) and final/ need {disk.total / GIB:.2f} GiB."
        )


def _machine_warnings(recipe: Recipe, given: dict[str, Any], memory: Memory | None) -> Iterator[str]:
    if given.get("use_cpu", False) or not _has_accelerator():
        if memory and memory.total > _machine_memory():
            yield f"this machine has {_machine_memory() / GIB:.0f} GiB of memory, less than a process needs."
        cores = os.cpu_count() or 1
        if os.environ.get("OMP_NUM_THREADS") == "1" and os.environ.get("WORLD_SIZE", "1") == "1" and cores > 1:
            yield f"one thread on {cores} cores (accelerate's default); launch with OMP_NUM_THREADS={cores}."
        if given.get("bf16"):
            yield "training.bf16 is true and there is no GPU: on most CPUs this is slower than float32."
        needs = "needs a GPU, and there is none here: this run would refuse to start."
        if given.get("fp16"):
            yield f"training.fp16 {needs}"
        if recipe.model.attn_implementation in GPU_ONLY:
            yield f"model.attn_implementation '{recipe.model.attn_implementation}' {needs}"
    for name in ("deepspeed", "fsdp_config", "accelerator_config"):
        path = given.get(name)
        if isinstance(path, str) and not os.path.isfile(path):
            yield f"training.{name}: there is no file {path} here."
    workers, cores = given.get("dataloader_num_workers", 0), os.cpu_count() or 1
    if workers > cores:
        yield f"training.dataloader_num_workers = {workers} on a machine with {cores} cores."
    remote = [source.path for source in recipe.data.sources if _is_remote(source.path) and not source.revision]
    if recipe.tokenizer.from_ and _is_remote(recipe.tokenizer.from_) and not recipe.tokenizer.revision:
        remote.append(recipe.tokenizer.from_)
    if recipe.model.from_ and _is_remote(recipe.model.from_) and not recipe.model.revision:
        remote.append(recipe.model.from_)
    absent = [name for name in remote if Path(name).suffix in _FILE_ENDINGS or name.startswith(("/", ".", "~"))]
    if absent:
        yield f"{', '.join(absent)} does not exist here."
    remote = [name for name in remote if name not in absent]
    if remote:
        yield f"no revision is given for {', '.join(remote)}: another day may bring other content."


def _is_remote(name: str) -> bool:
    # Path.exists raises for a name that is too long.
    return name != "stdlib" and not any(sign in name for sign in "*?[") and not os.path.exists(name)


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _has_accelerator() -> bool:
    # Imported only here: the rest of a dry run needs no torch.
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()
