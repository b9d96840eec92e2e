"""Synthetic data sets: slides with known lesions, their annotations and a manifest.

Input: a folder, a size and a seed. Output: six pyramidal TIFF slides with tissue of `wsiflow.slides.synthetic.tissue`
(three normal, three with lesions of the three size classes), or any number of `wsiflow.slides.synthetic.camelyon16`; an
ASAP XML file for each slide with lesions; a README; and last ``manifest.csv``.
Files are published one by one, so an interrupted data set is continued, and a complete one is left unchanged.
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
"""The lesions of a slide by their size classes, which are correct from the size of the demo slides (6,144 px) on."""

MANIFEST = "manifest.csv"
SOURCES = "sources.json"
_GENERATION = 1  # must be increased when the same seed gives other pixels
_QUALITY = 85  # of JPEG, 1 to 100
_CELLS = 384  # number of cells along the shorter side of the grid on which lesions are placed
_GAP_CELLS = 26  # between lesions: 101 um at 6,144 px; the challenge's evaluation merges lesions up to 75 um apart
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
    """The task to write one slide."""

    folder: Path
    slide_id: str
    spec: SlideSpec


class _LikeJob(NamedTuple):
    """The task to write one slide like those of CAMELYON16."""

    folder: Path
    plan: camelyon16.SyntheticSlide
    key: str


def write_dataset(folder: Path, *, size_px: int, seed: int, workers: int | None = None) -> Path:
    """Write the data set, or the files of it that are missing.

    Args:
        folder: Target folder, which is created if it does not exist.
        size_px: Side of the slides, level-0 px; the slide with the macrometastasis is 19/12 as wide. From 6144 on, the
            lesions have the size class of their slide; on smaller slides they are smaller.
        seed: Seed of all random choices.
        workers: Number of processes; None for one per core that this process may use.

    Returns:
        The path of the manifest.

    Raises:
        IntegrityError: The folder contains another data set, or damaged files.
        InputError: The slides are too small for their lesions.
        EnvironmentFault: Files cannot be written, or processes cannot be started.
    """
    jobs = [_Job(folder, name, _plan(name, size_px, seed)) for name in _CONTENTS]
    # The widest slide comes first, so that a small one is the last to end.
    queue = sorted(jobs, key=lambda job: -job.spec.width_px)
    texts = {f"{job.slide_id}.xml": asap_xml(job.spec.lesions) for job in jobs if job.spec.lesions}
    texts |= {"README.md": _readme(jobs, size_px, seed), MANIFEST: _manifest(jobs)}
    _refuse_others(folder, texts)
    missing = [job for job in queue if publish.done(folder, f"{job.slide_id}.tif", _key(job.spec)) is None]
    _each(_write_slide, missing, workers)
    return _publish(folder, texts)


def write_like(folder: Path, data: Path, *, slides: int, scale: float, seed: int, workers: int | None = None) -> Path:
    """Write slides like those of CAMELYON16, or the files of them that are missing; all slides are of the test part.

    Args:
        folder: Target folder, which is created if it does not exist.
        data: Folder with real outlines and images of tissue, see `wsiflow.slides.synthetic.atlas`.
        slides: Number of slides; every second one has metastases.
        scale: Ratio of lengths on the synthetic slides to those on the real ones, 0 to 1.
        seed: Seed of all random choices.
        workers: Number of processes; None for one per core that this process may use.

    Returns:
        The path of the manifest.

    Raises:
        IntegrityError: The folder contains another data set, or damaged files.
        InputError: The data folder is incomplete, or the metastases do not fit.
        EnvironmentFault: Files cannot be read or written, or processes cannot be started.
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
    """Call a function with each job in several processes, at most one per job.

    Args:
        write: The function, which must be picklable.
        jobs: Its arguments.
        workers: Number of processes; None for one per core that this process may use.
        begin: Function that each process calls once before its first job.
        begin_with: The arguments of ``begin``.
    """
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
    """Refuse a folder that contains texts of another data set, before any slide is rendered.

    Raises:
        IntegrityError: A text is that of another data set, or damaged.
    """
    for name, text in texts.items():
        publish.done(folder, name, publish.key_of(text=text))


