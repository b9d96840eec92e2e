"""The command ``wsiflow``, also as ``python -m wsiflow.flows``.

Commands that work on files alone start without Hydra and Prefect: an array job starts one for each of its elements.
"""

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from wsiflow.system import processes
from wsiflow.system.usage import Spending

from . import cli, logs, stopping, terminal

_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


def command() -> int:
    """Run the command of this process, and return the exit code with which the process ends."""
    ensure_utf8()
    exit_code = main()
    if "dask_jobqueue" not in sys.modules:  # it deletes its certificates when its objects are torn down
        processes.skip_teardown(exit_code)
    return exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    Spending.started_for_runs()
    open_closed_streams()
    ensure_home()
    reach_own_servers()
    try:
        arguments, level = logs.without_options(arguments)
        if arguments[:1] == ["element"]:  # its scheduler ends it, and knows what signals mean
            return _call(arguments, level)
        exit_code = stopping.run(lambda: _call(arguments, level))
    finally:
        terminal.flush()
    stopping.exit_if_abandoned(exit_code)
    return exit_code


def _call(arguments: Sequence[str], level: str) -> int:
    """Run the command that the command line names, and show log records from a level on."""

    def call() -> int:
        with logs.shown(level):
            return cli.main(arguments)

    return terminal.bounded(call)


def open_closed_streams() -> None:
    """Open the null device for standard streams that were closed before this process started.

    Otherwise the next file that is opened would get the number of such a stream, and with it what libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003 - open() takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115


def ensure_utf8() -> None:
    """Start anew with names of files as UTF-8, where an odd locale would have them read as something else.

    What is read that way could not be written into a receipt.
    """
    if sys.getfilesystemencoding().lower() not in {"utf-8", "utf8"} and not sys.flags.utf8_mode:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})


def ensure_home() -> None:
    """Give a user who has no home folder a temporary one, without which Prefect does not start.

    Containers that run under an arbitrary user number are such a case.
    """
    with contextlib.suppress(RuntimeError):
        if Path.home().is_dir() and (Path.home() != Path("/") or os.access("/", os.W_OK)):
            return
    with contextlib.suppress(OSError):
        os.environ["HOME"] = tempfile.mkdtemp(prefix="wsiflow-home-")
        atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)


def reach_own_servers() -> None:
    """Keep a proxy from requests to servers on this machine, which only this machine can reach."""
    if not any(name.lower().endswith("_proxy") and value for name, value in os.environ.items()):
        return
    others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    direct = ",".join(dict.fromkeys([*filter(None, others.split(",")), *_THIS_MACHINE]))
    os.environ |= dict.fromkeys(("no_proxy", "NO_PROXY"), direct)


if __name__ == "__main__":
    sys.exit(command())
