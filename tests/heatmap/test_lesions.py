"""Lesion detection by both methods, against plain recipes and maps made by hand."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from skimage import measure

from wsiflow.errors import InputError
from wsiflow.heatmap import lesions
from wsiflow.heatmap.lesions import LesionParams

NAN = np.nan
COMPONENTS = {
    "method": "components",
    "threshold": 0.5,
    "unit": "cells",
    "smoothing": 0,
    "morphology": "open_close",
    "kernel": 1,
    "min_area": 1,
    "confidence": "mean",
    "position": "centroid",
    "nms_radius": 2,
}
NMS = COMPONENTS | {"method": "nms"}


def detect(heatmap, settings_, *, cell_um=1.0, **changed):
    """Return the detections as lists."""
    return lesions.detect(
        np.asarray(heatmap, np.float32), LesionParams(**(settings_ | changed)), cell_um=cell_um
    ).tolist()


def heat(shape, *patches, fill=0.0):
    """Return a heatmap with rectangles of one value each."""
    heatmap = np.full(shape, fill, np.float32)
    for rows, cols, value in patches:
        heatmap[slice(*rows), slice(*cols)] = value
    return heatmap


def crescent():
    """Return a C-shaped lesion, open to the right, two cells thick."""
    return heat((12, 12), ((2, 10), (2, 10), 0.75), ((4, 8), (4, 10), 0.0))


heatmaps = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).choice(
        np.array([NAN, 0, 0.25, 0.5, 0.75, 1], np.float32), size=(14, 17), p=[0.2, 0.2, 0.1, 0.1, 0.2, 0.2]
    )
)


@given(heatmaps, st.sampled_from([COMPONENTS | {"position": "peak"}, NMS]))
def test_each_detection_lies_in_its_own_area(heatmap, settings_):
    """The cells that a detection comes from have its number, and cells below the threshold have none."""
    traces = lesions.trace(heatmap, LesionParams(**settings_), cell_um=1.0)
    numbers = traces.numbers[traces.areas]
    for number, (_, col, row) in enumerate(traces.detections, start=1):
        assert numbers[int(row), int(col)] == number
    assert not numbers[~(traces.scores > 0.5)].any()


def test_two_components():
    """Each component gives its mean and its centroid, the higher one first."""
    heatmap = heat((8, 10), ((1, 3), (1, 4), 0.75), ((5, 6), (6, 8), 1.0))
    assert detect(heatmap, COMPONENTS) == [[1, 6.5, 5], [0.75, 2, 1.5]]


def test_diagonal_cells_are_one_component():
    """Components are 8-connected."""
    assert detect(np.eye(3), COMPONENTS) == [[1, 1, 1]]


def test_threshold_is_strict():
    """A score equal to the threshold does not exceed it."""
    assert detect(heat((4, 4), ((1, 2), (1, 2), 0.5)), COMPONENTS) == []
    assert detect(heat((4, 4), ((1, 2), (1, 2), 0.5)), NMS) == []


def test_confidence_may_be_the_maximum():
    """The confidence is the highest score of the component instead of the mean."""
    assert detect([[0.625, 0.875]], COMPONENTS) == [[0.75, 0.5, 0]]
    assert detect([[0.625, 0.875]], COMPONENTS, confidence="max") == [[0.875, 0.5, 0]]


def test_peak_lies_inside_a_crescent_and_the_centroid_does_not():
    """The centroid of a crescent lies in its opening; the peak lies in the lesion."""
    heatmap = crescent()
    ((_, x, y),) = detect(heatmap, COMPONENTS)
    assert heatmap[round(y), round(x)] == 0
    ((_, x, y),) = detect(heatmap, COMPONENTS, position="peak")
    assert heatmap[int(y), int(x)] == 0.75


def test_peak_counts_the_edge_of_the_map_as_outline():
    """The peak of a lesion at the edge of the map is in the middle of its visible part."""
    assert detect(heat((5, 9), ((0, 5), (0, 5), 1.0)), COMPONENTS, position="peak") == [[1, 2, 2]]


def test_small_components_are_dropped():
    """A component with fewer cells than the minimum is dropped; with exactly as many it is kept."""
    heatmap = heat((5, 9), ((1, 2), (1, 3), 1.0), ((1, 2), (5, 8), 1.0))
    assert detect(heatmap, COMPONENTS, min_area=3) == [[1, 6, 1]]


@pytest.mark.parametrize(("morphology", "n"), [("open_close", 0), ("close_open", 1), ("none", 9)])
def test_order_of_morphology_matters(morphology, n):
    """Opening first removes a dotted field; closing first joins it."""
    heatmap = np.zeros((15, 15))
    heatmap[5:11:2, 5:11:2] = 1
    assert len(detect(heatmap, COMPONENTS, morphology=morphology, kernel=5)) == n


def test_cells_without_a_score_are_not_averaged():
    """Cells without tissue count neither for the mean nor for area and position."""
    heatmap = heat((3, 5), ((0, 3), (0, 5), 0.75))
    heatmap[1, 3] = NAN
    ((prob, x, _),) = detect(heatmap, COMPONENTS, morphology="close_open", kernel=3)
    assert prob == 0.75
    assert x == pytest.approx((5 * 3 * 2 - 3) / 14)
    assert detect(heatmap, COMPONENTS, morphology="close_open", kernel=3, min_area=15) == []


@pytest.mark.parametrize("settings_", [COMPONENTS, NMS])
@pytest.mark.parametrize("heatmap", [np.full((4, 5), NAN), np.zeros((4, 5)), np.empty((0, 0)), np.empty((0, 7))])
def test_nothing_to_find(settings_, heatmap):
    """Maps without tissue, without high scores or without cells give (0, 3)."""
    found = lesions.detect(heatmap.astype(np.float32), LesionParams(**settings_), cell_um=1.0)
    assert found.shape == (0, 3)


@settings(deadline=None)
@given(heatmaps, st.integers(1, 4), st.sampled_from(["open_close", "close_open"]))
def test_components_equal_the_plain_recipe(heatmap, kernel, morphology):
    """On a map without holes the result equals OpenCV's morphology with region properties."""
    heatmap = np.nan_to_num(heatmap)
    cells = (heatmap > 0.5).astype(np.uint8)
    ellipse = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (kernel, kernel))
    steps = [cv2.MORPH_OPEN, cv2.MORPH_CLOSE]
    for step in steps if morphology == "open_close" else steps[::-1]:
        cells = cv2.morphologyEx(cells, step, ellipse)
    regions = measure.regionprops(measure.label(cells, connectivity=2), heatmap)
    expected = sorted([round(r.centroid[0], 6), round(r.centroid[1], 6), r.intensity_mean] for r in regions)
    found = detect(heatmap, COMPONENTS, kernel=kernel, morphology=morphology)
    assert np.allclose(sorted([round(y, 6), round(x, 6), p] for p, x, y in found), expected)


