"""What is in a TIFF: which pages are levels and channels, what their samples mean, and what it says about itself.

Input: an open file of tifffile. Output: its levels, or `Declined` with the reason. No pixels are read, except samples
of the values where 16 bits are stored: it is not stated how many of them a scanner used.

Levels are the SubIFDs of OME-TIFF, and reduced pages in the main chain. A slide may have one page for each channel
(Bio-Formats writes them so); red, green and blue are then joined.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from numpy.typing import NDArray

from wsiflow.slides.readers import ome
from wsiflow.slides.readers.conversion import to_bands, to_colours, to_eight_bits, to_ome_tiff, to_pyramid, to_upright
from wsiflow.slides.readers.reader import Declined, fewest_bits, level_downsample, notes_on_samples

RESOLUTION = "TIFF XResolution"
FULL_BITS = 16
_UNSIGNED = ("b", "u")  # NumPy's kinds of types

_GREYS, _RGB, _PALETTE, _YCBCR = frozenset({0, 1}), 2, 3, 6
_INVERTED = 0
_COLOURS = {4: "a mask", 5: "CMYK", 8: "CIELab", 9: "ICCLab", 10: "ITULab", 32844: "LogL", 32845: "LogLuv"}
_UNSHOWN = frozenset({4, 9, 10})  # by libtiff
_UM_PER_UNIT = {2: 25_400.0, 3: 10_000.0, 4: 1_000.0, 5: 1.0}  # 4 and 5 are tifffile's own
_APERIO_MPP = re.compile(r"\|\s*MPP\s*=\s*([0-9.]+)")
_SAMPLED_SEGMENTS = 24
_MAX_SAMPLE_VALUE = 281
_UPRIGHT = 1
_OPACITY = {1: 1, 2: 2}


class Samples(NamedTuple):
    """What the samples of a pixel mean.

    Attributes:
        colours: Number of samples that are colours: 1 (grey or an index of the palette) or 3.
        alpha: 0 without opacity, else 1 if colours are multiplied by it, 2 if they are not.
        bits: Bits of a sample that are used.
        inverted: Whether 0 is white.
        palette: uint8 (entries, 3), or None.
        ycbcr: Whether decoded samples are luma and chroma.
    """

    colours: int
    alpha: int
    bits: int
    inverted: bool = False
    palette: NDArray[np.uint8] | None = None
    ycbcr: bool = False


class Level(NamedTuple):
    """A level: its size, and the page of each channel, or the one page of all."""

    size_px: tuple[int, int]
    pages: tuple[Any, ...]


class Layout(NamedTuple):
    """What is in a TIFF.

    Attributes:
        levels: The levels, finest first.
        downsamples: Level-0 pixels per pixel of each level.
        samples: What samples mean, on all levels.
        mpp: Micrometres per level-0 pixel along x and y, and where they are stated.
        notes: What a user must know about how pixels are shown.
        unstated: Whether nothing says that three channels are red, green and blue.
    """

    levels: tuple[Level, ...]
    downsamples: tuple[float, ...]
    samples: Samples
    mpp: tuple[float | None, float | None, str]
    notes: tuple[str, ...]
    unstated: bool


class PlainFacts(NamedTuple):
    """What the plainest reader of TIFF would not know about a file.

    Attributes:
        misread: Why the first page alone, shown as 8 bits, is not what is in the file; empty where it is.
        notes: What a user must know about how pixels are shown.
        mpp: Micrometres per level-0 pixel along x and y, and where they are stated.
    """

    misread: str = ""
    notes: tuple[str, ...] = ()
    mpp: tuple[float | None, float | None, str] = (None, None, "")


def plain_facts(tiff: Any) -> PlainFacts:
    """Return what the first page of a file does not show."""
    page = tiff.pages.first
    n_pages = _same_pages(tiff)
    bits = used_bits(tiff, [page]) if page.bitspersample == FULL_BITS else page.bitspersample
    notes = _notes(1 if page.photometric in _GREYS else 3, bits, planes=n_pages)
    if any(int(kind) not in _OPACITY for kind in page.extrasamples or ()):
        notes += (f"nothing states what sample {page.samplesperpixel} of a pixel is: it is taken for opacity",)
    return PlainFacts(_misread(tiff, bits, n_pages), notes, stated_mpp(tiff))


def _misread(tiff: Any, bits: int, n_pages: int) -> str:
    """Return why the first page alone, shown as 8 bits, is not what is in a file; empty where it is."""
    page, images = tiff.pages.first, ome.read_images(tiff.ome_metadata or "") if tiff.is_ome else []
    uncompressed_bytes = _tile_bytes(page) if page.compression == _UNCOMPRESSED and page.is_tiled else 0
    reasons = {
        "its levels are in SubIFDs": page.subifds and tiff.is_ome,
        f"it has {n_pages} pages of one channel each": n_pages > 1 and page.samplesperpixel == 1,
        f"it has {page.samplesperpixel} channels": page.samplesperpixel > (2 if page.photometric in _GREYS else 4),
        "it has a channel of fluorescence": any(ome.doubt(image.channels, 1) for image in images[:1]),
        f"its samples have {bits} bits": bits not in {1, 2, 4, 8, FULL_BITS} or page.dtype.kind not in _UNSIGNED,
        f"of the {page.bitspersample} bits of a sample {bits} are used": bits < page.bitspersample,
        f"it stores {_COLOURS.get(page.photometric)}": page.photometric in _UNSHOWN,
        f"its uncompressed tiles have {uncompressed_bytes} bytes, which libtiff refuses": uncompressed_bytes
        % _LIBTIFF_BUFFER_BYTES,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def layout(tiff: Any, path: Path, known_bits: int = 0) -> Layout:
    """Return what is in a file.

    Args:
        tiff: The open file.
        path: Its path, for messages.
        known_bits: Bits of a sample that are used, as an earlier call has found them; 0 where they are not known.

    Raises:
        Declined: It holds something else than a picture in grey or in colours.
    """
    image, channels, stated = _ome_channels(tiff, path) if tiff.is_ome else (None, _channel_pages(tiff), ())
    first = channels[0][0]
    for page in {id(page.keyframe): page.keyframe for levels in channels for page in levels}.values():
        _check_page(page, path)
    # The samples of an image with a page for each channel are those of all pages.
    per_page = first.keyframe.samplesperpixel
    if len(channels) > 1 and per_page > 1:
        raise Declined(f"it has {len(channels)} channels or planes of {per_page} samples each", to_ome_tiff(path))
    if reason := ome.doubt(stated, len(channels)):
        raise Declined(reason, ome.OTHER_CHANNELS)
    order = ome.rgb_order(stated) if len(channels) == 3 else None
    channels = [channels[place] for place in order] if order else channels
    used = image.bits if image and image.bits and image.bits < FULL_BITS else 0
    sampled = [levels[-1] for levels in channels] + [levels[0] for levels in channels]
    bits = known_bits or used_bits(tiff, sampled, used)
    samples = _samples(first.keyframe, len(channels), bits, path)
    levels = _common_levels(channels)
    mpp = (image.mpp_x, image.mpp_y, "OME PhysicalSizeX") if image and image.mpp_x and image.mpp_y else None
    joined = len(channels)
    planes = _same_pages(tiff) if joined == 1 else 1
    return Layout(
        levels=levels,
        downsamples=tuple(level_downsample(levels[0].size_px, level.size_px) for level in levels),
        samples=samples,
        mpp=mpp or stated_mpp(tiff),
        notes=_notes(3 if samples.palette is not None else samples.colours, bits, joined=joined, planes=planes),
        unstated=len(channels) > 1 and order is None,
    )


def stated_mpp(tiff: Any) -> tuple[float | None, float | None, str]:
    """Return micrometres per pixel of the first page along x and y, and where the file states them."""
    page = tiff.pages.first
    if tiff.is_ome:
        image = next(iter(ome.read_images(tiff.ome_metadata or "")), None)
        if image and image.mpp_x and image.mpp_y:
            return image.mpp_x, image.mpp_y, "OME PhysicalSizeX"
    aperio = _APERIO_MPP.search(page.description or "")
    if aperio and (mpp := ome.length_um(aperio[1], "um")):
        return mpp, mpp, "MPP in ImageDescription"
    px_x, px_y = (_ratio(page.tags.valueof(name)) for name in ("XResolution", "YResolution"))
    if not px_x or not px_y:
        return None, None, ""
    if tiff.is_imagej:
        um = ome.UM.get(str((tiff.imagej_metadata or {}).get("unit", "")).replace("\\u00B5", "µ"))
        return (um / px_x, um / px_y, "ImageJ's unit and XResolution") if um else (None, None, "")
    um = _UM_PER_UNIT.get(int(page.tags.valueof("ResolutionUnit", 2)))
    return (um / px_x, um / px_y, RESOLUTION) if um else (None, None, "")


def used_bits(tiff: Any, pages: Sequence[Any], stated: int = 0) -> int:
    """Return how many bits of a sample are used, from the largest value of some tiles where 16 are stored.

    Args:
        tiff: The open file.
        pages: Pages from which tiles are taken.
        stated: How many the metadata state, or 0.
    """
    page = pages[0].keyframe
    if page.bitspersample != FULL_BITS or page.dtype.kind != "u":
        return int(page.bitspersample)
    most = page.tags.valueof(_MAX_SAMPLE_VALUE, 0)
    limit = 2**stated - 1 if stated else max(most) if isinstance(most, tuple) else int(most or 0)
    if not 0 < limit < 2**FULL_BITS - 1:
        limit = max(_largest(tiff, each) for each in pages)
    return fewest_bits(limit)


def _largest(tiff: Any, page: Any) -> int:
    """Return the largest value in some tiles or strips of a page, evenly spread, and the ones with most bytes."""
    counts = np.array(page.databytecounts)
    present = np.flatnonzero(counts)
    if not present.size:
        return 0
    spread = np.linspace(0, present.size - 1, _SAMPLED_SEGMENTS).round().astype(int)
    largest = 0
    for index in {*present[spread].tolist(), int(np.argmax(counts))}:
        tiff.filehandle.seek(page.dataoffsets[index])
        data = tiff.filehandle.read(int(counts[index]))
        segment = page.keyframe.decode(data, index, jpegtables=page.jpegtables)[0]
        largest = max(largest, 0 if segment is None else int(segment.max()))
    return largest


def _notes(colours: int, bits: int, *, joined: int = 1, planes: int = 1) -> tuple[str, ...]:
    together = f"{joined} pages of one channel each are joined as red, green and blue"
    first = f"of its {planes} planes the first is shown"
    notes = notes_on_samples(bits, grey=colours == 1)
    return (*([together] if joined > 1 else []), *notes, *([first] if planes > 1 else []))


def _ome_channels(tiff: Any, path: Path) -> tuple[ome.OmeImage | None, list[list[Any]], tuple[ome.Channel, ...]]:
    """Return the metadata of the largest image of an OME-TIFF, the levels of each channel, and what channels are.

    Raises:
        Declined: The image lies in several files, or has several planes or moments.
    """
    images = ome.read_images(tiff.ome_metadata or "")
    number, series = max(enumerate(tiff.series), key=lambda each: _area_px(each[1].keyframe))
    if series.is_multifile:
        raise Declined("its pages lie in several files", to_ome_tiff(path))
    sizes = dict(zip(series.axes, series.shape, strict=True))
    if further := [f"{sizes[axis]} along {axis}" for axis in sizes if axis not in "YXSC" and sizes[axis] > 1]:
        raise Declined(f"it is not one plane ({', '.join(further)})", to_ome_tiff(path, " -z 0 -timepoint 0"))
    pages = [list(level.pages) for level in series.levels]
    if any(page is None or len(level) != len(pages[0]) for level in pages for page in level):
        raise Declined("pages are missing in it", to_ome_tiff(path))
    image = images[number] if number < len(images) else None
    channels = [[level[channel] for level in pages] for channel in range(len(pages[0]))]
    return image, channels, image.channels if image else ()


def _channel_pages(tiff: Any) -> list[list[Any]]:
    """Return for each channel the levels of the first image: all of one page, or grey pages of one size."""
    first = max(tiff.pages, key=lambda page: _area_px(page.keyframe))  # a thumbnail may precede the slide
    if first.keyframe.samplesperpixel > 1 or first.keyframe.photometric not in _GREYS:
        return [_reduced(tiff, first)]
    shape = _shape(first.keyframe)
    alike = [page for page in tiff.pages if _shape(page.keyframe) == shape and page is not first]
    return [_reduced(tiff, first), *([page, *_sub_levels(page)] for page in alike)]


def _same_pages(tiff: Any) -> int:
    """Return how many pages of the main chain are like the first, which is one channel or plane of them."""
    first = tiff.pages.first
    alike = [page for page in tiff.pages if _shape(page.keyframe) == _shape(first) and not page.keyframe.is_reduced]
    return len(alike) if first.photometric != _PALETTE else 1


def _reduced(tiff: Any, first: Any) -> list[Any]:
    """Return a page and its reduced levels, finest first: its SubIFDs, or else pages of the main chain."""
    chain = [] if first.subifds else [page for page in tiff.pages if _is_level(first.keyframe, page.keyframe)]
    return [first, *_sub_levels(first), *sorted(chain, key=lambda page: -page.imagewidth)]


def _sub_levels(page: Any) -> list[Any]:
    levels = list(page.pages or ()) if page.subifds else []
    return sorted(
        (level for level in levels if _is_level(page.keyframe, level.keyframe)), key=lambda level: -level.imagewidth
    )


def _is_level(first: Any, page: Any) -> bool:
    """Return whether a page is a smaller copy of the first, not a label or a thumbnail that a scanner adds."""
    sizes = ((first.imagewidth, page.imagewidth), (first.imagelength, page.imagelength))
    if not all(0 < reduced < full for full, reduced in sizes) or _shape(first)[2:] != _shape(page)[2:]:
        return False
    if not (page.is_reduced or page.is_tiled or page.is_subifd):
        return False
    (across, down), slack = (full / reduced for full, reduced in sizes), 0.0
    slack = across / page.imagewidth + down / page.imagelength  # rounding a side changes it by at most one pixel
    return bool(abs(across - down) <= slack)


def _common_levels(channels: Sequence[Sequence[Any]]) -> tuple[Level, ...]:
    """Return the levels that all channels have."""
    levels = []
    for pages in zip(*channels, strict=False):
        sizes = {(int(page.keyframe.imagewidth), int(page.keyframe.imagelength)) for page in pages}
        if len(sizes) == 1:
            levels.append(Level(sizes.pop(), tuple(pages)))
    return tuple(levels)


def _tile_bytes(page: Any) -> int:
    samples = page.samplesperpixel if page.planarconfig == 1 else 1
    return int(page.tilelength * (page.tilewidth * samples * page.bitspersample // 8))


def _area_px(page: Any) -> int:
    return int(page.imagewidth) * int(page.imagelength)


def _shape(page: Any) -> tuple[Any, ...]:
    return page.imagewidth, page.imagelength, page.samplesperpixel, page.dtype, page.photometric


def _check_page(page: Any, path: Path) -> None:
    """Refuse pages whose samples are no colours of up to 16 bits."""
    if page.compression != _UNCOMPRESSED and page.compression not in tifffile.TIFF.DECOMPRESSORS:
        raise Declined(f"its tiles have compression: {int(page.compression)}, which is not known", to_ome_tiff(path))
    if page.dtype is None or page.dtype.kind not in _UNSIGNED or page.bitspersample > FULL_BITS:
        kind = f"{page.bitspersample}-bit samples of type {page.dtype or page.sampleformat}"
        raise Declined(f"it has {kind}, not 8 or 16 bits", to_eight_bits(path))
    if page.photometric not in {*_GREYS, _RGB, _PALETTE, _YCBCR}:
        colours = _COLOURS.get(int(page.photometric), f"colours of the kind {int(page.photometric)}")
        raise Declined(f"it stores {colours}", to_colours(path))
    if page.tags.valueof("Orientation", _UPRIGHT) != _UPRIGHT:
        raise Declined("it is stored upside down or turned", to_upright(path))
    if page.is_subsampled and page.compression not in _JPEGS:
        raise Declined("its chroma is subsampled without JPEG", to_pyramid(path))


_JPEGS = frozenset({6, 7, 34892, 33007})
_DECODED_TO_RGB = _JPEGS | {22610, 34927, 34934, 50001, 50002, 52546}  # WebP, JPEG XR, JPEG XL
_APERIO_YCBCR = 33003
_UNCOMPRESSED = 1
_LIBTIFF_BUFFER_BYTES = 1024  # libtiff 4.7 compares the size of an uncompressed tile with that of its buffer


def _samples(page: Any, n_pages: int, bits: int, path: Path) -> Samples:
    """Return what the samples of an image mean.

    Raises:
        Declined: It has other channels than grey or red, green and blue, with or without opacity.
    """
    stored = n_pages if n_pages > 1 else int(page.samplesperpixel)
    colours = 3 if stored > 2 else 1
    extra = tuple(page.extrasamples or ()) if n_pages == 1 else ()
    if stored not in {colours, colours + 1} or (stored > colours and len(extra) != 1):
        raise Declined(f"it has {stored} channels, which are not red, green and blue", ome.OTHER_CHANNELS)
    if extra and int(extra[0]) not in _OPACITY:
        raise Declined(f"nothing states what sample {stored} of its {stored} is", to_bands(path, colours))
    alpha = _OPACITY[int(extra[0])] if extra else 0
    palette = None
    if page.photometric == _PALETTE and page.colormap is not None:
        palette = (page.colormap >> 8).astype(np.uint8).T.copy()
    raw_ycbcr = page.photometric == _YCBCR and page.compression not in _DECODED_TO_RGB
    return Samples(
        colours=colours,
        alpha=alpha,
        bits=bits,
        inverted=page.photometric == _INVERTED,
        palette=palette,
        # Aperio's first number of JPEG 2000 means luma and chroma; others write it for red, green and blue.
        ycbcr=colours == 3
        and (raw_ycbcr or (page.compression == _APERIO_YCBCR and (page.description or "").startswith("Aperio"))),
    )


def _ratio(value: Any) -> float:
    """Return a rational number of a tag, or 0."""
    try:
        return float(value[0]) / float(value[1])
    except (TypeError, IndexError, ValueError, ZeroDivisionError):
        return 0.0
