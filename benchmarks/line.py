"""Measure the whole line on a synthetic slide: core-seconds per tissue tile to read, stain, infer, certify and stitch.

Each run is a `wsiflow run` in this process (`executor=inline`), with the network loaded before; its receipts state the
cost of each step. Window loops run in turns with the runs, in the same process. The cost of the line is the cost in the
slide's receipts without the certificate, which is a fixed number of windows per slide. Work without receipts (tissue,
lesions, scores, report) is given as the rest of the run.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import engines, networks, product
from benchmarks.measuring import ResultTable, Spent, arguments, finish, interleave, machine, ratio, say, spread
from benchmarks.product import RunCost
from wsiflow.model.classifier import load
from wsiflow.system.machine import cpu_supports_bf16

_CODECS = {
    "none (slide read again)": ("store=none",),
    "raw": ("store=hdf5",),
    "lzf": ("store=hdf5", "store.compression=lzf"),
    "gzip": ("store=hdf5", "store.compression=gzip"),
    "jpeg 90": ("store=hdf5", "store.compression=jpeg"),
    "jpeg 80": ("store=hdf5", "store.compression=jpeg", "store.quality=80"),
}


class Size(NamedTuple):
    """How much is measured: side of the slide in px, windows of the loops, number of rounds."""

    side_px: int
    windows: int
    rounds: int


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the core-seconds of the whole line, and write ``line.json``."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--card", help="a model card instead of GoogLeNet with random weights")
    given = parser.parse_args(argv)
    size = Size(2048, 14, 2) if given.quick else Size(8192, 56, 3)
    about = machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["WSIFLOW_CACHE"] = str(folder / "cache")
        say(f"drawing a slide of {size.side_px} px")
        path = product.write_slide(folder / "slide.tif", size.side_px, workers=about["cores"])
        manifest = product.write_manifest(folder, [path])
        card = given.card or (networks.random_card("googlenet", folder) if not given.quick else "pkg:demo.json")
        values, tables = _lines(folder, str(card), manifest, size)
        values["workers"], workers_table = _workers(folder, str(card), manifest, most=about["cores"])
        values["stores"], stores_table = _stores(folder, manifest)
    finish(given, "line", about, values, [*tables, workers_table, stores_table])


def _lines(folder: Path, card: str, manifest: Path, size: Size) -> tuple[dict[str, Any], list[ResultTable]]:
    """Run the line with each precision and store, in turns with the window loops; return results and tables."""
    precisions = ("fp32", "bf16") if cpu_supports_bf16() else ("fp32",)
    ways = [way for way in engines.ways(quick=False, only=("window",)) if way[2] in precisions and way[1] != "torch"]
    loops = engines.prepare(
        load(networks.spec(card)), ways, engines.Size(2 * networks.WINDOW_PX, size.windows, size.rounds)
    )
    costs: dict[str, list[RunCost]] = {}

    def line(precision: str, store: str) -> float:
        overrides = [*_common(card, manifest), f"inference.precision={precision}", f"store={store}"]
        with product.run(folder, *overrides) as (out, _):
            costs.setdefault(_name(precision, store), []).append(product.cost(out))
        return costs[_name(precision, store)][-1].tiles

    runs = {_name(precision, "none"): (lambda precision=precision: line(precision, "none")) for precision in precisions}
    contestants = engines.as_contestants(loops) | runs
    say("loading the networks")
    _load(folder, card)
    rounds = interleave(contestants, rounds=size.rounds)
    say("once more by way of the store")
    for precision in precisions:
        line(precision, "hdf5")
    values = {"loops": {name: rounds[name] for name in loops}, "lines": {}}
    for name, own in costs.items():
        values["lines"][name] = _compared(name, own, rounds)
    return values, _line_tables(values["lines"], size)


def _load(folder: Path, card: str) -> None:
    """Run a small slide, so that this process has loaded every network that it needs."""
    small = folder / "small"
    small.mkdir()
    manifest = product.write_manifest(small, [product.write_slide(small / "small.tif", 2048)])
    for precision in ("fp32", "bf16") if cpu_supports_bf16() else ("fp32",):
        with product.run(small, *_common(card, manifest), f"inference.precision={precision}", "store=none"):
            say(f"{precision} is loaded")


def _common(card: str, manifest: Path, executor: str = "inline") -> list[str]:
    """Return the overrides of every run; the tolerance is off because scores of random weights would exceed it."""
    return [
        "model=card",
        f"model.card={card}",
        "dataset=manifest",
        f"dataset.manifest={manifest}",
        "stain=macenko",
        f"executor={executor}",
        "dense.tolerance=1",
    ]


def _name(precision: str, store: str) -> str:
    return f"{precision}, store={store}"


def _compared(name: str, costs: list[RunCost], rounds: dict[str, list[Spent]]) -> dict[str, Any]:
    """Return the costs of a line and, where it ran in turns with the window loops, both ratios round by round."""
    values: dict[str, Any] = {
        "tiles": costs[0].tiles,
        "steps_s_tile": product.median_steps(costs),
        "line_s_tile": spread([each.line_s_tile for each in costs]),
        "certificate_s": spread([each.core_s["certify"] for each in costs]),
        "area_overhead": costs[0].area_overhead,
        "stored_bytes": costs[0].stored_bytes,
    }
    if name in rounds:
        line = [Spent(each.slide_span_s, each.line_s_tile * each.tiles, each.tiles) for each in costs]
        loop = engines.best_loop(rounds, name.split(",")[0])
        values |= {
            "run_s_tile": spread([each.core_s_tile for each in rounds[name]]),
            "against_reference": ratio(rounds[engines.REFERENCE], line),
            "against_window": ratio(rounds[loop], line),
            "window_loop": loop,
        }
    return values


def _line_tables(lines: dict[str, Any], size: Size) -> list[ResultTable]:
    """Return tables of the cost by step and of the ratios."""
    parts = [step for step in product.STEPS if step != "certify"]
    columns = ["core-ms per tile", *parts, "line", "certificate, s per slide", "whole run", "pixels read / tissue"]
    split = [
        [
            name,
            *(f"{1e3 * each['steps_s_tile'][step]:.2f}" for step in parts),
            each["line_s_tile"].text(1e3),
            each["certificate_s"].text(),
            each["run_s_tile"].text(1e3) if "run_s_tile" in each else "",
            f"{each['area_overhead']:.2f}",
        ]
        for name, each in lines.items()
    ]
    tiles = next(iter(lines.values()))["tiles"]
    title = f"Whole line, one worker, slide of {size.side_px} px ({tiles} tissue tiles), stain=macenko"
    ratios = [
        [name, each["against_reference"].text(), each["against_window"].text(), each["window_loop"]]
        for name, each in lines.items()
        if "window_loop" in each
    ]
    compared = ["whole line", "against the reference loop", "against the best window loop at this precision", "which"]
    return [
        ResultTable(title, columns, split),
        ResultTable("Whole line against window loops (network only)", compared, ratios),
    ]


def _workers(folder: Path, card: str, manifest: Path, *, most: int) -> tuple[dict[str, Any], ResultTable]:
    """Run the slide with one worker process and with two, in groups as small as blocks allow."""
    values, rows = {}, []
    for precision in ("fp32", "bf16") if cpu_supports_bf16() else ("fp32",):
        rates: dict[int, float] = {}
        for workers in (1, 2) if most > 1 else (1,):
            say(f"{workers} worker processes, {precision}")
            overrides = [*_common(card, manifest, executor="process"), f"executor.workers={workers}"]
            overrides += ["tiles.group_tiles=25", "store=none", f"inference.precision={precision}"]
            with product.run(folder, *overrides) as (out, _):
                rates[workers] = product.tiles_per_s(out)
        one, two = rates[1], rates[max(rates)]
        values[precision] = {"tiles_per_s": rates, "speedup": two / one}
        rows.append([precision, f"{one:.2f}", f"{two:.2f}", f"{two / one:.2f}"])
    columns = ["precision", "1 worker, tiles per s", "2 workers, tiles per s", "speed-up"]
    return values, ResultTable(
        "Two workers against one: prediction, once every worker has loaded the network", columns, rows
    )


def _stores(folder: Path, manifest: Path) -> tuple[dict[str, Any], ResultTable]:
    """Run the demo network on one slide with every store and compression."""
    values, rows = {}, []
    plain: dict[str, Any] = {}
    for name, overrides in _CODECS.items():
        say(f"store {name}")
        with product.run(folder, *_common("pkg:demo.json", manifest), *overrides) as (out, _):
            cost, maps = product.cost(out), product.heatmaps(out)
        plain = plain or maps
        apart = np.concatenate([np.abs(maps[key] - plain[key])[~np.isnan(maps[key])] for key in maps])
        values[name] = {
            "bytes_per_tile": cost.stored_bytes / cost.tiles,
            "read_s_tile": cost.core_s["read"] / cost.tiles,
            "write_s_tile": cost.core_s["write"] / cost.tiles,
            "mean_abs_diff": float(apart.mean()),
            "max_abs_diff": float(apart.max()),
        }
        each = values[name]
        rows.append(
            [
                name,
                f"{each['bytes_per_tile'] / 1e3:.1f}",
                f"{1e3 * each['read_s_tile']:.2f}",
                f"{1e3 * each['write_s_tile']:.2f}",
                f"{each['mean_abs_diff']:.2g}",
                f"{each['max_abs_diff']:.2g}",
            ]
        )
    columns = ["store", "kB per tile", "read, ms per tile", "write, ms per tile", "mean abs dp", "max abs dp"]
    return values, ResultTable(
        "What pixels cost on their way through the store (demo network, one run each)", columns, rows
    )


if __name__ == "__main__":
    main()
