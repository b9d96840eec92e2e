"""Estimate the core-hours of the 399 slides of CAMELYON16: what is measured, counted and extrapolated.

Measured: the whole line on a synthetic slide, for each precision and stride, in core-seconds per megapixel read, and
what a slide and a worker cost besides; windows run one by one; and whether `wsiflow plan --calibrate` foretells such a
run. Counted: the pixels that the planner reads on 158 real outlines of tissue, with the blocks of these runs, and the
windows that it scores. Extrapolated: from these slides to all 399, by their number and by the tiles in their boxes.
"""

import csv
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import engines, extents, networks, product
from benchmarks.measuring import ResultTable, Spread, arguments, finish, interleave, machine, per_tile, say, spread
from benchmarks.targets import CAMELYON16_CORE_H
from flows.compose import compose_config
from wsiflow.model.choice import Choice
from wsiflow.plan.blocks import size_px
from wsiflow.plan.slide_plan import make_cut
from wsiflow.plan.tissue import select_tiles, touching_cells
from wsiflow.run.plan import read_plan
from wsiflow.run.stages.measure import areas_px
from wsiflow.system.machine import cpu_supports_bf16, installed_version

PAPER_CORE_H = 180_000
_BOXES = "camelyon16/tables/patch_counts_dldp.csv"
_AREAS = "camelyon16/tables/tissue_normal_geometry.csv"


class Size(NamedTuple):
    """How much is measured: side of the slide in px, strides, windows of the loop, rounds, every n-th outline."""

    side_px: int
    strides: tuple[int, ...]
    windows: int
    rounds: int
    every: int


_FULL, _QUICK = Size(6144, (16, 32), 56, 2, 1), Size(2048, (32,), 14, 1, 40)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, count and extrapolate, and write ``core_hours.json``."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, required=True, help="folder with camelyon16/")
    parser.add_argument("--every", type=int, help="every n-th outline alone; one takes 2 CPU-s")
    given = parser.parse_args(argv)
    size, about = _QUICK if given.quick else _FULL, machine()
    size = size._replace(every=given.every or size.every)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["WSIFLOW_CACHE"] = str(folder / "cache")
        lines, choices = _lines(folder, size, quick=given.quick)
        windows = _windows(size, quick=given.quick)
    counted, names = _counted(given.data, choices, size.every)
    values = {"lines": lines, "windows_s": windows, "counted": counted, "slides": names}
    values["boxes"] = _column(given.data / _BOXES, "n_tiles_224")
    values["areas"] = _column(given.data / _AREAS, "tissue_area_mm2")
    values["core_h"] = _core_hours(values)
    finish(given, "core_hours", about, values, _tables(values))


def _lines(folder: Path, size: Size, *, quick: bool) -> tuple[dict[str, Any], dict[int, Choice]]:
    """Foretell and run the line for each precision and stride; return what they cost, and the choice of each stride."""
    card = "pkg:demo.json" if quick else str(networks.random_card("googlenet", folder))
    (folder / "named").mkdir()
    slide = product.write_slide(folder / "slide.tif", size.side_px)
    named = product.write_manifest(folder / "named", [product.write_slide(folder / "named/n.tif", 2048, seed=9)])
    common = [
        *("model=card", f"model.card={card}", "dataset=manifest", "executor=inline", "dense.tolerance=1"),
        *(f"dataset.manifest={product.write_manifest(folder, [slide])}", "store=none", "stain=macenko"),
        f"inference.calibration={named}",
    ]
    lines: dict[str, Any] = {}
    choices: dict[int, Choice] = {}
    runs: dict[str, list[dict[str, float]]] = {}
    for turn in range(size.rounds):
        for stride in size.strides:
            for precision in _precisions(quick=quick):
                name = f"{precision}, stride {stride}"
                say(f"round {turn + 1} of {size.rounds}: {name}")
                out = folder / f"{precision}-{stride}-{turn}"
                settings = [*common, f"inference.precision={precision}", f"inference.stride={stride}"]
                if not turn:
                    lines[name] = foretold(out, settings)
                product.run_command(out, *settings)
                runs.setdefault(name, []).append(spent(out))
                choices[stride] = read_plan(out / "plan.json").settings.choice
    for name, own in runs.items():
        lines[name] |= {key: spread([each[key] for each in own]) for key in own[0]}
    return lines, choices


def _precisions(*, quick: bool) -> list[str]:
    able = {"fp32": True, "bf16": cpu_supports_bf16(), "int8": bool(installed_version("nncf")) and not quick}
    return [precision for precision, is_able in able.items() if is_able]


