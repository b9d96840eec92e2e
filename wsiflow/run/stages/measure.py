"""The stage ``measure``: it measures on a few blocks what the tasks of a run cost on the machine that does them.

A small plan is made of the run's plan: slides whose tissue is reduced to one block or to four, with the same frames and
settings. Every stage works through it in a temporary folder, each task is timed, and the result is written as
``costs.json``. It decides which tasks form a slice, and what a forecast says; no published byte depends on it.

The cost of a task of ``extract`` and ``predict`` has a fixed part and a part for each tile. The other stages work on a
sample or on the map of a whole slide, which is as large here as in the run; the cost of their tasks is fixed.
"""

import json
import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.plan.blocks import size_px
from wsiflow.plan.slide_plan import SlideCut, SlidePlan, read_cut
from wsiflow.run.costs import COSTS, Basis, Costs, StageCost, first_of
from wsiflow.run.plan import Plan, publish_plan, read_plan
from wsiflow.run.stages import network, predict
from wsiflow.run.stages.calibrate import calibrate
from wsiflow.run.stages.line import STAGES
from wsiflow.run.stages.pieces import piece, publish_piece
from wsiflow.run.stages.stage import Stage, Work
from wsiflow.system import publish
from wsiflow.system.provenance import cpu, thread_count

_SLIDES = 2
_BLOCKS = (1, 4)
_LEAST_CORE_S = 1e-6
# The first two tasks of ``predict`` load the network, in a fresh worker and in this process: `load_s` covers them.
_LOADS = 2
_IMPORT = "import wsiflow.run.stages.work"
_PREDICT = """
import pathlib, sys, time
from wsiflow.run.stages import work
from wsiflow.system.machine import limit_threads
limit_threads(int(sys.argv[2]))
clock = time.perf_counter()
outcome = work.run_task(pathlib.Path(sys.argv[1]), "predict", 0)
print(time.perf_counter() - clock)
sys.exit(outcome.exit_code)
"""


class Timed(NamedTuple):
    """The times of a task.

    Attributes:
        tiles: Number of tissue tiles, weighted by the pixels read for them: the mean tile of the run counts as one.
        core_s: Core-seconds of the task.
        waited_s: Wall seconds minus core-seconds: the task waited for disks or for other processes.
    """

    tiles: float
    core_s: float
    waited_s: float


def measure(source: Path, _index: int) -> tuple[publish.Receipt, bool]:
    """Take a few blocks of a run through every stage, and write the costs of tasks as ``costs.json``.

    Args:
        source: The run's plan.

    Raises:
        InputError: There is no tissue.
        EnvironmentFault: A fresh interpreter cannot be started.
    """
    plan, root = read_plan(source), source.parent
    with publish.private_folder(root) as folder:
        small, weights = _small_plan(folder, root, plan)
        if plan.settings.calibration:  # its slides are named in the folder of the run
            calibrated, _ = calibrate(source, 0)
            publish.adopt(folder, calibrated["path"], root / calibrated["path"], calibrated)
        costs = _costs(small, weights, _shapes(root, plan), plan.slides)
    assert costs.basis is not None
    values = costs._asdict() | {"stages": {stage: cost._asdict() for stage, cost in costs.stages.items()}}
    values["basis"] = costs.basis._asdict()
    values["stages"]["ingest"] = StageCost(_ingest_s(root, plan), 0.0)._asdict()
    publish.write_view(root, COSTS, json.dumps(values, indent=1, sort_keys=True).encode())
    return {"path": COSTS, "attempt": ""}, True


def areas_px(root: Path, plan: Plan) -> list[int]:
    """Return for each slide the number of reading pixels in its blocks, halo included."""
    return [_area_px(planned, read_cut(root, planned)) for planned in plan.slides]


def _area_px(planned: SlidePlan, cut: SlideCut) -> int:
    return sum(math.prod(size_px(planned.frame, block)) for block in cut.blocks)


def _shapes(root: Path, plan: Plan) -> int:
    """Return the number of different shapes of the blocks of a plan."""
    cuts = ((planned.frame, read_cut(root, planned)) for planned in plan.slides)
    return len({size_px(frame, block) for frame, cut in cuts for block in cut.blocks})


