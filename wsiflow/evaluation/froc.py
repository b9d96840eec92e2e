"""Compute FROC curves: lesion sensitivity against false positives per slide.

Input: per slide a labelled lesion mask and detections ``prob, x, y`` in level-0 px. Output: curves and metrics by name.

Both modes follow the conventions of the CAMELYON16 challenge. Annotations are dilated by 37.5 um and holes are filled,
so that outlines less than 75 um apart are one lesion. Regions whose major axis is under 275 um are isolated tumour
cells (ITC), and hits on them are ignored. Several hits on one lesion count once, with the highest confidence. Every
other detection is a false positive. The FROC score is the mean sensitivity, interpolated linearly, at 1/4, 1/2, 1, 2, 4
and 8 false positives per slide.

``official`` gives the numbers of the challenge's evaluator to the last digit, with its two peculiarities: it omits the
lowest threshold, which is harmless only where a lesion was missed or an ITC exists; and it rounds confidences of hits
to float32, but not those of false positives, so that a hit and a false positive of equal confidence may be separated.
``strict`` keeps every threshold, compares in float64, and counts equal confidences together.

In both modes a detection outside the mask is a false positive (the challenge's evaluator stops there, or wraps around
to the opposite side). Without any lesion every sensitivity and the score are NaN.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import cv2
import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from wsiflow.errors import InputError

Mode = Literal["official", "strict"]

RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives per slide at which the FROC score reads the sensitivity."""

JOIN_UM = 75.0
"""Joining distance of the challenge: annotations nearer than this are one lesion, each being dilated by half of it."""

ITC_UM = 275.0
"""Size limit of the challenge, 200 um plus dilation: a dilated region with a shorter major axis is an ITC."""


_CHUNK = 256  # assignments at a time, for the memory
_LARGEST_RADIUS_PX = 2000  # 75 um are 150 px at the finest usual spacing, and dilation by a larger disc takes too long


@dataclass(frozen=True, eq=False)
class LesionMask:
    """The annotated regions of one slide at evaluation resolution.

    Attributes:
        labels: int32 (rows, cols), 0 = background, 1..K = regions in raster order of their first pixel.
        itc: Labels of the regions that are isolated tumour cells.
        major_axis_px: float64 (K,), major axis of region k at index k - 1, in mask px.
        um_px: Side of a mask pixel in um; NaN where it is not known.
    """

    labels: NDArray[np.int32]
    itc: frozenset[int]
    major_axis_px: NDArray[np.float64]
    um_px: float = math.nan

    @property
    def n_regions(self) -> int:
        """Number of regions, ITC included."""
        return len(self.major_axis_px)

    @property
    def n_lesions(self) -> int:
        """Number of lesions: regions that are not isolated tumour cells."""
        return self.n_regions - len(self.itc)


@dataclass(frozen=True, eq=False)
class SlideFindings:
    """The annotated regions of one slide and the detections in it.

    Attributes:
        slide_id: Name of the slide, unique in a set of slides.
        lesions: The annotated regions; None for a slide without tumour.
        detections: float64 (n, 3): prob, x, y in level-0 px.
        downsample: Level-0 px per mask px; floor division of ``x, y`` by it gives the mask pixel.
        ignored: bool (rows, cols) at the resolution of the mask, where detections are neither hits nor false positives;
            None where nothing is ignored.
    """

    slide_id: str
    lesions: LesionMask | None
    detections: NDArray[np.float64]
    downsample: int = 32
    ignored: NDArray[np.bool_] | None = None


