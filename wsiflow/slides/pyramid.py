"""Writing of slides and masks as pyramidal TIFF files, and reading of masks.

Input and output are arrays (rows, cols) or (rows, cols, channels). Every file is tiled, states its spacing in
XResolution and YResolution, and stores its reduced levels in the chain of main pages with NewSubfileType 1, the only
place where OpenSlide (``generic-tiff``) looks for levels. The sides of level k are 1/2**k of those of level 0. The same
arguments give the same bytes, since the files contain no date. `wsiflow.heatmap.files` uses this module for heatmaps.
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
_BIG_TIFF_PX = 2**30  # above this number of pixels, offsets may exceed the 4 GiB of a classic TIFF
# Exceptions of tifffile, imagecodecs and Pillow for a file that is not an image, is truncated or has a damaged tile.
UNREADABLE = (OSError, ValueError, IndexError, RuntimeError, ArithmeticError, Image.DecompressionBombError)


def write_rgb(
    path: Path, bands: Iterable[NDArray[np.uint8]], *, shape: tuple[int, int], um_px: float, quality: int
) -> None:
    """Write a slide as a JPEG pyramid, one horizontal band after the other.

    Only one band and the compressed reduced levels (about a third of the file) are in memory at a time. The pixels of
    reduced levels are means of 2 x 2 pixels; an odd last row or column is dropped, as scanners do.

    Args:
        path: The file to write.
        bands: Horizontal strips from top to bottom, each uint8 (any number of rows, cols, 3), RGB.
        shape: Number of rows and columns of the whole slide.
        um_px: Spacing of level 0, um per px.
        quality: JPEG quality, 1 to 100.

    Raises:
        InputError: The bands do not add up to the shape.
    """
    shapes = _level_shapes(shape)
    reduced: list[list[bytes]] = [[] for _ in shapes]
    tiles = _encoded(_regrouped(bands, len(shapes), shape, path), reduced, quality)
    # The writer closes a generator after the last tile of level 0, but not a chain, and the generator must continue.
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
            deque(tiles, maxlen=0)  # this completes the reduced levels and checks the number of rows


def read_level(path: Path, downsample: int, *, coloured: bool = True) -> NDArray[np.uint8]:
    """Read the first channel of an image at a reduced scale.

    A stored level whose scale is within 1 % of the requested one is returned unchanged. Otherwise the centre pixel of
    each cell is taken from the next finer level.

    Args:
        path: A TIFF, pyramidal or not, or a PNG, with 8 bits or 1 bit per sample.
        downsample: Level-0 px per pixel of the result.
        coloured: Whether an image is accepted whose channels differ: of a mask in colours, one does not say it all.

    Returns:
        uint8 (rows, cols); each side is ceil(side of level 0 / downsample) unless a stored level is returned.

    Raises:
        InputError: The file is not such an image, or is coloured.
        EnvironmentFault: The system refuses to read the file.
    """
    remedy = "give an 8-bit TIFF or PNG image"
    try:
        level = _read_png(path, downsample) if path.suffix.lower() == ".png" else _read_tiff(path, downsample)
    except UNREADABLE as error:
        raise unreadable_file(error, "image", remedy, path) from error
    if level.dtype not in (np.uint8, np.bool_):
        raise InputError(f"the image has samples of type {level.dtype}, expected uint8", remedy, path=path)
    if not coloured and level.shape[2] > 2 and (level[..., 1:3] != level[..., :1]).any():
        cause = "the mask is a picture in colours, which do not say what is meant"
        raise InputError(cause, "give a mask of one channel", path=path)
    return level[..., 0].astype(np.uint8)


def image_shape(path: Path) -> tuple[int, int]:
    """Return the rows and columns of an image at its finest level; only its header is read.

    Args:
        path: A TIFF or a PNG.

    Raises:
        InputError: The file is not such an image.
        EnvironmentFault: The system refuses to read the file.
    """
    try:
        if path.suffix.lower() == ".png":
            with Image.open(path) as image:
                return image.height, image.width
        with tifffile.TiffFile(path) as tiff:
            page: Any = tiff.pages.first
            return int(page.imagelength), int(page.imagewidth)
    except UNREADABLE as error:
        raise unreadable_file(error, "image", "give an 8-bit TIFF or PNG image", path) from error


def unreadable_file(error: Exception, what: str, remedy: str, path: Path) -> WsiflowError:
    """Return the error of an image file that cannot be read.

    Args:
        error: An exception of `UNREADABLE`.
        what: What the file should be, for example ``image``.
        remedy: The remedy where the file is at fault.
        path: The file.

    Returns:
        An `EnvironmentFault` where the machine is at fault, otherwise an `InputError`.
    """
    if isinstance(error, OSError) and faults.is_of_machine(error):
        return faults.fault(error, path=path)
    return InputError(f"the file is not a readable {what} ({error})", remedy, path=path)


def _page_options(level: int, um_px: float) -> dict[str, Any]:
    """Return the arguments of the TIFF writer that all pages of all files have in common."""
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
    """Write a pyramid of one channel, compressed with deflate, which all readers support.

    Args:
        path: The file to write.
        levels: Arrays (rows, cols), level 0 first.
        um_px: Spacing of level 0, um per px.
        description: ImageDescription of level 0.
    """
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
    """Return the levels of a pyramid: the array, then each level reduced by ``halve``, until one fits in a tile."""
    levels = [base]
    while max(levels[-1].shape) > TILE_PX:
        levels.append(halve(levels[-1]))
    return levels


def _level_shapes(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the rows and columns of every level of a slide, halved until a level fits in one tile."""
    shapes = [shape]
    while max(shapes[-1]) > TILE_PX and min(shapes[-1]) > 1:
        shapes.append((shapes[-1][0] // 2, shapes[-1][1] // 2))
    return shapes


def _regrouped(
    bands: Iterable[NDArray[np.uint8]], n_levels: int, shape: tuple[int, int], path: Path
) -> Iterator[list[NDArray[np.uint8]]]:
    """Yield, for each tile row of level 0, the complete tile rows of every level, and at the end the remaining rows.

    Raises:
        InputError: The bands do not add up to the shape.
    """
    waiting: list[NDArray[np.uint8]] = [np.empty((0, shape[1] >> level, 3), np.uint8) for level in range(n_levels)]
    seen = 0
    for band in bands:
        if band.shape[1] != shape[1]:
            cause = f"a band is {band.shape[1]} px wide, but the slide is {shape[1]} px wide"
            raise InputError(cause, "give bands as wide as the slide", path=path)
        seen += band.shape[0]
        for start in range(0, band.shape[0], TILE_PX):
            waiting[0] = np.concatenate([waiting[0], band[start : start + TILE_PX]])
            yield _ready(waiting, last=False)
    if seen != shape[0]:
        raise InputError(f"the bands have {seen} rows, but the slide has {shape[0]}", "give every row once", path=path)
    yield _ready(waiting, last=True)


def _encoded(tile_rows: Iterable[list[NDArray[np.uint8]]], reduced: list[list[bytes]], quality: int) -> Iterator[bytes]:
    """Yield the encoded tiles of level 0, and append those of every reduced level to its list in ``reduced``."""
    for levels in tile_rows:
        for level, rows in enumerate(levels[1:], start=1):
            reduced[level].extend(_jpeg_tiles(rows, quality))
        yield from _jpeg_tiles(levels[0], quality)


def _ready(waiting: list[NDArray[np.uint8]], *, last: bool) -> list[NDArray[np.uint8]]:
    """Remove the rows that fill tiles from every level, return them, and append their halves to the next level."""
    ready = []
    for level, rows in enumerate(waiting):
        n = rows.shape[0] if last else rows.shape[0] // TILE_PX * TILE_PX
        ready.append(rows[:n])
        waiting[level] = rows[n:]
        if n > 1 and level + 1 < len(waiting):
            waiting[level + 1] = np.concatenate([waiting[level + 1], _box_halved(rows[:n])])
    return ready


def _box_halved(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the mean of every complete 2 x 2 cell, rounded half up."""
    height, width = rows.shape[0] // 2, rows.shape[1] // 2
    halved = cv2.resize(rows[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
    return halved.astype(np.uint8, copy=False)


def _jpeg_tiles(rows: NDArray[np.uint8], quality: int) -> Iterator[bytes]:
    """Yield the JPEG tiles of some rows, left to right and top to bottom; incomplete tiles repeat their last pixels."""
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
    """Return the channels of a PNG at a reduced scale, (rows, cols, channels)."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return pixels[np.ix_(*(_picks(side, downsample) for side in pixels.shape[:2]))]


def _read_tiff(path: Path, downsample: int) -> NDArray[Any]:
    """Return the channels of a TIFF at a reduced scale, from its coarsest level that is fine enough."""
    with tifffile.TiffFile(path) as tiff:
        first = tiff.pages.first
        scales = {index: _scale(first, page) for index, page in enumerate(tiff.pages)}
        fine = {index: scale for index, scale in scales.items() if scale and scale <= downsample * 1.01}
        index = max(fine, key=lambda level: fine[level])
        is_stored = math.isclose(fine[index], downsample, rel_tol=0.01)
        return _picked(tiff.pages[index], 1.0 if is_stored else downsample / fine[index])


def _picked(page: Any, step: float) -> NDArray[Any]:
    """Return the pixel at the centre of each cell of step x step pixels, with one tile or strip in memory at a time.

    A mask without reduced levels may have 10^10 pixels, and every worker of a run may read one.
    """
    rows, cols = (_picks(side, step) for side in (page.imagelength, page.imagewidth))
    picked = np.zeros((len(rows), len(cols), page.samplesperpixel), page.dtype)
    for tile, (plane, _, top, left, _), (_, height, width, _) in page.segments(maxworkers=1):
        if tile is None:  # a tile that is not stored is all 0
            continue
        (r0, r1), (c0, c1) = (
            np.searchsorted(picks, (begin, begin + side))
            for picks, begin, side in ((rows, top, height), (cols, left, width))
        )
        channels = slice(plane, plane + tile.shape[3])  # a plane is one channel
        picked[r0:r1, c0:c1, channels] = tile[0][np.ix_(rows[r0:r1] - top, cols[c0:c1] - left)]
    return picked


def _scale(first: Any, page: Any) -> float | None:
    """Return the downsample of a page, or None if it is not a level of the first page (but a label or thumbnail)."""
    across, down = first.imagewidth / page.imagewidth, first.imagelength / page.imagelength
    # Rounding a side to whole pixels changes its ratio by at most one pixel in its length.
    slack = across / page.imagewidth + down / page.imagelength
    return (across + down) / 2 if abs(across - down) <= slack else None


def _picks(side: int, step: float) -> NDArray[np.int64]:
    """Return the index of the pixel at the centre of each cell along a side, in ascending order."""
    return np.minimum(((np.arange(math.ceil(side / step)) + 0.5) * step).astype(np.int64), side - 1)
