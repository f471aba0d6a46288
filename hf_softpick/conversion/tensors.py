"""Every tensor of a source and what becomes of it: moved, checked and dropped, or a reason to refuse."""

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_softpick.conversion.settings import ANCESTOR, Settings
from hf_softpick.errors import CheckpointError
from hf_softpick.modeling.normalizers import NORMALIZERS, OWN_PARAMETERS

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_NAMES = (
    (re.compile(r"model\.embeddings\.weight"), EMBEDDINGS),
    (re.compile(r"model\.layers\.(\d+)\.attn_norm\.weight"), r"model.layers.\1.input_layernorm.weight"),
    (re.compile(r"model\.layers\.(\d+)\.mlp_norm\.weight"), r"model.layers.\1.post_attention_layernorm.weight"),
    (re.compile(r"model\.layers\.(\d+)\.attn\.([qkvo]_proj)\.weight"), r"model.layers.\1.self_attn.\2.weight"),
    (re.compile(r"model\.layers\.(\d+)\.attn\.s"), r"model.layers.\1.self_attn.head_scale"),
    (re.compile(r"(model\.layers\.\d+\.mlp\.(?:gate|up|down)_proj\.weight)"), r"\1"),
    (re.compile(r"(model\.norm\.weight)"), r"\1"),
    (re.compile(r"(lm_head\.weight)"), r"\1"),
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_SIZES = "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim".split()
_LOG_LENGTHS = re.compile(r"model\.layers\.(\d+)\.attn\.logn")
_FREQUENCIES = re.compile(r"model\.layers\.(\d+)\.self_attn\.rotary_emb\.inv_freq")


class Plan(NamedTuple):
    """moves: name in the source -> name in the target. checked: derived tensors that must have the value that follows
    from the settings, and a tied head; none is stored. dropped: parameters that the chosen normalizer has no use for.
    created: names in the target that have no source, with their value."""

    moves: dict[str, str]
    checked: dict[str, str]
    dropped: dict[str, str]
    created: dict[str, float]


def check_sizes(found: dict[str, tuple[tuple[int, ...], torch.dtype]], settings: Settings) -> None:
    """Refuse sizes that no tensor of the source has, before a model of these sizes is built.

    Raises:
        CheckpointError: more layers than the names of the tensors have, or a size above the longest side of a tensor.
    """
    layers = len({match[1] for name in found if (match := _LAYER.match(name))})
    said = settings.config["num_hidden_layers"]
    if said > layers:
        raise CheckpointError(f"num_hidden_layers is {said}, but the source has tensors of {layers} layers.")
    longest = max((side for shape, _ in found.values() for side in shape), default=0)
    for key in _SIZES:
        size = settings.config.get(key)
        if isinstance(size, int) and size > longest:
            raise CheckpointError(f"{key} is {size}, but the longest side of a tensor in the source is {longest}.")


def make_plan(
    found: dict[str, tuple[tuple[int, ...], torch.dtype]], expected: dict[str, tuple], settings: Settings
) -> Plan:
    """A `Plan` for the tensors `found` (name -> shape and dtype) and the parameters `expected` (name -> shape).

    Raises:
        CheckpointError: a tensor that is not known, missing, or of another shape than the settings say.
    """
    plan = Plan({}, {}, {}, {})
    unknown = []
    for name in found:
        target = _target(name, settings)
        if _is_derived(name, settings):
            plan.checked[name] = "follows from the settings"
        elif target == HEAD and settings.config["tie_word_embeddings"]:
            plan.checked[name] = "equal to the embeddings (tied)"
        elif target in expected:
            plan.moves[name] = target
        elif _is_unused(target, expected, settings):
            plan.dropped[name] = f"{settings.config['normalizer']} has no {_last(target)}"
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors are not understood: {_some(unknown)}. Nothing is left out silently."
        )
    missing = sorted(set(expected) - set(plan.moves.values()))
    own, had = (NORMALIZERS[n].parameters for n in (settings.config["normalizer"], settings.source_normalizer))
    plan.created.update({name: own[_last(name)] for name in missing if _last(name) in own.keys() - had.keys()})
    missing = [name for name in missing if name not in plan.created]
    if missing:
        hint = " Its config says that head and embeddings are not tied." if missing == [HEAD] else ""
        raise CheckpointError(f"{len(missing)} parameters have no tensor in the source: {_some(missing)}.{hint}")
    for name, target in plan.moves.items():
        shape = found[name][0]
        allowed = [expected[target], (*expected[target], 1)] if is_own(target) else [expected[target]]
        if shape not in allowed:
            rule = ""
            if ".mlp." in name and settings.model_type == ANCESTOR:
                rule = f" (intermediate_size {settings.config['intermediate_size']}: config.json, or its rule)"
            raise CheckpointError(
                f"{name} has shape {list(shape)}, but its config.json means {list(expected[target])}{rule}. The "
                "weights belong to another configuration."
            )
    return plan


