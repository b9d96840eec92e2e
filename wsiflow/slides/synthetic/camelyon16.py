"""Synthetic slides like those of CAMELYON16: real outlines of tissue and metastases, reduced, and filled with tissue.

Input: an `Atlas`. Output: descriptions of slides (`plan_slides`) and their pixels (`paint`). No file is written here.

Outlines are reduced by a scale, but the tissue in them is not: a slide of a quarter of the size is a quarter as many
cells wide, and the lengths in an evaluation must be scaled too. Training and test slides share neither images nor
outlines. Points are x, y in level-0 px of the synthetic slide.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError
from wsiflow.slides.stain.fits import DensityFit
from wsiflow.slides.synthetic import textures
from wsiflow.slides.synthetic.atlas import SCANNERS, Atlas, Part, Picture, area, part_of
from wsiflow.slides.synthetic.tissue import UM_PX, Lesion, Polygon, polygon

GENERATION = 1  # must be increased when the same seed gives other pixels

TISSUE_MM2 = (10.0, 60.0)  # area of a section at real size; four fifths of the real sections are in this range
LEAST_INSIDE = 0.6  # minimum fraction of a metastasis that lies on the tissue
_MARGIN_PX = 224  # width of the glass around the tissue
_RIM_PX = 64  # width of the tissue around every metastasis
_COARSE_PX = 16  # pitch of the grid on which outlines are placed
_PIECES = 8  # number of images per class that form the texture of a slide
_DECOYS, _MOST_DECOY = 4, 0.05  # maximum number of decoys on a slide, and maximum fraction of the tissue for each
_MOST_TUMOUR = 0.5  # maximum fraction of the tissue
_MOST_SECTIONS = 12  # maximum number of sections that are tried for the metastases of a slide
_PURITY = (0.45, 1.0)


class SyntheticSlide(NamedTuple):
    """The description of one synthetic slide.

    Attributes:
        slide_id: Name of the slide.
        part: Training or test.
        scanner: Scanner whose stains it has.
        seed: Seed of texture, mixture and noise.
        size_px: Width and height.
        tissue: Outlines of tissue.
        lesions: Metastases.
        decoys: Outlines that are filled with a second normal texture, just as metastases are with tumour.
        purity: Fraction of the inner texture in the middle of each decoy and, after these, of each metastasis.
        normal: Names of the images of its normal tissue.
        other: Names of the images of its decoys.
        tumour: Names of the images of its metastases.
        appearance: Its stains and scanner.
        like: The real slides with the outlines of its tissue and of its metastases (an empty text without metastases).
    """

    slide_id: str
    part: Part
    scanner: str
    seed: int
    size_px: tuple[int, int]
    tissue: tuple[Polygon, ...]
    lesions: tuple[Lesion, ...]
    decoys: tuple[Polygon, ...]
    purity: tuple[float, ...]
    normal: tuple[str, ...]
    other: tuple[str, ...]
    tumour: tuple[str, ...]
    appearance: textures.Appearance
    like: tuple[str, str]


def plan_slides(atlas: Atlas, part: Part, *, slides: int, scale: float, seed: int) -> tuple[SyntheticSlide, ...]:
    """Return the descriptions of slides; every second one has metastases.

    Each slide has the outlines of different real slides as long as there are enough of them.

    Args:
        atlas: Material of the slides.
        part: Part of the material that may be used.
        slides: Number of slides.
        scale: Ratio of lengths on the synthetic slide to those on the real one, 0 to 1.
        seed: Seed of all random choices.

    Raises:
        InputError: The part has no outlines, or none of its metastases fits on a section.
    """
    pairs = _pairs(atlas, part, slides=slides, scale=scale, seed=seed)
    return tuple(_planned(atlas, part, index, layout, seed) for index, layout in enumerate(pairs))


def paint(planned: SyntheticSlide, pictures: tuple[Picture, ...]) -> NDArray[np.uint8]:
    """Return the pixels of a slide.

    Args:
        planned: Description of the slide.
        pictures: The images of the atlas.

    Returns:
        uint8 (rows, cols, 3), RGB.
    """
    codes = {picture.name: picture.codes for picture in pictures}
    width_px, height_px = planned.size_px
    tissue = _smooth(planned.tissue, planned.size_px)
    field = textures.quilt(_stack(codes, planned.normal), tissue > 0, planned.seed)
    regions = [(Lesion(outline), planned.other) for outline in planned.decoys]
    regions += [(lesion, planned.tumour) for lesion in planned.lesions]
    for index, (region, names) in enumerate(regions):
        x, y, cols, rows = cv2.boundingRect(np.array(region.outline, np.int32))
        x0, y0, x1, y1 = max(0, x), max(0, y), min(width_px, x + cols), min(height_px, y + rows)
        inside = filled((region.outline,), (x0, y0), (x1 - x0, y1 - y0))
        inside[filled(region.islands, (x0, y0), (x1 - x0, y1 - y0)) > 0] = 0
        seed = 1000 * planned.seed + index
        share = textures.share_of_tumour(inside, planned.purity[index], seed)
        over = textures.quilt(_stack(codes, names), share > 0, seed)
        field[y0:y1, x0:x1] = textures.mixed(field[y0:y1, x0:x1], over, share)
    for top in range(0, height_px, 512):  # in strips, so that no float array has the size of the slide
        strip = np.s_[top : top + 512]
        share = tissue[strip].astype(np.float32) / np.float32(255)
        field[strip] = textures.mixed(np.zeros_like(field[strip]), field[strip], share)
    return textures.coloured(field, planned.appearance, planned.seed)


_kept_pictures: list[Picture] = []


def keep_pictures(pictures: tuple[Picture, ...]) -> None:
    """Store the images of an atlas in this process, so that they are sent to it once and not with every slide."""
    _kept_pictures[:] = pictures


def kept_pictures() -> tuple[Picture, ...]:
    """Return the images that `keep_pictures` stored in this process."""
    return tuple(_kept_pictures)


class _Layout(NamedTuple):
    """The outlines of a slide's tissue, metastases and decoys in synthetic px, and the real slides they come from."""

    like: tuple[str, str]
    size_px: tuple[int, int]
    tissue: tuple[Polygon, ...]
    lesions: tuple[Lesion, ...]
    decoys: tuple[Polygon, ...]


