"""Verdicts on the paper's claims: each way that each claim can go, and what is left undecided."""

import json
import math

import pytest
from comparison_cases import quantization, statistics, write, write_pair, write_run

from hf_softpick.analysis.claims import judge
from hf_softpick.analysis.comparison import gather
from hf_softpick.analysis.run_records import command

SINK, REMOVED, KURTOSIS, MAXIMUM, SPARSE, QUANTIZED, LOSS = range(7)


def judged(runs):
    return judge(gather(runs))


def with_statistics(runs, softmax, softpick):
    """(sink, kurtosis, maximum, sparsity) of each."""
    for run, figures in zip(runs, (softmax, softpick), strict=True):
        write(run / "report/statistics.json", statistics(run.name, run.name.split("-")[0], *figures))
    return judged(runs)


def test_the_paper_is_reproduced_by_its_own_figures(tmp_path):
    rows = judged(write_pair(tmp_path))
    assert [row["verdict"] for row in rows] == ["reproduced"] * 7
    assert rows[KURTOSIS]["figures"] == {"softmax-a": {"kurtosis": 33510.0}, "softpick-a": {"kurtosis": 340.0}}
    assert rows[MAXIMUM]["figures"]["softmax-a"]["maximum"] == 240.0
    assert "By the usual thresholds neither has massive activations." in rows[MAXIMUM]["detail"]
    assert {rows[i]["sample"] for i in (REMOVED, KURTOSIS, MAXIMUM, SPARSE)} == {"8,192 tokens in 40 sequences"}
    assert rows[QUANTIZED]["sample"] == "8,192 tokens"
    # 36 sequences, 4 layers, 6 heads
    assert rows[SINK]["sample"] == "864 maps, 36 sequences" and "0.12%" in rows[SINK]["detail"]
    assert "By the paper's measure, up to 1e-5: softpick-a 47.00%, softmax-a 0.00%" in rows[SPARSE]["detail"]
    assert "Random weights, at step 0, gave 48.95% exact zeros." in rows[SPARSE]["detail"]
    assert all(row["rule"] and row["paper"] and row["detail"] and not row["trivial"] for row in rows)
    assert all(list(row["figures"]) == ["softmax-a", "softpick-a"] for row in rows)  # as they were given


@pytest.mark.parametrize(
    "softmax, softpick, verdicts",
    [
        # sink rate 0, sinks removed, kurtosis, maximum, sparse
        ((0.0, 9.0, 9.0, 0.0), (0.0, 9.0, 9.0, 0.3), ("reproduced", "not measured") + ("not reproduced",) * 2),
        ((0.0, 9.0, 9.0, 0.0), (0.1, 7.3, 7.3, 0.3), ("not reproduced",) * 4),
        ((0.5, 9.0, 9.0, 0.0), (0.1, 7.1, 7.1, 0.3), ("not reproduced",) * 2 + ("reproduced",) * 2),
        ((0.5, 9.0, 9.0, 0.0), (0.0, 99.0, 5.0, 0.3), ("reproduced",) * 2 + ("not reproduced", "reproduced")),
        (("nan", "nan", 9.0, 0.0), (0.0, 3.0, "inf", 0.3), ("reproduced",) + ("not measured",) * 3),
        ((0.5, 9.0, 9.0, 0.0), ("nan", 3.0, 3.0, 0.3), ("not measured",) * 2 + ("reproduced",) * 2),
        ((0.5, 0.0, 9.0, 0.0), (0.0, -1.0, 3.0, 0.3), ("reproduced",) * 2 + ("not measured", "reproduced")),
    ],
)
def test_verdicts_of_statistics(tmp_path, softmax, softpick, verdicts):
    runs = write_pair(tmp_path)
    for run, figures in zip(runs, (softmax, softpick), strict=True):
        record = statistics(run.name, run.name.split("-")[0], 0.0, 1.0, 1.0, figures[3])
        summary = {"sink_rate": figures[0], "kurtosis": figures[1], "hidden_max": figures[2], "hidden_min": -1.0}
        record["summary"] |= summary
        write(run / "report/statistics.json", record)
    rows = judged(runs)
    assert tuple(row["verdict"] for row in rows[:4]) == verdicts


