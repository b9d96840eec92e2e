"""Whole-slide images: opening them, their metadata, and reading their pixels.

Input: a file that OpenSlide can read. Output: facts about the slide, and uint8 RGB arrays on an opaque background.

Conventions: points are (x, y) and sizes (width, height), as in OpenSlide; arrays are (rows, cols, 3). The prefix
``l0_`` marks level-0 pixels, ``l_`` pixels of the level that is read. A *reading pixel* is ``l0_per_px`` level-0 pixels
a side. Pixel (i, j) of a level begins at level-0 pixel (i * d, j * d), where d is the level's downsample as stated by
OpenSlide.

OpenSlide opens every slide and defines what its pixels are. Where `wsiflow.slides.tiff_tiles` can decode the tiles of a
level itself, and sample regions of that level are equal to the bit, it reads that level from then on.

This is the only module that uses OpenSlide. Label, macro and other associated images are never read. Of the properties
only the vendor, the pixel size, the background colour, the bounds and the place on the glass are read, since others may
identify a patient.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image

from wsiflow.errors import EnvironmentFault, InputError, WsiflowError
from wsiflow.slides import content, tiff_tiles
from wsiflow.system import faults

OPENSLIDE_AT_LEAST = (4, 0, 1)
REFERENCE_TILE_PX = 224

_LEVEL_TOLERANCE = 0.01  # a level may be coarser than requested by this relative difference
_DIRECT_TOLERANCE = 0.001  # below this relative difference of scale, resampling would only blur
_READ_LIMIT_PX = 1 << 24  # 64 MiB of RGBA; larger reads are split in two
_THUMBNAIL_LIMIT_PX = 1 << 27
_FILTER_SUPPORT_PX = {Image.Resampling.BOX: 0.5, Image.Resampling.BICUBIC: 2.0}
_DECODED_VENDORS = frozenset({"aperio", "generic-tiff", "philips"})  # OpenSlide places their tiles without overlap
_FILLED_VENDORS = frozenset({"aperio"})  # OpenSlide may fill their missing tiles by blending in another level


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
        centre_offset_nm: Where the centre of level 0 lies from the centre of the glass, from which Hamamatsu's
            annotations count, nm along x and y; None where the slide does not state it.
        mpp_source: Where the slide states its pixel size, for example ``OME PhysicalSizeX``; empty where it does not.
        notes: What a user must know about how pixels are shown, for example ``16 bits per sample are reduced to 8``.
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
    centre_offset_nm: tuple[float, float] | None = None
    mpp_source: str = ""
    notes: tuple[str, ...] = ()

    def level_for(self, l0_per_px: float) -> int:
        """Return the index of the coarsest level whose downsample is at most ``l0_per_px`` plus 1 %, or 0."""
        fine = [
            level
            for level, downsample in enumerate(self.level_downsamples)
            if downsample <= l0_per_px * (1 + _LEVEL_TOLERANCE)
        ]
        return max(fine, default=0)


class _Pixels(NamedTuple):
    """Composited pixels (rows, cols, 3), and the transparency of each, 0 to 255, or None if all are opaque."""

    rgb: NDArray[np.uint8]
    missing: NDArray[np.uint8] | None


class _Part(NamedTuple):
    """A rectangle within an array of pixels."""

    left: int
    top: int
    width: int
    height: int


class Slide:
    """An open slide with its metadata and pixels. Use it in a ``with`` statement, and from one thread at a time."""

    def __init__(self, facts: SlideFacts, handle: openslide.OpenSlide) -> None:
        """Take ownership of an open handle; callers use :func:`open_slide`."""
        self.facts = facts
        self._handle = handle
        self._tiles: tiff_tiles.TileFile | None = None
        self._verified: dict[int, tiff_tiles.TiledLevel | None] = {}

    def __enter__(self) -> "Slide":
        """Return the slide itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the handle."""
        self.close()

    def close(self) -> None:
        """Close the handle; the slide cannot be read afterwards."""
        self._handle.close()
        if self._tiles is not None:
            self._tiles.close()
            self._tiles = None
        self._verified.clear()

    @property
    def decoder(self) -> str:
        """``direct`` if all levels that were read so far are decoded without OpenSlide, otherwise ``openslide``."""
        return "direct" if self._verified and all(self._verified.values()) else "openslide"

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
        cols, rows = (math.ceil(l0_px / downsample) for l0_px in self.facts.l0_size_px)
        return self._read_scaled(0, 0, (cols, rows), downsample, Image.Resampling.BOX).rgb

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
        level = self._handle.get_best_level_for_downsample(REFERENCE_TILE_PX)
        l_size = self.facts.level_sizes_px[level]
        if l_size[0] * l_size[1] > _THUMBNAIL_LIMIT_PX:
            self._refuse_reference(f"its thumbnail would be computed from {l_size[0]} x {l_size[1]} px at once")
        shrunk = _fitted(l_size, (width / REFERENCE_TILE_PX, height / REFERENCE_TILE_PX))
        image = Image.fromarray(self._pixels(0, 0, level, l_size).rgb)
        return np.array(image.resize(shrunk, Image.Resampling.LANCZOS))

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
            if width >= height:
                halves = [(x, y, (width // 2, height)), (x + width // 2, y, (width - width // 2, height))]
            else:
                halves = [(x, y, (width, height // 2)), (x, y + height // 2, (width, height - height // 2))]
            parts = [self._read_scaled(*half, l0_per_px, resample) for half in halves]
            return _joined(parts, axis=1 if width >= height else 0)
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
            box.append(begin * l_per_px - l0_begin / downsample)
            l0_corner.append(l0_begin)
            l_size.append(l_end - l_begin)
        pixels = self._pixels(l0_corner[0], l0_corner[1], level, (l_size[0], l_size[1]))
        window = (box[0], box[1], box[0] + size_px[0] * l_per_px, box[1] + size_px[1] * l_per_px)
        missing = None if pixels.missing is None else _resized(pixels.missing, size_px, window, resample)
        return _Pixels(_resized(pixels.rgb, size_px, window, resample), missing)

    def _pixels(self, l0_x: int, l0_y: int, level: int, size_px: tuple[int, int]) -> _Pixels:
        """Read the part of a rectangle that lies on the slide, composited on the background colour."""
        downsample = self.facts.level_downsamples[level]
        spans = [
            _span_on_slide(l0_begin / downsample, extent, l_extent)
            for l0_begin, extent, l_extent in zip((l0_x, l0_y), size_px, self.facts.level_sizes_px[level], strict=True)
        ]
        (left, right), (top, bottom) = spans
        inside_px = (right - left, bottom - top)
        rgb = np.empty((size_px[1], size_px[0], 3), np.uint8)
        if inside_px != size_px:
            rgb[:] = self.facts.background_rgb
        if min(inside_px) <= 0:
            return _Pixels(rgb, None)
        l0_inside = (l0_x + round(left * downsample), l0_y + round(top * downsample))
        inside = rgb[top:bottom, left:right]
        missing = None
        for part in self._read_direct(inside, l0_inside, level):
            rows, cols = slice(part.top, part.top + part.height), slice(part.left, part.left + part.width)
            l0_part = (l0_inside[0] + round(part.left * downsample), l0_inside[1] + round(part.top * downsample))
            alpha = self._read_openslide(inside[rows, cols], l0_part, level)
            if alpha is not None:
                missing = np.zeros(rgb.shape[:2], np.uint8) if missing is None else missing
                missing[top:bottom, left:right][rows, cols] = 255 - alpha
        return _Pixels(rgb, missing)

    def _read_direct(self, target: NDArray[np.uint8], l0_corner: tuple[int, int], level: int) -> list[_Part]:
        """Fill an array with pixels of the slide as far as they can be decoded without OpenSlide.

        Returns:
            The parts that OpenSlide must read: none, some tiles, or the whole rectangle.
        """
        everything = [_Part(0, 0, target.shape[1], target.shape[0])]
        tiled = self._verified_level(level)
        l_x, l_y = (begin / self.facts.level_downsamples[level] for begin in l0_corner)
        # Where a read begins between two pixels of a level, OpenSlide blends them.
        if tiled is None or self._tiles is None or not (l_x.is_integer() and l_y.is_integer()):
            return everything
        declined = self._tiles.read_into(target, tiled, int(l_x), int(l_y))
        if declined and self.facts.vendor in _FILLED_VENDORS:
            return everything
        return [_Part(part.l_x - int(l_x), part.l_y - int(l_y), part.width, part.height) for part in declined]

    def _verified_level(self, level: int) -> tiff_tiles.TiledLevel | None:
        """Return a level whose tiles are decoded directly, or None; this is decided when the level is first read."""
        if level not in self._verified:
            self._verified[level] = self._verify(level)
        return self._verified[level]

    def _verify(self, level: int) -> tiff_tiles.TiledLevel | None:
        """Return a level if its sample regions, decoded directly, equal those of OpenSlide; otherwise None."""
        downsample = self.facts.level_downsamples[level]
        # OpenSlide splits reads above 4,096 px; with a fractional downsample it blends the pixels beyond the split.
        if self.facts.vendor not in _DECODED_VENDORS or not downsample.is_integer():
            return None
        self._tiles = self._tiles or tiff_tiles.open_tiles(self.facts.path)
        if self._tiles is None:
            return None
        tiled = self._tiles.level(self.facts.level_sizes_px[level])
        if tiled is None:
            return None
        agreed = [self._agrees(self._tiles, tiled, level, probe) for probe in tiled.probes()]
        return tiled if True in agreed and False not in agreed else None

    def _agrees(
        self, tiles: tiff_tiles.TileFile, tiled: tiff_tiles.TiledLevel, level: int, probe: tiff_tiles.Rectangle
    ) -> bool | None:
        """Return whether both readers give the same pixels, or None if the direct one declines part of them."""
        direct, shown = (np.empty((probe.height, probe.width, 3), np.uint8) for _ in range(2))
        if tiles.read_into(direct, tiled, probe.l_x, probe.l_y):
            return None
        downsample = int(self.facts.level_downsamples[level])
        try:
            alpha = self._read_openslide(shown, (probe.l_x * downsample, probe.l_y * downsample), level)
        except InputError:
            return False
        return alpha is None and np.array_equal(direct, shown)

    def _read_openslide(
        self, target: NDArray[np.uint8], l0_corner: tuple[int, int], level: int
    ) -> NDArray[np.uint8] | None:
        """Fill an array with pixels of the slide; return their opacity (rows, cols), or None if all are opaque."""
        size_px = (target.shape[1], target.shape[0])
        decoded = self._decode(l0_corner, level, size_px)
        alpha = decoded.getchannel("A")
        canvas = Image.new("RGB", size_px, self.facts.background_rgb)
        canvas.paste(decoded.convert("RGB"), mask=alpha)
        target[:] = np.asarray(canvas)
        return None if alpha.getextrema() == (255, 255) else np.array(alpha)

    def _decode(self, l0_corner: tuple[int, int], level: int, size_px: tuple[int, int]) -> Image.Image:
        """Return RGBA pixels of the slide, read by OpenSlide."""
        try:
            return self._handle.read_region(l0_corner, level, size_px)
        except openslide.OpenSlideError as error:
            where = f"{size_px[0]} x {size_px[1]} px of level {level} at level-0 ({l0_corner[0]}, {l0_corner[1]})"
            raise self._reopened(f"{where} cannot be decoded ({error})") from error

    def _reopened(self, cause: str) -> WsiflowError:
        """Open the file again, since OpenSlide refuses all reads after a failed one, and return the error to raise."""
        fresh = _open_handle(self.facts.path, self.facts.slide_id)
        self._handle.close()
        self._handle = fresh
        return _unreadable_slide(cause, self.facts.slide_id, self.facts.path)


def open_slide(path: Path, *, slide_id: str) -> Slide:
    """Open a slide.

    Args:
        path: A file in a format that OpenSlide supports. An ordinary image is refused whatever its name.
        slide_id: Id of the slide, for messages.

    Raises:
        InputError: The file is missing, empty, a folder, not a slide, or damaged.
        EnvironmentFault: The OpenSlide library is too old, or the system refuses to read the file.
    """
    _require_openslide()
    content.require_file(path, slide_id)
    handle = _open_handle(path, slide_id)
    return Slide(_facts(handle, path, slide_id), handle)


@cache
def _require_openslide() -> None:
    """Refuse versions of the OpenSlide library that have known memory faults and wrong pixel sizes."""
    version = tuple(int(part) for part in openslide.__library_version__.split(".")[:3])
    if version < OPENSLIDE_AT_LEAST:
        required = ".".join(str(part) for part in OPENSLIDE_AT_LEAST)
        cause = f"the OpenSlide library has version {openslide.__library_version__}, older than {required}"
        raise EnvironmentFault(cause, "install openslide-bin of that version or newer")


def _open_handle(path: Path, slide_id: str) -> openslide.OpenSlide:
    """Open a file as a slide; the library's own ``open_slide`` would also accept an ordinary image."""
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        content.require_readable(path)
        cause = "the file is not a slide in a format that OpenSlide reads"
        raise InputError(cause, content.COPY_AGAIN, slide=slide_id, path=path) from error
    except openslide.OpenSlideError as error:
        raise _unreadable_slide(f"the slide cannot be opened ({error})", slide_id, path) from error


