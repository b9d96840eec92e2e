"""Configurations composed by Hydra from overrides, one or those of a sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wsiflow.errors import InputError
from wsiflow.run.config import RunConfig, validate

from . import folders, keys, overrides, sweep


def _folder(*, _root_: DictConfig) -> str:
    """Return the name of a run's folder where none is given; interpolations are names here, and not followed."""
    values: Any = OmegaConf.to_container(_root_, resolve=False)
    return folders.default_name(values)


def _sweep_folder(out: str) -> str:
    return str(sweep.folder()) if sweep.is_on() else out


def _keys(*, _root_: DictConfig) -> str:
    """Return the keys for Hydra's help, in whose template a dollar sign stands for something else."""
    return keys.listed(_root_).replace("$", "$$")


OmegaConf.register_new_resolver("wsiflow_folder", _folder, replace=True)
OmegaConf.register_new_resolver("wsiflow_sweep", _sweep_folder, replace=True)
OmegaConf.register_new_resolver("wsiflow_keys", _keys, replace=True)


def to_config(composed: DictConfig, *, job: str = "") -> RunConfig:
    """Turn what Hydra composed into a validated configuration.

    Args:
        composed: What Hydra made of ``conf/`` and the overrides.
        job: Name of a sweep's job, which gets a folder of its own below ``out``; empty: a single run.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise InputError(f"no value for {', '.join(missing)}", "give it on the command line", stage="configuration")
        values: Any = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:  # a ${name} that is none
        raise overrides.refused(error, []) from error
    if job and sweep.is_on():  # where its own data set or name would put it, the sweep is not
        values["out"] = str(sweep.folder())
    if values["share"] == "auto":  # repeats are there to measure, so each does its own work
        values["share"] = str(Path(values["out"]) / ".shared" / f"repeat-{values['repeat']}") if job else None
    if job:
        given, out = values["tracking"]["sweep"], Path(values["out"])
        values["tracking"]["sweep"] = sweep.name() or sweep.name_of(given, values["name"], out)
        values["out"] = str(out / job)
    return validate(values)


def compose_config(given: Sequence[str], *, job: str = "") -> RunConfig:
    """Compose a configuration outside of the command line; see `to_config`.

    Raises:
        InputError: An override is unknown or out of bounds.
    """
    return to_config(_composed(given), job=job)


def _composed(given: Sequence[str]) -> DictConfig:
    try:
        with hydra.initialize_config_module("wsiflow.conf", version_base="1.3"):
            return hydra.compose("config", overrides=list(given))
    except Exception as error:
        if not overrides.is_refusal(error):
            raise
        raise overrides.refused(error, given) from error


def sweep_jobs(given: Sequence[str]) -> dict[str, list[str]]:
    """Return the overrides of every job that ``wsiflow run -m`` would make of these, by the job's name.

    Raises:
        InputError: An override cannot be parsed.
    """
    return {name: job.overrides for name, job in trials(given).items()}


def trials(given: Sequence[str]) -> dict[str, sweep.TrialOverrides]:
    """Return the trials that ``wsiflow run -m`` would make of overrides, by their names, all for one folder.

    Raises:
        InputError: An override cannot be parsed.
    """
    try:
        found = sweep.named(sweep.jobs(given, _experiment_axes(given)))
    except HydraException as error:
        raise overrides.refused(error, given) from error
    if "" in found or any(one.startswith("out=") for one in given):
        return found
    folder = f"out={overrides.quoted(_folder_of_sweep(given))}"
    return {name: job._replace(overrides=[*job.overrides, folder]) for name, job in found.items()}


def _folder_of_sweep(given: Sequence[str]) -> str:
    """Return where a sweep goes that is not told: where a run would without what is swept."""
    return str(_composed(sweep.fixed(given)).out)


def _experiment_axes(given: Sequence[str]) -> list[str]:
    """Return the axes of the experiment that overrides choose, as overrides; nothing where they choose none."""
    chosen = [one for one in given if one.startswith("experiment=")]
    if not chosen:
        return []
    with hydra.initialize_config_module("wsiflow.conf", version_base="1.3"):
        composed = hydra.compose("config", overrides=chosen[-1:], return_hydra_config=True)
    params: Any = OmegaConf.to_container(composed.hydra.sweeper.params or OmegaConf.create(), resolve=False)
    return [f"{key}={value}" for key, value in params.items()]
