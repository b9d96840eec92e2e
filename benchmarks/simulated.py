"""Points of the experiments that are simulated: a cluster, a division of the work, and the forecast of the run.

Input: settings with one value for each axis of an experiment, and a seed. Output: numbers by name. The slides are those
of CAMELYON16: the published numbers of tiles in the box of their tissue (``camelyon16/tables/patch_counts_dldp.csv``),
times an assumed share with tissue. Nothing is measured here; values from measurements are marked.

There are two kinds of work: ``paper`` is 18 years of one core for 399 slides at 12 % tissue, window by window; ``fp32``
and ``bf16`` are wsiflow's dense line as measured (``results/line.json``).
There are two schemes: ``reference`` has jobs of 7 cores for groups of 400 tiles, a job for the extraction of each
slide, and no retries; wsiflow's line runs in array jobs (``arrays``) or on persistent workers (``dask``).
"""

import csv
import json
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wsiflow.run import shards
from wsiflow.run.costs import Costs, StageCost
from wsiflow.run.forecast import simulation
from wsiflow.run.forecast.simulation import Cluster, Forecast, Share, Sizes, Step
from wsiflow.run.plan import Unit
from wsiflow.run.stages.line import LOADING, ROUGH, STAGES

RESULTS = Path(__file__).parent / "results"
PAPER_CORE_S = 18 * 365.25 * 24 * 3600  # for all slides
PAPER_TISSUE = 0.12
SLOTS = 7  # cores of a job of the reference
# Of the reference's jobs, and not published: interpreter and imports, loading the network, extracting a 448 px patch.
_REFERENCE_START_S, _REFERENCE_LOAD_S, _REFERENCE_EXTRACT_S = 20.0, 10.0, 0.02


