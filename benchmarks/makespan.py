"""Compare the forecast of `wsiflow plan` with the time of `wsiflow run`, for 1, 2 and 4 workers and one calibration.

Slides of several sizes are planned with ``--calibrate`` once. Each number of workers then has its own folder, which is
planned before it is run, so that the run consists of the line only. The makespan is taken from the trace: from the
start of the first task to the end of the last one. The forecast excludes the start of the workers, since they are
running by the time of the first task.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import networks, product
from benchmarks.measuring import ResultTable, arguments, finish, machine, say, significant

_TOLERANCE = 0.1


class Size(NamedTuple):
    """How much is run: sides of the slides in px, numbers of workers, number of rounds."""

    sides_px: tuple[int, ...]
    workers: tuple[int, ...]
    rounds: int


_QUICK = Size((2048, 2048, 1536), (1, 2), 1)
_FULL = Size((4096, 4096, 3072, 3072, 2048, 2048), (1, 2, 4), 3)


def main(argv: Sequence[str] | None = None) -> None:
    """Forecast and measure the makespan for each number of workers, and write ``makespan.json``."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, help="how often each number of workers runs")
    given = parser.parse_args(argv)
    size, about = _QUICK if given.quick else _FULL, machine()
    size = size._replace(rounds=given.rounds or size.rounds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["WSIFLOW_CACHE"] = str(folder / "cache")
        slides = [
            product.write_slide(folder / f"s{i}.tif", side, seed=i, workers=about["cores"])
            for i, side in enumerate(size.sides_px)
        ]
        manifest = product.write_manifest(folder, slides)
        card = "pkg:demo.json" if given.quick else str(networks.random_card("googlenet", folder))
        settings = [*_settings(card, manifest), *(["inference.stride=112"] if given.quick else [])]
        forecasts, costs = _forecast(folder, settings, size.workers)
        rounds = [
            {n: _run(folder / f"run-{turn}-{n}", settings, n) for n in size.workers} for turn in range(size.rounds)
        ]
    by_workers = {n: _compared(forecasts[n], [each[n] for each in rounds]) for n in size.workers}
    finish(given, "makespan", about, {"costs": costs, "workers": by_workers}, [_table(by_workers)])


def _settings(card: str, manifest: Path) -> list[str]:
    """Return the overrides of every run; the tolerance is off because scores of random weights would exceed it."""
    return [
        "model=card",
        f"model.card={card}",
        "dataset=manifest",
        f"dataset.manifest={manifest}",
        "inference.precision=fp32",
        "inference.backend=openvino",
        "tiles.group_tiles=60",
        "dense.windows=50",
        "dense.tolerance=1",
        "executor=process",
        "orchestrator=none",
        "tracking=off",
        "evaluation.bootstrap=0",
    ]


def _forecast(
    folder: Path, settings: Sequence[str], workers: Sequence[int]
) -> tuple[dict[int, dict[str, float]], dict[str, Any]]:
    """Return the forecast makespan and core-seconds for each number of workers, and the costs that were measured."""
    out, report = folder / "calibrated", folder / "report.json"
    numbers = ",".join(map(str, workers))
    _command("plan", *settings, f"out={out}", "--calibrate", "--workers", numbers, "--json", str(report))
    planned = json.loads(report.read_text(encoding="utf-8"))
    costs = json.loads((out / "costs.json").read_text(encoding="utf-8"))
    forecasts = {}
    for n, each in zip(workers, planned["forecasts"], strict=True):
        core_s = each["work_s"] + each["overhead_s"] - n * costs["start_s"]
        forecasts[n] = {"makespan_s": each["makespan_s"] - costs["start_s"], "core_s": core_s}
    return forecasts, costs


def _run(out: Path, settings: Sequence[str], workers: int) -> dict[str, float]:
    """Plan and run, and return the makespan, the core-seconds, and the load average before the run."""
    more = [f"out={out}", f"executor.workers={workers}"]
    _command("plan", *settings, *more)
    load = os.getloadavg()[0]
    _command("run", *settings, *more)
    with (out / "trace.csv").open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["stage"] not in {"choose", "ingest"}]
    starts, ends = ([datetime.fromisoformat(row[name]).timestamp() for row in rows] for name in ("start", "end"))
    measured = {"makespan_s": max(ends) - min(starts), "load": load, "core_s": sum(map(_cpu_s, rows))}
    say(f"{workers} workers: {measured}")
    return measured


def _cpu_s(row: dict[str, str]) -> float:
    return float(row["cpu_user_s"]) + float(row["cpu_sys_s"])


def _command(*words: str) -> None:
    """Run a wsiflow command, and print its errors only if it fails."""
    ended = subprocess.run([sys.executable, "-m", "wsiflow.flows", *words], check=False, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"wsiflow {words[0]} ended with {ended.returncode}: {ended.stderr.strip()}")


def _compared(forecast: dict[str, float], rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return the forecast, the medians of the measured rounds, and the ratio of the makespans."""
    measured = {name: statistics.median(each[name] for each in rounds) for name in forecast}
    ratio = forecast["makespan_s"] / measured["makespan_s"]
    return {"foretold": forecast, "measured": measured, "ratio": ratio, "rounds": list(rounds)}


def _table(by_workers: dict[int, dict[str, Any]]) -> ResultTable:
    rows = []
    for workers, each in by_workers.items():
        spans = [one["makespan_s"] for one in each["rounds"]]
        holds = abs(each["ratio"] - 1) <= _TOLERANCE
        rows.append(
            [
                str(workers),
                f"{each['foretold']['makespan_s']:.1f}",
                f"{each['measured']['makespan_s']:.1f} [{min(spans):.1f} to {max(spans):.1f}]",
                f"{each['ratio'] - 1:+.1%}",
                "pass" if holds else "**fail**",
                f"{each['foretold']['core_s']:.0f}",
                f"{each['measured']['core_s']:.0f}",
                " ".join(significant(one["load"], 2) for one in each["rounds"]),
            ]
        )
    columns = ["workers", "foretold, s", "measured, s", "difference", f"within {_TOLERANCE:.0%}"]
    columns += ["core-seconds foretold", "measured", "load average before"]
    return ResultTable("Makespan, foretold from one calibration and measured", columns, rows)


if __name__ == "__main__":
    main()
