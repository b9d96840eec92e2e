"""Certificates: the deviation of a fast method's scores from those of the reference method on the same windows.

Input: two arrays of probabilities. Output: measures of their deviation, and the limits that these exceed.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DECISION = 0.5


class ScoreDeviation(NamedTuple):
    """The deviation of scores from expected scores.

    Attributes:
        n: Number of scores.
        mean_abs_diff, p95_abs_diff, max_abs_diff: Mean, 95th percentile and maximum of the absolute differences; NaN if
            n is 0.
        correlation: Pearson's r; NaN if n is 0 or one side is constant.
        flips: Fraction of scores that are on the other side of one half than expected; NaN if n is 0.
    """

    n: int
    mean_abs_diff: float
    p95_abs_diff: float
    max_abs_diff: float
    correlation: float
    flips: float


class Limits(NamedTuple):
    """Upper limits of a deviation; infinity means no limit.

    Attributes:
        mean_abs_diff, max_abs_diff: Limits of the mean and the maximum of the absolute differences.
        flips: Limit of the fraction of scores that are on the other side of one half than expected.
    """

    mean_abs_diff: float = math.inf
    max_abs_diff: float = math.inf
    flips: float = math.inf


# Limits for a lower precision against fp32: a multiple of the deviations of GoogLeNet in bf16 and int8, since those of
# other networks may be larger. The limit for fp32 against itself allows for sums in a different order.
PRECISION_LIMITS = {
    "fp32": Limits(max_abs_diff=1e-4),
    "bf16": Limits(mean_abs_diff=0.002, max_abs_diff=0.02),
    "int8": Limits(mean_abs_diff=0.02, flips=0.02),
}


def score_deviation(scores: NDArray[np.float32], expected: NDArray[np.float32]) -> ScoreDeviation:
    """Return the deviation of scores from expected scores.

    Args:
        scores: float32 of any shape, 0 to 1.
        expected: float32 of the same shape, 0 to 1.
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


def exceeded_limits(deviation: ScoreDeviation, limits: Limits) -> list[str]:
    """Return a message for each limit that a deviation exceeds."""
    return [
        f"{name.replace('_', ' ')} is {getattr(deviation, name):.2g}, allowed {limit:g}"
        for name, limit in limits._asdict().items()
        if getattr(deviation, name) > limit
    ]


def draw_indices(seed: str, *, among: int, count: int) -> NDArray[np.int64]:
    """Return a random sample of indices without replacement, the same for the same seed on every machine.

    Only the raw stream of PCG64 is used, which NumPy guarantees not to change, unlike its distributions.

    Args:
        seed: Hexadecimal text, for example the key of a slide.
        among: Number of indices to draw from: 0 to ``among - 1``.
        count: Size of the sample; it is smaller if there are fewer indices.

    Returns:
        int64 (min(count, among),), in ascending order.
    """
    order = np.random.PCG64(int(seed[:16], 16)).random_raw(among)
    return np.sort(np.argsort(order, kind="stable")[:count])
