"""What one task does, stage by stage: read, compute, publish one file, return its receipt.

Every stage has the same form, ``(source, index) -> Outcome``, with ``source`` the file that says what there is to do:
``cases.json`` for ``ingest``, the plan for every later stage. The run's folder is where that file lies. A stage that
finds its file published does nothing.

Stages: ``ingest`` (a case), ``extract`` (a slide), ``predict`` (a group), ``stitch`` and ``detect`` (a slide).
"""

import traceback
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wsiflow import evaluation, export, geometry, heatmap, ingest, lesions, plan, publish, pyramid, slide, store, tiles
from wsiflow.errors import EnvironmentFault, IntegrityError, WsiflowError
from wsiflow.executor import Outcome
from wsiflow.geometry import Frame
from wsiflow.model import card
from wsiflow.plan import Plan, SlidePlan, Task
from wsiflow.provenance import facts, numeric_class

if TYPE_CHECKING:
    from wsiflow.model.classifier import Classifier


_OVERLAY_SIDE_PX = 1024


def run_task(source: Path, stage: str, index: int) -> Outcome:
    """Do one task of a stage and say how it ended; nothing but a dying process gets past this function.

    Args:
        source: ``cases.json`` or a plan.
        stage: One of `STAGES`.
        index: The case, slide or group.
    """
    try:
        receipt, executed = STAGES[stage](source, index)
    except WsiflowError as error:
        return Outcome(index, None, executed=True, error=str(error.about(stage=stage)), exit_code=error.exit_code)
    except (OSError, MemoryError) as error:
        cause = f"{stage}: {type(error).__name__}: {error}; free memory or disk, then run again"
        return Outcome(index, None, executed=True, error=" ".join(cause.split()), exit_code=30)
    except Exception as error:  # noqa: BLE001 - the boundary: a defect in one task must not lose the others
        where = traceback.extract_tb(error.__traceback__)[-1]
        cause = f"{stage}: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno}); report this"
        return Outcome(index, None, executed=True, error=" ".join(cause.split()), exit_code=50)
    return Outcome(index, receipt, executed=executed)


