"""TIFFs that OpenSlide declines or misreads, decoded by tifffile and imagecodecs.

These are TIFFs in strips, OME-TIFFs with SubIFDs or with a page for each channel, samples of 10, 12 or 14 bits, and
tiles of JPEG 2000, WebP, JPEG XL, JPEG XR, LZMA and what else imagecodecs decodes.

Only the tiles or strips under a rectangle are decoded. The last ones are kept, up to a number of bytes, since the
blocks of a slide follow each other row by row. Uncompressed strips are read by rows, however long they are. A
compressed strip is decoded whole, and kept until the next one: an image in one strip is in memory once.
"""

import errno
import logging
import os
import shlex
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from wsiflow.errors import InputError
from wsiflow.slides import content, tiff_tiles
from wsiflow.slides.readers import tiff_layout
from wsiflow.slides.readers.conversion import is_foreign, to_pyramid
from wsiflow.slides.readers.reader import (
    DARK,
    DARK_GROUND,
    WHITE,
    Declined,
    Description,
    composited,
    eight_bits,
    opacity,
    scaled,
)
from wsiflow.slides.readers.tiff_layout import RESOLUTION, Layout, PlainFacts, Samples
from wsiflow.system import faults

__all__ = ["RESOLUTION", "PlainFacts", "is_truncated", "open_file", "plain_facts"]

_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_KEPT_TILE_BYTES = 64 << 20
_KEPT_STRIP_BYTES = 256 << 20
_MOST_SEGMENT_BYTES = 2 << 30
_ROWS_BYTES = 1 << 20  # what is read at once of an uncompressed strip
_DARK_SIDE_PX = 512
# Codecs raise what they like for damaged data; those of imagecodecs are RuntimeErrors.
_UNREADABLE = (*tiff_tiles.UNREADABLE, NotImplementedError, struct.error)

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what is wrong with a file is said once, by us

_bits: dict[tuple[str | int, ...], int] = {}
"""Bits of a sample that are used, by path and stamp: a process opens a slide for every task."""

_Decode = Callable[[bytes, int], NDArray[Any] | None]


class _Plane(NamedTuple):
    """A page and where its tiles or strips (segments) lie in the file.

    Attributes:
        size_px: Width and height.
        segment_px: Width and height of a segment.
        across: Number of segments per row.
        per_plane: Number of segments of a plane of samples.
        planes: Number of planes of samples, 1 if samples are interleaved.
        samples: Samples of a pixel.
        dtype: Type of a sample.
        offsets: int64 (segments,), position in the file of the first byte.
        counts: int64 (segments,), number of bytes, 0 for a segment that is not stored.
        decode: Decoder of a segment.
    """

    size_px: tuple[int, int]
    segment_px: tuple[int, int]
    across: int
    per_plane: int
    planes: int
    samples: int
    dtype: np.dtype[Any]
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    decode: _Decode


