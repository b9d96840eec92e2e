"""Compare ways to find tissue on real overviews, as they are and made grey, pale, inked, framed, with pale lesions.

No truth says where the tissue of these overviews is. Dark tissue is what both thresholds of colour find on the overview
as it is; it must be found in every other version. Lesions are drawn on glass beside tissue, so their place is known.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from skimage.filters import threshold_otsu
from skimage.filters.rank import entropy
from skimage.morphology import disk

from benchmarks.measuring import ResultTable, arguments, finish, machine, say
from wsiflow.plan.tissue import TissueParams, select_tiles, tile_coverage, tissue_mask
from wsiflow.slides.slide import open_slide

CONF = Path(__file__).parents[1] / "conf/tissue"
STRENGTHS = (0.02, 0.036, 0.06, 0.1, 0.2, 0.4)
"""Optical densities of drawn lesions in green; that of (226, 221, 225) on glass of 240 is 0.036."""

_STAIN = np.array([0.72, 1.0, 0.78])  # absorption of red and blue as a part of that of green, as in pale eosin
_COUNTERSTAIN = np.array([1.0, 0.7, 0.35])  # of haematoxylin alone
_LESION_PX, _LESIONS, _AWAY_PX = 2, 4, 3
_PENS = {"green": (30, 150, 80), "blue": (30, 60, 190), "red": (210, 30, 45), "black": (25, 25, 28)}
_FRAME_PX = 5
_ENTROPY_PX = 3  # radius of the neighbourhood
_TILE_UM = 224 * 0.5
_SLIDES = {
    "CMU-1-Small-Region.svs": 0.499,
    "multi_frame_jpeg2000_camelyon_challenge_image.dcm": 28.97,
    "test3-DAPI-2-387.ndpi": 0.23,
}

Rgb = NDArray[np.uint8]
Mask = NDArray[np.bool_]


class Version(NamedTuple):
    """An overview as a method sees it, and what was drawn on it."""

    overview: Rgb
    drawn: Mask


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the methods, and write ``tissue.json``."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, required=True, help="folder with camelyon16/thumbnails_128 and wsi/good")
    given = parser.parse_args(argv)
    about = machine()
    paths = sorted((given.data / "camelyon16/thumbnails_128").glob("*.jpg"))[:: 20 if given.quick else 1]
    overviews = [np.array(Image.open(path).convert("RGB")) for path in paths]
    dark = [_dark(overview) for overview in overviews]
    places = [_places(one, seed) for seed, one in enumerate(dark)]
    values: dict[str, Any] = {"overviews": len(overviews), "area": {}, "dark": {}, "taken": {}, "lesions": {}}
    for name, method in _methods(at_px=1).items():
        say(f"{name} on {len(overviews)} overviews")
        values["area"][name], values["dark"][name], values["taken"][name] = _on_versions(overviews, dark, method)
        values["lesions"][name] = {str(od): _on_lesions(overviews, places, method, od) for od in STRENGTHS}
    values["slides"] = {name: _on_slide(given.data / "wsi/good" / name, um_px) for name, um_px in _SLIDES.items()}
    finish(given, "tissue", about, values, _tables(values))


def _methods(*, at_px: int) -> dict[str, Callable[[Rgb], Mask]]:
    """Return the methods by name, without the cleaning of small pieces that the scale of an overview decides.

    Args:
        at_px: Least area of a piece; 1 keeps all.
    """

    def product(name: str) -> Callable[[Rgb], Mask]:
        values = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
        params = TissueParams(**values | {"closing_px": 0, "min_object_px": at_px})
        return lambda overview: tissue_mask(overview, params)

    return {name: product(name) for name in ("saturation", "hsv_otsu")} | {
        "entropy": _by_entropy,
        "adaptive": product("adaptive"),
    }


def _by_entropy(overview: Rgb) -> Mask:
    """Return where the local entropy of brightness is above Otsu's threshold: what has texture."""
    values = entropy(cv2.cvtColor(overview, cv2.COLOR_RGB2GRAY), disk(_ENTROPY_PX))
    return np.asarray(values > threshold_otsu(values))


def _dark(overview: Rgb) -> Mask:
    methods = _methods(at_px=1)
    return methods["saturation"](overview) & methods["hsv_otsu"](overview)


# --- versions of an overview


def _grey(overview: Rgb) -> Rgb:
    return np.repeat(cv2.cvtColor(overview, cv2.COLOR_RGB2GRAY)[..., np.newaxis], 3, axis=2)


def _counterstained(overview: Rgb) -> Rgb:
    """Return the overview as a pale blue counterstain: a third of its absorption, all in one colour."""
    glass = np.percentile(overview.reshape(-1, 3), 95, axis=0)
    density = np.log10((glass + 1) / (overview + 1.0)).clip(0).mean(axis=2, keepdims=True)
    return np.clip(glass * 10 ** (-density / 3 * _COUNTERSTAIN), 0, 255).astype(np.uint8)


