"""Certificates: deviations, flips, limits, and a random sample that never changes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsiflow.model import certificate
from wsiflow.model.certificate import Limits, Weighing


def test_differences_by_hand() -> None:
    """Four scores have known differences, and one of them is on the other side of one half."""
    found = certificate.score_deviation(
        np.array([0.1, 0.6, 0.9, 0.3], np.float32), np.array([0.1, 0.4, 0.8, 0.4], np.float32)
    )
    assert found.n == 4
    assert found.mean_abs_diff == pytest.approx(0.1)
    assert found.max_abs_diff == pytest.approx(0.2)
    assert found.p95_abs_diff == pytest.approx(0.185)
    assert found.flips == 0.25
    assert found.correlation == pytest.approx(np.corrcoef([0.1, 0.6, 0.9, 0.3], [0.1, 0.4, 0.8, 0.4])[0, 1])


def test_decisions_are_made_at_one_half() -> None:
    """A score above one half counts as tumour, as for detections; no flip lies on one side of it."""
    expected = np.array([0.5, 0.51, 0.55, 0.1], np.float32)
    assert certificate.score_deviation(np.array([0.51, 0.5, 0.65, 0.45], np.float32), expected).flips == 0.5


def test_what_is_not_defined_is_nan_and_breaks_nothing() -> None:
    """Without scores, or for constant scores, there is no correlation."""
    none = certificate.score_deviation(np.empty(0, np.float32), np.empty(0, np.float32))
    assert none.n == 0
    assert math.isnan(none.mean_abs_diff)
    same = np.full(3, 0.25, np.float32)
    assert math.isnan(certificate.score_deviation(same, same).correlation)
    assert certificate.exceeded_limits(none, Limits(0.0, 0.0, 0.0)) == []


def weighing(weight: list[float], part: list[int], unit: list[int]) -> Weighing:
    return Weighing(np.array(weight), np.array(part), np.array(unit))


def test_weighted_means_and_bounds_by_hand() -> None:
    """One part is known entirely; of the other, three units of one window each stand for ten windows each."""
    drawn = weighing([1.0, 10.0, 10.0, 10.0], [0, 1, 1, 1], [0, 0, 1, 2])
    scores, expected = np.array([0.9, 0.1, 0.1, 0.1], np.float32), np.array([0.1, 0.2, 0.1, 0.1], np.float32)
    found = certificate.score_deviation(scores, expected, threshold=0.5, weighing=drawn)
    assert found.mean_abs_diff == pytest.approx((0.8 + 10 * 0.1) / 31)
    # Of three units and one more with the largest value: the 95 % quantile of (0.1 a + 0.8 b) / (a + b + c + d), where
    # a to d are exponential, of twenty million draws.
    assert found.mean_abs_diff_at_most == pytest.approx(0.8 / 31 + 30 / 31 * 0.51806, rel=0.03)
    assert found.flips == pytest.approx(1 / 31)
    assert found.flips_at_most == pytest.approx(1 / 31 + 30 / 31 * (1 - 0.05 ** (1 / 3)), rel=0.03)
    assert found.beyond_max_at_most == pytest.approx(30 / 31 * (1 - 0.05 ** (1 / 3)), rel=0.03)


def test_windows_of_a_block_count_as_one_where_none_has_a_property() -> None:
    """The bound is that of eight blocks, however many windows were drawn from each; all windows known have none."""
    none, all_windows = np.zeros((1, 80)), np.ones((1, 80))
    unit = list(np.repeat(range(8), 10))

    def bound(values: np.ndarray, weight: float) -> float:
        return float(certificate.upper_bounds(values, np.ones(1), weighing([weight] * 80, [0] * 80, unit))[0])

    assert bound(none, 5.0) == pytest.approx(1 - 0.05 ** (1 / 8), rel=0.03)
    assert bound(none, 1.0) == 0
    assert bound(all_windows, 5.0) == 1


def test_many_units_bound_a_mean_as_a_normal_distribution_does() -> None:
    """Of 2,000 windows that were drawn one by one the bound is that of 1.645 standard errors."""
    values = np.random.default_rng(0).random((1, 2000))
    drawn = weighing([9.0] * 2000, [0] * 2000, list(range(2000)))
    expected = values.mean() + 1.645 * values.std() / 2000**0.5
    assert certificate.upper_bounds(values, np.ones(1), drawn)[0] == pytest.approx(expected, rel=2e-3)


def test_a_bound_holds_as_often_as_it_says() -> None:
    """Of a hundred samples of blocks with some windows beyond, the bound of the share is below the truth in few."""
    rng, held = np.random.default_rng(1), 0
    blocks = rng.random((60, 50)) < rng.choice([0, 0.1], (60, 1))
    for _ in range(100):
        drawn = rng.choice(60, 8, replace=False)
        flags = blocks[drawn][:, rng.permutation(50)[:12]].ravel()
        how = weighing([60 / 8 * 50 / 12] * 96, [0] * 96, list(np.repeat(drawn, 12)))
        held += certificate.upper_bounds(flags[None].astype(np.float64), np.ones(1), how)[0] >= blocks.mean()
    assert held >= 93


def test_exceeded_limits_are_named_with_both_numbers() -> None:
    """The message for each limit has its name, the value and the limit."""
    found = certificate.score_deviation(np.array([0.1, 0.6], np.float32), np.array([0.1, 0.4], np.float32))
    assert certificate.exceeded_limits(found, Limits()) == []
    assert certificate.exceeded_limits(found, Limits(mean_abs_diff=0.05, flips=0.6)) == [
        "mean abs diff is 0.1, allowed 0.05"
    ]
    assert len(certificate.exceeded_limits(found, Limits(0.05, 0.05, 0.05))) == 3


def test_bf16_may_cost_what_the_documentation_says() -> None:
    """The documented limits against fp32 are: bf16 mean 0.002, maximum 0.02; int8 mean 0.02, flips 2 %."""
    assert certificate.PRECISION_LIMITS["bf16"] == Limits(mean_abs_diff=0.002, max_abs_diff=0.02)
    assert certificate.PRECISION_LIMITS["int8"] == Limits(mean_abs_diff=0.02, flips=0.02)


@given(among=st.integers(0, 300), count=st.integers(0, 300))
def test_a_draw_has_no_index_twice(among: int, count: int) -> None:
    """The sample has the requested size or all indices, each once and in ascending order."""
    drawn = certificate.draw_indices("abcdef0123456789", among=among, count=count)
    assert len(drawn) == min(among, count)
    assert (np.diff(drawn) > 0).all()
    assert ((drawn >= 0) & (drawn < among)).all()


def test_a_draw_is_the_same_everywhere() -> None:
    """The windows of a certificate are determined by the slide's key."""
    assert certificate.draw_indices("0123456789abcdef", among=1000, count=4).tolist() == [90, 279, 512, 622]
    assert certificate.draw_indices("1123456789abcdef", among=1000, count=4).tolist() != [90, 279, 512, 622]
