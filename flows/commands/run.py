"""``wsiflow run``: the whole line. Hydra reads its arguments: overrides, and options with a help of their own."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from wsiflow.errors import InputError

from .. import compose, run
from ..terminal import say

_HELP = {"-h", "--help"}
_SCRIPT_ONLY = "--script-only"


def add_options(_parser: ArgumentParser) -> None:
    """Add nothing: Hydra reads the command line."""


def main(arguments: Namespace) -> int:
    """Run the job, or every job of a sweep, or show every key, or what would be submitted to a scheduler."""
    run.quieten()
    others = [word for word in arguments.words if word not in _HELP]
    if len(others) < len(arguments.words) and not any(word.startswith("-") for word in others):
        say(compose.help_text(others))  # beside options of its own Hydra shows it, which takes seconds longer
        return 0
    if _SCRIPT_ONLY in arguments.words:
        say(_script([word for word in arguments.words if word != _SCRIPT_ONLY]))
        return 0
    sys.argv = ["wsiflow run", *run.as_typed(arguments.words)]
    return run.all_jobs()


def _script(words: Sequence[str]) -> str:
    """Return the first submission of a run to its scheduler, which tests it; nothing is submitted or written."""
    from wsiflow.run.executor import ends, submission
    from wsiflow.run.executor.pieces import Tries

    config = compose.compose_config(run.as_overrides(words))
    params = config.executor
    if params.array is None or params.kind != "array":
        cause = f"{_SCRIPT_ONLY} shows what a scheduler is given, and executor.kind is {params.kind}"
        raise InputError(cause, "name an executor of array jobs, such as executor=slurm_array", stage="configuration")
    form = submission.Form(params.array, config.out.resolve(), params.workers, params.threads)
    return submission.preview(form, ends.Requests(params.array).of(Tries()), params.workers or 1)
