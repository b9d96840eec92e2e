"""Detect lesions on a heatmap.

Input: a heatmap, float32 (rows, cols), NaN where not tissue. Output: detections, float64 (n, 3): prob, column, row in
heatmap cells, ordered by falling prob, then row, then column.

Conventions: a position is a cell index, so 0 is the first cell and 2.5 lies between the third and the fourth.
`geometry` defines whether an index is the centre or the corner of a cell. A cell without a score never exceeds the
threshold, enters no mean and is never the position of a detection; morphology may reach across it.

``components`` follows the reference system: threshold, morphology, 8-connected components. ``nms`` is non-maximum
suppression: it takes the highest cell, clears a square around it, and repeats until no cell exceeds the threshold.

A second map, of another model, takes part in the confidences of components alone: Wang et al. (2016) and the reference
system take the mean of both.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import scipy
from numpy.typing import NDArray
from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from wsiflow.errors import InputError
from wsiflow.system.paths import AbsolutePath

_CHUNK = 65536  # cells that non-maximum suppression processes together


class LesionParams(BaseModel, frozen=True, extra="forbid"):
    """How a heatmap becomes detections."""

    method: Literal["components", "nms"] = Field(
        description="How detections are found. components: a detection for each connected component of the thresholded "
        "map. nms: the highest cell, then the next one outside a square around it, and so on."
    )
    threshold: float = Field(ge=0, le=1, description="A cell counts when its score is higher than this.")
    unit: Literal["um", "cells"] = Field(
        description="Unit of smoothing, kernel, min_area and nms_radius. um: they mean the same at every stride and "
        "spacing. cells: they count cells of the heatmap, as the reference system does."
    )
    smoothing: float = Field(
        ge=0,
        le=1000,
        description="Standard deviation of a Gaussian over the scored cells, before anything else. 0: none.",
    )
    morphology: Literal["open_close", "close_open", "none"] = Field(
        description="For components: how the thresholded map is cleaned. open_close: opening, then closing. "
        "close_open: the other way round. none: it is left as it is."
    )
    kernel: float = Field(
        ge=0,
        le=1000,
        description="For components: width of the elliptical kernel of opening and closing; one cell changes nothing. "
        "The reference system uses 20 cells at stride 16, which removes anything under 320 px.",
    )
    min_area: float = Field(
        ge=0, description="For components: those with less scored area than this are dropped, square um or cells."
    )
    confidence: Literal["mean", "max"] = Field(
        description="For components: which of the component's scores is its confidence. The reference takes the mean."
    )
    position: Literal["centroid", "peak"] = Field(
        description="For components: where the detection lies. centroid: at the mean of its cells, as in the "
        "reference, which may lie outside of it. peak: at the scored cell that is farthest from the outline."
    )
    nms_radius: float = Field(
        gt=0,
        description="For nms: what is cleared around a maximum, from this far before it to this far after it, in both "
        "directions.",
    )
    # Plans and folders of versions without the following keys stay valid: each is recorded only where it is set.
    second: AbsolutePath | None = Field(
        default=None,
        description="For components: folder of a run over the same slides with another model. The map of this run says "
        "where lesions are, and the mean of both maps over a component is its confidence. null: this run's map alone.",
    )
    gate: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="A slide whose score is at most this has no detections, and the confidences of all others are "
        "multiplied by the slide's score. null: no gate.",
    )
    slide_scores: AbsolutePath | None = Field(
        default=None,
        description="For gate: CSV with the header slide_id,score, as wsiflow forest score writes it. null: the score "
        "of a slide is the highest probability on its heatmap.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "LesionParams":
        if self.second is not None and (self.method, self.confidence) != ("components", "mean"):
            raise ValueError("lesions.second needs lesions.method=components and lesions.confidence=mean")
        if self.slide_scores is not None and self.gate is None:
            raise ValueError("lesions.slide_scores is set, but no lesions.gate: set one, such as 0.5")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = plain(self)
        return {name: value for name, value in values.items() if value is not None or name not in _LATER_KEYS}


_LATER_KEYS = frozenset({"second", "gate", "slide_scores"})


class _Sizes(NamedTuple):
    """Sizes of the parameters in heatmap cells: integers of at least 1, except the standard deviation ``sigma``."""

    sigma: float
    kernel: int
    area: int
    radius: int


def _sizes(params: LesionParams, cell_um: float) -> _Sizes:
    cell = cell_um if params.unit == "um" else 1.0
    kernel, area, radius = params.kernel / cell, params.min_area / cell**2, params.nms_radius / cell
    return _Sizes(params.smoothing / cell, *(max(1, round(size)) for size in (kernel, area, radius)))


def detect(
    heatmap: NDArray[np.float32],
    params: LesionParams,
    *,
    cell_um: float,
    second: NDArray[np.float32] | None = None,
) -> NDArray[np.float64]:
    """Return the detections of one heatmap; the gate is `gated`.

    Args:
        heatmap: float32 (rows, cols), probabilities; NaN where not tissue.
        params: How lesions are detected.
        cell_um: Side of a heatmap cell, um.
        second: float32 (rows, cols), the map of another model, see `LesionParams.second`; a cell that has no score in
            it counts with the first map alone.

    Returns:
        float64 (n, 3): prob, column, row in heatmap cells; (0, 3) where nothing is detected.

    Raises:
        InputError: A heatmap is not two-dimensional or holds an infinite value, or the two have different shapes.
    """
    return trace(heatmap, params, cell_um=cell_um, second=second).detections


def gated(detections: NDArray[np.float64], score: float, gate: float) -> NDArray[np.float64]:
    """Return detections with the slide's score as a factor of their confidences; none where it does not pass the gate.

    Args:
        detections: float64 (n, 3), the confidence first.
        score: The slide's score.
        gate: What the score has to exceed.
    """
    return detections * (score, 1.0, 1.0) if score > gate else detections[:0]


class Traces(NamedTuple):
    """The detections of a heatmap, and where each comes from.

    Attributes:
        scores: float32 (rows, cols), the scores that were compared with the threshold; NaN where not tissue.
        detections: float64 (n, 3), as `detect` returns them.
        areas: int32 (rows, cols), the area to which a cell belongs; 0 for none.
        numbers: int32 (areas + 1,), the detection, counted from 1, of each area; 0 for areas that are none.
    """

    scores: NDArray[np.float32]
    detections: NDArray[np.float64]
    areas: NDArray[np.int32]
    numbers: NDArray[np.int32]


def trace(
    heatmap: NDArray[np.float32],
    params: LesionParams,
    *,
    cell_um: float,
    second: NDArray[np.float32] | None = None,
) -> Traces:
    """Return the detections of one heatmap with the cells of each; see `detect`.

    Raises:
        InputError: A heatmap is not two-dimensional or holds an infinite value, or the two have different shapes.
    """
    for one in (heatmap, heatmap if second is None else second):
        if one.ndim != 2 or one.shape != heatmap.shape or np.isinf(one).any():
            cause = f"the heatmap has shape {one.shape} and {np.isinf(one).sum()} infinite values"
            remedy = "give finite scores in rows x cols, NaN where not tissue, and two maps of one shape"
            raise InputError(cause, remedy, stage="lesions")
    sizes = _sizes(params, cell_um)
    scores = _smoothed(heatmap, sizes.sigma)
    above = scores > params.threshold  # False for NaN
    if not above.any():
        return Traces(scores, np.empty((0, 3)), np.zeros(heatmap.shape, np.int32), np.zeros(1, np.int32))
    if params.method == "nms":
        detections, areas, found = _maxima(scores, above, sizes.radius)
    else:
        cells = _cleaned(above, params.morphology, sizes.kernel)
        detections, areas, found = _components(_mean(scores, second, sizes.sigma), cells, params, sizes.area)
    order = np.lexsort((detections[:, 1], detections[:, 2], -detections[:, 0]))
    numbers = np.zeros(areas.max() + 1, np.int32)
    numbers[found[order]] = np.arange(1, len(order) + 1)
    return Traces(scores, detections[order], areas, numbers)


def _smoothed(heatmap: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """Return the Gaussian-weighted mean of the scored cells around each scored cell; other cells stay NaN."""
    if sigma == 0:
        return heatmap
    tissue = ~np.isnan(heatmap)
    total, weight = (
        scipy.ndimage.gaussian_filter(one, sigma, mode="constant")
        for one in (np.where(tissue, heatmap, 0), tissue.astype(np.float32))
    )
    mean = np.full_like(heatmap, np.nan)
    np.divide(total, weight, out=mean, where=tissue)
    return mean


def _mean(
    scores: NDArray[np.float32], second: NDArray[np.float32] | None, sigma: float
) -> NDArray[np.float32] | NDArray[np.float64]:
    """Return the mean of both maps; the first alone where the second has no score, or does not exist."""
    if second is None:
        return scores
    others = _smoothed(second, sigma).astype(np.float64)
    return np.where(np.isnan(others), scores, (scores + others) / 2)


def _maxima(
    scores: NDArray[np.float32], above: NDArray[np.bool_], radius: int
) -> tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.int64]]:
    """Return the cells that survive non-maximum suppression, float64 (n, 3): prob, column, row.

    Of equal cells the first one in row order takes precedence. The second value, int32 (rows, cols), is the area of the
    maximum, from 1, that cleared a cell above the threshold; the third is the area of each maximum.
    """
    rows, cols = np.nonzero(above)
    order = np.argsort(-scores[rows, cols], kind="stable")
    rows, cols = rows[order], cols[order]
    cleared = np.zeros(scores.shape, np.bool_)
    areas = np.zeros(scores.shape, np.int32)
    kept: list[tuple[float, int, int]] = []
    for start in range(0, len(rows), _CHUNK):
        r, c = rows[start : start + _CHUNK], cols[start : start + _CHUNK]
        left = ~cleared[r, c]  # most of a chunk is cleared already; only the rest is processed one by one
        for row, col in zip(r[left].tolist(), c[left].tolist(), strict=True):
            if not cleared[row, col]:
                kept.append((scores[row, col], col, row))
                around = np.s_[max(row - radius, 0) : row + radius, max(col - radius, 0) : col + radius]
                areas[around][~cleared[around] & above[around]] = len(kept)
                cleared[around] = True
    return np.array(kept, np.float64), areas, np.arange(1, len(kept) + 1)


def _cleaned(above: NDArray[np.bool_], morphology: str, width: int) -> NDArray[np.bool_]:
    """Return the cells that remain after opening and closing, in the order of ``morphology``, by an elliptical kernel.

    Args:
        above: bool (rows, cols), cells above the threshold.
        morphology: ``open_close``, ``close_open`` or ``none``.
        width: Width of the kernel, cells.
    """
    orders = {"open_close": (cv2.MORPH_OPEN, cv2.MORPH_CLOSE), "close_open": (cv2.MORPH_CLOSE, cv2.MORPH_OPEN)}
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    cells = above.astype(np.uint8)
    for operation in orders.get(morphology, ()):
        cells = cv2.morphologyEx(cells, operation, kernel).astype(np.uint8)
    return cells > 0


def _components(
    scores: NDArray[np.float32] | NDArray[np.float64], cells: NDArray[np.bool_], params: LesionParams, min_area: int
) -> tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.int64]]:
    """Return one detection, prob, column, row, per 8-connected component with at least ``min_area`` scored cells.

    The second value, int32 (rows, cols), is the component of each cell, and the third the component of each detection.
    """
    labels, n = scipy.ndimage.label(cells, np.ones((3, 3), np.int8))
    place = _POSITIONS[params.position]
    kept, found = [], []
    for label, window in zip(range(1, n + 1), scipy.ndimage.find_objects(labels), strict=True):
        member = (labels[window] == label) & ~np.isnan(scores[window])
        if member.sum() < min_area:
            continue
        values = scores[window][member].astype(np.float64)
        row, col = place(member)
        prob = values.mean() if params.confidence == "mean" else values.max()
        kept.append((prob, col + window[1].start, row + window[0].start))
        found.append(label)
    return np.array(kept, np.float64).reshape(-1, 3), labels, np.array(found, np.int64)


def _centroid(member: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the mean row and column of the cells of a component."""
    rows, cols = np.nonzero(member)
    return float(rows.mean()), float(cols.mean())


def _peak(member: NDArray[np.bool_]) -> tuple[float, float]:
    """Return row and column of the cell farthest from the outline of a component; the first of equal ones."""
    distance = scipy.ndimage.distance_transform_edt(np.pad(member, 1))
    row, col = np.unravel_index(int(distance.argmax()), distance.shape)
    return float(row - 1), float(col - 1)


_POSITIONS: dict[str, Callable[[NDArray[np.bool_]], tuple[float, float]]] = {"centroid": _centroid, "peak": _peak}
