"""Calibration against a table worked by hand, the Brier decomposition, and scikit-learn's regression."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from wsiflow.errors import InputError
from wsiflow.evaluation import calibration

# Forecasts of 0.1, 0.3 and 0.8 for ten days; it rained on 1 of 4, on 1 of 2 and on 3 of 4.
P = np.repeat([0.1, 0.3, 0.8], [4, 2, 4])
Y = np.array([1, 0, 0, 0, 1, 0, 1, 1, 1, 0])


def test_a_table_worked_by_hand() -> None:
    """Ten forecasts in five bins."""
    rows = calibration.table(calibration.bins(P, Y, k=5))
    assert [row.n for row in rows] == [4, 2, 0, 0, 4]
    assert [row.positives for row in rows] == [1, 1, 0, 0, 3]
    assert [row.observed for row in rows if row.n] == [0.25, 0.5, 0.75]
    assert math.isnan(rows[2].observed)
    assert (rows[4].low, rows[4].high) == pytest.approx((0.8, 1.0))
    assert (rows[0].wilson_low, rows[0].wilson_high) == pytest.approx((0.0456, 0.6994), abs=1e-4)
    assert (rows[0].exact_low, rows[0].exact_high) == pytest.approx((0.0063, 0.8059), abs=1e-4)


def test_scores_worked_by_hand() -> None:
    """The Brier score is (3 * 0.01 + 0.81 + 0.49 + 0.09 + 3 * 0.04 + 0.64) / 10; its components follow."""
    found = calibration.scores(calibration.bins(P, Y, k=5))
    assert found["brier"] == pytest.approx(0.218)
    assert found["reliability"] == pytest.approx((4 * 0.0225 + 2 * 0.04 + 4 * 0.0025) / 10)
    assert found["resolution"] == pytest.approx((4 * 0.0625 + 4 * 0.0625) / 10)
    assert found["uncertainty"] == pytest.approx(0.25)
    assert found["within"] == pytest.approx(0, abs=1e-15)
    assert found["ece"] == pytest.approx((4 * 0.15 + 2 * 0.2 + 4 * 0.05) / 10)
    assert found["mce"] == pytest.approx(0.2)


values = hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(0, 1, width=32))


@given(values, st.randoms(use_true_random=False), st.sampled_from([1, 2, 5, 10, 100]))
def test_the_parts_add_up_whatever_the_bins(prob: NDArray[np.float32], rng: "object", k: int) -> None:
    """Brier = reliability - resolution + uncertainty + within, and Brier is the mean squared difference."""
    outcome = np.random.default_rng(rng.randrange(1000)).integers(0, 2, len(prob))  # type: ignore[attr-defined]
    found = calibration.scores(calibration.bins(prob, outcome, k=k))
    parts = found["reliability"] - found["resolution"] + found["uncertainty"] + found["within"]
    assert found["brier"] == pytest.approx(parts, abs=1e-12)
    assert found["brier"] == pytest.approx(((prob.astype(np.float64) - outcome) ** 2).mean(), abs=1e-12)


def test_sums_add_up_and_coarsen() -> None:
    """Two halves merge to the whole, and 1,000 bins coarsen to 10 without a change of the Brier score."""
    rng = np.random.default_rng(0)
    p = rng.random(5000)
    y = rng.random(5000) < p
    whole = calibration.bins(p, y, k=1000)
    halves = calibration.merged([calibration.bins(p[:99], y[:99], k=1000), calibration.bins(p[99:], y[99:], k=1000)])
    assert np.array_equal(whole.n, halves.n)
    assert halves.pp == pytest.approx(whole.pp)
    direct, coarse = (
        calibration.scores(each) for each in (calibration.bins(p, y, k=10), calibration.coarser(whole, 10))
    )
    assert coarse == pytest.approx(direct)


def test_recalibration_equals_scikit_learn() -> None:
    """Slope and intercept are those of an unpenalised logistic regression."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    logit = rng.normal(0, 2, 400)
    y = rng.random(400) < 1 / (1 + np.exp(-(0.5 + 0.6 * logit)))
    fitted = LogisticRegression(C=np.inf, tol=1e-10).fit(logit[:, None], y)
    found = calibration.recalibrate(1 / (1 + np.exp(-logit)), y, np.ones(400))
    assert (found.intercept.value, found.slope.value) == pytest.approx(
        (fitted.intercept_[0], fitted.coef_[0, 0]), abs=1e-5
    )
    assert found.intercept.low < 0.5 < found.intercept.high
    assert found.slope.low < 0.6 < found.slope.high


