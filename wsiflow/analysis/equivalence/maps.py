"""The heatmaps of two runs, cell by cell, and what their differences change.

Input: two run folders, or two heatmap files. Output: a `Comparison`, its verdict and its sentence.

Maps are read in bands, so that their size does not matter. They must lie on one grid: the same stride, spacing,
convention and slide; each may reach farther than the other. Detections are those that each run published.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.analysis.equivalence import agreement
from wsiflow.analysis.equivalence.agreement import Tally
from wsiflow.errors import InputError
from wsiflow.evaluation import detections, matches, proportions
from wsiflow.heatmap import files
from wsiflow.run.plan import latest_plan
from wsiflow.slides import pyramid

NOT_EQUIVALENT = 10
"""Exit code of a comparison that does not keep to its bound."""

_BAND = pyramid.TILE_PX
_GRID = ("convention", "l0_width_px", "l0_height_px", "l0_per_px", "um_px", "stride_px")


class Found(NamedTuple):
    """Lesions of one slide or of several in two settings.

    Attributes:
        a, b: Detections in each list.
        lost, gained: Detections of A without one of B's within the radius, and of B without one of A's.
        true: True lesions, isolated tumour cells apart; None where the truth is not known.
        true_lost, true_gained: True lesions that only A, or only B, has a detection in.
    """

    a: int
    b: int
    lost: int
    gained: int
    true: int | None = None
    true_lost: int = 0
    true_gained: int = 0

    @property
    def same(self) -> bool:
        """Nothing is lost and nothing gained."""
        return not any((self.lost, self.gained, self.true_lost, self.true_gained))


class Slide(NamedTuple):
    """What was found for one slide, or for all.

    Attributes:
        slide_id: Name of the slide, ``all`` for all.
        numbers: Of `equivalence.numbers`: a slide's own tally, 2 MB, is not kept.
        found: Lesions; None where two files were compared.
    """

    slide_id: str
    numbers: dict[str, float]
    found: Found | None


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Two settings, slide by slide.

    Attributes:
        names: What A and B are called.
        slides: Those that both have.
        total: Of all their cells.
        missing: Sentences that name what only one has.
        neither: Slides that were planned and have no heatmap in any of the two.
        threshold: A cell is positive from this score on.
        radius_um: Detections at most this far apart are one lesion.
    """

    names: tuple[str, str]
    slides: list[Slide]
    total: Tally
    missing: list[str]
    neither: list[str]
    threshold: float
    radius_um: float

    def pooled(self) -> Slide:
        """Return all slides as one."""
        known = [one.found for one in self.slides if one.found is not None]
        return Slide("all", agreement.numbers(self.total), _summed(known) if known else None)


def compare(a: Path, b: Path, *, threshold: float, radius_um: float) -> Comparison:
    """Compare two runs, or two heatmap files.

    Args:
        a: Folder of a run, or a heatmap.
        b: The same of another setting.
        threshold: A cell is positive from this score on.
        radius_um: Detections at most this far apart are one lesion.

    Raises:
        InputError: They are not two of a kind, have no slide in common, or lie on different grids.
    """
    _check(a, b, threshold, radius_um)
    names = (a.name, b.name) if a.name != b.name else (str(a), str(b))
    if a.is_dir():
        return _compare_runs((_Run(a), _Run(b)), names, threshold, radius_um)
    total = tally_files(a, b, threshold=threshold)
    return Comparison(names, [Slide(a.stem, agreement.numbers(total), None)], total, [], [], threshold, radius_um)


def tally_files(a: Path, b: Path, *, threshold: float) -> Tally:
    """Compare two heatmap files, band by band.

    Raises:
        InputError: A file cannot be read, or they lie on different grids; both grids are named.
    """
    with files.open_heatmap(a) as left, files.open_heatmap(b) as right:
        maps = _Map(left, a), _Map(right, b)
        _same_grid(*maps)
        first_row, first_col = (min(one.origin[axis] for one in maps) for axis in (0, 1))
        end_row, end_col = (max(one.origin[axis] + one.rows.shape[axis] for one in maps) for axis in (0, 1))
        total = agreement.nothing()
        for row in range(first_row, end_row, _BAND):
            window = (row, min(row + _BAND, end_row), first_col, end_col)
            band = agreement.tally(maps[0].band(*window), maps[1].band(*window), threshold=threshold)
            total = agreement.added(total, band)
    return total


