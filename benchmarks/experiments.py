"""Run experiments: declared sweeps with checks of the shape that their results must have.

python -m benchmarks.experiments --data /data [--only X1 X3] [--quick]

Each file of ``benchmarks/experiments/`` is an experiment: settings, axes (every combination of their values is a
point), repeats (seeds, or turns of real processes), and checks. A point gives numbers by name; the table shows their
medians, on which the checks are decided. Results are written to ``results/<id>.json``, tables to ``docs/scaling.md``
and ``docs/tradeoff.md``.
"""

import argparse
import itertools
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks import oracles, processes, published, report, simulated, tradeoffs
from benchmarks.measuring import ResultTable, arguments, finish, machine, say, significant

FOLDER = Path(__file__).parent / "experiments"
TABLE = "camelyon16/tables/patch_counts_dldp.csv"
POINTS: dict[str, Callable[..., dict[str, float]]] = {
    **simulated.POINTS,
    **processes.POINTS,
    **published.POINTS,
    **oracles.POINTS,
    **tradeoffs.POINTS,
}

Row = dict[str, Any]
"""A point: the values of its axes, and the medians of its numbers, by name."""


class Verdict(NamedTuple):
    """The result of a check: its statement, whether it holds, and the numbers that decided it."""

    says: str
    holds: bool
    found: str


