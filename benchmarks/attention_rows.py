"""What the GPU benchmark says: rows of medians and ratios, and whether each promise is kept. Plain Python."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpu_cases import WORKS, Case
from measure import quantile, ratio

Row = dict[str, Any]
DENSE, MATCHED = "softpick, rows dense", "softpick, matched dense"


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    """Median, p20 and p80."""
    return {name: round(quantile(values, share), digits) for name, share in (("p50", 0.5), ("p20", 0.2), ("p80", 0.8))}


def works_of(columns: list[list[float]]) -> dict[str, list[float]]:
    """Milliseconds of each kind of work, from the one or two gaps between a step's marks."""
    if len(columns) == 1:
        return {"forward": columns[0]}
    forward, backward = columns
    return {"forward": forward, "backward": backward, "both": [a + b for a, b in zip(forward, backward, strict=True)]}


def rows_of(
    case: Case, cases: dict[str, Case], times: dict[str, dict[str, list[float]]], peak: float | None, facts: Row
) -> list[Row]:
    """One row for each kind of work.

    Args:
        case: what the rows are about.
        cases: entry -> its own case; two entries of a packed group are dense.
        times: entry -> work -> milliseconds of every turn, entries in the same turns.
        peak: bytes/s of the device's memory, of which decoding reaches a share.
        facts: what else each row carries.
    """
    rows = []
    for work in WORKS:
        chosen = {name: by_work[work] for name, by_work in times.items() if work in by_work}
        if not chosen:
            continue
        row: Row = {"kind": case.kind, "work": work, "case": case.name, "length": case.queries, "keys": case.keys}
        row.update(dim=case.dim, dtype=case.dtype, in_flight=case.in_flight, turns=len(next(iter(chosen.values()))))
        if case.documents:
            row["documents"] = list(case.documents)
        row["milliseconds"] = {name: spread(values) for name, values in chosen.items()}
        # 1e9 FLOP a millisecond are 1 TFLOP/s.
        row["tflops"] = {
            name: spread([cases[name].flop(work) / 1e9 / t for t in values], 2) for name, values in chosen.items()
        }
        if case.kind == "decode":
            speeds = {name: [case.bytes / (t / 1e3) for t in values] for name, values in chosen.items()}
            row["gigabytes_per_second"] = {name: spread([s / 1e9 for s in v], 1) for name, v in speeds.items()}
            if peak:
                row["bandwidth_share"] = {name: spread([s / peak for s in v]) for name, v in speeds.items()}
        row["speed"] = {}
        for ours in [name for name in ("softpick", "softpick fast") if name in chosen]:
            for name in [name for name in chosen if name != ours]:
                # Per FLOP: the dense rows beside packed documents do more.
                share = cases[ours].flop(work) / cases[name].flop(work)
                row["speed"][f"{ours} / {name}"] = ratio([t * share for t in chosen[name]], chosen[ours])
        rows.append(row | facts)
    return rows


def line_of(row: Row) -> str:
    """A row of the printed table: our speed, then how many times that of each peer."""
    if row["kind"] == "decode":
        own = f"{row['gigabytes_per_second']['softpick']['p50']:7.0f} GB/s"
        if "bandwidth_share" in row:
            own += f" {row['bandwidth_share']['softpick']['p50']:4.0%}"
    else:
        own = f"{row['tflops']['softpick']['p50']:7.1f} TFLOP/s"
    times = row["milliseconds"]["softpick"]
    own += f" ({times['p50']:.3f} ms, p20 {times['p20']:.3f}, p80 {times['p80']:.3f})"
    ratios = [(key.removeprefix("softpick "), value["p50"]) for key, value in row["speed"].items()]
    peers = [f"{name} {value:.2f}" for name, value in ratios if name.startswith("/")]
    return "  ".join([f"{row['kind']:6} {row['work']:8} {row['case']:40}{own}", *peers])


@dataclass(frozen=True)
class Promise:
    """`key` names a ratio of rows, or "share" the part of the memory's bandwidth; the worst row counts."""

    text: str
    limit: float
    keys: tuple[str, ...]
    kinds: tuple[str, ...] = ("dense", "gqa")
    works: tuple[str, ...] = ("forward",)
    holds_for: Callable[[Row], bool] = lambda row: True
    stretch: bool = False


FLASH_2 = ("softpick / flash-attn", "softpick / SDPA flash")
PROMISES = (
    Promise("forward >= 0.95 of softmax mode", 0.95, ("softpick / softmax",)),
    Promise("backward >= 0.90 of softmax mode", 0.90, ("softpick / softmax",), works=("backward",)),
    Promise("fast backward >= 0.90 of softmax mode", 0.90, ("softpick fast / softmax fast",), works=("backward",)),
    Promise("forward >= 1.0x FlashAttention-2", 1.0, FLASH_2, ("dense",)),
    Promise(
        "forward >= 1.15x FlashAttention-2 at D 64 (stretch)",
        1.15,
        FLASH_2,
        ("dense",),
        holds_for=lambda row: row["dim"] == 64,
        stretch=True,
    ),
    Promise("forward and backward >= 1.4x the ancestor", 1.4, ("softpick / ancestor",), ("dense",), ("both",)),
    Promise("packed >= 0.9 of dense per FLOP", 0.9, (f"softpick / {DENSE}",), ("packed",), ("forward", "backward")),
    Promise(
        "decode >= 70% of the memory's bandwidth at >= 8k keys and >= 8 heads in flight",
        0.70,
        ("share",),
        ("decode",),
        holds_for=lambda row: row["keys"] >= 8192 and row["in_flight"] >= 8,
    ),
)


def verdict(promise: Promise, rows: list[Row]) -> Row:
    """The worst row that the promise is about, and "kept", "MISSED" or "not measured"."""
    found = []
    for row in rows:
        if row["kind"] in promise.kinds and row["work"] in promise.works and promise.holds_for(row):
            shares = {"share": row.get("bandwidth_share", {}).get("softpick")}
            values = [(row["speed"] | shares).get(key) for key in promise.keys]
            found += [(value["p50"], f"{row['work']} {row['case']}") for value in values if value]
    said: Row = {"promise": promise.text, "limit": promise.limit, "stretch": promise.stretch, "rows": len(found)}
    if not found:
        return said | {"verdict": "not measured"}
    worst, where = min(found)
    median = quantile([value for value, _ in found], 0.5)
    kept = "kept" if worst >= promise.limit else "MISSED"
    return said | {"verdict": kept, "worst": worst, "where": where, "median": median}


def verdict_line(said: Row) -> str:
    """One line for the terminal."""
    if said["verdict"] == "not measured":
        return f"{'not measured':13}{said['promise']}"
    return (
        f"{said['verdict']:13}{said['promise']}: worst {said['worst']:.3f} ({said['where']}), "
        f"median of {said['rows']}: {said['median']:.3f}"
    )
