"""Measure the cost per tile by stride, block size, threads and worker processes: GoogLeNet, the network only.

A tile is 224 px a side at every stride. Blocks have the halo of a run, which costs small blocks more; all of their
tiles count as tissue. Two workers are two processes that run the same block for the same number of seconds.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import networks
from benchmarks.measuring import ResultTable, Spent, arguments, finish, interleave, machine, per_tile, say, spread
from wsiflow.model import scorer, scoring
from wsiflow.model.classifier import Classifier, load
from wsiflow.model.dense import network
from wsiflow.system.machine import cpu_supports_bf16

_CONTEXT_PX = 96  # what `dense.halo` says


class Size(NamedTuple):
    """How much is measured."""

    strides: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...]
    stride_region_px: int
    worker_tiles: tuple[int, int]
    worker_s: float
    rounds: int


_QUICK = Size((16, 224), ((1, 1), (1, 2)), 448, (1, 2), 2.0, 2)
_FULL = Size(
    (8, 16, 32, 56, 112, 224),
    ((1, 8), (3, 8), (5, 8), (7, 8), (9, 8), (7, 1), (7, 4), (7, 16)),
    1120,
    (5, 6),
    8.0,
    2,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the cost per tile by stride, block, threads and workers, and write ``scaling.json``."""
    given = arguments(__doc__ or "").parse_args(argv)
    size, about = _QUICK if given.quick else _FULL, machine()
    with tempfile.TemporaryDirectory() as name:
        os.environ["WSIFLOW_CACHE"] = str(Path(name) / "cache")
        card = "pkg:demo.json" if given.quick else str(networks.random_card("googlenet", Path(name)))
        classifier = load(networks.spec(card))
        values, tables = {}, []
        for part in (_strides, _blocks, _threads):
            values[part.__name__.strip("_")], table = part(classifier, size)
            tables.append(table)
        values["workers"], table = _workers(card, classifier, size, most=about["cores"])
    finish(given, "scaling", about, values, [*tables, table])


def _precisions() -> tuple[str, ...]:
    return ("fp32", "bf16") if cpu_supports_bf16() else ("fp32",)


def _strides(classifier: Classifier, size: Size) -> tuple[dict[str, Any], ResultTable]:
    """Measure the dense and the window engine at each stride, without halo; a window costs the same at any stride."""
    pixels = networks.tissue(size.stride_region_px)
    cut = networks.windows(pixels, 2 * networks.BATCH)
    contestants = {}
    for precision in _precisions():
        windows = networks.prepared(classifier, networks.choice("window", "openvino", precision), pixels)
        contestants[f"window {precision}"] = lambda made=windows: networks.run_windows(made, cut).size
        for stride in size.strides:
            how = networks.choice("dense", "openvino", precision, stride_px=stride)
            made = networks.prepared(classifier, how, pixels)
            share = (stride / networks.TILE_PX) ** 2
            contestants[f"dense {precision} {stride}"] = lambda made=made, share=share: (
                networks.run_region(made, pixels).size * share
            )
    for contestant in contestants.values():
        contestant()
    rounds = interleave(contestants, rounds=size.rounds, unit="tile (window)")
    values, rows = {}, []
    for stride in size.strides:
        facts = network.describe(classifier, stride)
        count = (networks.TILE_PX / stride) ** 2
        cells = [str(stride), str(facts.grid_px), f"{2e-9 * facts.dense_macs_px * networks.TILE_PX**2:.2f}"]
        for precision in _precisions():
            whole, window = (per_tile(rounds[name]) for name in (f"dense {precision} {stride}", f"window {precision}"))
            values[f"{precision} {stride}"] = {"dense_s_tile": whole, "window_s_tile": count * window.median}
            cells += [
                whole.text(1e3),
                f"{1e3 * count * window.median:,.1f}",
                f"{count * window.median / whole.median:.1f}",
            ]
        rows.append(cells)
    columns = ["stride, px", "computed every, px", "GFLOP per tile"]
    for precision in _precisions():
        columns += [f"dense {precision}, ms per tile", f"window {precision}, ms per tile", "ratio"]
    return values, ResultTable(f"Stride (region of {size.stride_region_px} px, no halo)", columns, rows)


