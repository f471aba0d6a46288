"""What quantizing a model costs: its loss in every format that is installed, against the saved weights.

A figure counts only where weights were quantized: layers are looked into, and what they store is counted.
"""

import gc
import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_softpick.analysis.loading import LoadedModel
from hf_softpick.analysis.quantization_formats import (
    GROUP_SIZES,
    Format,
    QuantizationRefused,
    Request,
    library,
    load_quantized,
    missing,
)
from hf_softpick.analysis.samples import Samples, batches
from hf_softpick.errors import CheckpointError, DataError
from hf_softpick.modeling.documents import document_begins

_LARGEST_EXPONENT = 700
_EVERY_MODULE = set(vars(nn.Module()))  # attributes that every module has
_TILE = 64
"""What every library takes: groups are of 32 to 128 weights, blocks of bitsandbytes on the CPU of 64."""


class Storage(NamedTuple):
    """The linear layers of a model other than its output: quantized weights, their bytes with scales, and the names
    of layers that are in float."""

    weights: int
    bytes: int
    in_float: list[str]


def measure_quantization(
    load: Callable[..., LoadedModel],
    samples_of: Callable[[LoadedModel, bool], Samples],
    formats: Sequence[Format],
    *,
    batch_size: int = 4,
    evaluate: Callable[[LoadedModel], dict[str, Any]] | None = None,
    after_each: Callable[[dict[str, Any]], None] = lambda result: None,
    progress: bool = False,
) -> dict[str, Any]:
    """Load the model anew in every format and measure its loss on the same rows. One model at a time is in memory.

    Args:
        load: `load_model` of one model; takes dtype, device_map and quantization_config.
        samples_of: the rows to measure on, and with True those that a format may calibrate on.
        evaluate: downstream tasks of a loaded model, {task: result}.
        after_each: called with the results so far, first with the baseline alone.

    Returns:
        data, baseline and formats of quantization.json. A loss that is not finite is one: NaN is never averaged away.

    Raises:
        CheckpointError: the model cannot be loaded, or is quantized already.
        DataError: no rows.
    """
    from tqdm.auto import tqdm

    loaded = load()
    model = loaded.model
    if getattr(model.config, "quantization_config", None) is not None:
        raise CheckpointError(f"{loaded.path} is quantized already. Give the model that it was made from.")
    samples = samples_of(loaded, False)
    rows = list(batches(samples, batch_size))
    bar = tqdm(total=(len(formats) + 1) * len(rows), desc="as saved", unit="batch", disable=not progress)
    try:
        started = time.perf_counter()
        loss, tokens = token_loss(model, rows, bar.update)
        baseline = {
            "dtype": str(model.dtype).removeprefix("torch."),
            "bits": 8 * model.dtype.itemsize,
            "loss": loss,
            "perplexity": perplexity(loss),
            "tasks": evaluate(loaded) if evaluate else {},
            "seconds": round(time.perf_counter() - started, 3),
        }
        parameters = sum(parameter.numel() for parameter in model.parameters())
        sizes = {layer.in_features for _, layer in _linear_layers(model)}
        group_size = next((size for size in GROUP_SIZES if all(n % size == 0 for n in sizes)), GROUP_SIZES[-1])
        odd_layers = _odd_layers(model.base_model)
        texts = []
        if any(item.calibrated and not missing(item) for item in formats):
            calibration = samples_of(loaded, True).rows
            texts = [loaded.tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in calibration]
        request = Request(model.dtype, model.device, group_size, loaded.tokenizer, texts)
        del model, loaded
        result = {
            "data": {"description": samples.description, "rows": len(samples.rows), "tokens": tokens},
            "baseline": baseline,
            "formats": [],
        }
        after_each(result)
        for item in formats:
            bar.set_description(item.name)
            begin, started = bar.n, time.perf_counter()
            gc.collect()
            torch.cuda.empty_cache()  # does nothing without a GPU
            entry = {"format": item.name, "library": library(item), "bits": item.bits}
            entry |= _measure_format(item, load, request, rows, baseline["loss"], parameters, evaluate, bar.update)
            if entry["status"] == "refused":
                entry["reason"] += odd_layers
            result["formats"].append(entry | {"seconds": round(time.perf_counter() - started, 3)})
            bar.update(begin + len(rows) - bar.n)
            after_each(result)
    finally:
        bar.close()
    return result


