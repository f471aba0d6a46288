"""Dense attention maps of a few heads on one short text, for display."""

from collections.abc import Sequence
from typing import Any

import torch

from hf_softpick.analysis.loading import LoadedModel
from hf_softpick.errors import CheckpointError, DataError, RecipeError
from hf_softpick.modeling.compat import attention_of
from hf_softpick.modeling.configuration_softpick import SoftpickConfig
from hf_softpick.modeling.normalizers import NORMALIZERS

DEFAULT_TEXT = 'def area(width, height):\n    """Return the area."""\n    return width * height\n'
MAX_TOKENS = 48


@torch.no_grad()
def attention_maps(
    loaded: LoadedModel,
    text: str = DEFAULT_TEXT,
    heads: Sequence[tuple[int, int]] | None = None,
    statistics: dict[str, Any] | None = None,
    max_tokens: int = MAX_TOKENS,
) -> dict[str, Any]:
    """Weights of chosen heads on `text`, which begins with BOS exactly if the model was trained so.

    Args:
        heads: (layer, head) pairs from 0. Default: the head with the most attention to the first token, and that with
            the median, by `statistics` (the content of statistics.json) or else on this text.
        max_tokens: the text is cut there, and the result says so.

    Returns:
        {"text", "tokens": T strings, "cut": bool, "chosen_by", "maps": [{"layer", "head", "why", "weights": T rows of
        growing length (the visible keys), "row_mass": T, "first_mass": mean weight of the first token}]}. Weights keep
        4 significant digits; 0 means exactly 0.

    Raises:
        DataError: the text has fewer than two tokens. RecipeError: there is no such head.
        CheckpointError: the model returns no attention weights.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = tokenizer(text).input_ids
    if len(ids) < 2:
        raise DataError(f"the text {text!r} has {len(ids)} tokens; give one with at least 2")
    cut, ids = len(ids) > max_tokens, ids[:max_tokens]
    attention = attention_of(model.config)
    own = model.config.model_type == SoftpickConfig.model_type or attention in NORMALIZERS
    if not own and attention != "eager":
        # sdpa and flash attention do not return weights.
        model.set_attn_implementation("eager")
    found = model(torch.tensor([ids], device=model.device), output_attentions=True, use_cache=False).attentions
    if not found or any(layer is None for layer in found):
        raise CheckpointError(f"{loaded.name} ({type(model).__name__}) returns no attention weights")
    maps = torch.stack([layer[0].double().cpu() for layer in found])  # [L, H, T, T]
    chosen_by = "given"
    if heads is None:
        chosen_by, first = "this text", maps[..., 0].mean(-1)
        if statistics and statistics.get("layers"):
            chosen_by = "statistics.json"
            # float reads "nan" too.
            first = torch.tensor([[float(x) for x in layer["heads"]["first_mass"]] for layer in statistics["layers"]])
            if first.shape != maps.shape[:2]:
                raise CheckpointError(
                    f"statistics.json of {loaded.name} is of a model with {tuple(first.shape)} layers and heads, this "
                    f"one has {tuple(maps.shape[:2])}. Measure again."
                )
        heads, reasons = _typical(first)
    else:
        reasons = ["chosen"] * len(heads)
    layers, per_layer = maps.shape[:2]
    for layer, head in heads:
        if not (0 <= layer < layers and 0 <= head < per_layer):
            raise RecipeError(
                f"{loaded.name} has no head {layer}.{head}: layers are 0 to {layers - 1}, heads 0 to {per_layer - 1}"
            )
    return {
        "text": text,
        "tokens": [tokenizer.decode([token]) for token in ids],
        "cut": cut,
        "chosen_by": chosen_by,
        "maps": [
            {
                "layer": layer,
                "head": head,
                "why": why,
                "weights": [[_short(w) for w in row[: i + 1]] for i, row in enumerate(maps[layer, head].tolist())],
                "row_mass": [_short(x) for x in maps[layer, head].sum(-1).tolist()],
                "first_mass": _short(maps[layer, head, :, 0].mean().item()),
            }
            for (layer, head), why in zip(heads, reasons, strict=True)
        ],
    }


def _typical(first: torch.Tensor) -> tuple[list[tuple[int, int]], list[str]]:
    """The heads with the largest and the median attention to the first token, [L, H]."""
    order = first.nan_to_num(-1.0).flatten().argsort(descending=True, stable=True).tolist()
    chosen = dict.fromkeys((order[0], order[len(order) // 2]))
    reasons = ["most attention to the first token", "median attention to the first token"]
    return [divmod(index, first.shape[1]) for index in chosen], reasons[: len(chosen)]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
