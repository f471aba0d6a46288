"""model.from: rows, tokenizer and packed documents are right for the loaded model, or refused by name."""

import json

import pytest
import torch
from tiny_foreign import ALPHABET, byte_tokenizer, save_source
from training_runs import losses, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM

from hf_softpick.data.settings import DataSettings
from hf_softpick.errors import RecipeError
from hf_softpick.modeling.configuration_softpick import SoftpickConfig
from hf_softpick.modeling.modeling_softpick import SoftpickForCausalLM
from hf_softpick.train import main
from hf_softpick.training.build import build_model
from hf_softpick.training.recipe_model import ModelSettings


def build(folder, tokenizer=None, data=None, **fields):
    settings = ModelSettings.model_validate({"from": str(folder), "normalizer": "softpick", **fields}, by_alias=True)
    rows = DataSettings(seq_len=32, **(data or {})) if data is not None else None
    return build_model(settings, tokenizer or byte_tokenizer(), seed=0, data=rows)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Returns a folder of a family's tiny model, with the 258 tokens of its tokenizer, made once."""
    made = {}

    def save(family, **changes):
        key = (family, *changes.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family.replace("-", ""))
            save_source(made[key], family, **changes)
        return made[key]

    return save


# Packed documents

LEAKING = ["bamba", "jamba", "lfm2", "qwen3_next"]
LEAKING_SOFTMAX = ["bloom", "falcon", "mamba", "mpt", "opt", "rwkv", "xglm"]


@pytest.mark.parametrize(
    ("family", "normalizer"),
    [*((family, "softpick") for family in LEAKING), *((family, "softmax") for family in LEAKING_SOFTMAX)],
)
def test_packed_documents_that_leak_are_refused(source, family, normalizer):
    with pytest.raises(
        RecipeError, match="does not keep packed documents apart.*packing=one_document.*isolate_documents=false"
    ):
        build(source(family), data={}, normalizer=normalizer)
    for way_out in ({"isolate_documents": False}, {"packing": "one_document"}):
        build(source(family), data=way_out, normalizer=normalizer)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "gpt_neox", "opt", "qwen2_moe"])
def test_packed_documents_that_stay_apart_are_not(source, family):
    build(source(family), data={})
    if family != "opt":
        build(source(family), data={}, normalizer="softmax")


# Positions


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "llama", "mpt"])
def test_rows_longer_than_the_model_are_refused(source, family):
    """Learned positions would crash, rotary ones train on what final/ does not say."""
    name = "max_seq_len" if family == "mpt" else "n_positions" if family == "gpt2" else "max_position_embeddings"
    with pytest.raises(RecipeError, match="data.seq_len is 32, but the model has positions for 16"):
        build(source(family, **{name: 16}), data={}, normalizer="softmax")


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_rotary_positions_are_extended_and_the_config_says_so(source, family):
    folder = source(family, max_position_embeddings=16)
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    model = build(folder, data={}, max_position_embeddings=32, rope_parameters=rope)
    saved = model.config.to_dict()
    assert saved["max_position_embeddings"] == 32 and rope.items() <= saved["rope_parameters"].items()
    before = AutoConfig.from_pretrained(folder).rope_parameters
    assert saved["rope_parameters"].get("partial_rotary_factor") == before.get("partial_rotary_factor")
    plain = build(folder)
    assert not torch.allclose(model(torch.tensor([[3, 4, 5]])).logits, plain(torch.tensor([[3, 4, 5]])).logits)
    with pytest.raises(RecipeError, match="gpt2 has no rope_parameters"):
        build(source("gpt2"), rope_parameters=rope)


