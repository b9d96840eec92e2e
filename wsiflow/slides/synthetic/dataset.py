"""Write a synthetic data set: slides with known lesions, their annotations and a manifest.

Input: a folder, a size and a seed. Output: six pyramidal TIFF slides of `wsiflow.slides.synthetic.tissue` tissue (three
normal, three with lesions of the three size classes), or any number of `wsiflow.slides.synthetic.camelyon16`; ASAP XML
beside those with lesions, a README and ``manifest.csv``, which comes last.
Files are published one by one: a data set that was interrupted is continued, one that is complete is left alone.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from xml.etree import ElementTree

import cv2
import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError
from wsiflow.slides import pyramid
from wsiflow.slides.synthetic import camelyon16
from wsiflow.slides.synthetic.atlas import read_atlas
from wsiflow.slides.synthetic.tissue import BLOCK_PX, UM_PX, Lesion, Polygon, SlideSpec, draw_stain, polygon, render
from wsiflow.system import faults, publish, tables
from wsiflow.system.machine import allocated_cores

Content = Literal["none", "macro", "micro", "micro+itc"]
"""What a slide holds; at the size of the demo slides (6,144 px) the lesions have these classes."""

MANIFEST = "manifest.csv"
SOURCES = "sources.json"
_GENERATION = 1  # raise it when the same seed draws other pixels
_QUALITY = 85  # JPEG
_CELLS = 384  # lesions find their places on a grid of so many cells along the shorter side
_GAP_CELLS = 26  # between lesions: 101 um at 6,144 px, so that the challenge's mask, which joins up to 75 um, has both
_TRIES = 100
_CONTENTS: dict[str, Content] = {
    "normal_001": "none",
    "normal_002": "none",
    "normal_003": "none",
    "tumor_001": "macro",
    "tumor_002": "micro",
    "tumor_003": "micro+itc",
}


_AnyJob = TypeVar("_AnyJob")


class _Job(NamedTuple):
    """One slide to write."""

    folder: Path
    slide_id: str
    spec: SlideSpec


class _LikeJob(NamedTuple):
    """One slide like a real one to write."""

    folder: Path
    plan: camelyon16.SyntheticSlide
    key: str


def write_dataset(folder: Path, *, size_px: int, seed: int, workers: int | None = None) -> Path:
    """Write the data set, or what is missing of it.

    Args:
        folder: Where to; created if need be.
        size_px: Side of the slides, level-0 px; the one with the macrometastasis is 19/12 as wide. Lesions have the
            sizes that their slides promise from 6144 on, and are smaller on smaller slides.
        seed: Decides everything else.
        workers: Processes to draw with; None takes one per core this process may use.

    Returns:
        The path of the manifest.

    Raises:
        IntegrityError: The folder holds another data set, or damaged files.
        InputError: The slides are too small for their lesions.
    """
    jobs = [_Job(folder, name, _plan(name, size_px, seed)) for name in _CONTENTS]
    # widest first, so that the last slide to end is a small one
    queue = sorted(jobs, key=lambda job: -job.spec.width_px)
    texts = {f"{job.slide_id}.xml": asap_xml(job.spec.lesions) for job in jobs if job.spec.lesions}
    texts |= {"README.md": _readme(jobs, size_px, seed), MANIFEST: _manifest(jobs)}
    _refuse_others(folder, texts)
    missing = [job for job in queue if publish.done(folder, f"{job.slide_id}.tif", _key(job.spec)) is None]
    _each(_write_slide, missing, workers)
    return _publish(folder, texts)


def write_like(folder: Path, data: Path, *, slides: int, scale: float, seed: int, workers: int | None = None) -> Path:
    """Write slides like those of CAMELYON16, or what is missing of them; all belong to the test part.

    Args:
        folder: Where to; created if need be.
        data: Real outlines and pictures of tissue, see `wsiflow.slides.synthetic.atlas`.
        slides: How many; every other one has metastases.
        scale: Length of an outline for each of the real one, 0 to 1.
        seed: Decides everything else.
        workers: Processes to draw with; None takes one per core this process may use.

    Returns:
        The path of the manifest.

    Raises:
        IntegrityError: The folder holds another data set, or damaged files.
        InputError: The data folder is not complete.
    """
    atlas = read_atlas(data)
    digest = hashlib.sha256(b"".join(picture.codes.tobytes() for picture in atlas.pictures)).hexdigest()
    plans = camelyon16.plan_slides(atlas, "test", slides=slides, scale=scale, seed=seed)
    jobs = [_LikeJob(folder, planned, _like_key(planned, digest)) for planned in plans]
    queue = sorted(jobs, key=lambda job: -math.prod(job.plan.size_px))
    texts = {f"{planned.slide_id}.xml": asap_xml(planned.lesions) for planned in plans if planned.lesions}
    texts |= {SOURCES: _sources(plans), "README.md": _like_readme(plans, scale, seed), MANIFEST: _like_manifest(plans)}
    _refuse_others(folder, texts)
    missing = [job for job in queue if publish.done(folder, f"{job.plan.slide_id}.tif", job.key) is None]
    _each(_write_like, missing, workers, camelyon16.keep_pictures, (atlas.pictures,))
    return _publish(folder, texts)


def _each(
    write: Callable[[_AnyJob], None],
    jobs: Sequence[_AnyJob],
    workers: int | None,
    begin: Callable[..., None] | None = None,
    begin_with: tuple[Any, ...] = (),
) -> None:
    """Call a function with each job, in as many processes as asked; each begins with the call that is given."""
    workers = min(workers or allocated_cores(), len(jobs))
    if workers < 2:
        if begin is not None:
            begin(*begin_with)
        for job in jobs:
            write(job)
        return
    try:
        pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=begin, initargs=begin_with)
    except OSError as error:
        raise faults.worker_fault(error) from error
    with pool:
        list(pool.map(write, jobs))


def _refuse_others(folder: Path, texts: dict[str, str]) -> None:
    """Refuse a folder whose texts are of another data set, before anything is drawn.

    Raises:
        IntegrityError: One is.
    """
    for name, text in texts.items():
        publish.done(folder, name, publish.key_of(text=text))


def _publish(folder: Path, texts: dict[str, str]) -> Path:
    """Publish texts, the manifest last, and return its path."""
    for name, text in texts.items():
        publish.publish_bytes(folder, name, text.encode(), publish.key_of(text=text), {"kind": "synthetic"})
    return folder / MANIFEST


def _plan(slide_id: str, size_px: int, seed: int) -> SlideSpec:
    """Return the plan of one slide of the data set."""
    content = _CONTENTS[slide_id]
    width_px = size_px * 19 // 12 if content == "macro" else size_px
    slide_seed = 1000 * seed + list(_CONTENTS).index(slide_id)
    return plan_slide(content, width_px=width_px, height_px=size_px, seed=slide_seed)


def plan_slide(content: Content, *, width_px: int, height_px: int, seed: int) -> SlideSpec:
    """Lay out a slide: one or two pieces of tissue on a quarter to under a half of it, and its lesions.

    Sizes of tissue and lesions follow the size of the slide. From 9,728 x 6,144 px, ``macro`` is a metastasis above
    2 mm; from 6,144 px a side, ``micro`` is two or three of 0.2 to 2 mm, and ``micro+itc`` one of these with two below.

    Args:
        content: What the slide holds.
        width_px: Width at level 0.
        height_px: Height at level 0.
        seed: Decides everything else.

    Returns:
        The plan; lesions lie inside the tissue and apart from each other.

    Raises:
        InputError: A lesion finds no place.
    """
    rng = np.random.default_rng(seed)
    tissue = _plan_tissue(rng, width_px, height_px, n_pieces=1 if content == "macro" else int(rng.integers(1, 3)))
    lesions: tuple[Lesion, ...] = ()
    if content == "macro":
        lesions = (_large_lesion(rng, tissue[0]),)
    elif content != "none":
        side = min(width_px, height_px)
        spans = [(0.14, 0.24)] * int(rng.integers(2, 4)) if content == "micro" else [(0.18, 0.28)] + [(0.06, 0.11)] * 2
        lesions = _place_lesions(rng, tissue, [rng.uniform(*span) * side for span in spans], side)
    return SlideSpec(width_px, height_px, seed, draw_stain(rng), tissue, lesions)


def _blob(rng: np.random.Generator, *, roughness: float, n_points: int = 240) -> NDArray[np.float64]:
    """Return a smooth irregular outline around 0, 0 with a mean radius of 1: n_points x 2."""
    angle = np.linspace(0, 2 * math.pi, n_points, endpoint=False)
    order = np.arange(2, 9)
    swing = rng.normal(0, roughness / order, len(order))[:, None]
    waves = (swing * np.cos(order[:, None] * angle + rng.uniform(0, 2 * math.pi, len(order))[:, None])).sum(axis=0)
    radius = np.clip(1 + waves, 0.5, 1.5)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _plan_tissue(rng: np.random.Generator, width_px: int, height_px: int, *, n_pieces: int) -> tuple[Polygon, ...]:
    """Return pieces of tissue side by side along the longer side, each in its own part of the slide."""
    share = rng.uniform(0.36, 0.44)
    size = np.array([width_px, height_px], np.float64)
    along = int(width_px < height_px)
    part = size.copy()
    part[along] /= n_pieces
    pieces = []
    for piece in range(n_pieces):
        outline = _blob(rng, roughness=0.12)
        outline -= (outline.max(axis=0) + outline.min(axis=0)) / 2
        outline *= part * 0.955 / np.ptp(outline, axis=0)
        area = cv2.contourArea(outline.astype(np.float32))
        # keep the piece as long as its part of the slide, and as thick as the share of tissue asks
        shrink = np.ones(2)
        shrink[1 - along] = min(1.0, share * part.prod() / area)
        centre = part / 2
        centre[along] += piece * part[along]
        pieces.append(polygon(outline * shrink + centre))
    return tuple(pieces)


def _large_lesion(rng: np.random.Generator, tissue: Polygon) -> Lesion:
    """Return a lesion nearly as long as the tissue and half as thick, with an island of normal tissue in it."""
    outline = np.array(tissue, np.float64)
    middle = (outline.max(axis=0) + outline.min(axis=0)) / 2
    ripple = 1 - 0.12 * np.abs(np.sin(np.arange(len(outline)) * rng.integers(5, 9) * math.pi / len(outline)))
    flat = np.stack([np.full(len(outline), 0.93), 0.55 * ripple], axis=1)
    if np.ptp(outline[:, 1]) > np.ptp(outline[:, 0]):
        flat = flat[:, ::-1]
    reach = np.ptp(outline, axis=0).min()
    island = _blob(rng, roughness=0.12) * 0.085 * reach + middle + rng.uniform(-0.05, 0.05, 2) * reach
    return Lesion(polygon((outline - middle) * flat + middle), (polygon(island),))


def _place_lesions(
    rng: np.random.Generator, tissue: tuple[Polygon, ...], axes_px: list[float], side_px: int
) -> tuple[Lesion, ...]:
    """Return lesions of the given longest axes at random places in the tissue, apart from each other.

    Raises:
        InputError: They find no place.
    """
    cell_px = side_px // _CELLS
    origin = np.concatenate([np.array(piece) for piece in tissue]).min(axis=0)
    cells = [((np.array(piece) - origin) // cell_px).astype(np.int32) for piece in tissue]
    free = np.zeros(np.concatenate(cells).max(axis=0)[::-1] + 2, np.uint8)
    cv2.fillPoly(free, cells, 1)
    axes_px = sorted(axes_px, reverse=True)
    for _ in range(_TRIES):
        places = _places(rng, free.copy(), [math.ceil(axis / 2 / cell_px) + 2 for axis in axes_px])
        if len(places) == len(axes_px):
            outlines = [
                _oval(rng, axis) + place * cell_px + origin for axis, place in zip(axes_px, places, strict=True)
            ]
            return tuple(Lesion(polygon(outline)) for outline in outlines)
    cause = f"no room for lesions of {', '.join(f'{axis:.0f}' for axis in axes_px)} px"
    raise InputError(cause, "take larger slides or another seed", stage="synth")


def _places(rng: np.random.Generator, free: NDArray[np.uint8], radii: list[int]) -> list[NDArray[np.int64]]:
    """Return the middles (x, y in cells) of discs put one by one into free cells, up to the first without room.

    What a disc and the gap around it take is cleared from ``free``.
    """
    places = []
    for radius in radii:
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
        rows, cols = np.nonzero(cv2.erode(free, disc, borderType=cv2.BORDER_CONSTANT, borderValue=0))
        if len(rows) == 0:
            break
        chosen = int(rng.integers(len(rows)))
        places.append(np.array([cols[chosen], rows[chosen]]))
        cv2.circle(free, (int(cols[chosen]), int(rows[chosen])), radius + _GAP_CELLS, 0, -1)
    return places


def _oval(rng: np.random.Generator, axis_px: float) -> NDArray[np.float64]:
    """Return an irregular outline of the given longest axis whose middle is 0, 0."""
    outline = _blob(rng, roughness=0.25, n_points=120) * np.array([1.0, rng.uniform(0.55, 0.9)])
    angle = rng.uniform(0, math.pi)
    outline @= np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    outline -= (outline.max(axis=0) + outline.min(axis=0)) / 2
    gaps = outline[:, None] - outline[None]
    longest = float(np.hypot(gaps[..., 0], gaps[..., 1]).max())
    return np.asarray(outline * (axis_px / longest), np.float64)


def asap_xml(lesions: tuple[Lesion, ...]) -> str:
    """Return lesions as an ASAP annotation: group _0 holds the outlines, _2 the islands that are not tumour."""
    root = ElementTree.Element("ASAP_Annotations")
    annotations = ElementTree.SubElement(root, "Annotations")
    outlines = [("_0", lesion.outline) for lesion in lesions]
    outlines += [("_2", island) for lesion in lesions for island in lesion.islands]
    for index, (group, outline) in enumerate(outlines):
        about = {"Name": f"Annotation {index}", "Type": "Polygon", "PartOfGroup": group, "Color": "#F4FA58"}
        coordinates = ElementTree.SubElement(ElementTree.SubElement(annotations, "Annotation", about), "Coordinates")
        for order, (x, y) in enumerate(outline):
            ElementTree.SubElement(coordinates, "Coordinate", {"Order": str(order), "X": str(x), "Y": str(y)})
    groups = ElementTree.SubElement(root, "AnnotationGroups")
    for name, colour in (("_0", "#00ff00"), ("_2", "#ff0000")):
        group_about = {"Name": name, "PartOfGroup": "None", "Color": colour}
        ElementTree.SubElement(ElementTree.SubElement(groups, "Group", group_about), "Attributes")
    ElementTree.indent(root, "\t")
    return '<?xml version="1.0"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _key(spec: SlideSpec) -> str:
    """Return what identifies a slide's content."""
    return publish.key_of(kind="synthetic", generation=_GENERATION, quality=_QUALITY, spec=asdict(spec))


