"""Tissue of any shape, made of small pictures of tissue: seamless textures, mixtures of two, colours.

Input: pieces of tissue as amounts of two stains. Output: large fields of the same, and RGB.

Codes are uint8, rows x cols x 2: haematoxylin and eosin, `CODE_STEP` of optical density for each count. Working in
stains rather than in colours lets pieces of several slides, once their stains are taken apart, share the colours of
one new slide.

A field is quilted (Efros and Freeman, 2001): pieces are laid row by row so that they overlap, of several random crops
the one that fits best is taken, and it is cut out along the line of least difference. Every class of tissue is made by
this one procedure, so that nothing about how pieces meet tells what they are.
"""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

CODE_STEP = 1 / 85  # 255 counts are a density of 3
PIECE_PX, OVERLAP_PX = 192, 48
_PITCH_PX = PIECE_PX - OVERLAP_PX
_CANDIDATES = 8  # random crops that compete for a place
_FEATHER_PX = 1.5  # standard deviation: a cut is as soft as the focus of a scanner
_NEST_PX = 40  # distance over which mixed tissue changes
_RAMP_PX = 96  # within this of its outline a lesion thins out
_RIM_PURITY = 0.35
_EDGE_PX = 6.0

Codes = NDArray[np.uint8]


class Appearance(NamedTuple):
    """How a slide was stained and scanned.

    Attributes:
        haematoxylin: Optical density of red, green and blue for one unit of the stain.
        eosin: Likewise.
        strengths: Factors on the amounts of both stains.
        glass: Grey values of the empty slide, red, green, blue.
        blur_px: Standard deviation of the focus blur.
        noise: Standard deviation of the sensor's noise, grey values.
    """

    haematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]
    strengths: tuple[float, float]
    glass: tuple[float, float, float]
    blur_px: float
    noise: float


