"""Show what is logged while a command runs.

Records go to standard error: warnings, with ``-v`` the steps of the run, with ``-vv`` everything, with ``-q`` errors
alone. The notes of a command, such as which engine was chosen or which slides are rejected, are records too, but go to
standard output, without a time or a level, unless ``-q`` is given. So each of them is shown once. The result of a
command is no record: it is printed in any case.

The level reaches trials in other processes through the environment.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from wsiflow.errors import InputError
from wsiflow.redaction import without_secrets
from wsiflow.system.notes import NOTES

from . import terminal

#: The lowest level that is logged where the command line names none: ``DEBUG``, ``INFO``, ``WARNING`` or ``ERROR``.
VARIABLE = "WSIFLOW_LOG_LEVEL"

#: The options of every command, as help texts describe them.
OPTIONS = "Every command takes -q (errors alone, no progress), -v (logs what it does) and -vv (logs everything)."

#: Logger of all records; its name is the same however this package is imported.
PACKAGE = logging.getLogger("wsiflow")

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_QUIET = {"-q", "--quiet"}
_VERBOSE = {"-v": 1, "--verbose": 1, "-vv": 2}
_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def note(text: str, level: int = logging.INFO) -> None:
    """Log a note that the user is shown before the result of the command."""
    NOTES.log(level, "%s", text)


def without_options(arguments: Sequence[str]) -> tuple[list[str], str]:
    """Take ``-q``, ``-v`` and ``-vv`` out of the arguments of a command.

    Returns:
        The other arguments, and the level, which is empty where none of these options is given.
    """
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    options = [word for word in words[:end] if word in _QUIET or word in _VERBOSE]
    others = [word for word in words[:end] if word not in options] + words[end:]
    if not options:
        return others, ""
    if options[-1] in _QUIET:
        return others, "ERROR"
    return others, "DEBUG" if sum(_VERBOSE.get(word, 0) for word in options) > 1 else "INFO"


def is_quiet() -> bool:
    """Tell whether only errors and the result of the command are shown."""
    return _level() == "ERROR"


@contextmanager
def shown(level: str = "") -> Iterator[None]:
    """Show what is logged during the body; a second call within the body changes nothing.

    Args:
        level: The lowest level that is shown; empty for that of the environment.

    Raises:
        InputError: The environment names no level.
    """
    if any(isinstance(handler, _PrintingHandler) for handler in PACKAGE.handlers):
        yield
        return
    before = os.environ.get(VARIABLE)
    if level:
        os.environ[VARIABLE] = level
    try:
        with _printed(_level()):
            yield
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


def redact(record: logging.LogRecord) -> bool:
    """Take the secrets out of a record; this is a filter for handlers."""
    record.msg, record.args = without_secrets(record.getMessage()), None
    return True


class _PrintingHandler(logging.Handler):
    """A handler that prints records as the command prints, so that closed streams do no harm."""

    def __init__(self, write: Callable[[str], None], level: str | int) -> None:
        super().__init__(level)
        self.addFilter(redact)
        self._print = write

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        self._print(self.format(record))


def _level() -> str:
    level = os.environ.get(VARIABLE, "").upper() or "WARNING"
    if level not in _LEVELS:
        raise InputError(f"{VARIABLE} is {level!r}", f"set it to one of {', '.join(_LEVELS)}, or unset it")
    return level


@contextmanager
def _printed(level: str) -> Iterator[None]:
    """Print records from a level on; records from INFO on are created in any case, since Prefect may show them."""
    errors, output = (
        _PrintingHandler(terminal.remark, level),
        _PrintingHandler(terminal.say, "ERROR" if is_quiet() else "INFO"),
    )
    errors.setFormatter(logging.Formatter(_FORMAT))
    errors.addFilter(lambda record: record.name != NOTES.name)
    PACKAGE.addHandler(errors)
    NOTES.addHandler(output)
    before = PACKAGE.level
    PACKAGE.setLevel(min(logging.INFO, errors.level))
    try:
        yield
    finally:
        PACKAGE.setLevel(before)
        PACKAGE.removeHandler(errors)
        NOTES.removeHandler(output)
