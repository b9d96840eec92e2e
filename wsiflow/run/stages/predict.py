"""The stage ``predict``: it computes the scores of a group.

Nothing here imports torch; the network is loaded in a worker after its threads were limited.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import IntegrityError
from wsiflow.plan.blocks import Block, scored_cells
from wsiflow.plan.geometry import Frame
from wsiflow.plan.slide_plan import read_cut
from wsiflow.run import first_pass, sharing, store
from wsiflow.run.costs import StageCost
from wsiflow.run.plan import Plan, Task, read_plan, task_key
from wsiflow.run.sharing import SharedFile
from wsiflow.run.stages import ingest
from wsiflow.run.stages.network import calibration, check_numeric_class, timed_scorer
from wsiflow.run.stages.pixels import Colours, planned_blocks
from wsiflow.run.stages.stage import Stage
from wsiflow.system import publish
from wsiflow.system.provenance import facts


def predict(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Compute the scores of one group, and publish them as ``predictions/<slide>/t<k>.h5``.

    Raises:
        EnvironmentFault: This is another kind of machine than the plan names.
        InputError: The slide has changed or cannot be read, or its colours cannot be normalised.
        IntegrityError: The store is damaged, or the network has changed.
    """
    plan = read_plan(source)
    root, task = source.parent, STAGE.task(plan, index)
    planned = plan.slides[task.slide]
    name, key = prediction_name(plan, task), task_key(root, plan, task)
    # Trials are compared by what their scores cost, but a first pass is the same for all that differ in the other.
    place = SharedFile(ingest.shared_folder(root) if first_pass.is_first_pass(root) else None, root, name, key)
    done = sharing.done(place) if place.shared else publish.done(root, name, key)
    if done is not None:
        return done, False
    check_numeric_class(plan)
    score, warmup_s = timed_scorer(root, plan)
    cut, frame = read_cut(root, planned), planned.frame
    blocks = cut.group(task.group)
    coord = tile_coord(frame, [cell for block in blocks for cell in block.cells()])
    receipt_facts = facts("prediction", planned.slide_id, group=task.group, warmup_s=warmup_s)

    def verify(path: Path) -> None:
        for number in range(1 + len(plan.settings.maps)):
            _read_planned(path, frame, blocks, number)

    described = {
        "slide_id": planned.slide_id,
        "slide_sha256": planned.sha256,
        "model": plan.settings.model_identity,
        "key": key,
        "versions": receipt_facts["versions"],
    } | ({"classes": plan.settings.maps} if plan.settings.maps else {})
    with sharing.publishing(place, receipt_facts, verify) as attempt:
        indices, colours = range(*cut.group_ranges[task.group - 1]), Colours(root, plan, planned)
        with planned_blocks(root, plan, planned, indices, attempt.timed, colours) as parts:
            scores = score.score(frame, parts, attempt.timed)
        attempt.receipt["stain_failures"] = colours.failures
        if plan.settings.choice.precision == "int8":
            attempt.receipt["calibration_sha256"] = publish.file_sha256(root / calibration(root, plan).name)
        publish.require_space(root, scores.prob.nbytes + scores.maps.nbytes + coord.nbytes)
        with attempt.timed("write"):
            store.write_predictions(attempt.path, frame, coord, scores.prob, described, scores.maps)
        attempt.receipt["counts"] = {"blocks": len(blocks), "tiles": len(coord), "windows": scores.windows}
    return attempt.receipt, True


def prediction_name(plan: Plan, task: Task) -> str:
    """Return the name of the scores of a group, relative to the run's folder."""
    return f"predictions/{plan.slides[task.slide].slide_id}/t{task.group}.h5"


def read_scores(root: Path, plan: Plan, task: Task, number: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the coordinates of the tiles of a group and their scores, as `store.read_predictions` does.

    Raises:
        IntegrityError: The file is damaged, or holds other tiles or cells than planned.
    """
    planned = plan.slides[task.slide]
    blocks = read_cut(root, planned).group(task.group)
    return _read_planned(root / prediction_name(plan, task), planned.frame, blocks, number)


def _read_planned(
    path: Path, frame: Frame, blocks: Sequence[Block], number: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return coordinates and scores of a file, and refuse other tiles than those of its blocks, or other cells."""
    scored = np.concatenate([scored_cells(block, frame.cells_per_tile) for block in blocks])
    coord, prob = store.read_predictions(path, number, scored)
    planned = tile_coord(frame, [cell for block in blocks for cell in block.cells()])
    if not np.array_equal(coord, planned):
        raise IntegrityError("the scores do not belong to the planned tiles", "report this", path=path)
    return coord, prob


def published(root: Path, plan: Plan, task: Task) -> publish.Receipt:
    """Return the receipt of the scores of a group.

    Raises:
        IntegrityError: The group is not published.
    """
    name = prediction_name(plan, task)
    receipt = publish.done(root, name, task_key(root, plan, task))
    if receipt is None:
        slide_id = plan.slides[task.slide].slide_id
        raise IntegrityError("the group was not predicted", "run again", slide=slide_id, path=root / name)
    return receipt


def tile_coord(frame: Frame, cells: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Return int64 (n, 5) of tiles: column, row, level-0 x and y of the first corner, side in level-0 px."""
    side = frame.tile_px * frame.l0_per_px
    return np.array([(c, r, round(c * side), round(r * side), round(side)) for c, r in cells], dtype=np.int64).reshape(
        -1, 5
    )


STAGE = Stage(
    name="predict",
    unit="group",
    work=predict,
    product=prediction_name,
    key=task_key,
    cost=StageCost(0.2, 0.067),
    steps=("read", "stain", "infer", "write"),
    verified="size",
    loads_network=True,
)
