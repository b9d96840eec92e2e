"""Evaluate the detections of many slides against their truth: FROC, slide AUC, and a row per slide.

Input: per slide a CSV of detections, a label and, for tumour, outlines or a mask image; optionally a CSV of
slide scores. Output: metrics by name, a row per slide, and the curves, as values and as the texts of their files.

A detection file has a line ``prob,x,y`` per detection, in level-0 px and without header. It exists for every slide and
is empty where nothing was detected, since FROC divides by the number of slides. The score of a slide is the given one,
else its highest confidence, else 0. A tumour slide without outlines or mask counts for the slide AUC only, like the one
incompletely annotated test slide of CAMELYON16. A slide with a label on which no tissue was found counts for neither,
unless the protocol says otherwise: its score of 0 would be that of the tissue mask. A slide without label and truth
counts for neither, and so does a slide that the protocol excludes by name. The rows of the slides state all of this. A
metric that is not defined, such as the AUC where all slides are tumour slides, is NaN, and null in JSON. What is
doubtful about received detections is in the rows of their slides and in the remarks, see `wsiflow.evaluation.received`.

``findings.json`` says what became of each detection and region, with outlines, for whoever looks at the slides.
``matches.json`` is what two evaluations are compared by: the protocol and its hash, and for every slide what it counts
for, a hash of its truth, its score and its matched confidences. `wsiflow.evaluation.paired` computes the bootstrap
intervals.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import EnvironmentFault, InputError, WsiflowError
from wsiflow.evaluation import findings, froc, further, missed, paired, received, roc
from wsiflow.evaluation.detections import detection_files, read_scores, require_same_slides
from wsiflow.evaluation.froc import SlideFindings
from wsiflow.evaluation.matches import EvaluationRecord, SlideRecord
from wsiflow.evaluation.missed import LookedAt, View, look_back
from wsiflow.evaluation.protocol import EvaluationParams
from wsiflow.evaluation.received import Unit
from wsiflow.evaluation.setting import Setting, patients
from wsiflow.evaluation.truth import Truth, read_truth, require_agreement, stated, truth_sha256
from wsiflow.slides.manifest import Case, read_manifest
from wsiflow.system import publish, tables
from wsiflow.system.tables import json_text

NO_TISSUE = "no tissue was found"
"""The reason of a slide on which nothing was looked at."""

NO_TISSUE_REMEDY = (
    "look at tissue/<slide>.png; then look everywhere (tissue=all), give its tissue (tissue=given), or leave such "
    "slides out (evaluation.no_tissue=leave_out), in another out= folder"
)


@dataclass(frozen=True, eq=False)
class Evidence:
    """The evidence by which a slide is scored: its label, truth, detections and score.

    Attributes:
        slide_id: Name of the slide.
        label: 1 for tumour, 0 for normal, None where the label follows from the truth.
        truth: Annotated regions, or None where they are not known.
        detections: float64 (n, 3): prob, x, y in level-0 px.
        score: Slide score, higher means more likely tumour; None for the highest confidence, or 0 without detections.
        patient_id: Slides of one patient are resampled together; empty where the patient is not known.
        note: What is doubtful about the detections, for the row of the slide.
        is_empty: Whether no tissue was found on the slide, so that nothing was looked at.
        view: How the slide was looked at; None where this is not known.
    """

    slide_id: str
    label: int | None
    truth: Truth | None
    detections: NDArray[np.float64]
    score: float | None = None
    patient_id: str = ""
    note: str = ""
    is_empty: bool = False
    view: View | None = None


@dataclass(frozen=True, eq=False)
class Scores:
    """The results of an evaluation.

    Attributes:
        metrics: Every metric by name; NaN where it is not defined.
        cases: A row per slide, the content of ``cases.csv``.
        froc: Both FROC curves and their parameters, as JSON values.
        roc: The ROC curve, as JSON values.
        matches: The record of the evaluation, the content of ``matches.json``.
        findings: What became of each slide's detections and regions, the content of ``findings.json`` by slide id.
        remarks: What is doubtful about the detections and the scores, as sentences.
    """

    metrics: dict[str, float]
    cases: list[dict[str, Any]]
    froc: dict[str, Any]
    roc: dict[str, Any]
    matches: "EvaluationRecord"
    findings: dict[str, dict[str, Any]]
    remarks: tuple[str, ...] = ()


class MatchedSlide(NamedTuple):
    """A slide after matching, without its mask.

    Attributes:
        row: Its row of ``cases.csv``.
        record: Its record in ``matches.json``.
        patient_id: Its patient.
        findings: What became of its detections and regions, see `wsiflow.evaluation.findings.describe`.
        looked_at: How much of its lesions was looked at; None where it has none, or this is not known.
        is_empty: Whether no tissue was found on it although it has a label.
    """

    row: dict[str, Any]
    record: SlideRecord
    patient_id: str
    findings: dict[str, Any]
    looked_at: LookedAt | None = None
    is_empty: bool = False


class Existing(NamedTuple):
    """Files of detections that any program wrote, and the manifest that they are scored against.

    Attributes:
        manifest: CSV with slide_id and label, annotation or mask.
        detections: Folder with one ``<slide_id>.csv`` per slide.
        scores: CSV with the header ``slide_id,score``; None where the highest confidence is the slide's score.
        mask_downsample: See `evaluate_folder`.
        unit: See `evaluate_folder`.
    """

    manifest: Path
    detections: Path
    scores: Path | None
    mask_downsample: int | None
    unit: Unit = "px"


def evaluate_existing(existing: Existing, params: EvaluationParams, *, seed: int, out: Path) -> Scores:
    """Score files of detections and write the files of the evaluation to ``out``.

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
        unit=existing.unit,
    )
    for name, text in documents(scores).items():
        publish.write_view(out, name, text.encode())
    return scores


