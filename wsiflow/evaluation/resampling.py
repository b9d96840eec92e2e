"""Resampling: cases drawn with replacement, and what statistics of the draws say.

Input: a number of cases and a seed. Output: how often each case is in each draw; from statistics of the draws,
percentile intervals and p-values.

A case is drawn whole, with all that was found in it: lesions and detections of one slide belong together, and so do
slides of one patient where patients are told. One set of draws serves every statistic and every setting, so that
differences between settings are those of the same cases.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import special

_LEAST_DIVISOR = 1e-9


def case_draws(n_cases: int, *, n: int, seed: int, clusters: Sequence[int] | None = None) -> NDArray[np.int64]:
    """Draw as many cases as there are, with replacement, again and again.

    Args:
        n_cases: Number of cases.
        n: Number of draws.
        seed: Seed of the draws; draws begin alike whatever their number.
        clusters: The cluster of each case, any numbers: cases of one cluster are drawn together, as many clusters as
            there are; None: each case by itself.

    Returns:
        int64 (n, n_cases), how often each case is in each draw.
    """
    group = _groups(n_cases, clusters)
    n_groups = int(group.max(initial=-1)) + 1
    rng = np.random.default_rng(seed)
    times = np.zeros((n, n_cases), np.int64)
    for row in times if n_groups else ():
        row[:] = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)[group]
    return times


def left_out(n_cases: int, *, clusters: Sequence[int] | None = None) -> NDArray[np.int64]:
    """Return the samples in which one case, or one cluster, is missing.

    Returns:
        int64 (cases or clusters, n_cases), 0 for what is left out and else 1.
    """
    group = _groups(n_cases, clusters)
    missing = np.arange(group.max(initial=-1) + 1)
    return np.asarray(group[None, :] != missing[:, None], np.int64)


def interval(drawn: NDArray[np.float64], level: float = 0.95) -> NDArray[np.float64]:
    """Return the percentile interval of statistics of draws.

    Args:
        drawn: (n,) or (n, k), a statistic, or k of them, per draw; draws in which one is NaN are left out.
        level: Share of the draws between the ends.

    Returns:
        float64 (2,) or (2, k), low and high ends; NaN where no draw is left.
    """
    kept = drawn[~np.isnan(drawn).any(axis=tuple(range(1, drawn.ndim)))]
    if not len(kept):
        return np.full((2, *drawn.shape[1:]), np.nan)
    ends: NDArray[np.float64] = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return ends


def corrected_interval(value: float, drawn: NDArray[np.float64], jackknife: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the 95 % interval of a skewed statistic: percentiles shifted for bias and skewness (BCa, Efron 1987).

    Args:
        value: The statistic of the sample.
        drawn: (n,), of the draws; NaN are left out.
        jackknife: (cases,), of the samples of `left_out`; NaN are left out.

    Returns:
        float64 (2,), low and high ends; NaN where no draw is left.
    """
    kept, others = drawn[~np.isnan(drawn)], jackknife[~np.isnan(jackknife)]
    if not kept.size or not others.size:
        return np.full(2, np.nan)
    below = ((kept < value).mean() + (kept <= value).mean()) / 2
    # Half a draw short of all or nothing: the normal quantile there is infinite.
    bias = special.ndtri(np.clip(below, 0.5 / kept.size, 1 - 0.5 / kept.size))
    spread = others.mean() - others
    squares = float((spread**2).sum())
    skew = float((spread**3).sum()) / (6 * squares**1.5) if squares > 0 else 0.0
    shifted = bias + special.ndtri([0.025, 0.975])
    # Where one case makes all the skewness the divisor falls to 0, the end of the draws; below it the ends would cross.
    stretched = shifted / np.maximum(1 - skew * shifted, _LEAST_DIVISOR)
    ends: NDArray[np.float64] = np.quantile(kept, special.ndtr(bias + stretched))
    return ends


def two_sided_p(drawn: NDArray[np.float64]) -> float:
    """Return the two-sided p-value of "no difference" from drawn differences.

    Twice the smaller share of draws on either side of 0, a draw at 0 counting for both sides; the sample itself counts
    as one more draw on that side, so that p is never 0. It is at most 1, and NaN without draws. It agrees with the
    percentile interval: where 0 is outside the 95 % interval, p is below 0.05, to within a draw or two.

    Args:
        drawn: (n,), the difference in each draw; NaN are left out.
    """
    kept = drawn[~np.isnan(drawn)]
    if not kept.size:
        return float("nan")
    fewer = min(int((kept <= 0).sum()), int((kept >= 0).sum()))
    return min(1.0, 2 * (fewer + 1) / (kept.size + 1))


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979): the chance of any false alarm stays below the level.

    The smallest is multiplied by their number, the next by one less, and so on, and none is below one before it. NaN
    stay NaN and are not counted.
    """
    values = np.asarray(p, np.float64)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    corrected = np.full(len(values), np.nan)
    corrected[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(order), 0, -1)), 1.0)
    found: list[float] = corrected.tolist()
    return found


def _groups(n_cases: int, clusters: Sequence[int] | None) -> NDArray[np.int64]:
    """Return the number of each case's cluster, from 0 without gaps."""
    return np.arange(n_cases) if clusters is None else np.unique(clusters, return_inverse=True)[1]
