"""Slides that OpenSlide reads: all vendors' formats, and most tiled TIFFs.

OpenSlide defines what the pixels of these slides are. Where `wsiflow.slides.tiff_tiles` can decode the tiles of a level
itself, and sample regions of that level are equal to the bit, it reads that level from then on.

This is the only module that uses OpenSlide. Label, macro and other associated images are never read. Of the properties
only the vendor, the pixel size, the background colour, the bounds and the place on the glass are read, since others may
identify a patient.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image

from wsiflow.errors import EnvironmentFault, InputError, WsiflowError
from wsiflow.slides import content, tiff_tiles
from wsiflow.slides.readers import tiff
from wsiflow.slides.readers.conversion import to_ome_tiff
from wsiflow.slides.readers.reader import Declined, Description, composited, opacity
from wsiflow.system import faults

OPENSLIDE_AT_LEAST = (4, 0, 1)
_DECODED_VENDORS = frozenset({"aperio", "generic-tiff", "philips"})  # OpenSlide places their tiles without overlap
_FILLED_VENDORS = frozenset({"aperio"})  # OpenSlide may fill their missing tiles by blending in another level
_PLAIN = "generic-tiff"  # any tiled TIFF that is no vendor's


class _Part(NamedTuple):
    """A rectangle within an array of pixels."""

    left: int
    top: int
    width: int
    height: int


class OpenSlideFile:
    """A slide that OpenSlide has opened, see `wsiflow.slides.readers.reader.Reader`."""

    blends = True

    def __init__(self, path: Path, handle: openslide.OpenSlide, description: Description) -> None:
        """Take ownership of an open handle; callers use `open_file`."""
        self.description = description
        self._path = path
        self._handle = handle
        self._tiles: tiff_tiles.TileFile | None = None
        self._verified: dict[int, tiff_tiles.TiledLevel | None] = {}

    def close(self) -> None:
        """Close the handle."""
        self._handle.close()
        if self._tiles is not None:
            self._tiles.close()
            self._tiles = None
        self._verified.clear()

    @property
    def decoder(self) -> str:
        """``direct`` if all levels that were read so far are decoded without OpenSlide, otherwise ``openslide``."""
        return "direct" if self._verified and all(self._verified.values()) else "openslide"

    def by_rows(self, level: int) -> bool:  # noqa: ARG002
        """Return False: OpenSlide reads tiled files alone."""
        return False

    def read_into(self, target: NDArray[np.uint8], l0_corner: tuple[int, int], level: int) -> NDArray[np.uint8] | None:
        """Fill an array with pixels of a level; return their opacity, or None if all are opaque."""
        downsample = self.description.level_downsamples[level]
        transparency = None
        for part in self._read_direct(target, l0_corner, level):
            rows, cols = slice(part.top, part.top + part.height), slice(part.left, part.left + part.width)
            l0_part = (l0_corner[0] + round(part.left * downsample), l0_corner[1] + round(part.top * downsample))
            alpha = self._read_openslide(target[rows, cols], l0_part, level)
            if alpha is not None:
                transparency = np.full(target.shape[:2], 255, np.uint8) if transparency is None else transparency
                transparency[rows, cols] = alpha
        return transparency

    def _read_direct(self, target: NDArray[np.uint8], l0_corner: tuple[int, int], level: int) -> list[_Part]:
        """Fill an array with pixels of the slide as far as they can be decoded without OpenSlide.

        Returns:
            The parts that OpenSlide must read: none, some tiles, or the whole rectangle.
        """
        everything = [_Part(0, 0, target.shape[1], target.shape[0])]
        tiled = self._verified_level(level)
        l_x, l_y = (begin / self.description.level_downsamples[level] for begin in l0_corner)
        # Where a read begins between two pixels of a level, OpenSlide blends them.
        if tiled is None or self._tiles is None or not (l_x.is_integer() and l_y.is_integer()):
            return everything
        declined = self._tiles.read_into(target, tiled, int(l_x), int(l_y))
        if declined and self.description.vendor in _FILLED_VENDORS:
            return everything
        return [_Part(part.l_x - int(l_x), part.l_y - int(l_y), part.width, part.height) for part in declined]

    def _verified_level(self, level: int) -> tiff_tiles.TiledLevel | None:
        """Return a level whose tiles are decoded directly, or None; this is decided when the level is first read."""
        if level not in self._verified:
            self._verified[level] = self._verify(level)
        return self._verified[level]

    def _verify(self, level: int) -> tiff_tiles.TiledLevel | None:
        """Return a level if its sample regions, decoded directly, equal those of OpenSlide; otherwise None."""
        downsample = self.description.level_downsamples[level]
        # OpenSlide splits reads above 4,096 px; with a fractional downsample it blends the pixels beyond the split.
        if self.description.vendor not in _DECODED_VENDORS or not downsample.is_integer():
            return None
        self._tiles = self._tiles or tiff_tiles.open_tiles(self._path)
        if self._tiles is None:
            return None
        tiled = self._tiles.level(self.description.level_sizes_px[level])
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
        downsample = int(self.description.level_downsamples[level])
        try:
            alpha = self._read_openslide(shown, (probe.l_x * downsample, probe.l_y * downsample), level)
        except InputError:
            return False
        return alpha is None and np.array_equal(direct, shown)

    def _read_openslide(
        self, target: NDArray[np.uint8], l0_corner: tuple[int, int], level: int
    ) -> NDArray[np.uint8] | None:
        """Fill an array with pixels of the slide; return their opacity (rows, cols), or None if all are opaque."""
        decoded = self._decode(l0_corner, level, (target.shape[1], target.shape[0]))
        return opacity(composited(target, decoded, self.description.background_rgb))

    def _decode(self, l0_corner: tuple[int, int], level: int, size_px: tuple[int, int]) -> Image.Image:
        """Return RGBA pixels of the slide, read by OpenSlide."""
        try:
            return self._handle.read_region(l0_corner, level, size_px)
        except openslide.OpenSlideError as error:
            where = f"{size_px[0]} x {size_px[1]} px of level {level} at level-0 ({l0_corner[0]}, {l0_corner[1]})"
            raise self._reopened(f"{where} cannot be decoded ({error})") from error

    def _reopened(self, cause: str) -> WsiflowError:
        """Open the file again, since OpenSlide refuses all reads after a failed one, and return the error to raise."""
        try:
            fresh = openslide.OpenSlide(self._path)
        except openslide.OpenSlideError as error:
            return _damaged(f"the slide cannot be opened again ({error})", self._path)
        self._handle.close()
        self._handle = fresh
        return _damaged(cause, self._path)


def open_file(path: Path) -> OpenSlideFile:
    """Open a slide; the library's own ``open_slide`` would also accept an ordinary image."""
    checked_version()
    try:
        handle = openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        content.require_readable(path)
        raise Declined from error
    except openslide.OpenSlideError as error:
        raise _refusal(error, path) from error
    try:
        return OpenSlideFile(path, handle, _described(handle, path))
    except BaseException:
        handle.close()
        raise


