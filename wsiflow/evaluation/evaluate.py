"""Evaluation: detections and truth of many slides, read, scored and told.

Input: per slide a CSV of detections, a label and, for tumour, outlines (ASAP XML) or a mask image; perhaps a CSV of
slide scores. Output: metrics by name, a row per slide, and the curves, as values and as the texts of their files.

A detection file has a line ``prob,x,y`` per detection, level-0 px, no header, and exists for every slide, empty where
nothing was found: FROC divides by the number of slides. A slide's score is the one given, else its highest detection,
else 0. A tumour slide without outlines or mask counts for the slide AUC alone, as the one incompletely annotated test
slide of CAMELYON16 does; a slide without label and truth counts for neither, nor does one that the protocol leaves out
by name. All are told in their rows. A metric that does not exist, such as the AUC of tumour slides only, is NaN, and
null in JSON.

``matches.json`` is what two evaluations are compared by: the protocol and its hash, and for every slide what it counted
for, a digest of its truth, its score and its matched confidences. Bootstrap intervals are of
`wsiflow.evaluation.paired`.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import EnvironmentFault, InputError, WsiflowError
from wsiflow.evaluation import froc, paired, roc
from wsiflow.evaluation.detections import detection_files, read_detections, read_scores, require_same_slides
from wsiflow.evaluation.froc import SlideFindings
from wsiflow.evaluation.matches import EvaluationRecord, SlideRecord
from wsiflow.evaluation.paired import Setting
from wsiflow.evaluation.protocol import EvaluationParams
from wsiflow.evaluation.truth import Truth, read_truth, require_agreement, truth_sha256
from wsiflow.slides.manifest import Case, read_manifest
from wsiflow.system import publish, tables
from wsiflow.system.tables import json_text


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a slide is scored by.

    Attributes:
        slide_id: Name of the slide.
        label: 1 for tumour, 0 for normal, None where only the truth tells.
        truth: Its true regions, or None where they are not known.
        detections: float64 (n, 3): prob, x, y in level-0 px.
        score: How likely the slide holds tumour; None: its highest detection, or 0.
        patient_id: Slides of one patient are resampled together; empty: the slide is by itself.
    """

    slide_id: str
    label: int | None
    truth: Truth | None
    detections: NDArray[np.float64]
    score: float | None = None
    patient_id: str = ""


@dataclass(frozen=True, eq=False)
class Scores:
    """What an evaluation found.

    Attributes:
        metrics: Every number by metric name; NaN where it does not exist.
        cases: A row per slide.
        froc: Both FROC curves and their settings, JSON values.
        roc: The ROC curve, JSON values.
        matches: What the evaluation is compared by.
    """

    metrics: dict[str, float]
    cases: list[dict[str, Any]]
    froc: dict[str, Any]
    roc: dict[str, Any]
    matches: "EvaluationRecord"


class MatchedSlide(NamedTuple):
    """A slide once its mask is no longer needed: its row of the table, its record, and its patient."""

    row: dict[str, Any]
    record: SlideRecord
    patient_id: str


class Existing(NamedTuple):
    """Detections that lie on the disk, and what they are scored against.

    Attributes:
        manifest: CSV with slide_id and label, annotation or mask.
        detections: Folder with one ``<slide_id>.csv`` per slide.
        scores: CSV with the header ``slide_id,score``, or None: the highest detection counts.
        mask_downsample: See `evaluate_folder`.
    """

    manifest: Path
    detections: Path
    scores: Path | None
    mask_downsample: int | None


def evaluate_existing(existing: Existing, params: EvaluationParams, *, seed: int, out: Path) -> Scores:
    """Score detections that lie on the disk and write the files of the evaluation to ``out``.

    Raises:
        InputError: See `evaluate_folder`; or the manifest cannot be used.
        EnvironmentFault: ``out`` cannot be written.
    """
    publish.preflight(out)
    scores = evaluate_folder(
        read_manifest(existing.manifest),
        existing.detections,
        params,
        seed=seed,
        scores=existing.scores,
        mask_downsample=existing.mask_downsample,
    )
    for name, text in documents(scores).items():
        publish.write_view(out, name, text.encode())
    return scores