def _measure_format(
    item: Format,
    load: Callable[..., LoadedModel],
    request: Request,
    rows: Sequence[dict[str, Tensor]],
    baseline: float,
    parameters: int,
    evaluate: Callable[[LoadedModel], dict[str, Any]] | None,
    advance: Callable[[int], Any],
) -> dict[str, Any]:
    if reason := missing(item):
        return {"status": "missing", "reason": reason}
    try:
        loaded = load_quantized(item, load, request)
        storage = quantized_storage(loaded.model)
        if not storage.weights:
            raise QuantizationRefused("nothing was quantized: every linear layer holds floats")
        try:
            loss, _ = token_loss(loaded.model, rows, advance)
        except Exception as error:  # a layer that loads may have no kernel for this device or type
            raise QuantizationRefused(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    except QuantizationRefused as error:
        return {"status": "refused", "reason": str(error)}
    return {
        "status": "measured",
        "bits_per_weight": 8 * storage.bytes / storage.weights,
        "quantized_share": storage.weights / parameters,
        "in_float": storage.in_float,
        "loss": loss,
        "perplexity": perplexity(loss),
        "loss_increase": loss - baseline,
        "tasks": evaluate(loaded) if evaluate else {},
    }


def token_loss(
    model: PreTrainedModel, rows: Sequence[dict[str, Tensor]], advance: Callable[[int], Any] = lambda count: None
) -> tuple[float, int]:
    """Mean negative log likelihood, nats, over every token of `rows` but the first of a document; and their number.

    Log-probabilities are float32 whatever the model computes in, and are summed in float64.

    Args:
        rows: batches of input_ids and position_ids [B, T], without padding.

    Raises:
        CheckpointError: the architecture takes no positions, so that documents in a row would see each other.
        DataError: no document has a second token.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise CheckpointError(
            f"{type(model).__name__} takes no position_ids, so the documents of a row cannot be kept apart."
        )
    total, count = torch.zeros((), dtype=torch.float64), 0
    with torch.no_grad():  # not inference_mode, which quanto's tensors do not bear
        for batch in rows:
            input_ids, position_ids = (batch[name].to(model.device) for name in ("input_ids", "position_ids"))
            # Without a mask and a cache, transformers derives from the positions what may see what.
            logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits[:, :-1]
            targets = input_ids.masked_fill(document_begins(position_ids), -100)[:, 1:]
            losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
            total += losses.double().sum().cpu()
            count += int((targets != -100).sum())
            advance(1)
    if not count:
        raise DataError("no document has a second token to predict. Give longer rows or other text.")
    return (total / count).item(), count


def perplexity(loss: float) -> float:
    """exp(loss); a NaN stays one, and what is beyond floats is infinite."""
    return math.inf if loss > _LARGEST_EXPONENT else math.exp(loss)


def quantized_storage(model: nn.Module) -> Storage:
    """Look into every linear layer but the output: a quantized one keeps integers and no float copy of its weight.

    Works for the layers of any library: it follows tensors within tensors, and state beside them.
    """
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    weights = stored = 0
    in_float = []
    for name, layer in _linear_layers(model):
        if layer is output:
            continue
        size = layer.in_features * layer.out_features
        tensors = {
            tensor.data_ptr(): tensor
            for key, value in _state(layer)
            if key != "bias"
            for tensor in _tensors(value, {})
        }.values()
        has_integers = any(not tensor.is_floating_point() and tensor.nbytes * 8 >= size for tensor in tensors)
        if has_integers and not any(tensor.is_floating_point() and tensor.numel() >= size for tensor in tensors):
            weights += size
            stored += sum(tensor.nbytes for tensor in tensors)
        else:
            in_float.append(name)
    return Storage(weights, stored, in_float)


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers of any library that say how many features go in and out."""
    for name, layer in model.named_modules():
        if isinstance(getattr(layer, "in_features", None), int) and isinstance(layer.out_features, int):
            yield name, layer


def _state(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """Parameters, buffers and other attributes of the layer itself, by name."""
    yield from layer.named_parameters(recurse=False, remove_duplicate=False)
    yield from layer.named_buffers(recurse=False, remove_duplicate=False)
    yield from ((name, value) for name, value in vars(layer).items() if name not in _EVERY_MODULE)


def _tensors(value: Any, seen: dict[int, Any]) -> Iterator[Tensor]:
    """Plain tensors that `value` holds: inner tensors of subclasses, attributes, entries. Not those of modules."""
    if id(value) in seen or isinstance(value, nn.Module | type):
        return
    seen[id(value)] = value
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        inner: Any = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    else:
        if isinstance(value, Tensor):
            yield value
        inner = list(value.values()) if isinstance(value, dict) else value
        inner = list(vars(inner).values()) if hasattr(inner, "__dict__") else inner
    for item in inner if isinstance(inner, list | tuple) else ():
        yield from _tensors(item, seen)


def _odd_layers(model: nn.Module) -> str:
    """Layers that no group or tile of a library fits, for the reason of a refusal."""
    odd = [
        f"{name} {layer.in_features} x {layer.out_features}"
        for name, layer in _linear_layers(model)
        if layer.in_features % _TILE or layer.out_features % _TILE
    ]
    return f" ({len(odd)} layers have sizes that are no multiples of {_TILE}, for instance {odd[0]})" if odd else ""
