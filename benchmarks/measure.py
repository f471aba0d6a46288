"""What every benchmark shares: timing ours and a peer in turns in one process, and a JSON record of the result."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
# The Llama-like model of 17.5M parameters that the training benchmarks share.
MODEL_17M = {
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 9,
    "num_attention_heads": 6,
    "tie_word_embeddings": True,
}


def alternate(functions: dict[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each call; the functions take turns, so that a slow moment of the machine hits all of them."""
    seconds = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def quantile(values: list[float], share: float) -> float:
    """The value at `share` of the sorted list, without interpolation."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def ratio(ours: list[float], peer: list[float]) -> dict[str, float]:
    """Median, p20 and p80 of ours / peer, turn by turn."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    return {name: round(quantile(ratios, share), 3) for name, share in (("p50", 0.5), ("p20", 0.2), ("p80", 0.8))}


def environment() -> dict[str, object]:
    """What the figures were measured with: processor, cores, load of the last minute, versions, commit."""
    packages = {}
    for name in ("torch", "transformers", "accelerate", "datasets", "tokenizers", "pyarrow"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    try:
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "packages": packages,
        "load": round(os.getloadavg()[0], 2),
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def record(name: str, rows: list[dict]) -> Path:
    """Write rows and environment to benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    return path
