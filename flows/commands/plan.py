"""The command ``wsiflow plan``: what a run will take, before any patch is read.

The command opens, hashes and cuts the slides and publishes the plan, so that the run itself finds all of that done. It
then counts the tasks and simulates the run for each number of workers. Of a cascade it plans the first pass, and a run
without it; what lies between is told as a range. What tasks cost is measured with
``--calibrate``, read from the run's folder or from a file, or taken from rough values for GoogLeNet at stride 16; the
report says which.
"""

import json
import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wsiflow.errors import InputError
from wsiflow.run import first_pass, intake, ledger, shards
from wsiflow.run.config import RunConfig
from wsiflow.run.costs import COSTS, Basis, Costs, costs_of, read_costs
from wsiflow.run.executor import params
from wsiflow.run.executor.protocol import Executor
from wsiflow.run.forecast import cascade
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
from ..options import positives, shares
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
    parser.add_argument(
        "--looked-at",
        type=shares,
        default=(),
        help="of a cascade: share of the tissue it looks at again: 0.1 or 0.05,0.2",
    )
    parser.add_argument("--json", type=Path, help="file to write the report to")


def main(arguments: Namespace) -> int:
    """Plan a run, and print what it will take."""
    quieten()
    config = compose_config([*arguments.overrides, *(["dataset=demo"] if arguments.tiles else [])])
    is_cascade = config.inference.cascade.is_on
    if arguments.tiles and arguments.calibrate:
        raise InputError("a table of tiles has no pixels to measure", "calibrate on slides and give --costs")
    if arguments.tiles and is_cascade:
        raise InputError("a table of tiles has no first pass to plan", "plan on slides, or without a cascade")
    simulation = _simulation(config, arguments)
    if is_cascade and not publish.generations(config.out, "plan.json"):
        return _forecast_cascade(config, arguments, simulation)
    if arguments.tiles:
        found = _Estimate(count_tasks_in_table(config, arguments.tiles, arguments.tissue), ROUGH, "rough")
    else:
        found = _estimate(_make_plans(config, _ingest, calibrate=arguments.calibrate)[0], config)
    if arguments.costs:
        found = found.with_costs(arguments.costs)
    forecasts = simulation.of(found)
    _write_json(arguments, _as_json(found, forecasts) | {"scheduler": simulation.scheduler})
    say("\n".join([*_count_lines(found.counts, config), *_cost_lines(found)]))
    say("\n".join(_forecast_lines(simulation.scheduler, forecasts)))
    return 0


class _Estimate(NamedTuple):
    """The tasks of a run, what they cost, and where that is known from."""

    counts: TaskCounts
    costs: Costs
    origin: str

    def with_costs(self, path: Path) -> "_Estimate":
        """Return the same with costs of a file."""
        return self._replace(costs=read_costs(path, ROUGH), origin=f"measured, {path.name}")

    def hours_between(self) -> tuple[float, float]:
        """Return the least and the most core-hours, which are the same where nothing was measured."""
        hours = core_hours(self.counts, self.costs)
        total = sum(hours.values())
        return core_hours_between(hours, self.costs.basis) if self.costs.basis else (total, total)


class _Simulation(NamedTuple):
    """What is simulated: a configuration whose slices are cut as for a scheduler, and numbers of workers."""

    config: RunConfig
    scheduler: str
    numbers: Sequence[int]
    queue_s: float

    def of(self, found: _Estimate) -> dict[int, Forecast]:
        """Return the simulated run by number of workers."""
        clusters = {n: cluster_of(self.scheduler, n, found.costs, self.queue_s) for n in self.numbers}
        return {n: forecast(found.counts, found.costs, self.config, cluster) for n, cluster in clusters.items()}


def _estimate(plan_path: Path, config: RunConfig) -> _Estimate:
    """Return what is known of a planned run."""
    root = plan_path.parent
    origin = "measured" if (root / COSTS).exists() else "rough"
    return _Estimate(count_tasks(plan_path, config), costs_of(root, ROUGH), origin)


