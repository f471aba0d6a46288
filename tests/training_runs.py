"""Small texts, rows, recipes and trainers for the tests of training, and a way to run the command in a process."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
WORDS = "def return self import class for in range x y z value = + ( ) : print".split()
VOCABULARY, SEQ_LEN = 64, 32


def write_text(path: Path, documents: int = 300) -> Path:
    """A jsonl source of word salad, always the same."""
    draw = random.Random(0)
    lines = ({"text": " ".join(draw.choice(WORDS) for _ in range(draw.randint(5, 60)))} for _ in range(documents))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_recipe(folder: Path, **sections: dict[str, Any]) -> Path:
    """A recipe of a model with 2 layers of width 32 on rows of 64 tokens; `sections` win over what is here."""
    recipe: dict[str, dict[str, Any]] = {
        "model": {
            "normalizer": "softpick",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        "tokenizer": {"train_bpe": 300},
        "data": {"seq_len": 64, "validation": 0.1, "sources": [{"path": str(write_text(folder / "text.jsonl"))}]},
        "training": {
            "per_device_train_batch_size": 8,
            "max_steps": 5,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 2,
            "disable_tqdm": True,
        },
        "eval": {"prompts": ["def "], "max_new_tokens": 4},
        "run": {"name": "tiny", "root": str(folder / "runs")},
    }
    for name, section in sections.items():
        replace = name in ("model", "tokenizer") and "from" in section
        recipe[name] = section if replace else {**recipe[name], **section}
    path = folder / "recipe.yaml"
    # JSON is YAML, and writing it needs nothing that is being tested.
    path.write_text(json.dumps(recipe, indent=1), encoding="utf-8")
    return path


def environment(**extra: str) -> dict[str, str]:
    """Environment of a child process: this checkout importable, one thread, no network."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}


def train(
    *arguments: str | Path, env: dict[str, str] | None = None, timeout: int = 120
) -> subprocess.CompletedProcess:
    """Run `python -m hf_softpick.train ARGUMENTS` to its end."""
    command = [sys.executable, "-m", "hf_softpick.train", *map(str, arguments)]
    return subprocess.run(command, env=env or environment(), capture_output=True, text=True, timeout=timeout)


def start(*arguments: str | Path) -> subprocess.Popen:
    """Start `python -m hf_softpick.train ARGUMENTS`."""
    command = [sys.executable, "-m", "hf_softpick.train", *map(str, arguments)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run folder."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(run: Path) -> list[float]:
    """The training loss of every log line."""
    return [record["loss"] for record in records(run) if "loss" in record]


def make_rows(count: int, empty: bool = False) -> list[dict[str, Any]]:
    """Packed rows of differing numbers of targets: two documents, then padding."""
    draw = random.Random(1)
    rows = []
    for _ in range(count):
        tokens, cut = (0 if empty else draw.randint(8, SEQ_LEN)), draw.randint(2, 6)
        rows.append(
            {
                "input_ids": [draw.randrange(VOCABULARY) for _ in range(SEQ_LEN)],
                "position_ids": [*range(cut), *range(SEQ_LEN - cut)],
                "num_tokens": tokens,
            }
        )
    return rows


def make_trainer(folder: Path, rows: list | None = None, max_consecutive_skips: int = 10, **arguments: Any):
    """A SoftpickTrainer of a tiny model on `make_rows`; `arguments` are TrainingArguments."""
    from transformers import TrainingArguments, set_seed

    from hf_softpick.data.collating import PackedCollator
    from hf_softpick.modeling.configuration_softpick import SoftpickConfig
    from hf_softpick.modeling.modeling_softpick import SoftpickForCausalLM
    from hf_softpick.training.callbacks import MetricsLog
    from hf_softpick.training.metrics import MetricsFile
    from hf_softpick.training.trainer import SoftpickTrainer

    set_seed(0)
    config = SoftpickConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        normalizer="scaled_softpick",
    )
    folder.mkdir(parents=True, exist_ok=True)
    metrics = MetricsFile(folder / "metrics.jsonl")
    defaults = {
        "output_dir": str(folder / "checkpoints"),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "ddp_find_unused_parameters": False,
    }
    return SoftpickTrainer(
        model=SoftpickForCausalLM._from_config(config, attn_implementation="auto"),
        args=TrainingArguments(**{**defaults, **arguments}),
        train_dataset=make_rows(64) if rows is None else rows,
        eval_dataset=make_rows(13),
        data_collator=PackedCollator(),
        metrics=metrics,
        max_consecutive_skips=max_consecutive_skips,
        callbacks=[MetricsLog(metrics)],
    )
