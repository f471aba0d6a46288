"""Downstream quality by lm-eval's own evaluator: the same figures as its command, BOS as the model was trained.

One task is evaluated after the other, so that one that fails, for instance because its data set cannot be reached,
does not lose the others. Whether the Hub can be reached is asked once: huggingface_hub repeats it for 25 seconds.
"""

import copy
import difflib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_softpick.analysis.downstream_results import merge
from hf_softpick.analysis.loading import LoadedModel
from hf_softpick.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAPER = ("arc_easy", "lambada_openai", "piqa", "sciq", "wikitext")
"""The tasks of the softpick paper (arXiv 2504.20966)."""

_LARGEST_BATCH = 64
_CPU_BATCH_TOKENS = 16384
_CPU_MEMORY_SHARE = 1 / 16
_HUB_TIMEOUT = 10.0  # seconds
_FILE_READERS = ("json", "csv", "text", "parquet", "arrow")


def find_tasks(
    names: str, include_path: Sequence[str | Path] = (), metadata: dict[str, Any] | None = None
) -> tuple[list[str], "TaskManager"]:
    """Tasks and groups to evaluate, one by one, and the manager that knows them.

    Args:
        names: separated by commas; `paper` stands for PAPER, a tag of lm-eval for its tasks.
        include_path: folders with task files of one's own, as --include_path of lm_eval.
        metadata: for tasks that build their data, as --metadata of lm_eval.

    Raises:
        RecipeError: lm-eval is not installed, or a name is unknown.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError(f"lm-eval cannot be imported ({error}). Run: pip install 'hf_softpick[eval]'") from None
    asked = [part for part in (part.strip() for part in names.split(",")) if part]
    if not asked:
        raise RecipeError(f"no task in {names!r}. Give names separated by commas, or paper.")
    for folder in include_path:
        if not Path(folder).is_dir():
            raise RecipeError(f"{folder}: no such folder of tasks.")
    options = {"include_path": [str(folder) for folder in include_path], "metadata": metadata}
    # To read the thousands of tasks of lm-eval takes seconds; those of one's own win over them in any case.
    manager = TaskManager(include_defaults=False, **options)
    if not set(asked) <= set(manager.all_subtasks):
        manager = TaskManager(**options)
    found: list[str] = []
    for name in asked:
        if name == "paper":
            found += PAPER
        elif name in manager.all_tags:
            found += sorted(manager.task_index[name].tags)
        elif name in manager.all_tasks:
            found.append(name)
        else:
            close = difflib.get_close_matches(name, ["paper", *manager.all_tasks], n=3)
            hint = f"Did you mean {', '.join(close)}?" if close else "`lm_eval ls tasks` shows all."
            raise RecipeError(f"unknown task {name!r}. {hint}")
    return list(dict.fromkeys(found)), manager


def harness(loaded: LoadedModel, batch_size: int | None = None) -> "HFLM":
    """lm-eval's model around `loaded`, whose tokenizer it does not change.

    Args:
        batch_size: sequences; None finds one that fits.

    Raises:
        CheckpointError: the tokenizer has neither BOS nor EOS, or adds tokens other than BOS to a text.
    """
    from lm_eval.models.utils import resolve_max_length

    from hf_softpick.analysis.downstream_harness import QuietHFLM

    tokenizer = copy.deepcopy(loaded.tokenizer)  # lm-eval sets, and may add, a padding token
    _check_special_tokens(tokenizer, loaded)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    length = resolve_max_length(loaded.model.config, tokenizer)
    return QuietHFLM(
        pretrained=loaded.model,
        tokenizer=tokenizer,
        add_bos_token=loaded.add_bos,
        batch_size=batch_size or find_batch_size(loaded.model, length),
    )


def _check_special_tokens(tokenizer: "PreTrainedTokenizerBase", loaded: LoadedModel) -> None:
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"the tokenizer of {loaded.path} has neither BOS nor EOS, and lm-eval needs one of them as the token "
            "before a text. Set bos_token or eos_token in its tokenizer_config.json to a token of its vocabulary."
        )
    plain = tokenizer("a", add_special_tokens=False).input_ids
    bos = [tokenizer.bos_token_id] if loaded.add_bos else []
    if (given := tokenizer("a").input_ids) != bos + plain:
        raise CheckpointError(
            f"the tokenizer of {loaded.path} turns 'a' into {tokenizer.convert_ids_to_tokens(given)}: tokens other "
            "than BOS, so that a prompt would not end where its text does. Save it without them (add_eos_token=False)."
        )


def find_batch_size(model: "PreTrainedModel", length: int) -> int:
    """Sequences of `length` tokens a batch, a power of two up to 64.

    On a GPU the largest that runs, by trying. On the CPU, where too much ends the process and larger batches are not
    faster, what keeps logits and log-probabilities (float32) within a sixteenth of the memory, and a batch within
    16384 tokens.
    """
    if model.device.type == "cpu":
        row = 3 * 4 * length * model.config.get_text_config().vocab_size
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        fits = min(_CPU_BATCH_TOKENS // length, int(memory * _CPU_MEMORY_SHARE) // row, _LARGEST_BATCH)
        return 2 ** int(math.log2(max(1, fits)))
    from accelerate.utils import find_executable_batch_size

    @find_executable_batch_size(starting_batch_size=_LARGEST_BATCH)
    def forward(batch_size: int) -> int:
        with torch.no_grad():
            logits = model(torch.zeros(batch_size, length, dtype=torch.long, device=model.device)).logits
            torch.nn.functional.log_softmax(logits, dim=-1)
        return batch_size

    return forward()


def evaluate_tasks(
    loaded: LoadedModel,
    tasks: Sequence[str],
    manager: "TaskManager",
    *,
    batch_size: int | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    after_task: Callable[[dict[str, Any], dict[str, Any]], None] = lambda result, lm_eval_result: None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluate `tasks`, from `find_tasks`, one after the other.

    Args:
        batch_size: sequences; None finds one. Where it does not fit after all, it is halved.
        limit: only the first documents of each task; for trials, the figures are not comparable.
        num_fewshot: examples in the prompt; None for each task's own number.
        after_task: called with both results after each task, to save them.

    Returns:
        The result (tasks, bos, batch_size, max_length, limit, num_fewshot), in which a task that failed, among them
        those whose data set is on the Hub while that cannot be reached, is {"error": one line}; and the results of
        lm-eval, merged, in lm-eval's own format.

    Raises:
        CheckpointError: as `harness`.
    """
    lm = harness(loaded, batch_size)
    result: dict[str, Any] = {
        "bos": {
            "add_bos_token": loaded.add_bos,
            "source": f"tokenizer of {loaded.path}",
            "prefix_token": lm.tokenizer.convert_ids_to_tokens(lm.prefix_token_id),
            "prefix_token_id": lm.prefix_token_id,
            "rolling_doubles_bos": _doubles_bos(lm),
        },
        "batch_size": lm.batch_size,
        "batch_size_from": "found" if batch_size is None else "given",
        "max_length": lm.max_length,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "tasks": {},
    }
    merged: dict[str, Any] = {}
    reason = _hub_unreachable() if any(_reads_the_hub(name, manager) for name in tasks) else None
    with _offline(reason is not None):
        for name in tasks:
            try:
                raw = _evaluate_one(lm, name, manager, limit, num_fewshot)
            except Exception as error:  # data sets, the network and task code raise nearly everything
                result["tasks"][name] = {"error": _one_line(error, reason)}
            else:
                batch = {"batch_size": lm.batch_size}  # of this task: a later one may have to halve it
                result["tasks"] |= {name: batch | task for name, task in summarize(raw, lm).items()}
                merged = merge(merged, _serializable(raw))
            result["batch_size"] = lm.batch_size
            after_task(result, merged)
    return result, merged


