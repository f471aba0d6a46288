"""`python eval/activations.py` on real folders: what it writes, and what it says of wrong ones."""

import json
import subprocess
import sys

import pytest
import torch
from byte_models import byte_tokenizer
from training_runs import REPOSITORY, environment, train, write_recipe
from transformers import LlamaConfig, LlamaForCausalLM


def _command(*arguments):
    command = [sys.executable, str(REPOSITORY / "eval" / "activations.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=180)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of 5 steps."""
    folder = tmp_path_factory.mktemp("run")
    done = train(write_recipe(folder))
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama of transformers with a byte tokenizer, without a run."""
    folder = tmp_path_factory.mktemp("llama") / "foreign"
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    tokenizer = byte_tokenizer()
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_run_and_a_foreign_model_side_by_side(run, llama, tmp_path):
    """The run is measured on its own validation split when alone, both on the same file when told so."""
    alone = _command(run, "--samples", 4)
    assert alone.returncode == 0, alone.stderr
    result = json.loads((run / "report" / "statistics.json").read_text())
    assert result["kind"] == "statistics" and result["model"]["normalizer"] == "softpick"
    assert result["model"]["trained_steps"] == 5 and result["nonfinite"] == []
    assert result["data"]["description"].startswith("validation split")
    assert result["data"]["rows"] == 4 and result["data"]["tokens"] <= 4 * 64
    assert len(result["layers"]) == 2 and len(result["layers"][0]["heads"]["sink_rate"]) == 2
    assert 0.2 < result["summary"]["sparsity"] < 0.8
    assert isinstance(result["layers"][0]["hidden"]["largest"]["token"], str)
    assert (run / "report" / "statistics.png").stat().st_size > 10_000

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"line {number} of a small text about nothing" for number in range(400)))
    both = _command(run, llama, "--data", text, "--seq-len", 48, "--samples", 3, "--out", tmp_path / "out")
    assert both.returncode == 0, both.stderr
    head, *lines = both.stdout.split("\n\n")[1].splitlines()
    assert head.split() == ["tiny", "foreign"]
    mass = next(line for line in lines if line.startswith("row mass"))
    assert float(mass.split()[-1]) == pytest.approx(1.0) and float(mass.split()[-2]) < 0.9
    foreign = json.loads((tmp_path / "out" / "foreign" / "statistics.json").read_text())
    assert foreign["model"]["architecture"] == "LlamaForCausalLM" and foreign["summary"]["sparsity"] == 0
    assert foreign["data"]["seq_len"] == 48


def test_nan_inside_a_model_is_an_error_after_the_results(run, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(run / "final", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    done = _command(broken, "--data", "stdlib", "--seq-len", 32, "--samples", 2, "--out", tmp_path)
    assert done.returncode == 5
    assert "NaN or Inf inside, first in layer 1 mlp" in done.stderr
    result = json.loads((tmp_path / "statistics.json").read_text())
    assert result["layers"][0]["hidden"]["kurtosis"] != "nan" and result["layers"][1]["hidden"]["kurtosis"] == "nan"
    assert result["summary"]["kurtosis"] == "nan"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere/at/all"], 4, "neither a folder nor a Hub id"),
        ([], 2, "MODEL"),
        (["RUN", "--samples", "0"], 2, "at least 1"),
        (["RUN", "--data", "missing.yaml"], 2, "no such recipe"),
        (["RUN", "--data", "missing.jsonl"], 3, "missing.jsonl"),
        # A model that cannot be loaded: the text is looked at first.
        (["EMPTY", "--data", "missing.jsonl"], 3, "missing.jsonl"),
        (["EMPTY", "--data", "stdlib"], 4, "cannot be loaded"),
    ],
)
def test_what_is_wrong_is_said(run, tmp_path, arguments, code, message):
    (tmp_path / "config.json").write_text("{}")
    folders = {"RUN": run, "EMPTY": tmp_path}
    done = _command(*(folders.get(argument, argument) for argument in arguments))
    assert done.returncode == code
    assert message in done.stderr and "Traceback" not in done.stderr


def test_help_is_quick():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(REPOSITORY / "eval" / "activations.py"), "--help"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "--seq-len" in done.stdout
    assert " torch\n" not in done.stderr and " transformers\n" not in done.stderr
