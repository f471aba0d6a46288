"""Speed of the data pipeline: tokenizing, packing and reading packed rows, each beside its peer in this process.

    python benchmarks/data_pipeline.py [--rounds 7]

tokenizing  the whole step (read, encode, add BOS and EOS, hash, write) against `tokenizers.encode_batch_fast`
            on texts that are in memory already; both on all cores
packing     best fit of web-like lengths: plan, rows in memory, Arrow rows on disk; the latter against a `datasets.map`
            that concatenates and cuts (half the bytes, for it keeps no positions and no boundaries); one core
reading     random batches of tensors with labels from the memory-mapped file, against the same file through
            `datasets` with_format("torch") and torch's default_collate; one process
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_caching, disable_progress_bars
from measure import record
from torch.utils.data import default_collate
from tqdm import tqdm

from hf_softpick.data.collating import PackedCollator
from hf_softpick.data.packing import fill_rows, plan_rows
from hf_softpick.data.rows import PackedRows, write_rows
from hf_softpick.data.settings import SourceSettings, TokenizerSettings
from hf_softpick.data.sources import open_sources
from hf_softpick.data.tokenizer import encoder_of, train_tokenizer
from hf_softpick.data.tokenizing import tokenize

SEQ_LEN = 2048


def main() -> int:
    """Measure, print, write benchmarks/results/data_pipeline.json; 1 if a promise is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each side, taken in turn")
    options = parser.parse_args()
    disable_caching()
    disable_progress_bars()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            *measure_tokenizing(Path(folder), options.rounds),
            *measure_packing(Path(folder), options.rounds),
            *measure_reading(Path(folder), options.rounds),
        ]
    for row in rows:
        print(format_row(row))
    missed = [row["name"] for row in rows if row["promise"] and promised_value(row) < row["promise"]]
    for name in missed:
        print(f"MISSED {name}")
    print(record("data_pipeline", rows))
    return 1 if missed else 0


def promised_value(row: dict[str, Any]) -> float:
    """The figure that the promise is about: tokenizing promises a ratio, the others a speed."""
    return (row["ratio"] if row["name"] == "tokenizing" else row["ours"])["median"]


def measure_tokenizing(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Tokens per second over the standard library with a vocabulary of 4096, trained on it."""
    sources = open_sources([SourceSettings(path="stdlib")])
    texts = [record.text for shard in sources[0].shards for record in shard.read() if record.text]
    tokenizer = train_tokenizer(sources, 4096)
    settings = TokenizerSettings(train_bpe=4096)
    encoder = encoder_of(tokenizer)
    count = int(tokenize(sources, tokenizer, settings, folder / "tokens.bin", seed=0).lengths.sum())

    def ours() -> None:
        tokenize(sources, tokenizer, settings, folder / "tokens.bin", seed=0)

    def peer() -> None:
        encoder.encode_batch_fast(texts, add_special_tokens=False)

    return [compare("tokenizing", "Mtok/s, all cores", "encode_batch_fast", count, rounds, ours, peer, promise=0.9)]


def measure_packing(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Tokens per second of 20M tokens in log-normal documents, median 540."""
    lengths = np.random.default_rng(0).lognormal(6.3, 1.1, 20_000).astype(np.int64) + 1
    starts = np.cumsum(lengths) - lengths
    tokens = np.random.default_rng(1).integers(0, 50_000, lengths.sum(), dtype=np.uint16)
    documents = Dataset.from_dict({"input_ids": [tokens[a : a + n] for a, n in zip(starts, lengths, strict=True)]})
    facts = {}

    def plan_only() -> None:
        plan_rows(starts, lengths, SEQ_LEN, 0)

    def in_memory() -> None:
        plan = plan_rows(starts, lengths, SEQ_LEN, 0)
        for begin in range(0, plan.num_rows, 512):
            fill_rows(plan, tokens, begin, min(begin + 512, plan.num_rows), 0, True)

    def ours() -> None:
        plan = plan_rows(starts, lengths, SEQ_LEN, 0)
        assert plan.num_tokens == lengths.sum(), "tokens were dropped"
        facts.update(padding=round(plan.padding, 6))
        write_rows(folder / "train.arrow", plan, tokens, 0, True, tqdm(disable=True))

    def cut(batch: dict[str, Any]) -> dict[str, list]:
        joined = np.concatenate(batch["input_ids"])
        return {"input_ids": list(joined[: len(joined) // SEQ_LEN * SEQ_LEN].reshape(-1, SEQ_LEN))}

    def peer() -> None:
        documents.with_format("numpy").map(cut, batched=True, batch_size=1000, keep_in_memory=False)

    count = int(lengths.sum())
    rows = [
        compare("packing, plan", "Mtok/s, one core", None, count, rounds, plan_only, promise=30),
        compare("packing, plan and rows", "Mtok/s, one core", None, count, rounds, in_memory, promise=30),
        compare("packing to disk", "Mtok/s, one core", "map, concatenate and cut", count, rounds, ours, peer),
    ]
    return [row | facts for row in rows]


def measure_reading(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Tokens per second of random batches of 16 rows, from file to tensors with labels."""
    packed = PackedRows.open(folder / "train.arrow")
    general = Dataset.from_file(str(folder / "train.arrow")).with_format("torch")
    keys = list(range(len(packed) // 16 * 16))
    random.Random(0).shuffle(keys)
    batches = [keys[begin : begin + 16] for begin in range(0, len(keys), 16)]
    collate = PackedCollator()

    def ours() -> None:
        for batch in batches:
            collate(packed.__getitems__(batch))

    def peer() -> None:
        for batch in batches:
            default_collate(general.__getitems__(batch))

    count = len(keys) * SEQ_LEN
    return [
        compare("reading", "Mtok/s, one process", "datasets, torch format", count, rounds, ours, peer, promise=100)
    ]


def compare(
    name: str,
    unit: str,
    peer_name: str | None,
    count: int,
    rounds: int,
    ours: Callable[[], None],
    peer: Callable[[], None] | None = None,
    promise: float | None = None,
) -> dict[str, Any]:
    """Time both sides in turn after one warm-up each; the ratio is of speeds, above 1 is faster than the peer."""
    sides = {"ours": ours} | ({"peer": peer} if peer else {})
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for round_number in tqdm(range(rounds + 1), desc=name, leave=False):
        for side, run in sides.items():
            begin = time.perf_counter()
            run()
            if round_number:
                speeds[side].append(count / (time.perf_counter() - begin) / 1e6)
    row: dict[str, Any] = {"name": name, "unit": unit, "ours": spread(speeds["ours"]), "promise": promise}
    if peer:
        ratios = [one / other for one, other in zip(speeds["ours"], speeds["peer"], strict=True)]
        row |= {"peer_name": peer_name, "peer": spread(speeds["peer"]), "ratio": spread(ratios)}
    return row


def spread(values: list[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile."""
    p20, median, p80 = np.percentile(values, [20, 50, 80])
    return {"median": round(median, 3), "p20": round(p20, 3), "p80": round(p80, 3)}


def format_row(row: dict[str, Any]) -> str:
    """One line of text."""
    text = "{name:<24} {median:8.2f} {unit} (p20 {p20:.2f}, p80 {p80:.2f})".format(**row, **row["ours"])
    if "ratio" in row:
        text += "   / {peer_name} = {median:.2f} (p20 {p20:.2f}, p80 {p80:.2f})".format(**row, **row["ratio"])
    if "padding" in row:
        text += f"   padding {row['padding']:.3%}"
    return text + (f"   promise {row['promise']}" if row["promise"] else "")


if __name__ == "__main__":
    sys.exit(main())
