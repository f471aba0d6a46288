"""Statistics of attention and activations: time against a plain forward pass, memory against dense maps.

    python benchmarks/analysis.py [--repeats 5] [--quick]

Promises. T=2048, 12 layers, 768 wide, float32: at most 1.6x the time of the plain forward pass of the same model, at
most 0.1x the extra memory of its dense maps. T=8192: within 8 GiB. 24 layers: at least 10x faster than one pass for
each layer that holds the maps. Logged every 100 steps of training: at most 0.2% of the time. Writes
benchmarks/results/analysis.json.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measure import MODEL_17M, alternate, quantile, ratio, record
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from hf_softpick import SoftpickConfig, SoftpickForCausalLM
from hf_softpick.analysis.attention_statistics import SINK_EPSILON
from hf_softpick.analysis.statistics import measure
from hf_softpick.data.collating import PackedCollator
from hf_softpick.training.metrics import MetricsFile
from hf_softpick.training.statistics import StatisticsLog
from hf_softpick.training.trainer import SoftpickTrainer

BASE = {"vocab_size": 4096, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12}
SMALL = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}
TIME, MEMORY, TOTAL_GIB, SPEEDUP, SHARE = 1.6, 0.1, 8.0, 10.0, 0.002
STEPS = 100


def build(kind: str, layers: int, length: int, sizes: dict) -> torch.nn.Module:
    """A random model in eval mode: "softpick" is ours (tiled), "softmax" Llama with SDPA, "maps" Llama eager."""
    torch.manual_seed(0)
    sizes = {**sizes, "num_hidden_layers": layers, "max_position_embeddings": length}
    if kind == "softpick":
        return SoftpickForCausalLM._from_config(SoftpickConfig(**sizes), attn_implementation="tiled").eval()
    implementation = "eager" if kind == "maps" else "sdpa"
    return LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation=implementation).eval()


def row(length: int) -> dict[str, torch.Tensor]:
    """One row [1, T] of random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, BASE["vocab_size"], (1, length), generator=generator)
    return {"input_ids": ids, "position_ids": torch.arange(length)[None]}


def forward(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **kwargs: bool):
    """The backbone alone: logits are no part of either side."""
    with torch.no_grad():
        return model.base_model(**inputs, use_cache=False, **kwargs)


def time_of_pass(kind: str, length: int, repeats: int) -> dict:
    """Statistics against the plain forward pass of the same model."""
    model, inputs = build(kind, 12, length, BASE), row(length)
    seconds = alternate(
        {"statistics": lambda: measure(model, [inputs]), "plain": lambda: forward(model, inputs)}, repeats
    )
    return {
        "what": f"time, {kind}, T={length}, 12 layers, 768 wide",
        "seconds": {name: round(quantile(times, 0.5), 2) for name, times in seconds.items()},
        "statistics / plain": ratio(seconds["statistics"], seconds["plain"]),
    }


def per_layer(layers: int, length: int, repeats: int) -> dict:
    """Against the ancestor's way: for each layer a forward pass that keeps all maps, of which it reads one."""
    model, eager, inputs = (
        build("softmax", layers, length, SMALL),
        build("maps", layers, length, SMALL),
        row(length),
    )

    def one_pass_each() -> None:
        for layer in range(layers):
            weights = forward(eager, inputs, output_attentions=True).attentions[layer]
            first = weights[..., 0].mean(-1)
            (first > SINK_EPSILON).float().mean()
            visible = torch.ones(length, length).tril().bool()
            ((weights <= 1e-5) & visible).sum()

    seconds = alternate(
        {"statistics": lambda: measure(model, [inputs]), "a pass each layer": one_pass_each}, repeats, warmup=0
    )
    return {
        "what": f"speed, softmax, T={length}, {layers} layers, 512 wide",
        "seconds": {name: round(quantile(times, 0.5), 2) for name, times in seconds.items()},
        "a pass each layer / statistics": ratio(seconds["a pass each layer"], seconds["statistics"]),
    }


def peak_gib(what: str, length: int) -> dict[str, float]:
    """Memory above the loaded model and in all, of one pass in a process of its own."""
    run = subprocess.run(
        [sys.executable, __file__, "--memory", what, str(length)], capture_output=True, text=True, check=True
    )
    above, total = run.stdout.split()[-2:]
    return {"above": float(above), "total": float(total)}


