"""Read the truth of a slide: its lesions at evaluation resolution, from outlines or from a mask image."""

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError, WsiflowError
from wsiflow.evaluation import froc
from wsiflow.evaluation.froc import LesionMask
from wsiflow.evaluation.protocol import EvaluationParams
from wsiflow.plan.slide_plan import SlidePlan
from wsiflow.slides import annotations, content, pyramid
from wsiflow.slides.annotations import TumourOutline
from wsiflow.slides.manifest import Case

_PADDING_M_PX = 16  # a tile of 512 px at 1/32
_MAX_MASK_PX = 2**30  # a larger evaluation mask comes from an outline at an impossible place


@dataclass(frozen=True, eq=False)
class Truth:
    """The annotated regions of a slide.

    Attributes:
        lesions: The regions; a slide without tumour has none.
        note: A remark for readers of the scores, for example on outlines without area; else empty.
    """

    lesions: LesionMask
    note: str = ""


def planned_truth(planned: SlidePlan, case: Case, params: EvaluationParams) -> Truth | None:
    """Read a slide's annotated regions at the spacing and size of its plan; see `read_truth`."""
    sized = dataclasses.replace(case, mpp=planned.um_px_l0)
    l0_size_px = (planned.frame.l0_width_px, planned.frame.l0_height_px)
    return read_truth(sized, params, l0_size_px=l0_size_px)


def read_truth(
    case: Case,
    params: EvaluationParams,
    *,
    l0_size_px: tuple[int, int] | None = None,
    mask_downsample: int | None = None,
) -> Truth | None:
    """Read a slide's annotated regions from its mask image, else from its outlines.

    Args:
        case: The slide; its mpp is used unless the parameters fix one for all slides.
        params: Downsample and spacing of the evaluation mask.
        l0_size_px: Width and height of the slide in level-0 px. None where they are not known: the evaluation mask is
            then as large as the outlines need.
        mask_downsample: Downsample at which a mask image is read; None for that of the evaluation.

    Returns:
        The regions; None where the slide has neither mask nor annotation, or the protocol excludes it.

    Raises:
        InputError: A file cannot be used, or no spacing is known.
    """
    marked = _marked(case, params, l0_size_px, mask_downsample)
    return None if marked is None else Truth(_regions(marked.tumour, marked.m_um_px, params), marked.note)


def check_truth(case: Case, params: EvaluationParams, *, l0_size_px: tuple[int, int]) -> None:
    """Check that a slide can be scored against its truth, before any work is done for the slide.

    Args:
        case: The slide, with its mpp.
        params: How the slide will be scored.
        l0_size_px: Width and height of the slide in level-0 px.

    Raises:
        InputError: See `read_truth`; or the label contradicts the truth.
    """
    marked = _marked(case, params, l0_size_px, None)
    if marked is not None:
        path = case.mask_path or case.annotation_path
        require_agreement(case.slide_id, case.label, has_tumour=bool(marked.tumour.any()), path=path)


class _Marked(NamedTuple):
    """Annotated tumour as bool (rows, cols) at evaluation resolution, the side of its pixels in um, and a note."""

    tumour: NDArray[np.bool_]
    m_um_px: float
    note: str = ""


def _marked(
    case: Case, params: EvaluationParams, l0_size_px: tuple[int, int] | None, mask_downsample: int | None
) -> _Marked | None:
    """Read the mask image, else the outlines; None where there is neither, or the protocol excludes the slide."""
    path = case.mask_path or case.annotation_path
    if params.excluded(case.slide_id) == "all" or path is None:
        return None
    try:
        content.require_file(path, what="truth")
        if case.mask_path is not None:
            return _painted(case, case.mask_path, params, l0_size_px, mask_downsample)
        return _drawn(case, path, params, l0_size_px)
    except WsiflowError as error:
        raise error.about(slide=case.slide_id) from error


def _painted(
    case: Case,
    path: Path,
    params: EvaluationParams,
    l0_size_px: tuple[int, int] | None,
    mask_downsample: int | None,
) -> _Marked:
    values = pyramid.read_level(path, mask_downsample or params.downsample)
    if l0_size_px is not None:
        _check_size(values.shape, _slide_shape(l0_size_px, params.downsample), case)
    if case.label is None and not params.mask_tumour and values.max(initial=0) == 1:
        cause = "the mask holds only 0 and 1, which may mean tumour, or tissue in a mask of 0, 1 and 2"
        remedy = (
            f"say in the manifest whether the slide is tumour or normal (label), or {annotations.NAME_TUMOUR_VALUES}"
        )
        raise InputError(cause, remedy, path=path)
    tumour = annotations.tumour_from_mask(values, path, label=case.label, named=params.mask_tumour)
    return _Marked(tumour, _m_um_px(case, params))


def _drawn(case: Case, path: Path, params: EvaluationParams, l0_size_px: tuple[int, int] | None) -> _Marked:
    outline, m_um_px = annotations.read_asap(path, l0_size_px=l0_size_px), _m_um_px(case, params)
    shape = _shape(outline, params, m_um_px, l0_size_px)
    if math.prod(shape) > _MAX_MASK_PX:
        raise InputError(f"the outlines reach {shape[1]} x {shape[0]} mask px", "give them in level-0 px", path=path)
    tumour = annotations.tumour_mask(outline, shape, downsample=params.downsample)
    if case.label is None and outline.tumour and not tumour.any():  # the slide would silently count as normal
        cause = f"{len(outline.tumour)} tumour outlines hold no pixel of the evaluation mask"
        remedy = "give them in level-0 px, or say in the manifest whether the slide is tumour or normal (label)"
        raise InputError(cause, remedy, path=path)
    note = f"outlines without area: {', '.join(outline.without_area)}" if outline.without_area else ""
    return _Marked(tumour, m_um_px, note)


def truth_sha256(label: int | None, lesions: LesionMask | None) -> str:
    """Return the SHA-256 of a slide's label and regions; it does not depend on the extent of the mask around them."""
    digest = hashlib.sha256(f"label {label}".encode())
    if lesions is not None and lesions.n_regions:
        box = [np.flatnonzero(lesions.labels.any(axis=axis)) for axis in (1, 0)]
        (top, bottom), (left, right) = ((int(hit[0]), int(hit[-1]) + 1) for hit in box)
        digest.update(f"at {top} {bottom} {left} {right} itc {sorted(lesions.itc)}".encode())
        digest.update(np.ascontiguousarray(lesions.labels[top:bottom, left:right], "<i4").tobytes())
    return digest.hexdigest()


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
    outline: TumourOutline, params: EvaluationParams, m_um_px: float, l0_size_px: tuple[int, int] | None
) -> tuple[int, int]:
    """Return rows and columns of the slide's mask, or of a mask that holds the dilated outlines."""
    if l0_size_px is not None:
        return _slide_shape(l0_size_px, params.downsample)
    margin = math.ceil(params.join_um / (2 * m_um_px)) + 2
    corners = [polygon.max(axis=0) for polygon in outline.tumour]
    x, y = np.max([(0.0, 0.0), *corners], axis=0)
    return math.ceil(y / params.downsample) + margin, math.ceil(x / params.downsample) + margin
