"""Direct decoding gives OpenSlide's pixels to the bit wherever it is used; elsewhere OpenSlide reads."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from wsiflow.errors import InputError
from wsiflow.slides import pyramid, tiff_tiles
from wsiflow.slides.slide import Slide, open_slide

Pixels = NDArray[np.uint8]
WIDTH, HEIGHT = 710, 498


def tissue(width: int = WIDTH, height: int = HEIGHT) -> Pixels:
    """Return a texture with the colours of a stained section and sharp borders on white."""
    random = np.random.default_rng(3)
    noise = random.integers(0, 256, (height // 5 + 2, width // 5 + 2, 3), dtype=np.uint8)
    image = np.array(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
    image[: height // 4, : width // 3] = 255
    return image


def write(path: Path, *levels: Pixels, **options: Any) -> Path:
    """Write a tiled pyramid, by default with JPEG tiles of 128 px, as scanners do."""
    options = {"tile": (128, 128), "photometric": "ycbcr", "subsampling": (2, 2), "compression": "jpeg"} | options
    bigtiff = options.pop("bigtiff", False)
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as writer:
        for number, level in enumerate(levels):
            writer.write(level, subfiletype=int(number > 0), **options)
    return path


def random_rectangles(size_px: tuple[int, int], count: int) -> Iterator[tuple[int, int, int, int]]:
    """Return left, top, width and height in level pixels, some of them partly or fully outside."""
    random = np.random.default_rng(size_px)
    for _ in range(count):
        width, height = (int(side) for side in random.integers(1, 400, 2))
        yield int(random.integers(-width, size_px[0])), int(random.integers(-height, size_px[1])), width, height


def shown_by_openslide(path: Path, level: int, rectangle: tuple[int, int, int, int]) -> Pixels:
    """Return what OpenSlide shows of a rectangle of a level, on white."""
    x, y, width, height = rectangle
    with openslide.OpenSlide(path) as handle:
        downsample = round(handle.level_downsamples[level])
        rgba = np.array(handle.read_region((x * downsample, y * downsample), level, (width, height)))
    return np.where(rgba[..., 3:] == 255, rgba[..., :3], 255).astype(np.uint8)


def assert_shows_openslides_pixels(opened: Slide, level: int, count: int = 12) -> None:
    """Compare random rectangles of a level to the bit."""
    downsample = round(opened.facts.level_downsamples[level])
    for rectangle in random_rectangles(opened.facts.level_sizes_px[level], count):
        x, y, width, height = rectangle
        read = opened.read(x * downsample, y * downsample, level, (width, height))
        np.testing.assert_array_equal(read.rgb, shown_by_openslide(opened.facts.path, level, rectangle))


@contextmanager
def only_openslide(path: Path) -> Iterator[Slide]:
    """Return a slide that is read by OpenSlide only."""
    with open_slide(path, slide_id="T1") as opened:
        opened._reader._verified = dict.fromkeys(range(len(opened.facts.level_sizes_px)))
        yield opened


DIRECT: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": (1, 1)},
    "4:2:2": {"subsampling": (2, 1)},
    "4:2:0": {"subsampling": (2, 2)},
    "4:1:1": {"subsampling": (4, 1)},
    "quality-5": {"compressionargs": {"level": 5}},
    "quality-100": {"compressionargs": {"level": 100}},
    "rgb-jpeg": {"photometric": "rgb", "subsampling": None, "compressionargs": {"outcolorspace": "rgb", "level": 40}},
    "oblong-tiles": {"tile": (64, 192)},
    "bigtiff-240": {"bigtiff": True, "tile": (240, 240)},
    "uncompressed": {"photometric": "rgb", "subsampling": None, "compression": None},
    "deflate": {"photometric": "rgb", "subsampling": None, "compression": "zlib"},
    "deflate-predictor": {"photometric": "rgb", "subsampling": None, "compression": "zlib", "predictor": True},
    "lzw-predictor": {"photometric": "rgb", "subsampling": None, "compression": "lzw", "predictor": True},
}


@pytest.mark.parametrize("form", DIRECT)
def test_every_supported_form_is_decoded_directly_and_equally(tmp_path: Path, form: str) -> None:
    """Each compression, colour space and tile shape gives OpenSlide's pixels on every level, borders included."""
    path = write(tmp_path / "s.tif", tissue(), tissue()[::2, ::2], **DIRECT[form])
    with open_slide(path, slide_id="T1") as opened:
        for level in (0, 1):
            assert_shows_openslides_pixels(opened, level)
        assert opened.decoder == "direct"


