"""Saved folders: complete, the same logits wherever they are loaded, and never softmax by accident."""

import dataclasses
import json
import os
import subprocess
import sys
import typing
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny_softpick import (
    IMPLEMENTATIONS,
    NORMALIZERS,
    SIZES,
    close,
    double_parameters,
    oracle,
    tiny_config,
    tiny_model,
    tokens,
    without_package,
)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.hub import PushToHubMixin

from hf_softpick import SoftpickConfig, SoftpickForCausalLM, SoftpickModel
from hf_softpick.modeling.configuration_softpick import AS_LLAMA

FOREIGN = ["sdpa", "flash_attention_2", "flex_attention"]
PACKAGE = Path(__file__).parents[2] / "hf_softpick"


def saved_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_a_saved_folder_is_complete(tmp_path, normalizer):
    model = tiny_model(normalizer, "eager")
    model.config.use_cache = False  # what Trainer leaves behind
    model.save_pretrained(tmp_path)
    assert model.config.use_cache is False
    files = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= files
    # Every module of the package but what other architectures need, so that a new one is not forgotten.
    others = {"__init__.py", "attention_guard.py", "proving.py", "registration.py"}
    code = {path.name for path in (PACKAGE / "modeling").glob("*.py")} - others
    assert {name for name in files if name.endswith(".py")} == code
    config = saved_config(tmp_path)
    assert config["normalizer"] == normalizer
    assert config["use_cache"] is True
    assert config["architectures"] == ["SoftpickForCausalLM"]
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_softpick.SoftpickForCausalLM"
    assert config.get("attn_implementation") == (None if normalizer == "softmax" else normalizer)
    assert not any("/" in json.dumps(value) for value in config.values()), "a path of this machine in config.json"


def test_an_upload_while_saving_is_complete(tmp_path, monkeypatch):
    """transformers uploads inside save_pretrained, ahead of what we do behind it."""
    uploaded, api = [], mock.Mock(create_repo=lambda *_, **__: mock.Mock(repo_id="me/it"))
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: api)
    monkeypatch.setattr(
        PushToHubMixin, "_upload_modified_files", lambda *_, **__: uploaded.extend(os.listdir(tmp_path))
    )
    tiny_model().save_pretrained(tmp_path, push_to_hub=True)
    assert sorted(uploaded) == sorted(os.listdir(tmp_path)) and "modeling_softpick.py" in uploaded


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_loading_gives_the_same_logits(tmp_path, normalizer, auto):
    model, ids = tiny_model(normalizer), tokens(2, 20)
    model.save_pretrained(tmp_path)
    loader = AutoModelForCausalLM if auto else SoftpickForCausalLM
    for implementation in (None, *IMPLEMENTATIONS):
        loaded = loader.from_pretrained(tmp_path, attn_implementation=implementation)
        assert isinstance(loaded, SoftpickForCausalLM)
        assert loaded.config._attn_implementation == (implementation or "auto")
        close(loaded(ids).logits, model(ids).logits)


def test_backbone_and_config_load_through_the_auto_classes(tmp_path):
    model, ids = tiny_model(), tokens(1, 9)
    model.save_pretrained(tmp_path)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert type(backbone) is SoftpickModel
    close(backbone(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert AutoConfig.from_pretrained(tmp_path).normalizer == "softpick"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loader", [AutoModelForCausalLM, SoftpickForCausalLM])
def test_head_scale_stays_float32(tmp_path, loader, dtype):
    """Rounded to bfloat16, 0.3 is off by 0.1 %, and its steps are lost in training."""
    tiny_model("scaled_softpick").save_pretrained(tmp_path)
    built = SoftpickForCausalLM._from_config(tiny_config("scaled_softpick"), dtype=dtype)
    loaded = loader.from_pretrained(tmp_path, dtype=dtype)
    original = SoftpickForCausalLM.from_pretrained(tmp_path)
    for name, parameter in loaded.named_parameters():
        expected = torch.float32 if "head_scale" in name else dtype
        assert parameter.dtype == expected, name
        assert built.get_parameter(name).dtype == expected, name
        if "head_scale" in name:
            assert torch.equal(parameter, original.get_parameter(name))
    assert loaded(tokens(1, 8)).logits.isfinite().all()


def test_tied_embeddings_are_saved_once_and_stay_tied(tmp_path):
    model, ids = tiny_model(tie_word_embeddings=True), tokens(1, 8)
    model.save_pretrained(tmp_path)
    loaded = SoftpickForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    close(loaded(ids).logits, model(ids).logits)


def test_only_the_main_process_writes_code(tmp_path):
    tiny_model().save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("*.py"))


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("normalizer", ["softpick", "rectified_softmax", "scaled_softpick"])
def test_implementations_of_softmax_are_refused_everywhere(tmp_path, normalizer, name):
    """From every door: from_pretrained, from_config, the class itself, the setter, and the config written by hand."""
    model = tiny_model(normalizer)
    model.save_pretrained(tmp_path)
    doors = {
        "from_pretrained": lambda: SoftpickForCausalLM.from_pretrained(tmp_path, attn_implementation=name),
        "auto": lambda: AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name),
        "backbone": lambda: AutoModel.from_pretrained(tmp_path, attn_implementation=name),
        "from_config": lambda: AutoModelForCausalLM.from_config(tiny_config(normalizer), attn_implementation=name),
        "class": lambda: SoftpickForCausalLM(tiny_config(normalizer, attn_implementation=name)),
        "setter": lambda: model.set_attn_implementation(name),
        "setter of the backbone": lambda: model.model.set_attn_implementation(name),
    }
    for door, load in doors.items():
        with pytest.raises(ValueError, match=f"(?s){normalizer}.*{name}.*computes softmax"):
            load()
            pytest.fail(f"{door} let {name} through")
    before = model(tokens(1, 8)).logits
    model.config._attn_implementation = name  # past every check at load time
    with pytest.raises(ValueError, match="computes softmax"):
        model(tokens(1, 8))
    model.set_attn_implementation("auto")
    assert torch.equal(model(tokens(1, 8)).logits, before)


