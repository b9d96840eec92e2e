"""What of the annotated lesions was looked at, and why a lesion was missed.

Input: the annotated regions of a slide, the tiles that were looked at, and the heatmap. Output: counts and areas, and a
reason for each lesion without a hit.

Conventions: points are x, y in level-0 px; a mask pixel of the evaluation stands for the point at its centre.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import scipy
from numpy.typing import NDArray

from wsiflow.evaluation.froc import LesionMask, labels_at
from wsiflow.heatmap import lesions
from wsiflow.heatmap.lesions import LesionParams
from wsiflow.plan import geometry
from wsiflow.plan.geometry import Frame

_UNSEEN = "not looked at"
_Value = TypeVar("_Value", bound=np.generic)


class View(NamedTuple):
    """How a slide was looked at.

    Attributes:
        frame: Its transform.
        tiles: bool (rows, cols), the tiles that were looked at; the grid may end where they do.
        params: How lesions were detected on its heatmap.
        read_map: Returns the heatmap; it is called only where a lesion that was looked at was missed.
        read_second: Returns the map of another model, see `LesionParams.second`; None where there is none.
        read_score: Returns the slide's score, where it has to pass a gate.
        cells: bool (n, m, m), which heatmap cells of each of these tiles were looked at, row by row; None for all.
        passed_over: bool (n, m, m), which of the others the first pass of a cascade has looked at; None without one.
    """

    frame: Frame
    tiles: NDArray[np.bool_]
    params: LesionParams
    read_map: Callable[[], NDArray[np.float32]]
    read_second: Callable[[], NDArray[np.float32] | None] = lambda: None
    read_score: Callable[[], float] = lambda: 1.0
    cells: NDArray[np.bool_] | None = None
    passed_over: NDArray[np.bool_] | None = None


class LookedAt(NamedTuple):
    """How much of a slide's annotated lesions was looked at.

    Attributes:
        n_lesions, n_looked_at: Lesions, isolated tumour cells left out, and those of which any part was looked at.
        area_um2, area_looked_at_um2: Annotated area, isolated tumour cells included, and what of it was looked at.
        missed: The reason for each lesion without a hit, by the lesion's number.
    """

    n_lesions: int
    n_looked_at: int
    area_um2: float
    area_looked_at_um2: float
    missed: dict[int, str]


def look_back(
    regions: LesionMask,
    annotated: NDArray[np.bool_] | None,
    best: NDArray[np.float64],
    view: View,
    *,
    downsample: int,
    m_um_px: float,
) -> LookedAt:
    """Return how much of a slide's lesions was looked at, and why lesions were missed.

    Args:
        regions: The annotated regions, as they are scored.
        annotated: bool (rows, cols), what was annotated, before regions were joined; None for the regions themselves.
        best: float64 (K,), highest confidence of a hit on each region; -inf for a missed region.
        view: How the slide was looked at.
        downsample: Level-0 px per mask px.
        m_um_px: Side of a mask px, um.
    """
    labels = regions.labels if annotated is None else np.where(annotated, regions.labels, 0)
    rows, cols = np.nonzero(labels)
    centres = _centres(rows, cols, downsample)
    seen = is_looked_at(view, centres)
    own = labels[rows, cols]
    passed = set[int]()
    if view.passed_over is not None:
        passed.update(own[is_looked_at(view._replace(cells=view.passed_over), centres)].tolist())
    parts = np.bincount(own[seen], minlength=regions.n_regions + 1)
    counted = [k for k in range(1, regions.n_regions + 1) if k not in regions.itc]
    missed = [k for k in counted if best[k - 1] == -np.inf]
    reasons = {k: "passed over by the first pass" if k in passed else _UNSEEN for k in missed if not parts[k]}
    left = [k for k in missed if parts[k]]
    return LookedAt(
        n_lesions=len(counted),
        n_looked_at=sum(bool(parts[k]) for k in counted),
        area_um2=float(len(own) * m_um_px**2),
        area_looked_at_um2=float(seen.sum() * m_um_px**2),
        missed=dict(sorted((reasons | _reasons(regions, left, view, downsample)).items())),
    )


def is_looked_at(view: View, l0_points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which points, float64 (n, 2), lie in a heatmap cell that was looked at."""
    frame, cells = view.frame, view.cells
    places = np.floor(l0_points / (frame.stride_px * frame.l0_per_px)).astype(np.int64)
    t_places, inside = np.divmod(places, frame.cells_per_tile)
    seen = np.asarray(_values_at(view.tiles, t_places.astype(np.float64), outside=False))
    if cells is not None:
        numbers = np.cumsum(view.tiles).reshape(view.tiles.shape) - 1
        (cols, rows), (h_cols, h_rows) = t_places[seen].T, inside[seen].T
        seen[seen] = cells[numbers[rows, cols], h_rows, h_cols]
    return seen


