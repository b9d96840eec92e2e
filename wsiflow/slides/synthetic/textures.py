"""Texture synthesis: tissue of any size and shape from small images, mixtures of two textures, and their colours.

Input: pieces of tissue as amounts of two stains. Output: large fields of such amounts, and RGB images.

Codes are amounts of haematoxylin and eosin, uint8 (rows, cols, 2); one count is `CODE_STEP` of optical density. Because
the stains of pieces from several slides are separated, all pieces can be shown in the stains of one new slide.

Fields are quilted (Efros and Freeman, 2001): overlapping pieces are placed row by row. Of several random crops the one
that fits best is taken and cut along the path of least difference. All classes of tissue are synthesised by this one
procedure, so that a network cannot recognise a class by how its pieces are joined.
"""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

CODE_STEP = 1 / 85  # so 255 counts are an optical density of 3
PIECE_PX, OVERLAP_PX = 192, 48
_PITCH_PX = PIECE_PX - OVERLAP_PX
_CANDIDATES = 8  # number of random crops that are compared for each place
_FEATHER_PX = 1.5  # standard deviation of the blur along a cut, which is as soft as the focus of a scanner
_NEST_PX = 40  # distance over which the mixture of two tissues varies
_RAMP_PX = 96  # distance from its outline over which a lesion becomes sparser
_RIM_PURITY = 0.35
_EDGE_PX = 6.0

Codes = NDArray[np.uint8]


class Appearance(NamedTuple):
    """The appearance of a slide, determined by its stains and scanner.

    Attributes:
        haematoxylin: Optical density of red, green and blue for one unit of haematoxylin.
        eosin: The same for eosin.
        strengths: Factors for the amounts of both stains.
        glass: Grey values of the empty slide in red, green and blue.
        blur_px: Standard deviation of the focus blur.
        noise: Standard deviation of the sensor noise, grey values.
    """

    haematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]
    strengths: tuple[float, float]
    glass: tuple[float, float, float]
    blur_px: float
    noise: float


