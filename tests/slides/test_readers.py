"""Readers: every form of file shows the pixels that were written, or is refused with its reason and a way out."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from wsiflow.errors import InputError
from wsiflow.run.stages import overviews
from wsiflow.slides import content, slide
from wsiflow.slides.readers import formats, image, openslide_file, tiff
from wsiflow.slides.readers import ome_zarr as ome_zarr_reader
from wsiflow.slides.readers.formats import Format
from wsiflow.slides.readers.reader import GREY, Description
from wsiflow.slides.slide import open_slide
from wsiflow.system import publish

Pixels = NDArray[np.uint8]
WIDTH, HEIGHT = 203, 150


def tissue(width: int = WIDTH, height: int = HEIGHT, seed: int = 3) -> Pixels:
    """Return a texture in bright colours, with a border on white."""
    noise = np.random.default_rng(seed).integers(60, 256, (height // 5 + 2, width // 5 + 2, 3), dtype=np.uint8)
    image = np.array(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
    image[: height // 3, : width // 3] = 255
    return image


IMAGE = tissue()
GREY_IMAGE = IMAGE[..., 1].copy()
PLANES = np.moveaxis(IMAGE, 2, 0).copy()
RGBA = np.dstack([IMAGE, IMAGE[..., 0]])


def written(path: Path, pixels: NDArray[Any] = IMAGE, **options: Any) -> Path:
    """Write one page, by default in tiles of 64 px and RGB; ``tile=None`` writes strips."""
    options = {"photometric": "rgb", "tile": (64, 64)} | options
    if options["tile"] is None:
        del options["tile"]
    tifffile.imwrite(path, pixels, **options)
    return path


def ome(path: Path, *levels: NDArray[Any], about: dict[str, Any] | None = None, **options: Any) -> Path:
    """Write an OME-TIFF whose reduced levels are SubIFDs, as Bio-Formats and QuPath do."""
    options = {"photometric": "rgb", "tile": (64, 64)} | options
    about = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25} | (about or {})
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(levels[0], subifds=len(levels) - 1, metadata=about, **options)
        for level in levels[1:]:
            writer.write(level, subfiletype=1, **options)
    return path


def shown(path: Path, level: int = 0) -> Pixels:
    """Return all pixels of a level."""
    with open_slide(path, slide_id="S") as opened:
        return opened.read(0, 0, level, opened.facts.level_sizes_px[level]).rgb


def refused(path: Path) -> str:
    """Return the message with which a file is refused, when it is opened or read."""
    with pytest.raises(InputError) as caught, open_slide(path, slide_id="S") as opened:
        opened.overview(8)
    message = str(caught.value)
    assert message.startswith(f"slide S, {path}: ")
    assert "\n" not in message
    return message


BOTH: dict[str, tuple[NDArray[Any], dict[str, Any]]] = {
    "none": (IMAGE, {}),
    "lzw": (IMAGE, {"compression": "lzw"}),
    "lzw-predictor": (IMAGE, {"compression": "lzw", "predictor": True}),
    "deflate": (IMAGE, {"compression": "zlib", "predictor": True}),
    "zstd": (IMAGE, {"compression": "zstd"}),
    "packbits": (IMAGE, {"compression": "packbits"}),
    "jpeg": (IMAGE, {"compression": "jpeg", "photometric": "ycbcr", "subsampling": (2, 2)}),
    "jpeg-4:4:4": (IMAGE, {"compression": "jpeg", "photometric": "ycbcr", "subsampling": (1, 1)}),
    "jpeg-rgb": (IMAGE, {"compression": "jpeg", "compressionargs": {"outcolorspace": "rgb"}}),
    "planar": (PLANES, {"planarconfig": "separate", "compression": "zlib"}),
    "16-bit": (IMAGE.astype(np.uint16) * 257 - (IMAGE % 97), {}),
    "grey": (GREY_IMAGE, {"photometric": "minisblack"}),
    "inverted": (GREY_IMAGE, {"photometric": "miniswhite"}),
    "grey-16": (GREY_IMAGE.astype(np.uint16) * 257, {"photometric": "minisblack"}),
    "palette": (
        GREY_IMAGE,
        {"photometric": "palette", "colormap": (np.arange(768).reshape(3, 256) * 85 % 65536).astype(np.uint16)},
    ),
    "premultiplied": (
        np.dstack([(IMAGE.astype(int) * IMAGE[..., :1] // 255).astype(np.uint8), IMAGE[..., 0]]),
        {"extrasamples": ["assocalpha"]},
    ),
}


@pytest.mark.parametrize("form", BOTH)
def test_both_readers_of_tiff_show_the_same_pixels(tmp_path: Path, form: str) -> None:
    """Where OpenSlide reads a form too, the other reader's pixels are equal to the bit, opacity included."""
    pixels, options = BOTH[form]
    path = written(tmp_path / "s.tif", pixels, **options)
    parts, opacities = [], []
    for module in (tiff, openslide_file):
        reader = module.open_file(path)
        part = np.empty((90, 120, 3), np.uint8)
        opacities.append(reader.read_into(part, (51, 37), 0))
        parts.append(part)
        reader.close()
    np.testing.assert_array_equal(*parts)
    np.testing.assert_array_equal(*opacities)


