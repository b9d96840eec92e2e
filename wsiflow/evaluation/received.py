"""Detections that another program wrote: read, brought into level-0 px, and doubted where they may mean other things.

Refused are detections of which none lies on the slide. Everything else that is doubtful
is scored as it is written, and stated: detections beyond the slide, several at one place, and detections that would hit
more lesions with x and y exchanged, in um, or in pixels of a heatmap.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError
from wsiflow.evaluation import froc
from wsiflow.evaluation.detections import read_detections
from wsiflow.evaluation.protocol import EvaluationParams
from wsiflow.evaluation.truth import Truth
from wsiflow.slides.manifest import Case

Unit = Literal["px", "um"]
"""What coordinates are in: level-0 pixels, or micrometres from the corner of level 0."""


_MAPS = (8, 16, 32, 64, 112, 128, 224, 256)  # downsamples that heatmaps of other programs have
_CORNER = 16
_IN_UM = "in um"
_TELLING = 0.1  # share of detections that must hit by another reading: by chance some do by any


class SlideExtent(NamedTuple):
    """What is known of the extent of a slide.

    Attributes:
        slide_id: Name of the slide.
        l0_size_px: Width and height in level-0 px; None where neither the slide nor its mask is there.
        um_px: Spacing of level 0; None where it is not known.
        what: What the size is of, for messages.
    """

    slide_id: str
    l0_size_px: tuple[int, int] | None
    um_px: float | None
    what: str = "slide"

    @classmethod
    def of(
        cls, case: Case, params: EvaluationParams, l0_size_px: tuple[int, int] | None, truth: Truth | None
    ) -> "SlideExtent":
        """Return the extent of a slide: its own where it is there, else that of its mask image."""
        um_px, what = case.mpp or params.l0_um_px, "slide"
        if l0_size_px is None and case.mask_path is not None and truth is not None:
            rows, cols = truth.lesions.labels.shape
            l0_size_px, what = (cols * params.downsample, rows * params.downsample), "mask"
        return cls(case.slide_id, l0_size_px, um_px, what)

    def beyond(self, xy: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which points, (n, 2) in level-0 px, lie outside; none where the size is not known."""
        if self.l0_size_px is None:
            return np.zeros(len(xy), np.bool_)
        outside: NDArray[np.bool_] = (xy < 0) | (xy >= self.l0_size_px)
        return np.asarray(outside.any(axis=1))


class Received(NamedTuple):
    """Detections, float64 (n, 3): prob, x, y in level-0 px, and remarks on them."""

    detections: NDArray[np.float64]
    remarks: tuple[str, ...] = ()


def read_received(path: Path, slide: SlideExtent, unit: Unit = "px") -> Received:
    """Read the detections of one slide that another program wrote.

    Args:
        path: CSV without header: ``prob,x,y``; the file may be empty.
        slide: The slide.
        unit: What x and y are in.

    Raises:
        InputError: See `read_detections`; or all detections lie beyond the slide, or its spacing is needed and is not
            known.
    """
    detections = read_detections(path)
    if unit == "um":
        if slide.um_px is None:
            remedy = "add its mpp to the manifest, or give one spacing for all slides (--um-px)"
            raise InputError("the spacing of the slide is not known, and detections are in um", remedy, path=path)
        detections = detections / [1.0, slide.um_px, slide.um_px]
    beyond = slide.beyond(detections[:, 1:])
    if len(beyond) and beyond.all():
        _refuse_place(detections, slide, unit, path)
    remarks = [f"{beyond.sum()} of {len(beyond)} detections lie beyond the {slide.what}"] if beyond.any() else []
    repeated = Counter(map(tuple, detections[:, 1:].tolist()))
    if more := len(detections) - len(repeated):
        x, y = next(place for place, count in repeated.items() if count > 1)
        repeating = "1 detection repeats" if more == 1 else f"{more} detections repeat"
        remarks.append(f"{repeating} the place of another, first at {x:g}, {y:g}; each of them counts")
    return Received(detections, tuple(remarks))


