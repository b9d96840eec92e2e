"""The scored slides of a setting, the cases and patients that they are, and whether two settings may be compared.

Input: matches, scores and labels of slides. Cases are named by their slides, whose upper and lower case are the same.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.evaluation import froc


class Setting(NamedTuple):
    """The scored slides of one setting: a row of a comparison.

    Attributes:
        name: Name of the setting, unique in a comparison.
        matches: The slides that count for FROC.
        slide_ids: The slides that count for the AUC, in the order of scores and labels.
        scores: float64 (n,), higher means more likely tumour.
        labels: int64 (n,) of 0 and 1.
        protocol_hash: SHA-256 of the scoring protocol, or empty.
        truth: SHA-256 of each slide's truth, by slide id; a slide whose truth is not known is absent.
        clusters: Number of each slide's patient, by slide id: slides of one patient are drawn together. A slide without
            a number is drawn independently.
    """

    name: str
    matches: Sequence[froc.Matches]
    slide_ids: tuple[str, ...]
    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    protocol_hash: str = ""
    truth: Mapping[str, str] | None = None
    clusters: Mapping[str, int] | None = None


def comparability_problems(settings: Sequence[Setting]) -> list[str]:
    """Return the reasons why settings must not be compared; empty where they may.

    Settings must have the same protocol, the same slides for FROC and for the AUC, for every slide the same label,
    truth and number of lesions, and the same grouping of slides by patient. Upper and lower case of slide names are the
    same.
    """
    return [reason for one in settings[1:] for reason in _against(settings[0], one)]


def patients(setting: Setting) -> list[int] | None:
    """Return the number of the patient of each slide that counts for the AUC; None where no patient has two slides."""
    whose = patients_of_slides(setting)
    return whose if len(set(whose)) < len(whose) else None


def patients_of_slides(setting: Setting) -> list[int]:
    """Return the number of the patient, or of the slide, of each slide that counts for the AUC."""
    cluster = dict(zip(case_names(setting), clusters_of(setting), strict=True))
    return [cluster[slide.casefold()] for slide in setting.slide_ids]


def _against(first: Setting, other: Setting) -> list[str]:
    """Return sentences on each difference between two settings that rules out a comparison."""
    both = f"{first.name} and {other.name}"
    reasons = []
    if first.protocol_hash != other.protocol_hash:
        hashes = " and ".join(one.protocol_hash[:12] or "none" for one in (first, other))
        reasons.append(f"{both} were scored by different protocols ({hashes})")
    for what, ours, theirs in (
        ("FROC", _lesions(first), _lesions(other)),
        ("the AUC", labels_of(first), labels_of(other)),
    ):
        odd = sorted(set(ours) ^ set(theirs))
        reasons += [f"{both} have different slides for {what}: {_listed(odd)} in one of them only"] if odd else []
        kind = "numbers of lesions" if what == "FROC" else "labels"
        reasons += _unequal(both, kind, ours, theirs)
    reasons += _unequal(both, "truth", _folded(first.truth or {}), _folded(other.truth or {}))
    return reasons + _unequal(both, "patients", _patients(first), _patients(other))


def _unequal(both: str, kind: str, ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[str]:
    """Return a sentence that names the slides whose values differ between two settings, if there are any."""
    odd = sorted(slide for slide in set(ours) & set(theirs) if ours[slide] != theirs[slide])
    return [f"{both} have different {kind} for {_listed(odd)}"] if odd else []


_SHOWN = 5


def _listed(slides: Sequence[str]) -> str:
    more = f" and {len(slides) - _SHOWN} more" if len(slides) > _SHOWN else ""
    return ", ".join(slides[:_SHOWN]) + more


def _lesions(setting: Setting) -> dict[str, tuple[int, int]]:
    return {one.slide_id.casefold(): (len(one.best), one.n_itc) for one in setting.matches}


def labels_of(setting: Setting) -> dict[str, int]:
    """Return the label of each slide that counts for the AUC, by the slide's name."""
    return {slide.casefold(): int(label) for slide, label in zip(setting.slide_ids, setting.labels, strict=True)}


def scores_of(setting: Setting) -> dict[str, float]:
    """Return the score of each slide that counts for the AUC, by the slide's name."""
    return {slide.casefold(): float(score) for slide, score in zip(setting.slide_ids, setting.scores, strict=True)}


def _patients(setting: Setting) -> dict[str, str]:
    """Return the first slide of each slide's patient, which identifies the patient whatever its number."""
    patients, first = {}, dict[int, str]()
    for case, number in zip(case_names(setting), clusters_of(setting), strict=True):
        patients[case] = first.setdefault(number, case)
    return patients


def _folded(by_slide: Mapping[str, str]) -> dict[str, str]:
    return {slide.casefold(): value for slide, value in by_slide.items()}


def case_names(setting: Setting) -> list[str]:
    """Return every case of a setting once, in an order that does not depend on the order of its slides."""
    return sorted({one.slide_id.casefold() for one in setting.matches} | {one.casefold() for one in setting.slide_ids})


def clusters_of(setting: Setting) -> list[int]:
    """Return the cluster of each case: its patient's number, or an unused number for a slide without patient."""
    given = {slide.casefold(): number for slide, number in (setting.clusters or {}).items()}
    free = max(given.values(), default=-1) + 1
    return [given.get(case, free + index) for index, case in enumerate(case_names(setting))]


def patients_of_classes(setting: Setting) -> list[set[int]]:
    """Return the patients, or slides, with normal slides, and those with tumour slides."""
    labelled = list(zip(patients_of_slides(setting), setting.labels.tolist(), strict=True))
    return [{whose for whose, label in labelled if label == kind} for kind in (0, 1)]


def patients_with_lesions(setting: Setting) -> set[int]:
    """Return the patients, or slides, with lesions that count."""
    cluster = dict(zip(case_names(setting), clusters_of(setting), strict=True))
    return {cluster[one.slide_id.casefold()] for one in setting.matches if one.n_lesions}


def matches_by_name(setting: Setting) -> list[froc.Matches]:
    """Return the slides that count for FROC in the order of their names."""
    return sorted(setting.matches, key=lambda one: one.slide_id.casefold())


def patients_of_lesions(setting: Setting) -> NDArray[np.int64]:
    """Return the patient, or the slide, of each lesion in the order of `wsiflow.evaluation.draws.lesion_weights`."""
    cluster = dict(zip(case_names(setting), clusters_of(setting), strict=True))
    ordered = matches_by_name(setting)
    return np.repeat([cluster[one.slide_id.casefold()] for one in ordered], [one.n_lesions for one in ordered])


def regions_that_count(setting: Setting) -> NDArray[np.bool_]:
    """Return which regions are lesions that count, and not isolated tumour cells; regions in the order of the names."""
    counts = [~np.isin(np.arange(len(one.best)), one.itc) for one in matches_by_name(setting)]
    return np.concatenate([np.empty(0, np.bool_), *counts])


def n_lesions(setting: Setting) -> int:
    """Return the number of lesions that count."""
    return sum(one.n_lesions for one in setting.matches)
