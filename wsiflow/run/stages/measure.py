"""What the run's work costs on the machine that does it, measured on a few blocks.

A small plan is made of the run's own: slides whose tissue is cut down to one block or four, with the same frames and
settings. It is taken through every stage in a folder that is thrown away, each task is timed, and the result is written
as ``costs.json``. It decides which tasks travel together and what is foretold; no published byte depends on it.

Tasks of ``extract`` and ``predict`` cost a fixed part and one for each tile. The others work on a sample or on the map
of a whole slide, which is as large here as in the run: they cost the same whatever the tissue.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.plan.slide_plan import SlideCut, SlidePlan, cut_name, make_cut, read_cut, slide_key
from wsiflow.run.costs import COSTS, Costs, StageCost, first_of
from wsiflow.run.plan import Plan, publish_plan, read_plan
from wsiflow.run.stages import network, predict
from wsiflow.run.stages.calibrate import calibrate
from wsiflow.run.stages.line import STAGES
from wsiflow.run.stages.stage import Stage, Work
from wsiflow.system import publish
from wsiflow.system.provenance import thread_count

_SLIDES = 2
_BLOCKS = (1, 4)
_LEAST_CORE_S = 1e-6
# The first two of the stage that loads the network, that of a fresh worker and that of this process, are in `load_s`.
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
    """A task that was timed.

    Attributes:
        tiles: Tissue tiles, weighed by what is read for them: the run's mean tile counts for one.
        core_s: Core-seconds.
        waited_s: Wall seconds beyond those: disks, and other processes.
    """

    tiles: float
    core_s: float
    waited_s: float


def measure(source: Path, _index: int) -> tuple[publish.Receipt, bool]:
    """Take a few blocks of a run through every stage and write what tasks cost as ``costs.json``.

    Args:
        source: The run's plan.

    Raises:
        InputError: There is no tissue.
        EnvironmentFault: A fresh interpreter cannot be started.
    """
    plan, root = read_plan(source), source.parent
    with publish.private_folder(root) as folder:
        small, weights = _small_plan(folder, root, plan)
        costs = _costs(small, weights, _shapes(root, plan))
    values = costs._asdict() | {"stages": {stage: cost._asdict() for stage, cost in costs.stages.items()}}
    values["stages"]["ingest"] = StageCost(_ingest_s(root, plan), 0.0)._asdict()
    publish.write_view(root, COSTS, json.dumps(values, indent=1, sort_keys=True).encode())
    return {"path": COSTS, "attempt": ""}, True


def areas_px(root: Path, plan: Plan) -> list[int]:
    """Return the pixels that are read for the blocks of each slide, halo included."""
    return [_area_px(planned, read_cut(root, planned)) for planned in plan.slides]


def _area_px(planned: SlidePlan, cut: SlideCut) -> int:
    frame = planned.frame
    return sum(frame.block_px(block.rows) * frame.block_px(block.cols) for block in cut.blocks)


def _shapes(root: Path, plan: Plan) -> int:
    """Return how many shapes the blocks of a plan have."""
    cuts = (read_cut(root, planned) for planned in plan.slides)
    return len({(block.rows, block.cols) for cut in cuts for block in cut.blocks})


def _small_plan(folder: Path, root: Path, plan: Plan) -> tuple[Path, list[list[float]]]:
    """Publish a plan of a few blocks; the slides to be timed are its last, after others that are the same.

    Returns:
        The plan, and the tiles of each group of its slides, weighed by area.
    """
    with_tissue = sorted((slide for slide in plan.slides if slide.n_tiles), key=lambda slide: slide.n_tiles)
    if not with_tissue:
        raise InputError("there is no tissue to measure costs on", "plan without --calibrate")
    px_tile = sum(areas_px(root, plan)) / sum(slide.n_tiles for slide in plan.slides)
    chosen = [with_tissue[len(with_tissue) * (2 * i + 1) // (2 * _SLIDES)] for i in range(_SLIDES)]
    timed = [(slide, place, count) for slide in chosen for place, count in enumerate(_BLOCKS)]
    wanted = [timed[0], *timed, *timed]  # for a fresh worker; to see each shape for the first time; to be timed
    slides, weights = [], []
    for number, (slide, place, count) in enumerate(wanted):
        cut = _piece(read_cut(root, slide), slide, place, count, plan.settings.group_tiles)
        slides.append(_publish_slide(folder, root, slide, cut, f"{number}"))
        groups = [cut._replace(blocks=tuple(cut.group(k))) for k in range(1, len(cut.group_ranges) + 1)]
        weights.append([_area_px(slide, group) / px_tile for group in groups])
    return publish_plan(folder, Plan(plan.settings, slides, ())), weights


def _piece(cut: SlideCut, slide: SlidePlan, place: int, count: int, group_tiles: int) -> SlideCut:
    """Return a slide cut down to the tissue of some blocks in a row, at one of a few places."""
    first = len(cut.blocks) * (2 * place + 1) // (2 * len(_BLOCKS)) - count // 2
    first = max(0, min(first, len(cut.blocks) - count))
    grid = np.zeros((slide.frame.t_rows, slide.frame.t_cols), dtype=np.bool_)
    for block in cut.blocks[first : first + count]:
        cols, rows = np.array(block.cells()).T
        grid[rows, cols] = True
    return make_cut(grid, slide.frame, group_tiles=group_tiles)


def _publish_slide(folder: Path, root: Path, slide: SlidePlan, cut: SlideCut, name: str) -> SlidePlan:
    """Write what tasks read of a slide: its cut, and the record that tells whether its content has changed."""
    for path, text in (
        (folder / cut_name(name), json.dumps(cut.as_dict())),
        (folder / f"tissue/{name}.json", (root / f"tissue/{slide.slide_id}.json").read_text(encoding="utf-8")),
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return slide._replace(
        slide_id=name,
        n_tiles=sum(len(block.tissue) for block in cut.blocks),
        n_blocks=len(cut.blocks),
        n_groups=len(cut.group_ranges),
        key=slide_key(slide.sha256, slide.frame, cut),
    )


def _costs(source: Path, weights: Sequence[Sequence[float]], shapes: int) -> Costs:
    """Take the small plan through the line and return what it cost."""
    plan = read_plan(source)
    found: dict[str, list[Timed]] = {}
    fresh_s = 0.0
    start_s = min(_start_s() for _ in range(2))
    firsts: dict[str, list[Timed]] = {}
    due = [stage for stage in STAGES.values() if stage.is_due(plan, 0)]
    for stage in due:
        if stage is predict.STAGE:
            if plan.settings.choice.precision == "int8":
                calibrate(source, 0)
            fresh_s = float(_fresh(_PREDICT, str(source), str(thread_count())))
            network.release()  # what `choose` has left
        firsts[stage.name], found[stage.name] = _timed_stage(stage, source, weights)
    fitted = {stage.name: _fit(stage, found[stage.name]) for stage in due}
    for stage in due:
        if stage.loads_network:  # shapes that were not seen before, and networks of its own
            is_first, cost = stage is predict.STAGE, fitted[stage.name]
            seen = firsts[stage.name][_LOADS if is_first else 0 :]
            more_s = sum(max(0.0, one.core_s - cost.fixed_s - cost.unit_s * one.tiles) for one in seen)
            fitted[first_of(stage.name)] = StageCost(
                more_s * (shapes / _shapes(source.parent, plan) if is_first else 1.0), 0.0
            )
    cost, timed = fitted[predict.STAGE.name], found[predict.STAGE.name]
    first_s = cost.fixed_s * len(weights[0]) + cost.unit_s * sum(weights[0])
    return Costs(start_s, max(0.0, fresh_s - first_s), _spread(cost, timed), fitted)


def _timed_stage(stage: Stage, source: Path, weights: Sequence[Sequence[float]]) -> tuple[list[Timed], list[Timed]]:
    """Do the tasks of a stage, and return what they took for the first time and again."""
    plan, half = read_plan(source), len(weights) // 2
    found: list[list[Timed]] = []
    for slide, groups in enumerate(weights):
        tasks = stage.tasks_of(plan, slide)
        each = groups if len(tasks) == len(groups) else [sum(groups) / len(tasks)] * len(tasks)
        found.append([_timed(stage.work, source, task, tiles) for task, tiles in zip(tasks, each, strict=True)])
    first, again = found[:-half], found[-half:]
    return [one for slide in first for one in slide], [one for slide in again for one in slide]


def _timed(work: Work, source: Path, task: int, tiles: float) -> Timed:
    clock, cpu = time.perf_counter(), time.process_time()
    work(source, task)
    core_s = max(_LEAST_CORE_S, time.process_time() - cpu)  # a coarse clock may not move; costs are divided by it
    return Timed(tiles, core_s, max(0.0, time.perf_counter() - clock - core_s))


def _fit(stage: Stage, timed: Sequence[Timed]) -> StageCost:
    """Return what a stage's tasks cost: least squares of relative errors, neither part below 0.

    To the core-seconds comes the least that any of the tasks waited: what it waits for a disk, and no other process.
    """
    waited_s = min(each.waited_s for each in timed)
    core_s = np.array([each.core_s for each in timed])
    if stage.unit == "slide":
        return StageCost(float(core_s.mean()) + waited_s, 0.0)
    tiles = np.array([each.tiles for each in timed])
    weighed = np.column_stack([1 / core_s, tiles / core_s])
    (fixed_s, unit_s), *_ = np.linalg.lstsq(weighed, np.ones(len(timed)), rcond=None)
    if fixed_s < 0 or unit_s < 0:
        fixed_s, unit_s = (0.0, core_s.sum() / tiles.sum()) if fixed_s < 0 else (core_s.mean(), 0.0)
    return StageCost(float(fixed_s) + waited_s, float(unit_s))


def _spread(cost: StageCost, timed: Sequence[Timed]) -> float:
    """Return the standard deviation of core-seconds over what the fit gives, as far as repeats show it."""
    errors = [each.core_s / (cost.fixed_s + cost.unit_s * each.tiles) - 1 for each in timed]
    return math.sqrt(statistics.fmean(error**2 for error in errors))


def _start_s() -> float:
    """Return the seconds from the start of an interpreter until it could do a task."""
    clock = time.perf_counter()
    _fresh(_IMPORT)
    return time.perf_counter() - clock


def _fresh(program: str, *arguments: str) -> str:
    """Run a program in a fresh interpreter and return what it prints."""
    command = [sys.executable, "-c", program, *arguments]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    if ended.returncode:
        told = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        raise EnvironmentFault(f"a fresh worker cannot predict ({told})", "see that it runs: wsiflow doctor")
    return ended.stdout


def _ingest_s(root: Path, plan: Plan) -> float:
    """Return the mean of the seconds that ingest took, from its receipts."""
    found = (publish.read_receipt(root, f"tissue/{slide.slide_id}.json") for slide in plan.slides)
    return statistics.fmean(receipt["wall_s"] for receipt in found if receipt)