def _forecast_cascade(config: RunConfig, arguments: Namespace, simulation: _Simulation) -> int:
    """Plan the first pass of a cascade and a run without it, and print what both passes will take."""
    first_path, whole_path = _make_plans(config, _ingest_cascade, calibrate=arguments.calibrate)
    first = _estimate(first_path, first_pass.config_of(config, first_path.parent))
    whole = _estimate(whole_path, config)
    if arguments.costs:
        whole = whole.with_costs(arguments.costs)
    looked = cascade.looked_at(config, arguments.looked_at)
    parts = {
        which: _Estimate(*cascade.own_pass(config, whole.counts, whole.costs, share), whole.origin)
        for which, share in zip(("least", "most"), looked.shares_of_cost(), strict=True)
    }
    of_first = simulation.of(first)
    simulated = {
        which: {n: of_first[n].then(own) for n, own in simulation.of(part).items()} for which, part in parts.items()
    }
    least = first.hours_between()[0] + parts["least"].hours_between()[0]
    most = first.hours_between()[1] + parts["most"].hours_between()[1]
    report = {
        "first_pass": _as_json(first, {}),
        "whole": _as_json(whole, {}),
        "looked_at": looked._asdict(),
        "core_hours_between": (least, most),
        "forecasts": {which: _forecasts_as_json(each) for which, each in simulated.items()},
        "scheduler": simulation.scheduler,
    }
    _write_json(arguments, report)
    say("\n".join(["first pass:", *_count_lines(first.counts, config), *_cost_lines(first)]))
    say("\n".join(["own pass, if it looked at all tissue:", *_count_lines(whole.counts, config), *_cost_lines(whole)]))
    say(f"it looks at {_range_text(looked.least, looked.most)} of the tissue: {looked.origin}")
    say(f"core-hours to do of both passes: between {least:.3g} and {most:.3g}")
    for which, each in simulated.items():
        say("\n".join([f"if it looks at the {which}:", *_forecast_lines(simulation.scheduler, each)]))
    return 0


def _range_text(least: float, most: float) -> str:
    return f"{least:.0%}" if least == most else f"{least:.0%} to {most:.0%}"


def _write_json(arguments: Namespace, report: Mapping[str, Any]) -> None:
    if arguments.json:
        publish.write_view(arguments.json.parent, arguments.json.name, json.dumps(report, indent=1).encode())


def _simulation(config: RunConfig, arguments: Namespace) -> _Simulation:
    """Return what is to be simulated for a run.

    Raises:
        InputError: There is no simulation of its executor.
    """
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
    return _Simulation(config, scheduler, numbers, arguments.queue_s)


def _scheduler(config: RunConfig) -> str:
    """Return the scheduler as which the run's own executor is simulated."""
    if config.executor.array is None:
        return config.executor.kind
    return "sge" if config.executor.array.dialect.name == "Grid Engine" else "slurm"


def _make_plans(config: RunConfig, ingesting: Callable[..., tuple[Path, ...]], *, calibrate: bool) -> tuple[Path, ...]:
    """Publish the plans of a run as the run itself would, and measure costs if that is requested."""
    limit_threads(config.executor.threads)
    with logs.shown(), stopping.reporting(lambda: ledger.summary([config.out])), progress.shown(config.out):
        return ingesting(config, calibrate=calibrate)


def _ingest(config: RunConfig, *, calibrate: bool) -> tuple[Path]:
    cases = shards.begin(config, logs.note)
    with workers(config.executor, config.out) as pool:
        return (_plan(pool, cases, logs.note, calibrate=calibrate),)


def _ingest_cascade(config: RunConfig, *, calibrate: bool) -> tuple[Path, Path]:
    """Plan the first pass of a cascade, and a run without it; what is wrong with slides is said once."""
    cases = shards.begin(config, logs.note)
    with workers(config.executor, config.out) as pool:
        first = _plan(pool, shards.begin_first_pass(cases), _silent, calibrate=calibrate)
        whole = shards.begin(cascade.without_first_pass(config), _silent)
        return first, _plan(pool, whole, logs.note, calibrate=calibrate)


def _silent(_text: str, _level: int) -> None:
    """Say nothing."""


def _plan(pool: Executor, cases: Path, note: shards.Note, *, calibrate: bool) -> Path:
    message = shards.choose(pool, cases)
    if message:
        note(message, logging.INFO)
    faults = intake.find_faults(cases)
    for fault in (*intake.describe_faults(cases, faults), *intake.describe_shared_truth(cases)):
        note(fault, logging.WARNING)
    every_case = range(len(shards.case_sizes(cases)))
    plan_path = ingest.make_plan(cases, shards.ingest_shard(pool, cases, every_case))
    for warning in (*intake.describe_rejections(plan_path, faults), *intake.describe_usable(cases, plan_path)):
        note(warning, logging.WARNING)
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


def _cost_lines(found: _Estimate) -> Iterator[str]:
    counts, costs, origin = found
    hours = core_hours(counts, costs)
    total = sum(hours.values())
    source = "rough values for GoogLeNet at stride 16, fp32: measure with --calibrate" if origin == "rough" else origin
    yield f"costs: {source}"
    between = ""
    if costs.basis is not None:
        least, most = found.hours_between()
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


def _as_json(found: _Estimate, forecasts: Mapping[int, Forecast]) -> dict[str, Any]:
    counts, costs, origin = found
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
        "forecasts": _forecasts_as_json(forecasts),
    }


def _forecasts_as_json(forecasts: Mapping[int, Forecast]) -> list[dict[str, Any]]:
    return [each._asdict() | {"efficiency": each.efficiency} for each in forecasts.values()]
