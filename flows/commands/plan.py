"""The command ``wsiflow plan``: what a run will take, before any patch is read.

The command opens, hashes and cuts the slides and publishes the plan, so that the run itself finds all of that done. It
then counts the tasks and simulates the run for each number of workers. What tasks cost is measured with
``--calibrate``, read from the run's folder or from a file, or taken from rough values for GoogLeNet at stride 16; the
report says which.
"""

import json
import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wsiflow.errors import InputError
from wsiflow.run import intake, ledger, shards
from wsiflow.run.config import RunConfig
from wsiflow.run.costs import COSTS, Basis, Costs, costs_of, read_costs
from wsiflow.run.executor import params
from wsiflow.run.forecast.forecast import (
    SCHEDULERS,
    TaskCounts,
    cluster_of,
    core_hours,
    core_hours_between,
    count_tasks,
    count_tasks_in_table,
    forecast,
)
from wsiflow.run.forecast.simulation import Forecast
from wsiflow.run.stages import ingest
from wsiflow.run.stages.line import ROUGH
from wsiflow.system import publish
from wsiflow.system.machine import allocated_cores, limit_threads

from .. import logs, progress, stopping
from ..cluster import workers
from ..compose import compose_config
from ..options import positives
from ..run import quieten
from ..terminal import say

_GROUPS = {"slurm": "slurm_array", "sge": "sge_array"}


def add_options(parser: ArgumentParser) -> None:
    """Add the overrides, and the options of the simulation."""
    about = "What a run will take: slides, tasks, disk, memory, core-hours, and time on any number of workers."
    parser.description = about
    parser.add_argument("overrides", nargs="*", help="as for wsiflow run")
    parser.add_argument("--workers", type=positives, help="numbers of workers to simulate: 1,16,256 (the run's own)")
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="what starts them (the run's own)")
    parser.add_argument("--calibrate", action="store_true", help="run a few blocks to measure what tasks cost here")
    parser.add_argument("--costs", type=Path, help="a costs.json measured elsewhere")
    parser.add_argument("--tiles", type=Path, help="CSV with slide and n_tiles_224, instead of slides")
    parser.add_argument("--tissue", type=float, default=1.0, help="share of those tiles that hold tissue (1)")
    parser.add_argument("--queue-s", type=float, default=0.0, help="mean wait of a submission, seconds (0)")
    parser.add_argument("--json", type=Path, help="file to write the report to")


def main(arguments: Namespace) -> int:
    """Plan a run, and print what it will take."""
    quieten()
    config = compose_config([*arguments.overrides, *(["dataset=demo"] if arguments.tiles else [])])
    if config.inference.cascade.is_on:
        cause = "what a cascade looks at is known only after its first pass"
        raise InputError(cause, "plan without inference.cascade.threshold, which gives the most that it can take")
    if arguments.tiles:
        if arguments.calibrate:
            raise InputError("a table of tiles has no pixels to measure", "calibrate on slides and give --costs")
        counts, costs, origin = count_tasks_in_table(config, arguments.tiles, arguments.tissue), ROUGH, "rough"
    else:
        plan_path = _make_plan(config, calibrate=arguments.calibrate)
        counts, costs = count_tasks(plan_path, config), costs_of(config.out, ROUGH)
        origin = "measured" if (config.out / COSTS).exists() else "rough"
    if arguments.costs:
        costs, origin = read_costs(arguments.costs, ROUGH), f"measured, {arguments.costs.name}"
    numbers = arguments.workers or [params.worker_count(config.executor, cores=allocated_cores()) or 1]
    own_scheduler = _scheduler(config)
    scheduler = arguments.scheduler or own_scheduler
    if scheduler not in SCHEDULERS:
        raise InputError(
            f"there is no simulation of executor {own_scheduler}", f"give --scheduler: {', '.join(SCHEDULERS)}"
        )
    if scheduler != own_scheduler:  # slices are cut as for that scheduler
        executor = compose_config([f"executor={_GROUPS.get(scheduler, scheduler)}"]).executor
        config = config.model_copy(update={"executor": executor})
    forecasts = {
        n: forecast(counts, costs, config, cluster_of(scheduler, n, costs, arguments.queue_s)) for n in numbers
    }
    if arguments.json:
        report = _as_json(counts, costs, origin, forecasts) | {"scheduler": scheduler}
        publish.write_view(arguments.json.parent, arguments.json.name, json.dumps(report, indent=1).encode())
    say("\n".join([*_count_lines(counts, config), *_cost_lines(counts, costs, origin)]))
    say("\n".join(_forecast_lines(scheduler, forecasts)))
    return 0


def _scheduler(config: RunConfig) -> str:
    """Return the scheduler as which the run's own executor is simulated."""
    if config.executor.array is None:
        return config.executor.kind
    return "sge" if config.executor.array.dialect.name == "Grid Engine" else "slurm"


