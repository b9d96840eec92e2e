"""Compare the heatmaps of two runs cell by cell, and count the decisions and lesions that change.

Input: two run folders, or two heatmap files. Output: a `MapComparison`, and sentences on it.

Maps are read in bands, so a comparison needs little memory whatever their size. Both must lie on one grid: the same
stride, spacing, convention and slide. One map may cover more of that grid than the other. Detections are those that
each run published.
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
from wsiflow.run.plan import latest_plan as latest_plan
from wsiflow.run.stages.stitch import map_file
from wsiflow.slides import pyramid

NOT_EQUIVALENT = 10
"""Exit code of ``wsiflow compare-maps`` where two settings are not equivalent within the bound."""

_BAND = pyramid.TILE_PX
_GRID = ("convention", "l0_width_px", "l0_height_px", "l0_per_px", "um_px", "stride_px")


class LesionAgreement(NamedTuple):
    """How far two settings agree in the lesions that they detect, in one slide or in several.

    Attributes:
        a, b: Number of detections in setting A and in setting B.
        lost: Number of A's detections that have no partner among B's within the radius.
        gained: Number of B's detections that have no partner among A's within the radius.
        true: Number of annotated lesions, isolated tumour cells not counted; None where no truth is known.
        true_lost, true_gained: Number of annotated lesions that only A, or only B, detects.
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
        """Whether no lesion is lost and none is gained."""
        return not any((self.lost, self.gained, self.true_lost, self.true_gained))


class SlideAgreement(NamedTuple):
    """How far two settings agree on one slide, or on all of them.

    Attributes:
        slide_id: Name of the slide; ``all`` stands for all slides together.
        numbers: Agreement of the cells, see `agreement.tally_numbers`. The slide's tally itself takes 2 MB and is not
            kept.
        lesions: Agreement of the detections; None where two heatmap files were compared.
    """

    slide_id: str
    numbers: dict[str, float]
    lesions: LesionAgreement | None


@dataclasses.dataclass(frozen=True, eq=False)
class MapComparison:
    """The maps of two settings, compared slide by slide.

    Attributes:
        names: Names of the settings A and B.
        slides: Agreement on each slide that has a heatmap in both settings.
        total: Tally over the cells of all these slides.
        missing: A sentence for each slide that has a heatmap in one of the settings only.
        neither: Slides that were planned and have a heatmap in neither setting.
        threshold: A cell is positive from this score on.
        radius_um: Two detections at most this far apart, um, are the same lesion.
    """

    names: tuple[str, str]
    slides: list[SlideAgreement]
    total: Tally
    missing: list[str]
    neither: list[str]
    threshold: float
    radius_um: float

    def pooled(self) -> SlideAgreement:
        """Return the agreement over all slides together."""
        known = [one.lesions for one in self.slides if one.lesions is not None]
        return SlideAgreement("all", agreement.tally_numbers(self.total), _summed(known) if known else None)


def compare_maps(a: Path, b: Path, *, threshold: float, radius_um: float, of_class: str = "") -> MapComparison:
    """Compare two runs, or two heatmap files.

    Args:
        a: Folder of a run, or a heatmap.
        b: Folder of the other run, or the other heatmap.
        threshold: A cell is positive from this score on, 0 to 1.
        radius_um: Two detections at most this far apart, um, are the same lesion.
        of_class: Further class of the runs whose maps are compared; empty for the maps of the positive score, of which
            the lesions are compared too.

    Raises:
        InputError: One is a folder and the other a file, the runs have no slide in common, a run does not map the
            class, or the maps lie on different grids.
    """
    _check(a, b, threshold, radius_um)
    names = (a.name, b.name) if a.name != b.name else (str(a), str(b))
    if a.is_dir():
        return _compare_runs((_RunFolder(a, of_class), _RunFolder(b, of_class)), names, threshold, radius_um)
    if of_class:
        raise InputError(f"a class is named, {of_class!r}, and {a} is a file", "name two run folders", path=a)
    total = tally_files(a, b, threshold=threshold)
    return MapComparison(
        names, [SlideAgreement(a.stem, agreement.tally_numbers(total), None)], total, [], [], threshold, radius_um
    )


