"""Which description of the visible keys a model's call hands to the kernels, forward and backward: rows by a band read
no tensor, packed ones read int32 intervals."""

import pytest
import torch
from tiny_foreign import foreign_model
from tiny_softpick import tiny_model, tokens

from hf_softpick.modeling import attention_triton

LENGTH = 12


def model_of(kind: str, window: int | None):
    if kind == "llama":
        family, changes = ("llama", {}) if window is None else ("mistral", {"sliding_window": window})
        return foreign_model(family, "softpick", num_attention_heads=2, num_key_value_heads=1, **changes)
    return tiny_model("scaled_softpick", "triton", num_attention_heads=2, num_key_value_heads=1, sliding_window=window)


def inputs(case: str) -> dict:
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {
        "plain": {},
        "numbered": {"position_ids": torch.arange(LENGTH).expand(2, -1)},
        "window": {},
        "packed": {"position_ids": torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)},
        "padded": {"attention_mask": mask},
        "explicit": {"attention_mask": torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()},
    }[case] | {"input_ids": ids, "labels": ids, "use_cache": False}


@pytest.fixture
def seen(monkeypatch):
    """(pass, description) of each call of the kernels."""
    calls = []
    for name in ("attention_forward", "attention_backward"):
        run = getattr(attention_triton, name)

        def recorded(*arguments, name=name, run=run, **named):
            (visible,) = (x for x in arguments if isinstance(x, attention_triton.Visible))
            calls.append((name.removeprefix("attention_"), visible))
            return run(*arguments, **named)

        monkeypatch.setattr(attention_triton, name, recorded)
    # On CPU "auto" leaves the interpreter alone; models of other architectures know no other name.
    monkeypatch.setattr("hf_softpick.modeling.attention_interface.resolve_auto", lambda *_: "triton")
    return calls


@pytest.mark.parametrize("kind", ["ours", "llama"])
@pytest.mark.parametrize("case", ["plain", "numbered", "window", "packed", "padded", "explicit"])
def test_what_the_kernels_are_told(case, kind, seen):
    window = 5 if case == "window" else None
    model_of(kind, window).train()(**inputs(case)).loss.backward()
    assert [name for name, _ in seen] == ["forward"] * 2 + ["backward"] * 2
    for _, visible in seen:
        # Our model does not wait for the device to learn that numbered tokens are one document; transformers does.
        intervals = case in ("packed", "padded") or (case == "numbered" and kind == "ours")
        given = {"start", "end"} if intervals else set()
        given |= {"keys"} if case == "padded" else {"mask"} if case == "explicit" else set()
        assert {name for name in ("start", "end", "keys", "mask") if getattr(visible, name) is not None} == given
        if "start" in given:
            assert visible.start.dtype == visible.end.dtype == torch.int32
        if not given:
            left = -1 if window is None else window - 1
            assert (visible.causal, visible.offset, visible.window) == (True, 0, (left, -1))