def evaluate_folder(  # noqa: PLR0913  these are the options of the command
    cases: Sequence[Case],
    detections: Path,
    params: EvaluationParams,
    *,
    seed: int,
    scores: Path | None = None,
    mask_downsample: int | None = None,
    unit: Unit = "px",
) -> Scores:
    """Score a folder of detections against a manifest.

    Args:
        cases: The slides of the manifest, with label, annotation or mask, and spacing. A slide that is there is opened
            for its size and spacing; no pixel is read.
        detections: Folder with one ``<slide_id>.csv`` per slide of the manifest and no other CSV.
        params: How detections are scored.
        seed: Seed of the bootstrap.
        scores: CSV with the header ``slide_id,score``, or None.
        mask_downsample: Downsample at which mask images are read: None for that of the evaluation, 1 for mask images
            that are already at evaluation resolution.
        unit: What coordinates are in: ``px`` of level 0, or ``um`` from its corner.

    Raises:
        InputError: A slide has no detections or no score, or a file belongs to no slide (the message lists all); a file
            cannot be used; a spacing is missing; or truth and label contradict each other.
    """
    paths = detection_files([case.slide_id for case in cases], detections)
    given = read_scores(scores) if scores is not None else {}
    if scores is not None:
        require_same_slides(paths, given, "score", scores)

    doubts, remarks = received.Doubts(params.downsample), list[str]()

    def evidence(case: Case) -> Evidence:
        place, um_px = stated(case)
        sized = replace(case, mpp=case.mpp or um_px)
        truth = read_truth(sized, params, l0_size_px=place.l0_size_px, mask_downsample=mask_downsample, place=place)
        slide = received.SlideExtent.of(sized, params, place.l0_size_px, truth)
        own = received.read_received(paths[case.slide_id], slide, unit)
        doubts.add(own.detections, slide, truth)
        note = "; ".join(own.remarks)
        told = filter(None, (truth.note if truth is not None else "", note))
        remarks.extend(f"slide {case.slide_id}: {one}" for one in told)
        return Evidence(
            case.slide_id, case.label, truth, own.detections, given.get(case.slide_id), case.patient_id, note
        )

    matched, faults = match_slides({case.slide_id: partial(evidence, case) for case in cases}, params)
    _raise_faults(faults, {case.slide_id: case.line for case in cases})
    result = evaluate_matched(list(matched.values()), params, seed=seed)
    return replace(result, remarks=(*remarks, *doubts.remarks(), *_undefined(result.metrics)))


def _undefined(metrics: Mapping[str, float]) -> list[str]:
    """Return why scores are not defined."""
    reasons = []
    if math.isnan(metrics["froc.score"]):
        what = "no slide counts for it" if not metrics["froc.n_slides"] else "no slide has an annotated lesion"
        if metrics["froc.n_itc"]:
            what += " that is larger than isolated tumour cells"
        reasons.append(f"froc.score is not defined: {what}")
    if math.isnan(metrics["roc.auc"]):
        missing = [kind for kind in ("tumour", "normal") if not metrics[f"roc.n_{kind}"]]
        reasons.append(f"roc.auc is not defined: there is no {' and no '.join(missing)} slide")
    return reasons


