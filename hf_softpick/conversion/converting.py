"""The conversion itself: read, check, write beside the destination, load again and compare, rename."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_softpick.conversion.settings import Settings, override_normalizer, read_settings
from hf_softpick.conversion.sources import TOKENIZER_FILES, Source, fingerprint, locate, open_source, read_json
from hf_softpick.conversion.tensors import (
    EMBEDDINGS,
    HEAD,
    Plan,
    check_derived,
    check_sizes,
    common_dtype,
    is_own,
    make_plan,
    transform,
)
from hf_softpick.errors import CheckpointError, RecipeError, StorageError
from hf_softpick.files import settle, write_json
from hf_softpick.generation_settings import usable_generation_config
from hf_softpick.modeling.configuration_softpick import SoftpickConfig
from hf_softpick.modeling.modeling_softpick import SoftpickForCausalLM
from hf_softpick.versions import versions

REPORT = "conversion.json"


def convert(
    source: str,
    destination: Path,
    *,
    normalizer: str | None = None,
    dtype: str | None = None,
    config: Path | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Write `source` as a softpick checkpoint to `destination`, whole or not at all.

    Args:
        source: a folder with config.json and safetensors, a folder of a distributed checkpoint, or a Hub id.
        normalizer: replaces the one that the weights were trained with, with a warning.
        dtype: name of a torch dtype for the weights; default that of the source.
        config: config.json for a distributed checkpoint.
        tokenizer: a folder or Hub id; default the tokenizer that lies beside the weights, if any.
        revision: branch, tag or commit of a Hub id.
        subfolder: folder inside `source`.

    Returns:
        What conversion.json holds.

    Raises:
        CheckpointError: the source cannot be expressed exactly, is damaged or incomplete.
        RecipeError: arguments that do not fit. StorageError: the result could not be written.
    """
    started = time.perf_counter()
    destination = Path(destination)
    _check_destination(destination)
    opened = open_source(source, config=config, revision=revision, subfolder=subfolder)
    settings, warnings = override_normalizer(read_settings(opened.config), normalizer)
    check_sizes(opened.store.tensors, settings)
    model = _empty_model(settings)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if settings.config["tie_word_embeddings"]:
        expected.pop(HEAD, None)
    found = opened.store.tensors
    plan = make_plan(found, expected, settings)
    kind = common_dtype(plan, found, getattr(torch, dtype) if dtype else None)
    warnings += _dtype_warnings(opened, plan, kind) + [
        f"{name} was dropped: {why}." for name, why in plan.dropped.items()
    ]
    state = _read(opened, plan, expected, settings, kind, progress)

    destination = destination.absolute()
    # A name of its own: another conversion to the same place must not lose its files.
    staging = destination.with_name(f".{destination.name}-staging-{os.urandom(4).hex()}")
    try:
        staging.mkdir(parents=True)
        _write_model(model, state, settings, opened, staging, warnings)
        tokenizer_files = _copy_tokenizer(opened, tokenizer, staging, settings, warnings)
        _check(staging, state, kind)
        report = _report(opened, destination, settings, plan, expected, kind, tokenizer_files, warnings)
        report["seconds"] = round(time.perf_counter() - started, 1)
        write_json(staging / REPORT, report)
        settle(staging)
        if destination.is_dir():
            destination.rmdir()
        staging.rename(destination)
    except OSError as error:
        raise StorageError(
            f"{destination} could not be written: {error}. Make room, or choose another folder."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return report


def _check_destination(destination: Path) -> None:
    """Before any work: nothing may lie there but an empty folder. A link cannot be replaced by a folder."""
    try:
        if destination.is_symlink():
            raise RecipeError(f"{destination} is a link. Give the folder itself, or one that does not exist.")
        if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
            raise RecipeError(
                f"{destination} exists already and is not empty. Give another folder; nothing is replaced."
            )
    except OSError as error:
        raise StorageError(f"{destination} cannot be read: {error}. Choose another folder.") from error


def _empty_model(settings: Settings) -> SoftpickForCausalLM:
    try:
        with torch.device("meta"):
            return SoftpickForCausalLM(SoftpickConfig(**settings.config))
    except Exception as error:  # the strict configuration classes raise several kinds
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the source's settings make no softpick configuration: {reason}") from None


def _dtype_warnings(opened: Source, plan: Plan, kind: torch.dtype) -> list[str]:
    found, warnings = opened.store.tensors, []
    narrowed = sorted(
        {str(found[name][1]) for name in plan.moves if torch.promote_types(found[name][1], kind) != kind}
    )
    if narrowed:
        warnings.append(f"Weights in {', '.join(narrowed)} were rounded to {kind}.")
    said = opened.config.get("dtype") or opened.config.get("torch_dtype")
    if said is not None and f"torch.{said}" != str(kind):
        warnings.append(f"config.json of the source says {said}; the result is saved in {kind}.")
    return warnings


def _read(
    opened: Source, plan: Plan, expected: dict[str, tuple], settings: Settings, kind: torch.dtype, progress: bool
) -> dict[str, Tensor]:
    """Parameters by their name here, every source tensor read and checked."""
    state: dict[str, Tensor] = {}
    bad = []
    for name in tqdm(opened.store.tensors, desc="tensors", disable=not progress, leave=False):
        tensor = opened.store.read(name)
        if not tensor.isfinite().all():
            bad.append(name)
        elif name in plan.moves:
            target = plan.moves[name]
            state[target] = transform(tensor, expected[target], torch.float32 if is_own(target) else kind)
            if not state[target].isfinite().all():
                raise CheckpointError(f"{name} has values that do not fit into {kind}. Choose another --dtype.")
        elif name in plan.checked and name != HEAD:
            check_derived(name, tensor, settings)
    if bad:
        raise CheckpointError(
            f"{len(bad)} tensors hold NaN or infinite values: {', '.join(bad[:4])}. Take another step."
        )
    if HEAD in plan.checked:
        head = transform(opened.store.read(HEAD), expected[EMBEDDINGS], kind)
        if not torch.equal(head, state[EMBEDDINGS]):
            raise CheckpointError(f"tie_word_embeddings is true, but {HEAD} differs from the embeddings.")
    for target, value in plan.created.items():
        state[target] = torch.full(expected[target], value, dtype=torch.float32)
    return state


def _write_model(
    model: SoftpickForCausalLM,
    state: dict[str, Tensor],
    settings: Settings,
    opened: Source,
    staging: Path,
    warnings: list[str],
) -> None:
    full = {**state, HEAD: state[EMBEDDINGS]} if settings.config["tie_word_embeddings"] else state
    model.load_state_dict(full, strict=True, assign=True)
    model.tie_weights()
    given = opened.folder / "generation_config.json"
    if given.is_file():
        generation = usable_generation_config(read_json(given), warnings)
        if generation is not None:
            model.generation_config = generation
    try:
        model.save_pretrained(staging)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the model cannot be saved: {' '.join(str(error).split())}") from error


def _copy_tokenizer(
    opened: Source, tokenizer: str | None, staging: Path, settings: Settings, warnings: list[str]
) -> list[Path]:
    """Copy the tokenizer's files as they are, and load them once."""
    folder = opened.folder if tokenizer is None else locate(tokenizer, None, None, TOKENIZER_FILES)[0]
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    usable = any(path.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for path in files)
    if not usable and tokenizer is not None:
        raise CheckpointError(f"{tokenizer} holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json).")
    if not usable:
        warnings.append("The source has no tokenizer. Give one by --tokenizer, or save one beside the result.")
        return []
    for path in files:
        shutil.copyfile(path, staging / path.name)
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(staging, trust_remote_code=False)
    except Exception as error:  # damaged files, missing libraries, code of its own
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be loaded: {reason} Code of a tokenizer is never run; --tokenizer "
            "takes another one."
        ) from error
    largest = max(loaded.get_vocab().values(), default=-1)
    if largest >= settings.config["vocab_size"]:
        raise CheckpointError(
            f"the tokenizer in {folder} has the token id {largest}, but the model's vocab_size is "
            f"{settings.config['vocab_size']}: it is not this model's tokenizer."
        )
    return files


