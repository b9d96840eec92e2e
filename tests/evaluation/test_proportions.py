"""Intervals of a proportion, against published values and against simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsiflow.errors import InputError
from wsiflow.evaluation import proportions

# Newcombe (Statistics in Medicine 1998; 17: 857), table I: 81/263, 15/148, 0/20, 1/29.
NEWCOMBE = [
    (81, 263, (0.2553, 0.3662), (0.2527, 0.3676)),
    (15, 148, (0.0624, 0.1605), (0.0578, 0.1617)),
    (0, 20, (0.0000, 0.1611), (0.0000, 0.1684)),
    (1, 29, (0.0061, 0.1718), (0.0009, 0.1776)),
]


@pytest.mark.parametrize(("hits", "n", "wilson", "exact"), NEWCOMBE)
def test_published_intervals(hits: int, n: int, wilson: tuple[float, float], exact: tuple[float, float]) -> None:
    """The intervals equal the four examples of Newcombe's comparison to the printed digits."""
    assert np.round(proportions.wilson(hits, n), 4) == pytest.approx(wilson)
    assert np.round(proportions.clopper_pearson(hits, n), 4) == pytest.approx(exact)


def test_the_rule_of_three() -> None:
    """Zero of n bounds the rate by 1 - 0.05**(1/n), about 3/n."""
    assert proportions.upper_bound(0, 100) == pytest.approx(1 - 0.05**0.01)
    assert proportions.upper_bound(0, 10**8) == pytest.approx(2.9957e-8, rel=1e-4)
    assert proportions.upper_bound(0, 0) == 1
    assert proportions.upper_bound(5, 5) == 1


def test_no_draws_say_nothing() -> None:
    """The interval of 0 of 0 is 0 to 1."""
    for interval in (proportions.wilson(0, 0), proportions.clopper_pearson(0, 0)):
        assert [float(end) for end in interval] == [0, 1]


@given(st.integers(0, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_hold_the_share_and_mirror(counts: tuple[int, int]) -> None:
    """The share lies inside, and the interval of the complement is mirrored."""
    hits, n = counts
    for method in (proportions.wilson, proportions.clopper_pearson):
        (low, high), (other_low, other_high) = method(hits, n), method(n - hits, n)
        assert 0 <= low <= high <= 1
        assert not n or low <= hits / n <= high
        assert (low, high) == pytest.approx((1 - other_high, 1 - other_low), abs=1e-9)


def test_exact_interval_covers_whatever_the_share() -> None:
    """By the binomial distribution the coverage of Clopper and Pearson is at least 95 % everywhere."""
    from scipy import stats

    n = 30
    low, high = proportions.clopper_pearson(np.arange(n + 1), n)
    for share in np.linspace(0.01, 0.99, 99):
        chance = stats.binom.pmf(np.arange(n + 1), n, share)
        assert chance[(low <= share) & (share <= high)].sum() >= 0.95


@pytest.mark.parametrize(("hits", "n"), [(-1, 5), (6, 5)])
def test_impossible_counts_are_refused(hits: int, n: int) -> None:
    with pytest.raises(InputError, match="give counts from 0 to n"):
        proportions.wilson(hits, n)
