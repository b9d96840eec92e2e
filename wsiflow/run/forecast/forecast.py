"""Forecast what a run will take: number of tasks, disk space, memory, and time on other machines."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from wsiflow.errors import InputError
from wsiflow.model import card
from wsiflow.run import shards
from wsiflow.run.config import RunConfig
from wsiflow.run.costs import Basis, Costs
from wsiflow.run.forecast import simulation
from wsiflow.run.forecast.simulation import Cluster, Forecast, Sizes, Tasks
from wsiflow.run.plan import Plan
from wsiflow.run.plan import read_plan as read_plan
from wsiflow.run.stages import measure
from wsiflow.run.stages.line import LOADING, STAGES, stages_of
from wsiflow.system import publish, tables
from wsiflow.system.machine import allocated_cores

# Measured on synthetic slides, see docs/performance.md. _KEPT: stored bytes per byte of a block's pixels.
_READ_SHARE = 1.69  # pixels read over pixels of tissue tiles
_KEPT = {"none": 1.0, "lzf": 0.74, "gzip": 0.62, "jpeg": 0.08}
_WORKER_MB = 800  # memory of a worker without the activations of its network
_SLIDE_FILES = 10  # files of ingest, and folders, per slide
_FILE_BYTES = 8192  # structure and receipt of a small file
_SEED = 0
_REPEATS = 0.3  # six runs of one slide took 19 % less to 29 % more than foretold, on cores that others used too
_ELEMENT_S = 3500  # of the hour that is requested for an element, it takes work so long
_IDLE_S = 60  # an element waits so long for more
SCHEDULERS = {
    "inline": Cluster(1, window=1),
    "process": Cluster(1, starts_per_s=2000),
    "dask": Cluster(1, starts_per_s=1000),  # a millisecond of the scheduler each
    "slurm": Cluster(1, starts_per_s=50, poll_s=1, array_limit=1001, failure=0.001, life_s=_ELEMENT_S, idle_s=_IDLE_S),
    "sge": Cluster(1, starts_per_s=20, poll_s=1, array_limit=75_000, failure=0.001, life_s=_ELEMENT_S, idle_s=_IDLE_S),
}
"""Simulated cluster of each executor and scheduler. Limits are the defaults of the programs; sites differ."""


class TaskCounts(NamedTuple):
    """The tasks of a run, and the resources that they take.

    Attributes:
        slides: Tasks of each slide that are not published yet.
        tiles: Number of tissue tiles of each slide.
        rejected: Reasons of the slides that cannot be planned, by slide id.
        tasks: Number of tasks by stage.
        done: Number of published tasks by stage.
        scratch: Bytes on disk by kind of file.
        files: Number of files and folders.
        memory_mb: Memory of the largest task, MB.
        megapixels: Pixels of all blocks that are read, halo included; 0 where slides are not known.
    """

    slides: list[Tasks]
    tiles: list[int]
    rejected: dict[str, str]
    tasks: dict[str, int]
    done: dict[str, int]
    scratch: dict[str, int]
    files: int
    memory_mb: int
    megapixels: float = 0.0


def count_tasks(plan_path: Path, config: RunConfig) -> TaskCounts:
    """Count the tasks of a plan, and which of them are published, and estimate their resources."""
    root, plan = plan_path.parent, read_plan(plan_path)
    read_px = sum(measure.areas_px(root, plan))
    slides: list[Tasks] = []
    tasks, done = dict.fromkeys(STAGES, 0), dict.fromkeys(STAGES, 0)
    for slide in range(len(plan.slides)):
        missing: Tasks = {}
        for stage in (stage for stage in stages_of(root) if stage.is_due(plan, slide)):
            places = stage.tasks_of(plan, slide)
            left = [place for place in places if not publish.has_recorded_size(root, stage.product_of(plan, place))]
            tasks[stage.name] += len(places)
            done[stage.name] += len(places) - len(left)
            missing[stage.name] = {place: shards.units(plan, stage, place) for place in left}
        slides.append(missing)
    return TaskCounts(
        slides,
        [planned.n_tiles for planned in plan.slides],
        {rejected.slide_id: rejected.reason for rejected in plan.rejected},
        tasks,
        done,
        _scratch(plan, read_px),
        _files(tasks, plan.settings.maps) + _SLIDE_FILES * len(plan.slides),
        max(_WORKER_MB + config.tiles.memory_mb, _stitching_mb(plan)),
        read_px / 1e6,
    )


def _scratch(plan: Plan, read_px: int) -> dict[str, int]:
    """Return an estimate of the bytes on disk by kind: patches, scores, and an upper bound for heatmaps."""
    stored = plan.settings.store
    pixels = read_px if stored.kind == "hdf5" else 0
    cells = sum(planned.n_tiles * planned.frame.cells_per_tile**2 for planned in plan.slides)
    tiles = sum(slide.n_tiles for slide in plan.slides)
    return _bytes(pixels, stored.compression, cells, tiles, plan.n_groups) | _map_bytes(cells, plan.settings.maps)


def _bytes(pixels: float, compression: str, cells: int, tiles: int, groups: int) -> dict[str, int]:
    return {
        "patches": round(3 * pixels * _KEPT[compression]),
        "predictions": 4 * cells + 40 * tiles + _FILE_BYTES * groups,
        "heatmaps": round(4 / 3 * (4 + 1) * cells),
    }


def _map_bytes(cells: int, maps: Sequence[str]) -> dict[str, int]:
    """Return the bytes of further classes, which are in the predictions and in maps of their own; empty for none."""
    return {"maps": round((4 + 4 / 3 * 4) * cells * len(maps))} if maps else {}


def _files(tasks: Mapping[str, int], maps: Sequence[str]) -> int:
    """Return the number of files that the tasks publish, receipts included."""
    return 2 * sum(count * (1 + len(STAGES[stage].beside(maps, 1))) for stage, count in tasks.items())


def _stitching_mb(plan: Plan) -> int:
    """Return the memory in MB that stitching the largest heatmap takes: about three copies of it."""
    largest = max((math.prod(planned.frame.h_shape) for planned in plan.slides), default=0)
    return round(3 * 4 * largest / 1e6)


def count_tasks_in_table(config: RunConfig, path: Path, share: float) -> TaskCounts:
    """Count the tasks of slides of which only a table with numbers of tiles exists.

    Args:
        config: The configuration of the run.
        path: CSV with a column ``n_tiles_224``, tiles in the bounding box of each slide's tissue.
        share: Share of these tiles that hold tissue.

    Raises:
        InputError: The table cannot be read, or a count is not a whole number.
    """
    advice = "give a CSV with slide,n_tiles_224"
    table = tables.read(path, "the table of tiles", advice, ("n_tiles_224",))
    try:
        boxes = [int(row["n_tiles_224"]) for row in table.rows()]
    except ValueError as error:
        cause = f"the table of tiles has a count that is not a whole number ({error})"
        raise InputError(cause, advice, path=path) from error
    return count_tasks_of_tiles(config, [max(1, round(share * box)) for box in boxes])


def count_tasks_of_tiles(config: RunConfig, tiles: list[int]) -> TaskCounts:
    """Count the tasks of slides of which only the numbers of tissue tiles are known; nothing of them is done."""
    stored = config.store.kind == "hdf5"
    sizes = Sizes(
        config.tiles.group_tiles,
        max(1, config.store.part_tiles // config.tiles.group_tiles) * config.tiles.group_tiles,
    )
    enabled = {
        "stain": config.stain.method != "none",
        "extract": stored,
        "index": stored,
        "certify": config.dense.windows > 0,
    }
    units = {stage.name: stage.unit for stage in STAGES.values() if enabled.get(stage.name, True)}
    slides = [simulation.slide_tasks(count, units, sizes) for count in tiles]
    tasks = {stage: sum(len(slide.get(stage, ())) for slide in slides) for stage in STAGES}
    cells = sum(tiles) * (config.tiles.tile_px // config.inference.stride) ** 2
    pixels = _READ_SHARE * sum(tiles) * config.tiles.tile_px**2 if stored else 0
    maps = card.map_names(card.read_card(config.model), config.model) if config.model.maps else ()
    scratch = _bytes(pixels, config.store.compression, cells, sum(tiles), tasks["predict"]) | _map_bytes(cells, maps)
    memory_mb = _WORKER_MB + config.tiles.memory_mb
    files = _files(tasks, maps) + _SLIDE_FILES * len(tiles)
    none_done = dict.fromkeys(tasks, 0)
    return TaskCounts(simulation.numbered(slides), tiles, {}, tasks, none_done, scratch, files, memory_mb)


def cluster_of(scheduler: str, workers: int, costs: Costs, queue_s: float) -> Cluster:
    """Return the cluster to simulate.

    Args:
        scheduler: A name of `SCHEDULERS`; workers of ``inline`` and ``process`` share the cores of this machine.
        workers: Number of workers.
        costs: Measured or rough costs of tasks.
        queue_s: Mean wait in the scheduler's queue, seconds.
    """
    return SCHEDULERS[scheduler]._replace(
        workers=1 if scheduler == "inline" else workers,
        cores=allocated_cores() if scheduler in {"inline", "process"} else 0,
        start_s=0.0 if scheduler == "inline" else costs.start_s,
        load_s=costs.load_s,
        spread=costs.spread,
        queue_s=queue_s,
        window=0 if SCHEDULERS[scheduler].array_limit else 4 * workers,
        side_by_side=shards.SIDE_BY_SIDE,
        seed=_SEED,
    )


def forecast(counts: TaskCounts, costs: Costs, config: RunConfig, cluster: Cluster) -> Forecast:
    """Simulate the remaining tasks of a run on a cluster, in the shards and slices that the run would use."""
    cuts = shards.cut(counts.tiles, config.shard_slides)
    parts = [[counts.slides[index] for index in part] for part in cuts]
    each = simulation.simulate(
        [simulation.shard(part, costs, loading=LOADING, target_s=config.executor.slice_s) for part in parts], cluster
    )
    return each._replace(allocated_s=each.allocated_s * config.executor.threads)


def core_hours(counts: TaskCounts, costs: Costs) -> dict[str, float]:
    """Return the core-hours of the remaining tasks by stage."""
    seconds: dict[str, float] = {}
    for tasks in counts.slides:
        for stage, places in tasks.items():
            more = sum(costs.stages[stage].core_s(tiles) for tiles in places.values())
            seconds[stage] = seconds.get(stage, 0.0) + more
    return {stage: each / 3600 for stage, each in seconds.items() if each}


def core_hours_between(hours: Mapping[str, float], basis: Basis) -> tuple[float, float]:
    """Return the least and the most core-hours that an estimate stands for.

    The groups whose scores were measured differ by so much from the estimate; and runs differ by `_REPEATS` from it,
    where few blocks were measured, and on a machine that others use too.

    Args:
        hours: Estimated core-hours by stage.
        basis: What they were measured on.
    """
    scores = hours.get("predict", 0.0)
    rest = sum(hours.values()) - scores
    least, most = min(basis.least, 1 - _REPEATS), max(basis.most, 1 + _REPEATS)
    return scores * least + rest * (1 - _REPEATS), scores * most + rest * (1 + _REPEATS)