class Workload(NamedTuple):
    """The slides of a simulated run and the kind of work.

    Attributes:
        table: CSV with columns slide and n_tiles_224.
        tissue: Share of these tiles that hold tissue.
        kind: ``paper``, ``fp32`` or ``bf16``.
        slides: Number of slides, chosen evenly from small to large, and repeated where there are fewer; 0 for all.
    """

    table: Path
    tissue: float
    kind: str
    slides: int = 0

    def tiles(self) -> list[int]:
        """Return the number of tissue tiles of each slide, in the order of the table where all slides are taken."""
        boxes = _boxes(self.table)
        if self.slides:
            ranked, whole = sorted(boxes), self.slides // len(boxes)
            count = self.slides % len(boxes)
            boxes = (*ranked * whole, *(ranked[(2 * i + 1) * len(ranked) // (2 * count)] for i in range(count)))
        return [max(1, round(self.tissue * box)) for box in boxes]

    def costs(self) -> Costs:
        """Return the costs of tasks on one core."""
        if self.kind == "paper":
            per_tile = PAPER_CORE_S / (PAPER_TISSUE * sum(_boxes(self.table)))
            return ROUGH._replace(
                stages={
                    **ROUGH.stages,
                    "predict": StageCost(0.0, per_tile),
                    "extract": StageCost(0.0, _REFERENCE_EXTRACT_S),
                }
            )
        line = _line(self.kind)
        return ROUGH._replace(
            stages={
                **ROUGH.stages,
                "predict": StageCost(ROUGH.stages["predict"].fixed_s, line["line_s_tile"][0]),
                "certify": StageCost(line["certificate_s"][0], 0.0),
            }
        )


@cache
def _boxes(table: Path) -> tuple[int, ...]:
    with table.open(encoding="utf-8", newline="") as stream:
        return tuple(int(row["n_tiles_224"]) for row in csv.DictReader(stream))


@cache
def _line(precision: str) -> dict[str, Any]:
    results = json.loads((RESULTS / "line.json").read_text(encoding="utf-8"))
    line: dict[str, Any] = results["values"]["lines"][f"{precision}, store=none"]
    return line


class Site(NamedTuple):
    """A cluster and the scheme by which it is used.

    Attributes:
        scheme: ``reference``, ``slices`` (an element of an array job for every slice), ``arrays`` (elements that take
            slice after slice) or ``dask``.
        cores: Number of cores.
        queue_s: Mean wait of a submission in the queue, seconds.
        spread: Relative standard deviation of a task's time.
        failure: Probability that a job is lost.
        limit_s: Time limit of a job, seconds; 0 for none.
    """

    scheme: str
    cores: int
    queue_s: float
    spread: float
    failure: float = 0.0
    limit_s: float = 0.0

    def cluster(self, costs: Costs, seed: int) -> Cluster:
        """Return the cluster to simulate."""
        reference, arrays, fresh = (
            self.scheme == "reference",
            self.scheme != "dask",
            self.scheme in {"reference", "slices"},
        )
        return Cluster(
            workers=max(1, self.cores // SLOTS) if reference else self.cores,
            fresh=fresh,
            start_s=_REFERENCE_START_S if reference else costs.start_s,
            load_s=_REFERENCE_LOAD_S if reference else costs.load_s,
            spread=self.spread,
            queue_s=self.queue_s,
            starts_per_s=50 if arrays else 1000,  # an array's elements; futures, at a millisecond each
            poll_s={"slices": 5, "arrays": 1}.get(self.scheme, 0),
            array_limit=75_000 if arrays else 0,
            failure=self.failure,
            limit_s=self.limit_s if fresh else 0,
            life_s=self.limit_s or 3500 if self.scheme == "arrays" else 0,
            attempts=1 if reference else 5,
            seed=seed,
        )


def _units(*names: str) -> dict[str, Unit]:
    """Return the unit of a task (slide, part or group) of the named stages, in the order of the line."""
    return {stage.name: stage.unit for stage in STAGES.values() if stage.name in names}


def reference(work: Workload, *, group_tiles: int = 400) -> list[list[Step]]:
    """Return the shard of the reference system: extraction of every slide, prediction of all groups, then stitching.

    Work is in seconds of a job of 7 cores, all of which prediction is assumed to use; extraction and stitching use one.
    """
    costs, tiles = work.costs(), work.tiles()
    groups = [simulation.slide_tasks(count, _units("predict"), Sizes(group_tiles, group_tiles)) for count in tiles]

    def stage(name: str, counts: list[int], cores: int) -> Step:
        shares = tuple(Share(costs.task_s(name, count) / cores, 1) for count in counts)
        return Step(name, shares, loads=name == "predict")

    in_order = [count for slide in groups for count in slide["predict"]]
    return [[stage("extract", tiles, 1), stage("predict", in_order, SLOTS), stage("stitch", tiles, 1)]]


def line(work: Workload, *, slice_s: float, group_tiles: int = 400) -> list[list[Step]]:
    """Return the shards of wsiflow's line: about 40 shards of slides that run in parallel, the largest first."""
    sizes = Sizes(group_tiles, group_tiles)
    units = _units("stain", "predict", *(["certify"] if work.kind != "paper" else []), "stitch", "detect")
    slides, costs = [simulation.slide_tasks(count, units, sizes) for count in work.tiles()], work.costs()
    tasks = simulation.numbered(slides)
    parts = [[tasks[index] for index in part] for part in shards.cut(work.tiles(), 0)]
    return [simulation.shard(part, costs, loading=LOADING, target_s=slice_s) for part in parts]


def forecast_metrics(forecast: Forecast, cores_each: int = 1) -> dict[str, float]:
    """Return the numbers of a forecast by name, with core-seconds converted to core-hours.

    Args:
        forecast: The forecast.
        cores_each: Cores of a worker.
    """
    return {
        "makespan_s": forecast.makespan_s,
        "core_h": cores_each * forecast.work_s / 3600,
        "efficiency": forecast.efficiency,
        "tail_share": forecast.tail_s / forecast.makespan_s,
        "waves": forecast.waves,
        "overhead_share": forecast.overhead_s / (forecast.work_s + forecast.overhead_s),
        "lost_core_h": cores_each * forecast.lost_s / 3600,
        "queue_s": forecast.queue_s,
        "elements": forecast.elements,
        "arrays": forecast.arrays,
        "lost": forecast.retried,
        "failed": forecast.failed,
    }


def scaling(settings: dict[str, Any], *, seed: int) -> dict[str, float]:
    """Simulate a scheme on a number of cores, for strong and weak scaling.

    Besides the numbers of a `Forecast` it returns ``speedup`` against the same work on one core without overhead, and
    ``model_s``, the estimate setup + waves x group + merge for the reference scheme.
    """
    slides = settings.get("slides", 0) or round(settings.get("slides_per_core", 0) * settings["cores"])
    work = Workload(Path(settings["table"]), settings["tissue"], settings["work"], slides)
    site = Site(settings["scheme"], settings["cores"], settings["queue_s"], settings["spread"])
    group = settings.get("group_tiles", 400)
    if site.scheme == "reference":
        parts = reference(work, group_tiles=group)
    else:
        parts = line(work, slice_s=settings["slice_s"], group_tiles=group)
    cluster = site.cluster(work.costs(), seed)._replace(side_by_side=settings.get("side_by_side", 0))
    forecast = simulation.simulate(parts, cluster)
    values = forecast_metrics(forecast, SLOTS if site.scheme == "reference" else 1)
    values["speedup"] = values["core_h"] * 3600 / forecast.makespan_s
    # Efficiency counts all cores of the site, also those that the scheme leaves idle.
    values["efficiency"] = values["speedup"] / site.cores
    values["waves"] = sum(len(stage.shares) for part in parts for stage in part if stage.name == "predict")
    values["waves"] /= forecast.workers
    values["model_s"] = _model_s(parts, site, work.costs())
    return values


def _model_s(parts: list[list[Step]], site: Site, costs: Costs) -> float:
    """Return setup + waves x mean group + merge: each stage takes its waves at the mean time, or its longest task."""
    cluster, total = site.cluster(costs, 0), 0.0
    for stage in parts[0] if len(parts) == 1 else ():
        works = [share.work_s + cluster.start_s + cluster.load_s * stage.loads for share in stage.shares]
        waves = math.ceil(len(works) / cluster.workers)
        total += cluster.queue_s + max(waves * float(np.mean(works)), max(works))
    return total


def group_size(settings: dict[str, Any], *, seed: int) -> dict[str, float]:
    """Simulate the prediction of the reference scheme with groups of ``group_tiles`` patches."""
    work = Workload(Path(settings["table"]), settings["tissue"], "paper", settings.get("slides", 0))
    site = Site(
        "reference",
        settings["cores"],
        settings["queue_s"],
        settings["spread"],
        failure=settings["failure"],
        limit_s=settings["limit_s"],
    )
    stages = [stage for stage in reference(work, group_tiles=settings["group_tiles"])[0] if stage.name == "predict"]
    cluster = site.cluster(work.costs(), seed)._replace(attempts=3)
    forecast = simulation.simulate([stages], cluster)
    shares = stages[0].shares
    return forecast_metrics(forecast, SLOTS) | {
        "group_h": float(np.median([share.work_s for share in shares])) / 3600,
        "waves": len(shares) / cluster.workers,
        "failed_share": forecast.failed / len(shares),
        "lost_each_core_h": SLOTS * forecast.lost_s / 3600 / max(1, forecast.retried),
        "group_mb": settings["group_tiles"] * 448 * 448 * 3 / 1e6,
    }


def order(settings: dict[str, Any], *, seed: int) -> dict[str, float]:
    """Simulate slides of very different sizes in some order, with whole slides or parts and groups as tasks.

    Setting ``order`` is ``table``, ``random`` or ``largest`` (first). Setting ``cut`` is ``slide``, where a job
    extracts a whole slide and another one predicts it, or ``groups``, with parts and groups of equal cost.
    """
    work = Workload(Path(settings["table"]), settings["tissue"], settings["work"])
    costs, tiles = work.costs(), work.tiles()
    if settings["order"] == "random":
        tiles = np.random.default_rng(seed).permutation(tiles).tolist()
    if settings["order"] == "largest":
        tiles.sort(reverse=True)
    most = max(tiles) if settings["cut"] == "slide" else 400
    sizes = Sizes(most, most if settings["cut"] == "slide" else 4000)
    slides = [simulation.slide_tasks(count, _units("extract", "predict"), sizes) for count in tiles]
    stages = [
        Step(
            name,
            tuple(Share(costs.task_s(name, count), 1) for slide in slides for count in slide[name]),
            loads=name in LOADING,
        )
        for name in ("extract", "predict")
    ]
    site = Site("dask", settings["cores"], 0.0, settings["spread"])
    forecast = simulation.simulate([stages], site.cluster(costs, seed))
    longest_s = max(costs.task_s("extract", count) + costs.task_s("predict", count) for count in tiles)
    return forecast_metrics(forecast) | {
        "largest_slide_s": longest_s,
        "against_largest": forecast.makespan_s / longest_s,
    }


def array_limit(settings: dict[str, Any], *, seed: int) -> dict[str, float]:
    """Simulate the submission of all groups in array jobs of limited size, where lost elements are submitted again.

    Setting ``scheme`` is ``boxes``: every tile of the boxes in groups of 180, divided by the limit, lost ones submitted
    again by a list of ids; ``slides``: an array for each slide, whose elements find their group by counting from the
    first id of their submission; or ``slices``: wsiflow's array for each stage of a shard, whose elements find their
    slice in the list that is submitted with them.
    """
    work = Workload(Path(settings["table"]), settings["tissue"], "paper")
    tiles, limit = work.tiles(), settings["array_limit"]
    if settings["scheme"] == "boxes":
        groups = [-(-sum(_boxes(work.table)) // 180)]
    elif settings["scheme"] == "slides":
        groups = [-(-count // 400) for count in tiles]
    else:
        groups = [len(stage.shares) for part in line(work, slice_s=settings["slice_s"]) for stage in part]
    elements = sum(groups)
    submissions = sum(-(-count // limit) for count in groups)
    rng = np.random.default_rng(seed)
    lost = [np.flatnonzero(rng.random(count) < settings["failure"]) + 1 for count in groups]
    again = sum(-(-len(each) // limit) for each in lost)
    wrong = sum(_wrong(each) for each in lost) if settings["scheme"] == "slides" else 0
    return {
        "elements": elements,
        "arrays": submissions,
        "submit_s": submissions * settings["submit_s"],
        "resubmitted": sum(map(len, lost)),
        "arrays_again": again,
        "wrong_groups": wrong,
    }


def _wrong(ids: np.ndarray) -> int:
    """Return the number of elements of a resubmission, with one submission per run of ids, that take the wrong group.

    An element takes its id less the first id of its submission as its group, which is correct only for the first run.
    """
    if not len(ids):
        return 0
    firsts = ids[np.r_[True, np.diff(ids) > 1]]
    return int(sum(ids >= firsts[firsts > 1].min())) if (firsts > 1).any() else 0


POINTS = {
    "scaling": scaling,
    "group_size": group_size,
    "order": order,
    "array_limit": array_limit,
}
