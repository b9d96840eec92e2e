"""Compute confidence intervals of a proportion, k of n.

Input: counts. Output: bounds, as shares. The n trials are assumed to be independent; where they are not (neighbouring
cells of a map, slides of one patient) the bounds are too narrow, and the caller has to say so.
"""

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from wsiflow.errors import InputError

Bounds = tuple[NDArray[np.float64], NDArray[np.float64]]


def clopper_pearson(hits: ArrayLike, n: ArrayLike, *, level: float = 0.95) -> Bounds:
    """Return the exact two-sided interval, whose coverage is at least its level (Clopper and Pearson 1934).

    Args:
        hits: (...), number of successes.
        n: (...), number of trials; where it is 0, the interval is 0 to 1.
        level: Confidence level.

    Returns:
        Low and high bounds, float64 (...) each.

    Raises:
        InputError: A count is negative, or there are more successes than trials.
    """
    k, of = _counts(hits, n)
    tail = (1 - level) / 2
    with np.errstate(invalid="ignore"):  # where a bound is 0 or 1 the beta distribution has no quantile
        low = np.where(k == 0, 0.0, scipy.special.betaincinv(np.maximum(k, 1), of - k + 1, tail))
        high = np.where(k == of, 1.0, scipy.special.betaincinv(k + 1, np.maximum(of - k, 1), 1 - tail))
    return low, high


def upper_bound(hits: int, n: int, *, level: float = 0.95) -> float:
    """Return the exact one-sided upper bound of a share; 1 where ``n`` is 0.

    For 0 successes it is 1 - (1 - level)**(1 / n), about 3 / n at 95 % (rule of three, Hanley and Lippman-Hand 1983).

    Raises:
        InputError: As for `clopper_pearson`.
    """
    _, high = clopper_pearson(hits, n, level=2 * level - 1)
    return float(high)


def wilson(hits: ArrayLike, n: ArrayLike, *, z: float = 1.959963984540054) -> Bounds:
    """Return the score interval, which is narrower than the exact one and has its level on average (Wilson 1927).

    Args:
        hits: (...), number of successes.
        n: (...), number of trials; where it is 0, the interval is 0 to 1.
        z: Normal quantile of the level, for example 1.96 for 95 %.

    Returns:
        Low and high bounds, float64 (...) each.

    Raises:
        InputError: As for `clopper_pearson`.
    """
    k, of = _counts(hits, n)
    size = np.maximum(of, 1)
    share = k / size
    centre = share + z * z / (2 * size)
    half = z * np.sqrt(share * (1 - share) / size + (z / (2 * size)) ** 2)
    scale = 1 + z * z / size
    # at 0 and at n the bound is exact, and rounding must not move it beyond
    low = np.where(k == 0, 0.0, np.clip((centre - half) / scale, 0, 1))
    high = np.where(k == of, 1.0, np.clip((centre + half) / scale, 0, 1))
    return low, high


def _counts(hits: ArrayLike, n: ArrayLike) -> Bounds:
    k, of = np.broadcast_arrays(np.asarray(hits, np.float64), np.asarray(n, np.float64))
    if not ((k >= 0) & (k <= of)).all():
        bad = np.flatnonzero(~((k >= 0) & (k <= of)).ravel())[0]
        raise InputError(f"{k.ravel()[bad]:g} of {of.ravel()[bad]:g} is no proportion", "give counts from 0 to n")
    return k, of
