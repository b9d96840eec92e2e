"""Where a slide is to be looked at, as a file says: a mask image, or outlines.

Input: a mask (PNG, TIFF) of any size that has the proportions of the slide, or a file of outlines. Output: a bool mask
(rows, cols) on the plane of an overview.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError
from wsiflow.slides import annotations, clam, content, pyramid
from wsiflow.slides.annotations import Outline, SlidePlace, painted
from wsiflow.slides.manifest import Case

IMAGE_SUFFIXES = (".png", ".tif", ".tiff")
OUTLINE_SUFFIXES = (".geojson", ".json", ".xml", ".annotations", ".ndpa")
TISSUE = "tissue"
"""The class of outlines that are tissue, where any is called so."""

FOLDERS = ("tissue", "tissue_masks")
"""Folders beside a slide in which the file of its tissue is looked for."""

_CUT_OUT = frozenset({"exclude", "exclusion", "ignore", "ignore*", "artifact", "artefact", "background", "hole"})
_ENDINGS = ("", "_mask", "-mask", "_tissue", "-tissue", "_tissue_mask")
_GRANDQC = frozenset(
    range(1, 8)
)  # 1 clean tissue, 2 fold, 3 dark spot, 4 pen, 5 edge or bubble, 6 out of focus, 7 none
_PLAIN = (frozenset({0, 1}), frozenset({0, 255}), frozenset({0, 1, 2}))
_PROPORTION = 0.02  # by which the proportions of a mask may differ from those of the slide, beside rounding
_OUTSIDE = 0.05  # part of the slide's side by which outlines may reach beyond it


class Plane(NamedTuple):
    """The plane of an overview.

    Attributes:
        l0_size_px: Width and height of the slide at level 0.
        downsample: Level-0 pixels per pixel of the overview.
        shape: Rows and columns of the overview.
        place: What readers of outlines need to know about the slide.
    """

    l0_size_px: tuple[int, int]
    downsample: float
    shape: tuple[int, int]
    place: SlidePlace


class Chosen(NamedTuple):
    """What of a file is meant.

    Attributes:
        names: Names or classes of outlines; empty for all.
        preferred: The class that is meant where ``names`` is empty and an outline has it.
        values: Values of masks; empty where the values say which of them are meant.
        names_key, values_key: The settings of names and of values, for messages; empty where there is none.
    """

    names: tuple[str, ...] = ()
    preferred: str = ""
    values: tuple[int, ...] = ()
    names_key: str = "tissue.outlines"
    values_key: str = "tissue.values"


def find_tissue_file(case: Case, folder: Path | None) -> Path:
    """Return the file that says where a slide's tissue is: that of the manifest, else the one called as the slide.

    Args:
        case: The slide.
        folder: Folder of the files; None for `FOLDERS` beside the slide.

    Raises:
        InputError: There is no such file, or there are several.
    """
    if case.tissue_mask_path is not None:
        return case.tissue_mask_path
    places = [folder] if folder else [case.path.parent / name for name in FOLDERS]
    suffixes = (*IMAGE_SUFFIXES, *OUTLINE_SUFFIXES, *clam.SUFFIXES)
    stems = dict.fromkeys(stem + end for stem in (case.slide_id, case.path.stem, case.path.name) for end in _ENDINGS)
    known = {f"{stem}{suffix}".casefold() for stem in stems for suffix in suffixes}
    listed = [path for place in places for path in _files_in(place, case.slide_id)]
    found = [path for path in listed if path.name.casefold() in known]
    if len(found) == 1:
        return found[0]
    remedy = "name it in the manifest (tissue_mask_path), or its folder (tissue.folder)"
    if found:
        names = ", ".join(path.name for path in found)
        cause = f"several files may say where its tissue is: {names}"
        raise InputError(cause, remedy, slide=case.slide_id, path=places[0])
    cause = f"tissue=given, and no file says where its tissue is (such as {case.slide_id}.png)"
    raise InputError(cause, remedy, slide=case.slide_id, path=places[0])


def _files_in(folder: Path, slide_id: str) -> list[Path]:
    """Return the files in a folder, sorted; none where there is no such folder."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise content.unlisted(error).about(slide=slide_id) from error


