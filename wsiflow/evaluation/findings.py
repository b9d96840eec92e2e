"""What became of every detection and every annotated region of a slide, with outlines: for people who look at it.

Input: the regions and detections of a slide, as they are matched. Output: plain JSON values, the content of
``findings.json``, from which no score is computed.

Conventions: points are x, y in level-0 px; regions are numbered from 1 as `wsiflow.evaluation.froc` numbers them.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray

from wsiflow.evaluation.froc import SlideFindings, labels_at
from wsiflow.plan import outline
from wsiflow.slides.annotations import Outline, TruthOutlines

HIT, FALSE_POSITIVE, IGNORED, UNKNOWN = "hit", "false positive", "ignored", ""
"""What a detection is; unknown where the slide does not count for FROC."""

LESION, ITC = "lesion", "isolated tumour cells"

_TOLERANCE_PX = 0.5  # of the mask
_FINE = 16  # outlines that were drawn keep to this part of a pixel of the mask

_RingsOf = Mapping[int, list[NDArray[np.float64]]]


class Regions(NamedTuple):
    """The annotated regions of a slide and what is known of them.

    Attributes:
        matched: The regions and the detections, as they were matched.
        annotated: bool (rows, cols), what was annotated, before regions were joined; None for the regions themselves.
        missed: The reason for each lesion without a hit, by the lesion's number, where it is known.
        drawn: The outlines that the regions come from, which are then shown as they are; None for those of the masks.
    """

    matched: SlideFindings
    annotated: NDArray[np.bool_] | None
    missed: Mapping[int, str]
    drawn: TruthOutlines | None = None


def describe(regions: Regions, *, counts: bool) -> dict[str, Any]:
    """Return the detections and regions of a slide as JSON values.

    Args:
        regions: The regions and detections.
        counts: Whether the slide counts for FROC; where it does not, no detection is a hit or a false positive.

    Returns:
        ``detections``, each a list of prob, x, y, kind and the number of the region that it lies in (0 for none), in
        the order of the file; and ``regions``, each with number, kind, best (the highest confidence of a detection in
        it, or None), reason (why it was missed, or an empty text), box (left, top, right, bottom) and rings (a list
        x, y, x, y, ... for each). Both are empty where nothing of the region was drawn.
    """
    slide = regions.matched
    ignored = _are_ignored(slide)
    own = np.where(ignored, 0, _own_regions(slide))
    kinds = _kinds(slide, own, ignored) if counts else [UNKNOWN] * len(own)
    rows = zip(slide.detections.tolist(), kinds, own.tolist(), strict=True)
    return {
        "detections": [[prob, round(x), round(y), kind, region] for (prob, x, y), kind, region in rows],
        "regions": [*_regions(regions, own), *_ignored(slide, regions.drawn)],
    }


def _own_regions(slide: SlideFindings) -> NDArray[np.int32]:
    """Return int32 (n,), the number of the region that each detection lies in; 0 for none."""
    if slide.lesions is None:
        return np.zeros(len(slide.detections), np.int32)
    return labels_at(slide.lesions.labels, slide.detections[:, 1:], slide.downsample)


def _are_ignored(slide: SlideFindings) -> NDArray[np.bool_]:
    """Return bool (n,), which detections lie in ignored regions."""
    if slide.ignored is None:
        return np.zeros(len(slide.detections), np.bool_)
    return np.asarray(labels_at(slide.ignored.astype(np.int32), slide.detections[:, 1:], slide.downsample) > 0)


def _kinds(slide: SlideFindings, own: NDArray[np.int32], ignored: NDArray[np.bool_]) -> list[str]:
    """Return what each detection is, by the rules of `wsiflow.evaluation.froc.match`."""
    itc = slide.lesions.itc if slide.lesions is not None else frozenset()
    return [
        IGNORED if left_out or region in itc else HIT if region else FALSE_POSITIVE
        for region, left_out in zip(own.tolist(), ignored.tolist(), strict=True)
    ]


def _regions(regions: Regions, own: NDArray[np.int32]) -> Iterator[dict[str, Any]]:
    slide = regions.matched
    if slide.lesions is None:
        return
    labels = slide.lesions.labels
    annotated = labels if regions.annotated is None else np.where(regions.annotated, labels, 0)
    rings = _drawn_rings(regions.drawn, labels, slide.downsample)
    for number, window in enumerate(scipy.ndimage.find_objects(annotated, slide.lesions.n_regions), start=1):
        confidences = slide.detections[own == number, 0]
        mask = annotated[window] == number if window else None
        yield {
            "number": number,
            "kind": ITC if number in slide.lesions.itc else LESION,
            "best": float(confidences.max()) if confidences.size else None,
            "reason": regions.missed.get(number, ""),
            **_outlined(mask, window, slide.downsample, rings.get(number, [])),
        }


def _ignored(slide: SlideFindings, drawn: TruthOutlines | None) -> Iterator[dict[str, Any]]:
    """Yield what is ignored on a slide as one region without a number."""
    if slide.ignored is not None and slide.ignored.any():
        (window,) = scipy.ndimage.find_objects(slide.ignored.astype(np.int32), 1)
        rings = _rings(drawn.ignored) if drawn is not None else []
        outlined = _outlined(slide.ignored[window], window, slide.downsample, rings)
        yield {"number": 0, "kind": IGNORED, "best": None, "reason": "", **outlined}


def _rings(outlines: Iterable[Outline]) -> list[NDArray[np.float64]]:
    return [ring for one in outlines for ring in (one.polygon, *one.holes)]


def _drawn_rings(drawn: TruthOutlines | None, labels: NDArray[np.int32], downsample: int) -> _RingsOf:
    """Return the rings that were drawn, by the number of the region that most of each one's points lie in."""
    found: dict[int, list[NDArray[np.float64]]] = defaultdict(list)
    for ring in _rings((*drawn.tumour, *drawn.exclusions)) if drawn is not None else []:
        between = (ring + np.roll(ring, -1, axis=0)) / 2  # of a figure of few points, the corners may lie just outside
        numbers = np.bincount(labels_at(labels, np.concatenate([ring, between]), downsample))
        if numbers[1:].any():
            found[int(numbers[1:].argmax()) + 1].append(ring)
    return found


def _outlined(
    mask: NDArray[np.bool_] | None,
    window: tuple[slice, slice] | None,
    downsample: int,
    rings: list[NDArray[np.float64]],
) -> dict[str, Any]:
    """Return the box of a part of a mask and its rings, in level-0 px: those that were drawn, else the mask's."""
    if mask is None or window is None:
        return {"box": [], "rings": []}
    rows, cols = window
    corner = np.array([cols.start, rows.start], np.float64)
    box = [cols.start, rows.start, cols.stop, rows.stop]
    if rings:
        shown = [outline.thinned(ring, downsample / _FINE) for ring in rings]
    else:
        shown = [(ring + corner) * downsample for ring in outline.simplified_rings(mask, tolerance_px=_TOLERANCE_PX)]
    return {
        "box": [side * downsample for side in box],
        "rings": [np.rint(ring).astype(np.int64).ravel().tolist() for ring in shown],
    }