@dataclass(frozen=True, eq=False)
class Matches:
    """Detections of one slide, divided into hits and false positives.

    Attributes:
        slide_id: Name of the slide.
        best: float64 (K,), highest confidence of a hit on each region; -inf for a missed region and for ITC.
        n_itc: Number of the K regions that are ITC.
        false_positives: float64 (m,), confidences of detections outside every region.
        itc: Indices of the regions that are ITC.
        any_best: float64 (K,), as ``best``, for ITC too; None where it is not known.
        major_axis_um: float64 (K,), major axis of each dilated region; None where it is not known.
        n_ignored: Number of detections in ignored regions, which are neither hits nor false positives.
    """

    slide_id: str
    best: NDArray[np.float64]
    n_itc: int
    false_positives: NDArray[np.float64]
    itc: tuple[int, ...] = ()
    any_best: NDArray[np.float64] | None = None
    major_axis_um: NDArray[np.float64] | None = None
    n_ignored: int = 0

    @property
    def n_lesions(self) -> int:
        """Number of lesions: regions that are not isolated tumour cells."""
        return len(self.best) - self.n_itc


@dataclass(frozen=True, eq=False)
class FrocCurve:
    """Operating points of a FROC curve by rising threshold; the last point is (0, 0) at threshold inf.

    Attributes:
        fp_per_slide: float64 (p,), false positives per slide.
        sensitivity: float64 (p,), share of the lesions that are hit; NaN without lesions.
        thresholds: float64 (p,), a detection counts from this confidence on.
    """

    fp_per_slide: NDArray[np.float64]
    sensitivity: NDArray[np.float64]
    thresholds: NDArray[np.float64]


def evaluation_mask(
    tumour: NDArray[np.bool_], um_px: float, *, join_um: float = JOIN_UM, itc_um: float = ITC_UM
) -> LesionMask:
    """Turn a tumour mask into the regions that the challenge counts.

    Args:
        tumour: bool (rows, cols) at evaluation resolution, level 0 / 32 in the challenge.
        um_px: Side of a mask pixel in um: 0.243 * 32 in the challenge.
        join_um: Annotations nearer than this are one lesion.
        itc_um: A dilated region with a shorter major axis is isolated tumour cells.

    Returns:
        The dilated and filled regions, 8-connected, and which of them are ITC.

    Raises:
        InputError: ``um_px`` is not a positive number, or so small that the joining distance is thousands of pixels.
    """
    if not (math.isfinite(um_px) and um_px > 0):
        raise InputError(f"the side of a mask pixel is {um_px} um", "give its side in um, more than 0")
    if join_um / (um_px * 2) > _LARGEST_RADIUS_PX:
        cause = f"the side of a mask pixel is {um_px:g} um, so half of {join_um:g} um exceeds {_LARGEST_RADIUS_PX} px"
        raise InputError(cause, "give spacings in um, not in mm (mpp), or a larger downsample")
    labels = np.zeros(tumour.shape, np.int32)
    if not tumour.any():
        return LesionMask(labels, frozenset(), np.empty(0), um_px)
    radius_px = join_um / (um_px * 2)
    window = _window(tumour, math.ceil(radius_px) + 1)
    labels[window], _ = scipy.ndimage.label(_filled(_dilated(tumour[window], radius_px)), np.ones((3, 3), np.int8))
    axes = _major_axes(labels[window])
    return LesionMask(labels, frozenset((np.flatnonzero(axes < itc_um / um_px) + 1).tolist()), axes, um_px)


