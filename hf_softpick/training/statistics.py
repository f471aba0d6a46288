"""Sinks, sparsity and activations while a model trains: `eval.statistics` of the recipe."""

import logging
import time
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from hf_softpick.analysis.statistics import ModelStatistics, measure
from hf_softpick.errors import RecipeError

if TYPE_CHECKING:
    from hf_softpick.training.trainer import SoftpickTrainer

logger = logging.getLogger(__name__)

PREFIX = "stats_"
SHARE = 8
"""A measurement reads at most 1 / SHARE of the tokens of a step, so that every 100 steps it takes about 0.1% of the
time."""
LEAST_TOKENS = 64


class StatisticsLog(TrainerCallback):
    """Logs the scalars of `analysis.statistics` as stats_*, before the first step, every `every` steps, at the end.

    Each rank looks at rows of its own, always the same; the result is over all of them.
    """

    def __init__(self, trainer: "SoftpickTrainer", every: int) -> None:
        self.trainer = trainer
        self.every = every
        self.rows = choose_rows(trainer)

    def on_train_begin(self, args, state, control, **kwargs):
        """What the initial weights do; an attention that cannot be watched stops the run here."""
        if state.global_step == 0:
            self._log()

    def on_step_end(self, args, state, control, **kwargs):
        """Measure when it is time."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._log()

    def _log(self) -> None:
        start = time.perf_counter()
        due = self.trainer.control.should_log  # logging here would take the place of the step's own line
        with self.trainer.clock.paused():
            statistics = self.measure()
            summary = {f"{PREFIX}{name}": value for name, value in statistics.summary().items()}
            self.trainer.log({**summary, f"{PREFIX}seconds": time.perf_counter() - start})
        self.trainer.control.should_log = due
        broken = statistics.nonfinite()
        if broken and self.trainer.is_world_process_zero():
            logger.warning("NaN or Inf inside the model, first in layer %(layer)d %(where)s", broken[0])

    def measure(self) -> ModelStatistics:
        """Statistics of the model as it is now, over the rows of all ranks; every rank calls this."""
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)
        try:
            with trainer.autocast():
                statistics = measure(model, self.rows)
        except ValueError as error:
            raise RecipeError(f"eval.statistics: {error} Set eval.statistics=0.") from error
        statistics, *others = gather_object([statistics])
        for other in others:
            statistics.merge(other)
        return statistics


def choose_rows(trainer: "SoftpickTrainer") -> list[dict[str, torch.Tensor]]:
    """Rows [1, T] of this rank: the first of the validation split, else of the training data, without padding.

    Sharded models meet in every forward pass, so the number of rows is the same on every rank.
    """
    args = trainer.args
    dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    step_tokens = args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.seq_len
    budget = max(step_tokens // SHARE, LEAST_TOKENS)
    count = max(1, min(budget // trainer.seq_len, len(dataset) // args.world_size))
    rows = []
    for index in range(count):
        row = dataset[(args.process_index + index * args.world_size) % len(dataset)]
        length = max(2, min(int(row["num_tokens"]), budget))
        columns = {name: torch.as_tensor(row[name])[:length].long()[None] for name in ("input_ids", "position_ids")}
        rows.append(columns)
    return rows