def foretold(out: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Return what `wsiflow plan --calibrate` says of a run, in core-seconds."""
    report = out.with_suffix(".json")
    command = [sys.executable, "-m", "wsiflow.flows", "plan", *settings, *product.QUIET, f"out={out}"]
    subprocess.run([*command, "--calibrate", "--json", str(report)], check=True, stdout=subprocess.DEVNULL)
    told = json.loads(report.read_text(encoding="utf-8"))
    first_s = told["worker_once_s"]["first blocks"]  # the only worker of the run spends them as well
    return {
        "foretold_s": 3600 * sum(told["core_hours"].values()) + first_s,
        "foretold_between_s": [3600 * hours + first_s for hours in told["core_hours_between"]],
        "worker_once_s": told["worker_once_s"],
    }


def spent(out: Path) -> dict[str, float]:
    """Return the core-seconds of a run of one slide: per megapixel read, and besides for the slide."""
    cost, plan = product.cost(out), read_plan(out / "plan.json")
    per_pixel = sum(cost.core_s[step] for step in ("read", "stain", "infer", "write"))
    planning_s = sum(receipt["cpu_s"] for receipt in product.receipts(out) if receipt.get("kind") == "tissue")
    total_s = sum(cost.core_s.values())
    return {
        "s_megapixel": per_pixel / sum(areas_px(out, plan)) * 1e6,
        "certificate_s": cost.core_s["certify"],
        "other_s": total_s - per_pixel - cost.core_s["certify"],
        "tasks_s": total_s - planning_s,
    }


def _windows(size: Size, *, quick: bool) -> dict[str, Spread]:
    """Return the core-seconds of a window in the best window loop at each precision; the network alone."""
    classifier = networks.demo() if quick else networks.random_classifier("googlenet")
    able = _precisions(quick=quick)
    ways = [way for way in engines.ways(quick=quick, only=("window",)) if way[2] in able and way[1] != "torch"]
    loops = engines.prepare(classifier, ways, engines.Size(2 * networks.WINDOW_PX, size.windows, size.rounds))
    contestants = engines.as_contestants({name: run for name, run in loops.items() if name != engines.REFERENCE})
    for run in contestants.values():
        run()
    rounds = interleave(contestants, rounds=size.rounds)
    best = {precision: per_tile(rounds[engines.best_loop(rounds, precision)]) for precision in able}
    return {name: Spread(*(value / networks.WINDOWS_PER_TILE for value in each)) for name, each in best.items()}


def _counted(data: Path, choices: Mapping[int, Choice], every: int) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Plan the outlines; return sums of tissue tiles, windows and megapixels by stride, and the slides' names."""
    counted: dict[str, dict[str, float]] = {}
    names = []
    for name, mask in extents.masks(data, every=every):
        say(name)
        names.append(name.lower())
        for stride, choice in choices.items():
            sums = counted.setdefault(str(stride), {})
            for key, value in _of_mask(mask, choice).items():
                sums[key] = sums.get(key, 0.0) + value
    return counted, names


def _of_mask(mask: extents.Mask, choice: Choice) -> dict[str, float]:
    """Return what a run would read and score of a slide, with `tissue.windows` of either value."""
    params = compose_config([]).tissue
    largest = (choice.block_rows, choice.block_cols)
    frame = extents.frame_of(mask, params.downsample, choice.halo_px, largest, stride_px=choice.stride_px)
    tiles = select_tiles(extents.coverage_of(mask, frame, params.downsample), params)
    scored = touching_cells(mask, tiles, frame, downsample=params.downsample)
    found = {
        "tissue_tiles": float(mask.sum()) * params.downsample**2 / frame.tile_px**2,
        "windows": float(scored.sum()),
    }
    for windows, cells in (("all", None), ("touching", scored)):
        cut = make_cut(tiles, frame, group_tiles=400, scored=cells)
        found[f"megapixels, {windows}"] = sum(math.prod(size_px(frame, block)) for block in cut.blocks) / 1e6
    return found


def _column(path: Path, name: str) -> dict[str, float]:
    """Return a column of a table by slide: tiles in the boxes of 399 slides, or mm2 of tissue of 158 normal ones."""
    with path.open(encoding="utf-8", newline="") as stream:
        return {row["slide"].lower(): float(row[name]) for row in csv.DictReader(stream)}


def factors(values: Mapping[str, Any]) -> dict[str, float]:
    """Return by how much the counted slides are multiplied for all slides.

    To all that have outlines by the area of their tissue, which is known for each; from these to all by their number,
    or by the tiles in their boxes.
    """
    boxes, areas = values["boxes"], values["areas"]
    outlined = sum(areas.values()) / sum(areas[name] for name in values["slides"])
    return {
        "by slides": outlined * len(boxes) / len(areas),
        "by boxes": outlined * sum(boxes.values()) / sum(boxes[name] for name in areas),
    }


def _core_hours(values: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return core-hours of every way: of the outlines, and of all slides with either factor."""
    times_of, hours = factors(values), {}
    all_slides = len(values["boxes"])
    for name, line in values["lines"].items():
        counted = values["counted"][name.split()[-1]]
        per_slide_s = line["certificate_s"].median + line["other_s"].median
        for windows in ("touching", "all"):
            of_pixels = counted[f"megapixels, {windows}"] * line["s_megapixel"].median
            hours[f"{name}, {windows}"] = {
                "outlines": (of_pixels + len(values["slides"]) * per_slide_s) / 3600,
                **{how: (of_pixels * times + all_slides * per_slide_s) / 3600 for how, times in times_of.items()},
            }
    for precision, seconds in values["windows_s"].items():
        for stride, counted in values["counted"].items():
            of_windows = counted["windows"] * seconds.median / 3600
            hours[f"{precision}, stride {stride}, windows one by one"] = {
                "outlines": of_windows,
                **{how: of_windows * times for how, times in times_of.items()},
            }
    return hours


def _tables(values: Mapping[str, Any]) -> list[ResultTable]:
    return [_measured_table(values), _hours_table(values), _foretold_table(values)]


def _measured_table(values: Mapping[str, Any]) -> ResultTable:
    """Return the table of what was measured on this processor."""
    rows = [
        [
            name,
            line["s_megapixel"].text(1e3),
            line["certificate_s"].text(),
            line["other_s"].text(),
            " + ".join(f"{seconds:.1f}" for seconds in line["worker_once_s"].values()),
            values["windows_s"][name.split(",")[0]].text(1e3),
        ]
        for name, line in values["lines"].items()
    ]
    columns = [
        *("", "line, core-ms per megapixel read", "certificate, core-s a slide", "other, core-s a slide"),
        *("a worker once: start, network, first blocks, s", "a window in the best loop, core-ms"),
    ]
    return ResultTable("Measured here", columns, rows)


def _hours_table(values: Mapping[str, Any]) -> ResultTable:
    """Return the table of core-hours; what is counted and what is extrapolated have columns of their own."""
    hours, slides = values["core_h"], len(values["slides"])
    rows = []
    for name in values["lines"]:
        counted = values["counted"][name.split()[-1]]
        loop = hours[f"{name}, windows one by one"]
        now, before = hours[f"{name}, touching"], hours[f"{name}, all"]
        rows.append(
            [
                name,
                f"{counted['megapixels, touching'] / slides:,.0f} ({counted['megapixels, all'] / slides:,.0f})",
                f"{now['outlines']:.1f} ({before['outlines']:.1f})",
                f"{between_text(now)} ({between_text(before)})",
                f"{CAMELYON16_CORE_H.get(name, '')}",
                between_text(loop),
                f"{loop['by slides'] / now['by slides']:.0f}",
            ]
        )
    counted = next(iter(values["counted"].values()))
    tiles = sorted(counted["tissue_tiles"] * times / 1e6 for times in factors(values).values())
    title = (
        f"Core-hours of {len(values['boxes'])} slides, {tiles[0]:.1f} to {tiles[1]:.1f} M tiles of tissue; the paper: "
        f"{PAPER_CORE_H:,}"
    )
    columns = [
        "in brackets: tissue.windows=all, as before",
        f"counted: megapixels read, mean of {slides} outlines",
        f"counted and measured: core-hours of the {slides}",
        "extrapolated: core-hours of all, by slides and by boxes",
        "goal",
        "extrapolated: the best window loop",
        "times fewer",
    ]
    return ResultTable(title, columns, rows)


def between_text(hours: Mapping[str, float]) -> str:
    """Return the core-hours by slides and by boxes, the lesser first."""
    least, most = sorted((hours["by slides"], hours["by boxes"]))
    return f"{least:,.0f} to {most:,.0f}"


def _foretold_table(values: Mapping[str, Any]) -> ResultTable:
    """Return the table that compares the estimate of `wsiflow plan --calibrate` with the runs."""
    rows = []
    for name, line in values["lines"].items():
        least, most = line["foretold_between_s"]
        inside = least <= line["tasks_s"].median <= most
        cells = [f"{line['foretold_s']:.1f}", f"{least:.1f} to {most:.1f}", line["tasks_s"].text()]
        rows.append([name, *cells, "yes" if inside else "**no**"])
    columns = ["", "foretold, core-s", "its range", "the run, core-s", "within the range"]
    return ResultTable("Core-seconds of one slide, foretold by wsiflow plan --calibrate and measured", columns, rows)


if __name__ == "__main__":
    main()
