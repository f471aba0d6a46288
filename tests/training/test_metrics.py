"""What a run says of itself while it trains: numbers, files, reporters."""

import copy
import json
import math
import time

import pytest
import torch
from training_runs import SEQ_LEN, make_rows, make_trainer, records

from hf_softpick.data.collating import PackedCollator
from hf_softpick.files import plain
from hf_softpick.training import flops
from hf_softpick.training.callbacks import line
from hf_softpick.training.metrics import Clock, MetricsFile, duration


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Log records of 4 steps of 8 rows, with TensorBoard and wandb."""
    folder = tmp_path_factory.mktemp("logged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(folder))
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
        trainer = make_trainer(folder, report_to=["tensorboard", "wandb"], eval_strategy="steps", eval_steps=2)
        trainer.peak_flops = 1e12
        trainer.train()
        import wandb

        wandb.finish()
    return folder, trainer


def test_every_log_line_has_what_a_person_asks_for(logged):
    """Loss, gradient, rate, tokens, speed, time left, memory, MFU."""
    folder, trainer = logged
    lines = [record for record in records(folder) if "loss" in record]
    assert [record["step"] for record in lines] == [1, 2, 3, 4]
    assert [record["tokens_seen"] for record in lines] == [8 * SEQ_LEN * step for step in (1, 2, 3, 4)]
    assert lines[-1]["eta_seconds"] == 0.0 < lines[0]["eta_seconds"]
    for record in lines:
        assert record["tokens_per_second"] > 0 and record["memory_gib"] > 0.1 and record["grad_norm"] > 0
        left = (4 - record["step"]) * 8 * SEQ_LEN
        assert record["eta_seconds"] * record["tokens_per_second"] == pytest.approx(left)
        expected = record["tokens_per_second"] * trainer.flops_per_token / 1e12
        assert record["mfu"] == pytest.approx(expected)
    assert sum("eval_loss" in record for record in records(folder)) == 2


def test_logged_losses_are_those_of_a_plain_loop(tmp_path):
    """Gradient descent written out: every other test compares one run of ours with another."""
    rows, rate = make_rows(32), 0.5
    trainer = make_trainer(
        tmp_path,
        rows,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=2,
        optim="sgd",
        learning_rate=rate,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    model, losses = copy.deepcopy(trainer.model).train(), []
    for step in range(4):
        batch = PackedCollator()(rows[8 * step : 8 * step + 8])
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate * parameter.grad
    trainer.train()
    logged = records(tmp_path)
    expected = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2]
    assert [record["loss"] for record in logged if "loss" in record] == pytest.approx(expected, abs=1e-5)
    assert [record["train_loss"] for record in logged if "train_loss" in record] == pytest.approx(
        [sum(losses) / 4], abs=1e-5
    )
    assert abs(losses[0] - losses[3]) > 0.01


def test_reporters_work_offline(logged):
    """report_to is transformers' own; our numbers must reach it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = logged
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"train/loss", "train/tokens_per_second", "train/tokens_seen", "eval/loss"} <= set(events.Tags()["scalars"])
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


def test_no_mfu_without_a_known_peak(tmp_path):
    """A guessed peak would give a wrong figure that looks measured."""
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    assert not any("mfu" in record for record in records(tmp_path))


def test_flops_of_a_known_model(tmp_path):
    """Counted by hand: 6 for each multiplied weight, and 12 L H D T for attention."""
    trainer = make_trainer(tmp_path)
    attention, mlp, head, norms, scales = 2 * 4 * 32 * 32, 2 * 3 * 32 * 64, 64 * 32, 5 * 32, 2 * 2
    weights = attention + mlp + head + norms + scales
    assert trainer.flops_per_token == 6 * weights + 12 * 2 * 2 * 16 * SEQ_LEN
    assert trainer.floating_point_ops({"input_ids": torch.zeros(3, SEQ_LEN)}) == trainer.flops_per_token * 3 * SEQ_LEN


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12), ("Voodoo 2", None)],
)
def test_peaks(name, peak):
    """Longer names are tried first, unknown ones are unknown."""
    assert flops.peak_flops(name) == peak


def test_clock_leaves_pauses_out():
    """Evaluation time must not lower the tokens per second."""
    clock = Clock()
    time.sleep(0.05)
    with clock.paused():
        time.sleep(0.2)
    assert 0.04 < clock.read() < 0.15


def test_non_finite_numbers_are_strict_json():
    """NaN is not JSON; null or 0 would hide it."""
    values = plain({"a": math.nan, "b": [math.inf, -math.inf, 1.5], "c": torch.tensor(2.0)})
    assert values == {"a": "nan", "b": ["inf", "-inf", 1.5], "c": 2.0}
    json.loads(json.dumps(values), parse_constant=lambda _: pytest.fail("not strict"))


def test_rewind_and_torn_line(tmp_path):
    """A resumed run measures again what came after its checkpoint; a killed one may leave half a line."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        file.write({"step": step, "loss": 1.0 * step})
    with file.path.open("a") as raw:
        raw.write('{"step": 4, "lo')
    assert [record["step"] for record in file.read()] == [1, 2, 3]
    file.rewind(2)
    file.write({"step": 3, "loss": 9.0})
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 9.0)]


def test_the_line_for_a_person():
    """Short, with units, and only what was measured."""
    logs = {
        "loss": 4.12345,
        "grad_norm": 0.812,
        "learning_rate": 3e-4,
        "tokens_per_second": 12345.6,
        "eta_seconds": 3725,
    }
    assert line(20, logs) == "step 20  loss 4.1235  grad 0.812  lr 3.00e-04  12,346 tok/s  ETA 1:02:05"
    assert line(5, {"eval_loss": 2.5}) == "step 5  validation loss 2.5000"
    assert "3 updates skipped" in line(1, {"loss": math.nan, "skipped_updates": 3})
    assert duration(59.9) == "0:00:59"
