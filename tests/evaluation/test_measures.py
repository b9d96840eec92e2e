"""Average precision, scores by size and sensitivity at a specificity: values by hand, and against other libraries."""

import math

import numpy as np
import pytest
from sklearn import metrics

from wsiflow.evaluation import measures, roc
from wsiflow.evaluation.froc import Matches, SlideFindings, evaluation_mask, match
from wsiflow.evaluation.further import further_measures
from wsiflow.evaluation.setting import Setting


def ones(n):
    return np.ones((1, n), np.int64)


def slides(rng, n):
    """Return slides with lesions, some of them missed, and false positives, with ties."""
    return [
        Matches(
            f"s{i}",
            np.where(rng.random(k) < 0.3, -np.inf, rng.integers(1, 9, k) / 10),
            0,
            rng.integers(1, 9, rng.integers(0, 6)) / 10,
        )
        for i, k in enumerate(rng.integers(0, 4, n))
    ]


def test_average_precision_equals_that_of_candidates():
    """It is what picai_eval computes: missed lesions are candidates of confidence 0 and precision 0."""
    for seed in range(20):
        found = slides(np.random.default_rng(seed), 8)
        best, false = (
            np.concatenate(parts) for parts in zip(*((m.best, m.false_positives) for m in found), strict=True)
        )
        truth = np.repeat([1, 0], [len(best), len(false)])
        confidence = np.concatenate([np.where(best > 0, best, 0.0), false])
        precision, recall, thresholds = metrics.precision_recall_curve(truth, confidence)
        precision[:-1][thresholds == 0] = 0
        expected = -np.sum(np.diff(recall) * precision[:-1])
        assert measures.average_precision(found, ones(8))[0] == pytest.approx(expected)


def test_average_precision_by_hand():
    """Hits at 0.9 and 0.5, a false positive between them, a missed lesion: (1 + 2/3) / 3; without a lesion NaN."""
    found = [Matches("a", np.array([0.9, 0.5, -np.inf]), 0, np.array([0.7])), Matches("b", np.empty(0), 0, np.empty(0))]
    assert measures.average_precision(found, ones(2))[0] == pytest.approx((1 + 2 / 3) / 3)
    drawn = measures.average_precision(found, np.array([[2, 0], [0, 2]]))
    assert drawn[0] == pytest.approx((1 + 2 / 3) / 3)
    assert math.isnan(drawn[1])
    missed = [Matches("a", np.array([-np.inf]), 0, np.array([0.7]))]
    assert measures.average_precision(missed, ones(1))[0] == 0


@pytest.mark.parametrize("specificity", measures.SPECIFICITIES)
def test_sensitivity_at_a_specificity_is_the_best_point_of_the_curve(specificity):
    """No point of the ROC curve with that specificity has more; draws count their slides."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        labels = np.append(rng.integers(0, 2, 38), [0, 1])
        scores = (rng.random(40) + labels / 3).round(1)
        times = rng.integers(0, 3, (1, 40))
        curve = roc.curve(np.repeat(scores, times[0]), np.repeat(labels, times[0]))
        expected = curve.tpr[1 - curve.fpr >= specificity - 1e-12].max()
        assert measures.sensitivity_at_specificity(scores, labels, times, specificity)[0] == pytest.approx(expected)
    assert math.isnan(measures.sensitivity_at_specificity([0.5], [1], ones(1), specificity)[0])


def test_the_specificity_itself_is_enough():
    """Of ten normal slides one above the threshold is a specificity of 0.9, two are less."""
    scores, labels = [0.95, *[0.1] * 8, 0.5, 0.6, 0.4], [0] * 10 + [1, 1]
    assert measures.sensitivity_at_specificity(scores, labels, ones(12), 0.9)[0] == 0.5


def painted(*sides):
    """Return the evaluation mask of squares, at 8 um per pixel, and a detection in the middle of each."""
    tumour, points, left = np.zeros((400, 900), bool), [], 20
    for side in sides:
        tumour[20 : 20 + side, left : left + side] = True
        points.append((left + side // 2, 20 + side // 2))
        left += side + 60
    return evaluation_mask(tumour, 8.0), points


def test_lesions_are_scored_by_their_size():
    """A macro lesion of 2.4 mm, a micro one and an ITC have scores of their own; FROC ignores the hit on the ITC."""
    lesions, points = painted(300, 40, 5)
    hits = [(confidence, x * 32, y * 32) for confidence, (x, y) in zip((0.9, 0.3, 0.8), points, strict=True)]
    first = match(SlideFindings("a", lesions, np.array([hits[0], hits[2], (0.5, 32, 32)])))
    second = match(SlideFindings("b", lesions, np.array(hits)))
    assert (first.n_itc, first.itc, first.best[2], first.any_best[2]) == (1, (2,), -np.inf, 0.8)
    assert first.major_axis_um[0] > 2400 > 2075 > first.major_axis_um[1] > 275 > first.major_axis_um[2]
    setting = Setting("a", [first, second], ("a", "b"), np.array([0.9, 0.9]), np.array([1, 1]))
    found = further_measures(setting, n=50, seed=0)
    assert found.n_lesions == {"macro": 2, "micro": 2, "itc": 2}
    values = {name: one.value for name, one in found.intervals.items()}
    assert values["froc.macro_score"] == values["froc.itc_score"] == 1
    assert values["froc.micro_score"] == pytest.approx(0.5, abs=0.1)
    assert found.intervals["froc.macro_score"].low < 0.3, "two slides are not many"
    assert values["froc.average_precision"] == pytest.approx(1 / 2 + 1 / 4 * 3 / 4)
