"""What a faster way of computing costs in accuracy: its scores against those of the slow way, on the same windows.

Input: two arrays of probabilities. Output: how far they lie apart, and which agreed limits that breaks.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DECISION = 0.5


class ScoreDeviation(NamedTuple):
    """How far scores lie from those expected.

    Attributes:
        n: Scores compared.
        mean_abs_diff, p95_abs_diff, max_abs_diff: Of the absolute differences; NaN where n is 0.
        correlation: Pearson's r; NaN where either side does not vary.
        flips: Share of scores on the other side of one half.
    """

    n: int
    mean_abs_diff: float
    p95_abs_diff: float
    max_abs_diff: float
    correlation: float
    flips: float


class Limits(NamedTuple):
    """How far scores may lie from those expected; infinite where nothing is promised.

    Attributes:
        mean_abs_diff, max_abs_diff: Of the absolute differences.
        flips: Share of scores on the other side of one half.
    """

    mean_abs_diff: float = math.inf
    max_abs_diff: float = math.inf
    flips: float = math.inf


# Of a lower precision against fp32: some times what bf16 and int8 cost GoogLeNet, to leave room for other networks. Of
# fp32 against itself: sums taken in another order.
PRECISION_LIMITS = {
    "fp32": Limits(max_abs_diff=1e-4),
    "bf16": Limits(mean_abs_diff=0.002, max_abs_diff=0.02),
    "int8": Limits(mean_abs_diff=0.02, flips=0.02),
}


def score_deviation(scores: NDArray[np.float32], expected: NDArray[np.float32]) -> ScoreDeviation:
    """Compare scores with those expected.

    Args:
        scores: float32, any shape, 0 to 1.
        expected: float32 of the same shape.
    """
    left, right = scores.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    if not len(left):
        return ScoreDeviation(0, math.nan, math.nan, math.nan, math.nan, math.nan)
    apart = np.abs(left - right)
    return ScoreDeviation(
        n=len(left),
        mean_abs_diff=float(apart.mean()),
        p95_abs_diff=float(np.quantile(apart, 0.95)),
        max_abs_diff=float(apart.max()),
        correlation=float(np.corrcoef(left, right)[0, 1]) if left.std() > 0 and right.std() > 0 else math.nan,
        flips=float(((left >= DECISION) != (right >= DECISION)).mean()),
    )


def exceeded_limits(found: ScoreDeviation, limits: Limits) -> list[str]:
    """Return which limits a comparison breaks, in words; none where it keeps to all."""
    return [
        f"{name.replace('_', ' ')} is {getattr(found, name):.2g}, allowed {limit:g}"
        for name, limit in limits._asdict().items()
        if getattr(found, name) > limit
    ]


def draw_indices(seed: str, *, among: int, wanted: int) -> NDArray[np.int64]:
    """Return up to ``wanted`` different indices below ``among`` in rising order, the same for the same seed anywhere.

    Only the raw stream of PCG64 is used, which NumPy never changes, unlike its distributions.

    Args:
        seed: Hexadecimal, such as a slide's key.
        among: Number of things to draw from.
        wanted: How many to draw.
    """
    order = np.random.PCG64(int(seed[:16], 16)).random_raw(among)
    return np.sort(np.argsort(order, kind="stable")[:wanted])
