"""Two private methods of transformers' Trainer that no public hook replaces; the other names: modeling/compat.py.

Read in transformers 5.17 and 5.23. No callback is told the norm of the gradients before the optimizer's step, and none
encloses the writing of a checkpoint. `tests/training/test_trainer_hooks.py` runs both.
"""

from collections.abc import Callable

from torch import Tensor, nn
from transformers import Trainer


class HookedTrainer(Trainer):
    """transformers' Trainer, with those two methods under names of our own."""

    def judge_update(self, model: nn.Module, norm: Tensor | float | None) -> Tensor | float | None:
        """Called once before each optimizer step, with the gradients reduced and clipped.

        Args:
            norm: of all gradients before clipping; None where DeepSpeed does not know it.

        Returns:
            what is logged as the norm.
        """
        return norm

    def write_checkpoint(self, write: Callable[[], None]) -> None:
        """`write` makes `checkpoint-N` in args.output_dir, on every rank."""
        write()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        return self.judge_update(model, super()._get_grad_norm(model, grad_norm))

    def _save_checkpoint(self, model: nn.Module, trial: None) -> None:
        self.write_checkpoint(lambda: super(HookedTrainer, self)._save_checkpoint(model, trial))
