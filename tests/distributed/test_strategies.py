"""Every strategy in float32 and bf16, launched as the 7B recipe says: one run, float32 weights, and a resume."""

import json
import shutil

import pytest
import torch
from launchers import accelerate, deepspeed, run_command
from safetensors.torch import load_file
from training_runs import REPOSITORY, losses, records, write_text

from hf_softpick.train import main

RECIPE = "recipes/softpick_7b.yaml"
DEEPSPEED = REPOSITORY / "recipes/deepspeed/zero3.json"
PRECISIONS = {"bf16": [], "float32": ["training.bf16=false"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("precision")


@pytest.fixture(scope="module")
def shrunk(folder):
    """What the 7B recipe needs to run here: two thin layers and a text; compiling alone would take minutes."""
    text = write_text(folder / "text.jsonl")
    model = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    training = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "warmup_steps": 0, "learning_rate": 0.01}
    training |= {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1, "torch_compile": "false"}
    return [
        f"run.root={folder / 'runs'}",
        "tokenizer={train_bpe: 300}",
        f"data={{seq_len: 64, validation: 0.1, sources: [{{path: {text}}}]}}",
        "eval={every: 2, statistics: 2, generate_every: 2, max_new_tokens: 4}",
        *(f"model.{name}={value}" for name, value in model.items()),
        *(f"training.{name}={value}" for name, value in training.items()),
    ]


@pytest.fixture(scope="module")
def alone(folder, shrunk):
    """The runs of one process, of which all others must be the equals."""
    for name, options in PRECISIONS.items():
        arguments = [*shrunk, *options, "training.gradient_accumulation_steps=4", f"run.name=alone-{name}"]
        assert main([str(REPOSITORY / RECIPE), *arguments]) == 0
    return {name: folder / "runs" / f"alone-{name}" for name in PRECISIONS}


def _weights(run, name="final"):
    folder = run / name
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    return weights


def _check(run, alone, precision):
    """The losses of one process in the same precision and not those in the other; float32 weights everywhere."""
    other = next(name for name in PRECISIONS if name != precision)
    close, parted = {"bf16": (5e-3, 1e-4), "float32": (1e-5, 1e-4)}[precision]
    assert losses(run) == pytest.approx(losses(alone[precision]), abs=close)
    assert losses(run) != pytest.approx(losses(alone[other]), abs=parted)
    final = _weights(run)
    expected = _weights(alone[precision])
    assert final.keys() == expected.keys()
    for name, tensor in final.items():
        assert (tensor - expected[name]).abs().mean() < 2e-3, name
    # Not the float32 form of bfloat16 weights.
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in final.values())
    for step in (2, 4):
        _weights(run, f"checkpoints/checkpoint-{step}")
    # Measured by the engine's own forward pass, and by calling the model itself.
    for key in ("eval_loss", "stats_kurtosis"):
        mine, theirs = ([r[key] for r in records(each) if key in r][-1] for each in (run, alone[precision]))
        assert mine == pytest.approx(theirs, rel=5e-2)  # two ranks look at two rows


@pytest.fixture(scope="module")
def zero3(folder, shrunk):
    """The 7B recipe by the line in its head."""
    line = accelerate("zero3.yaml", "-m", "hf_softpick.train", RECIPE)
    done = run_command(*line, *shrunk, "run.name=zero3")
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "zero3"


@pytest.mark.slow
def test_zero3_in_bf16_is_the_run_of_one_process(zero3, alone):
    _check(zero3, alone, "bf16")


@pytest.mark.slow
def test_resume_in_bf16_is_exact(folder, shrunk, zero3):
    """By DeepSpeed's own launcher, as recipes/README.md has it, from step 2."""
    run = shutil.copytree(zero3, folder / "runs" / "resumed")
    (run / "finished.json").unlink()
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    line = deepspeed(RECIPE, "training.deepspeed=recipes/deepspeed/zero3.json", *shrunk, "run.name=resumed")
    done = run_command(*line)
    assert done.returncode == 0 and "from step 2" in done.stdout, done.stderr
    expected = _weights(zero3)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in _weights(run).items())
    assert losses(run) == losses(zero3)


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        pytest.param(2, "bf16", marks=pytest.mark.slow),
        *(pytest.param(*cell, marks=pytest.mark.sweep) for cell in [(0, "bf16"), (1, "bf16")]),
        *(pytest.param(stage, "float32", marks=pytest.mark.sweep) for stage in (0, 1, 2, 3)),
    ],
)
def test_strategy(folder, shrunk, alone, stage, precision):
    """Data parallel (0) and every stage of ZeRO; a JSON that does not speak of precision at all, too."""
    name = f"zero{stage}-{precision}"
    arguments = [RECIPE, *shrunk, *PRECISIONS[precision], f"run.name={name}"]
    if stage == 0:
        line = accelerate("ddp.yaml", "-m", "hf_softpick.train", *arguments)
    else:
        config = json.loads(DEEPSPEED.read_text())
        config["zero_optimization"]["stage"] = stage
        if stage == 2:
            del config["bf16"], config["fp16"]
        path = folder / f"{name}.json"
        path.write_text(json.dumps(config))
        line = deepspeed(*arguments, f"training.deepspeed={path}")
    done = run_command(*line)
    assert done.returncode == 0, done.stderr
    _check(folder / "runs" / name, alone, precision)
