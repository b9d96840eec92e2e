"""AUC, variance, intervals and DeLong's test against published values and plain double loops."""

import csv
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from wsiflow.errors import InputError
from wsiflow.evaluation import roc

SCORES, LABELS = [0.9, 0.8, 0.6, 0.3, 0.1, 0.5, 0.7], [1, 1, 1, 1, 0, 0, 0]

# Albumin, total protein, K-G score and outcome of 43 patients (DeLong, DeLong, Clarke-Pearson 1988), as the manual of
# SAS/STAT prints them.
PATIENTS = """
3.0 5.8 10 0  3.2 6.3 5 1  3.9 6.8 3 1  2.8 4.8 6 0  3.2 5.8 3 1  0.9 4.0 5 0  2.5 5.7 8 0  1.6 5.6 5 1  3.8 5.7 5 1
3.7 6.7 6 1  3.2 5.4 4 1  3.8 6.6 6 1  4.1 6.6 5 1  3.6 5.7 5 1  4.3 7.0 4 1  3.6 6.7 4 0  2.3 4.4 6 1  4.2 7.6 4 0
4.0 6.6 6 0  3.5 5.8 6 1  3.8 6.8 7 1  3.0 4.7 8 0  4.5 7.4 5 1  3.7 7.4 5 1  3.1 6.6 6 1  4.1 8.2 6 1  4.3 7.0 5 1
4.3 6.5 4 1  3.2 5.1 5 1  2.6 4.7 6 1  3.3 6.8 6 0  1.7 4.0 7 0  3.7 6.1 5 1  3.3 6.3 7 1  4.2 7.7 6 1  3.5 6.2 5 1
2.9 5.7 9 0  2.1 4.8 7 1  2.8 6.2 8 0  4.0 7.0 7 1  3.3 5.7 6 1  3.7 6.9 5 1  3.6 6.6 5 1
"""

two_classes = st.tuples(
    st.lists(st.integers(0, 5), min_size=2, max_size=8), st.lists(st.integers(0, 5), min_size=2, max_size=8)
).map(lambda pn: (pn[0] + pn[1], [1] * len(pn[0]) + [0] * len(pn[1])))


def outcomes(scores, labels):
    """Return 1, 1/2 or 0 for every negative (row) against every positive (column)."""
    scores, labels = np.array(scores, float), np.array(labels)
    return (np.sign(scores[labels == 1][None, :] - scores[labels == 0][:, None]) + 1) / 2


def test_worked_example():
    """Four tumour and three normal slides have AUC 0.75 and variance 0.0347222."""
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
    """Published slide scores of three models have the published AUCs and deviations on 129 test slides."""
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
    """Ranks give the values of the full matrix of pairs, ties included."""
    x = outcomes(*sample)
    n, m = x.shape
    a, b, s = m * x.mean(axis=1).var(ddof=1), n * x.mean(axis=0).var(ddof=1), x.var(ddof=1)
    e = ((m * n - 1) * s - (n - 1) * a - (m - 1) * b) / ((m - 1) * (n - 1))
    assert roc.auc(*sample) == pytest.approx(x.mean())
    assert roc.delong_variance(*sample) == pytest.approx((a + b - e) / (m * n), abs=1e-12)


def patients():
    """Return albumin, total protein, K-G score (negated so that higher is better) and outcome."""
    albumin, protein, kg, outcome = np.array(PATIENTS.split(), float).reshape(-1, 4).T
    return albumin, protein, 10 - kg, outcome


def test_published_areas_and_errors():
    """The three tests of DeLong's example have the areas and standard errors that SAS prints."""
    *tests, outcome = patients()
    assert [round(roc.auc(one, outcome), 4) for one in tests] == [0.7366, 0.6478, 0.7258]
    errors = np.sqrt(np.diag(roc.delong_covariance(tests, outcome)))
    assert errors.round(4).tolist() == [0.0927, 0.1, 0.1028]


