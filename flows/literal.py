"""Take the values of paths and texts on the command line as they are typed.

Hydra's grammar gives a meaning to commas, brackets, quotes, blanks and equals signs, and knows no letters beyond ASCII.
A path may have any of them. Such a value is quoted here before Hydra reads it, so that it means itself. What already is
a text for Hydra, such as one that is quoted or has an interpolation, stays as it is, unless there is a file of exactly
that name. In a sweep commas separate values, unless there is a file of exactly that name.
"""

import os
import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Sweep
from hydra.errors import HydraException

from wsiflow.run import config

from .overrides import quoted

_QUOTES = ("'", '"')
_INTERPOLATION = re.compile(r"\$\{")


def literal(overrides: Sequence[str], *, sweep: bool = False) -> list[str]:
    """Return overrides in which the values of paths and texts are quoted where Hydra would not take them as typed.

    Args:
        overrides: What was typed; doing this twice changes nothing more.
        sweep: Whether an override may list the values of several trials.
    """
    return [_literal(text, sweep=sweep) for text in overrides]


def _literal(text: str, *, sweep: bool) -> str:
    typed, equals, value = text.partition("=")
    key = typed.lstrip("+")
    if not equals or not value.strip():
        return text
    if key in config.path_keys():
        return f"{typed}={_path(typed, value, sweep=sweep)}"
    if key in config.text_keys() | config.WORD_KEYS and not value.startswith(_QUOTES) and _parsed(typed, value) is None:
        return f"{typed}={quoted(value)}"
    return text


def _path(typed: str, value: str, *, sweep: bool) -> str:
    """Return the value of a path as Hydra must be given it."""
    parsed = _parsed(typed, value)
    if os.path.lexists(value):
        # One that means itself already stays as it is, and with it the names of trials.
        is_itself = isinstance(parsed, _Text) and parsed == value and not _INTERPOLATION.search(value)
        return value if is_itself else quoted(_INTERPOLATION.sub(r"\\${", value))
    if isinstance(parsed, _Text) or (parsed == [None] and typed.lstrip("+") in config.optional_keys()):
        return value
    if sweep and isinstance(parsed, Sweep):
        return _list(typed, value) if isinstance(parsed, ChoiceSweep) and parsed.simple_form else value
    if sweep and parsed is None and "," in value:
        return _list(typed, value)
    return quoted(value)


def _list(typed: str, value: str) -> str:
    """Return the values of several trials, which commas separate."""
    parts = re.findall(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|[^,]+", value)
    return ",".join(_path(typed, part.strip(), sweep=False) for part in parts)


class _Text(str):
    """What Hydra reads as a text."""


def _parsed(typed: str, value: str) -> object:
    """Return what Hydra reads: a `_Text`, a sweep, or a list of any other value; None where it cannot read it."""
    try:
        read = OverridesParser.create().parse_override(f"{typed}={value}")
    except HydraException:
        return None
    if read.is_sweep_override():
        return read._value  # noqa: SLF001 - its public form has lost which values were quoted
    value_read = read.value()
    return _Text(value_read) if isinstance(value_read, str) else [value_read]
