"""Read and write the files of heatmaps: a float32 TIFF of probabilities, and an 8-bit pyramid for viewers.

OpenSlide opens a float32 TIFF and reports its levels, but libtiff refuses to render 32-bit samples. A heatmap therefore
has two files: the float32 file is the data, and OpenSlide can show the 8-bit preview (0 where not tissue).
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from numpy.typing import ArrayLike, NDArray

from wsiflow.errors import InputError
from wsiflow.plan.geometry import Frame, l0_from_h, l0_from_h_corner
from wsiflow.slides.pyramid import TILE_PX, UNREADABLE, reduced_levels, unreadable_file, write_gray


class Heatmap(NamedTuple):
    """A heatmap that was read from its file.

    Attributes:
        values: float32 (rows, cols), probabilities, 0 to 1; NaN where not tissue.
        description: JSON values that were written with it: ``slide_id``, ``frame``, ``key``, and ``class`` for a map
            of a further class.
    """

    values: NDArray[np.float32]
    description: dict[str, Any]

    @property
    def frame(self) -> Frame:
        """The transform between heatmap cells, the pixels that were read and level 0."""
        return Frame(**self.description["frame"])

    def l0_from_cells(self, rows: ArrayLike, cols: ArrayLike) -> NDArray[np.float64]:
        """Return where on the slide the scores of cells belong.

        Args:
            rows: Rows of cells, of any shape.
            cols: Columns of cells, of the same shape.

        Returns:
            float64 (..., 2), x and y in level-0 px, from the corner of level 0: centres of cells, or their corners
            where the run had ``geometry=reference``.
        """
        points = np.stack(np.broadcast_arrays(np.asarray(cols, np.float64), np.asarray(rows, np.float64)), axis=-1)
        return l0_from_h(self.frame, points.reshape(-1, 2)).reshape(points.shape)

    def cells_from_l0(self, points: ArrayLike) -> NDArray[np.int64]:
        """Return the rows and columns of the cells that hold points of the slide.

        Args:
            points: x and y in level-0 px, (..., 2), such as detections.

        Returns:
            int64 (..., 2), rows and columns, which may lie outside of the map.
        """
        frame = self.frame
        begin, side = l0_from_h_corner(frame, 0, 0), frame.stride_px * frame.l0_per_px
        return np.floor((np.asarray(points, np.float64) - begin) / side).astype(np.int64)[..., ::-1]


def write_heatmap(path: Path, heat: NDArray[np.float32], *, um_px: float, description: Mapping[str, Any]) -> None:
    """Write a heatmap as a float32 TIFF pyramid.

    A pixel of a reduced level is the largest value of 2 x 2 pixels that is not NaN, so that a lesion of one cell stays
    visible in every overview; a mean would hide it.

    Args:
        path: The file to write.
        heat: float32 (rows, cols), probabilities; NaN where not tissue.
        um_px: Side of a heatmap cell, um.
        description: JSON values on the heatmap (transform, model, classes), stored in the tag ImageDescription.
    """
    text = json.dumps(description, sort_keys=True, allow_nan=False)
    write_gray(path, heat_levels(heat), um_px=um_px, description=text)


def heat_levels(heat: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Return the levels of a heatmap's pyramid, float32, each half as large: see `write_heatmap`."""
    return reduced_levels(heat.astype(np.float32), _largest_known)


def write_preview(path: Path, heat: NDArray[np.float32], *, um_px: float) -> None:
    """Write a heatmap as the 8-bit TIFF pyramid that OpenSlide renders.

    Args:
        path: The file to write.
        heat: float32 (rows, cols), probabilities, 0 to 1; NaN where not tissue.
        um_px: Side of a heatmap cell, um.
    """
    gray = np.where(np.isnan(heat), 0, 1 + np.rint(254 * np.clip(np.nan_to_num(heat), 0, 1))).astype(np.uint8)
    text = json.dumps({"0": "not tissue", "1..255": "probability = (value - 1) / 254"})
    write_gray(path, reduced_levels(gray, _largest), um_px=um_px, description=text)


FIRST_PASS, OWN_PASS = 1, 2
"""What a cell of the file of passes says: it was scored by the first pass of a cascade alone, or by the run's own."""


def write_passes(path: Path, passes: NDArray[np.uint8], *, um_px: float) -> None:
    """Write which pass has scored each cell of a heatmap, as an 8-bit TIFF pyramid.

    Args:
        path: The file to write.
        passes: uint8 (rows, cols): 0 for no score, `FIRST_PASS` or `OWN_PASS`.
        um_px: Side of a heatmap cell, um.
    """
    text = json.dumps({"0": "no score", str(FIRST_PASS): "first pass alone", str(OWN_PASS): "the run's own pass"})
    write_gray(path, reduced_levels(passes, _largest), um_px=um_px, description=text)