def verdict(made: Comparison, bound: float) -> list[str]:
    """Return why two settings are not equivalent within a bound, in words; none where they are.

    They are where both score the same cells of the same slides, no score differs by more than the bound, and no lesion
    is gained or lost.
    """
    total, reasons = made.total, list(made.missing)
    if made.neither:
        reasons.append(f"neither has a heatmap of {len(made.neither)} planned slides")
    if total.only_a or total.only_b:
        reasons.append(f"{total.only_a + total.only_b} cells are scored by one of the two only")
    if total.largest > bound:
        worst = next(one.slide_id for one in made.slides if one.numbers["max"] == total.largest)
        reasons.append(f"the largest |dp| is {total.largest:.3g}, in {worst}; {bound:g} is the bound")
    if not total.n:
        reasons.append("no cell is scored by both")
    found = made.pooled().found
    if found is not None and not found.same:
        reasons.append(lesions_told(found))
    return reasons


def sentence(made: Comparison) -> str:
    """Return what a paper would say."""
    total, found = made.total, made.pooled().found
    cells, flips = total.n, total.up + total.down
    many = f"{len(made.slides)} slide{'' if len(made.slides) == 1 else 's'}"
    if not cells:
        return f"{made.names[0]} and {made.names[1]} score no common cell over {many}."
    bound = proportions.upper_bound(flips, cells)
    same = not flips and (found is None or found.same)
    verb = f"equals {made.names[0]} within" if same else f"differs from {made.names[0]} by at most"
    lesions = f"; {lesions_told(found)}" if found is not None else ""
    return (
        f"{made.names[1]} {verb} {total.largest:.2g} (max |dp|; mean {total.total_abs / cells:.2g}) over {many}: "
        f"{flips:,} of {cells:,} decisions at {made.threshold:g} flip "
        f"(at most {bound:.2g} at 95 %, were cells independent){lesions}."
    )


class _Run:
    """What a run's folder says of its slides."""

    def __init__(self, root: Path) -> None:
        """Read the plan, and the matches where the run was scored."""
        made = latest_plan(root)
        self.root = root
        self.planned = {slide.slide_id for slide in made.slides} | {slide.slide_id for slide in made.rejected}
        self.slides = {slide.slide_id: slide for slide in made.slides if self.heatmap(slide.slide_id).is_file()}
        paths = [root / folder / "matches.json" for folder in ("evaluation", "evaluation-PARTIAL")]
        scored = next((path for path in paths if path.is_file()), None)
        recorded = matches.read_matches(scored).slides if scored else []
        self.truth = {one.slide_id: one for one in recorded if one.in_froc}

    def heatmap(self, slide_id: str) -> Path:
        """Return where a slide's heatmap lies."""
        return self.root / f"heatmaps/{slide_id}.tif"

    def points_um(self, slide_id: str) -> NDArray[np.float64]:
        """Return x and y of a slide's detections, um from its corner."""
        found = detections.read_detections(self.root / f"detections/{slide_id}.csv")
        return found[:, 1:] * self.slides[slide_id].um_px_l0

    def hits(self, slide_id: str) -> NDArray[np.bool_] | None:
        """Return which true lesions have a detection, or None where the truth is not known."""
        one = self.truth.get(slide_id)
        if one is None:
            return None
        return np.array([best is not None for k, best in enumerate(one.best) if k not in one.itc], np.bool_)


class _Map:
    """A heatmap's place on the grid of its slide."""

    def __init__(self, rows: files.HeatmapRows, path: Path) -> None:
        """Read where the map begins, in cells from the slide's corner."""
        self.rows, self.path = rows, path
        frame = rows.description.get("frame")
        if not isinstance(frame, Mapping) or not {*_GRID, "t_col0", "t_row0", "tile_px"} <= frame.keys():
            raise InputError("it does not say which grid it lies on", "give a heatmap that wsiflow wrote", path=path)
        self.grid = {name: frame[name] for name in _GRID}
        per_tile = frame["tile_px"] // frame["stride_px"]
        self.origin = (frame["t_row0"] * per_tile, frame["t_col0"] * per_tile)

    def told(self) -> str:
        """Return the grid in words."""
        return (
            f"stride {self.grid['stride_px']} px at {self.grid['um_px']:g} um/px, {self.grid['convention']}, "
            f"on {self.grid['l0_width_px']} x {self.grid['l0_height_px']} px"
        )

    def band(self, first_row: int, end_row: int, first_col: int, end_col: int) -> NDArray[np.float32]:
        """Return the cells of a window of the slide's grid, NaN where the map has none."""
        out = np.full((end_row - first_row, end_col - first_col), np.nan, np.float32)
        top, left = self.origin
        start, end = max(first_row, top), min(end_row, top + self.rows.shape[0])
        if start < end:
            cols = slice(left - first_col, left - first_col + self.rows.shape[1])
            out[start - first_row : end - first_row, cols] = self.rows.rows(start - top, end - top)
        return out


