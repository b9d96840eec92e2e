"""Planes and conversions, compared with known values of the reference system."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsiflow.plan import geometry
from wsiflow.plan.geometry import Frame

CENTRED = Frame("centred", 2240, 1120, 1.0, 0.243, 224, 224, 16, 112, 1, 1, 0, 0, 10, 5)


def reference(width: int, height: int, **more: int) -> Frame:
    return CENTRED._replace(convention="reference", l0_width_px=width, l0_height_px=height, **more)


@pytest.mark.parametrize(
    ("width", "last_col", "origin"),
    [
        (97280, 433, 96833),  # O-4: 47 px left of the ideal 96880, one column past the edge
        (53760, 239, 53313),  # O-4: 111 px left of the ideal 53424
    ],
)
def test_o4_far_patch_is_shifted_inwards(width: int, last_col: int, origin: int) -> None:
    """O-4: the reference's last patch starts at D - 447."""
    assert geometry.patch_origin_px(reference(width, width), last_col, last_col) == (origin, origin)


def test_o4_ideal_origin_is_kept_elsewhere() -> None:
    """Patches away from the border start half a window before their tile."""
    assert geometry.patch_origin_px(reference(97280, 97280), 1, 200) == (112, 224 * 200 - 112)


def test_reference_has_no_halo_before_the_first_tile() -> None:
    """At index 0 the reference's patch starts at the slide's border, on each axis separately."""
    assert geometry.patch_origin_px(reference(97280, 97280), 0, 3) == (0, 560)


def test_o6_window_of_tile_1_column_13() -> None:
    """O-6: in tile 1, j = 13, the window starts at 320, and its centre and the cell are at 432."""
    frame = reference(97280, 97280)
    window_x = geometry.patch_origin_px(frame, 1, 1)[0] + frame.halo_px + geometry.window_offsets_px(frame)[13, 0]
    assert window_x == 320
    assert window_x + 112 == 432
    h_row, h_col = geometry.h_from_t(frame, 1, 1)
    assert geometry.l0_from_h(frame, np.array([[h_col + 13.0, h_row]]))[0, 0] == 432


def test_reference_windows_stay_inside_the_patch() -> None:
    """The reference's windows start at 0, 16 .. 208 in the 448 px patch."""
    offsets = geometry.window_offsets_px(reference(97280, 97280)) + 112
    assert sorted(set(offsets[:, 0].tolist())) == list(range(0, 209, 16))
    assert offsets[1].tolist() == [16, 0], "the first index of a tile's map is the row"


@given(stride=st.sampled_from([1, 2, 4, 7, 8, 14, 16, 28, 32, 56, 112, 224]), col=st.integers(0, 9))
def test_centred_window_centre_is_its_cells_centre(stride: int, col: int) -> None:
    """The centre of a window is the centre of its cell, to the pixel."""
    frame = CENTRED._replace(stride_px=stride)
    offsets = geometry.window_offsets_px(frame)
    h_row, h_col = geometry.h_from_t(frame, col, 0)
    j = frame.cells_per_tile - 1
    window_centre = 224 * col + offsets[j, 0] + 112
    cell_centre = geometry.l0_from_h(frame, np.array([[h_col + j, h_row]], dtype=float))[0, 0]
    assert 0 <= cell_centre - window_centre <= 0.5
    assert (offsets >= -112).all()
    assert (offsets + 224 <= 224 + 112).all(), "every window lies in the tile and its halo"


def test_grid_covers_the_slide_to_its_last_pixel() -> None:
    """A last column of one pixel has a tile of its own."""
    assert geometry.grid_shape(2241, 1120, l0_per_px=1.0, tile_px=224) == (5, 11)
    assert geometry.grid_shape(4480, 2240, l0_per_px=2.0, tile_px=224) == (5, 10)
    assert geometry.grid_shape(2220, 2967, l0_per_px=0.243 / 0.499, tile_px=224) == (28, 21)


def test_heatmap_cell_corner_maps_back_to_level_0() -> None:
    """Cells start where their tile starts, in level-0 pixels of a slide read at half its resolution."""
    frame = CENTRED._replace(l0_per_px=2.0, t_col0=3, t_row0=1)
    assert geometry.l0_from_h_corner(frame, 14, 0) == ((3 + 1) * 448, 448)


@pytest.mark.parametrize(
    ("um_px", "scale"), [(0.226, 1.0), (0.243, 1.0), (0.121, 0.243 / 0.121), (0.499, 0.243 / 0.499)]
)
def test_reading_scale_within_tolerance_is_one(um_px: float, scale: float) -> None:
    """Slides of both CAMELYON scanners are read unchanged; other spacings are resampled."""
    assert geometry.reading_scale(um_px, 0.243, tolerance=0.1) == scale


def test_a_place_on_the_far_edge_is_not_on_the_slide() -> None:
    """The centre of the last cell is the first pixel beyond the slide; one pixel more, and it is the last one on it."""
    frame = CENTRED._replace(stride_px=112, l0_width_px=2 * 112 + 56, l0_height_px=3 * 112 + 56)
    assert geometry.cells_on_slide(frame) == (3, 2)
    wider = frame._replace(l0_width_px=frame.l0_width_px + 1, l0_height_px=frame.l0_height_px + 1)
    assert geometry.cells_on_slide(wider) == (4, 3)
