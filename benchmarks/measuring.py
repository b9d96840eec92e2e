"""Shared steps of the benchmarks: run contestants in turns, measure seconds, describe the machine, write results.

Input: contestants, that is, functions that do some work and return its number of tiles. Output: the cost of each round
of each contestant. In a round every contestant runs once, so that a disturbance of the machine affects all of them, and
ratios are computed within a round.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from wsiflow.system.machine import allocated_cores, cpu_flags, cpu_model

Contestant = Callable[[], float]
"""A function that does its work once and returns the number of tiles."""

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
_PACKAGES = (
    "wsiflow",
    "torch",
    "openvino",
    "onnxruntime",
    "nncf",
    "numpy",
    "scikit-learn",
    "imagecodecs",
    "openslide-bin",
    "h5py",
)


class Spent(NamedTuple):
    """The cost of one round of a contestant: wall and CPU seconds of this process, and the number of tiles."""

    wall_s: float
    cpu_s: float
    tiles: float

    @property
    def core_s_tile(self) -> float:
        """CPU seconds per tile."""
        return self.cpu_s / self.tiles


class Spread(NamedTuple):
    """Median, minimum and maximum over rounds."""

    median: float
    low: float
    high: float

    def text(self, scale: float = 1.0, digits: int = 3) -> str:
        """Return median and range, multiplied by ``scale``, as text with ``digits`` significant digits."""
        median, low, high = (f"{significant(scale * value, digits)}" for value in self)
        return median if low == high else f"{median} [{low} to {high}]"


class ResultTable(NamedTuple):
    """A table of results; cells are text."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join([f"**{self.title}**", "", *("| " + " | ".join(line) + " |" for line in lines)])


def interleave(contestants: Mapping[str, Contestant], *, rounds: int, unit: str = "tile") -> dict[str, list[Spent]]:
    """Run the contestants in turns.

    Args:
        contestants: Functions by name; each must have run once before, so that first-use costs are not measured.
        rounds: Number of rounds.
        unit: Name of the unit that the contestants count, for messages.

    Returns:
        The cost of each round by name.
    """
    costs: dict[str, list[Spent]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name, contestant in contestants.items():
            costs[name].append(spent(contestant))
            say(f"round {turn + 1} of {rounds}: {name}: {significant(1e3 * costs[name][-1].core_s_tile)} ms per {unit}")
    return costs


def spent(contestant: Contestant) -> Spent:
    """Run a contestant once and return the cost."""
    wall, cpu = time.perf_counter(), time.process_time()
    tiles = contestant()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu, tiles)


def spread(values: Sequence[float]) -> Spread:
    """Return median and range of values."""
    return Spread(statistics.median(values), min(values), max(values))


def per_tile(rounds: Sequence[Spent]) -> Spread:
    """Return median and range of the core-seconds per tile."""
    return spread([each.core_s_tile for each in rounds])


def ratio(slow: Sequence[Spent], fast: Sequence[Spent]) -> Spread:
    """Return median and range of the ratio of core-seconds per tile, slow over fast, round by round."""
    return spread([one.core_s_tile / other.core_s_tile for one, other in zip(slow, fast, strict=True)])


def significant(value: float, digits: int = 3) -> str:
    """Return a number with ``digits`` significant digits, without exponent from 1e-4 to 1e7."""
    if value == 0 or not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits}g}"
    short = float(f"{value:.{digits}g}")
    return f"{short:,.0f}" if abs(short) >= 10 ** (digits - 1) else f"{value:#.{digits}g}".rstrip(".")


def machine() -> dict[str, Any]:
    """Return a description of the machine: CPU, memory, versions, and the load average."""
    return {
        "cpu": cpu_model(),
        "machine": platform.machine(),
        "flags": [flag for flag in _FLAGS if flag in cpu_flags()],
        "cores": allocated_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "load_average": list(os.getloadavg()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def arguments(about: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all benchmarks; ``about`` is its description."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON files")
    parser.add_argument("--quick", action="store_true", help="a small size: shows that it works, measures nothing")
    return parser


def finish(
    given: argparse.Namespace, name: str, about: dict[str, Any], values: Any, tables: Sequence[ResultTable]
) -> None:
    """Write ``<name>.json`` and print the tables.

    Args:
        given: The options of the benchmark.
        name: Name of the benchmark.
        about: Description of the machine at the start, from `machine`.
        values: All measured values.
        tables: Tables to print and to store.
    """
    settings = {key: value.name if isinstance(value, Path) else value for key, value in vars(given).items()}
    settings.pop("out")
    result = {
        "benchmark": name,
        "settings": settings,
        "machine": about,
        "values": values,
        "tables": [table._asdict() for table in tables],
    }
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for table in tables:
        print(f"\n{table.markdown()}")
    print(f"\nwritten to {path}", flush=True)


def say(text: str) -> None:
    """Print a message of progress with the time of day to standard error."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
