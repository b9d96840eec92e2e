"""ROC: how well a score per slide separates tumour from normal.

Input: scores (n,) and labels (n,) of 0 and 1. Output: the area under the curve, its variance and interval, the curve.

The area is the Mann-Whitney probability that a tumour slide scores higher than a normal one, ties counting one half.
With one class only there is no pair to compare, and the area is NaN.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

from wsiflow.errors import InputError

Z95 = 1.959963984540054
"""Half width of a 95 % normal interval in standard deviations."""

_LEAST = 2  # slides in a class that have a variance
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class RocCurve:
    """Operating points, by falling threshold; the first is (0, 0) at threshold inf.

    Attributes:
        fpr: float64 (p,), share of the normal slides at or above the threshold; NaN without any.
        tpr: float64 (p,), share of the tumour slides at or above the threshold; NaN without any.
        thresholds: float64 (p,).
    """

    fpr: NDArray[np.float64]
    tpr: NDArray[np.float64]
    thresholds: NDArray[np.float64]


class Paired(NamedTuple):
    """Difference of two areas over the same slides, its standard error, and how likely as much is by chance."""

    difference: float
    standard_error: float
    p: float


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the area under the ROC curve; NaN when a class is missing.

    Args:
        scores: (n,), higher means more likely tumour.
        labels: (n,) of 0 and 1.

    Raises:
        InputError: A score is NaN, a label is neither 0 nor 1, or the lengths differ.
    """
    positive, negative = _split(scores, labels)
    if not (positive.size and negative.size):
        return math.nan
    return float(_wins(positive, negative).mean())


