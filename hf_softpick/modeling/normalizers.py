"""What each normalizer is, the one place that says it; recipe, conversion, statistics, report and loops read it here.

Free of torch, because recipes are checked without it, and of other modules.
"""

import math
from dataclasses import dataclass, replace

SOFTPICK_EPS = 1e-6
HEAD_SCALE = "head_scale"


@dataclass(frozen=True)
class Normalizer:
    """What turns the scores x_j of a query into weights w_j, over the keys V that it sees:

        w_j = p_j / (sum_{k in V} |p_k| + constant),    p = e^x, or e^x - 1 with `minus_one`; a p_j below 0 weighs 0

    With L = log of the denominator, o = sum_j w_j v_j, delta = <o, do> and dp_j = <do, v_j>, a score has the gradient

        dx_j = e^(x_j - L) * (dp_j - delta),    with `minus_one` and x_j <= 0: e^(x_j - L) * delta

    Source: Zuhri, Fuadi, Aji 2025, arXiv 2504.20966, for softpick, rectified_softmax and their scaled forms.
    """

    name: str
    base: str
    """The normalizer without the scaling, which is what the loops and kernels compute."""
    ancestor: str
    """Its name in `attn_impl` of the ancestor, after "parallel_" or "naive_"."""
    minus_one: bool = False
    constant: float = 0.0
    """Part of the denominator, added before any shift: the value does not depend on how it is computed."""
    rectified: bool = False
    """Keys with a score below 0 are left out, as if the query did not see them."""
    scaled: bool = False
    """Scores are first multiplied by s_h * log(n), s_h a parameter of each head, n = 2 + the query's position in its
    document."""
    eager_bytes: int = 8
    """What dense attention keeps of each score for the backward pass."""
    paper_claims: bool = False
    """The paper claims for it: no attention sinks, no massive activations, sparse maps."""

    @property
    def is_softmax(self) -> bool:
        """Whether the attention of transformers computes it, once the scores are scaled."""
        return self.base == "softmax"

    @property
    def is_plain_softmax(self) -> bool:
        """Whether any attention computes it as it is: what a model runs that is told nothing."""
        return self.is_softmax and not self.scaled

    @property
    def hidden_score(self) -> float:
        """The score that adds nothing to either sum."""
        return 0.0 if self.minus_one else -math.inf

    @property
    def rows_sum_to_one(self) -> bool:
        """Whether the weights of a query always sum to 1, so that no statistics of that sum say anything."""
        return not (self.minus_one or self.rectified or self.constant)

    @property
    def parameters(self) -> dict[str, float]:
        """Parameters of its own in each layer, float32 [H], with their initial value."""
        return {HEAD_SCALE: 0.3} if self.scaled else {}


_SOFTPICK = Normalizer(
    "softpick",
    base="softpick",
    ancestor="softpick_attn",
    minus_one=True,
    constant=SOFTPICK_EPS,
    eager_bytes=17,
    paper_claims=True,
)
_SOFTMAX = Normalizer("softmax", base="softmax", ancestor="attn")
NORMALIZERS: dict[str, Normalizer] = {
    normalizer.name: normalizer
    for normalizer in (
        _SOFTPICK,
        _SOFTMAX,
        Normalizer("rectified_softmax", "rectified_softmax", "rectified_attn", rectified=True, eager_bytes=9),
        replace(_SOFTPICK, name="scaled_softpick", ancestor="scaled_softpick_attn", scaled=True),
        replace(_SOFTMAX, name="scaled_softmax", ancestor="scaled_attn", scaled=True),
    )
}


# Names of parameters that some normalizer has, and transformers' attention has not.
OWN_PARAMETERS = tuple(dict.fromkeys(name for normalizer in NORMALIZERS.values() for name in normalizer.parameters))


def describe_normalizer(name: str) -> Normalizer:
    """The normalizer of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in NORMALIZERS:
        raise ValueError(f"normalizer is {name!r}, expected one of {', '.join(NORMALIZERS)}")
    return NORMALIZERS[name]


def base_normalizer(name: str) -> str:
    """The function behind a normalizer's name: scaled_* only changes the scores. Errors as `describe_normalizer`."""
    return describe_normalizer(name).base
