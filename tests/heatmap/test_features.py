"""Features of small maps by hand, laws that hold for any map, and the published sheets."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from wsiflow.errors import InputError
from wsiflow.heatmap.features import LEVELS, NAMES, describe

SHEETS = "published/dldp/RF_parameters"
O8 = (
    ".095723,.089877,.083945,.076643,.063522,.037545,.028268,.019574,.011522,.004426,"
    "171275,.536173,.562284,304606,580.067510,.999940,.900002,.974239,.911765,.675691"
)
TISSUE = 40  # cells

Named = dict[str, float]


def features(heat: NDArray[np.float32], threshold: float = 0.5, *, reference: bool = False, cell: float = 16) -> Named:
    """Return the features by name, for tissue of 40 cells of 16 px."""
    found = describe(heat, threshold=threshold, tissue_l0_px2=TISSUE * 256, cell_l0_px=cell, reference=reference)
    return dict(zip(NAMES, found.tolist(), strict=True))


def region(found: Named, which: str) -> list[float]:
    """Return the ten features of one region."""
    return [found[name] for name in (NAMES[10:20] if which == "largest" else NAMES[20:])]


@pytest.fixture
def heat() -> NDArray[np.float32]:
    """Return a map with a 2 x 4 box, an L of three cells, a single cell of 0.6, and a column of glass."""
    heat = np.full((10, 12), 0.1, np.float32)
    heat[2:4, 2:6] = [[0.95, 0.85, 0.75, 0.95], [0.95, 0.95, 0.95, 0.95]]
    heat[7, 3], heat[8, 3], heat[8, 4] = 0.9, 0.8, 0.7
    heat[6, 8] = 0.6
    heat[:, 11] = np.nan
    return heat


def test_shares_and_sums_by_hand(heat: NDArray[np.float32]) -> None:
    """Shares count cells strictly above a level, and sums add the excess over it."""
    found = features(heat)
    above = [12, 11, 10, 8, 6]  # 0.9 itself is not above 0.9 and 0.6 not above 0.6
    assert [found[f"ratio_cancer_tissue{level}"] for level in (50, 60, 70, 80, 90)] == [n / TISSUE for n in above]
    excess = [6 * 0.45 + 0.35 + 0.25 + 0.4 + 0.3 + 0.2 + 0.1, 6 * 0.05]
    assert [found["ratio_sum_tissue50"], found["ratio_sum_tissue90"]] == pytest.approx(
        [value / TISSUE for value in excess], abs=1e-7
    )


def test_regions_by_hand(heat: NDArray[np.float32]) -> None:
    """Areas, boxes, moments, intensities and hulls of a full box and an L."""
    found = features(heat)
    major, minor = 4 * math.sqrt(15 / 12), 4 * math.sqrt(3 / 12)  # of 4 and of 2 cells in a line: (n^2 - 1) / 12
    box = [8, math.sqrt(1 - (minor / major) ** 2), 1, 8, major, 0.95, 0.75, (6 * 0.95 + 0.85 + 0.75) / 8, 2 / 4, 1]
    assert region(found, "largest") == pytest.approx(box)
    corner = 4 * math.sqrt(1 / 3)  # variances 2/9 and covariance 1/9: eigenvalues 3/9 and 1/9
    ell = [3, math.sqrt(1 - 1 / 3), 3 / 4, 4, corner, 0.9, 0.7, 0.8, 1, 1]
    assert region(found, "second_largest")[:-1] == pytest.approx(ell[:-1])
    assert 3 / 4 <= found["solidity_second_largest"] <= 1


def test_regions_touch_at_corners_and_follow_the_threshold(heat: NDArray[np.float32]) -> None:
    """Diagonal neighbours are one region; a higher threshold shrinks regions and keeps shares."""
    heat[4, 6] = 0.99
    found = features(heat)
    assert found["largest_area"] == 9
    assert found["area_bbox_largest"] == 15
    higher = features(heat, 0.8)
    assert higher["largest_area"] == 8
    assert [higher[name] for name in NAMES[:10]] == [found[name] for name in NAMES[:10]]


def test_a_tie_for_the_second_place(heat: NDArray[np.float32]) -> None:
    """Two equal regions are first and second; the reference skips to the next smaller one."""
    heat[0:2, 7:11] = 0.7
    heat[0, 6] = 0.1
    corrected, reference = features(heat[:, :11]), features(np.pad(heat, 1, constant_values=0.1), reference=True)
    assert (corrected["largest_area"], corrected["second_largest_area"]) == (8, 8)
    assert corrected["maxprob_largest"] == pytest.approx(0.7)  # of equal ones the first in row order
    assert corrected["maxprob_second_largest"] == pytest.approx(0.95)
    assert (reference["largest_area"], reference["second_largest_area"]) == (8, 3)


def test_a_region_alone() -> None:
    """The features of a missing second region are 0; the reference gives -1 and repeats the largest."""
    heat = np.zeros((6, 6), np.float32)
    heat[2:4, 2:5] = 0.8
    corrected, reference = features(heat), features(heat, reference=True)
    assert region(corrected, "second_largest") == [0] * 10
    assert reference["second_largest_area"] == -1
    assert region(reference, "second_largest")[1:] == region(reference, "largest")[1:]
    assert region(corrected, "largest") == region(reference, "largest")


def test_equal_regions_only() -> None:
    """Without a strictly smaller region the reference gives -1 and the features of the last region."""
    heat = np.zeros((9, 9), np.float32)
    heat[1, 1], heat[4, 4], heat[7, 7] = 0.6, 0.7, 0.8
    found = features(heat, reference=True)
    assert (found["maxprob_largest"], found["maxprob_second_largest"]) == pytest.approx((0.6, 0.8))
    assert (found["largest_area"], found["second_largest_area"]) == (1, -1)


def test_the_border(heat: NDArray[np.float32]) -> None:
    """A region at the border counts; the reference removes it, but counts its cells."""
    cut = heat[3:, :11]
    assert features(cut)["largest_area"] == 4
    reference = features(cut, reference=True)
    assert reference["largest_area"] == 3
    assert reference["ratio_cancer_tissue90"] == 4 / TISSUE


def test_no_region_above_the_threshold(heat: NDArray[np.float32]) -> None:
    """Shares of lower levels are kept; the reference sets them to 0."""
    heat = np.minimum(heat, 0.88)
    assert not any(features(heat, 0.9, reference=True).values())
    corrected = features(heat, 0.9)
    assert corrected["ratio_cancer_tissue80"] == 8 / TISSUE
    assert not any(list(corrected.values())[10:])


def test_tissue_is_counted_in_cells_of_the_map_or_of_16_px(heat: NDArray[np.float32]) -> None:
    """With cells of 64 px there are 16 times fewer; the reference still counts cells of 16 px."""
    inside = np.pad(heat, 1, constant_values=np.nan)
    fine, coarse = features(inside), features(inside, cell=64)
    assert coarse["ratio_cancer_tissue50"] == 16 * fine["ratio_cancer_tissue50"]
    assert features(inside, cell=64, reference=True) == features(inside, reference=True)


def test_without_tissue_everything_is_zero(heat: NDArray[np.float32]) -> None:
    """A map without tissue has zero features; scores without tissue, and infinite ones, are refused."""
    assert not any(features(np.full((4, 4), np.nan, np.float32)).values())
    with pytest.raises(InputError, match="an area of 0 px"):
        describe(heat, threshold=0.5, tissue_l0_px2=0, cell_l0_px=16)
    with pytest.raises(InputError, match="1 infinite"):
        features(np.array([[np.inf]], np.float32))
    with pytest.raises(InputError, match="shape"):
        features(np.zeros(3, np.float32))


# --- laws that hold for any map, and for the published sheets


def check_laws(row: Named, threshold: float) -> None:
    """See that the features of a slide do not contradict each other.

    The sums are integrals of the shares over the level, so the difference of two neighbouring sums lies between the
    shares at its ends, times the step: a law that the sum of probabilities would break.
    """
    shares = np.array([row[f"ratio_cancer_tissue{100 * level:.0f}"] for level in LEVELS])
    sums = np.array([row[f"ratio_sum_tissue{100 * level:.0f}"] for level in LEVELS])
    slack = 1e-6 * max(float(shares[0]), 1e-3)
    assert (np.diff(shares) <= 0).all()
    assert (sums[:-1] - sums[1:] >= 0.1 * shares[1:] - slack).all()
    assert (sums[:-1] - sums[1:] <= 0.1 * shares[:-1] + slack).all()
    assert 0 <= sums[-1] <= 0.1 * shares[-1] + slack
    for which in ("largest", "second_largest"):
        area = row["largest_area" if row[f"{which}_area"] == -1 else f"{which}_area"]  # -1 only beside an equal one
        if area == 0:
            assert not any(row[name] for name in NAMES[20 if which != "largest" else 10 :])
            continue
        assert row[f"extend_{which}"] == pytest.approx(area / row[f"area_bbox_{which}"], rel=1e-12)
        height = math.sqrt(row[f"area_bbox_{which}"] * row[f"aspect_ratio_bbox_{which}"])
        assert height == pytest.approx(round(height), abs=1e-6)
        least, mean, most = (row[f"{name}prob_{which}"] for name in ("min", "ave", "max"))
        assert np.float32(threshold) < least <= mean + 1e-6
        assert mean - 1e-6 <= most <= 1
        assert row[f"extend_{which}"] <= row[f"solidity_{which}"] + 1e-9
        assert row[f"solidity_{which}"] <= 1 + 1e-9
        assert 0 <= row[f"eccentricity_{which}"] <= 1
        # a disc has the least long axis of its area, but for the 1/12 that cells lack
        assert row[f"major_axis_length_{which}"] ** 2 >= (4 / math.pi) * area - 4 / 3 - 1e-6
    assert row["second_largest_area"] <= row["largest_area"]


maps = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=14),
    elements=st.sampled_from([0, 0.3, 0.55, 0.8, 0.95]),
)


@given(maps, st.sampled_from(LEVELS), st.booleans())
def test_features_of_any_map_keep_the_laws(heat: NDArray[np.float32], threshold: float, reference: bool) -> None:
    """The laws hold for any map in both modes."""
    check_laws(features(heat, threshold, reference=reference), threshold)


@given(maps, st.sampled_from(LEVELS))
def test_turning_a_map_turns_only_its_boxes(heat: NDArray[np.float32], threshold: float) -> None:
    """The transposed map has the same shares and areas."""
    found, turned = features(heat, threshold), features(heat.T, threshold)
    assert [turned[name] for name in NAMES[:11]] == pytest.approx([found[name] for name in NAMES[:11]])


def published(path: Path) -> list[dict[str, str]]:
    """Return the rows of a published sheet."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_published_sheets_keep_the_laws(shared_data: Path) -> None:
    """All 48 sheets have our columns in our order, and every row keeps the laws of our own maps."""
    paths = sorted((shared_data / SHEETS).rglob("*.csv"))
    rows = 0
    for path in paths:
        level = float("0." + path.name.split("strike_")[1].split("_")[1].lstrip("0"))
        for row in published(path):
            assert tuple(row)[3:] == NAMES
            check_laws({name: float(row[name]) for name in NAMES}, level)
            rows += 1
    assert (len(paths), rows) == (48, 16 * (109 + 157 + 129))


def test_published_ties_are_those_that_the_reference_mode_makes(shared_data: Path) -> None:
    """Where the area is -1, the other features are those of an equally large region."""
    found = {}
    for path in sorted((shared_data / SHEETS).rglob("*_9_*.csv")):
        for row in published(path):
            values = {name: float(row[name]) for name in NAMES}
            if values["second_largest_area"] == -1:
                alone = region(values, "second_largest")[1:] == region(values, "largest")[1:]
                found[row["name"], path.parent.name] = alone
                assert values["area_bbox_second_largest"] >= values["largest_area"]
    assert list(found.values()).count(True) == 3
    assert [slide for (slide, _), alone in found.items() if not alone] == ["normal_054.tif", "test_041.tif"]


def test_the_published_row_of_test_001(shared_data: Path) -> None:
    """Our names and their order are those of the sheet: no value is ours, since the heatmap is not published."""
    folder = shared_data / SHEETS / "RF_parameter_Method_II_Model_I_norm" / "9"
    (row,) = [row for row in published(next(folder.glob("*_test_9_*.csv"))) if row["name"] == "test_001.tif"]
    expected = [float(value) for value in O8.split(",")]
    assert [float(row[name]) for name in NAMES[:20]] == pytest.approx(expected, abs=1e-6)
