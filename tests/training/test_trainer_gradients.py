"""What reaches the optimizer: the same update however the batch is cut, the recipe's AdamW, schedule and clipping."""

import pytest
import torch
from training_runs import make_trainer
from transformers import TrainerCallback


def _series(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def whole_batch(tmp_path_factory):
    """Losses and final weights of 4 steps with 8 rows in one micro-batch."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"))
    return _series(trainer), {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(("rows", "accumulation"), [(1, 8), (4, 2)])
def test_accumulation_changes_nothing(tmp_path, whole_batch, rows, accumulation):
    """Rows hold different numbers of targets, so a mean of micro-batch means would differ in the second digit."""
    trainer = make_trainer(
        tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation, max_steps=4
    )
    losses = _series(trainer)
    assert len(losses) == 4
    assert losses == pytest.approx(whole_batch[0], abs=5e-6)  # another processor rounds 1.4e-6 apart
    # AdamW divides by the gradient's size, so near-zero gradients turn rounding into visible steps of at most lr.
    for name, parameter in trainer.model.named_parameters():
        assert torch.allclose(parameter, whole_batch[1][name], atol=1e-4), name


def test_gradients_are_invariant_to_accumulation(tmp_path):
    """The first gradient itself, before AdamW, to 1e-6."""

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            caught.append({name: p.grad.clone() for name, p in model.named_parameters()})

    caught: list[dict[str, torch.Tensor]] = []
    for rows, accumulation in ((8, 1), (1, 8)):
        trainer = make_trainer(
            tmp_path / str(rows),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
        )
        trainer.add_callback(Catch())
        trainer.train()
    for name, gradient in caught[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.allclose(gradient, caught[1][name], atol=1e-6, rtol=0), name


def test_adamw_takes_the_recipes_numbers_and_decays_matrices_alone(tmp_path):
    """transformers decays per-head scales, which are parameters of no norm; ours must not be pulled to 0."""
    trainer = make_trainer(tmp_path, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-15, max_steps=1)
    trainer.train()
    decayed, plain = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert decayed["betas"] == (0.8, 0.9) and decayed["eps"] == 1e-15
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in plain["params"]} == {1}
    assert len(plain["params"]) == 2 * 2 + 1 + 2  # norms of 2 layers, last norm, head scales of 2 layers


def test_cosine_reaches_its_minimum(tmp_path):
    """The last update is made with min_lr_rate of the peak, the first after warmup with the peak."""
    trainer = make_trainer(
        tmp_path,
        max_steps=12,
        warmup_steps=2,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
    )
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates[0] == 0.0 and max(rates) == pytest.approx(1e-2)
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(1e-3)
    assert min(rates[2:]) > 1e-3 - 1e-12


def test_gradients_are_clipped(tmp_path):
    """The logged norm is the one before clipping; the optimizer sees at most max_grad_norm."""

    class Measure(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())

    norms: list[float] = []
    trainer = make_trainer(tmp_path, max_grad_norm=0.01, max_steps=2)
    trainer.add_callback(Measure())
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert min(logged) > 0.1
    assert norms == pytest.approx([0.01] * 2, rel=1e-3)
