"""What each normalizer means for a kernel: the one table of them. Kernels read these switches and know no names."""

from typing import NamedTuple

import triton.language as tl

# Where m starts if nothing bounds it from below: far below every score, yet finite, because -inf minus -inf is NaN.
LOWEST = tl.constexpr(-3.0e38)


class Normalizer(NamedTuple):
    """Weight of key j: N(x_j) / (sum_k |N'(x_k)| + ADDED), and of a hidden key 0.

    MINUS_ONE: N'(x) = e^x - 1 and N = max(N', 0), so that a hidden key has the score 0; else N = N' = e^x, and -inf.
    HIDE_NEGATIVE: keys with a score below 0 are hidden. LEAST_M: where the running maximum m starts; 0 if ADDED or the
    one of MINUS_ONE, which are shifted by 2^-m like all terms, would overflow below.
    """

    MINUS_ONE: bool
    HIDE_NEGATIVE: bool
    ADDED: float
    LEAST_M: float


NORMALIZERS = {
    "softpick": Normalizer(MINUS_ONE=True, HIDE_NEGATIVE=False, ADDED=1e-6, LEAST_M=0.0),
    "softmax": Normalizer(MINUS_ONE=False, HIDE_NEGATIVE=False, ADDED=0.0, LEAST_M=LOWEST.value),
    "rectified_softmax": Normalizer(MINUS_ONE=False, HIDE_NEGATIVE=True, ADDED=0.0, LEAST_M=0.0),
}
