"""Tissue detection on an overview, the selection of tiles, and the reference's tile index."""

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image

from wsiflow.plan import tissue
from wsiflow.plan.geometry import Frame, window_offsets_px
from wsiflow.plan.tissue import TissueParams, select_tiles, tile_coverage, tissue_mask, touching_cells
from wsiflow.slides.slide import open_slide

PARAMS = TissueParams(
    method="hsv_otsu",
    downsample=32,
    min_chroma=8,
    closing_px=0,
    min_object_px=0,
    min_coverage=0.05,
    dilate_tiles=1,
)
PINK, PURPLE, RED, GREEN_INK = (230, 150, 200), (120, 80, 160), (200, 60, 50), (40, 160, 90)


def with_(**settings: object) -> TissueParams:
    """Return the settings of these tests with some replaced."""
    return TissueParams(**(PARAMS.model_dump() | settings))


def blocks(*colours: tuple[int, int, int], background: int = 245, noise: float = 2.0) -> NDArray[np.uint8]:
    """Return a noisy field of 60 rows with a block of 20 x 20 px per colour, every 40 columns from column 10."""
    image = np.full((60, 40 * max(1, len(colours)), 3), background, dtype=np.float64)
    for k, colour in enumerate(colours):
        image[20:40, 40 * k + 10 : 40 * k + 30] = colour
    image += np.random.default_rng(0).normal(0, noise, image.shape)
    return image.clip(0, 255).round().astype(np.uint8)


def found(mask: NDArray[np.bool_]) -> list[float]:
    """Return the fraction of every block that is in a mask, after a check that nothing around them is."""
    inside = np.zeros_like(mask)
    parts = []
    for left in range(10, mask.shape[1], 40):
        inside[20:40, left : left + 20] = True
        parts.append(float(mask[20:40, left : left + 20].mean()))
    assert not mask[~inside].any()
    return parts


@pytest.mark.parametrize("noise", [0.0, 2.0], ids=["flat", "noisy"])
@pytest.mark.parametrize("colour", [PINK, PURPLE, RED], ids=["pink", "purple", "red"])
def test_a_block_of_tissue_is_found_exactly(colour: tuple[int, int, int], noise: float) -> None:
    """This also holds on a flat two-colour image, and where the hue is at the red end of the scale."""
    assert found(tissue_mask(blocks(colour, noise=noise), PARAMS)) == [1.0]


@pytest.mark.parametrize("background", [255, 245, 128, 3, 0])
@pytest.mark.parametrize("noise", [0.0, 1.0], ids=["flat", "noisy"])
def test_a_slide_of_one_grey_has_no_tissue(background: int, noise: float) -> None:
    """White, grey and black slides are empty: noise has saturation and hue, but hardly any colour."""
    assert not tissue_mask(blocks(background=background, noise=noise), PARAMS).any()


def test_all_tissue_colours_together_are_found() -> None:
    """Pink, purple and red next to each other are all tissue; no hue threshold separates them."""
    assert found(tissue_mask(blocks(PINK, PURPLE, RED), PARAMS)) == [1.0, 1.0, 1.0]


def test_ink_is_distinguished_from_tissue_by_its_hue() -> None:
    """Green ink is removed by its hue, and kept by the method that ignores hue."""
    image = blocks(PURPLE, GREEN_INK)
    assert found(tissue_mask(image, PARAMS)) == [1.0, 0.0]
    assert found(tissue_mask(image, with_(method="saturation"))) == [1.0, 1.0]


def test_violet_tissue_on_bluish_glass_is_whole() -> None:
    """If the glass has the hue of the tissue, the reference splits the tissue; this method does not."""
    image = np.full((60, 60, 3), (226, 224, 234), np.uint8)
    image[10:50, 10:30], image[10:50, 30:50] = (96, 60, 160), (190, 110, 190)
    noise = np.random.default_rng(0).integers(-2, 3, image.shape)
    image = (image + noise).astype(np.uint8)
    assert not tissue.reference_mask(image)[10:50, 10:30].any()
    mask = tissue_mask(image, PARAMS)
    assert mask[10:50, 10:50].all()
    assert mask.sum() == 40 * 40


def test_the_whole_slide_can_be_selected() -> None:
    """``all`` ignores the pixels."""
    assert tissue_mask(blocks(PINK), with_(method="all")).all()


def test_specks_go_and_gaps_close() -> None:
    """Pieces below the minimum area are removed; gaps up to twice the radius are closed."""
    image = blocks(PURPLE, noise=0)
    image[5, 5:8] = PURPLE
    image[30, 10:30] = 245
    mask = tissue_mask(image, with_(min_object_px=4, closing_px=2))
    assert mask.sum() == 20 * 20
    assert not mask[5].any()


