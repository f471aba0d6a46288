"""Proof that a model of another architecture computes what is believed of it, by running it once on a few tokens.

Not part of the Hub code of checkpoints: our own model needs no proof.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_interface import attention_forward
from .compat import TorchDispatchMode, attention_of, is_sharded
from .normalizers import NORMALIZERS

LENGTH, FIRST = 13, 5  # a row, and the first of its two documents; nothing else in a model has 13 elements
_WITHOUT_ATTENTION = {"linear_attention", "mamba", "conv", "recurrent", "moe", "mlp", "sparse", "dense"}


def prove_normalizer(model: PreTrainedModel, normalizer: str) -> None:
    """Every attention layer of `model`, loaded with the attn_implementation of that name, computes `normalizer` alone.

    Runs two short batches, and leaves mode, gradients and random state as they were. Under ZeRO-3 every rank calls it.

    Raises:
        ValueError: a layer runs an attention of its own, a later token is seen, or nothing would differ from softmax.
    """
    calls, other, config = [], _OtherAttention(), model.config.get_text_config(decoder=True)

    def recorded(module, *args, **kwargs):
        calls.append(module)
        with other.paused():
            # Its own configuration would refuse the counter-check.
            asked = module if computed == normalizer else nn.Module()
            return attention_forward(asked, *args, **kwargs | {"name": computed})

    with _running(model, normalizer) as rows:
        ALL_ATTENTION_FUNCTIONS[attention_of(config)] = recorded
        try:
            computed = normalizer
            with other:
                logits = _logits(model, rows)
            layers, called = attention_layers(config), len(set(calls))
            # A layer may call it twice (Diffllama), or be run twice (Zamba 2).
            if other.seen or not calls or layers not in (called, len(calls)):
                also = f", and {', '.join(sorted(other.seen))} ran beside it" if other.seen else ""
                raise ValueError(f"{called} of its {layers} attention layers call the registered attention{also}")
            _check_causal(logits)
            computed = "softmax"
            if torch.equal(_logits(model, rows), logits):
                raise ValueError("its logits are the same with softmax")
        finally:
            del ALL_ATTENTION_FUNCTIONS[attention_of(config)]


def prove_causal(model: PreTrainedModel) -> None:
    """No token of `model`, which computes softmax its own way, sees a later one; otherwise as `prove_normalizer`."""
    with _running(model, "softmax") as rows:
        _check_causal(_logits(model, rows))


def isolates_documents(model: PreTrainedModel, normalizer: str) -> bool:
    """Whether each document of a packed row, whose position_ids restart, has the logits that it has alone.

    Raises:
        ValueError: as `prove_normalizer`, which must have passed.
    """
    with _running(model, normalizer) as rows:
        row, whole = rows[:1], torch.arange(LENGTH, device=rows.device)
        packed = torch.cat([whole[:FIRST], whole[:-FIRST]])
        both = _logits(model, row.expand(2, -1), position_ids=torch.stack([packed, whole]))
        alone = torch.cat([both[1, :FIRST], _logits(model, row[:, FIRST:])[0]])
        return not _differ(both[0], alone)


def refusal(model: str, normalizer: str, error: Exception) -> ValueError:
    """The one message of a model that cannot be trained or measured with `normalizer`, because of `error`."""
    reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    if isinstance(error, KeyError) and error.args == (normalizer,):
        reason = "it has a fixed list of attentions"  # Falcon, GPT-J and others
    elsewhere = "" if NORMALIZERS[normalizer].is_plain_softmax else "normalizer 'softmax', or "
    return ValueError(
        f"{model} cannot run with normalizer {normalizer!r}: {reason.rstrip('.')}. Use {elsewhere}a decoder whose "
        "attention goes through transformers' AttentionInterface (Llama, Qwen, Mistral, Gemma 3, GPT-2, most others)."
    )


@contextlib.contextmanager
def _running(model: PreTrainedModel, normalizer: str) -> Iterator[Tensor]:
    """Yields int64 [2, LENGTH], rows that differ in the last token; whatever is raised names the model."""
    device, was_training = model.device, model.training
    with (
        torch.no_grad(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        _gathered(model),
    ):
        model.eval()
        try:
            yield _rows(model).to(device)
        except Exception as error:  # any architecture may stop anywhere in a call that it was not written for
            raise refusal(type(model).__name__, normalizer, error) from error
        finally:
            model.train(was_training)


def _rows(model: PreTrainedModel) -> Tensor:
    """Ordinary tokens: that of an image, for instance, asks for an image."""
    config = model.config.get_text_config(decoder=True)
    named = [value for key, value in config.to_dict().items() if key.endswith(("token_id", "token_index"))]
    special = {token for value in named for token in (value if isinstance(value, list) else [value])}
    tokens = [token for token in range(min(config.vocab_size, 1000)) if token not in special]
    row = (tokens * LENGTH)[-LENGTH - 1 :]
    return torch.tensor([row[1:], [*row[1:-1], row[0]]])


@contextlib.contextmanager
def _gathered(model: PreTrainedModel) -> Iterator[None]:
    """Whole weights for each module while it runs, where ZeRO-3 has sharded them and no engine gathers them yet."""
    if not any(map(is_sharded, model.parameters())):
        yield
        return
    import deepspeed

    open_ = {}

    def enter(module, _):
        open_.setdefault(module, []).append(deepspeed.zero.GatheredParameters(list(module.parameters(recurse=False))))
        open_[module][-1].__enter__()

    def leave(module, *_):
        open_[module].pop().__exit__(None, None, None)

    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    hooks = [m.register_forward_pre_hook(enter) for m in owners] + [m.register_forward_hook(leave) for m in owners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def attention_layers(config: PreTrainedConfig) -> int:
    """Layers with an attention; hybrid models have others."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if kinds is None:
        return config.num_hidden_layers
    return sum(kind not in _WITHOUT_ATTENTION for kind in kinds)


class _OtherAttention(TorchDispatchMode):
    """Names of the operators that weigh the keys of a row outside of `paused`."""

    def __init__(self):
        super().__init__()
        self.seen, self.watching = set(), True

    @contextlib.contextmanager
    def paused(self):
        self.watching = False
        try:
            yield
        finally:
            self.watching = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.name()
        softmax = "softmax" in name and isinstance(out, Tensor) and out.shape[-1] == LENGTH
        if self.watching and (softmax or "attention" in name or "attn" in name):
            self.seen.add(name.split(".")[0])
        return out


def _logits(model: PreTrainedModel, rows: Tensor, **kwargs) -> Tensor:
    logits = model(input_ids=rows, use_cache=False, **kwargs).logits
    if not torch.isfinite(logits).all():
        raise ValueError("its logits are not finite")
    return logits


def _check_causal(logits: Tensor) -> None:
    if _differ(logits[0, :-1], logits[1, :-1]):
        raise ValueError("its tokens see later ones")


def _differ(a: Tensor, b: Tensor) -> bool:
    """Beyond rounding, which stays below 2e-6 of the largest logit in float32 for all causal models of transformers.
    What really leaks moves logits of random weights by more than 1e-4 of it."""
    tolerance = 3e-5 if a.dtype == torch.float32 else 3e-2
    return bool((a - b).abs().max() > tolerance * a.abs().max())
