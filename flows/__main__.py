"""The command ``wsiflow``, also as ``python -m wsiflow.flows``.

Commands that work on files alone start without Hydra and Prefect: an array job starts one for each of its elements.
"""

import os
import sys
from collections.abc import Sequence

from wsiflow import stopping, terminal

_COMPOSED = {"plan", "run", "retry"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["element"]:  # ended by its scheduler, which knows what signals mean
            return _call(arguments)
        return stopping.run(lambda: _call(arguments))
    finally:
        terminal.flush()


def _call(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in _COMPOSED:
        from . import run

        return run.main(arguments)
    from wsiflow import cli

    if arguments and arguments[0] == "compare" and os.environ.get("PREFECT_API_URL"):
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")  # errors are told once, here
        from . import comparing

        return cli.main(arguments, comparing.answer)
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
