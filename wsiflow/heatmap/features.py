"""Compute thirty features that describe a slide by its heatmap, for a classifier of slides.

Input: a heatmap, float32 (rows, cols), NaN where not tissue, and the area of the tissue. Output: float64 (30,) with the
names of `NAMES`: the share of the tissue above each of five probability levels, the sum of the excess over each level,
and ten measures of the largest and of the second largest region. Lengths and areas are in heatmap cells, so features of
heatmaps with other cells are not comparable.

These are the features of Li, Mikailov and Chen (IEEE TAI 2023), with the column names of their published sheets. With
``reference`` they also have the quirks of that system:

* the second region is the largest one that is strictly smaller than the largest. Where there is none, its area is -1
  and its other nine features are those of the last region in row order, which is the largest one where it is the only;
* regions that touch the border of the map are ignored;
* without any region, the shares and sums are 0 even where cells exceed the levels;
* the area of the tissue is counted in cells of 16 level-0 px, whatever the cells of the map.

Without ``reference`` the second region may be as large as the first, regions at the border count, only the measures of
a missing region are 0, and the tissue is counted in cells of the map.
"""

from collections.abc import Sequence

import numpy as np
import scipy
import skimage
from numpy.typing import NDArray

from wsiflow.errors import InputError

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Probability levels above which cells are counted; the threshold of the regions is chosen among them."""

_REGION = (
    "{}_area",
    "eccentricity_{}",
    "extend_{}",
    "area_bbox_{}",
    "major_axis_length_{}",
    "maxprob_{}",
    "minprob_{}",
    "aveprob_{}",
    "aspect_ratio_bbox_{}",
    "solidity_{}",
)
NAMES = (
    *(f"ratio_cancer_tissue{100 * level:.0f}" for level in LEVELS),
    *(f"ratio_sum_tissue{100 * level:.0f}" for level in LEVELS),
    *(name.format("largest") for name in _REGION),
    *(name.format("second_largest") for name in _REGION),
)
"""Names of the features, in the order of the published sheets."""

REFERENCE_CELL_L0_PX = 16
"""Side of the cells in which the reference system counts tissue, level-0 px."""

Heat = NDArray[np.float32]


def describe(
    heat: Heat, *, threshold: float, tissue_l0_px2: float, cell_l0_px: float, reference: bool = False
) -> NDArray[np.float64]:
    """Return the features of one slide.

    Args:
        heat: float32 (rows, cols), NaN where not tissue.
        threshold: Regions are 8-connected components of the cells above this probability.
        tissue_l0_px2: Area of the slide's tissue, square level-0 px.
        cell_l0_px: Side of a heatmap cell, level-0 px.
        reference: Whether the features have the quirks of the reference system.

    Returns:
        float64 (30,), see `NAMES`; all 0 for a slide without tissue.

    Raises:
        InputError: The map is not two-dimensional or holds an infinite value, or it has scores although the area of the
            tissue is 0.
    """
    if heat.ndim != 2 or np.isinf(heat).any():
        cause = f"the heatmap has shape {heat.shape} and {np.isinf(heat).sum()} infinite values"
        raise InputError(cause, "give finite scores in rows x cols, NaN where not tissue", stage="features")
    scores = heat[~np.isnan(heat)].astype(np.float64)
    if not scores.size:
        return np.zeros(len(NAMES))
    if not tissue_l0_px2 > 0:
        remedy = "give the area of the tissue that the heatmap covers"
        raise InputError(f"the tissue has an area of {tissue_l0_px2:g} px", remedy, stage="features")
    regions = _regions(heat, threshold, reference=reference)
    if reference and not regions:
        return np.zeros(len(NAMES))
    tissue_cells = tissue_l0_px2 / (REFERENCE_CELL_L0_PX if reference else cell_l0_px) ** 2
    shares = [(scores > np.float32(level)).sum() / tissue_cells for level in LEVELS]
    sums = [np.maximum(scores - level, 0).sum() / tissue_cells for level in LEVELS]
    pair = _reference_pair(regions) if reference else _pair(regions)
    return np.concatenate([shares, sums, *pair])


def _regions(heat: Heat, threshold: float, *, reference: bool) -> list[NDArray[np.float64]]:
    """Return the ten measures, float64 (10,), of each region that the features may use, in row order.

    A map can have a hundred thousand regions. Measured are only those that can be the first or the second region: the
    two largest, the largest strictly smaller one, and the last one, which the reference system takes by mistake.
    """
    above = heat > np.float32(threshold)  # False for NaN
    if reference:
        above = skimage.segmentation.clear_border(above)  # type: ignore[no-untyped-call]
    labels, n = scipy.ndimage.label(above, np.ones((3, 3), np.int8))
    areas = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    first_two = np.argsort(-areas, kind="stable")
    smaller = np.flatnonzero(areas < areas.max(initial=0))
    measured = {*first_two[:2], *smaller[np.argsort(-areas[smaller], kind="stable")][:1], *range(n)[-1:]}
    windows = scipy.ndimage.find_objects(labels)
    return [_measured(heat[windows[k]], labels[windows[k]] == k + 1) for k in sorted(int(k) for k in measured)]


def _measured(heat: Heat, member: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the ten measures of a region, float64 (10,), in the order of `_REGION`.

    Args:
        heat: float32 (rows, cols), probabilities in the bounding box of the region.
        member: bool (rows, cols), the cells of the region.
    """
    shape = skimage.measure.regionprops(member.astype(np.uint8))[0]  # type: ignore[no-untyped-call]
    values, (rows, cols) = heat[member].astype(np.float64), member.shape
    return np.array(
        [
            values.size,
            shape.eccentricity,
            values.size / member.size,
            member.size,
            shape.axis_major_length,
            values.max(),
            values.min(),
            values.mean(),
            rows / cols,
            shape.solidity,
        ]
    )


def _pair(regions: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """Return the measures of the two largest regions, the first of equally large ones; zeros for a missing region."""
    ranked = sorted(regions, key=lambda region: -region[0])
    return [*ranked, *[np.zeros(len(_REGION))] * 2][:2]


def _reference_pair(regions: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """Return the measures that the reference system uses for the two largest regions; ``regions`` is not empty."""
    largest = max(regions, key=lambda region: region[0])
    smaller = [region for region in regions if region[0] < largest[0]]
    if smaller:
        return [largest, max(smaller, key=lambda region: region[0])]
    return [largest, np.concatenate([[-1.0], regions[-1][1:]])]
