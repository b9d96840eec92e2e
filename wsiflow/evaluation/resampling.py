"""Bootstrap over cases: draw cases with replacement, and compute intervals and p-values from statistics of the draws.

Input: a number of cases and a seed. Output: how often each case is in each draw; from a statistic of each draw,
intervals and p-values.

A case is drawn with all of its lesions and detections, and slides of one patient are drawn together where patients are
known. One set of draws serves every statistic and every setting, so that differences between settings are differences
on the same cases.
"""

from collections.abc import Sequence

import numpy as np
import scipy
from numpy.typing import NDArray

_LEAST_DIVISOR = 1e-9


def case_draws(n_cases: int, *, n: int, seed: int, clusters: Sequence[int] | None = None) -> NDArray[np.int64]:
    """Draw bootstrap samples: each draws as many cases, or clusters of cases, as there are, with replacement.

    Args:
        n_cases: Number of cases.
        n: Number of draws.
        seed: Seed of the draws; with the same seed, the first draws are the same for every ``n``.
        clusters: Cluster of each case, arbitrary integers: cases of one cluster are drawn together. None draws each
            case independently.

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
    """Return the jackknife samples, in each of which one case, or one cluster of cases, is left out.

    Returns:
        int64 (cases or clusters, n_cases), 0 for the cases left out, else 1.
    """
    group = _groups(n_cases, clusters)
    missing = np.arange(group.max(initial=-1) + 1)
    return np.asarray(group[None, :] != missing[:, None], np.int64)


def interval(drawn: NDArray[np.float64], level: float = 0.95) -> NDArray[np.float64]:
    """Return the percentile interval of a bootstrapped statistic.

    Args:
        drawn: (n,) or (n, k), one statistic or k statistics per draw; a draw in which one is NaN is left out.
        level: Share of the draws between the ends.

    Returns:
        float64 (2,) or (2, k), low and high ends; NaN where every draw is left out.
    """
    kept = drawn[~np.isnan(drawn).any(axis=tuple(range(1, drawn.ndim)))]
    if not len(kept):
        return np.full((2, *drawn.shape[1:]), np.nan)
    ends: NDArray[np.float64] = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return ends


def corrected_interval(value: float, drawn: NDArray[np.float64], jackknife: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the bias-corrected and accelerated 95 % interval of a skewed statistic (BCa, Efron 1987).

    Args:
        value: The statistic of the sample.
        drawn: (n,), the statistic of each draw; NaN are left out.
        jackknife: (cases,), the statistic of each sample of `left_out`; NaN are left out.

    Returns:
        float64 (2,), low and high ends; NaN where every draw is left out.
    """
    kept, others = drawn[~np.isnan(drawn)], jackknife[~np.isnan(jackknife)]
    if not kept.size or not others.size:
        return np.full(2, np.nan)
    below = ((kept < value).mean() + (kept <= value).mean()) / 2
    # Clipped half a draw away from 0 and 1, where the normal quantile is infinite.
    bias = scipy.special.ndtri(np.clip(below, 0.5 / kept.size, 1 - 0.5 / kept.size))
    spread = others.mean() - others
    squares = float((spread**2).sum())
    skew = float((spread**3).sum()) / (6 * squares**1.5) if squares > 0 else 0.0
    shifted = bias + scipy.special.ndtri([0.025, 0.975])
    # Where a single case causes all skewness the divisor falls to 0 and the end is that of the draws; below 0 the ends
    # would cross.
    stretched = shifted / np.maximum(1 - skew * shifted, _LEAST_DIVISOR)
    ends: NDArray[np.float64] = np.quantile(kept, scipy.special.ndtr(bias + stretched))
    return ends


def one_sided_p(drawn: NDArray[np.float64], bound: float) -> float:
    """Return the p-value of the hypothesis that a difference is at most ``bound``, from bootstrapped differences.

    It is the share of draws at or below the bound; the sample itself counts as one more of them, so that p is never 0.
    It agrees with the percentile interval: where the bound is below the 95 % interval, p is below 0.025, to within a
    draw or two. NaN without draws.

    Args:
        drawn: (n,), the difference in each draw; NaN are left out.
        bound: The least difference that the hypothesis excludes.
    """
    kept = drawn[~np.isnan(drawn)]
    return (int((kept <= bound).sum()) + 1) / (kept.size + 1) if kept.size else float("nan")


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for multiple comparisons by Holm's method (1979), which bounds the family-wise error.

    The smallest p-value is multiplied by their number, the next one by that number less 1, and so on; a corrected value
    is never below the one before it. NaN stay NaN and are not counted.
    """
    values = np.asarray(p, np.float64)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    corrected = np.full(len(values), np.nan)
    corrected[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(order), 0, -1)), 1.0)
    result: list[float] = corrected.tolist()
    return result


def _groups(n_cases: int, clusters: Sequence[int] | None) -> NDArray[np.int64]:
    """Return int64 (n_cases,), the cluster of each case, numbered from 0 without gaps."""
    return np.arange(n_cases) if clusters is None else np.unique(clusters, return_inverse=True)[1]
