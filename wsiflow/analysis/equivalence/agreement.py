"""How far two heatmaps of the same slides lie apart, and what that changes: decisions and lesions.

Input: the scores of the same cells in two settings, A and B, band by band; detections of both. Output: a tally that
adds up over bands and slides, and its numbers by name.

Conventions: NaN is "no score here"; a cell is compared where both have one. A difference is B minus A. A cell is
positive when its score is at least the threshold; a flip *up* is negative in A and positive in B. A lesion is *lost*
that A has and B has not, *gained* the other way round.

Quantiles come from counts of |difference| by the leading 10 bits of its float32 mantissa: what is returned is at least
the true quantile and at most 0.1 % more, for any number of cells in 2 MB. All other numbers are exact.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial import KDTree

from wsiflow.errors import InputError
from wsiflow.evaluation import proportions

QUANTILES = (0.5, 0.95, 0.99, 0.999)

_SHIFT = 13  # of 23 bits of a float32's mantissa 10 stay
_N_BINS = (int(np.float32(1).view(np.uint32)) >> _SHIFT) + 1
_STRIPS = 40


class Moments(NamedTuple):
    """Counts, means and sums of products about them, of the scores of A and of B.

    Attributes:
        n: How many cells.
        a, b: Means.
        aa, bb, ab: Sums of squares and of products about the means.
    """

    n: int
    a: float
    b: float
    aa: float
    bb: float
    ab: float


@dataclass(frozen=True, eq=False)
class Tally:
    """What two maps have in common and what not.

    Attributes:
        moments: Of the cells that both score.
        only_a, only_b: Cells that one of them scores: its tissue mask is larger there.
        up, down: Flips of the decision.
        total, total_abs: Sums of the differences and of their absolute values.
        largest: The largest |difference|; 0 where nothing is compared.
        counts: int64 (2, bins), |difference| by its leading bits: where B is below A, and where it is not.
        strips: float64 (5, 40), by the mean of both scores from 0 to 1: cells, sum, sum of squares, lowest and highest
            difference.
    """

    moments: Moments
    only_a: int
    only_b: int
    up: int
    down: int
    total: float
    total_abs: float
    largest: float
    counts: NDArray[np.int64]
    strips: NDArray[np.float64]

    @property
    def n(self) -> int:
        """Cells that both score."""
        return self.moments.n


class Pairing(NamedTuple):
    """Which detections have no counterpart: bool (n,) for each of A's, bool (m,) for each of B's."""

    lost: NDArray[np.bool_]
    gained: NDArray[np.bool_]


def tally(a: NDArray[np.float32], b: NDArray[np.float32], *, threshold: float) -> Tally:
    """Compare two maps, or bands of them.

    Args:
        a: float32, any shape, 0 to 1, NaN where there is no score.
        b: float32 of the same shape, of the same cells.
        threshold: A cell is positive from this score on.

    Raises:
        InputError: The shapes differ, or a score is no probability.
    """
    if a.shape != b.shape:
        raise InputError(f"maps of {a.shape} and {b.shape} cells", "compare maps of one grid")
    has_a, has_b = ~np.isnan(a), ~np.isnan(b)
    both = has_a & has_b
    left, right = a[both].astype(np.float64), b[both].astype(np.float64)
    for scores in (left, right):
        low, high = scores.min(initial=0.0), scores.max(initial=1.0)
        if low < 0 or high > 1:
            cause = f"a score is {low if low < 0 else high:g}"
            raise InputError(cause, "compare maps of probabilities, 0 to 1")
    apart = right - left
    size = np.abs(apart)
    largest = float(size.max(initial=0.0))
    place = size.astype(np.float32).view(np.uint32) >> _SHIFT
    return Tally(
        moments=_moments(left, right),
        only_a=int((has_a & ~has_b).sum()),
        only_b=int((has_b & ~has_a).sum()),
        up=int(((left < threshold) & (right >= threshold)).sum()),
        down=int(((left >= threshold) & (right < threshold)).sum()),
        total=float(apart.sum()),
        total_abs=float(size.sum()),
        largest=largest,
        counts=np.stack([np.bincount(place[sign], minlength=_N_BINS) for sign in (apart < 0, apart >= 0)]),
        strips=_strips((left + right) / 2, apart),
    )


def nothing() -> Tally:
    """Return the tally of no cells, to add others to."""
    return tally(np.empty(0, np.float32), np.empty(0, np.float32), threshold=0.5)


def added(x: Tally, y: Tally) -> Tally:
    """Return the tally of both."""
    sums = x.strips[:3] + y.strips[:3]
    low, high = np.minimum(x.strips[3], y.strips[3]), np.maximum(x.strips[4], y.strips[4])
    return Tally(
        moments=_pooled(x.moments, y.moments),
        only_a=x.only_a + y.only_a,
        only_b=x.only_b + y.only_b,
        up=x.up + y.up,
        down=x.down + y.down,
        total=x.total + y.total,
        total_abs=x.total_abs + y.total_abs,
        largest=max(x.largest, y.largest),
        counts=x.counts + y.counts,
        strips=np.vstack([sums, low, high]),
    )


def quantile(found: Tally, share: float) -> float:
    """Return the |difference| that at least this share of the cells does not exceed; NaN where nothing is compared."""
    if not found.n:
        return math.nan
    reached = np.cumsum(found.counts.sum(axis=0))
    place = int(np.searchsorted(reached, math.ceil(share * found.n)))
    if place == 0:
        return 0.0  # or below 1.2e-41
    edge = np.uint32(((place + 1) << _SHIFT) - 1).view(np.float32)
    return min(float(edge), found.largest)


def numbers(found: Tally) -> dict[str, float]:
    """Return the numbers of a tally by name; NaN where nothing is compared."""
    n, flips = found.n, found.up + found.down
    moments = found.moments
    spread = math.sqrt(moments.aa * moments.bb)
    return {
        "cells": n,
        "only_a": found.only_a,
        "only_b": found.only_b,
        "max": found.largest if n else math.nan,
        "mean": found.total_abs / n if n else math.nan,
        **{f"p{100 * share:g}": quantile(found, share) for share in QUANTILES},
        "bias": found.total / n if n else math.nan,
        "correlation": moments.ab / spread if spread > 0 else math.nan,
        "flips": flips,
        "flips_up": found.up,
        "flips_down": found.down,
        "flip_share": flips / n if n else math.nan,
        "flip_share_upper": proportions.upper_bound(flips, n),
    }


def histogram(found: Tally) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return counts of |difference| between powers of two.

    Returns:
        float64 (k + 1,), the edges, 0 and 2**-24 to 1, and int64 (2, k), how many cells lie from one edge up to the
        next (the last edge included) where B is below A, and where it is not.
    """
    edges = np.concatenate([[0.0], 2.0 ** np.arange(-24, 1)])
    first = edges[:-1].astype(np.float32).view(np.uint32) >> _SHIFT
    return edges, np.add.reduceat(found.counts, first, axis=1)


