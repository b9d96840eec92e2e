"""``wsiflow element``: one element of an array job, which its job script calls: it starts as quickly as it can."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from wsiflow.run.executor import element


def add_options(parser: ArgumentParser) -> None:
    """Add the path of the table that lists the slices of the array."""
    parser.add_argument("table", type=Path)


def main(arguments: Namespace) -> int:
    """Run the slice that belongs to this element."""
    return element.run(arguments.table)
