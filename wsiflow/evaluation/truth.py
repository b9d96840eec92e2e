"""Read the truth of a slide: its lesions at evaluation resolution, from outlines or from a mask image.

A mask image comes first where both are given. Outlines are placed by what the slide states where their format needs
that; the slide is then opened, and no pixel of it is read.
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError, WsiflowError
from wsiflow.evaluation import froc
from wsiflow.evaluation.froc import LesionMask
from wsiflow.evaluation.protocol import EvaluationParams
from wsiflow.plan.slide_plan import SlidePlan
from wsiflow.slides import annotations, content, pixel_size, pyramid, slide
from wsiflow.slides.annotations import SlidePlace, TruthOutlines
from wsiflow.slides.manifest import Case
from wsiflow.slides.slide import SlideFacts

_PADDING_M_PX = 16  # a tile of 512 px at 1/32
_MAX_MASK_PX = 2**30  # a larger evaluation mask comes from an outline at an impossible place
_NEARLY_ALL = 0.9  # of the tissue: a truth that covers as much of it is doubted
_CROPPED = frozenset({".mrxs", ".scn", ".bif", ".czi", ".dcm"})  # extensions of slides that may state bounds


@dataclass(frozen=True, eq=False)
class Truth:
    """The annotated regions of a slide.

    Attributes:
        lesions: The regions; a slide without tumour has none.
        note: A remark for readers of the scores, for example on outlines without area; else empty.
        ignored: bool (rows, cols) at the resolution of the regions, where detections are neither hits nor false
            positives; None where nothing is ignored.
        tumour: bool (rows, cols), what was annotated, before regions were joined; None where it is not kept.
        m_um_px: Side of a pixel of these masks, um.
        drawn: The outlines, where the truth is given as outlines; None where it is a mask image.
    """

    lesions: LesionMask
    note: str = ""
    ignored: NDArray[np.bool_] | None = None
    tumour: NDArray[np.bool_] | None = None
    m_um_px: float = 1.0
    drawn: TruthOutlines | None = None


class Marks(NamedTuple):
    """What is annotated on a slide, at evaluation resolution.

    Attributes:
        tumour: bool (rows, cols), annotated tumour as it was drawn.
        m_um_px: Side of its pixels in um.
        note: See `Truth`.
        ignored: See `Truth`.
        drawn: See `Truth`.
    """

    tumour: NDArray[np.bool_]
    m_um_px: float
    note: str = ""
    ignored: NDArray[np.bool_] | None = None
    drawn: TruthOutlines | None = None


def planned_truth(planned: SlidePlan, case: Case, params: EvaluationParams) -> Truth | None:
    """Read a slide's annotated regions at the spacing and size of its plan; see `read_truth`."""
    return as_truth(planned_marks(planned, case, params), params)


def planned_marks(planned: SlidePlan, case: Case, params: EvaluationParams) -> Marks | None:
    """Read what is annotated on a slide, at the spacing and size of its plan; None where nothing is."""
    sized = dataclasses.replace(case, mpp=planned.um_px_l0)
    return _marks(sized, params, (planned.frame.l0_width_px, planned.frame.l0_height_px))


def planned_outlines(planned: SlidePlan, case: Case, params: EvaluationParams) -> TruthOutlines | None:
    """Read what is drawn on a slide, in level-0 px; None where its truth is a mask image, or it has none.

    Raises:
        InputError: The file cannot be used, or cannot be placed on the slide.
    """
    if case.mask_path is not None or case.annotation_path is None:
        return None
    l0_size_px = planned.frame.l0_width_px, planned.frame.l0_height_px
    try:
        content.require_file(case.annotation_path, what="truth")
        return _outlines(case, case.annotation_path, params, l0_size_px, None)
    except WsiflowError as error:
        raise error.about(slide=case.slide_id) from error


