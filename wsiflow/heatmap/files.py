"""The files of heatmaps: float32 TIFF of probabilities, and a pyramid for viewers.

OpenSlide opens a float32 TIFF and reports its levels, but libtiff refuses to render 32-bit samples, so a heatmap has
two files: the float32 one is the data, and an 8-bit preview (0 where not tissue) is what OpenSlide can show.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from wsiflow.errors import InputError
from wsiflow.slides.pyramid import TILE_PX, UNREADABLE, reduced_levels, unreadable_file, write_gray


def write_heatmap(path: Path, heat: NDArray[np.float32], *, um_px: float, description: Mapping[str, Any]) -> None:
    """Write a heatmap as a float32 pyramid.

    A reduced level holds the largest known value of each 2 x 2 cell: a lesion of one cell stays visible in every
    overview, where a mean would fade it.

    Args:
        path: The file to write.
        heat: rows x cols, float32, probability; NaN where not tissue.
        um_px: Spacing of the heatmap's cells, um.
        description: JSON values about the heatmap (transform, model, classes), kept in ImageDescription.
    """
    text = json.dumps(description, sort_keys=True, allow_nan=False)
    write_gray(path, reduced_levels(heat.astype(np.float32), _largest_known), um_px=um_px, description=text)


def write_preview(path: Path, heat: NDArray[np.float32], *, um_px: float) -> None:
    """Write a heatmap as the 8-bit pyramid that OpenSlide renders.

    Args:
        path: The file to write.
        heat: rows x cols, float32, probability in 0..1; NaN where not tissue.
        um_px: Spacing of the heatmap's cells, um.
    """
    gray = np.where(np.isnan(heat), 0, 1 + np.rint(254 * np.clip(np.nan_to_num(heat), 0, 1))).astype(np.uint8)
    text = json.dumps({"0": "not tissue", "1..255": "probability = (value - 1) / 254"})
    write_gray(path, reduced_levels(gray, _largest), um_px=um_px, description=text)


def read_heatmap(path: Path) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Read what `write_heatmap` wrote.

    Returns:
        The heatmap (rows x cols, float32, NaN where not tissue) and its description.

    Raises:
        InputError: The file is not a readable float32 heatmap with a JSON description.
    """
    remedy = "write the heatmap again"
    try:
        with tifffile.TiffFile(path) as tiff:
            heat, text = tiff.pages.first.asarray(), tiff.pages.first.description
        description = json.loads(text)
    except UNREADABLE as error:
        raise unreadable_file(error, "heatmap", remedy, path) from error
    if heat.ndim != 2 or heat.dtype != np.float32:
        raise InputError(f"found {heat.dtype} of shape {heat.shape}, expected float32 rows x cols", remedy, path=path)
    return heat, description


class HeatmapRows:
    """A heatmap's file held open: what it is, and some of its rows at a time."""

    def __init__(self, tiff: tifffile.TiffFile) -> None:
        """Read what is known about the map; no cell is decoded yet."""
        self._file, self._page = tiff.filehandle, tiff.pages.first
        self.shape = (self._page.imagelength, self._page.imagewidth)
        self.description: dict[str, Any] = json.loads(self._page.description)

    def rows(self, first: int, end: int) -> NDArray[np.float32]:
        """Decode the tiles that hold the rows from ``first`` up to ``end``, float32 (end - first, cols)."""
        across = -(-self.shape[1] // TILE_PX)
        top = first // TILE_PX
        bottom = -(-end // TILE_PX)
        tiles = np.empty((bottom - top, TILE_PX, across, TILE_PX), np.float32)
        for row, col in np.ndindex(bottom - top, across):
            index = (top + row) * across + col
            self._file.seek(self._page.dataoffsets[index])
            packed = self._file.read(self._page.databytecounts[index])
            cells: Any = self._page.decode(packed, index)[0]
            tiles[row, :, col] = cells[0, :, :, 0]
        start = first - top * TILE_PX
        return tiles.reshape(-1, across * TILE_PX)[start : start + end - first, : self.shape[1]]


@contextmanager
def open_heatmap(path: Path) -> Iterator[HeatmapRows]:
    """Open what `write_heatmap` wrote, to be read in parts: a map may have 10^8 cells.

    Raises:
        InputError: The file is not a readable float32 heatmap with a JSON description.
    """
    remedy = "give the heatmap of a slide (heatmaps/<slide>.tif), or write it again"
    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            if len(page.shape) != 2 or page.dtype != np.float32 or (page.tilewidth, page.tilelength) != (TILE_PX,) * 2:
                cause = f"found {page.dtype} of shape {page.shape}, expected float32 rows x cols in tiles of {TILE_PX}"
                raise InputError(cause, remedy, path=path)
            yield HeatmapRows(tiff)
    except UNREADABLE as error:
        raise unreadable_file(error, "heatmap", remedy, path) from error


def _quads(level: NDArray[Any], fill: float) -> NDArray[Any]:
    """Return the 2 x 2 cells of a level, the odd last row and column filled up: ceil(rows/2) x ceil(cols/2) x 4."""
    rows, cols = level.shape
    even = np.pad(level, ((0, rows % 2), (0, cols % 2)), constant_values=fill)
    return np.stack([even[::2, ::2], even[::2, 1::2], even[1::2, ::2], even[1::2, 1::2]], axis=-1)


def _largest_known(level: NDArray[np.float32]) -> NDArray[np.float32]:
    """Halve by the largest value that is not NaN."""
    halved: NDArray[np.float32] = np.fmax.reduce(_quads(level, np.nan), axis=-1)
    return halved


def _largest(level: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Halve by the largest value."""
    halved: NDArray[np.uint8] = np.max(_quads(level, 0), axis=-1)
    return halved
