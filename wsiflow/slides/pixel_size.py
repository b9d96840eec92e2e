"""The size of a slide's pixels: which of the stated values is used, and whether it can be true.

Input: what a slide states, what the user has given, and the slide's size. Output: micrometres per level-0 pixel, with a
remark where a user should know of the choice; or a refusal.

What the user gives is used, also where the slide states another value; a difference is only mentioned. What a slide
states by itself is refused where it can hardly be true, since every number of the run would be wrong: the resolution of
a printer, which image programs write into every file, or a slide that is larger than glass or smaller than a grain of
sand. Giving the same value confirms it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from wsiflow.errors import InputError
from wsiflow.slides.manifest import Case
from wsiflow.slides.slide import SlideFacts

BOUNDS_UM_PX = (0.05, 100.0)
ANISOTROPY = 0.02
MOST_MM = 80.0
"""Side of the largest slide that is not doubted: glass has 75 or 76 mm."""

_CONFLICT = 0.1
_UM_PER_INCH, _UM_PER_CM = 25400.0, 10000.0
_PRINTERS_DPI = (72, 96, 150, 180, 200, 240, 300, 350, 360, 400, 600, 720, 1200)
_DPI_TOLERANCE = 0.005
_UNITS_UM = {"mm": 1000.0, "cm": _UM_PER_CM, "inch": _UM_PER_INCH}
_COARSEST_SCANNER_UM_PX = 20.0
_FINE_UM_PX = 0.1  # below the resolution of light
_LEAST_MM = 1.0
_SCANNERS_UM_PX = (0.1, 1.2)
_FACTORS = {10: "10", 0.1: "10", 1000: "1,000", 0.001: "1,000", 2.54: "2.54, as between inch and centimetre"}
_FACTORS |= {1 / 2.54: _FACTORS[2.54], 100: "100", 0.01: "100"}
_FACTOR_TOLERANCE = 0.06


class PixelSize(NamedTuple):
    """Micrometres per level-0 pixel, and what a user should know of them; empty where nothing is unusual."""

    um_px: float
    remark: str = ""


class _Doubt(NamedTuple):
    """Why a stated value is not used, and the value that was probably meant, um, or None."""

    cause: str
    meant: float | None = None


def choose(facts: SlideFacts, case: Case) -> PixelSize:
    """Return the size of a slide's pixels: as the user has given it, else as the slide states it.

    Args:
        facts: Metadata of the slide.
        case: The slide, with the values that the manifest or the settings give.

    Raises:
        InputError: Neither gives a value, x and y differ by more than 2 %, or the value cannot be true.
    """
    if case.mpp is not None:
        return _given(case.mpp, "the manifest" if case.line else "dataset.mpp", facts)
    doubt = _doubt(facts)
    if doubt is not None and case.mpp_if_none is not None:
        return _given(case.mpp_if_none, "dataset.mpp", facts)
    if doubt is not None or facts.mpp is None:
        doubt = doubt or _Doubt("")
        raise InputError(doubt.cause, _remedy(facts, doubt.meant), slide=facts.slide_id, path=facts.path)
    um_px = sum(facts.mpp) / 2
    if case.mpp_if_none is not None and _differ(um_px, case.mpp_if_none):
        why = f"dataset.mpp={case.mpp_if_none:g} is for slides that state none"
        return PixelSize(um_px, f"the {um_px:g} um/px that the slide states are used: {why}")
    if um_px < _FINE_UM_PX:
        return PixelSize(um_px, f"{um_px:g} um/px are finer than light resolves; correct them with dataset.mpp=")
    return PixelSize(um_px)


def stated(facts: SlideFacts) -> float | None:
    """Return the size that a slide states by itself, um; None where it states none, or one that can hardly be true."""
    return None if facts.mpp is None or _doubt(facts) is not None else sum(facts.mpp) / 2


def _given(um_px: float, who: str, facts: SlideFacts) -> PixelSize:
    """Return the value that a user has given, with a remark where it contradicts the slide or the size of glass.

    Raises:
        InputError: It is out of bounds.
    """
    low, high = BOUNDS_UM_PX
    if not low <= um_px <= high:
        cause = f"{who} states a pixel size of {um_px:g} um, outside {low:g} to {high:g}"
        raise InputError(cause, _remedy(facts, _meant(um_px, facts)), slide=facts.slide_id, path=facts.path)
    if facts.mpp is not None and _printers_dpi(facts.mpp) is None and any(_differ(um_px, one) for one in facts.mpp):
        own = " x ".join(f"{one:.4g}" for one in dict.fromkeys(facts.mpp))
        ratio = um_px / facts.mpp[0]
        factors = [name for factor, name in _FACTORS.items() if abs(ratio / factor - 1) < _FACTOR_TOLERANCE]
        why = f", which differs by a factor of {factors[0]}" if factors else ""
        return PixelSize(um_px, f"{who} has {um_px:g} um/px, which is used; the slide states {own}{why}")
    if _side_mm(um_px, facts) > MOST_MM:
        wide = f"the slide is {_side_mm(um_px, facts):.0f} mm long, longer than glass"
        return PixelSize(um_px, f"{who} has {um_px:g} um/px, which is used, though {wide}")
    return PixelSize(um_px)


def _doubt(facts: SlideFacts) -> _Doubt | None:
    """Return why the value that a slide states is not used, or None where it may be true."""
    if facts.mpp is None:
        return _Doubt("the slide does not state its pixel size")
    dpi = _printers_dpi(facts.mpp)
    if dpi is not None:
        return _Doubt(
            f"the slide does not state its pixel size: its {dpi} dpi are the resolution of a printer or screen"
        )
    unit = next(
        (name for name, um in _UNITS_UM.items() if all(abs(one / um - 1) < _DPI_TOLERANCE for one in facts.mpp)), ""
    )
    if unit:
        return _Doubt(
            f"the slide does not state its pixel size: 1 px per {unit} is what programs write where they know none"
        )
    (mpp_x, mpp_y), (low, high) = facts.mpp, BOUNDS_UM_PX
    if not (low <= mpp_x <= high and low <= mpp_y <= high):
        cause = f"the slide states a pixel size of {mpp_x:g} x {mpp_y:g} um, outside {low:g} to {high:g}"
        return _Doubt(cause, _meant((mpp_x + mpp_y) / 2, facts))
    if abs(mpp_x - mpp_y) > ANISOTROPY * max(mpp_x, mpp_y):
        return _Doubt(
            f"the slide states pixels of {mpp_x:g} x {mpp_y:g} um, which differ by more than {ANISOTROPY:.0%}"
        )
    return _doubt_of_side((mpp_x + mpp_y) / 2, facts)


def _doubt_of_side(um_px: float, facts: SlideFacts) -> _Doubt | None:
    """Return why a slide cannot have pixels of a size, by the side that it would have; None where it can."""
    side_mm, stated = _side_mm(um_px, facts), f"the slide states {um_px:.4g} um/px"
    if side_mm > MOST_MM:
        return _Doubt(f"{stated}, by which it is {side_mm:.0f} mm long, longer than glass", _meant(um_px, facts))
    if um_px < _FINE_UM_PX and side_mm < _LEAST_MM:
        cause = f"{stated}, by which it is only {side_mm:.2g} mm long, and finer than light resolves"
        return _Doubt(cause, _meant(um_px, facts))
    return None


def _printers_dpi(mpp: Sequence[float]) -> int | None:
    """Return the dots per inch of a printer or screen that a pixel size is, in whatever unit they were written."""
    if min(mpp) < _COARSEST_SCANNER_UM_PX:
        return None
    for unit_um in (_UM_PER_INCH, _UM_PER_CM):
        for dpi in _PRINTERS_DPI:
            if all(abs(unit_um / one / dpi - 1) < _DPI_TOLERANCE for one in mpp):
                return dpi
    return None


def _meant(um_px: float, facts: SlideFacts) -> float | None:
    """Return the value that was probably meant: a scanner's, if a point or a unit is corrected; None without one."""
    low, high = _SCANNERS_UM_PX
    values = (um_px * factor for factor in (10, 0.1, 1000, 0.001, 100, 0.01))
    return next((one for one in values if low <= one <= high and _side_mm(one, facts) <= MOST_MM), None)


def _side_mm(um_px: float, facts: SlideFacts) -> float:
    return max(facts.l0_size_px) * um_px / 1000


def _differ(a: float, b: float) -> bool:
    return abs(a - b) > _CONFLICT * min(a, b)


def _remedy(facts: SlideFacts, meant: float | None) -> str:
    value = "<um per pixel>" if meant is None else f"{meant:.4g}"
    guess = "" if meant is None else f" (was {meant:.4g} meant?)"
    return (
        f"give the level-0 pixel size{guess}: dataset.mpp={value}, or in the manifest: header 'slide_id,path,mpp', "
        f"line '{facts.slide_id},{facts.path.name},<um per pixel>'"
    )