def _pairs(atlas: Atlas, part: Part, *, slides: int, scale: float, seed: int) -> Iterator[_Layout]:
    """Yield the layout of each slide, alternately without and with metastases."""
    rng = np.random.default_rng([seed, part == "test"])
    sections = [slide for slide in sorted(atlas.sections) if part_of(slide) == part and _in_bounds(atlas, slide)]
    diseased = [slide for slide in sorted(atlas.metastases) if part_of(slide) == part]
    if not sections or not diseased:
        raise InputError(f"the {part} part has no outlines", "complete the folder camelyon16/", stage="synth")
    rng.shuffle(sections)
    rng.shuffle(diseased)
    queue = iter(diseased * (1 + slides))
    for index in range(slides):
        turn = sections[index % len(sections) :] + sections[: index % len(sections)]
        if index % 2 == 0:
            yield _laid_out(rng, atlas, (turn[0], ""), (), scale)
            continue
        fits = (fit for source in queue for fit in _fitting(rng, atlas, turn, source, scale))
        fit = next(fits, None)
        if fit is None:
            raise InputError("no metastases fit on a section", "take another seed or scale", stage="synth")
        yield _laid_out(rng, atlas, *fit, scale)


def _in_bounds(atlas: Atlas, slide: str) -> bool:
    """Return whether the area of a section is within `TISSUE_MM2`."""
    low, high = TISSUE_MM2
    return low <= area(atlas.sections[slide]) * (UM_PX / 1000) ** 2 <= high


def _fitting(
    rng: np.random.Generator, atlas: Atlas, sections: list[str], source: str, scale: float
) -> Iterator[tuple[tuple[str, str], tuple[Lesion, ...]]]:
    """Yield sections with room for at least half of a slide's metastases.

    Each comes with the names of both real slides and the metastases in their best position on the section.
    """
    outlines, islands = atlas.metastases[source]
    for slide in sections[:_MOST_SECTIONS]:
        section = atlas.sections[slide] * scale
        if sum(map(area, outlines)) * scale**2 > _MOST_TUMOUR * area(section):
            continue
        turn = _turn(rng)
        turned = [(outline @ turn) * scale for outline in outlines]
        shift, inside = _best_shift(rng, section, turned)
        kept = [index for index, share in enumerate(inside) if share >= LEAST_INSIDE and area(turned[index]) >= 64]
        if 2 * len(kept) >= len(outlines):
            holes = [(island @ turn) * scale + shift for island in islands]
            yield (slide, source), tuple(_lesion(turned[index] + shift, holes) for index in kept)


def _turn(rng: np.random.Generator) -> NDArray[np.float64]:
    """Return a random matrix (2, 2): a rotation by a multiple of 90°, in half of the cases with a reflection."""
    turn = np.linalg.matrix_power(np.array([[0.0, 1.0], [-1.0, 0.0]]), int(rng.integers(4)))
    return turn @ np.diag([1.0, -1.0]) if rng.random() < 0.5 else turn


