"""A model that was trained with softpick runs softpick, or not at all: whoever saved it, whoever loads it, however."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from guard_doors import knock
from tiny_softpick import SIZES, close, tokens, without_package
from tokenizers import Tokenizer, models
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from hf_softpick.modeling.attention_guard import SEALED, unmark

# Classes with other biases, norms, position codes and experts than ours; and Llama, which others save as a Llama.
FAMILIES = {
    "llama": ("LlamaForCausalLM", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "gemma3_text": ("Gemma3ForCausalLM", {"sliding_window": 5, "rope_parameters": None}),  # 5.17 takes no flat ones
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 2}),
}
IDS = tokens(2, 20)


def foreign(family: str, attention: str = "softpick"):
    torch.manual_seed(0)
    sizes = {"vocab_size": SIZES["vocab_size"]} if family == "gpt2" else SIZES
    config = CONFIG_MAPPING[family](**{**sizes, "initializer_range": 0.4, **FAMILIES[family][1]})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def saved(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder of each family, saved by nobody in particular, with what it must compute; softmax is far from it."""
    root = tmp_path_factory.mktemp("guard")
    words = Tokenizer(models.WordLevel({"a": 7, "?": 0}, unk_token="?"))
    for family in FAMILIES:
        model = foreign(family)
        model.save_pretrained(root / family)
        logits = model(IDS, use_cache=False).logits.detach()
        assert (logits - foreign(family, "sdpa")(IDS, use_cache=False).logits).abs().max() > 0.05, family
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(root / family)
        torch.save(IDS, root / family / "ids.pt")
        torch.save(logits, root / family / "logits.pt")
    return root


def check(found: dict, expected: torch.Tensor | None, refused: dict[str, str]) -> None:
    """Every door gives the right logits, or an error with the words that `refused` has for it."""
    assert expected is None or found.pop("config") == "softpick"
    for door, result in found.items():
        words = next((words for part, words in refused.items() if part in door), None)
        if words is None:
            assert isinstance(result, torch.Tensor), f"{door}: {result}"
            close(result, expected)
        else:
            assert isinstance(result, str) and words in result, f"{door}: {result}"


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_package_a_folder_is_softpick_or_an_error(folders, family):
    found = knock(folders / family, FAMILIES[family][0], IDS)
    check(found, torch.load(folders / family / "logits.pt"), {"sdpa": "trained with 'softpick'"})


def test_without_the_package_a_folder_is_softpick_or_an_error(folders):
    """By its own code if that is trusted; else each class that is tried says what is needed."""
    out = folders / "out.pt"
    cases = json.dumps({str(folders / family): architecture for family, (architecture, _) in FAMILIES.items()})
    command = [sys.executable, "-P", str(Path(__file__).with_name("guard_doors.py")), cases, str(out)]
    environment = without_package(folders)
    done = subprocess.run(command, env=environment, cwd=folders, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, (alone, trusted) in torch.load(out).items():
        check(alone, None, {"Auto": "trust_remote_code=True", "": "Import hf_softpick"})
        check(trusted, torch.load(Path(folder, "logits.pt")), {"sdpa": "trained with 'softpick'"})
        again = Path(f"{folder}-again")  # saved by that code
        assert saved(again) == saved(Path(folder))
        code = {path.name for path in Path(folder).glob("*.py")}
        assert "attention_guard.py" in code and {path.name for path in again.glob("*.py")} == code


def test_nothing_in_a_sealed_folder_names_the_architecture(folders, tmp_path):
    """What engines choose an implementation by, also after they have opened it by trusted code."""
    for family, (architecture, _) in FAMILIES.items():
        config = saved(folders / family)
        inside = config.pop(SEALED)
        assert inside[0]["model_type"] == family and inside[0]["normalizer"] == "softpick"
        assert config["vocab_size"] == config["transformers_weights"]  # the note; a composite has no vocabulary
        assert config["model_type"] == SEALED and config["architectures"] == [f"Softpick{architecture}"]
        assert f'"{family}"' not in json.dumps(config)
        opened = AutoConfig.from_pretrained(folders / family)
        assert opened.architectures == config["architectures"]
        opened.save_pretrained(tmp_path)  # a configuration alone
        assert saved(tmp_path)["model_type"] == SEALED and saved(tmp_path)["architectures"] == opened.architectures
        assert PreTrainedConfig.from_json_file(folders / family / "config.json").vocab_size == SIZES["vocab_size"]


def _plain(model, folder):
    model.save_pretrained(folder)


def _shards(model, folder):
    model.save_pretrained(folder, max_shard_size="10KB")


def _trainer(model, folder):
    """As Trainer and TRL's trainers do, and as under ZeRO-3 and FSDP, with gathered weights."""
    trainer = Trainer(model, TrainingArguments(folder, use_cpu=True, report_to="none"))
    trainer._save(str(folder), state_dict=model.state_dict())


def _merged(model, folder):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.merge_and_unload().save_pretrained(folder)


@pytest.mark.parametrize("save", [_plain, _shards, _trainer, _merged])
def test_whoever_saves_writes_the_guard(tmp_path, save):
    model = foreign("llama", "rectified_softmax")
    save(model, tmp_path)
    assert saved(tmp_path)["model_type"] == SEALED
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=None)
    assert loaded.config._attn_implementation == "rectified_softmax"
    close(loaded(IDS).logits, model(IDS).logits)


