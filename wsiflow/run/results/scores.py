"""Score a run: match its slides, publish the scores under a key of their own, and show the latest ones."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import IntegrityError, WsiflowError
from wsiflow.evaluation import evaluate, missed
from wsiflow.evaluation.detections import read_detections
from wsiflow.evaluation.truth import as_truth, planned_marks, share_of_tissue
from wsiflow.heatmap import files
from wsiflow.plan import cascade
from wsiflow.plan.slide_plan import SlidePlan, read_cut, tissue_grid
from wsiflow.run.cases import read_cases
from wsiflow.run.config import RunConfig
from wsiflow.run.plan import Plan
from wsiflow.run.results import report
from wsiflow.run.results.status import FORMER, Status
from wsiflow.run.stages import detect, ingest, stitch
from wsiflow.run.stages.stage import Stage
from wsiflow.slides.manifest import Case
from wsiflow.system import publish, tables
from wsiflow.system.faults import unreadable
from wsiflow.system.provenance import facts


class PublishedScores(NamedTuple):
    """The key of published scores (of settings, detections and truth), and the folder of their files."""

    key: str
    folder: Path


class ScoringInput(NamedTuple):
    """The slides to score.

    Attributes:
        key: Hash of settings, detections and truth of the slides that can be scored.
        slides: The matched slides; None where the scores are published already.
        faults: Faults of the slides that cannot be scored, by slide id.
    """

    key: str
    slides: list[evaluate.MatchedSlide] | None
    faults: Mapping[str, WsiflowError]


_SCORES = ("scores.json", "cases.csv", "froc.json", "roc.json", "matches.json", "findings.json", "froc.png", "roc.png")


def prepare_scoring(root: Path, config: RunConfig, plan: Plan, statuses: Sequence[Status]) -> ScoringInput:
    """Match the slides that have results with their truth, unless their scores are published already.

    The key of scores depends on detections and truth: an added slide or a corrected outline leads to other scores under
    another key, and earlier scores stay as they are. A truth that can no longer be read fails its own slide only.

    Args:
        root: The run's folder.
        config: The run's configuration.
        plan: The run's plan.
        statuses: Status of every slide.
    """
    cases = {case.slide_id: case for case in read_cases(publish.generations(root, "cases.json")[-1])[1]}
    good = {status.slide_id for status in statuses if not status.exit_code}
    planned = {one.slide_id: i for i, one in enumerate(plan.slides) if one.slide_id in good}
    truth, faults = _truth_sha256([cases[slide_id] for slide_id in planned], config)
    slides = {slide_id: i for slide_id, i in planned.items() if slide_id in truth}
    key = _scores_key(root, plan, slides, cases, truth)
    if all(publish.done_if_present(root, f"evaluations/{key[:12]}/{name}", key) is not None for name in _SCORES):
        return ScoringInput(key, None, faults)
    readers = {slide_id: partial(_evidence, root, plan, i, cases[slide_id], config) for slide_id, i in slides.items()}
    matched, wrong = evaluate.match_slides(readers, config.evaluation)
    if wrong:
        kept = {slide_id: i for slide_id, i in slides.items() if slide_id in matched}
        key = _scores_key(root, plan, kept, cases, truth)
    return ScoringInput(key, list(matched.values()), faults | wrong)


def _scores_key(
    root: Path,
    plan: Plan,
    slides: Mapping[str, int],
    cases: Mapping[str, Case],
    truth: Mapping[str, list[Any]],
) -> str:
    return publish.key_of(
        settings=plan.settings.numbers(),
        detections=[published_receipt(root, plan, detect.STAGE, i)["sha256"] for i in slides.values()],
        truth=[[slide_id, *truth[slide_id]] for slide_id in slides],
        patients=[cases[slide_id].patient_id for slide_id in slides],  # slides of one patient are resampled together
    )


def publish_scores(root: Path, view: str, config: RunConfig, scoring: ScoringInput) -> PublishedScores:
    """Publish scores and curves under ``evaluations/<key>`` unless they exist, and copy them to the folder ``view``."""
    published = PublishedScores(scoring.key, root / "evaluations" / scoring.key[:12])
    if scoring.slides is not None:
        scores = evaluate.evaluate_matched(scoring.slides, config.evaluation, seed=config.seed)
        documents = {name: text.encode() for name, text in evaluate.documents(scores).items()}
        documents["scores.json"] = documents.pop("summary.json")
        documents |= {"froc.png": report.froc_figure(scores.froc), "roc.png": report.roc_figure(scores.roc)}
        for name in _SCORES:
            path = f"evaluations/{scoring.key[:12]}/{name}"
            publish.publish_bytes(root, path, documents[name], scoring.key, facts("evaluation", ""))
    for name in _SCORES[1:]:
        publish.write_view(root, f"{view}/{name}", (published.folder / name).read_bytes())
    return published


def summarise(root: Path, view: str, published: PublishedScores, work: Mapping[str, float]) -> dict[str, float]:
    """Write scores and work metrics as ``summary.json``, undefined ones as null, and return them by name."""
    scores = read_metrics(published.folder / "scores.json")
    publish.write_view(root, f"{view}/summary.json", tables.json_text({**scores, **work}).encode())
    return scores | dict(work)


def former_metrics(root: Path, view: str) -> dict[str, float]:
    """Return the metrics of an earlier start of the run by name; empty where there are none."""
    paths = [root / name / "summary.json" for name in (view, FORMER)]
    return next((read_metrics(path) for path in paths if path.exists()), {})


def read_metrics(path: Path) -> dict[str, float]:
    """Read metrics by name from JSON; null becomes NaN."""
    metrics = json.loads(path.read_text(encoding="utf-8"))
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def _evidence(root: Path, plan: Plan, index: int, case: Case, config: RunConfig) -> evaluate.Evidence:
    """Read the evidence of a slide from the run's folder; its score is the highest probability on its heatmap."""
    planned, heatmap = plan.slides[index], root / stitch.STAGE.product_of(plan, index)
    detections = read_detections(root / detect.STAGE.product_of(plan, index))
    score = published_receipt(root, plan, stitch.STAGE, index)["score"]
    cut = read_cut(root, planned)
    tiles, passed = tissue_grid(cut.tile_runs), None
    if plan.settings.cascade is not None:
        passed = cascade.of_tiles(ingest.cells_of_passes(root, plan, planned)[1], tiles, planned.frame)
    view = missed.View(
        frame=planned.frame,
        tiles=tiles,
        params=plan.settings.lesions,
        read_map=lambda: files.read_heatmap(heatmap)[0],
        read_second=lambda: detect.second_map(plan, index),
        read_score=lambda: detect.gate_score(root, plan, index),
        cells=cut.scored(planned.frame),
        passed_over=passed,
    )
    return replace(evidence(planned, case, config, detections, score, root=root), view=view)


