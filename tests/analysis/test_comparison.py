"""What compare.py reads: runs as they are, results that belong to them, and what must not be mixed."""

import json
import math
import shutil

import pytest
from comparison_cases import STEPS, quantization, statistics, write, write_pair, write_run

from hf_softpick.analysis import run_records
from hf_softpick.analysis.comparison import gather, mismatch
from hf_softpick.analysis.run_records import curves, gather_run, number
from hf_softpick.errors import CheckpointError, DataError, RecipeError
from hf_softpick.files import plain
from hf_softpick.modeling.attention_guard import SEALED


def test_a_pair_that_differs_in_the_normalizer_alone(tmp_path):
    found = gather(write_pair(tmp_path / "runs"))
    assert [run["label"] for run in found["runs"]] == ["softmax-a", "softpick-a"]
    assert [(d["key"], d["values"], d["training"]) for d in found["recipe_differences"]] == [
        ("model.normalizer", ["softmax", "softpick"], True),
        ("run.name", ["softmax-a", "softpick-a"], False),
    ]
    assert found["pair"] == {
        "softpick": "softpick-a",
        "softmax": "softmax-a",
        "other_differences": [],
        "unknown": None,
    }
    assert found["warnings"] == []
    assert json.loads(json.dumps(plain(found), allow_nan=False)) == plain(found)


def test_curves_end_in_the_mean_of_the_last_tenth():
    records = [{"step": s, "loss": float(s), "tokens_per_second": 100 + s} for s in range(1, 101)]
    records += [{"step": 50, "eval_loss": 7.0}, {"step": 100, "eval_loss": 6.0, "eval_tokens": 80}]
    found = curves(records)
    assert found["last_train_loss"] == pytest.approx(sum(range(91, 101)) / 10) and found["last_train_lines"] == 10
    assert found["eval"] == [[50, 7.0], [100, 6.0]] and found["last_eval_loss"] == 6.0 and found["eval_tokens"] == 80
    assert found["tokens_per_second"] == 151  # without the first line, 2 to 100
    assert found["tokens_per_second_20"] < 151 < found["tokens_per_second_80"]


def test_steps_that_a_resumed_run_logged_again_count_once_and_bad_losses_are_counted():
    records = [
        {"step": 1, "loss": 9.0},
        {"step": 2, "loss": "nan"},
        {"step": 1, "loss": 5.0},
        {"step": 3, "loss": 4.0},
    ]
    found = curves(records)
    assert found["train"] == [[1, 5.0], [3, 4.0]] and found["nonfinite"] == 1 and found["log_lines"] == 3


def test_long_curves_are_thinned_by_means():
    found = curves([{"step": s, "loss": float(s % 2)} for s in range(1, 10_001)])
    assert len(found["train"]) <= run_records.MAX_POINTS and found["train"][-1][0] == 10_000
    assert all(abs(loss - 0.5) < 0.05 for _, loss in found["train"])


def test_nan_strings_are_numbers_and_text_is_not():
    assert math.isnan(number("nan")) and number("-inf") == -math.inf and number("3") is None and number(True) is None


@pytest.mark.parametrize("step, words", [(500, "step 500"), (None, "unknown step")])
def test_a_result_of_another_step_is_flagged(tmp_path, step, words):
    runs = write_pair(tmp_path)
    record = statistics("softpick-a", "softpick", 0.0, 3.0, 9.0, 0.4)
    record["model"]["trained_steps"] = step
    write(runs[1] / "report/statistics.json", record)
    found = gather(runs)
    (warning,) = found["warnings"]
    assert words in warning and f"step {STEPS:,}" in warning and "eval/activations.py" in warning
    assert list(found["runs"][1]["stale"]) == ["statistics"]


def test_results_on_different_data_are_flagged(tmp_path):
    runs = write_pair(tmp_path)
    record = statistics("softpick-a", "softpick", 0.0, 3.0, 9.0, 0.4)
    record["data"]["tokens"] = 4096
    write(runs[1] / "report/statistics.json", record)
    record = quantization("softpick-a", "softpick", {"int4": 0.1})
    record["baseline"]["dtype"] = "bfloat16"
    write(runs[1] / "report/quantization.json", record)
    found = gather(runs)
    assert len(found["warnings"]) == 2
    assert "tokens differs: softmax-a 8192, softpick-a 4096" in found["warnings"][0]
    assert "bfloat16" in mismatch("quantization", found["runs"])
    assert mismatch("passkey", found["runs"]) is None


def test_the_pair_is_the_one_whose_recipes_differ_least(tmp_path):
    runs = [
        write_run(tmp_path, "far", "softmax", training__learning_rate=1e-3, training__seed=2),
        write_run(tmp_path, "near", "softmax"),
        write_run(tmp_path, "pick", "softpick", training__save_steps=7),
    ]
    pair = gather(runs)["pair"]
    assert (pair["softpick"], pair["softmax"], pair["other_differences"]) == ("pick", "near", [])
    found = gather([runs[0], runs[2]])
    assert found["pair"]["other_differences"] == ["training.learning_rate", "training.seed"]
    assert "training.learning_rate, training.seed" in found["warnings"][0]


def test_scaled_and_unscaled_do_not_make_a_pair(tmp_path):
    runs = [write_run(tmp_path, n, n) for n in ("softmax", "scaled_softmax", "scaled_softpick")]
    assert gather(runs)["pair"]["softmax"] == "scaled_softmax"
    assert "scaling" in gather([runs[0], runs[2]])["pair"]["other_differences"][0]
    pair = gather(runs[:2])["pair"]
    assert pair["softpick"] is None and pair["softmax"] == "softmax"


