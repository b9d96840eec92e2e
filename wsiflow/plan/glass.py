"""Tissue told from the glass around it: by what the glass of this slide looks like, and not by a split of all pixels.

Input: an overview of a slide, uint8 RGB (rows, cols, 3). Output: boolean masks of it.

Otsu's threshold lies between the strongest stain of a slide and everything else, so that it loses pale tissue beside
dark one, and everything on a slide without colours. Here the colour of the glass and its noise are estimated first.
On a slide with colours, tissue is what is darker than the glass and has another tint; edges of coverslips, dust and
bubbles are darker only. On a grey slide it is what is darker, and on a dark one (fluorescence) what is brighter. Where
no glass is in sight, everything is tissue. Ink is left out, and so is black that reaches the border.
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Literal, NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

Light = Literal["colour", "grey", "dark", "none"]

LEAST_DARKENING = 8
"""What counts as darker (or, on a dark slide, brighter) than glass, grey levels of 255."""
DEVIATIONS = 4.0
"""What counts is also so many standard deviations of the glass."""

_BRIGHT = 150  # glass of a bright-field slide is brighter than this
_DARK = 80  # the background of a dark slide, and half of the slide, is darker than this
_LEAST_GLASS = 0.02  # a peak of the histogram with less of the slide is no glass
_MOST_GLASS = 0.5  # a peak with more of the slide is its background, however bright it is
_PEAK = 6  # half the width of a peak of the histogram, grey levels
_GLASS_TINT = 24  # what is more coloured than this is no glass
_FILLED = 0.4  # part of the pixels that are not pure white that another peak must have, to be glass beside filling
_SCANNED = 0.25  # part of the slide that these pixels must be
_FILL_BESIDE = (200, 250)  # grey levels of such a peak
_COLOURED = 4  # a slide with this tint somewhere has colours
_SOMEWHERE = 0.001  # part of a slide that shows what the slide is
_BLACK = 40  # what is darker and touches the border was not scanned
_GREEN_INK = 12  # by which green exceeds red and blue in ink, and in no usual stain
_BLUE_INK = 100  # by which blue exceeds red in ink, where green does too, and in no haematoxylin
_RED_INK = (130, 30)  # by which red exceeds green and blue in ink, and blue green at most; blood and AEC are paler
_BLACK_INK = (50, 12)  # brightness and chroma of black ink at most
_MOST_INK = 0.4  # part of the tissue; what is more is a stain of this colour, such as light green

_ENOUGH_PX = 1_000_000  # of an overview, to know its glass
_STRIP_ROWS = 256

_BELL = np.array([1, 6, 15, 20, 15, 6, 1]) / 64  # it has one highest place, also over a single grey level

_Plane = NDArray[np.float32]  # one channel, (rows, cols)
_Level = TypeVar("_Level", np.float32, np.uint8)


class Glass(NamedTuple):
    """What the background of a slide looks like.

    Attributes:
        light: ``colour`` or ``grey`` for a bright slide with or without colours, ``dark`` for a dark one, ``none``
            where there is no background to be seen.
        rgb: Its colour; black where there is none.
        noise: Standard deviation of its brightness, grey levels.
    """

    light: Light
    rgb: tuple[float, float, float]
    noise: float


def find_glass(overview: NDArray[np.uint8]) -> Glass:
    """Return what the background of a slide looks like, from its overview, uint8 (rows, cols, 3), RGB.

    Of a large overview every few pixels tell.
    """
    step = math.isqrt(overview.shape[0] * overview.shape[1] // _ENOUGH_PX) + 1
    overview = np.ascontiguousarray(overview[::step, ::step])
    planes = _smooth_planes(overview)
    scanned = ~black_border(overview)
    grey = _grey(planes)
    peak = _bright_peak(overview, grey, _spread(planes), scanned)
    if peak is None and np.median(_largest(planes)[scanned]) < _DARK:
        return _dark_background(planes, scanned)
    if peak is None:
        return Glass("none", (0.0, 0.0, 0.0), 0.0)
    near = scanned & (np.abs(grey - peak) <= _PEAK)
    red, green, blue = (float(np.median(plane[near])) for plane in planes)
    # Tissue only darkens, so the brighter side of the peak has the noise of glass alone.
    noise = _one_sided_noise(grey[scanned] - peak)
    least = max(_COLOURED, DEVIATIONS * noise / 2)
    coloured = np.count_nonzero(_tint(planes, (red, green, blue))[scanned] >= least)
    return Glass("colour" if coloured > _SOMEWHERE * scanned.sum() else "grey", (red, green, blue), noise)


def tissue_by_glass(overview: NDArray[np.uint8], *, least_tint: float) -> NDArray[np.bool_]:
    """Return which pixels of an overview differ from its glass as tissue does, bool (rows, cols).

    Args:
        overview: uint8 (rows, cols, 3), RGB.
        least_tint: What counts as another tint than that of the glass: difference between the channels' darkening,
            grey levels.
    """
    glass = find_glass(overview)
    tissue, *kinds = _in_strips(overview, lambda strip: [_differs(strip, glass, least_tint), *inks(strip)])
    if glass.light == "dark":
        return tissue
    tissue &= ~black_border(overview)
    if glass.light == "grey":
        return tissue
    most = _MOST_INK * np.count_nonzero(tissue)
    kinds = [kind for kind in kinds if np.count_nonzero(tissue & kind) <= most]
    marks = reduce(np.logical_or, kinds, np.zeros_like(tissue)).astype(np.uint8)
    # The pixels around ink are mixed with it.
    return np.asarray(tissue & ~(cv2.dilate(marks, np.ones((3, 3), np.uint8)) > 0))


def _differs(overview: NDArray[np.uint8], glass: Glass, least_tint: float) -> NDArray[np.bool_]:
    """Return which pixels differ from glass, whether it is by tissue or by ink, bool (rows, cols)."""
    if glass.light == "none":
        return np.ones(overview.shape[:2], np.bool_)
    least = max(LEAST_DARKENING, DEVIATIONS * glass.noise)
    darkening = _darkening(_smooth_planes(overview), glass.rgb)
    if glass.light == "dark":
        return np.asarray(-_smallest(darkening) >= least)
    differs = _largest(darkening) >= least
    if glass.light == "colour":
        differs &= _spread(darkening) >= max(least_tint, DEVIATIONS * glass.noise / 2)
    return np.asarray(differs)


def _in_strips(
    overview: NDArray[np.uint8], masks_of: Callable[[NDArray[np.uint8]], list[NDArray[np.bool_]]]
) -> list[NDArray[np.bool_]]:
    """Return the masks of an overview, computed strip by strip: in floating point it needs much memory as a whole."""
    strips = []
    for top in range(0, len(overview), _STRIP_ROWS):
        first = max(top - 1, 0)  # means of 3 x 3 pixels need the rows beside a strip
        masks = masks_of(overview[first : top + _STRIP_ROWS + 1])
        strips.append([mask[top - first :][:_STRIP_ROWS] for mask in masks])
    return [np.concatenate(each) for each in zip(*strips, strict=True)]


def inks(overview: NDArray[np.uint8]) -> list[NDArray[np.bool_]]:
    """Return which pixels look like green, blue, red and black ink, bool (rows, cols) each.

    Faded red ink looks like blood and like red stains, and is not known.
    """
    red, green, blue = planes = _smooth_planes(overview)
    brightness, chroma = _BLACK_INK
    redder, bluer = _RED_INK
    return [
        green - np.maximum(red, blue) >= _GREEN_INK,
        (blue - red >= _BLUE_INK) & (green >= red),
        (red - np.maximum(green, blue) >= redder) & (blue - green <= bluer),
        (_largest(planes) <= brightness) & (_spread(planes) <= chroma),
    ]


def black_border(overview: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return which pixels are black and connected with the border, bool (rows, cols), on a slide that has light.

    Scanners and converters fill what was not scanned with black.
    """
    planes = _planes(overview)
    black = _largest(planes) <= _BLACK
    if not black.any() or np.count_nonzero(_smallest(planes) >= _BRIGHT) < _LEAST_GLASS * black.size:
        return np.zeros_like(black)
    _, labels = cv2.connectedComponents(black.astype(np.uint8), connectivity=8)
    edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    is_unscanned = np.zeros(labels.max() + 1, np.bool_)
    is_unscanned[edge[edge > 0]] = True
    return np.asarray(is_unscanned[labels])