def read_passes(path: Path) -> NDArray[np.uint8]:
    """Read which pass has scored each cell of a heatmap, uint8 (rows, cols), as `write_passes` wrote it.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            return np.asarray(tiff.pages.first.asarray(), np.uint8)
    except UNREADABLE as error:
        raise unreadable_file(error, "map of passes", "run again", path) from error


def read_heatmap(path: Path | str) -> Heatmap:
    """Read a heatmap that `write_heatmap` wrote.

    Raises:
        InputError: The file is not a readable float32 heatmap with a JSON description.
    """
    path, remedy = Path(path), "name a heatmaps/<slide>.tif of a run, or run again where it is one"
    try:
        with tifffile.TiffFile(path) as tiff:
            heat, text = tiff.pages.first.asarray(), tiff.pages.first.description
        description = json.loads(text)
    except UNREADABLE as error:
        raise unreadable_file(error, "heatmap", remedy, path) from error
    if heat.ndim != 2 or heat.dtype != np.float32:
        cause = f"the file holds {heat.dtype} of shape {heat.shape}, and float32 of rows x cols is expected"
        raise InputError(cause, remedy, path=path)
    return Heatmap(heat, description)


class Preview:
    """An open preview: the levels of an 8-bit heatmap, whole or by tiles; it is used from one thread at a time.

    A value is 0 where there is no score, else 1 + 254 times the probability. A cell of level n covers 2^n x 2^n cells
    of the heatmap, and has the largest value of these.

    Attributes:
        shapes: Rows and columns of each level, the finest first.
    """

    def __init__(self, tiff: tifffile.TiffFile) -> None:
        """Read the sizes of the levels; no cell is decoded yet."""
        self._pages: list[Any] = list(tiff.pages)
        self._file = tiff.filehandle
        self.shapes = [(int(page.imagelength), int(page.imagewidth)) for page in self._pages]

    def level(self, number: int) -> NDArray[np.uint8]:
        """Return a level, uint8 (rows, cols)."""
        cells: NDArray[np.uint8] = self._pages[number].asarray()
        return cells

    def tile(self, number: int, row: int, col: int) -> NDArray[np.uint8]:
        """Return a tile of a level, uint8 (at most 256, at most 256); those at the far sides end with the level."""
        page, (rows, cols) = self._pages[number], self.shapes[number]
        index = row * -(-cols // TILE_PX) + col
        self._file.seek(page.dataoffsets[index])
        decoded: Any = page.decode(self._file.read(page.databytecounts[index]), index)[0]
        cells: NDArray[np.uint8] = decoded[0, : rows - row * TILE_PX, : cols - col * TILE_PX, 0]
        return cells


@contextmanager
def open_preview(path: Path) -> Iterator[Preview]:
    """Open a preview that `write_preview` wrote.

    Raises:
        InputError: The file is not a readable preview.
        EnvironmentFault: The system refuses to read the file.
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            yield Preview(tiff)
    except UNREADABLE as error:
        raise unreadable_file(error, "preview of a heatmap", "run again", path) from error


class HeatmapRows:
    """An open heatmap file, which reads a range of rows at a time.

    Attributes:
        shape: Rows and columns of the heatmap.
        description: JSON values that `write_heatmap` stored.
    """

    def __init__(self, tiff: tifffile.TiffFile) -> None:
        """Read shape and description of the heatmap; no cell is decoded yet."""
        self._file, self._page = tiff.filehandle, tiff.pages.first
        self.shape = (self._page.imagelength, self._page.imagewidth)
        self.description: dict[str, Any] = json.loads(self._page.description)

    def rows(self, first: int, end: int) -> NDArray[np.float32]:
        """Return float32 (end - first, cols), the rows from ``first`` up to ``end``; only their tiles are decoded."""
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
    """Open a heatmap that `write_heatmap` wrote, to read it in parts: a map may have 10^8 cells.

    Raises:
        InputError: The file is not a readable float32 heatmap with a JSON description.
    """
    remedy = "give the heatmap of a slide (heatmaps/<slide>.tif), or write it again"
    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            if len(page.shape) != 2 or page.dtype != np.float32 or (page.tilewidth, page.tilelength) != (TILE_PX,) * 2:
                cause = f"the file holds {page.dtype} of shape {page.shape}"
                cause += f", and float32 of rows x cols in tiles of {TILE_PX} px is expected"
                raise InputError(cause, remedy, path=path)
            yield HeatmapRows(tiff)
    except UNREADABLE as error:
        raise unreadable_file(error, "heatmap", remedy, path) from error


def _quads(level: NDArray[Any], fill: float) -> NDArray[Any]:
    """Return (ceil(rows / 2), ceil(cols / 2), 4), the 2 x 2 pixels of a level; ``fill`` pads an odd row or column."""
    rows, cols = level.shape
    even = np.pad(level, ((0, rows % 2), (0, cols % 2)), constant_values=fill)
    return np.stack([even[::2, ::2], even[::2, 1::2], even[1::2, ::2], even[1::2, 1::2]], axis=-1)


def _largest_known(level: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a level at half the size: of each 2 x 2 pixels the largest value that is not NaN."""
    halved: NDArray[np.float32] = np.fmax.reduce(_quads(level, np.nan), axis=-1)
    return halved


def _largest(level: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a level at half the size: of each 2 x 2 pixels the largest value."""
    halved: NDArray[np.uint8] = np.max(_quads(level, 0), axis=-1)
    return halved