def _write_slide(job: _Job) -> None:
    """Draw and publish one slide."""
    spec, name = job.spec, f"{job.slide_id}.tif"
    cv2.setNumThreads(1)  # the processes already use every core
    with publish.publishing(job.folder, name, _key(spec), {"kind": "synthetic"}, _check_slide) as attempt:
        pyramid.write_rgb(
            attempt.path, _bands(spec), shape=(spec.height_px, spec.width_px), um_px=UM_PX, quality=_QUALITY
        )


def _like_key(planned: camelyon16.SyntheticSlide, pictures: str) -> str:
    """Return what identifies the content of a slide like a real one."""
    # The receipts of existing data sets hold keys of this text, in which the two records had other names.
    text = repr(planned).replace("SyntheticSlide(", "Plan(").replace("appearance=Appearance(", "look=Look(")
    return publish.key_of(kind="like", generation=camelyon16.GENERATION, quality=_QUALITY, plan=text, pictures=pictures)


def _write_like(job: _LikeJob) -> None:
    """Draw and publish one slide like a real one."""
    name, (width_px, height_px) = f"{job.plan.slide_id}.tif", job.plan.size_px
    cv2.setNumThreads(1)
    with publish.publishing(job.folder, name, job.key, {"kind": "synthetic"}, _check_slide) as attempt:
        pixels = camelyon16.paint(job.plan, camelyon16.kept_pictures())
        strips = (pixels[y : y + BLOCK_PX] for y in range(0, height_px, BLOCK_PX))
        pyramid.write_rgb(attempt.path, strips, shape=(height_px, width_px), um_px=UM_PX, quality=_QUALITY)


