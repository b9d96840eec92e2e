"""The command ``wsiflow plan``: what a run will take, before any patch is read.

Slides are opened, hashed and cut, and the plan is published, all of which the run itself finds done. From then on it is
counting, and a simulation for each number of workers. What tasks cost is measured with ``--calibrate``, taken from the
run's folder or a file, or is a rough value for GoogLeNet at stride 16; the report says which.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wsiflow.errors import InputError
from wsiflow.plan import plan
from wsiflow.plan.plan import Plan
from wsiflow.run import executor, ledger, shards
from wsiflow.run.config import RunConfig
from wsiflow.run.costs import COSTS, ROUGH, Costs, costs_of, read_costs
from wsiflow.run.forecast import simulation
from wsiflow.run.forecast.simulation import Cluster, Forecast, Sizes, Tasks
from wsiflow.run.stages import ingest, line, measure
from wsiflow.system import publish, tables
from wsiflow.system.machine import allocated_cores, limit_threads

from . import stopping, terminal
from .cluster import workers

# Bytes of a block's pixels that a store keeps, as measured on synthetic slides: docs/performance.md.
_READ_SHARE = 1.69  # pixels read over pixels of tissue tiles, likewise
_KEPT = {"none": 1.0, "lzf": 0.74, "gzip": 0.62, "jpeg": 0.08}
_WORKER_MB = 800  # a worker without its network's activations
_SLIDE_FILES = 10  # of ingest, and folders
_FILE_BYTES = 8192  # structure and receipt of a small file
_SEED = 0

SCHEDULERS = {
    "inline": Cluster(1, window=1),
    "process": Cluster(1, starts_per_s=2000),
    "dask": Cluster(1, starts_per_s=1000),  # a millisecond of the scheduler each
    "slurm": Cluster(1, fresh=True, starts_per_s=50, poll_s=15, array_limit=1001, failure=0.001),
    "sge": Cluster(1, fresh=True, starts_per_s=20, poll_s=15, array_limit=75_000, failure=0.001),
}
"""How each kind of place runs slices. Limits are the programs' own defaults; sites differ."""


_GROUPS = {"slurm": "slurm_array", "sge": "sge_array"}


class Counted(NamedTuple):
    """What there is to do.

    Attributes:
        slides: The tasks of each slide that are still to be done.
        tiles: Tissue tiles of each slide.
        rejected: Slides that cannot be planned, with their reasons.
        tasks: Tasks by stage.
        done: How many of them are published already.
        scratch: Bytes by kind.
        files: Files and folders.
        memory_mb: What the largest task takes.
    """

    slides: list[Tasks]
    tiles: list[int]
    rejected: dict[str, str]
    tasks: dict[str, int]
    done: dict[str, int]
    scratch: dict[str, int]
    files: int
    memory_mb: int


def main(argv: Sequence[str]) -> int:
    """Plan a run, say what it will take, and return the exit code."""
    given = _parser().parse_intermixed_args(argv)
    return terminal.bounded(lambda: _plan(given))


def _parser() -> argparse.ArgumentParser:
    about = "What a run will take: slides, tasks, disk, memory, core-hours, and time on any number of workers."
    parser = argparse.ArgumentParser(prog="wsiflow plan", description=about)
    parser.add_argument("overrides", nargs="*", help="as for wsiflow run")
    parser.add_argument("--workers", type=_numbers, help="numbers of workers to simulate: 1,16,256 (the run's own)")
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="what starts them (the run's own)")
    parser.add_argument("--calibrate", action="store_true", help="run a few blocks to measure what tasks cost here")
    parser.add_argument("--costs", type=Path, help="a costs.json measured elsewhere")
    parser.add_argument("--tiles", type=Path, help="CSV with slide and n_tiles_224, instead of slides")
    parser.add_argument("--tissue", type=float, default=1.0, help="share of those tiles that hold tissue (1)")
    parser.add_argument("--queue-s", type=float, default=0.0, help="mean wait of a submission, seconds (0)")
    parser.add_argument("--json", type=Path, help="file to write the report to")
    return parser


def _numbers(text: str) -> list[int]:
    """Return whole numbers from 1, given with commas."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{min(values)} is below 1")
    return values


def _plan(given: argparse.Namespace) -> int:
    from .run import compose_config

    config = compose_config([*given.overrides, *(["dataset=demo"] if given.tiles else [])])
    if given.tiles:
        if given.calibrate:
            raise InputError("a table of tiles has no pixels to measure", "calibrate on slides and give --costs")
        counted, costs, origin = _from_table(config, given.tiles, given.tissue), ROUGH, "rough"
    else:
        plan_path = make(config, calibrate=given.calibrate)
        counted, costs = count(plan_path, config), costs_of(config.out)
        origin = "measured" if (config.out / COSTS).exists() else "rough"
    if given.costs:
        costs, origin = read_costs(given.costs), f"measured, {given.costs.name}"
    numbers = given.workers or [executor.worker_count(config.executor, cores=allocated_cores()) or 1]
    scheduler = given.scheduler or _scheduler(config)
    if scheduler != _scheduler(config):  # slices as it would be given them
        other = compose_config([f"executor={_GROUPS.get(scheduler, scheduler)}"]).executor
        config = config.model_copy(update={"executor": other})
    found = {n: forecast(counted, costs, config, _cluster(scheduler, n, costs, given.queue_s)) for n in numbers}
    if given.json:
        report = _as_json(counted, costs, origin, found) | {"scheduler": scheduler}
        publish.write_view(given.json.parent, given.json.name, json.dumps(report, indent=1).encode())
    terminal.say("\n".join([*_counts_told(counted, config), *_costs_told(counted, costs, origin)]))
    terminal.say("\n".join(_forecasts_told(scheduler, found)))
    return 0


def _scheduler(config: RunConfig) -> str:
    """Return what the run's own executor is simulated as."""
    if config.executor.array is None:
        return config.executor.kind
    return "sge" if config.executor.array.dialect.name == "Grid Engine" else "slurm"


