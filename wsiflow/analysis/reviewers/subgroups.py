"""Scores of subgroups of the slides: by scanner, centre, class of lesion, or any other column.

Input: an evaluation, and a value per slide. Output: a row per value. Small groups are marked, never hidden: a group
without tumour or without normal slides has a row whose scores are NaN.

The AUC has DeLong's 95 % interval; FROC score and sensitivities have that of a bootstrap over cases; the shares of
tumour slides at or above the threshold, and of normal slides below it, have that of Clopper and Pearson. Groups are not
compared with each other, and nothing is corrected for their number: a difference between two of many groups is a hint.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from wsiflow.errors import InputError
from wsiflow.evaluation import froc, paired, proportions, roc
from wsiflow.evaluation.matches import EvaluationRecord
from wsiflow.evaluation.paired import Setting

SMALL = 10
"""Fewer tumour, or fewer normal slides than this are a small group."""

_MOST_GROUPS = 50


class How(NamedTuple):
    """How groups are scored.

    Attributes:
        threshold: A slide is positive from this score on.
        bootstrap: Draws of the intervals of FROC.
        seed: Seed of the draws.
    """

    threshold: float
    bootstrap: int
    seed: int


def table(record: EvaluationRecord, values: Mapping[str, Mapping[str, str]], how: How) -> list[dict[str, Any]]:
    """Return a row for all slides, and one for every value of every column.

    Args:
        record: The evaluation.
        values: A value for every slide, by column and slide.
        how: How groups are scored.

    Raises:
        InputError: A column has too many values to be groups.
    """
    counted = [one for one in record.slides if one.in_froc or one.in_auc]
    record = record.model_copy(update={"slides": counted})
    rows = [_row(record, "all", "", how)]
    for column, of_slide in values.items():
        groups = sorted({of_slide[one.slide_id] for one in counted})
        if len(groups) > _MOST_GROUPS:
            cause = f"column {column} has {len(groups)} values for {len(counted)} slides"
            raise InputError(cause, f"name a column of at most {_MOST_GROUPS} groups", stage="subgroups")
        for group in groups:
            slides = [one for one in counted if of_slide[one.slide_id] == group]
            rows.append(_row(record.model_copy(update={"slides": slides}), column, group, how))
    return rows


def _row(record: EvaluationRecord, column: str, group: str, how: How) -> dict[str, Any]:
    """Return the numbers of one group by name; NaN for what is not defined."""
    setting = record.setting("group")
    tumour, normal = (setting.scores[setting.labels == label] for label in (1, 0))
    positive, negative = int((tumour >= how.threshold).sum()), int((normal < how.threshold).sum())
    auc_low, auc_high = roc.auc_interval(setting.scores, setting.labels)
    intervals = _froc(setting, how)
    numbers: dict[str, Any] = {
        "column": column,
        "group": group,
        "slides": len(record.slides),
        "tumour": len(tumour),
        "normal": len(normal),
        "lesions": sum(one.n_lesions for one in setting.matches),
        "froc_slides": len(setting.matches),
        "auc": roc.auc(setting.scores, setting.labels),
        "auc_low": auc_low,
        "auc_high": auc_high,
    }
    for name, (hits, n) in {"sensitivity": (positive, len(tumour)), "specificity": (negative, len(normal))}.items():
        low, high = proportions.clopper_pearson(hits, n)
        ends = (hits / n, float(low), float(high)) if n else (math.nan,) * 3
        numbers |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
    for name, interval in intervals.items():
        numbers |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return numbers | {"note": _note(len(tumour), len(normal), numbers["auc"])}


def _froc(setting: Setting, how: How) -> dict[str, paired.Interval]:
    """Return the FROC score and the sensitivities with their intervals, by column of the table."""
    names = {"froc.score": "froc"} | {f"froc.sensitivity_at_{rate:g}": f"froc_at_{rate:g}" for rate in froc.RATES}
    if not any(one.n_lesions for one in setting.matches):
        return dict.fromkeys(names.values(), paired.Interval(math.nan, math.nan, math.nan))
    found = paired.bootstrap([setting], reference=setting.name, n=how.bootstrap, seed=how.seed)
    return {name: found.intervals[setting.name][metric] for metric, name in names.items()}


def _note(tumour: int, normal: int, auc: float) -> str:
    """Say what a reader has to know before using a row."""
    notes = []
    if min(tumour, normal) < SMALL:
        notes.append(f"small: {tumour} tumour and {normal} normal slides")
    if auc in {0.0, 1.0}:
        notes.append("the AUC is at its end: its interval is Newcombe's, DeLong's has no width there")
    return "; ".join(notes)
