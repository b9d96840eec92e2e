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
for, a digest of its truth, its score and its matched confidences. Bootstrap intervals are of `comparison`.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from wsiflow.errors import EnvironmentFault, InputError, WsiflowError
from wsiflow.evaluation import froc, paired, roc
from wsiflow.evaluation.froc import LesionMask, Matches, SlideFindings
from wsiflow.evaluation.paired import Setting
from wsiflow.plan.plan import SlidePlan
from wsiflow.run.config import EvaluationParams
from wsiflow.slides import annotations, content, pyramid
from wsiflow.slides.annotations import TumourOutline
from wsiflow.slides.manifest import Case, read_manifest
from wsiflow.system import faults, publish, tables

_PADDING_M_PX = 16  # a tile of 512 px at 1/32
_MAX_MASK_PX = 2**30  # an evaluation mask beyond this comes from an outline at an impossible place


@dataclass(frozen=True, eq=False)
class Truth:
    """What is known to be in a slide.

    Attributes:
        lesions: The true regions, none in a slide without tumour.
        note: What a reader of the scores should know about them.
    """

    lesions: LesionMask
    note: str = ""


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
    matches: "Recorded"


class RecordedSlide(BaseModel, frozen=True):
    """One slide of ``matches.json``.

    Attributes:
        slide_id: Name of the slide.
        label: 1 for tumour, 0 for normal, None where it is not known.
        score: How likely the slide holds tumour.
        in_froc: Whether it counts for FROC.
        in_auc: Whether it counts for the slide AUC.
        reason: Why it does not count for something, or empty.
        truth: SHA-256 of the label and of the true regions, None where they are not known.
        best: The highest confidence that hit each region, None where none did.
        n_itc: How many of the regions are isolated tumour cells.
        itc: Which ones, from 0.
        false_positives: Confidences of the detections outside every region.
        patient: Number of its patient in this file, None where it is not known.
    """

    slide_id: str
    label: Literal[0, 1] | None
    score: FiniteFloat
    in_froc: bool
    in_auc: bool
    reason: str
    truth: str | None
    best: list[FiniteFloat | None]
    n_itc: int = Field(ge=0)
    itc: list[int]
    false_positives: list[FiniteFloat]
    patient: int | None = None


class Recorded(BaseModel, frozen=True):
    """An evaluation as ``matches.json`` keeps it.

    Attributes:
        protocol: Every rule of scoring.
        protocol_hash: SHA-256 of the protocol.
        slides: What was scored, in the order of the manifest.
    """

    protocol: dict[str, Any]
    protocol_hash: str
    slides: list[RecordedSlide]

    def truth_hash(self) -> str:
        """Return the SHA-256 of what the slides counted for and of their truth, in any order of the slides."""
        facts = [[one.slide_id.casefold(), one.label, one.in_froc, one.in_auc, one.truth] for one in self.slides]
        return publish.key_of(truth=sorted(facts, key=lambda fact: str(fact[0])))

    def setting(self, name: str) -> Setting:
        """Return it as a row of a comparison."""
        counted = [one for one in self.slides if one.in_auc]
        return Setting(
            name=name,
            matches=[_as_matches(one) for one in self.slides if one.in_froc],
            slide_ids=tuple(one.slide_id for one in counted),
            scores=np.array([one.score for one in counted], np.float64),
            labels=np.array([one.label for one in counted], np.int64),
            protocol_hash=self.protocol_hash,
            truth={one.slide_id: one.truth for one in self.slides if one.truth is not None},
            clusters={one.slide_id: one.patient for one in self.slides if one.patient is not None},
        )


