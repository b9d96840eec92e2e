"""Pyramidal TIFF files can be read by every reader that the project names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from worked_examples import write_mask

from wsiflow.errors import InputError
from wsiflow.heatmap import files
from wsiflow.slides import pyramid


def heatmap(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Return random probabilities with a border that is not tissue."""
    heat = np.random.default_rng(seed).random((rows, cols)).astype(np.float32)
    heat[: rows // 4] = np.nan
    return heat


def gradient(rows: int, cols: int) -> np.ndarray:
    """Return a smooth colour image, which JPEG hardly changes."""
    y, x = np.mgrid[:rows, :cols]
    return np.stack([x * 255 // cols, y * 255 // rows, (x + y) * 255 // (rows + cols)], axis=-1).astype(np.uint8)


def test_heatmap_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """Values, NaN and the description are unchanged after writing and reading."""
    heat, about = heatmap(300, 517), {"stride_px": 16, "origin": [8.0, 8.0], "slide_id": "é"}
    files.write_heatmap(tmp_path / "a.tif", heat, um_px=3.888, description=about)
    back, found = files.read_heatmap(tmp_path / "a.tif")
    np.testing.assert_array_equal(back, heat)
    assert found == about


def test_heatmap_levels_are_reduced_pages_of_largest_values(tmp_path: Path) -> None:
    """Level 1 is a tiled page marked as reduced, and keeps the peak of every 2 x 2 cell with tissue."""
    heat = heatmap(301, 518)
    files.write_heatmap(tmp_path / "a.tif", heat, um_px=3.888, description={})
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert [page.shape for page in tiff.pages] == [(301, 518), (151, 259), (76, 130)]
        pages = [page.aspage() for page in tiff.pages]
        assert [page.subfiletype for page in pages] == [0, 1, 1]
        assert all(page.is_tiled and page.dtype == np.float32 for page in pages)
        level = tiff.pages[1].asarray()
    assert level[100, 50] == heat[200:202, 100:102].max()
    assert np.isnan(level[0, 0])
    assert level[37, 0] == heat[75, :2].max(), "a half-known cell has the value of its known half"
    assert level[150, 3] == heat[300, 6:8].max(), "the odd last row is kept"


def test_heatmap_opens_in_openslide_with_levels_and_spacing(tmp_path: Path) -> None:
    """OpenSlide recognises the float32 file, although it cannot render it."""
    files.write_heatmap(tmp_path / "a.tif", heatmap(300, 600), um_px=3.888, description={})
    with openslide.OpenSlide(tmp_path / "a.tif") as slide:
        assert slide.level_dimensions == ((600, 300), (300, 150), (150, 75))
        assert float(slide.properties["tiff.XResolution"]) == pytest.approx(10_000 / 3.888)


def test_preview_is_rendered_by_openslide(tmp_path: Path) -> None:
    """Every pixel from OpenSlide is the probability on the scale stated in the file, and 0 outside tissue."""
    heat = heatmap(300, 600)
    files.write_preview(tmp_path / "a.tif", heat, um_px=3.888)
    with openslide.OpenSlide(tmp_path / "a.tif") as slide:
        assert slide.level_count == 3
        seen = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., 0].astype(np.float64)
    np.testing.assert_array_equal(seen == 0, np.isnan(heat))
    assert np.nanmax(np.abs((seen - 1) / 254 - heat)[~np.isnan(heat)]) <= 0.5 / 254 + 1e-6


@pytest.mark.parametrize("kind", ["heatmap", "preview", "mask", "rgb"])
def test_same_arguments_same_bytes(tmp_path: Path, kind: str) -> None:
    """A file contains no time, version or address."""
    heat = heatmap(280, 300)
    for name in ("a.tif", "b.tif"):
        if kind == "heatmap":
            files.write_heatmap(tmp_path / name, heat, um_px=1, description={"b": 1, "a": 2})
        elif kind == "preview":
            files.write_preview(tmp_path / name, heat, um_px=1)
        elif kind == "mask":
            write_mask(tmp_path / name, heat > 0.5, um_px=1)
        else:
            pyramid.write_rgb(tmp_path / name, [gradient(280, 300)], shape=(280, 300), um_px=1, quality=90)
    first = (tmp_path / "a.tif").read_bytes()
    assert first == (tmp_path / "b.tif").read_bytes()
    assert b"DateTime" not in first


@pytest.mark.parametrize("text", ["", "no json"])
def test_other_tiff_is_no_heatmap(tmp_path: Path, text: str) -> None:
    """A TIFF that wsiflow did not write is refused with the reason."""
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 4), np.float32), description=text, metadata=None)
    with pytest.raises(InputError, match="not a readable heatmap"):
        files.read_heatmap(tmp_path / "a.tif")