def _reads_the_hub(name: str, manager: "TaskManager") -> bool:
    """Whether a task may need a data set of the Hub; yes for a group."""
    config = manager.task_index[name].cfg or {}
    return "custom_dataset" not in config and config.get("dataset_path") not in _FILE_READERS


def _hub_unreachable() -> str | None:
    """Why the Hub cannot be reached, by one request that is not repeated; None where it answers or nothing may ask it.

    huggingface_hub repeats a failed request five times, after 1, 2, 4, 8 and 8 seconds, for every data set.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.is_offline_mode():
        return None
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT)
    except Exception as error:  # of whatever HTTP library huggingface_hub uses
        return f"{constants.ENDPOINT} cannot be reached: {str(error).strip() or type(error).__name__}"
    return None


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """As with HF_HUB_OFFLINE=1, if wanted: data sets that are in the cache are read, others fail at once."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if wanted:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _doubles_bos(lm: "HFLM") -> bool:
    """Whether lm-eval's rolling tasks read BOS BOS text: its prefix token comes before what the tokenizer adds."""
    return bool(lm.add_bos_token) and lm.prefix_token_id == lm.tokenizer.bos_token_id


def _evaluate_one(
    lm: "HFLM", name: str, manager: "TaskManager", limit: int | None, num_fewshot: int | None
) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    while True:
        lm.requests.clear()  # of a try that did not fit, or of another task
        lm.truncated.clear()
        try:
            return simple_evaluate(
                lm, tasks=[name], num_fewshot=num_fewshot, limit=limit, task_manager=manager, batch_size=lm.batch_size
            )
        except torch.OutOfMemoryError:
            if lm.batch_size == 1:
                raise
            lm.batch_size_per_gpu //= 2
            torch.cuda.empty_cache()


