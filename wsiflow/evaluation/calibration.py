"""Calibration: whether a probability means what it says.

Input: probabilities (n,) and outcomes (n,) of 0 and 1. Output: sums by bin, a reliability table, scores.

Everything is computed from sums by bin, which add up: a map of 10^8 cells is taken in band by band. The Brier score and
its parts are exact whatever the bins. The expected calibration error depends on the bins, as it does by definition. The
slope and intercept are those of the mean probabilities of the bins, which are exact where a bin holds one value.

Brier's score splits (Murphy 1973, with the terms that bins wider than one value add, Stephenson et al. 2008) as

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
_FLOOR = 1e-6  # probabilities nearer to 0 or 1 have no logit to speak of; float32 ends at 6e-8 below 1
_STEPS = 100
_FURTHEST = 4.0  # a step of Newton's from where all is nearly certain would lead to where all is certain otherwise
_SEPARATED = "the outcomes are separated: the likelihood has no maximum"
_INVERTED = "the higher the probability, the rarer the outcome: are the model's classes swapped (model.positive_class)?"
_CLOSE = 1e-10


@dataclass(frozen=True, eq=False)
class Bins:
    """Sums over the values of each bin; equally wide bins from 0 to 1, the last one closed.

    Attributes:
        n: int64 (k,), how many values.
        positives: int64 (k,), how many of them with outcome 1.
        p, pp, py: float64 (k,), sums of the probability, its square, and its product with the outcome.
    """

    n: NDArray[np.int64]
    positives: NDArray[np.int64]
    p: NDArray[np.float64]
    pp: NDArray[np.float64]
    py: NDArray[np.float64]

    @property
    def total(self) -> int:
        """How many values there are."""
        return int(self.n.sum())


class ReliabilityBin(NamedTuple):
    """A bin of a reliability table.

    Attributes:
        low, high: Bounds of the probability.
        n, positives: Values, and those with outcome 1.
        mean: Mean probability; NaN in an empty bin.
        observed: Share of positives; NaN in an empty bin.
        wilson_low, wilson_high: 95 % interval of the share, of Wilson.
        exact_low, exact_high: Likewise, of Clopper and Pearson.
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
    """A coefficient with Wald's 95 % interval; all NaN where there is no finite estimate."""

    value: float
    low: float
    high: float


_NONE = Estimate(math.nan, math.nan, math.nan)


class Fit(NamedTuple):
    """Logistic recalibration: logit P(y = 1) = intercept + slope * logit p (Cox 1958).

    Attributes:
        intercept: Of that line.
        slope: Of that line; 1 where the probabilities are as spread as they should be, below 1 where too far.
        in_the_large: Intercept when the slope is held at 1: 0 where the probabilities are right on average.
        note: Why there is no estimate, or that the slope is that of a model whose classes are swapped; else empty.
    """

    intercept: Estimate
    slope: Estimate
    in_the_large: float
    note: str


