"""Synthetic lymph node slides with known lesions, of which any window can be rendered on demand.

Input: a `SlideSpec`, which describes a slide in a few hundred numbers. Output: RGB images, uint8 (rows, cols, 3).
Points and polygons are x, y in level-0 px; the spacing is always `UM_PX`.

A slide is rendered in blocks of `BLOCK_PX`. Each block is a pure function of the specification and the block's
position, so a window has the same pixels however the slide is divided. Everything that continues from one block into
the next (tissue, slow variation, nuclei) depends on the level-0 position through a hash, not on a random stream. Stains
are mixed as optical densities (the Beer-Lambert law), as in real light microscopy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

UM_PX = 0.243
BLOCK_PX = 512
_STAMP_PX = 48  # upper limit of the radius of a nucleus
_BLUR_PAD_PX = 16  # width of the border that is rendered around a block and cut off after the blur
_FIELD_PAD_PX = _BLUR_PAD_PX + _STAMP_PX  # width of the border from which nuclei may reach into the rendered area
_FIELD_PX = BLOCK_PX + 2 * _FIELD_PAD_PX  # side of the "field square" of a block: the block with that border
_CELL_PX = 16  # pitch of the grid on which slow variation is computed
_TORUS_PX = 1024  # period of the fine textures, a multiple of a block
_PITCH_PX = {"lymphocyte": 28, "pale": 75, "spindle": 42, "tumour": 54}  # at most one nucleus per square of this side
_MACRO_UM, _ITC_UM = 2000.0, 200.0

Polygon = tuple[tuple[int, int], ...]
"""A closed outline, x, y in level-0 px."""


@dataclass(frozen=True)
class Lesion:
    """A tumour region: its outline, and the islands of normal tissue inside it."""

    outline: Polygon
    islands: tuple[Polygon, ...] = ()

    @property
    def axis_um(self) -> float:
        """Longest distance between two points of the outline, um."""
        hull = cv2.convexHull(np.array(self.outline, np.int32))[:, 0].astype(np.float64)
        gaps = hull[:, None] - hull[None]
        return float(np.hypot(gaps[..., 0], gaps[..., 1]).max()) * UM_PX

    @property
    def kind(self) -> Literal["macro", "micro", "itc"]:
        """Size class by the longest axis: macro from 2 mm, itc (isolated tumour cells) below 0.2 mm, micro between."""
        if self.axis_um >= _MACRO_UM:
            return "macro"
        return "itc" if self.axis_um < _ITC_UM else "micro"


@dataclass(frozen=True)
class Stain:
    """The stain, the scanner's noise and the focus of one slide."""

    haematoxylin: tuple[float, float, float]
    """Optical density in red, green and blue of the densest nucleus."""
    eosin: tuple[float, float, float]
    """Optical density in red, green and blue of the densest cytoplasm."""
    glass: tuple[float, float, float]
    """Colour of the empty slide, 0 to 255."""
    blur_px: float
    """Standard deviation of the focus blur."""
    noise: float
    """Standard deviation of the sensor noise, grey values."""


@dataclass(frozen=True)
class SlideSpec:
    """The specification of a synthetic slide: its size, seed, stain, and the outlines of tissue and lesions."""

    width_px: int
    height_px: int
    seed: int
    stain: Stain
    tissue: tuple[Polygon, ...]
    lesions: tuple[Lesion, ...]


