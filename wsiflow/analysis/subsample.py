"""Score coarser strides from the heatmaps of a finished run, without running them.

A heatmap holds every cell of a coarser map whose windows are among its own. Input: a finished run. Output: per stride a
folder with detections, scores and settings, which `wsiflow compare` accepts beside runs. Such a folder has no cost,
since the time of that stride was never measured.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsiflow.analysis import scored
from wsiflow.analysis.scored import ScoredRun
from wsiflow.errors import InputError
from wsiflow.evaluation import evaluate
from wsiflow.evaluation.detections import format_detections, read_detections
from wsiflow.heatmap import assembly, files, lesions
from wsiflow.model.choice import reason_scores_differ
from wsiflow.plan import geometry
from wsiflow.plan.geometry import Frame
from wsiflow.plan.slide_plan import SlidePlan
from wsiflow.run.results import record, scores
from wsiflow.system import publish


def write(root: Path, strides: Sequence[int], out: Path) -> list[Path]:
    """Score a run's heatmaps at coarser strides, and write a folder for each stride.

    Args:
        root: The run's folder.
        strides: Strides in reading pixels, each a multiple of the run's stride.
        out: Folder in which a folder ``stride=<s>`` is written for each stride.

    Returns:
        The folders written, in the order of the strides.

    Raises:
        InputError: The folder holds no scored run, slides are missing from its scores, or its maps do not hold the
            windows of a stride.
        EnvironmentFault: The folder cannot be written.
    """
    run = scored.read(root)
    if run.is_partial:
        raise InputError("slides are missing from the run's scores", "run again until it is complete", path=root)
    for stride in strides:  # refuse before anything is written
        _require_same_windows(run, stride)
    publish.preflight(out)
    return [_write(run, stride, out / f"stride={stride}") for stride in strides]


def _write(run: ScoredRun, stride: int, out: Path) -> Path:
    cases = {case.slide_id: case for case in run.cases}

    def slides() -> Iterator[evaluate.Evidence]:
        for planned in run.plan.slides:
            coarse, detections = _detected(run, planned, stride)
            text = format_detections(detections)
            publish.write_view(out, f"detections/{planned.slide_id}.csv", text.encode())
            detections = read_detections(out / f"detections/{planned.slide_id}.csv")  # rounded as they are published
            score = assembly.slide_score(coarse)
            yield scores.evidence(planned, cases[planned.slide_id], run.config, detections, score)

    evaluation = evaluate.evaluate_cases(slides(), run.config.evaluation, seed=run.config.seed)
    for name, text in evaluate.documents(evaluation).items():
        publish.write_view(out, f"evaluation/{name}", text.encode())
    settings = record.settings(run.config.model_dump(mode="json"), run.plan) | record.digests(run.plan)
    settings |= {"inference.stride": stride, "subsampled_from": run.plan.settings.choice.stride_px}
    publish.write_view(out, "evaluation/settings.json", json.dumps(settings, indent=1, sort_keys=True).encode())
    return out


def _require_same_windows(run: ScoredRun, stride: int) -> None:
    """Refuse a stride whose map cannot be taken from the run's heatmaps without changing a score.

    Raises:
        InputError: The windows differ, or a score depends on more than its window; the message says which.
    """
    choice = run.plan.settings.choice
    reason = "not every window was run (inference.refine)" if choice.refine else reason_scores_differ(choice, choice)
    if run.plan.settings.cascade is not None:
        reason = "tissue was passed over (inference.cascade)"
    if run.config.lesions.second is not None or run.config.lesions.gate is not None:
        reason = "its detections depend on more than its own maps (lesions.second, lesions.gate)"
    if run.config.tiles.tile_px % stride:
        reason = f"it does not divide the tile of {run.config.tiles.tile_px} px"
    if reason:
        cause = f"stride {stride} cannot be taken from the run's heatmaps: {reason}"
        raise InputError(cause, "run at that stride", path=run.root)
    for planned in run.plan.slides[:1]:
        try:
            geometry.subsampling(planned.frame, _at(planned.frame, stride))
        except InputError as error:
            raise error.about(path=run.root) from error


def _at(frame: Frame, stride: int) -> Frame:
    return frame._replace(stride_px=stride)


def _detected(run: ScoredRun, planned: SlidePlan, stride: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return a slide's map at a stride and its detections, float64 (n, 3): prob, x, y in level-0 px."""
    fine, _ = files.read_heatmap(run.root / f"heatmaps/{planned.slide_id}.tif")
    frame = _at(planned.frame, stride)
    coarse = assembly.subsample(fine, planned.frame, frame)
    detected = lesions.detect(coarse, run.config.lesions, cell_um=frame.um_px * stride)
    return coarse, np.column_stack([detected[:, 0], geometry.l0_from_h(frame, detected[:, 1:3])])
