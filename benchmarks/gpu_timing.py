"""Timing on a GPU: events on one stream, functions in turns, inputs rotated, the queue kept ahead of the device."""

import shutil
import subprocess
import time
from collections.abc import Callable
from itertools import pairwise

import torch

Step = Callable[[int], tuple]
MOST_TURNS, LEAST_TURNS, WARM_SECONDS, MOST_LEAD = 40, 5, 0.25, 0.05


class Stopwatch:
    """Points on the device's time line; on a CPU, where smoke runs prove nothing about speed, on the wall clock."""

    def __init__(self, device: str, flush: bool = False) -> None:
        self.cuda = device == "cuda"
        # Written before each call, this leaves nothing of the inputs in the cache.
        self.cache = torch.empty(3 * cache_bytes(), dtype=torch.int8, device=device) if self.cuda and flush else None

    def mark(self) -> torch.cuda.Event | float:
        """Now, in stream order."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start, end) -> float:
        """Between two marks; call `wait` first."""
        return start.elapsed_time(end) if self.cuda else 1e3 * (end - start)

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.cuda:
            torch.cuda.synchronize()

    def lead(self, seconds: float) -> None:
        """Flush the cache if asked for, and occupy the device while the host queues what is timed next.

        Without this, short kernels would be timed at the pace at which Python launches them.
        """
        if self.cache is not None:
            self.cache.zero_()
        if self.cuda:
            torch.cuda._sleep(int(2e9 * seconds))  # cycles, at 2 GHz or less: never too short


def cache_bytes() -> int:
    """L2 of the current device."""
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 * 2**20


def host_seconds(step: Step, watch: Stopwatch) -> float:
    """What the host needs to queue one step, the better of two after one that compiles. A CPU has no queue."""
    if not watch.cuda:
        return 0.0
    step(0)
    queued = []
    for count in (1, 2):
        watch.wait()
        start = time.perf_counter()
        step(count)
        queued.append(time.perf_counter() - start)
    watch.wait()
    return min(queued)


def in_turns(steps: dict[str, Step], seconds: float, watch: Stopwatch, most: int = MOST_TURNS) -> tuple[dict, str]:
    """Time steps against each other.

    Args:
        steps: name -> function of a running number, which chooses its inputs; it returns marks round what it did.
        seconds: about how long to measure; decides the number of turns, LEAST_TURNS to `most`.

    Returns:
        name -> one list of milliseconds for each gap between marks; and the clocks while the device was busy.
    """
    lead = {name: min(MOST_LEAD, 1.3 * host_seconds(step, watch) + 2e-5) for name, step in steps.items()}
    start, rounds = time.perf_counter(), 0
    # Long enough for the clocks to rise again after compilation left the device idle.
    while not rounds or (watch.cuda and time.perf_counter() - start < WARM_SECONDS):
        for name, step in steps.items():
            watch.lead(lead[name])
            step(rounds)
        watch.wait()
        rounds += 1
    turn_seconds = (time.perf_counter() - start) / rounds
    turns = min(most, max(min(LEAST_TURNS, most), int(seconds / turn_seconds)))
    names, marks, count = list(steps), {name: [] for name in steps}, 0
    for turn in range(turns):
        for place in range(len(names)):
            # Another neighbour in each turn, and other inputs than the neighbour's.
            name = names[(turn + place) % len(names)]
            watch.lead(lead[name])
            marks[name].append(steps[name](count))
            count += 1
    clocks = nvidia_smi("clocks.sm,clocks.mem,power.draw,temperature.gpu") if watch.cuda else ""
    watch.wait()
    gaps = {}
    for name, found in marks.items():
        between = [[watch.milliseconds(*pair) for pair in pairwise(points)] for points in found]
        gaps[name] = [list(column) for column in zip(*between, strict=True)]
    return gaps, clocks


def nvidia_smi(fields: str) -> str:
    """Fields of the current device with units, or "" where there is no nvidia-smi (AMD, a container without it)."""
    program = shutil.which("nvidia-smi")
    if not program:
        return ""
    device = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    chosen = [f"--id=GPU-{device}"] if device else []
    try:
        command = [program, f"--query-gpu={fields}", "--format=csv,noheader", *chosen]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip().splitlines()[0] if found.returncode == 0 and found.stdout.strip() else ""


def gpu_facts() -> dict[str, object]:
    """Name, compute capability, multiprocessors, memory, L2, driver and limits of the current device."""
    facts = torch.cuda.get_device_properties(0)
    return {
        "name": facts.name,
        "capability": None if torch.version.hip else f"{facts.major}.{facts.minor}",
        "architecture": getattr(facts, "gcnArchName", None),
        "multiprocessors": facts.multi_processor_count,
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "l2_mib": round(cache_bytes() / 2**20, 1),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "driver": nvidia_smi("driver_version"),
        "max sm clock, memory clock, power limit": nvidia_smi("clocks.max.sm,clocks.max.mem,power.limit"),
    }


def copy_bandwidth(watch: Stopwatch) -> float:
    """Bytes/s of a copy of 1 GiB on the device, read and written bytes together, median of 20."""
    source = torch.randint(0, 255, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def step(_: int) -> tuple:
        start = watch.mark()
        target.copy_(source)
        return start, watch.mark()

    gaps, _ = in_turns({"copy": step}, 1.0, watch, most=20)
    milliseconds = sorted(gaps["copy"][0])
    return 2 * source.numel() / (milliseconds[len(milliseconds) // 2] / 1e3)
