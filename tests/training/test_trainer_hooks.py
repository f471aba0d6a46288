"""The private methods of transformers' Trainer that training/compat.py names; for its oldest and newest version."""

import math

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_softpick.training.compat import HookedTrainer


class _Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x, labels=None):
        return {"loss": (self.weight * x).mean()}


class _Recording(HookedTrainer):
    def judge_update(self, model, norm):
        self.events.append(("judged", float(norm), model.weight.grad.norm().item(), model.weight.detach().clone()))
        model.zero_grad(set_to_none=True)
        return 7.0

    def write_checkpoint(self, write):
        self.events.append(("saving", self.state.global_step))
        kept, self.args.output_dir = self.args.output_dir, f"{self.args.output_dir}/elsewhere"
        super().write_checkpoint(write)
        self.args.output_dir = kept


def _train(folder, **arguments):
    rows = [{"x": torch.arange(4.0)}] * 8
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", per_device_train_batch_size=1, max_steps=2, logging_steps=1
    )
    for name, value in arguments.items():
        setattr(args, name, value)
    trainer = _Recording(_Line(), args, train_dataset=rows)
    trainer.events = []
    trainer.train()
    return trainer


def test_the_update_is_judged_before_it_is_made(tmp_path):
    """Once an update, clipped by then, with the norm from before; without gradients nothing is applied."""
    for clip, applied in ((0.25, 0.25), (0.0, math.sqrt(14) / 4)):
        trainer = _train(tmp_path, max_grad_norm=clip, gradient_accumulation_steps=2, save_strategy="no")
        judged = [event for event in trainer.events if event[0] == "judged"]
        assert len(judged) == 2
        for _, norm, clipped, weight in judged:
            assert math.isclose(norm, math.sqrt(14) / 4, rel_tol=1e-4) and math.isclose(clipped, applied, rel_tol=1e-4)
            assert torch.equal(weight, torch.ones(4))
        assert torch.equal(trainer.model.weight.detach(), torch.ones(4))
        assert [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line] == [7.0, 7.0]


def test_a_checkpoint_is_written_whole_inside_the_hook(tmp_path):
    trainer = _train(tmp_path, save_strategy="steps", save_steps=2)
    assert [event for event in trainer.events if event[0] == "saving"] == [("saving", 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    written = {path.name for path in (tmp_path / "elsewhere" / "checkpoint-2").iterdir()}
    assert written > {"trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"}


def test_both_methods_are_transformers_own():
    """A method that has been renamed would be called by nobody."""
    for name in ("_get_grad_norm", "_save_checkpoint"):
        assert name in vars(Trainer) and name in vars(HookedTrainer)
