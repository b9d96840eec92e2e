"""Compare measured speed with its targets: core-seconds per tile, GoogLeNet at stride 16.

Input: the results of the benchmarks in a folder. Output: tables of targets and results, and of the distance from the
floors.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.engines import REFERENCE
from benchmarks.measuring import ResultTable, Spread

CAMELYON16_CORE_H = {"bf16, stride 16": 100, "fp32, stride 16": 180}
CASCADE_CORE_H = {"bf16, stride 16": 35}


class SpeedTarget(NamedTuple):
    """By which factor a measurement should be cheaper than the window loops.

    Attributes:
        name: Name of the target.
        path: Place of the measurement in the results: file, then keys.
        against_reference: Target factor against the reference's window loop; None where there is no target.
        against_window: Target factor against the best window loop at the same precision; None where there is none.
    """

    name: str
    path: tuple[str, ...]
    against_reference: float | None
    against_window: float | None


TARGETS = (
    SpeedTarget("dense fp32, network only", ("engines", "googlenet", "dense, openvino fp32"), 450, 100),
    SpeedTarget("dense bf16, network only", ("engines", "googlenet", "dense, openvino bf16"), 850, 110),
    SpeedTarget("dense int8, network only", ("engines", "googlenet", "dense, openvino int8"), 1500, 100),
    SpeedTarget(
        "padding-free network, dense bf16",
        ("engines", "inception_valid", "dense, openvino bf16"),
        None,
        90,
    ),
    SpeedTarget("whole line fp32", ("line", "lines", "fp32, store=none"), 250, 60),
    SpeedTarget("whole line bf16", ("line", "lines", "bf16, store=none"), 500, 65),
)
_SPEEDUP = 1.85


def read(folder: Path) -> dict[str, Any]:
    """Return the results in a folder by name of the benchmark."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def tables(results: Mapping[str, Any]) -> list[ResultTable]:
    """Return the table of the targets and, where floors were measured, the table of the distance from them."""
    result = [_targets(results)]
    if "floors" in results:
        result.append(_floors(results))
    return result


def _targets(results: Mapping[str, Any]) -> ResultTable:
    """Return the table of every target with its result."""
    rows = []
    for target in TARGETS:
        measured = _at(results, target.path)
        cells = [target.name]
        for key in ("against_reference", "against_window"):
            factor, reached = getattr(target, key), measured.get(key)
            cells += [*_target_cells(factor, None if reached is None else Spread(*reached))]
        rows.append(cells)
    for precision, each in _at(results, ("line", "workers")).items():
        rows.append(
            [f"2 workers against 1, {precision}", *_target_cells(_SPEEDUP, Spread(*[each["speedup"]] * 3)), "", ""]
        )
    for name, goal in CAMELYON16_CORE_H.items():
        hours = _at(results, ("core_hours", "core_h", f"{name}, touching"))
        if hours:
            least, most = sorted((hours["by slides"], hours["by boxes"]))
            reached_h = f"{least:.0f} to {most:.0f} core-hours" + ("" if most <= goal else ": **missed**")
            rows.append([f"CAMELYON16, {name}", f"at most {goal} core-hours", reached_h, "", ""])
    columns = ["", "target against the reference loop", "reached", "target against the best window loop", "reached"]
    quick = any(result["settings"]["quick"] for result in results.values())
    return ResultTable("Speed to reach" + " (quick sizes: shows nothing)" * quick, columns, rows)


def _target_cells(factor: float | None, reached: Spread | None) -> tuple[str, str]:
    """Return the cells of a target and of the factor reached, marked where the target was missed."""
    text = "" if reached is None else reached.text()
    if factor is None:
        return "", text
    missed = reached is not None and reached.median < factor
    return f"{factor:,g}", (text or "not measured") + (" **missed**" if missed else "")


def _floors(results: Mapping[str, Any]) -> ResultTable:
    """Return the table of the distance of the dense pass and the whole line from the machine's peak rate."""
    products = results["floors"]["values"]["products"]
    rows = []
    for precision, peak in products["peak_gflop_s"].items():
        if not peak:
            continue
        floor_s = products["tile_gflop"] / peak
        cells = [precision, f"{1e3 * floor_s:.1f}"]
        for path, key in (
            (("engines", "googlenet", f"dense, openvino {precision}"), "core_s_tile"),
            (("line", "lines", f"{precision}, store=none"), "line_s_tile"),
        ):
            reached = _at(results, path).get(key)
            cells.append("" if reached is None else f"{1e3 * reached[0]:.1f} ({floor_s / reached[0]:.0%})")
        loop_s = _at(results, ("engines", "googlenet", REFERENCE)).get("core_s_tile")
        rows.append([*cells, "" if loop_s is None else f"{loop_s[0] / floor_s:,.0f}"])
    columns = [
        "precision",
        "floor, ms per tile",
        "dense pass, ms (floor / reached)",
        "whole line, ms (floor / reached)",
        "reference loop / floor: the most there can be",
    ]
    return ResultTable(
        "Distance from the floor: FLOPs of a tile at the peak rate, no halo, nothing read", columns, rows
    )


def _at(results: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """Return the measurement at a path; empty where it was not measured."""
    value: Any = results.get(path[0], {}).get("values", {})
    for key in path[1:]:
        value = (value or {}).get(key, {})
    return value or {}