def _refuse_place(detections: NDArray[np.float64], slide: SlideExtent, unit: Unit, path: Path) -> None:
    """Refuse detections that all lie beyond the slide.

    Raises:
        InputError: Always; the message says what they would have to be to lie on it.
    """
    width, height = slide.l0_size_px or (0, 0)
    other = [name for name, xy in _readings(detections, slide, unit).items() if not slide.beyond(xy).any()]
    x, y = detections[0, 1:].tolist()
    where = f"beyond the {slide.what} of {width} x {height} px"
    cause = f"all {len(detections)} detections lie {where}, the first at "
    cause = f"the one detection lies {where}, at " if len(detections) == 1 else cause
    hint = f" (they would lie on it {' or '.join(other)})" if other else ""
    remedy = f"give x and y in level-0 px of this slide{hint}, or say what they are in (--unit um)"
    raise InputError(f"{cause}{x:g}, {y:g}", remedy, path=path)


def _readings(
    detections: NDArray[np.float64], slide: SlideExtent, unit: Unit = "px", downsamples: Iterable[int] = ()
) -> dict[str, NDArray[np.float64]]:
    """Return what coordinates could mean instead, float64 (n, 2) in level-0 px by the words that say it."""
    xy = detections[:, 1:]
    readings = {"with x and y exchanged": xy[:, ::-1]}
    if slide.um_px is not None:
        um = xy * slide.um_px if unit == "um" else xy / slide.um_px
        readings["in level-0 px" if unit == "um" else _IN_UM] = um
    return readings | {f"in pixels of a map at 1/{scale}": (xy + 0.5) * scale for scale in downsamples if scale > 1}


@dataclass
class Doubts:
    """What the detections of all slides together seem to mean.

    Attributes:
        m_downsample: Level-0 px per pixel of the evaluation mask.
        n: Number of detections on slides with lesions.
        hits: How many of them lie in a region as they are.
        others: How many would, by what else they could mean.
        small: Number of slides of known size whose detections all lie in a corner, of a 16th of each side.
        sized: Number of slides of known size with detections.
    """

    m_downsample: int
    n: int = 0
    hits: int = 0
    others: Counter[str] = field(default_factory=Counter)
    small: int = 0
    sized: int = 0

    def add(self, detections: NDArray[np.float64], slide: SlideExtent, truth: Truth | None) -> None:
        """Add the detections of a slide, float64 (n, 3)."""
        if slide.l0_size_px is not None and len(detections):
            corner = np.array(slide.l0_size_px) / _CORNER
            self.sized += 1
            self.small += int((detections[:, 1:] <= corner).all())
        if truth is None or not truth.lesions.n_regions:
            return
        self.n += len(detections)
        self.hits += self._hits(detections[:, 1:], truth)
        downsamples = sorted({*_MAPS, self.m_downsample})
        for name, xy in _readings(detections, slide, downsamples=downsamples).items():
            self.others[name] += self._hits(xy, truth)

    def _hits(self, xy: NDArray[np.float64], truth: Truth) -> int:
        return int((froc.labels_at(truth.lesions.labels, np.ascontiguousarray(xy), self.m_downsample) > 0).sum())

    def remarks(self) -> list[str]:
        """Return what is doubtful, as sentences."""
        name, hits = self.others.most_common(1)[0] if self.others else ("", 0)
        if hits > 2 * self.hits and hits >= _TELLING * self.n:
            as_is = f"{self.hits or 'none'} of {self.n} detections on slides with lesions lie in one"
            option = ", or give --unit um" if name == _IN_UM else ""
            return [f"{as_is}, and {hits} would {name}: see that x and y are in level-0 px{option}"]
        if self.sized and self.small == self.sized:
            of = f"the first 1/{_CORNER} of their slides"
            return [f"all detections lie in {of}: see that x and y are in level-0 px, and not in pixels of a map"]
        return []