def draw_stain(rng: np.random.Generator) -> Stain:
    """Return a random stain: brownish pink to violet, weak to strong, sharp to slightly blurred."""
    violet = rng.beta(0.6, 0.6)
    haematoxylin = (1 - violet) * np.array([1.32, 1.62, 1.02]) + violet * np.array([1.40, 1.62, 0.52])
    eosin = (1 - violet) * np.array([0.24, 0.80, 0.44]) + violet * np.array([0.30, 0.86, 0.18])
    strength = rng.uniform(0.75, 1.15, 2)
    red, green, blue = (strength[0] * haematoxylin * rng.normal(1, 0.06, 3)).tolist()
    red_e, green_e, blue_e = (strength[1] * eosin * rng.normal(1, 0.08, 3)).tolist()
    white = rng.uniform(236, 247)
    tint = (white + rng.uniform(-2, 2, 3)).tolist()
    return Stain(
        haematoxylin=(red, green, blue),
        eosin=(red_e, green_e, blue_e),
        glass=(tint[0], tint[1], tint[2]),
        blur_px=float(rng.uniform(0.6, 1.3)),
        noise=int(rng.integers(6, 13)) / 4,  # only a few values, because a table of noise is cached for each
    )


def polygon(points: NDArray[np.float64]) -> Polygon:
    """Return an outline, float64 (n, 2) of x, y in level-0 px, rounded to whole pixels."""
    return tuple((int(x), int(y)) for x, y in np.rint(points))


