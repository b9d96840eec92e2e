"""Measure calibration: whether a predicted probability agrees with the observed frequency.

Input: probabilities (n,) and outcomes (n,) of 0 and 1. Output: sums by bin, a reliability table, calibration scores and
a logistic recalibration.

Everything is computed from sums by bin. The sums of several arrays add up, so a map of 10^8 cells can be processed in
bands. The Brier score and its components do not depend on the bins. The expected calibration error (ECE) depends on
them by definition. Slope and intercept are fitted to the mean probabilities of the bins, which is exact where every bin
holds one distinct value.

The Brier score decomposes (Murphy 1973; Stephenson et al. 2008 for the within-bin terms) as

    brier = reliability - resolution + uncertainty + within

with o the share of positives, and over bins k of n_k values, mean probability p_k and share of positives o_k:
reliability = sum n_k (p_k - o_k)^2 / n, resolution = sum n_k (o_k - o)^2 / n, uncertainty = o (1 - o), and
within = sum (p - p_k)^2 / n - 2 sum (p - p_k)(y - o_k) / n.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsiflow.errors import InputError
from wsiflow.evaluation import proportions

Z95 = 1.959963984540054
_FLOOR = 1e-6  # probabilities are clipped here: nearer to 0 or 1 float32 is too coarse for a meaningful logit
_STEPS = 100
_FURTHEST = 4.0  # an unbounded Newton step from nearly certain probabilities overshoots to the opposite certainty
_SEPARATED = "the outcomes are separated: the likelihood has no maximum"
_INVERTED = "the higher the probability, the rarer the outcome: are the model's classes swapped (model.positive_class)?"
_CLOSE = 1e-10


@dataclass(frozen=True, eq=False)
class Bins:
    """Sums over the values in each of k bins of equal width from 0 to 1; the last bin includes 1.

    Attributes:
        n: int64 (k,), number of values.
        positives: int64 (k,), number of values with outcome 1.
        p, pp, py: float64 (k,), sums of the probability, of its square, and of its product with the outcome.
    """

    n: NDArray[np.int64]
    positives: NDArray[np.int64]
    p: NDArray[np.float64]
    pp: NDArray[np.float64]
    py: NDArray[np.float64]

    @property
    def total(self) -> int:
        """Number of values in all bins."""
        return int(self.n.sum())


class ReliabilityBin(NamedTuple):
    """A bin of a reliability table.

    Attributes:
        low, high: Bounds of the probability.
        n, positives: Number of values, and of values with outcome 1.
        mean: Mean probability; NaN in an empty bin.
        observed: Share of positives; NaN in an empty bin.
        wilson_low, wilson_high: Wilson's 95 % interval of the share of positives.
        exact_low, exact_high: The 95 % interval of Clopper and Pearson.
    """

    low: float
    high: float
    n: int
    positives: int
    mean: float
    observed: float
    wilson_low: float
    wilson_high: float
    exact_low: float
    exact_high: float


class Estimate(NamedTuple):
    """A regression coefficient with Wald's 95 % interval; all NaN where no finite estimate exists."""

    value: float
    low: float
    high: float


_NONE = Estimate(math.nan, math.nan, math.nan)


class Fit(NamedTuple):
    """Logistic recalibration: logit P(y = 1) = intercept + slope * logit p (Cox 1958).

    Attributes:
        intercept: Calibration intercept.
        slope: Calibration slope: 1 for calibrated probabilities, below 1 where they are too extreme.
        in_the_large: Intercept with the slope fixed at 1 (calibration in the large): 0 where the mean probability
            equals the share of positives.
        note: Reason why no estimate exists, or a hint that the model's classes may be swapped; else empty.
    """

    intercept: Estimate
    slope: Estimate
    in_the_large: float
    note: str


