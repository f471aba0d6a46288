"""The model of a run: always float32, never softmax by accident, foreign architectures included."""

import json

import pytest
import torch
from tiny_foreign import foreign_model
from training_runs import records, write_recipe
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_softpick.data.settings import TokenizerSettings
from hf_softpick.errors import RecipeError
from hf_softpick.modeling.configuration_softpick import SoftpickConfig
from hf_softpick.modeling.modeling_softpick import SoftpickForCausalLM
from hf_softpick.train import main
from hf_softpick.training.build import build_model
from hf_softpick.training.recipe_model import ModelSettings

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level BPE with 300 tokens."""
    from hf_softpick.data.preparing import prepare_data
    from hf_softpick.training.recipe import load_recipe

    recipe = load_recipe(write_recipe(tmp_path_factory.mktemp("tokenizer")))
    return prepare_data(recipe.data, TokenizerSettings(train_bpe=300), progress=False).tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama of somebody else, saved in bfloat16."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(vocab_size=300, num_key_value_heads=2, max_position_embeddings=64, **SIZES)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _settings(**fields):
    return ModelSettings.model_validate(fields, by_alias=True)


@pytest.mark.parametrize("normalizer", ["softpick", "scaled_softpick"])
@pytest.mark.parametrize("tied", [False, True])
def test_new_models_are_drawn_as_transformers_draws_them(tokenizer, normalizer, tied):
    """Building without the first draw must still initialise, tie and scale everything."""
    settings = _settings(normalizer=normalizer, tie_word_embeddings=tied, **SIZES)
    model = build_model(settings, tokenizer, seed=3)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
        elif "head_scale" in name:
            assert (parameter == 0.3).all()
        else:
            assert (parameter == 1).all(), name
    again, other = build_model(settings, tokenizer, seed=3), build_model(settings, tokenizer, seed=4)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    assert model.config.vocab_size == len(tokenizer) == 300


@pytest.fixture(scope="module")
def neox(tmp_path_factory):
    """An architecture whose weights do not fit our blocks, saved in bfloat16."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("neox")
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=300, **SIZES)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_foreign_model_runs_with_our_attention_in_float32(tokenizer, neox):
    """transformers would take dtype and attention from the saved configuration."""
    model = build_model(_settings(**{"from": str(neox), "normalizer": "softpick"}), tokenizer, seed=0)
    assert type(model) is GPTNeoXForCausalLM and model.dtype == torch.float32
    assert model.config._attn_implementation == "softpick"
    softmax = build_model(_settings(**{"from": str(neox), "normalizer": "softmax"}), tokenizer, seed=0)
    ids = torch.arange(3, 40)[None]
    assert (model(ids).logits - softmax(ids).logits).abs().max() > 1e-4


@pytest.mark.parametrize("sealed", [False, True])
def test_weights_that_fit_ours_become_a_model_of_ours(tokenizer, llama, tmp_path, sealed):
    """With the logits of the architecture's own class under softpick; also when another trainer saved it sealed."""
    own = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation="softpick")
    own.save_pretrained(tmp_path)
    source = {"from": str(tmp_path if sealed else llama)}
    model = build_model(_settings(**source, normalizer="softpick"), tokenizer, seed=0)
    assert type(model) is SoftpickForCausalLM and model.config.normalizer == "softpick"
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(model(ids).logits, own(ids).logits)
    scaled = build_model(_settings(**source, normalizer="scaled_softpick"), tokenizer, seed=0)
    assert (scaled.model.layers[1].self_attn.head_scale == 0.3).all()
    softmax = build_model(_settings(**source, normalizer="softmax"), tokenizer, seed=0)
    assert type(softmax) is LlamaForCausalLM and softmax.config._attn_implementation == "sdpa"


def test_going_on_from_our_own_model(tokenizer, tmp_path):
    """The recipe's normalizer wins over the saved one, and the weights are the saved ones."""
    config = SoftpickConfig(vocab_size=300, normalizer="softmax", **SIZES)
    saved = SoftpickForCausalLM._from_config(config)
    saved.save_pretrained(tmp_path)
    model = build_model(_settings(**{"from": str(tmp_path), "normalizer": "softpick"}), tokenizer, seed=0)
    assert model.config.normalizer == "softpick"
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"normalizer": "scaled_softpick"}, "parameters of its own"),
        ({"normalizer": "softpick", "attn_implementation": "tiled"}, "leave it out"),
    ],
)
def test_what_a_foreign_model_cannot_do_is_refused(tokenizer, neox, fields, message):
    """Named, instead of silently computing something else."""
    with pytest.raises(RecipeError, match=message):
        build_model(_settings(**{"from": str(neox), **fields}), tokenizer, seed=0)


@pytest.mark.parametrize("family", ["bloom", "falcon", "gptj", "gpt_neo", "mamba"])
def test_a_normalizer_that_would_never_run_is_refused(tokenizer, tmp_path, family):
    """BLOOM trained as non-causal softmax, Mamba unchanged, the others ended with "KeyError: 'softpick'"."""
    foreign_model(family, vocab_size=300).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="cannot run with normalizer 'softpick'.*Use normalizer 'softmax'"):
        build_model(_settings(**{"from": str(tmp_path), "normalizer": "softpick"}), tokenizer, seed=0)


def test_a_model_that_does_not_exist(tokenizer):
    """One message, no traceback of a download."""
    with pytest.raises(RecipeError, match="no/such-model"):
        build_model(_settings(**{"from": "no/such-model", "normalizer": "softpick"}), tokenizer, seed=0)


@pytest.mark.parametrize(("source", "model_type"), [("llama", "softpick"), ("neox", "softpick_sealed")])
def test_every_save_of_a_continued_model_refuses_softmax(request, tmp_path, capsys, source, model_type):
    """Checkpoints and final/; modeling/test_attention_guard.py shows what that form does."""
    model = {"from": str(request.getfixturevalue(source)), "normalizer": "softpick"}
    recipe = write_recipe(tmp_path, model=model)
    assert main([str(recipe), "training.max_steps=2", "training.save_steps=1"]) == 0, capsys.readouterr().err
    run = tmp_path / "runs/tiny"
    assert len([record for record in records(run) if "loss" in record]) == 2
    for folder in ("checkpoints/checkpoint-1", "checkpoints/checkpoint-2", "final"):
        assert json.loads((run / folder / "config.json").read_text())["model_type"] == model_type
        loaded = AutoModelForCausalLM.from_pretrained(run / folder, attn_implementation=None)
        assert loaded.config._attn_implementation == ("auto" if source == "llama" else "softpick")
    assert "trust_remote_code=True" in (run / "final" / "README.md").read_text()
    assert AutoConfig.from_pretrained(run / "final").use_cache is True
    assert main([str(recipe), "training.max_steps=3", "training.save_steps=1"]) == 0, capsys.readouterr().err


def test_weights_that_are_missing_or_cut_off_are_refused(llama, tmp_path, capsys):
    config = json.loads((llama / "config.json").read_text())
    deeper = tmp_path / "deeper"
    LlamaForCausalLM.from_pretrained(llama).save_pretrained(deeper)
    (deeper / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert main([str(write_recipe(tmp_path, model={"from": str(deeper), "normalizer": "softpick"}))]) == 2
    assert "has no weights for 9 parameters" in capsys.readouterr().err
    weights = deeper / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert main([str(tmp_path / "recipe.yaml")]) == 2
    assert "model.from" in capsys.readouterr().err