def test_opacity_is_that_of_openslide_to_a_grey_level(tmp_path: Path) -> None:
    """OpenSlide multiplies and divides by the opacity, and so rounds twice."""
    path = written(tmp_path / "s.tif", RGBA, extrasamples=["unassalpha"])
    reader, part = tiff.open_file(path), np.empty((HEIGHT, WIDTH, 3), np.uint8)
    np.testing.assert_array_equal(reader.read_into(part, (0, 0), 0), RGBA[..., 3])
    assert np.abs(part.astype(int) - shown(path)).max() <= 1


LOSSLESS: dict[str, dict[str, Any]] = {
    "strips": {"tile": None},
    "strips-lzw": {"tile": None, "compression": "lzw", "predictor": True, "rowsperstrip": 7},
    "strips-zstd": {"tile": None, "compression": "zstd", "rowsperstrip": 16},
    "one-strip": {"tile": None, "compression": "zlib", "rowsperstrip": HEIGHT},
    "big-endian": {"tile": None, "byteorder": ">"},
    "lzma": {"compression": "lzma"},
    "jpeg-2000": {"compression": "jpeg2000"},
    "jpeg-xl": {"compression": "jpegxl"},
    "jpeg-xr": {"compression": "jpegxr"},
    "webp": {"compression": "webp", "compressionargs": {"lossless": True}},
    "png": {"compression": "png"},
    "bigtiff": {"tile": None, "bigtiff": True, "compression": "zlib"},
}


@pytest.mark.parametrize("form", LOSSLESS)
def test_what_openslide_declines_is_read_to_the_bit(tmp_path: Path, form: str) -> None:
    """Strips and the newer compressions give the pixels that were written, wherever a rectangle lies."""
    path = written(tmp_path / "s.tif", **LOSSLESS[form])
    with open_slide(path, slide_id="S") as opened:
        assert (opened.facts.vendor, opened.decoder) == ("tiff", "tifffile")
        np.testing.assert_array_equal(opened.read(51, 37, 0, (120, 90)).rgb, IMAGE[37:127, 51:171])
        beyond = opened.read(-20, 100, 0, (300, 80))
        np.testing.assert_array_equal(beyond.rgb[:50, 20:223], IMAGE[100:])
        assert (beyond.rgb[50:] == 255).all()
        assert beyond.transparent == 0


@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_planes_and_strips(tmp_path: Path, planes: str) -> None:
    """Uncompressed and compressed strips of one sample each are put together."""
    pixels = PLANES if planes == "separate" else IMAGE
    for compression in (None, "zlib"):
        path = written(tmp_path / "s.tif", pixels, tile=None, planarconfig=planes, compression=compression)
        np.testing.assert_array_equal(shown(path), IMAGE)


def test_a_jpeg_in_strips_is_decoded_as_in_its_library(tmp_path: Path) -> None:
    """Its colours are those of the tiled form."""
    path = written(tmp_path / "s.tif", tile=None, photometric="ycbcr", compression="jpeg", rowsperstrip=32)
    np.testing.assert_array_equal(shown(path), tifffile.imread(path))