def _inked(overview: Rgb, dark: Mask, colour: tuple[int, int, int]) -> Version:
    """Return the overview with a line of ink across it, 2 px wide, on glass."""
    drawn = np.zeros(overview.shape[:2], np.uint8)
    rows, cols = drawn.shape
    cv2.line(drawn, (cols // 8, rows // 8), (cols * 7 // 8, rows // 5), 1, 2)
    mask = (drawn > 0) & ~dark
    inked = overview.copy()
    inked[mask] = colour
    return Version(inked, mask)


def _framed(overview: Rgb) -> Version:
    """Return the overview in a black frame, as converters fill what was not scanned."""
    framed = cv2.copyMakeBorder(overview, *[_FRAME_PX] * 4, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    mask = np.ones(framed.shape[:2], np.bool_)
    mask[_FRAME_PX:-_FRAME_PX, _FRAME_PX:-_FRAME_PX] = False
    return Version(np.asarray(framed, np.uint8), mask)


def _places(dark: Mask, seed: int) -> list[Mask]:
    """Return discs beside the dark tissue of an overview, at random places that depend on the seed alone."""
    near = cv2.dilate(dark.astype(np.uint8), disk(4 * _AWAY_PX)) > 0
    close = cv2.dilate(dark.astype(np.uint8), disk(_AWAY_PX)) > 0
    free = np.argwhere(near & ~close)
    rng = np.random.default_rng(seed)
    chosen = free[rng.permutation(len(free))[:_LESIONS]]
    discs = []
    for row, col in chosen.tolist():
        drawn = np.zeros(dark.shape, np.uint8)
        cv2.circle(drawn, (col, row), _LESION_PX, 1, -1)
        discs.append(drawn > 0)
    return discs


# --- measures


def _on_versions(
    overviews: Sequence[Rgb], references: Sequence[Mask], method: Callable[[Rgb], Mask]
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Return shares of area by version, of dark tissue that is found, and of ink and frames that are taken."""
    area: dict[str, list[float]] = {"as it is": [], "grey": [], "counterstain": []}
    dark: dict[str, list[float]] = {name: [] for name in area}
    taken: dict[str, list[float]] = {}
    for overview, reference in zip(overviews, references, strict=True):
        versions = {"as it is": overview, "grey": _grey(overview), "counterstain": _counterstained(overview)}
        for name, version in versions.items():
            mask = method(version)
            area[name].append(float(mask.mean()))
            dark[name].append(float(mask[reference].mean()) if reference.any() else 1.0)
        marks = {f"{name} ink": _inked(overview, reference, colour) for name, colour in _PENS.items()}
        for name, version in (marks | {"black frame": _framed(overview)}).items():
            if version.drawn.any():
                taken.setdefault(name, []).append(float(method(version.overview)[version.drawn].mean()))
    return _means(area), _means(dark), _means(taken)


def _on_lesions(
    overviews: Sequence[Rgb], places: Sequence[Sequence[Mask]], method: Callable[[Rgb], Mask], density: float
) -> dict[str, float]:
    """Return the recall of lesions that are drawn at some places, by number (any of it) and by area."""
    found, parts = [], []
    for overview, discs in zip(overviews, places, strict=True):
        pale = overview.astype(np.float64)
        for each in discs:
            pale[each] *= 10 ** (-density * _STAIN)
        mask = method(pale.astype(np.uint8))
        found += [bool(mask[each].any()) for each in discs]
        parts += [float(mask[each].mean()) for each in discs]
    return {"lesions": float(np.mean(found)), "area": float(np.mean(parts)), "n": float(len(found))}


def _on_slide(path: Path, um_px: float) -> dict[str, dict[str, float]]:
    """Return the share of a real slide that is tissue, and the tiles that are looked at, by method."""
    with open_slide(path, slide_id=path.stem) as opened:
        downsample = max(1.0, round(8 / um_px))
        overview = opened.overview(downsample)
    l0_tile_px = max(_TILE_UM / um_px, 1)
    grid = (
        int(np.ceil(overview.shape[0] * downsample / l0_tile_px)),
        int(np.ceil(overview.shape[1] * downsample / l0_tile_px)),
    )
    results = {}
    for name, method in _methods(at_px=16).items():
        mask = method(overview)
        coverage = tile_coverage(mask, downsample=downsample, tile_l0_px=l0_tile_px, grid=grid)
        params = TissueParams(**yaml.safe_load((CONF / "adaptive.yaml").read_text(encoding="utf-8")))
        results[name] = {"area": float(mask.mean()), "tiles": float(select_tiles(coverage, params).sum())}
    return results


def _means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: float(np.mean(each)) for name, each in values.items()}


# --- tables


def _tables(values: Mapping[str, Any]) -> list[ResultTable]:
    count, names = values["overviews"], list(values["area"])
    marks = list(values["taken"][names[0]])
    first = ResultTable(
        f"Share of {count} real overviews that is tissue, and of their dark tissue that is found",
        ["method", "area as it is", "grey", "counterstain", "dark tissue as it is", "grey", "counterstain", *marks],
        [
            [
                name,
                *(_percent(values["area"][name][version]) for version in values["area"][name]),
                *(_percent(values["dark"][name][version]) for version in values["dark"][name]),
                *(_percent(values["taken"][name][mark]) for mark in marks),
            ]
            for name in names
        ],
    )
    lesions = values["lesions"]
    second = ResultTable(
        f"Recall of {lesions[names[0]][str(STRENGTHS[0])]['n']:.0f} lesions drawn on glass, by number and by area",
        ["optical density in green", *names],
        [
            [
                f"{od:g}",
                *(
                    f"{_percent(one['lesions'])}, {_percent(one['area'])}"
                    for one in (lesions[n][str(od)] for n in names)
                ),
            ]
            for od in STRENGTHS
        ],
    )
    third = ResultTable(
        "Share of real slides that is tissue, and tiles that are looked at",
        ["slide", *names],
        [
            [slide, *(f"{_percent(one[name]['area'])}, {one[name]['tiles']:,.0f}" for name in names)]
            for slide, one in values["slides"].items()
        ],
    )
    return [first, second, third]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    main()
