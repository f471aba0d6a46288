"""Token-weighted evaluation: one number whatever the batch size."""

import math

import pytest
import torch
from training_runs import make_rows, make_trainer

from hf_softpick.data.collating import PackedCollator


def _by_hand(model, rows):
    """Negative log likelihood of every target, one row at a time, in float64."""
    total, count = 0.0, 0
    for row in rows:
        batch = PackedCollator()([row])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        scores = torch.log_softmax(logits.double()[0, :-1], dim=-1)
        for place, target in enumerate(batch["labels"][0, 1:].tolist()):
            if target != -100:
                total, count = total - scores[place, target].item(), count + 1
    return total / count, count


@pytest.mark.parametrize("batch_size", [1, 2, 5, 13, 40])
def test_loss_is_the_mean_over_tokens_for_every_batch_size(tmp_path, batch_size):
    """transformers averages batch means, which weighs the tokens of a short last batch more."""
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=batch_size)
    metrics = trainer.evaluate()
    loss, count = _by_hand(trainer.model.eval(), make_rows(13))
    assert metrics["eval_loss"] == pytest.approx(loss, abs=1e-6)
    assert metrics["eval_tokens"] == count
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_the_last_evaluation_is_made_once(tmp_path):
    """Also of a run of one step, and not again when training has just made it."""
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    metrics = trainer.final_evaluation()
    assert metrics["eval_loss"] == pytest.approx(_by_hand(trainer.model.eval(), make_rows(13))[0], abs=1e-6)
    assert trainer.final_evaluation() == metrics
    assert sum("eval_loss" in record for record in trainer.state.log_history) == 1
    trainer.eval_dataset = None
    assert trainer.final_evaluation() == {}


def test_rows_without_targets_weigh_nothing(tmp_path):
    """A batch of padding has loss 0/0."""
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=2)
    alone = trainer.evaluate(make_rows(4))
    mixed = trainer.evaluate([*make_rows(2), *make_rows(2, empty=True), *make_rows(4)[2:]])
    assert mixed["eval_loss"] == pytest.approx(alone["eval_loss"], abs=1e-6)
    assert mixed["eval_tokens"] == alone["eval_tokens"]


def test_evaluation_leaves_training_as_it_was(tmp_path):
    """Evaluating between steps must change neither weights nor random numbers nor train mode."""
    without = make_trainer(tmp_path / "a", eval_strategy="no")
    without.train()
    between = make_trainer(tmp_path / "b", eval_strategy="steps", eval_steps=1)
    between.train()
    assert sum("eval_loss" in entry for entry in between.state.log_history) == 4
    for one, other in zip(without.model.parameters(), between.model.parameters(), strict=True):
        assert torch.equal(one, other)
