"""Every recipe that we ship is read, described and counted; launch files are what the launchers accept."""

import json
from pathlib import Path

import pytest
import torch

from hf_softpick.training.dry_run import describe, vocabulary_size
from hf_softpick.training.estimates import count_parameters
from hf_softpick.training.recipe import load_recipe

FOLDER = Path(__file__).parent.parent / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
MILLIONS = {"120m": 123.7, "340m": 373.9, "1.8b": 1775.4, "7b": 7241.7}


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_all_recipes_are_there():
    sizes = ["tiny", *MILLIONS]
    assert {f"{kind}_{size}" for kind in ("softpick", "softmax") for size in sizes} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recipe(name):
    """The name, the meaning and the description agree, and the count holds for the real model on the meta device."""
    from hf_softpick.modeling.configuration_softpick import SoftpickConfig
    from hf_softpick.modeling.modeling_softpick import SoftpickForCausalLM

    recipe = load_recipe(FOLDER / f"{name}.yaml")
    kind, size = name.split("_", 1)
    assert recipe.run.name == name
    assert recipe.model.normalizer == kind
    vocabulary, _ = vocabulary_size(recipe.model, recipe.tokenizer)
    with torch.device("meta"):
        model = SoftpickForCausalLM(SoftpickConfig(**recipe.model.config_fields(), vocab_size=vocabulary))
    parameters = sum(p.numel() for p in model.parameters())
    assert count_parameters(recipe.model, vocabulary) == parameters
    if size in MILLIONS:
        assert round(parameters / 1e6, 1) == MILLIONS[size]
    assert f"{parameters:,}" in describe(recipe)


@pytest.mark.parametrize("size", ["tiny", *MILLIONS])
def test_softmax_differs_in_one_key(size):
    softpick, softmax = (load_recipe(FOLDER / f"{kind}_{size}.yaml").resolved() for kind in ("softpick", "softmax"))
    assert softpick["model"].pop("normalizer") == "softpick"
    assert softmax["model"].pop("normalizer") == "softmax"
    assert softpick.pop("run")["root"] == softmax.pop("run")["root"]
    assert softpick == softmax


@pytest.mark.parametrize("size", MILLIONS)
def test_hyperparameters_of_the_paper(size):
    recipe = load_recipe(FOLDER / f"softpick_{size}.yaml")
    given = recipe.training.arguments
    assert recipe.data.seq_len == 4096
    assert given["per_device_train_batch_size"] * given["gradient_accumulation_steps"] == 16
    expected = {
        "learning_rate": 3e-4,
        "adam_epsilon": 1e-15,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "warmup_steps": 1000,
        "max_steps": 100000,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "seed": 79,
        "torch_compile": True,
    }
    assert {name: given[name] for name in expected} == expected


def test_tiny_needs_nothing_from_elsewhere():
    recipe = load_recipe(FOLDER / "softpick_tiny.yaml")
    assert [source.path for source in recipe.data.sources] == ["stdlib"]
    assert recipe.tokenizer.train_bpe and recipe.tokenizer.from_ is None
    found = describe(recipe)
    assert "no revision" not in found and "GPU" not in found


@pytest.mark.parametrize("name", ["single", "ddp", "zero3"])
def test_accelerate_file(name, monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file

    monkeypatch.chdir(FOLDER.parent)
    config = load_config_from_file(str(FOLDER / "accelerate" / f"{name}.yaml"))
    kind = {"single": "NO", "ddp": "MULTI_GPU", "zero3": "DEEPSPEED"}[name]
    assert config.distributed_type == kind
    assert config.use_cpu is False
    if name == "zero3":
        assert Path(config.deepspeed_config["deepspeed_config_file"]).is_file()


def test_deepspeed_file():
    config = json.loads((FOLDER / "deepspeed" / "zero3.json").read_text())
    stage = config["zero_optimization"]
    assert stage["stage"] == 3
    # Without it final/ would have no weights.
    assert stage["stage3_gather_16bit_weights_on_model_save"] is True
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert config[name] == "auto"


def test_commands_in_recipes_name_files_that_exist():
    for path in FOLDER.rglob("*"):
        if path.is_file():
            for word in path.read_text().split():
                word = word.strip("`'\",;:()|")
                if word.startswith("recipes/") and word.endswith((".yaml", ".json")) and "<" not in word:
                    assert (FOLDER.parent / word).is_file(), f"{path.name} names {word}"