@pytest.mark.parametrize("rows", [16, 400])
def test_strips_are_decoded_once_for_the_overview(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """A slide in strips is read in bands of whole rows, so that neither time nor memory grow with its width."""
    path = written(tmp_path / "s.tif", tissue(600, 400), tile=None, compression="zlib", rowsperstrip=rows)
    decoded: list[int] = []
    decode = tiff.TiffFile._decoded
    monkeypatch.setattr(tiff.TiffFile, "_decoded", lambda *args: decoded.append(args[2]) or decode(*args))
    monkeypatch.setattr(slide, "_READ_LIMIT_PX", 600 * 64)
    monkeypatch.setattr(tiff, "_KEPT_STRIP_BYTES", 3 * 600 * 70)
    with open_slide(path, slide_id="S") as opened:
        overview = opened.overview(8)
    assert len(decoded) == len(set(decoded)) == -(-400 // rows)
    assert np.abs(overview - tissue(600, 400).reshape(50, 8, 75, 8, 3).mean(axis=(1, 3))).max() <= 1


def test_uncompressed_rows_are_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One uncompressed strip may hold gigabytes; only the rows under a rectangle are read."""
    path = written(tmp_path / "s.tif", tile=None, rowsperstrip=HEIGHT)
    monkeypatch.setattr(tiff, "_ROWS_BYTES", 3 * WIDTH * 10)
    reader = tiff.open_file(path)
    reader.read_into(np.empty((5, 5, 3), np.uint8), (0, 42), 0)
    assert [index for _, _, index in reader._kept] == [4]


def test_an_ome_tiff_has_its_levels_and_pixel_size(tmp_path: Path) -> None:
    """SubIFDs are levels, and PhysicalSizeX in its unit is the pixel size."""
    levels = (IMAGE, IMAGE[::2, ::2], IMAGE[::4, ::4])
    units = {"PhysicalSizeX": 250.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.25e-3, "PhysicalSizeYUnit": "mm"}
    path = ome(tmp_path / "s.ome.tif", *levels, about=units)
    with open_slide(path, slide_id="S") as opened:
        facts = opened.facts
        assert facts.level_sizes_px == ((203, 150), (102, 75), (51, 38))
        assert facts.level_downsamples == (1.0, 2.0, 4.0)
        assert facts.mpp == pytest.approx((0.25, 0.25))
        assert facts.mpp_source == "OME PhysicalSizeX"
        assert facts.notes == ()
        for level, pixels in enumerate(levels):
            np.testing.assert_array_equal(opened.read(0, 0, level, facts.level_sizes_px[level]).rgb, pixels)
        np.testing.assert_array_equal(opened.read_scaled(9, 7, (60, 50), l0_per_px=2.0).rgb, levels[1][7:57, 9:69])


def test_an_ome_tiff_of_one_level_is_openslides(tmp_path: Path) -> None:
    """Its pixels stay as they were; its pixel size is now known."""
    with open_slide(ome(tmp_path / "s.ome.tif", IMAGE), slide_id="S") as opened:
        assert opened.facts.vendor == "generic-tiff"
        assert (opened.facts.mpp, opened.facts.mpp_source) == ((0.25, 0.25), "OME PhysicalSizeX")


CHANNELS: dict[str, tuple[NDArray[Any], dict[str, Any]]] = {
    "unnamed": (PLANES, {}),
    "named": (PLANES, {"Channel": {"Name": ["Red", "Green", "Blue"]}}),
    "other-order": (PLANES[::-1].copy(), {"Channel": {"Name": ["blue", "green", "red"]}}),
    "coloured": (PLANES, {"Channel": {"Color": [-16776961, 16711935, 65535]}}),
    "12-bit": (PLANES.astype(np.uint16) * 16 + 8, {}),
    "12-bit-stated": (PLANES.astype(np.uint16) * 16 + 8, {"SignificantBits": 12}),
}


@pytest.mark.parametrize("form", CHANNELS)
def test_a_page_for_each_channel_is_joined(tmp_path: Path, form: str) -> None:
    """Bio-Formats writes red, green and blue so; OpenSlide would show the first page in grey."""
    pixels, about = CHANNELS[form]
    levels = (pixels, np.ascontiguousarray(pixels[:, ::2, ::2]))
    path = ome(tmp_path / "s.ome.tif", *levels, about={"axes": "CYX"} | about, photometric="minisblack")
    with open_slide(path, slide_id="S") as opened:
        assert opened.facts.notes[0] == "3 pages of one channel each are joined as red, green and blue"
        assert opened.facts.level_downsamples == (1.0, 2.0)
    assert np.abs(shown(path).astype(int) - IMAGE).max() <= (pixels.dtype != np.uint8)
    assert np.abs(shown(path, 1).astype(int) - IMAGE[::2, ::2]).max() <= (pixels.dtype != np.uint8)


def test_pages_without_ome_are_joined_too(tmp_path: Path) -> None:
    """ImageJ and others write three grey pages; the unit of ImageJ's resolution is in its description."""
    plain = written(tmp_path / "plain.tif", PLANES, photometric="minisblack")
    np.testing.assert_array_equal(shown(plain), IMAGE)
    path = tmp_path / "imagej.tif"
    tifffile.imwrite(path, PLANES, imagej=True, resolution=(4, 4), metadata={"unit": "um", "axes": "CYX"})
    np.testing.assert_array_equal(shown(path), IMAGE)
    with open_slide(path, slide_id="S") as opened:
        assert (opened.facts.mpp, opened.facts.mpp_source) == ((0.25, 0.25), "ImageJ's unit and XResolution")


@pytest.mark.parametrize(
    ("pixels", "about", "cause"),
    [
        (PLANES, {"Channel": {"Name": ["DAPI", "FITC", "TRITC"]}}, "3 channels (DAPI, FITC, TRITC) of fluorescence"),
        (PLANES, {"Channel": {"Name": ["CD3", "CD8", "PanCK"]}}, "not called red, green and blue"),
        (PLANES, {"Channel": {"EmissionWavelength": [450, 520, 600]}}, "3 channels of fluorescence"),
        (np.concatenate([PLANES, PLANES[:2]]), {}, "5 channels, which are not red, green and blue"),
        (PLANES[:2], {}, "2 channels, which are not red, green and blue"),
        (PLANES // 8, {}, "3 channels of unknown colour on a dark ground"),
        (PLANES[:1], {"Channel": {"Name": ["DAPI"]}}, "1 channels (DAPI) of fluorescence"),
    ],
    ids=["dyes", "markers", "wavelengths", "five", "two", "dark", "one"],
)
def test_fluorescence_is_refused_in_words(
    tmp_path: Path, pixels: NDArray[Any], about: dict[str, Any], cause: str
) -> None:
    """A model of stained sections would score it without a word."""
    path = ome(tmp_path / "s.ome.tif", pixels, about={"axes": "CYX"} | about, photometric="minisblack")
    assert cause in refused(path)


@pytest.mark.parametrize(("bits", "tile"), [(10, (64, 64)), (12, (64, 64)), (12, None), (14, None), (16, (64, 64))])
def test_the_bits_that_are_used_are_shown(tmp_path: Path, bits: int, tile: tuple[int, int] | None) -> None:
    """12 bits in 16 would be black if the upper 8 were shown; the largest value shows how many are used."""
    most = 2**bits - 1
    deep = ((IMAGE.astype(np.uint32) * most + 127) // 255).astype(np.uint16)
    path = written(tmp_path / "s.tif", deep, tile=tile)
    np.testing.assert_array_equal(shown(path), IMAGE)
    with open_slide(path, slide_id="S") as opened:
        assert opened.facts.notes == (f"samples of {bits} bits are reduced to 8 (value * 255 / {most})",)


@pytest.mark.parametrize("tile", [(64, 64), None])
def test_8_bits_in_16_are_shown_as_they_are(tmp_path: Path, tile: tuple[int, int] | None) -> None:
    """Taken for 16 bits, they would be black; a larger value among them is refused, and not its lower 8 bits shown."""
    path = written(tmp_path / "s.tif", IMAGE.astype(np.uint16), tile=tile)
    np.testing.assert_array_equal(shown(path), IMAGE)
    large = ome(
        tmp_path / "l.ome.tif", IMAGE.astype(np.uint16) * 2, about={"SignificantBits": 8}, tile=tile or (64, 64)
    )
    assert "a sample is 510, but others of the slide have 8 bits" in refused(large)


def test_a_value_above_the_bits_that_were_seen_is_refused(tmp_path: Path) -> None:
    """It would be clipped silently; the largest value can be stated in the file."""
    deep = IMAGE.astype(np.uint16) * 4
    path = written(tmp_path / "s.tif", deep)
    with tifffile.TiffFile(path, mode="r+") as file:
        index = 5
        offset = file.pages.first.dataoffsets[index]
    data = bytearray(path.read_bytes())
    data[offset : offset + 2] = (5000).to_bytes(2, "little")
    stated = tmp_path / "stated.tif"
    path.write_bytes(data)
    tifffile.imwrite(
        stated, deep, tile=(64, 64), photometric="rgb", extratags=[(281, "H", 3, (4095, 4095, 4095), True)]
    )
    with open_slide(stated, slide_id="S") as opened:
        assert "12 bits" in opened.facts.notes[0]
    with open_slide(path, slide_id="S") as opened:
        assert "14 bits" in opened.facts.notes[0] or "10 bits" in opened.facts.notes[0]


def test_a_sample_that_openslide_takes_for_opacity_is_noted(tmp_path: Path) -> None:
    """In strips, such a file is refused; in tiles OpenSlide says what its pixels are."""
    path = written(tmp_path / "s.tif", RGBA, extrasamples=["unspecified"])
    with open_slide(path, slide_id="S") as opened:
        assert opened.facts.notes == ("nothing states what sample 4 of a pixel is: it is taken for opacity",)
        assert opened.read(0, 0, 0, (WIDTH, HEIGHT)).transparent > 0.1


@pytest.mark.parametrize("tile", [(64, 64), None])
def test_pages_of_the_same_size_are_noted(tmp_path: Path, tile: tuple[int, int] | None) -> None:
    """A stack of pictures in colours is one slide: its first plane."""
    path = written(tmp_path / "s.tif", np.stack([IMAGE, 255 - IMAGE]), tile=tile)
    np.testing.assert_array_equal(shown(path), IMAGE)
    with open_slide(path, slide_id="S") as opened:
        assert opened.facts.notes == ("of its 2 planes the first is shown",)


def test_a_grey_slide_is_read_and_noted(tmp_path: Path) -> None:
    """Whoever reads it, the note is the same."""
    for tile in ((64, 64), None):
        path = written(tmp_path / "s.tif", GREY_IMAGE, photometric="minisblack", tile=tile)
        np.testing.assert_array_equal(shown(path), np.repeat(GREY_IMAGE[..., None], 3, axis=2))
        with open_slide(path, slide_id="S") as opened:
            assert opened.facts.notes == (GREY,)


def _png_16(path: Path, pixels: NDArray[Any]) -> None:
    path.write_bytes(imagecodecs.png_encode(pixels))


IMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "png": (".png", lambda path: Image.fromarray(IMAGE).save(path)),
    "palette": (".png", lambda path: Image.fromarray(IMAGE // 64 * 64).quantize(64).save(path)),
    "bmp": (".BMP", lambda path: Image.fromarray(IMAGE).save(path)),
    "webp": (".webp", lambda path: Image.fromarray(IMAGE).save(path, lossless=True)),
    "jpeg-2000": (".jp2", lambda path: Image.fromarray(IMAGE).save(path)),
    "jpeg-xl": (".jxl", lambda path: path.write_bytes(imagecodecs.jpegxl_encode(IMAGE))),
    "16-bit": (".png", lambda path: _png_16(path, IMAGE.astype(np.uint16) * 257)),
    "12-bit": (".png", lambda path: _png_16(path, (IMAGE.astype(np.uint16) * 16 + IMAGE // 16))),
    "grey": (".png", lambda path: Image.fromarray(GREY_IMAGE).save(path)),
    "grey-pgm": (".pgm", lambda path: Image.fromarray(GREY_IMAGE).save(path)),
}


@pytest.mark.parametrize("form", IMAGES)
def test_images_of_a_region_are_slides_of_one_level(tmp_path: Path, form: str) -> None:
    """People have tiles too; their pixel size is given with them."""
    suffix, write = IMAGES[form]
    path = tmp_path / f"region{suffix}"
    write(path)
    expected = {
        "palette": lambda: np.asarray(Image.open(path).convert("RGB")),
        **dict.fromkeys(("grey", "grey-pgm"), lambda: np.repeat(GREY_IMAGE[..., None], 3, axis=2)),
    }.get(form, lambda: IMAGE)()
    with open_slide(path, slide_id="S") as opened:
        assert opened.facts.level_sizes_px == ((WIDTH, HEIGHT),)
        np.testing.assert_array_equal(opened.read(-3, 20, 0, (100, 60)).rgb[:, 3:], expected[20:80, :97])
        assert opened.overview(10).shape == (15, 21, 3)


def test_the_size_of_an_image_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's own limit is that of pictures; ours is that of memory."""
    path = tmp_path / "a.png"
    Image.fromarray(IMAGE).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    np.testing.assert_array_equal(shown(path), IMAGE)
    monkeypatch.setattr(image, "_MOST_PX", 1000)
    assert "203 x 150 px, more than the 1000 that are decoded at once; convert it: vips tiffsave" in refused(path)


def test_a_photograph_is_turned_as_its_header_says(tmp_path: Path) -> None:
    """Viewers show it so, and people give coordinates of what they see."""
    turned = Image.fromarray(IMAGE)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(shown(tmp_path / "a.png"), np.rot90(IMAGE, -1))


def test_the_resolution_of_an_image_is_what_it_states(tmp_path: Path) -> None:
    """Whether it is a microscope's is judged elsewhere."""
    Image.fromarray(IMAGE).save(tmp_path / "a.png", dpi=(25_400, 25_400))
    with open_slide(tmp_path / "a.png", slide_id="S") as opened:
        assert opened.facts.mpp == pytest.approx((1.0, 1.0), rel=1e-3)
        assert opened.facts.mpp_source == "resolution of the PNG"


def _cut(path: Path) -> None:
    written(path, tile=None, compression="zlib", rowsperstrip=16)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


REFUSED: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "float": ("s.tif", lambda path: written(path, IMAGE.astype(np.float32)), "type float32", "vips linear "),
    "32-bit": ("s.tif", lambda path: written(path, IMAGE.astype(np.uint32)), "32-bit samples", "vips linear "),
    "cmyk": (
        "s.tif",
        lambda path: written(path, RGBA, photometric="separated", tile=None),
        "CMYK",
        "vips colourspace ",
    ),
    "lab": ("s.tif", lambda path: written(path, photometric="cielab", tile=None), "CIELab", "vips colourspace "),
    "icc-lab": ("s.tif", lambda path: written(path, photometric="icclab"), "ICCLab", "vips colourspace "),
    "turned": (
        "s.tif",
        lambda path: written(path, tile=None, extratags=[(274, "H", 1, 4, True)]),
        "upside down",
        "vips autorot ",
    ),
    "fourth": (
        "s.tif",
        lambda path: written(path, RGBA, tile=None, extrasamples=["unspecified"]),
        "nothing states what sample 4 of its 4 is",
        "vips extract_band ",
    ),
    "channels": (
        "s.tif",
        lambda path: written(path, np.dstack([IMAGE, IMAGE[..., :2]]), photometric="minisblack", planarconfig="contig"),
        "5 channels",
        "use a slide of a stained section",
    ),
    "cut": ("s.tif", _cut, "ends before its last tile or strip", "copy it again"),
    "cut-head": ("s.tif", lambda path: path.write_bytes(b"II*\0\x08\0\0\0\xff\xff"), "ends early", "copy it again"),
    "cellsens": ("s.vsi", lambda path: written(path, photometric="rgb", tile=None), "Olympus cellSens", "bfconvert "),
    "isyntax": ("s.isyntax", lambda path: path.write_bytes(b"<DataObject>"), "Philips iSyntax", "vendor's program"),
    "zip": ("s.svs", lambda path: path.write_bytes(b"PK\3\4....."), "is a ZIP archive", "name the slide itself"),
    "page": ("s.svs", lambda path: path.write_text("<!DOCTYPE html>"), "is a web page", "name the slide itself"),
    "pointer": ("s.svs", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "Git LFS", "pull"),
    "mirax": ("s.mrxs", lambda path: path.write_text("[GENERAL]"), "the folder s, in which", "copy the folder too"),
    "cmyk-jpeg": ("s.jpg", lambda path: Image.fromarray(RGBA, "CMYK").save(path), "CMYK", "vips colourspace "),
    "frames": (
        "s.gif",
        lambda path: Image.fromarray(IMAGE).save(path, save_all=True, append_images=[Image.fromarray(255 - IMAGE)]),
        "2 frames",
        "vips tiffsave ",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_cannot_be_read_says_why_and_how_it_is_converted(tmp_path: Path, form: str) -> None:
    """To copy a file again helps only where a part of it is missing."""
    name, write, cause, remedy = REFUSED[form]
    write(tmp_path / name)
    message = refused(tmp_path / name)
    assert cause in message
    assert remedy in message
    assert ("copy it again" in message) == form.startswith("cut")


@pytest.mark.skipif(shutil.which("vips") is None, reason="needs libvips (libvips-tools)")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: written(path, (IMAGE / 255).astype(np.float32)),
        lambda path: written(path, IMAGE[::-1, ::-1], tile=None, extratags=[(274, "H", 1, 3, True)]),
        lambda path: written(path, np.dstack([IMAGE, IMAGE[..., :1]]), tile=None, extrasamples=["unspecified"]),
    ],
    ids=["float", "turned", "fourth"],
)
def test_the_command_converts_what_is_not_read(tmp_path: Path, write: Callable[[Path], object]) -> None:
    """The command of the message, run as it stands, writes a slide with the same colours, pixel size and levels."""
    path = tmp_path / "it's one.tif"
    write(path)
    command = re.search("vips .*", refused(path))
    assert command is not None
    subprocess.run(command[0], shell=True, check=True, capture_output=True)
    (converted,) = (each for each in tmp_path.iterdir() if each != path)
    assert np.abs(shown(converted).astype(int) - IMAGE).mean() < 9  # JPEG


def test_one_strip_of_gigabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would have to be in the memory of every worker."""
    path = written(tmp_path / "it's big.tif", tile=None, compression="zlib", rowsperstrip=HEIGHT)
    monkeypatch.setattr(tiff, "_MOST_SEGMENT_BYTES", 1000)
    message = refused(path)
    assert "one compressed strip of 0.0 GiB" in message
    assert """vips tiffsave '""" in message


def test_a_damaged_tile_is_named(tmp_path: Path) -> None:
    """The decoder of JPEG reports nothing by itself; the other tiles can still be read."""
    path = ome(tmp_path / "s.ome.tif", IMAGE, IMAGE[::2, ::2], photometric="ycbcr", compression="jpeg")
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages.first.dataoffsets[5], file.pages.first.databytecounts[5]
    data = bytearray(path.read_bytes())
    data[offset + count // 2 : offset + count // 2 + 2] = b"\xff\xd9"  # the mark of the end
    path.write_bytes(data)
    with open_slide(path, slide_id="S") as opened:
        with pytest.raises(InputError, match=r"slide S.*tile or strip 5 of level 0 is damaged; copy it again"):
            opened.read(64, 64, 0, (64, 64))
        opened.read(0, 0, 0, (64, 64))


@pytest.mark.parametrize("compression", ["zlib", "lzma"])
def test_a_tile_that_is_not_stored_is_background(tmp_path: Path, compression: str) -> None:
    """Its part of a rectangle is returned, whether OpenSlide reads the file or not."""
    path = written(tmp_path / "s.tif", compression=compression)
    with tifffile.TiffFile(path, mode="r+") as file:
        counts = file.pages.first.tags["TileByteCounts"]
        counts.overwrite((0, *counts.value[1:]))
    with open_slide(path, slide_id="S") as opened:
        region = opened.read(32, 0, 0, (64, 64))
        assert region.transparent == pytest.approx(0.5)
        assert (region.rgb[:, :32] == 255).all()
        np.testing.assert_array_equal(region.rgb[:, 32:], IMAGE[:64, 64:96])
        assert opened.read(-64, 64, 0, (128, 64)).transparent == 0
        assert opened.read_scaled(0, 0, (64, 64), l0_per_px=1.5).transparent == pytest.approx((64 / 96) ** 2, abs=0.01)


def test_a_thumbnail_before_the_slide_is_not_the_slide(tmp_path: Path) -> None:
    """The largest page is level 0, and smaller pages of other proportions are no levels."""
    path = tmp_path / "s.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(tissue(40, 40), photometric="rgb", metadata=None)
        writer.write(IMAGE, photometric="rgb", metadata=None, compression="zlib")
        writer.write(IMAGE[::2, ::2], photometric="rgb", metadata=None, compression="zlib", subfiletype=1)
    with open_slide(path, slide_id="S") as opened:
        assert opened.facts.level_sizes_px == ((203, 150), (102, 75))
    np.testing.assert_array_equal(shown(path), IMAGE)


FORMS = st.fixed_dictionaries(
    {
        "compression": st.sampled_from([None, "zlib", "lzw", "zstd", "lzma", "jpeg2000", "jpegxl", "packbits"]),
        "tile": st.one_of(st.none(), st.tuples(*[st.sampled_from([16, 48, 64, 256])] * 2)),
        "predictor": st.booleans(),
        "file": st.fixed_dictionaries({"bigtiff": st.booleans(), "byteorder": st.sampled_from("<>")}),
        "levels": st.integers(1, 3),
        "subifds": st.booleans(),
        "colours": st.sampled_from(["rgb", "planar", "rgba", "grey", "pages", "12-bit"]),
        "um_px": st.one_of(st.none(), st.floats(0.1, 2)),
        "unit": st.sampled_from(["CENTIMETER", "INCH"]),
        "size": st.tuples(st.integers(2, 140), st.integers(2, 140)),
    }
)
RECTANGLES = st.tuples(st.integers(-60, 150), st.integers(-60, 150), st.integers(1, 120), st.integers(1, 120))


@given(form=FORMS, rectangle=RECTANGLES)
@settings(max_examples=60)
def test_random_slides_show_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, form: dict[str, Any], rectangle: tuple[int, int, int, int]
) -> None:
    """Whatever the size, tiles, levels, compression, colours and tags: pixels, places and pixel size are the file's."""
    folder = tmp_path_factory.mktemp("random")
    try:
        _compare(folder / "s.tif", form, rectangle)
    finally:
        shutil.rmtree(folder)


def _stored(image: Pixels, colours: str) -> tuple[NDArray[Any], dict[str, Any], Pixels]:
    """Return an image as it is stored, the options of its form, and as it is shown."""
    grey = np.repeat(image[..., :1], 3, axis=2)
    opaque = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
    deep = ((image.astype(np.uint32) * 4095 + 127) // 255).astype(np.uint16)
    deep[0, 0], shown = 4095, image.copy()
    shown[0, 0] = 255
    planes = np.moveaxis(image, 2, 0).copy()
    return {
        "rgb": (image, {"photometric": "rgb"}, image),
        "planar": (planes, {"photometric": "rgb", "planarconfig": "separate"}, image),
        "rgba": (opaque, {"photometric": "rgb", "extrasamples": ["unassalpha"]}, image),
        "grey": (image[..., 0].copy(), {"photometric": "minisblack"}, grey),
        "pages": (planes, {"photometric": "minisblack"}, image),
        "12-bit": (deep, {"photometric": "rgb"}, shown),
    }[colours]


def _compare(path: Path, form: dict[str, Any], rectangle: tuple[int, int, int, int]) -> None:
    expected = _written_at_random(path, form)
    x, y, cols, rows = rectangle
    with open_slide(path, slide_id="S") as opened:
        facts = opened.facts
        assert facts.l0_size_px == form["size"]
        assert facts.mpp == (pytest.approx((form["um_px"],) * 2, rel=1e-3) if form["um_px"] else None)
        for level, size_px in enumerate(facts.level_sizes_px):
            assert size_px == expected[level].shape[1::-1]
            downsample = facts.level_downsamples[level]
            if opened.decoder != "tifffile" and not downsample.is_integer():
                continue  # OpenSlide blends these
            region = opened.read(round(x * downsample), round(y * downsample), level, (cols, rows))
            np.testing.assert_array_equal(region.rgb, _padded(expected[level], x, y, cols, rows))


def _written_at_random(path: Path, form: dict[str, Any]) -> list[Pixels]:
    """Write a slide of a form, and return what its levels show."""
    images = [tissue(*form["size"])]
    while len(images) < form["levels"] and min(images[-1].shape[:2]) >= 4:
        images.append(np.ascontiguousarray(images[-1][::2, ::2]))
    if form["colours"] == "pages" and not form["subifds"]:
        images = images[:1]  # reduced pages in the main chain would be channels
    always = {name: form[name] for name in ("compression", "tile")} | {"metadata": None}
    always["predictor"] = form["predictor"] and form["compression"] in {"zlib", "lzw", "zstd", "lzma"}
    if form["um_px"]:
        px = (10_000 if form["unit"] == "CENTIMETER" else 25_400) / form["um_px"]
        always |= {"resolution": (px, px), "resolutionunit": form["unit"]}
    # What writes these two takes samples of this machine's byte order alone.
    file = {} if form["compression"] in {"jpeg2000", "jpegxl"} else form["file"]
    expected = []
    with tifffile.TiffWriter(path, **file) as writer:
        for number, image in enumerate(images):
            pixels, options, shown = _stored(image, form["colours"])
            expected.append(shown)
            inside = len(images) - 1 if form["subifds"] and number == 0 and len(images) > 1 else None
            writer.write(pixels, subfiletype=int(number > 0), subifds=inside, **options, **always)
    return expected


def _padded(image: Pixels, x: int, y: int, width: int, height: int) -> Pixels:
    """Return a rectangle of an image in white surroundings, pixel by pixel."""
    rows, cols = np.arange(y, y + height), np.arange(x, x + width)
    inside = ((rows >= 0) & (rows < image.shape[0]))[:, None] & ((cols >= 0) & (cols < image.shape[1]))
    found = image[np.clip(rows, 0, image.shape[0] - 1)][:, np.clip(cols, 0, image.shape[1] - 1)]
    return np.where(inside[..., None], found, 255).astype(np.uint8)


def ome_zarr(path: Path, levels: list[NDArray[Any]], *, version: int = 2, **about: Any) -> Path:
    """Write an OME-Zarr of version 0.4 (Zarr 2) or 0.5 (Zarr 3) with axes c, y and x."""
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(path, mode="w", zarr_format=version)
    datasets = []
    for number, level in enumerate(levels):
        array = group.create_array(str(number), shape=level.shape, chunks=(1, 64, 64), dtype=level.dtype)
        array[:] = level
        scale = {"type": "scale", "scale": [1.0, 0.25 * 2**number, 0.25 * 2**number]}
        datasets.append({"path": str(number), "coordinateTransformations": [scale]})
    axes = [{"name": "c", "type": "channel"}, *({"name": name, "unit": "micrometer"} for name in "yx")]
    attributes = {"multiscales": [{"axes": axes, "datasets": datasets}]} | about
    group.attrs.update(attributes if version == 2 else {"ome": attributes})
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_an_ome_zarr_is_a_slide_in_a_folder(tmp_path: Path, version: int) -> None:
    """Its levels, pixel size and pixels are read, and its hash covers all of its chunks."""
    path = ome_zarr(tmp_path / "s.zarr", [PLANES, PLANES[:, ::2, ::2]], version=version)
    with open_slide(path, slide_id="S") as opened:
        assert opened.facts.level_downsamples == (1.0, 2.0)
        assert (opened.facts.mpp, opened.facts.mpp_source) == ((0.25, 0.25), "OME-Zarr scale")
    np.testing.assert_array_equal(shown(path), IMAGE)
    np.testing.assert_array_equal(shown(path, 1), IMAGE[::2, ::2])
    before = content.sha256(path)
    chunk = max(part for part in (path / "0").rglob("*") if part.is_file() and "json" not in part.name)
    chunk.write_bytes(b"cut short")
    assert content.sha256(path) != before
    with pytest.raises(InputError, match=r"level 0 at .* cannot be decoded"):
        shown(path)


def test_an_ome_zarr_of_12_bits_in_another_order(tmp_path: Path) -> None:
    """Labels name the channels, as in OME-TIFF."""
    deep = PLANES[::-1].astype(np.uint16) * 16 + 8
    labels = {"omero": {"channels": [{"label": name} for name in ("Blue", "Green", "Red")]}}
    path = ome_zarr(tmp_path / "s.ome.zarr", [deep], **labels)
    assert np.abs(shown(path).astype(int) - IMAGE).max() <= 1


def test_an_ome_zarr_with_larger_values_than_its_coarsest_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finest level is asked too; a value that is met later is refused, since 8 of its bits would be shown."""
    named = {"omero": {"channels": [{"label": name} for name in ("Red", "Green", "Blue")]}}
    deep = PLANES.astype(np.uint16) * 257
    path = ome_zarr(tmp_path / "s.zarr", [deep, deep[:, ::2, ::2] // 257], **named)
    np.testing.assert_array_equal(shown(path), IMAGE)
    monkeypatch.setattr(ome_zarr_reader, "_SAMPLED_PX", 1)
    deep[:, (HEIGHT - 1) // 2, (WIDTH - 1) // 2] = 200
    path = ome_zarr(tmp_path / "l.zarr", [deep], **named)
    assert "but others of the slide have 8 bits" in refused(path)


def test_a_folder_that_is_no_ome_zarr_is_refused(tmp_path: Path) -> None:
    """Of other arrays nobody knows what their axes are."""
    (tmp_path / "s.zarr").mkdir()
    assert "the folder is not an image of OME-Zarr" in refused(tmp_path / "s.zarr")
    assert "it has no pixels" in refused(ome_zarr(tmp_path / "e.zarr", [PLANES[:, :0, :0]]))
    path = ome_zarr(tmp_path / "f.zarr", [PLANES], omero={"channels": [{"label": "DAPI"}] * 3})
    assert "of fluorescence" in refused(path)


class _Flat:
    """A reader of slides of one colour, which a test adds to the table."""

    blends, decoder = False, "flat"
    description = Description("flat", ((50, 40),), (1.0,), 0.5, 0.5, "the test")

    def by_rows(self, _level: int) -> bool:
        return False

    def read_into(self, target: Pixels, _l0_corner: tuple[int, int], _level: int) -> None:
        target[:] = 77

    def close(self) -> None:
        pass


def test_a_reader_is_a_file_and_a_line_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is touched to add one."""
    module = ModuleType("wsiflow.slides.readers.flat")
    module.open_file = lambda _path: _Flat()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, Format("flat", only=frozenset({".flat"}))))
    path = tmp_path / "s.flat"
    path.write_bytes(b"7")
    with open_slide(path, slide_id="S") as opened:
        assert (opened.facts.mpp, opened.facts.mpp_source, opened.decoder) == ((0.5, 0.5), "the test", "flat")
        assert (opened.overview(10) == 77).all()


def test_every_real_slide_is_read_or_refused(shared_data: Path) -> None:
    """The good ones open and have an overview; the bad ones are refused in a line."""
    for path in sorted((shared_data / "wsi" / "good").rglob("*")):
        if path.is_file():
            with open_slide(path, slide_id="good") as opened:
                assert opened.overview(64).size
    for path in sorted((shared_data / "wsi" / "bad").iterdir()):
        refused(path)


def test_the_overview_of_a_large_flat_slide_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture of the heatmap is drawn on the overview of the tissue, also if its file is gone."""
    path = written(tmp_path / "s.tif", tissue(2000, 1000), compression="zlib")
    planned: Any = SimpleNamespace(slide_id="S", overview_downsample=4, frame=SimpleNamespace(convention="centred"))
    with open_slide(path, slide_id="S") as opened:
        assert not opened.facts.is_costly(4)
        unkept, downsample = overviews.read_overview(tmp_path, planned, opened, side_px=200)
        assert (unkept.shape, downsample, opened.kept_overview(4)) == ((100, 200, 3), 10, None)
    monkeypatch.setattr(slide, "_COSTLY_PX", 1_000_000)
    with open_slide(path, slide_id="S") as opened:
        overview = opened.overview(4)
        assert opened.kept_overview(4) is overview
        again, downsample = overviews.read_overview(tmp_path, planned, opened, side_px=200)
        assert (again.shape, downsample) == ((84, 167, 3), 12)
    publish.publish_bytes(tmp_path, overviews.name_of("S"), overviews.as_png(overview), "key", {})
    with open_slide(path, slide_id="S") as opened:
        monkeypatch.setattr(opened, "_read_scaled", None)
        kept, _ = overviews.read_overview(tmp_path, planned, opened, side_px=200)
    np.testing.assert_array_equal(kept, again)