def read_truth(
    case: Case,
    params: EvaluationParams,
    *,
    l0_size_px: tuple[int, int] | None = None,
    mask_downsample: int | None = None,
    place: SlidePlace | None = None,
) -> Truth | None:
    """Read a slide's annotated regions from its mask image, else from its outlines.

    Args:
        case: The slide; its mpp is used unless the parameters fix one for all slides.
        params: Downsample and spacing of the evaluation mask.
        l0_size_px: Width and height of the slide in level-0 px. None where they are not known: the evaluation mask is
            then as large as the outlines need.
        mask_downsample: Downsample at which a mask image is read; None for that of the evaluation.
        place: What the slide states; None to open it where the outlines cannot be placed without.

    Returns:
        The regions; None where the slide has neither mask nor annotation, or the protocol excludes it.

    Raises:
        InputError: A file cannot be used, or no spacing is known.
    """
    return as_truth(_marks(case, params, l0_size_px, mask_downsample, place), params)


def as_truth(marks: Marks | None, params: EvaluationParams) -> Truth | None:
    """Return annotated tumour as the regions that the protocol counts; None where nothing is annotated."""
    if marks is None:
        return None
    lesions = _regions(marks.tumour, marks.m_um_px, params)
    return Truth(lesions, marks.note, marks.ignored, marks.tumour, marks.m_um_px, marks.drawn)


def check_truth(case: Case, params: EvaluationParams, place: SlidePlace) -> Marks | None:
    """Check that a slide can be scored against its truth, before any work is done for the slide.

    Args:
        case: The slide, with its mpp.
        params: How the slide will be scored.
        place: What the slide states.

    Returns:
        What is annotated; None where nothing is.

    Raises:
        InputError: See `read_truth`; or the label contradicts the truth.
    """
    marks = _marks(case, params, place.l0_size_px, None, place)
    if marks is not None:
        path = case.mask_path or case.annotation_path
        require_agreement(case.slide_id, case.label, has_tumour=bool(marks.tumour.any()), path=path)
    return marks


def share_of_tissue(
    marks: Marks | None, tissue: NDArray[np.bool_], *, downsample: float, m_downsample: float
) -> float | None:
    """Return which part of the tissue of a slide is annotated as tumour where it is nearly all; None where it is less.

    Such a truth may be a tissue mask, with which every classifier scores perfectly.

    Args:
        marks: What is annotated; None where nothing is.
        tissue: bool (rows, cols), the tissue that was found.
        downsample: Level-0 px per pixel of the tissue.
        m_downsample: Level-0 px per pixel of the evaluation mask.
    """
    if marks is None or not marks.tumour.any():
        return None
    centres = ((np.arange(n) + 0.5) * (downsample / m_downsample) for n in tissue.shape)
    m_rows, m_cols = (np.minimum(at.astype(np.int64), n - 1) for at, n in zip(centres, marks.tumour.shape, strict=True))
    share = float((tissue & marks.tumour[np.ix_(m_rows, m_cols)]).sum() / max(1, tissue.sum()))
    return round(share, 4) if share >= _NEARLY_ALL else None


def place_of(facts: SlideFacts) -> SlidePlace:
    """Return what a slide states about the place of its annotations."""
    return SlidePlace(facts.l0_size_px, facts.l0_bounds_corner, facts.mpp, facts.centre_offset_nm)


class Stated(NamedTuple):
    """What a slide states about the place of its annotations, and the size of its pixels, um; None where not known."""

    place: SlidePlace
    um_px: float | None = None


def stated(case: Case) -> Stated:
    """Return what the slide of a case states.

    Of a slide that is missing or cannot be read nothing is known, except that slides of most formats have no bounds.
    """
    try:
        with slide.open_slide(case.path, slide_id=case.slide_id) as opened:
            return Stated(place_of(opened.facts), pixel_size.stated(opened.facts))
    except WsiflowError:
        return Stated(SlidePlace(l0_bounds_corner=None if case.path.suffix.lower() in _CROPPED else (0, 0)))


def _marks(
    case: Case,
    params: EvaluationParams,
    l0_size_px: tuple[int, int] | None,
    mask_downsample: int | None = None,
    place: SlidePlace | None = None,
) -> Marks | None:
    """Read the mask image, else the outlines; None where there is neither, or the protocol excludes the slide."""
    path = case.mask_path or case.annotation_path
    if params.excluded(case.slide_id) == "all" or path is None:
        return None
    try:
        content.require_file(path, what="truth")
        if case.mask_path is not None:
            return _painted(case, case.mask_path, params, l0_size_px, mask_downsample)
        return _drawn(case, path, params, l0_size_px, place)
    except WsiflowError as error:
        raise error.about(slide=case.slide_id) from error