def evaluate_cases(evidence: Iterable[Evidence], params: EvaluationParams, *, seed: int) -> Scores:
    """Score slides: FROC in both modes with bootstrap intervals, and the slide AUC with its DeLong interval.

    Args:
        evidence: The slides; with a generator only one mask at a time is in memory.
        params: How detections are scored.
        seed: Seed of the bootstrap.

    Raises:
        InputError: Truth and label contradict each other, a confidence or score is outside 0 to 1, or a slide appears
            twice.
    """
    return evaluate_matched([match_slide(one, params) for one in evidence], params, seed=seed)


def match_slides(
    evidence: Mapping[str, Callable[[], Evidence]], params: EvaluationParams
) -> tuple[dict[str, MatchedSlide], dict[str, WsiflowError]]:
    """Match slides one after another; a fault of one slide does not stop the others.

    Args:
        evidence: For each slide id a function that reads the slide's evidence, so that one mask at a time is in memory.
        params: How slides are scored.

    Returns:
        The matched slides, and the faults of the slides that cannot be matched, both by slide id.
    """
    matched, faults = {}, {}
    for slide_id, read in evidence.items():
        try:
            matched[slide_id] = match_slide(read(), params)
        except (InputError, EnvironmentFault) as error:
            faults[slide_id] = error.about(slide=slide_id, stage="evaluation")
    return matched, faults


def evaluate_matched(matched: Sequence[MatchedSlide], params: EvaluationParams, *, seed: int) -> Scores:
    """Compute metrics, curves and records of matched slides; see `evaluate_cases`."""
    record = EvaluationRecord(
        protocol=params.protocol(), protocol_hash=params.protocol_hash(), slides=_with_patients(matched)
    )
    setting = record.setting("")
    return Scores(
        _froc_metrics(setting)
        | _roc_metrics(setting)
        | _intervals(setting, params.bootstrap, seed)
        | _tissue_metrics(matched)
        | _further(setting, params, seed),
        [one.row for one in matched],
        {"downsample": params.downsample, "l0_um_px": params.l0_um_px, "rates": list(froc.RATES)}
        | {
            "official": _lists(froc.curve(setting.matches, mode="official")),
            "strict": _lists(froc.curve(setting.matches, mode="strict")),
        },
        _lists(roc.curve(setting.scores, setting.labels)),
        record,
        {one.record.slide_id: one.findings for one in matched},
    )


def documents(scores: Scores) -> dict[str, str]:
    """Return the texts of the evaluation's files by name; NaN and infinity are null in JSON."""
    return {
        "summary.json": json_text(scores.metrics),
        "cases.csv": tables.csv_text(scores.cases, None if scores.cases else ["slide_id"]),
        "froc.json": json_text(scores.froc),
        "roc.json": json_text(scores.roc),
        "matches.json": json.dumps(scores.matches.model_dump(mode="json"), sort_keys=True, allow_nan=False) + "\n",
        "findings.json": json.dumps(scores.findings, separators=(",", ":"), allow_nan=False) + "\n",
    }


# --- one slide