def match(slide: SlideFindings) -> Matches:
    """Divide a slide's detections into hits and false positives.

    Raises:
        InputError: The detections are not (n, 3), a number is not finite, or a confidence is outside 0 to 1.
    """
    detections = np.asarray(slide.detections, np.float64)
    if detections.ndim != 2 or detections.shape[1] != 3:
        cause = f"the detections have shape {detections.shape}"
        raise InputError(cause, "give prob, x, y for each", slide=slide.slide_id)
    # The challenge's evaluator counts a missed lesion as a hit with confidence 0: below 0 every lesion would be found.
    prob = detections[:, 0]
    bad = np.flatnonzero(~np.isfinite(detections).all(axis=1) | (prob < 0) | (prob > 1))
    if bad.size:
        row = detections[bad[0]].tolist()
        raise InputError(
            f"detection {bad[0]} is {row}",
            "give confidences from 0 to 1 (of logits their sigmoid) and finite coordinates",
            slide=slide.slide_id,
            stage="froc",
        )
    n_ignored = 0
    if slide.ignored is not None:
        ignored = labels_at(slide.ignored.astype(np.int32), detections[:, 1:], slide.downsample) > 0
        n_ignored, detections = int(ignored.sum()), detections[~ignored]
    if slide.lesions is None:
        return Matches(slide.slide_id, np.empty(0), 0, detections[:, 0], n_ignored=n_ignored)
    prob, hit = detections[:, 0], labels_at(slide.lesions.labels, detections[:, 1:], slide.downsample)
    any_best = np.full(slide.lesions.n_regions, -np.inf)
    np.maximum.at(any_best, hit[hit > 0] - 1, prob[hit > 0])
    itc = tuple(label - 1 for label in sorted(slide.lesions.itc))
    best = any_best.copy()
    best[list(itc)] = -np.inf
    axes_um = slide.lesions.major_axis_px * slide.lesions.um_px
    known_axes = None if np.isnan(axes_um).any() else axes_um
    return Matches(slide.slide_id, best, len(itc), prob[hit == 0], itc, any_best, known_axes, n_ignored)


def curve(matches: Sequence[Matches], *, mode: Mode) -> FrocCurve:
    """Return the FROC curve of a set of slides.

    Raises:
        InputError: A slide appears twice.
    """
    return _curve(_pool(matches, mode), np.ones(len(matches), np.int64))


def score(matches: Sequence[Matches], *, mode: Mode) -> dict[str, float]:
    """Return the FROC score, its six sensitivities, and the numbers of lesions, ITC and slides, by metric name.

    The slides without any region are counted as well: most of the false positives of a curve come from them.

    Raises:
        InputError: A slide appears twice.
    """
    sensitivities = _at_rates(curve(matches, mode=mode))
    prefix = "froc." if mode == "official" else "froc.strict_"
    return {
        f"{prefix}score": float(sensitivities.mean()),
        **{f"{prefix}sensitivity_at_{rate:g}": float(s) for rate, s in zip(RATES, sensitivities, strict=True)},
        "froc.n_lesions": float(sum(slide.n_lesions for slide in matches)),
        "froc.n_itc": float(sum(slide.n_itc for slide in matches)),
        "froc.n_slides": float(len(matches)),
        "froc.n_normal": float(sum(not len(slide.best) for slide in matches)),
    }


def evaluate(slides: Iterable[SlideFindings], *, mode: Mode) -> dict[str, float]:
    """Match slides and return their metrics; with a generator of slides one mask at a time is in memory.

    Raises:
        InputError: A slide appears twice, or its detections cannot be used.
    """
    return score([match(slide) for slide in slides], mode=mode)


def resample(
    matches: Sequence[Matches], times: NDArray[np.int64], *, mode: Mode, rates: ArrayLike = RATES
) -> NDArray[np.float64]:
    """Return the sensitivities of many bootstrap draws of the slides; confidences are sorted only once.

    Args:
        matches: The slides.
        times: int64 (n, slides), how often each slide is in each draw, from `resampling.case_draws`.
        mode: Mode in which each draw is scored.
        rates: (k,), false positives per slide at which the sensitivity is read.

    Returns:
        float64 (n, k); NaN in a draw without any lesion. The mean over `RATES` is the FROC score of the draw.

    Raises:
        InputError: A slide appears twice.
    """
    pool, at = _pool(matches, mode), np.asarray(rates, np.float64)
    most = float(at.max(initial=0.0))
    near = _within(pool, 2 * most)
    sensitivities = np.empty((len(times), len(at)))
    for row, drawn in zip(sensitivities, times, strict=True):
        points = _curve(near, drawn)
        if points.fp_per_slide[0] <= most:  # few false positives were drawn, so the thresholds left out matter
            points = _curve(pool, drawn)
        row[:] = _at_rates(points, at)
    return sensitivities


