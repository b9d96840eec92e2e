"""Tables as text: CSV for programs and Markdown for readers. Undefined values are empty cells, or dashes."""

import codecs
import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wsiflow.errors import InputError
from wsiflow.system import faults

_WORKBOOKS = frozenset({b"PK\x03\x04", b"\xd0\xcf\x11\xe0"})  # how .xlsx and .ods, and .xls, begin


class Line(NamedTuple):
    """A line of a CSV file: its number, counted from 1, and its cells as they are written."""

    number: int
    cells: list[str]


class Table(NamedTuple):
    """A CSV file with a header.

    Attributes:
        header: The names of the columns, in lower case.
        lines: The lines below the header, each with one cell for every column.
    """

    header: list[str]
    lines: list[Line]

    def rows(self) -> Iterator[dict[str, str]]:
        """Yield each line as a mapping from column names to cells."""
        return (dict(zip(self.header, line.cells, strict=True)) for line in self.lines)


def read_lines(path: Path, what: str, advice: str, separators: str = ",") -> list[Line]:
    """Read all lines of a CSV file that are not blank.

    Args:
        path: UTF-8 text separated by commas, or UTF-16 with a byte order mark, as spreadsheets write it; a byte order
            mark and CRLF line ends are accepted.
        separators: What may separate the cells. The header decides: it has most of that character outside of quotes.
            A line such as ``sep=;`` above it, which spreadsheets write and read, decides before it.
        what: What the file is called in messages, for example ``the manifest``.
        advice: The remedy in the message where the file does not exist.

    Raises:
        InputError: The file does not exist or is not CSV; the message names the line.
        EnvironmentFault: The system refuses to read the file.
    """
    try:
        with path.open(encoding=_encoding(path), newline="") as stream:
            separator = _separator(stream.readline(), separators)
            stream.seek(0)
            reader = csv.reader(stream, strict=True, delimiter=separator)
            lines = [Line(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
            return (
                lines[1:]
                if len(separators) > 1 and lines and _names_separator(separator.join(lines[0].cells))
                else lines
            )
    except OSError as error:
        raise faults.unreadable(error, what, advice, path=path) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 text", "save it as 'CSV UTF-8'", path=path) from error
    except csv.Error as error:
        cause = f"line {reader.line_num} is not CSV ({error})"
        raise InputError(cause, "correct the quotes of that line", path=path) from error


def _encoding(path: Path) -> str:
    """Return the encoding of a text.

    Raises:
        InputError: The file is a workbook of a spreadsheet program.
    """
    with path.open("rb") as stream:
        start = stream.read(4)
    if start in _WORKBOOKS:
        raise InputError("it is a workbook of a spreadsheet program, not CSV", "save it as 'CSV UTF-8'", path=path)
    return "utf-16" if start[:2] in {codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE} else "utf-8-sig"


def _names_separator(line: str) -> re.Match[str] | None:
    return re.fullmatch(r"sep=(.)\s*", line.removeprefix("\ufeff"), re.IGNORECASE | re.DOTALL)


def _separator(line: str, separators: str) -> str:
    """Return the separator of a file by its first line."""
    named = _names_separator(line)
    if named and named[1] in separators:
        return named[1]
    bare = re.sub(r'"[^"]*"', "", line)
    return max(separators, key=bare.count)  # the first of those that are equally frequent


def read(path: Path, what: str, advice: str, columns: Iterable[str] = ()) -> Table:
    """Read a CSV file with a header, and strip the blanks around its cells.

    Args:
        path: See `read_lines`.
        what: See `read_lines`.
        advice: The remedy in the message where the file does not exist or a column is missing.
        columns: Names of the columns that the file must have.

    Raises:
        InputError: The file does not exist, is not CSV, is empty or has no header with these columns, or the number of
            cells of a line is not that of the header.
        EnvironmentFault: The system refuses to read the file.
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
            cause = f"line {line.number} has {len(line.cells)} cells, but the header has {len(header)}"
            raise InputError(cause, "give every line a cell for each column", path=path)
    return Table(header, lines[1:])


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Return rows as CSV with a header; None, NaN and missing values become empty cells.

    Args:
        rows: Values by column.
        columns: Names of the columns; None for those of the first row.
    """
    names = list(rows[0]) if columns is None and rows else list(columns or ())
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows({name: "" if is_undefined(value) else value for name, value in row.items()} for row in rows)
    return text.getvalue()


def markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return rows as a Markdown table: integers in full, floats to three digits, None and NaN as a dash."""
    lines = [heads, ["---"] * len(heads), *([_shown(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def is_undefined(value: Any) -> bool:
    """Return whether a value is None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _shown(value: Any) -> str:
    if is_undefined(value):
        return "-"
    if isinstance(value, str):
        return value.replace("|", "\\|")
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def json_text(values: Mapping[str, Any]) -> str:
    """Return JSON text in which NaN and infinity are null."""
    return json.dumps(_finite(values), indent=1, sort_keys=True, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """Return a value in which NaN and infinity, which JSON does not have, are None at any depth."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
