"""Slides: which files open and which are refused, and that every pixel comes from the right place."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.slides import slide
from wsiflow.slides.content import sha256, signature
from wsiflow.slides.readers import openslide_file
from wsiflow.slides.slide import Slide, open_slide

WIDTH, HEIGHT = 333, 250
Pixels = NDArray[np.uint8]


def coded(width: int, height: int) -> Pixels:
    """Return an image whose colours encode the coordinates: red x, green y, blue the higher parts of both."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x % 256, y % 256, x // 256 * 16 + y // 256], axis=2).astype(np.uint8)


def smooth(width: int, height: int) -> Pixels:
    """Return a band-limited texture, like tissue under a microscope."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8)
    return np.array(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def write(path: Path, levels: Sequence[Pixels], um_px: float = 0.25, compression: str = "zlib") -> Path:
    """Write a tiled pyramid with 64-px tiles, level 0 first."""
    with tifffile.TiffWriter(path) as writer:
        for number, level in enumerate(levels):
            writer.write(
                level,
                subfiletype=int(number > 0),
                tile=(64, 64),
                photometric="rgb",
                compression=compression,
                resolution=(1e4 / um_px, 1e4 / um_px),
                resolutionunit="CENTIMETER",
            )
    return path


def halved(image: Pixels) -> Pixels:
    """Return every second pixel, which unlike an average differs from a resampled read."""
    return np.ascontiguousarray(image[::2, ::2])


def padded(image: Pixels, x: int, y: int, width: int, height: int) -> Pixels:
    """Return a rectangle of an image in white surroundings, pixel by pixel."""
    rows, cols = np.arange(y, y + height), np.arange(x, x + width)
    inside = ((rows >= 0) & (rows < image.shape[0]))[:, None] & ((cols >= 0) & (cols < image.shape[1]))
    found = image[np.clip(rows, 0, image.shape[0] - 1)][:, np.clip(cols, 0, image.shape[1] - 1)]
    return np.where(inside[..., None], found, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slide]:
    """Return the path of a coded slide of two levels with downsamples 1 and about 2."""
    image = coded(WIDTH + 1, HEIGHT)
    path = write(tmp_path_factory.mktemp("pyramid") / "coded.tif", [image, halved(image)])
    with open_slide(path, slide_id="coded") as opened:
        yield opened


@pytest.fixture(scope="module")
def texture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slide]:
    """Return the path of a textured slide of one level."""
    path = write(tmp_path_factory.mktemp("texture") / "texture.tif", [smooth(WIDTH, HEIGHT)])
    with open_slide(path, slide_id="texture") as opened:
        yield opened


def test_the_facts_are_the_files(pyramid: Slide) -> None:
    """Format, sizes, scale and background are those of the file."""
    facts = pyramid.facts
    assert facts.vendor == "generic-tiff"
    assert facts.l0_size_px == (WIDTH + 1, HEIGHT)
    assert facts.level_sizes_px == ((334, 250), (167, 125))
    assert facts.level_downsamples == (1.0, 2.0)
    assert facts.mpp == pytest.approx((0.25, 0.25), rel=1e-4)
    assert facts.background_rgb == (255, 255, 255)


rectangles = st.tuples(st.integers(-90, 400), st.integers(-90, 320), st.integers(1, 150), st.integers(1, 150))


@given(rectangle=rectangles)
@settings(deadline=None, max_examples=60)
def test_a_read_is_the_padded_image(pyramid: Slide, rectangle: tuple[int, int, int, int]) -> None:
    """Wherever a level-0 rectangle lies, its pixels are those of the slide, and the rest is background."""
    x, y, width, height = rectangle
    region = pyramid.read(x, y, 0, (width, height))
    np.testing.assert_array_equal(region.rgb, padded(coded(WIDTH + 1, HEIGHT), *rectangle))
    assert region.transparent == 0


@given(rectangle=rectangles)
@settings(deadline=None, max_examples=60)
def test_a_scaled_read_of_a_stored_scale_is_the_level(pyramid: Slide, rectangle: tuple[int, int, int, int]) -> None:
    """At the scale of a level the level's own pixels are returned without blending."""
    x, y, width, height = rectangle
    region = pyramid.read_scaled(x, y, (width, height), l0_per_px=2.0)
    np.testing.assert_array_equal(region.rgb, padded(halved(coded(WIDTH + 1, HEIGHT)), *rectangle))