def bins(prob: ArrayLike, outcome: ArrayLike, *, k: int) -> Bins:
    """Return the sums of probabilities and outcomes by bin.

    Args:
        prob: (n,), probabilities, 0 to 1.
        outcome: (n,), outcomes, 0 or 1.
        k: Number of bins.

    Raises:
        InputError: A probability is outside 0 to 1 or NaN, an outcome neither 0 nor 1, or the lengths differ.
    """
    p, y = np.asarray(prob, np.float64), np.asarray(outcome)
    if p.ndim != 1 or p.shape != y.shape:
        cause = f"the probabilities have shape {p.shape} and the outcomes {y.shape}"
        raise InputError(cause, "give one outcome per probability")
    if not ((p >= 0) & (p <= 1)).all():
        bad = p[~((p >= 0) & (p <= 1))][0]
        raise InputError(f"a probability is {bad}", "give probabilities from 0 to 1, which calibration needs")
    if not ((y == 0) | (y == 1)).all():
        raise InputError(f"an outcome is {y[(y != 0) & (y != 1)][0]!r}", "use 1 and 0")
    place = np.minimum((p * k).astype(np.int64), k - 1)

    def total(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(place, weights, k).astype(np.float64)

    y = y.astype(np.float64)
    return Bins(np.bincount(place, minlength=k), total(y).astype(np.int64), total(p), total(p * p), total(p * y))


def merged(parts: Iterable[Bins]) -> Bins:
    """Add up sums over the same bins; ``parts`` must not be empty."""
    columns = zip(*((part.n, part.positives, part.p, part.pp, part.py) for part in parts), strict=True)
    return Bins(*(np.sum(column, axis=0) for column in columns))


def coarser(fine: Bins, k: int) -> Bins:
    """Return the sums in ``k`` wider bins; ``k`` must divide the number of bins of ``fine``."""
    return Bins(*(values.reshape(k, -1).sum(axis=1) for values in (fine.n, fine.positives, fine.p, fine.pp, fine.py)))


def table(sums: Bins) -> list[ReliabilityBin]:
    """Return the reliability table, a row for every bin, also for empty ones."""
    edges = np.arange(len(sums.n) + 1) / len(sums.n)  # 0.3, and not the 0.30000000000000004 of linspace
    with np.errstate(invalid="ignore"):  # 0 / 0: an empty bin has no mean
        mean, observed = sums.p / sums.n, sums.positives / sums.n
    intervals = proportions.wilson(sums.positives, sums.n) + proportions.clopper_pearson(sums.positives, sums.n)
    columns = (edges[:-1], edges[1:], sums.n, sums.positives, mean, observed, *intervals)
    return [ReliabilityBin(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def scores(sums: Bins) -> dict[str, float]:
    """Return the Brier score, its components, and the expected and largest calibration error by name.

    All are NaN where the bins hold no value.
    """
    n = sums.total
    if not n:
        names = ("brier", "reliability", "resolution", "uncertainty", "within", "ece", "mce")
        return {"n": 0.0, "positives": 0.0, **dict.fromkeys(names, math.nan)}
    full = sums.n > 0
    size, y, p, pp, py = (each[full] for each in (sums.n, sums.positives, sums.p, sums.pp, sums.py))
    mean, share, overall = p / size, y / size, y.sum() / n
    spread = pp - size * mean**2  # sum of (p - p_k)^2
    common = py - size * mean * share  # sum of (p - p_k)(y - o_k)
    gaps = np.abs(mean - share)
    return {
        "n": float(n),
        "positives": float(y.sum()),
        "brier": float((pp - 2 * py + y).sum() / n),
        "reliability": float((size * (mean - share) ** 2).sum() / n),
        "resolution": float((size * (share - overall) ** 2).sum() / n),
        "uncertainty": float(overall * (1 - overall)),
        "within": float((spread - 2 * common).sum() / n),
        "ece": float((size * gaps).sum() / n),
        "mce": float(gaps.max()),
    }


def recalibrate(prob: ArrayLike, positives: ArrayLike, n: ArrayLike) -> Fit:
    """Fit a logistic recalibration by Newton's method on the binomial likelihood.

    Args:
        prob: (k,), distinct probabilities; they are clipped to 1e-6 and 1 - 1e-6.
        positives: (k,), number of cases with this probability and outcome 1.
        n: (k,), number of cases with this probability.
    """
    p, y, size = (np.asarray(each, np.float64) for each in (prob, positives, n))
    p, y, size = p[size > 0], y[size > 0], size[size > 0]
    logit = np.log(np.clip(p, _FLOOR, 1 - _FLOOR) / (1 - np.clip(p, _FLOOR, 1 - _FLOOR)))
    note = _unfit(logit, y, size)
    if note and not (0 < y.sum() < size.sum()):
        return Fit(_NONE, _NONE, math.nan, note)
    ones = np.ones((len(p), 1))
    (in_the_large,), _ = _newton(ones, logit, y, size)
    if note:
        return Fit(_NONE, _NONE, float(in_the_large), note)
    line, covariance = _newton(np.column_stack([ones, logit]), np.zeros(len(p)), y, size)
    if not np.isfinite(covariance).all():
        return Fit(_NONE, _NONE, float(in_the_large), "the outcomes are all but separated: no finite slope was found")
    half = Z95 * np.sqrt(np.diag(covariance))
    intercept, slope = (
        Estimate(*ends) for ends in zip(line.tolist(), (line - half).tolist(), (line + half).tolist(), strict=True)
    )
    return Fit(intercept, slope, float(in_the_large), _INVERTED if slope.high < 0 else "")


def _unfit(logit: NDArray[np.float64], y: NDArray[np.float64], n: NDArray[np.float64]) -> str:
    """Return the reason why no finite slope exists; empty where one exists."""
    positive, negative = logit[y > 0], logit[y < n]
    if not len(n):
        return "there are no cases"
    if not (positive.size and negative.size):
        return "only one outcome occurs"
    if logit.max() == logit.min():
        return "all probabilities are equal"
    if positive.min() >= negative.max():
        return _SEPARATED
    if positive.max() <= negative.min():
        return f"{_SEPARATED}; {_INVERTED}"
    return ""


def _newton(
    design: NDArray[np.float64], offset: NDArray[np.float64], y: NDArray[np.float64], n: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the coefficients of a logistic regression and their covariance, by Newton's method.

    The log-likelihood is concave, and a step that would lower it is halved, so the iteration converges to the maximum.
    Where the coefficients diverge and the information matrix becomes singular, the covariance is NaN.

    Args:
        design: float64 (k, c), design matrix.
        offset: float64 (k,), fixed part of the linear predictor.
        y: float64 (k,), positives.
        n: float64 (k,), cases.
    """

    def likelihood(at: NDArray[np.float64]) -> float:
        line = design @ at + offset
        return float((y * line - n * np.logaddexp(0, line)).sum())

    estimate = np.zeros(design.shape[1])
    for _ in range(_STEPS):
        line = design @ estimate + offset
        fitted, rest = (np.exp(-np.logaddexp(0, each)) for each in (-line, line))
        information = design.T @ (design * (n * fitted * rest)[:, None])
        try:
            step = np.linalg.solve(information, design.T @ (y - n * fitted))
            covariance = np.linalg.inv(information).astype(np.float64)
        except np.linalg.LinAlgError:
            return estimate, np.full_like(information, np.nan)
        step = step / max(1.0, np.abs(design @ step).max() / _FURTHEST)
        while likelihood(estimate + step) < likelihood(estimate) and np.abs(step).max() > _CLOSE:
            step = step / 2
        estimate = estimate + step
        if np.abs(step).max() <= _CLOSE * max(1.0, np.abs(estimate).max()):
            break
    return estimate, covariance