def _lesion(outline: NDArray[np.float64], holes: list[NDArray[np.float64]]) -> Lesion:
    """Return a metastasis with those islands of normal tissue whose first point lies inside it."""
    ring = outline.astype(np.float32)
    mine = [hole for hole in holes if cv2.pointPolygonTest(ring, hole[0].tolist(), measureDist=False) > 0]
    return Lesion(polygon(outline), tuple(polygon(hole) for hole in mine))


def _best_shift(
    rng: np.random.Generator, section: NDArray[np.float64], outlines: list[NDArray[np.float64]]
) -> tuple[NDArray[np.float64], list[float]]:
    """Return the shift that places the outlines best on the section, and the fraction of each that then lies on it.

    The best shift maximises the sum of these fractions, so that small outlines count as much as large ones. One of the
    nearly best shifts is chosen at random.
    """
    points = np.concatenate(outlines)
    origin = points.min(axis=0)
    cols, rows = (np.ptp(points, axis=0) // _COARSE_PX).astype(int) + 3
    masks = []
    for outline in outlines:
        mask = np.zeros((rows, cols), np.float32)
        ring = np.rint((outline - origin) / _COARSE_PX).astype(np.int32)
        cv2.fillPoly(mask, [ring], 1.0)
        masks.append(mask / mask.sum())
    corner = section.min(axis=0)
    around = np.ptp(section, axis=0) // _COARSE_PX
    ground = np.zeros((int(around[1]) + 2 * rows, int(around[0]) + 2 * cols), np.float32)
    cv2.fillPoly(ground, [np.rint((section - corner) / _COARSE_PX + [cols, rows]).astype(np.int32)], 1.0)
    score = cv2.matchTemplate(ground, np.sum(masks, axis=0), cv2.TM_CCORR)
    near = np.argwhere(score >= 0.98 * score.max())
    row, col = near[int(rng.integers(len(near)))]
    under = ground[row : row + rows, col : col + cols]
    shift = (np.array([col - cols, row - rows])) * _COARSE_PX + corner - origin
    return shift, [float((mask * under).sum()) for mask in masks]


def _laid_out(
    rng: np.random.Generator, atlas: Atlas, like: tuple[str, str], lesions: tuple[Lesion, ...], scale: float
) -> _Layout:
    """Return the layout of a slide with placed metastases, cropped to its tissue plus a margin."""
    section = atlas.sections[like[0]] * scale
    points = np.concatenate([section, *(np.array(lesion.outline, np.float64) for lesion in lesions)])
    origin = np.floor(points.min(axis=0)) - _MARGIN_PX - _RIM_PX
    width_px, height_px = (int(side) for side in np.ceil(points.max(axis=0) - origin) + _MARGIN_PX + _RIM_PX)
    moved = tuple(
        Lesion(_moved(lesion.outline, -origin), tuple(_moved(hole, -origin) for hole in lesion.islands))
        for lesion in lesions
    )
    coarse = (width_px // _COARSE_PX + 1, height_px // _COARSE_PX + 1)
    tumour = filled([_shrunk(lesion.outline) for lesion in moved], (0, 0), coarse)
    reach = _RIM_PX // _COARSE_PX
    grown = cv2.dilate(tumour, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1)))
    tissue = filled([polygon((section - origin) / _COARSE_PX)], (0, 0), coarse)
    tissue[grown > 0] = 255
    rings, _ = cv2.findContours(tissue, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    outlines = tuple(polygon(ring[:, 0].astype(np.float64) * _COARSE_PX) for ring in rings if len(ring) > 2)
    diseased = sorted(slide for slide in atlas.metastases if part_of(slide) == part_of(like[0]))
    shapes = atlas.metastases[diseased[int(rng.integers(len(diseased)))]][0]
    return _Layout(like, (width_px, height_px), outlines, moved, _decoys(rng, shapes, tissue, grown > 0, scale))


def _decoys(
    rng: np.random.Generator,
    shapes: tuple[NDArray[np.float64], ...],
    tissue: NDArray[np.uint8],
    taken: NDArray[np.bool_],
    scale: float,
) -> tuple[Polygon, ...]:
    """Return some outlines of metastases at random free places of the tissue; the masks have pixels of `_COARSE_PX`."""
    free = np.argwhere((tissue > 0) & ~taken)
    if not len(free):
        return ()
    most = _MOST_DECOY * np.count_nonzero(tissue) * _COARSE_PX**2
    placed = []
    for index in rng.permutation(len(shapes))[:_DECOYS]:
        outline = shapes[index] @ _turn(rng) * scale
        row, col = free[int(rng.integers(len(free)))]
        ring = polygon(outline - outline.mean(axis=0) + np.array([col, row]) * _COARSE_PX)
        covered = filled([_shrunk(ring)], (0, 0), (tissue.shape[1], tissue.shape[0])) > 0
        if area(outline) <= most and not (covered & taken).any():
            placed.append(ring)
    return tuple(placed)


def _planned(atlas: Atlas, part: Part, index: int, layout: _Layout, seed: int) -> SyntheticSlide:
    """Return the description of a slide: its layout with random textures, mixtures and colours."""
    rng = np.random.default_rng([seed, part == "test", index])
    scanner = atlas.centers.get(layout.like[1] or layout.like[0], SCANNERS[0])
    normal = [picture.name for picture in atlas.pictures if picture.part == part and not picture.tumour]
    tumour = [picture.name for picture in atlas.pictures if picture.part == part and picture.tumour]
    n_normal = min(_PIECES, len(normal) // 2)
    drawn = [normal[one] for one in rng.permutation(len(normal))[: 2 * n_normal]]
    return SyntheticSlide(
        slide_id=f"{part}_{index + 1:03d}",
        part=part,
        scanner=scanner,
        seed=int(rng.integers(2**31)),
        size_px=layout.size_px,
        tissue=layout.tissue,
        lesions=layout.lesions,
        decoys=layout.decoys,
        purity=tuple(rng.uniform(*_PURITY, len(layout.decoys) + len(layout.lesions)).tolist()),
        normal=tuple(drawn[:n_normal]),
        other=tuple(drawn[n_normal:]),
        tumour=tuple(tumour[one] for one in rng.permutation(len(tumour))[:_PIECES]) if layout.lesions else (),
        appearance=_appearance(rng, atlas.stains[scanner]),
        like=layout.like,
    )


def _appearance(rng: np.random.Generator, fit: DensityFit) -> textures.Appearance:
    """Return a random appearance: stains near those of the scanner, weak to strong, sharp to slightly blurred."""
    haematoxylin = np.array(fit.haematoxylin) * rng.normal(1, 0.06, 3)
    eosin = np.array(fit.eosin) * rng.normal(1, 0.06, 3)
    glass = rng.uniform(232, 246) + rng.uniform(-2, 2, 3)
    return textures.Appearance(
        haematoxylin=tuple(haematoxylin.tolist()),
        eosin=tuple(eosin.tolist()),
        strengths=tuple(rng.uniform(0.75, 1.3, 2).tolist()),
        glass=tuple(glass.tolist()),
        blur_px=float(rng.uniform(0.35, 0.9)),
        noise=float(rng.uniform(0.5, 2.0)),
    )


def _stack(codes: Mapping[str, textures.Codes], names: tuple[str, ...]) -> textures.Codes:
    """Return the stain amounts of the images with these names, uint8 (n, side, side, 2)."""
    return np.stack([codes[name] for name in names])


def _moved(outline: Polygon, shift: NDArray[np.float64]) -> Polygon:
    """Return a shifted outline."""
    return polygon(np.array(outline, np.float64) + shift)


def _shrunk(outline: Polygon, factor: float = 1 / _COARSE_PX) -> Polygon:
    """Return an outline scaled by a factor."""
    return polygon(np.array(outline, np.float64) * factor)


def filled(
    polygons: tuple[Polygon, ...] | list[Polygon], corner: tuple[int, int], size_px: tuple[int, int]
) -> NDArray[np.uint8]:
    """Return a mask, uint8 (rows, cols), that is 255 inside any of the polygons.

    Args:
        polygons: Outlines, x, y.
        corner: x, y of the mask's top-left corner.
        size_px: Width and height of the mask.
    """
    mask = np.zeros(size_px[::-1], np.uint8)
    for outline in polygons:
        cv2.fillPoly(mask, [np.array(outline, np.int32) - np.array(corner, np.int32)], 255)
    return mask


def _smooth(outlines: tuple[Polygon, ...], size_px: tuple[int, int]) -> NDArray[np.uint8]:
    """Return a tissue mask, uint8 (rows, cols), 0 to 255, with rounded outlines and soft edges of a few px."""
    quarter = (size_px[0] // 4 + 1, size_px[1] // 4 + 1)
    mask = filled([_shrunk(outline, 0.25) for outline in outlines], (0, 0), quarter)
    soft = cv2.GaussianBlur(mask, (0, 0), 4)
    full = cv2.resize(soft, (4 * quarter[0], 4 * quarter[1]), interpolation=cv2.INTER_LINEAR)
    sharp = np.clip((np.arange(256) - 127.5) * 8 + 127.5, 0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(full, sharp), np.uint8)[: size_px[1], : size_px[0]]