def _dark_background(planes: Sequence[_Plane], scanned: NDArray[np.bool_]) -> Glass:
    """Return the background of a slide of which most is dark: the darkest peak of its brightest channels."""
    brightest = _largest(planes)[scanned]
    peak = _peaks(_histogram(brightest))[0]
    near = scanned & (np.abs(_largest(planes) - peak) <= _PEAK)
    red, green, blue = (float(np.median(plane[near])) for plane in planes)
    return Glass("dark", (red, green, blue), _one_sided_noise(peak - brightest))


def _bright_peak(overview: NDArray[np.uint8], grey: _Plane, chroma: _Plane, scanned: NDArray[np.bool_]) -> float | None:
    """Return the grey level of the glass of a bright slide; None where nothing looks like glass."""
    candidates, total = scanned & (chroma <= _GLASS_TINT), int(scanned.sum())
    filled = candidates & (_smallest(_planes(overview)) == 255)
    rest = np.count_nonzero(scanned & ~filled)
    if filled.any() and rest >= _SCANNED * total:
        # What was not scanned may be pure white, and the glass beside it is less bright.
        left = grey[candidates & ~filled]
        peak = _brightest_peak(left, total)
        low, high = _FILL_BESIDE
        if peak is not None and low <= peak < high:
            mass = np.count_nonzero(np.abs(left - peak) <= _PEAK)
            if mass >= _FILLED * rest:
                return peak
    return _brightest_peak(grey[candidates], total)


