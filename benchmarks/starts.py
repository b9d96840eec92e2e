"""Measure what commands cost besides their work: CPU seconds from the start of a process to its end.

With ``--before PYTHON`` the commands of another installation run in turns with these, so that both sides meet the same
machine: PYTHON is the interpreter of its virtual environment.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import product
from benchmarks.measuring import ResultTable, Spread, arguments, finish, machine, say, spread

_NOW, _BEFORE = "now", "before"


def main(argv: Sequence[str] | None = None) -> None:
    """Run every command in turns, and write ``starts.json``."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--before", type=Path, help="the interpreter of another installation to compare with")
    given = parser.parse_args(argv)
    sides = {_NOW: Path(sys.executable)} | ({_BEFORE: given.before} if given.before else {})
    rounds, about = 2 if given.quick else 5, machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slides = [product.write_slide(folder / f"s{i}.tif", 1024, seed=i) for i in range(1 if given.quick else 6)]
        manifest = product.write_manifest(folder, slides)
        measured = {side: _measured(folder / side, python, manifest) for side, python in sides.items()}
        turns: dict[str, dict[str, list[float]]] = {what: {side: [] for side in sides} for what in measured[_NOW]}
        for turn in range(rounds):
            for what, by_side in turns.items():
                say(f"round {turn + 1} of {rounds}: {what}")
                for side, found in by_side.items():
                    found.append(_started(measured[side][what], folder / side))
    values = {what: {side: spread(found) for side, found in by_side.items()} for what, by_side in turns.items()}
    finish(given, "starts", about, values, [_table(values, rounds)])


def _measured(folder: Path, python: Path, manifest: Path) -> dict[str, list[str]]:
    """Return the commands of an installation by what they are; the run that is started again is finished here."""
    folder.mkdir()
    wsiflow = [str(python), "-m", "wsiflow.flows"]
    slides = ["dataset=manifest", f"dataset.manifest={manifest}", "executor=inline", *product.QUIET]
    run = [*wsiflow, "run", *slides, "inference.stride=112", "out=finished"]
    _started(run, folder)
    return {
        "wsiflow --help": [*wsiflow, "--help"],
        "wsiflow run --help": [*wsiflow, "run", "--help"],
        "a typo: wsiflow run inference.strid=8": [*wsiflow, "run", "inference.strid=8"],
        "a finished run started again": run,
        "a plan of small slides that was made before": [*wsiflow, "plan", *run[4:]],
    }


def _started(command: Sequence[str], folder: Path) -> float:
    """Run a command in a folder and return its CPU seconds; a typo ends with an exit code of its own."""
    environment = {**os.environ, "WSIFLOW_CACHE": str(folder / "cache")}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as child:
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode not in {0, 20}:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}")
    return usage.ru_utime + usage.ru_stime


def _table(values: Mapping[str, Mapping[str, Spread]], rounds: int) -> ResultTable:
    """Return the table of commands; without another installation its column is empty."""
    rows = [
        [what, *(by_side[side].text(digits=2) if side in by_side else "" for side in (_BEFORE, _NOW))]
        for what, by_side in values.items()
    ]
    return ResultTable(f"CPU seconds of a start, {rounds} rounds", ["what", _BEFORE, _NOW], rows)


if __name__ == "__main__":
    main()