def test_published_paired_tests():
    """Albumin and total protein against the K-G score: difference, error, chi square and p as SAS prints them."""
    albumin, protein, kg, outcome = patients()
    found = [roc.paired_test(one, kg, outcome) for one in (albumin, protein)]
    rounded = [(round(d, 4), round(e, 4), round((d / e) ** 2, 4), round(p, 4)) for d, e, p in found]
    assert rounded == [(0.0108, 0.0953, 0.0127, 0.9102), (-0.0780, 0.1046, 0.5554, 0.4561)]


@given(two_classes, st.randoms(use_true_random=False))
def test_covariance_equals_its_definition(sample, random):
    """It equals the covariance of placement values from the matrices of pairs."""
    scores, labels = sample
    other = random.sample(scores, len(scores))
    x, y = outcomes(scores, labels), outcomes(other, labels)
    n, m = x.shape

    def covariance(a, b):
        return sum((p - a.mean()) * (q - b.mean()) for p, q in zip(a, b, strict=True)) / (len(a) - 1)

    def expected(a, b):
        return covariance(a.mean(axis=0), b.mean(axis=0)) / m + covariance(a.mean(axis=1), b.mean(axis=1)) / n

    found = roc.delong_covariance([scores, other], labels)
    assert found == pytest.approx(np.array([[expected(x, x), expected(x, y)], [expected(y, x), expected(y, y)]]))


@given(two_classes)
def test_paired_test_of_equal_and_mirrored_scores(sample):
    """Equal scores have difference 0, and exchanging the scores changes the sign only."""
    scores, labels = sample
    other = [-score for score in scores]
    assert roc.paired_test(scores, scores, labels) == (0, 0, 1)
    there, back = roc.paired_test(scores, other, labels), roc.paired_test(other, scores, labels)
    assert there[0] == pytest.approx(-back[0])
    assert there[1:] == pytest.approx(back[1:], nan_ok=True)


def test_paired_test_of_one_slide_in_a_class():
    """With one slide in a class there is no test."""
    difference, error, p = roc.paired_test([1, 0, 0], [0, 0, 0], [1, 0, 0])
    assert difference == 0.5
    assert math.isnan(error)
    assert math.isnan(p)


@given(two_classes, st.integers(0, 1000))
def test_area_of_a_draw_is_that_of_its_slides(sample, seed):
    """Counting slides equals repeating them; a draw without a class is NaN."""
    scores, labels = (np.array(one) for one in sample)
    times = np.random.default_rng(seed).integers(0, 3, size=(4, len(scores)))
    expected = [roc.auc(np.repeat(scores, row), np.repeat(labels, row)) for row in times]
    assert roc.resample(scores, labels, times) == pytest.approx(expected, nan_ok=True)


@given(two_classes)
def test_turning_the_scores_round_mirrors_the_area(sample):
    """Negated scores have the complementary AUC and the same variance."""
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
    """The interval is logit(0.75) -+ 1.96 deviations with DeLong's variance."""
    variance = roc.delong_covariance([SCORES], LABELS)[0, 0]
    half = roc.Z95 * math.sqrt(variance) / (0.75 * 0.25)
    expected = [1 / (1 + math.exp(-(math.log(3) + sign * half))) for sign in (-1, 1)]
    assert roc.auc_interval(SCORES, LABELS) == pytest.approx(expected)


@given(two_classes)
def test_interval_of_turned_scores_is_mirrored(sample):
    """Negated scores have the interval from 1 - high to 1 - low."""
    scores, labels = sample
    low, high = roc.auc_interval(scores, labels)
    assert roc.auc_interval([-score for score in scores], labels) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize(("m", "n"), [(3, 3), (49, 80), (1000, 1000)])
