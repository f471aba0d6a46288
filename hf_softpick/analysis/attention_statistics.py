"""Statistics of one layer's attention, accumulated over batches: sinks, sparsity, row mass, entropy, distance.

A sequence is one document of a row; averages over sequences are weighted by their tokens. Legend: B rows, T tokens,
H heads, n sequences.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_softpick.analysis.attention_rows import AttentionRows
from hf_softpick.modeling.documents import document_begins, document_positions

SINK_EPSILONS = (0.1, 0.2, 0.3, 0.5)
SINK_EPSILON = 0.3
MIN_SINK_TOKENS = 32
DORMANT_MASS = 0.01
FIRST = 4


class Documents(NamedTuple):
    """The sequences of a batch of rows.

    index: int64 [B, T], which sequence a token belongs to, counted over the batch; padding has `count`.
    position: int64 [B, T], place in its sequence. length: int64 [n]. first: int64 [n], b * T + t of its first token.
    """

    index: Tensor
    position: Tensor
    length: Tensor
    first: Tensor

    @property
    def count(self) -> int:
        """n."""
        return self.length.shape[0]

    @property
    def real(self) -> Tensor | None:
        """bool [B, T], False = padding; None when nothing is."""
        real = self.index < self.count
        return None if bool(real.all()) else real


def documents_of(rows: int, length: int, position_ids: Tensor | None, real: Tensor | None, device: Any) -> Documents:
    """Sequences as the model sees them: those that position_ids int [B or 1, T] tell, or one a row; real: bool [B, T],
    False = padding."""
    if position_ids is None:
        position_ids = torch.arange(length, device=device)[None] if real is None else real.cumsum(-1)
    begins = document_begins(position_ids, real).expand(rows, -1)
    first = begins.flatten().nonzero()[:, 0]
    count = len(first)
    number = begins.flatten().cumsum(0).view(rows, length) - 1
    if real is not None:
        number = torch.where(real, number, count)
    sizes = torch.bincount(number.flatten(), minlength=count)[:count]
    return Documents(number, document_positions(begins, real), sizes, first)


class AttentionStatistics:
    """One layer over any number of batches; definitions at `result`.

    Args:
        min_sink_tokens: shorter sequences do not count for sinks: a token that sees three others gives each much.
    """

    def __init__(self, min_sink_tokens: int = MIN_SINK_TOKENS) -> None:
        self.min_sink_tokens = min_sink_tokens
        self.sums: Tensor | int = 0
        self.tiles: Tensor | int = 0
        self.sequences: list[Tensor] = []
        self.lengths: list[Tensor] = []

    @torch.no_grad()
    def add(self, rows: AttentionRows, documents: Documents) -> None:
        """Add one batch."""
        batch, heads, length = rows.mass.shape
        index, real = documents.index, documents.real
        weight = torch.ones_like(index, dtype=torch.float64) if real is None else real.double()
        seen_rows = weight[:, None]
        visible = rows.visible.double().expand(batch, heads, length) * seen_rows
        mass = rows.mass.double() * seen_rows
        position = documents.position.double()[:, None]
        # sum_ij w_ij (i - j), from the mass that each query gives and each key receives.
        distance = mass * position - rows.received.double() * position
        parts = [
            mass,
            (mass == 0) * seen_rows,
            rows.entropy.double() * seen_rows,
            (mass != 0) * seen_rows,
            visible - rows.positive.double() * seen_rows,
            visible - rows.above.double() * seen_rows,
            visible,
            distance,
            seen_rows.expand_as(mass),
        ]
        self.sums = self.sums + torch.stack([part.sum((0, 2)) for part in parts]).cpu()
        self.tiles = self.tiles + torch.stack([rows.tiles, rows.empty_tiles]).cpu()
        self.sequences.append(self._by_sequence(rows, documents, mass).cpu())
        self.lengths.append(documents.length.cpu())

    def _by_sequence(self, rows: AttentionRows, documents: Documents, mass: Tensor) -> Tensor:
        """[n, 5, H]: mean attention to the first token; to the first four; the most that any position of the first
        half receives; that position; mean row mass."""
        batch, heads, length = mass.shape
        n, index, position = documents.count, documents.index.flatten(), documents.position.flatten()
        real = index < n
        size = torch.cat([documents.length, documents.length.new_zeros(1)])[index]  # of each token's sequence
        seen = rows.seen.double().expand(batch, heads, length)
        received, seen, mass = (x.transpose(0, 1).flatten(1) for x in (rows.received.double(), seen, mass))

        def total(values: Tensor, where: Tensor) -> Tensor:
            """[H, n] sums of values [H, B * T] over the tokens of each sequence at `where`."""
            sums = values.new_zeros(heads, n + 1)
            return sums.index_add_(1, index, torch.where(where, values, 0.0))[:, :n]

        # A window hides the beginning from later queries: the mean is over those that see it.
        mean = received / seen.clamp_min(1)
        near = real & (position < FIRST)
        # Who sees any of the first four: who sees the last of them, and the queries before that one.
        last_near = near & (position == (size - 1).clamp_max(FIRST - 1))
        four = total(received, near) / total(seen + position, last_near).clamp_min(1)
        # Beyond the first half few queries see a key, and a token that looks at itself would pass for a sink.
        half = real & (position < (size + 1) // 2)
        candidates = torch.where(half, mean, -math.inf)
        top = candidates.new_full((heads, n + 1), -math.inf)
        top.scatter_reduce_(1, index.expand(heads, -1), candidates, "amax")
        is_top = half & ((candidates == top[:, index]) | candidates.isnan())
        place = position.new_full((heads, n + 1), length)
        place.scatter_reduce_(1, index.expand(heads, -1), torch.where(is_top, position, length), "amin")
        parts = [mean[:, documents.first], four, top[:, :n], place[:, :n].double()]
        return torch.stack([*parts, total(mass, real) / documents.length]).permute(2, 0, 1)

    def merge(self, other: "AttentionStatistics") -> None:
        """Add what another rank has seen."""
        self.sums, self.tiles = self.sums + other.sums, self.tiles + other.tiles
        self.sequences += other.sequences
        self.lengths += other.lengths

    def sink_counts(self) -> tuple[Tensor, int]:
        """How many (sequence, head) exceed each of SINK_EPSILONS at the first token, the first four, the most attended
        position: [3, epsilons]; and of how many."""
        sequences, lengths = torch.cat(self.sequences), torch.cat(self.lengths)
        counted = sequences[lengths >= self.min_sink_tokens][:, :3]
        limits = torch.tensor(SINK_EPSILONS, dtype=torch.float64)
        exceeds = (counted[..., None] > limits).sum((0, 2)) if len(counted) else torch.zeros(3, len(limits))
        if bool(counted.isnan().any()):
            exceeds = exceeds * math.nan
        return exceeds, len(counted) * counted.shape[2]

    def result(self) -> dict[str, list[Any]]:
        """By head, lists of H:

        - sink_rate: share of the sequences whose mean attention to their first token, alpha_1 = sum_i w_i1 / T,
          exceeds 0.3 (Gu et al., arXiv 2410.10781; the softpick paper follows them). first_mass, first4_mass: that
          mean itself, and to the first four tokens (the sinks of StreamingLLM, arXiv 2309.17453).
        - top_mass, top_position: mean of the most that any position k of a sequence's first half receives,
          alpha_k = sum_i w_ik / (T - k + 1), and the position where that is most often.
        - row_mass: mean of sum_j w_ij. empty_rows: share of the rows where it is 0.
        - sparsity, sparsity_small: share of visible weights that are exactly 0, and at most 1e-5.
        - empty_tiles_64, empty_tiles_128: share of the tiles with a visible score in which none is positive.
        - entropy: mean of -sum p ln p, p = w_i / mass_i, in nats over the rows with mass.
        - distance: sum_ij w_ij (i - j) / sum_ij w_ij, in tokens.
        - dormant: mean row mass below 0.01 on every sequence.
        """
        if not self.sequences:
            raise ValueError("no batch has been added, so there are no statistics")
        mass, empty, entropy, full, zero, small, visible, distance, rows = self.sums
        tiles, empty_tiles = self.tiles.double()
        sequences, lengths = torch.cat(self.sequences), torch.cat(self.lengths)
        counted = lengths >= self.min_sink_tokens
        weight = lengths[counted].double()
        first, four, top = ((sequences[counted, part] * weight[:, None]).sum(0) / weight.sum() for part in range(3))
        sinks = (sequences[counted, 0] > SINK_EPSILON).double().mean(0) + 0 * first
        positions = sequences[counted, 3].mode(0).values if len(weight) else torch.full_like(mass, math.nan)
        result = {
            "sink_rate": sinks,
            "first_mass": first,
            "first4_mass": four,
            "top_mass": top,
            "row_mass": mass / rows,
            "empty_rows": empty / rows,
            "sparsity": zero / visible,
            "sparsity_small": small / visible,
            "empty_tiles_64": empty_tiles[0] / tiles[0],
            "empty_tiles_128": empty_tiles[1] / tiles[1],
            "entropy": entropy / full,
            "distance": distance / mass,
        }
        lists = {name: values.tolist() for name, values in result.items()}
        lists["top_position"] = [int(p) if math.isfinite(p) else math.nan for p in positions.tolist()]
        lists["dormant"] = (sequences[:, 4] < DORMANT_MASS).all(0).tolist()
        return lists