def print_peak(what: str, length: int) -> None:
    """In the child process: run one pass and print its peak."""
    import threading

    import psutil

    model, inputs = build("maps" if what == "maps" else what, 12, length, BASE), row(length)
    forward(model, row(64))
    process, done, peak = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss)

    start = process.memory_info().rss
    thread = threading.Thread(target=watch)
    thread.start()
    if what == "maps":
        forward(model, inputs, output_attentions=True)
    else:
        measure(model, [inputs])
    done.set()
    thread.join()
    print((peak[0] - start) / 2**30, peak[0] / 2**30)


def in_training(repeats: int) -> dict:
    """One measurement of the training callback against one step of the trainer's model; 17M, 4 rows of 512."""
    batch, length = 4, 512
    tokens = torch.randint(0, MODEL_17M["vocab_size"], (64, length)).numpy()
    rows = [{"input_ids": ids, "position_ids": torch.arange(length).numpy(), "num_tokens": length} for ids in tokens]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=10**6,
            per_device_train_batch_size=batch,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
        )
        model = SoftpickForCausalLM._from_config(SoftpickConfig(**MODEL_17M), attn_implementation="auto")
        trainer = SoftpickTrainer(
            model=model,
            args=args,
            metrics=MetricsFile(Path(folder) / "metrics.jsonl"),
            train_dataset=rows,
            data_collator=PackedCollator(),
        )
        log = StatisticsLog(trainer, STEPS)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        inputs = PackedCollator()(rows[:batch])

        def step() -> None:
            model.train()
            model(**inputs, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        seconds = alternate({"measurement": log._log, "step": step}, repeats)
    share = ratio(seconds["measurement"], seconds["step"])
    return {
        "what": f"training, 17M, {batch} rows of {length}, every {STEPS} steps",
        "seconds": {name: round(quantile(times, 0.5), 3) for name, times in seconds.items()},
        "share of the time": {name: round(value / STEPS, 5) for name, value in share.items()},
    }


def main() -> int:
    """Measure, print a line for each promise, write the record; 1 if one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs; writes nothing")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print_peak(options.memory[0], int(options.memory[1]))
        return 0
    length, long, layers = (256, 512, 4) if options.quick else (2048, 8192, 24)
    repeats = 1 if options.quick else options.repeats
    rows, promises = [], []
    for kind in ("softpick", "softmax"):
        rows.append(time_of_pass(kind, length, repeats))
        value = rows[-1]["statistics / plain"]["p50"]
        promises.append((f"statistics / plain forward, {kind}", value, value <= TIME, f"<= {TIME}x"))
    maps = peak_gib("maps", length)
    for kind in ("softpick", "softmax"):
        peak = peak_gib(kind, length)
        share = round(peak["above"] / maps["above"], 4)
        rows.append({"what": f"memory, {kind}, T={length}", "GiB": peak, "dense maps, GiB": maps, "ratio": share})
        promises.append((f"extra memory / dense maps, {kind}", share, share <= MEMORY, f"<= {MEMORY}x"))
    peak = peak_gib("softpick", long)
    rows.append({"what": f"memory, softpick, T={long}", "GiB": peak})
    promises.append(
        (f"GiB in all at T={long}", round(peak["total"], 2), peak["total"] <= TOTAL_GIB, f"<= {TOTAL_GIB}")
    )
    rows.append(per_layer(layers, length // 4, max(1, repeats // 2)))
    value = rows[-1]["a pass each layer / statistics"]["p50"]
    promises.append(("faster than one pass each layer", value, value >= SPEEDUP, f">= {SPEEDUP}x"))
    rows.append(in_training(repeats))
    value = rows[-1]["share of the time"]["p50"]
    promises.append((f"of training time, every {STEPS} steps", value, value <= SHARE, f"<= {SHARE}"))
    for each in rows:
        print(each)
    for what, value, kept, limit in promises:
        print(f"{'kept  ' if kept else 'MISSED'} {what}: {value} ({limit})")
    if not options.quick:
        print(record("analysis", rows))
    return 0 if all(kept for _, _, kept, _ in promises) else 1


if __name__ == "__main__":
    sys.exit(main())