def lesion_weights(matches: Sequence[Matches], *, mode: Mode) -> list[NDArray[np.float64]]:
    """Return how far each region is found at each of the six rates; over all lesions the mean is the sensitivity.

    A rate between two operating points weighs their thresholds as the interpolation does.

    Returns:
        Per slide float64 (K, 6) from 0 to 1; 0 for isolated tumour cells.

    Raises:
        InputError: A slide appears twice.
    """
    points = curve(matches, mode=mode)
    fp, thresholds = points.fp_per_slide[::-1], points.thresholds[::-1]
    before = np.searchsorted(fp, RATES, side="right") - 1
    after = np.minimum(before + 1, len(fp) - 1)
    step = fp[after] - fp[before]
    weight = np.divide(np.array(RATES) - fp[before], step, out=np.zeros(len(RATES)), where=step > 0)
    high, low = thresholds[before], thresholds[after]
    hits = [slide.best[:, None] for slide in matches]
    if mode == "official":
        high, low, hits = _as_float32(high), _as_float32(low), [_as_float32(one) for one in hits]
    return [(1 - weight) * (one >= high) + weight * (one >= low) for one in hits]


def exchange(first: Sequence[Matches], second: Sequence[Matches], swapped: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the strict sensitivities of a setting some of whose slides have the results of another setting.

    Args:
        first: The slides of the setting.
        second: The same slides, in the same order, with the results of the other setting.
        swapped: bool (k, slides), in each of k assignments the slides with the results of ``second``.

    Returns:
        float64 (k, 6), NaN without lesions; what `curve` in strict mode gives for each assignment.
    """
    both, least = [*first, *second], _least_needed(first, second)
    hit_values, hit_slides = falling([slide.best[(slide.best > -np.inf) & (slide.best >= least)] for slide in both])
    false_values, false_slides = falling([slide.false_positives[slide.false_positives >= least] for slide in both])
    last = np.flatnonzero(np.append(np.diff(false_values) != 0, np.ones(min(len(false_values), 1), np.bool_)))
    above = np.searchsorted(-hit_values, -false_values[last], side="left")
    reaching = np.searchsorted(-hit_values, -false_values[last], side="right")
    n_lesions = sum(slide.n_lesions for slide in first)
    sensitivities = np.empty((len(swapped), len(RATES)))
    for start in range(0, len(swapped), _CHUNK):
        taken = np.concatenate([~swapped[start : start + _CHUNK], swapped[start : start + _CHUNK]], axis=1)
        hits = np.pad(np.cumsum(taken[:, hit_slides], axis=1, dtype=np.int32), ((0, 0), (1, 0)))
        false = np.pad(np.cumsum(taken[:, false_slides], axis=1, dtype=np.int32)[:, last], ((0, 0), (1, 0)))
        rows = np.arange(len(taken))
        for column, rate in enumerate(RATES):
            allowed = rate * len(first)
            # The highest confidence of a false positive with which there are too many, if any.
            place = (false[:, 1:] <= allowed).sum(axis=1)
            found = hits[:, -1].astype(np.float64)
            many = place < len(last)
            row, at = rows[many], place[many]
            few, more = hits[row, above[at]], hits[row, reaching[at]]
            step = false[row, at + 1] - false[row, at]
            found[many] = few + (more - few) * (allowed - false[row, at]) / step
            sensitivities[start : start + len(taken), column] = found
    return sensitivities / n_lesions if n_lesions else np.full_like(sensitivities, np.nan)


def _least_needed(first: Sequence[Matches], second: Sequence[Matches]) -> float:
    """Return the confidence at which every exchange has more false positives than the highest rate; -inf without one.

    Whichever results a slide has, it has a k-th false positive at the lower one of the two k-th confidences.
    """
    certain = np.concatenate([np.empty(0), *(_lower(one, other) for one, other in zip(first, second, strict=True))])
    allowed = int(RATES[-1] * len(first))
    return -float(np.partition(-certain, allowed)[allowed]) if len(certain) > allowed else -math.inf


def _lower(one: Matches, other: Matches) -> NDArray[np.float64]:
    """Return the lower one of both k-th highest confidences of false positives, for each k that both have."""
    n = min(len(one.false_positives), len(other.false_positives))
    ours, theirs = (np.sort(slide.false_positives)[::-1][:n] for slide in (one, other))
    return np.minimum(ours, theirs)


# --- regions


def _window(tumour: NDArray[np.bool_], margin: int) -> tuple[slice, slice]:
    """Return the bounding box of the tumour with a margin, as slices of rows and columns inside the mask."""
    box = [np.flatnonzero(tumour.any(axis=axis)) for axis in (1, 0)]
    rows, cols = (slice(max(int(hit[0]) - margin, 0), int(hit[-1]) + 1 + margin) for hit in box)
    return rows, cols


def _dilated(tumour: NDArray[np.bool_], radius_px: float) -> NDArray[np.bool_]:
    """Return the pixels whose centre is nearer than ``radius_px`` to the centre of a tumour pixel."""
    reach = math.ceil(radius_px)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = (np.sqrt(x * x + y * y) < radius_px).astype(np.uint8)
    return cv2.dilate(tumour.astype(np.uint8), disc) > 0


def _filled(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Fill holes: background pixels without a 4-connected path to the edge of the array."""
    background, n = scipy.ndimage.label(~region)
    is_open = np.zeros(n + 1, np.bool_)
    for edge in (background[0], background[-1], background[:, 0], background[:, -1]):
        is_open[edge] = True
    is_open[0] = False  # label 0 is the region itself
    filled: NDArray[np.bool_] = ~is_open[background]
    return filled


def _major_axes(labels: NDArray[np.int32]) -> NDArray[np.float64]:
    """Return float64 (K,), the major axis in px of the ellipse with the same second moments as each region.

    Pixels count as points at their centres, without the 1/12 of their own extent, as in the challenge's evaluator: a
    single pixel has a major axis of 0.
    """
    rows, cols = np.nonzero(labels)
    region = labels[rows, cols] - 1
    area = np.bincount(region)
    dy = rows - (np.bincount(region, rows) / area)[region]
    dx = cols - (np.bincount(region, cols) / area)[region]
    yy, xx, xy = (np.bincount(region, product) / area for product in (dy * dy, dx * dx, dy * dx))
    axes: NDArray[np.float64] = 4 * np.sqrt((yy + xx + np.sqrt((yy - xx) ** 2 + 4 * xy * xy)) / 2)
    return axes


# --- scores


def labels_at(labels: NDArray[np.int32], xy: NDArray[np.float64], downsample: int) -> NDArray[np.int32]:
    """Return int32 (n,), the label of the region at each level-0 point; 0 for background and outside the mask."""
    m_xy = np.floor(xy / downsample)
    rows, cols = labels.shape
    inside = ((m_xy >= 0) & (m_xy < (cols, rows))).all(axis=1)
    hit = np.zeros(len(xy), np.int32)
    m_x, m_y = m_xy[inside].astype(np.int64).T
    hit[inside] = labels[m_y, m_x]
    return hit


def falling(per_slide: Sequence[NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the confidences of many slides by falling confidence, and the index of the slide of each."""
    values = np.concatenate([np.empty(0), *per_slide])
    slides = np.repeat(np.arange(len(per_slide)), [len(one) for one in per_slide])
    order = np.argsort(-values, kind="stable")
    return values[order], slides[order]


class _Ranked(NamedTuple):
    """Confidences of many slides, ranked once so that they can be counted for any resample of the slides.

    Attributes:
        slides: int64 (values,), index of the slide of each confidence, by falling confidence.
        reach: int64 (thresholds,), number of confidences at or above each threshold.
        least: float64 (slides,), lowest confidence of each slide; inf where a slide has none.
    """

    slides: NDArray[np.int64]
    reach: NDArray[np.int64]
    least: NDArray[np.float64]

    def reaching(self, times: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of confidences at or above each threshold where slide i is drawn ``times[i]`` times."""
        total: NDArray[np.int64] = np.concatenate([[0], np.cumsum(times[self.slides])])[self.reach]
        return total

    def lowest(self, times: NDArray[np.int64]) -> float:
        """Return the lowest confidence of the slides that are drawn; inf where they have none."""
        return float(self.least[times > 0].min(initial=math.inf))


class _Pool(NamedTuple):
    """Confidences of all slides, and the thresholds, ranked once for the curves of any resample of the slides."""

    mode: Mode
    thresholds: NDArray[np.float64]
    true: _Ranked
    false: _Ranked
    n_lesions: NDArray[np.int64]


def _pool(matches: Sequence[Matches], mode: Mode) -> _Pool:
    """Rank the confidences of a set of slides.

    Raises:
        InputError: A slide appears twice.
    """
    slide_id, n = Counter(slide.slide_id for slide in matches).most_common(1)[0] if matches else ("", 1)
    if n > 1:
        raise InputError(f"there are {n} results of one slide", "give each slide once", slide=slide_id, stage="froc")
    hits = [_official(slide.best) if mode == "official" else slide.best[slide.best > -np.inf] for slide in matches]
    false = [slide.false_positives for slide in matches]
    thresholds = np.unique(np.concatenate([np.empty(0), *hits, *false]))
    # The challenge's evaluator compares its float32 hits with the threshold rounded to float32 too.
    for_hits = _as_float32(thresholds) if mode == "official" else thresholds
    n_lesions = np.array([slide.n_lesions for slide in matches], np.int64)
    return _Pool(mode, thresholds, _ranked(hits, for_hits), _ranked(false, thresholds), n_lesions)


def _official(best: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return hits as the challenge's evaluator keeps them: float32, and 0 for a missed region or an ITC."""
    return _as_float32(np.maximum(best, 0.0))


def _as_float32(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values.astype(np.float32).astype(np.float64)


def _ranked(per_slide: Sequence[NDArray[np.float64]], thresholds: NDArray[np.float64]) -> _Ranked:
    """Rank the confidences of many slides and count those at or above each threshold."""
    values, slides = falling(per_slide)
    reach = np.searchsorted(-values, -thresholds, side="right")
    return _Ranked(slides, reach, np.array([one.min(initial=math.inf) for one in per_slide], np.float64))


def _within(pool: _Pool, rate: float) -> _Pool:
    """Return the pool without the thresholds at which all slides together have more false positives than ``rate``."""
    first = int(np.searchsorted(-pool.false.reach, -rate * len(pool.n_lesions)))
    true, false = (
        one._replace(slides=one.slides[: one.reach[first:].max(initial=0)], reach=one.reach[first:])
        for one in (pool.true, pool.false)
    )
    return pool._replace(thresholds=pool.thresholds[first:], true=true, false=false)


def _curve(pool: _Pool, times: NDArray[np.int64]) -> FrocCurve:
    """Return the FROC curve where slide i is drawn ``times[i]`` times."""
    keep = np.ones(len(pool.thresholds), np.bool_)
    if pool.mode == "official":
        keep = pool.thresholds > min(pool.true.lowest(times), pool.false.lowest(times))
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 is NaN: no slide, or no lesion, to divide by
        fp = np.append(pool.false.reaching(times)[keep], 0) / times.sum()
        sensitivity = np.append(pool.true.reaching(times)[keep], 0) / (times @ pool.n_lesions)
    return FrocCurve(fp, sensitivity, np.append(pool.thresholds[keep], np.inf))


def _at_rates(points: FrocCurve, rates: Sequence[float] | NDArray[np.float64] = RATES) -> NDArray[np.float64]:
    """Return the sensitivity at each rate of false positives, interpolated linearly between operating points.

    Beyond the largest rate of the curve the sensitivity stays constant.
    """
    return np.interp(np.asarray(rates, np.float64), points.fp_per_slide[::-1], points.sensitivity[::-1])
