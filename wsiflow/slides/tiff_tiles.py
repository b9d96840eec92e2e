"""Direct decoding of the tiles of a TIFF slide, which gives the pixels of OpenSlide in a fraction of the time.

Input: a tiled TIFF or BigTIFF of 8-bit RGB. Output: uint8 arrays (rows, cols, 3) in pixels of a level (``l_``).

OpenSlide decodes a tile to 32 bits per pixel and then paints it with a drawing library; this module copies the bytes of
the decoder once. Both decode JPEG with the default settings of libjpeg-turbo, so their pixels are equal. This module
does not rely on that: its caller first compares the regions of `TiledLevel.probes` with OpenSlide.

Unusual tiles are declined: tiles that are missing, whose data end too early, or whose header is not that of a plain
baseline JPEG. The caller reads them with OpenSlide.

Decoded tiles are not cached: when strips are read with their halo, a tile is decoded 1.3 times on average.
"""

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

_JPEG = 7
_LOSSLESS = frozenset({1, 5, 8, 32946})  # uncompressed, LZW, and the two numbers of deflate
_RGB, _YCBCR = 2, 6
_COLOURS = {_RGB: "RGB", _YCBCR: "YCBCR"}
_MCU_PX = 16  # TIFF requires tile sides to be multiples of 16, so they consist of whole minimum coded units of a JPEG
_BLOCK_PX = 8
_GREY = 128  # the value of all pixels of a block of which libjpeg has decoded nothing
_MARKER, _BASELINE, _SCAN, _RESTARTS = 0xFF, 0xC0, 0xDA, 0xDD  # of a JPEG: any, SOF0, SOS, DRI
_DEFINED_RESTARTS = bytes((_MARKER, _RESTARTS))
_ALL_SAMPLES = range(3)
_ONE_SCAN = b"\x00\x0c\x03\x00\x3f\x00"  # length and samples, then first and last coefficient, of a scan of everything
_MOST_EXPANSION = 2  # a compressed tile is always smaller than this multiple of its pixels
# The exceptions of tifffile and imagecodecs for a file that is not a TIFF and for a damaged tile.
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)

Decoder = Callable[[bytes, int], NDArray[np.uint8] | None]
"""A function from the bytes and the index of a tile to its pixels (rows, cols, 3), or None.

The next call may reuse the array."""


class Rectangle(NamedTuple):
    """A rectangle inside a level, in pixels of that level."""

    l_x: int
    l_y: int
    width: int
    height: int