@pytest.mark.parametrize("normalizer", ["softmax", "softpick"])
def test_positions_that_the_longest_document_chooses_are_refused(tmp_path, normalizer):
    """Logits of a document would change with another one beside it. Ours has no such positions: it stays a Llama."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    save_source(tmp_path, "llama", rope_parameters={**rope, "original_max_position_embeddings": 16})
    with pytest.raises(RecipeError, match="seq_len is 32, and beyond 16 tokens rope_type 'longrope'"):
        build(tmp_path, data={}, normalizer=normalizer)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"]["original_max_position_embeddings"] = 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert build(tmp_path, data={}, normalizer=normalizer).config.model_type == "llama"


def test_a_configuration_that_is_none_is_refused(tmp_path):
    save_source(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))
    with pytest.raises(RecipeError, match="(?s)model.from .*not a multiple"):
        build(tmp_path, data={})


# Tokenizer and embedding


@pytest.mark.parametrize("pad", [257, -1])
@pytest.mark.parametrize("family", ["gpt_neox", "qwen2", "llama", "opt"])
def test_the_row_of_the_pad_token_learns(source, family, pad):
    """Padding_idx would freeze EOS here, or the last row."""
    model = build(source(family, pad_token_id=pad))
    ids = torch.tensor([[256, 5, 257, 257, 9]])
    model(input_ids=ids, labels=ids).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient[257].abs().sum() > 0 and gradient[5].abs().sum() > 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_tokenizer_of_another_model_is_refused(source, caplog, family):
    """Not larger is not enough: the same ids must mean the same tokens. Without files GPT-2 has a tokenizer of one."""
    folder = source(family)
    with pytest.raises(RecipeError, match=r"256 of its 258 tokens have other ids, first 0, which is .* there"):
        build(folder, byte_tokenizer(ALPHABET[1:] + ALPHABET[:1]))
    build(folder, byte_tokenizer())
    assert not caplog.records
    for path in folder.glob("token*"):
        path.rename(path.with_name(f"hidden.{path.name}"))
    try:
        build(folder, byte_tokenizer(ALPHABET[1:] + ALPHABET[:1]))
        assert "no tokenizer to compare" in caplog.text
    finally:
        for path in folder.glob("hidden.*"):
            path.rename(path.with_name(path.name.removeprefix("hidden.")))


def test_ids_beyond_a_hole_have_embeddings(source):
    """len(tokenizer) is 258, its last id 267."""
    tokenizer = byte_tokenizer(hole=10)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = ModelSettings.model_validate(sizes)
    assert build_model(settings, tokenizer, seed=0).config.vocab_size == 268
    with pytest.raises(RecipeError, match="vocab_size is 260, but the tokenizer has 268 tokens"):
        build_model(ModelSettings.model_validate({**sizes, "vocab_size": 260}), tokenizer, seed=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_embeddings_are_added_when_the_recipe_says_so(source, family):
    """Drawn around the mean of the old rows, the same on every rank; the old rows stay."""
    folder, tokenizer = source(family), byte_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    with pytest.raises(
        RecipeError, match="has 258 embeddings, but the tokenizer has 260 tokens. Set model.vocab_size=260"
    ):
        build(folder, tokenizer)
    with pytest.raises(RecipeError, match="model.vocab_size is 200, but the model has 258 embeddings"):
        build(folder, vocab_size=200)
    model, again = (build(folder, tokenizer, vocab_size=264) for _ in range(2))
    old = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    new = model.get_input_embeddings().weight
    assert model.config.vocab_size == 264 and len(new) == len(model.get_output_embeddings().weight) == 264
    assert torch.equal(new, again.get_input_embeddings().weight) and torch.equal(new[:258], old)
    assert (new[258:] - old.mean(0)).abs().max() < 0.1 * old.std()


def test_a_run_with_added_tokens_and_longer_rows(source, tmp_path, capsys):
    """final/ says what was trained."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["return"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    folder = source("llama", max_position_embeddings=16)
    model = {"from": str(folder), "normalizer": "softpick", "vocab_size": 259, "max_position_embeddings": 64}
    recipe = write_recipe(tmp_path, model=model, tokenizer={"from": str(tmp_path / "tokenizer")})
    assert main([str(recipe), "training.max_steps=3"]) == 0, capsys.readouterr().err
    run = tmp_path / "runs" / "tiny"
    assert losses(run)[-1] < losses(run)[0]
    saved = json.loads((run / "final" / "config.json").read_text())
    assert (saved["vocab_size"], saved["max_position_embeddings"]) == (259, 64)


# Dropout and models without heads


def test_dropout_of_a_checkpoint_of_ours(tmp_path):
    """A traceback at the first step before."""
    config = SoftpickConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_dropout=0.1,
    )
    SoftpickForCausalLM._from_config(config, attn_implementation="eager").save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="attention_dropout = 0.1, which .* Set model.attention_dropout=0"):
        build(tmp_path)
    assert build(tmp_path, attention_dropout=0.0).config.attention_dropout == 0
    assert build(tmp_path, attn_implementation="eager").config.attention_dropout == 0.1


def test_a_model_without_heads_trains(source, tmp_path, capsys):
    """Its operations are not known: no MFU instead of a traceback."""
    recipe = write_recipe(
        tmp_path,
        model={"from": str(source("mamba")), "normalizer": "softmax"},
        tokenizer={"from": str(source("mamba"))},
        data={"isolate_documents": False},
    )
    assert main([str(recipe), "training.max_steps=2"]) == 0, capsys.readouterr().err
