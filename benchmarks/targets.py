"""The speed to reach, and what was reached: core-seconds per tile, GoogLeNet at stride 16.

Input: the results of the benchmarks in a folder. Output: tables of target and result, and of how far from the floors.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.engines import REFERENCE
from benchmarks.measuring import Spread, Table

CAMELYON16_CORE_H = 100  # at 12 % tissue


class Target(NamedTuple):
    """How many times cheaper something should be.

    Attributes:
        name: What.
        path: Where its measurement is: file, then keys.
        against_reference: Times against the reference's window loop, None: none is set.
        against_window: Times against the best window loop at the same precision, None: none is set.
    """

    name: str
    path: tuple[str, ...]
    against_reference: float | None
    against_window: float | None


TARGETS = (
    Target("dense fp32, network only", ("engines", "googlenet", "dense, openvino fp32"), 450, 100),
    Target("dense bf16, network only", ("engines", "googlenet", "dense, openvino bf16"), 850, 110),
    Target("dense int8, network only", ("engines", "googlenet", "dense, openvino int8"), 1500, 100),
    Target(
        "padding-free network, dense bf16",
        ("engines", "inception_valid", "dense, openvino bf16"),
        None,
        90,
    ),
    Target("whole line fp32", ("line", "lines", "fp32, store=none"), 250, 60),
    Target("whole line bf16", ("line", "lines", "bf16, store=none"), 500, 65),
)
_SPEEDUP = 1.85


def read(folder: Path) -> dict[str, Any]:
    """Return the results in a folder by benchmark."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Return what the results say about the targets and the floors."""
    found = [_targets(results)]
    if "floors" in results:
        found.append(_floors(results))
    return found


def _targets(results: Mapping[str, Any]) -> Table:
    """Return every target with its result."""
    rows = []
    for target in TARGETS:
        measured = _at(results, target.path)
        cells = [target.name]
        for key in ("against_reference", "against_window"):
            wanted, reached = getattr(target, key), measured.get(key)
            cells += [*_judged(wanted, None if reached is None else Spread(*reached))]
        rows.append(cells)
    for precision, each in _at(results, ("line", "workers")).items():
        rows.append([f"2 workers against 1, {precision}", *_judged(_SPEEDUP, Spread(*[each["speedup"]] * 3)), "", ""])
    hours = (_at(results, ("line", "camelyon16")) or {}).get("core_h", {})
    for name, each in hours.items():
        if name.endswith("store=none"):
            told = f"{each['0.12']:.0f} core-hours" + ("" if each["0.12"] <= CAMELYON16_CORE_H else ": **missed**")
            rows.append([f"CAMELYON16 at 12 % tissue, {name}", f"at most {CAMELYON16_CORE_H} core-hours", told, "", ""])
    columns = ["", "target against the reference loop", "reached", "target against the best window loop", "reached"]
    quick = any(result["settings"]["quick"] for result in results.values())
    return Table("Speed to reach" + " (quick sizes: shows nothing)" * quick, columns, rows)


def _judged(wanted: float | None, reached: Spread | None) -> tuple[str, str]:
    """Return a target and what was reached, marked where it was missed."""
    told = "" if reached is None else reached.text()
    if wanted is None:
        return "", told
    missed = reached is not None and reached.median < wanted
    return f"{wanted:,g}", (told or "not measured") + (" **missed**" if missed else "")


def _floors(results: Mapping[str, Any]) -> Table:
    """Return how far the dense pass and the whole line are from what the machine could do at most."""
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
    return Table("Distance from the floor: FLOPs of a tile at the peak rate, no halo, nothing read", columns, rows)


def _at(results: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """Return the measurement at a path, empty where it was not made."""
    found: Any = results.get(path[0], {}).get("values", {})
    for key in path[1:]:
        found = (found or {}).get(key, {})
    return found or {}
