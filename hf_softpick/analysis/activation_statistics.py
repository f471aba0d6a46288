"""Moments and extremes of hidden states, accumulated over batches: kurtosis, largest values, massive activations.

Legend: B rows, T tokens, C channels.
"""

import heapq
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

MASSIVE_VALUE = 100.0
MASSIVE_RATIO = 1000.0
KEPT = 8


class ActivationStatistics:
    """One tensor [B, T, C] of a model, for instance the hidden states after one block, over any number of batches.

    - kurtosis: Pearson's, E[(x - mean)^4] / E[(x - mean)^2]^2 over all tokens and channels together (a normal
      distribution has 3). The softpick paper (arXiv 2504.20966) compares models by the kurtosis of hidden states;
      Bondarenko et al. (arXiv 2306.12929) take it so, over a layer's whole tensor.
    - token_kurtosis: the same over the channels of each token, averaged over tokens.
    - max, min: of all values. top3: the three largest |x|, and median |x|, each per row, averaged over rows by tokens,
      as Sun et al. (arXiv 2402.17762) report them.
    - massive: values with |x| > 100 and |x| > 1000 times the median |x| of their row, the definition of Sun et al.
      (there "roughly" 1000 times).
    - nonfinite: NaN and Inf seen. They also turn the moments into NaN: nothing is averaged away.
    """

    def __init__(self) -> None:
        self.values = self.tokens = self.massive = self.nonfinite = 0
        self.moments = [0.0, 0.0, 0.0, 0.0]
        self.token_kurtosis = self.median = 0.0
        self.top3 = [0.0, 0.0, 0.0]
        self.max, self.min = -math.inf, math.inf
        self.largest: list[tuple[float, int, int, int, float]] = []
        self.massive_at: list[tuple[float, int, int, int, float]] = []

    @torch.no_grad()
    def add(self, x: Tensor, real: Tensor | None = None, first_row: int = 0) -> None:
        """Add one batch.

        Args:
            x: [B, T, C], any floating dtype; computed in float32 (float64 stays float64).
            real: bool [B, T], False = padding, left out.
            first_row: index of the batch's first row, for the places of the largest values.
        """
        for row in range(x.shape[0]):
            index = None if real is None else real[row].nonzero()[:, 0]
            part = x[row] if index is None else x[row][index]
            if part.shape[0]:
                self._add_row(part if part.dtype == torch.float64 else part.float(), index, first_row + row)

    def _add_row(self, x: Tensor, index: Tensor | None, row: int) -> None:
        tokens, channels = x.shape
        square = x * x
        dot = torch.linalg.vecdot
        sums = torch.stack([x.sum(-1), square.sum(-1), dot(square, x), dot(square, square)]).double()
        per_token = _kurtosis(sums / channels).sum()
        size = x.abs()
        by_token = size.amax(-1)
        # The three largest values lie in the three tokens with the largest maxima.
        best = torch.topk(by_token, min(3, tokens))
        values, places = torch.topk(
            size[best.indices].flatten(), min(KEPT, 3 * channels, best.indices.numel() * channels)
        )
        median = _median(size)
        numbers = torch.stack(
            [*sums.sum(-1), per_token, x.amax().double(), x.amin().double(), median.double()]
        ).tolist()
        self.nonfinite += 0 if math.isfinite(numbers[1]) else int((~x.isfinite()).sum())
        self.tokens += tokens
        self.values += tokens * channels
        self.moments = [a + b for a, b in zip(self.moments, numbers[:4], strict=True)]
        self.token_kurtosis += numbers[4]
        self.max, self.min = _extreme(max, self.max, numbers[5]), _extreme(min, self.min, numbers[6])
        self.median += numbers[7] * tokens
        top = values[:3].tolist()
        top += [top[-1]] * (3 - len(top))
        self.top3 = [a + b * tokens for a, b in zip(self.top3, top, strict=True)]
        token = best.indices[places[:1] // channels]
        channel = places[:1] % channels
        self._keep(self.largest, x, index, row, token, channel, 1)
        if top[0] > MASSIVE_VALUE and top[0] > MASSIVE_RATIO * numbers[7]:
            found = ((size > MASSIVE_VALUE) & (size > MASSIVE_RATIO * median)).nonzero()
            self.massive += len(found)
            order = size[found[:, 0], found[:, 1]].argsort(descending=True)[:KEPT]
            self._keep(self.massive_at, x, index, row, found[order, 0], found[order, 1], KEPT)

    def _keep(self, kept: list, x: Tensor, index: Tensor | None, row: int, token: Tensor, channel: Tensor, count: int):
        value = x[token, channel].tolist()
        position = (token if index is None else index[token]).tolist()
        kept += [(abs(v), row, t, c, v) for v, t, c in zip(value, position, channel.tolist(), strict=True)]
        kept[:] = heapq.nlargest(count, kept)

    def merge(self, other: "ActivationStatistics") -> None:
        """Add what another rank has seen."""
        for name in ("values", "tokens", "massive", "nonfinite", "token_kurtosis", "median"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.moments = [a + b for a, b in zip(self.moments, other.moments, strict=True)]
        self.top3 = [a + b for a, b in zip(self.top3, other.top3, strict=True)]
        self.max, self.min = _extreme(max, self.max, other.max), _extreme(min, self.min, other.min)
        self.largest = heapq.nlargest(1, self.largest + other.largest)
        self.massive_at = heapq.nlargest(KEPT, self.massive_at + other.massive_at)

    def result(self) -> dict[str, Any]:
        """The statistics as plain values; places are {"row", "position", "channel", "value"}, position in the row."""
        if not self.tokens:
            raise ValueError("no token has been added, so there are no statistics")
        places = [[_place(entry) for entry in kept] for kept in (self.largest, self.massive_at)]
        return {
            "kurtosis": _kurtosis(torch.tensor(self.moments, dtype=torch.float64) / self.values).item(),
            "token_kurtosis": self.token_kurtosis / self.tokens,
            "max": self.max,
            "min": self.min,
            "top3": [value / self.tokens for value in self.top3],
            "median": self.median / self.tokens,
            "massive": self.massive,
            "massive_at": places[1],
            "largest": places[0][0] if places[0] else None,
        }


def _place(entry: tuple[float, int, int, int, float]) -> dict[str, Any]:
    return dict(zip(("row", "position", "channel", "value"), entry[1:], strict=True))


def _extreme(choose: Any, a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else choose(a, b)


def _kurtosis(means: Tensor) -> Tensor:
    """Pearson's kurtosis from the mean of x, x^2, x^3, x^4 along dimension 0; a constant has none and gives NaN."""
    m1, m2, m3, m4 = means
    variance = m2 - m1**2
    return (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / torch.where(variance > 0, variance**2, math.nan)


def _median(x: Tensor) -> Tensor:
    """Median of all values, the lower of two; NaN if one is. On a CPU NumPy selects ten times faster than torch."""
    if x.device.type != "cpu":
        return x.flatten().median()
    flat = x.flatten().numpy()
    middle = (flat.size - 1) // 2
    value = np.partition(flat, middle)[middle]
    return torch.tensor(value if not np.isnan(flat.max()) else math.nan, dtype=x.dtype)
