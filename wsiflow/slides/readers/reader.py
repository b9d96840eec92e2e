"""What a reader of slides is: the protocol that every file of this package follows.

A reader opens a file and describes it without reading pixels; then it fills arrays with pixels of a level. Everything
else (rectangles beyond the slide, scales between the levels, overviews) is done by `wsiflow.slides.slide.Slide`, so it
is the same for all formats.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsiflow.errors import InputError

WHITE = (255, 255, 255)
USED_BITS = (8, 10, 12, 14, 16)  # of samples that are stored in 16
GREY = "the slide is grey, which models of stained sections were not trained on"
DARK = 60  # of 255: the middle of the values of a fluorescent slide is darker, that of a stained section brighter
DARK_GROUND = "it has 3 channels of unknown colour on a dark ground, as fluorescence has"


class Description(NamedTuple):
    """What a file says about itself before pixels are read.

    Attributes:
        vendor: Name of the format, for example ``aperio``.
        level_sizes_px: Width and height of every level, finest first.
        level_downsamples: Level-0 pixels per pixel of every level.
        mpp_x: Micrometres per level-0 pixel along x as the file states them, or None. They may be implausible.
        mpp_y: The same along y.
        mpp_source: Where the file states them, for example ``OME PhysicalSizeX``; empty where it does not.
        background_rgb: Colour shown behind transparent pixels and outside the slide.
        l0_bounds_corner: Level-0 x, y of the top-left corner of the scanned area.
        notes: What a user must know about how pixels are shown, for example ``16 bits per sample are reduced to 8``.
        centre_offset_nm: Where the centre of level 0 lies from the centre of the glass, nm along x and y, or None.
    """

    vendor: str
    level_sizes_px: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    mpp_x: float | None = None
    mpp_y: float | None = None
    mpp_source: str = ""
    background_rgb: tuple[int, int, int] = WHITE
    l0_bounds_corner: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()
    centre_offset_nm: tuple[float, float] | None = None


class Reader(Protocol):
    """An open file. It is used from one thread at a time; forked processes may go on with it."""

    @property
    def description(self) -> Description:
        """What the file says about itself."""
        ...

    @property
    def decoder(self) -> str:
        """Name of what decoded the pixels so far, for records."""
        ...

    @property
    def blends(self) -> bool:
        """Whether a read that begins between two pixels of a level is blended; if not, the nearest pixel begins it."""
        ...

    def by_rows(self, level: int) -> bool:
        """Return whether a level is stored in rows, so that bands as wide as the level are read at the least cost."""
        ...

    def read_into(self, target: NDArray[np.uint8], l0_corner: tuple[int, int], level: int) -> NDArray[np.uint8] | None:
        """Fill an array with pixels of a level, composited on the background colour.

        Args:
            target: uint8 (rows, cols, 3), RGB, possibly a view of a larger array.
            l0_corner: Level-0 x, y of the rectangle, which lies on the slide.
            level: Index of the level.

        Returns:
            The opacity of the pixels, uint8 (rows, cols), or None if all are opaque.

        Raises:
            InputError: A pixel cannot be decoded. Other pixels can still be read afterwards.
        """
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class Declined(Exception):
    """Raised by a reader that does not read a file; another one may.

    Attributes:
        cause: Why it does not, or an empty text where the file is none of its formats at all.
        remedy: What the user can do if no other reader reads it.
    """

    def __init__(self, cause: str = "", remedy: str = "") -> None:
        """Keep cause and remedy."""
        super().__init__(cause, remedy)
        self.cause = cause
        self.remedy = remedy


def composited(target: NDArray[np.uint8], rgba: Image.Image, background_rgb: tuple[int, int, int]) -> Image.Image:
    """Fill an array with an RGBA image on a background, and return the image's opacity."""
    alpha = rgba.getchannel("A")
    canvas = Image.new("RGB", rgba.size, background_rgb)
    canvas.paste(rgba.convert("RGB"), mask=alpha)
    target[:] = np.asarray(canvas)
    return alpha


def opacity(alpha: Image.Image) -> NDArray[np.uint8] | None:
    """Return an alpha channel as an array, or None if all pixels are opaque."""
    return None if alpha.getextrema() == (255, 255) else np.array(alpha)


def eight_bits(bits: int) -> NDArray[np.uint8]:
    """Return the 8-bit value of every sample of so many bits, rounded to the nearest as libtiff does."""
    most = 2**bits - 1
    table: NDArray[np.uint8] = ((np.arange(most + 1) * 255 + most // 2) // most).astype(np.uint8)
    return table


def fewest_bits(largest: int) -> int:
    """Return how many bits of a sample that is stored in 16 are used, where the largest one has some value."""
    return next((bits for bits in USED_BITS if 0 < largest < 2**bits), USED_BITS[-1])


def scaled(samples: NDArray[Any], table: NDArray[np.uint8], remedy: str) -> NDArray[np.uint8]:
    """Return samples as 8 bits, by the table of `eight_bits`.

    Raises:
        InputError: A sample has more bits than the table; `remedy` says what helps.
    """
    if samples.size and int(samples.max()) >= len(table):
        bits = (len(table) - 1).bit_length()
        raise InputError(f"a sample is {int(samples.max())}, but others of the slide have {bits} bits", remedy)
    return table[samples.astype(np.uint16, copy=False)]


def notes_on_samples(bits: int, *, grey: bool) -> tuple[str, ...]:
    """Return what a user must know about samples of some bits, grey or of a colour."""
    reduced = f"samples of {bits} bits are reduced to 8 (value * 255 / {2**bits - 1})"
    return (*([GREY] if grey else []), *([reduced] if bits > USED_BITS[0] else []))


def level_downsample(l0_size_px: tuple[int, int], l_size_px: tuple[int, int]) -> float:
    """Return level-0 pixels per pixel of a level: a whole number where its sides are those of level 0, rounded."""
    ratios = [full / reduced for full, reduced in zip(l0_size_px, l_size_px, strict=True)]
    whole = round(sum(ratios) / 2)
    if all(
        abs(full - reduced * whole) < whole for full, reduced in zip(l0_size_px, l_size_px, strict=True)
    ):  # the last pixel of a level may be incomplete, or may have been dropped
        return float(whole)
    return sum(ratios) / 2