@settings(deadline=None)
@given(heatmaps, st.integers(1, 5))
def test_nms_equals_taking_the_maximum_again_and_again(heatmap, radius):
    """The sorted pass equals repeated search and clearing, ties by row then column."""
    left, expected = np.where(np.isnan(heatmap), -1, heatmap), []
    while left.max() > 0.5:
        row, col = np.unravel_index(left.argmax(), left.shape)
        expected.append([left[row, col], col, row])
        left[max(row - radius, 0) : row + radius, max(col - radius, 0) : col + radius] = -1
    assert detect(heatmap, NMS, nms_radius=radius) == expected


def test_nms_clears_a_half_open_square():
    """With radius 2 the second cell before the maximum is cleared and the second after it is not."""
    assert detect([[0.75, 0, 1, 0, 0.875]], NMS) == [[1, 2, 0], [0.875, 4, 0]]


def test_nms_over_more_cells_than_it_looks_at_together():
    """A plateau larger than a chunk gives a regular grid."""
    found = detect(np.ones((400, 400)), NMS, nms_radius=100)
    assert [(x, y) for _, x, y in found] == [(x, y) for y in (0, 100, 200, 300) for x in (0, 100, 200, 300)]


@settings(deadline=None)
@given(heatmaps, st.sampled_from([COMPONENTS, NMS]), st.sampled_from(["centroid", "peak"]), st.sampled_from([0, 1.5]))
def test_order_and_scores(heatmap, settings_, position, sigma):
    """Detections are ordered by falling prob, row and column, and exceed the threshold."""
    found = detect(heatmap, settings_, position=position, smoothing=sigma, morphology="none")
    assert found == sorted(found, key=lambda d: (-d[0], d[2], d[1]))
    assert all(0.5 < prob <= 1 + 1e-6 for prob, _, _ in found)


@settings(deadline=None)
@given(heatmaps, st.sampled_from([COMPONENTS | {"position": "peak"}, NMS]), st.sampled_from([0, 1.5]))
def test_no_detection_on_a_cell_without_a_score(heatmap, settings_, sigma):
    """A detection never lies on a cell without a score."""
    for _, x, y in detect(heatmap, settings_, smoothing=sigma, kernel=3, morphology="close_open"):
        assert not np.isnan(heatmap[int(y), int(x)])


def test_smoothing_keeps_a_constant_map():
    """Smoothing averages scored cells only, so that the rim of the tissue keeps its value."""
    heatmap = heat((9, 9), ((2, 7), (2, 7), 0.75), fill=NAN)
    ((prob, x, y),) = detect(heatmap, COMPONENTS, smoothing=2)
    assert (prob, x, y) == pytest.approx((0.75, 4, 4))