@given(
    l0_per_px=st.floats(0.4, 5.0),
    x=st.integers(-20, 200),
    y=st.integers(-20, 200),
    size=st.tuples(st.integers(2, 60), st.integers(2, 60)),
    cut=st.floats(0.1, 0.9),
)
@settings(deadline=None, max_examples=100)
def test_neighbouring_scaled_reads_join_without_a_seam(
    texture: Slide, l0_per_px: float, x: int, y: int, size: tuple[int, int], cut: float
) -> None:
    """Two adjacent reads equal one read of both, except for the rounding of the filter's two passes."""
    width, height = size
    left = max(1, int(width * cut))
    whole = texture.read_scaled(x, y, (width, height), l0_per_px=l0_per_px).rgb
    parts = [
        texture.read_scaled(x, y, (left, height), l0_per_px=l0_per_px).rgb,
        texture.read_scaled(x + left, y, (width - left, height), l0_per_px=l0_per_px).rgb,
    ]
    assert np.abs(np.concatenate(parts, axis=1).astype(int) - whole).max() <= 2


def test_a_scaled_read_stays_in_place(pyramid: Slide) -> None:
    """The centre of a resampled pixel shows its level-0 coordinate."""
    l0_per_px = 1.5
    region = pyramid.read_scaled(20, 30, (100, 80), l0_per_px=l0_per_px)
    centre = (np.arange(20, 120) + 0.5) * l0_per_px - 0.5
    np.testing.assert_allclose(region.rgb[40, :, 0], centre, atol=0.51)


def test_enlarging_interpolates(pyramid: Slide) -> None:
    """With less than one level-0 pixel per reading pixel the slide is enlarged around the same place."""
    region = pyramid.read_scaled(100, 100, (60, 40), l0_per_px=0.5)
    assert region.rgb.shape == (40, 60, 3)
    np.testing.assert_allclose(region.rgb[20, :, 0], (np.arange(100, 160) + 0.5) * 0.5 - 0.5, atol=0.51)