def read_region(path: Path, plane: Plane, chosen: Chosen) -> NDArray[np.bool_]:
    """Return where a file says that a slide is to be looked at, bool (rows, cols) of the plane.

    Raises:
        InputError: The file cannot be read, does not belong to the slide, or holds nothing of what is meant.
        EnvironmentFault: The system refuses to read the file.
    """
    if _is_mask(path):
        return _read_mask(path, plane, chosen)
    kept, cut = _read_areas(path, plane, chosen)
    drawn, without = (painted(each, plane.shape, downsample=plane.downsample) for each in (kept, cut))
    return drawn & ~without


def check_region(path: Path, plane: Plane, chosen: Chosen) -> None:
    """Check a file as far as that is known before the pixels of a mask are read; see `read_region`."""
    if _is_mask(path):
        rows, cols = pyramid.image_shape(path)
        _check_proportions((cols, rows), plane, path)
    else:
        _read_areas(path, plane, chosen)


def _is_mask(path: Path) -> bool:
    """Tell whether a file is a mask, and no file of outlines.

    Raises:
        InputError: It is neither, or there is no such file.
        EnvironmentFault: The system refuses to read the file.
    """
    content.require_file(path, what="region")
    suffix = path.suffix.lower()
    if suffix in (*IMAGE_SUFFIXES, *OUTLINE_SUFFIXES, *clam.SUFFIXES):
        return suffix in IMAGE_SUFFIXES
    known = ", ".join((*IMAGE_SUFFIXES, *OUTLINE_SUFFIXES, *clam.SUFFIXES))
    remedy = f"give a mask or outlines with one of the extensions {known}; JPEG changes the values of a mask"
    raise InputError(f"regions are not read from {suffix or 'a file without extension'}", remedy, path=path)


# --- outlines


def _read_areas(path: Path, plane: Plane, chosen: Chosen) -> tuple[Sequence[Outline], Sequence[Outline]]:
    """Return the outlines that are meant, and those that are cut out of them.

    Raises:
        InputError: The file outlines nothing, or nothing that is meant, or belongs to another slide.
    """
    is_clam = path.suffix.lower() in clam.SUFFIXES
    areas = clam.read_contours(path) if is_clam else _read_outlines(path, plane.place)
    if not areas:
        raise InputError("the file outlines no area", "draw polygons; points and lines enclose nothing", path=path)
    _check_places(areas, plane, path)
    return _choose(areas, chosen, path)


def _read_outlines(path: Path, place: SlidePlace) -> Sequence[Outline]:
    """Read outlines of any program.

    TRIDENT counts from the corner of level 0, as OpenSlide does, and not from that of the scanned area, as QuPath does;
    its outlines have an id of the tissue.
    """
    is_trident = path.suffix.lower() in {".geojson", ".json"} and b'"tissue_id"' in path.read_bytes()
    return annotations.read(path, place, origin="slide" if is_trident else None).outlines


def _choose(areas: Sequence[Outline], chosen: Chosen, path: Path) -> tuple[Sequence[Outline], Sequence[Outline]]:
    """Return the areas that are meant, and those that are cut out of them.

    Raises:
        InputError: None is meant.
    """
    present = {name.casefold(): name for area in areas for name in (area.group, area.name) if name}
    names = frozenset(name.casefold() for name in chosen.names)
    if not names and chosen.preferred in present:
        names = frozenset({chosen.preferred})
    cut = [area for area in areas if _is_called(area, _CUT_OUT - names)]
    kept = [area for area in areas if (_is_called(area, names) if names else area not in cut)]
    if not kept:
        listed = ", ".join(sorted(present.values(), key=str.casefold)) or "none"
        wanted = ", ".join(chosen.names) or "an area that is not cut out"
        cause = f"no outline is called {wanted}; the names there are: {listed}"
        raise InputError(cause, f"name one of them in {chosen.names_key}", path=path)
    return kept, cut


