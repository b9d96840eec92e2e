"""What every command has in common: how it speaks, and how it ends.

Exit codes: 0 complete, 10 partial (only when allowed), 20 bad input, 30 environment, 40 integrity, 50 a defect.
"""

import os
import sys
from collections.abc import Callable
from typing import TextIO

from wsiflow import faults
from wsiflow.errors import WsiflowError
from wsiflow.redaction import without_secrets


def say(text: str) -> None:
    """Tell the user something, but no secret: what is printed ends in logs."""
    print(_fit(without_secrets(text), sys.stdout), flush=True)  # noqa: T201 - the one place that prints


def report(error: WsiflowError) -> int:
    """Tell the user what went wrong, in one line, and return the exit code."""
    print(_fit(f"wsiflow: {error}", sys.stderr), file=sys.stderr, flush=True)  # noqa: T201
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
        if "WSIFLOW_DEBUG" in os.environ:
            raise
        return report(faults.fault(error))
    except Exception as error:
        if "WSIFLOW_DEBUG" in os.environ:
            raise
        remedy = "report this, with the traceback that WSIFLOW_DEBUG=1 shows"
        return report(WsiflowError(f"{type(error).__name__}: {error}", remedy))
