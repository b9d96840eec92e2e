"""``wsiflow retry``: start a run again with the configuration that its folder keeps."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from wsiflow import redaction
from wsiflow.errors import InputError
from wsiflow.run import cases
from wsiflow.run.config import RunConfig
from wsiflow.run.executor.params import ExecutorParams
from wsiflow.run.stages import ingest
from wsiflow.system.paths import is_same

from ..run import quieten, start
from ..terminal import say


def add_options(parser: ArgumentParser) -> None:
    """Add the run's folder, and settings of its executor."""
    parser.description = "Start a run again as its folder says: only what is missing is done."
    parser.add_argument("run", type=Path)
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="executor.KEY=VALUE",
        help="where and with what it runs from now on, such as executor.array.memory_limit_mb=64000; what it computes "
        "stays as it was",
    )


def main(arguments: Namespace) -> int:
    """Start a run again, so that what is missing is done, and nothing else."""
    quieten()
    root = arguments.run
    cases_path = ingest.newest_cases(root)
    if cases_path is None:
        raise InputError("it holds no cases.json", "name the out= folder of a run, or start it as at first", path=root)
    config, _ = cases.read_cases(cases_path)
    if redaction.holds_redacted(config.executor.model_dump()):
        cause = "executor settings hold a secret, which the folder does not keep"
        raise InputError(cause, "start it with the wsiflow run command that began it", path=cases_path)
    config = config.model_copy(update={"executor": _changed(config.executor, arguments.settings)})
    summary = start(_here(config, root))
    say(summary.text)
    return summary.exit_code


def _changed(params: ExecutorParams, settings: Sequence[str]) -> ExecutorParams:
    """Return the settings of an executor with some of them changed.

    Raises:
        InputError: A setting is none of the executor, or its value cannot be used.
    """
    values = params.model_dump()
    for setting in settings:
        key, equals, text = setting.partition("=")
        group, *names = key.split(".")
        if group != "executor" or not names or not equals:
            remedy = "give executor.KEY=VALUE; other settings belong to another run, in another out= folder"
            raise InputError(f"{setting} is no setting of the executor", remedy, stage="configuration")
        place = values
        for name in names[:-1]:
            place[name] = inner = place.get(name) or {}
            place = inner
        place[names[-1]] = yaml.safe_load(text)
    try:
        return ExecutorParams.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["executor", *map(str, first["loc"])])
        raise InputError(f"{where}: {first['msg']}", "correct it", stage="configuration") from error


def _here(config: RunConfig, root: Path) -> RunConfig:
    """Return the configuration of a run with the folder where the run lies now: it may have been moved or copied.

    The folder that the trials of a sweep share lies beside them, and is taken to have been moved with them.
    """
    if is_same(config.out, root):
        return config
    here, share = root.resolve(), config.share
    if share is not None and share.is_relative_to(config.out.parent):
        share = here.parent / share.relative_to(config.out.parent)
    return config.model_copy(update={"out": here, "share": share})
