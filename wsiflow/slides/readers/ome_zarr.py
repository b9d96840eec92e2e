"""OME-Zarr: a folder of chunks, read by the package zarr (``pip install 'wsiflow[zarr]'``).

Versions 0.4 (Zarr 2) and 0.5 (Zarr 3) of the format are read, and what bioformats2raw writes, of which the first image
is taken. The image is one plane of one or three channels, as in OME-TIFF.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError
from wsiflow.slides import content
from wsiflow.slides.readers import ome
from wsiflow.slides.readers.reader import (
    DARK,
    DARK_GROUND,
    USED_BITS,
    Declined,
    Description,
    eight_bits,
    fewest_bits,
    level_downsample,
    notes_on_samples,
    scaled,
)
from wsiflow.system import faults

try:
    import zarr
except ImportError:  # an extra
    zarr = None  # type: ignore[assignment]

_REMEDY = "write it again with bioformats2raw, or convert it: raw2ometiff <folder.zarr> <slide.ome.tif>"
_SAMPLED_PX = 1 << 22
# Packages of codecs raise what they like for chunks that are damaged.
_UNREADABLE = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


class _Image(NamedTuple):
    """The levels of an image and what their axes are.

    Attributes:
        levels: Its arrays, finest first.
        axes: Names of their axes, for example ``tczyx``.
        order: Places of red, green and blue along ``c``; one place for a grey image.
        bits: Bits of a sample that are used.
    """

    levels: list[Any]
    axes: str
    order: list[int]
    bits: int


class ZarrFolder:
    """An image of OME-Zarr, see `wsiflow.slides.readers.reader.Reader`."""

    blends = False
    decoder = "zarr"

    def __init__(self, path: Path, image: _Image, description: Description) -> None:
        """Keep the open arrays; callers use `open_file`."""
        self.description = description
        self._path = path
        self._image = image
        self._table = eight_bits(image.bits)

    def close(self) -> None:
        """Do nothing: chunks are opened one by one."""

    def by_rows(self, level: int) -> bool:  # noqa: ARG002
        """Return False: chunks are tiles."""
        return False

    def read_into(self, target: NDArray[np.uint8], l0_corner: tuple[int, int], level: int) -> None:
        """Fill an array with pixels of a level, which are all opaque."""
        rows, cols = target.shape[:2]
        downsample, size_px = self.description.level_downsamples[level], self.description.level_sizes_px[level]
        l_x, l_y = (
            min(max(0, int(begin / downsample + 0.5)), side - extent)
            for begin, side, extent in zip(l0_corner, size_px, (cols, rows), strict=True)
        )
        try:
            samples = _part(self._image, level, slice(l_y, l_y + rows), slice(l_x, l_x + cols))
        except _UNREADABLE as error:
            if isinstance(error, OSError) and faults.is_of_machine(error):
                raise faults.unreadable(error, "the slide", content.COPY_AGAIN, path=self._path) from error
            cause = f"{cols} x {rows} px of level {level} at ({l_x}, {l_y}) cannot be decoded ({error})"
            raise InputError(cause, content.COPY_AGAIN, path=self._path) from error
        target[:] = samples if samples.dtype == np.uint8 else scaled(samples, self._table, _REMEDY)


def open_file(path: Path) -> ZarrFolder:
    """Open a folder."""
    if zarr is None:
        raise Declined("OME-Zarr is read by the package zarr, which is not installed", "pip install 'wsiflow[zarr]'")
    try:
        group = zarr.open_group(path, mode="r")
        return _opened(path, group)
    except _UNREADABLE as error:
        if isinstance(error, OSError) and faults.is_of_machine(error):
            raise
        raise Declined(f"the folder is not an image of OME-Zarr ({error})", _REMEDY) from error


def _opened(path: Path, group: Any) -> ZarrFolder:
    about = _attributes(group)
    if "multiscales" not in about and "bioformats2raw.layout" in about:
        group = group["0"]
        about = _attributes(group)
    (scales, *_) = about["multiscales"]
    axes = "".join(axis["name"] if isinstance(axis, Mapping) else axis for axis in scales.get("axes", "tczyx")).lower()
    levels = [group[each["path"]] for each in scales["datasets"]]
    channels = _channels(about.get("omero", {}))
    sizes = dict(zip(axes, levels[0].shape, strict=True))
    if further := [f"{sizes[axis]} along {axis}" for axis in axes if axis not in "cyx" and sizes[axis] > 1]:
        raise Declined(f"it is not one plane ({', '.join(further)})", _REMEDY)
    if levels[0].dtype not in (np.uint8, np.uint16):
        raise Declined(f"its samples are of type {levels[0].dtype}, not 8 or 16 bits", _REMEDY)
    if 0 in levels[0].shape:
        raise Declined("it has no pixels", content.COPY_AGAIN)
    count = sizes.get("c", 1)
    if reason := ome.doubt(channels, count):
        raise Declined(reason, ome.OTHER_CHANNELS)
    order = ome.rgb_order(channels) if count == len(channels) == 3 else None
    image = _Image(levels, axes, order or list(range(count)), USED_BITS[0])
    image = image._replace(bits=_used_bits(image))
    if count > 1 and order is None:
        _require_bright(image)
    return ZarrFolder(path, image, _description(image, _mpp(scales, axes)))


def _description(image: _Image, mpp: tuple[float | None, float | None, str]) -> Description:
    y, x = image.axes.index("y"), image.axes.index("x")
    sizes = tuple((int(level.shape[x]), int(level.shape[y])) for level in image.levels)
    return Description(
        vendor="ome-zarr",
        level_sizes_px=sizes,
        level_downsamples=tuple(level_downsample(sizes[0], size) for size in sizes),
        mpp_x=mpp[0],
        mpp_y=mpp[1],
        mpp_source=mpp[2],
        notes=notes_on_samples(image.bits, grey=len(image.order) == 1),
    )


def _attributes(group: Any) -> Mapping[str, Any]:
    """Return the attributes of OME: in version 0.5 they are below the name ``ome``."""
    attributes: Mapping[str, Any] = dict(group.attrs)
    below: Mapping[str, Any] = attributes.get("ome", attributes)
    return below


def _channels(omero: Mapping[str, Any]) -> tuple[ome.Channel, ...]:
    listed: Sequence[Mapping[str, Any]] = omero.get("channels", ())
    return tuple(ome.channel(str(each.get("label", "")), _colour(str(each.get("color", "")))) for each in listed)


def _colour(text: str) -> tuple[int, int, int] | None:
    try:
        red, green, blue = bytes.fromhex(text)[:3]
    except ValueError:
        return None
    return red, green, blue


def _mpp(scales: Mapping[str, Any], axes: str) -> tuple[float | None, float | None, str]:
    """Return micrometres per pixel of level 0 along x and y, and where they are stated."""
    listed = [*scales["datasets"][0].get("coordinateTransformations", ()), *scales.get("coordinateTransformations", ())]
    factors = [each["scale"] for each in listed if each.get("type") == "scale"]
    found = []
    for name in "xy":
        axis = scales["axes"][axes.index(name)] if scales.get("axes") else {}
        unit = axis.get("unit") if isinstance(axis, Mapping) else None
        length = float(np.prod([factor[axes.index(name)] for factor in factors])) if factors else None
        found.append(ome.length_um(length, unit) if unit else None)
    return (found[0], found[1], "OME-Zarr scale") if all(found) else (None, None, "")


def _part(image: _Image, level: int, rows: slice, cols: slice) -> NDArray[Any]:
    """Return samples of a level, (rows, cols, 3)."""
    places: dict[str, Any] = {"y": rows, "x": cols}
    array, channel = image.levels[level], {"c": slice(None)}
    samples = np.asarray(array[tuple(places.get(axis, channel.get(axis, 0)) for axis in image.axes)])
    left = [axis for axis in image.axes if axis in "cyx"]
    if "c" not in left:
        samples, left = samples[..., None], [*left, "c"]
    samples = np.transpose(samples, [left.index(axis) for axis in "yxc"])[..., image.order]
    return np.repeat(samples, 3, axis=2) if samples.shape[2] == 1 else samples


def _sampled(image: _Image, level: int) -> NDArray[Any]:
    """Return the middle of a level."""
    height, width = (image.levels[level].shape[image.axes.index(axis)] for axis in "yx")
    side = int(_SAMPLED_PX**0.5)
    top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
    return _part(image, level, slice(top, min(height, top + side)), slice(left, min(width, left + side)))


def _used_bits(image: _Image) -> int:
    if image.levels[0].dtype == np.uint8:
        return USED_BITS[0]
    return fewest_bits(max(int(_sampled(image, level).max()) for level in {0, len(image.levels) - 1}))


def _require_bright(image: _Image) -> None:
    """Refuse three channels of which nothing says what they are, and which are dark as those of fluorescence are."""
    if np.median(_sampled(image, -1)) < DARK * 2 ** (image.bits - USED_BITS[0]):
        raise Declined(DARK_GROUND, ome.OTHER_CHANNELS)