@pytest.mark.parametrize("normalizer", ["softmax", "scaled_softmax"])
def test_sdpa_is_for_softmax(tmp_path, normalizer):
    model, ids = tiny_model(normalizer), tokens(1, 12)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert loaded.config._attn_implementation == "sdpa"
    close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_what_the_model_says_it_supports_is_true(normalizer):
    """Continuous batching switches to flash attention where it is said to be supported; engines ask the class whether
    it may be built for them at all, and then it speaks for itself."""
    flags = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend")
    for model in (tiny_model(normalizer), tiny_model(normalizer).model):
        assert {getattr(model, flag) for flag in flags} == {
            normalizer.endswith("softmax") and "rect" not in normalizer
        }
        # A name without a parameter is a warning, and an error in some quantizers.
        scaled = any("head_scale" in name for name, _ in model.named_parameters())
        assert model._keep_in_fp32_modules_strict == ({"head_scale"} if scaled else set())
    assert not any(getattr(SoftpickForCausalLM, flag) for flag in flags[:-1]) and SoftpickModel.is_backend_compatible()
    hints = typing.get_type_hints(SoftpickModel.forward, include_extras=True)
    assert "output_attentions" in typing.get_args(hints["kwargs"])[0].__annotations__


@pytest.mark.parametrize("name", ["softmax", "rectified_softmax", "scaled_softpick"])
def test_another_normalizers_name_is_refused_at_load(tmp_path, name):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"(?s)'softpick'.*{name}.*belongs to the model"):
        SoftpickForCausalLM.from_pretrained(tmp_path, attn_implementation=name)


def test_the_normalizer_can_be_changed_at_load(tmp_path):
    """As the message above says."""
    model, ids = tiny_model(), tokens(1, 12)
    model.save_pretrained(tmp_path)
    changed = SoftpickForCausalLM.from_pretrained(tmp_path, normalizer="rectified_softmax")
    close(changed(ids).logits[0], oracle(double_parameters(changed), changed.config, ids[0])[0])
    changed.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.normalizer == "rectified_softmax"


def test_a_llama_checkpoint_goes_on_as_softpick(tmp_path):
    """The recipe's model.from: Llama's weights under another normalizer."""
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager")).eval()
    llama.save_pretrained(tmp_path)
    ids = tokens(1, 12)
    model = SoftpickForCausalLM.from_pretrained(tmp_path, config=tiny_config("softmax"))
    close(model(ids).logits, llama(ids).logits)
    model = SoftpickForCausalLM.from_pretrained(tmp_path, config=tiny_config())
    close(model(ids).logits[0], oracle(double_parameters(model), model.config, ids[0])[0])


VANILLA = {"normalizer": "softmax"}


def test_llama_takes_only_what_it_computes_alike(tmp_path):
    """Whatever attn_implementation says; another field of ours must be weighed before it is added."""
    ours = {field.name for field in dataclasses.fields(SoftpickConfig)}
    assert set(AS_LLAMA) == ours - {field.name for field in dataclasses.fields(LlamaConfig)}
    ids = tokens(2, 20)
    for fields in (VANILLA, {}, {"normalizer": "scaled_softmax"}, {**VANILLA, "sliding_window": 5}):
        model = tiny_model(**fields)
        model.save_pretrained(tmp_path)
        for choice in ({}, {"attn_implementation": None}, {"attn_implementation": "eager"}):
            if fields == VANILLA:
                close(LlamaForCausalLM.from_pretrained(tmp_path, **choice)(ids).logits, model(ids).logits)
            else:
                with pytest.raises(ValueError, match="for AutoModelForCausalLM after `import hf_softpick`"):
                    LlamaForCausalLM.from_pretrained(tmp_path, **choice)
        close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
        assert not hasattr(SoftpickConfig(**model.config.to_dict()), "transformers_weights")