def _make_plan(config: RunConfig, *, calibrate: bool) -> Path:
    """Publish the plan of a run as the run itself would, and measure costs if that is requested."""
    limit_threads(config.executor.threads)
    with logs.shown(), stopping.reporting(lambda: ledger.summary([config.out])), progress.shown(config.out):
        return _ingest(config, calibrate=calibrate)


def _ingest(config: RunConfig, *, calibrate: bool) -> Path:
    cases = shards.begin(config, logs.note)
    with workers(config.executor, config.out) as pool:
        message = shards.choose(pool, cases)
        if message:
            logs.note(message)
        faults = intake.find_faults(cases)
        for fault in (*intake.describe_faults(cases, faults), *intake.describe_shared_truth(cases)):
            logs.note(fault, logging.WARNING)
        every_case = range(len(shards.case_sizes(cases)))
        plan_path = ingest.make_plan(cases, shards.ingest_shard(pool, cases, every_case))
        rejections = intake.describe_rejections(plan_path, faults)
        for warning in (*rejections, *intake.describe_usable(cases, plan_path)):
            logs.note(warning, logging.WARNING)
        if calibrate:
            shards.once(pool, plan_path, "measure")
    return plan_path


def _count_lines(counts: TaskCounts, config: RunConfig) -> Iterator[str]:
    groups = counts.tasks["predict"]
    yield (
        f"slides: {len(counts.slides)} planned, {len(counts.rejected)} rejected; tissue tiles: {sum(counts.tiles):,}; "
        f"groups of about {config.tiles.group_tiles} tiles or fewer: {groups:,}"
    )
    yield "tasks: " + ", ".join(
        f"{stage} {number:,}" + (f" ({counts.done[stage]:,} published)" if counts.done[stage] else "")
        for stage, number in counts.tasks.items()
        if number
    )
    kinds = ", ".join(f"{kind} {size / 1e9:.3g} GB" for kind, size in counts.scratch.items() if size)
    yield f"disk: {kinds}; about {counts.files:,} files"
    yield f"memory of a task: {counts.memory_mb:,} MB"


def _cost_lines(counts: TaskCounts, costs: Costs, origin: str) -> Iterator[str]:
    hours = core_hours(counts, costs)
    total = sum(hours.values())
    source = "rough values for GoogLeNet at stride 16, fp32: measure with --calibrate" if origin == "rough" else origin
    yield f"costs: {source}"
    between = ""
    if costs.basis is not None:
        least, most = core_hours_between(hours, costs.basis)
        between = f", between {least:.3g} and {most:.3g}"
        yield f"  {_basis_text(costs.basis)}; the rest is extrapolated{_by_pixels(counts)}"
    each = ", ".join(f"{stage} {value:.3g}" for stage, value in hours.items())
    yield f"core-hours to do: {total:.3g}{between} ({each})"
    once = ", ".join(f"{name} {seconds:.1f}" for name, seconds in costs.once_s().items())
    yield f"  not in it: what each worker spends once ({once} s), scores and report, tasks that fail"
    yield f"tasks spread by {costs.spread:.0%}"


def _basis_text(basis: Basis) -> str:
    """Return what costs were measured on."""
    return (
        f"measured on {basis.blocks} blocks of {basis.slides} slides, {basis.megapixels:.3g} megapixels, on {basis.cpu}"
    )


def _by_pixels(counts: TaskCounts) -> str:
    return f" by the {counts.megapixels:,.0f} megapixels that are read" if counts.megapixels else " by tiles of tissue"


def _forecast_lines(scheduler: str, forecasts: Mapping[int, Forecast]) -> Iterator[str]:
    yield f"simulated, {scheduler}:"
    yield "  workers    makespan  efficiency  idle tail  slices  arrays  core-hours allocated"
    for number, each in forecasts.items():
        yield (
            f"  {number:7,}  {_clock(each.makespan_s):>10}  {each.efficiency:10.0%}  {_clock(each.tail_s):>9}"
            f"  {each.elements:6,}  {each.arrays:6,}  {each.allocated_s / 3600:20,.3g}"
        )


def _clock(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _as_json(counts: TaskCounts, costs: Costs, origin: str, forecasts: Mapping[int, Forecast]) -> dict[str, Any]:
    hours = core_hours(counts, costs)
    return {
        "slides": len(counts.slides),
        "tiles": sum(counts.tiles),
        "rejected": counts.rejected,
        "tasks": counts.tasks,
        "published": counts.done,
        "scratch_bytes": counts.scratch,
        "files": counts.files,
        "memory_mb": counts.memory_mb,
        "costs": origin,
        "core_hours": hours,
        "core_hours_between": core_hours_between(hours, costs.basis) if costs.basis else None,
        "measured_on": costs.basis._asdict() if costs.basis else None,
        "megapixels": counts.megapixels,
        "worker_once_s": costs.once_s(),
        "forecasts": [each._asdict() | {"efficiency": each.efficiency} for each in forecasts.values()],
    }
