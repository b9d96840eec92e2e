"""``wsiflow doctor``: what the machine and the installation are, as a bug report needs it."""

import platform
import shutil
from argparse import ArgumentParser, Namespace

from wsiflow.system import machine, provenance

from ..terminal import say


def add_options(_parser: ArgumentParser) -> None:
    """Add no options: the command has none."""


def main(_arguments: Namespace) -> int:
    """Print the machine, its cores, and the versions of what is installed."""
    say(f"python {platform.python_version()} on {platform.platform()}")
    say(f"cores this process may use: {machine.allocated_cores()}")
    say(f"numeric class: {machine.numeric_class(1)}")
    say(f"free space here: {shutil.disk_usage('.').free / 1e9:.1f} GB")
    for name, version in provenance.versions().items():
        say(f"{name} {version}")
    return 0
