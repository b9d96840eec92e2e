"""Score subgroups of the slides: by scanner, centre, class of lesion, or any other column.

Input: the record of an evaluation, and a value per slide and column. Output: a row per value. Small groups are marked
and never left out: a group without tumour or without normal slides has a row whose scores are NaN.

The AUC has DeLong's 95 % interval. The FROC score and its sensitivities have a bootstrap interval over cases. The
sensitivity (share of tumour slides at or above the threshold) and the specificity (share of normal slides below it)
have the interval of Clopper and Pearson. Groups are not tested against each other, and nothing is corrected for the
number of groups: a difference between two of many groups is only a hint.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from wsiflow.errors import InputError
from wsiflow.evaluation import froc, paired, proportions, roc
from wsiflow.evaluation.draws import Interval
from wsiflow.evaluation.matches import EvaluationRecord
from wsiflow.evaluation.setting import Setting, patients

SMALL = 10
"""A group with fewer tumour slides, or fewer normal slides, than this is marked as small."""

_MOST_GROUPS = 50


class SubgroupOptions(NamedTuple):
    """How subgroups are scored.

    Attributes:
        threshold: A slide is positive from this score on, 0 to 1.
        bootstrap: Number of bootstrap draws for the FROC intervals.
        seed: Seed of the draws.
    """

    threshold: float
    bootstrap: int
    seed: int


def table(
    record: EvaluationRecord, values: Mapping[str, Mapping[str, str]], options: SubgroupOptions
) -> list[dict[str, Any]]:
    """Return a row for all slides, and a row for every value of every column.

    Args:
        record: The evaluation's record.
        values: A value for every slide, by column and slide id.
        options: How subgroups are scored.

    Raises:
        InputError: A column has more values than there may be groups.
    """
    counted = [one for one in record.slides if one.in_froc or one.in_auc]
    record = record.model_copy(update={"slides": counted})
    rows = [_row(record, "all", "", options)]
    for column, of_slide in values.items():
        groups = sorted({of_slide[one.slide_id] for one in counted})
        if len(groups) > _MOST_GROUPS:
            cause = f"column {column} has {len(groups)} values for {len(counted)} slides"
            raise InputError(cause, f"name a column of at most {_MOST_GROUPS} groups", stage="subgroups")
        for group in groups:
            slides = [one for one in counted if of_slide[one.slide_id] == group]
            rows.append(_row(record.model_copy(update={"slides": slides}), column, group, options))
    return rows


def _row(record: EvaluationRecord, column: str, group: str, options: SubgroupOptions) -> dict[str, Any]:
    """Return the numbers of one group by name; NaN where a score is not defined."""
    setting = record.setting("group")
    tumour, normal = (setting.scores[setting.labels == label] for label in (1, 0))
    positive, negative = int((tumour >= options.threshold).sum()), int((normal < options.threshold).sum())
    auc_low, auc_high = roc.auc_interval(setting.scores, setting.labels, patients(setting))
    intervals = _froc(setting, options)
    numbers: dict[str, Any] = {
        "column": column,
        "group": group,
        "slides": len(record.slides),
        "tumour": len(tumour),
        "normal": len(normal),
        "lesions": sum(one.n_lesions for one in setting.matches),
        "froc_slides": len(setting.matches),
        "froc_normal": sum(not len(one.best) for one in setting.matches),
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


def _froc(setting: Setting, options: SubgroupOptions) -> dict[str, Interval]:
    """Return the FROC score and its sensitivities with their intervals, by column name of the table."""
    names = {"froc.score": "froc"} | {f"froc.sensitivity_at_{rate:g}": f"froc_at_{rate:g}" for rate in froc.RATES}
    if not any(one.n_lesions for one in setting.matches):
        return dict.fromkeys(names.values(), Interval(math.nan, math.nan, math.nan))
    results = paired.bootstrap([setting], reference=setting.name, n=options.bootstrap, seed=options.seed)
    return {name: results.intervals[setting.name][metric] for metric, name in names.items()}


def _note(tumour: int, normal: int, auc: float) -> str:
    """Return remarks on a row: a small group, or an AUC at the end of its range; else an empty text."""
    notes = []
    if min(tumour, normal) < SMALL:
        notes.append(f"small: {tumour} tumour and {normal} normal slides")
    if auc in {0.0, 1.0}:
        notes.append("the AUC is at its end: its interval is Newcombe's, DeLong's has no width there")
    return "; ".join(notes)
