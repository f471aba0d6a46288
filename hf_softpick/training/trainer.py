"""SoftpickTrainer: transformers' Trainer with exact evaluation, refused non-finite updates and whole checkpoints.

Only what has to sit inside the Trainer lives here; the order of a run is in run.py.
"""

import logging
import math
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_softpick.errors import StorageError
from hf_softpick.files import clear
from hf_softpick.modeling import compat
from hf_softpick.training import checkpointing
from hf_softpick.training.callbacks import StopRequest
from hf_softpick.training.compat import HookedTrainer
from hf_softpick.training.evaluation import token_weighted_loss
from hf_softpick.training.flops import flops_per_token, peak_flops
from hf_softpick.training.metrics import Clock, MetricsFile, memory_gib
from hf_softpick.training.numerics import SkipGuard, poison
from hf_softpick.training.resume import group_options

logger = logging.getLogger(__name__)


class SoftpickTrainer(HookedTrainer):
    """Trainer for packed rows of one length.

    Args:
        metrics: where the record of every log line goes; written by rank 0 alone.
        max_consecutive_skips: refused updates in a row that are tolerated before NumericsError.
        manifest_facts: what every checkpoint's manifest says besides step, tokens and files.
        **kwargs: as for transformers.Trainer; rows have `input_ids` of one length.
    """

    def __init__(
        self,
        *,
        metrics: MetricsFile,
        max_consecutive_skips: int = 10,
        manifest_facts: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.stop = StopRequest()
        super().__init__(**kwargs)
        if tied := getattr(self.model, "all_tied_weights_keys", None):
            # A tied head is not saved; without this, transformers warns at every resume that it is missing.
            compat.expect_missing(self.model, tied)
        self.metrics = metrics
        self.guard = SkipGuard(max_consecutive_skips)
        self.manifest_facts = manifest_facts or {}
        self.clock = Clock()
        self.seq_len = len(self.train_dataset[0]["input_ids"])
        self.flops_per_token = flops_per_token(self.model, self.model.config, self.seq_len)
        on_gpu = self.args.bf16 and torch.cuda.is_available()
        self.peak_flops = peak_flops(torch.cuda.get_device_name()) if on_gpu else None
        self.micro_losses: list[Tensor] = []
        self.window_loss: Tensor | float = 0.0
        self.window_updates = self.window_start_tokens = self.run_updates = 0
        self.run_loss: Tensor | float = 0.0
        self.no_targets = False
        self.evaluated: tuple[int, dict[str, float]] = (-1, {})
        self.group_options: list[dict[str, Any]] = []
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)  # callbacks.Progress prints one readable line instead.
        self.add_callback(self.stop)
        self.add_callback(_Start(self))

    # Loss and gradients

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices alone decay: norms, biases and per-head scales have one dimension, also when ZeRO-3 hides it."""
        named = model.named_parameters(remove_duplicate=False)  # tied weights go by both names
        matrices = {name for name, p in named if len(compat.whole_shape(p)) >= 2}
        # The base class names what a module has registered, also a parameter that is None.
        return [name for name in super().get_decay_parameter_names(model) if name in matrices]

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """As the base class; remembers what the recipe says of its groups, which a checkpoint overwrites."""
        optimizer = super().create_optimizer(*args)
        if not self.group_options:
            self.group_options = group_options(optimizer)
        return optimizer

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """One update's micro-batches and the number of their targets over all ranks; notes when there is none.

        Nothing, and the end, when a checkpoint of the last step was loaded: the base class would train one step more.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        batches, targets = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.no_targets = targets is not None and not int(targets)
        return batches, targets

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss; NaN instead when this update must not be applied."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # The logits are the largest tensor of a step: they must not outlive this call unless they are needed.
        wanted = return_outputs or self.no_targets
        result = super().compute_loss(model, inputs, wanted, num_items_in_batch)
        loss, outputs = result if wanted else (result, None)
        self.micro_losses.append(loss.detach().clone())
        if self.no_targets:
            # Its gradient is 0, which AdamW would still turn into an update from momentum and decay.
            loss = loss + outputs.logits.sum() * torch.nan
        else:
            loss = poison(loss, ~torch.isfinite(loss))
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Forward and backward of one micro-batch; counts its tokens, padding included."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.state.num_input_tokens_seen += inputs["input_ids"].numel() * self.args.world_size
        return loss

    def autocast(self) -> AbstractContextManager:
        """The precision of training's forward pass, for whoever calls the unwrapped model."""
        if self.is_deepspeed_enabled:  # accelerate leaves it to the engine
            return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)
        return self.accelerator.autocast()

    def judge_update(self, model: nn.Module, norm: Tensor | float | None) -> float:
        """Apply or refuse, the same on all ranks.

        DeepSpeed has made its step by now, or refused it itself because the norm was not finite.
        """
        norm = math.nan if norm is None else float(norm)
        loss = torch.stack(self.micro_losses).sum()
        self.micro_losses.clear()
        stopping = self.stop.requested or self.metrics.fault is not None
        refused, self.stop.agreed = self.agree(not math.isfinite(norm), stopping)
        if not refused:
            self.guard.applied()
            self.window_loss, self.run_loss = self.window_loss + loss, self.run_loss + loss
            self.window_updates += 1
            self.run_updates += 1
            return norm
        if self.is_deepspeed_enabled:
            self._after_deepspeed_refusal()
        else:
            # Without gradients the optimizer leaves weights and its own state exactly as they are.
            model.zero_grad(set_to_none=True)
        self._report_refusal(loss, norm)
        return norm

    def agree(self, *flags: bool) -> list[bool]:
        """Each flag, true everywhere as soon as it is true on one rank."""
        if self.args.world_size == 1:
            return list(flags)
        shared = torch.tensor(flags, dtype=torch.int32, device=self.args.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in shared.tolist()]

    def _after_deepspeed_refusal(self) -> None:
        if not self.accelerator.optimizer_step_was_skipped:
            raise RuntimeError(
                "DeepSpeed applied an update with a non-finite gradient norm. Its ZeRO optimizers refuse such updates "
                "from version 0.19 on; please update deepspeed."
            )
        # The learning rate is a function of the step number, for refused steps too, as it is without DeepSpeed: the
        # base class steps its scheduler unless it sees this flag, the engine has left its own where it was.
        self.model_wrapped.optimizer.overflow = False
        if self.model_wrapped.lr_scheduler is not None:
            self.model_wrapped.lr_scheduler.step()

    def _report_refusal(self, loss: Tensor, norm: float) -> None:
        if self.no_targets:
            self.guard.no_targets()
            log = logger.warning if self.is_world_process_zero() else logger.debug
            log("step %d: no target token in the whole batch, update left out", self.state.global_step + 1)
            return
        losses = self.accelerator.gather(loss.float().reshape(1)).tolist()
        if self.args.fp16 and all(map(math.isfinite, losses)):
            return  # The loss scaler looks for its scale by overflowing; that is no fault of the run.
        record = self.guard.refuse(self.state.global_step + 1, losses, norm)
        if self.is_world_process_zero():
            self.metrics.write(record)
            logger.warning(
                "step %d: %s on ranks %s (losses %s, gradient norm %s); update not applied, %d in a row",
                *(record[key] for key in ("step", "reason", "ranks", "losses", "grad_norm", "consecutive")),
            )
        newest = next(iter(checkpointing.steps(Path(self.args.output_dir))), None)
        self.guard.check(f"Last checkpoint: step {newest}." if newest else "There is no checkpoint yet.")

    # Evaluation and logging

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Token-weighted loss of the whole set, independent of batch size and number of processes."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        with self.clock.paused():
            result = token_weighted_loss(
                self.model_wrapped,
                dataset,
                self.data_collator,
                self.args.per_device_eval_batch_size,
                self.args.device,
                self.args.process_index,
                self.args.world_size,
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.items()}
        self.log(metrics)
        self.evaluated = (self.state.global_step, metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def final_evaluation(self) -> dict[str, float]:
        """The evaluation at the present step, made now unless training has just made it; {} without a set."""
        if self.eval_dataset is None:
            return {}
        step, metrics = self.evaluated
        metrics = metrics if step == self.state.global_step else self.evaluate()
        return {name: value for name, value in metrics.items() if name.startswith("eval_")}

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Forward and backward operations of one micro-batch, attention included where it is known."""
        if self.flops_per_token is None:
            return super().floating_point_ops(inputs)
        return self.flops_per_token * inputs["input_ids"].numel()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace the base class's loss by ours (applied updates only) and add what a person watching asks for."""
        if "loss" in logs:
            logs.update(self._window())
        if "train_loss" in logs:
            logs["train_loss"] = self._mean_over_ranks(self.run_loss, self.run_updates)
        super().log(logs, start_time)

    def _mean_over_ranks(self, total: Tensor | float, updates: int) -> float:
        if not updates:
            return math.nan
        total = torch.as_tensor(total, device=self.args.device, dtype=torch.float32).reshape(1)
        return self.accelerator.gather(total).mean().item() / updates

    def _window(self) -> dict[str, float]:
        seconds = self.clock.read()
        tokens = self.state.num_input_tokens_seen - self.window_start_tokens
        speed = tokens / seconds
        remaining = self.state.max_steps - self.state.global_step
        tokens_per_step = self.state.num_input_tokens_seen / max(self.state.global_step, 1)
        report = {
            "loss": self._mean_over_ranks(self.window_loss, self.window_updates),
            "tokens_seen": self.state.num_input_tokens_seen,
            "tokens_per_second": speed,
            "eta_seconds": remaining * tokens_per_step / speed if speed else math.inf,
            "memory_gib": memory_gib(),
            "skipped_updates": self.guard.total,
        }
        if self.peak_flops and self.flops_per_token:
            report["mfu"] = speed * self.flops_per_token / (self.peak_flops * self.args.world_size)
        self.clock.restart()
        self.window_loss, self.window_updates = 0.0, 0
        self.window_start_tokens = self.state.num_input_tokens_seen
        return report

    # Checkpoints

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """As the base class, without the pickle of the arguments (it holds tokens in clear text)."""
        super().save_model(output_dir, *args, **kwargs)
        if self.args.should_save:
            Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def write_checkpoint(self, write: Callable[[], None]) -> None:
        """Write a checkpoint beside its place, describe it, rename it. All ranks agree that it is whole."""
        output_dir, step = self.args.output_dir, self.state.global_step
        root = Path(output_dir)
        staging = checkpointing.staging_directory(root, step)

        def stage() -> None:
            self.args.output_dir = str(staging)
            try:
                write()
            finally:
                self.args.output_dir = output_dir

        with self.clock.paused():
            self._save_together(lambda: clear(staging) if self.is_world_process_zero() else None, step)
            self._save_together(stage, step)
            self._save_together(lambda: self._publish(root, step), step)

    def _publish(self, root: Path, step: int) -> None:
        if not self.is_world_process_zero():
            return
        # A relaunch goes on counting refused updates: a run that diverged must not end by being restarted.
        counts = {"tokens_seen": self.state.num_input_tokens_seen, "consecutive_skips": self.guard.consecutive}
        facts = {"step": step, **counts, **self.manifest_facts}
        staged = checkpointing.staging_directory(root, step) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        checkpointing.write_manifest(staged, facts)
        checkpointing.publish(root, step)
        checkpointing.rotate(root, self.args.save_total_limit)

    def together(
        self, work: Callable[[], Any], expected: Callable[[Exception], bool] = checkpointing.is_storage_fault
    ) -> Exception | None:
        """Do `work` on every rank; when it fails as `expected` on one, all of them get to know the exception."""
        fault = None
        try:
            work()
        except Exception as error:
            if not expected(error):
                raise
            fault = error
        (failed,) = self.agree(fault is not None)
        return (fault or RuntimeError("it failed on another rank")) if failed else None

    def _save_together(self, write: Callable[[], None], step: int) -> None:
        """When `write` fails on one rank, no rank goes on as if the checkpoint existed."""
        fault = self.together(write)
        if fault is None:
            return
        root = Path(self.args.output_dir)
        if self.is_world_process_zero():
            shutil.rmtree(checkpointing.staging_directory(root, step), ignore_errors=True)
        good = checkpointing.steps(root)
        raise StorageError(
            f"The checkpoint of step {step} could not be written under {root}: {fault}. "
            f"{shutil.disk_usage(root).free / 2**30:.1f} GiB are free there. "
            + (f"The last good checkpoint is step {good[0]}; " if good else "There is no older checkpoint; ")
            + "make room and run the same command again."
        )


class _Start(TrainerCallback):
    """Begins the window of the first log line where training begins, with what a checkpoint has brought back."""

    def __init__(self, trainer: SoftpickTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Model and state are loaded, the first step is not made yet."""
        self.trainer.clock.restart()
        self.trainer.window_start_tokens = state.num_input_tokens_seen