@given(
    mask=hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)),
    ratio=st.floats(0.3, 9),
    downsample=st.sampled_from([1.0, 4.016, 32.0]),
)
@example(mask=np.ones((3, 6), np.bool_), ratio=0.99999, downsample=4.016)
def test_coverage_conserves_the_area(mask: NDArray[np.bool_], ratio: float, downsample: float) -> None:
    """For any ratio of tile to mask pixel, the areas in the tiles add up to that of the tissue."""
    grid = tuple(int(np.ceil(extent / ratio)) for extent in mask.shape)
    coverage = tile_coverage(mask, downsample=downsample, tile_l0_px=ratio * downsample, grid=(grid[0], grid[1]))
    sides = [np.diff(np.minimum(np.arange(cells + 1) * ratio, n)) for cells, n in zip(grid, mask.shape, strict=True)]
    assert (coverage * np.outer(*sides)).sum() == pytest.approx(mask.sum(), abs=1e-3)
    assert coverage.min() >= 0
    assert coverage.max() <= 1


def test_coverage_of_a_fractional_tile() -> None:
    """Tiles of 2.5 mask pixels share the pixel between them by area."""
    mask = np.array([[1, 1, 0, 0, 1]] * 5, dtype=np.bool_)
    coverage = tile_coverage(mask, downsample=32, tile_l0_px=80, grid=(2, 2))
    np.testing.assert_allclose(coverage, [[0.8, 0.4]] * 2)


def test_coverage_at_the_edge_counts_what_is_on_the_slide() -> None:
    """A tile half outside is fully covered by tissue up to the border; a tile outside has no coverage."""
    coverage = tile_coverage(np.ones((3, 3), np.bool_), downsample=1, tile_l0_px=2, grid=(3, 3))
    np.testing.assert_array_equal(coverage, [[1, 1, 0], [1, 1, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("dilate_tiles", "expected"),
    [
        (0, ["....", ".#..", "....", "...."]),
        (1, ["###.", "###.", "###.", "...."]),
        (2, ["####", "####", "####", "####"]),
    ],
)
def test_selection_grows_to_the_neighbours_and_stays_on_the_grid(dilate_tiles: int, expected: list[str]) -> None:
    """Each step adds the eight neighbours of every selected tile."""
    coverage = np.zeros((4, 4))
    coverage[1, 1], coverage[3, 3] = 0.05, 0.049
    chosen = select_tiles(coverage, with_(dilate_tiles=dilate_tiles))
    assert ["".join(".#"[cell] for cell in row.astype(int)) for row in chosen] == expected


def test_glass_is_never_selected() -> None:
    """A tile without tissue is not selected even if the minimum coverage is 0."""
    assert not select_tiles(np.zeros((3, 3)), with_(min_coverage=0)).any()


@pytest.mark.parametrize(
    ("shape", "box", "vector"),
    [
        ((985, 434), (42, 424, 57, 927), [985, 434, 3, 42, 424, 57, 927, 871, 383]),
        ((240, 274), (46, 274, 30, 240), [240, 274, 3, 46, 274, 30, 240, 210, 228]),
        ((10, 12), (0, 0, 0, 0), [10, 12, 3, 0, 0, 0, 0, 0, 0]),
    ],
    ids=["tumor_026", "tumor_091-clipped-at-the-end", "no-tissue"],
)
def test_the_reference_vector(shape: tuple[int, int], box: tuple[int, int, int, int], vector: list[int]) -> None:
    """The rectangle has one row and one column more than the box, unless the thumbnail ends there."""
    assert tissue.reference_vector(shape, box).tolist() == vector


def test_the_reference_index_of_a_published_slide(shared_data: Path) -> None:
    """The mask of tumor_091 gives its published table, tile for tile."""
    with (shared_data / "camelyon16" / "tables" / "tumor_091_tiles_dldp.csv").open() as stream:
        table = np.array([[int(row[name]) for name in row] for row in csv.DictReader(stream)])
    mask = np.zeros((240, 274), np.bool_)
    mask[table[:, 0], table[:, 1]] = table[:, 2] > 0
    index = tissue.reference_index_of(mask)
    assert index.vector.tolist() == [240, 274, 3, 46, 274, 30, 240, 210, 228]
    assert len(index.tile_rows_cols) == 47_880
    np.testing.assert_array_equal(index.tile_rows_cols, table[:, :2])
    np.testing.assert_array_equal(index.is_tissue, table[:, 2] > 0)
    assert index.is_tissue.sum() == 5_759
    assert index.tile_rows_cols[[0, -1]].tolist() == [[30, 46], [239, 273]]
    assert index.tile_rows_cols[index.is_tissue][:3].tolist() == [[30, 149], [31, 148], [31, 149]]


def small_slide(noise: float) -> NDArray[np.uint8]:
    """Return a white thumbnail of 10 x 12 pixels with a pink block of 3 x 4."""
    image = np.full((10, 12, 3), 245.0)
    image[3:6, 4:8] = PINK
    return np.clip(image + np.random.default_rng(0).normal(0, noise, image.shape), 0, 255).astype(np.uint8)


def test_the_reference_on_a_small_noisy_slide() -> None:
    """With sensor noise the thresholds are 85 and 16, and the block is detected."""
    thumbnail = small_slide(noise=3)
    index = tissue.reference_index(thumbnail)
    assert tissue.reference_thresholds(thumbnail) == (85, 16)
    assert index.vector.tolist() == [10, 12, 3, 4, 8, 3, 6, 4, 5]
    assert (index.is_tissue.sum(), index.is_tissue.size) == (12, 20)


def test_the_reference_takes_a_flat_slide_whole() -> None:
    """On a flat slide the reference's thresholds are 0 and inclusive, so all 120 pixels are tissue."""
    thumbnail = small_slide(noise=0)
    assert tissue.reference_thresholds(thumbnail) == (0, 0)
    assert tissue.reference_mask(thumbnail).all()
    mask = tissue_mask(thumbnail, PARAMS)
    assert mask[3:6, 4:8].all()
    assert mask.sum() == 12


def test_the_reference_index_without_tissue_lists_nothing() -> None:
    """In cases where the reference crashes, the index is empty."""
    index = tissue.reference_index_of(np.zeros((4, 5), np.bool_))
    assert index.vector.tolist() == [4, 5, 3, 0, 0, 0, 0, 0, 0]
    assert index.tile_rows_cols.shape == (0, 2)
    assert index.is_tissue.size == 0


def test_real_overviews_have_a_plausible_share_of_tissue(shared_data: Path) -> None:
    """All but a few overviews have 0.5 to 60 % tissue; the Radboud slides have as much as their outlines."""
    paths = sorted((shared_data / "camelyon16" / "thumbnails_128").glob("*.jpg"))
    overviews = [np.array(Image.open(path).convert("RGB")) for path in paths]
    shares = np.array([tissue_mask(overview, PARAMS).mean() for overview in overviews])
    assert len(shares) == 156
    assert shares.max() < 0.6
    assert (shares < 0.005).sum() <= 2
    with (shared_data / "camelyon16" / "tables" / "tissue_normal_geometry.csv").open() as stream:
        areas_mm2 = [float(row["tissue_area_mm2"]) for row in csv.DictReader(stream) if row["center"] == "0"]
    narrow = np.array([overview.shape[1] <= 60 for overview in overviews])
    slide_mm2 = 97_280 * 220_672 * 0.000243**2
    assert np.median(shares[narrow]) == pytest.approx(np.median(areas_mm2) / slide_mm2, rel=0.15)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("multi_frame_jpeg2000_camelyon_challenge_image.dcm", 0.25, 0.4),
        ("CMU-1-Small-Region.svs", 0.3, 0.45),
        ("test3-DAPI-2-387.ndpi", 0.0, 0.9),
    ],
    ids=["lymph-node", "skin", "fluorescence"],
)
@pytest.mark.parametrize("downsample", [2, 8])
def test_real_slides_have_the_tissue_one_sees(
    shared_data: Path, name: str, least: float, most: float, downsample: int
) -> None:
    """On real slides the tissue is as large as a viewer sees it, at any scale, and a dark slide has some."""
    with open_slide(shared_data / "wsi" / "good" / name, slide_id="real") as opened:
        share = tissue_mask(opened.overview(downsample), with_(closing_px=2, min_object_px=16)).mean()
    assert least < share < most