def test_models_without_a_run_have_no_curves_and_unknown_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / "runs", n, n) for n in ("softmax", "softpick")]
    models = [run.rename(tmp_path / f"model-{run.name}") / "final" for run in runs]
    for model in models:
        (model.parent / "recipe.yaml").unlink()
        model.rename(model.with_name(f"only-{model.parent.name}"))
    sources = [model.with_name(f"only-{model.parent.name}") for model in models]
    found = gather(sources)
    assert [run["curves"] for run in found["runs"]] == [None, None]
    assert found["runs"][1]["normalizer"] == "softpick"
    assert (
        "no recipe of" in found["pair"]["unknown"]
        and "cannot be checked" in found["warnings"][0]
        and found["pair"]["other_differences"] == []
    )
    # A result of the same name, but of another model.
    name = found["runs"][1]["name"]
    write(tmp_path / f"report/{name}/statistics.json", statistics("elsewhere", "softpick", 0.0, 3.0, 9.0, 0.4))
    assert "another model" in gather(sources)["warnings"][1]


def test_a_sealed_model_is_looked_into(tmp_path):
    """Another architecture, as modeling/attention_guard.py saves it."""
    run = write_run(tmp_path, "a", "softpick")
    inside = json.loads((run / "final/config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    write(run / "final/config.json", {"model_type": "softpick_sealed", "vocab_size": "a note", SEALED: [inside]})
    plain_run = write_run(tmp_path, "b", "softpick")
    found, expected = gather_run(run)["model"], gather_run(plain_run)["model"]
    assert found == expected | {"architecture": "GPT2LMHeadModel"} and found["vocab_size"] == 4096


def test_results_are_looked_for_in_the_given_folder_first(tmp_path):
    runs = write_pair(tmp_path / "runs")
    write(tmp_path / "mine/softpick-a/statistics.json", statistics("softpick-a", "softpick", 0.25, 3.0, 9.0, 0.4))
    found = gather(runs, tmp_path / "mine")["runs"]
    assert found[1]["statistics"]["summary"]["sink_rate"] == 0.25
    assert found[0]["statistics"]["summary"]["sink_rate"] == 0.63


def test_an_unfinished_run_is_taken_with_a_warning(tmp_path):
    runs = write_pair(tmp_path, results=False)
    (runs[1] / "finished.json").unlink()
    (runs[1] / "final/config.json").unlink()
    found = gather(runs)
    assert not found["runs"][1]["has_model"] and found["runs"][1]["normalizer"] == "softpick"
    assert any("softpick-a has not finished" in warning for warning in found["warnings"])


def test_two_runs_of_one_name_keep_apart(tmp_path):
    runs = [write_run(tmp_path / "x", "a", "softmax"), write_run(tmp_path / "y", "a", "softpick")]
    assert [run["label"] for run in gather(runs)["runs"]] == ["a (1)", "a (2)"]


def test_wrong_arguments_are_named(tmp_path):
    run = write_run(tmp_path, "a", "softmax")
    with pytest.raises(RecipeError, match="at least two"):
        gather([run])
    with pytest.raises(RecipeError, match="given twice"):
        gather([run, run / "final"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty holds no model"):
        gather([run, tmp_path / "empty"])
    (run / "report").mkdir()
    (run / "report/passkey.json").write_text("{")
    with pytest.raises(DataError, match=r"passkey\.json cannot be read"):
        gather_run(run)
    (run / "report/passkey.json").write_text("[]")
    with pytest.raises(DataError, match="holds a list"):
        gather_run(run)


def test_statistics_logged_while_training_are_kept():
    records = [
        {"step": 0, "stats_sink_rate": 0.0, "stats_sparsity": 0.5, "stats_kurtosis": "nan", "stats_hidden_max": 2.0},
        {"step": 50, "loss": 3.0},
        {"step": 50, "stats_sink_rate": 0.25, "stats_kurtosis": 4.0, "stats_hidden_max": 5.0},
    ]
    assert curves(records)["untrained_sparsity"] == 0.5 and curves(records[1:])["untrained_sparsity"] is None
    found = curves(records)["statistics"]
    assert found["sink_rate"] == [[0, 0.0], [50, 0.25]] and found["kurtosis"] == [[50, 4.0]]
    assert found["first_mass"] == []


def test_results_of_another_model_are_stale(tmp_path):
    """Copied from the other run: same step, another normalizer; the saved model has the last word."""
    runs = write_pair(tmp_path)
    for kind in ("statistics", "quantization"):
        shutil.copyfile(runs[0] / f"report/{kind}.json", runs[1] / f"report/{kind}.json")
    found = gather(runs)
    first, second = found["runs"]
    assert {first["normalizer"], second["normalizer"]} == {"softpick", "softmax"}
    assert "measured on a model with normalizer" in second["stale"]["statistics"] and not first["stale"]


def test_one_results_folder_cannot_hold_two_runs_of_one_name(tmp_path):
    runs = [write_run(tmp_path / place, "run", kind) for place, kind in (("a", "softpick"), ("b", "softmax"))]
    with pytest.raises(RecipeError, match="2 of the runs are called run"):
        gather(runs, tmp_path)
    assert [run["label"] for run in gather(runs)["runs"]] == ["run (1)", "run (2)"]


def test_another_dtype_is_another_condition(tmp_path):
    runs = write_pair(tmp_path)
    path = runs[1] / "report/statistics.json"
    record = json.loads(path.read_text())
    record["model"]["dtype"] = "bfloat16"
    path.write_text(json.dumps(record))
    assert any("dtype differs" in warning for warning in gather(runs)["warnings"])
