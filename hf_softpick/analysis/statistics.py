"""All statistics of a model from one forward pass over each batch: attention by head, activations by layer."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_softpick.analysis.activation_statistics import MASSIVE_RATIO, MASSIVE_VALUE, ActivationStatistics
from hf_softpick.analysis.attention_rows import SMALL, AttentionCall, attention_rows
from hf_softpick.analysis.attention_statistics import (
    DORMANT_MASS,
    MIN_SINK_TOKENS,
    SINK_EPSILON,
    SINK_EPSILONS,
    AttentionStatistics,
    documents_of,
)
from hf_softpick.analysis.watching import PARTS, decoder_blocks, watch

THRESHOLDS = {
    "sink": list(SINK_EPSILONS),
    "small_weight": SMALL,
    "dormant_mass": DORMANT_MASS,
    "massive_value": MASSIVE_VALUE,
    "massive_ratio": MASSIVE_RATIO,
}
KINDS = ("first", "first4", "any")
SIZES = ("rows", "sequences", "tokens", "row_length", "sink_sequences", "min_sink_tokens")


class ModelStatistics:
    """Statistics of one model over any number of batches, mergeable over ranks.

    Args:
        layers: number of decoder layers.
        min_sink_tokens: sequences shorter than this do not count for sinks.
    """

    def __init__(self, layers: int, min_sink_tokens: int = MIN_SINK_TOKENS) -> None:
        self.min_sink_tokens = min_sink_tokens
        self.attention = [AttentionStatistics(min_sink_tokens) for _ in range(layers)]
        self.outputs = [{part: ActivationStatistics() for part in PARTS} for _ in range(layers)]
        self.rows = self.tokens = self.sequences = self.sink_sequences = 0
        self.row_length = 0

    def add(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
        """Run one batch through the decoder and look into it.

        Args:
            inputs: input_ids int64 [B, T], and optionally position_ids (packed documents) or attention_mask
                (0 = padding). On the device of the model.

        Raises:
            ValueError: the model's attention cannot be watched, or its layers changed; the message names the reason.
        """
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        real = None if mask is None or bool(mask.all()) else mask.bool()
        documents = documents_of(*ids.shape, inputs.get("position_ids"), real, ids.device)
        calls = [0] * len(self.attention)

        def on_attention(layer: int, call: AttentionCall) -> None:
            calls[layer] += 1
            rows = attention_rows(call, documents.real)
            if bool((rows.visible > documents.position[:, None] + 1).any()):
                raise ValueError(
                    f"{type(model).__name__} lets packed documents see each other. Give rows of one document each."
                )
            self.attention[layer].add(rows, documents)

        def on_output(layer: int, part: str, output: Tensor) -> None:
            rows = output.view(*ids.shape, -1) if output.ndim == 2 else output  # experts work on tokens without rows
            self.outputs[layer][part].add(rows, documents.real, self.rows)

        arguments = {name: value for name, value in inputs.items() if name in ("input_ids", "position_ids")}
        if real is not None:
            arguments["attention_mask"] = mask
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        size = int(documents.length.max()) if documents.count else 0
        if longest is not None and size > longest:
            raise ValueError(f"a document has {size} tokens, the model reads {longest}.")
        if int(ids.max()) >= model.get_input_embeddings().num_embeddings:
            raise ValueError(
                f"token {int(ids.max())} is beyond the model's {model.get_input_embeddings().num_embeddings}: the "
                "tokenizer is not that of the model."
            )
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with torch.no_grad(), watch(model, on_attention, on_output) as blocks:
                if len(blocks) != len(self.attention):
                    raise ValueError(f"the model has {len(blocks)} layers, expected {len(self.attention)}")
                # The backbone alone: logits of a long row would be its largest tensor.
                model.base_model(**arguments, use_cache=False)
        finally:
            for module, training in modes.items():
                module.training = training
        if set(calls) != {1}:
            layer = next(layer for layer, count in enumerate(calls) if count != 1)
            raise ValueError(
                f"attention of layer {layer} was seen {calls[layer]} times in one forward pass of "
                f"{type(model).__name__}, expected once: it does not go through transformers' attention interface."
            )
        self.rows += ids.shape[0]
        self.row_length = max(self.row_length, ids.shape[1])
        self.sequences += documents.count
        self.sink_sequences += int((documents.length >= self.min_sink_tokens).sum())
        self.tokens += int(documents.length.sum())

    def merge(self, other: "ModelStatistics") -> None:
        """Add what another rank has seen."""
        for mine, theirs in zip(self.attention, other.attention, strict=True):
            mine.merge(theirs)
        for mine, theirs in zip(self.outputs, other.outputs, strict=True):
            for part in PARTS:
                mine[part].merge(theirs[part])
        self.row_length = max(self.row_length, other.row_length)
        for name in ("rows", "tokens", "sequences", "sink_sequences"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def sink_rates(self) -> dict[str, dict[str, float]]:
        """Share of (sequence, layer, head) above each epsilon; "nan" where no sequence is long enough."""
        counts, total = zip(*(layer.sink_counts() for layer in self.attention), strict=True)
        rates = torch.stack(counts).sum(0) / (sum(total) or math.nan)
        names = list(map(str, SINK_EPSILONS))
        return {kind: dict(zip(names, row, strict=True)) for kind, row in zip(KINDS, rates.tolist(), strict=True)}

    def nonfinite(self) -> list[dict[str, Any]]:
        """Layers and parts with NaN or Inf, in the order of the forward pass."""
        return [
            {"layer": layer, "where": part, "count": parts[part].nonfinite}
            for layer, parts in enumerate(self.outputs)
            for part in ("attention", "mlp", "hidden")
            if parts[part].nonfinite
        ]

    def summary(self) -> dict[str, float]:
        """The scalars: means over layers and heads, extremes over layers, counts over the model."""
        heads = [layer.result() for layer in self.attention]
        hidden = [parts["hidden"].result() for parts in self.outputs]
        return _summary(heads, hidden, self.sink_rates())

    def result(self, tokenizer: PreTrainedTokenizerBase | None = None, rows: Sequence[Tensor] = ()) -> dict[str, Any]:
        """Everything, as plain values.

        Args:
            tokenizer, rows: to name the tokens at the largest values; rows are the input_ids in the order of `add`.

        Returns:
            data (sample sizes), thresholds, sink_rate, summary, layers and nonfinite, as statistics.json holds them.
        """
        heads = [layer.result() for layer in self.attention]
        outputs = [
            {part: each.result() if each.tokens else None for part, each in parts.items()} for parts in self.outputs
        ]
        rates = self.sink_rates()
        for parts in outputs:
            for part in filter(None, parts.values()):
                for place in filter(None, [part["largest"], *part["massive_at"]]):
                    place["token"] = _token(tokenizer, rows, place)
        return {
            "data": {name: getattr(self, name) for name in SIZES},
            "thresholds": THRESHOLDS,
            "sink_rate": rates,
            "summary": _summary(heads, [parts["hidden"] for parts in outputs], rates),
            "layers": [
                {"layer": layer, "heads": by_head, **parts}
                for layer, (by_head, parts) in enumerate(zip(heads, outputs, strict=True))
            ],
            "nonfinite": self.nonfinite(),
        }


def measure(
    model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], min_sink_tokens: int = MIN_SINK_TOKENS
) -> ModelStatistics:
    """Statistics of `model` over `batches`; arguments and errors as for `ModelStatistics`."""
    statistics = ModelStatistics(len(decoder_blocks(model)), min_sink_tokens)
    for inputs in batches:
        statistics.add(model, {name: value.to(model.device) for name, value in inputs.items()})
    if not statistics.tokens:
        raise ValueError("there is no token to measure")
    return statistics


def _summary(heads: list[dict], hidden: list[dict], rates: dict[str, dict[str, float]]) -> dict[str, float]:
    """NaN is neither left out of a mean nor of an extreme."""

    def mean(name: str) -> float:
        values = [value for layer in heads for value in layer[name]]
        return sum(values) / len(values)

    kurtosis = [layer["kurtosis"] for layer in hidden]
    epsilon = str(SINK_EPSILON)
    names = ("sparsity", "sparsity_small", "empty_tiles_64", "empty_tiles_128", "row_mass", "empty_rows")
    return {
        "sink_rate": rates["first"][epsilon],
        "sink_rate_first4": rates["first4"][epsilon],
        "sink_rate_any": rates["any"][epsilon],
        "first_mass": mean("first_mass"),
        **{name: mean(name) for name in (*names, "entropy", "distance")},
        "dormant_heads": sum(sum(layer["dormant"]) for layer in heads),
        "kurtosis": sum(kurtosis) / len(kurtosis),
        "kurtosis_max": float(np.max(kurtosis)),
        "hidden_max": float(np.max([layer["max"] for layer in hidden])),
        "hidden_min": float(np.min([layer["min"] for layer in hidden])),
        "massive_activations": sum(layer["massive"] for layer in hidden),
    }


def _token(tokenizer: PreTrainedTokenizerBase | None, rows: Sequence[Tensor], place: dict[str, Any]) -> str | None:
    if tokenizer is None or place["row"] >= len(rows):
        return None
    return tokenizer.decode([int(rows[place["row"]][place["position"]])])
