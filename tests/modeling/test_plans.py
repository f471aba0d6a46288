"""The plans that parallel engines read: Llama's, with what is ours; what two processes compute and save by them."""

import re

import pytest
import torch
from tiny_softpick import NORMALIZERS, SIZES, tiny_config, tiny_model, tokens
from torch.distributed.tensor import DTensor, Shard
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification
from transformers.distributed import DistributedConfig
from two_processes import start_group

from hf_softpick import SoftpickForCausalLM, SoftpickForTokenClassification

PLANS = ("tp_plan", "pp_plan", "fsdp_plan")
# Normalizer, key heads of 4, and what else: every normalizer that has parameters of its own, and one that has none.
CASES = [
    ("softpick", 2, {"attention_bias": True}),
    ("scaled_softpick", 2, {"tie_word_embeddings": True}),
    ("scaled_softpick", 4, {"attention_bias": True, "sliding_window": 5}),
    ("softmax", 4, {"tie_word_embeddings": True}),
]


@pytest.mark.parametrize(
    "heads", [(SoftpickForCausalLM, LlamaForCausalLM), (SoftpickForTokenClassification, LlamaForTokenClassification)]
)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_plans_are_llamas_and_cover_what_is_ours(normalizer, heads):
    """A parameter of ours that no plan names fails here; so does a name of a plan that no module has."""
    ours = heads[0](tiny_config(normalizer, tie_word_embeddings=True))
    theirs = heads[1](LlamaConfig(**SIZES, tie_word_embeddings=True))
    names, llamas = (
        {re.sub(r"\.\d+", ".*", name) for name, _ in (*model.named_modules(), *model.named_parameters())}
        for model in (ours, theirs)
    )
    own = names - llamas
    assert not llamas - names
    assert own == ({"model.layers.*.self_attn.head_scale"} if normalizer.startswith("scaled_") else set())
    assert ours.tp_plan == {**theirs.tp_plan, **dict.fromkeys(own, "colwise")}
    assert ours.pp_plan == theirs.pp_plan and ours.fsdp_plan == theirs.fsdp_plan
    assert all(set(getattr(ours, plan)) <= names for plan in PLANS)
    assert ours.supports_tp_plan and ours.supports_pp_plan


def _load_both(folder, **sizes):
    one = SoftpickForCausalLM.from_pretrained(folder)
    return one, SoftpickForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes))


def _generate(model, ids):
    return model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)


def _tensor_parallel(rank: int, folders: list[str]) -> None:
    ids = tokens(2, 11)
    for folder in folders:
        one, split = _load_both(folder, tp_size=2, tp_plan="auto")
        expected, out = one(ids, labels=ids), split(ids, labels=ids)
        torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-5)
        expected.loss.backward()
        out.loss.backward()
        for (name, parameter), part in zip(one.named_parameters(), split.parameters(), strict=True):
            gradient = part.grad.full_tensor() if isinstance(part, DTensor) else part.grad
            torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-5, msg=f"{folder}: {name}")
            if "head_scale" in name:
                assert part.placements == (Shard(0),)
                assert torch.equal(part.to_local(), parameter[2 * rank : 2 * rank + 2])
        assert torch.equal(_generate(split, ids), _generate(one, ids))
        split.save_pretrained(f"{folder}/saved")
        torch.distributed.barrier()
        saved = SoftpickForCausalLM.from_pretrained(f"{folder}/saved")
        torch.testing.assert_close(saved.state_dict(), one.state_dict(), atol=0, rtol=0)


def _pipeline(rank: int, folders: list[str]) -> None:
    """Decoding as well: the caches of the layers that lie on the other stage stay empty."""
    ids = tokens(2, 11)
    for folder in folders:
        one, stage = _load_both(folder, pp_size=2)
        with torch.no_grad():
            assert torch.equal(stage(ids).logits, one(ids).logits)
            assert torch.equal(_generate(stage, ids), _generate(one, ids))


@pytest.mark.parametrize("check", [_tensor_parallel, _pipeline])
def test_two_processes_compute_what_one_does(check, tmp_path):
    """transformers' own sharding by the plans, on CPU."""
    folders = [str(tmp_path / str(i)) for i in range(len(CASES))]
    for (normalizer, key_heads, more), folder in zip(CASES, folders, strict=True):
        model = tiny_model(normalizer, num_key_value_heads=key_heads, **more)
        for name, parameter in model.named_parameters():
            if "bias" in name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(folder)
    start_group(check, (folders,))
