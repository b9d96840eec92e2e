"""``wsiflow verify``: compare every published file of a run with its receipt."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from wsiflow.errors import InputError, IntegrityError
from wsiflow.run import shards
from wsiflow.run.plan import latest_plan
from wsiflow.system import publish

from ..terminal import report, say


def add_options(parser: ArgumentParser) -> None:
    """Add the run's folder."""
    parser.add_argument("run", type=Path)


def main(arguments: Namespace) -> int:
    """Print how many files are what their receipts say, and which are not."""
    names = publish.receipt_names(arguments.run)
    if not names:
        raise InputError("it holds no receipts", "name the out= folder of a run", path=arguments.run)
    plan = latest_plan(arguments.run) if publish.generations(arguments.run, "plan.json") else None
    damaged = spared = 0
    for name in names:
        if plan and not (arguments.run / name).exists() and shards.is_dispensable(arguments.run, plan, name):
            spared += 1
            continue
        try:
            publish.check(arguments.run, publish.read_receipt(arguments.run, name) or {"path": name})
        except IntegrityError as error:
            damaged += 1
            report(error)
    say(f"{len(names) - damaged - spared} of {len(names)} published files are what their receipts say")
    if spared:
        say(f"{spared} files of pixels were deleted; nothing needs them, the scores are there")
    return IntegrityError.exit_code if damaged else 0
