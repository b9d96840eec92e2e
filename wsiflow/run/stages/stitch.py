"""The stage ``stitch``: it assembles the heatmap of a slide from the scores of its groups."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from wsiflow.errors import IntegrityError
from wsiflow.heatmap import assembly, files
from wsiflow.plan.geometry import Frame
from wsiflow.run import store
from wsiflow.run.costs import StageCost
from wsiflow.run.plan import Plan, Task, read_plan
from wsiflow.run.stages import network, predict
from wsiflow.run.stages.stage import Stage
from wsiflow.system import publish
from wsiflow.system.provenance import facts

_LARGE_MAP_CELLS = 1 << 22


def stitch(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Assemble the scores of a slide, and publish the heatmap as ``heatmaps/<slide>.tif``.

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
    if done is not None:
        return done, False
    frame = planned.frame
    make_room(frame)
    parts = [store.read_predictions(root / predict.prediction_name(plan, task)) for task in tasks]
    coord = np.concatenate([np.empty((0, 5), dtype=np.int64), *(part[0] for part in parts)])
    m = frame.cells_per_tile
    prob = np.concatenate([np.empty((0, m, m), dtype=np.float32), *(part[1] for part in parts)])
    with publish.publishing(root, name, key, facts("heatmap", planned.slide_id), _readable(frame)) as attempt:
        with attempt.timed("stitch"):
            heat = assembly.assemble(frame, coord[:, :2], prob)
        with attempt.timed("write"):
            description = {"slide_id": planned.slide_id, "frame": frame._asdict(), "key": key}
            files.write_heatmap(attempt.path, heat, um_px=cell_um(frame), description=description)
        attempt.receipt["counts"] = {"tiles": len(coord)}
        attempt.receipt["score"] = assembly.slide_score(heat)
    return attempt.receipt, True


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


STAGE = Stage(
    name="stitch",
    unit="slide",
    work=stitch,
    product=lambda plan, task: f"heatmaps/{plan.slides[task.slide].slide_id}.tif",
    key=_key,
    cost=StageCost(0.5, 0.0005),
    steps=("stitch", "write"),
)
