"""``wsiflow verify``: compare every published file of a run with its receipt."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from wsiflow.errors import InputError, IntegrityError
from wsiflow.run import first_pass, shards
from wsiflow.run.plan import latest_plan
from wsiflow.system import publish

from ..terminal import report, say


def add_options(parser: ArgumentParser) -> None:
    """Add the run's folder."""
    parser.add_argument("run", type=Path)


def main(arguments: Namespace) -> int:
    """Print how many files are what their receipts say, and which are not."""
    folders = [arguments.run, first_pass.folder_of(arguments.run)]
    names = {folder: publish.receipt_names(folder) for folder in folders}
    if not names[arguments.run]:
        raise InputError("it holds no receipts", "name the out= folder of a run", path=arguments.run)
    damaged, spared = map(sum, zip(*(_verify(folder, listed) for folder, listed in names.items()), strict=True))
    total = sum(map(len, names.values()))
    say(f"{total - damaged - spared} of {total} published files are what their receipts say")
    if spared:
        say(f"{spared} files of pixels were deleted; nothing needs them, the scores are there")
    return IntegrityError.exit_code if damaged else 0


def _verify(root: Path, names: Sequence[str]) -> tuple[int, int]:
    """Report files that are not what their receipts say; return how many, and how many were deleted and not needed."""
    plan = latest_plan(root) if names and publish.generations(root, "plan.json") else None
    damaged = spared = 0
    for name in names:
        if plan and not (root / name).exists() and shards.is_dispensable(root, plan, name):
            spared += 1
            continue
        try:
            publish.check(root, publish.read_receipt(root, name) or {"path": name})
        except IntegrityError as error:
            damaged += 1
            report(error)
    return damaged, spared
