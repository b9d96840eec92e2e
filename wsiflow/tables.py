"""Tables of rows as text: CSV for programs, Markdown for readers. What is not defined is empty, or a dash."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with the same keys as CSV with a header; None and NaN are empty cells."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
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