def _bands(spec: SlideSpec) -> Iterator[NDArray[np.uint8]]:
    """Yield the slide in strips of one block."""
    for y in range(0, spec.height_px, BLOCK_PX):
        yield render(spec, 0, y, spec.width_px, min(BLOCK_PX, spec.height_px - y))


def _check_slide(path: Path) -> None:
    """Decode a reduced level of a slide, which is written after level 0."""
    pyramid.read_level(path, 4)


def _manifest(jobs: list[_Job]) -> str:
    """Return the manifest, paths relative to it."""
    return tables.csv_text([_manifest_row(job.slide_id, has_tumour=bool(job.spec.lesions)) for job in jobs])


def _manifest_row(slide_id: str, *, has_tumour: bool) -> dict[str, Any]:
    label, annotation = ("tumor", f"{slide_id}.xml") if has_tumour else ("normal", "")
    return {
        "slide_id": slide_id,
        "path": f"{slide_id}.tif",
        "mpp": UM_PX,
        "label": label,
        "annotation_path": annotation,
    }


def _like_manifest(plans: Iterable[camelyon16.SyntheticSlide]) -> str:
    """Return the manifest of slides like real ones, paths relative to it."""
    rows = [
        {
            **_manifest_row(planned.slide_id, has_tumour=bool(planned.lesions)),
            "patient_id": planned.slide_id.replace(planned.part, "patient"),
            "split": planned.part,
            "scanner": f"center_{planned.scanner}",
        }
        for planned in plans
    ]
    return tables.csv_text(rows)