def delong_variance(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the unbiased variance of the area; NaN with fewer than two slides in a class.

    With m tumour and n normal slides it is (A + B - e) / (m n): A and B are m and n times the variances of the mean
    win of each normal and each tumour slide, and e, a mix of A, B and the variance of all m n outcomes, takes off
    what chance adds to both. Being unbiased it can fall below 0 in small sets.

    Args:
        scores: (n,), higher means more likely tumour.
        labels: (n,) of 0 and 1.

    Raises:
        InputError: As for ``auc``.
    """
    positive, negative = _split(scores, labels)
    m, n = len(positive), len(negative)
    if min(m, n) < _LEAST:
        return math.nan
    wins = _wins(positive, negative)
    a, b = m * _wins(negative, positive).var(ddof=1), n * wins.var(ddof=1)
    ties = float((np.searchsorted(np.sort(negative), positive, "right") - _below(negative, positive)).sum())
    # An outcome is 1, 1/2 or 0, so its square is itself, less 1/4 for a tie.
    s = (n * wins.sum() - ties / 4 - m * n * wins.mean() ** 2) / (m * n - 1)
    e = ((m * n - 1) * s - (n - 1) * a - (m - 1) * b) / ((m - 1) * (n - 1))
    return float((a + b - e) / (m * n))


def auc_interval(scores: ArrayLike, labels: ArrayLike) -> tuple[float, float]:
    """Return the 95 % interval of the area: DeLong's variance on the scale of log odds.

    The log odds of the area -+ 1.96 of their standard deviations, turned back: it stays within 0 and 1 and is longer
    towards 1/2. The plain interval, area -+ 1.96 deviations, is too short where it matters: in simulated sets of 129
    slides it held a true area of 0.95 in 91 % of the cases and one of 0.98 in 86 %, this one in 94 and 92 %. Where
    DeLong's variance is 0, as at an area of 0 or 1, the ends are Newcombe's, which need the area and the numbers alone.

    Both ends are NaN with fewer than two slides in a class.

    Raises:
        InputError: As for ``auc``.
    """
    area, variance = auc(scores, labels), float(delong_covariance([scores], labels)[0, 0])
    if math.isnan(variance):
        return math.nan, math.nan
    if variance < _ROUNDING**2 or not 0 < area < 1:
        n_tumour = int((np.asarray(labels) == 1).sum())
        return _newcombe(area, n_tumour, len(np.asarray(labels)) - n_tumour)
    odds, half = area / (1 - area), math.exp(Z95 * math.sqrt(variance) / (area * (1 - area)))
    return odds / (odds + half), odds / (odds + 1 / half)


def delong_covariance(scores: Sequence[ArrayLike], labels: ArrayLike) -> NDArray[np.float64]:
    """Return the covariance of the areas of several scores of the same slides (DeLong et al. 1988).

    The sum of the covariance of the tumour slides' mean wins over their number and of that of the normal slides'. On
    the diagonal it is a little above `delong_variance`, which is free of bias, and never below 0.

    Args:
        scores: k times (n,), higher means more likely tumour.
        labels: (n,) of 0 and 1.

    Returns:
        float64 (k, k); NaN with fewer than two slides in a class.

    Raises:
        InputError: As for ``auc``.
    """
    split = [_split(one, labels) for one in scores]
    if any(min(len(positive), len(negative)) < _LEAST for positive, negative in split):
        return np.full((len(split), len(split)), np.nan)
    of_tumour = np.array([_wins(positive, negative) for positive, negative in split])
    of_normal = np.array([_wins(negative, positive) for positive, negative in split])
    parts = [np.atleast_2d(np.cov(wins)) / wins.shape[1] for wins in (of_tumour, of_normal)]
    total: NDArray[np.float64] = parts[0] + parts[1]
    return total


def paired_test(scores: ArrayLike, reference: ArrayLike, labels: ArrayLike) -> Paired:
    """Compare the areas of two scores of the same slides (DeLong et al. 1988).

    Returns:
        The difference, its standard error and the two-sided p-value of a normal deviate. Without any variance, as
        between scores that separate the classes and the same scores turned round, p is 1 for equal areas and else NaN:
        four slides can look like that by chance. With fewer than two slides in a class all but the difference is NaN.

    Raises:
        InputError: As for ``auc``.
    """
    difference = auc(scores, labels) - auc(reference, labels)
    covariance = delong_covariance([scores, reference], labels)
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    if math.isnan(variance):
        return Paired(difference, math.nan, math.nan)
    error = math.sqrt(max(variance, 0.0))
    if error < _ROUNDING:  # what is left of equal numbers after subtraction
        return Paired(difference, 0.0, 1.0 if abs(difference) < _ROUNDING else math.nan)
    return Paired(difference, error, math.erfc(abs(difference) / error / math.sqrt(2)))


def resample(scores: ArrayLike, labels: ArrayLike, times: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the area of many draws of the slides.

    Args:
        scores: (n,), higher means more likely tumour.
        labels: (n,) of 0 and 1.
        times: int64 (draws, n), how often each slide is in each draw: `resampling.case_draws`.

    Returns:
        float64 (draws,); NaN in a draw that lacks a class.

    Raises:
        InputError: As for ``auc``.
    """
    positive, negative = _split(scores, labels)
    tumour = np.asarray(labels) == 1
    ours, theirs = positive[:, None], negative[None, :]
    outcomes = (ours > theirs) + (ours == theirs) / 2
    of_tumour, of_normal = times[:, tumour], times[:, ~tumour]
    won = ((of_tumour @ outcomes) * of_normal).sum(axis=1)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: no pair was drawn
        areas: NDArray[np.float64] = won / (of_tumour.sum(axis=1) * of_normal.sum(axis=1))
    return areas


def curve(scores: ArrayLike, labels: ArrayLike) -> RocCurve:
    """Return the operating points, one per distinct score.

    Raises:
        InputError: As for ``auc``.
    """
    positive, negative = _split(scores, labels)
    rising = np.unique(np.concatenate([positive, negative]))
    thresholds = np.concatenate([rising, [np.inf]])[::-1]
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: no slide of the class
        fpr, tpr = ((len(one) - _below(one, thresholds)) / np.float64(len(one)) for one in (negative, positive))
    return RocCurve(fpr, tpr, thresholds)


def _newcombe(area: float, m: int, n: int) -> tuple[float, float]:
    """Return the areas whose own deviation puts them 1.96 of it away (Newcombe 2006, method 5).

    The variance at a true area t is that of Hanley and McNeil with both numbers replaced by their mean k where they
    weigh the terms: t (1 - t) (2 k - 1 - 3 (k - 1) / ((2 - t) (1 + t))) / (m n).
    """
    k = (m + n) / 2

    def beyond(t: float) -> float:
        variance = t * (1 - t) * (2 * k - 1 - 3 * (k - 1) / ((2 - t) * (1 + t))) / (m * n)
        return (t - area) ** 2 - Z95**2 * variance

    low = optimize.brentq(beyond, _ROUNDING, area - _ROUNDING) if area > 0 else 0.0
    high = optimize.brentq(beyond, area + _ROUNDING, 1 - _ROUNDING) if area < 1 else 1.0
    return float(low), float(high)


def _split(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the scores of tumour and of normal slides."""
    values, truth = np.asarray(scores, np.float64), np.asarray(labels)
    if values.ndim != 1 or values.shape != truth.shape:
        raise InputError(f"scores {values.shape} and labels {truth.shape}", "give one label per score", stage="roc")
    if np.isnan(values).any():
        raise InputError(f"score {np.flatnonzero(np.isnan(values))[0]} is NaN", "score every slide", stage="roc")
    known = (truth == 0) | (truth == 1)
    if not known.all():
        raise InputError(f"label {truth[~known][0]!r}", "use 1 for tumour and 0 for normal", stage="roc")
    return values[truth == 1], values[truth == 0]


def _below(values: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return how many values lie below each point."""
    return np.searchsorted(np.sort(values), points, "left")


def _wins(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of their values that each of ours beats, ties counting one half."""
    ranked = np.sort(theirs)
    return (np.searchsorted(ranked, ours, "left") + np.searchsorted(ranked, ours, "right")) / (2 * len(theirs))