def bins(prob: ArrayLike, outcome: ArrayLike, *, k: int) -> Bins:
    """Return the sums of some values.

    Args:
        prob: (n,), 0 to 1.
        outcome: (n,) of 0 and 1.
        k: Number of bins.

    Raises:
        InputError: A probability is outside 0 to 1 or NaN, an outcome neither 0 nor 1, or the lengths differ.
    """
    p, y = np.asarray(prob, np.float64), np.asarray(outcome)
    if p.ndim != 1 or p.shape != y.shape:
        raise InputError(f"probabilities {p.shape} and outcomes {y.shape}", "give one outcome per probability")
    if not ((p >= 0) & (p <= 1)).all():
        bad = p[~((p >= 0) & (p <= 1))][0]
        raise InputError(f"a probability is {bad}", "calibration needs probabilities from 0 to 1")
    if not ((y == 0) | (y == 1)).all():
        raise InputError(f"an outcome is {y[(y != 0) & (y != 1)][0]!r}", "use 1 and 0")
    place = np.minimum((p * k).astype(np.int64), k - 1)

    def total(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(place, weights, k).astype(np.float64)

    y = y.astype(np.float64)
    return Bins(np.bincount(place, minlength=k), total(y).astype(np.int64), total(p), total(p * p), total(p * y))


def merged(parts: Iterable[Bins]) -> Bins:
    """Add up sums over the same bins; there must be at least one part."""
    columns = zip(*((part.n, part.positives, part.p, part.pp, part.py) for part in parts), strict=True)
    return Bins(*(np.sum(column, axis=0) for column in columns))


def coarser(fine: Bins, k: int) -> Bins:
    """Return the sums in ``k`` bins, a divisor of the number there is."""
    return Bins(*(values.reshape(k, -1).sum(axis=1) for values in (fine.n, fine.positives, fine.p, fine.pp, fine.py)))


def table(found: Bins) -> list[ReliabilityBin]:
    """Return the reliability table: a row per bin, empty ones too."""
    edges = np.arange(len(found.n) + 1) / len(found.n)  # 0.3, and not the 0.30000000000000004 of linspace
    with np.errstate(invalid="ignore"):  # 0 / 0: an empty bin has no mean
        mean, observed = found.p / found.n, found.positives / found.n
    intervals = proportions.wilson(found.positives, found.n) + proportions.clopper_pearson(found.positives, found.n)
    columns = (edges[:-1], edges[1:], found.n, found.positives, mean, observed, *intervals)
    return [ReliabilityBin(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def scores(found: Bins) -> dict[str, float]:
    """Return Brier's score, its parts and the calibration errors, by name; NaN without any value."""
    n = found.total
    if not n:
        names = ("brier", "reliability", "resolution", "uncertainty", "within", "ece", "mce")
        return {"n": 0.0, "positives": 0.0, **dict.fromkeys(names, math.nan)}
    full = found.n > 0
    size, y, p, pp, py = (each[full] for each in (found.n, found.positives, found.p, found.pp, found.py))
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
    """Fit the line that turns logits into calibrated ones, by Newton's method on the binomial likelihood.

    Args:
        prob: (k,), probabilities; those nearer to 0 or 1 than 1e-6 count as 1e-6 away.
        positives: (k,), how many of the cases with that probability have outcome 1.
        n: (k,), how many cases there are.
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
    found, covariance = _newton(np.column_stack([ones, logit]), np.zeros(len(p)), y, size)
    if not np.isfinite(covariance).all():
        return Fit(_NONE, _NONE, float(in_the_large), "the outcomes are all but separated: no finite slope was found")
    half = Z95 * np.sqrt(np.diag(covariance))
    intercept, slope = (
        Estimate(*ends) for ends in zip(found.tolist(), (found - half).tolist(), (found + half).tolist(), strict=True)
    )
    return Fit(intercept, slope, float(in_the_large), _INVERTED if slope.high < 0 else "")


def _unfit(logit: NDArray[np.float64], y: NDArray[np.float64], n: NDArray[np.float64]) -> str:
    """Say why there is no finite slope; an empty text where there is one."""
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
    """Return coefficients of a binomial regression and their covariance.

    The likelihood is concave; a step that would lower it is halved, so that every start ends at the maximum. Where that
    is too far away to be told from infinity, the covariance is NaN.
    """

    def likelihood(at: NDArray[np.float64]) -> float:
        line = design @ at + offset
        return float((y * line - n * np.logaddexp(0, line)).sum())

    found = np.zeros(design.shape[1])
    for _ in range(_STEPS):
        line = design @ found + offset
        fitted, rest = (np.exp(-np.logaddexp(0, each)) for each in (-line, line))
        information = design.T @ (design * (n * fitted * rest)[:, None])
        try:
            step = np.linalg.solve(information, design.T @ (y - n * fitted))
            covariance = np.linalg.inv(information).astype(np.float64)
        except np.linalg.LinAlgError:
            return found, np.full_like(information, np.nan)
        step = step / max(1.0, np.abs(design @ step).max() / _FURTHEST)
        while likelihood(found + step) < likelihood(found) and np.abs(step).max() > _CLOSE:
            step = step / 2
        found = found + step
        if np.abs(step).max() <= _CLOSE * max(1.0, np.abs(found).max()):
            break
    return found, covariance