def tally_files(a: Path, b: Path, *, threshold: float) -> Tally:
    """Tally the cells of two heatmap files, band by band.

    Raises:
        InputError: A file cannot be read, or the maps lie on different grids; the message describes both grids.
    """
    with files.open_heatmap(a) as left, files.open_heatmap(b) as right:
        maps = _PlacedMap(left, a), _PlacedMap(right, b)
        _same_grid(*maps)
        first_row, first_col = (min(one.origin[axis] for one in maps) for axis in (0, 1))
        end_row, end_col = (max(one.origin[axis] + one.rows.shape[axis] for one in maps) for axis in (0, 1))
        total = agreement.empty_tally()
        for row in range(first_row, end_row, _BAND):
            window = (row, min(row + _BAND, end_row), first_col, end_col)
            band = agreement.tally(maps[0].band(*window), maps[1].band(*window), threshold=threshold)
            total = agreement.merge_tallies(total, band)
    return total


def reasons_not_equivalent(comparison: MapComparison, bound: float) -> list[str]:
    """Return the reasons why two settings are not equivalent within a bound; empty where they are equivalent.

    Two settings are equivalent where both score the same cells of the same slides, no score differs by more than the
    bound, and no lesion is gained or lost.

    Args:
        comparison: The compared maps.
        bound: Largest difference of two scores that is still accepted, 0 to 1.
    """
    total, reasons = comparison.total, list(comparison.missing)
    if comparison.neither:
        reasons.append(f"neither has a heatmap of {len(comparison.neither)} planned slides")
    if total.only_a or total.only_b:
        reasons.append(f"{total.only_a + total.only_b} cells are scored by one of the two only")
    if total.largest > bound:
        worst = next(one.slide_id for one in comparison.slides if one.numbers["max"] == total.largest)
        reasons.append(f"the largest |dp| is {total.largest:.3g}, in {worst}; {bound:g} is the bound")
    if not total.n:
        reasons.append("no cell is scored by both")
    lesions = comparison.pooled().lesions
    if lesions is not None and not lesions.same:
        reasons.append(lesion_sentence(lesions))
    return reasons


def summary_sentence(comparison: MapComparison) -> str:
    """Return the comparison as one sentence that can be quoted in a paper."""
    total, pooled = comparison.total, comparison.pooled().lesions
    cells, flips = total.n, total.up + total.down
    many = f"{len(comparison.slides)} slide{'' if len(comparison.slides) == 1 else 's'}"
    if not cells:
        return f"{comparison.names[0]} and {comparison.names[1]} score no common cell over {many}."
    bound = proportions.upper_bound(flips, cells)
    same = not flips and (pooled is None or pooled.same)
    verb = f"equals {comparison.names[0]} within" if same else f"differs from {comparison.names[0]} by at most"
    lesions = f"; {lesion_sentence(pooled)}" if pooled is not None else ""
    return (
        f"{comparison.names[1]} {verb} {total.largest:.2g} (max |dp|; mean {total.total_abs / cells:.2g}) over {many}: "
        f"{flips:,} of {cells:,} decisions at {comparison.threshold:g} flip "
        f"(at most {bound:.2g} at 95 %, were cells independent){lesions}."
    )


