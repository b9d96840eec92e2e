"""The commands that start the line: ``run`` composes the configuration with Hydra, ``retry`` takes that of a folder."""

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wsiflow import ingest, ledger, publish, stopping, terminal
from wsiflow.config import RunConfig, validate
from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.results import Summary

from . import sweep

_ENVIRONMENT = {
    "HYDRA_FULL_ERROR": "1",  # raise errors instead of printing them with advice about Hydra's own internals
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # errors are told once, here; the server keeps its logs
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
_exit_codes: list[int] = []


def main(arguments: Sequence[str]) -> int:
    """Run ``run`` or ``retry`` with what stands behind it, and return the exit code."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if arguments[0] == "plan":
        from . import planning

        return planning.main(arguments[1:])
    if arguments[0] == "retry":
        return terminal.bounded(lambda: _retry(arguments[1:]))
    sys.argv = ["wsiflow run", *arguments[1:]]
    return terminal.bounded(_all_jobs)


def _retry(arguments: Sequence[str]) -> int:
    """Start a run again with the configuration in its folder."""
    parser = argparse.ArgumentParser(
        prog="wsiflow retry", description="Start a run again as its folder says: does what is lacking."
    )
    parser.add_argument("run", type=Path)
    root = parser.parse_args(arguments).run
    told = publish.generations(root, "cases.json")
    if not told:
        raise InputError("it holds no run", "name the out= folder of a run", path=root)
    config, _ = ingest.read_cases(told[-1])
    summary = start(config.model_copy(update={"out": root}))
    terminal.say(summary.text)
    return summary.exit_code


def _all_jobs() -> int:
    """Run the job, or every job of a sweep, and return the worst exit code."""
    _exit_codes.clear()
    try:
        _compose_and_run()
    except (HydraException, OmegaConfBaseException) as error:
        sweep.end()
        return terminal.report(_refused(error))
    except Exception as error:
        if not sweep.is_on():
            raise
        sweep.end()
        cause = f"a trial of the sweep did not end: {type(error).__name__}: {error}"
        return terminal.report(EnvironmentFault(cause, "run the same command again: what is done stays done"))
    return max([*_exit_codes, *sweep.end()], default=0)


@hydra.main(version_base="1.3", config_path="pkg://wsiflow.conf", config_name="config")
def _compose_and_run(composed: DictConfig) -> float | None:
    """Run one job of a single run or of a sweep; a failed job of a sweep does not stop the others.

    Returns:
        The FROC score, for sweepers that optimise.
    """
    found: list[Summary] = []
    is_trial = HydraConfig.get().mode == RunMode.MULTIRUN

    def job() -> int:
        found.append(start(to_config(composed, job=_trial_name())))
        terminal.say(found[0].text)
        return found[0].exit_code

    exit_code = terminal.bounded(job)
    if is_trial:
        sweep.ended(HydraConfig.get().job.num, exit_code)
    else:
        _exit_codes.append(exit_code)
    return found[0].metrics.get("froc.score") if found else None


def to_config(composed: DictConfig, *, job: str = "") -> RunConfig:
    """Turn what Hydra composed into a validated configuration.

    Args:
        composed: What Hydra made of ``conf/`` and the overrides.
        job: Name of a sweep's job, which gets a folder of its own below ``out``; empty: a single run.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise InputError(f"no value for {', '.join(missing)}", "give it on the command line", stage="configuration")
    values: Any = OmegaConf.to_container(composed, resolve=True)
    if values["share"] == "auto":  # repeats are there to measure, so each does its own work
        values["share"] = str(Path(values["out"]) / ".shared" / f"repeat-{values['repeat']}") if job else None
    if job:
        values["out"] = str(Path(values["out"]) / job)
        values["tracking"]["sweep"] = values["tracking"]["sweep"] or sweep.name() or values["name"]
    _make_absolute(values)
    return validate(values)


def _make_absolute(values: dict[str, Any]) -> None:
    """Let paths begin at the root: workers, and whoever starts the run again, may be in other folders."""
    _, found, store = values["tracking"]["uri"].partition("sqlite:///")
    if found:
        values["tracking"]["uri"] = found + os.path.normpath(Path(store).absolute())
    for part, name in (("dataset", "manifest"), ("dataset", "folder"), ("dataset", "path"), ("model", "card")):
        path = values[part].get(name)
        if path and not str(path).startswith("pkg:"):
            values[part][name] = str(Path(path).absolute())
    for name in ("out", "share"):
        if values[name]:
            values[name] = str(Path(values[name]).absolute())


def compose_config(overrides: Sequence[str], *, job: str = "") -> RunConfig:
    """Compose a configuration outside of the command line; see `to_config`.

    Raises:
        InputError: An override is unknown or out of bounds.
    """
    try:
        with hydra.initialize_config_module("wsiflow.conf", version_base="1.3"):
            composed = hydra.compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise _refused(error) from error
    return to_config(composed, job=job)


def sweep_jobs(overrides: Sequence[str]) -> dict[str, list[str]]:
    """Return the overrides of every job that ``wsiflow run -m`` would make of these, by the job's name.

    Raises:
        InputError: An override cannot be parsed.
    """
    given = list(overrides)
    try:
        parser = OverridesParser.create()
        own = {one.get_key_element() for one in parser.parse_overrides(given)}
        listed = parser.parse_overrides(_experiment_axes(given))
        overrides = [str(one.input_line) for one in listed if one.get_key_element() not in own] + given
        parsed = parser.parse_overrides(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise _refused(error) from error
    axes = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        if one.is_sweep_override()
        else [text]
        for one, text in zip(parsed, overrides, strict=True)
    ]
    jobs = [list(job) for job in itertools.product(*axes)]
    return {sweep.joined(one for one in job if one not in overrides): job for job in jobs}


def _experiment_axes(overrides: Sequence[str]) -> list[str]:
    """Return the axes of the experiment that overrides choose, as overrides; nothing where they choose none."""
    chosen = [one for one in overrides if one.startswith("experiment=")]
    if not chosen:
        return []
    with hydra.initialize_config_module("wsiflow.conf", version_base="1.3"):
        composed = hydra.compose("config", overrides=chosen[-1:], return_hydra_config=True)
    params: Any = OmegaConf.to_container(composed.hydra.sweeper.params or OmegaConf.create(), resolve=False)
    return [f"{key}={value}" for key, value in params.items()]


def quoted(text: str) -> str:
    """Return a text as the value of an override, whatever characters it has."""
    return QuotedString(text, Quote.single).with_quotes()


def _refused(error: Exception) -> InputError:
    return InputError(str(error).strip(), "wsiflow run --cfg job shows every key", stage="configuration")


def _trial_name() -> str:
    """Return the name of a sweep's trial, empty for a single run."""
    own = HydraConfig.get()
    return sweep.trial_name(own.overrides.task, own.job.num) if own.mode == RunMode.MULTIRUN else ""


def start(config: RunConfig) -> Summary:
    """Run the line, through Prefect or directly."""
    with stopping.telling(lambda: ledger.told([config.out])):
        if config.orchestrator == "none":
            from wsiflow.model.threads import limit_threads

            from .pipeline import direct

            limit_threads(config.executor.threads)
            return direct(config)
        from .server import chosen_server

        with ExitStack() as server:
            terminal.say(server.enter_context(chosen_server()))
            with stopping.at_stop(server.close):
                return as_flow(config, config.name)


def as_flow(config: RunConfig, name: str) -> Summary:
    """Run the line as a Prefect flow run of this name."""
    from wsiflow.model.threads import limit_threads

    from .pipeline import SlidesFailedError, pipeline

    limit_threads(config.executor.threads)
    try:
        return pipeline.with_options(flow_run_name=lambda: name)(config)
    except SlidesFailedError as failed:
        return failed.summary
