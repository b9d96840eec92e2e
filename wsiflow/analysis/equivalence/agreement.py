"""Measure how far two heatmaps of the same slides agree, and count the decisions and lesions that change.

Input: the scores of the same cells in two settings, A and B, band by band; the detections of both. Output: a `Tally`,
which adds up over bands and slides, and its numbers by name.

Conventions: NaN means "no score here", and a cell is compared where both settings have a score. A difference is B minus
A. A cell is positive when its score is at least the threshold; a flip *up* is a cell that is negative in A and positive
in B. A *lost* lesion is detected in A and not in B, a *gained* one in B and not in A.

Quantiles come from counts of |difference| by the leading 10 bits of its float32 mantissa: a returned quantile is at
least the true one and at most 0.1 % larger, and the counts take 2 MB for any number of cells. All other numbers are
exact.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray

from wsiflow.errors import InputError
from wsiflow.evaluation import proportions

QUANTILES = (0.5, 0.95, 0.99, 0.999)

_SHIFT = 13  # keeps 10 of the 23 bits of a float32's mantissa
_N_BINS = (int(np.float32(1).view(np.uint32)) >> _SHIFT) + 1
_STRIPS = 40


class Moments(NamedTuple):
    """First and second moments of the scores of A and of B.

    Attributes:
        n: Number of cells.
        a, b: Mean score of A and of B.
        aa, bb, ab: Sums of squares and of products of the deviations from the means.
    """

    n: int
    a: float
    b: float
    aa: float
    bb: float
    ab: float


@dataclass(frozen=True, eq=False)
class Tally:
    """Sums and counts over the cells of two maps, which add up over bands and slides.

    Attributes:
        moments: Moments of the cells that both maps score.
        only_a, only_b: Number of cells that only A, or only B, scores: its tissue mask is larger there.
        up, down: Number of cells whose decision flips.
        total, total_abs: Sums of the differences and of their absolute values.
        largest: The largest |difference|; 0 where no cell is compared.
        counts: int64 (2, bins), numbers of cells by the leading bits of |difference|: row 0 where B is below A, row 1
            elsewhere.
        strips: float64 (5, 40), by the mean of both scores in 40 strips from 0 to 1: number of cells; sum, sum of
            squares, lowest and highest of the differences.
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
        """Number of cells that both maps score."""
        return self.moments.n


class Pairing(NamedTuple):
    """Detections without a partner: ``lost`` is bool (n,) over A's detections, ``gained`` bool (m,) over B's."""

    lost: NDArray[np.bool_]
    gained: NDArray[np.bool_]


def tally(a: NDArray[np.float32], b: NDArray[np.float32], *, threshold: float) -> Tally:
    """Tally the cells of two maps, or of the same band of both.

    Args:
        a: float32, any shape: probabilities of setting A; NaN where there is no score.
        b: float32 of the same shape: probabilities of setting B for the same cells.
        threshold: A cell is positive from this score on.

    Raises:
        InputError: The shapes differ, or a score lies outside 0 to 1.
    """
    if a.shape != b.shape:
        raise InputError(f"the maps have {a.shape} and {b.shape} cells", "compare maps of one grid")
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


def empty_tally() -> Tally:
    """Return the tally of no cells, the neutral element of `merge_tallies`."""
    return tally(np.empty(0, np.float32), np.empty(0, np.float32), threshold=0.5)


def merge_tallies(x: Tally, y: Tally) -> Tally:
    """Return the tally over the cells of ``x`` and of ``y`` together."""
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


def quantile(pooled: Tally, share: float) -> float:
    """Return the |difference| that at least this share of the cells does not exceed; NaN where no cell is compared."""
    if not pooled.n:
        return math.nan
    reached = np.cumsum(pooled.counts.sum(axis=0))
    place = int(np.searchsorted(reached, math.ceil(share * pooled.n)))
    if place == 0:
        return 0.0  # a difference of 0, or below 1.2e-41
    edge = np.uint32(((place + 1) << _SHIFT) - 1).view(np.float32)
    return min(float(edge), pooled.largest)


def tally_numbers(pooled: Tally) -> dict[str, float]:
    """Return the agreement of two maps by name of the measure; NaN where no cell is compared.

    ``max``, ``mean`` and the quantiles are of |difference|, ``bias`` is the mean difference, ``correlation`` Pearson's,
    and ``flip_share_upper`` the one-sided 95 % bound of Clopper and Pearson.
    """
    n, flips = pooled.n, pooled.up + pooled.down
    moments = pooled.moments
    spread = math.sqrt(moments.aa * moments.bb)
    return {
        "cells": n,
        "only_a": pooled.only_a,
        "only_b": pooled.only_b,
        "max": pooled.largest if n else math.nan,
        "mean": pooled.total_abs / n if n else math.nan,
        **{f"p{100 * share:g}": quantile(pooled, share) for share in QUANTILES},
        "bias": pooled.total / n if n else math.nan,
        "correlation": moments.ab / spread if spread > 0 else math.nan,
        "flips": flips,
        "flips_up": pooled.up,
        "flips_down": pooled.down,
        "flip_share": flips / n if n else math.nan,
        "flip_share_upper": proportions.upper_bound(flips, n),
    }


def histogram(pooled: Tally) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return a histogram of |difference| with powers of two as edges.

    Returns:
        The edges, float64 (k + 1,): 0 and 2**-24 to 1. The counts, int64 (2, k): number of cells from one edge up to
        the next, the last edge included; row 0 where B is below A, row 1 elsewhere.
    """
    edges = np.concatenate([[0.0], 2.0 ** np.arange(-24, 1)])
    first = edges[:-1].astype(np.float32).view(np.uint32) >> _SHIFT
    return edges, np.add.reduceat(pooled.counts, first, axis=1)


def strip_bounds(pooled: Tally) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the limits of agreement (Bland and Altman 1986) by strips of the mean score.

    Returns:
        The centres of the strips that hold cells, float64 (k,); and float64 (5, k): mean difference, mean -+ 1.96
        standard deviations, lowest and highest difference.
    """
    n, total, squares, low, high = pooled.strips[:, pooled.strips[0] > 0]
    mean = total / n
    half = 1.96 * np.sqrt(np.maximum(squares / n - mean**2, 0))
    centres = (np.arange(_STRIPS) + 0.5) / _STRIPS
    return centres[pooled.strips[0] > 0], np.stack([mean, mean - half, mean + half, low, high])


def pair_detections(a: NDArray[np.float64], b: NDArray[np.float64], *, reach: float) -> Pairing:
    """Pair detections of A and B that lie near each other: a maximum bipartite matching (Hopcroft and Karp 1973).

    Args:
        a: float64 (n, 2), x and y of A's detections.
        b: float64 (m, 2), x and y of B's detections, in the same unit.
        reach: Largest distance between the two detections of a pair, in that unit.
    """
    if not (len(a) and len(b)):
        return Pairing(np.ones(len(a), np.bool_), np.ones(len(b), np.bool_))
    near = scipy.spatial.KDTree(a).query_ball_tree(scipy.spatial.KDTree(b), reach)
    ends = np.cumsum([0, *(len(each) for each in near)])
    places = np.array([place for each in near for place in sorted(each)], np.int32)
    graph = scipy.sparse.csr_array((np.ones(len(places), np.int8), places, ends), shape=(len(a), len(b)))
    partner = scipy.sparse.csgraph.maximum_bipartite_matching(graph, perm_type="column")  # index for each of A's, or -1
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
    """Return the moments of both samples together, by the update of Chan et al. (1979), which avoids cancellation."""
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
