"""Start the line for the jobs that Hydra composes, one or those of a sweep, through Prefect or directly."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from wsiflow.errors import EnvironmentFault, InputError, WsiflowError
from wsiflow.system.machine import limit_threads
from wsiflow.system.usage import Spending

from . import logs, overrides, stopping, sweep, terminal, trial
from .compose import to_config
from .literal import literal

if TYPE_CHECKING:
    from wsiflow.run.config import RunConfig
    from wsiflow.run.results.finish import Summary

_ENVIRONMENT = {
    "HYDRA_FULL_ERROR": "1",  # raise errors instead of printing them with advice about Hydra's own internals
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the command prints errors, once; the server keeps its logs
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",  # likewise of its threads, of which a lost server fills the screen
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
_OPTIONS_WITH_VALUES = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"}
_OPTIONS_WITH_VALUES |= {"--config-dir", "-cd", "--experimental-rerun"}
_exit_codes: list[int] = []


def quieten() -> None:
    """Keep Hydra and Prefect from printing what the command prints itself, and from sending statistics."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.raiseExceptions = False  # Prefect's handler prints what becomes of records that a lost server cannot take
    warnings.filterwarnings("ignore", "Failed to create the Prefect home")  # `server` says what follows from it


def all_jobs() -> int:
    """Run the job, or every job of a sweep, and return the worst exit code."""
    _exit_codes.clear()
    try:
        _compose_and_run()
    except Exception as error:
        if overrides.is_refusal(error):
            sweep.end()
            return terminal.report(overrides.explain_refusal(error, _typed_overrides()))
        if not trial.is_on():
            raise
        cause = f"a trial of the sweep did not end: {type(error).__name__}: {error}"
        exit_code = terminal.report(EnvironmentFault(cause, "run the same command again: what is done stays done"))
        return max([exit_code, *(one.exit_code for one in sweep.end())])
    trials = sweep.end()
    for lost in (one for one in trials if not one.reported):
        cause = f"the trial {lost.name} left no record of how it ended, so it counts as failed"
        terminal.report(EnvironmentFault(cause, "run the same command again: what is done stays done"))
    return max([*_exit_codes, *(one.exit_code for one in trials)], default=0)


def as_typed(words: Sequence[str]) -> list[str]:
    """Return the words of a command line, with paths and texts quoted where Hydra would not take them as typed."""
    is_sweep = not {"-m", "--multirun"}.isdisjoint(words)
    places = _places_of_overrides(words)
    return [literal([word], sweep=is_sweep)[0] if place in places else word for place, word in enumerate(words)]


def as_overrides(words: Sequence[str]) -> list[str]:
    """Return the words of a command line as overrides alone, for what composes without Hydra's command line.

    A folder of configurations, ``--config-dir``, becomes the setting that names it.
    """
    rest, found = list(words), list[str]()
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in {"--config-dir", "-cd"} and (equals or place + 1 < len(words)):
            folder = value if equals else words[place + 1]
            found.append(f"hydra.searchpath=[file://{Path(folder).absolute()}]")
            rest[place : place + 1 if equals else place + 2] = [""] * (1 if equals else 2)
    return [*as_typed([word for word in rest if word]), *found]


def _places_of_overrides(words: Sequence[str]) -> set[int]:
    """Return the places of the overrides among the words of a command line, the others are options and their values."""
    values = {place + 1 for place, word in enumerate(words) if word in _OPTIONS_WITH_VALUES}
    return {place for place, word in enumerate(words) if not word.startswith("-")} - values


def _typed_overrides() -> list[str]:
    """Return the overrides of the command line, without Hydra's options and their values."""
    words = sys.argv[1:]
    return [words[place] for place in sorted(_places_of_overrides(words))]


@hydra.main(version_base="1.3", config_path="pkg://wsiflow.conf", config_name="config")
def _compose_and_run(composed: DictConfig) -> float | tuple[float, ...] | None:
    """Run one job of a single run or of a sweep; a failed job of a sweep does not stop the others.

    Returns:
        What a sweeper optimises, see `sweep.objectives`; None for a job without scores.
    """
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        return _run_trial(composed, hydra_config)
    _exit_codes.append(
        terminal.bounded(
            lambda: _run_job(composed, to_config(composed, hydra_config.overrides.task), hydra_config).exit_code
        )
    )
    return None


def _run_trial(composed: DictConfig, hydra_config: HydraConf) -> float | tuple[float, ...] | None:
    """Run one trial of a sweep, and record how it ended."""
    summaries: list[Summary] = []
    ended = trial.Trial(str(hydra_config.job.num), 0)
    with logs.shown(), suppress(InputError):  # one that the job raises again, and explains
        ended = ended._replace(name=trial.trial_name(hydra_config.overrides.task) or ended.name)
    heading = trial.heading(hydra_config.job.num, ended.name)

    def job() -> int:
        nonlocal ended
        sweep.prepare_process()
        trial.trial_name(hydra_config.overrides.task)  # refuses a sweep of folders, now where it is explained
        config = to_config(composed, hydra_config.overrides.task, job=ended.name)
        reason = sweep.reason_to_skip(config)
        if reason:
            ended = ended._replace(reason=reason, skipped=True)
            logs.note(f"skipped: {reason}", logging.WARNING)
            return 0
        trial.claim_own(config.out, hydra_config.overrides.task)
        summaries.append(_run_job(composed, config, hydra_config))
        return summaries[0].exit_code

    def explained() -> int:
        nonlocal ended
        try:
            return job()
        except WsiflowError as error:
            ended = ended._replace(reason=str(error))
            raise

    with logs.shown():
        logs.note(heading)
        exit_code = terminal.bounded(explained, heading)
    if summaries and not summaries[0].metrics:
        ended = ended._replace(reason=summaries[0].text)
    trial.record_end(hydra_config.job.num, ended._replace(exit_code=exit_code))
    return sweep.objectives(summaries[0].metrics, hydra_config.sweeper) if summaries else None


def _run_job(composed: DictConfig, config: "RunConfig", hydra_config: HydraConf) -> "Summary":
    """Run a job, print its result, and keep beside its results how Hydra composed it."""
    summary = start(config)
    terminal.say(summary.text)
    try:
        sweep.write_composition(config.out, composed, hydra_config)
    except OSError as error:  # the run itself is complete
        logs.note(f"{config.out / '.hydra'} is not written: {error.strerror}", logging.WARNING)
    return summary


def start(config: "RunConfig") -> "Summary":
    """Run the line, through Prefect or directly."""
    from wsiflow.run import ledger  # here and below: what is needed once the configuration is known to be right

    with logs.shown(), stopping.reporting(lambda: ledger.summary([config.out])):
        from .line import direct, finished

        limit_threads(config.executor.threads)
        is_direct = config.orchestrator == "none"
        if (trial.is_on() or not is_direct) and (summary := finished(config)) is not None:
            return summary
        sweep.load_libraries(config)
        if is_direct:
            Spending.begin_run()
            return direct(config)
        from .pipeline import as_flow_or_without

        with ExitStack() as own:
            sweep.start_server(own)
            Spending.begin_run()
            return as_flow_or_without(config, trial.title(config))
