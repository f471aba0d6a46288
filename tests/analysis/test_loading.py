"""What a measuring command takes for a model, and what it says of everything else."""

import json
import shutil

import pytest
import torch
from byte_models import byte_tokenizer
from safetensors.torch import load_file, save_file
from tiny_foreign import foreign_model

from hf_softpick import SoftpickConfig, SoftpickForCausalLM
from hf_softpick.analysis.loading import describe, load_model, locate, normalizer_of
from hf_softpick.errors import CheckpointError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run as far as loading looks at it."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    tokenizer = byte_tokenizer()
    config = SoftpickConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    SoftpickForCausalLM(config).save_pretrained(folder / "final")
    tokenizer.save_pretrained(folder / "final")
    (folder / "recipe.yaml").write_text("{}")
    (folder / "finished.json").write_text(json.dumps({"step": 7}))
    return folder


def test_a_run_and_its_final_folder_are_the_same(run):
    assert locate(run) == (str(run / "final"), run, "mine")
    assert locate(run / "final") == (str(run / "final"), run, "mine")
    loaded = load_model(run)
    assert not loaded.model.training and loaded.add_bos is False
    found = describe(loaded)
    assert (found["normalizer"], found["layers"], found["trained_steps"]) == ("softpick", 2, 7)
    assert found["parameters"] == loaded.model.num_parameters()


def test_hub_ids_and_mistyped_folders_are_told_apart(run, tmp_path, monkeypatch):
    assert locate("owner/name") == ("owner/name", None, "owner--name")
    monkeypatch.chdir(run.parent.parent)
    with pytest.raises(CheckpointError, match=r"no folder .*/nothing; .* holds .*mine"):
        locate(f"{run.parent.name}/nothing")
    for wrong, words in (
        ("a/b/c", "neither a folder nor a Hub id"),
        (run / "recipe.yaml", "is a file"),
        (tmp_path, "no model"),
    ):
        with pytest.raises(CheckpointError, match=words):
            locate(wrong)
    (tmp_path / "recipe.yaml").write_text("{}")
    with pytest.raises(CheckpointError, match="has not finished"):
        locate(tmp_path)


def test_missing_weights_are_refused(run, tmp_path):
    """transformers would fill them with random numbers and a warning."""
    broken = tmp_path / "broken"
    load_model(run).model.save_pretrained(broken)
    byte_tokenizer().save_pretrained(broken)
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no weights for 1 parameters \(model.layers.1.mlp.up_proj.weight"):
        load_model(broken)


def test_the_normalizer_of_other_architectures_is_their_attention(run):
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    assert normalizer_of(llama) == "softmax"
    llama.set_attn_implementation("softpick")
    assert normalizer_of(llama) == "softpick"
    assert load_model(run, dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["bloom", "falcon", "llama"])
def test_a_normalizer_that_never_runs_is_not_measured(tmp_path, family):
    """A folder whose configuration names one is measured under it, or refused by that name."""
    foreign_model(family).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"attn_implementation": "softpick"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if family == "llama":
        assert describe(load_model(tmp_path, dtype="bfloat16"))["normalizer"] == "softpick"
    else:
        with pytest.raises(CheckpointError, match=f"{tmp_path}: .*cannot run with normalizer 'softpick'"):
            load_model(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(run, tmp_path):
    """transformers makes one that knows no token, and every text would be empty."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(run / "final" / name, tmp_path)
    with pytest.raises(CheckpointError, match="has no tokenizer|cannot be loaded.*tokenizer"):
        load_model(tmp_path)
