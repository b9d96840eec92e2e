"""Images of a region: PNG, JPEG, BMP, WebP and JPEG 2000, decoded by Pillow; JPEG XL and JPEG XR by imagecodecs.

They have one level, and rarely a pixel size, which is then given. Such an image is decoded once, and kept whole.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from wsiflow.errors import InputError
from wsiflow.slides import content
from wsiflow.slides.readers.conversion import to_colours, to_eight_bits, to_pyramid
from wsiflow.slides.readers.reader import (
    USED_BITS,
    WHITE,
    Declined,
    Description,
    composited,
    eight_bits,
    fewest_bits,
    notes_on_samples,
    opacity,
)
from wsiflow.system import faults

_NAMES = ("PNG", "JPEG", "BMP", "WEBP", "JPEG2000", "GIF", "PPM")
_STARTS = (
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"BM",
    b"RIFF",
    b"\0\0\0\x0cjP",
    b"\xff\x4f\xff\x51",
    b"GIF8",
    b"P4",
    b"P5",
    b"P6",
)
_MOST_PX = 1 << 28  # 0.8 GB of RGB; larger images are for a tiled format
_MODES = {"1": "L", "L": "L", "P": "RGBA", "LA": "RGBA", "PA": "RGBA", "RGB": "RGB", "RGBA": "RGBA", "YCbCr": "RGB"}
_PNG, _PNG_DEPTH_AT = b"\x89PNG", 24
_CODECS: dict[bytes, Callable[[bytes], NDArray[Any]]] = {
    b"\xff\x0a": imagecodecs.jpegxl_decode,
    b"\0\0\0\x0cJXL ": imagecodecs.jpegxl_decode,
    b"II\xbc\1": imagecodecs.jpegxr_decode,
}
_UM_PER_INCH = 25_400.0
_ORIENTATION, _QUARTER_TURNED = (
    0x0112,
    5,
)  # a tag of Exif, and the values from which width and height are exchanged
# Exceptions of Pillow for files that are cut short or damaged.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, RuntimeError, Image.DecompressionBombError)


class ImageFile:
    """An image that Pillow decodes, see `wsiflow.slides.readers.reader.Reader`."""

    blends = False
    decoder = "pillow"

    def __init__(self, path: Path, description: Description, pixels: Image.Image | None = None) -> None:
        """Keep what was found in the header, and pixels that were decoded with it; callers use `open_file`."""
        self.description = description
        self._path = path
        self._pixels = pixels

    def close(self) -> None:
        """Drop the pixels."""
        self._pixels = None

    def by_rows(self, level: int) -> bool:  # noqa: ARG002
        """Return False: the image is decoded whole."""
        return False

    def read_into(self, target: NDArray[np.uint8], l0_corner: tuple[int, int], level: int) -> NDArray[np.uint8] | None:  # noqa: ARG002
        """Fill an array with pixels; return their opacity, or None if all are opaque."""
        if self._pixels is None:
            self._pixels = _decoded(self._path)
        rows, cols = target.shape[:2]
        part = self._pixels.crop((*l0_corner, l0_corner[0] + cols, l0_corner[1] + rows))
        if part.mode == "RGBA":
            return opacity(composited(target, part, WHITE))
        target[:] = np.asarray(part.convert("RGB"))
        return None


def open_file(path: Path) -> ImageFile:
    """Open an image."""
    with path.open("rb") as stream:
        start = stream.read(_PNG_DEPTH_AT + 1)
    codec = next((codec for begin, codec in _CODECS.items() if start.startswith(begin)), None)
    if start.startswith(_PNG) and start[_PNG_DEPTH_AT:] == b"\x10":
        codec = imagecodecs.png_decode  # Pillow drops the lower 8 bits, whichever are used
    if codec is None and not start.startswith(_STARTS):
        raise Declined
    try:
        return _with_codec(path, codec) if codec else _with_pillow(path)
    except _UNREADABLE as error:
        if isinstance(error, OSError) and faults.is_of_machine(error):
            raise
        raise Declined(f"the image ends early or is damaged ({error})", content.COPY_AGAIN) from error


def _with_pillow(path: Path) -> ImageFile:
    """Read the header of an image."""
    with _header(path) as image:
        _check(image, path)
        width, height = image.size
        if image.getexif().get(_ORIENTATION, 1) >= _QUARTER_TURNED:
            width, height = height, width
        mpp_x, mpp_y, source = _stated_mpp(image)
        notes = notes_on_samples(USED_BITS[0], grey=image.mode in {"1", "L", "LA"})
        vendor = str(image.format).lower()
    return ImageFile(path, _described(vendor, (width, height), (mpp_x, mpp_y, source), notes))


@contextlib.contextmanager
def _header(path: Path) -> Iterator[Image.Image]:
    """Open an image whose size is checked here: Pillow refuses half as many pixels as too many."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path, formats=_NAMES) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _with_codec(path: Path, codec: Callable[[bytes], NDArray[Any]]) -> ImageFile:
    """Decode an image whose format or depth is not Pillow's."""
    samples = codec(path.read_bytes())
    if samples.ndim == 2:
        samples = samples[..., None]
    if samples.ndim != 3 or samples.shape[2] > 4 or samples.dtype not in (np.uint8, np.uint16):
        raise Declined(f"the image has samples of type {samples.dtype} {samples.shape}", to_eight_bits(path))
    bits = USED_BITS[0]
    if samples.dtype == np.uint16:
        bits = fewest_bits(int(samples.max()))
        samples = eight_bits(bits)[samples]
    notes = notes_on_samples(bits, grey=samples.shape[2] < 3)
    pixels = Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples)
    size_px = (samples.shape[1], samples.shape[0])
    return ImageFile(path, _described(path.suffix.lower()[1:], size_px, (None, None, ""), notes), _plain(pixels))


