"""What starts the line: the jobs that Hydra composes, one or those of a sweep, through Prefect or directly."""

import os
import sys
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from wsiflow.errors import EnvironmentFault
from wsiflow.run import ledger
from wsiflow.run.config import RunConfig
from wsiflow.run.results.finish import Summary
from wsiflow.system.machine import limit_threads

from . import logs, overrides, stopping, sweep, terminal
from .compose import to_config

_ENVIRONMENT = {
    "HYDRA_FULL_ERROR": "1",  # raise errors instead of printing them with advice about Hydra's own internals
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # errors are told once, here; the server keeps its logs
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
_OPTIONS_WITH_VALUES = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"}
_OPTIONS_WITH_VALUES |= {"--config-dir", "-cd", "--experimental-rerun"}
_exit_codes: list[int] = []


def quieten() -> None:
    """Keep Hydra and Prefect from saying what the command says itself, and from sending anything."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", "Failed to create the Prefect home")  # what becomes of it is said by `server`


def all_jobs() -> int:
    """Run the job, or every job of a sweep, and return the worst exit code."""
    _exit_codes.clear()
    try:
        _compose_and_run()
    except Exception as error:
        if overrides.is_refusal(error):
            sweep.end()
            return terminal.report(overrides.refused(error, _typed()))
        if not sweep.is_on():
            raise
        cause = f"a trial of the sweep did not end: {type(error).__name__}: {error}"
        told = terminal.report(EnvironmentFault(cause, "run the same command again: what is done stays done"))
        return max([told, *(trial.exit_code for trial in sweep.end())])
    trials = sweep.end()
    for lost in (trial for trial in trials if not trial.told):
        cause = f"the trial {lost.name} left no word of how it ended, so it counts as failed"
        terminal.report(EnvironmentFault(cause, "run the same command again: what is done stays done"))
    return max([*_exit_codes, *(trial.exit_code for trial in trials)], default=0)


def _typed() -> list[str]:
    """Return the overrides of the command line, without Hydra's options and their values."""
    words = iter(sys.argv[1:])
    found = []
    for word in words:
        if word in _OPTIONS_WITH_VALUES:
            next(words, None)
        elif not word.startswith("-"):
            found.append(word)
    return found


@hydra.main(version_base="1.3", config_path="pkg://wsiflow.conf", config_name="config")
def _compose_and_run(composed: DictConfig) -> float | None:
    """Run one job of a single run or of a sweep; a failed job of a sweep does not stop the others.

    Returns:
        The FROC score, for sweepers that optimise.
    """
    found: list[Summary] = []
    own = HydraConfig.get()
    is_trial, name = own.mode == RunMode.MULTIRUN, ""

    def job() -> int:
        nonlocal name
        if is_trial:
            sweep.end_with_it()
            name = sweep.trial_name(own.overrides.task) or str(own.job.num)
        config = to_config(composed, job=name)
        if is_trial:
            sweep.claim_own(config.out, own.overrides.task)
        found.append(start(config))
        terminal.say(found[0].text)
        return found[0].exit_code

    exit_code = terminal.bounded(job)
    if is_trial:
        sweep.ended(own.job.num, name, exit_code)
    else:
        _exit_codes.append(exit_code)
    return found[0].metrics.get("froc.score") if found else None


def start(config: RunConfig) -> Summary:
    """Run the line, through Prefect or directly."""
    with logs.shown(), stopping.telling(lambda: ledger.summary([config.out])):
        from .line import direct, finished

        limit_threads(config.executor.threads)
        if config.orchestrator == "none":
            return direct(config)
        if not _is_server_set() and (summary := finished(config)) is not None:
            return summary
        from .server import chosen_server

        with ExitStack() as server:
            logs.note(server.enter_context(chosen_server()))
            with stopping.at_stop(server.close):
                return as_flow(config, config.name)


def _is_server_set() -> bool:
    """Tell whether the user has a Prefect server, without importing Prefect, which takes seconds."""
    home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    profiles = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml")
    with suppress(OSError, UnicodeDecodeError):
        if "PREFECT_API_URL" in profiles.read_text(encoding="utf-8"):
            return True
    return "PREFECT_API_URL" in os.environ


def as_flow(config: RunConfig, name: str) -> Summary:
    """Run the line as a Prefect flow run of this name."""
    from .pipeline import SlidesFailedError, pipeline

    limit_threads(config.executor.threads)
    try:
        return pipeline.with_options(flow_run_name=lambda: name)(config)
    except SlidesFailedError as failed:
        return failed.summary
