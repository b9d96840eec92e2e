"""The area under the ROC curve and its variance, against published scores and a plain double loop."""

import csv
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsiflow import roc
from wsiflow.errors import InputError

SCORES, LABELS = [0.9, 0.8, 0.6, 0.3, 0.1, 0.5, 0.7], [1, 1, 1, 1, 0, 0, 0]

two_classes = st.tuples(
    st.lists(st.integers(0, 5), min_size=2, max_size=8), st.lists(st.integers(0, 5), min_size=2, max_size=8)
).map(lambda pn: (pn[0] + pn[1], [1] * len(pn[0]) + [0] * len(pn[1])))


def outcomes(scores, labels):
    """Return 1, 1/2 or 0 for every negative (row) against every positive (column)."""
    scores, labels = np.array(scores, float), np.array(labels)
    return (np.sign(scores[labels == 1][None, :] - scores[labels == 0][:, None]) + 1) / 2


def test_worked_example():
    """Four tumour and three normal slides: area 0.75, variance 0.0347222."""
    assert roc.auc(SCORES, LABELS) == 0.75
    assert round(roc.delong_variance(SCORES, LABELS), 7) == 0.0347222


@pytest.mark.parametrize(
    ("column", "area", "deviation"),
    [
        ("Method_II_noise_norm", 0.983929, 0.008553),
        ("Method_II_noise_only", 0.942092, 0.021844),
        ("Method_I", 0.915561, 0.025770),
    ],
)
def test_published_scores(shared_data, column, area, deviation):
    """The published slide scores of three models have the published areas and deviations on 129 test slides."""
    with (shared_data / "camelyon16" / "tables" / "reference.csv").open() as file:
        truth = {row["image"].removesuffix(".tif"): row["type"] == "tumor" for row in csv.DictReader(file)}
    with (shared_data / "published" / "dldp" / "RF_results" / "reference_all_final_results_0515.csv").open() as file:
        rows = list(csv.DictReader(file))
    scores, labels = [float(row[column]) for row in rows], [truth[row["slide_name"]] for row in rows]
    assert (len(labels), sum(labels)) == (129, 49)
    assert round(roc.auc(scores, labels), 6) == area
    assert round(math.sqrt(roc.delong_variance(scores, labels)), 6) == deviation


@given(two_classes)
def test_area_and_variance_equal_the_matrix_of_outcomes(sample):
    """Ranks give what the full matrix of pairs gives, ties included."""
    x = outcomes(*sample)
    n, m = x.shape
    a, b, s = m * x.mean(axis=1).var(ddof=1), n * x.mean(axis=0).var(ddof=1), x.var(ddof=1)
    e = ((m * n - 1) * s - (n - 1) * a - (m - 1) * b) / ((m - 1) * (n - 1))
    assert roc.auc(*sample) == pytest.approx(x.mean())
    assert roc.delong_variance(*sample) == pytest.approx((a + b - e) / (m * n), abs=1e-12)


@given(two_classes)
def test_turning_the_scores_round_mirrors_the_area(sample):
    """Negated scores have the complementary area and the same variance."""
    scores, labels = sample
    negated = [-score for score in scores]
    assert roc.auc(negated, labels) == pytest.approx(1 - roc.auc(scores, labels))
    assert roc.delong_variance(negated, labels) == pytest.approx(roc.delong_variance(scores, labels), abs=1e-12)


@given(two_classes)
def test_area_is_the_trapezoid_under_the_curve(sample):
    """The curve runs from (0, 0) to (1, 1) and encloses the area."""
    curve = roc.curve(*sample)
    assert (curve.fpr[0], curve.tpr[0], curve.thresholds[0]) == (0, 0, math.inf)
    assert (curve.fpr[-1], curve.tpr[-1]) == (1, 1)
    assert np.trapezoid(curve.tpr, curve.fpr) == pytest.approx(roc.auc(*sample))


@given(two_classes)
def test_interval_holds_the_area_within_bounds(sample):
    """0 <= low <= area <= high <= 1."""
    low, high = roc.auc_interval(*sample)
    assert 0 <= low <= roc.auc(*sample) + 1e-12
    assert roc.auc(*sample) - 1e-12 <= high <= 1


def test_interval_of_the_worked_example():
    """The area -+ 1.96 deviations, cut at 1."""
    low, high = roc.auc_interval(SCORES, LABELS)
    assert (round(low, 4), high) == (0.3848, 1)


def test_one_class_has_no_area():
    """Without a pair to compare everything is NaN."""
    values = [roc.auc([0.1, 0.2], [1, 1]), roc.delong_variance([0.1, 0.2], [0, 0]), *roc.auc_interval([0.1], [1])]
    assert all(map(math.isnan, [*values, *roc.curve([0.1], [1]).fpr[1:]]))


def test_one_slide_in_a_class_has_an_area_but_no_variance():
    """A variance needs two slides in each class."""
    assert roc.auc([0.1, 0.2, 0.3], [0, 0, 1]) == 1
    assert math.isnan(roc.delong_variance([0.1, 0.2, 0.3], [0, 0, 1]))


@pytest.mark.parametrize(
    ("scores", "labels", "told"),
    [([0.1, math.nan], [0, 1], "NaN"), ([0.1, 0.2], [0, 2], "label"), ([0.1, 0.2], [0], "one label per score")],
)
def test_unusable_input_is_refused(scores, labels, told):
    """NaN scores, odd labels and odd lengths are named."""
    with pytest.raises(InputError, match=told):
        roc.auc(scores, labels)