@pytest.mark.parametrize(("softmax", "softpick"), [(0, 3), (3, 0), (2, 2)])
def test_massive_activations_of_one_run_are_not_those_of_neither(tmp_path, softmax, softpick):
    runs = write_pair(tmp_path)
    for run, count in zip(runs, (softmax, softpick), strict=True):
        record = statistics(run.name, run.name.split("-")[0], 0.0, 3.0, 9.0, 0.4)
        record["summary"]["massive_activations"] = count
        write(run / "report/statistics.json", record)
    assert "neither" not in judged(runs)[MAXIMUM]["detail"]


def test_no_sink_anywhere_is_said_plainly(tmp_path):
    rows = with_statistics(write_pair(tmp_path), (0.0, 9.0, 9.0, 0.0), (0.0, 3.0, 3.0, 0.4))
    assert rows[SINK]["verdict"] == "reproduced" and rows[SINK]["trivial"]
    assert "trivially: softmax-a has no sink either" in rows[SINK]["detail"]
    assert rows[REMOVED]["verdict"] == "not measured" and not rows[REMOVED]["trivial"]
    assert "Softmax shows no sink either" in rows[REMOVED]["detail"]


def test_the_minimum_counts_for_the_maximum(tmp_path):
    runs = write_pair(tmp_path)
    record = statistics("softpick-a", "softpick", 0.0, 3.0, 9.0, 0.4)
    record["summary"]["hidden_min"] = -999.0
    write(runs[1] / "report/statistics.json", record)
    row = judged(runs)[MAXIMUM]
    assert row["verdict"] == "not reproduced" and row["figures"]["softpick-a"]["maximum"] == 999.0


@pytest.mark.parametrize("share, verdict", [(0.25, "reproduced"), (0.2, "not reproduced"), ("nan", "not measured")])
def test_sparse_needs_no_baseline(tmp_path, share, verdict):
    runs = write_pair(tmp_path)
    record = statistics("softpick-a", "softpick", 0.0, 3.0, 9.0, 0.4)
    record["summary"]["sparsity"] = share
    write(runs[1] / "report/statistics.json", record)
    (runs[0] / "report/statistics.json").unlink()
    rows = judged(runs)
    assert rows[SPARSE]["verdict"] == verdict and rows[SINK]["verdict"] == "reproduced"
    assert rows[KURTOSIS]["verdict"] == "not measured" and "eval/activations.py" in rows[KURTOSIS]["detail"]


@pytest.mark.parametrize(
    "softmax, softpick, verdict, word",
    [
        (
            {"int4": 0.3, "int2": 5.0},
            {"int4": 0.1, "int2": 6.0},
            "not reproduced",
            "less in int4; softpick loses more",
        ),
        ({"int8": 0.0004, "int4": 0.3}, {"int8": 0.0009, "int4": 0.1}, "reproduced", "no difference in int8"),
        ({"int8": 0.0004}, {"int8": -0.0001}, "not measured", "Nothing to tell them apart"),
        ({"int8": 0.0009}, {"int8": -0.0021}, "not measured", "Nothing to tell them apart"),
        ({"int4": 0.3004}, {"int4": 0.3}, "not measured", "they lose the same in int4"),
        ({"int4": 0.3, "int2": 2.0}, {"int4": 0.3004, "int2": 1.0}, "reproduced", "no difference in int4"),
        ({"int4": 0.2}, {"int2": 0.1}, "not measured", "no format was measured in both"),
        ({"int2": "nan"}, {"int2": 2.0}, "reproduced", "less in int2"),
        ({"int2": 2.0}, {"int2": "nan"}, "not reproduced", "more in int2"),
        ({"int2": "inf"}, {"int2": "nan"}, "not measured", "same in int2"),
    ],
)
def test_verdicts_of_quantization(tmp_path, softmax, softpick, verdict, word):
    runs = write_pair(tmp_path)
    for run, increases in zip(runs, (softmax, softpick), strict=True):
        write(run / "report/quantization.json", quantization(run.name, run.name.split("-")[0], increases))
    row = judged(runs)[QUANTIZED]
    assert row["verdict"] == verdict and word in row["detail"]


