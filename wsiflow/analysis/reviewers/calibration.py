"""Assess the calibration of a run: of its slide scores, and of the cells of its heatmaps where the truth is known.

Input: a scored run. Output: ``calibration.json``, ``.csv`` and ``.png``, bytes by name.

A slide's score is the highest probability on its map, which is not the probability that the slide holds tumour. Its
calibration is therefore expected to be poor, and says how a score is to be read. The outcome of a cell is whether the
point of its score lies in annotated tumour. Neighbouring cells depend on each other, so the intervals of cells are too
narrow.
"""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsiflow.analysis.scored import ScoredRun
from wsiflow.errors import InputError, IntegrityError
from wsiflow.evaluation import calibration
from wsiflow.evaluation.calibration import Bins
from wsiflow.evaluation.matches import SlideRecord
from wsiflow.evaluation.truth import planned_marks, planned_truth, truth_sha256
from wsiflow.heatmap import files
from wsiflow.plan import geometry
from wsiflow.plan.geometry import Frame
from wsiflow.plan.slide_plan import SlidePlan
from wsiflow.slides import pyramid
from wsiflow.slides.manifest import Case
from wsiflow.system import tables

_FINE, _SHOWN = 1000, 10
_BAND = pyramid.TILE_PX


def documents(run: ScoredRun, *, cells: bool) -> dict[str, bytes]:
    """Return the files of the calibration, bytes by name.

    Args:
        run: The run.
        cells: Whether the cells are calibrated too, for which every heatmap and every truth is read.

    Raises:
        InputError: A slide score lies outside 0 to 1, or a truth can no longer be read.
        IntegrityError: The truth of a slide has changed since the slide was scored.
    """
    setting = run.record.setting("slides")
    score, label = setting.scores, setting.labels
    levels = {"slides": _level(calibration.bins(score, label, k=_SHOWN), score, label, np.ones(len(score)))}
    if cells:
        fine = calibration.merged([calibration.bins([], [], k=_FINE), *_cells(run)])
        mean = fine.p / np.maximum(fine.n, 1)
        levels["cells"] = _level(calibration.coarser(fine, _SHOWN), mean, fine.positives, fine.n)
    rows = [{"level": name, **row} for name, level in levels.items() for row in level["table"]]
    return {
        "calibration.json": tables.json_text(levels).encode(),
        "calibration.csv": tables.csv_text(rows).encode(),
        "calibration.png": figure(levels),
    }


