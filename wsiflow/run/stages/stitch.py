"""The stage ``stitch``: it assembles the heatmaps of a slide from the scores of its groups.

The heatmap of the positive score is what later stages read. Those of further classes are published beside it.
"""

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wsiflow.errors import InputError, IntegrityError
from wsiflow.heatmap import assembly, files
from wsiflow.plan.geometry import Frame
from wsiflow.run.costs import StageCost
from wsiflow.run.plan import Plan, Task, read_plan
from wsiflow.run.stages import ingest, network, predict
from wsiflow.run.stages.stage import Stage
from wsiflow.system import publish
from wsiflow.system.provenance import facts

_LARGE_MAP_CELLS = 1 << 22
_LONGEST_STEM = 60  # characters of a class in the name of a file


def stitch(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Assemble the scores of a slide, and publish the heatmap as ``heatmaps/<slide>.tif``.

    The heatmaps of further classes are published as ``maps/<slide>.<class>.tif``; one map is in memory at a time.

    Raises:
        IntegrityError: A group of the slide is not published, or its scores are damaged.
    """
    plan = read_plan(source)
    root, planned = source.parent, plan.slides[index]
    tasks = [Task(index, k) for k in range(1, planned.n_groups + 1)]
    for task in tasks:
        predict.published(root, plan, task)
    name, key = STAGE.product_of(plan, index), STAGE.key_of(root, plan, index)
    done = publish.done(root, name, key)
    further = [name.format(slide=planned.slide_id) for name in map_files(plan.settings.maps)]
    missing = [n for n, each in enumerate(further, 1) if publish.done_if_present(root, each, key) is None]
    if plan.settings.cascade is not None:
        _publish_passes(root, plan, index)
    if done is not None and not missing:
        return done, False
    make_room(planned.frame)
    for number in missing:
        _publish_map(root, plan, index, number, further[number - 1])
    if done is not None:  # maps of further classes were deleted, and are assembled again
        return done, False
    return _publish_map(root, plan, index, 0, name), True


def _publish_map(root: Path, plan: Plan, index: int, number: int, name: str) -> publish.Receipt:
    """Assemble and publish the map of a slide: of the positive score, number 0, or of a further class, from 1 on."""
    planned, key = plan.slides[index], STAGE.key_of(root, plan, index)
    frame, m = planned.frame, planned.frame.cells_per_tile
    tasks = [Task(index, k) for k in range(1, planned.n_groups + 1)]
    parts = [predict.read_scores(root, plan, task, number) for task in tasks]
    coord = np.concatenate([np.empty((0, 5), dtype=np.int64), *(part[0] for part in parts)])
    prob = np.concatenate([np.empty((0, m, m), dtype=np.float32), *(part[1] for part in parts)])
    description: dict[str, Any] = {"slide_id": planned.slide_id, "frame": frame._asdict(), "key": key}
    if number:
        description["class"] = plan.settings.maps[number - 1]
    described = facts("map" if number else "heatmap", planned.slide_id)
    with publish.publishing(root, name, key, described, _readable(frame)) as attempt:
        with attempt.timed("stitch"):
            heat = assembly.assemble(frame, coord[:, :2], prob)
        with attempt.timed("write"):
            files.write_heatmap(attempt.path, heat, um_px=cell_um(frame), description=description)
        attempt.receipt["counts"] = {"tiles": len(coord)}
        attempt.receipt["score"] = assembly.slide_score(heat)
    return attempt.receipt


def _publish_passes(root: Path, plan: Plan, index: int) -> None:
    """Publish which pass has scored each cell of a slide's heatmap, unless it is published already."""
    planned, key = plan.slides[index], STAGE.key_of(root, plan, index)
    name = passes_file(planned.slide_id)
    if publish.done_if_present(root, name, key) is not None:
        return
    with publish.publishing(root, name, key, facts("passes", planned.slide_id), publish.accept) as attempt:
        fine, passed = ingest.cells_of_passes(root, plan, planned)
        passes = np.where(fine, np.uint8(files.OWN_PASS), np.where(passed, np.uint8(files.FIRST_PASS), np.uint8(0)))
        with attempt.timed("write"):
            files.write_passes(attempt.path, passes, um_px=cell_um(planned.frame))


def passes_file(slide_id: str) -> str:
    """Return the name of the file that says which pass has scored each cell of a slide's heatmap."""
    return f"heatmaps/{slide_id}.passes.tif"


def class_stems(names: Sequence[str]) -> list[str]:
    """Return what stands for each of some classes in names of files: letters, digits, ``_`` and ``-``, no two alike.

    There is no dot, so that the class is the last part of ``<slide>.<class>``. Case is ignored, as on some disks.
    """
    stems: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")[:_LONGEST_STEM] or "class"
        alike = itertools.chain([plain], (f"{plain}-{number}" for number in itertools.count(2)))
        stem = next(stem for stem in alike if stem.casefold() not in stems)
        stems[stem.casefold()] = stem
    return list(stems.values())


def map_files(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the heatmaps of further classes; ``{slide}`` stands for the slide's id."""
    return tuple(f"maps/{{slide}}.{stem}.tif" for stem in class_stems(names))


def map_file(names: Sequence[str], name: str, root: Path) -> str:
    """Return the name of the heatmap of one of the further classes of a run, as `map_files` does.

    Raises:
        InputError: The run does not map this class.
    """
    if name not in names:
        others = f", only of {list(names)}" if names else ""
        cause = f"the run has no map of class {name!r} beside that of the positive class{others}"
        raise InputError(cause, "name one of them, or run with model.maps in another out= folder", path=root)
    return map_files(names)[list(names).index(name)]


def make_room(frame: Frame) -> None:
    """Release the network where the map of a slide is so large that a worker should not hold both in memory."""
    if math.prod(frame.h_shape) > _LARGE_MAP_CELLS:
        network.release()


def cell_um(frame: Frame) -> float:
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


def _key(root: Path, plan: Plan, task: Task) -> str:
    return publish.key_of(slide=plan.slides[task.slide].key, scores=predict.STAGE.published(root, plan, task.slide))


def _beside(maps: Sequence[str], passes: int) -> tuple[str, ...]:
    return (*map_files(maps), *([passes_file("{slide}")] if passes > 1 else []))


STAGE = Stage(
    name="stitch",
    unit="slide",
    work=stitch,
    product=lambda plan, task: f"heatmaps/{plan.slides[task.slide].slide_id}.tif",
    key=_key,
    cost=StageCost(0.5, 0.0005),
    steps=("stitch", "write"),
    beside=_beside,
)