def test_sizes_in_um_mean_the_same_at_every_stride():
    """A map with each cell repeated four by four gives the same lesions at four times the position."""
    coarse = heat((30, 30), ((2, 10), (2, 10), 0.75), ((20, 22), (20, 22), 1.0), ((12, 13), (3, 20), 0.75))
    fine = np.kron(coarse, np.ones((4, 4), np.float32))
    sizes = {"unit": "um", "kernel": 48, "min_area": 5000, "position": "centroid"}
    found = np.array(detect(coarse, COMPONENTS, cell_um=16.0, **sizes))
    finer = np.array(detect(fine, COMPONENTS, cell_um=4.0, **sizes))
    assert len(found) == 1  # two by two cells, and a line of them, are gone
    np.testing.assert_allclose(finer[:, 1:] / 4, found[:, 1:] + 3 / 8, atol=0.5)
    peaks = [detect(each, NMS, cell_um=um, unit="um", nms_radius=160) for each, um in ((coarse, 16.0), (fine, 4.0))]
    assert [len(each) for each in peaks] == [3, 3]


def test_no_size_is_below_a_cell():
    """Where the stride exceeds every size, each cell above the threshold is a lesion."""
    heatmap = heat((5, 5), ((1, 2), (1, 2), 1.0))
    sizes = {"unit": "um", "kernel": 20, "min_area": 500, "nms_radius": 10}
    assert detect(heatmap, COMPONENTS, cell_um=56.0, **sizes) == [[1, 1, 1]]
    assert detect(heatmap, NMS, cell_um=56.0, **sizes) == [[1, 1, 1]]


@pytest.mark.parametrize("heatmap", [np.array([[0.5, np.inf]]), np.array([0.5, 0.6])])
def test_unusable_heatmaps_are_refused(heatmap):
    """An infinite score is refused; it would be the first lesion."""
    with pytest.raises(InputError, match="heatmap"):
        detect(heatmap, COMPONENTS)


@pytest.mark.parametrize(
    "changed", [{"threshold": 1.5}, {"kernel": -1}, {"unit": "px"}, {"method": "dbscan"}, {"radius": 3}]
)
def test_bad_settings_are_refused(changed):
    """Values out of bounds and unknown keys are refused."""
    with pytest.raises(ValidationError):
        LesionParams(**(COMPONENTS | changed))


# --- two maps, and the gate


@given(heatmaps, heatmaps)
def test_the_second_map_takes_part_in_confidences_alone(first, second):
    """Components and positions are those of the first map; the confidence is the mean of (L + V) / 2 (Wang 2016)."""
    params = LesionParams(**COMPONENTS | {"kernel": 2})
    alone = lesions.trace(first, params, cell_um=1.0)
    both = lesions.trace(first, params, cell_um=1.0, second=second)
    assert np.array_equal(both.areas, alone.areas)
    assert sorted(both.detections[:, 1:].tolist()) == sorted(alone.detections[:, 1:].tolist())
    for label in np.flatnonzero(both.numbers):
        number, cells = both.numbers[label], (both.areas == label) & ~np.isnan(first)
        mean = np.where(np.isnan(second), first, (first.astype(float) + second) / 2)[cells].mean()
        assert both.detections[number - 1, 0] == pytest.approx(mean, abs=1e-12)


def test_two_maps_by_hand():
    """The first map is above the threshold in two lesions; the second one turns their order round."""
    first = heat((3, 5), ((1, 2), (0, 2), 0.875), ((1, 2), (3, 5), 0.75))
    second = heat((3, 5), ((1, 2), (0, 1), 0.25), ((1, 2), (3, 5), 1.0), ((0, 1), (0, 5), 1.0))
    params = LesionParams(**COMPONENTS)
    found = lesions.detect(first, params, cell_um=1.0, second=second)
    assert found.tolist() == [[0.875, 3.5, 1.0], [0.5, 0.5, 1.0]]
    with pytest.raises(InputError, match="two maps of one shape"):
        lesions.detect(first, params, cell_um=1.0, second=second[:2])


def test_the_gate_lets_no_lesion_through_at_its_own_value():
    """As in the reference: at most the gate, no lesion; above it the confidence times the slide's score."""
    found = np.array([[0.75, 1, 2], [0.5, 3, 4]])
    assert lesions.gated(found, 0.5, 0.5).shape == (0, 3)
    assert lesions.gated(found, 0.8, 0.5).tolist() == [[0.75 * 0.8, 1, 2], [0.4, 3, 4]]


@pytest.mark.parametrize(
    "wrong", [{"second": "/r", "method": "nms"}, {"second": "/r", "confidence": "max"}, {"slide_scores": "/s.csv"}]
)
def test_settings_that_would_do_nothing_are_refused(wrong):
    """A second map without means, and scores without a gate."""
    with pytest.raises(ValidationError, match=r"lesions\.(second needs|slide_scores is set)"):
        LesionParams(**COMPONENTS | wrong)


def test_settings_without_the_new_keys_are_recorded_as_before():
    """Keys of published detections contain them, and stay what they were."""
    assert LesionParams(**COMPONENTS, second=None, gate=None, slide_scores=None).model_dump() == COMPONENTS
