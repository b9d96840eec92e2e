"""Tissue by the look of the glass: pale and grey slides, fluorescence, ink, black borders, images without glass."""

import numpy as np
import pytest
from numpy.typing import NDArray
from test_tissue import GREEN_INK, PINK, PURPLE, blocks, with_

from wsiflow.plan.glass import black_border, find_glass, inks, tissue_by_glass
from wsiflow.plan.tissue import tissue_mask

ADAPTIVE = with_(method="adaptive", min_chroma=4)
PALE = (226, 221, 225)
BROWN, BLUE_COUNTERSTAIN = (140, 95, 60), (198, 206, 220)
BLUE_INK, RED_INK, BLACK_INK = (40, 70, 190), (210, 30, 45), (30, 30, 32)


def parts(image: NDArray[np.uint8]) -> list[float]:
    """Return the fraction of every block of `blocks` that is tissue; their rims count neither inside nor outside."""
    mask = tissue_mask(image, ADAPTIVE)
    around = np.ones_like(mask)
    found = []
    for left in range(10, mask.shape[1], 40):
        around[19:41, left - 1 : left + 21] = False
        found.append(float(mask[21:39, left + 1 : left + 19].mean()))
    assert not (mask & around).any()
    return found


@pytest.mark.parametrize("noise", [0.0, 2.0], ids=["flat", "noisy"])
@pytest.mark.parametrize("glass", [255, 240, 215])
@pytest.mark.parametrize("beside", [[], [PINK], [PURPLE, PINK]], ids=["alone", "beside-pink", "beside-both"])
def test_pale_tissue_is_found_whatever_is_beside_it(
    beside: list[tuple[int, int, int]], glass: int, noise: float
) -> None:
    """A pale block, which Otsu's threshold loses beside a dark one, is found; its colour is relative to the glass."""
    pale = (PALE[0] - 240 + glass, PALE[1] - 240 + glass, PALE[2] - 240 + glass)
    image = blocks(*beside, pale, background=glass, noise=noise)
    assert min(parts(image)) > 0.8
    if beside:
        assert tissue_mask(image, with_())[20:40, -30:-10].mean() < 0.5


@pytest.mark.parametrize("glass", [239.4, 239.6, 240.2, 254.7])
def test_the_level_of_glass_may_lie_anywhere(glass: float) -> None:
    """On a real overview the mean of many pixels has hardly any noise, and all glass may have one grey level."""
    image = np.full((60, 80, 3), glass, np.float64)
    image[20:40, 10:30], image[20:40, 50:70] = PURPLE, np.array(PALE) - 240 + glass
    image += np.random.default_rng(0).normal(0, 0.1, image.shape)
    rgb = image.round().astype(np.uint8)
    assert parts(rgb) == [1.0, 1.0]
    assert find_glass(rgb).rgb == pytest.approx([glass] * 3, abs=0.6)


def test_a_pale_slide_is_not_grey() -> None:
    """Its colours are weak, but they are there."""
    assert find_glass(blocks(PALE, background=240)).light == "colour"


@pytest.mark.parametrize("colour", [PINK, PURPLE, BROWN, BLUE_COUNTERSTAIN], ids=["pink", "purple", "brown", "blue"])
def test_stains_are_found(colour: tuple[int, int, int]) -> None:
    """So are the colours of H&E and of immunohistochemistry, with its pale counterstain."""
    assert parts(blocks(colour)) == [1.0]
    assert parts(blocks(BROWN, colour)) == [1.0, 1.0]


def test_a_grey_slide_has_tissue() -> None:
    """In a slide of one channel there is no colour at all; what is darker than the glass is tissue."""
    image = blocks(PINK, PURPLE, PALE)
    grey = np.repeat(image.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)
    assert find_glass(grey).light == "grey"
    assert min(parts(grey)) > 0.95
    assert parts(blocks((35, 35, 35), (120, 120, 120))) == [1.0, 1.0]


def test_in_a_slide_with_colours_grey_things_are_not_tissue() -> None:
    """The edge of a coverslip is darker than glass and has its tint."""
    assert parts(blocks(PURPLE, (222, 222, 223), noise=1)) == [1.0, 0.0]