def _is_called(area: Outline, names: frozenset[str]) -> bool:
    return bool({name.casefold() for name in (area.name, area.group, *area.hints)} & names)


def _check_places(areas: Sequence[Outline], plane: Plane, path: Path) -> None:
    """Refuse outlines that lie outside the slide: those of another slide, or in other units.

    Raises:
        InputError: A point is farther outside than drawing explains.
    """
    points = np.concatenate([area.polygon for area in areas])
    size = np.array(plane.l0_size_px, np.float64)
    outside = ((points < -_OUTSIDE * size) | (points > (1 + _OUTSIDE) * size)).any(axis=1)
    if outside.any():
        x, y = points[outside][0].tolist()
        width, height = plane.l0_size_px
        cause = f"an outline has the point {x:g}, {y:g}, but the slide has {width} x {height} px"
        raise InputError(cause, "give the outlines of this slide, in level-0 px", path=path)


# --- masks


def _read_mask(path: Path, plane: Plane, chosen: Chosen) -> NDArray[np.bool_]:
    """Return the mask of an image at the centres of the plane's pixels.

    Raises:
        InputError: The image has other proportions than the slide, or unknown values.
    """
    rows, cols = pyramid.image_shape(path)
    _check_proportions((cols, rows), plane, path)
    l0_per_px = (plane.l0_size_px[0] / cols, plane.l0_size_px[1] / rows)
    step = max(1, math.floor(plane.downsample / max(l0_per_px)))
    level = pyramid.read_level(path, step, coloured=False)
    picks = [
        np.minimum((np.arange(count) + 0.5) * plane.downsample / (l0_px / side), side - 1).astype(np.int64)
        for count, l0_px, side in zip(plane.shape, plane.l0_size_px[::-1], level.shape, strict=True)
    ]
    meant = _meant(level, chosen, path)
    return meant[np.ix_(*picks)]


def _check_proportions(size_px: tuple[int, int], plane: Plane, path: Path) -> None:
    width, height = plane.l0_size_px
    if _has_proportions(size_px, (width, height)):
        return
    swapped = "; its sides are swapped" if _has_proportions(size_px[::-1], (width, height)) else ""
    cause = (
        f"the mask has {size_px[0]} x {size_px[1]} px, which are not the proportions of the slide's {width} x {height}"
    )
    raise InputError(f"{cause}{swapped}", "give a mask of the whole slide, of any size", path=path)


def _has_proportions(size_px: tuple[int, int], l0_size_px: tuple[int, int]) -> bool:
    """Tell whether a mask fits a slide, up to the rounding of its sides to whole pixels."""
    across, down = (l0_px / px for l0_px, px in zip(l0_size_px, size_px, strict=True))
    return abs(across / down - 1) <= _PROPORTION + 1 / size_px[0] + 1 / size_px[1]


def _meant(level: NDArray[np.uint8], chosen: Chosen, path: Path) -> NDArray[np.bool_]:
    """Return which pixels of a mask are meant, bool (rows, cols).

    Raises:
        InputError: The values do not say so, or none of the named values is there.
    """
    present = frozenset(np.flatnonzero(np.bincount(level.ravel(), minlength=256)).tolist())
    listed = ", ".join(map(str, sorted(present)[:8])) + (", ..." if len(present) > 8 else "")
    if chosen.values:
        return np.asarray(np.isin(np.arange(256), chosen.values)[level])
    if present <= _GRANDQC or (present <= _GRANDQC | {0} and max(present) > 2):
        return np.asarray(level == 1)
    if any(present <= plain for plain in _PLAIN):
        return np.asarray(level > 0)
    cause = f"the mask has the values {listed}, which do not say what is meant"
    named = f", or name the values that are meant, for example {chosen.values_key}=[{max(present)}]"
    remedy = f"write a lossless mask of 0 and 255{named if chosen.values_key else ''}"
    raise InputError(cause, remedy, path=path)
