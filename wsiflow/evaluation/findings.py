"""What became of every detection and every annotated region of a slide, with outlines: for people who look at it.

Input: the regions and detections of a slide, as they are matched. Output: plain JSON values, the content of
``findings.json``, from which no score is computed.

Conventions: points are x, y in level-0 px; regions are numbered from 1 as `wsiflow.evaluation.froc` numbers them.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray

from wsiflow.evaluation.froc import SlideFindings, labels_at
from wsiflow.plan import outline

HIT, FALSE_POSITIVE, IGNORED, UNKNOWN = "hit", "false positive", "ignored", ""
"""What a detection is; unknown where the slide does not count for FROC."""

LESION, ITC = "lesion", "isolated tumour cells"

_TOLERANCE_PX = 0.5  # of the mask


class Regions(NamedTuple):
    """The annotated regions of a slide and what is known of them.

    Attributes:
        matched: The regions and the detections, as they were matched.
        annotated: bool (rows, cols), what was annotated, before regions were joined; None for the regions themselves.
        missed: The reason for each lesion without a hit, by the lesion's number, where it is known.
    """

    matched: SlideFindings
    annotated: NDArray[np.bool_] | None
    missed: Mapping[int, str]


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
        "regions": [*_regions(regions, own), *_ignored(slide)],
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
    drawn = labels if regions.annotated is None else np.where(regions.annotated, labels, 0)
    for number, window in enumerate(scipy.ndimage.find_objects(drawn, slide.lesions.n_regions), start=1):
        confidences = slide.detections[own == number, 0]
        yield {
            "number": number,
            "kind": ITC if number in slide.lesions.itc else LESION,
            "best": float(confidences.max()) if confidences.size else None,
            "reason": regions.missed.get(number, ""),
            **(_outlined(drawn[window] == number, window, slide.downsample) if window else {"box": [], "rings": []}),
        }


def _ignored(slide: SlideFindings) -> Iterator[dict[str, Any]]:
    """Yield what is ignored on a slide as one region without a number."""
    if slide.ignored is not None and slide.ignored.any():
        (window,) = scipy.ndimage.find_objects(slide.ignored.astype(np.int32), 1)
        outlined = _outlined(slide.ignored[window], window, slide.downsample)
        yield {"number": 0, "kind": IGNORED, "best": None, "reason": "", **outlined}


def _outlined(mask: NDArray[np.bool_], window: tuple[slice, slice], downsample: int) -> dict[str, Any]:
    """Return the box and the rings of a part of a mask, in level-0 px."""
    rows, cols = window
    corner = np.array([cols.start, rows.start], np.float64)
    rings = outline.simplified_rings(mask, tolerance_px=_TOLERANCE_PX)
    box = [cols.start, rows.start, cols.stop, rows.stop]
    return {
        "box": [side * downsample for side in box],
        "rings": [np.rint((ring + corner) * downsample).astype(np.int64).ravel().tolist() for ring in rings],
    }