def _sources(plans: Iterable[camelyon16.SyntheticSlide]) -> str:
    """Return which real outlines and pictures each slide is made of."""
    rows = {
        planned.slide_id: {
            "tissue": planned.like[0],
            "metastases": planned.like[1],
            "pictures": sorted({*planned.normal, *planned.other, *planned.tumour}),
        }
        for planned in plans
    }
    return json.dumps(rows, indent=1) + "\n"


def _like_readme(plans: Sequence[camelyon16.SyntheticSlide], scale: float, seed: int) -> str:
    """Return a page about a data set of slides like real ones."""
    rows = []
    for planned in plans:
        axes = sorted((round(lesion.axis_um / scale) for lesion in planned.lesions), reverse=True)
        found = ", ".join(map(str, axes[:5])) + (f" and {len(axes) - 5} more" if len(axes) > 5 else "")
        like = " and ".join(filter(None, planned.like))
        rows.append(
            f"| {planned.slide_id} | {planned.size_px[0]} x {planned.size_px[1]} | {like} | {found or 'none'} |"
        )
    return "\n".join(
        [
            "# Synthetic slides like CAMELYON16",
            "",
            f"Drawn by `wsiflow synth --like camelyon16` with scale={scale:g}, seed={seed}, at {UM_PX} µm per pixel.",
            "No slide is real: outlines of tissue and metastases are those of CAMELYON16, made smaller by the scale,",
            "and filled with texture quilted from real pictures of tissue (CC0, Radboud University Medical Center;",
            "some by way of DIDSR/dldp). They say how settings of one pipeline compare, and nothing about how well a",
            "model does in a clinic.",
            "",
            "Lengths of the CAMELYON16 protocol belong to the real size. Evaluate with",
            f"`evaluation.l0_um_px={UM_PX / scale:g} evaluation.downsample={max(1, round(32 * scale))}`.",
            "",
            "| slide | px | outlines of | metastases, longest axis at real size, µm |",
            "|---|---|---|---|",
            *rows,
            "",
            f"`{MANIFEST}` lists them; outlines are ASAP XML. `{SOURCES}` names the pictures of each slide, all of",
            "the test part.",
            "",
        ]
    )


def _readme(jobs: list[_Job], size_px: int, seed: int) -> str:
    """Return a page about the data set."""
    rows = []
    for job in jobs:
        found = ", ".join(f"{lesion.kind} ({lesion.axis_um:.0f} µm)" for lesion in job.spec.lesions) or "none"
        rows.append(f"| {job.slide_id} | {job.spec.width_px} x {job.spec.height_px} | {found} |")
    return "\n".join(
        [
            "# Synthetic slides",
            "",
            f"Drawn by `wsiflow synth` with size_px={size_px}, seed={seed}, at {UM_PX} µm per pixel. No patient is",
            "behind them. They show that a pipeline works; they say nothing about how well a model does in a clinic.",
            "",
            "| slide | px | lesions (longest axis) |",
            "|---|---|---|",
            *rows,
            "",
            "`manifest.csv` lists them; lesion outlines are ASAP XML (group _0 tumour, _2 normal tissue inside it).",
            "",
        ]
    )