def _target(name: str, settings: Settings) -> str | None:
    if settings.model_type != ANCESTOR:
        return name
    return next((match.expand(target) for pattern, target in _NAMES if (match := pattern.fullmatch(name))), None)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def is_own(name: str) -> bool:
    """Whether a parameter of the target belongs to its normalizer: always float32."""
    return _last(name) in OWN_PARAMETERS


def _is_unused(target: str | None, expected: dict[str, tuple], settings: Settings) -> bool:
    """Whether the source's normalizer gave this parameter to a layer that exists, and the chosen one has none."""
    if target is None or _last(target) not in NORMALIZERS[settings.source_normalizer].parameters:
        return False
    layer_exists = f"{target.rpartition('.')[0]}.q_proj.weight" in expected
    return layer_exists and _last(target) not in NORMALIZERS[settings.config["normalizer"]].parameters


def _is_derived(name: str, settings: Settings) -> bool:
    ancestor = settings.model_type == ANCESTOR
    if ancestor and not NORMALIZERS[settings.source_normalizer].scaled:
        return False
    match = (_LOG_LENGTHS if ancestor else _FREQUENCIES).fullmatch(name)
    return match is not None and int(match[1]) < settings.config["num_hidden_layers"]


def check_derived(name: str, tensor: Tensor, settings: Settings) -> None:
    """Refuse a stored log(n) or table of frequencies with values other than the settings give, up to its own rounding.

    Raises:
        CheckpointError: the values differ: the source computes something else than it says.
    """
    if _LOG_LENGTHS.fullmatch(name):
        expected = torch.arange(2, tensor.numel() + 2, dtype=torch.float64).log()
        what = "log(position + 2)"
    else:
        rope = settings.config["rope_parameters"]
        if rope.get("rope_type", "default") != "default":
            raise CheckpointError(f"{name} is stored for rope_type {rope['rope_type']!r}, where it cannot be checked.")
        size = settings.config["head_dim"]
        expected = rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        what = f"the frequencies of rope_theta {rope['rope_theta']}"
    stored = tensor.flatten().double()
    rtol = 4 * max(torch.finfo(kind).eps for kind in (tensor.dtype, torch.float32))  # computed in float32 at best
    if stored.shape != expected.shape or not torch.allclose(stored, expected, rtol=rtol):
        raise CheckpointError(f"{name} does not hold {what}, so this model is not what its config.json says.")


def transform(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`tensor` in the shape and dtype of its target, contiguous, with memory of its own."""
    return tensor.reshape(shape).to(dtype, copy=True).contiguous()


def common_dtype(plan: Plan, found: dict[str, tuple[tuple[int, ...], Any]], wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of the result: `wanted`, else that of all moved tensors but the normalizer's own.

    Raises:
        CheckpointError: they have several.
    """
    kinds = {found[name][1] for name, target in plan.moves.items() if not is_own(target)}
    odd = [str(kind) for kind in kinds if not kind.is_floating_point]
    if odd:
        raise CheckpointError(f"the weights have the types {', '.join(odd)}, which are not floating.")
    if wanted is None and len(kinds) > 1:
        raise CheckpointError(
            f"the weights have several types ({', '.join(sorted(map(str, kinds)))}). Choose by --dtype."
        )
    return wanted or kinds.pop()


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