def test_our_own_slides_are_decoded_directly(tmp_path: Path) -> None:
    """Synthetic slides are read in the same way as scanned ones, on each level."""
    path = tmp_path / "s.tif"
    pyramid.write_rgb(path, [tissue(1024, 1280)], shape=(1280, 1024), um_px=0.25, quality=80)
    with open_slide(path, slide_id="T1") as opened:
        for level in range(len(opened.facts.level_sizes_px)):
            assert_shows_openslides_pixels(opened, level, count=6)
        assert opened.decoder == "direct"


OTHER: dict[str, tuple[Pixels, dict[str, Any]]] = {
    "packbits": (tissue(), {"photometric": "rgb", "compression": "packbits"}),
    "alpha": (np.dstack([tissue(), tissue()[..., :1]]), {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
    "planar": (np.moveaxis(tissue(), 2, 0).copy(), {"photometric": "rgb", "planarconfig": "separate"}),
    "grey": (tissue()[..., 0].copy(), {"photometric": "minisblack"}),
    "16-bit": (tissue().astype(np.uint16) * 257, {"photometric": "rgb"}),
    "upside-down": (tissue(), {"photometric": "rgb", "extratags": [(274, "H", 1, 4, True)]}),
}


@pytest.mark.parametrize("form", OTHER)
def test_other_forms_are_left_to_openslide(tmp_path: Path, form: str) -> None:
    """Files that cannot be decoded directly are read by OpenSlide, and the slide's ``decoder`` says so."""
    pixels, options = OTHER[form]
    path = write(tmp_path / "s.tif", pixels, **({"subsampling": None, "compression": None} | options))
    with open_slide(path, slide_id="T1") as opened:
        region = opened.read(-9, 30, 0, (333, 222))
        assert opened.decoder == "openslide"
    with only_openslide(path) as expected:
        np.testing.assert_array_equal(region.rgb, expected.read(-9, 30, 0, (333, 222)).rgb)


@pytest.mark.parametrize(
    ("name", "decoder"),
    [
        ("CMU-1-Small-Region.svs", "direct"),
        ("CMU-1-Small-Region.generic.jpeg.tiff", "direct"),
        ("boxes.tiff", "direct"),
        ("test3-DAPI-2-387.ndpi", "openslide"),
        ("multi_frame_jpeg2000_camelyon_challenge_image.dcm", "openslide"),
    ],
)
def test_real_slides_show_openslides_pixels(shared_data: Path, name: str, decoder: str) -> None:
    """Of slides of four vendors the tiled TIFFs are decoded directly, with equal pixels."""
    with open_slide(shared_data / "wsi" / "good" / name, slide_id="good") as opened:
        assert_shows_openslides_pixels(opened, 0, count=10)
        assert opened.decoder == decoder


def test_a_resampled_read_is_the_same_from_either_reader(shared_data: Path) -> None:
    """Scaled reads and overviews resample the same level pixels."""
    path = shared_data / "wsi" / "good" / "CMU-1-Small-Region.svs"
    with open_slide(path, slide_id="good") as opened, only_openslide(path) as expected:
        direct = opened.read_scaled(-20, 300, (500, 400), l0_per_px=2.1)
        np.testing.assert_array_equal(direct.rgb, expected.read_scaled(-20, 300, (500, 400), l0_per_px=2.1).rgb)
        np.testing.assert_array_equal(opened.overview(32), expected.overview(32))
        assert (opened.decoder, expected.decoder) == ("direct", "openslide")


PHILIPS = """<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">
<Attribute Name="PIM_DP_SCANNED_IMAGES"><Array><DataObject ObjectType="DPScannedImage">
<Attribute Name="PIM_DP_IMAGE_TYPE">WSI</Attribute>
<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array>
<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING">"0.00025" "0.00025"</Attribute>
</DataObject>
<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING">"0.0005" "0.0005"</Attribute>
</DataObject></Array></Attribute></DataObject></Array></Attribute></DataObject>"""


def test_a_philips_slide_with_padded_levels_is_decoded_directly(tmp_path: Path) -> None:
    """Levels that are padded to whole tiles, as this vendor's are, have the same place as in OpenSlide."""
    full = np.pad(tissue(), ((0, 14), (0, 58), (0, 0)))
    reduced = np.pad(tissue()[::2, ::2], ((0, 7), (0, 29), (0, 0)))
    path = tmp_path / "s.tif"
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for number, level in enumerate((full, reduced)):
            writer.write(
                level,
                subfiletype=number,
                tile=(128, 128),
                photometric="ycbcr",
                compression="jpeg",
                software="Philips DP v1.0",
                description=PHILIPS if number == 0 else None,
                metadata=None,
            )
    with open_slide(path, slide_id="T1") as opened:
        assert opened.facts.vendor == "philips"
        for level in (0, 1):
            assert_shows_openslides_pixels(opened, level)
        assert opened.decoder == "direct"


@pytest.mark.parametrize("vendor", ["generic-tiff", "aperio"])
def test_missing_tiles_are_those_of_openslide(tmp_path: Path, vendor: str) -> None:
    """They are background, or for one vendor what another level shows, and their fraction is returned."""
    description = "Aperio Image Library v12.0.5\r\n710x498 (128x128) JPEG|MPP = 0.25" if vendor == "aperio" else None
    path = write(tmp_path / "s.tif", tissue(), tissue()[::2, ::2], description=description, metadata=None)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for page, missing in zip(tiff.pages, ({3, 9, 14, 21}, {1, 4}), strict=True):
            counts = page.tags["TileByteCounts"]
            kept = [0 if number in missing else count for number, count in enumerate(counts.value)]
            counts.overwrite(tuple(kept))
    with open_slide(path, slide_id="T1") as opened, only_openslide(path) as expected:
        assert opened.facts.vendor == vendor
        for level in (0, 1):
            for x, y, width, height in random_rectangles(opened.facts.level_sizes_px[level], 20):
                place = (x << level, y << level, level, (width, height))
                direct, shown = opened.read(*place), expected.read(*place)
                np.testing.assert_array_equal(direct.rgb, shown.rgb)
                assert direct.transparent == shown.transparent
        assert opened.decoder == "direct"
        assert opened.read(3 * 128, 0, 0, (128, 128)).transparent == 1


def test_between_two_pixels_of_a_level_openslide_blends(tmp_path: Path) -> None:
    """A read that begins half a level pixel off is OpenSlide's, even if the level is otherwise decoded directly."""
    path = write(tmp_path / "s.tif", tissue(), tissue()[::2, ::2])
    with open_slide(path, slide_id="T1") as opened, only_openslide(path) as expected:
        for l0_x, l0_y in ((101, 40), (40, 101), (40, 40)):
            read = opened.read(l0_x, l0_y, 1, (90, 80)).rgb
            np.testing.assert_array_equal(read, expected.read(l0_x, l0_y, 1, (90, 80)).rgb)
        assert opened.decoder == "direct"


def test_a_level_with_a_fractional_downsample_is_openslides(tmp_path: Path) -> None:
    """If a side was rounded down, level pixels lie between level-0 pixels, and OpenSlide blends them."""
    path = write(tmp_path / "s.tif", tissue()[:497], tissue()[:496:2, ::2])
    with open_slide(path, slide_id="T1") as opened, only_openslide(path) as expected:
        assert not opened.facts.level_downsamples[1].is_integer()
        np.testing.assert_array_equal(
            opened.read_scaled(50, 60, (200, 150), l0_per_px=2.0).rgb,
            expected.read_scaled(50, 60, (200, 150), l0_per_px=2.0).rgb,
        )
        assert opened.decoder == "openslide"


def test_two_pages_of_one_size_are_left_to_openslide(tmp_path: Path) -> None:
    """If a page that is not a level has the size of one, OpenSlide reads the level."""
    path = tmp_path / "s.tif"
    with tifffile.TiffWriter(path) as writer:
        for page in (tissue(), 255 - tissue()):
            writer.write(page, tile=(128, 128), photometric="rgb", compression="zlib", metadata=None)
    with open_slide(path, slide_id="T1") as opened:
        assert_shows_openslides_pixels(opened, 0, count=4)
        assert opened.decoder == "openslide"


def test_a_decoder_that_disagrees_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One different grey level in one channel of a sample, and OpenSlide reads the slide."""
    decoded = imagecodecs.jpeg8_decode

    def brighter(data: bytes, *, out: Pixels, **options: Any) -> None:
        decoded(data, out=out, **options)
        out[..., 0] |= 1

    path = write(tmp_path / "s.tif", tissue())
    monkeypatch.setattr(imagecodecs, "jpeg8_decode", brighter)
    with open_slide(path, slide_id="T1") as opened:
        assert_shows_openslides_pixels(opened, 0, count=4)
        assert opened.decoder == "openslide"


def tiled_level(path: Path) -> tiff_tiles.TiledLevel:
    """Return the index of level 0."""
    tiles = tiff_tiles.open_tiles(path)
    assert tiles is not None
    level = tiles.level((WIDTH, HEIGHT))
    tiles.close()
    assert level is not None
    return level


def probed(level: tiff_tiles.TiledLevel) -> set[tuple[int, int]]:
    """Return column and row of the tiles that the sample rectangles touch."""
    return {
        (col, row)
        for probe in level.probes()
        for col in range(probe.l_x // 128, (probe.l_x + probe.width - 1) // 128 + 1)
        for row in range(probe.l_y // 128, (probe.l_y + probe.height - 1) // 128 + 1)
    }


def test_the_samples_cover_tissue_and_borders(tmp_path: Path) -> None:
    """The samples, about seven tiles, include the tile with most bytes, off the grid, and the last tile."""
    level = tiled_level(write(tmp_path / "s.tif", tissue()))
    richest, probes, touched = int(np.argmax(level.counts)), level.probes(), probed(level)
    assert {(richest % 6, richest // 6), (0, 0), (5, 3)} <= touched
    assert 6 <= len(touched) <= 7
    assert all(probe.l_x + probe.width <= WIDTH and probe.l_y + probe.height <= HEIGHT for probe in probes)
    assert any(probe.l_x % 128 and probe.l_y % 128 for probe in probes)


@pytest.mark.parametrize("size", [(124, 154), (154, 60), (1, 1)])
def test_a_level_smaller_than_half_a_tile_is_probed(tmp_path: Path, size: tuple[int, int]) -> None:
    """The last level of a narrow slide is a partial tile; no sample extends beyond it."""
    path = write(tmp_path / "narrow.tif", tissue(*size), tile=(256, 256))
    tiles = tiff_tiles.open_tiles(path)
    assert tiles is not None
    level = tiles.level(size)
    assert level is not None
    for probe in level.probes():
        assert min(probe.l_x, probe.l_y) >= 0
        assert min(probe.width, probe.height) > 0
        assert probe.l_x + probe.width <= size[0]
        assert probe.l_y + probe.height <= size[1]
    with open_slide(path, slide_id="narrow") as opened:
        assert opened.overview(1).shape == (size[1], size[0], 3)


def test_nothing_is_probed_until_pixels_are_read(tmp_path: Path) -> None:
    """Opening a slide for its metadata opens no second file, and closing it closes all."""
    path = write(tmp_path / "s.tif", tissue())

    def handles() -> int:
        return sum(os.path.realpath(link) == str(path) for link in Path("/proc/self/fd").iterdir())

    opened = open_slide(path, slide_id="T1")
    before = handles()
    assert opened.decoder == "openslide"
    opened.read(0, 0, 0, (9, 9))
    assert (handles(), opened.decoder) == (before + 1, "direct")
    opened.close()
    assert handles() == 0


def test_the_index_of_a_large_slide_is_read_whole(tmp_path: Path) -> None:
    """Of 152,881 tiles only one exists; it is found, and the rest is background."""
    path, side = tmp_path / "s.tif", 391
    tile = imagecodecs.jpeg8_encode(tissue(256, 256), level=80, outcolorspace="ycbcr", subsampling="420")
    blank = (b"" for _ in range(side * side))
    data = (tile if number == side * 200 + 77 else none for number, none in enumerate(blank))
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        writer.write(
            data, shape=(100_000, 100_000, 3), dtype=np.uint8, tile=(256, 256), photometric="ycbcr", compression="jpeg"
        )
    with open_slide(path, slide_id="T1") as opened:
        region = opened.read(77 * 256 - 10, 200 * 256, 0, (100, 90))
        assert region.transparent == pytest.approx(0.1)
        assert opened.read(77 * 256 + 10, 200 * 256 + 5, 0, (100, 90)).transparent == 0
        assert opened.decoder == "direct"
        np.testing.assert_array_equal(region.rgb, shown_by_openslide(path, 0, (77 * 256 - 10, 200 * 256, 100, 90)))


def zeroed(tile: bytearray) -> None:
    """Return data with zeros up to the end, as an interrupted copy leaves them."""
    tile[len(tile) // 2 :] = bytes(len(tile) - len(tile) // 2)


def holed(tile: bytearray) -> None:
    """Return data with a short run of zeros."""
    tile[len(tile) // 2 : len(tile) // 2 + 40] = bytes(40)


def shifted(tile: bytearray) -> None:
    """Return data of which some bytes are lost and the rest has moved up."""
    tile[len(tile) // 2 : -20] = tile[len(tile) // 2 + 20 :]


def mixed(tile: bytearray) -> None:
    """Return data with foreign bytes in the middle."""
    tile[len(tile) // 3 : len(tile) // 3 + 200] = np.random.default_rng(0).bytes(200)


def beheaded(tile: bytearray) -> None:
    """Return data that are not a JPEG."""
    tile[:100] = bytes(100)


def bent(tile: bytearray) -> None:
    """Return data whose header states another height."""
    frame = tile.index(b"\xff\xc0")
    tile[frame + 5 : frame + 7] = (96).to_bytes(2, "big")


@pytest.mark.parametrize("form", ["4:2:0", "4:4:4", "rgb-jpeg"])
@pytest.mark.parametrize("damage", [zeroed, holed, shifted, mixed, beheaded, bent])
def test_damage_is_reported_as_by_openslide(tmp_path: Path, form: str, damage: Callable[[bytearray], None]) -> None:
    """The decoder does not report damage, but the same tiles are refused with the same messages as by OpenSlide."""
    path = write(tmp_path / "s.tif", tissue(), **({"compressionargs": {"level": 40}} | DIRECT[form]))
    level = tiled_level(path)
    unprobed = sorted(set(range(len(level.counts))) - {row * level.across + col for col, row in probed(level)})
    data = bytearray(path.read_bytes())
    for number in unprobed:
        span = slice(int(level.offsets[number]), int(level.offsets[number] + level.counts[number]))
        tile = data[span]
        damage(tile)
        data[span] = tile
    path.write_bytes(data)
    with open_slide(path, slide_id="T1") as opened, only_openslide(path) as expected:
        outcomes = [(outcome(opened, number), outcome(expected, number)) for number in unprobed]
        assert opened.decoder == "direct"
    for direct, shown in outcomes:
        assert type(direct) is type(shown)
        np.testing.assert_array_equal(direct, shown)
    assert any(isinstance(shown, str) for _, shown in outcomes)


def outcome(opened: Slide, number: int) -> Pixels | str:
    """Return the pixels of a tile, or the error about it."""
    try:
        return opened.read(number % 6 * 128, number // 6 * 128, 0, (100, 100)).rgb
    except InputError as error:
        return str(error)


def test_a_file_that_was_cut_is_refused_where_it_is_missing(tmp_path: Path) -> None:
    """Tiles before the end of the file are read; those beyond are errors."""
    path = write(tmp_path / "s.tif", tissue())
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages.first.dataoffsets[16]
    with open_slide(path, slide_id="T1") as opened:
        whole = opened.read(0, 0, 0, (300, 200)).rgb
        os.truncate(path, offset + 100)
        np.testing.assert_array_equal(opened.read(0, 0, 0, (300, 200)).rgb, whole)
        with pytest.raises(InputError, match=r"slide T1.*Short read"):
            opened.read(4 * 128, 2 * 128, 0, (100, 100))


def test_a_child_process_may_read_on(tmp_path: Path) -> None:
    """After a fork both processes read the same pixels from the shared file."""
    path = write(tmp_path / "s.tif", tissue())
    with open_slide(path, slide_id="T1") as opened:
        expected = opened.read(100, 100, 0, (300, 300)).rgb
        child = os.fork()
        same = all(np.array_equal(opened.read(100, 100, 0, (300, 300)).rgb, expected) for _ in range(20))
        if child == 0:
            os._exit(int(not same))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert same


@pytest.mark.parametrize("content", [b"", b"II*\0", b"no TIFF at all", b"II*\0\x08\0\0\0\xff\xff"])
def test_what_is_no_tiff_has_no_tiles(tmp_path: Path, content: bytes) -> None:
    """Any file may be opened; one that is not a TIFF gives None."""
    path = tmp_path / "s.tif"
    path.write_bytes(content)
    assert tiff_tiles.open_tiles(path) is None