def evaluate_folder(
    cases: Sequence[Case],
    detections: Path,
    params: EvaluationParams,
    *,
    seed: int,
    scores: Path | None = None,
    mask_downsample: int | None = None,
) -> Scores:
    """Score a folder of detections against a manifest.

    Args:
        cases: The slides of the manifest: label, annotation or mask, spacing. No slide file is opened.
        detections: Folder with one ``<slide_id>.csv`` per slide of the manifest and no other CSV.
        params: How detections are scored.
        seed: Seed of the bootstrap.
        scores: CSV with the header ``slide_id,score``, or None.
        mask_downsample: Scale at which mask images are read: None for the evaluation's, 1 for mask images that are
            already at evaluation resolution.

    Raises:
        InputError: A slide has no detections or no score, or a file has no slide (all are listed); a file cannot be
            used; a spacing is missing; truth and label contradict each other.
    """
    paths = detection_files([case.slide_id for case in cases], detections)
    given = read_scores(scores) if scores is not None else {}
    if scores is not None:
        require_same_slides(paths, given, "score", scores)

    def evidence(case: Case) -> Evidence:
        truth = read_truth(case, params, mask_downsample=mask_downsample)
        found = read_detections(paths[case.slide_id])
        return Evidence(case.slide_id, case.label, truth, found, given.get(case.slide_id), case.patient_id)

    matched, faults = match_slides({case.slide_id: partial(evidence, case) for case in cases}, params)
    _report(list(faults.values()))
    return evaluate_matched(list(matched.values()), params, seed=seed)


def evaluate_cases(evidence: Iterable[Evidence], params: EvaluationParams, *, seed: int) -> Scores:
    """Score slides: FROC in both modes with bootstrap intervals, and the slide AUC with its DeLong interval.

    Args:
        evidence: The slides; a generator keeps one mask at a time in memory.
        params: How detections are scored.
        seed: Seed of the bootstrap.

    Raises:
        InputError: Truth and label contradict each other, a number is not finite, or a slide appears twice.
    """
    return evaluate_matched([match_slide(one, params) for one in evidence], params, seed=seed)


def match_slides(
    evidence: Mapping[str, Callable[[], Evidence]], params: EvaluationParams
) -> tuple[dict[str, MatchedSlide], dict[str, WsiflowError]]:
    """Judge slides one after another, only one mask in memory at a time; one that cannot be matched costs no other.

    Args:
        evidence: What reads what a slide is scored by, by slide.
        params: How slides are scored.

    Returns:
        What was matched, and what is wrong with the others, both by slide.
    """
    matched, faults = {}, {}
    for slide_id, read in evidence.items():
        try:
            matched[slide_id] = match_slide(read(), params)
        except (InputError, EnvironmentFault) as error:
            faults[slide_id] = error.about(slide=slide_id, stage="evaluation")
    return matched, faults


def evaluate_matched(matched: Sequence[MatchedSlide], params: EvaluationParams, *, seed: int) -> Scores:
    """Score slides that are matched; see `evaluate_cases`."""
    record = EvaluationRecord(
        protocol=params.protocol(), protocol_hash=params.protocol_hash(), slides=_with_patients(matched)
    )
    setting = record.setting("")
    return Scores(
        _froc_metrics(setting) | _roc_metrics(setting) | _intervals(setting, params.bootstrap, seed),
        [one.row for one in matched],
        {"downsample": params.downsample, "l0_um_px": params.l0_um_px, "rates": list(froc.RATES)}
        | {
            "official": _lists(froc.curve(setting.matches, mode="official")),
            "strict": _lists(froc.curve(setting.matches, mode="strict")),
        },
        _lists(roc.curve(setting.scores, setting.labels)),
        record,
    )


def documents(scores: Scores) -> dict[str, str]:
    """Return the files of an evaluation, text by name; NaN and infinity are null."""
    return {
        "summary.json": json_text(scores.metrics),
        "cases.csv": tables.csv_text(scores.cases, None if scores.cases else ["slide_id"]),
        "froc.json": json_text(scores.froc),
        "roc.json": json_text(scores.roc),
        "matches.json": json.dumps(scores.matches.model_dump(mode="json"), sort_keys=True, allow_nan=False) + "\n",
    }


# --- one slide


