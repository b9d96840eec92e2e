"""Print what commands print, and turn how they end into an exit code.

Exit codes: 0 complete, 10 partial (only when allowed), 20 bad input, 30 environment, 40 integrity, 50 a defect.

A command does not need its streams: where standard output or error is a closed pipe (``| head``), a terminal that is
gone or a full disk, it goes on without printing there.
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
    """Print a text to standard output, without secrets, since what is printed ends in logs."""
    _write(sys.stdout, without_secrets(text))


def remark(text: str) -> None:
    """Print a text to standard error, and so beside the result of the command, which scripts may read."""
    _write(sys.stderr, without_secrets(text))


def report(error: WsiflowError, about: str = "") -> int:
    """Print in one line to standard error what went wrong, and return the exit code.

    Args:
        error: What went wrong.
        about: What it happened to, such as one trial of a sweep.
    """
    _write(sys.stderr, without_secrets(": ".join(filter(None, ("wsiflow", about, str(error))))))
    return error.exit_code


def _fit(text: str, stream: TextIO) -> str:
    """Return a text as a stream can encode it, since an umlaut in a name must not end a run."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def bounded(command: Callable[[], int], about: str = "") -> int:
    """Call a command and return its exit code; an error is printed in one line, and has the exit code of its class.

    With ``WSIFLOW_DEBUG`` set, an unexpected error is raised, so that it ends in its traceback.

    Args:
        command: The command.
        about: What the command is about, as its errors say it; see `report`.
    """
    try:
        return command()
    except WsiflowError as error:
        return report(error, about)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and not _has_reader(sys.stdout):
            return 0  # Hydra or argparse was printing to a closed pipe
        if "WSIFLOW_DEBUG" in os.environ:
            raise
        return report(faults.fault(error), about)
    except Exception as error:
        if "WSIFLOW_DEBUG" in os.environ:
            raise
        remedy = "report this, with the traceback that WSIFLOW_DEBUG=1 shows"
        return report(WsiflowError(f"{type(error).__name__}: {error}", remedy), about)


def flush() -> None:
    """Write what is still buffered, so that the interpreter does not fail to when it ends."""
    for stream in (sys.stdout, sys.stderr):
        _write(stream, None)


def _has_reader(stream: TextIO | None) -> bool:
    """Tell whether a stream is anything but a pipe whose other end was closed."""
    if stream is None:
        return True
    poll = select.poll()
    poll.register(stream, 0)
    return not poll.poll(0)


def _write(stream: TextIO | None, text: str | None) -> None:
    """Write a line, or without one only what is buffered."""
    if stream is None:  # it was closed before this process began
        return
    try:
        if text is not None:
            print(_fit(text, stream), file=stream)
        stream.flush()
    except OSError as error:
        _discard_stream(stream)
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            _write(sys.stderr, f"wsiflow: standard output cannot be written: {error.strerror}; the command goes on")


def _discard_stream(stream: TextIO) -> None:
    """Turn a stream to the null device: its buffer, and what libraries write to it, would fail again and again."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