def main(argv: Sequence[str] | None = None) -> None:
    """Run the selected experiments and write their results."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, default=os.environ.get("WSIFLOW_TEST_DATA"), help=f"has {TABLE}")
    parser.add_argument("--only", nargs="+", default=[], help="ids, such as X1; all where it is not given")
    parser.add_argument("--document", type=Path, help="page to write the tables into")
    given = parser.parse_args(argv)
    if given.data is None or not (Path(given.data) / TABLE).is_file():
        parser.error(f"--data must name a folder with {TABLE}")
    failed = []
    for path in sorted(FOLDER.glob("*.yaml"), key=lambda path: (len(path.stem), path.stem)):
        if not given.only or path.stem in given.only:
            verdicts = run(path, given)
            failed += [f"{path.stem}: {verdict.says}" for verdict in verdicts if not verdict.holds]
    if given.document:
        report.main(["--results", str(given.out), "--document", str(given.document)])
    for line in failed:
        say(f"does not hold: {line}")


def run(path: Path, given: argparse.Namespace) -> list[Verdict]:
    """Run one experiment, write its results and return the verdicts of its checks."""
    sweep, about = yaml.safe_load(path.read_text(encoding="utf-8")), machine()
    axes: dict[str, list[Any]] = sweep["axes"] | (sweep.get("quick", {}) if given.quick else {})
    settings = sweep.get("settings", {}) | {"table": str(Path(given.data) / TABLE), "data": str(given.data)}
    settings |= {"quick": given.quick}
    point, repeats = POINTS[sweep["point"]], 2 if given.quick else sweep["repeats"]
    rows: list[Row] = []
    for values in itertools.product(*axes.values()):
        place = dict(zip(axes, values, strict=True))
        if not _selected(place, sweep.get("only", [])):
            continue
        turns = [point(settings | place, seed=seed) for seed in range(repeats)]
        rows.append(place | {name: statistics.median(each[name] for each in turns) for name in turns[0]})
        say(f"{path.stem}: {place}")
    verdicts = [verdict for check in sweep["checks"] for verdict in decide(check, rows, list(axes))]
    values = {"rows": rows, "checks": [verdict._asdict() for verdict in verdicts], "repeats": repeats}
    kind = sweep.get("kind", "simulated" if sweep["point"] in simulated.POINTS else "measured")
    title = f"{path.stem} {sweep['title']} ({kind}, median of {repeats})"
    given_one = argparse.Namespace(out=given.out, quick=given.quick)
    tables = [_table(title, [*axes, *sweep["shows"]], rows), _verdicts(path.stem, verdicts)]
    finish(given_one, path.stem, about, values, tables)
    return verdicts


def _selected(place: Row, only: list[dict[str, Any]]) -> bool:
    """Tell whether a combination is run: one that ``only`` lists, or any where the list is empty."""
    return not only or any(_fits(place, where) for where in only)


def _fits(row: Row, where: dict[str, Any]) -> bool:
    """Tell whether a row satisfies the conditions: two numbers in a list are bounds, other lists are choices."""
    return all(_one_fits(row[name], condition) for name, condition in where.items())


def _one_fits(value: Any, condition: Any) -> bool:
    if not isinstance(condition, list):
        return bool(value == condition)
    if len(condition) == 2 and all(isinstance(each, int | float) for each in condition):
        return bool(condition[0] <= value <= condition[1])
    return value in condition


def decide(check: dict[str, Any], rows: Sequence[Row], axes: Sequence[str]) -> Iterator[Verdict]:
    """Yield the verdict of a check for every combination of the axes other than its own (``along``).

    Args:
        check: ``rule`` (a name of `RULES`), ``says`` (its statement), ``of`` (the name of the number that is checked),
            further parameters of the rule, and ``where``, which selects rows.
        rows: The points.
        axes: Names of the axes.
    """
    chosen = [row for row in rows if _fits(row, check.get("where", {}))]
    if not chosen:
        yield Verdict(check["says"], holds=False, found="no such point")
        return
    along = check.get("along")
    others = [axis for axis in axes if axis != along and along]
    for key in sorted({_key(row, others) for row in chosen}):
        held = [row for row in chosen if _key(row, others) == key]
        if along and _numeric(held, along):
            held.sort(key=lambda row: row[along])
        holds, found = RULES[check["rule"]](check, held)
        place = ", ".join(part for part in key if part)
        yield Verdict(check["says"] + f" [{place}]" * bool(place), holds, found)


def _numeric(rows: Sequence[Row], name: str) -> bool:
    return all(isinstance(row[name], int | float) for row in rows)


def _key(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{name}={row[name]}" for name in names)


def _series(check: dict[str, Any], rows: Sequence[Row]) -> list[float]:
    return [float(row[check["of"]]) for row in rows]


def _listed(values: Sequence[float]) -> str:
    return " ".join(significant(value) for value in values)


def _at_least(check: dict[str, Any], rows: Sequence[Row]) -> tuple[bool, str]:
    values = _series(check, rows)
    return min(values) >= check["bound"], f"least {significant(min(values))}"


def _at_most(check: dict[str, Any], rows: Sequence[Row]) -> tuple[bool, str]:
    values = _series(check, rows)
    return max(values) <= check["bound"], f"most {significant(max(values))}"


def _falls(check: dict[str, Any], rows: Sequence[Row]) -> tuple[bool, str]:
    """Check that each value is at most the one before, up to a tolerance, and that the last is below the first."""
    values, slack = _series(check, rows), 1 + check.get("tolerance", 0.0)
    steps = all(later <= earlier * slack for earlier, later in itertools.pairwise(values))
    return steps and values[-1] < values[0], _listed(values)


def _rises(check: dict[str, Any], rows: Sequence[Row]) -> tuple[bool, str]:
    holds, _ = _falls(check, list(reversed(rows)))
    return holds, _listed(_series(check, rows))


def _flat(check: dict[str, Any], rows: Sequence[Row]) -> tuple[bool, str]:
    values = _series(check, rows)
    return max(values) <= min(values) * (1 + check["tolerance"]), _listed(values)


def _valley(check: dict[str, Any], rows: Sequence[Row]) -> tuple[bool, str]:
    """Check that the minimum is not at an end, and that both ends exceed it by a margin."""
    values = _series(check, rows)
    least = min(range(len(values)), key=values.__getitem__)
    inside = 0 < least < len(values) - 1
    return inside and min(values[0], values[-1]) >= values[least] * (1 + check["margin"]), _listed(values)


def _near(check: dict[str, Any], rows: Sequence[Row]) -> tuple[bool, str]:
    """Check that each value equals that of another number (``to``) within a relative tolerance."""
    ratios = [float(row[check["of"]]) / float(row[check["to"]]) for row in rows]
    return all(abs(ratio - 1) <= check["tolerance"] for ratio in ratios), "ratio " + _listed(ratios)


def _below(check: dict[str, Any], rows: Sequence[Row]) -> tuple[bool, str]:
    """Check that the value at ``less`` on the axis is at most ``factor`` times the value at ``more``."""
    by = {row[check["along"]]: float(row[check["of"]]) for row in rows}
    less, more = by.get(check["less"]), by.get(check["more"])
    if less is None or more is None:
        return False, "no such point"
    return less <= check.get("factor", 1.0) * more, f"{significant(less)} against {significant(more)}"


RULES = {
    "at_least": _at_least,
    "at_most": _at_most,
    "falls": _falls,
    "rises": _rises,
    "flat": _flat,
    "valley": _valley,
    "near": _near,
    "below": _below,
}


def _table(title: str, columns: Sequence[str], rows: Sequence[Row]) -> ResultTable:
    return ResultTable(title, list(columns), [[_cell(row[name]) for name in columns] for row in rows])


def _cell(value: Any) -> str:
    return significant(float(value)) if isinstance(value, int | float) else str(value)


def _verdicts(name: str, verdicts: Sequence[Verdict]) -> ResultTable:
    cells = [[verdict.says, "pass" if verdict.holds else "**fail**", verdict.found] for verdict in verdicts]
    return ResultTable(f"{name}: shape", ["rule", "", "found"], cells)


if __name__ == "__main__":
    main()
