"""The size of pixels: which stated value is used, and which are doubted."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

from wsiflow.errors import InputError
from wsiflow.slides.manifest import Case
from wsiflow.slides.pixel_size import choose
from wsiflow.slides.slide import SlideFacts, open_slide

FACTS = SlideFacts("T1", Path("T1.svs"), "aperio", (4000, 3000), (0.25, 0.25), ((10, 10),), (1.0,), (255, 255, 255))
LISTED = Case("T1", Path("T1.svs"), line=2)


def facts(*mpp: float, side_px: int = 4000) -> SlideFacts:
    return replace(FACTS, mpp=(mpp[0], mpp[-1]) if mpp else None, l0_size_px=(side_px, side_px // 2))


def refused(about: SlideFacts, case: Case = LISTED) -> InputError:
    with pytest.raises(InputError) as caught:
        choose(about, case)
    return caught.value


@pytest.mark.parametrize(
    ("stated", "manifest", "expected"),
    [((0.25,), None, 0.25), ((0.25, 0.252), None, 0.251), ((0.25,), 0.26, 0.26), ((), 0.5, 0.5), ((84.67,), 0.5, 0.5)],
    ids=["slide", "nearly-square", "manifest-wins", "manifest-only", "instead-of-300-dpi"],
)
def test_the_pixel_size_is_the_manifests_else_the_slides(
    stated: tuple[float, ...], manifest: float | None, expected: float
) -> None:
    """The manifest takes precedence, because slides are sometimes wrong; there is nothing to say of it."""
    assert choose(facts(*stated), replace(LISTED, mpp=manifest)) == (pytest.approx(expected), "")


@pytest.mark.parametrize(
    ("stated", "side_px", "cause", "meant"),
    [
        ((), 4000, "the slide does not state its pixel size", ""),
        ((0.25, 0.5), 4000, "0.25 x 0.5 um, which differ by more than 2%", ""),
        ((0.00499,), 4000, "states a pixel size of 0.00499 x 0.00499 um, outside 0.05 to 100", "0.499"),
        ((0.000253,), 4000, "states a pixel size of 0.000253", "0.253"),
        ((253,), 4000, "states a pixel size of 253 x 253 um", "0.253"),
        ((10000 / 300,), 4000, "its 300 dpi are", ""),
        ((9000,), 4000, "states a pixel size of 9000 x 9000 um", ""),
        ((25400 / 72,), 4000, "its 72 dpi are the resolution of a printer or screen", ""),
        ((25400 / 96,), 90000, "its 96 dpi are", ""),
        ((25400 / 300,), 4000, "its 300 dpi are", ""),
        ((10000 / 118.11,), 4000, "its 300 dpi are", ""),
        ((25400 / 600,), 4000, "its 600 dpi are", ""),
        ((1000.0,), 4000, "1 px per mm is what programs write", ""),
        ((10000.0,), 4000, "1 px per cm is what programs write", ""),
        ((25400.0,), 4000, "1 px per inch is what programs write", ""),
        ((2.5,), 90000, "states 2.5 um/px, by which it is 225 mm long, longer than glass", "0.25"),
        ((0.0505,), 1200, "states 0.0505 um/px, by which it is only 0.061 mm long", "0.505"),
    ],
)
def test_a_doubtful_pixel_size_is_refused(stated: tuple[float, ...], side_px: int, cause: str, meant: str) -> None:
    """The error has the stated value, what it probably should be, and both ways to give it."""
    error = refused(facts(*stated, side_px=side_px))
    assert cause in error.cause
    assert f"dataset.mpp={meant or '<um per pixel>'}," in error.remedy
    assert (f"(was {meant} meant?)" in error.remedy) == bool(meant)
    assert "'slide_id,path,mpp'" in error.remedy
    assert "'T1,T1.svs,<um per pixel>'" in error.remedy


@pytest.mark.parametrize(
    ("mpp", "side_px"),
    [(0.11, 250_000), (0.25, 300_000), (0.2204, 340_000), (0.5, 150_000), (1.0, 76_000), (8.0, 9_000), (0.25, 60)],
)
def test_what_scanners_state_is_not_doubted(mpp: float, side_px: int) -> None:
    """Whole glass at every usual magnification, and a small region."""
    assert choose(facts(mpp, side_px=side_px), LISTED) == (mpp, "")


@pytest.mark.parametrize("mpp", [0.05, 100.1, 1000.0, float("nan"), 0.00025])
def test_a_given_value_out_of_bounds_is_refused(mpp: float) -> None:
    """The source of the value is named."""
    if mpp == 0.05:
        assert choose(facts(), replace(LISTED, mpp=mpp)).um_px == mpp
    else:
        assert "the manifest states a pixel size of" in refused(FACTS, replace(LISTED, mpp=mpp)).cause
        assert "dataset.mpp states" in refused(FACTS, replace(LISTED, mpp=mpp, line=0)).cause


@pytest.mark.parametrize(
    ("stated", "given", "remark"),
    [
        (0.499, 0.25, "the manifest has 0.25 um/px, which is used; the slide states 0.499"),
        (0.25, 0.2751, "the slide states 0.25"),
        (0.25, 0.2749, ""),
        (0.25, 2.5, "the slide states 0.25, which differs by a factor of 10"),
        (0.97, 0.382, "which differs by a factor of 2.54, as between inch and centimetre"),
    ],
)
def test_a_contradiction_beyond_a_tenth_is_told(stated: float, given: float, remark: str) -> None:
    """The given value is used, and the remark says so."""
    chosen = choose(facts(stated), replace(LISTED, mpp=given))
    assert chosen.um_px == given
    assert chosen.remark.endswith(remark)
    assert bool(chosen.remark) == bool(remark)


def test_a_given_value_for_slides_without_one_leaves_the_others_alone() -> None:
    """A folder has slides of several scanners; one value is for those that state none, or no plausible one."""
    case = replace(LISTED, line=0, mpp_if_none=0.25)
    assert choose(facts(), case) == (0.25, "")
    assert choose(facts(84.667), case) == (0.25, "")
    assert choose(facts(0.26), case) == (0.26, "")
    um_px, remark = choose(facts(0.5), case)
    assert (um_px, "dataset.mpp=0.25 is for slides that state none" in remark) == (0.5, True)
    assert choose(facts(2.5, side_px=90_000), case).um_px == 0.25


def test_a_doubted_value_is_confirmed_by_giving_it() -> None:
    """Very large glass and immersion objectives exist: the run goes on, with a remark."""
    assert choose(facts(0.055, side_px=1200), replace(LISTED, mpp_if_none=0.055)) == (0.055, "")
    chosen = choose(facts(0.5, side_px=200_000), replace(LISTED, mpp_if_none=0.5))
    assert (chosen.um_px, "100 mm long" in chosen.remark) == (0.5, True)
    assert "finer than light" in choose(facts(0.055, side_px=90_000), LISTED).remark


@pytest.mark.parametrize(
    ("unit", "per_unit", "um_px"),
    [
        ("INCH", 25400 / 0.25, 0.25),
        ("CENTIMETER", 10000 / 0.25, 0.25),
        ("NONE", 10000 / 0.25, None),
        ("INCH", 300, None),
        ("CENTIMETER", 118.11, None),
    ],
)
def test_the_tags_of_a_tiff_are_read_in_their_unit(
    tmp_path: Path, unit: str, per_unit: float, um_px: float | None
) -> None:
    """Without a unit they state nothing, and the resolution of a printer states no pixel size."""
    pixels, path = np.zeros((256, 256, 3), np.uint8), tmp_path / "a.tif"
    resolution = {"resolution": (per_unit, per_unit), "resolutionunit": unit}
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", compression="deflate", **resolution)
    with open_slide(path, slide_id="a") as opened:
        if um_px is None:
            assert "does not state its pixel size" in refused(opened.facts).cause
        else:
            assert choose(opened.facts, LISTED) == (pytest.approx(um_px, rel=1e-4), "")
