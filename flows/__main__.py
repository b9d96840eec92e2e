"""The command ``wsiflow``, also as ``python -m wsiflow.flows``.

Commands that work on files alone start without Hydra and Prefect: an array job starts one for each of its elements.
"""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_COMPOSED = {"plan", "run", "retry"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    _have_home()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in _COMPOSED:
        from . import run

        return run.main(arguments)
    from wsiflow import cli

    if arguments and arguments[0] == "compare" and os.environ.get("PREFECT_API_URL"):
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")  # errors are told once, here
        from . import comparing

        return cli.main(arguments, comparing.answer)
    return cli.main(arguments)


def _have_home() -> None:
    """Give a user without a home, as any user id in a container is, a passing one: libraries keep things there."""
    try:
        Path.home()
    except RuntimeError:
        passing = tempfile.mkdtemp(prefix="wsiflow-home-")
        atexit.register(shutil.rmtree, passing, ignore_errors=True)
        os.environ["HOME"] = passing


if __name__ == "__main__":
    sys.exit(main())