def strip_bounds(found: Tally) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what a plot of Bland and Altman (1986) shows, by strips of the mean score.

    Returns:
        float64 (k,), the centres of the strips that hold cells, and float64 (5, k): mean difference, mean -+ 1.96
        standard deviations, lowest and highest difference.
    """
    n, total, squares, low, high = found.strips[:, found.strips[0] > 0]
    mean = total / n
    half = 1.96 * np.sqrt(np.maximum(squares / n - mean**2, 0))
    centres = (np.arange(_STRIPS) + 0.5) / _STRIPS
    return centres[found.strips[0] > 0], np.stack([mean, mean - half, mean + half, low, high])


def pair(a: NDArray[np.float64], b: NDArray[np.float64], *, reach: float) -> Pairing:
    """Pair detections that lie near each other, each at most once, as many as possible (Hopcroft and Karp 1973).

    Args:
        a: float64 (n, 2), x and y of A's detections.
        b: float64 (m, 2), x and y of B's, in the same unit.
        reach: Largest distance of a pair, in that unit.
    """
    if not (len(a) and len(b)):
        return Pairing(np.ones(len(a), np.bool_), np.ones(len(b), np.bool_))
    near = KDTree(a).query_ball_tree(KDTree(b), reach)
    ends = np.cumsum([0, *(len(each) for each in near)])
    places = np.array([place for each in near for place in sorted(each)], np.int32)
    graph = csr_array((np.ones(len(places), np.int8), places, ends), shape=(len(a), len(b)))
    partner = maximum_bipartite_matching(graph, perm_type="column")  # of each of A's, or -1
    gained = np.ones(len(b), np.bool_)
    gained[partner[partner >= 0]] = False
    return Pairing(partner < 0, gained)


def _moments(left: NDArray[np.float64], right: NDArray[np.float64]) -> Moments:
    if not left.size:
        return Moments(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    a, b = float(left.mean()), float(right.mean())
    da, db = left - a, right - b
    return Moments(left.size, a, b, float(da @ da), float(db @ db), float(da @ db))


def _pooled(x: Moments, y: Moments) -> Moments:
    """Return the moments of both, without the cancellation that sums of raw squares suffer (Chan et al. 1979)."""
    n = x.n + y.n
    if not n:
        return x
    da, db, weight = y.a - x.a, y.b - x.b, x.n * y.n / n
    means = (x.a + da * y.n / n, x.b + db * y.n / n)
    return Moments(
        n, *means, x.aa + y.aa + da * da * weight, x.bb + y.bb + db * db * weight, x.ab + y.ab + da * db * weight
    )


def _strips(mean: NDArray[np.float64], apart: NDArray[np.float64]) -> NDArray[np.float64]:
    place = np.clip((mean * _STRIPS).astype(np.int64), 0, _STRIPS - 1)
    sums = [np.bincount(place, weights, _STRIPS) for weights in (None, apart, apart * apart)]
    low, high = np.full(_STRIPS, np.inf), np.full(_STRIPS, -np.inf)
    np.minimum.at(low, place, apart)
    np.maximum.at(high, place, apart)
    return np.stack([*sums, low, high]).astype(np.float64)