class TiffFile:
    """An open TIFF, see `wsiflow.slides.readers.reader.Reader`."""

    blends = False
    decoder = "tifffile"

    def __init__(self, path: Path, descriptor: int, layout: Layout, planes: Sequence[Sequence[_Plane]]) -> None:
        """Take ownership of a file descriptor; callers use `open_file`.

        Args:
            path: The file, for messages.
            descriptor: A descriptor of the file. Reads do not change its position, so forked processes may share it.
            layout: What is in the file.
            planes: The pages of each level.
        """
        self.description = Description(
            vendor="tiff",
            level_sizes_px=tuple(level.size_px for level in layout.levels),
            level_downsamples=layout.downsamples,
            mpp_x=layout.mpp[0],
            mpp_y=layout.mpp[1],
            mpp_source=layout.mpp[2],
            notes=layout.notes,
        )
        self._path = path
        self._descriptor = descriptor
        self._samples = layout.samples
        self._table = _table(layout.samples, planes[0][0].dtype)
        self._planes = planes
        self._kept: OrderedDict[tuple[int, int, int], NDArray[Any] | None] = OrderedDict()
        self._kept_bytes = 0

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
        self._kept.clear()

    def by_rows(self, level: int) -> bool:
        """Return whether a level is stored in strips."""
        return all(plane.across == 1 for plane in self._planes[level])

    def read_into(self, target: NDArray[np.uint8], l0_corner: tuple[int, int], level: int) -> NDArray[np.uint8] | None:
        """Fill an array with pixels of a level; return their opacity, or None if all are opaque."""
        downsample, size_px = self.description.level_downsamples[level], self.description.level_sizes_px[level]
        rows, cols = target.shape[:2]
        l_x, l_y = (
            min(max(0, int(begin / downsample + 0.5)), side - extent)
            for begin, side, extent in zip(l0_corner, size_px, (cols, rows), strict=True)
        )
        parts = [self._rectangle(level, number, (l_x, l_y, cols, rows)) for number in range(len(self._planes[level]))]
        stored = np.logical_and.reduce([present for _, present in parts])
        samples = parts[0][0] if len(parts) == 1 else np.concatenate([pixels for pixels, _ in parts], axis=2)
        rgb, alpha = self._colours(samples)
        if alpha is None and stored.all():
            target[:] = rgb
            return None
        shown = np.where(stored, 255 if alpha is None else alpha, 0).astype(np.uint8)
        rgba = Image.fromarray(np.dstack([rgb, shown]))
        return opacity(composited(target, rgba, WHITE))

    def _rectangle(
        self, level: int, number: int, rectangle: tuple[int, int, int, int]
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return the samples of a rectangle of a page, and which of its pixels are stored."""
        plane = self._planes[level][number]
        l_x, l_y, cols, rows = rectangle
        width, height = plane.segment_px
        pixels = np.zeros((rows, cols, plane.samples), plane.dtype)
        stored = np.ones((rows, cols), np.bool_)
        for top in range(l_y // height * height, l_y + rows, height):
            for left in range(l_x // width * width, l_x + cols, width):
                x, y = max(left, l_x), max(top, l_y)
                here = np.s_[y - l_y : top + height - l_y, x - l_x : left + width - l_x]
                for separate in range(plane.planes):
                    index = separate * plane.per_plane + top // height * plane.across + left // width
                    segment = self._segment(level, number, index)
                    if segment is None:
                        stored[here] = False
                        continue
                    target = pixels[here] if plane.planes == 1 else pixels[here][..., separate : separate + 1]
                    target[:] = segment[y - top :, x - left :][: target.shape[0], : target.shape[1]]
        return pixels, stored

    def _segment(self, level: int, number: int, index: int) -> NDArray[Any] | None:
        """Return the samples of a tile or strip, or None if it is not stored; the last ones are kept."""
        place = (level, number, index)
        if place in self._kept:
            self._kept.move_to_end(place)
            return self._kept[place]
        segment = self._decoded(self._planes[level][number], index, level)
        self._kept[place] = segment
        self._kept_bytes += 0 if segment is None else segment.nbytes
        most = _KEPT_STRIP_BYTES if self.by_rows(level) else _KEPT_TILE_BYTES
        while self._kept_bytes > most and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= 0 if oldest is None else oldest.nbytes
        return segment

    def _decoded(self, plane: _Plane, index: int, level: int) -> NDArray[Any] | None:
        count = int(plane.counts[index])
        if not count:
            return None
        where = f"tile or strip {index} of level {level}"
        try:
            data = os.pread(self._descriptor, count, int(plane.offsets[index]))
            if len(data) < count:
                raise InputError(f"{where} ends early", content.COPY_AGAIN, path=self._path)
            segment = plane.decode(data, index)
        except MemoryError as error:
            raise faults.fault(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), path=self._path) from error
        except _UNREADABLE as error:
            if isinstance(error, OSError) and faults.is_of_machine(error):
                raise faults.unreadable(error, "the slide", content.COPY_AGAIN, path=self._path) from error
            cause = f"{where} cannot be decoded ({error})"
            raise InputError(cause, content.COPY_AGAIN, path=self._path) from error
        if segment is None:
            raise InputError(f"{where} is damaged", content.COPY_AGAIN, path=self._path)
        return segment

    def _colours(self, pixels: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Return the colours of samples, uint8 (rows, cols, 3), and their opacity, or None without one."""
        about = self._samples
        remedy = f"state the largest value: tiffset -s 281 65535 {shlex.quote(str(self._path))}"
        shown = pixels if self._table is None else scaled(pixels, self._table, remedy)
        colours, alpha = shown[..., : about.colours], shown[..., -1] if about.alpha else None
        if about.palette is not None:
            colours = about.palette[np.minimum(pixels[..., 0], len(about.palette) - 1)]
        elif about.colours == 1:
            colours = 255 - colours if about.inverted else colours
            colours = np.repeat(colours, 3, axis=2)
        elif about.ycbcr:
            image = Image.fromarray(np.ascontiguousarray(colours), mode="YCbCr")
            colours = np.asarray(image.convert("RGB"))
        if alpha is not None and about.alpha == 1:
            opaque = np.maximum(alpha[..., None], 1).astype(np.uint16)
            colours = np.minimum(colours.astype(np.uint16) * 255 // opaque, 255).astype(np.uint8)
        return colours, alpha


def plain_facts(path: Path) -> PlainFacts:
    """Return what the first page of a file does not show; nothing for a file that cannot be understood.

    It is kept, because a process opens a slide for every task, and the index of a large one takes milliseconds.
    """
    return _plain_facts(path, _stamp(path))


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@lru_cache(maxsize=256)
def _plain_facts(path: Path, _stamped: tuple[int, ...]) -> PlainFacts:
    try:
        with tifffile.TiffFile(path) as tiff:
            return tiff_layout.plain_facts(tiff)
    except _UNREADABLE:
        return PlainFacts()


def is_truncated(path: Path) -> bool:
    """Return whether a TIFF ends before the pixels that it lists."""
    try:
        with tifffile.TiffFile(path) as tiff:
            return any(_beyond(page, tiff.filehandle.size) for page in tiff.pages)
    except _UNREADABLE:
        return True


def open_file(path: Path) -> TiffFile:
    """Open a TIFF."""
    with path.open("rb") as stream:
        if not stream.read(4).startswith(_STARTS) or is_foreign(path):
            raise Declined
    stamp: tuple[str | int, ...] = (str(path), *_stamp(path))
    try:
        with tifffile.TiffFile(path) as tiff:
            layout = tiff_layout.layout(tiff, path, _bits.get(stamp, 0))
            if any(_beyond(page, tiff.filehandle.size) for level in layout.levels for page in level.pages):
                raise InputError("the file ends before its last tile or strip", content.COPY_AGAIN, path=path)
            planes = [[_plane(page, tiff.byteorder, path) for page in level.pages] for level in layout.levels]
    except _UNREADABLE as error:
        if isinstance(error, OSError) and faults.is_of_machine(error):
            raise
        raise Declined(
            f"the file begins like a TIFF, but ends early or is damaged ({error})", content.COPY_AGAIN
        ) from error
    _bits[stamp] = layout.samples.bits
    opened = TiffFile(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC), layout, planes)
    try:
        if layout.unstated:
            _require_bright(opened, path)
    except BaseException:
        opened.close()
        raise
    return opened


def _require_bright(opened: TiffFile, path: Path) -> None:
    """Refuse three channels of which nothing says what they are, and which are dark as those of fluorescence are."""
    level = len(opened.description.level_sizes_px) - 1
    size_px = opened.description.level_sizes_px[level]
    cols, rows = (min(side, _DARK_SIDE_PX) for side in size_px)
    middle = [(side - extent) // 2 for side, extent in zip(size_px, (cols, rows), strict=True)]
    downsample = opened.description.level_downsamples[level]
    target = np.empty((rows, cols, 3), np.uint8)
    opened.read_into(target, (round(middle[0] * downsample), round(middle[1] * downsample)), level)
    if np.median(target) < DARK:
        raise InputError(DARK_GROUND, "if they are red, green and blue, name its channels so in the OME-XML", path=path)


def _beyond(page: Any, file_bytes: int) -> bool:
    counts = np.array(page.databytecounts, np.int64)
    return bool((np.array(page.dataoffsets, np.int64)[counts > 0] + counts[counts > 0] > file_bytes).any())


def _plane(page: Any, byteorder: str, path: Path) -> _Plane:
    """Return where the tiles or strips of a page lie, and how they are decoded."""
    frame = page.keyframe
    if frame.is_final and not frame.is_tiled and frame.is_contiguous and frame.bitspersample in {8, 16}:
        return _uncompressed(page, byteorder)
    size_px = (int(frame.imagewidth), int(frame.imagelength))
    tile_px = (int(frame.tilewidth), int(frame.tilelength))
    segment_px = tile_px if frame.is_tiled else (size_px[0], min(int(frame.rowsperstrip), size_px[1]))
    across, down = (-(-side // part) for side, part in zip(size_px, segment_px, strict=True))
    planes = int(frame.samplesperpixel) if frame.planarconfig == 2 else 1
    try:
        frame.decode(None, 0)  # without data it only says whether it decodes such pages
    except (NotImplementedError, ValueError) as error:
        raise Declined(f"its tiles or strips are not decoded ({error})", to_pyramid(path)) from error
    n_bytes = segment_px[0] * segment_px[1] * int(frame.samplesperpixel) // planes * frame.dtype.itemsize
    if n_bytes > _MOST_SEGMENT_BYTES:
        cause = f"the image is one compressed strip of {n_bytes / 2**30:.1f} GiB, which would have to be in memory"
        raise Declined(cause, to_pyramid(path))
    return _Plane(
        size_px=size_px,
        segment_px=segment_px,
        across=across,
        per_plane=across * down,
        planes=planes,
        samples=int(frame.samplesperpixel),
        dtype=np.dtype(frame.dtype),
        offsets=np.array(page.dataoffsets, np.int64),
        counts=np.array(page.databytecounts, np.int64),
        decode=_decoder(page),
    )


def _uncompressed(page: Any, byteorder: str) -> _Plane:
    """Return the rows of an uncompressed page as short strips, whatever strips it was written in."""
    frame = page.keyframe
    width, height = int(frame.imagewidth), int(frame.imagelength)
    planes = int(frame.samplesperpixel) if frame.planarconfig == 2 else 1
    samples = int(frame.samplesperpixel) // planes
    stored = np.dtype(frame.dtype).newbyteorder(byteorder)
    row_bytes = width * samples * stored.itemsize
    rows = min(height, max(1, _ROWS_BYTES // row_bytes))
    down = -(-height // rows)
    tops = np.arange(down, dtype=np.int64) * rows
    offsets = [page.dataoffsets[0] + plane * height * row_bytes + tops * row_bytes for plane in range(planes)]

    def decoded(data: bytes, _index: int) -> NDArray[Any]:
        return np.frombuffer(data, stored).reshape(-1, width, samples)

    return _Plane(
        size_px=(width, height),
        segment_px=(width, rows),
        across=1,
        per_plane=down,
        planes=planes,
        samples=int(frame.samplesperpixel),
        dtype=np.dtype(frame.dtype),
        offsets=np.concatenate(offsets),
        counts=np.tile(np.minimum(rows, height - tops) * row_bytes, planes),
        decode=decoded,
    )


def _decoder(page: Any) -> _Decode:
    """Return the decoder of a page's tiles or strips; one that notices damage where there is one."""
    frame, tables, header, decode = page.keyframe, page.jpegtables, page.keyframe.jpegheader, page.keyframe.decode
    is_jpeg = frame.compression == 7 and tiff_tiles.is_plain(frame)
    careful = tiff_tiles.jpeg_decoder(frame) if is_jpeg else None
    height = int(frame.tilelength)

    def decoded(data: bytes, index: int) -> NDArray[Any] | None:
        if careful is not None and tiff_tiles.is_plain_jpeg(data, height):
            tile = careful(data, index)
            return None if tile is None else tile.copy()
        segment = decode(data, index, jpegtables=tables, jpegheader=header)[0]
        return None if segment is None else segment[0]

    return decoded


def _table(samples: Samples, dtype: np.dtype[Any]) -> NDArray[np.uint8] | None:
    """Return the 8-bit value of every sample, or None where samples have 8 bits or are an index of a palette."""
    if (samples.bits == 8 and dtype == np.uint8) or samples.palette is not None:
        return None
    return eight_bits(samples.bits)
