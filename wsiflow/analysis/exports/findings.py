"""What a run knows of a slide, as every export needs it: detections, tissue, truth, heatmap and its contours.

Input: the folder of a run. Output: a `Findings` for each slide that has a heatmap and detections. All places are
level-0 pixels, x and y, from the corner of level 0, as OpenSlide counts them; an export that counts from elsewhere
converts them.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray

from wsiflow.errors import InputError, WsiflowError
from wsiflow.evaluation.detections import read_detections
from wsiflow.evaluation.truth import planned_marks, planned_outlines, stated
from wsiflow.heatmap.files import read_heatmap
from wsiflow.model.card import read_card
from wsiflow.plan.geometry import Frame, l0_from_h_corner
from wsiflow.plan.outline import polygons
from wsiflow.plan.slide_plan import SlidePlan
from wsiflow.run.cases import read_cases
from wsiflow.run.plan import Plan, latest_plan
from wsiflow.run.stages import ingest, stitch
from wsiflow.slides.annotations import Outline, TruthOutlines
from wsiflow.slides.manifest import Case

Ring = NDArray[np.float64]
"""float64 (n, 2), x and y in level-0 px; closed, and the first point is not repeated."""

TISSUE, TUMOUR, EXCLUSION, IGNORED = "Tissue", "Tumor", "Exclusion", "Ignore*"
"""What regions enclose. The last three are names that are known where exported truth is read again."""


class Region(NamedTuple):
    """A region of a slide.

    Attributes:
        kind: What it encloses: `TISSUE`, `TUMOUR`, `EXCLUSION`, `IGNORED`, or ``Heatmap 0.5`` for a contour at 0.5.
        name: Its name among the regions of the slide.
        outer: Its outline.
        holes: Outlines of its holes.
        measurements: Numbers about it by name.
    """

    kind: str
    name: str
    outer: Ring
    holes: tuple[Ring, ...] = ()
    measurements: tuple[tuple[str, float], ...] = ()


class TileScore(NamedTuple):
    """A tile of which any cell is scored.

    Attributes:
        l0_x, l0_y: Its top-left corner, level-0 px; a fraction where slides are read at another spacing.
        l0_side: Its side, level-0 px.
        highest, mean: Of the probabilities of its scored cells.
    """

    l0_x: float
    l0_y: float
    l0_side: float
    highest: float
    mean: float


class Findings(NamedTuple):
    """What a run knows of a slide.

    Attributes:
        slide_id: The slide.
        path: The slide's file.
        um_px_l0: Spacing of level 0.
        frame: The transform of the heatmap.
        l0_corner: Level-0 x, y of the corner of the scanned area, from which viewers such as QuPath count.
        class_name: What the heatmap is the probability of.
        heat: float32 (rows, cols), probabilities; NaN where not tissue.
        detections: float64 (n, 3): prob, x, y in level-0 px.
        tissue: GeoJSON features of the tissue, which count from ``l0_corner``.
        truth: Annotated regions.
        contours: Regions of the heatmap at or above thresholds.
    """

    slide_id: str
    path: Path
    um_px_l0: float
    frame: Frame
    l0_corner: tuple[int, int]
    class_name: str
    heat: NDArray[np.float32]
    detections: NDArray[np.float64]
    tissue: Sequence[dict[str, Any]] = ()
    truth: Sequence[Region] = ()
    contours: Sequence[Region] = ()

    def identity(self) -> str:
        """Return a text that is the same for the same heatmap of the same slide, and for no other."""
        pixels = hashlib.sha256(np.ascontiguousarray(self.heat, "<f4").tobytes()).hexdigest()
        return f"{self.slide_id} {self.class_name} {self.l0_corner} {tuple(self.frame)} {pixels}"

    @property
    def l0_cell(self) -> float:
        """Side of a heatmap cell, level-0 px."""
        return self.frame.stride_px * self.frame.l0_per_px

    def tiles(self) -> Iterator[TileScore]:
        """Yield the tiles of which any cell is scored, row by row."""
        m, frame = self.frame.cells_per_tile, self.frame
        cells = self.heat.reshape(frame.t_rows, m, frame.t_cols, m).swapaxes(1, 2)
        side = frame.tile_px * frame.l0_per_px
        for row, col in np.argwhere(np.isfinite(cells).any(axis=(2, 3))).tolist():
            scores = cells[row, col]
            x, y = l0_from_h_corner(frame, col * m, row * m)
            yield TileScore(x, y, side, float(np.nanmax(scores)), float(np.nanmean(scores, dtype=np.float64)))


def read_findings(
    root: Path, thresholds: Sequence[float], note: Callable[[str], None], *, only: Sequence[str] | None = None
) -> Iterator[Findings]:
    """Read what a run knows of its slides, one after another: one heatmap is in memory at a time.

    Args:
        root: The folder of the run.
        thresholds: Where contours are drawn; empty for the threshold of the run's own detections.
        note: Takes a sentence on what is left out.
        only: Ids of the slides to read; None for all.

    Raises:
        InputError: The folder holds no run, or not one of these slides; or a slide cannot be opened that may state a
            scanned area.
    """
    cases_path = ingest.newest_cases(root)
    if cases_path is None:
        raise InputError("the folder holds no run", "name the out= folder of a run", path=root)
    cases = {case.slide_id: case for case in read_cases(cases_path)[1]}
    plan = latest_plan(root)
    _require_known(only or (), plan, root)
    levels, class_name = thresholds or [plan.settings.lesions.threshold], _class_name(plan)
    for index, planned in enumerate(plan.slides):
        if only is not None and planned.slide_id not in only:
            continue
        path = root / stitch.STAGE.product_of(plan, index)
        rows = root / f"detections/{planned.slide_id}.csv"
        if not (path.is_file() and rows.is_file()):
            note(f"slide {planned.slide_id} is left out: it has no heatmap with detections")
            continue
        case, heat = cases[planned.slide_id], read_heatmap(path)[0]
        tissue = json.loads((root / f"tissue/{planned.slide_id}.geojson").read_text(encoding="utf-8"))
        yield Findings(
            slide_id=planned.slide_id,
            path=case.path,
            um_px_l0=planned.um_px_l0,
            frame=planned.frame,
            l0_corner=_corner(case),
            class_name=class_name,
            heat=heat,
            detections=read_detections(rows),
            tissue=tissue["features"],
            truth=_truth(planned, case, plan, note),
            contours=[one for level in levels for one in contours(heat, planned.frame, level)],
        )


def _require_known(only: Sequence[str], plan: Plan, root: Path) -> None:
    unknown = sorted(set(only) - {planned.slide_id for planned in plan.slides})
    if unknown:
        cause = f"the run has no slide {', '.join(unknown)}"
        raise InputError(cause, "name slides of process_list.csv", path=root)


def contours(heat: NDArray[np.float32], frame: Frame, threshold: float) -> list[Region]:
    """Return the regions of a heatmap whose cells are at or above a threshold, along the borders of the cells.

    Their areas add up to that of these cells. Cells that touch at a corner alone are two regions.

    Args:
        heat: float32 (rows, cols), probabilities; NaN where not tissue.
        frame: The slide's transform.
        threshold: Lowest probability of a cell, which is compared in float32 as it is stored.
    """
    labels, pieces = polygons(heat >= np.float32(threshold))
    peaks = np.atleast_1d(scipy.ndimage.maximum(heat, labels, np.arange(1, len(pieces) + 1)))
    begin, side = l0_from_h_corner(frame, 0, 0), frame.stride_px * frame.l0_per_px
    return [
        Region(
            f"Heatmap {threshold:g}",
            f"probability >= {threshold:g} ({number})",
            *_placed(rings, side, begin),
            (("Probability max", float(peak)),),
        )
        for number, (rings, peak) in enumerate(zip(pieces, peaks, strict=True), start=1)
    ]


def _placed(
    rings: Sequence[Ring], scale: float, begin: tuple[float, float] = (0.0, 0.0)
) -> tuple[Ring, tuple[Ring, ...]]:
    """Return the outer ring and the holes of a piece of a mask, closed in it, in level-0 px."""
    outer, *holes = (np.array(begin) + ring[:-1] * scale for ring in rings)
    return outer, tuple(holes)


def _corner(case: Case) -> tuple[int, int]:
    """Return the level-0 pixel from which QuPath counts.

    Raises:
        InputError: The slide cannot be opened, and slides of its format may state a scanned area.
    """
    corner = stated(case).place.l0_bounds_corner
    if corner is None:
        cause = "the slide cannot be opened, so that it is not known from where QuPath counts"
        raise InputError(cause, "export where the slide lies", slide=case.slide_id, path=case.path)
    return corner


def _class_name(plan: Plan) -> str:
    """Return the name of the positive class; a card that was moved since leaves ``positive``."""
    with suppress(WsiflowError):
        return "+".join(read_card(plan.settings.model).positive_names)
    return "positive"


def _truth(planned: SlidePlan, case: Case, plan: Plan, note: Callable[[str], None]) -> list[Region]:
    """Return the annotated regions as they were drawn; those of a mask image follow its pixels at evaluation scale."""
    params = plan.settings.evaluation
    try:
        drawn = planned_outlines(planned, case, params)
        if drawn is not None:
            return _drawn_regions(drawn)
        marks = planned_marks(planned, case, params)
    except WsiflowError as error:
        note(f"the truth of slide {planned.slide_id} is left out: {error}")
        return []
    if marks is None:
        return []
    named = [(TUMOUR, marks.tumour), *([] if marks.ignored is None else [(IGNORED, marks.ignored)])]
    return [
        Region(kind, f"{kind} {number}", *_placed(rings, params.downsample))
        for kind, mask in named
        for number, rings in enumerate(polygons(mask)[1], start=1)
    ]


def _drawn_regions(drawn: TruthOutlines) -> list[Region]:
    kinds: tuple[tuple[str, tuple[Outline, ...]], ...] = (
        (TUMOUR, drawn.tumour),
        (EXCLUSION, drawn.exclusions),
        (IGNORED, drawn.ignored),
    )
    return [Region(kind, one.name, one.polygon, one.holes) for kind, group in kinds for one in group]
