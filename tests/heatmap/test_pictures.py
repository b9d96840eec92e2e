"""Outlines cover exactly the mask, and overlays show every score at its place."""

import io
import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from wsiflow.heatmap import overlay
from wsiflow.plan import outline

masks = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9))


def features(mask: NDArray[np.bool_], downsample: float = 1, offset: tuple[float, float] = (0, 0)) -> list[Any]:
    """Return the features of a mask's GeoJSON."""
    found: list[Any] = json.loads(outline.tissue_geojson(mask, downsample=downsample, offset=offset))["features"]
    return found


def picture(png: bytes) -> NDArray[np.uint8]:
    """Return the pixels of a PNG."""
    return np.asarray(Image.open(io.BytesIO(png)))


def signed_area(ring: list[list[float]]) -> float:
    """Return the shoelace area of a closed ring."""
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in itertools.pairwise(ring)) / 2


def filled(feature: Any, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels inside a rectilinear polygon by counting the borders to the left of each."""
    crossings = np.zeros((shape[0], shape[1] + 1), dtype=int)
    for ring in feature["geometry"]["coordinates"]:
        for (x0, y0), (x1, y1) in itertools.pairwise(ring):
            if x0 == x1:
                crossings[min(y0, y1) : max(y0, y1), x0] += 1
    odd: NDArray[np.bool_] = np.cumsum(crossings, axis=1)[:, :-1] % 2 == 1
    return odd


@given(masks)
def test_polygons_cover_exactly_the_mask(mask: NDArray[np.bool_]) -> None:
    """Filled polygons are 4-connected pieces that together are the mask."""
    labels, count = ndimage.label(mask)
    pieces = [filled(feature, mask.shape) for feature in features(mask)]
    assert len(pieces) == count
    assert np.array_equal(np.sum(pieces, axis=0) if pieces else np.zeros(mask.shape), mask)
    assert all(len(np.unique(labels[piece])) == 1 for piece in pieces)


@given(masks)
def test_rings_are_closed_simple_and_oriented(mask: NDArray[np.bool_]) -> None:
    """A polygon is one ring of positive area and holes of negative area, without self-contact."""
    for feature in features(mask):
        outer, *holes = feature["geometry"]["coordinates"]
        assert signed_area(outer) > 0
        assert all(signed_area(hole) < 0 for hole in holes)
        for ring in (outer, *holes):
            assert ring[0] == ring[-1]
            assert len({tuple(point) for point in ring}) == len(ring) - 1


def test_geojson_of_a_ring_of_tissue() -> None:
    """A 3 x 3 ring at downsample 32 with an offset has the GeoJSON that QuPath reads."""
    mask = np.ones((3, 3), dtype=bool)
    mask[1, 1] = False
    (feature,) = features(mask, 32, (100, 1000))
    assert feature["geometry"]["type"] == "Polygon"
    outer, hole = feature["geometry"]["coordinates"]
    assert {tuple(point) for point in outer} == {(100, 1000), (196, 1000), (196, 1096), (100, 1096)}
    assert {tuple(point) for point in hole} == {(132, 1032), (132, 1064), (164, 1064), (164, 1032)}
    assert feature["properties"] == {
        "objectType": "annotation",
        "name": "tissue 1",
        "classification": {"name": "Tissue", "color": [46, 134, 171]},
        "isLocked": True,
    }


def test_geojson_is_deterministic_with_ids_of_their_own() -> None:
    """The same mask gives the same text, and pieces have different ids."""
    mask = np.eye(3, dtype=bool)
    assert outline.tissue_geojson(mask, downsample=2.5, offset=(0, 0)) == outline.tissue_geojson(
        mask, downsample=2.5, offset=(0, 0)
    )
    assert len({feature["id"] for feature in features(mask)}) == 3


def test_drawn_outlines_follow_the_mask_with_few_points() -> None:
    """A slanted border is a straight line, a hole has a ring of its own, and a single pixel does not vanish."""
    mask = np.tri(40, 40, dtype=bool)
    mask[25:32, 5:12] = False
    mask[2, 30] = True
    rings = outline.simplified_rings(mask, tolerance_px=0.75)
    single, hole, large = sorted(rings, key=lambda ring: abs(signed_area([*ring.tolist(), ring[0].tolist()])))
    areas = [abs(signed_area([*ring.tolist(), ring[0].tolist()])) for ring in (single, hole, large)]
    assert areas == [pytest.approx(0.5), pytest.approx(49, abs=7), pytest.approx(40 * 40 / 2, rel=0.03)]
    assert len(large) <= 6
    assert single.mean(axis=0).tolist() == [30.5, 2.5]


def test_no_tissue_is_an_empty_collection() -> None:
    """A slide without tissue has a valid, empty collection."""
    assert features(np.zeros((4, 4), dtype=bool)) == []


@given(masks)
def test_tissue_png_is_the_mask(mask: NDArray[np.bool_]) -> None:
    """In the PNG 255 is tissue and 0 is not."""
    assert np.array_equal(picture(outline.tissue_png(mask)), mask * np.uint8(255))


def test_cells_larger_than_pixels_fill_their_square() -> None:
    """A 2 x 2 heatmap at 3 px per cell from (1, 2) fills exactly 6 x 6 pixels."""
    heat = np.array([[0.1, 0.2], [0.3, np.nan]], dtype=np.float32)
    drawn = overlay.heat_on_overview(heat, (10, 9), cell_px=3.0, origin_px=(1.0, 2.0))
    assert np.array_equal(drawn[2:8, 1:7], np.kron(heat, np.ones((3, 3))), equal_nan=True)
    assert np.isfinite(drawn).sum() == 27


def test_the_hottest_of_many_cells_shows() -> None:
    """The highest of the 16 cells of a pixel is drawn, also beside NaN."""
    heat = np.full((8, 8), np.nan, dtype=np.float32)
    heat[4:, :4] = 0.1
    heat[6, 1] = 0.9
    drawn = overlay.heat_on_overview(heat, (2, 2), cell_px=0.25, origin_px=(0.0, 0.0))
    assert drawn[1, 0] == np.float32(0.9)
    assert np.isfinite(drawn).sum() == 1


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.floats(0, 1, width=32)),
    st.floats(0.2, 5),
    st.tuples(st.floats(-20, 20), st.floats(-20, 20)),
)
def test_every_pixel_shows_a_cell_it_meets(
    heat: NDArray[np.float32], cell_px: float, origin_px: tuple[float, float]
) -> None:
    """A pixel shows the score of a cell that overlaps it, wherever the map lies."""
    drawn = overlay.heat_on_overview(heat, (8, 11), cell_px=cell_px, origin_px=origin_px)
    for row, col in np.argwhere(np.isfinite(drawn)):
        spans = [
            slice(
                max(0, int(np.floor((at - origin) / cell_px - 1e-6))), int(np.ceil((at + 1 - origin) / cell_px + 1e-6))
            )
            for at, origin in ((row, origin_px[1]), (col, origin_px[0]))
        ]
        assert drawn[row, col] in heat[spans[0], spans[1]]


def test_a_map_beside_the_overview_draws_nothing() -> None:
    """A heatmap outside the overview draws nothing."""
    for cell_px in (0.5, 2.0):
        drawn = overlay.heat_on_overview(np.ones((4, 4), np.float32), (5, 5), cell_px=cell_px, origin_px=(50.0, 0.0))
        assert np.isnan(drawn).all()


def test_overlay_leaves_unscored_pixels_alone() -> None:
    """NaN is transparent and so is a score of 0, higher scores tint more, and the scale is below."""
    overview = np.full((60, 80, 3), (225, 180, 205), dtype=np.uint8)
    heat = np.full((6, 8), np.nan, dtype=np.float32)
    heat[0, 0], heat[5, 3], heat[5, 7] = 0.0, 0.4, 1.0
    seen = picture(overlay.overlay_png(overview, heat, cell_px=10.0, origin_px=(0.0, 0.0)))
    assert seen.shape[:2] > (60, 80)
    assert seen.shape[1] == 80
    change = np.abs(seen[:60].astype(int) - overview).sum(axis=2)
    assert (change[10:50] == 0).all()
    assert 0 == change[5, 5] < change[55, 35] < change[55, 75]


def test_the_scale_is_fixed() -> None:
    """The colour of a score does not depend on the other scores of the slide."""
    overview = np.full((20, 40, 3), 230, dtype=np.uint8)
    alone, beside = (
        picture(overlay.overlay_png(overview, np.array([scores], np.float32), cell_px=20.0, origin_px=(0.0, 0.0)))
        for scores in ([0.3, np.nan], [0.3, 0.9])
    )
    assert np.array_equal(alone[:20, :20], beside[:20, :20])


def test_overlay_bytes_are_deterministic_and_detections_are_ringed() -> None:
    """The same input gives the same bytes; a detection is circled and its point left visible."""
    overview = np.full((100, 100, 3), 200, dtype=np.uint8)
    heat = np.full((1, 1), np.nan, dtype=np.float32)
    found = np.array([[0.9, 50.0, 40.0]])
    first, again = (
        overlay.overlay_png(overview, heat, cell_px=1.0, origin_px=(0.0, 0.0), detections=found) for _ in range(2)
    )
    assert first == again
    rows, cols = np.nonzero((picture(first)[:100] != 200).any(axis=2))
    assert (rows.mean(), cols.mean()) == pytest.approx((40, 50), abs=1)
    assert np.hypot(rows - 40, cols - 50).min() > 3


def test_thumbnail_is_small_and_keeps_its_shape() -> None:
    """The longer side has the given length."""
    small = overlay.thumbnail(outline.tissue_png(np.ones((300, 600), dtype=bool)), side_px=100)
    with Image.open(io.BytesIO(small)) as opened:
        assert (opened.format, opened.size) == ("JPEG", (100, 50))
