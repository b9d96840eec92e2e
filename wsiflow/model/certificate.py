"""Certificates: the deviation of a fast method's scores from those of the reference method on the same windows.

Input: two arrays of probabilities, and how the windows were drawn. Output: measures of their deviation with bounds, and
the limits that these exceed.

Windows are drawn in parts whose sizes are known, so that means and shares are of all windows of a slide: each drawn
window stands for as many as its weight (stratified sampling, Cochran 1977, Sampling Techniques, chapter 5). Windows of
one unit, such as a block of tissue, depend on each other, and the variance is that between the units of a part (chapter
9; the estimator is that of units drawn with replacement, which is not too small). A part all of whose windows were
drawn has no error. Bounds are one-sided, 95 %: Student's t for means, and Clopper and Pearson's (1934) for shares, of
as many windows as are independent (Korn and Graubard 1998, Survey Methodology 24:193); where no window has a property,
whole units count as one, and the bound is near 3 / n.
"""

import math
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray

DECISION = 0.5
_LEVEL = 0.95
_NO_VARIANCE = 1e-18


class ScoreDeviation(NamedTuple):
    """The deviation of scores from expected scores.

    Attributes:
        n: Number of scores.
        mean_abs_diff, p95_abs_diff: Weighted mean and 95th percentile of the absolute differences; NaN if n is 0.
        max_abs_diff: Maximum of the absolute differences of the windows that were drawn; others may differ by more.
        correlation: Pearson's r; NaN if n is 0 or one side is constant.
        flips: Weighted share of scores that are on the other side of the threshold than expected; NaN if n is 0.
        mean_abs_diff_at_most, flips_at_most: Upper bounds of the mean and the share over all windows, 95 %; NaN where
            it is not known how the windows were drawn.
        beyond_max_at_most: Upper bound of the share of all windows that differ by more than ``max_abs_diff``, likewise.
    """

    n: int
    mean_abs_diff: float
    p95_abs_diff: float
    max_abs_diff: float
    correlation: float
    flips: float
    mean_abs_diff_at_most: float = math.nan
    flips_at_most: float = math.nan
    beyond_max_at_most: float = math.nan


class Weighing(NamedTuple):
    """How windows were drawn.

    Attributes:
        weight: float64 (n,), for how many windows each one stands, itself included.
        part: int64 (n,), the part of the windows that each was drawn from.
        unit: int64 (n,), the unit of its part that each belongs to.
    """

    weight: NDArray[np.float64]
    part: NDArray[np.int64]
    unit: NDArray[np.int64]

    def of(self, windows: NDArray[np.bool_] | slice) -> "Weighing":
        """Return how some of the windows were drawn."""
        return Weighing(self.weight[windows], self.part[windows], self.unit[windows])


