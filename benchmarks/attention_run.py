"""The run of the GPU benchmark: for each case build, check, compare and time everybody who can take part."""

import argparse
import hashlib
import json
import math
import time
import traceback
import warnings
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from attention_compile import Job, check_in_parallel, check_job
from attention_peers import Peer, ancestor, autotuned, our_configuration, peers
from attention_reference import LIMITS, Attention, difference, inputs, results, tail_difference
from attention_rows import DENSE, MATCHED, PROMISES, Row, line_of, rows_of, verdict, works_of
from gpu_cases import Case, matched_length
from gpu_timing import MOST_TURNS, Step, Stopwatch, cache_bytes, copy_bandwidth, gpu_facts, in_turns
from measure import RESULTS, environment
from roofline import chip_of

# Seconds of timing that one case gets at most, and the share of the budget that is left for compiling and checking.
MOST_SECONDS, TIMING_SHARE = 4.0, 0.5
MOST_SETS = 64


class Wrong(Exception):
    """Our kernel disagrees with the reference or with a trusted peer, or fails."""


class Benchmark:
    """What was found so far, and what the run needs to go on. `args`: see gpu_attention.py."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = "cpu" if args.smoke else "cuda"
        self.watch = Stopwatch(self.device, args.flush_l2)
        self.peers = peers() + ([ancestor(args.ancestor, args.ancestor_function)] if args.ancestor else [])
        self.checked: dict[Job, str] = {}
        self.rows: list[Row] = []
        self.failed: list[str] = []
        self.left_out: list[str] = []
        self.peak: float | None = None
        self.environment = environment()
        self.environment["packages"] |= {name: installed(name) for name in ("triton", "flash_attn")}
        if self.environment["commit"] == "unknown" and args.commit:
            self.environment["commit"] = args.commit
        self.environment["dirty"] = self.environment["commit"].endswith("-dirty")
        if args.ancestor:
            digest = hashlib.sha256(args.ancestor.read_bytes()).hexdigest()
            self.environment["ancestor"] = {"function": args.ancestor_function, "sha256": digest}
        if not args.smoke:
            self.environment["gpu"] = gpu = gpu_facts()
            chip, copied = chip_of(gpu["name"]), copy_bandwidth(self.watch)
            self.peak = chip.bandwidth if chip else copied
            gpu |= {"copy_bandwidth": copied, "peak_bandwidth": self.peak}
            gpu["peak_bandwidth_is"] = "datasheet" if chip else "copy of 1 GiB, bytes read and written"

    def run(self, cases: list[Case]) -> None:
        """Measure the cases in order until the time is up; the result file is kept current."""
        start = time.monotonic()
        self.compile(cases)
        for number, case in enumerate(cases):
            spent, waiting = time.monotonic() - start, len(cases) - number
            left = self.args.seconds - spent
            if number and left < spent / number:
                self.left_out += [f"{c.kind} {c.name}: out of time" for c in cases[number:]]
                print(f"left out, not enough of {self.args.seconds:.0f} s is left:", *self.left_out, sep="\n  ")
                break
            eta = f", about {min(left, spent / number * waiting):.0f} s left" if number else ""
            print(f"[{number + 1}/{len(cases)}] {case.kind} {case.name}  ({spent:.0f} s{eta})", flush=True)
            try:
                found = self.measure(case, min(MOST_SECONDS, TIMING_SHARE * left / waiting))
            except torch.OutOfMemoryError:
                self.left_out.append(f"{case.kind} {case.name}: out of memory")
                print(f"left out {self.left_out[-1]}", flush=True)
            except (Wrong, RuntimeError) as error:
                self.failed.append(f"{case.kind} {case.name}: {first_line(error)}")
                print(f"FAILED {self.failed[-1]}", flush=True)
                traceback.print_exception(error.__cause__, limit=-6)
                self.still_alive(case.name)
            else:
                self.rows += found
                if not self.args.smoke:
                    print(*map(line_of, found), sep="\n", flush=True)
            if self.device == "cuda":
                torch.cuda.empty_cache()
            self.write()

    def compile(self, cases: list[Case]) -> None:
        """Have compiled and checked at small sizes what takes long, ours and FlexAttention."""
        if self.args.smoke:
            return
        start = time.monotonic()
        entries = [(peer, own, self.backward(case)) for case in cases for own, peer in self.entries(case).values()]
        jobs = {(peer, own.small(), backward) for peer, own, backward in entries if peer.slow_to_compile}
        self.checked |= check_in_parallel(jobs, self.device)
        spent = time.monotonic() - start
        print(f"{len(self.checked)} of {len(jobs)} slow compilations checked in {spent:.0f} s", flush=True)

    def backward(self, case: Case) -> bool:
        """Whether a backward pass is timed with the forward."""
        return case.kind in ("gqa", "packed") or case.kind == "dense" and "backward" in self.args.only

    def entries(self, case: Case) -> dict[str, tuple[Case, Peer]]:
        """Who is timed against whom; packed documents also against our kernel on dense rows of the same tokens."""
        backward = self.backward(case)
        found = {p.name: (case, p) for p in self.peers if case.kind in p.kinds and (backward or not p.backward_alone)}
        if case.documents:
            whole = replace(case, kind="dense", documents=())
            length = min(matched_length(case.documents), case.queries)
            matched = replace(whole, batch=case.batch * case.queries // length, queries=length, keys=length)
            found |= {DENSE: (whole, self.peers[0]), MATCHED: (matched, self.peers[0])}
        return found

    def measure(self, case: Case, seconds: float) -> list[Row]:
        """Rows of one case. `seconds`: how long to time.

        Raises:
            Wrong: our kernel fails or computes something else.
        """
        backward, entries = self.backward(case), self.entries(case)
        configuration = our_configuration(case, self.device)
        sets, expected, attends, skipped = {}, {}, {}, {}
        for name, (own, peer) in entries.items():
            if own not in sets:
                sets[own] = [inputs(own, self.device, backward, seed) for seed in range(self.input_sets(own))]
            try:
                attends[name] = self.checked_attention(name, own, peer, sets[own][0], expected)
            except Wrong:
                raise
            # A peer may fail in any way, at import, compilation or launch, and must not take the others with it.
            except Exception as error:
                if peer.ours and isinstance(error, torch.OutOfMemoryError):
                    raise
                if peer.ours:
                    raise Wrong(f"{name}: {first_line(error)}") from error
                self.still_alive(name)
                skipped[name] = first_line(error)
                print(f"  without {name}: {skipped[name]}", flush=True)
        expected.clear()
        steps = {name: step(attend, sets[entries[name][0]], backward, self.watch) for name, attend in attends.items()}
        gaps, clocks = in_turns(steps, seconds, self.watch, 1 if self.args.smoke else MOST_TURNS)
        calls = len(sets[case]) if case.kind == "decode" else 1
        times = {}
        for name, columns in gaps.items():
            times[name] = works_of([[t / calls for t in column] for column in columns])
            if entries[name][1].backward_alone or case.kind == "dense" and "forward" not in self.args.only:
                del times[name]["forward"]
        facts = {"configuration": configuration, "skipped": skipped, "input_sets": len(sets[case]), "clocks": clocks}
        return rows_of(case, {name: own for name, (own, _) in entries.items()}, times, self.peak, facts)

    def input_sets(self, case: Case) -> int:
        """So many that a set has left the cache before its next turn."""
        if self.device == "cpu":
            return 2
        return min(MOST_SETS, max(1 if case.kind == "decode" else 2, math.ceil(3 * cache_bytes() / case.bytes)))

    def checked_attention(
        self, name: str, case: Case, peer: Peer, given: tuple, expected: dict[tuple, list[torch.Tensor]]
    ) -> Attention:
        """The peer's function for a case, once it has computed the right thing at a small size and at this one.

        Args:
            given: inputs at the size that is timed.
            expected: (case, normalizer) -> what our kernel found for them; filled here.

        Raises:
            Wrong: our kernel is off, or differs from a trusted peer.
            RuntimeError: the peer is off.
        """
        backward = given[0].requires_grad
        small = case.small(20) if self.args.smoke else case.small()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch explains at length why a backend refuses; the error says it too
            attend, job = peer.build(case, self.device), (peer, small, backward)
            if job not in self.checked:
                self.checked[job] = check_job(job, self.device)
            reason = self.checked[job]
            if not reason:
                found = results(attend, given, backward)
                reason = tail_difference(found[0], given, case, peer.normalizer)
        if reason:
            raise (Wrong if peer.ours else RuntimeError)(f"{name} against float64: {reason}")
        ours = expected.setdefault((case, peer.normalizer), found)
        reason = difference(found, ours, 2 * LIMITS[case.dtype])
        if reason:
            raise (Wrong if peer.trusted else RuntimeError)(f"{name} against ours: {reason}")
        return attend

    def still_alive(self, name: str) -> None:
        """After an illegal access every later call fails as well: end the run under the right name."""
        try:
            self.watch.wait()
        except RuntimeError as error:
            self.failed.append(f"{name} broke the device: {first_line(error)}")
            self.write()
            raise SystemExit(f"gpu_attention: {self.failed[-1]}; nothing after it can be measured") from error

    def verdicts(self) -> list[Row]:
        """Every promise; a smoke run has measured none."""
        return [verdict(promise, [] if self.args.smoke else self.rows) for promise in PROMISES]

    def write(self) -> Path | None:
        """The result file, complete after every case, so that a run cut short leaves what it measured."""
        path = self.args.out or (None if self.args.smoke else RESULTS / "gpu_attention.json")
        if path:
            options = {name: getattr(self.args, name) for name in ("only", "seconds", "dtype", "flush_l2")}
            text = {"environment": self.environment, "measured": not self.args.smoke, "options": options}
            text |= {"promises": self.verdicts(), "failed": self.failed, "left_out": self.left_out, "rows": self.rows}
            text["autotuned"] = autotuned()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(text, indent=1) + "\n")
        return path


def step(attend: Attention, sets: list[tuple], backward: bool, watch: Stopwatch) -> Step:
    """A function of a running number that works on one of the input sets and returns its marks.

    A decode step is over in microseconds: it works on all sets, one after the other, between two marks.
    """

    def decode(_: int) -> tuple:
        with torch.no_grad():
            start = watch.mark()
            for q, k, v, _ in sets:
                attend(q, k, v)
            return start, watch.mark()

    def forward(count: int) -> tuple:
        q, k, v, _ = sets[count % len(sets)]
        with torch.no_grad():
            start = watch.mark()
            attend(q, k, v)
            return start, watch.mark()

    def train(count: int) -> tuple:
        q, k, v, gradient = sets[count % len(sets)]
        start = watch.mark()
        out = attend(q, k, v)
        middle = watch.mark()
        torch.autograd.grad(out, (q, k, v), gradient)
        return start, middle, watch.mark()

    query = sets[0][0]
    return decode if query.ndim == 4 and query.shape[1] == 1 else train if backward else forward


def installed(name: str) -> str | None:
    """Version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def first_line(error: Exception) -> str:
    """What an exception says, short enough for a table."""
    return ((str(error).strip().splitlines() or [""])[0] or type(error).__name__)[:200]
