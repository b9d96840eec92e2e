"""``wsiflow task``: predict one array task of a plan by hand."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from wsiflow.errors import InputError
from wsiflow.run.plan import read_plan
from wsiflow.run.stages import pixels, work
from wsiflow.system import machine

from ..terminal import say


def add_options(parser: ArgumentParser) -> None:
    """Add the plan and the task's place in it."""
    parser.add_argument("plan", type=Path)
    parser.add_argument("index", type=int)


def main(arguments: Namespace) -> int:
    """Run the task, after the colours of its slide have been fitted where they are missing."""
    plan = read_plan(arguments.plan)
    if not 0 <= arguments.index < plan.n_groups:
        raise InputError(f"there is no task {arguments.index}, the plan has {plan.n_groups}", "count from 0")
    machine.limit_threads(int(plan.settings.numeric_class["threads"]))
    if pixels.fits_slides(plan.settings.stain):  # does nothing where the run has fitted them
        outcome = work.run_task(arguments.plan, "stain", plan.task("group", arguments.index).slide)
        if outcome.receipt is None:
            say(str(outcome.failure))
            return outcome.exit_code
    outcome = work.run_task(arguments.plan, "predict", arguments.index)
    say(f"published {outcome.receipt['path']}" if outcome.receipt else str(outcome.failure))
    return outcome.exit_code
