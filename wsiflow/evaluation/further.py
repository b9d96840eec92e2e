"""Further measures of a setting with their intervals: average precision, scores by size, sensitivity at a specificity.

Input: a setting. Output: an interval for every measure of `measures`, from the draws that `paired.bootstrap` takes.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.evaluation import discordance, froc, measures
from wsiflow.evaluation.draws import Interval, draw_cases, extended, interval_of_classes, lesion_weights, times_of
from wsiflow.evaluation.setting import (
    Setting,
    n_lesions,
    patients_of_classes,
    patients_of_slides,
    patients_with_lesions,
)


class FurtherMeasures(NamedTuple):
    """Measures beside FROC score and AUC: interval by metric, and number of lesions by size class."""

    intervals: dict[str, Interval]
    n_lesions: dict[str, int]


def further_measures(setting: Setting, *, n: int, seed: int, join_um: float = froc.JOIN_UM) -> FurtherMeasures:
    """Return average precision, the scores of each size class, and the slides' sensitivities at specificities.

    They come from the draws of `bootstrap`. Metrics are ``froc.average_precision``, ``froc.macro_score``,
    ``froc.micro_score``, ``froc.itc_score`` and ``roc.sensitivity_at_specificity_0.95``; see `measures`.

    Args:
        setting: The slides.
        n: Number of draws; with 0 all intervals are NaN.
        seed: Seed of the draws.
        join_um: Joining distance of the protocol.
    """
    times = draw_cases(setting, n, seed).drawn
    of_froc = times_of(times, [one.slide_id for one in setting.matches])
    of_auc = times_of(times, setting.slide_ids)
    intervals = {
        "froc.average_precision": interval_of_classes(
            measures.average_precision(setting.matches, of_froc), [patients_with_lesions(setting)]
        )
    }
    numbers = dict[str, int]()
    for size in measures.SIZES:
        chosen = measures.of_size(setting.matches, size, join_um=join_um)
        if chosen is None:
            continue
        own = setting._replace(matches=chosen)
        numbers[size] = n_lesions(own)
        values = froc.resample(chosen, of_froc, mode="strict").mean(axis=1)
        drawn = interval_of_classes(values, [patients_with_lesions(own)])
        intervals[f"froc.{size}_score"] = extended(drawn, lesion_weights(own, "strict")["froc.strict_score"], own)
    for specificity in measures.SPECIFICITIES:
        values = measures.sensitivity_at_specificity(setting.scores, setting.labels, of_auc, specificity)
        intervals[f"roc.sensitivity_at_specificity_{specificity:g}"] = _of_tumour_slides(values, setting)
    return FurtherMeasures(intervals, numbers)


def _of_tumour_slides(values: NDArray[np.float64], setting: Setting) -> Interval:
    """Return a share of the tumour slides with its interval, extended where almost all are found or almost none."""
    one = interval_of_classes(values, patients_of_classes(setting))
    whose = np.array(patients_of_slides(setting), np.int64)[setting.labels == 1]
    if not math.isfinite(one.low):
        return one
    n_patients = len(set(whose.tolist()))
    exact = discordance.share_interval(np.full(n_patients, one.value), np.arange(n_patients))
    return Interval(one.value, min(one.low, exact[0]), max(one.high, exact[1])) if exact else one