def test_perfect_separation_is_not_certain(m, n):
    """An AUC of 1 has an interval that begins below 1, lower for fewer slides."""
    low, high = roc.auc_interval([1] * m + [0] * n, [1] * m + [0] * n)
    assert high == 1
    assert 1 - low == pytest.approx(roc.Z95**2 * 2 / (m + n), rel=0.75)  # of the order of 3.8 over the smaller class


# --- patients


def of_patients(rng, n_patients, n_slides, icc, area):
    """Return scores, labels and patients: slides of a patient have one label, and scores that resemble each other."""
    patient = np.repeat(np.arange(n_patients), n_slides)
    labels = (np.arange(n_patients) % 2)[patient]
    own, common = rng.normal(size=patient.size), rng.normal(size=n_patients)[patient]
    scores = math.sqrt(2) * special.ndtri(area) * labels + math.sqrt(icc) * common + math.sqrt(1 - icc) * own
    return scores, labels, patient


@given(two_classes)
def test_patients_of_one_slide_change_no_variance(sample):
    """Obuchowski's covariance of patients with one slide each is DeLong's."""
    scores, labels = sample
    other = [score**2 for score in scores]
    alone = roc.delong_covariance([scores, other], labels)
    assert roc.delong_covariance([scores, other], labels, range(len(labels))) == pytest.approx(alone)


def test_slides_that_repeat_add_nothing():
    """Five equal slides of every patient give the variance of one, and not a fifth of it."""
    alone = roc.delong_covariance([SCORES], LABELS)
    again = roc.delong_covariance([np.repeat(SCORES, 5)], np.repeat(LABELS, 5), np.repeat(np.arange(7), 5))
    assert again == pytest.approx(alone)
    assert roc.delong_covariance([np.repeat(SCORES, 5)], np.repeat(LABELS, 5)) < alone / 4
    low, high = roc.auc_interval(np.repeat(SCORES, 5), np.repeat(LABELS, 5), np.repeat(np.arange(7), 5))
    assert low < roc.auc_interval(SCORES, LABELS)[0] < roc.auc_interval(SCORES, LABELS)[1] < high
    p = roc.paired_test(
        np.repeat(SCORES, 5), np.repeat(LABELS, 5) * 0.0, np.repeat(LABELS, 5), np.repeat(range(7), 5)
    ).p
    assert p > roc.paired_test(SCORES, [0.0] * 7, LABELS).p


def test_covariance_of_patients_equals_its_definition():
    """Obuchowski's sums in plain loops, with patients that have slides of both classes."""
    rng = np.random.default_rng(0)
    labels, patient = rng.integers(0, 2, 30), rng.integers(0, 8, 30)
    scores = rng.normal(size=30) + labels
    x = outcomes(scores, labels)
    placed = np.empty(30)
    placed[labels == 1], placed[labels == 0] = x.mean(axis=0), x.mean(axis=1)
    apart = placed - x.mean()
    m, n, everyone = int(labels.sum()), int((1 - labels).sum()), set(patient.tolist())
    with_tumour, with_normal = (set(patient[labels == kind].tolist()) for kind in (1, 0))

    def sums(kind):
        return {who: sum(apart[(patient == who) & (labels == kind)]) for who in everyone}

    tumour, normal = sums(1), sums(0)
    s10 = len(with_tumour) / (len(with_tumour) - 1) / m * sum(tumour[who] ** 2 for who in with_tumour)
    s01 = len(with_normal) / (len(with_normal) - 1) / n * sum(normal[who] ** 2 for who in with_normal)
    s11 = len(everyone) / (len(everyone) - 1) * sum(tumour[who] * normal[who] for who in everyone)
    found = roc.delong_covariance([scores], labels, patient)[0, 0]
    assert found == pytest.approx(s10 / m + s01 / n + 2 * s11 / (m * n))