def extract(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Read every block of a slide and publish them as ``patches/<slide>.h5``."""
    made = plan.read(source)
    root, planned = source.parent, made.slides[index]
    params = store.StoreParams.model_validate(made.work["store"])
    name = f"patches/{planned.slide_id}.h5"
    key = publish.key_of(slide=planned.key, compression=params.compression)
    done = publish.done(root, name, key)
    if done is not None:
        return done, False
    blocks = planned.blocks()
    receipt_facts = facts("patches", planned.slide_id)
    counts = [hi - lo for lo, hi in planned.group_ranges]

    def verify(path: Path) -> None:
        store.check_patches(path, counts, planned.frame)

    described = {
        "slide_id": planned.slide_id,
        "slide_sha256": planned.sha256,
        "key": key,
        "versions": receipt_facts["versions"],
    }
    publish.require_space(root, len(blocks) * planned.frame.patch_px**2 * 3)
    with publish.publishing(root, name, key, receipt_facts, verify) as attempt:
        with (
            attempt.timed("write"),
            _open(root, planned) as opened,
            store.create_patches(attempt.path, planned.frame, described, params.compression) as writer,
        ):
            for k, (lo, hi) in enumerate(planned.group_ranges, 1):
                parts = _timed_reads(attempt, opened, planned.frame, blocks[lo:hi], params.read_blocks)
                writer.add_group(k, block_coord(planned.frame, blocks[lo:hi]), parts)
        attempt.receipt["counts"] = {"blocks": len(blocks), "tiles": planned.n_tiles}
        attempt.receipt["seconds"]["write"] -= attempt.receipt["seconds"]["read"]  # it was read while it was written
    return attempt.receipt, True


def _open(root: Path, planned: SlidePlan) -> slide.Slide:
    """Open a planned slide, unless it is no longer the one that was planned."""
    path = Path(planned.path)
    ingest.check_unchanged(root, planned.slide_id, path)
    return slide.open_slide(path, slide_id=planned.slide_id)


def block_coord(frame: Frame, blocks: Sequence[tiles.Block]) -> NDArray[np.int64]:
    """Return int64 (n, 5): first tile's column and row, level-0 x and y of the patch, its side in level-0 px."""
    side = round(frame.patch_px * frame.l0_per_px)
    rows = []
    for block in blocks:
        x, y = geometry.patch_origin_px(frame, block.t_col, block.t_row)
        rows.append((block.t_col, block.t_row, round(x * frame.l0_per_px), round(y * frame.l0_per_px), side))
    return np.array(rows, dtype=np.int64).reshape(-1, 5)


def check_numeric_class(made: Plan) -> None:
    """Refuse to compute scores here under the key of another kind of machine.

    Raises:
        EnvironmentFault: Processor, library or threads would give other last bits than the plan says.
    """
    planned = made.settings["predict"]["numeric_class"]
    here = numeric_class()
    differing = [
        f"{name} is {here[name]!r}, planned {planned.get(name)!r}" for name in here if here[name] != planned.get(name)
    ]
    if differing:
        remedy = "run on the kind of machine the run was planned on, or choose another out= folder"
        raise EnvironmentFault(f"this machine gives other last bits: {'; '.join(differing)}", remedy, stage="predict")


def read_blocks(
    opened: slide.Slide, frame: Frame, blocks: Sequence[tiles.Block], at_a_time: int
) -> Iterator[tuple[NDArray[np.uint8], list[float]]]:
    """Read blocks with their halo from a slide, a few at a time.

    Yields:
        uint8 (n, side, side, 3) and the share of each block that the scanner never wrote.
    """
    side = (frame.patch_px, frame.patch_px)
    for first in range(0, len(blocks), at_a_time):
        regions = [
            opened.read_scaled(
                *geometry.patch_origin_px(frame, block.t_col, block.t_row), side, l0_per_px=frame.l0_per_px
            )
            for block in blocks[first : first + at_a_time]
        ]
        yield np.stack([region.rgb for region in regions]), [region.transparent for region in regions]


def _timed_reads(
    attempt: publish.Attempt, opened: slide.Slide, frame: Frame, blocks: Sequence[tiles.Block], at_a_time: int
) -> Iterator[tuple[NDArray[np.uint8], list[float]]]:
    """Read blocks, counting the time as reading and not as the writing it happens inside of."""
    parts = read_blocks(opened, frame, blocks, at_a_time)
    while True:
        with attempt.timed("read"):
            part = next(parts, None)
        if part is None:
            return
        yield part


def predict(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Predict one group and publish ``predictions/<slide>/t<k>.h5``."""
    made = plan.read(source)
    root, task = source.parent, made.tasks[index]
    planned = made.slides[task.slide]
    name, key = prediction_name(made, task), plan.task_key(made, task)
    done = publish.done(root, name, key)
    if done is not None:
        return done, False
    check_numeric_class(made)
    model = _classifier(card.ModelSpec.model_validate(made.work["model"]))
    if model.identity != made.settings["predict"]["model"]:
        cause = "the model is another than when the run was planned"
        raise IntegrityError(
            cause, "restore card and weights, or choose another out= folder", path=made.work["model"]["card"]
        )
    blocks, frame = planned.group(task.group), planned.frame
    cells = [cell for block in blocks for cell in tiles.block_tile_cells(block, block_tiles=frame.block_tiles)]
    coord = _tile_coord(frame, cells)
    receipt_facts = facts("prediction", planned.slide_id, group=task.group)

    def verify(path: Path) -> None:
        written, prob = store.read_predictions(path)
        if not np.array_equal(written, coord) or prob.shape[1:] != (frame.cells_per_tile,) * 2:
            raise IntegrityError("the scores do not belong to the planned tiles", "report this", path=path)

    described = {
        "slide_id": planned.slide_id,
        "slide_sha256": planned.sha256,
        "model": made.settings["predict"]["model"],
        "key": key,
        "versions": receipt_facts["versions"],
    }
    with publish.publishing(root, name, key, receipt_facts, verify) as attempt:
        prob = _scores(root, made, planned, task, model, attempt)
        publish.require_space(root, prob.nbytes + coord.nbytes)
        with attempt.timed("write"):
            store.write_predictions(attempt.path, frame, coord, prob, described)
        attempt.receipt["counts"] = {"blocks": len(blocks), "tiles": len(coord), "windows": int(prob.size)}
    return attempt.receipt, True


@lru_cache(maxsize=1)
def _classifier(spec: card.ModelSpec) -> "Classifier":
    """Load the model once per process; torch is imported here so that a worker's threads are limited before."""
    from wsiflow.model.classifier import load

    return load(spec)


def _scores(
    root: Path, made: Plan, planned: SlidePlan, task: Task, model: "Classifier", attempt: publish.Attempt
) -> NDArray[np.float32]:
    """Return float32 (n, m, m), the scores of a group's tissue tiles in the order of its blocks."""
    from wsiflow.model.window import predict_blocks

    frame, m = planned.frame, planned.frame.cells_per_tile
    batch = made.settings["predict"]["inference"]["batch"]
    found: list[NDArray[np.float32]] = []
    parts = _group_pixels(root, made, planned, task)
    while True:
        with attempt.timed("read"):
            part = next(parts, None)
        if part is None:
            return np.concatenate(found)
        blocks, pixels = part
        with attempt.timed("infer"):
            for offsets, chosen in _alike(frame, blocks):
                prob = predict_blocks(model, pixels[chosen], offsets, batch=batch)
                found.append(prob.reshape(-1, m, m))


def _alike(frame: Frame, blocks: Sequence[tiles.Block]) -> Iterator[tuple[NDArray[np.int64], slice]]:
    """Yield runs of blocks with tissue in the same places, and the window positions inside each of them."""
    windows, first = geometry.window_offsets_px(frame), 0
    for tissue_cells, run in groupby(block.tissue for block in blocks):
        length = sum(1 for _ in run)
        corners = [
            (
                frame.halo_px + i % frame.block_tiles * frame.tile_px,
                frame.halo_px + i // frame.block_tiles * frame.tile_px,
            )
            for i in tissue_cells
        ]
        offsets = np.concatenate([windows + np.array(corner) for corner in corners])
        yield offsets, slice(first, first + length)
        first += length


def _group_pixels(
    root: Path, made: Plan, planned: SlidePlan, task: Task
) -> Iterator[tuple[list[tiles.Block], NDArray[np.uint8]]]:
    """Yield a group's blocks a few at a time with their pixels, from the store or from the slide."""
    params = store.StoreParams.model_validate(made.work["store"])
    blocks, at_a_time = planned.group(task.group), params.read_blocks
    if params.kind == "none":
        with _open(root, planned) as opened:
            parts = read_blocks(opened, planned.frame, blocks, at_a_time)
            for first, (pixels, _) in zip(range(0, len(blocks), at_a_time), parts, strict=True):
                yield blocks[first : first + at_a_time], pixels
        return
    path = root / f"patches/{planned.slide_id}.h5"
    with store.open_patches(path) as file:
        group = store.patch_group(file, task.group)
        if not np.array_equal(group.coord, block_coord(planned.frame, blocks)):
            raise IntegrityError(
                f"group t{task.group} holds other blocks than planned", "delete it, run again", path=path
            )
        for first in range(0, len(blocks), at_a_time):
            yield blocks[first : first + at_a_time], store.read_img(group, first, first + at_a_time)


def _tile_coord(frame: Frame, cells: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Return int64 (n, 5): column, row, level-0 x and y of the tile's corner, its side in level-0 px."""
    side = frame.tile_px * frame.l0_per_px
    return np.array([(c, r, round(c * side), round(r * side), round(side)) for c, r in cells], dtype=np.int64).reshape(
        -1, 5
    )


def prediction_name(made: Plan, task: Task) -> str:
    """Return the name of a task's file, relative to the run's folder."""
    return f"predictions/{made.slides[task.slide].slide_id}/t{task.group}.h5"


def stitch(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Put a slide's scores together and publish ``heatmaps/<slide>.tif``, its preview and its overlay.

    Raises:
        IntegrityError: A group of the slide is not published: nothing is stitched from an unbalanced ledger.
    """
    made = plan.read(source)
    root, planned = source.parent, made.slides[index]
    tasks = [Task(index, k) for k in range(1, len(planned.group_ranges) + 1)]
    receipts = [_published(root, made, task) for task in tasks]
    name = f"heatmaps/{planned.slide_id}.tif"
    key = publish.key_of(slide=planned.key, scores=[receipt["sha256"] for receipt in receipts])
    done = publish.done(root, name, key)
    if done is not None:
        return done, False
    frame = planned.frame
    parts = [store.read_predictions(root / prediction_name(made, task)) for task in tasks]
    coord = np.concatenate([np.empty((0, 5), dtype=np.int64), *(part[0] for part in parts)])
    m = frame.cells_per_tile
    prob = np.concatenate([np.empty((0, m, m), dtype=np.float32), *(part[1] for part in parts)])
    with publish.publishing(root, name, key, facts("heatmap", planned.slide_id), _readable(frame)) as attempt:
        with attempt.timed("stitch"):
            heat = heatmap.assemble(frame, coord[:, :2], prob)
        with attempt.timed("write"):
            description = {"slide_id": planned.slide_id, "frame": frame._asdict(), "key": key}
            pyramid.write_heatmap(attempt.path, heat, um_px=_cell_um(frame), description=description)
        attempt.receipt["counts"] = {"tiles": len(coord)}
        attempt.receipt["score"] = heatmap.slide_score(heat)
    return attempt.receipt, True


def _cell_um(frame: Frame) -> float:
    """Return the side of a heatmap cell in micrometres."""
    return frame.um_px * frame.stride_px


def _readable(frame: Frame) -> Any:
    def verify(path: Path) -> None:
        heat, _ = pyramid.read_heatmap(path)
        if heat.shape != frame.h_shape:
            raise IntegrityError(
                f"the map has shape {heat.shape}, {frame.h_shape} was written", "report this", path=path
            )

    return verify


def _any_bytes(_path: Path) -> None:
    """Accept a picture: nothing is computed from it."""


def _published(root: Path, made: Plan, task: Task) -> publish.Receipt:
    name = prediction_name(made, task)
    receipt = publish.done(root, name, plan.task_key(made, task))
    if receipt is None:
        slide_id = made.slides[task.slide].slide_id
        raise IntegrityError("the group was not predicted", "run again", slide=slide_id, path=root / name)
    return receipt


def detect(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Find lesions on a slide's heatmap and publish ``detections/<slide>.csv``, empty where there are none.

    Beside it go the pictures of the heatmap: an 8-bit pyramid for viewers, and the overlay with the detections.
    """
    made = plan.read(source)
    root, planned = source.parent, made.slides[index]
    receipt = publish.read_receipt(root, f"heatmaps/{planned.slide_id}.tif")
    if receipt is None:
        raise IntegrityError("the slide has no heatmap", "run again", slide=planned.slide_id)
    name = f"detections/{planned.slide_id}.csv"
    key = publish.key_of(heatmap=receipt["sha256"], lesions=made.settings["lesions"])
    done = publish.done(root, name, key)
    if done is not None:
        return done, False
    heat, _ = pyramid.read_heatmap(root / receipt["path"])
    found = lesions.detect(heat, lesions.LesionParams.model_validate(made.settings["lesions"]))
    l0 = np.column_stack([found[:, 0], geometry.l0_from_h(planned.frame, found[:, 1:3])])
    _publish_pictures(root, planned, heat, l0, key)
    text = evaluation.format_detections(l0)
    return publish.publish_bytes(root, name, text.encode(), key, facts("detections", planned.slide_id)), True


def _publish_pictures(
    root: Path, planned: SlidePlan, heat: NDArray[np.float32], detections: NDArray[np.float64], key: str
) -> None:
    """Publish what people look at: ``heatmaps/<slide>.preview.tif`` and the overlay ``heatmaps/<slide>.png``."""
    receipt_facts = facts("overlay", planned.slide_id)
    name = f"heatmaps/{planned.slide_id}.preview.tif"
    if publish.done(root, name, key) is None:
        with publish.publishing(root, name, key, receipt_facts, _any_bytes) as attempt, attempt.timed("write"):
            pyramid.write_preview(attempt.path, heat, um_px=_cell_um(planned.frame))
    with _open(root, planned) as opened:
        downsample = max(1.0, max(opened.facts.l0_size_px) / _OVERLAY_SIDE_PX)
        overview = opened.overview(downsample)
    corner = geometry.l0_from_h_corner(planned.frame, 0, 0)
    png = export.overlay_png(
        overview,
        heat,
        cell_px=planned.frame.stride_px * planned.frame.l0_per_px / downsample,
        origin_px=(corner[0] / downsample, corner[1] / downsample),
        detections=detections / (1.0, downsample, downsample),
    )
    publish.publish_bytes(root, f"heatmaps/{planned.slide_id}.png", png, key, receipt_facts)


STAGES = {"ingest": ingest.ingest, "extract": extract, "predict": predict, "stitch": stitch, "detect": detect}
