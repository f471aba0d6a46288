"""A model of another architecture is proven to compute its normalizer, or refused: nothing is believed by its name."""

import pytest
import torch
from tiny_foreign import foreign_model
from transformers.models.llama import modeling_llama

from hf_softpick.modeling.proving import prove_causal, prove_normalizer

PROVEN = ["llama", "gemma3_text", "gpt2", "gpt_neox", "opt", "diffllama", "qwen2_moe"]
HYBRID = ["bamba", "jamba", "lfm2", "qwen3_next", "zamba2"]
NONE_CALLED = "0 of its 2 attention layers call the registered attention"
READS_MASK = "reads it by itself, so not all of its attention goes through transformers' AttentionInterface"
REFUSED = {
    "bloom": READS_MASK,
    "codegen": READS_MASK,
    "xglm": READS_MASK,
    "openai-gpt": NONE_CALLED,
    "xlnet": NONE_CALLED,
    "rwkv": NONE_CALLED,
    "mamba": "0 of its 0 attention layers",
    "mpt": "AttributeError",
    "bert": "not causal",
    "gemma2": "softcap",
}


@pytest.mark.parametrize("family", [*PROVEN, *HYBRID])
def test_families_that_run_our_attention_are_proven(family):
    """Hybrid models have fewer attention layers than layers. Mode and random state stay as they were; no token is used
    that means something to the model."""
    model, seen = foreign_model(family, "softpick", eos_token_id=[62, 63], bos_token_id=61), set()
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.update(args[0].flatten().tolist()))
    model.register_forward_hook(lambda *_: torch.rand(1) and None)
    before = torch.random.get_rng_state()
    prove_normalizer(model, "softpick")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert len(seen) == 14 and not seen & {61, 62, 63}


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_run_something_else_are_refused(family):
    model = foreign_model(family, "softpick")
    with pytest.raises(ValueError, match=REFUSED[family]) as caught:
        prove_normalizer(model, "softpick")
    assert f"{type(model).__name__} cannot run with normalizer 'softpick'" in str(caught.value)


def test_one_layer_of_its_own_is_found(monkeypatch):
    """A softmax in one layer of two, or beside ours, and a layer without any attention."""
    model, own = foreign_model("llama", "softpick"), foreign_model("llama", "eager")
    beside = model.model.layers[0].self_attn.register_forward_hook(
        lambda *_: bool(torch.zeros(13).softmax(-1).sum() < 0) or None
    )
    with pytest.raises(ValueError, match="2 of its 2 .* registered attention, and aten::_softmax ran beside it"):
        prove_normalizer(model, "softpick")
    beside.remove()
    model.model.layers[1].self_attn = own.model.layers[1].self_attn
    with pytest.raises(ValueError, match=READS_MASK):
        prove_normalizer(model, "softpick")
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", lambda _, q, *a, **k: (q.transpose(1, 2), None))
    with pytest.raises(ValueError, match="1 of its 2 attention layers call the registered attention. Use"):
        prove_normalizer(model, "softpick")


@pytest.mark.parametrize("normalizer", ["softpick", "softmax"])
def test_a_model_that_sees_later_tokens_is_refused(normalizer):
    """Encoders are among transformers' causal models, and train without a word on what they shall predict."""
    if normalizer == "softmax":
        model, prove = foreign_model("bert"), prove_causal
    else:
        model = foreign_model("llama", "softpick")
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda _, args, out: out + out.roll(-1, 1))
        prove = lambda model: prove_normalizer(model, "softpick")  # noqa: E731
    with pytest.raises(ValueError, match="its tokens see later ones"):
        prove(model)
    prove_causal(foreign_model("bloom"))


def test_without_an_effect_nothing_is_proven():
    """Calls alone prove nothing where their result is thrown away."""
    model = foreign_model("llama", "softpick")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    with pytest.raises(ValueError, match="same with softmax"):
        prove_normalizer(model, "softpick")
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(ValueError, match="its logits are not finite"):
        prove_normalizer(model, "softpick")