def _unreadable_slide(cause: str, slide_id: str, path: Path) -> WsiflowError:
    """Return the error of a slide that OpenSlide cannot read, because it is damaged or the machine is at fault."""
    fault = faults.error_named_in(cause)
    if fault is not None:
        return faults.unreadable(fault, "the slide", content.COPY_AGAIN, slide=slide_id, path=path)
    return InputError(cause, content.COPY_AGAIN, slide=slide_id, path=path)


def _facts(handle: openslide.OpenSlide, path: Path, slide_id: str) -> SlideFacts:
    """Return the metadata of an open slide."""
    sizes = tuple((int(width), int(height)) for width, height in handle.level_dimensions)
    if not sizes or min(sizes[0]) < 1:
        handle.close()
        raise InputError("the slide has no pixels", content.COPY_AGAIN, slide=slide_id, path=path)
    properties = handle.properties
    return SlideFacts(
        slide_id=slide_id,
        path=path,
        vendor=properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown"),
        l0_size_px=sizes[0],
        mpp=_stated_mpp(properties),
        level_sizes_px=sizes,
        level_downsamples=tuple(float(downsample) for downsample in handle.level_downsamples),
        background_rgb=_background(properties),
        l0_bounds_corner=(
            int(properties.get(openslide.PROPERTY_NAME_BOUNDS_X, 0)),
            int(properties.get(openslide.PROPERTY_NAME_BOUNDS_Y, 0)),
        ),
        centre_offset_nm=_centre_offset(properties),
    )


