"""Write the tables of the results into a document, between its marks; the text around them is written by hand.

python -m benchmarks.report --results benchmarks/results --document docs/performance.md
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cascade_hours, targets
from benchmarks.measuring import ResultTable

ROOT = Path(__file__).parents[1]
_MARKED = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tables of all results into the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--document", type=Path, default=ROOT / "docs/performance.md")
    given = parser.parse_args(argv)
    text = given.document.read_text(encoding="utf-8")
    given.document.write_text(filled(text, targets.read(given.results)), encoding="utf-8")
    print(f"written to {given.document}")


def filled(text: str, results: Mapping[str, Any]) -> str:
    """Return a document with the tables of every benchmark between its marks, or a remark where it was not measured."""
    parts = {name: _part(result) for name, result in results.items()}
    parts["targets"] = _joined(targets.tables(results)) if results else ""
    parts["cascade_hours"] = _joined(cascade_hours.tables(results))

    def put(mark: re.Match[str]) -> str:
        return f"{mark[1]}{parts.get(mark[2]) or 'Not measured yet.'}\n{mark[3]}"

    return _MARKED.sub(put, text)


def _part(result: Mapping[str, Any]) -> str:
    """Return the tables of one benchmark, and a line on the machine and the versions."""
    about = result["machine"]
    quick = " A quick size: shows that it works, measures nothing." if result["settings"]["quick"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    on = (
        f"{about['started']}, {about['cpu']} ({', '.join(about['flags'])}), {about['cores']} cores, "
        f"{about['memory_gb']:.0f} GB, load average at the start {about['load_average'][0]:.1f}; "
        f"Python {about['python']}, {versions}.{quick}"
    )
    how = "Simulated" if "simulated" in result["tables"][0]["title"] else "Measured"
    return f"{_joined([ResultTable(**table) for table in result['tables']])}\n\n{how} {on}"


def _joined(tables: Sequence[ResultTable]) -> str:
    return "\n\n".join(table.markdown() for table in tables)


if __name__ == "__main__":
    main()
