"""Score a run: match its slides, publish the scores under a key of their own, and show the latest ones."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import IntegrityError, WsiflowError
from wsiflow.evaluation import evaluate
from wsiflow.evaluation.detections import read_detections
from wsiflow.evaluation.truth import planned_truth
from wsiflow.plan.plan import Plan, SlidePlan
from wsiflow.run.cases import read_cases
from wsiflow.run.config import RunConfig
from wsiflow.run.results import report
from wsiflow.run.results.status import FORMER, Status
from wsiflow.run.stages import detect, stitch
from wsiflow.run.stages.stage import Stage
from wsiflow.slides.manifest import Case
from wsiflow.system import publish, tables
from wsiflow.system.faults import unreadable
from wsiflow.system.provenance import facts


class Evaluated(NamedTuple):
    """What was scored: the key of settings, detections and truth, and where its published files lie."""

    key: str
    folder: Path


class ScoringInput(NamedTuple):
    """What there is to score.

    Attributes:
        key: What identifies settings, detections and truth of the slides that can be scored.
        slides: The matched slides; None where the scores are published already.
        faults: What is wrong with the slides that cannot be scored.
    """

    key: str
    slides: list[evaluate.MatchedSlide] | None
    faults: Mapping[str, WsiflowError]


_SCORES = ("scores.json", "cases.csv", "froc.json", "roc.json", "matches.json", "froc.png", "roc.png")


def prepare_scoring(root: Path, config: RunConfig, made: Plan, statuses: Sequence[Status]) -> ScoringInput:
    """Judge the slides that have results, unless their scores are published.

    Scores follow the detections and the truth: a slide that joins or a corrected outline gives other scores under
    another key, and never touches the former ones. Truth that broke after its slide was planned costs no other slide.
    """
    cases = {case.slide_id: case for case in read_cases(publish.generations(root, "cases.json")[-1])[1]}
    good = {status.slide_id for status in statuses if not status.exit_code}
    planned = {one.slide_id: i for i, one in enumerate(made.slides) if one.slide_id in good}
    truth, faults = _truth_sha256([cases[slide_id] for slide_id in planned], config)
    slides = {slide_id: i for slide_id, i in planned.items() if slide_id in truth}
    key = _scores_key(root, made, slides, cases, truth)
    if all(publish.at_hand(root, f"evaluations/{key[:12]}/{name}", key) is not None for name in _SCORES):
        return ScoringInput(key, None, faults)
    readers = {slide_id: partial(_found, root, made, i, cases[slide_id], config) for slide_id, i in slides.items()}
    matched, wrong = evaluate.match_slides(readers, config.evaluation)
    if wrong:
        kept = {slide_id: i for slide_id, i in slides.items() if slide_id in matched}
        key = _scores_key(root, made, kept, cases, truth)
    return ScoringInput(key, list(matched.values()), faults | wrong)


def _scores_key(
    root: Path,
    made: Plan,
    slides: Mapping[str, int],
    cases: Mapping[str, Case],
    truth: Mapping[str, list[Any]],
) -> str:
    return publish.key_of(
        settings=made.settings,
        detections=[published_receipt(root, made, detect.STAGE, i)["sha256"] for i in slides.values()],
        truth=[[slide_id, *truth[slide_id]] for slide_id in slides],
        patients=[cases[slide_id].patient_id for slide_id in slides],  # whose slides are drawn together
    )


def publish_scores(root: Path, view: str, config: RunConfig, scoring: ScoringInput) -> Evaluated:
    """Publish scores and curves under ``evaluations/<key>``, or find them, and show the latest under ``view``."""
    evaluated = Evaluated(scoring.key, root / "evaluations" / scoring.key[:12])
    if scoring.slides is not None:
        scores = evaluate.evaluate_matched(scoring.slides, config.evaluation, seed=config.seed)
        documents = {name: text.encode() for name, text in evaluate.documents(scores).items()}
        documents["scores.json"] = documents.pop("summary.json")
        documents |= {"froc.png": report.froc_figure(scores.froc), "roc.png": report.roc_figure(scores.roc)}
        for name in _SCORES:
            published = f"evaluations/{scoring.key[:12]}/{name}"
            publish.publish_bytes(root, published, documents[name], scoring.key, facts("evaluation", ""))
    for name in _SCORES[1:]:
        publish.write_view(root, f"{view}/{name}", (evaluated.folder / name).read_bytes())
    return evaluated


def summarise(root: Path, view: str, evaluated: Evaluated, work: Mapping[str, float]) -> dict[str, float]:
    """Write ``summary.json``, scores and work by name, and return it; what is not defined is null there, NaN here."""
    scores = read_metrics(evaluated.folder / "scores.json")
    publish.write_view(root, f"{view}/summary.json", tables.json_text({**scores, **work}).encode())
    return scores | dict(work)


def former_metrics(root: Path, view: str) -> dict[str, float]:
    """Return the metrics of an earlier start, nothing where there are none."""
    paths = [root / name / "summary.json" for name in (view, FORMER)]
    return next((read_metrics(path) for path in paths if path.exists()), {})


def read_metrics(path: Path) -> dict[str, float]:
    """Read metrics by name; what is null there is NaN here."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: math.nan if value is None else value for name, value in found.items()}


