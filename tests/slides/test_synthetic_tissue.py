"""A synthetic slide does not depend on how it is divided, and its tissue is that of its specification."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiflow.slides.synthetic import tissue
from wsiflow.slides.synthetic.tissue import Lesion, SlideSpec

SQUARE = ((200, 150), (1300, 150), (1300, 1100), (200, 1100))
SPEC = SlideSpec(
    width_px=1500,
    height_px=1250,
    seed=5,
    stain=tissue.draw_stain(np.random.default_rng(5)),
    tissue=(SQUARE,),
    lesions=(
        Lesion(((400, 300), (1000, 300), (1000, 900), (400, 900)), (((600, 500), (800, 500), (800, 700), (600, 700)),)),
    ),
)
WHOLE = tissue.render(SPEC, 0, 0, 1500, 1250)


@settings(max_examples=20, deadline=None)
@given(x=st.integers(0, 1400), y=st.integers(0, 1150), width=st.integers(1, 700), height=st.integers(1, 700))
def test_window_is_a_part_of_the_whole(x: int, y: int, width: int, height: int) -> None:
    """Pixels depend on their place in the slide, not on the window."""
    width, height = min(width, 1500 - x), min(height, 1250 - y)
    window = tissue.render(SPEC, x, y, width, height)
    np.testing.assert_array_equal(window, WHOLE[y : y + height, x : x + width])


def test_blocks_join_without_a_seam() -> None:
    """Across the border of two blocks, pixels differ no more than across any other column."""
    inside = WHOLE[200:1050].astype(int)
    steps = np.abs(np.diff(inside, axis=1)).mean(axis=(0, 2))
    border = tissue.BLOCK_PX - 1
    nearby = np.r_[steps[border - 40 : border], steps[border + 1 : border + 41]]
    assert steps[border] < nearby.max() * 1.2


def test_another_seed_is_another_slide() -> None:
    """The seed decides where the nuclei are."""
    other = tissue.render(replace(SPEC, seed=6), 300, 200, 200, 200)
    assert np.mean(other != WHOLE[200:400, 300:500]) > 0.5


def test_glass_is_pale_and_noisy() -> None:
    """Outside the tissue there is off-white with sensor noise, which makes thresholds well defined."""
    glass = WHOLE[:100].astype(float)
    assert glass.mean() > 225
    assert 1 < glass.std(axis=(0, 1)).min() < 5


def test_outside_the_slide_is_glass() -> None:
    """A window may extend beyond any border of the slide."""
    beyond = tissue.render(SPEC, -300, -300, 250, 250)
    assert beyond.mean() > 225


def test_tumour_and_normal_tissue_differ_in_texture() -> None:
    """Lymphocytes on a pale ground give more contrast than tumour cells in cytoplasm."""
    rng = np.random.default_rng(1)
    contrast = {
        tumour: np.mean([tissue.patch(rng, tumour=tumour, size_px=224)[..., 1].std() for _ in range(12)])
        for tumour in (False, True)
    }
    assert contrast[False] > contrast[True] + 5


def test_island_in_a_lesion_is_normal_tissue() -> None:
    """An island is rendered as if the lesion were not there."""
    healthy = tissue.render(replace(SPEC, lesions=()), 700, 540, 60, 60)
    np.testing.assert_array_equal(WHOLE[540:600, 700:760], healthy)
    assert np.any(WHOLE[400:460, 700:760] != tissue.render(replace(SPEC, lesions=()), 700, 400, 60, 60))


def test_stain_varies_between_slides() -> None:
    """The colours of the tissue of different slides differ by more than noise."""
    rng = np.random.default_rng(2)
    means = [tissue.patch(rng, tumour=True, size_px=128).mean(axis=(0, 1)) for _ in range(12)]
    assert np.std(means, axis=0).min() > 4


def test_patch_follows_its_generator() -> None:
    """The same generator state gives the same patch."""
    first, second = (tissue.patch(np.random.default_rng(9), tumour=True, size_px=96) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(("axis_px", "kind"), [(822, "itc"), (824, "micro"), (8229, "micro"), (8231, "macro")])
def test_class_of_a_lesion_is_its_longest_axis(axis_px: int, kind: str) -> None:
    """The classes are separated at 0.2 mm and 2 mm, at 0.243 um per px."""
    assert Lesion(((0, 0), (axis_px, 0), (axis_px // 2, 100))).kind == kind
