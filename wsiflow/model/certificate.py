"""Certificates: the deviation of a fast method's scores from those of the reference method on the same windows.

Input: two arrays of probabilities, and how the windows were drawn. Output: measures of their deviation with bounds, and
the limits that these exceed.

Windows are drawn in parts whose sizes are known, so that means and shares are of all windows of a slide: each drawn
window stands for as many as its weight (stratified sampling, Cochran 1977, Sampling Techniques, chapter 5). Windows of
one unit, such as a block of tissue, depend on each other, so it is units that are counted. A part all of whose windows
were drawn has no error.

Bounds are one-sided, 95 %, and suppose no distribution, because deviations are rare and large: that of Gaffke (2005,
Three test statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative variable, Mathematical
Methods of Statistics 14:451), the quantile of the mean when the drawn units, and one more that has the largest value
there can be, get random shares of the whole. Of n units without a property its share is at most 1 - 0.05^(1/n), near
3 / n, as Clopper and Pearson (1934) say. Here units differ in size, and those of all parts are taken as one sample,
which is not too small.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DECISION = 0.5
_LEVEL = 0.95
_REDRAWS = 4000  # the bounds scatter by 2 % among streams of random numbers
_AT_ONCE = 200  # of thousands of units, so that they take some MB


class ScoreDeviation(NamedTuple):
    """The deviation of scores from expected scores.

    Attributes:
        n: Number of scores.
        mean_abs_diff, p95_abs_diff: Weighted mean and 95th percentile of the absolute differences; NaN if n is 0.
        max_abs_diff: Maximum of the absolute differences of the windows that were drawn; others may differ by more.
        correlation: Pearson's r; NaN if n is 0 or one side is constant.
        flips: Weighted share of scores that are on the other side of the threshold than expected; NaN if n is 0.
        mean_abs_diff_at_most: Upper bound of the mean over all windows, 95 %, where none differs by more than
            ``max_abs_diff``; NaN where it is not known how the windows were drawn, as are the other bounds.
        flips_at_most: Upper bound of the share over all windows, 95 %.
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


def pooled(weighings: Sequence[Weighing]) -> Weighing:
    """Return how the windows of several samples were drawn: no part of one is one of another."""
    parts, first = [np.empty(0, np.int64)], 0
    for each in weighings:
        parts.append(each.part + first)
        first += int(each.part.max(initial=-1)) + 1
    return Weighing(
        np.concatenate([np.empty(0), *(each.weight for each in weighings)]),
        np.concatenate(parts),
        np.concatenate([np.empty(0, np.int64), *(each.unit for each in weighings)]),
    )


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
    values, largest = np.stack([apart, flipped, np.zeros(len(left))]), np.array([found.max_abs_diff, 1.0, 1.0])
    mean_at_most, flips_at_most, beyond_at_most = upper_bounds(values, largest, weighing).tolist()
    return found._replace(
        mean_abs_diff_at_most=mean_at_most, flips_at_most=flips_at_most, beyond_max_at_most=beyond_at_most
    )


def _quantile(values: NDArray[np.float64], weight: NDArray[np.float64], share: float) -> float:
    """Return a quantile of weighted values; with equal weights, that of the values."""
    if (weight == weight[0]).all():
        return float(np.quantile(values, share))
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weight[order])
    return float(values[order][min(np.searchsorted(below, share * below[-1]), len(values) - 1)])


def upper_bounds(values: NDArray[np.float64], largest: NDArray[np.float64], weighing: Weighing) -> NDArray[np.float64]:
    """Return upper 95 % bounds of means over all windows.

    Args:
        values: float64 (k, n), k properties of each window, at least 0.
        largest: float64 (k,), what no window's value exceeds.
        weighing: How the windows were drawn.

    Returns:
        float64 (k,), the bounds of the means of the k properties.
    """
    known, total = _is_known(weighing), float(weighing.weight.sum())
    certain: NDArray[np.float64] = (values * weighing.weight)[:, known].sum(axis=1) / total
    if known.all():
        return certain
    drawn = weighing.of(~known)
    _, unit = np.unique(np.stack([drawn.part, drawn.unit]), axis=1, return_inverse=True)
    sizes = np.bincount(unit.ravel(), drawn.weight).astype(np.float64)
    parts = [np.bincount(unit.ravel(), drawn.weight * each) for each in values[:, ~known]]
    sums: NDArray[np.float64] = np.stack(parts).astype(np.float64)
    unseen = float((sizes**2).sum() / sizes.sum())  # as large as the units are on average, where they are of one size
    sizes, sums = np.append(sizes, unseen), np.append(sums, unseen * largest[:, None], axis=1)
    stream, means = np.random.default_rng(0), []
    for _ in range(_REDRAWS // _AT_ONCE):
        shares = stream.standard_exponential((_AT_ONCE, len(sizes)))
        means.append(shares @ sums.T / (shares @ sizes)[:, None])
    high = np.quantile(np.concatenate(means), _LEVEL, axis=0)
    return np.asarray(certain + high * float(drawn.weight.sum()) / total)


def _is_known(weighing: Weighing) -> NDArray[np.bool_]:
    """Return which windows belong to a part all of whose windows were drawn: each stands for itself alone."""
    sizes = np.bincount(weighing.part, weighing.weight)
    counts = np.bincount(weighing.part)
    known: NDArray[np.bool_] = (sizes <= counts + 1e-6)[weighing.part]
    return known


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