@pytest.mark.parametrize("background", [255, 245, 128, 3, 0])
@pytest.mark.parametrize("noise", [0.0, 1.0, 3.0])
def test_an_empty_slide_has_no_tissue(background: int, noise: float) -> None:
    """White, grey and black slides are empty, however much noise they have."""
    assert not tissue_mask(blocks(background=background, noise=noise), ADAPTIVE).any()


@pytest.mark.parametrize("stain", [(0, 0, 200), (90, 90, 90), (200, 40, 30)])
def test_on_a_dark_slide_what_is_bright_is_tissue(stain: tuple[int, int, int]) -> None:
    """Fluorescence has a dark background, whose noise is no tissue."""
    image = blocks(stain, background=4)
    assert find_glass(image).light == "dark"
    assert parts(image) == [1.0]


@pytest.mark.parametrize("colour", [GREEN_INK, BLUE_INK, RED_INK, BLACK_INK], ids=["green", "blue", "red", "black"])
def test_ink_is_left_out(colour: tuple[int, int, int]) -> None:
    """Pens are not tissue, and beside them dark and pale tissue stays."""
    assert parts(blocks(PURPLE, colour, PINK)) == [1.0, 0.0, 1.0]
    assert parts(blocks(colour, PALE, PALE, PALE, noise=0.5)) == [0.0, 1.0, 1.0, 1.0]
    for stain in (PINK, PURPLE, BROWN, BLUE_COUNTERSTAIN, (60, 35, 90), (90, 105, 170), (185, 75, 65), (190, 60, 75)):
        assert not np.any(inks(blocks(stain)))


def test_a_green_stain_is_no_ink() -> None:
    """Where most of the tissue is green, or blue, that is its stain: light green, aniline blue."""
    for stain in ((120, 190, 150), (60, 110, 190)):
        assert parts(blocks(stain, PURPLE, stain, stain)) == [1.0] * 4


def test_black_borders_are_left_out_and_dark_tissue_is_not() -> None:
    """What was not scanned is black and reaches the border of the slide; a dark piece inside stays."""
    image = blocks((60, 20, 80), PURPLE)
    image[:, :5], image[:3] = 0, (12, 10, 8)
    mask = tissue_mask(image, ADAPTIVE)
    assert not mask[:, :4].any()
    assert mask[20:40, 10:30].all()
    assert black_border(image)[:, :5].all()
    assert not black_border(image)[20:40].any(axis=0)[10:].any()


def test_glass_beside_white_filling_is_no_tissue() -> None:
    """Where the rest of a slide was not scanned it is pure white, and its glass is darker than that."""
    image = blocks(PURPLE, PINK, background=232)
    wide = np.full((60, 300, 3), 255, np.uint8)
    wide[:, :80] = image
    mask = tissue_mask(wide, ADAPTIVE)
    assert mask[20:40, 10:30].all()
    assert mask[20:40, 50:70].all()
    assert mask.sum() <= 2 * 22 * 22


def test_a_large_overview_has_the_mask_of_its_parts() -> None:
    """It is looked at strip by strip, and its glass is known from some of its pixels; no seam is left."""
    image = np.tile(blocks(PURPLE, PALE, noise=0.5), (20, 15, 1))
    mask = tissue_mask(image, ADAPTIVE)
    np.testing.assert_array_equal(mask[60:1140, 80:1120], np.tile(mask[60:120, 80:160], (18, 13)))


def test_an_image_without_glass_is_all_tissue() -> None:
    """A picture of tissue alone has no glass to compare with; Otsu's threshold would take its darker half."""
    rng = np.random.default_rng(0)
    image = np.clip(rng.normal((190, 120, 180), 12, (50, 60, 3)), 0, 255).astype(np.uint8)
    image[:25] = np.clip(rng.normal((120, 80, 160), 12, (25, 60, 3)), 0, 255).astype(np.uint8)
    assert find_glass(image).light == "none"
    assert tissue_by_glass(image, least_tint=4).all()