def test_an_adapter_saved_alone_names_a_base_that_is_guarded(tmp_path, caplog):
    """Or a warning says what to do: nothing in adapter_config.json can make others refuse the base of somebody."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"])
    base = foreign("llama")
    base.save_pretrained(tmp_path / "base")
    logging.getLogger("transformers").addHandler(caplog.handler)
    for model, warned in ((LlamaForCausalLM.from_pretrained(tmp_path / "base"), False), (base, True)):
        caplog.clear()
        peft.get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
        assert ("Save the base model first" in caplog.text) is warned
    logging.getLogger("transformers").removeHandler(caplog.handler)


def test_the_kernel_on_the_hub_computes_what_it_is_named_for(folders, tmp_path):
    """Its name is another than ours; it is fetched by the repository's name, here only looked at."""
    model = foreign("llama")
    model.config._attn_implementation_internal = "someone/softpick-attention"
    model.save_pretrained(tmp_path)
    assert saved(tmp_path)[SEALED][0]["normalizer"] == "softpick"
    with pytest.raises(Exception, match="(?i)kernel|offline"):
        LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="someone/softpick-attention")
    with pytest.raises(ValueError, match="trained with 'softpick'"):
        LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="kernels-community/flash-attn2")


def test_trainer_resumes_from_a_sealed_checkpoint(tmp_path):
    model = foreign("llama")
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = {"use_cpu": True, "report_to": "none", "save_steps": 1, "disable_tqdm": True}
    Trainer(model, TrainingArguments(tmp_path, max_steps=1, **arguments), train_dataset=rows).train()
    again = Trainer(foreign("llama"), TrainingArguments(tmp_path, max_steps=2, **arguments), train_dataset=rows)
    assert again.train(resume_from_checkpoint=True).global_step == 2
    assert saved(tmp_path / "checkpoint-2")["model_type"] == SEALED


def test_one_part_of_a_composite_model(tmp_path):
    """The text model runs softpick, the vision tower as it likes."""
    text = {**SIZES, "model_type": "llama", "initializer_range": 0.4}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CONFIG_MAPPING["llava"](text_config=text, vision_config=vision, image_token_index=5)
    from transformers import LlavaForConditionalGeneration as Llava

    model = Llava._from_config(config, attn_implementation={"text_config": "softpick"}).eval()
    model.save_pretrained(tmp_path)
    ids = IDS.clamp_min(6)
    for choice in ({}, {"attn_implementation": None}):
        loaded = Llava.from_pretrained(tmp_path, **choice)
        assert loaded.config.vision_config._attn_implementation == "sdpa"
        close(loaded(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="trained with 'softpick'"):
        Llava.from_pretrained(tmp_path, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="LlamaModel cannot run .* trained with 'softpick'"):
        loaded.set_attn_implementation("sdpa")


def test_folders_of_version_0_1_are_guarded_while_the_package_is_there(tmp_path):
    """They only name the attention, which None overrides."""
    model = foreign("gpt_neox")
    model.save_pretrained(tmp_path)
    config = saved(tmp_path)[SEALED][0]
    del config["normalizer"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"attn_implementation": "softpick"}))
    found = knock(tmp_path, "GPTNeoXForCausalLM", IDS)
    check(found, model(IDS).logits, {"sdpa": "trained with 'softpick'"})


def test_going_back_to_softmax_is_said(folders, tmp_path):
    """`unmark`, or `del config.normalizer` as the message says; then an ordinary folder is written."""
    config = AutoConfig.from_pretrained(folders / "gpt_neox")
    unmark(config)
    model = AutoModelForCausalLM.from_pretrained(folders / "gpt_neox", config=config, attn_implementation="sdpa")
    model.save_pretrained(tmp_path)
    assert saved(tmp_path)["model_type"] == "gpt_neox" and "normalizer" not in saved(tmp_path)
    assert not list(tmp_path.glob("*.py"))


def test_a_folder_without_a_normalizer_of_ours_is_left_alone(tmp_path):
    foreign("qwen2", "sdpa").save_pretrained(tmp_path)
    assert saved(tmp_path)["model_type"] == "qwen2" and not list(tmp_path.glob("*.py"))
    (tmp_path / "config.json").write_text("[]")
    # As transformers says it: 5.23 the first, 5.17 the second.
    with pytest.raises((ValueError, TypeError), match="Unrecognized model|list indices must be integers"):
        AutoConfig.from_pretrained(tmp_path)
