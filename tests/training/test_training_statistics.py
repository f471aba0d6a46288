"""Statistics logged during training: equal to a measurement afterwards, and without a trace in the training itself."""

import pytest
import torch
from training_runs import make_trainer, records

from hf_softpick.analysis.statistics import measure
from hf_softpick.training.statistics import PREFIX, SHARE, StatisticsLog, choose_rows


def _train(folder, every=2, **arguments):
    trainer = make_trainer(folder, max_steps=5, **arguments)
    if every:
        trainer.add_callback(StatisticsLog(trainer, every))
    trainer.train()
    return trainer


def _logged(folder):
    return {
        record["step"]: {name.removeprefix(PREFIX): value for name, value in record.items() if PREFIX in name}
        for record in records(folder)
        if f"{PREFIX}kurtosis" in record
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without statistics: its losses and weights."""
    trainer = _train(tmp_path_factory.mktemp("plain"), every=0)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.model.state_dict()


@pytest.mark.parametrize(
    "arguments",
    [{}, {"gradient_checkpointing": True}, {"torch_compile": True, "torch_compile_backend": "eager"}],
    ids=["plain", "checkpointing", "compile"],
)
def test_logged_at_both_ends_and_in_between(tmp_path, plain, arguments):
    trainer = _train(tmp_path, **arguments)
    logged = _logged(tmp_path)
    assert sorted(logged) == [0, 2, 4, 5]
    # The weights are those of the last step, so measuring again gives the same.
    expected = measure(trainer.model, choose_rows(trainer)).summary()
    # Documents of these rows are too short to have sinks.
    sinks = {name for name in expected if name.startswith("sink_rate") or name == "first_mass"}
    assert all(logged[5][name] == "nan" for name in sinks)
    others = {name: value for name, value in expected.items() if name not in sinks}
    assert {name: logged[5][name] for name in others} == pytest.approx(others, rel=1e-5)
    assert logged[0]["kurtosis"] != logged[5]["kurtosis"]
    assert all(entry["seconds"] > 0 for entry in logged.values())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not arguments:
        assert losses == plain[0]
        assert all(torch.equal(value, plain[1][name]) for name, value in trainer.model.state_dict().items())
    else:
        assert losses == pytest.approx(plain[0], abs=1e-5)


def test_torch_compile_is_not_asked_to_compile_again(tmp_path):
    from torch._dynamo.utils import counters

    graphs = []
    for every in (0, 1):
        torch._dynamo.reset()
        counters.clear()
        _train(tmp_path / str(every), every=every, torch_compile=True, torch_compile_backend="eager")
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


def test_rows_are_few_real_and_always_the_same(tmp_path):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=64)
    rows = choose_rows(trainer)
    assert sum(row["input_ids"].numel() for row in rows) <= 64 * trainer.seq_len // SHARE
    assert len(rows) == 64 // SHARE
    for row, source in zip(rows, trainer.eval_dataset, strict=False):
        length = source["num_tokens"]
        assert row["input_ids"].tolist() == [source["input_ids"][:length]]
        assert row["position_ids"].tolist() == [source["position_ids"][:length]]


def test_nan_inside_the_model_is_named(tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    StatisticsLog(trainer, 1)._log()
    assert "first in layer 1 mlp" in caplog.text
    assert records(tmp_path)[-1][f"{PREFIX}kurtosis"] == "nan"
