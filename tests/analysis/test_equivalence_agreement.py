"""Agreement of two maps against NumPy on whole arrays for any bands; detections paired by distance."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from wsiflow.analysis.equivalence import agreement
from wsiflow.analysis.equivalence.agreement import (
    empty_tally,
    merge_tallies,
    pair_detections,
    quantile,
    tally,
    tally_numbers,
)
from wsiflow.errors import InputError

F32 = NDArray[np.float32]
scores = st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 0.5, 1.0, math.nan]))
pairs = st.integers(1, 80).flatmap(
    lambda n: st.tuples(*(hnp.arrays(np.float32, n, elements=scores) for _ in range(2)), st.integers(0, n))
)


def plain(a: F32, b: F32, threshold: float) -> dict[str, float]:
    """Return the same numbers computed by NumPy from whole arrays."""
    both = np.isfinite(a) & np.isfinite(b)
    x, y = a[both].astype(np.float64), b[both].astype(np.float64)
    d = y - x
    return {
        "cells": len(x),
        "only_a": (np.isfinite(a) & np.isnan(b)).sum(),
        "only_b": (np.isfinite(b) & np.isnan(a)).sum(),
        "max": np.abs(d).max() if len(d) else math.nan,
        "mean": np.abs(d).mean() if len(d) else math.nan,
        "bias": d.mean() if len(d) else math.nan,
        "flips_up": ((x < threshold) & (y >= threshold)).sum(),
        "flips_down": ((x >= threshold) & (y < threshold)).sum(),
    }


@given(pairs)
def test_numbers_are_those_of_the_whole_however_it_is_cut(drawn: tuple[F32, F32, int]) -> None:
    """Merged tallies of two bands equal NumPy on both together."""
    a, b, cut = drawn
    found = merge_tallies(tally(a[:cut], b[:cut], threshold=0.5), tally(a[cut:], b[cut:], threshold=0.5))
    expected = plain(a, b, 0.5)
    assert {name: tally_numbers(found)[name] for name in expected} == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert found.counts.sum() == found.strips[0].sum() == found.n


@given(pairs, st.floats(0.01, 1))
def test_quantiles_are_never_below_and_hardly_above(drawn: tuple[F32, F32, int], share: float) -> None:
    """A quantile is at least the true one and at most 0.1 % larger."""
    a, b, _ = drawn
    found = tally(a, b, threshold=0.5)
    if found.n:
        d = np.abs(b.astype(np.float64) - a)[np.isfinite(a) & np.isfinite(b)]
        true = np.sort(d)[math.ceil(share * len(d)) - 1]
        assert true * (1 - 1e-7) - 2e-41 <= quantile(found, share) <= true * 1.001 + 1e-41


def test_correlation_of_many_bands() -> None:
    """The correlation over bands equals NumPy's where raw squares would cancel."""
    rng = np.random.default_rng(0)
    a = (0.9 + 1e-4 * rng.random((40, 50))).astype(np.float32)
    b = (a + 1e-5 * rng.random((40, 50))).astype(np.float32)
    found = empty_tally()
    for x, y in zip(a, b, strict=True):
        found = merge_tallies(found, tally(x, y, threshold=0.5))
    expected = np.corrcoef(a.ravel().astype(np.float64), b.ravel().astype(np.float64))[0, 1]
    assert tally_numbers(found)["correlation"] == pytest.approx(expected, rel=1e-9)


def test_histogram_counts_between_powers_of_two() -> None:
    """An edge belongs to the bin above it, 1 to the last bin, and the sign selects the row."""
    a = np.array([0.5, 0.5, 0.5, 0.5, 1.0, 0.2], np.float32)
    b = np.array([0.5, 0.75, 0.25, 0.625, 0.0, np.nan], np.float32)
    edges, counts = agreement.histogram(tally(a, b, threshold=0.5))
    below = {(edges[i], edges[i + 1]): n for i, n in enumerate(counts[0].tolist()) if n}
    above = {(edges[i], edges[i + 1]): n for i, n in enumerate(counts[1].tolist()) if n}
    assert below == {(0.25, 0.5): 1, (0.5, 1.0): 1}
    assert above == {(0.0, 2.0**-24): 1, (0.125, 0.25): 1, (0.25, 0.5): 1}


def test_equal_maps_differ_nowhere() -> None:
    """All differences are 0, and the rule of three bounds the share of flips."""
    a = np.linspace(0, 1, 1000, dtype=np.float32)
    found = tally_numbers(tally(a, a, threshold=0.5))
    assert [found[name] for name in ("max", "mean", "p50", "p99.9", "bias", "flips")] == [0] * 6
    assert found["flip_share_upper"] == pytest.approx(3 / 1000, rel=0.01)
    assert found["correlation"] == pytest.approx(1)


def test_no_common_cell_is_no_number() -> None:
    """Maps without a common cell have counts, and NaN for every other number."""
    a, b = np.array([0.3, np.nan], np.float32), np.array([np.nan, 0.3], np.float32)
    found = tally_numbers(tally(a, b, threshold=0.5))
    assert (found["cells"], found["only_a"], found["only_b"]) == (0, 1, 1)
    assert math.isnan(found["max"])
    assert found["flip_share_upper"] == 1


def test_strips_hold_the_differences() -> None:
    """A strip has mean, deviation and extremes of the differences at its mean score."""
    a, b = np.array([0.40, 0.45], np.float32), np.array([0.50, 0.43], np.float32)
    centres, bounds = agreement.strip_bounds(tally(a, b, threshold=0.5))
    assert centres == pytest.approx([0.4375, 0.4625]) or len(centres) == 2
    assert bounds[3].min() == pytest.approx(-0.02, abs=1e-6)
    assert bounds[4].max() == pytest.approx(0.10, abs=1e-6)


def test_what_is_no_pair_of_maps_is_refused() -> None:
    with pytest.raises(InputError, match="one grid"):
        tally(np.zeros(3, np.float32), np.zeros(4, np.float32), threshold=0.5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("odd", [2.0, -0.5, np.inf, -np.inf])
@pytest.mark.parametrize("other", [0.5, None])
def test_scores_that_are_no_probabilities_are_refused(odd: float, other: float | None) -> None:
    """Scores above 1 are refused even where both maps are equal."""
    a = np.array([0.5, odd], np.float32)
    with pytest.raises(InputError, match=f"a score is {odd:g}"):
        tally(a, a if other is None else np.full(2, other, np.float32), threshold=0.5)


points = hnp.arrays(np.float64, st.tuples(st.integers(0, 6), st.just(2)), elements=st.integers(0, 6).map(float))


@given(points, points, st.sampled_from([0.0, 1.0, 2.5]))
def test_as_many_pairs_as_possible(a: NDArray[np.float64], b: NDArray[np.float64], reach: float) -> None:
    """No other pairing leaves fewer detections unpaired; all are tried."""
    found = pair_detections(a, b, reach=reach)
    near = np.hypot(*(a[:, None] - b[None]).transpose(2, 0, 1)) <= reach
    n = min(len(a), len(b))
    small, large = (near, len(b)) if len(a) <= len(b) else (near.T, len(a))
    best = max(sum(small[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(large), n))
    assert (len(found.lost), len(found.gained)) == (len(a), len(b))
    assert (~found.lost).sum() == (~found.gained).sum() == best


def test_pairs_are_not_shared() -> None:
    """Of two detections near one partner one is lost, and the partner that is too far is gained."""
    found = pair_detections(np.array([[0.0, 0], [1, 0]]), np.array([[0.5, 0], [90, 0]]), reach=5)
    assert found.lost.sum() == 1
    assert found.gained.tolist() == [False, True]