def text(missed: dict[int, str]) -> str:
    """Return the reasons of missed lesions as a line, lesions with one reason together."""
    lesions_by_reason: dict[str, list[int]] = {}
    for lesion, reason in missed.items():
        lesions_by_reason.setdefault(reason, []).append(lesion)
    return "; ".join(
        f"{'lesion' if len(numbers) == 1 else 'lesions'} {', '.join(map(str, numbers))}: {reason}"
        for reason, numbers in lesions_by_reason.items()
    )


def _reasons(regions: LesionMask, numbers: Sequence[int], view: View, downsample: int) -> dict[int, str]:
    """Return the reason for each of some lesions that were looked at, at least in part."""
    if not numbers:
        return {}
    if view.params.gate is not None and (score := view.read_score()) <= view.params.gate:
        reason = f"the slide's score, {score:.3f}, does not pass the gate of {view.params.gate:g}"
        return dict.fromkeys(numbers, reason)
    cell_um = view.frame.um_px * view.frame.stride_px
    traces = lesions.trace(view.read_map(), view.params, cell_um=cell_um, second=view.read_second())
    l0_detections = geometry.l0_from_h(view.frame, traces.detections[:, 1:3])
    hit = labels_at(regions.labels, l0_detections, downsample)
    reasons, windows = {}, scipy.ndimage.find_objects(regions.labels)
    for number in numbers:
        window = windows[number - 1]
        rows, cols = np.nonzero(regions.labels[window] == number)
        cells = _cells(view.frame, _centres(rows + window[0].start, cols + window[1].start, downsample))
        scores = _values_at(traces.scores, cells, outside=np.nan)
        detections = np.unique(traces.numbers[_values_at(traces.areas, cells, outside=0)])
        own = detections[detections > 0] - 1
        if number in hit[own]:  # it was no hit, so that it does not count
            reasons[number] = "its detection lies in an ignored region"
        else:
            reasons[number] = _reason(scores, l0_detections[own], hit[own], view.params.threshold)
    return reasons


def _reason(
    scores: NDArray[np.float32], l0_detections: NDArray[np.float64], hit: NDArray[np.int32], threshold: float
) -> str:
    """Return why a lesion was missed.

    Args:
        scores: float32 (n,), scores of its cells; NaN where there is none.
        l0_detections: float64 (k, 2), where the detections lie that cells of the lesion belong to.
        hit: int32 (k,), the lesion that each of these lies in; 0 for none.
        threshold: What a score must exceed.
    """
    scored = scores[~np.isnan(scores)]
    if not scored.size:  # the tile was looked at, but the part of it that the lesion has lies beyond the slide
        return _UNSEEN
    most = float(scored.max())
    if most <= threshold:
        return f"below the threshold (at most {most:.3f} of {threshold:g})"
    if not len(l0_detections):
        return f"above the threshold (up to {most:.3f}) but too small to be a detection"
    others = sorted(set(hit.tolist()) - {0})
    if others:
        return f"merged into lesion {', '.join(map(str, others))}"
    x, y = l0_detections[0].tolist()
    return f"merged into a detection outside of it, at {x:.0f}, {y:.0f}"


def _centres(rows: NDArray[np.int64], cols: NDArray[np.int64], downsample: int) -> NDArray[np.float64]:
    """Return the level-0 x, y of the centres of mask pixels, float64 (n, 2)."""
    return np.asarray((np.column_stack([cols, rows]) + 0.5) * downsample, dtype=np.float64)


def _cells(frame: Frame, l0_points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the column and row of the heatmap cell that contains each point, float64 (n, 2) of whole numbers."""
    corner = np.array(geometry.l0_from_h_corner(frame, 0, 0))
    return np.asarray(np.floor((l0_points - corner) / (frame.stride_px * frame.l0_per_px)))


def _values_at(values: NDArray[_Value], places: NDArray[np.float64], *, outside: float) -> NDArray[_Value]:
    """Return the values (n,) of an array (rows, cols) at some columns and rows; ``outside`` where there is none."""
    rows, cols = values.shape
    inside = ((places >= 0) & (places < (cols, rows))).all(axis=1)
    found = np.full(len(places), outside, values.dtype)
    col, row = places[inside].astype(np.int64).T
    found[inside] = values[row, col]
    return found
