"""`python eval/compare.py` on two real runs of five steps, as a user starts it."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import REPOSITORY, environment, train, write_recipe

SCRIPT = REPOSITORY / "eval" / "compare.py"


def compare(*arguments, cwd=None):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment(), cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    recipe = write_recipe(folder)
    for name in ("softmax", "softpick"):
        done = train(recipe, f"model.normalizer={name}", f"run.name={name}", "eval.every=5")
        assert done.returncode == 0, done.stderr
    return [folder / "runs" / name for name in ("softmax", "softpick")]


def test_two_runs(runs, tmp_path):
    found = compare(*runs, "--out", tmp_path / "report", "--text", "def x ( y ) : return y", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    report = json.loads((tmp_path / "report/comparison.json").read_text())
    assert [run["label"] for run in report["runs"]] == ["softmax", "softpick"]
    # Five steps: neither has learned anything.
    assert [w.split(":")[0] for w in report["warnings"]] == [f"{n} is undertrained" for n in ("softmax", "softpick")]
    assert report["recipe_differences"][0]["key"] == "model.normalizer" and report["pair"]["other_differences"] == []
    verdicts = {row["claim"]: row["verdict"] for row in report["claims"]}
    assert set(verdicts.values()) == {"not measured"} and len(verdicts) == 7
    assert "is undertrained: loss" in report["claims"][0]["detail"]
    for run in report["runs"]:
        assert len(run["curves"]["train"]) == 5 and run["curves"]["last_eval_loss"] > 0
        maps = run["attention_maps"]
        assert maps["tokens"] and all(len(item["row_mass"]) == len(maps["tokens"]) for item in maps["maps"])
    page = (tmp_path / "report/comparison.html").read_text()
    assert "softpick (softpick) against softmax (softmax): none of the 7 claims of the paper can be judged." in page
    assert '<p class="flag">softpick is undertrained: loss' in page[: page.index("<table")]
    assert page.count("<svg") > 8
    assert "## Attention maps" in (tmp_path / "report/comparison.md").read_text()
    assert "Equal training loss" in found.stdout
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        *("comparison.html", "comparison.json", "comparison.md")
    ]


@pytest.fixture
def script(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    specification = importlib.util.spec_from_file_location("compare_script", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def main(script):
    """The script's own main: a process for each mistake would take minutes."""
    return lambda *arguments: script.main([str(argument) for argument in arguments])


def test_all_models_are_measured_on_one_text(runs, tmp_path, monkeypatch, capsys, script, main):
    model = shutil.copytree(runs[1] / "final", tmp_path / "model")
    commands = []

    def record(command, **_):
        commands.append([str(part) for part in command[1:]])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(script.subprocess, "run", record)
    arguments = ("--out", tmp_path / "report", "--no-maps", "--measure", "statistics,passkey,quantization")
    recipe = str(runs[0] / "recipe.yaml")

    def texts(*more):
        commands.clear()
        assert main(*more, *arguments) == 0
        found = {}
        for name, _, *rest in commands:
            found.setdefault(Path(name).stem, set()).add(" ".join(rest))
        return found

    # Runs have recipes of their own.
    assert texts(*runs) == {"activations": {""}, "passkey": {""}, "quantization": {""}}
    assert "no run of its own" not in capsys.readouterr().out
    one = {f"--data {recipe} --seq-len 64"}
    assert texts(model, runs[0]) == {"activations": one, "passkey": {""}, "quantization": one}
    said = capsys.readouterr().out
    assert f"{model} has no run of its own: all are measured on {recipe}, rows of 64 tokens" in said
    one = {"--data stdlib --seq-len 32 --samples 4"}
    assert texts(*runs, "--data", "stdlib", "--seq-len", "32", "--samples", "4")["quantization"] == one
    assert texts(model, runs[0], "--samples", "4")["activations"] == {f"--data {recipe} --seq-len 64 --samples 4"}


@pytest.mark.slow
def test_a_model_without_a_run_is_judged_on_the_text_of_the_run(runs, tmp_path, monkeypatch, main):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs[1] / "final", tmp_path / "model")
    arguments = ("--measure", "statistics", "--samples", "3", "--results", tmp_path, "--out", tmp_path / "report")
    assert main("model", runs[0], *arguments, "--no-maps") == 0
    data = [json.loads((tmp_path / name / "statistics.json").read_text())["data"] for name in ("model", "softmax")]
    assert data[0] == data[1] and data[0]["rows"] == 3 and "validation split" in data[0]["description"]


@pytest.mark.slow
def test_measuring_first(runs, tmp_path, monkeypatch, main):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    arguments = ("--measure", "statistics,passkey", "--results", tmp_path, "--out", tmp_path / "report", "--no-maps")
    # Rows of 64 tokens have no room for a passkey prompt.
    assert main(*runs, *arguments) == 2
    report = json.loads((tmp_path / "report/comparison.json").read_text())
    sparse = next(row for row in report["claims"] if row["claim"] == "Sparse attention maps")
    assert sparse["figures"]["softpick"]["exact zeros"] > 0.25 and len(report["warnings"]) == 4
    assert "Measuring passkey of" in report["warnings"][2] and "exit code 2" in report["warnings"][2]
    page = (tmp_path / "report/comparison.html").read_text()
    assert "Sink rate of softpick by layer and head" in page and "Largest hidden value" in page
    softmax, softpick = (json.loads((tmp_path / run.name / "statistics.json").read_text()) for run in runs)
    assert f"{softpick['summary']['sparsity']:.2%}" in page and softmax["summary"]["sparsity"] == 0


def test_mistakes_are_one_message_and_an_exit_code(runs, tmp_path, capsys, main):
    cases = [
        ((runs[0], "--out", tmp_path), 2, "at least two"),
        ((*runs, "--out", tmp_path, "--results", tmp_path / "none"), 2, "is not a folder"),
        ((*runs, "--out", tmp_path, "--samples", 4), 2, "--samples need --measure with statistics or quantization"),
        ((*runs, "--out", tmp_path, "--heads", "9.9"), 2, "has no head 9.9"),
        ((runs[0], tmp_path / "nowhere", "--out", tmp_path), 4, "nowhere is neither a folder nor a Hub id"),
        ((*runs, "--out", runs[0] / "recipe.yaml" / "x", "--no-maps"), 6, "cannot be made"),
    ]
    for arguments, code, words in cases:
        assert main(*arguments) == code
        assert words in capsys.readouterr().err
    for wrong in ([], ["--out", tmp_path, "--heads", "1-2"], ["--out", tmp_path, "--measure", "loss"]):
        with pytest.raises(SystemExit) as ended:
            main(*runs, *wrong)
        assert ended.value.code == 2


def test_a_model_that_cannot_be_loaded_leaves_its_maps_out(runs, tmp_path, capsys, main):
    damaged = tmp_path / "damaged"
    shutil.copytree(runs[1], damaged)
    (damaged / "final/model.safetensors").write_bytes(b"")
    assert main(runs[0], damaged, "--out", tmp_path / "report") == 0
    assert "damaged: no attention maps" in capsys.readouterr().err
    assert "damaged" in (tmp_path / "report/comparison.md").read_text()