class TiledLevel(NamedTuple):
    """The positions of a level's tiles in the file, and their decoder.

    Attributes:
        size_px: Width and height of the level.
        tile_px: Width and height of a tile.
        across: Number of tiles per row.
        offsets: int64 (tiles,), position in the file of the first byte of each tile, row by row.
        counts: int64 (tiles,), number of bytes of each tile, 0 for a missing one.
        decode: Decoder of a tile.
    """

    size_px: tuple[int, int]
    tile_px: tuple[int, int]
    across: int
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    decode: Decoder

    def probes(self) -> list[Rectangle]:
        """Return sample rectangles, about seven tiles in all, to compare with another reader.

        One rectangle, off the tile grid, covers parts of the tile with the most bytes, which is not blank, and of three
        neighbours. The others are whole tiles: the first, the middle and the last one that exist. The border of the
        level cuts the last one.
        """
        present = np.flatnonzero(self.counts)
        if not present.size:
            return []
        chosen = {int(present[place]): None for place in (0, present.size // 2, -1)}
        return [self._around(int(np.argmax(self.counts))), *(self._tile(index) for index in chosen)]

    def _tile(self, index: int) -> Rectangle:
        """Return the part of a tile inside the level."""
        l_corner = [
            place * side for place, side in zip((index % self.across, index // self.across), self.tile_px, strict=True)
        ]
        return self._clipped(l_corner[0], l_corner[1])

    def _around(self, index: int) -> Rectangle:
        """Return a rectangle of the size of a tile that extends from the tile's middle into three neighbours."""
        tile = self._tile(index)
        steps = [-1 if begin else 1 for begin in (tile.l_x, tile.l_y)]
        # In a level smaller than half a tile there is no such place; the rectangle then begins at the last pixel.
        return self._clipped(
            min(max(0, tile.l_x + steps[0] * (self.tile_px[0] // 2 - 3)), self.size_px[0] - 1),
            min(max(0, tile.l_y + steps[1] * (self.tile_px[1] // 2 - 5)), self.size_px[1] - 1),
        )

    def _clipped(self, l_x: int, l_y: int) -> Rectangle:
        """Return the part inside the level of a rectangle of the size of a tile."""
        width, height = (
            min(side, end - begin) for side, end, begin in zip(self.tile_px, self.size_px, (l_x, l_y), strict=True)
        )
        return Rectangle(l_x, l_y, width, height)


class TileFile:
    """The tiled levels of an open TIFF; use it from one thread at a time.

    Reads do not change the position of the file descriptor, so forked processes may share it.
    """

    def __init__(self, descriptor: int, levels: tuple[TiledLevel, ...]) -> None:
        """Take ownership of a file descriptor; callers use :func:`open_tiles`."""
        self._descriptor = descriptor
        self._levels = levels

    def close(self) -> None:
        """Close the file; it cannot be read afterwards."""
        os.close(self._descriptor)

    def level(self, size_px: tuple[int, int]) -> TiledLevel | None:
        """Return the level with this width and height, or None if the file has no such level, or several."""
        levels = [level for level in self._levels if level.size_px == size_px]
        return levels[0] if len(levels) == 1 else None

    def read_into(self, target: NDArray[np.uint8], level: TiledLevel, l_x: int, l_y: int) -> list[Rectangle]:
        """Fill an array with the pixels of a level.

        Args:
            target: uint8 (rows, cols, 3), possibly a view of a larger array.
            level: A level of this file.
            l_x: Left edge in pixels of the level; the rectangle must lie within the level.
            l_y: Top edge in pixels of the level.

        Returns:
            The parts of the rectangle, one per tile, that could not be decoded; these are unchanged in ``target``.
        """
        rows, cols = target.shape[:2]
        tile_width, tile_height = level.tile_px
        declined = []
        for tile_y in range(l_y // tile_height * tile_height, l_y + rows, tile_height):
            for tile_x in range(l_x // tile_width * tile_width, l_x + cols, tile_width):
                left, right = max(tile_x, l_x), min(tile_x + tile_width, l_x + cols)
                top, bottom = max(tile_y, l_y), min(tile_y + tile_height, l_y + rows)
                tile = self._decoded(level, tile_y // tile_height * level.across + tile_x // tile_width)
                if tile is None:
                    declined.append(Rectangle(left, top, right - left, bottom - top))
                    continue
                shown = tile[top - tile_y : bottom - tile_y, left - tile_x : right - tile_x]
                target[top - l_y : bottom - l_y, left - l_x : right - l_x] = shown
        return declined

    def _decoded(self, level: TiledLevel, index: int) -> NDArray[np.uint8] | None:
        """Return the pixels of one tile, or None if it is missing, truncated or damaged."""
        count = int(level.counts[index])
        if not count:
            return None
        try:
            data = os.pread(self._descriptor, count, int(level.offsets[index]))
            return level.decode(data, index) if len(data) == count else None
        except UNREADABLE:
            return None


def open_tiles(path: Path) -> TileFile | None:
    """Open a file for the direct decoding of its tiles.

    Only the chain of main pages is searched, where OpenSlide finds its levels too. For a slide of 100,000 x 100,000 px
    in tiles of 256 px this takes about 0.05 s.

    Args:
        path: Any file.

    Returns:
        The file, or None if it is not a TIFF or no page of it is supported.
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            levels = tuple(_levels(tiff))
        return TileFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC), levels) if levels else None
    except UNREADABLE:
        return None


def _levels(tiff: Any) -> Iterator[TiledLevel]:
    """Yield the pages that this module can decode."""
    for page in tiff.pages:
        if not is_plain(page):
            continue
        decode = jpeg_decoder(page) if page.compression == _JPEG else _lossless_decoder(page)
        tile_px = (int(page.tilewidth), int(page.tilelength))
        offsets, counts = (np.array(listed, np.int64) for listed in (page.dataoffsets, page.databytecounts))
        across, down = (
            -(-side // tile) for side, tile in zip((page.imagewidth, page.imagelength), tile_px, strict=True)
        )
        if decode is None or not len(offsets) == len(counts) == across * down:
            continue
        counts[(counts < 0) | (counts > _MOST_EXPANSION * tile_px[0] * tile_px[1] * 3)] = 0
        yield TiledLevel((int(page.imagewidth), int(page.imagelength)), tile_px, across, offsets, counts, decode)


def is_plain(page: Any) -> bool:
    """Return whether a page is a tiled, upright, two-dimensional image of three interleaved 8-bit samples."""
    return bool(
        page.is_tiled
        and (page.imagedepth, page.tiledepth, page.planarconfig, page.fillorder) == (1, 1, 1, 1)
        and (page.samplesperpixel, page.bitspersample, page.dtype) == (3, 8, np.dtype(np.uint8))
        and not page.extrasamples
        and page.tags.valueof("Orientation", 1) == 1
    )


def _lossless_decoder(page: Any) -> Decoder | None:
    """Return tifffile's decoder, which handles predictors too; None for other compressions and colour spaces."""
    if page.compression not in _LOSSLESS or page.photometric != _RGB:
        return None
    decode = page.decode

    def decoded(data: bytes, index: int) -> NDArray[np.uint8] | None:
        tile = decode(data, index)[0]
        return None if tile is None else tile[0]

    return decoded


def jpeg_decoder(page: Any) -> Decoder | None:
    """Return a decoder of JPEG tiles that writes all of them to one array; None for other colour spaces."""
    colour, tables = _COLOURS.get(page.photometric), page.jpegtables
    height, width = page.tilelength, page.tilewidth
    if colour is None or height % _MCU_PX or width % _MCU_PX or _DEFINED_RESTARTS in (tables or b""):
        return None
    longer_rgb, longer_gray = (np.empty((height + _MCU_PX, width, *samples), np.uint8) for samples in ((3,), ()))
    complete = bytearray(len(page.databytecounts))

    def decoded(data: bytes, index: int) -> NDArray[np.uint8] | None:
        longer = _made_longer(data, height)
        if longer is None:
            return None
        if not longer.blends_rows:
            _decode_jpeg(longer.data, tables, colour, longer_rgb)
            return None if _ends_early(longer_rgb, height) else longer_rgb[:height]
        if not complete[index]:
            # The first sample suffices to detect truncation, and is decoded alone if the image is declared YCbCr.
            _decode_jpeg(longer.data, tables, "YCBCR", longer_gray)
            if _ends_early(longer_gray, height):
                return None
            complete[index] = 1
        _decode_jpeg(data, tables, colour, longer_rgb[:height])
        return longer_rgb[:height]

    return decoded


class _Longer(NamedTuple):
    """A JPEG whose header was changed to declare one more row of coding units than its data contain."""

    data: bytes
    blends_rows: bool
    """Whether colour has half the vertical resolution, so that the last true row is blended with the added one."""


def _made_longer(data: bytes, height: int) -> _Longer | None:
    """Return a tile whose header declares more rows, with which the decoder shows whether the data are complete.

    For damaged data OpenSlide stops, but this decoder reports nothing. Damage mostly shows in data that end too early:
    the decoder then leaves all coding units that it has not begun grey. In a complete tile it still begins the first
    unit of the added row, and meets the end of the data there. In a damaged tile it has met the end before. (Damage
    after which the number of units is right again is not detected here or by OpenSlide, except for invalid codes.)

    Returns:
        The tile, or None if it is not a baseline JPEG of three samples and this height, in one scan without restarts.
    """
    begins = _segments(data)
    frame, scan = begins.get(_BASELINE, 0), begins.get(_SCAN, 0)
    if not frame or _RESTARTS in begins or data[scan + 2 : scan + 5] + data[scan + 11 : scan + 14] != _ONE_SCAN:
        return None
    if data[frame + 5 : frame + 7] != height.to_bytes(2, "big") or data[frame + 9] != len(_ALL_SAMPLES):
        return None
    taller = data[: frame + 5] + (height + _MCU_PX).to_bytes(2, "big") + data[frame + 7 :]
    vertical = {data[frame + 11 + 3 * sample] & 15 for sample in _ALL_SAMPLES}
    return _Longer(taller, len(vertical) > 1)


def is_plain_jpeg(data: bytes, height: int) -> bool:
    """Return whether a tile is a JPEG of this height that `jpeg_decoder` declines only if it is damaged."""
    return _made_longer(data, height) is not None


def _segments(data: bytes) -> dict[int, int]:
    """Return the positions of a JPEG's header segments by marker; empty if they are not a chain up to the scan."""
    begins: dict[int, int] = {}
    begin = 2
    while _SCAN not in begins and data[begin] == _MARKER:
        begins[data[begin + 1]] = begin
        begin += 2 + int.from_bytes(data[begin + 2 : begin + 4], "big")
    return begins if _SCAN in begins else {}


def _ends_early(longer: NDArray[np.uint8], height: int) -> bool:
    """Return whether the decoder met the end of the data before the first block of the added row."""
    return bool((longer[height : height + _BLOCK_PX, :_BLOCK_PX] == _GREY).all())


def _decode_jpeg(data: bytes, tables: bytes | None, colour: str, out: NDArray[np.uint8]) -> None:
    """Decode a JPEG into an array of its size. The TIFF states its colour space; the JPEG's markers may be wrong."""
    shown = "RGB" if out.ndim == 3 else "GRAYSCALE"
    imagecodecs.jpeg8_decode(data, tables=tables, colorspace=colour, outcolorspace=shown, out=out)
