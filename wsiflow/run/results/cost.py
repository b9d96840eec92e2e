"""Compute throughput and cost of a run from the receipts of its published files.

Input: receipts, one mapping per published file. The caller selects them: for rates only those that this run wrote, so
that work of an earlier run never counts as speed. Output: metrics by name, and seconds by slide.

Conventions:

* A *tile* and a *window* count once, where they were predicted (``kind == "prediction"``). Extraction and stitching add
  cost, but no tiles.
* *Busy core-seconds* are user and system CPU seconds. A worker that waits for its disk is not busy, and the waiting
  lowers ``throughput.efficiency``.
* Work that a worker does once, whatever its tasks (start, imports, loading of networks), is warm-up and part of no
  receipt.
* *Allocated core-seconds* are seconds of the wall times cores of every worker from its start to its end, as schedulers
  charge them: starting, waiting and lost work included. Where workers descend from the driver, they are the cores that
  these take, as long as the driver lives.
* Where the denominator of a rate is zero, the metric is NaN, never 0 or infinite.
"""

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from datetime import datetime
from typing import Any

from wsiflow.run import first_pass
from wsiflow.run.executor.driver import Spent
from wsiflow.run.stages.line import STEPS

Receipt = Mapping[str, Any]

TOTAL, LINE = "cost.total_core_hours", "throughput.core_hours"
"""Core-hours of everything, by which settings are compared, and of the line alone."""

ALLOCATED = "cost.allocated_core_hours"
"""Core-hours that a scheduler charges."""


def summarise(
    receipts: Sequence[Receipt], *, run_wall_s: float, workers: int, tile_mm2: Mapping[str, float]
) -> dict[str, float]:
    """Return the throughput and cost metrics of a run by name.

    * ``throughput.tiles_per_s``, ``windows_per_s``: predicted tiles and windows per second of the run's wall time.
    * ``throughput.core_hours``: busy core-hours of all receipts, every kind.
    * ``throughput.core_seconds_per_tile``: the same in seconds, per predicted tile.
    * ``throughput.mm2_per_core_hour``: area of the predicted tiles per busy core-hour.
    * ``throughput.wall_s``: ``run_wall_s``.
    * ``throughput.efficiency``: busy core-seconds over ``workers * run_wall_s``.
    * ``cost.<step>_core_s``: the part of the busy core-seconds that falls to a step, see `step_core_seconds`.

    Args:
        receipts: Receipts of the files that this run wrote.
        run_wall_s: Wall seconds from the start of the run to its end, waiting included.
        workers: Cores that the run may use: worker processes times threads of each.
        tile_mm2: Area of one tile in mm2, by slide id.

    Raises:
        KeyError: A predicted slide has no entry in ``tile_mm2``.
    """
    predictions = [r for r in receipts if r["kind"] == "prediction"]
    tiles = sum(r["counts"]["tiles"] for r in predictions)
    windows = sum(r["counts"]["windows"] for r in predictions)
    area_mm2 = sum(r["counts"]["tiles"] * tile_mm2[r["slide"]] for r in predictions)
    core_s = sum(r["cpu_s"] for r in receipts)
    metrics = {
        "throughput.tiles_per_s": _ratio(tiles, run_wall_s),
        "throughput.windows_per_s": _ratio(windows, run_wall_s),
        "throughput.core_seconds_per_tile": _ratio(core_s, tiles),
        "throughput.core_hours": core_s / 3600.0,
        "throughput.mm2_per_core_hour": _ratio(area_mm2 * 3600.0, core_s),
        "throughput.wall_s": float(run_wall_s),
        "throughput.efficiency": _ratio(core_s, workers * run_wall_s),
    }
    steps = step_core_seconds(receipts)
    return metrics | {f"cost.{step}_core_s": steps[step] for step in STEPS}


def tile_area_mm2(tile_px: int, um_px: float) -> float:
    """Return the area in mm2 of a square tile of ``tile_px`` pixels of ``um_px`` micrometres."""
    return (tile_px * um_px / 1000.0) ** 2


def origin_core_seconds(receipts: Sequence[Receipt], before: Set[str]) -> dict[str, float]:
    """Return ``cost.executed_core_s``, the work of this start of the run, and ``cost.cached_core_s``, all other work.

    Args:
        receipts: Receipts of all files that are published for the run.
        before: Names of the files that were published before this start.
    """
    cached = math.fsum(r["cpu_s"] for r in receipts if r["path"] in before or r.get("shared"))
    total = math.fsum(r["cpu_s"] for r in receipts)
    return {"cost.executed_core_s": total - cached, "cost.cached_core_s": cached}


def first_pass_core_seconds(receipts: Sequence[Receipt]) -> float:
    """Return the part of the busy core-seconds that falls to the first pass of a cascade."""
    return math.fsum(r["cpu_s"] for r in receipts if r["path"].startswith(f"{first_pass.FOLDER}/"))


def total_core_seconds(
    drivers: Sequence[Spent], attempts: Sequence[Mapping[str, Any]], receipts: Sequence[Receipt]
) -> float:
    """Return ``cost.total_core_s``: everything that the run cost, start, planning, failures and scoring included.

    Core-seconds of all processes that descend from a driver are those that the kernel has counted; what workers
    elsewhere cost is what their attempts have reported. Of a driver that was killed only the attempts are known, and of
    an attempt whose process was killed elsewhere nothing. What the run shares with another one, which computed it, is
    charged as its receipts say.

    Args:
        drivers: Every driver of the run, in the order in which they started.
        attempts: Every attempt, see `wsiflow.run.trace.attempts`.
        receipts: Receipts of the published files.

    Returns:
        Core-seconds; NaN where no driver has recorded what it cost, as in runs of former versions.
    """
    if not any(one.core_s for one in drivers):
        return math.nan
    total = math.fsum(receipt["cpu_s"] for receipt in receipts if receipt.get("shared"))
    for one, own in zip(drivers, _attempts_of(drivers, attempts), strict=True):
        total += one.core_s or 0.0
        if one.core_s is None or not one.local:
            total += math.fsum(float(row.get("core_s") or 0.0) for row in own)
    return total


