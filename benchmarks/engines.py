"""Measure every engine against the window loop of the reference system, on the same pixels; the network only.

A tile is 224 px a side and has 196 windows at stride 16. Window loops run half the windows of one tile, dense engines
run one block of 1,792 px without halo. The core-seconds are divided by the windows scored and multiplied by 196. The
table gives the ratio to the reference's loop, and to the best window loop at the same precision.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks import networks
from benchmarks.measuring import (
    Contestant,
    ResultTable,
    Spent,
    Spread,
    arguments,
    finish,
    interleave,
    machine,
    per_tile,
    ratio,
    say,
)
from wsiflow.model import scoring
from wsiflow.model.classifier import Classifier
from wsiflow.model.engines.engine import installed_backends
from wsiflow.model.engines.spec import PRECISIONS
from wsiflow.system.machine import cpu_supports_bf16

Run = Callable[[], NDArray[np.float32]]
"""A function that scores the tile or the block once."""

REFERENCE = "reference loop, torch fp32"
_QUICK_PX = 896
_FULL_PX = 1792


class Size(NamedTuple):
    """How much is measured.

    Attributes:
        region_px: Side of the block of the dense engines, px.
        windows: Number of windows of the tile that the window loops run.
        rounds: Number of rounds.
    """

    region_px: int
    windows: int
    rounds: int


def ways(*, quick: bool, only: Sequence[str] = ("window", "dense")) -> list[tuple[str, str, str]]:
    """Return every combination of engine, backend and precision that this machine can run."""
    combinations = [
        (engine, backend, precision)
        for engine in only
        for backend in installed_backends()
        for precision in PRECISIONS[backend]
        if (precision != "bf16" or cpu_supports_bf16()) and (backend, precision) != ("torch", "bf16")
    ]
    return [way for way in combinations if way[1] == "openvino" and way[2] != "int8"] if quick else combinations


def prepare(classifier: Classifier, chosen: Sequence[tuple[str, str, str]], size: Size) -> dict[str, Run]:
    """Return the reference's loop and every way by name, each prepared to score the same pixels."""
    pixels = networks.tissue(size.region_px)
    cut = networks.windows(pixels, size.windows)
    reference = networks.Reference(classifier)
    runs: dict[str, Run] = {REFERENCE: lambda: reference.run(cut)}
    for engine, backend, precision in chosen:
        say(f"preparing {engine} {backend} {precision}")
        made = networks.prepared(classifier, networks.choice(engine, backend, precision), pixels)
        runs[f"{engine}, {backend} {precision}"] = _run(made, cut, pixels)
    return runs


def as_contestants(runs: Mapping[str, Run]) -> dict[str, Contestant]:
    """Return contestants that run each function once and return the number of tiles scored."""

    def counted(run: Run) -> Contestant:
        return lambda: run().size / networks.WINDOWS_PER_TILE

    return {name: counted(run) for name, run in runs.items()}


def differences(runs: Mapping[str, Run]) -> dict[str, float]:
    """Run each way once, and return its largest difference of probability from the same engine in fp32."""
    scores = {name: run() for name, run in runs.items()}
    plain = {"window": REFERENCE, "dense": next(name for name in runs if name.startswith("dense"))}
    return {
        name: float(np.abs(own - scores[plain["dense" if name.startswith("dense") else "window"]]).max())
        for name, own in scores.items()
    }


def _run(
    made: scoring.WindowScorer | scoring.DenseScorer, cut: Sequence[NDArray[np.uint8]], pixels: NDArray[np.uint8]
) -> Run:
    if isinstance(made, scoring.WindowScorer):
        return lambda: networks.run_windows(made, cut)
    return lambda: networks.run_region(made, pixels)


def best_loop(rounds: dict[str, list[Spent]], precision: str) -> str:
    """Return the name of the window loop with the fewest core-seconds at a precision."""
    loops = [name for name in rounds if name.startswith("window") and name.endswith(precision)]
    return min(loops, key=lambda name: per_tile(rounds[name]).median)


def compared(rounds: dict[str, list[Spent]]) -> dict[str, dict[str, Spread | None]]:
    """Return core-seconds per tile, and the ratios to both window loops, of each contestant."""
    results: dict[str, dict[str, Spread | None]] = {}
    for name, each in rounds.items():
        results[name] = {"core_s_tile": per_tile(each), "against_reference": ratio(rounds[REFERENCE], each)}
        if name.startswith("dense"):
            loop = best_loop(rounds, name.split()[-1])
            results[name]["against_window"] = ratio(rounds[loop], each)
    return results


def table(title: str, results: dict[str, dict[str, Spread | None]], apart: dict[str, float]) -> ResultTable:
    """Return the comparison as a table."""
    columns = [
        "network only",
        "core-ms per tile",
        "against the reference loop",
        "against the best window loop at this precision",
        "largest difference of probability to fp32",
    ]
    rows = []
    for name, each in results.items():
        against = each.get("against_window")
        rows.append(
            [
                name,
                each["core_s_tile"].text(1e3) if each["core_s_tile"] else "",
                each["against_reference"].text() if each["against_reference"] else "",
                against.text() if against else "",
                f"{apart[name]:.1g}",
            ]
        )
    return ResultTable(title, columns, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the core-seconds per tile of every engine, and write ``engines.json``."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--demo", action="store_true", help="the demo network alone, instead of GoogLeNet")
    given = parser.parse_args(argv)
    about = machine()
    values, tables = {}, []
    for name, classifier, chosen, size in _matches(given):
        say(f"{name}: {size}")
        runs = prepare(classifier, chosen, size)
        say("running everything once")
        apart = differences(runs)
        rounds = interleave(as_contestants(runs), rounds=size.rounds)
        results = compared(rounds)
        values[name] = {
            key: {"rounds": rounds[key], "apart": apart[key], **each, "window_loop": best_loop(rounds, key.split()[-1])}
            for key, each in results.items()
        }
        tables.append(table(f"{name}, stride {networks.STRIDE_PX}, {size.rounds} rounds", results, apart))
    finish(given, "engines", about, values, tables)


def _matches(given: argparse.Namespace) -> list[tuple[str, Classifier, list[tuple[str, str, str]], Size]]:
    """Return the comparisons to measure: name, network, ways and size of each."""
    size = Size(_QUICK_PX, 2 * networks.BATCH, 2) if given.quick else Size(_FULL_PX, networks.WINDOWS_PER_TILE // 2, 3)
    chosen = ways(quick=given.quick)
    if given.demo:
        return [("demo", networks.demo(), chosen, size)]
    padding_free = [way for way in chosen if way[1] == "openvino" and way[2] != "int8"]
    return [
        ("googlenet", networks.random_classifier("googlenet"), chosen, size),
        ("inception_valid", networks.random_classifier("inception_valid"), padding_free, size),
    ]


if __name__ == "__main__":
    main()
