"""What one task does, stage by stage: read, compute, publish one file, return its receipt.

Every stage has the same form, ``(source, index) -> (receipt, executed)``, with ``source`` the file that says what there
is to do: ``cases.json`` for ``choose`` and ``ingest``, the plan for every later stage. The run's folder is where that
file lies. A stage that finds its file published does nothing.

Stages: ``choose`` (once), ``ingest`` (a case), ``measure`` (once), ``calibrate`` (once, for int8), ``stain`` (a slide),
``extract`` (a part of a slide), ``index`` (a slide), ``predict`` (a group), ``certify``, ``stitch`` and ``detect`` (a
slide), ``advise`` (once, where a certificate is beyond the tolerance).
"""

import dataclasses
import json
import math
import traceback
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import EnvironmentFault, InputError, IntegrityError, Rewritten, WsiflowError
from wsiflow.evaluation.detections import format_detections
from wsiflow.heatmap import assembly, files, lesions
from wsiflow.heatmap.overlay import overlay_png
from wsiflow.plan import geometry, plan
from wsiflow.plan.geometry import Frame
from wsiflow.plan.plan import Plan, SlidePlan, Task
from wsiflow.run import sharing, store
from wsiflow.run.executor import Outcome
from wsiflow.run.sharing import Place
from wsiflow.run.stages import certify, ingest, line, measure, predict
from wsiflow.run.stages.pixels import (
    block_coord,
    block_size_px,
    fit_name,
    open_planned,
    part_name,
    read_slide,
    stain_params,
    timed_reads,
    tissue_sample,
)
from wsiflow.slides.stain import transfer
from wsiflow.system import faults, publish
from wsiflow.system.provenance import facts
from wsiflow.system.usage import Meter

_OVERLAY_SIDE_PX = 1024
_LARGE_MAP_CELLS = 1 << 22


def run_slice(source: Path, stage: str, lo: int, hi: int) -> Iterator[Outcome]:
    """Do the tasks ``lo`` to ``hi - 1`` of a stage one after another: what every executor's workers call."""
    for index in range(lo, hi):
        meter = Meter()
        outcome = run_task(source, stage, index)
        yield outcome.with_usage(**meter.usage(executed=outcome.executed))


def run_task(source: Path, stage: str, index: int) -> Outcome:
    """Do one task of a stage and say how it ended; nothing but a dying process gets past this function.

    Args:
        source: ``cases.json`` or a plan.
        stage: One of `STAGES`.
        index: The task's place in its stage: a case, slide, part or group.
    """
    try:
        try:
            receipt, executed = STAGES[stage](source, index)
        except Rewritten:  # a new link or owner would do, and a copy may have ended: what was read is read again, once
            receipt, executed = STAGES[stage](source, index)
    except WsiflowError as error:
        return Outcome(index, None, executed=True, error=str(error.about(stage=stage)), exit_code=error.exit_code)
    except OSError as error:
        told = str(faults.fault(error, stage=stage))
        return Outcome(index, None, executed=True, error=told, exit_code=EnvironmentFault.exit_code)
    except MemoryError as error:
        told = str(EnvironmentFault(f"out of memory ({error})", "free memory, or use fewer workers", stage=stage))
        return Outcome(index, None, executed=True, error=told, exit_code=EnvironmentFault.exit_code)
    except Exception as error:  # noqa: BLE001 - the boundary: a defect in one task must not lose the others
        where = traceback.extract_tb(error.__traceback__)[-1]
        cause = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        told = str(WsiflowError(cause, "report this", stage=stage))
        return Outcome(index, None, executed=True, error=told, exit_code=WsiflowError.exit_code)
    return Outcome(index, receipt, executed=executed)