def _painted(
    case: Case,
    path: Path,
    params: EvaluationParams,
    l0_size_px: tuple[int, int] | None,
    mask_downsample: int | None,
) -> Marks:
    if path.suffix.lower() in annotations.COMPANION_SUFFIXES:
        raise InputError("outlines are given as a mask image", "give them as annotation_path", path=path)
    values = pyramid.read_level(path, mask_downsample or params.downsample, coloured=False)
    if l0_size_px is not None:
        _check_size(values.shape, _slide_shape(l0_size_px, params.downsample), case)
    if case.label is None and not params.mask_tumour and values.max(initial=0) == 1:
        cause = "the mask holds only 0 and 1, which may mean tumour, or tissue in a mask of 0, 1 and 2"
        remedy = (
            f"say in the manifest whether the slide is tumour or normal (label), or {annotations.NAME_TUMOUR_VALUES}"
        )
        raise InputError(cause, remedy, path=path)
    tumour = annotations.tumour_from_mask(values, path, label=case.label, named=params.mask_tumour)
    return Marks(tumour, _m_um_px(case, params))


def _drawn(
    case: Case,
    path: Path,
    params: EvaluationParams,
    l0_size_px: tuple[int, int] | None,
    place: SlidePlace | None,
) -> Marks:
    m_um_px, outline = _m_um_px(case, params), _outlines(case, path, params, l0_size_px, place)
    remarks = annotations.check_on_slide(outline, l0_size_px, path) if l0_size_px is not None else ()
    shape = _shape(outline, params, m_um_px, l0_size_px)
    if math.prod(shape) > _MAX_MASK_PX:
        raise InputError(f"the outlines reach {shape[1]} x {shape[0]} mask px", "give them in level-0 px", path=path)
    tumour = annotations.tumour_mask(outline, shape, downsample=params.downsample)
    if case.label is None and outline.tumour and not tumour.any():  # the slide would silently count as normal
        cause = f"{len(outline.tumour)} tumour outlines hold no pixel of the evaluation mask"
        remedy = "give them in level-0 px, or say in the manifest whether the slide is tumour or normal (label)"
        raise InputError(cause, remedy, path=path)
    ignored = None
    if outline.ignored:
        ignored = annotations.painted(outline.ignored, shape, downsample=params.downsample)
    return Marks(tumour, m_um_px, "; ".join(filter(None, (outline.note, *remarks))), ignored, outline)


def _outlines(
    case: Case, path: Path, params: EvaluationParams, l0_size_px: tuple[int, int] | None, place: SlidePlace | None
) -> TruthOutlines:
    form = annotations.format_of(path)
    origin = form.origin if params.outline_origin == "auto" else params.outline_origin
    if place is None:
        needed = form.needs_slide or origin == "bounds"
        place = stated(case).place if needed else SlidePlace(l0_size_px, (0, 0))
    return annotations.read_outlines(path, place, origin=origin, groups=params.groups, label=case.label)


def files_sha256(*paths: Path | str | None) -> list[str | None]:
    """Return the hashes of the files of a slide's truth; None where there is none, or it cannot be read."""
    hashes: list[str | None] = []
    for path in paths:
        try:
            hashes.append(content.cached_sha256(Path(path)) if path else None)
        except WsiflowError:  # scoring says so
            hashes.append(None)
    return hashes


def truth_sha256(label: int | None, lesions: LesionMask | None, ignored: NDArray[np.bool_] | None = None) -> str:
    """Return the SHA-256 of a slide's label and regions; it does not depend on the extent of the mask around them."""
    digest = hashlib.sha256(f"label {label}".encode())
    if lesions is not None and lesions.n_regions:
        place, box = _boxed(lesions.labels)
        digest.update(f"at {place} itc {sorted(lesions.itc)}".encode())
        digest.update(np.ascontiguousarray(box, "<i4").tobytes())
    if ignored is not None and ignored.any():
        place, box = _boxed(ignored)
        digest.update(f"ignored at {place}".encode())
        digest.update(np.ascontiguousarray(box).tobytes())
    return digest.hexdigest()