def match_slide(one: Evidence, params: EvaluationParams) -> MatchedSlide:
    """Match a slide's detections with its truth, and decide whether it counts for FROC and for the AUC.

    Raises:
        InputError: Truth and label contradict each other, or a confidence or score is outside 0 to 1.
    """
    out = params.excluded(one.slide_id)
    label = one.label if out == "all" else _label(one)  # an excluded slide may contradict its truth
    lesions = one.truth.lesions if one.truth is not None and label == 1 else None
    known = lesions is not None or label == 0
    is_empty = one.is_empty and label is not None and out != "all"
    if is_empty and params.no_tissue == "fail":
        raise InputError(NO_TISSUE, NO_TISSUE_REMEDY, slide=one.slide_id, stage="evaluation")
    is_left_out = is_empty and params.no_tissue == "leave_out"
    in_froc = known and not out and not is_left_out
    in_auc = label is not None and out != "all" and not is_left_out
    ignored = one.truth.ignored if one.truth is not None else None
    slide = SlideFindings(one.slide_id, lesions, one.detections, params.downsample, ignored)
    matches = froc.match(slide)
    reason = f"{NO_TISSUE}: not scored" if is_left_out else _reason(out, label, params.name, known=known)
    notes = [
        one.truth.note if one.truth is not None else "",
        one.note,
        f"{matches.n_ignored} detections in ignored regions" if in_froc and matches.n_ignored else "",
        f"{NO_TISSUE}: it counts with the score 0" if is_empty and not is_left_out else "",
        reason,
    ]
    looked_at = None
    if one.view is not None and one.truth is not None and lesions is not None and out != "all":
        looked_at = look_back(
            lesions,
            one.truth.tumour,
            matches.best,
            one.view,
            downsample=params.downsample,
            m_um_px=one.truth.m_um_px,
        )
    score = _slide_score(one)
    row = {
        "slide_id": one.slide_id,
        "label": "" if label is None else label,
        "score": "" if is_left_out else score,
        "n_detections": len(one.detections),
        "n_lesions": matches.n_lesions if in_froc else "",
        "n_itc": matches.n_itc if in_froc else "",
        "n_found": int((matches.best > -np.inf).sum()) if in_froc else "",
        "n_false_positives": len(matches.false_positives) if in_froc else "",
        **(_looked_at_cells(looked_at) if one.view is not None else {}),
        "note": "; ".join(note for note in notes if note),
    }
    record = SlideRecord(
        slide_id=one.slide_id,
        label=label,
        score=score,
        in_froc=in_froc,
        in_auc=in_auc,
        reason=reason,
        truth=truth_sha256(label, lesions, ignored) if known and out != "all" else None,
        best=_known(matches.best) if in_froc else [],
        n_itc=matches.n_itc if in_froc else 0,
        itc=list(matches.itc) if in_froc else [],
        itc_best=_known(matches.any_best[list(matches.itc)]) if in_froc and matches.any_best is not None else [],
        major_axis_um=matches.major_axis_um.tolist() if in_froc and matches.major_axis_um is not None else [],
        false_positives=matches.false_positives.tolist() if in_froc else [],
    )
    annotated, drawn = (one.truth.tumour, one.truth.drawn) if one.truth is not None else (None, None)
    missed_for = looked_at.missed if looked_at is not None else {}
    shown = findings.describe(findings.Regions(slide, annotated, missed_for, drawn), counts=in_froc)
    return MatchedSlide(row, record, one.patient_id, shown, looked_at, is_empty)


def _looked_at_cells(looked_at: LookedAt | None) -> dict[str, Any]:
    """Return the cells of ``cases.csv`` that say what of a slide's lesions was looked at, and why some were missed."""
    if looked_at is None:
        return {"n_looked_at": "", "lesion_recall": "", "lesion_recall_area": "", "missed": ""}
    n_lesions, area_um2 = looked_at.n_lesions, looked_at.area_um2
    return {
        "n_looked_at": looked_at.n_looked_at,
        "lesion_recall": round(looked_at.n_looked_at / n_lesions, 6) if n_lesions else "",
        "lesion_recall_area": round(looked_at.area_looked_at_um2 / area_um2, 6) if area_um2 else "",
        "missed": missed.text(looked_at.missed),
    }


def _known(best: NDArray[np.float64]) -> list[float | None]:
    """Return confidences as JSON values: None for a missed region."""
    return [one if one > -np.inf else None for one in best.tolist()]


def _reason(out: str, label: int | None, protocol: str, *, known: bool) -> str:
    """Return the reason why a slide does not count for FROC or the AUC; empty where it counts for both."""
    if out == "all":
        return f"not scored: protocol {protocol} excludes it"
    if label is None:
        return "no label: not scored"
    if out == "froc":
        return f"not in FROC: protocol {protocol} excludes it"
    return "" if known else "no truth: not in FROC"


def _with_patients(matched: Sequence[MatchedSlide]) -> list[SlideRecord]:
    """Return the records with patients as numbers in order of appearance: names of patients are not published."""
    numbers: dict[str, int] = {}
    for one in matched:
        if one.patient_id:
            numbers.setdefault(one.patient_id, len(numbers))
    return [one.record.model_copy(update={"patient": numbers.get(one.patient_id)}) for one in matched]


