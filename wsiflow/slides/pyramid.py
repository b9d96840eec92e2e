"""Pyramidal TIFF files: slides and masks written, masks read; `wsiflow.heatmap.files` writes heatmaps with it.

Input and output are arrays of rows x cols (x channel). Every file is tiled, carries its spacing in XResolution and
YResolution, and keeps its reduced levels in the chain of main pages with NewSubfileType 1: OpenSlide (``generic-tiff``)
finds levels nowhere else. Level k is 1/2**k of level 0. Same arguments, same bytes: there is no date in the file.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from wsiflow.errors import InputError, WsiflowError
from wsiflow.system import faults

TILE_PX = 256
_BIG_TIFF_PX = 2**30  # above this many pixels the offsets may not fit classic TIFF's 4 GiB
# what tifffile, imagecodecs and Pillow raise for bytes that are no image, a cut file or a damaged tile
UNREADABLE = (OSError, ValueError, IndexError, RuntimeError, ArithmeticError, Image.DecompressionBombError)


def write_mask(path: Path, mask: NDArray[np.bool_] | NDArray[np.uint8], *, um_px: float) -> None:
    """Write a mask as a pyramid of 0 and 255.

    A reduced level takes every second pixel: area and outline keep their expected size, so a lesion is as large at
    1/32 as at level 0.

    Args:
        path: The file to write.
        mask: rows x cols; anything but 0 is inside.
        um_px: Spacing of the mask, um.
    """
    gray = np.where(mask, 255, 0).astype(np.uint8)
    write_gray(path, reduced_levels(gray, lambda level: level[::2, ::2]), um_px=um_px, description="")


def write_rgb(
    path: Path, bands: Iterable[NDArray[np.uint8]], *, shape: tuple[int, int], um_px: float, quality: int
) -> None:
    """Write a slide as a JPEG pyramid, band by band.

    One band and the compressed reduced levels (about a third of the file) are in memory at a time. Reduced levels are
    2 x 2 box means; an odd last row or column is not carried up, as scanners do it.

    Args:
        path: The file to write.
        bands: Horizontal strips from top to bottom, each any number of rows x cols x 3 (RGB).
        shape: rows, cols of the whole slide.
        um_px: Spacing of level 0, um.
        quality: JPEG quality, 1..100.

    Raises:
        InputError: The bands do not fill the shape.
    """
    shapes = _level_shapes(shape)
    reduced: list[list[bytes]] = [[] for _ in shapes]
    tiles = _encoded(_regrouped(bands, len(shapes), shape, path), reduced, quality)
    # the writer closes a generator after its last tile, but not a chain: what follows that tile is still needed
    level_0 = chain(tiles)
    with tifffile.TiffWriter(path, bigtiff=math.prod(shape) > _BIG_TIFF_PX) as tiff:
        for level, (rows, cols) in enumerate(shapes):
            tiff.write(
                level_0 if level == 0 else iter(reduced[level]),
                shape=(rows, cols, 3),
                dtype=np.uint8,
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                **_page_options(level, um_px),
            )
            deque(tiles, maxlen=0)  # complete the reduced levels, and check the number of rows


def read_level(path: Path, downsample: int) -> NDArray[np.uint8]:
    """Read the first channel of an image at a reduced scale.

    A stored level within 1 % of the scale is returned as it is; otherwise the centre pixel of each cell is taken from
    the next finer level.

    Args:
        path: A TIFF, pyramidal or not, or a PNG; 8 bits or 1 bit per sample.
        downsample: Level-0 px per pixel of the result.

    Returns:
        rows x cols, uint8: ceil(level 0 / downsample) where it is computed.

    Raises:
        InputError: The file cannot be read, or has other samples.
    """
    remedy = "give an 8-bit TIFF or PNG image"
    try:
        level = _read_png(path, downsample) if path.suffix.lower() == ".png" else _read_tiff(path, downsample)
    except UNREADABLE as error:
        raise refused(error, "image", remedy, path) from error
    if level.dtype not in (np.uint8, np.bool_):
        raise InputError(f"found samples of type {level.dtype}, expected uint8", remedy, path=path)
    return level.astype(np.uint8)


def refused(error: Exception, what: str, remedy: str, path: Path) -> WsiflowError:
    """Return what it means that a file cannot be read: it is no such file, or the system does not let us."""
    if isinstance(error, OSError) and faults.is_of_machine(error):
        return faults.fault(error, path=path)
    return InputError(f"not a readable {what} ({error})", remedy, path=path)


def _page_options(level: int, um_px: float) -> dict[str, Any]:
    """Return what every page of every file has in common."""
    px_cm = 10_000 / um_px
    return {
        "tile": (TILE_PX, TILE_PX),
        "subfiletype": int(level > 0),
        "resolution": (px_cm, px_cm),
        "resolutionunit": "CENTIMETER",
        "metadata": None,
        "software": "wsiflow",
    }


def write_gray(path: Path, levels: Sequence[NDArray[Any]], *, um_px: float, description: str) -> None:
    """Write levels of one channel; deflate is the compression every reader has."""
    with tifffile.TiffWriter(path, bigtiff=levels[0].nbytes > _BIG_TIFF_PX) as tiff:
        for level, pixels in enumerate(levels):
            tiff.write(
                pixels,
                photometric="minisblack",
                compression="zlib",
                description=description if level == 0 else None,
                **_page_options(level, um_px),
            )


def reduced_levels(base: NDArray[Any], halve: Callable[[Any], NDArray[Any]]) -> list[NDArray[Any]]:
    """Return the array and its halves until one tile holds the last."""
    levels = [base]
    while max(levels[-1].shape) > TILE_PX:
        levels.append(halve(levels[-1]))
    return levels


def _level_shapes(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Return rows, cols of every level of a slide, halved until one tile holds the last."""
    shapes = [shape]
    while max(shapes[-1]) > TILE_PX and min(shapes[-1]) > 1:
        shapes.append((shapes[-1][0] // 2, shapes[-1][1] // 2))
    return shapes


def _regrouped(
    bands: Iterable[NDArray[np.uint8]], n_levels: int, shape: tuple[int, int], path: Path
) -> Iterator[list[NDArray[np.uint8]]]:
    """Yield, for each tile row of level 0, what is ready of every level: whole tile rows, and at the end the rest.

    Raises:
        InputError: The bands do not fill the shape.
    """
    waiting: list[NDArray[np.uint8]] = [np.empty((0, shape[1] >> level, 3), np.uint8) for level in range(n_levels)]
    seen = 0
    for band in bands:
        if band.shape[1] != shape[1]:
            raise InputError(f"a band is {band.shape[1]} px wide, the slide {shape[1]}", "cut equal bands", path=path)
        seen += band.shape[0]
        for start in range(0, band.shape[0], TILE_PX):
            waiting[0] = np.concatenate([waiting[0], band[start : start + TILE_PX]])
            yield _ready(waiting, last=False)
    if seen != shape[0]:
        raise InputError(f"the bands have {seen} rows, the slide {shape[0]}", "give every row once", path=path)
    yield _ready(waiting, last=True)


def _encoded(tile_rows: Iterable[list[NDArray[np.uint8]]], reduced: list[list[bytes]], quality: int) -> Iterator[bytes]:
    """Yield the tiles of level 0 and append those of every reduced level to its list."""
    for levels in tile_rows:
        for level, rows in enumerate(levels[1:], start=1):
            reduced[level].extend(_jpeg_tiles(rows, quality))
        yield from _jpeg_tiles(levels[0], quality)


def _ready(waiting: list[NDArray[np.uint8]], *, last: bool) -> list[NDArray[np.uint8]]:
    """Take the rows that fill tiles off every level, and hand their halves to the next one."""
    ready = []
    for level, rows in enumerate(waiting):
        n = rows.shape[0] if last else rows.shape[0] // TILE_PX * TILE_PX
        ready.append(rows[:n])
        waiting[level] = rows[n:]
        if n > 1 and level + 1 < len(waiting):
            waiting[level + 1] = np.concatenate([waiting[level + 1], _box_halved(rows[:n])])
    return ready


def _box_halved(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the mean of every whole 2 x 2 cell, rounded half up."""
    height, width = rows.shape[0] // 2, rows.shape[1] // 2
    halved = cv2.resize(rows[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
    return halved.astype(np.uint8, copy=False)


def _jpeg_tiles(rows: NDArray[np.uint8], quality: int) -> Iterator[bytes]:
    """Yield the tiles of some rows, left to right and top to bottom, edges filled up with their last pixels."""
    height, width = rows.shape[:2]
    for y in range(0, height, TILE_PX):
        for x in range(0, width, TILE_PX):
            tile = rows[y : y + TILE_PX, x : x + TILE_PX]
            missing = (TILE_PX - tile.shape[0], TILE_PX - tile.shape[1])
            if any(missing):
                tile = np.pad(tile, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
            tile = np.ascontiguousarray(tile)
            yield bytes(
                imagecodecs.jpeg8_encode(
                    tile, level=quality, colorspace="RGB", outcolorspace="YCBCR", subsampling="420"
                )
            )


def _read_png(path: Path, downsample: int) -> NDArray[Any]:
    """Return the first channel of a PNG at a reduced scale."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return _subsampled(pixels if pixels.ndim == 2 else pixels[..., 0], downsample)


def _read_tiff(path: Path, downsample: int) -> NDArray[Any]:
    """Return the first channel of a TIFF at a reduced scale, from the coarsest level that is not coarser than asked."""
    with tifffile.TiffFile(path) as tiff:
        first = tiff.pages.first
        scales = {index: _scale(first, page) for index, page in enumerate(tiff.pages)}
        fine = {index: scale for index, scale in scales.items() if scale and scale <= downsample * 1.01}
        index = max(fine, key=lambda found: fine[found])
        if math.isclose(fine[index], downsample, rel_tol=0.01):
            pixels = tiff.pages[index].asarray()
            return pixels if pixels.ndim == 2 else pixels[..., 0]
        return _picked(tiff.pages[index], downsample / fine[index])


def _picked(page: Any, step: float) -> NDArray[Any]:
    """Return what `_subsampled` returns of a page, with one tile or strip of it in memory at a time.

    A mask without levels may have 10^10 pixels, and every worker of a run may look at one.
    """
    rows, cols = (_picks(side, step) for side in (page.imagelength, page.imagewidth))
    found = np.zeros((len(rows), len(cols)), page.dtype)
    for tile, (plane, _, top, left, _), (_, height, width, _) in page.segments(maxworkers=1):
        if tile is None or plane:  # not stored, all 0; another channel
            continue
        (r0, r1), (c0, c1) = (
            np.searchsorted(picks, (begin, begin + side))
            for picks, begin, side in ((rows, top, height), (cols, left, width))
        )
        found[r0:r1, c0:c1] = tile[0, :, :, 0][np.ix_(rows[r0:r1] - top, cols[c0:c1] - left)]
    return found


def _scale(first: Any, page: Any) -> float | None:
    """Return the downsample of a page, or None for a page that is no level of the first one (a label, a thumbnail)."""
    across, down = first.imagewidth / page.imagewidth, first.imagelength / page.imagelength
    # rounding a side to whole pixels moves the ratio by at most one pixel in its length
    slack = across / page.imagewidth + down / page.imagelength
    return (across + down) / 2 if abs(across - down) <= slack else None


def _subsampled(level: NDArray[Any], step: float) -> NDArray[Any]:
    """Return the pixel at the centre of each cell of step x step pixels; the last cells may be cut."""
    return level[np.ix_(*(_picks(side, step) for side in level.shape))]


def _picks(side: int, step: float) -> NDArray[np.int64]:
    """Return the centre of each cell along a side, rising."""
    return np.minimum(((np.arange(math.ceil(side / step)) + 0.5) * step).astype(np.int64), side - 1)