def block_pixels(rows: int, cols: int, context_px: int) -> np.ndarray:
    """Return synthetic tissue, uint8 (rows, cols, 3), as large as the windows of a block and their context."""
    sides = [
        tiles * networks.TILE_PX - networks.STRIDE_PX + networks.WINDOW_PX + 2 * context_px for tiles in (rows, cols)
    ]
    drawn = networks.tissue(networks.WINDOW_PX * 4)
    repeats = [-(-side // drawn.shape[0]) for side in sides]
    return np.ascontiguousarray(np.tile(drawn, (*repeats, 1))[: sides[0], : sides[1]])


def context_px(classifier: Classifier) -> int:
    """Return the context around the windows of a block in px; 0 for a network that does not pad."""
    return _CONTEXT_PX if network.describe(classifier, networks.STRIDE_PX).padded else 0


def _blocks(classifier: Classifier, size: Size) -> tuple[dict[str, Any], ResultTable]:
    """Measure blocks of many sizes."""
    context = context_px(classifier)
    contestants = {}
    for precision in _precisions():
        how = networks.choice("dense", "openvino", precision, context_px=context)
        made = networks.prepared(classifier, how, block_pixels(1, 1, context))
        for rows, cols in size.blocks:
            pixels = block_pixels(rows, cols, context)
            contestants[f"{precision} {rows}x{cols}"] = lambda made=made, pixels=pixels: (
                networks.run_region(made, pixels).size / networks.WINDOWS_PER_TILE
            )
    say("running every block once")
    for contestant in contestants.values():
        contestant()
    rounds = interleave(contestants, rounds=size.rounds)
    values = {name: per_tile(own) for name, own in rounds.items()}
    table_rows = [
        [f"{rows} x {cols}", *(values[f"{precision} {rows}x{cols}"].text(1e3) for precision in _precisions())]
        for rows, cols in size.blocks
    ]
    title = f"Block size: core-ms per tile, all of it tissue, context of {context} px"
    return values, ResultTable(title, ["tile rows x columns", *_precisions()], table_rows)


def _threads(classifier: Classifier, size: Size) -> tuple[dict[str, Any], ResultTable]:
    """Measure one and two threads of one process."""
    context = context_px(classifier)
    pixels = block_pixels(*size.worker_tiles, context)
    contestants = {}
    for precision in _precisions():
        how = networks.choice("dense", "openvino", precision, context_px=context)
        for threads in (1, 2):
            made = networks.prepared(classifier, how, pixels, threads=threads)
            contestants[f"{precision} {threads}"] = lambda made=made: (
                networks.run_region(made, pixels).size / networks.WINDOWS_PER_TILE
            )
    for contestant in contestants.values():
        contestant()
    rounds = interleave(contestants, rounds=size.rounds + 1)
    values = {name: {"wall_s_tile": _wall(own), "core_s_tile": per_tile(own)} for name, own in rounds.items()}
    rows = [
        [
            *name.split(),
            each["wall_s_tile"].text(1e3),
            each["core_s_tile"].text(1e3),
            f"{values[f'{name.split()[0]} 1']['wall_s_tile'].median / each['wall_s_tile'].median:.2f}",
        ]
        for name, each in values.items()
    ]
    columns = ["precision", "threads", "wall-ms per tile", "core-ms per tile", "speed-up"]
    return values, ResultTable(f"Threads of one process, block of {size.worker_tiles} tiles", columns, rows)


def _wall(rounds: Sequence[Spent]) -> Any:
    return spread([each.wall_s / each.tiles for each in rounds])


def _workers(card: str, classifier: Classifier, size: Size, *, most: int) -> tuple[dict[str, Any], ResultTable]:
    """Measure one and two processes of one thread."""
    context = context_px(classifier)
    values, rows = {}, []
    for precision in _precisions():
        for workers in (1, 2) if most > 1 else (1,):
            say(f"{workers} processes, {precision}")
            spawn = get_context("spawn")
            with spawn.Manager() as manager, ProcessPoolExecutor(workers, mp_context=spawn) as pool:
                job = (card, precision, context, size.worker_tiles, manager.Barrier(workers), size.worker_s)
                rates = [future.result() for future in [pool.submit(_rate, job) for _ in range(workers)]]
            values[f"{precision} {workers}"] = {"tiles_s": rates}
            alone = values[f"{precision} 1"]["tiles_s"][0]
            rows.append([precision, str(workers), f"{sum(rates):.1f}", f"{sum(rates) / alone:.2f}"])
    columns = ["precision", "processes", "tiles per second", "against one"]
    return values, ResultTable(f"Worker processes of one thread, block of {size.worker_tiles} tiles", columns, rows)


def _rate(job: tuple[str, str, int, tuple[int, int], Any, float]) -> float:
    """Wait until every process is ready, run a block repeatedly for some seconds, and return tiles per second."""
    card, precision, context, tiles, ready, seconds = job
    how = networks.choice("dense", "openvino", precision, context_px=context)
    pixels = block_pixels(*tiles, context)
    made = scorer.make_scorer(load(networks.spec(card)), how, threads=1)
    assert isinstance(made, scoring.DenseScorer)
    networks.run_region(made, pixels)
    ready.wait()
    begin, done = time.perf_counter(), 0
    while time.perf_counter() < begin + seconds:
        networks.run_region(made, pixels)
        done += 1
    return done * tiles[0] * tiles[1] / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