def test_eight_bit_heatmap_is_refused(tmp_path: Path) -> None:
    """A preview is not mistaken for the data."""
    files.write_preview(tmp_path / "a.tif", heatmap(10, 10), um_px=1)
    with pytest.raises(InputError, match="uint8"):
        files.read_heatmap(tmp_path / "a.tif")


def test_slide_opens_in_openslide_with_all_levels_and_spacing(tmp_path: Path) -> None:
    """Levels, spacing and pixels of a slide that was written in bands are correct."""
    image = gradient(1100, 1501)
    pyramid.write_rgb(
        tmp_path / "a.tif", [image[:300], image[300:307], image[307:]], shape=(1100, 1501), um_px=0.243, quality=95
    )
    with openslide.OpenSlide(tmp_path / "a.tif") as slide:
        assert slide.level_dimensions == ((1501, 1100), (750, 550), (375, 275), (187, 137))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.243, abs=1e-9)
        for level, (cols, rows) in enumerate(slide.level_dimensions):
            seen = np.asarray(slide.read_region((0, 0), level, (cols, rows)))[..., :3].astype(int)
            step = 2**level
            expected = image[: rows * step, : cols * step].reshape(rows, step, cols, step, 3).mean(axis=(1, 3))
            assert np.abs(seen - expected).max() <= 12
            assert np.abs(seen - expected).mean() <= 1.5


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 1100), cols=st.integers(1, 1100))
def test_slide_of_any_size_is_whole(tmp_path_factory: pytest.TempPathFactory, rows: int, cols: int) -> None:
    """Every level of a slide of any size is complete to its last pixel."""
    path = tmp_path_factory.mktemp("size") / "a.tif"
    pyramid.write_rgb(path, [np.full((rows, cols, 3), 99, np.uint8)], shape=(rows, cols), um_px=1, quality=90)
    with tifffile.TiffFile(path) as tiff:
        assert [page.shape[:2] for page in tiff.pages] == [(rows >> k, cols >> k) for k in range(len(tiff.pages))]
        assert all(np.all(np.abs(page.asarray().astype(int) - 99) <= 2) for page in tiff.pages)


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 599), max_size=6, unique=True))
def test_bands_may_be_cut_anywhere(tmp_path_factory: pytest.TempPathFactory, cuts: list[int]) -> None:
    """The file depends on the pixels, not on their division into bands."""
    folder, image = tmp_path_factory.mktemp("bands"), gradient(600, 310)
    pyramid.write_rgb(folder / "whole.tif", [image], shape=(600, 310), um_px=1, quality=80)
    pyramid.write_rgb(folder / "cut.tif", np.split(image, sorted(cuts)), shape=(600, 310), um_px=1, quality=80)
    assert (folder / "whole.tif").read_bytes() == (folder / "cut.tif").read_bytes()


@pytest.mark.parametrize(("shape", "reason"), [((600, 300), "310 px wide"), ((599, 310), "600 rows")])
def test_bands_must_fill_the_slide(tmp_path: Path, shape: tuple[int, int], reason: str) -> None:
    """Too few or too many pixels are an error, and not cropped or filled."""
    with pytest.raises(InputError, match=reason):
        pyramid.write_rgb(tmp_path / "a.tif", [gradient(600, 310)], shape=shape, um_px=1, quality=80)


@pytest.mark.parametrize("downsample", [1, 2, 4])
def test_stored_mask_level_is_returned_as_it_is(tmp_path: Path, downsample: int) -> None:
    """A level of the file is returned where there is one."""
    mask = np.zeros((801, 643), bool)
    mask[100:300, 50:600] = True
    write_mask(tmp_path / "m.tif", mask, um_px=0.243)
    np.testing.assert_array_equal(
        pyramid.read_level(tmp_path / "m.tif", downsample), np.where(mask, 255, 0)[::downsample, ::downsample]
    )


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_missing_level_is_subsampled(tmp_path: Path, suffix: str) -> None:
    """From one level, the centre pixel of each cell is taken, and the incomplete last cell is kept."""
    mask = np.random.default_rng(3).integers(0, 2, (67, 100)).astype(np.uint8)
    path = tmp_path / f"m{suffix}"
    Image.fromarray(mask).save(path) if suffix == ".png" else tifffile.imwrite(path, mask)
    level = pyramid.read_level(path, 32)
    assert level.shape == (3, 4)
    np.testing.assert_array_equal(level[:2, :3], mask[16::32, 16::32][:2, :3])