def _check(a: Path, b: Path, threshold: float, radius_um: float) -> None:
    """Refuse what cannot be compared, before anything is read."""
    if not 0 <= threshold <= 1:
        raise InputError(f"the threshold is {threshold}", "give a probability, 0 to 1")
    if not (math.isfinite(radius_um) and radius_um >= 0):
        raise InputError(f"the radius is {radius_um} um", "give a distance in um, at least 0")
    for path in (a, b):
        if not path.exists():
            raise InputError("it does not exist", "name two run folders, or two heatmaps", path=path)
    if a.is_dir() != b.is_dir():
        raise InputError(f"one is a folder and the other a file ({b})", "name two of a kind", path=a)


def _compare_runs(runs: tuple[_Run, _Run], names: tuple[str, str], threshold: float, radius_um: float) -> Comparison:
    """Compare the slides that both runs have, one at a time."""
    both = [slide_id for slide_id in runs[0].slides if slide_id in runs[1].slides]
    if not both:
        cause = f"it has no slide with a heatmap in common with {runs[1].root}"
        raise InputError(cause, "name two finished runs over the same slides", path=runs[0].root)
    slides, total = [], agreement.nothing()
    for slide_id in both:
        _same_slide(runs, slide_id)
        found = tally_files(*(run.heatmap(slide_id) for run in runs), threshold=threshold)
        slides.append(Slide(slide_id, agreement.numbers(found), _found(runs, slide_id, radius_um)))
        total = agreement.added(total, found)
    neither = (runs[0].planned | runs[1].planned) - runs[0].slides.keys() - runs[1].slides.keys()
    return Comparison(names, slides, total, _missing(runs, names), sorted(neither), threshold, radius_um)


def _same_grid(a: _Map, b: _Map) -> None:
    if a.grid != b.grid:
        cause = f"its grid is {a.told()}; that of {b.path} is {b.told()}"
        raise InputError(
            cause, "compare maps of one grid: run both settings at the same stride and spacing", path=a.path
        )


def _same_slide(runs: tuple[_Run, _Run], slide_id: str) -> None:
    ours, theirs = (run.slides[slide_id].sha256 for run in runs)
    if ours != theirs:
        cause = f"its file is another one in {runs[1].root} (SHA-256 {theirs[:12]}, {ours[:12]} here)"
        raise InputError(cause, "compare runs over the same slides", slide=slide_id, path=runs[0].root)


def _found(runs: tuple[_Run, _Run], slide_id: str, radius_um: float) -> Found:
    """Compare the detections of a slide, and where both runs know the truth, the true lesions they hit."""
    points = [run.points_um(slide_id) for run in runs]
    pairing = agreement.pair(*points, reach=radius_um)
    alone = Found(len(points[0]), len(points[1]), int(pairing.lost.sum()), int(pairing.gained.sum()))
    truths = [run.truth.get(slide_id) for run in runs]
    hits = [run.hits(slide_id) for run in runs]
    if truths[0] is None or truths[1] is None or hits[0] is None or hits[1] is None:
        return alone
    if truths[0].truth != truths[1].truth:
        cause = f"its truth is another one in {runs[1].root}"
        raise InputError(cause, "score both runs against the same truth", slide=slide_id, path=runs[0].root)
    lost, gained = int((hits[0] & ~hits[1]).sum()), int((hits[1] & ~hits[0]).sum())
    return alone._replace(true=len(hits[0]), true_lost=lost, true_gained=gained)


def _missing(runs: tuple[_Run, _Run], names: tuple[str, str]) -> list[str]:
    """Say which slides only one of the runs has a heatmap of."""
    told = []
    for (mine, theirs), name in zip((runs, runs[::-1]), names, strict=True):
        told += [f"{slide_id} has no heatmap in {name}" for slide_id in theirs.slides if slide_id not in mine.slides]
    return told


def _summed(known: Sequence[Found]) -> Found:
    a, b, lost, gained, true_lost, true_gained = (
        sum(getattr(one, name) for one in known) for name in ("a", "b", "lost", "gained", "true_lost", "true_gained")
    )
    true = [one.true for one in known if one.true is not None]
    return Found(a, b, lost, gained, sum(true) if true else None, true_lost, true_gained)


def lesions_told(found: Found) -> str:
    """Return the lesions gained and lost in words."""
    told = f"lesions gained {found.gained}, lost {found.lost} of {found.a} detections"
    if found.true is None:
        return told
    return f"{told}; true lesions gained {found.true_gained}, lost {found.true_lost} of {found.true}"
