"""What every command has in common: how it speaks, and how it ends.

Exit codes: 0 complete, 10 partial (only when allowed), 20 bad input, 30 environment, 40 integrity, 50 a defect.

Nobody has to listen: where standard output or error is a pipe that was closed (``| head``), a terminal that is gone or
a full disk, the command goes on without it.
"""

import contextlib
import os
import select
import sys
from collections.abc import Callable
from typing import TextIO

from wsiflow.errors import WsiflowError
from wsiflow.redaction import without_secrets
from wsiflow.system import faults


def say(text: str) -> None:
    """Tell the user something, but no secret: what is printed ends in logs."""
    _write(sys.stdout, without_secrets(text))


def remark(text: str) -> None:
    """Tell the user something beside what a command answers, which scripts may read."""
    _write(sys.stderr, without_secrets(text))


def report(error: WsiflowError) -> int:
    """Tell the user what went wrong, in one line, and return the exit code."""
    _write(sys.stderr, f"wsiflow: {error}")
    return error.exit_code


def _fit(text: str, stream: TextIO) -> str:
    """Return a text as a stream can write it: a name with an umlaut must not end a run where the locale has none."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def bounded(command: Callable[[], int]) -> int:
    """Call a command and return its exit code, whatever happens: one line for every error, of its class.

    With ``WSIFLOW_DEBUG`` set, what nobody expected ends in its traceback instead.
    """
    try:
        return command()
    except WsiflowError as error:
        return report(error)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and not _has_reader(sys.stdout):
            return 0  # Hydra or argparse was printing, and nobody wants more of it
        if "WSIFLOW_DEBUG" in os.environ:
            raise
        return report(faults.fault(error))
    except Exception as error:
        if "WSIFLOW_DEBUG" in os.environ:
            raise
        remedy = "report this, with the traceback that WSIFLOW_DEBUG=1 shows"
        return report(WsiflowError(f"{type(error).__name__}: {error}", remedy))


def flush() -> None:
    """Write what is still buffered, so that the interpreter need not when it ends."""
    for stream in (sys.stdout, sys.stderr):
        _write(stream, None)


def _has_reader(stream: TextIO | None) -> bool:
    """Tell whether a stream is something else than a pipe whose other end was closed."""
    if stream is None:
        return True
    look = select.poll()
    look.register(stream, 0)
    return not look.poll(0)


def _write(stream: TextIO | None, text: str | None) -> None:
    """Write a line, or only what is buffered."""
    if stream is None:  # it was closed before this process began
        return
    try:
        if text is not None:
            print(_fit(text, stream), file=stream)
        stream.flush()
    except OSError as error:
        _turn_away(stream)
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            _write(sys.stderr, f"wsiflow: nothing more is told, standard output cannot be written: {error.strerror}")


def _turn_away(stream: TextIO) -> None:
    """Let a stream lead nowhere: what it still holds, and what libraries write to it, would fail again and again."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