def figure(levels: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Draw a reliability diagram per level, with the number of values in each bin below it, as PNG."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(4.6 * len(levels), 5.2), dpi=160, layout="constrained")
    axes = drawn.subplots(2, len(levels), squeeze=False, height_ratios=[4, 1], sharex=True)
    for column, (name, level) in enumerate(levels.items()):
        top, below = axes[:, column]
        rows = [row for row in level["table"] if row["n"]]
        mean, share = (np.array([row[key] for row in rows]) for key in ("mean", "observed"))
        reach = np.array([[row["observed"] - row["wilson_low"], row["wilson_high"] - row["observed"]] for row in rows])
        top.plot([0, 1], [0, 1], color="#8a939c", linewidth=0.8)
        if rows:
            top.errorbar(mean, share, yerr=np.maximum(reach.T, 0), fmt="o-", color="#1f5f99", markersize=4, linewidth=1)
        top.set_xlim(0, 1)
        top.set_ylim(-0.02, 1.02)
        top.set_ylabel("share with tumour")
        top.set_title(f"{name}: Brier {level['brier']:.3f}, ECE {level['ece']:.3f}", fontsize=10)
        below.bar([(row["low"] + row["high"]) / 2 for row in rows], [row["n"] for row in rows], 0.09, color="#9ecae1")
        below.set_yscale("symlog", linthresh=1)
        below.set_ylabel("n")
        below.set_xlabel("probability")
        for each in (top, below):
            each.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    drawn.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _level(bins: Bins, prob: ArrayLike, positives: ArrayLike, n: ArrayLike) -> dict[str, Any]:
    """Return the calibration of slides or of cells as JSON values: scores, recalibration line, reliability table."""
    fit = calibration.recalibrate(prob, positives, n)
    return {
        **calibration.scores(bins),
        "intercept": fit.intercept._asdict(),
        "slope": fit.slope._asdict(),
        "in_the_large": fit.in_the_large,
        "note": fit.note,
        "table": [row._asdict() for row in calibration.table(bins)],
    }


def _cells(run: ScoredRun) -> Iterator[Bins]:
    """Yield the binned sums of all heatmaps whose slides count for FROC, one band of rows at a time."""
    cases = {case.slide_id: case for case in run.cases}
    known = {one.slide_id: one for one in run.record.slides if one.in_froc}
    for planned in run.plan.slides:
        if planned.slide_id in known:
            downsample = run.config.evaluation.downsample
            _require_same_truth(run, cases[planned.slide_id], planned, known[planned.slide_id])
            tumour, ignored = _marks(run, cases[planned.slide_id], planned)
            path = run.root / f"heatmaps/{planned.slide_id}.tif"
            yield from cell_bins(path, planned.frame, tumour, downsample, ignored=ignored)


def _require_same_truth(run: ScoredRun, case: Case, planned: SlidePlan, one: SlideRecord) -> None:
    """Check that the truth of a slide is still the one that the slide was scored with.

    Raises:
        IntegrityError: It has changed.
    """
    truth = planned_truth(planned, case, run.config.evaluation)
    lesions = truth.lesions if truth is not None and one.label == 1 else None
    if truth_sha256(one.label, lesions, truth.ignored if truth is not None else None) != one.truth:
        cause = "the annotated regions are no longer those that the slide was scored with"
        path = case.annotation_path or case.mask_path
        raise IntegrityError(cause, "run again, then export", slide=case.slide_id, path=path, stage="calibration")


def cell_bins(
    path: Path,
    frame: Frame,
    tumour: NDArray[np.bool_],
    downsample: int,
    *,
    ignored: NDArray[np.bool_] | None = None,
) -> Iterator[Bins]:
    """Yield the binned sums of the cells of a heatmap, band by band.

    Args:
        path: The heatmap.
        frame: Transform between the heatmap's cells and level 0.
        tumour: bool (rows, cols), annotated tumour at level 0 / downsample; cells outside the array are not tumour.
        downsample: Level-0 px per mask px.
        ignored: bool (rows, cols) like ``tumour``, whose cells are left out; None where nothing is ignored.
    """
    with files.open_heatmap(path) as opened:
        places = np.arange(max(opened.shape), dtype=np.float64)
        x, y = np.floor(geometry.l0_from_h(frame, np.column_stack([places, places])) / downsample).astype(np.int64).T
        x, y = x[: opened.shape[1]], y[: opened.shape[0]]
        for first in range(0, opened.shape[0], _BAND):
            end = min(first + _BAND, opened.shape[0])
            prob = opened.rows(first, end)
            rows = y[first:end]
            truth, scored = _cells_of(tumour, rows, x), ~np.isnan(prob)
            if ignored is not None:
                scored &= ~_cells_of(ignored, rows, x)
            yield calibration.bins(prob[scored], truth[scored], k=_FINE)


def _cells_of(mask: NDArray[np.bool_], rows: NDArray[np.int64], cols: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return the values of a mask in some rows and columns, False outside the mask."""
    values = np.zeros((len(rows), len(cols)), np.bool_)
    on, inside = rows < mask.shape[0], cols < mask.shape[1]
    values[np.ix_(on, inside)] = mask[np.ix_(rows[on], cols[inside])]
    return values


def _marks(run: ScoredRun, case: Case, planned: SlidePlan) -> tuple[NDArray[np.bool_], NDArray[np.bool_] | None]:
    """Return the annotated tumour of a slide, neither joined nor dilated, and what is ignored on it."""
    try:
        marks = planned_marks(planned, case, run.config.evaluation)
    except InputError as error:
        raise error.about(slide=case.slide_id, stage="calibration") from error
    if marks is None:
        return np.zeros((0, 0), np.bool_), None
    return marks.tumour & (case.label != 0), marks.ignored