def _described(
    vendor: str, size_px: tuple[int, int], mpp: tuple[float | None, float | None, str], notes: tuple[str, ...]
) -> Description:
    return Description(
        vendor=vendor,
        level_sizes_px=(size_px,),
        level_downsamples=(1.0,),
        mpp_x=mpp[0],
        mpp_y=mpp[1],
        mpp_source=mpp[2],
        notes=notes,
    )


def _check(image: Image.Image, path: Path) -> None:
    width, height = image.size
    if width * height > _MOST_PX:
        cause = f"the image has {width} x {height} px, more than the {_MOST_PX} that are decoded at once"
        raise Declined(cause, to_pyramid(path))
    if image.mode not in _MODES:
        remedy = to_eight_bits(path) if image.mode in {"I", "F"} or ";" in image.mode else to_colours(path)
        raise Declined(f"the image stores {image.mode}, not grey or red, green and blue", remedy)
    if (frames := getattr(image, "n_frames", 1)) > 1:
        raise Declined(f"the image has {frames} frames", to_pyramid(path))


def _decoded(path: Path) -> Image.Image:
    """Return the pixels of an image, upright, in mode L, RGB or RGBA."""
    try:
        with _header(path) as image:
            upright = ImageOps.exif_transpose(image)
            upright.load()
    except _UNREADABLE as error:
        if isinstance(error, OSError) and faults.is_of_machine(error):
            raise faults.unreadable(error, "the slide", content.COPY_AGAIN, path=path) from error
        raise InputError(f"the image cannot be decoded ({error})", content.COPY_AGAIN, path=path) from error
    return _plain(upright)


def _plain(image: Image.Image) -> Image.Image:
    """Return an image in mode L, RGB or RGBA."""
    opaque = image.mode == "P" and "transparency" not in image.info
    return image.convert("RGB" if opaque else _MODES[image.mode])


def _stated_mpp(image: Image.Image) -> tuple[float | None, float | None, str]:
    """Return micrometres per pixel along x and y from the resolution that a header states, and where that is."""
    try:
        dpi_x, dpi_y = (float(each) for each in image.info.get("dpi", ()))
    except (TypeError, ValueError):
        return None, None, ""
    if not (dpi_x > 1 and dpi_y > 1):  # without a unit, it is the shape of a pixel
        return None, None, ""
    return _UM_PER_INCH / dpi_x, _UM_PER_INCH / dpi_y, f"resolution of the {image.format}"
