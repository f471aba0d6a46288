"""`python eval/compare.py` on two real runs of five steps, as a user starts it."""

import json
import subprocess
import sys

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
    assert [run["label"] for run in report["runs"]] == ["softmax", "softpick"] and report["warnings"] == []
    assert report["recipe_differences"][0]["key"] == "model.normalizer" and report["pair"]["other_differences"] == []
    verdicts = {row["claim"]: row["verdict"] for row in report["claims"]}
    assert verdicts["Equal training loss"] == "reproduced" and list(verdicts.values()).count("not measured") == 6
    for run in report["runs"]:
        assert len(run["curves"]["train"]) == 5 and run["curves"]["last_eval_loss"] > 0
        maps = run["attention_maps"]
        assert maps["tokens"] and all(len(item["row_mass"]) == len(maps["tokens"]) for item in maps["maps"])
    page = (tmp_path / "report/comparison.html").read_text()
    assert "softpick (softpick) against softmax (softmax)" in page and page.count("<svg") > 8
    assert "## Attention maps" in (tmp_path / "report/comparison.md").read_text()
    assert "Equal training loss" in found.stdout
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        *("comparison.html", "comparison.json", "comparison.md")
    ]


def test_measuring_first(runs, tmp_path):
    arguments = ("--measure", "statistics", "--results", tmp_path, "--out", tmp_path / "report", "--no-maps")
    found = compare(*runs, *arguments, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    report = json.loads((tmp_path / "report/comparison.json").read_text())
    verdicts = {row["claim"]: row["verdict"] for row in report["claims"]}
    assert verdicts["Sparse attention maps"] == "reproduced" and report["warnings"] == []
    assert all((tmp_path / run.name / "statistics.json").is_file() for run in runs)


def test_mistakes_are_one_message_and_an_exit_code(runs, tmp_path):
    cases = [
        ((runs[0], "--out", tmp_path), 2, "at least two"),
        ((*runs, "--out", tmp_path, "--heads", "9.9"), 2, "has no head 9.9"),
        ((runs[0], tmp_path / "nowhere", "--out", tmp_path), 4, "nowhere is neither a folder nor a Hub id"),
        ((*runs, "--out", runs[0] / "recipe.yaml" / "x", "--no-maps"), 6, "cannot be written"),
    ]
    for arguments, code, words in cases:
        found = compare(*arguments)
        assert (found.returncode, words in found.stderr) == (code, True), (arguments, found.stderr)
        assert "Traceback" not in found.stderr
    assert compare(*runs).returncode == 2  # --out is missing
    assert compare(*runs, "--out", tmp_path, "--heads", "1-2").returncode == 2
    assert compare(*runs, "--out", tmp_path, "--measure", "loss").returncode == 2
