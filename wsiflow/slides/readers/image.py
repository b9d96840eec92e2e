"""Images of a region: PNG, JPEG, BMP, WebP and JPEG 2000, decoded by Pillow.

They have one level, and rarely a pixel size, which is then given. Such an image is decoded once, and kept whole.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from wsiflow.errors import InputError
from wsiflow.slides import content
from wsiflow.slides.readers.conversion import to_eight_bits, to_pyramid
from wsiflow.slides.readers.reader import WHITE, Declined, Description, Format, composited, opacity

_NAMES = ("PNG", "JPEG", "BMP", "WEBP", "JPEG2000", "GIF", "PPM", "TGA")
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
_DEEP = frozenset({"I;16", "I;16B", "I;16L"})
_UM_PER_INCH = 25_400.0
# Exceptions of Pillow for files that are cut short or damaged.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError)


class ImageFile:
    """An image that Pillow decodes, see `wsiflow.slides.readers.reader.Reader`."""

    blends = False
    decoder = "pillow"

    def __init__(self, path: Path, description: Description) -> None:
        """Keep what was found in the header; callers use `FORMAT`."""
        self.description = description
        self._path = path
        self._pixels: Image.Image | None = None

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


def _open(path: Path) -> ImageFile:
    """Read the header of an image."""
    with path.open("rb") as stream:
        if not stream.read(12).startswith(_STARTS):
            raise Declined
    if path.suffix.lower() not in FORMAT.others:
        cause = f"the file is an ordinary image, but its name ends in {path.suffix!r}"
        raise Declined(cause, "replace it by the slide, or give the file (and its line) the ending of an image")
    try:
        with Image.open(path, formats=_NAMES) as image:
            _check(image, path)
            width, height = image.size
            if image.getexif().get(0x0112, 1) >= 5:  # turned by a quarter
                width, height = height, width
            mpp = _stated_mpp(image)
            notes = _notes(image)
    except _UNREADABLE as error:
        raise Declined(f"the image ends early or is damaged ({error})", content.COPY_AGAIN) from error
    description = Description(
        vendor=str(image.format).lower(),
        level_sizes_px=((width, height),),
        level_downsamples=(1.0,),
        mpp_x=mpp[0],
        mpp_y=mpp[1],
        mpp_source=mpp[2],
        notes=notes,
    )
    return ImageFile(path, description)


def _check(image: Image.Image, path: Path) -> None:
    width, height = image.size
    if width * height > _MOST_PX:
        cause = f"the image has {width} x {height} px, more than the {_MOST_PX} that are decoded at once"
        raise Declined(cause, to_pyramid(path))
    if image.mode not in _MODES and image.mode not in _DEEP:
        raise Declined(f"the image stores {image.mode}, not grey or red, green and blue", to_eight_bits(path))
    if getattr(image, "n_frames", 1) > 1:
        raise Declined(f"the image has {image.n_frames} frames", to_pyramid(path))


def _decoded(path: Path) -> Image.Image:
    """Return the pixels of an image, upright, in mode L, RGB or RGBA."""
    try:
        with Image.open(path, formats=_NAMES) as image:
            upright = ImageOps.exif_transpose(image)
            upright.load()
    except _UNREADABLE as error:
        raise InputError(f"the image cannot be decoded ({error})", content.COPY_AGAIN, path=path) from error
    if upright.mode in _DEEP:
        samples = np.asarray(upright).astype(np.uint32)
        return Image.fromarray(((samples + 128) // 257).astype(np.uint8))
    opaque = upright.mode == "P" and "transparency" not in upright.info
    return upright.convert("RGB" if opaque else _MODES[upright.mode])


def _stated_mpp(image: Image.Image) -> tuple[float | None, float | None, str]:
    """Return micrometres per pixel along x and y from the resolution that a header states, and where that is."""
    try:
        dpi_x, dpi_y = (float(each) for each in image.info.get("dpi", ()))
    except (TypeError, ValueError):
        return None, None, ""
    if not (dpi_x > 1 and dpi_y > 1):  # without a unit, it is the shape of a pixel
        return None, None, ""
    return _UM_PER_INCH / dpi_x, _UM_PER_INCH / dpi_y, f"resolution of the {image.format}"


def _notes(image: Image.Image) -> tuple[str, ...]:
    notes = []
    if image.mode in {"1", "L", "LA", *_DEEP}:
        notes.append("the slide is grey, which models of stained sections were not trained on")
    if image.mode in _DEEP:
        notes.append("samples of 16 bits are reduced to 8 (value * 255 / 65535)")
    return tuple(notes)


FORMAT = Format(
    name="Pillow",
    suffixes=frozenset(),
    open=_open,
    others=frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".jp2", ".j2k", ".gif", ".ppm"}),
)