def _small_plan(folder: Path, root: Path, plan: Plan) -> tuple[Path, list[list[float]]]:
    """Publish a plan of a few blocks; its last slides are the timed ones, the others repeat them for warming up.

    Returns:
        The file of the plan, and for each of its slides the number of tiles of each group, weighted by area.

    Raises:
        InputError: There is no tissue.
    """
    with_tissue = sorted((slide for slide in plan.slides if slide.n_tiles), key=lambda slide: slide.n_tiles)
    if not with_tissue:
        raise InputError("there is no tissue to measure costs on", "plan without --calibrate")
    px_tile = sum(areas_px(root, plan)) / sum(slide.n_tiles for slide in plan.slides)
    chosen = [with_tissue[len(with_tissue) * (2 * i + 1) // (2 * _SLIDES)] for i in range(_SLIDES)]
    timed = [(slide, place, count) for slide in chosen for place, count in enumerate(_BLOCKS)]
    # One slide for a fresh worker, one of each shape for a first time, and those that are timed.
    pieces = [timed[0], *timed, *timed]
    slides, weights = [], []
    for number, (slide, place, count) in enumerate(pieces):
        cut = piece(
            read_cut(root, slide), slide, (2 * place + 1) / (2 * len(_BLOCKS)), count, plan.settings.group_tiles
        )
        slides.append(publish_piece(folder, root, slide, cut, f"{number}"))
        groups = [cut._replace(blocks=tuple(cut.group(k))) for k in range(1, len(cut.group_ranges) + 1)]
        weights.append([_area_px(slide, group) / px_tile for group in groups])
    alone = plan.settings.model_copy(update={"cascade": None})  # a first pass has no scores of these pieces
    return publish_plan(folder, Plan(alone, slides, ())), weights


def _costs(source: Path, weights: Sequence[Sequence[float]], shapes: int, all_slides: Sequence[SlidePlan]) -> Costs:
    """Take the small plan through the line, and return the costs of a run of all slides with blocks of some shapes."""
    plan = read_plan(source)
    times: dict[str, list[Timed]] = {}
    fresh_s = 0.0
    start_s = min(_start_s() for _ in range(2))
    firsts: dict[str, list[Timed]] = {}
    due = [stage for stage in STAGES.values() if stage.is_due(plan, 0)]
    for stage in due:
        if stage is predict.STAGE:
            if plan.settings.choice.precision == "int8":
                calibrate(source, 0)
            fresh_s = float(_fresh(_PREDICT, str(source), str(thread_count())))
            network.release()  # the network that `choose` has loaded in this process
        firsts[stage.name], times[stage.name] = _timed_stage(stage, source, weights)
    # Where most blocks have a shape of their own, every task prepares new shapes, as the first runs do.
    own_shapes = 2 * shapes > sum(planned.n_blocks for planned in all_slides)
    if own_shapes:
        times[predict.STAGE.name] = firsts[predict.STAGE.name][_LOADS:]
    fitted = {stage.name: _fit(stage, times[stage.name]) for stage in due}
    for stage in due:
        if stage.loads_network:  # it prepares shapes that are new to it, or a network of its own
            is_first, cost = stage is predict.STAGE, fitted[stage.name]
            seen = firsts[stage.name][_LOADS if is_first else 0 :]
            seen = [] if is_first and own_shapes else seen
            more_s = sum(max(0.0, one.core_s - cost.fixed_s - cost.unit_s * one.tiles) for one in seen)
            fitted[first_of(stage.name)] = StageCost(
                more_s * (shapes / _shapes(source.parent, plan) if is_first else 1.0), 0.0
            )
    cost, timed = fitted[predict.STAGE.name], times[predict.STAGE.name]
    first_s = cost.fixed_s * len(weights[0]) + cost.unit_s * sum(weights[0])
    return Costs(start_s, max(0.0, fresh_s - first_s), _spread(cost, timed), fitted, _basis(source, cost, timed))


def _basis(source: Path, cost: StageCost, timed: Sequence[Timed]) -> Basis:
    """Return what the costs of ``predict`` were measured on: the last slides of the small plan, see `_small_plan`."""
    plan = read_plan(source)
    last = slice(-len(_BLOCKS) * _SLIDES, None)
    ratios = [each.core_s / max(_LEAST_CORE_S, cost.core_s(each.tiles)) for each in timed]
    return Basis(
        slides=len({planned.path for planned in plan.slides[last]}),
        blocks=sum(planned.n_blocks for planned in plan.slides[last]),
        megapixels=sum(areas_px(source.parent, plan)[last]) / 1e6,
        least=min(ratios),
        most=max(ratios),
        cpu=cpu(),
    )


def _timed_stage(stage: Stage, source: Path, weights: Sequence[Sequence[float]]) -> tuple[list[Timed], list[Timed]]:
    """Do the tasks of a stage, and return the times of the first runs and of the repeated ones."""
    plan, half = read_plan(source), len(weights) // 2
    times: list[list[Timed]] = []
    for slide, groups in enumerate(weights):
        tasks = stage.tasks_of(plan, slide)
        each = groups if len(tasks) == len(groups) else [sum(groups) / len(tasks)] * len(tasks)
        times.append([_timed(stage.work, source, task, tiles) for task, tiles in zip(tasks, each, strict=True)])
    first, again = times[:-half], times[-half:]
    return [one for slide in first for one in slide], [one for slide in again for one in slide]


def _timed(work: Work, source: Path, task: int, tiles: float) -> Timed:
    clock, cpu = time.perf_counter(), time.process_time()
    work(source, task)
    core_s = max(_LEAST_CORE_S, time.process_time() - cpu)  # a coarse clock may not move; costs are divided by it
    return Timed(tiles, core_s, max(0.0, time.perf_counter() - clock - core_s))


def _fit(stage: Stage, timed: Sequence[Timed]) -> StageCost:
    """Return the cost of a stage's tasks by least squares of relative errors; neither part is below 0.

    The shortest waiting time of the tasks is added to the fixed part: it is time for the disk, whereas longer ones are
    also due to other processes.
    """
    waited_s = min(each.waited_s for each in timed)
    core_s = np.array([each.core_s for each in timed])
    if stage.unit == "slide":
        return StageCost(float(core_s.mean()) + waited_s, 0.0, waited_s)
    tiles = np.array([each.tiles for each in timed])
    weighed = np.column_stack([1 / core_s, tiles / core_s])
    (fixed_s, unit_s), *_ = np.linalg.lstsq(weighed, np.ones(len(timed)), rcond=None)
    if fixed_s < 0 or unit_s < 0:
        fixed_s, unit_s = (0.0, core_s.sum() / tiles.sum()) if fixed_s < 0 else (core_s.mean(), 0.0)
    return StageCost(float(fixed_s) + waited_s, float(unit_s), waited_s)


def _spread(cost: StageCost, timed: Sequence[Timed]) -> float:
    """Return the standard deviation of the relative error of the fit."""
    errors = [each.core_s / (cost.fixed_s + cost.unit_s * each.tiles) - 1 for each in timed]
    return math.sqrt(statistics.fmean(error**2 for error in errors))


def _start_s() -> float:
    """Return the seconds from the start of an interpreter until it can do a task."""
    clock = time.perf_counter()
    _fresh(_IMPORT)
    return time.perf_counter() - clock


def _fresh(program: str, *arguments: str) -> str:
    """Run a program in a fresh interpreter, and return what it prints.

    Raises:
        EnvironmentFault: The program failed.
    """
    command = [sys.executable, "-c", program, *arguments]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    if ended.returncode:
        is_killed = ended.returncode == -signal.SIGKILL
        silent = "it was killed, as where a job is out of memory" if is_killed else f"exit code {ended.returncode}"
        message = (ended.stderr.strip().splitlines() or [silent])[-1]
        raise EnvironmentFault(
            f"a fresh worker cannot predict ({message})", "see what is missing here with wsiflow doctor"
        )
    return ended.stdout


def _ingest_s(root: Path, plan: Plan) -> float:
    """Return the mean wall seconds of ingest for a slide, from its receipts."""
    receipts = (publish.read_receipt(root, f"tissue/{slide.slide_id}.json") for slide in plan.slides)
    return statistics.fmean(receipt["wall_s"] for receipt in receipts if receipt)