def make(config: RunConfig, *, calibrate: bool) -> Path:
    """Make the plan of a run, as the run itself would, and measure costs if that is asked for."""
    limit_threads(config.executor.threads)
    with stopping.telling(lambda: ledger.told([config.out])):
        return _made(config, calibrate=calibrate)


def _made(config: RunConfig, *, calibrate: bool) -> Path:
    cases = shards.begin(config)
    with workers(config.executor, config.out) as pool:
        told = shards.choose(pool, cases)
        if told:
            terminal.say(told)
        wanted = range(len(shards.case_sizes(cases)))
        plan_path = ingest.make_plan(cases, shards.ingest_shard(pool, cases, wanted))
        if calibrate:
            shards.once(pool, plan_path, "measure")
    return plan_path


def count(plan_path: Path, config: RunConfig) -> Counted:
    """Count what a plan asks for, and what of it is published."""
    root, made = plan_path.parent, plan.read(plan_path)
    slides: list[Tasks] = []
    tasks, done = dict.fromkeys(line.LINE, 0), dict.fromkeys(line.LINE, 0)
    for slide in range(len(made.slides)):
        due = {stage: made.tasks_of(stage, slide) for stage in line.LINE if line.is_due(made, stage, slide)}
        lacking: Tasks = {}
        for stage, places in due.items():
            left = [place for place in places if not publish.is_there(root, line.product(made, stage, place))]
            tasks[stage] += len(places)
            done[stage] += len(places) - len(left)
            lacking[stage] = {place: shards.units(made, stage, place) for place in left}
        slides.append(lacking)
    return Counted(
        slides,
        [planned.n_tiles for planned in made.slides],
        {rejected.slide_id: rejected.reason for rejected in made.rejected},
        tasks,
        done,
        _scratch(root, made),
        _files(tasks) + _SLIDE_FILES * len(made.slides),
        max(_WORKER_MB + config.tiles.memory_mb, _stitching_mb(made)),
    )


def _scratch(root: Path, made: Plan) -> dict[str, int]:
    """Return bytes by kind: patches as stored, scores, and heatmaps at most, since cells without tissue take little."""
    stored = made.work["store"]
    pixels = sum(measure.areas_px(root, made)) if stored["kind"] == "hdf5" else 0
    cells = sum(planned.n_tiles * planned.frame.cells_per_tile**2 for planned in made.slides)
    return _bytes(pixels, stored["compression"], cells, sum(slide.n_tiles for slide in made.slides), made.n_groups)


def _bytes(pixels: float, compression: str, cells: int, tiles: int, groups: int) -> dict[str, int]:
    return {
        "patches": round(3 * pixels * _KEPT[compression]),
        "predictions": 4 * cells + 40 * tiles + _FILE_BYTES * groups,
        "heatmaps": round(4 / 3 * (4 + 1) * cells),
    }


def _files(tasks: Mapping[str, int]) -> int:
    """Return how many files the tasks leave, each with its receipt: a heatmap comes with two pictures."""
    return 2 * (sum(tasks.values()) + 2 * tasks["detect"])


def _stitching_mb(made: Plan) -> int:
    """Return what stitching the largest map takes: it is held about three times."""
    largest = max((math.prod(planned.frame.h_shape) for planned in made.slides), default=0)
    return round(3 * 4 * largest / 1e6)


