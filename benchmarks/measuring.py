"""What every benchmark does alike: take turns, count seconds, say what it ran on, write JSON, print tables.

Input: contestants, functions that do some work and return how many tiles it was. Output: for each contestant what each
round cost. In a round every contestant runs once, so that a disturbance of the machine meets all of them, and ratios
are taken within a round.
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
"""Does its work once and returns how many tiles it was."""

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
    """What one round of a contestant cost: wall and CPU seconds of this process, and tiles done."""

    wall_s: float
    cpu_s: float
    tiles: float

    @property
    def core_s_tile(self) -> float:
        """CPU seconds per tile."""
        return self.cpu_s / self.tiles


class Spread(NamedTuple):
    """Median, least and largest of some rounds."""

    median: float
    low: float
    high: float

    def text(self, scale: float = 1.0, digits: int = 3) -> str:
        """Return it for a table, to so many significant digits."""
        median, low, high = (f"{significant(scale * value, digits)}" for value in self)
        return median if low == high else f"{median} [{low} to {high}]"


class Table(NamedTuple):
    """A table to print: cells are text."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join([f"**{self.title}**", "", *("| " + " | ".join(line) + " |" for line in lines)])


def interleave(contestants: Mapping[str, Contestant], *, rounds: int, unit: str = "tile") -> dict[str, list[Spent]]:
    """Run the contestants in turns.

    Args:
        contestants: What to run, by name; each must have run once before, so that nothing is made on first use.
        rounds: How often each runs.
        unit: What the contestants count, if it is not tiles.

    Returns:
        What each round cost, by name.
    """
    found: dict[str, list[Spent]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name, contestant in contestants.items():
            found[name].append(spent(contestant))
            say(f"round {turn + 1} of {rounds}: {name}: {significant(1e3 * found[name][-1].core_s_tile)} ms per {unit}")
    return found


def spent(contestant: Contestant) -> Spent:
    """Run once and return what it cost."""
    wall, cpu = time.perf_counter(), time.process_time()
    tiles = contestant()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu, tiles)


def spread(values: Sequence[float]) -> Spread:
    """Return median and range."""
    return Spread(statistics.median(values), min(values), max(values))


def per_tile(rounds: Sequence[Spent]) -> Spread:
    """Return core-seconds per tile."""
    return spread([each.core_s_tile for each in rounds])


def ratio(slow: Sequence[Spent], fast: Sequence[Spent]) -> Spread:
    """Return how many times cheaper a tile is, in core-seconds, round by round."""
    return spread([one.core_s_tile / other.core_s_tile for one, other in zip(slow, fast, strict=True)])


def significant(value: float, digits: int = 3) -> str:
    """Return a number with so many significant digits, without an exponent where it is a common size."""
    if value == 0 or not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits}g}"
    short = float(f"{value:.{digits}g}")
    return f"{short:,.0f}" if abs(short) >= 10 ** (digits - 1) else f"{value:#.{digits}g}".rstrip(".")


def machine() -> dict[str, Any]:
    """Return what the benchmark runs on, and how busy that is."""
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
    """Return a parser of the options all benchmarks have."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON files")
    parser.add_argument("--quick", action="store_true", help="a small size: shows that it works, measures nothing")
    return parser


def finish(given: argparse.Namespace, name: str, about: dict[str, Any], values: Any, tables: Sequence[Table]) -> None:
    """Write ``<name>.json`` and print the tables.

    Args:
        given: The options.
        name: Name of the benchmark.
        about: What `machine` returned when it began.
        values: Everything measured.
        tables: What to show of it.
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
    """Tell how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