def _publish(folder: Path, texts: dict[str, str]) -> Path:
    """Publish texts by file name in their order, the manifest last, and return its path."""
    for name, text in texts.items():
        publish.publish_bytes(folder, name, text.encode(), publish.key_of(text=text), {"kind": "synthetic"})
    return folder / MANIFEST


def _plan(slide_id: str, size_px: int, seed: int) -> SlideSpec:
    """Return the specification of one slide of the data set."""
    content = _CONTENTS[slide_id]
    width_px = size_px * 19 // 12 if content == "macro" else size_px
    slide_seed = 1000 * seed + list(_CONTENTS).index(slide_id)
    return plan_slide(content, width_px=width_px, height_px=size_px, seed=slide_seed)


def plan_slide(content: Content, *, width_px: int, height_px: int, seed: int) -> SlideSpec:
    """Return the specification of a slide with one or two pieces of tissue, which cover a quarter to almost half of it.

    The sizes of tissue and lesions are proportional to that of the slide. From 9,728 x 6,144 px on, ``macro`` is a
    metastasis above 2 mm. From 6,144 px a side on, ``micro`` is two or three metastases of 0.2 to 2 mm, and
    ``micro+itc`` is one of these and two smaller ones.

    Args:
        content: Size classes of the lesions.
        width_px: Width at level 0.
        height_px: Height at level 0.
        seed: Seed of all random choices.

    Returns:
        The specification; lesions lie inside the tissue and do not touch each other.

    Raises:
        InputError: There is no room for a lesion.
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
    """Return a smooth irregular outline, float64 (n_points, 2), around the origin with a mean radius of about 1."""
    angle = np.linspace(0, 2 * math.pi, n_points, endpoint=False)
    order = np.arange(2, 9)
    swing = rng.normal(0, roughness / order, len(order))[:, None]
    waves = (swing * np.cos(order[:, None] * angle + rng.uniform(0, 2 * math.pi, len(order))[:, None])).sum(axis=0)
    radius = np.clip(1 + waves, 0.5, 1.5)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _plan_tissue(rng: np.random.Generator, width_px: int, height_px: int, *, n_pieces: int) -> tuple[Polygon, ...]:
    """Return the outlines of pieces of tissue, placed next to each other along the longer side of the slide."""
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
        # The piece is as long as its part of the slide, and as thick as the fraction of tissue requires.
        shrink = np.ones(2)
        shrink[1 - along] = min(1.0, share * part.prod() / area)
        centre = part / 2
        centre[along] += piece * part[along]
        pieces.append(polygon(outline * shrink + centre))
    return tuple(pieces)


def _large_lesion(rng: np.random.Generator, tissue: Polygon) -> Lesion:
    """Return a lesion almost as long as the tissue and half as thick, with an island of normal tissue inside it."""
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
    """Return lesions with the given longest axes at random places in the tissue, with gaps between them.

    Raises:
        InputError: There is no room for them.
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
    cause = f"there is no room for lesions of {', '.join(f'{axis:.0f}' for axis in axes_px)} px"
    raise InputError(cause, "take larger slides or another seed", stage="synth")


def _places(rng: np.random.Generator, free: NDArray[np.uint8], radii: list[int]) -> list[NDArray[np.int64]]:
    """Return the centres, x, y in cells, of discs that are placed in turn in free cells, until one has no room.

    The cells of each disc and of the gap around it are cleared in ``free``.
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
    """Return an irregular outline, float64 (n, 2), centred on the origin, with the given longest axis."""
    outline = _blob(rng, roughness=0.25, n_points=120) * np.array([1.0, rng.uniform(0.55, 0.9)])
    angle = rng.uniform(0, math.pi)
    outline @= np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    outline -= (outline.max(axis=0) + outline.min(axis=0)) / 2
    gaps = outline[:, None] - outline[None]
    longest = float(np.hypot(gaps[..., 0], gaps[..., 1]).max())
    return np.asarray(outline * (axis_px / longest), np.float64)


def asap_xml(lesions: tuple[Lesion, ...]) -> str:
    """Return lesions as an ASAP annotation: group _0 contains the outlines, group _2 the islands of normal tissue."""
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
    """Return the key of a slide's content."""
    return publish.key_of(kind="synthetic", generation=_GENERATION, quality=_QUALITY, spec=asdict(spec))


