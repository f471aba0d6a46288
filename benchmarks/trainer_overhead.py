"""What SoftpickTrainer costs beside a bare loop: same model, rows and optimizer, one step of each in turn.

    python benchmarks/trainer_overhead.py [--repeats 60]

Promise: at most 2% of a step. The trainer logs every 10 steps and writes metrics.jsonl, as in a run; the bare loop
reads batches, clips and schedules, and does nothing else. Writes benchmarks/results/trainer_overhead.json.
"""

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import MODEL_17M, quantile, ratio, record
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments, get_scheduler, set_seed

from hf_softpick import SoftpickConfig, SoftpickForCausalLM
from hf_softpick.data.collating import PackedCollator
from hf_softpick.training.callbacks import MetricsLog, Progress
from hf_softpick.training.metrics import MetricsFile
from hf_softpick.training.trainer import SoftpickTrainer

BATCH, LENGTH, WARMUP = 2, 256, 4
PROMISE = 1.02


class InTurn(TrainerCallback):
    """After every step of the trainer, one of the bare loop; notes the seconds of both."""

    def __init__(self, bare_step) -> None:
        self.bare_step = bare_step
        self.seconds: dict[str, list[float]] = {"trainer": [], "bare": []}

    def on_train_begin(self, args, state, control, **kwargs):
        """The first trainer step begins here."""
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Everything since the last call was the trainer's, logging and reading of the next batch included."""
        middle = time.perf_counter()
        self.bare_step()
        end = time.perf_counter()
        if state.global_step > WARMUP:
            self.seconds["trainer"].append(middle - self.start)
            self.seconds["bare"].append(end - middle)
        self.start = time.perf_counter()


def bare_loop(model: torch.nn.Module, rows: list, args: TrainingArguments):
    """A function that makes one step: read, forward, backward, clip, AdamW, schedule."""
    loader = iter(DataLoader(rows, batch_size=BATCH, shuffle=True, collate_fn=PackedCollator()))
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim >= 2) == decays], "weight_decay": 0.1 * decays}
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)
    scheduler = get_scheduler("cosine", optimizer, 0, args.max_steps)
    model.train()

    def step() -> None:
        model(**next(loader), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(folder: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of `repeats` steps of the trainer and of the bare loop."""
    steps = repeats + WARMUP
    tokens = torch.randint(0, MODEL_17M["vocab_size"], (BATCH * steps, LENGTH)).numpy()
    positions = torch.arange(LENGTH).numpy()
    rows = [{"input_ids": row, "position_ids": positions, "num_tokens": LENGTH} for row in tokens]
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-4,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
    )
    model = SoftpickForCausalLM._from_config(SoftpickConfig(**MODEL_17M), attn_implementation="auto")
    twin = copy.deepcopy(model).to(args.device)
    metrics = MetricsFile(folder / "metrics.jsonl")
    turns = InTurn(bare_loop(twin, rows, args))
    trainer = SoftpickTrainer(
        model=model,
        args=args,
        metrics=metrics,
        train_dataset=rows,
        data_collator=PackedCollator(),
        callbacks=[MetricsLog(metrics), Progress()],
    )
    trainer.add_callback(turns)
    trainer.train()
    return turns.seconds


def main() -> int:
    """Measure, print one line, write the record; 1 if the promise is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60)
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(Path(folder), parser.parse_args().repeats)
    share = ratio(seconds["trainer"], seconds["bare"])
    # The sum over all steps does not depend on which neighbours are paired.
    total = round(sum(seconds["trainer"]) / sum(seconds["bare"]), 3)
    row = {
        "shape": f"B{BATCH} T{LENGTH} fp32, {len(seconds['bare'])} steps",
        "milliseconds": {name: round(1000 * quantile(times, 0.5), 1) for name, times in seconds.items()},
        "trainer / bare": share,
        "trainer / bare, all steps": total,
    }
    print(
        f"step 17M {row['shape']}  trainer / bare loop = {share['p50']:.3f} (p20 {share['p20']:.3f}, p80 "
        f"{share['p80']:.3f}), all steps {total:.3f}  {row['milliseconds']} ms"
    )
    kept = share["p50"] <= PROMISE
    print(f"{'kept  ' if kept else 'MISSED'} trainer overhead <= {PROMISE - 1:.0%} a step")
    print(record("trainer_overhead", [row]))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