def evidence(
    planned: SlidePlan,
    case: Case,
    config: RunConfig,
    detections: NDArray[np.float64],
    score: float,
    root: Path | None = None,
) -> evaluate.Evidence:
    """Read the truth of a slide and return the evidence by which the slide is scored.

    Args:
        planned: The slide in the plan.
        case: The slide in the manifest.
        config: The run's configuration.
        detections: float64 (n, 3): prob, x, y in level-0 px, as `wsiflow.evaluation.detections.read_detections`
            returns them.
        score: Slide score; higher means more likely tumour.
        root: The run's folder, whose tissue masks show whether the truth covers nearly all tissue; None to leave that.
    """
    params = config.evaluation
    marks = planned_marks(planned, case, params)
    share = None
    if root is not None and marks is not None and marks.tumour.any():
        tissue = ingest.tissue_of(root, planned.slide_id)
        sides = {"downsample": planned.overview_downsample, "m_downsample": params.downsample}
        share = share_of_tissue(marks, tissue, **sides)
    notes = [
        *(ingest.remarks(root, planned.slide_id) if root is not None else []),
        "" if share is None else f"{share:.0%} of the tissue is annotated as tumour",
    ]
    return evaluate.Evidence(
        slide_id=planned.slide_id,
        label=case.label,
        truth=as_truth(marks, params),
        detections=detections,
        score=score,
        patient_id=case.patient_id,
        note="; ".join(filter(None, notes)),
        is_empty=not planned.n_tiles,
    )


def _truth_sha256(cases: Sequence[Case], config: RunConfig) -> tuple[dict[str, list[Any]], dict[str, WsiflowError]]:
    """Return label and file hashes of each slide's truth, and faults of unreadable files, both by slide id.

    An unreadable file of a slide that the protocol excludes is no fault, and its hash is None.
    """
    truth: dict[str, list[Any]] = {}
    faults: dict[str, WsiflowError] = {}
    for case in cases:
        hashes: list[str | None] = []
        for path in (case.annotation_path, case.mask_path):
            try:
                hashes.append(publish.file_sha256(path) if path else None)
            except OSError as error:
                hashes.append(None)
                if config.evaluation.excluded(case.slide_id) != "all":
                    fault = unreadable(error, "its truth", "correct the path", path=path or "")
                    faults[case.slide_id] = fault.about(slide=case.slide_id, stage="evaluation")
        if case.slide_id not in faults:
            truth[case.slide_id] = [case.label, *hashes]
    return truth, faults


def published_receipt(root: Path, plan: Plan, stage: Stage, index: int) -> publish.Receipt:
    """Return the receipt of the file that a task has published.

    Args:
        root: The run's folder.
        plan: The run's plan.
        stage: The stage of the task.
        index: The task's place in its stage.

    Raises:
        IntegrityError: The file has no receipt, or another key than the planned one.
    """
    name = stage.product_of(plan, index)
    receipt, planned_key = receipt_of(root, name), stage.key_of(root, plan, index)
    if receipt["key"] != planned_key:
        cause = f"it was published under the key {receipt['key'][:12]}, and the plan requires {planned_key[:12]}"
        raise IntegrityError(cause, "choose another out= folder", path=root / name)
    return receipt


def receipt_of(root: Path, name: str) -> publish.Receipt:
    """Return the receipt of a published file.

    Raises:
        IntegrityError: There is none.
    """
    receipt = publish.read_receipt(root, name)
    if receipt is None:
        raise IntegrityError("it has no receipt", "run again", path=root / name)
    return receipt
