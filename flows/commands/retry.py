"""``wsiflow retry``: start a run again with the configuration that its folder keeps."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from wsiflow import redaction
from wsiflow.errors import InputError
from wsiflow.run import cases
from wsiflow.run.config import RunConfig
from wsiflow.run.stages import ingest
from wsiflow.system.paths import is_same

from ..run import quieten, start
from ..terminal import say


def add_options(parser: ArgumentParser) -> None:
    """Add the run's folder."""
    parser.description = "Start a run again as its folder says: only what is missing is done."
    parser.add_argument("run", type=Path)


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
    summary = start(_here(config, root))
    say(summary.text)
    return summary.exit_code


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