class _RunFolder:
    """The slides of a run as its folder describes them."""

    def __init__(self, root: Path, of_class: str = "") -> None:
        """Read the plan, and ``matches.json`` where the run was scored.

        Args:
            root: The run's folder.
            of_class: Further class whose heatmaps are asked for; empty for the positive score.

        Raises:
            InputError: The run does not map the class.
        """
        plan = latest_plan(root)
        self.root, self.of_class = root, of_class
        self.file = map_file(plan.settings.maps, of_class, root) if of_class else "heatmaps/{slide}.tif"
        self.planned = {slide.slide_id for slide in plan.slides} | {slide.slide_id for slide in plan.rejected}
        self.slides = {slide.slide_id: slide for slide in plan.slides if self.heatmap(slide.slide_id).is_file()}
        paths = [root / folder / "matches.json" for folder in ("evaluation", "evaluation-PARTIAL")]
        scored = next((path for path in paths if path.is_file()), None)
        records = matches.read_matches(scored).slides if scored else []
        self.truth = {one.slide_id: one for one in records if one.in_froc}

    def heatmap(self, slide_id: str) -> Path:
        """Return the path of a slide's heatmap."""
        return self.root / self.file.format(slide=slide_id)

    def points_um(self, slide_id: str) -> NDArray[np.float64]:
        """Return the detections of a slide as float64 (n, 2): x and y in um from the slide's top left corner."""
        l0_points = detections.read_detections(self.root / f"detections/{slide_id}.csv")
        return l0_points[:, 1:] * self.slides[slide_id].um_px_l0

    def hits(self, slide_id: str) -> NDArray[np.bool_] | None:
        """Return bool (lesions,), which annotated lesions have a detection; None where no truth is known."""
        one = self.truth.get(slide_id)
        if one is None:
            return None
        return np.array([best is not None for k, best in enumerate(one.best) if k not in one.itc], np.bool_)


class _PlacedMap:
    """An open heatmap with its place on the grid of its slide."""

    def __init__(self, rows: files.HeatmapRows, path: Path) -> None:
        """Read the first row and column of the map, in cells from the slide's top left corner."""
        self.rows, self.path = rows, path
        frame = rows.description.get("frame")
        if not isinstance(frame, Mapping) or not {*_GRID, "t_col0", "t_row0", "tile_px"} <= frame.keys():
            cause = "the heatmap does not say which grid of cells it lies on"
            raise InputError(cause, "give a heatmap that wsiflow wrote", path=path)
        self.grid = {name: frame[name] for name in _GRID}
        per_tile = frame["tile_px"] // frame["stride_px"]
        self.origin = (frame["t_row0"] * per_tile, frame["t_col0"] * per_tile)

    def grid_text(self) -> str:
        """Return the grid in words, for messages."""
        return (
            f"stride {self.grid['stride_px']} px at {self.grid['um_px']:g} um/px, {self.grid['convention']}, "
            f"on {self.grid['l0_width_px']} x {self.grid['l0_height_px']} px"
        )

    def band(self, first_row: int, end_row: int, first_col: int, end_col: int) -> NDArray[np.float32]:
        """Return float32 (rows, cols), the cells of a window of the slide's grid; NaN where the map has none."""
        out = np.full((end_row - first_row, end_col - first_col), np.nan, np.float32)
        top, left = self.origin
        start, end = max(first_row, top), min(end_row, top + self.rows.shape[0])
        if start < end:
            cols = slice(left - first_col, left - first_col + self.rows.shape[1])
            out[start - first_row : end - first_row, cols] = self.rows.rows(start - top, end - top)
        return out


def _check(a: Path, b: Path, threshold: float, radius_um: float) -> None:
    """Refuse arguments that cannot be compared, before any file is read."""
    if not 0 <= threshold <= 1:
        raise InputError(f"the threshold is {threshold}", "give a probability, 0 to 1")
    if not (math.isfinite(radius_um) and radius_um >= 0):
        raise InputError(f"the radius is {radius_um} um", "give a distance in um, at least 0")
    for path in (a, b):
        if not path.exists():
            raise InputError("this path does not exist", "name two run folders, or two heatmaps", path=path)
    if a.is_dir() != b.is_dir():
        cause = f"one of the two is a folder and the other ({b}) a file"
        raise InputError(cause, "name two run folders, or two heatmaps", path=a)