@given(
    mask=hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=40)),
    tiles=hnp.arrays(bool, (3, 4)),
    stride=st.sampled_from([16, 32, 56, 224]),
    downsample=st.sampled_from([16.0, 32.0, 50.0]),
    l0_per_px=st.sampled_from([1.0, 1.25]),
)
def test_windows_that_touch_tissue_are_scored_and_no_others(
    mask: NDArray[np.bool_], tiles: NDArray[np.bool_], stride: int, downsample: float, l0_per_px: float
) -> None:
    """Every window of the selected tiles that holds any part of a pixel of tissue is scored, as a loop finds them."""
    frame = Frame("centred", 896, 672, l0_per_px, 0.25, 224, 224, stride, 104, 1, 1, 0, 0, 4, 3)
    side = 224 * l0_per_px / downsample
    expected = [
        [
            mask[
                max(0, int(np.floor(y))) : int(np.ceil(y + side)), max(0, int(np.floor(x))) : int(np.ceil(x + side))
            ].any()
            for x, y in (window_offsets_px(frame) + np.array([224 * col, 224 * row])) * (l0_per_px / downsample)
        ]
        for row, col in np.argwhere(tiles).tolist()
    ]
    found = touching_cells(mask, tiles, frame, downsample=downsample)
    assert [each.ravel().tolist() for each in found] == expected


def test_windows_are_recorded_where_not_all_are_scored() -> None:
    """Settings of folders of earlier versions, which scored all windows, are what they were."""
    assert "windows" not in PARAMS.model_dump()
    assert with_(windows="touching").model_dump(mode="json")["windows"] == "touching"