def test_a_read_in_halves_is_the_same_read(texture: Slide, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of pixels per read changes the memory, but not the result."""
    whole = texture.read_scaled(-5, -7, (150, 120), l0_per_px=2.2).rgb
    monkeypatch.setattr(slide, "_READ_LIMIT_PX", 500)
    assert np.abs(texture.read_scaled(-5, -7, (150, 120), l0_per_px=2.2).rgb.astype(int) - whole).max() <= 2


def test_the_overview_averages_areas(texture: Slide) -> None:
    """A pixel of the overview is the mean of the pixels it covers, with background outside the slide."""
    overview = texture.overview(8)
    assert overview.shape == (32, 42, 3)
    canvas = padded(smooth(WIDTH, HEIGHT), 0, 0, 42 * 8, 32 * 8)
    mean = canvas.reshape(32, 8, 42, 8, 3).mean(axis=(1, 3))
    assert np.abs(overview - mean).max() <= 1


@pytest.mark.parametrize(
    ("downsample", "expected"),
    [(2, 10), (3, 10), (7.9, 10), (8, 90), (20, 90)],
    ids=["finest", "between", "just-finer", "the-level", "coarser-than-all"],
)
def test_the_overview_never_enlarges_a_level(tmp_path: Path, downsample: float, expected: int) -> None:
    """The coarsest level that is fine enough is used; the levels have different greys to distinguish them."""
    levels = [np.full((256, 512, 3), 10, np.uint8), np.full((32, 64, 3), 90, np.uint8)]
    with open_slide(write(tmp_path / "greys.tif", levels), slide_id="greys") as opened:
        assert opened.overview(downsample)[3, 3].tolist() == [expected] * 3


@pytest.mark.parametrize("sizes", [((999, 751), (500, 376)), ((1400, 1100), (933, 733)), ((1000, 752), (500, 376))])
def test_the_edge_of_a_level_is_that_of_the_slide(tmp_path: Path, sizes: tuple[tuple[int, int], ...]) -> None:
    """Also where the downsample is no integer: neither a level nor what lies between two has white blended in.

    OpenSlide rounds where tiles meet, and bicubic filters overshoot at an edge, also where downsamples are integers.
    """
    levels = [np.full((height, width, 3), 128, np.uint8) for width, height in sizes]
    with open_slide(write(tmp_path / "grey.tif", levels), slide_id="grey") as opened:
        l0_per_level = opened.facts.level_downsamples[1]
        for l0_per_px, most in ((l0_per_level, 1), (2.7, 21)):
            cols, rows = (int(l_px * l0_per_level / l0_per_px) for l_px in opened.facts.level_sizes_px[1])
            for x, y in ((-113, -57), (cols - 200, rows - 150), (cols - 211, -3)):
                rgb = opened.read_scaled(x, y, (300, 260), l0_per_px=l0_per_px).rgb.astype(int)
                on_slide = rgb[max(0, -y) : rows - y, max(0, -x) : cols - x]
                assert np.abs(on_slide - 128).max() <= most
        assert (opened.overview(7.3)[:-1, :-1] == 128).all()


def test_a_broken_tile_spoils_only_reads_of_it(tmp_path: Path) -> None:
    """The error names slide and place; afterwards the other tiles can still be read."""
    path = write(tmp_path / "broken.tif", [smooth(128, 128)], compression="jpeg")
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages.first.dataoffsets[3], tiff.pages.first.databytecounts[3]
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = bytes(count)
    path.write_bytes(data)
    with open_slide(path, slide_id="broken") as opened:
        with pytest.raises(InputError, match=r"slide broken.*level 0 at level-0 \(64, 64\).*copy it again"):
            opened.read(64, 64, 0, (64, 64))
        assert opened.read(0, 0, 0, (64, 64)).rgb.std() > 0


def _missing(path: Path) -> None:
    """Return a path at which there is nothing."""


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (_missing, "does not exist"),
    "folder": (Path.mkdir, "is a folder"),
    "empty": (Path.touch, r"empty \(0 bytes\)"),
    "text": (lambda path: path.write_text("not a slide"), "not a slide in a format that is read, nor an image"),
    "png": (
        lambda path: Image.new("RGB", (9, 9)).save(path, format="PNG"),
        "the file is an ordinary image of another name",
    ),
    "pipe": (os.mkfifo, "not a regular file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_slide_is_refused(tmp_path: Path, kind: str) -> None:
    """Other files with the suffix .svs are refused with the slide, the file, the cause and the remedy."""
    make, cause = REFUSED[kind]
    path = tmp_path / "s.svs"
    make(path)
    with pytest.raises(InputError, match=cause) as caught:
        open_slide(path, slide_id="T1")
    assert "slide T1" in str(caught.value)
    assert str(path) in str(caught.value)
    assert "line" in caught.value.remedy


def test_a_manifest_given_as_a_slide_is_named(tmp_path: Path) -> None:
    """As in ``dataset.path=cases.csv``: no program for slides would read it."""
    path = tmp_path / "my cases.csv"
    path.write_text("slide_id,path\na,a.tif\n")
    with pytest.raises(InputError, match="is a table, not a slide") as caught:
        open_slide(path, slide_id="T1")
    assert f"dataset=manifest dataset.manifest='{path}'" in caught.value.remedy


@pytest.mark.parametrize(("name", "cause"), [("broken.svs", "format"), ("unopenable.tiff", "compression: 52479")])
def test_damaged_real_files_are_refused(shared_data: Path, name: str, cause: str) -> None:
    """Files with a slide's extension that OpenSlide cannot open are refused with its reason."""
    with pytest.raises(InputError, match=cause):
        open_slide(shared_data / "wsi" / "bad" / name, slide_id="bad")


@pytest.mark.parametrize(
    ("name", "vendor", "size"),
    [
        ("CMU-1-Small-Region.svs", "aperio", (2220, 2967)),
        ("CMU-1-Small-Region.generic.jpeg.tiff", "generic-tiff", (2220, 2967)),
        ("multi_frame_jpeg2000_camelyon_challenge_image.dcm", "dicom", (1696, 812)),
        ("test3-DAPI-2-387.ndpi", "hamamatsu", (3968, 4864)),
        ("boxes.tiff", "generic-tiff", (300, 250)),
        ("boxes_dicom/boxes_0.dcm", "dicom", (16, 16)),
    ],
)
def test_real_slides_open(shared_data: Path, name: str, vendor: str, size: tuple[int, int]) -> None:
    """Slides of four vendors open, and their overviews cover them."""
    with open_slide(shared_data / "wsi" / "good" / name, slide_id="good") as opened:
        assert (opened.facts.vendor, opened.facts.l0_size_px) == (vendor, size)
        assert opened.overview(32).shape == (-(-size[1] // 32), -(-size[0] // 32), 3)


def test_an_overview_joins_without_a_seam_on_a_real_slide(shared_data: Path) -> None:
    """On real tissue too, two adjacent reads at another scale equal one read of both."""
    with open_slide(shared_data / "wsi" / "good" / "CMU-1-Small-Region.svs", slide_id="cmu") as opened:
        whole = opened.read_scaled(200, 300, (400, 100), l0_per_px=2.0040).rgb
        parts = [opened.read_scaled(x, 300, (200, 100), l0_per_px=2.0040).rgb for x in (200, 400)]
    assert np.abs(np.concatenate(parts, axis=1).astype(int) - whole).max() <= 1


def test_the_hash_of_one_file_is_that_of_the_file(tmp_path: Path) -> None:
    """``sha256sum`` prints the same hash."""
    path = tmp_path / "a.svs"
    path.write_bytes(b"pixels")
    (tmp_path / "b.svs").write_bytes(b"other")
    assert sha256(path) == hashlib.sha256(b"pixels").hexdigest()


@pytest.mark.parametrize(
    ("main", "companion"),
    [("s.mrxs", "s/Dat_0.dat"), ("a.dcm", "b.dcm"), ("s.vms", "s-1.jpg")],
    ids=["mirax", "dicom", "hamamatsu"],
)
def test_all_files_of_a_slide_count(tmp_path: Path, main: str, companion: str) -> None:
    """A change in a companion file changes hash and signature; an unrelated file changes neither."""
    (tmp_path / "s").mkdir()
    path, other = tmp_path / main, tmp_path / companion
    path.write_text("ImageFile=s-1.jpg")
    other.write_text("1")
    before = sha256(path), signature(path)
    (tmp_path / "unrelated.txt").write_text("2")
    assert (sha256(path), signature(path)) == before
    other.write_text("22")
    assert sha256(path) != before[0]
    assert signature(path) != before[1]


def test_the_signature_changes_with_a_replaced_file(tmp_path: Path) -> None:
    """The same bytes in a new file with the same time are another file."""
    path, copy = tmp_path / "a.svs", tmp_path / "copy"
    for file in (path, copy):
        file.write_bytes(b"pixels")
        os.utime(file, ns=(5, 5))
    before = signature(path)
    assert signature(path) == before
    copy.rename(path)
    assert signature(path) != before


@pytest.mark.parametrize(
    ("size", "expected"),
    [((97280, 220672), (985, 434)), ((61440, 53760), (240, 274))],
    ids=["tumor_026", "tumor_091"],
)
def test_the_reference_thumbnail_has_a_pixel_per_tile(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    """Slides of the published sizes give the thumbnails of their published index."""
    path = tmp_path / "big.tif"
    width, height = size
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        writer.write(
            repeat(b"", -(-width // 4096) * -(-height // 4096)),
            shape=(height, width, 3),
            dtype=np.uint8,
            tile=(4096, 4096),
            photometric="rgb",
            compression="zlib",
        )
        overview = coded(width // 128, height // 128)
        writer.write(overview, subfiletype=1, tile=(256, 256), photometric="rgb", compression="zlib")
    with open_slide(path, slide_id="big") as opened:
        thumbnail = opened.reference_thumbnail()
    assert thumbnail.shape == (*expected, 3)
    np.testing.assert_allclose(thumbnail[5, 10:120, 0], (np.arange(10, 120) + 0.5) * 1.75 - 0.5, atol=0.8)


def test_a_slide_smaller_than_a_tile_has_no_reference_thumbnail(tmp_path: Path) -> None:
    """The message states what the reference geometry needs; there is no division by zero."""
    path = write(tmp_path / "small.tif", [coded(300, 200)])
    with open_slide(path, slide_id="small") as opened, pytest.raises(InputError, match="300 x 200 px, less than one"):
        opened.reference_thumbnail()


def test_an_old_openslide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions with known memory faults and swapped pixel sizes are not used."""
    monkeypatch.setattr(openslide, "__library_version__", "4.0.0")
    with pytest.raises(EnvironmentFault, match=r"4\.0\.0, older than 4\.0\.1"):
        openslide_file.checked_version.__wrapped__()


@pytest.mark.parametrize("names", [("s.mrxs", "s/Data0.dat"), ("1.dcm", "2.dcm"), ("i.vms", "tile.jpg")])
def test_a_missing_file_of_a_slide_is_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    """If it were left out, the hash of the slide would silently not cover it."""
    named, part = (tmp_path / name for name in names)
    named.write_text(part.name)
    part.parent.mkdir(exist_ok=True)
    part.symlink_to("gone")
    for look in (sha256, signature):
        with pytest.raises(InputError, match=rf"{part.name}: the slide's data file is a broken link"):
            look(named)


def test_a_folder_of_a_slide_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user may be able to list it, so the exit code is 30."""
    (tmp_path / "s.mrxs").write_text("[GENERAL]")
    (tmp_path / "s").mkdir()

    def scandir(path: str) -> Iterator[os.DirEntry[str]]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(EnvironmentFault, match=r"/s: the folder cannot be listed \(Permission denied\)"):
        sha256(tmp_path / "s.mrxs")


def test_a_slide_that_may_not_be_read_is_not_called_another_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSlide reports both in the same way, but a file without permission must not look damaged."""
    path = write(tmp_path / "s.tif", [coded(64, 64)])

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    def unsupported(_path: Path) -> None:
        raise openslide.OpenSlideUnsupportedFormatError

    monkeypatch.setattr(openslide, "OpenSlide", unsupported)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(EnvironmentFault, match=r"s\.tif: the slide file cannot be read \(Permission denied\)"):
        open_slide(path, slide_id="s")