def _brightest_peak(grey: _Plane, total: int) -> float | None:
    """Return the brightest peak that is high enough for glass, or the one that holds most of ``total`` pixels."""
    counts = _histogram(grey)
    mass = np.convolve(counts, np.ones(2 * _PEAK + 1), mode="same")
    for peak in reversed(_peaks(counts)):
        least = _LEAST_GLASS if peak >= _BRIGHT else _MOST_GLASS
        if peak >= _DARK and mass[peak] >= least * total:
            return float(peak)
    return None


def _histogram(grey: _Plane) -> NDArray[np.float64]:
    return np.bincount(np.rint(grey).astype(np.uint8), minlength=256).astype(np.float64)


def _peaks(counts: NDArray[np.float64]) -> list[int]:
    """Return the grey levels at which a smoothed histogram is highest among its neighbours, from dark to bright."""
    smooth = np.convolve(np.pad(counts, 3, mode="reflect"), _BELL, mode="valid")
    highest = (smooth[max(level - _PEAK, 0) : level + _PEAK + 1].max() for level in range(256))
    return [level for level, most in enumerate(highest) if 0 < smooth[level] == most]


def _one_sided_noise(beyond: _Plane) -> float:
    """Return the standard deviation of the values that lie on the side of a peak where there is no tissue."""
    own = beyond[(beyond >= 0) & (beyond <= 2 * _PEAK)]
    return float(np.sqrt(np.mean(own**2))) if own.size else 0.0


def _planes(overview: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Return the three channels; they are kept apart, because numpy reduces an axis of three values slowly."""
    return [np.ascontiguousarray(overview[..., channel]) for channel in range(3)]


def _smooth_planes(overview: NDArray[np.uint8]) -> list[_Plane]:
    """Return the three channels as means of 3 x 3 pixels, which have a third of the noise."""
    smooth = (cv2.boxFilter(plane, cv2.CV_32F, (3, 3)) for plane in _planes(overview))
    return [np.asarray(plane, dtype=np.float32) for plane in smooth]


def _grey(planes: Sequence[_Plane]) -> _Plane:
    return np.asarray((planes[0] + planes[1] + planes[2]) / np.float32(3), dtype=np.float32)


def _largest(planes: Sequence[NDArray[_Level]]) -> NDArray[_Level]:
    return reduce(np.maximum, planes)


def _smallest(planes: Sequence[NDArray[_Level]]) -> NDArray[_Level]:
    return reduce(np.minimum, planes)


def _spread(planes: Sequence[_Plane]) -> _Plane:
    """Return the difference between the largest and the smallest channel of each pixel."""
    return np.asarray(_largest(planes) - _smallest(planes))


def _darkening(planes: Sequence[_Plane], glass: tuple[float, float, float]) -> list[_Plane]:
    """Return by how much each channel is darker than glass."""
    return [np.float32(level) - plane for level, plane in zip(glass, planes, strict=True)]


def _tint(planes: Sequence[_Plane], glass: tuple[float, float, float]) -> _Plane:
    """Return by how much the tint of each pixel differs from that of the glass, grey levels."""
    return _spread(_darkening(planes, glass))