def _found(root: Path, made: Plan, index: int, case: Case, config: RunConfig) -> evaluate.Evidence:
    """Return what one slide is scored by; its score is the highest probability on its heatmap."""
    detections = read_detections(root / detect.STAGE.product_of(made, index))
    return evidence(
        made.slides[index], case, config, detections, published_receipt(root, made, stitch.STAGE, index)["score"]
    )


def evidence(
    planned: SlidePlan, case: Case, config: RunConfig, detections: NDArray[np.float64], score: float
) -> evaluate.Evidence:
    """Return what a slide is scored by.

    Args:
        planned: The slide.
        case: The same in the manifest.
        config: How it is scored.
        detections: float64 (n, 3): prob, x, y in level-0 px, as `wsiflow.evaluation.detections.read_detections`
            returns them.
        score: How likely the slide holds tumour.
    """
    return evaluate.Evidence(
        slide_id=planned.slide_id,
        label=case.label,
        truth=planned_truth(planned, case, config.evaluation),
        detections=detections,
        score=score,
        patient_id=case.patient_id,
    )


def _truth_sha256(cases: Sequence[Case], config: RunConfig) -> tuple[dict[str, list[Any]], dict[str, WsiflowError]]:
    """Return label and hashes of each slide's truth, and what is wrong where it cannot be read, both by slide.

    What a slide has that counts for nothing is hashed as far as that is possible.
    """
    found: dict[str, list[Any]] = {}
    faults: dict[str, WsiflowError] = {}
    for case in cases:
        hashes: list[str | None] = []
        for path in (case.annotation_path, case.mask_path):
            try:
                hashes.append(publish.file_sha256(path) if path else None)
            except OSError as error:
                hashes.append(None)
                if config.evaluation.excluded(case.slide_id) != "all":
                    told = unreadable(error, "its truth", "correct the path", path=path or "")
                    faults[case.slide_id] = told.about(slide=case.slide_id, stage="evaluation")
        if case.slide_id not in faults:
            found[case.slide_id] = [case.label, *hashes]
    return found, faults


def published_receipt(root: Path, made: Plan, stage: Stage, index: int) -> publish.Receipt:
    """Return the receipt of what a task has published, which must be what the plan asks for."""
    name = stage.product_of(made, index)
    receipt, wanted = receipt_of(root, name), stage.key_of(root, made, index)
    if receipt["key"] != wanted:
        cause = f"it was published under the key {receipt['key'][:12]}, and the plan asks for {wanted[:12]}"
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