def _label(one: Evidence) -> int | None:
    """Return the label, from the truth where none is given.

    Raises:
        InputError: The given label contradicts the truth.
    """
    if one.truth is None:
        return one.label
    has_tumour = one.truth.lesions.n_regions > 0
    require_agreement(one.slide_id, one.label, has_tumour=has_tumour)
    return int(has_tumour)


def _slide_score(one: Evidence) -> float:
    """Return the given score, else the highest confidence, else 0."""
    if one.score is None:
        return float(one.detections[:, 0].max(initial=0.0))
    if not 0 <= one.score <= 1:
        remedy = "give scores from 0 to 1 (of logits their sigmoid)"
        raise InputError(f"the slide score is {one.score}", remedy, slide=one.slide_id, stage="roc")
    return one.score


# --- all slides


def _tissue_metrics(matched: Sequence[MatchedSlide]) -> dict[str, float]:
    """Return how much of all lesions was looked at, and on how many slides no tissue was found.

    Nothing is returned where it is not known of any slide what was looked at.
    """
    if not any("missed" in one.row for one in matched):
        return {}
    known = [one.looked_at for one in matched if one.looked_at is not None]
    n_lesions, area_um2 = sum(one.n_lesions for one in known), sum(one.area_um2 for one in known)
    looked_at, seen_um2 = sum(one.n_looked_at for one in known), sum(one.area_looked_at_um2 for one in known)
    return {
        "tissue.lesion_recall": looked_at / n_lesions if n_lesions else math.nan,
        "tissue.lesion_recall_area": seen_um2 / area_um2 if area_um2 else math.nan,
        "tissue.n_lesions_not_looked_at": float(n_lesions - looked_at),
        "tissue.n_slides_empty": float(sum(one.is_empty for one in matched)),
    }


def _raise_faults(faults: Mapping[str, WsiflowError], lines: Mapping[str, int]) -> None:
    """Raise the faults of all slides as one error, with the lines of the manifest; return where there is none."""
    if len(faults) == 1:
        raise next(iter(faults.values()))
    if faults:
        messages = " | ".join(f"line {lines[slide_id]}: {fault}" for slide_id, fault in faults.items())
        raise InputError(f"{len(faults)} slides cannot be scored: {messages}", "fix all of them and run again")


def _froc_metrics(setting: Setting) -> dict[str, float]:
    """Return the FROC metrics of both modes."""
    return froc.score(setting.matches, mode="official") | froc.score(setting.matches, mode="strict")


def _roc_metrics(setting: Setting) -> dict[str, float]:
    """Return the AUC, its DeLong interval, the variance that it has with independent slides, and their numbers."""
    low, high = roc.auc_interval(setting.scores, setting.labels, patients(setting))
    return {
        "roc.auc": roc.auc(setting.scores, setting.labels),
        "roc.auc_ci_low": low,
        "roc.auc_ci_high": high,
        "roc.auc_variance": roc.delong_variance(setting.scores, setting.labels),
        "roc.n_tumour": float((setting.labels == 1).sum()),
        "roc.n_normal": float((setting.labels == 0).sum()),
    }


def _intervals(setting: Setting, n: int, seed: int) -> dict[str, float]:
    """Return the low and high ends of all bootstrap intervals by metric name, from one set of draws."""
    intervals = paired.bootstrap([setting], reference=setting.name, n=n, seed=seed).intervals[setting.name]
    del intervals["roc.auc"]  # `_roc_metrics` has it
    return {f"{metric}_ci_low": one.low for metric, one in intervals.items()} | {
        f"{metric}_ci_high": one.high for metric, one in intervals.items()
    }


def _further(setting: Setting, params: EvaluationParams, seed: int) -> dict[str, float]:
    """Return average precision, sensitivities by size and at specificities, with intervals, and the sizes' numbers."""
    found = further.further_measures(setting, n=params.bootstrap, seed=seed, join_um=params.join_um)
    metrics: dict[str, float] = {}
    for metric, one in found.intervals.items():
        metrics |= {metric: one.value, f"{metric}_ci_low": one.low, f"{metric}_ci_high": one.high}
    return metrics | {f"froc.n_{size}": float(n) for size, n in found.n_lesions.items()}


# --- files


def _lists(curve: froc.FrocCurve | roc.RocCurve) -> dict[str, list[float]]:
    """Return the arrays of a curve as lists by name, for JSON."""
    return {name: values.tolist() for name, values in vars(curve).items()}