def quilt(pieces: Codes, wanted: NDArray[np.bool_], seed: int) -> Codes:
    """Cover a region with one texture.

    Args:
        pieces: n x side x side x 2, side at least `PIECE_PX`.
        wanted: rows x cols, where texture is needed; elsewhere there may or may not be some.
        seed: Decides which crops compete.

    Returns:
        rows x cols x 2.
    """
    rows, cols = (-(-side // _PITCH_PX) for side in wanted.shape)
    field = np.zeros((rows * _PITCH_PX + OVERLAP_PX, cols * _PITCH_PX + OVERLAP_PX, 2), np.uint8)
    needed = _needed(wanted, (rows, cols))
    for row, col in np.argwhere(needed):
        rng = np.random.default_rng([seed, int(row), int(col)])
        here = field[row * _PITCH_PX :, col * _PITCH_PX :][:PIECE_PX, :PIECE_PX]
        above, left = bool(row and needed[row - 1, col]), bool(col and needed[row, col - 1])
        crops = np.stack([_crop(pieces, rng) for _ in range(_CANDIDATES)])
        strips = [place for place, met in ((np.s_[:OVERLAP_PX], above), (np.s_[:, :OVERLAP_PX], left)) if met]
        misfits = [sum(int(_gap(crop[place], here[place]).sum()) for place in strips) for crop in crops]
        best = crops[int(np.argmin(misfits))]
        _lay(here, best, _kept(_gap(best, here), above=above, left=left))
    return field[: wanted.shape[0], : wanted.shape[1]]


def share_of_tumour(lesions: NDArray[np.uint8], purity: float, seed: int) -> NDArray[np.float32]:
    """Return how much of each pixel is tumour: nests among what was there before, sparser towards the outline.

    Args:
        lesions: rows x cols, anything but 0 is inside a lesion.
        purity: Share of tumour in the middle of a lesion, 0 to 1.
        seed: Decides where nests lie.

    Returns:
        rows x cols, 0 to 1, and 0 outside the lesions.
    """
    inside = (lesions > 0).astype(np.uint8)
    depth_px = cv2.distanceTransform(
        cv2.copyMakeBorder(inside, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0), cv2.DIST_L2, 3
    )
    depth_px = depth_px[1:-1, 1:-1]
    wanted = purity * (_RIM_PURITY + (1 - _RIM_PURITY) * np.minimum(depth_px / _RAMP_PX, 1))
    # a uniform field is below w on a share w of its area
    edge = np.clip((wanted - uniform_field(inside.shape, _NEST_PX, seed)) * _NEST_PX / _EDGE_PX + 0.5, 0, 1)
    return np.asarray(edge * np.minimum(depth_px / _EDGE_PX, 1), np.float32)


def uniform_field(shape: tuple[int, int], pitch_px: int, seed: int) -> NDArray[np.float32]:
    """Return smooth random values, uniform in 0 to 1, that change over some pitch_px.

    The ranks are those of the coarse grid, so the field between its points is uniform to a few percent.
    """
    grid = np.random.default_rng(seed).normal(size=tuple(side // pitch_px + 5 for side in shape))
    smooth = cv2.GaussianBlur(grid, (0, 0), 0.8)
    size = tuple(side * pitch_px for side in smooth.shape[::-1])
    full = cv2.resize(smooth.astype(np.float32), size, interpolation=cv2.INTER_CUBIC)
    full = full[2 * pitch_px :, 2 * pitch_px :][: shape[0], : shape[1]]
    edges = np.quantile(full[::4, ::4], np.linspace(0, 1, 65))
    return np.interp(full, edges, np.linspace(0, 1, 65)).astype(np.float32)


def mixed(under: Codes, over: Codes, share: NDArray[np.float32]) -> Codes:
    """Return one texture where the share is 0 and another where it is 1: codes rows x cols x 2, share rows x cols."""
    weight = share[..., None]
    return np.rint(under * (1 - weight) + over * weight).astype(np.uint8)


def coloured(codes: Codes, appearance: Appearance, seed: int) -> NDArray[np.uint8]:
    """Return what a scanner sees of a field.

    Args:
        codes: rows x cols x 2.
        appearance: Stains and scanner.
        seed: Decides the noise.

    Returns:
        rows x cols x 3, uint8, RGB.
    """
    amount = np.arange(256) * CODE_STEP
    stains = [
        np.multiply(appearance.strengths[k], stain)
        for k, stain in enumerate((appearance.haematoxylin, appearance.eosin))
    ]
    density = amount[:, None, None] * stains[0] + amount[None, :, None] * stains[1]
    table = np.rint(np.array(appearance.glass) * np.exp(-density)).astype(np.uint8).reshape(-1, 3)
    colours = table[codes[..., 0].astype(np.uint16) * 256 + codes[..., 1]]
    soft = cv2.GaussianBlur(colours, (0, 0), appearance.blur_px)
    noise = np.random.default_rng(seed).normal(0, appearance.noise, (1024, 1024, 3))
    repeats = [-(-side // 1024) for side in codes.shape[:2]]
    grain = np.tile(np.rint(noise).astype(np.int8), (*repeats, 1))[: codes.shape[0], : codes.shape[1]]
    return np.asarray(cv2.add(soft, grain, dtype=cv2.CV_8U), np.uint8)


def _needed(wanted: NDArray[np.bool_], grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which places of the grid have a wanted pixel under their piece."""
    found = np.zeros(grid, np.bool_)
    for row, col in np.ndindex(grid):
        under = wanted[row * _PITCH_PX :, col * _PITCH_PX :][:PIECE_PX, :PIECE_PX]
        found[row, col] = under.any()
    return found


def _crop(pieces: Codes, rng: np.random.Generator) -> Codes:
    """Return a random PIECE_PX square of a random piece, turned and flipped at random."""
    piece = pieces[rng.integers(len(pieces))]
    y, x = rng.integers(0, piece.shape[0] - PIECE_PX + 1, 2)
    crop = np.rot90(piece[y : y + PIECE_PX, x : x + PIECE_PX], int(rng.integers(4)))
    return np.asarray(crop[:, ::-1] if rng.random() < 0.5 else crop, np.uint8)


def _gap(one: Codes, other: Codes) -> NDArray[np.int32]:
    """Return the squared difference of two fields at each pixel."""
    apart = cv2.absdiff(np.ascontiguousarray(one), np.ascontiguousarray(other)).astype(np.int32)
    return np.asarray(apart[..., 0] ** 2 + apart[..., 1] ** 2, np.int32)


def _kept(gap: NDArray[np.int32], *, above: bool, left: bool) -> NDArray[np.bool_]:
    """Return which pixels a new piece takes, cut along the lines of least squared difference to what lies there."""
    new = np.ones(gap.shape, np.bool_)
    steps = np.arange(OVERLAP_PX)
    if left:
        new[:, :OVERLAP_PX] &= steps[None] >= _cut(gap[:, :OVERLAP_PX])[:, None]
    if above:
        new[:OVERLAP_PX] &= steps[:, None] >= _cut(gap[:OVERLAP_PX].T)[None]
    return new


def _cut(gap: NDArray[np.int32]) -> NDArray[np.intp]:
    """Return the column, for each row, of the path of least sum from the first row to the last."""
    total = gap.astype(np.int64)
    far = np.iinfo(np.int64).max // 2
    for row in range(1, len(total)):
        before = np.pad(total[row - 1], 1, constant_values=far)
        total[row] += np.minimum(np.minimum(before[:-2], before[1:-1]), before[2:])
    path = np.empty(len(total), np.intp)
    path[-1] = np.argmin(total[-1])
    for row in range(len(total) - 2, -1, -1):
        low = max(0, path[row + 1] - 1)
        path[row] = low + np.argmin(total[row, low : path[row + 1] + 2])
    return path


def _lay(here: Codes, crop: Codes, new: NDArray[np.bool_]) -> None:
    """Write a piece over what is there, softly along its cuts."""
    hard = new.astype(np.float32)
    weight = cv2.GaussianBlur(hard, (0, 0), _FEATHER_PX, borderType=cv2.BORDER_REPLICATE)[..., None]
    here[...] = np.rint(here * (1 - weight) + crop * weight).astype(np.uint8)
