"""Compute further measures of lesions and slides: average precision, sensitivity by size, sensitivity at a specificity.

Input: matches of slides, scores and labels, and how often each slide is in each of many draws. Output: a value per
draw.

**Average precision** is the sum, over falling confidences, of the gain in recall times the precision there (as
``picai_eval`` of the PI-CAI challenge computes it; Saha et al. 2024). A lesion counts once, by its highest confidence;
a missed one limits the recall; hits on isolated tumour cells (ITC) are ignored; equal confidences count together.

**By size**: the strict FROC score of the lesions of one size class alone, at the false positives of all slides. Macro
are lesions whose major axis is at least 2 mm, micro are smaller ones, and ITC are those of the protocol; the axis
includes the joining distance, by which the outlines were dilated.

**Sensitivity at a specificity** is the largest share of tumour slides from some score on, at which at least that share
of the normal slides lies below it.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsiflow.evaluation import froc
from wsiflow.evaluation.froc import Matches

SIZES = ("macro", "micro", "itc")
"""Size classes of lesions, the largest first."""

SPECIFICITIES = (0.9, 0.95)
"""Specificities at which the sensitivity for slides is read."""

MACRO_UM = 2000.0
"""Major axis of a macrometastasis, um (TNM); the joining distance is added."""

_ROUNDING = 1e-9


def average_precision(matches: Sequence[Matches], times: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the average precision of many draws of the slides.

    Args:
        matches: The slides.
        times: int64 (n, slides), how often each slide is in each draw; ones for the sample itself.

    Returns:
        float64 (n,); NaN in a draw without any lesion.
    """
    hits, hit_slides = froc.falling([one.best[one.best > -np.inf] for one in matches])
    false, false_slides = froc.falling([one.false_positives for one in matches])
    n_lesions = times @ np.array([one.n_lesions for one in matches], np.int64)
    thresholds = -np.unique(-hits)  # precision counts only where recall grows
    true = _at_least(times, hits, hit_slides, thresholds)
    wrong = _at_least(times, false, false_slides, thresholds)
    gained = np.diff(true, axis=1, prepend=0)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0: nothing drawn yet, or no lesion
        precision = np.where(true > 0, true / (true + wrong), 0.0)
        values: NDArray[np.float64] = (gained * precision).sum(axis=1) / n_lesions
    return values


def of_size(matches: Sequence[Matches], size: str, *, join_um: float = froc.JOIN_UM) -> list[Matches] | None:
    """Return the slides with the lesions of one size class alone; None where sizes are not known.

    The false positives are those of the slides. Isolated tumour cells have the hits that FROC ignores.
    """
    if any(one.major_axis_um is None or one.any_best is None for one in matches if len(one.best)):
        return None
    return [replace(one, best=_best_of_size(one, size, join_um), n_itc=0, itc=()) for one in matches]


def _best_of_size(one: Matches, size: str, join_um: float) -> NDArray[np.float64]:
    if one.major_axis_um is None or one.any_best is None:
        return one.best[:0]
    is_macro = one.major_axis_um >= MACRO_UM + join_um
    is_itc = np.zeros(len(one.best), np.bool_)
    is_itc[list(one.itc)] = True
    wanted = {"macro": is_macro & ~is_itc, "micro": ~is_macro & ~is_itc, "itc": is_itc}[size]
    chosen: NDArray[np.float64] = one.any_best[wanted]
    return chosen


def sensitivity_at_specificity(
    scores: ArrayLike, labels: ArrayLike, times: NDArray[np.int64], specificity: float
) -> NDArray[np.float64]:
    """Return the sensitivity for slides at a specificity, of many draws of the slides.

    Args:
        scores: (n,), higher means more likely tumour.
        labels: (n,) of 0 and 1.
        times: int64 (draws, n), how often each slide is in each draw.
        specificity: Least share of normal slides below the threshold.

    Returns:
        float64 (draws,); NaN in a draw without one of the classes.
    """
    values, truth = np.asarray(scores, np.float64), np.asarray(labels)
    thresholds = -np.unique(-values)
    true, wrong = (_at_least(times[:, truth == kind], *_sorted(values[truth == kind]), thresholds) for kind in (1, 0))
    n_tumour, n_normal = (times[:, truth == kind].sum(axis=1) for kind in (1, 0))
    allowed = wrong <= (1 - specificity) * n_normal[:, None] + _ROUNDING
    found = np.where(allowed, true, 0).max(axis=1, initial=0)
    shares = np.full(len(times), np.nan)
    np.divide(found, n_tumour, out=shares, where=(n_tumour > 0) & (n_normal > 0))
    return shares


def _sorted(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    order = np.argsort(-values, kind="stable")
    return values[order], order


def _at_least(
    times: NDArray[np.int64], values: NDArray[np.float64], slides: NDArray[np.int64], thresholds: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return int64 (draws, thresholds), how many falling values are at or above each threshold in each draw."""
    reach = np.searchsorted(-values, -thresholds, side="right")
    counts: NDArray[np.int64] = np.pad(np.cumsum(times[:, slides], axis=1), ((0, 0), (1, 0)))[:, reach]
    return counts