class Judged(NamedTuple):
    """A slide once its mask is no longer needed: its row of the table, its record, and its patient."""

    row: dict[str, Any]
    recorded: RecordedSlide
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
    paths = _detection_files([case.slide_id for case in cases], detections)
    given = read_scores(scores) if scores is not None else {}
    if scores is not None:
        _same_slides(paths, given, "score", scores)

    def evidence(case: Case) -> Evidence:
        truth = read_truth(case, params, mask_downsample=mask_downsample)
        found = read_detections(paths[case.slide_id])
        return Evidence(case.slide_id, case.label, truth, found, given.get(case.slide_id), case.patient_id)

    judged, faults = judge_all({case.slide_id: partial(evidence, case) for case in cases}, params)
    _report(list(faults.values()))
    return evaluate_judged(list(judged.values()), params, seed=seed)


def evaluate_cases(evidence: Iterable[Evidence], params: EvaluationParams, *, seed: int) -> Scores:
    """Score slides: FROC in both modes with bootstrap intervals, and the slide AUC with its DeLong interval.

    Args:
        evidence: The slides; a generator keeps one mask at a time in memory.
        params: How detections are scored.
        seed: Seed of the bootstrap.

    Raises:
        InputError: Truth and label contradict each other, a number is not finite, or a slide appears twice.
    """
    return evaluate_judged([judge(one, params) for one in evidence], params, seed=seed)


def judge_all(
    evidence: Mapping[str, Callable[[], Evidence]], params: EvaluationParams
) -> tuple[dict[str, Judged], dict[str, WsiflowError]]:
    """Judge slides one after another, only one mask in memory at a time; one that cannot be judged costs no other.

    Args:
        evidence: What reads what a slide is scored by, by slide.
        params: How slides are scored.

    Returns:
        What was judged, and what is wrong with the others, both by slide.
    """
    judged, faults = {}, {}
    for slide_id, read in evidence.items():
        try:
            judged[slide_id] = judge(read(), params)
        except (InputError, EnvironmentFault) as error:
            faults[slide_id] = error.about(slide=slide_id, stage="evaluation")
    return judged, faults