def _write_slide(job: _Job) -> None:
    """Render and publish one slide."""
    spec, name = job.spec, f"{job.slide_id}.tif"
    cv2.setNumThreads(1)  # because the processes already use all cores
    with publish.publishing(job.folder, name, _key(spec), {"kind": "synthetic"}, _check_slide) as attempt:
        pyramid.write_rgb(
            attempt.path, _bands(spec), shape=(spec.height_px, spec.width_px), um_px=UM_PX, quality=_QUALITY
        )


def _like_key(planned: camelyon16.SyntheticSlide, pictures: str) -> str:
    """Return the key of the content of a slide like those of CAMELYON16."""
    # The receipts of existing data sets hold keys of this text, in which the two records had other names.
    text = repr(planned).replace("SyntheticSlide(", "Plan(").replace("appearance=Appearance(", "look=Look(")
    return publish.key_of(kind="like", generation=camelyon16.GENERATION, quality=_QUALITY, plan=text, pictures=pictures)


def _write_like(job: _LikeJob) -> None:
    """Render and publish one slide like those of CAMELYON16."""
    name, (width_px, height_px) = f"{job.plan.slide_id}.tif", job.plan.size_px
    cv2.setNumThreads(1)
    with publish.publishing(job.folder, name, job.key, {"kind": "synthetic"}, _check_slide) as attempt:
        pixels = camelyon16.paint(job.plan, camelyon16.kept_pictures())
        strips = (pixels[y : y + BLOCK_PX] for y in range(0, height_px, BLOCK_PX))
        pyramid.write_rgb(attempt.path, strips, shape=(height_px, width_px), um_px=UM_PX, quality=_QUALITY)


def _bands(spec: SlideSpec) -> Iterator[NDArray[np.uint8]]:
    """Yield the pixels of a slide in strips of the height of a block."""
    for y in range(0, spec.height_px, BLOCK_PX):
        yield render(spec, 0, y, spec.width_px, min(BLOCK_PX, spec.height_px - y))


def _check_slide(path: Path) -> None:
    """Verify a slide by decoding a reduced level, since these are written after level 0."""
    pyramid.read_level(path, 4)


def _manifest(jobs: list[_Job]) -> str:
    """Return the text of the manifest, with paths relative to its folder."""
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
    """Return the text of the manifest of slides like those of CAMELYON16, with paths relative to its folder."""
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
    """Return JSON text with the names of the real outlines and images of which each slide consists."""
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
    """Return the README, Markdown, of a data set of slides like those of CAMELYON16."""
    rows = []
    for planned in plans:
        axes = sorted((round(lesion.axis_um / scale) for lesion in planned.lesions), reverse=True)
        lengths = ", ".join(map(str, axes[:5])) + (f" and {len(axes) - 5} more" if len(axes) > 5 else "")
        like = " and ".join(filter(None, planned.like))
        rows.append(
            f"| {planned.slide_id} | {planned.size_px[0]} x {planned.size_px[1]} | {like} | {lengths or 'none'} |"
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
    """Return the README, Markdown, of the data set."""
    rows = []
    for job in jobs:
        lesions = ", ".join(f"{lesion.kind} ({lesion.axis_um:.0f} µm)" for lesion in job.spec.lesions) or "none"
        rows.append(f"| {job.slide_id} | {job.spec.width_px} x {job.spec.height_px} | {lesions} |")
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