def _centre_offset(properties: Mapping[str, str]) -> tuple[float, float] | None:
    """Return where a slide of Hamamatsu lies from the centre of its glass, nm, or None where it does not state it."""
    try:
        x, y = (float(properties[f"hamamatsu.{axis}OffsetFromSlideCentre"]) for axis in "XY")
    except (KeyError, ValueError):
        return None
    return x, y


def _stated_mpp(properties: Mapping[str, str]) -> tuple[float, float] | None:
    """Return the stated pixel size along x and y, um, or None unless both are positive numbers."""
    stated = [properties.get(name) for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)]
    try:
        mpp_x, mpp_y = (float(text or "nan") for text in stated)
    except ValueError:
        return None
    return (mpp_x, mpp_y) if mpp_x > 0 and mpp_y > 0 else None


def _background(properties: Mapping[str, str]) -> tuple[int, int, int]:
    """Return the colour that the slide states for areas that were not scanned, or white."""
    red, green, blue = bytes.fromhex(properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff"))
    return red, green, blue


def _span_on_slide(l_begin: float, extent: int, l_extent: int) -> tuple[int, int]:
    """Return the half-open range of pixels along an axis of a rectangle that lie on the level.

    Args:
        l_begin: Position at which the rectangle begins, level pixels.
        extent: Length of the rectangle, px.
        l_extent: Length of the level, px.
    """
    rounding = 1e-6  # the error of divisions by a downsample that is not an integer
    return max(0, math.ceil(-l_begin - rounding)), min(extent, math.ceil(l_extent - l_begin - rounding))


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