def _attempts_of(
    drivers: Sequence[Spent], attempts: Sequence[Mapping[str, Any]]
) -> "Iterator[list[Mapping[str, Any]]]":
    """Yield the attempts of each driver: those that name it; of former versions those until the next one started."""
    starts = [*(one.since for one in drivers[1:]), "9"]
    for one, end in zip(drivers, starts, strict=True):
        yield [
            row
            for row in attempts
            if row.get("driver") == one.since or (not row.get("driver") and one.since <= row["submit"] < end)
        ]


def total_metrics(
    drivers: Sequence[Spent], attempts: Sequence[Mapping[str, Any]], receipts: Sequence[Receipt]
) -> dict[str, float]:
    """Return ``cost.total_core_s``, the same as ``cost.total_core_hours``, and its part ``cost.start_core_s``.

    The start is what a process does once, however many runs it has: each trial of a sweep is charged all of it.
    """
    total_s = total_core_seconds(drivers, attempts, receipts)
    start_s = math.nan if math.isnan(total_s) else math.fsum(one.start_s for one in drivers)
    return {"cost.total_core_s": total_s, TOTAL: total_s / 3600.0, "cost.start_core_s": start_s}


def allocated_metrics(
    drivers: Sequence[Spent], attempts: Sequence[Mapping[str, Any]], elsewhere_s: float
) -> dict[str, float]:
    """Return ``cost.allocated_core_s``, what a scheduler charges for all starts, and the same in core-hours.

    Of a driver that was killed, the life of its workers ends with their last attempt.

    Args:
        drivers: Every driver of the run, in the order in which they started.
        attempts: Every attempt, see `wsiflow.run.trace.attempts`.
        elsewhere_s: Allocated core-seconds of workers that do not descend from a driver.

    Returns:
        Two numbers; NaN where a driver has not recorded its cores, as in runs of former versions.
    """
    total_s = math.nan if not drivers or any(one.cores is None for one in drivers) else elsewhere_s
    for one, own in zip(drivers, _attempts_of(drivers, attempts), strict=True):
        total_s += (one.cores or 0) * (_known_life_s(one, own) if one.elapsed_s is None else one.elapsed_s)
    return {"cost.allocated_core_s": total_s, ALLOCATED: total_s / 3600.0}


def _known_life_s(one: Spent, own: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds from the start of a driver to the end of its last attempt."""
    last = datetime.fromisoformat(max([one.since, *(row["end"] for row in own)]))
    return (last - datetime.fromisoformat(one.since)).total_seconds()


def core_hours_text(metrics: Mapping[str, float]) -> str:
    """Return what a run cost, such as ``0.031 core-hours, 0.012 of them the line; 0.08 allocated``.

    Runs of former versions have no total; the text is empty where a run has neither, as detections of other programs.
    """
    total, line, allocated = (metrics.get(name, math.nan) for name in (TOTAL, LINE, ALLOCATED))
    if math.isfinite(total):
        bill = f"; {allocated:.3g} allocated" if math.isfinite(allocated) else ""
        return f"{total:.3g} core-hours, {line:.3g} of them the line{bill}"
    return f"{line:.3g} core-hours of the line" if math.isfinite(line) else ""


def step_core_seconds(receipts: Sequence[Receipt]) -> dict[str, float]:
    """Return the busy core-seconds of every step of `STEPS`.

    The CPU seconds of a receipt are divided among its steps in proportion to their wall seconds, so that they add up to
    the receipt's CPU seconds. Receipts without timed steps cost core-hours and belong to no step.
    """
    split = dict.fromkeys(STEPS, 0.0)
    for receipt in receipts:
        timed_s = math.fsum(receipt["seconds"].values())
        for step in STEPS:
            if timed_s > 0:
                split[step] += receipt["cpu_s"] * receipt["seconds"].get(step, 0.0) / timed_s
    return split


def seconds_by_slide(receipts: Sequence[Receipt]) -> dict[str, dict[str, float]]:
    """Return, by slide id, the columns ``seconds_<step>``, ``seconds_wall`` and ``seconds_cpu``.

    They are sums over the slide's receipts: wall seconds of each step, wall seconds of the whole tasks, and CPU
    seconds. Tasks of one slide may run in parallel, so ``seconds_wall`` may exceed the elapsed time.
    """
    columns = [f"seconds_{step}" for step in STEPS] + ["seconds_wall", "seconds_cpu"]
    rows: dict[str, dict[str, float]] = {}
    for receipt in receipts:
        row = rows.setdefault(receipt["slide"], dict.fromkeys(columns, 0.0))
        for step in STEPS:
            row[f"seconds_{step}"] += receipt["seconds"].get(step, 0.0)
        row["seconds_wall"] += receipt["wall_s"]
        row["seconds_cpu"] += receipt["cpu_s"]
    return rows


def _ratio(amount: float, per: float) -> float:
    return amount / per if per > 0 else math.nan