def _check(staging: Path, state: dict[str, Tensor], kind: torch.dtype) -> None:
    """Load what was written, as its users will, and compare every tensor bit by bit."""
    loaded, info = SoftpickForCausalLM.from_pretrained(
        staging, dtype="auto", output_loading_info=True, trust_remote_code=False
    )
    wrong = [f"{key}: {sorted(map(str, info[key]))[:3]}" for key in info if info[key]]
    parameters, tied = dict(loaded.named_parameters()), {HEAD} if loaded.config.tie_word_embeddings else set()
    wrong += sorted((parameters.keys() ^ state.keys()) - tied)
    for name, expected in state.items():
        found = parameters.get(name, expected)
        if found.dtype != expected.dtype or not torch.equal(found, expected):
            wrong.append(name)
    if wrong:
        raise CheckpointError(f"the written model in {kind} is not the one that was meant: {'; '.join(wrong[:4])}.")


def _report(
    opened: Source,
    destination: Path,
    settings: Settings,
    plan: Plan,
    expected: dict[str, tuple],
    kind: torch.dtype,
    tokenizer_files: list[Path],
    warnings: list[str],
) -> dict[str, Any]:
    found = opened.store.tensors

    def stored(name: str) -> dict[str, Any]:
        return {"source": name, "shape": list(found[name][0]), "dtype": _short(found[name][1])}

    tensors = [
        {
            **stored(name),
            "target": target,
            "target_shape": list(expected[target]),
            "target_dtype": "float32" if is_own(target) else _short(kind),
        }
        for name, target in plan.moves.items()
    ]
    generation = opened.folder / "generation_config.json"
    files = [opened.config_file, *opened.store.files, *tokenizer_files]
    files += [generation] if generation.is_file() else []
    return {
        "schema": 1,
        "kind": "conversion",
        "source": {
            "given": opened.given,
            "revision": opened.revision,
            "format": opened.store.format,
            "model_type": settings.model_type,
            "normalizer": settings.source_normalizer,
            "files": [fingerprint(path) for path in files],
        },
        "target": {
            "folder": destination.name,
            "model_type": SoftpickConfig.model_type,
            "normalizer": settings.config["normalizer"],
            "dtype": _short(kind),
            "parameters": sum(torch.Size(shape).numel() for shape in expected.values()),
        },
        "settings": settings.mapping,
        "settings_without_effect": settings.without_effect,
        "tensors": tensors,
        "checked_and_not_stored": [{**stored(name), "reason": why} for name, why in plan.checked.items()],
        "dropped": [{**stored(name), "reason": why} for name, why in plan.dropped.items()],
        "created": [{"target": name, "value": value} for name, value in plan.created.items()],
        "training_state_not_read": list(opened.store.left),
        "notes": settings.notes,
        "warnings": warnings,
        "versions": versions(),
    }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
