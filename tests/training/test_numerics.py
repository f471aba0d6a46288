"""Non-finite losses and gradients: the update is left out, said aloud, and not for ever."""

import math

import pytest
import torch
from training_runs import make_rows, make_trainer, records
from transformers import TrainerCallback

from hf_softpick.errors import DataError, NumericsError
from hf_softpick.training.numerics import SkipGuard


class Poison(TrainerCallback):
    """Makes the first weight's gradient NaN in the steps given, and notes weights and optimizer state after each."""

    def __init__(self, steps):
        self.steps, self.states = steps, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 in self.steps:
            weight = next(model.parameters())
            self.handle = weight.register_hook(lambda gradient: gradient * math.nan)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step in self.steps:
            self.handle.remove()
        weights = [p.detach().clone() for p in model.parameters()]
        moments = [value.clone() for each in optimizer.state.values() for value in each.values()]
        self.states.append((weights, moments))


def _equal(one, other):
    return all(
        torch.equal(a, b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)
    )


def test_non_finite_gradient_changes_nothing_and_training_goes_on(tmp_path):
    """Weights, moments and AdamW's step count stay bit-equal over the refused step, and the next one is applied."""
    trainer, poison = make_trainer(tmp_path, max_steps=4), Poison({2})
    trainer.add_callback(poison)
    trainer.train()
    assert _equal(poison.states[1], poison.states[0])
    assert not _equal(poison.states[2], poison.states[1])
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    skipped = [record for record in records(tmp_path) if record.get("event") == "skipped_update"]
    assert [(record["step"], record["reason"]) for record in skipped] == [(2, "non-finite gradient")]
    by_step = {record["step"]: record for record in records(tmp_path) if "loss" in record}
    assert by_step[2]["loss"] == "nan" and by_step[2]["grad_norm"] == "nan"
    assert math.isfinite(by_step[3]["loss"]) and by_step[3]["loss"] > 1.0
    assert by_step[4]["skipped_updates"] == 1


def test_infinite_loss_with_finite_gradient_is_refused(tmp_path):
    """A target of probability 0 gives loss inf and gradient p - 1: only the loss shows it."""
    trainer, poison = make_trainer(tmp_path, max_steps=2), Poison(set())
    trainer.add_callback(poison)
    forward = trainer.model.forward

    def broken(*args, **kwargs):
        output = forward(*args, **kwargs)
        if trainer.state.global_step == 1:
            output.loss = output.loss + torch.tensor(math.inf)
        return output

    trainer.model.forward = broken
    trainer.train()
    assert _equal(poison.states[1], poison.states[0])
    (skipped,) = [record for record in records(tmp_path) if record.get("event") == "skipped_update"]
    assert (skipped["reason"], skipped["ranks"], skipped["losses"]) == ("non-finite loss", [0], ["inf"])


def test_one_bad_micro_batch_refuses_the_whole_update(tmp_path):
    """Gradients of the good micro-batches must not be applied alone."""
    trainer, poison = (
        make_trainer(tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=4),
        Poison(set()),
    )
    trainer.add_callback(poison)
    forward, calls = trainer.model.forward, []

    def broken(*args, **kwargs):
        output = forward(*args, **kwargs)
        calls.append(None)
        output.loss = output.loss * (math.nan if len(calls) == 6 else 1.0)
        return output

    trainer.model.forward = broken
    trainer.train()
    assert len(calls) == 8
    assert _equal(poison.states[1], poison.states[0])


def test_learning_rate_is_a_function_of_the_step(tmp_path):
    """A refused update still counts as a step, otherwise the schedule would not end at its end."""
    rates = []
    for name, steps in (("clean", set()), ("poisoned", {2, 3})):
        trainer = make_trainer(tmp_path / name, max_steps=5)
        trainer.add_callback(Poison(steps))
        trainer.train()
        rates.append([entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry])
    assert rates[0] == rates[1]


def test_a_window_is_the_mean_of_its_applied_updates(tmp_path):
    """One NaN in a window of logging_steps must neither hide the other losses nor count as 0."""
    each = make_trainer(tmp_path / "each", max_steps=4)
    each.add_callback(Poison({2}))
    each.train()
    window = make_trainer(tmp_path / "window", max_steps=4, logging_steps=4)
    window.add_callback(Poison({2}))
    window.train()
    single = [record["loss"] for record in records(tmp_path / "each") if "loss" in record and record["loss"] != "nan"]
    (whole,) = [record["loss"] for record in records(tmp_path / "window") if "loss" in record]
    assert whole == pytest.approx(sum(single) / 3, abs=1e-6)


def test_too_many_in_a_row_end_the_run(tmp_path):
    """Two are tolerated, the third in a row is not; a good step in between starts the count again."""
    trainer = make_trainer(tmp_path / "a", max_steps=8, max_consecutive_skips=2)
    trainer.add_callback(Poison({1, 2, 4, 5}))
    trainer.train()
    assert trainer.state.global_step == 8
    trainer = make_trainer(tmp_path / "b", max_steps=8, max_consecutive_skips=2)
    trainer.add_callback(Poison({2, 3, 4}))
    with pytest.raises(NumericsError, match=r"3 updates in a row .*step 4.*max_consecutive_skips allows 2"):
        trainer.train()
    assert NumericsError.exit_code == 5


def test_too_many_batches_without_targets(tmp_path):
    """More in a row than max_consecutive_skips allows: the data is wrong."""
    trainer = make_trainer(tmp_path, make_rows(64, empty=True), max_steps=8, max_consecutive_skips=2)
    with pytest.raises(DataError, match="3 updates in a row had no target token"):
        trainer.train()


@pytest.mark.parametrize(
    ("empty", "refused", "error"), [(3, 0, DataError), (1, 2, NumericsError), (2, 0, None), (0, 2, None)]
)
def test_a_run_without_an_update_is_not_trained(empty, refused, error):
    """Three steps of which none was applied must not end as a finished run."""
    guard = SkipGuard(10)
    for _ in range(empty):
        guard.no_targets()
    for step in range(refused):
        guard.refuse(step, [math.nan], math.nan)
    if error is None:
        guard.require_training(3)
        return
    with pytest.raises(error, match="nothing was trained"):
        guard.require_training(3)


def test_batch_without_targets_is_left_out(tmp_path):
    """0/0 is NaN, and a gradient of 0 would still move weights by momentum and decay."""
    rows = make_rows(24)
    rows[8:16] = make_rows(8, empty=True)
    trainer, poison = make_trainer(tmp_path, rows, max_steps=3, weight_decay=0.1), Poison(set())
    # In order, so that the second step gets exactly the rows without targets.
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.add_callback(poison)
    trainer.train()
    assert _equal(poison.states[1], poison.states[0])
    assert not _equal(poison.states[2], poison.states[1])
    assert (trainer.guard.total, trainer.guard.empty) == (0, 1)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