def fit_stain(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Measure a slide's colours on a sample of its tissue and publish them as ``stain/<slide>.json``.

    Raises:
        InputError: They cannot be measured and the policy is to stop.
    """
    made = plan.read(source)
    root, planned = source.parent, made.slides[index]
    params, name = stain_params(made), fit_name(planned)
    key = line.key(root, made, "stain", index)
    place = Place(ingest.shared_folder(root), root, name, key)
    done = sharing.done(place)
    if done is not None:
        return done, False
    found: dict[str, Any] = {"fit": None, "failure": ""}
    with sharing.publishing(place, facts("stain", planned.slide_id), publish.accept) as attempt:
        with attempt.timed("stain"):
            pixels = tissue_sample(root, planned, params)  # a slide that cannot be read is no slide in grey
            try:
                found["fit"] = dataclasses.asdict(transfer.fit(pixels, params))
            except InputError as error:
                if params.on_failure == "fail":
                    raise
                found["failure"] = error.cause
                attempt.receipt["stain_failures"] = [(0, 0, f"the whole slide: {error.cause}")]
        attempt.path.write_text(json.dumps(found, sort_keys=True), encoding="utf-8")
    return attempt.receipt, True


def extract(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Read the blocks of a part of a slide and publish them as ``patches/<slide>/p<j>.h5``."""
    made = plan.read(source)
    root, task = source.parent, made.task("extract", index)
    planned, params = made.slides[task.slide], store.StoreParams.model_validate(made.work["store"])
    name, numbers = part_name(planned, task.group), made.part(*task)
    frame, cut = planned.frame, plan.read_cut(root, planned)
    key = line.key(root, made, "extract", index)
    place = Place(ingest.shared_folder(root), root, name, key)
    done = sharing.done(place)
    if done is not None:
        return done, False
    receipt_facts = facts("patches", planned.slide_id, part=task.group)
    groups = {k: cut.group(k) for k in numbers}
    sizes = {k: [block_size_px(frame, block) for block in group] for k, group in groups.items()}

    def verify(path: Path) -> None:
        store.check_patches(path, sizes)

    raw_bytes = sum(rows * cols * 3 for group in sizes.values() for rows, cols in group)
    publish.require_space(place.shared or root, raw_bytes // 3 if params.loss else raw_bytes, less="store=none")
    with sharing.publishing(place, receipt_facts, verify) as attempt:
        with (
            attempt.timed("write"),
            open_planned(root, planned) as opened,
            store.create_patches(attempt.path, frame, _described(planned, key, receipt_facts), params) as writer,
        ):
            for k, group in groups.items():
                parts = timed_reads(read_slide(opened, frame, group), attempt.timed)
                writer.add_group(k, block_coord(frame, group), parts)
            attempt.receipt["decoder"] = opened.decoder
        tiles = sum(len(block.tissue) for group in groups.values() for block in group)
        attempt.receipt["counts"] = {"blocks": sum(map(len, groups.values())), "tiles": tiles}
        attempt.receipt["seconds"]["write"] -= attempt.receipt["seconds"].get("read", 0.0)  # read while it was written
    return attempt.receipt, True


def _described(planned: SlidePlan, key: str, receipt_facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a patches file says of itself."""
    versions = receipt_facts["versions"]
    return {"slide_id": planned.slide_id, "slide_sha256": planned.sha256, "key": key, "versions": versions}


def link_patches(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Publish ``patches/<slide>.h5``, through which all parts of a slide's patches are read as one file.

    Raises:
        IntegrityError: A part is not published.
    """
    made = plan.read(source)
    root, planned = source.parent, made.slides[index]
    parts = {part_name(planned, j): made.part(index, j) for j in range(1, made.n_parts(index) + 1)}
    name, key = f"patches/{planned.slide_id}.h5", line.key(root, made, "index", index)
    done = publish.at_hand(root, name, key)
    if done is not None:
        return done, False
    receipt_facts = facts("index", planned.slide_id)
    with publish.publishing(root, name, key, receipt_facts, publish.accept) as attempt, attempt.timed("write"):
        described = _described(planned, key, receipt_facts)
        links = {f"{planned.slide_id}/{Path(part).name}": groups for part, groups in parts.items()}
        store.write_index(attempt.path, planned.frame, described, links)
    return attempt.receipt, True


def stitch(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Put a slide's scores together and publish ``heatmaps/<slide>.tif``, its preview and its overlay.

    Raises:
        IntegrityError: A group of the slide is not published: nothing is stitched from an unbalanced ledger.
    """
    made = plan.read(source)
    root, planned = source.parent, made.slides[index]
    tasks = [Task(index, k) for k in range(1, planned.n_groups + 1)]
    for task in tasks:
        predict.published(root, made, task)
    name, key = f"heatmaps/{planned.slide_id}.tif", line.key(root, made, "stitch", index)
    done = publish.done(root, name, key)
    if done is not None:
        return done, False
    frame = planned.frame
    _make_room(frame)
    parts = [store.read_predictions(root / predict.prediction_name(made, task)) for task in tasks]
    coord = np.concatenate([np.empty((0, 5), dtype=np.int64), *(part[0] for part in parts)])
    m = frame.cells_per_tile
    prob = np.concatenate([np.empty((0, m, m), dtype=np.float32), *(part[1] for part in parts)])
    with publish.publishing(root, name, key, facts("heatmap", planned.slide_id), _readable(frame)) as attempt:
        with attempt.timed("stitch"):
            heat = assembly.assemble(frame, coord[:, :2], prob)
        with attempt.timed("write"):
            description = {"slide_id": planned.slide_id, "frame": frame._asdict(), "key": key}
            files.write_heatmap(attempt.path, heat, um_px=_cell_um(frame), description=description)
        attempt.receipt["counts"] = {"tiles": len(coord)}
        attempt.receipt["score"] = assembly.slide_score(heat)
    return attempt.receipt, True


def _make_room(frame: Frame) -> None:
    """Release the network where the slide's map is so large that a worker should not hold both."""
    if math.prod(frame.h_shape) > _LARGE_MAP_CELLS:
        predict.release()


def _cell_um(frame: Frame) -> float:
    """Return the side of a heatmap cell in micrometres."""
    return frame.um_px * frame.stride_px


def _readable(frame: Frame) -> Any:
    def verify(path: Path) -> None:
        heat, _ = files.read_heatmap(path)
        if heat.shape != frame.h_shape:
            raise IntegrityError(
                f"the map has shape {heat.shape}, {frame.h_shape} was written", "report this", path=path
            )

    return verify


def detect(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Find lesions on a slide's heatmap and publish ``detections/<slide>.csv``, empty where there are none.

    Beside it go the pictures of the heatmap: an 8-bit pyramid for viewers, and the overlay with the detections.
    """
    made = plan.read(source)
    root, planned = source.parent, made.slides[index]
    name, key = f"detections/{planned.slide_id}.csv", line.key(root, made, "detect", index)
    done = publish.done(root, name, key)
    if done is not None and all(publish.at_hand(root, each, key) for each in line.picture_names(planned)):
        return done, False
    _make_room(planned.frame)
    if done is not None:  # pictures that were deleted are made again
        _publish_pictures(root, planned, *_detected(root, made, index), key)
        return done, False
    with publish.publishing(root, name, key, facts("detections", planned.slide_id), publish.accept) as attempt:
        heat, l0 = _detected(root, made, index)
        with attempt.uncounted():
            _publish_pictures(root, planned, heat, l0, key)
        attempt.path.write_text(format_detections(l0), encoding="utf-8", newline="")
    return attempt.receipt, True


def _detected(root: Path, made: Plan, index: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return a slide's heatmap, and the detections on it: prob, x, y in level-0 px."""
    frame = made.slides[index].frame
    heat, _ = files.read_heatmap(root / line.product(made, "stitch", index))
    found = lesions.detect(heat, line.lesion_params(made), cell_um=_cell_um(frame))
    return heat, np.column_stack([found[:, 0], geometry.l0_from_h(frame, found[:, 1:3])])


def _publish_pictures(
    root: Path, planned: SlidePlan, heat: NDArray[np.float32], detections: NDArray[np.float64], key: str
) -> None:
    """Publish what people look at, as far as it is lacking: the pyramid of a heatmap for viewers, and its overlay."""
    receipt_facts = facts("overlay", planned.slide_id)
    preview, overlay = line.picture_names(planned)
    if publish.at_hand(root, preview, key) is None:
        with publish.publishing(root, preview, key, receipt_facts, publish.accept) as attempt, attempt.timed("write"):
            files.write_preview(attempt.path, heat, um_px=_cell_um(planned.frame))
    if publish.at_hand(root, overlay, key) is not None:
        return
    with publish.publishing(root, overlay, key, receipt_facts, publish.accept) as attempt:
        with open_planned(root, planned) as opened:
            downsample = max(1.0, max(opened.facts.l0_size_px) / _OVERLAY_SIDE_PX)
            overview = opened.overview(downsample)
        corner = geometry.l0_from_h_corner(planned.frame, 0, 0)
        png = overlay_png(
            overview,
            heat,
            cell_px=planned.frame.stride_px * planned.frame.l0_per_px / downsample,
            origin_px=(corner[0] / downsample, corner[1] / downsample),
            detections=detections / (1.0, downsample, downsample),
        )
        attempt.path.write_bytes(png)


STAGES = {
    "choose": predict.choose,
    "ingest": ingest.ingest,
    "calibrate": predict.calibrate,
    "stain": fit_stain,
    "extract": extract,
    "index": link_patches,
    "predict": predict.predict,
    "certify": certify.certify,
    "advise": certify.advise,
    "stitch": stitch,
    "detect": detect,
}
STAGES["measure"] = partial(measure.measure, STAGES)