def quilt(pieces: Codes, region: NDArray[np.bool_], seed: int) -> Codes:
    """Return a field that is covered with one texture inside a region.

    Args:
        pieces: uint8 (n, side, side, 2), where side is at least `PIECE_PX`.
        region: bool (rows, cols), where texture is required; elsewhere the field may be empty.
        seed: Seed of the random crops.

    Returns:
        uint8 (rows, cols, 2).
    """
    rows, cols = (-(-side // _PITCH_PX) for side in region.shape)
    field = np.zeros((rows * _PITCH_PX + OVERLAP_PX, cols * _PITCH_PX + OVERLAP_PX, 2), np.uint8)
    needed = _needed(region, (rows, cols))
    for row, col in np.argwhere(needed):
        rng = np.random.default_rng([seed, int(row), int(col)])
        here = field[row * _PITCH_PX :, col * _PITCH_PX :][:PIECE_PX, :PIECE_PX]
        above, left = bool(row and needed[row - 1, col]), bool(col and needed[row, col - 1])
        crops = np.stack([_crop(pieces, rng) for _ in range(_CANDIDATES)])
        strips = [place for place, met in ((np.s_[:OVERLAP_PX], above), (np.s_[:, :OVERLAP_PX], left)) if met]
        misfits = [sum(int(_gap(crop[place], here[place]).sum()) for place in strips) for crop in crops]
        best = crops[int(np.argmin(misfits))]
        _lay(here, best, _kept(_gap(best, here), above=above, left=left))
    return field[: region.shape[0], : region.shape[1]]


def share_of_tumour(lesions: NDArray[np.uint8], purity: float, seed: int) -> NDArray[np.float32]:
    """Return the fraction of tumour in each pixel: nests within the other tissue, sparser towards the outline.

    Args:
        lesions: Shape (rows, cols); every value but 0 is inside a lesion.
        purity: Fraction of tumour in the middle of a lesion, 0 to 1.
        seed: Seed of the positions of nests.

    Returns:
        float32 (rows, cols), 0 to 1, and 0 outside the lesions.
    """
    inside = (lesions > 0).astype(np.uint8)
    depth_px = cv2.distanceTransform(
        cv2.copyMakeBorder(inside, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0), cv2.DIST_L2, 3
    )
    depth_px = depth_px[1:-1, 1:-1]
    target = purity * (_RIM_PURITY + (1 - _RIM_PURITY) * np.minimum(depth_px / _RAMP_PX, 1))
    # A uniform field is below the target t on a fraction t of its area.
    edge = np.clip((target - uniform_field(inside.shape, _NEST_PX, seed)) * _NEST_PX / _EDGE_PX + 0.5, 0, 1)
    return np.asarray(edge * np.minimum(depth_px / _EDGE_PX, 1), np.float32)


def uniform_field(shape: tuple[int, int], pitch_px: int, seed: int) -> NDArray[np.float32]:
    """Return a smooth random field, float32 (rows, cols), whose values are distributed uniformly in 0 to 1.

    The distribution is equalised on every fourth pixel and is uniform to a few percent.

    Args:
        shape: Number of rows and columns.
        pitch_px: Distance over which the field varies.
        seed: Seed of the field.
    """
    grid = np.random.default_rng(seed).normal(size=tuple(side // pitch_px + 5 for side in shape))
    smooth = cv2.GaussianBlur(grid, (0, 0), 0.8)
    size = tuple(side * pitch_px for side in smooth.shape[::-1])
    full = cv2.resize(smooth.astype(np.float32), size, interpolation=cv2.INTER_CUBIC)
    full = full[2 * pitch_px :, 2 * pitch_px :][: shape[0], : shape[1]]
    edges = np.quantile(full[::4, ::4], np.linspace(0, 1, 65))
    return np.interp(full, edges, np.linspace(0, 1, 65)).astype(np.float32)


def mixed(under: Codes, over: Codes, share: NDArray[np.float32]) -> Codes:
    """Return the mixture of two fields (rows, cols, 2); ``share`` (rows, cols) is the fraction of ``over``, 0 to 1."""
    weight = share[..., None]
    return np.rint(under * (1 - weight) + over * weight).astype(np.uint8)


def coloured(codes: Codes, appearance: Appearance, seed: int) -> NDArray[np.uint8]:
    """Return the image of a field, stained and scanned.

    Args:
        codes: uint8 (rows, cols, 2).
        appearance: Stains and scanner.
        seed: Seed of the sensor noise.

    Returns:
        uint8 (rows, cols, 3), RGB.
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


def _needed(region: NDArray[np.bool_], grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the places of the grid, bool of shape ``grid``, whose piece covers a pixel of the region."""
    needed = np.zeros(grid, np.bool_)
    for row, col in np.ndindex(grid):
        under = region[row * _PITCH_PX :, col * _PITCH_PX :][:PIECE_PX, :PIECE_PX]
        needed[row, col] = under.any()
    return needed


def _crop(pieces: Codes, rng: np.random.Generator) -> Codes:
    """Return a random square of `PIECE_PX` from a random piece, randomly rotated and reflected."""
    piece = pieces[rng.integers(len(pieces))]
    y, x = rng.integers(0, piece.shape[0] - PIECE_PX + 1, 2)
    crop = np.rot90(piece[y : y + PIECE_PX, x : x + PIECE_PX], int(rng.integers(4)))
    return np.asarray(crop[:, ::-1] if rng.random() < 0.5 else crop, np.uint8)


def _gap(one: Codes, other: Codes) -> NDArray[np.int32]:
    """Return the squared difference of two fields at each pixel, int32 (rows, cols)."""
    apart = cv2.absdiff(np.ascontiguousarray(one), np.ascontiguousarray(other)).astype(np.int32)
    return np.asarray(apart[..., 0] ** 2 + apart[..., 1] ** 2, np.int32)


def _kept(gap: NDArray[np.int32], *, above: bool, left: bool) -> NDArray[np.bool_]:
    """Return the pixels that a new piece takes, cut along the paths of least squared difference to the old pixels."""
    new = np.ones(gap.shape, np.bool_)
    steps = np.arange(OVERLAP_PX)
    if left:
        new[:, :OVERLAP_PX] &= steps[None] >= _cut(gap[:, :OVERLAP_PX])[:, None]
    if above:
        new[:OVERLAP_PX] &= steps[:, None] >= _cut(gap[:OVERLAP_PX].T)[None]
    return new


def _cut(gap: NDArray[np.int32]) -> NDArray[np.intp]:
    """Return the column in each row of the path with the least sum from the first to the last row."""
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
    """Write the new pixels of a piece into a field in place, blended along the cuts."""
    hard = new.astype(np.float32)
    weight = cv2.GaussianBlur(hard, (0, 0), _FEATHER_PX, borderType=cv2.BORDER_REPLICATE)[..., None]
    here[...] = np.rint(here * (1 - weight) + crop * weight).astype(np.uint8)