def _one_line(error: Exception, unreachable: str | None = None) -> str:
    if unreachable and isinstance(error, ConnectionError):
        return f"{type(error).__name__}: its data set is not in the cache, and {unreachable}"
    lines = str(error.__cause__ or error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _serializable(raw: dict[str, Any]) -> dict[str, Any]:
    """Results of lm-eval as it writes them, without samples."""
    from lm_eval.utils import handle_non_serializable

    raw = {key: value for key, value in raw.items() if key not in ("samples", "pretty_env_info")}
    return json.loads(json.dumps(raw, default=handle_non_serializable))


def summarize(raw: dict[str, Any], lm: "HFLM") -> dict[str, Any]:
    """The tasks of one result of lm-eval, by name: samples, version, num_fewshot, prompts, truncated_prompts, metrics.

    prompts and truncated_prompts are None where the task asks for none, see QuietHFLM. A metric has value, stderr
    (None where lm-eval gives none) and higher_is_better (None where the task does not say). Tasks that score whole
    texts also get `text`, see `text_statistics`, and the metric token_perplexity.
    """
    tasks = {}
    for name, values in raw["results"].items():
        better = raw["higher_is_better"].get(name, {})
        metrics = {}
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            label = metric if filter_name == "none" else f"{metric} ({filter_name})"
            metrics[label] = {
                "value": float(value),
                "stderr": None if stderr is None or isinstance(stderr, str) else float(stderr),
                "higher_is_better": better.get(metric),
            }
        tasks[name] = {
            "samples": raw["n-samples"].get(name, {}).get("effective"),
            "version": raw["versions"].get(name),
            "num_fewshot": raw["n-shot"].get(name),
            "prompts": lm.requests.get(name),
            "truncated_prompts": lm.truncated.get(name),
            "metrics": metrics,
        }
        if raw["configs"].get(name, {}).get("output_type") == "loglikelihood_rolling":
            text = text_statistics(raw["samples"][name], lm)
            tasks[name]["text"] = text
            perplexity = {key: text[f"token_perplexity{end}"] for key, end in (("value", ""), ("stderr", "_stderr"))}
            metrics["token_perplexity"] = perplexity | {"higher_is_better": False}
    return tasks


def text_statistics(samples: Sequence[dict[str, Any]], lm: "HFLM") -> dict[str, Any]:
    """What lm-eval leaves out of a rolling task: counts, and the perplexity of a token of the text.

    lm-eval puts its prefix token before each text, also where the tokenizer has put BOS there, and then counts the
    prediction of BOS after BOS, which no training asks for, in all its figures. Here it is left out: nll = sum over
    documents of -(log p(document) - bos_after_bos).

    Returns:
        documents, tokens, bytes; bos_after_bos (nats, None where lm-eval adds no second BOS); token_perplexity =
        exp(nll / tokens) with its standard error; bits_per_byte of the same nll. The standard error is that of a ratio
        of sums over documents (Cochran, Sampling Techniques, 1977, eq. 6.9), None for a single document.
    """
    texts = [sample["arguments"][0][0] for sample in samples]
    tokens = [len(lm.tok_encode(text, add_special_tokens=False)) for text in texts]
    bos = [lm.tokenizer.bos_token_id]
    twice = lm._loglikelihood_tokens([(None, bos, bos)], disable_tqdm=True)[0][0] if _doubles_bos(lm) else None
    nlls = [(twice or 0.0) - float(sample["filtered_resps"][0]) for sample in samples]
    count, size = sum(tokens), sum(len(text.encode()) for text in texts)
    rate = sum(nlls) / count
    stderr = None
    if len(texts) > 1:
        spread = sum((nll - rate * number) ** 2 for nll, number in zip(nlls, tokens, strict=True))
        stderr = math.sqrt(len(texts) * spread / (len(texts) - 1)) / count
    perplexity = math.exp(rate) if rate < 700 else math.inf
    return {
        "documents": len(texts),
        "tokens": count,
        "bytes": size,
        "bos_after_bos": twice,
        "token_perplexity": perplexity,
        "token_perplexity_stderr": None if stderr is None else perplexity * stderr,
        "bits_per_byte": sum(nlls) / size / math.log(2),
    }