@pytest.mark.parametrize(
    "stored",
    [
        {},
        {"tile": (32, 16), "compression": "zlib", "predictor": True},
        {"rowsperstrip": 7, "compression": "lzw"},
        {"tile": (16, 16), "bigtiff": True, "photometric": "rgb"},
        {"tile": (16, 16), "photometric": "rgb", "planarconfig": "separate"},
        {"dtype": bool, "rowsperstrip": 5},
    ],
)
@pytest.mark.parametrize("downsample", [1, 3, 32])
def test_a_mask_without_levels_is_read_tile_by_tile(tmp_path: Path, stored: dict[str, Any], downsample: int) -> None:
    """In any storage, the pixels equal those picked from the whole mask, which need not fit into memory."""
    stored = dict(stored)
    dtype = stored.pop("dtype", np.uint8)
    whole = np.random.default_rng(5).integers(0, 256 if dtype is np.uint8 else 2, (101, 67)).astype(dtype)
    image = whole
    if "photometric" in stored:
        image = np.stack([whole] * 3, axis=0 if "planarconfig" in stored else -1)
    tifffile.imwrite(tmp_path / "m.tif", image, **stored)
    rows, cols = (
        np.minimum(np.arange(downsample // 2, side + downsample // 2, downsample), side - 1) for side in (101, 67)
    )
    np.testing.assert_array_equal(pyramid.read_level(tmp_path / "m.tif", downsample), whole[np.ix_(rows, cols)])


def test_a_mask_in_colours_is_refused(tmp_path: Path) -> None:
    """What is painted in green or blue would be lost without notice; three equal channels say the same as one."""
    image = gradient(40, 40)
    tifffile.imwrite(tmp_path / "m.tif", image, photometric="rgb")
    np.testing.assert_array_equal(pyramid.read_level(tmp_path / "m.tif", 1), image[..., 0])  # of a slide
    with pytest.raises(InputError, match=r"m\.tif.* colours, .*give a mask of one channel"):
        pyramid.read_level(tmp_path / "m.tif", 1, coloured=False)
    tifffile.imwrite(tmp_path / "grey.tif", image[..., :1].repeat(3, axis=2), photometric="rgb")
    np.testing.assert_array_equal(pyramid.read_level(tmp_path / "grey.tif", 1, coloured=False), image[..., 0])


@pytest.mark.parametrize("content", [b"", b"no image at all"])
@pytest.mark.parametrize("name", ["m.tif", "m.png"])
def test_unreadable_mask_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    """An empty or foreign file is refused with its path."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        pyramid.read_level(tmp_path / name, 32)


def test_damaged_mask_is_named(tmp_path: Path) -> None:
    """Inverted bytes in a compressed tile are an input error, and do not crash the decoder."""
    write_mask(tmp_path / "m.tif", heatmap(600, 600) > 0.5, um_px=1)
    content = (tmp_path / "m.tif").read_bytes()
    middle = len(content) // 2
    (tmp_path / "m.tif").write_bytes(content[:middle] + b"\xff" * 64 + content[middle + 64 :])
    with pytest.raises(InputError, match=r"m\.tif"):
        pyramid.read_level(tmp_path / "m.tif", 1)


def test_sixteen_bit_mask_is_refused(tmp_path: Path) -> None:
    """Masks with more than 8 bits are refused, and not truncated."""
    tifffile.imwrite(tmp_path / "m.tif", np.zeros((8, 8), np.uint16))
    with pytest.raises(InputError, match="uint16"):
        pyramid.read_level(tmp_path / "m.tif", 1)


def test_preview_says_its_scale(tmp_path: Path) -> None:
    """The file states the meaning of the grey values."""
    files.write_preview(tmp_path / "a.tif", heatmap(10, 10), um_px=1)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert json.loads(tiff.pages.first.description)["0"] == "not tissue"


@given(st.integers(1, 700), st.integers(1, 600), st.data())
@settings(max_examples=15, deadline=None)
def test_any_rows_of_a_heatmap_are_read_alone(
    tmp_path_factory: pytest.TempPathFactory, rows: int, cols: int, data: st.DataObject
) -> None:
    """A range of rows equals that of the whole map, wherever it begins and ends."""
    path = tmp_path_factory.mktemp("rows") / "h.tif"
    heat = np.random.default_rng(0).random((rows, cols), dtype=np.float32)
    heat[heat < 0.2] = np.nan
    files.write_heatmap(path, heat, um_px=1.0, description={"frame": {}})
    first = data.draw(st.integers(0, rows - 1))
    end = data.draw(st.integers(first + 1, rows))
    with files.open_heatmap(path) as opened:
        assert opened.shape == (rows, cols)
        assert opened.description == {"frame": {}}
        assert np.array_equal(opened.rows(first, end), heat[first:end], equal_nan=True)


def test_what_is_no_heatmap_is_not_opened(tmp_path: Path) -> None:
    """A mask and a text file are refused."""
    write_mask(tmp_path / "m.tif", np.ones((300, 300), bool), um_px=1.0)
    (tmp_path / "t.tif").write_text("no image")
    for name, cause in (("m.tif", "float32 of rows x cols"), ("t.tif", "not a readable heatmap")):
        with pytest.raises(InputError, match=cause), files.open_heatmap(tmp_path / name):
            pass