def test_interval_of_patients_holds_the_truth_as_often_as_it_says():
    """25 patients of five slides with a correlation of 0.6: 95 % of the intervals hold the area, and not 73 %."""
    held, alone = [], []
    for seed in range(800):
        scores, labels, patient = of_patients(np.random.default_rng([5, seed]), 25, 5, 0.6, 0.9)
        for ends, kept in ((held, patient), (alone, None)):
            low, high = roc.auc_interval(scores, labels, kept)
            ends.append(low <= 0.9 <= high)
    assert 0.93 <= np.mean(held) <= 0.975
    assert np.mean(alone) < 0.8


def test_a_class_of_one_patient_has_no_interval():
    """What rests on one patient is not certain, however many slides there are."""
    assert all(map(math.isnan, roc.auc_interval(SCORES, LABELS, [0, 0, 0, 0, 1, 2, 3])))
    assert math.isnan(roc.paired_test(SCORES, LABELS, LABELS, [0, 0, 0, 0, 1, 2, 3]).p)


@pytest.mark.parametrize("patients", [3, 40])
def test_perfect_separation_counts_patients(patients):
    """At an AUC of 1 the end below is that of as many slides as there are patients."""
    labels = np.repeat([1, 0], 5 * patients)
    whose = np.repeat(np.arange(2 * patients), 5)
    assert roc.auc_interval(labels, labels, whose) == pytest.approx(roc.auc_interval(labels[::5], labels[::5]))


def test_newcombes_interval():
    """The end below an area of 1 is 1.96 deviations of Hanley and McNeil away, both numbers replaced by their mean."""
    low, _ = roc.auc_interval([1] * 20 + [0] * 30, [1] * 20 + [0] * 30)
    both_beat, beats_both = low / (2 - low), 2 * low**2 / (1 + low)
    spread = low * (1 - low) + (25 - 1) * (both_beat - low**2) + (25 - 1) * (beats_both - low**2)
    assert (1 - low) / math.sqrt(spread / (20 * 30)) == pytest.approx(roc.Z95)


def test_one_class_has_no_area():
    """With one class everything is NaN."""
    values = [roc.auc([0.1, 0.2], [1, 1]), roc.delong_variance([0.1, 0.2], [0, 0]), *roc.auc_interval([0.1], [1])]
    assert all(map(math.isnan, [*values, *roc.curve([0.1], [1]).fpr[1:]]))


def test_one_slide_in_a_class_has_an_area_but_no_variance():
    """A variance needs two slides in each class."""
    assert roc.auc([0.1, 0.2, 0.3], [0, 0, 1]) == 1
    assert math.isnan(roc.delong_variance([0.1, 0.2, 0.3], [0, 0, 1]))


@pytest.mark.parametrize(
    ("scores", "other", "difference", "p"),
    [
        ([1, 1, 0, 0], [0, 0, 1, 1], 1, math.nan),
        ([1, 1, 0, 0], [0.5] * 4, 0.5, math.nan),
        ([1, 1, 0, 0], [9, 8, 1, 2], 0, 1),
        ([0.5] * 4, [0.1] * 4, 0, 1),
    ],
)
def test_areas_that_do_not_vary_are_not_told_apart(scores, other, difference, p):
    """Where DeLong's variance is 0 the p-value is not 0."""
    found = roc.paired_test(scores, other, [1, 1, 0, 0])
    assert found[:2] == (difference, 0)
    assert found.p == pytest.approx(p, nan_ok=True)


@pytest.mark.filterwarnings("error")
def test_huge_scores_are_resampled_without_a_word():
    """Scores whose difference overflows are compared without a warning."""
    times = np.ones((1, 3), np.int64)
    assert roc.resample([1e308, -1e308, 0], [1, 0, 0], times) == 1


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [([0.1, math.nan], [0, 1], "NaN"), ([0.1, 0.2], [0, 2], "label"), ([0.1, 0.2], [0], "one label per score")],
)
def test_unusable_input_is_refused(scores, labels, message):
    """NaN scores, other labels and unequal lengths are refused by name."""
    with pytest.raises(InputError, match=message):
        roc.auc(scores, labels)
