"""Tables as text: CSV for programs, Markdown for readers. What is not defined is an empty cell, or a dash."""

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wsiflow.errors import InputError
from wsiflow.system import faults


class Line(NamedTuple):
    """A line of a CSV file: its number, from 1, and its cells as they are written."""

    number: int
    cells: list[str]


class Table(NamedTuple):
    """A CSV file with a header.

    Attributes:
        header: The names of the columns, in lower case.
        lines: The other lines, each with a cell for every column.
    """

    header: list[str]
    lines: list[Line]

    def rows(self) -> Iterator[dict[str, str]]:
        """Yield every line as cells by column."""
        return (dict(zip(self.header, line.cells, strict=True)) for line in self.lines)


def read_lines(path: Path, what: str, advice: str) -> list[Line]:
    """Read the lines of a CSV file that are not blank.

    Args:
        path: UTF-8 text with commas; a byte order mark and CRLF line ends are accepted.
        what: What the file is, for messages, for example ``the manifest``.
        advice: What to do where there is no such file.

    Raises:
        InputError: There is no such file, or it is not CSV; the line is named.
        EnvironmentFault: The system does not let us read it.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            return [Line(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except OSError as error:
        raise faults.unreadable(error, what, advice, path=path) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 text", "save it as 'CSV UTF-8'", path=path) from error
    except csv.Error as error:
        cause = f"line {reader.line_num}: not CSV ({error})"
        raise InputError(cause, "correct the quotes of that line", path=path) from error


def read(path: Path, what: str, advice: str, columns: Iterable[str] = ()) -> Table:
    """Read a CSV file with a header; cells are stripped.

    Args:
        path: See `read_lines`.
        what: Likewise.
        advice: What to do where there is no such file, or columns are missing.
        columns: Those that it must have.

    Raises:
        InputError: See `read_lines`; the file is empty, lacks columns, or a line has not a cell for each of them.
        EnvironmentFault: The system does not let us read it.
    """
    lines = [Line(line.number, [cell.strip() for cell in line.cells]) for line in read_lines(path, what, advice)]
    if not lines:
        raise InputError(f"{what} is empty", "give a header and a line for each row", path=path)
    header = [name.lower() for name in lines[0].cells]
    missing = [name for name in columns if name not in header]
    if missing:
        raise InputError(f"{what} has no column {', '.join(missing)}", advice, path=path)
    for line in lines[1:]:
        if len(line.cells) != len(header):
            cause = f"line {line.number} has {len(line.cells)} cells, the header has {len(header)}"
            raise InputError(cause, "give every line a cell for each column", path=path)
    return Table(header, lines[1:])


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Return rows as CSV with a header; None, NaN and what a row lacks are empty cells.

    Args:
        rows: Values by column.
        columns: The columns; those of the first row where nothing else is said.
    """
    names = list(rows[0]) if columns is None and rows else list(columns or ())
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows({name: "" if is_undefined(value) else value for name, value in row.items()} for row in rows)
    return text.getvalue()


def markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return rows as a Markdown table: counts in full, other numbers to three digits, None and NaN as a dash."""
    lines = [heads, ["---"] * len(heads), *([_shown(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def is_undefined(value: Any) -> bool:
    """Tell whether there is no value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _shown(value: Any) -> str:
    if is_undefined(value):
        return "-"
    if isinstance(value, str):
        return value.replace("|", "\\|")
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def json_text(values: Mapping[str, Any]) -> str:
    """Return JSON text, null for what is not finite."""
    return json.dumps(_finite(values), indent=1, sort_keys=True, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """Replace what JSON has no number for by None, at any depth."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