@pytest.mark.parametrize(
    "loss, verdict, word",
    [
        (3.02, "reproduced", "higher"),
        (2.98, "reproduced", "lower"),
        (3.06, "not reproduced", "higher"),
        (2.9, "not reproduced", "better"),
    ],
)
def test_equal_training_loss_is_within_a_percent(tmp_path, loss, verdict, word):
    runs = [write_run(tmp_path, "m", "softmax", 3.0), write_run(tmp_path, "p", "softpick", loss)]
    row = judged(runs)[LOSS]
    assert row["verdict"] == verdict and word in row["detail"] and "nats" in row["detail"]
    assert ("better than equal" in row["detail"]) == (word == "better")


@pytest.mark.parametrize("lines, verdict", [(1, "not measured"), (2, "not measured"), (3, "reproduced")])
def test_equal_training_loss_needs_three_log_lines(tmp_path, lines, verdict):
    runs = write_pair(tmp_path, results=False)
    for run in runs:
        records = [{"step": 970 + 10 * i, "loss": 3.0} for i in range(4 - lines, 4)]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    row = judged(runs)[LOSS]
    assert row["verdict"] == verdict
    assert row["sample"] == f"{lines} log line{'' if lines == 1 else 's'}, one seed each"


@pytest.mark.parametrize("weak", [0, 1])
@pytest.mark.parametrize("validated", [True, False])
def test_models_that_learned_nothing_are_not_judged(tmp_path, weak, validated):
    runs = write_pair(tmp_path)
    limit = 0.7 * math.log(4096)
    for loss, judges in ((limit + 0.01, False), (limit - 0.01, True)):
        records = [{"step": step, "loss": 3.0 if validated else loss} for step in range(100, 1001, 10)]
        records += [{"step": 1000, "eval_loss": loss}] if validated else []
        (runs[weak] / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
        found = gather(runs)
        rows = judge(found)
        assert (REMOVED in [i for i, row in enumerate(rows) if row["verdict"] != "not measured"]) is judges
        if judges:
            assert found["warnings"] == []
        else:
            (warning,) = found["warnings"]
            assert {row["verdict"] for row in rows} == {"not measured"} and not any(row["trivial"] for row in rows)
            expected = f"{runs[weak].name} is undertrained: loss {loss:.4f} of ln(vocabulary) 8.3178"
            assert all(row["detail"].startswith(expected) for row in rows)
            assert warning.startswith(expected) and warning.endswith("No claim is judged.")


def test_no_contrast_of_runs_that_differ_in_more_than_the_normalizer(tmp_path):
    runs = write_pair(tmp_path)
    recipe = runs[1] / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace('"seed": 1', '"seed": 2'))
    rows = judged(runs)
    for row in (rows[i] for i in (REMOVED, KURTOSIS, MAXIMUM, QUANTIZED, LOSS)):
        assert row["verdict"] == "not measured" and "training.seed" in row["detail"] and row["figures"]
    assert rows[SINK]["verdict"] == rows[SPARSE]["verdict"] == "reproduced"  # of the softpick run alone


def test_no_verdict_from_a_stale_result(tmp_path):
    runs = write_pair(tmp_path)
    record = statistics("softpick-a", "softpick", 0.0, 3.0, 9.0, 0.4)
    record["model"]["trained_steps"] = 500
    write(runs[1] / "report/statistics.json", record)
    rows = judged(runs)
    assert {row["verdict"] for row in rows[:5]} == {"not measured"} and "step 500" in rows[SINK]["detail"]
    assert rows[LOSS]["verdict"] == "reproduced"


def test_without_results_or_without_the_pair_nothing_is_claimed(tmp_path):
    rows = judged(write_pair(tmp_path / "a", results=False))
    assert [row["verdict"] for row in rows] == ["not measured"] * 6 + ["reproduced"]
    rows = judged([write_run(tmp_path / "b", name, "softmax") for name in ("x", "y")])
    assert {row["verdict"] for row in rows} == {"not measured"}
    assert all("No run with softpick" in row["detail"] for row in rows)


def test_no_verdict_on_losses_of_different_steps(tmp_path):
    runs = write_pair(tmp_path)
    lines = (runs[1] / "metrics.jsonl").read_text().splitlines()
    (runs[1] / "metrics.jsonl").write_text("\n".join(lines[:50]))
    (runs[1] / "finished.json").unlink()
    row = judged(runs)[LOSS]
    assert row["verdict"] == "not measured" and "different steps" in row["detail"]


def test_commands_are_ready_for_a_shell():
    assert command("passkey", "runs/a b", "runs/c") == "python eval/passkey.py 'runs/a b' runs/c"
