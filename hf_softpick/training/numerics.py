"""Non-finite losses and gradients: how an update is refused, counted and reported. No training loop lives here."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_softpick.errors import DataError, NumericsError

_NO_TARGETS = (
    "A target is a token with another one of its document before it: these documents are single tokens. Join them, "
    "or set tokenizer.add_bos or data.isolate_documents."
)


def poison(loss: Tensor, refuse: Tensor) -> Tensor:
    """`loss`, or NaN where `refuse` is true, so that every gradient of this update becomes NaN on every rank.

    A loss can be infinite while its gradient is finite (a target of probability 0). Turning the gradients to NaN lets
    the reduction that happens anyway carry the refusal to all ranks, whichever engine owns the optimizer step.
    """
    return loss * torch.where(refuse, torch.nan, 1.0).to(loss.dtype)


@dataclass
class SkipGuard:
    """Counts refused updates and ends the run when too many follow each other.

    Args:
        max_consecutive: how many refused updates in a row are tolerated.
    """

    max_consecutive: int
    consecutive: int = 0
    total: int = 0
    empty: int = 0
    empty_in_row: int = 0
    last: dict = field(default_factory=dict)

    def applied(self) -> None:
        """An update went in."""
        self.consecutive = self.empty_in_row = 0

    def no_targets(self) -> None:
        """The update had no target token at all: nothing to learn from, and no fault of the numbers.

        Raises:
            DataError: more than `max_consecutive` such updates in a row.
        """
        self.empty += 1
        self.empty_in_row += 1
        if self.empty_in_row > self.max_consecutive:
            raise DataError(f"{self.empty_in_row} updates in a row had no target token. {_NO_TARGETS}")

    def require_training(self, steps: int) -> None:
        """Refuse the end of a run of which all `steps`, counted from its start, were left out.

        Raises:
            DataError: none had a target token.
            NumericsError: the rest was not finite.
        """
        if not 0 < steps <= self.empty + self.total:
            return
        if not self.total:
            raise DataError(f"None of the {steps} updates had a target token, so nothing was trained. {_NO_TARGETS}")
        raise NumericsError(
            f"None of the {steps} updates was applied (last: a {self.last['reason']} at step {self.last['step']}), so "
            "nothing was trained. Lower training.learning_rate, or use float32 (training.bf16=false)."
        )

    def refuse(self, step: int, losses: list[float], grad_norm: float) -> dict:
        """Record a refused update.

        Args:
            step: the optimizer step, counted from 1.
            losses: loss of this update on each rank, by rank.
            grad_norm: norm after the reduction over ranks.

        Returns:
            what metrics.jsonl says of it.
        """
        self.consecutive += 1
        self.total += 1
        ranks = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        self.last = {
            "step": step,
            "event": "skipped_update",
            "reason": "non-finite loss" if ranks else "non-finite gradient",
            "ranks": ranks or "unknown: the loss was finite on every rank",
            "losses": losses,
            "grad_norm": grad_norm,
            "consecutive": self.consecutive,
        }
        return self.last

    def check(self, checkpoint_hint: str) -> None:
        """Raise NumericsError when more than `max_consecutive` updates in a row were refused."""
        if self.consecutive > self.max_consecutive:
            raise NumericsError(
                f"{self.consecutive} updates in a row had a {self.last['reason']} (last: step {self.last['step']}, "
                f"ranks {self.last['ranks']}); training.max_consecutive_skips allows {self.max_consecutive}. None of "
                f"them was applied. {checkpoint_hint} Lower training.learning_rate, check the data around this step, "
                "or use float32 (training.bf16=false)."
            )