def _refusal(error: openslide.OpenSlideError, path: Path) -> Exception:
    """Return the error of a slide whose format OpenSlide knows, but which it cannot open."""
    cause = f"the slide cannot be opened ({error})"
    fault = faults.error_named_in(cause)
    if fault is not None:
        return faults.unreadable(fault, "the slide", content.COPY_AGAIN, path=path)
    if openslide.OpenSlide.detect_format(path) == _PLAIN:
        return Declined(cause, to_ome_tiff(path))
    if tiff.is_truncated(path):
        return InputError(cause, content.COPY_AGAIN, path=path)
    return InputError(cause, to_ome_tiff(path), path=path)


def _damaged(cause: str, path: Path) -> WsiflowError:
    """Return the error of pixels that OpenSlide cannot read, because they are damaged or the machine is at fault."""
    fault = faults.error_named_in(cause)
    if fault is not None:
        return faults.unreadable(fault, "the slide", content.COPY_AGAIN, path=path)
    return InputError(cause, content.COPY_AGAIN, path=path)


@cache
def checked_version() -> str:
    """Return the version of the OpenSlide library.

    Raises:
        EnvironmentFault: It is one of those that have known memory faults and wrong pixel sizes.
    """
    found = openslide.__library_version__
    if tuple(int(part) for part in found.split(".")[:3]) < OPENSLIDE_AT_LEAST:
        required = ".".join(map(str, OPENSLIDE_AT_LEAST))
        cause = f"the OpenSlide library has version {found}, older than {required}"
        raise EnvironmentFault(cause, "install openslide-bin of that version or newer")
    return found


def _described(handle: openslide.OpenSlide, path: Path) -> Description:
    """Return the metadata of an open slide.

    Raises:
        Declined: OpenSlide opens the file, but does not show what is in it.
        InputError: There are no pixels in it.
    """
    sizes = tuple((int(width), int(height)) for width, height in handle.level_dimensions)
    if not sizes or min(sizes[0]) < 1:
        raise InputError("the slide has no pixels", content.COPY_AGAIN, path=path)
    properties = handle.properties
    vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
    plain = tiff.plain_facts(path) if vendor == _PLAIN else tiff.PlainFacts()
    if plain.misread:
        raise Declined(plain.misread, to_ome_tiff(path))
    mpp_x, mpp_y = (_number(properties.get(name)) for name in (_MPP_X, _MPP_Y))
    source = f"OpenSlide, {vendor}" if vendor != _PLAIN else tiff.RESOLUTION
    if mpp_x is None and mpp_y is None:
        mpp_x, mpp_y, source = plain.mpp
    return Description(
        vendor=vendor,
        level_sizes_px=sizes,
        level_downsamples=tuple(float(downsample) for downsample in handle.level_downsamples),
        mpp_x=mpp_x,
        mpp_y=mpp_y,
        mpp_source=source,
        background_rgb=_background(properties),
        l0_bounds_corner=(
            int(properties.get(openslide.PROPERTY_NAME_BOUNDS_X, 0)),
            int(properties.get(openslide.PROPERTY_NAME_BOUNDS_Y, 0)),
        ),
        notes=plain.notes,
        centre_offset_nm=_centre_offset(properties),
    )


_MPP_X, _MPP_Y = openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y


def _number(text: str | None) -> float | None:
    """Return a stated pixel size, um, or None unless it is a positive number."""
    try:
        mpp = float(text or "nan")
    except ValueError:
        return None
    return mpp if mpp > 0 else None


def _centre_offset(properties: Mapping[str, str]) -> tuple[float, float] | None:
    """Return where a slide of Hamamatsu lies from the centre of its glass, nm, or None where it does not state it."""
    try:
        x, y = (float(properties[f"hamamatsu.{axis}OffsetFromSlideCentre"]) for axis in "XY")
    except (KeyError, ValueError):
        return None
    return x, y


def _background(properties: Mapping[str, str]) -> tuple[int, int, int]:
    """Return the colour that the slide states for areas that were not scanned, or white."""
    red, green, blue = bytes.fromhex(properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff"))
    return red, green, blue