def _compare_runs(
    runs: tuple[_RunFolder, _RunFolder], names: tuple[str, str], threshold: float, radius_um: float
) -> MapComparison:
    """Compare the slides that both runs have, one at a time."""
    both = [slide_id for slide_id in runs[0].slides if slide_id in runs[1].slides]
    if not both:
        cause = f"this run has no slide with a heatmap in common with {runs[1].root}"
        raise InputError(cause, "name two finished runs over the same slides", path=runs[0].root)
    slides, total = [], agreement.empty_tally()
    for slide_id in both:
        _same_slide(runs, slide_id)
        tally = tally_files(*(run.heatmap(slide_id) for run in runs), threshold=threshold)
        lesions = None if runs[0].of_class else _lesion_agreement(runs, slide_id, radius_um)
        slides.append(SlideAgreement(slide_id, agreement.tally_numbers(tally), lesions))
        total = agreement.merge_tallies(total, tally)
    neither = (runs[0].planned | runs[1].planned) - runs[0].slides.keys() - runs[1].slides.keys()
    return MapComparison(names, slides, total, _missing(runs, names), sorted(neither), threshold, radius_um)


def _same_grid(a: _PlacedMap, b: _PlacedMap) -> None:
    if a.grid != b.grid:
        cause = f"its grid is {a.grid_text()}; that of {b.path} is {b.grid_text()}"
        raise InputError(
            cause, "compare maps of one grid: run both settings at the same stride and spacing", path=a.path
        )


def _same_slide(runs: tuple[_RunFolder, _RunFolder], slide_id: str) -> None:
    ours, theirs = (run.slides[slide_id].sha256 for run in runs)
    if ours != theirs:
        cause = f"the slide is another file in {runs[1].root} (SHA-256 {theirs[:12]} there, {ours[:12]} here)"
        raise InputError(cause, "compare runs over the same slides", slide=slide_id, path=runs[0].root)


def _lesion_agreement(runs: tuple[_RunFolder, _RunFolder], slide_id: str, radius_um: float) -> LesionAgreement:
    """Compare the detections of a slide and, where both runs know the truth, the annotated lesions that they hit."""
    points = [run.points_um(slide_id) for run in runs]
    pairing = agreement.pair_detections(*points, reach=radius_um)
    alone = LesionAgreement(len(points[0]), len(points[1]), int(pairing.lost.sum()), int(pairing.gained.sum()))
    truths = [run.truth.get(slide_id) for run in runs]
    hits = [run.hits(slide_id) for run in runs]
    if truths[0] is None or truths[1] is None or hits[0] is None or hits[1] is None:
        return alone
    if truths[0].truth != truths[1].truth:
        cause = f"the slide was scored against another truth in {runs[1].root}"
        raise InputError(cause, "score both runs against the same truth", slide=slide_id, path=runs[0].root)
    lost, gained = int((hits[0] & ~hits[1]).sum()), int((hits[1] & ~hits[0]).sum())
    return alone._replace(true=len(hits[0]), true_lost=lost, true_gained=gained)


def _missing(runs: tuple[_RunFolder, _RunFolder], names: tuple[str, str]) -> list[str]:
    """Return a sentence for each slide that has a heatmap in one of the runs only."""
    sentences = []
    for (mine, theirs), name in zip((runs, runs[::-1]), names, strict=True):
        absent = [slide_id for slide_id in theirs.slides if slide_id not in mine.slides]
        sentences += [f"{slide_id} has no heatmap in {name}" for slide_id in absent]
    return sentences


def _summed(known: Sequence[LesionAgreement]) -> LesionAgreement:
    a, b, lost, gained, true_lost, true_gained = (
        sum(getattr(one, name) for one in known) for name in ("a", "b", "lost", "gained", "true_lost", "true_gained")
    )
    true = [one.true for one in known if one.true is not None]
    return LesionAgreement(a, b, lost, gained, sum(true) if true else None, true_lost, true_gained)


def lesion_sentence(lesions: LesionAgreement) -> str:
    """Return the numbers of gained and lost detections and annotated lesions as text."""
    text = f"lesions gained {lesions.gained}, lost {lesions.lost} of {lesions.a} detections"
    if lesions.true is None:
        return text
    return f"{text}; true lesions gained {lesions.true_gained}, lost {lesions.true_lost} of {lesions.true}"
