"""Moments and extremes of hidden states, accumulated over batches: kurtosis, largest values, massive activations.

Legend: B rows, T tokens, C channels.
"""

import heapq
import math
from typing import Any, NamedTuple

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
    - token_kurtosis: the same over the channels of each token, averaged over the tokens that are not constant.
    - max, min: of all values. top3: the three largest |x|, and median |x|, each per row, averaged over rows by tokens,
      as Sun et al. (arXiv 2402.17762) report them.
    - massive: values with |x| > 100 and |x| > 1000 times the median |x| of their row, the definition of Sun et al.
      (there "roughly" 1000 times).
    - nonfinite: NaN and Inf seen. They also turn the moments into NaN: nothing is averaged away.
    """

    def __init__(self) -> None:
        self.tokens = self.uneven_tokens = self.massive = self.nonfinite = 0
        self.moments = Moments(0, 0.0, 0.0, 0.0, 0.0)
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
        size = x.abs()
        largest = size.amax(-1)
        # The three largest values lie in the three tokens with the largest maxima.
        best = torch.topk(largest, min(3, tokens))
        values, places = torch.topk(
            size[best.indices].flatten(), min(KEPT, 3 * channels, best.indices.numel() * channels)
        )
        median = _median(size)
        high, low, middle = torch.stack([x.amax().double(), x.amin().double(), median.double()]).tolist()
        if not math.isfinite(high) or not math.isfinite(low):
            self.nonfinite += int((~x.isfinite()).sum())
        self.tokens += tokens
        self.moments = self.moments.merged(_moments(x))
        by_token = _token_kurtosis(x)
        self.token_kurtosis += by_token.double().sum().item()
        self.uneven_tokens += len(by_token)
        self.max, self.min = float(np.maximum(self.max, high)), float(np.minimum(self.min, low))
        self.median += middle * tokens
        top = values[:3].tolist()
        top += [top[-1]] * (3 - len(top))
        self.top3 = [a + b * tokens for a, b in zip(self.top3, top, strict=True)]
        token = best.indices[places[:1] // channels]
        channel = places[:1] % channels
        self._keep(self.largest, x, index, row, token, channel, 1)
        if top[0] > MASSIVE_VALUE and top[0] > MASSIVE_RATIO * middle:
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
        for name in ("tokens", "uneven_tokens", "massive", "nonfinite", "token_kurtosis", "median"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.moments = self.moments.merged(other.moments)
        self.top3 = [a + b for a, b in zip(self.top3, other.top3, strict=True)]
        self.max, self.min = float(np.maximum(self.max, other.max)), float(np.minimum(self.min, other.min))
        self.largest = heapq.nlargest(1, self.largest + other.largest)
        self.massive_at = heapq.nlargest(KEPT, self.massive_at + other.massive_at)

    def result(self) -> dict[str, Any]:
        """The statistics as plain values; places are {"row", "position", "channel", "value"}, position in the row."""
        if not self.tokens:
            raise ValueError("no token has been added, so there are no statistics")
        names = ("row", "position", "channel", "value")
        places = [
            [dict(zip(names, entry[1:], strict=True)) for entry in kept] for kept in (self.largest, self.massive_at)
        ]
        return {
            "kurtosis": self.moments.kurtosis(),
            "token_kurtosis": self.token_kurtosis / self.uneven_tokens if self.uneven_tokens else math.nan,
            "max": self.max,
            "min": self.min,
            "top3": [value / self.tokens for value in self.top3],
            "median": self.median / self.tokens,
            "massive": self.massive,
            "massive_at": places[1],
            "largest": places[0][0] if places[0] else None,
        }


class Moments(NamedTuple):
    """Number and mean of values, and the sums of the 2nd to 4th power of what they differ from the mean by."""

    count: int
    mean: float
    second: float
    third: float
    fourth: float

    def merged(self, other: "Moments") -> "Moments":
        """Of both sets of values; the pairwise formulas of Pebay (Sandia report SAND2008-6212)."""
        if not self.count or not other.count:
            return self if self.count else other
        a, b = self.count, other.count
        n, delta = a + b, other.mean - self.mean
        second = self.second + other.second + delta**2 * a * b / n
        third = self.third + other.third + delta**3 * a * b * (a - b) / n**2
        third += 3 * delta * (a * other.second - b * self.second) / n
        fourth = self.fourth + other.fourth + delta**4 * a * b * (a * a - a * b + b * b) / n**3
        fourth += 6 * delta**2 * (a * a * other.second + b * b * self.second) / n**2
        fourth += 4 * delta * (a * other.third - b * self.third) / n
        return Moments(n, self.mean + delta * b / n, second, third, fourth)

    def kurtosis(self) -> float:
        """Pearson's; a constant has none and gives NaN."""
        return self.count * self.fourth / self.second**2 if self.second != 0 else math.nan


def _moments(x: Tensor) -> Moments:
    """Of all values of [T, C]. Scaled and centred first: float32 neither overflows nor cancels."""
    scale = x.abs().amax().clamp_min(torch.finfo(x.dtype).tiny)
    y = x / scale
    centre = (y.sum(-1).double().sum() / y.numel()).to(x.dtype)
    y -= centre
    square, dot = y * y, torch.linalg.vecdot
    sums = torch.stack([y.sum(-1), square.sum(-1), dot(square, y), dot(square, square)]).double().sum(-1)
    s1, s2, s3, s4, centre, scale = [*sums.tolist(), centre.item(), scale.item()]
    n = y.numel()
    mean = s1 / n  # what rounding left of the centre
    second = s2 - n * mean**2
    third = s3 - 3 * mean * s2 + 2 * n * mean**3
    fourth = s4 - 4 * mean * s3 + 6 * mean**2 * s2 - 3 * n * mean**4
    return Moments(n, (centre + mean) * scale, second * scale**2, third * scale**3, fourth * scale**4)


def _token_kurtosis(x: Tensor) -> Tensor:
    """Kurtosis over the channels of every token of [T, C] that is not constant; a token with NaN or Inf has NaN."""
    y = x - x.mean(-1, keepdim=True)
    size = y.abs().amax(-1, keepdim=True)
    # Rounding leaves a constant token with differences in its last digits.
    uneven = ~(size <= 8 * torch.finfo(x.dtype).eps * x.abs().amax(-1, keepdim=True))[:, 0]
    square = (y / size)[uneven].square_()
    return square.shape[-1] * torch.linalg.vecdot(square, square) / square.sum(-1) ** 2


def _median(x: Tensor) -> Tensor:
    """Median of all values, the lower of two; NaN if one is. On a CPU NumPy selects ten times faster than torch."""
    if x.device.type != "cpu":
        return x.flatten().median()
    flat = x.flatten().numpy()
    middle = (flat.size - 1) // 2
    value = np.partition(flat, middle)[middle]
    return torch.tensor(value if not np.isnan(flat.max()) else math.nan, dtype=x.dtype)