def render(spec: SlideSpec, x: int, y: int, width_px: int, height_px: int) -> NDArray[np.uint8]:
    """Return the pixels of a window of a slide; outside the slide there is glass.

    Args:
        spec: The slide.
        x: Left edge, level-0 px.
        y: Top edge, level-0 px.
        width_px: Width of the window.
        height_px: Height of the window.

    Returns:
        uint8 (height_px, width_px, 3), RGB.
    """
    window = np.empty((height_px, width_px, 3), np.uint8)
    for block_y in range(y // BLOCK_PX, -(-(y + height_px) // BLOCK_PX)):
        for block_x in range(x // BLOCK_PX, -(-(x + width_px) // BLOCK_PX)):
            block = _block(spec, block_x, block_y)
            left, top = block_x * BLOCK_PX, block_y * BLOCK_PX
            x0, x1 = max(x, left), min(x + width_px, left + BLOCK_PX)
            y0, y1 = max(y, top), min(y + height_px, top + BLOCK_PX)
            window[y0 - y : y1 - y, x0 - x : x1 - x] = block[y0 - top : y1 - top, x0 - left : x1 - left]
    return window


def patch(rng: np.random.Generator, *, tumour: bool, size_px: int) -> NDArray[np.uint8]:
    """Return a patch of a random slide, either all tumour or normal.

    One in three normal patches lies across the border of the tissue.

    Args:
        rng: Generator for all random choices.
        tumour: Whether the patch is tumour.
        size_px: Side of the patch.

    Returns:
        uint8 (size_px, size_px, 3), RGB.
    """
    far = 8 * size_px
    everywhere: Polygon = ((-far, -far), (far, -far), (far, far), (-far, far))
    tissue = everywhere
    if not tumour and rng.random() < 1 / 3:
        angle, middle = rng.uniform(0, 2 * math.pi), rng.uniform(0.25, 0.75, 2) * size_px
        turned = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        tissue = polygon(np.array([[0, -far], [far, -far], [far, far], [0, far]]) @ turned + middle)
    lesions = (Lesion(everywhere),) if tumour else ()
    spec = SlideSpec(size_px, size_px, int(rng.integers(2**31)), draw_stain(rng), (tissue,), lesions)
    return render(spec, 0, 0, size_px, size_px)


def _block(spec: SlideSpec, block_x: int, block_y: int) -> NDArray[np.uint8]:
    """Return the pixels of one block, uint8 (BLOCK_PX, BLOCK_PX, 3), RGB."""
    x, y = block_x * BLOCK_PX - _FIELD_PAD_PX, block_y * BLOCK_PX - _FIELD_PAD_PX
    tissue = _filled(spec.tissue, x, y)
    if tissue.any():
        tumour = _filled([lesion.outline for lesion in spec.lesions], x, y)
        tumour[_filled([island for lesion in spec.lesions for island in lesion.islands], x, y) > 0] = 0
        stains = _stains(spec.seed, x, y, tissue, tumour)
    else:
        stains = np.zeros((BLOCK_PX + 2 * _BLUR_PAD_PX,) * 2, np.uint16)
    colour = cv2.GaussianBlur(_colours(spec.stain)[stains], (0, 0), spec.stain.blur_px)
    sharp = colour[_BLUR_PAD_PX:-_BLUR_PAD_PX, _BLUR_PAD_PX:-_BLUR_PAD_PX]
    place = np.array([block_x]), np.array([block_y])
    across, down = (int(_hash(spec.seed, stream, *place)[0] * BLOCK_PX) for stream in (90, 91))
    noise = _noise(spec.stain.noise)[down : down + BLOCK_PX, across : across + BLOCK_PX]
    return np.asarray(cv2.add(sharp, noise, dtype=cv2.CV_8U), np.uint8)


def _filled(polygons: Sequence[Polygon], x: int, y: int) -> NDArray[np.uint8]:
    """Return a mask of the field square with its corner at x, y, level-0 px, that is 255 inside any of the polygons."""
    mask = np.zeros((_FIELD_PX, _FIELD_PX), np.uint8)
    for outline in polygons:
        cv2.fillPoly(mask, [np.array(outline, np.int32) - np.array([x, y], np.int32)], 255)
    return mask


def _stains(seed: int, x: int, y: int, tissue: NDArray[np.uint8], tumour: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Return the amounts of both stains in a block and its blur border: 256 * haematoxylin + eosin, each 0 to 255.

    Args:
        seed: Seed of the slide.
        x: Left edge of the field square, level-0 px.
        y: Top edge of the field square, level-0 px.
        tissue: Mask of the field square, 255 inside tissue.
        tumour: Mask of the field square, 255 inside tumour.
    """
    slow = _slow(seed, 1, x, y)
    fibrous = np.clip((_slow(seed, 2, x, y) - 0.63) * 9, 0, 1)
    fibrous[tumour > 0] *= 0.5
    nuclei = _trimmed(_nuclei(seed, x, y, _chances(tissue, tumour, slow, fibrous))).astype(np.float32) / 255
    cancer = _trimmed(cv2.blur(tumour, (15, 15))).astype(np.float32) / 255
    solid = _trimmed(cv2.blur(tissue, (11, 11))).astype(np.float32) / 255
    slow, fibrous = _trimmed(slow), _trimmed(fibrous)
    fine, gap, fibre = (_trimmed(_torus(name, x % _TORUS_PX, y % _TORUS_PX)) for name in ("fine", "gap", "fibre"))
    open_space = np.clip((gap - 0.5 - 0.35 * slow) * 5, 0, 1) * (1 - fibrous) * (1 - 0.9 * cancer)
    eosin = (0.14 + 0.2 * slow + 0.36 * fine) * (1 - 0.92 * open_space)
    eosin += cancer * (0.24 + 0.18 * slow + 0.24 * fine - eosin)
    eosin += fibrous * (0.3 + 0.6 * fibre - eosin)
    haze = (0.03 + 0.05 * fine + cancer * (0.02 + 0.07 * fine)) * (1 - open_space)
    kept = solid * (1 - _trimmed(_fat(seed, x, y)) * (1 - cancer))
    haematoxylin = np.maximum(haze, nuclei) * kept
    eosin *= (1 - 0.5 * np.minimum(nuclei * 1.5, 1)) * kept
    stains = (haematoxylin * 255).astype(np.uint16) * 256 + (np.clip(eosin, 0, 1) * 255).astype(np.uint16)
    return np.asarray(stains, np.uint16)


def _trimmed(field: NDArray[Any]) -> NDArray[Any]:
    """Return the part of a field square that is rendered: the block and its blur border."""
    trim = _FIELD_PAD_PX - _BLUR_PAD_PX
    return field[trim:-trim, trim:-trim]


def _chances(
    tissue: NDArray[np.uint8], tumour: NDArray[np.uint8], slow: NDArray[np.float32], fibrous: NDArray[np.float32]
) -> dict[str, NDArray[np.float32]]:
    """Return, for each kind of nucleus, the probability at each pixel of the field square that a candidate is drawn."""
    cancer, inside = tumour / np.float32(255), tissue / np.float32(255)
    return {
        "lymphocyte": inside * (0.35 + 0.65 * slow) * (1 - 0.95 * cancer) * (1 - 0.85 * fibrous),
        "pale": inside * 0.25 * (1 - cancer),
        "spindle": inside * (0.02 + 0.45 * fibrous),
        "tumour": inside * 0.9 * cancer * (1 - fibrous),
    }


def _nuclei(seed: int, x: int, y: int, chances: dict[str, NDArray[np.float32]]) -> NDArray[np.uint8]:
    """Return the haematoxylin of all nuclei on the field square at x, y, 0 to 255; its rendered part is complete."""
    canvas = np.zeros((_FIELD_PX + 2 * _STAMP_PX,) * 2, np.uint8)
    for stream, (kind, chance) in enumerate(chances.items(), start=10):
        stamps = _stamps(kind)
        for col, row, drawn, which in zip(*_scattered(seed, stream, x, y, _PITCH_PX[kind]), strict=True):
            if drawn < chance[row, col]:
                stamp = stamps[int(which * len(stamps))]
                top, left = row + _STAMP_PX - stamp.shape[0] // 2, col + _STAMP_PX - stamp.shape[1] // 2
                under = canvas[top : top + stamp.shape[0], left : left + stamp.shape[1]]
                np.maximum(under, stamp, out=under)  # independent of the order, so neighbouring blocks agree
    return canvas[_STAMP_PX:-_STAMP_PX, _STAMP_PX:-_STAMP_PX]


def _scattered(
    seed: int, stream: int, x: int, y: int, pitch_px: int, reach_px: int = 0
) -> tuple[list[int], list[int], list[float], list[float]]:
    """Return points of a jittered grid on a field square: columns, rows, and two uniform random numbers for each.

    A point depends only on its grid cell, so neighbouring blocks agree about it.

    Args:
        seed: Seed of the slide.
        stream: Number that distinguishes the grids of one slide.
        x: Left edge of the field square, level-0 px.
        y: Top edge of the field square, level-0 px.
        pitch_px: Side of a grid cell.
        reach_px: Distance outside the square up to which points are returned.
    """
    first_x, first_y = (x - reach_px) // pitch_px, (y - reach_px) // pitch_px
    n = (_FIELD_PX + 2 * reach_px) // pitch_px + 2
    cell_y, cell_x = (part.ravel() for part in np.mgrid[first_y : first_y + n, first_x : first_x + n])
    draws = [_hash(seed, 10 * stream + k, cell_x, cell_y) for k in range(4)]
    # The outer eighths of a cell stay free, so that nuclei touch more often than they overlap.
    cols = np.floor((cell_x + 0.125 + 0.75 * draws[0]) * pitch_px).astype(np.int64) - x
    rows = np.floor((cell_y + 0.125 + 0.75 * draws[1]) * pitch_px).astype(np.int64) - y
    low, high = -reach_px, _FIELD_PX + reach_px
    inside = (cols >= low) & (cols < high) & (rows >= low) & (rows < high)
    return cols[inside].tolist(), rows[inside].tolist(), draws[2][inside].tolist(), draws[3][inside].tolist()


def _fat(seed: int, x: int, y: int) -> NDArray[np.float32]:
    """Return a soft mask, 0 to 1, of the fat cells on a field square at x, y."""
    holes = np.zeros((_FIELD_PX, _FIELD_PX), np.uint8)
    cols, rows, draws, sizes = _scattered(seed, 70, x, y, 210, reach_px=160)
    fatty = _noise_at(seed, 71, np.array(cols) + x, np.array(rows) + y)
    for col, row, drawn, size, here in zip(cols, rows, draws, sizes, fatty, strict=True):
        if drawn < 0.8 and here > 0.74:
            cv2.ellipse(holes, (col, row), (int(85 + 45 * size), int(75 + 40 * drawn)), 360 * size, 0, 360, 255, -1)
    return np.asarray(cv2.blur(holes, (7, 7)), np.float32) / np.float32(255)


def _slow(seed: int, stream: int, x: int, y: int) -> NDArray[np.float32]:
    """Return variation over some 100 um, 0 to 1, on a field square whose corner x, y is a multiple of `_CELL_PX`."""
    centre = (np.arange(-1, _FIELD_PX // _CELL_PX + 1) + 0.5) * _CELL_PX
    grid_x, grid_y = np.meshgrid(centre + x, centre + y)
    coarse = _noise_at(seed, stream, grid_x, grid_y).astype(np.float32)
    # cv2.resize puts a cell's value at its centre, so with a border of one cell neighbouring blocks are continuous.
    field = cv2.resize(coarse, None, fx=_CELL_PX, fy=_CELL_PX, interpolation=cv2.INTER_LINEAR)
    return np.asarray(field[_CELL_PX:-_CELL_PX, _CELL_PX:-_CELL_PX], np.float32)


def _noise_at(seed: int, stream: int, x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.float64]:
    """Return value noise of two octaves at level-0 points, 0 to 1."""
    total = np.zeros(x.shape)
    for octave, (pitch_px, weight) in enumerate(((1100, 0.7), (300, 0.3))):
        u, v = x / pitch_px, y / pitch_px
        i, j = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
        across, down = _eased(u - i), _eased(v - j)
        corner = [_hash(seed, 10 * stream + octave, i + di, j + dj) for dj in (0, 1) for di in (0, 1)]
        above = corner[0] + across * (corner[1] - corner[0])
        below = corner[2] + across * (corner[3] - corner[2])
        total += weight * (above + down * (below - above))
    return total


def _eased(t: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the smoothstep of numbers in 0 to 1, whose slope is 0 at both ends."""
    return t * t * (3 - 2 * t)


def _hash(seed: int, stream: int, i: NDArray[np.int64], j: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return a uniform pseudo-random number, 0 to 1, that depends only on the arguments (a SplitMix64 finaliser)."""
    key = (seed * 1_000_003 + stream) * 0x9E3779B97F4A7C15 % 2**64
    z = np.uint64(key) ^ (i.astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9) + j.astype(np.uint64))
    for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(multiplier)
        z = z ^ (z >> np.uint64(27))
    return (z >> np.uint64(11)).astype(np.float64) / 2**53


@lru_cache(maxsize=16)
def _colours(stain: Stain) -> NDArray[np.uint8]:
    """Return the colour of every pair of stain amounts, uint8 (65536, 3), in row 256 * haematoxylin + eosin."""
    amount = np.arange(256) / 255
    density = amount[:, None, None] * np.array(stain.haematoxylin) + amount[None, :, None] * np.array(stain.eosin)
    colours: NDArray[np.uint8] = np.rint(np.array(stain.glass) * np.exp(-density)).astype(np.uint8)
    return colours.reshape(-1, 3)


@lru_cache(maxsize=16)
def _noise(deviation: float) -> NDArray[np.int16]:
    """Return sensor noise, int16 (2 * BLOCK_PX, 2 * BLOCK_PX, 3), of which every block uses a part."""
    grain = np.random.default_rng(0).normal(0, deviation, (2 * BLOCK_PX, 2 * BLOCK_PX, 3))
    return np.rint(grain).astype(np.int16)


@lru_cache(maxsize=48)
def _torus(kind: str, x: int, y: int) -> NDArray[np.float32]:
    """Return the field square at x, y of a fine texture, 0 to 1, whose period is `_TORUS_PX`."""
    texture = _texture(kind)
    return np.take(np.take(texture, range(y, y + _FIELD_PX), 0, mode="wrap"), range(x, x + _FIELD_PX), 1, mode="wrap")


@lru_cache(maxsize=3)
def _texture(kind: str) -> NDArray[np.float32]:
    """Return one period of a fine texture, float32 (_TORUS_PX, _TORUS_PX), uniformly distributed in 0 to 1."""
    rows_px, cols_px, seed = {"fine": (2.2, 2.2, 1), "gap": (6.0, 6.0, 2), "fibre": (1.6, 9.0, 3)}[kind]
    grain = np.random.default_rng(seed).normal(size=(_TORUS_PX, _TORUS_PX))
    frequency = np.fft.fftfreq(_TORUS_PX)
    smooth = np.exp(-2 * (np.pi * rows_px * frequency[:, None]) ** 2 - 2 * (np.pi * cols_px * frequency[None]) ** 2)
    field = np.real(np.fft.ifft2(np.fft.fft2(grain) * smooth))
    if kind == "fibre":  # the fibres are bent into waves that are periodic as well
        turn = 2 * np.pi * np.arange(_TORUS_PX) / _TORUS_PX
        down = np.rint(26 * np.sin(3 * turn) + 12 * np.sin(7 * turn + 1)).astype(np.int64)
        field = field[(np.arange(_TORUS_PX)[:, None] + down[None]) % _TORUS_PX, np.arange(_TORUS_PX)[None]]
    rank = np.empty(field.size, np.float32)
    rank[np.argsort(field, axis=None, kind="stable")] = np.linspace(0, 1, field.size, dtype=np.float32)
    return rank.reshape(field.shape)


@lru_cache(maxsize=4)
def _stamps(kind: str) -> tuple[NDArray[np.uint8], ...]:
    """Return images of nuclei of one kind: their haematoxylin, 0 to 255, each a square with an odd side."""
    rng = np.random.default_rng(sorted(_PITCH_PX).index(kind))
    return tuple(_nucleus(rng, kind) for _ in range(96))


def _nucleus(rng: np.random.Generator, kind: str) -> NDArray[np.uint8]:
    """Return a random nucleus: an irregular ellipse with a membrane, chromatin clumps and, in tumour, nucleoli."""
    radius_px, slender, density, rim = {
        "lymphocyte": (rng.uniform(11.5, 15.5), rng.uniform(0.8, 1.0), rng.uniform(0.7, 1.0), 0.1),
        "pale": (rng.uniform(15, 21), rng.uniform(0.65, 0.95), rng.uniform(0.3, 0.5), 0.25),
        "spindle": (rng.uniform(20, 30), rng.uniform(0.2, 0.32), rng.uniform(0.6, 0.85), 0.1),
        "tumour": (rng.uniform(21, 37), rng.uniform(0.6, 0.95), rng.uniform(0.32, 0.58), 0.2),
    }[kind]
    reach = int(radius_px * 1.2) + 3
    row, col = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float64)
    turn = rng.normal(0, 0.15) if kind == "spindle" else rng.uniform(0, math.pi)
    along, beside = col * math.cos(turn) + row * math.sin(turn), (row * math.cos(turn) - col * math.sin(turn)) / slender
    angle = np.arctan2(beside, along)
    bumps = sum(rng.normal(0, 0.09 / k) * np.cos(k * angle + rng.uniform(0, 6)) for k in (2, 3, 4))
    depth = radius_px * (1 + bumps) - np.hypot(along, beside)  # px inside the outline
    clumps = cv2.GaussianBlur(rng.normal(size=depth.shape), (0, 0), 2.2)
    value = density * (1 + (0.12 if kind == "lymphocyte" else 0.3) * clumps / clumps.std())
    value += rim * np.exp(-(((depth - 2) / 1.8) ** 2))
    if kind == "tumour":
        for _ in range(rng.integers(1, 3)):
            at = rng.normal(0, radius_px * 0.25, 2)
            value += 0.4 * np.exp(-((row - at[0]) ** 2 + (col - at[1]) ** 2) / 2 / rng.uniform(2.2, 3.6) ** 2)
    return np.asarray(np.clip(value * np.clip(depth / 2.5, 0, 1), 0, 1) * 255, np.uint8)