def match_slide(one: Evidence, params: EvaluationParams) -> MatchedSlide:
    """Match a slide's detections with its truth and say what it counts for.

    Raises:
        InputError: Truth and label contradict each other, or a number is not finite.
    """
    out = params.excluded(one.slide_id)
    label = one.label if out == "all" else _label(one)  # of a slide that counts for nothing nothing has to fit
    lesions = one.truth.lesions if one.truth is not None and label == 1 else None
    known = lesions is not None or label == 0
    in_froc, in_auc = known and not out, label is not None and out != "all"
    matches = froc.match(SlideFindings(one.slide_id, lesions, one.detections, params.downsample))
    reason = _reason(out, label, params.name, known=known)
    notes = [one.truth.note if one.truth is not None else "", reason]
    row = {
        "slide_id": one.slide_id,
        "label": "" if label is None else label,
        "score": _slide_score(one),
        "n_detections": len(one.detections),
        "n_lesions": matches.n_lesions if in_froc else "",
        "n_itc": matches.n_itc if in_froc else "",
        "n_found": int((matches.best > -np.inf).sum()) if in_froc else "",
        "n_false_positives": len(matches.false_positives) if in_froc else "",
        "note": "; ".join(note for note in notes if note),
    }
    record = SlideRecord(
        slide_id=one.slide_id,
        label=label,
        score=row["score"],
        in_froc=in_froc,
        in_auc=in_auc,
        reason=reason,
        truth=truth_sha256(label, lesions) if known and out != "all" else None,
        best=[best if best > -np.inf else None for best in matches.best.tolist()] if in_froc else [],
        n_itc=matches.n_itc if in_froc else 0,
        itc=sorted(k - 1 for k in lesions.itc) if in_froc and lesions is not None else [],
        false_positives=matches.false_positives.tolist() if in_froc else [],
    )
    return MatchedSlide(row, record, one.patient_id)


def _reason(out: str, label: int | None, protocol: str, *, known: bool) -> str:
    """Say why a slide does not count for something, or nothing."""
    if out == "all":
        return f"not scored: protocol {protocol} excludes it"
    if label is None:
        return "no label: not scored"
    if out == "froc":
        return f"not in FROC: protocol {protocol} excludes it"
    return "" if known else "no truth: not in FROC"


def _with_patients(matched: Sequence[MatchedSlide]) -> list[SlideRecord]:
    """Number the patients in the order in which they appear: their names stay where they are."""
    numbers: dict[str, int] = {}
    for one in matched:
        if one.patient_id:
            numbers.setdefault(one.patient_id, len(numbers))
    return [one.record.model_copy(update={"patient": numbers.get(one.patient_id)}) for one in matched]


def _label(one: Evidence) -> int | None:
    """Return the label, from the truth where none is given, and refuse one that contradicts the truth."""
    if one.truth is None:
        return one.label
    found = one.truth.lesions.n_regions > 0
    require_agreement(one.slide_id, one.label, found=found)
    return int(found)


def _slide_score(one: Evidence) -> float:
    """Return the score given, else the highest detection, else 0."""
    if one.score is None:
        return float(one.detections[:, 0].max(initial=0.0))
    if not math.isfinite(one.score):
        raise InputError(f"the slide score is {one.score}", "give a finite score", slide=one.slide_id, stage="roc")
    return one.score


# --- all slides


def _report(faults: Sequence[WsiflowError]) -> None:
    """Raise what is wrong, all of it at once."""
    if len(faults) == 1:
        raise faults[0]
    if faults:
        told = " | ".join(str(fault) for fault in faults)
        raise InputError(f"{len(faults)} slides cannot be scored: {told}", "mend all of them, then run again")


def _froc_metrics(setting: Setting) -> dict[str, float]:
    """Return the FROC metrics of both modes."""
    return froc.score(setting.matches, mode="official") | froc.score(setting.matches, mode="strict")


def _roc_metrics(setting: Setting) -> dict[str, float]:
    """Return the ROC metrics."""
    low, high = roc.auc_interval(setting.scores, setting.labels)
    return {
        "roc.auc": roc.auc(setting.scores, setting.labels),
        "roc.auc_ci_low": low,
        "roc.auc_ci_high": high,
        "roc.auc_variance": roc.delong_variance(setting.scores, setting.labels),
        "roc.n_tumour": float((setting.labels == 1).sum()),
        "roc.n_normal": float((setting.labels == 0).sum()),
    }


def _intervals(setting: Setting, n: int, seed: int) -> dict[str, float]:
    """Return the bootstrap intervals of all metrics, from one set of draws."""
    found = paired.bootstrap([setting], reference=setting.name, n=n, seed=seed).intervals[setting.name]
    stems = {metric: "roc.auc_bootstrap" if metric == "roc.auc" else metric for metric in found}
    return {f"{stems[metric]}_ci_low": one.low for metric, one in found.items()} | {
        f"{stems[metric]}_ci_high": one.high for metric, one in found.items()
    }


# --- files


def _lists(curve: froc.FrocCurve | roc.RocCurve) -> dict[str, list[float]]:
    """Return a curve as lists."""
    return {name: values.tolist() for name, values in vars(curve).items()}
