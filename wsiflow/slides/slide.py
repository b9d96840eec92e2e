"""Whole-slide images: opening them, their metadata, and reading their pixels.

Input: a file that one of `wsiflow.slides.readers` reads. Output: facts about the slide, and uint8 RGB arrays on an
opaque background.

Conventions: points are (x, y) and sizes (width, height), as in OpenSlide; arrays are (rows, cols, 3). The prefix
``l0_`` marks level-0 pixels, ``l_`` pixels of the level that is read. A *reading pixel* is ``l0_per_px`` level-0 pixels
a side. Pixel (i, j) of a level begins at level-0 pixel (i * d, j * d), where d is the level's downsample as stated by
the reader.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsiflow.errors import InputError, WsiflowError
from wsiflow.slides import content
from wsiflow.slides.readers.formats import open_file
from wsiflow.slides.readers.reader import Description, Reader

REFERENCE_TILE_PX = 224

_LEVEL_TOLERANCE = 0.01  # a level may be coarser than requested by this relative difference
_DIRECT_TOLERANCE = 0.001  # below this relative difference of scale, resampling would only blur
_ROUNDING = 1e-6  # the error of divisions by a downsample that is not an integer
_ACROSS = 0.1  # of a level's pixel that lies within the slide, below which it counts as outside
_READ_LIMIT_PX = 1 << 24  # 64 MiB of RGBA; larger reads are split in two
_THUMBNAIL_LIMIT_PX = 1 << 27
_COSTLY_PX = 1 << 26  # a second or two of decoding; slides with a pyramid have far smaller levels
_FILTER_SUPPORT_PX = {Image.Resampling.BOX: 0.5, Image.Resampling.BICUBIC: 2.0}


class Region(NamedTuple):
    """A rectangle of pixels read from a slide."""

    rgb: NDArray[np.uint8]
    """Shape (rows, cols, 3); where the slide has no pixels, its background colour."""
    transparent: float
    """Fraction of the rectangle, 0 to 1, that lies on the slide but has no pixels; the part outside does not count."""


@dataclass(frozen=True)
class SlideFacts:
    """The metadata of a slide that are known without reading pixels.

    Attributes:
        slide_id: Id of the slide in messages and results.
        path: The file that was opened.
        vendor: OpenSlide's name of the format, for example ``aperio``.
        l0_size_px: Width and height of level 0.
        mpp: Micrometres per level-0 pixel along x and y, or None where the slide does not state both.
        level_sizes_px: Width and height of every level, finest first.
        level_downsamples: Level-0 pixels per pixel of every level.
        background_rgb: Colour shown behind transparent pixels and outside the slide.
        l0_bounds_corner: Level-0 x, y of the top-left corner of the scanned area, the origin of viewers such as QuPath.
        mpp_source: Where the slide states its pixel size, for example ``OME PhysicalSizeX``; empty where it does not.
        notes: What a user must know about how pixels are shown, for example ``16 bits per sample are reduced to 8``.
        centre_offset_nm: Where the centre of level 0 lies from the centre of the glass, from which Hamamatsu's
            annotations count, nm along x and y; None where the slide does not state it.
    """

    slide_id: str
    path: Path
    vendor: str
    l0_size_px: tuple[int, int]
    mpp: tuple[float, float] | None
    level_sizes_px: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    background_rgb: tuple[int, int, int]
    l0_bounds_corner: tuple[int, int] = (0, 0)
    mpp_source: str = ""
    notes: tuple[str, ...] = ()
    centre_offset_nm: tuple[float, float] | None = None

    def level_for(self, l0_per_px: float) -> int:
        """Return the index of the coarsest level whose downsample is at most ``l0_per_px`` plus 1 %, or 0."""
        fine = [
            level
            for level, downsample in enumerate(self.level_downsamples)
            if downsample <= l0_per_px * (1 + _LEVEL_TOLERANCE)
        ]
        return max(fine, default=0)

    def is_costly(self, downsample: float) -> bool:
        """Return whether an overview is computed from so many pixels that it is kept, and not read a second time."""
        width, height = self.level_sizes_px[self.level_for(downsample)]
        return width * height > _COSTLY_PX


class _Pixels(NamedTuple):
    """Composited pixels (rows, cols, 3), and the transparency of each, 0 to 255, or None if all are opaque."""

    rgb: NDArray[np.uint8]
    missing: NDArray[np.uint8] | None


class _Span(NamedTuple):
    """The pixels of a read that lie on the slide along an axis, as half-open ranges.

    Where the downsample of a level is not an integer, a read begins between two of its pixels, and OpenSlide would
    blend those at an edge of the slide with what lies beyond it: they are the nearest pixels within instead.

    Attributes:
        l0_begin: Level-0 pixel at which the pixels within begin.
        begin, end: Pixels that lie within the slide.
        first, last: The same with those that lie across an edge, with a tenth or more of them within.
    """

    l0_begin: int
    begin: int
    end: int
    first: int
    last: int


class Slide:
    """An open slide with its metadata and pixels. Use it in a ``with`` statement, and from one thread at a time."""

    def __init__(self, facts: SlideFacts, reader: Reader) -> None:
        """Take ownership of an open reader; callers use :func:`open_slide`."""
        self.facts = facts
        self._reader = reader
        self._overviews: dict[float, NDArray[np.uint8]] = {}

    def __enter__(self) -> "Slide":
        """Return the slide itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file; the slide cannot be read afterwards."""
        self._reader.close()
        self._overviews.clear()

    @property
    def decoder(self) -> str:
        """What decoded the pixels so far; ``direct`` if all of them were decoded from tiles without OpenSlide."""
        return self._reader.decoder

    def read(self, l0_x: int, l0_y: int, level: int, size_px: tuple[int, int]) -> Region:
        """Read a rectangle of one level, padded with the background colour outside the slide.

        Args:
            l0_x: Left edge in level-0 pixels; may lie outside the slide.
            l0_y: Top edge in level-0 pixels; may lie outside the slide.
            level: Index of the level.
            size_px: Width and height in pixels of that level.

        Returns:
            The region, (height, width, 3).

        Raises:
            InputError: A pixel cannot be decoded. The slide stays usable for other reads.
        """
        return _region(self._pixels(l0_x, l0_y, level, size_px))

    def read_scaled(self, x: int, y: int, size_px: tuple[int, int], *, l0_per_px: float) -> Region:
        """Read a rectangle of the reading plane.

        A level of that scale (within 0.1 %) is read unchanged, from its nearest pixel. Otherwise the coarsest level
        that is fine enough is resampled with Pillow's antialiased bicubic filter. The margin around the rectangle is
        wide enough that neighbouring reads join without a seam, except for rounding by at most 2 grey levels.

        Args:
            x: Left edge in reading pixels; may lie outside the slide.
            y: Top edge in reading pixels; may lie outside the slide.
            size_px: Width and height in reading pixels.
            l0_per_px: Level-0 pixels per reading pixel; values below 1 enlarge the slide.

        Returns:
            The region, (height, width, 3).

        Raises:
            InputError: A pixel cannot be decoded. The slide stays usable for other reads.
        """
        return self._read_scaled(x, y, size_px, l0_per_px, Image.Resampling.BICUBIC)

    def overview(self, downsample: float) -> NDArray[np.uint8]:
        """Return the whole slide at a reduced scale, averaged over areas; the memory needed is bounded by the result.

        Args:
            downsample: Level-0 pixels per pixel of the overview, at least 1.

        Returns:
            Shape (ceil(height / downsample), ceil(width / downsample), 3). Pixel (row, col) begins at level-0 pixel
            (col * downsample, row * downsample); the last row and column may reach beyond the slide.

        Raises:
            InputError: A pixel cannot be decoded.
        """
        if downsample in self._overviews:
            return self._overviews[downsample]
        cols, rows = (math.ceil(l0_px / downsample) for l0_px in self.facts.l0_size_px)
        overview = self._read_scaled(0, 0, (cols, rows), downsample, Image.Resampling.BOX).rgb
        if self.facts.is_costly(downsample):
            self._overviews = {downsample: overview}
        return overview

    def kept_overview(self, downsample: float) -> NDArray[np.uint8] | None:
        """Return an overview that was read already and whose reading is worth avoiding; None in other cases."""
        return self._overviews.get(downsample)

    def reference_thumbnail(self) -> NDArray[np.uint8]:
        """Return the reference system's thumbnail: one level, reduced by Lanczos to at most (W / 224, H / 224) px.

        Returns:
            Shape (ny, nx, 3), about one pixel per 224-pixel tile of level 0.

        Raises:
            InputError: The slide is smaller than one tile, has no overview level small enough, or cannot be decoded.
        """
        width, height = self.facts.l0_size_px
        if min(width, height) < REFERENCE_TILE_PX:
            self._refuse_reference(f"the slide has {width} x {height} px, less than one {REFERENCE_TILE_PX} px tile")
        level = self._level_before(REFERENCE_TILE_PX)
        l_size = self.facts.level_sizes_px[level]
        if l_size[0] * l_size[1] > _THUMBNAIL_LIMIT_PX:
            self._refuse_reference(f"its thumbnail would be computed from {l_size[0]} x {l_size[1]} px at once")
        shrunk = _fitted(l_size, (width / REFERENCE_TILE_PX, height / REFERENCE_TILE_PX))
        image = Image.fromarray(self._pixels(0, 0, level, l_size).rgb)
        return np.array(image.resize(shrunk, Image.Resampling.LANCZOS))

    def _level_before(self, downsample: float) -> int:
        """Return the index of the level before the first one that is coarser than ``downsample``, as in OpenSlide."""
        coarser = (level for level, stated in enumerate(self.facts.level_downsamples) if stated > downsample)
        return max(0, next(coarser, len(self.facts.level_downsamples)) - 1)

    def _refuse_reference(self, cause: str) -> None:
        """Raise the error that the reference geometry cannot be used for this slide."""
        raise InputError(
            cause, "use geometry=centred in another out= folder", slide=self.facts.slide_id, path=self.facts.path
        )

    def _read_scaled(
        self, x: int, y: int, size_px: tuple[int, int], l0_per_px: float, resample: Image.Resampling
    ) -> Region:
        """Read a rectangle of the reading plane; it is split in halves where it needs more than `_READ_LIMIT_PX`."""
        level = self.facts.level_for(l0_per_px)
        l_per_px = l0_per_px / self.facts.level_downsamples[level]
        width, height = size_px
        if width * height * l_per_px**2 > _READ_LIMIT_PX and max(size_px) > 1:
            if width >= height and not (self._reader.by_rows(level) and height > 1):
                halves = [(x, y, (width // 2, height)), (x + width // 2, y, (width - width // 2, height))]
            else:
                halves = [(x, y, (width, height // 2)), (x, y + height // 2, (width, height - height // 2))]
            parts = [self._read_scaled(*half, l0_per_px, resample) for half in halves]
            return _joined(parts, axis=1 if parts[0].rgb.shape[0] == height else 0)
        if abs(l_per_px - 1) <= _DIRECT_TOLERANCE:
            # The read begins at a whole pixel of the level; between two pixels OpenSlide would blend them.
            downsample = self.facts.level_downsamples[level]
            l0_x, l0_y = (round(round(begin * l_per_px) * downsample) for begin in (x, y))
            return self.read(l0_x, l0_y, level, size_px)
        return _region(self._resampled(x, y, size_px, level, l_per_px, resample))

    def _resampled(
        self, x: int, y: int, size_px: tuple[int, int], level: int, l_per_px: float, resample: Image.Resampling
    ) -> _Pixels:
        """Resample a rectangle of the reading plane from an enclosing rectangle of a level."""
        downsample = self.facts.level_downsamples[level]
        margin = math.ceil(_FILTER_SUPPORT_PX[resample] * max(l_per_px, 1.0)) + 1
        l0_corner, l_size, box = [], [], []
        for begin, extent in zip((x, y), size_px, strict=True):
            l_begin = math.floor(begin * l_per_px) - margin
            l_end = math.ceil((begin + extent) * l_per_px) + margin
            l0_begin = round(l_begin * downsample)
            # If the downsample is not an integer, the read begins a fraction of a level pixel away from l_begin.
            box.append(begin * l_per_px - self._l_begin(l0_begin, level))
            l0_corner.append(l0_begin)
            l_size.append(l_end - l_begin)
        pixels = self._pixels(l0_corner[0], l0_corner[1], level, (l_size[0], l_size[1]))
        window = (box[0], box[1], box[0] + size_px[0] * l_per_px, box[1] + size_px[1] * l_per_px)
        missing = None if pixels.missing is None else _resized(pixels.missing, size_px, window, resample)
        return _Pixels(_resized(pixels.rgb, size_px, window, resample), missing)

    def _pixels(self, l0_x: int, l0_y: int, level: int, size_px: tuple[int, int]) -> _Pixels:
        """Read the part of a rectangle that lies on the slide, composited on the background colour."""
        cols, rows = (
            self._span(l0_begin, level, extent, l_extent)
            for l0_begin, extent, l_extent in zip((l0_x, l0_y), size_px, self.facts.level_sizes_px[level], strict=True)
        )
        inside_px = (cols.end - cols.begin, rows.end - rows.begin)
        rgb = np.empty((size_px[1], size_px[0], 3), np.uint8)
        if inside_px != size_px:
            rgb[:] = self.facts.background_rgb
        if min(inside_px) <= 0:
            return _Pixels(rgb, None)
        try:
            alpha = self._reader.read_into(
                rgb[rows.begin : rows.end, cols.begin : cols.end], (cols.l0_begin, rows.l0_begin), level
            )
        except WsiflowError as error:
            raise error.about(slide=self.facts.slide_id, path=self.facts.path) from error
        _extend(rgb, cols, rows)
        if alpha is None:
            return _Pixels(rgb, None)
        missing = np.zeros(rgb.shape[:2], np.uint8)
        missing[rows.begin : rows.end, cols.begin : cols.end] = 255 - alpha
        _extend(missing, cols, rows)
        return _Pixels(rgb, missing)

    def _span(self, l0_begin: int, level: int, extent: int, l_extent: int) -> _Span:
        """Return which pixels of a read lie on the slide along an axis.

        Args:
            l0_begin: Level-0 pixel at which the read begins.
            level: The level.
            extent: Length of the read, px.
            l_extent: Length of the level, px.
        """
        downsample = self.facts.level_downsamples[level]
        l_begin = self._l_begin(l0_begin, level)
        begin = max(0, math.ceil(-l_begin - _ROUNDING))
        l0_inside = l0_begin + round(begin * downsample)
        within = l_extent - self._l_begin(l0_inside, level) + _ROUNDING
        end = min(extent, begin + math.floor(within))
        first = max(0, math.ceil(-l_begin - (1 - _ACROSS)))
        last = min(extent, begin + math.floor(within + (1 - _ACROSS)))
        return _Span(l0_inside, begin, end, min(first, begin), max(last, end))

    def _l_begin(self, l0_begin: int, level: int) -> float:
        """Return where a read that begins at a level-0 pixel begins in a level, level pixels."""
        l_begin = l0_begin / self.facts.level_downsamples[level]
        return l_begin if self._reader.blends else float(math.floor(l_begin + 0.5))


def open_slide(path: Path | str, *, slide_id: str = "") -> Slide:
    """Open a slide.

    Args:
        path: A file in a format that one of the readers reads.
        slide_id: Id of the slide, for messages; empty for the name of the file.

    Raises:
        InputError: The file is missing, empty, a folder, not a slide, or damaged.
        EnvironmentFault: The OpenSlide library is too old, or the system refuses to read the file.
    """
    path = Path(path)
    slide_id = slide_id or path.stem
    content.require_file(path, slide_id)
    try:
        reader = open_file(path)
    except WsiflowError as error:
        raise error.about(slide=slide_id, path=path) from error
    return Slide(_facts(reader.description, path, slide_id), reader)


def _facts(stated: Description, path: Path, slide_id: str) -> SlideFacts:
    """Return the metadata of an open slide."""
    mpp = (stated.mpp_x, stated.mpp_y) if stated.mpp_x is not None and stated.mpp_y is not None else None
    return SlideFacts(
        slide_id=slide_id,
        path=path,
        vendor=stated.vendor,
        l0_size_px=stated.level_sizes_px[0],
        mpp=mpp,
        level_sizes_px=stated.level_sizes_px,
        level_downsamples=stated.level_downsamples,
        background_rgb=stated.background_rgb,
        l0_bounds_corner=stated.l0_bounds_corner,
        mpp_source=stated.mpp_source if mpp else "",
        notes=stated.notes,
        centre_offset_nm=stated.centre_offset_nm,
    )


def _extend(pixels: NDArray[np.uint8], cols: _Span, rows: _Span) -> None:
    """Fill the pixels that lie across an edge of the slide with the nearest ones that lie within."""
    within = pixels[rows.begin : rows.end]
    within[:, cols.first : cols.begin] = within[:, cols.begin : cols.begin + 1]
    within[:, cols.end : cols.last] = within[:, cols.end - 1 : cols.end]
    pixels[rows.first : rows.begin, cols.first : cols.last] = pixels[rows.begin, cols.first : cols.last]
    pixels[rows.end : rows.last, cols.first : cols.last] = pixels[rows.end - 1, cols.first : cols.last]


def _resized(
    pixels: NDArray[np.uint8],
    size_px: tuple[int, int],
    window: tuple[float, float, float, float],
    resample: Image.Resampling,
) -> NDArray[np.uint8]:
    """Resample a window of an image, always along x first: Pillow's order, and so its rounding, depends on the size."""
    left, top, right, bottom = window
    image = Image.fromarray(pixels)
    flat = image.resize((size_px[0], image.height), resample, (left, 0, right, image.height))
    return np.array(flat.resize(size_px, resample, (0, top, size_px[0], bottom)))


def _fitted(size_px: tuple[int, int], most: tuple[float, float]) -> tuple[int, int]:
    """Return the largest size within ``most``, rounded down as in Pillow before version 7, which the reference used."""
    width, height = size_px
    if width > most[0]:
        width, height = int(most[0]), int(height * most[0] / width)
    if height > most[1]:
        width, height = int(width * most[1] / height), int(most[1])
    return max(width, 1), max(height, 1)


def _region(pixels: _Pixels) -> Region:
    """Return composited pixels as a region."""
    missing = 0.0 if pixels.missing is None else float(pixels.missing.mean()) / 255
    return Region(pixels.rgb, missing)


def _joined(parts: list[Region], axis: int) -> Region:
    """Return adjacent regions joined along an axis of their arrays."""
    rgb = np.concatenate([part.rgb for part in parts], axis=axis)
    areas = [part.rgb.shape[0] * part.rgb.shape[1] for part in parts]
    return Region(rgb, float(np.average([part.transparent for part in parts], weights=areas)))