def _boxed(mask: NDArray[Any]) -> tuple[str, NDArray[Any]]:
    """Return the place of the box around what is not 0 in a mask, as a text, and the part of the mask in it."""
    box = [np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0)]
    (top, bottom), (left, right) = ((int(hit[0]), int(hit[-1]) + 1) for hit in box)
    return f"{top} {bottom} {left} {right}", mask[top:bottom, left:right]


def _regions(tumour: NDArray[np.bool_], m_um_px: float, params: EvaluationParams) -> LesionMask:
    return froc.evaluation_mask(tumour, m_um_px, join_um=params.join_um, itc_um=params.itc_um)


def require_agreement(slide_id: str, label: int | None, *, has_tumour: bool, path: Path | None = None) -> None:
    """Check that a label, where one is given, agrees with the truth.

    Raises:
        InputError: It contradicts the truth.
    """
    if label is None or label == int(has_tumour):
        return
    cause = f"the label says {'tumour' if label else 'normal'} and the truth holds {'' if has_tumour else 'no '}tumour"
    remedy = "correct the label, or the truth (in level-0 px, at least a mask pixel large)"
    remedy += f", or, of a mask, {annotations.NAME_TUMOUR_VALUES}"
    raise InputError(cause, remedy, slide=slide_id, stage="evaluation", path=path or "")


def _m_um_px(case: Case, params: EvaluationParams) -> float:
    """Return the side of a pixel of the evaluation mask in um.

    Raises:
        InputError: Neither the parameters nor the manifest state the spacing of level 0.
    """
    l0_um_px = params.l0_um_px or case.mpp
    if l0_um_px is None:
        remedy = "add its mpp to the manifest, or fix one spacing for all slides"
        raise InputError("the spacing of the slide is not known", remedy, slide=case.slide_id, stage="evaluation")
    return l0_um_px * params.downsample


def _slide_shape(l0_size_px: tuple[int, int], downsample: int) -> tuple[int, int]:
    """Return rows and columns of an evaluation mask of the whole slide."""
    return math.ceil(l0_size_px[1] / downsample), math.ceil(l0_size_px[0] / downsample)


def _check_size(shape: tuple[int, ...], expected: tuple[int, int], case: Case) -> None:
    """Refuse a mask of another slide or another scale; a mask that is padded to whole tiles is accepted.

    On a slide of few tiles a mask of half its size is accepted too, since it lacks no more pixels than padding adds.

    Raises:
        InputError: The size is neither that of the slide nor a padded one.
    """
    if not all(_fits(a, b) for a, b in zip(shape, expected, strict=True)):
        cause = f"the mask is {shape[1]} x {shape[0]} px where the slide is {expected[1]} x {expected[0]}"
        remedy = "give the mask of this slide, with the slide's size at level 0"
        raise InputError(cause, remedy, slide=case.slide_id, path=case.mask_path)


def _fits(side: int, expected: int) -> bool:
    """Tell whether a side of a mask is that of the slide, up to rounding or to padding to whole tiles."""
    rounding = max(1, 0.02 * expected)
    padded = math.ceil(expected / _PADDING_M_PX) * _PADDING_M_PX
    return expected - rounding <= side <= max(padded, expected + rounding)


def _shape(
    outline: TruthOutlines, params: EvaluationParams, m_um_px: float, l0_size_px: tuple[int, int] | None
) -> tuple[int, int]:
    """Return rows and columns of the slide's mask, or of a mask that holds the dilated outlines."""
    if l0_size_px is not None:
        return _slide_shape(l0_size_px, params.downsample)
    margin = math.ceil(params.join_um / (2 * m_um_px)) + 2
    corners = [one.polygon.max(axis=0) for one in (*outline.tumour, *outline.ignored)]
    x, y = np.max([(0.0, 0.0), *corners], axis=0)
    return math.ceil(y / params.downsample) + margin, math.ceil(x / params.downsample) + margin