def test_counts_are_as_good_as_cases() -> None:
    """Cases with one probability may be given as counts."""
    alone = calibration.recalibrate(P, Y, np.ones(10))
    together = calibration.recalibrate([0.1, 0.3, 0.8], [1, 1, 3], [4, 2, 4])
    assert alone.slope == pytest.approx(together.slope)
    assert alone.intercept == pytest.approx(together.intercept)


def test_wald_intervals_cover() -> None:
    """In 400 simulated sets the 95 % interval of the slope covers the true slope in 92 to 98 %."""
    rng, held = np.random.default_rng(2), 0
    for _ in range(400):
        logit = rng.normal(0, 1.5, 300)
        y = rng.random(300) < 1 / (1 + np.exp(-logit))
        found = calibration.recalibrate(1 / (1 + np.exp(-logit)), y, np.ones(300))
        held += found.slope.low <= 1 <= found.slope.high
    assert 0.92 <= held / 400 <= 0.98


@pytest.mark.parametrize(
    ("prob", "outcome", "note"),
    [
        ([0.1, 0.2, 0.8], [0, 0, 1], "separated"),
        ([0.1, 0.2, 0.2, 0.8], [0, 0, 1, 1], "separated"),  # only just: a tie is no overlap
        ([0.1, 0.9], [1, 1], "only one outcome"),
        ([0.5, 0.5], [1, 0], "all probabilities are equal"),
    ],
)
def test_what_has_no_slope_is_said(prob: list[float], outcome: list[int], note: str) -> None:
    found = calibration.recalibrate(prob, outcome, np.ones(len(prob)))
    assert note in found.note
    assert math.isnan(found.slope.value)


@pytest.mark.parametrize("wrong", [1, 2, 5])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_confident_model_with_swapped_classes_is_told(wrong: int, mirrored: bool) -> None:
    """A model that is wrong with certainty has a negative slope and a note that says so."""
    outcome = np.repeat([0, 1], [40, 3])
    prob = np.where(outcome == 1, 1e-9, 1 - 1e-9)
    prob[:wrong] = 1e-9
    if mirrored:
        prob, outcome = 1 - prob, 1 - outcome
    found = calibration.recalibrate(prob, outcome, np.ones(43))
    assert "classes swapped" in found.note
    assert math.isfinite(found.in_the_large)
    apart = calibration.recalibrate([0.9, 0.8, 0.1], [0, 0, 1], np.ones(3))
    assert "separated" in apart.note
    assert "classes swapped" in apart.note


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1e-9, 1e-4, 0.3, 0.999, 1.0]), st.booleans()), min_size=1, max_size=30),
    st.sampled_from([1, 1000, 10**7]),
)
def test_every_set_of_scores_has_a_slope_or_a_note(cases: list[tuple[float, bool]], weight: int) -> None:
    """Certain, constant, inverted and one-class scores raise nothing and give no infinite number."""
    prob, outcome = (np.array(each, float) for each in zip(*cases, strict=True))
    found = calibration.recalibrate(prob, outcome * weight, np.full(len(prob), weight))
    assert found.note or math.isfinite(found.slope.high - found.slope.low)
    assert not any(math.isinf(value) for value in (*found.slope, *found.intercept, found.in_the_large))


def test_certainty_has_a_logit() -> None:
    """Probabilities of 0 and 1 are clipped by one millionth."""
    found = calibration.recalibrate([0.0, 0.0, 1.0, 1.0], [0, 1, 0, 1], np.ones(4))
    assert found.slope.value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("prob", "outcome", "cause"),
    [
        ([1.5], [1], "a probability is 1.5"),
        ([np.nan], [1], "nan"),
        ([0.5], [2], "an outcome is"),
        ([0.5], [], "shape|\\(1,\\)"),
    ],
)
def test_bad_values_are_refused(prob: list[float], outcome: list[int], cause: str) -> None:
    with pytest.raises(InputError, match=cause):
        calibration.bins(prob, outcome, k=10)


def test_without_cases_nothing_is_said_of_outcomes() -> None:
    """The note on no cases differs from the note on a single outcome."""
    assert calibration.recalibrate([], [], []).note == "there are no cases"


def test_nothing_has_no_scores() -> None:
    found = calibration.scores(calibration.bins([], [], k=10))
    assert found["n"] == 0
    assert math.isnan(found["brier"])