class Limits(NamedTuple):
    """Upper limits of a deviation; infinity means no limit.

    Attributes:
        mean_abs_diff, max_abs_diff: Limits of the mean and the maximum of the absolute differences.
        flips: Limit of the fraction of scores that are on the other side of the threshold than expected.
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


def score_deviation(
    scores: NDArray[np.float32],
    expected: NDArray[np.float32],
    *,
    threshold: float = DECISION,
    weighing: Weighing | None = None,
) -> ScoreDeviation:
    """Return the deviation of scores from expected scores.

    Args:
        scores: float32 of any shape, 0 to 1.
        expected: float32 of the same shape, 0 to 1.
        threshold: A score above it decides for tumour.
        weighing: How the windows were drawn; None where these are all that count, and bounds are NaN.
    """
    left, right = scores.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    if not len(left):
        return ScoreDeviation(0, math.nan, math.nan, math.nan, math.nan, math.nan)
    apart, flipped = np.abs(left - right), (left > threshold) != (right > threshold)
    weight = np.ones(len(left)) if weighing is None else weighing.weight
    found = ScoreDeviation(
        n=len(left),
        mean_abs_diff=float(np.average(apart, weights=weight)),
        p95_abs_diff=_quantile(apart, weight, 0.95),
        max_abs_diff=float(apart.max()),
        correlation=float(np.corrcoef(left, right)[0, 1]) if left.std() > 0 and right.std() > 0 else math.nan,
        flips=float(np.average(flipped, weights=weight)),
    )
    if weighing is None:
        return found
    return found._replace(
        mean_abs_diff_at_most=mean_at_most(apart, weighing),
        flips_at_most=share_at_most(flipped, weighing),
        beyond_max_at_most=share_at_most(np.zeros(len(left), np.bool_), weighing),
    )


def _quantile(values: NDArray[np.float64], weight: NDArray[np.float64], share: float) -> float:
    """Return a quantile of weighted values; with equal weights, that of the values."""
    if (weight == weight[0]).all():
        return float(np.quantile(values, share))
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weight[order])
    return float(values[order][min(np.searchsorted(below, share * below[-1]), len(values) - 1)])


def mean_at_most(values: NDArray[np.float64], weighing: Weighing) -> float:
    """Return the upper 95 % bound of the mean over all windows, from values that are at least 0 and at most 1."""
    mean = float(np.average(values, weights=weighing.weight))
    variance, freedom = _variance(values, weighing)
    return min(1.0, mean + float(scipy.special.stdtrit(freedom, _LEVEL)) * math.sqrt(variance))


def share_at_most(has: NDArray[np.bool_], weighing: Weighing) -> float:
    """Return the upper 95 % bound of the share of all windows that have a property."""
    weight, known = weighing.weight, _is_known(weighing)
    total, rest = float(weight.sum()), ~known
    certain = float(weight[known & has].sum()) / total
    if not rest.any():
        return certain
    drawn = weighing.of(rest)
    share, n = float(np.average(has[rest], weights=drawn.weight)), _least_independent(drawn)
    if 0 < share < 1:
        variance, _ = _variance(has[rest].astype(np.float64), drawn)
        most = float(drawn.weight.sum() ** 2 / (drawn.weight**2).sum())
        n = min(max(n, share * (1 - share) / max(variance, _NO_VARIANCE)), most)
    hits = min(share * n, n)
    high = 1.0 if n - hits <= 0 else float(scipy.special.betaincinv(hits + 1, n - hits, _LEVEL))
    return certain + high * float(drawn.weight.sum()) / total


def _is_known(weighing: Weighing) -> NDArray[np.bool_]:
    """Return which windows belong to a part all of whose windows were drawn: each stands for itself alone."""
    sizes = np.bincount(weighing.part, weighing.weight)
    counts = np.bincount(weighing.part)
    known: NDArray[np.bool_] = (sizes <= counts + 1e-6)[weighing.part]
    return known


def _variance(values: NDArray[np.float64], weighing: Weighing) -> tuple[float, float]:
    """Return the variance of the weighted mean, between the units of each part, and its degrees of freedom.

    These are Satterthwaite's (1946): a part with a small variance adds few. A part with a single unit shows no
    variance: its deviation from 0 is taken, which is not too small.
    """
    known, total = _is_known(weighing), float(weighing.weight.sum())
    variance, squares = 0.0, 0.0
    for part in np.unique(weighing.part[~known]).tolist():
        own = weighing.part == part
        weight, value = weighing.weight[own], values[own]
        _, unit = np.unique(weighing.unit[own], return_inverse=True)
        n = int(unit.max()) + 1
        centre = float(np.average(value, weights=weight)) if n > 1 else 0.0
        sums = np.bincount(unit, weight * (value - centre)) / total
        of_part = float((sums**2).sum()) * n / max(n - 1, 1)
        variance, squares = variance + of_part, squares + of_part**2 / max(n - 1, 1)
    return variance, max(1.0, variance**2 / squares) if squares else 1.0


def _least_independent(weighing: Weighing) -> float:
    """Return how many windows are independent if all windows of a unit are alike."""
    _, unit = np.unique(np.stack([weighing.part, weighing.unit]), axis=1, return_inverse=True)
    sums = np.bincount(unit.ravel(), weighing.weight)
    return float(sums.sum() ** 2 / (sums**2).sum())


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
