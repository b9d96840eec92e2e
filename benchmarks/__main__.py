"""Run every benchmark, each in a process of its own, and write the tables into ``docs/performance.md``.

python -m benchmarks --data /data --googlenet card.json --slide slide.svs
"""

import subprocess
import sys
import time
from pathlib import Path

from benchmarks import report, targets
from benchmarks.measuring import arguments, say


def main() -> None:
    """Run all benchmarks, print the targets and write the documents."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, help="folder with camelyon16/: outlines, overviews and tables")
    parser.add_argument("--googlenet", type=Path, help="card of a trained GoogLeNet")
    parser.add_argument("--slide", type=Path, help="a real slide")
    parser.add_argument("--before", type=Path, help="the interpreter of another installation, for its starts")
    parser.add_argument("--document", type=Path, default=report.ROOT / "docs/performance.md")
    parser.add_argument("--scaling", type=Path, default=report.ROOT / "docs/scaling.md")
    parser.add_argument("--tissue", type=Path, default=report.ROOT / "docs/tissue.md")
    given = parser.parse_args()
    own = {
        "engines": [],
        "floors": [],
        "line": [],
        "scaling": [],
        "memory": [],
        "agreement": _named(given, "googlenet", "slide"),
        "cascade": _named(given, "googlenet"),
        "cascade_loss": [],
        "scale": [],
        "makespan": [],
        "starts": _named(given, "before"),
        "intervals": [],
        **(
            {name: _named(given, "data") for name in ("extents", "core_hours", "tissue", "experiments")}
            if given.data
            else {}
        ),
    }
    quick = ["--quick"] if given.quick else []
    failed: list[str] = []
    for name, more in own.items():
        begin = time.perf_counter()
        say(f"{name} begins")
        command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(given.out), *quick, *more]
        ended = subprocess.run(command, check=False).returncode
        failed += [name] * (ended != 0)
        say(f"{name} {'failed' if ended else 'ended'} after {time.perf_counter() - begin:.0f} s")
    for table in targets.tables(targets.read(given.out)):
        print(f"\n{table.markdown()}")
    for document in (given.document, given.scaling, given.tissue):
        report.main(["--results", str(given.out), "--document", str(document)])
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the tables of these are old or missing")


def _named(given: object, *options: str) -> list[str]:
    """Return those of the options that were given, as words of a command line."""
    return [word for name in options if getattr(given, name) for word in (f"--{name}", str(getattr(given, name)))]


if __name__ == "__main__":
    main()