# What a user without the package does; prints one line of JSON. Run where hf_softpick cannot be imported.
STRANGER = """
import json, sys
try:
    import hf_softpick
except ModuleNotFoundError:
    pass
else:
    sys.exit("the package is importable, so this shows nothing")
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, logging
logging.set_verbosity_error()
folder, copy, out = sys.argv[1], sys.argv[2], {}
ids = torch.tensor(json.loads(sys.argv[3]))
refusals = {}
def refused(door, load):
    try:
        model = load()
    except Exception as error:
        refusals[door] = f"{type(error).__name__}: {error}"
    else:
        refusals[door] = None
refused("auto", lambda: AutoModelForCausalLM.from_pretrained(folder))
refused("auto config", lambda: AutoConfig.from_pretrained(folder))
refused("llama", lambda: LlamaForCausalLM.from_pretrained(folder))
refused("llama with None", lambda: LlamaForCausalLM.from_pretrained(folder, attn_implementation=None))
refused("llama from text", lambda: LlamaForCausalLM.from_pretrained(sys.argv[4]))
refused("llama from text with None", lambda: LlamaForCausalLM.from_pretrained(sys.argv[4], attn_implementation=None))
load = lambda where, **kwargs: AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True, **kwargs)
model = load(folder)
out["class"] = [type(model).__name__, model.config._attn_implementation]
out["logits"] = model(ids).logits.tolist()
out["eager"] = load(folder, attn_implementation="eager")(ids).logits.tolist()
out["generated"] = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()
for name in ("sdpa", "flash_attention_2", "flex_attention"):
    refused(name, lambda: load(folder, attn_implementation=name))
    refused("set " + name, lambda: model.set_attn_implementation(name))
build = AutoModelForCausalLM.from_config
refused("config", lambda: build(model.config, trust_remote_code=True, attn_implementation="sdpa"))
model.save_pretrained(copy)
out["copy"] = load(copy)(ids).logits.tolist()
half = load(copy, dtype=torch.bfloat16)
out["dtypes"] = {n: str(p.dtype) for n, p in half.named_parameters()}
model.save_pretrained(sys.argv[2] + "_sharded", max_shard_size="10KB")
out["sharded"] = load(sys.argv[2] + "_sharded")(ids).logits.tolist()
out["heads"] = {}
for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
    headed = getattr(transformers, f"AutoModelFor{task}").from_pretrained(copy, trust_remote_code=True)
    out["heads"][type(headed).__name__] = headed.model(ids).last_hidden_state.tolist()
out["refusals"] = refusals
print(json.dumps(out))
"""


def test_a_folder_runs_where_the_package_does_not_exist(tmp_path):
    """With trust_remote_code: same logits, same refusals, and a copy as complete as the first. Without: errors."""
    model, ids = tiny_model("scaled_softpick"), tokens(2, 20)
    first, copy, plain = tmp_path / "first", tmp_path / "copy", tmp_path / "plain"
    model.save_pretrained(first)
    # The worst case: someone renames the model type so that Llama's own code is chosen.
    tiny_model().save_pretrained(plain)
    config = saved_config(plain)
    del config["auto_map"]
    (plain / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    command = [sys.executable, "-P", "-c", STRANGER, str(first), str(copy), json.dumps(ids.tolist()), str(plain)]
    process = subprocess.run(
        command, cwd=tmp_path, env=without_package(tmp_path), capture_output=True, text=True, timeout=200
    )
    assert process.returncode == 0, process.stderr[-3000:]
    out = json.loads(process.stdout.splitlines()[-1])

    assert out["class"] == ["SoftpickForCausalLM", "auto"]
    for name in ("logits", "eager", "copy", "sharded"):
        close(torch.tensor(out[name]), model(ids).logits)
    assert set(out["heads"]) == {
        f"SoftpickFor{task}" for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering")
    }
    for hidden in out["heads"].values():
        close(torch.tensor(hidden), model.model(ids).last_hidden_state)
    assert out["generated"] == model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()
    assert {n for n, dtype in out["dtypes"].items() if dtype == "torch.float32"} == {
        n for n, _ in model.named_parameters() if "head_scale" in n
    }
    refusals = out["refusals"]
    assert not [door for door, message in refusals.items() if message is None], refusals
    assert "trust_remote_code" in refusals["auto"] and "trust_remote_code" in refusals["auto config"]
    assert all("scaled_softpick" in refusals[door] for door in ("sdpa", "set sdpa", "config"))
    assert all("for AutoModelForCausalLM" in message for door, message in refusals.items() if "llama" in door)

    files, again = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (first, copy))
    assert files.keys() == again.keys()
    assert all(again[name] == files[name] for name in files if name.endswith(".py"))
    assert saved_config(copy) == saved_config(first)
    assert files["model.safetensors"] == again["model.safetensors"]