def evaluate_judged(judged: Sequence[Judged], params: EvaluationParams, *, seed: int) -> Scores:
    """Score slides that are judged; see `evaluate_cases`."""
    recorded = Recorded(protocol=params.protocol(), protocol_hash=params.protocol_hash(), slides=_with_patients(judged))
    setting = recorded.setting("")
    return Scores(
        _froc_metrics(setting) | _roc_metrics(setting) | _intervals(setting, params.bootstrap, seed),
        [one.row for one in judged],
        {"downsample": params.downsample, "l0_um_px": params.l0_um_px, "rates": list(froc.RATES)}
        | {
            "official": _lists(froc.curve(setting.matches, mode="official")),
            "strict": _lists(froc.curve(setting.matches, mode="strict")),
        },
        _lists(roc.curve(setting.scores, setting.labels)),
        recorded,
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


def json_text(values: Mapping[str, Any]) -> str:
    """Return JSON text, null for what is not finite."""
    return json.dumps(_finite(values), indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_matches(path: Path) -> Recorded:
    """Read the ``matches.json`` of an evaluation.

    Raises:
        InputError: The file cannot be read, or is not what an evaluation writes; the first wrong entry is named.
    """
    remedy = "give the matches.json that an evaluation of this version wrote"
    try:
        found = Recorded.model_validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise faults.unreadable(error, "it", remedy, path=path) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(f"{where}: {first['msg']}", remedy, path=path) from error
    if publish.key_of(**found.protocol) != found.protocol_hash:
        raise InputError("its protocol does not have the hash it states", remedy, path=path)
    seen: set[str] = set()
    for one in found.slides:
        cause = _contradiction(one, seen)
        if cause:
            raise InputError(cause, remedy, slide=one.slide_id, path=path)
        seen.add(one.slide_id.casefold())
    return found


def planned_truth(planned: SlidePlan, case: Case, params: EvaluationParams) -> Truth | None:
    """Read a slide's true regions at the spacing and size it was planned with; see `read_truth`."""
    sized = dataclasses.replace(case, mpp=planned.um_px_l0)
    l0_size_px = (planned.frame.l0_width_px, planned.frame.l0_height_px)
    return read_truth(sized, params, l0_size_px=l0_size_px)


def read_truth(
    case: Case,
    params: EvaluationParams,
    *,
    l0_size_px: tuple[int, int] | None = None,
    mask_downsample: int | None = None,
) -> Truth | None:
    """Read a slide's true regions from its mask image, else from its outlines.

    Args:
        case: The slide; its mpp is used unless the parameters fix one.
        params: Downsample and spacing of the evaluation mask.
        l0_size_px: Width and height of the slide; None where not known: the mask then reaches as far as the outlines.
        mask_downsample: Scale at which a mask image is read; None for the evaluation's own.

    Returns:
        The regions, or None when the slide has neither mask nor annotation, or counts for nothing.

    Raises:
        InputError: A file cannot be used, or no spacing is known.
    """
    marked = _marked(case, params, l0_size_px, mask_downsample)
    return None if marked is None else Truth(_regions(marked.tumour, marked.m_um_px, params), marked.note)


def check_truth(case: Case, params: EvaluationParams, *, l0_size_px: tuple[int, int]) -> None:
    """See that a slide's truth can be scored, before any work is done for the slide.

    Args:
        case: The slide, with its mpp.
        params: How it will be scored.
        l0_size_px: Width and height of the slide.

    Raises:
        InputError: See `read_truth`; or the label contradicts the truth.
    """
    marked = _marked(case, params, l0_size_px, None)
    if marked is not None:
        path = case.mask_path or case.annotation_path
        _require_agreement(case.slide_id, case.label, found=bool(marked.tumour.any()), path=path)


class _Marked(NamedTuple):
    """What was drawn or painted: bool (rows, cols) at evaluation resolution, the side of its pixels, and a note."""

    tumour: NDArray[np.bool_]
    m_um_px: float
    note: str = ""


def _marked(
    case: Case, params: EvaluationParams, l0_size_px: tuple[int, int] | None, mask_downsample: int | None
) -> _Marked | None:
    """Read what was painted, else what was drawn; None where there is neither, or the slide counts for nothing."""
    path = case.mask_path or case.annotation_path
    if params.excluded(case.slide_id) == "all" or path is None:
        return None
    try:
        content.require_file(path, what="truth")
        if case.mask_path is not None:
            return _painted(case, case.mask_path, params, l0_size_px, mask_downsample)
        return _drawn(case, path, params, l0_size_px)
    except WsiflowError as error:
        raise error.about(slide=case.slide_id) from error


def _painted(
    case: Case,
    path: Path,
    params: EvaluationParams,
    l0_size_px: tuple[int, int] | None,
    mask_downsample: int | None,
) -> _Marked:
    values = pyramid.read_level(path, mask_downsample or params.downsample)
    if l0_size_px is not None:
        _check_size(values.shape, _slide_shape(l0_size_px, params.downsample), case)
    if case.label is None and not params.mask_tumour and values.max(initial=0) == 1:
        cause = "the mask holds only 0 and 1, which may mean tumour, or tissue in a mask of 0, 1 and 2"
        remedy = f"say in the manifest whether the slide is tumour or normal (label), or {annotations.SAY_VALUES}"
        raise InputError(cause, remedy, path=path)
    tumour = annotations.tumour_from_mask(values, path, label=case.label, named=params.mask_tumour)
    return _Marked(tumour, _m_um_px(case, params))


def _drawn(case: Case, path: Path, params: EvaluationParams, l0_size_px: tuple[int, int] | None) -> _Marked:
    outline, m_um_px = annotations.read_asap(path, l0_size_px=l0_size_px), _m_um_px(case, params)
    shape = _shape(outline, params, m_um_px, l0_size_px)
    if math.prod(shape) > _MAX_MASK_PX:
        raise InputError(f"the outlines reach {shape[1]} x {shape[0]} mask px", "give them in level-0 px", path=path)
    tumour = annotations.tumour_mask(outline, shape, downsample=params.downsample)
    if case.label is None and outline.tumour and not tumour.any():  # it would pass for normal without a word
        cause = f"{len(outline.tumour)} tumour outlines hold no pixel of the evaluation mask"
        remedy = "give them in level-0 px, or say in the manifest whether the slide is tumour or normal (label)"
        raise InputError(cause, remedy, path=path)
    note = f"outlines without area: {', '.join(outline.without_area)}" if outline.without_area else ""
    return _Marked(tumour, m_um_px, note)


def read_detections(path: Path) -> NDArray[np.float64]:
    """Read the detections of one slide.

    Args:
        path: CSV without header: ``prob,x,y``, level-0 px; may be empty.

    Returns:
        float64 (n, 3) in the order of the file.

    Raises:
        InputError: The file cannot be read, or a line is not three finite numbers; the line is named.
    """
    return np.array(
        [_numbers(line, cells, path) for line, cells in tables.read_lines(path, "it", "correct the path")], np.float64
    ).reshape(-1, 3)


def format_detections(detections: NDArray[np.float64]) -> str:
    """Return the text of a detection file.

    Coordinates are floored to whole level-0 px. Confidences are rounded to float32 and written with the digits that
    give exactly that number back: the challenge's evaluator compares float32 with what it reads, and must not see a
    difference between equal confidences. Lines come by falling confidence, then y, then x.

    Args:
        detections: float64 (n, 3): prob, x, y in level-0 px.
    """
    prob = detections[:, 0].astype(np.float32).astype(np.float64)
    x, y = np.floor(detections[:, 1:]).astype(np.int64).T
    order = np.lexsort((x, y, -prob))
    return "".join(f"{p!r},{i},{j}\n" for p, i, j in zip(*(v[order].tolist() for v in (prob, x, y)), strict=True))


def read_scores(path: Path) -> dict[str, float]:
    """Read a CSV of slide scores with the header ``slide_id,score``.

    Raises:
        InputError: The file cannot be read, has another header, a slide twice or a score that is not finite.
    """
    rows = tables.read_lines(path, "it", "correct the path")
    if not rows or [cell.strip().lower() for cell in rows[0][1]] != ["slide_id", "score"]:
        found = ",".join(rows[0][1]) if rows else ""
        raise InputError(f"the first line is {found!r}", "begin the file with slide_id,score", path=path)
    scores: dict[str, float] = {}
    for line, cells in rows[1:]:
        if len(cells) != 2 or cells[0] in scores:
            what = "a second score of one slide" if len(cells) == 2 else f"{len(cells)} cells"
            raise InputError(f"line {line}: {what}", "give a line slide_id,score per slide", path=path)
        scores[cells[0]] = _number(cells[1], line, path)
    return scores


# --- one slide


def judge(one: Evidence, params: EvaluationParams) -> Judged:
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
    recorded = RecordedSlide(
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
    return Judged(row, recorded, one.patient_id)


def _reason(out: str, label: int | None, protocol: str, *, known: bool) -> str:
    """Say why a slide does not count for something, or nothing."""
    if out == "all":
        return f"not scored: protocol {protocol} excludes it"
    if label is None:
        return "no label: not scored"
    if out == "froc":
        return f"not in FROC: protocol {protocol} excludes it"
    return "" if known else "no truth: not in FROC"


def truth_sha256(label: int | None, lesions: LesionMask | None) -> str:
    """Return the SHA-256 of a slide's label and regions; how far the mask reaches beyond them does not matter."""
    digest = hashlib.sha256(f"label {label}".encode())
    if lesions is not None and lesions.n_regions:
        box = [np.flatnonzero(lesions.labels.any(axis=axis)) for axis in (1, 0)]
        (top, bottom), (left, right) = ((int(hit[0]), int(hit[-1]) + 1) for hit in box)
        digest.update(f"at {top} {bottom} {left} {right} itc {sorted(lesions.itc)}".encode())
        digest.update(np.ascontiguousarray(lesions.labels[top:bottom, left:right], "<i4").tobytes())
    return digest.hexdigest()


def _with_patients(judged: Sequence[Judged]) -> list[RecordedSlide]:
    """Number the patients in the order in which they appear: their names stay where they are."""
    numbers: dict[str, int] = {}
    for one in judged:
        if one.patient_id:
            numbers.setdefault(one.patient_id, len(numbers))
    return [one.recorded.model_copy(update={"patient": numbers.get(one.patient_id)}) for one in judged]


def _regions(tumour: NDArray[np.bool_], m_um_px: float, params: EvaluationParams) -> LesionMask:
    return froc.evaluation_mask(tumour, m_um_px, join_um=params.join_um, itc_um=params.itc_um)


def _label(one: Evidence) -> int | None:
    """Return the label, from the truth where none is given, and refuse one that contradicts the truth."""
    if one.truth is None:
        return one.label
    found = one.truth.lesions.n_regions > 0
    _require_agreement(one.slide_id, one.label, found=found)
    return int(found)


def _require_agreement(slide_id: str, label: int | None, *, found: bool, path: Path | None = None) -> None:
    if label is None or label == int(found):
        return
    cause = f"the label says {'tumour' if label else 'normal'} and the truth holds {'' if found else 'no '}tumour"
    remedy = "correct the label, or the truth (in level-0 px, at least a mask pixel large)"
    remedy += f", or, of a mask, {annotations.SAY_VALUES}"
    raise InputError(cause, remedy, slide=slide_id, stage="evaluation", path=path or "")


def _slide_score(one: Evidence) -> float:
    """Return the score given, else the highest detection, else 0."""
    if one.score is None:
        return float(one.detections[:, 0].max(initial=0.0))
    if not math.isfinite(one.score):
        raise InputError(f"the slide score is {one.score}", "give a finite score", slide=one.slide_id, stage="roc")
    return one.score


def _m_um_px(case: Case, params: EvaluationParams) -> float:
    """Return the side of a pixel of the evaluation mask."""
    l0_um_px = params.l0_um_px or case.mpp
    if l0_um_px is None:
        remedy = "add its mpp to the manifest, or fix one spacing for all slides"
        raise InputError("the spacing is not known", remedy, slide=case.slide_id, stage="evaluation")
    return l0_um_px * params.downsample


def _slide_shape(l0_size_px: tuple[int, int], downsample: int) -> tuple[int, int]:
    """Return rows and columns of a mask of the whole slide."""
    return math.ceil(l0_size_px[1] / downsample), math.ceil(l0_size_px[0] / downsample)


def _check_size(shape: tuple[int, ...], expected: tuple[int, int], case: Case) -> None:
    """Refuse a mask of another slide or scale; masks padded to whole tiles pass.

    On a slide of a few tiles a mask of half its size lacks no more pixels than such padding adds.
    """
    if not all(_fits(a, b) for a, b in zip(shape, expected, strict=True)):
        cause = f"the mask is {shape[1]} x {shape[0]} px where the slide is {expected[1]} x {expected[0]}"
        remedy = "give the mask of this slide, with the slide's size at level 0"
        raise InputError(cause, remedy, slide=case.slide_id, path=case.mask_path)


def _fits(side: int, expected: int) -> bool:
    """Tell whether a mask's side is the slide's, to rounding, or what padding to whole tiles makes of it."""
    rounding = max(1, 0.02 * expected)
    padded = math.ceil(expected / _PADDING_M_PX) * _PADDING_M_PX
    return expected - rounding <= side <= max(padded, expected + rounding)


def _shape(
    outline: TumourOutline, params: EvaluationParams, m_um_px: float, l0_size_px: tuple[int, int] | None
) -> tuple[int, int]:
    """Return rows and columns of a mask of the slide, or of one that holds the dilated outlines."""
    if l0_size_px is not None:
        return _slide_shape(l0_size_px, params.downsample)
    margin = math.ceil(params.join_um / (2 * m_um_px)) + 2
    corners = [polygon.max(axis=0) for polygon in outline.tumour]
    x, y = np.max([(0.0, 0.0), *corners], axis=0)
    return math.ceil(y / params.downsample) + margin, math.ceil(x / params.downsample) + margin


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
    found = paired.compare([setting], reference=setting.name, n=n, seed=seed).intervals[setting.name]
    stems = {metric: "roc.auc_bootstrap" if metric == "roc.auc" else metric for metric in found}
    return {f"{stems[metric]}_ci_low": one.low for metric, one in found.items()} | {
        f"{stems[metric]}_ci_high": one.high for metric, one in found.items()
    }


# --- files


def _detection_files(slide_ids: Sequence[str], folder: Path) -> dict[str, Path]:
    """Return the detection file of every slide."""
    if not folder.is_dir():
        raise InputError("not a folder", "give the folder that holds <slide_id>.csv", path=folder)
    paths = {path.name.removesuffix(".csv"): path for path in sorted(folder.glob("*.csv")) if path.name[0] != "."}
    _same_slides(slide_ids, paths, "detection file", folder)
    return paths


def _same_slides(expected: Iterable[str], found: Iterable[str], what: str, path: Path) -> None:
    """Refuse files or lines that do not stand for exactly the slides of the manifest."""
    missing, stray = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if not (missing or stray):
        return
    parts = [f"no {what} for {', '.join(missing)}"] if missing else []
    parts += [f"a {what} for {', '.join(stray)}, which the manifest does not have"] if stray else []
    remedy = "give exactly the slides of the manifest (an empty file where nothing was found)"
    raise InputError(" and ".join(parts), remedy, path=path)


def _numbers(line: int, cells: list[str], path: Path) -> list[float]:
    """Return the three numbers of a line of detections."""
    if len(cells) != 3:
        hint = " (an index column?)" if len(cells) == 4 else ""
        cause = f"line {line} has {len(cells)} cells{hint}, expected prob,x,y"
        raise InputError(cause, "write prob,x,y without header and index", path=path)
    return [_number(cell, line, path) for cell in cells]


def _number(cell: str, line: int, path: Path) -> float:
    """Return a finite number."""
    try:
        value = float(cell)
    except ValueError as error:
        hint = " (a header?)" if line == 1 else ""
        raise InputError(f"line {line}: {cell!r} is not a number{hint}", "write numbers only", path=path) from error
    if not math.isfinite(value):
        raise InputError(f"line {line}: {cell!r} is not finite", "write finite numbers", path=path)
    return value


def _as_matches(one: RecordedSlide) -> Matches:
    best = np.array([-np.inf if value is None else value for value in one.best], np.float64)
    return Matches(one.slide_id, best, one.n_itc, np.array(one.false_positives, np.float64))


def _contradiction(one: RecordedSlide, seen: Set[str]) -> str:
    """Say what in the record of a slide cannot be, or nothing."""
    if one.slide_id.casefold() in seen:
        return "it is there twice"
    if one.in_auc and one.label is None:
        return "it counts for the slide AUC and has no label"
    if len(one.itc) != one.n_itc or not all(0 <= k < len(one.best) and one.best[k] is None for k in one.itc):
        return f"itc {one.itc} does not fit n_itc {one.n_itc} and {len(one.best)} regions"
    return ""


def _lists(curve: froc.FrocCurve | roc.RocCurve) -> dict[str, list[float]]:
    """Return a curve as lists."""
    return {name: values.tolist() for name, values in vars(curve).items()}


def _finite(value: Any) -> Any:
    """Replace what JSON has no number for by None, at any depth."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