def _from_table(config: RunConfig, path: Path, share: float) -> Counted:
    """Count what slides would be of which a table tells the tiles."""
    advice = "give a CSV with slide,n_tiles_224"
    table = tables.read(path, "the table of tiles", advice, ("n_tiles_224",))
    try:
        boxes = [int(row["n_tiles_224"]) for row in table.rows()]
    except ValueError as error:
        raise InputError(f"the table of tiles holds what is no count ({error})", advice, path=path) from error
    tiles = [max(1, round(share * box)) for box in boxes]
    stored = config.store.kind == "hdf5"
    sizes = Sizes(
        config.tiles.group_tiles,
        max(1, config.store.part_tiles // config.tiles.group_tiles) * config.tiles.group_tiles if stored else 0,
        stained=config.stain.method != "none",
        certified=config.dense.windows > 0,
    )
    found = [simulation.slide_tasks(count, sizes) for count in tiles]
    tasks = {stage: sum(len(slide[stage]) for slide in found) for stage in line.LINE}
    cells = sum(tiles) * (config.tiles.tile_px // config.inference.stride) ** 2
    pixels = _READ_SHARE * sum(tiles) * config.tiles.tile_px**2 if stored else 0
    scratch = _bytes(pixels, config.store.compression, cells, sum(tiles), tasks["predict"])
    memory_mb = _WORKER_MB + config.tiles.memory_mb
    files = _files(tasks) + _SLIDE_FILES * len(tiles)
    none_done = dict.fromkeys(tasks, 0)
    return Counted(simulation.numbered(found), tiles, {}, tasks, none_done, scratch, files, memory_mb)


def _cluster(scheduler: str, workers: int, costs: Costs, queue_s: float) -> Cluster:
    """Return a cluster of so many workers; those of this machine share its cores."""
    return SCHEDULERS[scheduler]._replace(
        workers=1 if scheduler == "inline" else workers,
        cores=allocated_cores() if scheduler in {"inline", "process"} else 0,
        start_s=0.0 if scheduler == "inline" else costs.start_s,
        load_s=costs.load_s,
        spread=costs.spread,
        queue_s=queue_s,
        window=0 if SCHEDULERS[scheduler].fresh else 4 * workers,
        side_by_side=shards.SIDE_BY_SIDE,
        seed=_SEED,
    )


def forecast(counted: Counted, costs: Costs, config: RunConfig, cluster: Cluster) -> Forecast:
    """Simulate what is left to do, in the run's own shards and slices."""
    cuts = shards.cut(counted.tiles, config.shard_slides)
    parts = [[counted.slides[index] for index in part] for part in cuts]
    return simulation.simulate(
        [simulation.shard(part, costs, target_s=config.executor.slice_s) for part in parts], cluster
    )


def core_hours(counted: Counted, costs: Costs) -> dict[str, float]:
    """Return the core-hours that are left to do, by stage."""
    seconds: dict[str, float] = {}
    for tasks in counted.slides:
        for stage, places in tasks.items():
            more = sum(costs.task_s(stage, tiles) for tiles in places.values())
            seconds[stage] = seconds.get(stage, 0.0) + more
    return {stage: each / 3600 for stage, each in seconds.items() if each}


def _counts_told(counted: Counted, config: RunConfig) -> Iterator[str]:
    groups = counted.tasks["predict"]
    yield (
        f"{len(counted.slides)} slides, {len(counted.rejected)} rejected; {sum(counted.tiles):,} tissue tiles "
        f"in {groups:,} groups of at most {config.tiles.group_tiles} or so"
    )
    yield from (f"  rejected {slide}: {reason}" for slide, reason in counted.rejected.items())
    yield "tasks: " + ", ".join(
        f"{stage} {number:,}" + (f" ({counted.done[stage]:,} published)" if counted.done[stage] else "")
        for stage, number in counted.tasks.items()
        if number
    )
    kinds = ", ".join(f"{kind} {size / 1e9:.3g} GB" for kind, size in counted.scratch.items() if size)
    yield f"disk: {kinds}; about {counted.files:,} files"
    yield f"memory of a task: {counted.memory_mb:,} MB"


def _costs_told(counted: Counted, costs: Costs, origin: str) -> Iterator[str]:
    hours = core_hours(counted, costs)
    told = "rough values for GoogLeNet at stride 16, fp32: measure with --calibrate" if origin == "rough" else origin
    yield f"costs: {told}"
    each = ", ".join(f"{stage} {value:.3g}" for stage, value in hours.items())
    yield f"core-hours to do: {sum(hours.values()):.3g} ({each})"
    yield (
        f"a worker starts in {costs.start_s:.1f} s and loads the network in {costs.load_s:.1f} s; "
        f"tasks spread by {costs.spread:.0%}"
    )


def _forecasts_told(scheduler: str, found: Mapping[int, Forecast]) -> Iterator[str]:
    yield f"simulated, {scheduler}:"
    yield "  workers    makespan  efficiency  idle tail  slices  arrays"
    for number, each in found.items():
        yield (
            f"  {number:7,}  {_clock(each.makespan_s):>10}  {each.efficiency:10.0%}  {_clock(each.tail_s):>9}"
            f"  {each.elements:6,}  {each.arrays:6,}"
        )


def _clock(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _as_json(counted: Counted, costs: Costs, origin: str, found: Mapping[int, Forecast]) -> dict[str, Any]:
    return {
        "slides": len(counted.slides),
        "tiles": sum(counted.tiles),
        "rejected": counted.rejected,
        "tasks": counted.tasks,
        "published": counted.done,
        "scratch_bytes": counted.scratch,
        "files": counted.files,
        "memory_mb": counted.memory_mb,
        "costs": origin,
        "core_hours": core_hours(counted, costs),
        "forecasts": [each._asdict() | {"efficiency": each.efficiency} for each in found.values()],
    }
