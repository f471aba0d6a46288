"""What the GPU benchmark measures: shapes, packed documents, the FLOP and bytes that count as useful. Plain Python.

Every case is causal; a decode case is one query that sees all keys. FLOP follow FlashAttention's convention, forward
4 B H T^2 D halved for the causal mask and backward 2.5 times that, whatever a kernel really executes.
"""

import random
from dataclasses import dataclass, replace

WORKS = {"forward": 1.0, "backward": 2.5, "both": 3.5}
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
TOKENS, HIDDEN = 16384, 2048
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
# FlexAttention compiles for every shape, so it takes part at these lengths alone.
FLEX_LENGTHS = (2048, 8192)
DECODE_KV_HEADS, DECODE_GROUP = 8, 4
SECTIONS = ("forward", "backward", "gqa", "packed", "decode")


@dataclass(frozen=True)
class Case:
    """One shape. `queries` and `keys` are tokens of a sequence, `documents` the lengths of all packed ones."""

    kind: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    dtype: str = "bfloat16"
    documents: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Short and unique, for tables."""
        heads = f"H{self.heads}" + (f"/{self.kv_heads}" if self.kv_heads != self.heads else "")
        if self.kind == "decode":
            return f"B{self.batch} {heads} S{self.keys} D{self.dim} {self.dtype}"
        packed = f" {len(self.documents)} documents" if self.documents else ""
        return f"B{self.batch} {heads} T{self.queries} D{self.dim} {self.dtype}{packed}"

    @property
    def pairs(self) -> float:
        """Query-key pairs that count, one head: half the square of each length, or batch * keys when decoding."""
        if self.kind == "decode":
            return float(self.batch * self.keys)
        return sum(n * n for n in self.documents) / 2 if self.documents else self.batch * self.queries**2 / 2

    @property
    def boundaries(self) -> list[int]:
        """cu_seqlens: 0 and the running sum of the documents."""
        total, found = 0, [0]
        for length in self.documents:
            total += length
            found.append(total)
        return found

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the query and of key and value: [B, T, H, D], packed [B * T, H, D]."""
        query, key = (self.heads, self.dim), (self.kv_heads, self.dim)
        if self.documents:
            return (self.batch * self.queries, *query), (self.batch * self.keys, *key)
        return (self.batch, self.queries, *query), (self.batch, self.keys, *key)

    @property
    def bytes(self) -> int:
        """What has to move at least once in a forward pass: query, key, value, output."""
        query = 2 * self.batch * self.queries * self.heads
        key = 2 * self.batch * self.keys * self.kv_heads
        return (query + key) * self.dim * ITEM_BYTES[self.dtype]

    @property
    def in_flight(self) -> int:
        """Sequences times KV heads: what a decode step can work on side by side before it splits keys."""
        return self.batch * self.kv_heads

    def flop(self, work: str) -> float:
        """Useful FLOP of "forward", "backward" or "both"."""
        return 4 * self.heads * self.pairs * self.dim * WORKS[work]

    def small(self, length: int = 256) -> "Case":
        """The same kind, head dimension, dtype and group size at a length where a float64 reference is cheap."""
        case = replace(self, batch=2, heads=2 * (self.heads // self.kv_heads), kv_heads=2, queries=length, keys=length)
        if self.kind == "decode":
            return replace(case, queries=1, keys=16 * length + 77)  # long enough to be split over keys, unevenly
        if self.documents:
            third = length // 3
            return replace(case, documents=(third, 1, length - third - 1, length - 5, 5))
        return case


def document_lengths(rows: int, row_length: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths of packed documents that fill `rows` rows of `row_length` tokens.

    Log-normal with median 540 tokens, like web text; what does not fit in a row is a document of its own in the next.
    """
    draw, found = random.Random(seed), []
    rest = 0
    for _ in range(rows):
        free = row_length
        while free:
            rest = rest or int(draw.lognormvariate(6.3, 1.1)) + 1
            taken = min(rest, free)
            found.append(taken)
            free, rest = free - taken, rest - taken
    return tuple(found)


def matched_length(documents: tuple[int, ...]) -> int:
    """The one length with as many pairs a token as the documents have on average, rounded to 128."""
    return max(128, round(sum(n * n for n in documents) / sum(documents) / 128) * 128)


def dense(length: int, dim: int, dtype: str, group: int = 1) -> Case:
    """At least TOKENS tokens of HIDDEN / dim heads; `group` query heads to a KV head."""
    heads = HIDDEN // dim
    batch = max(1, TOKENS // length)
    return Case("dense" if group == 1 else "gqa", batch, heads, heads // group, length, length, dim, dtype)


def packed(row_length: int, dim: int, dtype: str) -> Case:
    """Twice the tokens of `dense(row_length, ...)` as isolated documents: fewer would be a small sample of lengths."""
    whole = dense(row_length, dim, dtype)
    rows = 2 * whole.batch
    return replace(whole, kind="packed", batch=rows, documents=document_lengths(rows, row_length))


def decode(in_flight: int, keys: int, dim: int, dtype: str) -> Case:
    """One token for each of in_flight / 8 sequences, four query heads to each of eight KV heads."""
    kv_heads = DECODE_KV_HEADS
    return Case("decode", in_flight // kv_heads, kv_heads * DECODE_GROUP, kv_heads, 1, keys, dim, dtype)


def plan(sections: tuple[str, ...], dtype: str) -> list[Case]:
    """The cases of the sections, those that decide a promise first, so that a short run measures those."""
    found: list[tuple[int, Case]] = []
    for dim in (64, 128):
        if "forward" in sections or "backward" in sections:
            order = {8192: 0, 2048: 0, 16384: 1, 4096: 1}
            found += [(order.get(length, 3), dense(length, dim, dtype)) for length in LENGTHS]
        if "packed" in sections:
            found += [(rank, packed(length, dim, dtype)) for rank, length in ((0, 4096), (2, 8192))]
        if "gqa" in sections:
            found += [(rank, dense(length, dim, dtype, group=8)) for rank, length in ((1, 8192), (2, 2048))]
    if "decode" in sections:
        grid = [(heads, keys) for heads in (8, 32, 256) for keys in (1024, 8192, 32768, 131072)]
        found += [(0 if keys == 8192 else 2, decode(heads, keys, 128, dtype)) for heads, keys in grid]
        found += [(0, decode(heads, 8192, 64, dtype)) for heads in (8, 64)]
    return [case for _, case in sorted(found, key=lambda pair: pair[0])]


def smoke_plan(dtype: str) -> list[Case]:
    """One tiny case of each kind, for Triton's interpreter."""
    return [
        Case("dense", 1, 2, 2, 40, 40, 16, dtype),
        Case("gqa", 1, 2, 1, 20, 20, 16, dtype),
        Case("packed", 1, 1, 1, 40, 40, 16, dtype, documents=(29, 1, 10)),
        Case("decode", 1, 2, 1, 1, 70, 16, dtype),
    ]
