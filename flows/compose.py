"""Compose configurations from overrides with Hydra: that of one run, or those of a sweep."""

from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wsiflow.errors import InputError, WsiflowError
from wsiflow.model import read_card
from wsiflow.run import tracking
from wsiflow.run.config import RunConfig, validate

from . import folders, keys, trial
from .literal import literal
from .overrides import choice_groups, choices, explain_refusal, is_refusal, quoted


def _folder(*, _root_: DictConfig) -> str:
    """Return the folder of a run without ``out=``; interpolations count as they are written, and are not followed."""
    values: Any = OmegaConf.to_container(_root_, resolve=False)
    return folders.default_name(values)


def _sweep_folder(out: str) -> str:
    return str(trial.sweep_folder()) if trial.is_on() else out


def _keys(*, _root_: DictConfig) -> str:
    """Return the keys for Hydra's help, whose template needs a dollar sign to be doubled."""
    return keys.list_keys(_root_).replace("$", "$$")


OmegaConf.register_new_resolver("wsiflow_folder", _folder, replace=True)
OmegaConf.register_new_resolver("wsiflow_sweep", _sweep_folder, replace=True)
OmegaConf.register_new_resolver("wsiflow_store", tracking.default_uri, replace=True)
OmegaConf.register_new_resolver("wsiflow_keys", _keys, replace=True)


def to_config(composed: DictConfig, overrides: Sequence[str], *, job: str = "") -> RunConfig:
    """Turn what Hydra composed into a validated configuration.

    Args:
        composed: What Hydra composed from ``conf/`` and the overrides.
        overrides: The overrides.
        job: Name of a trial of a sweep, whose folder lies below ``out``; empty for a single run.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise InputError(f"no value for {', '.join(missing)}", "give it on the command line", stage="configuration")
        values: Any = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:  # an interpolation that names no key
        raise explain_refusal(error, []) from error
    if job and trial.is_on():  # a trial's data set or name must not move it out of the sweep's folder
        values["out"] = str(trial.sweep_folder())
    if values["share"] == "auto":  # repeats measure costs, so each does its own work
        values["share"] = str(Path(values["out"]) / ".shared" / f"repeat-{values['repeat']}") if job else None
    if job:
        recorded, out = values["tracking"], Path(values["out"])
        recorded["sweep"] = trial.sweep_name() or trial.sweep_name_of(recorded["sweep"], values["name"], out)
        values["out"] = str(out / job)
    return _with_stride_alone(validate(values), overrides)


def _with_stride_alone(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Keep ``inference.stride_alone=auto`` only where it may be used, so that it is in no file of any other run."""
    inference = config.inference
    if inference.stride_alone != "auto":
        return config
    is_given = any(one.lstrip("+").startswith(("inference.stride=", "experiment=")) for one in overrides)
    try:
        is_needed = not is_given and inference.engine == "dense" and not read_card(config.model).is_built_in
    except WsiflowError:  # the run itself refuses such a card, with what else is wrong
        is_needed = False
    return (
        config
        if is_needed
        else config.model_copy(update={"inference": inference.model_copy(update={"stride_alone": 0})})
    )


def compose_config(overrides: Sequence[str], *, job: str = "") -> RunConfig:
    """Compose and validate a configuration from overrides; see `to_config`.

    Raises:
        InputError: An override is unknown or out of bounds.
    """
    return to_config(_composed(overrides), overrides, job=job)


def help_text(overrides: Sequence[str]) -> str:
    """Return the help of ``wsiflow run``: the choices of every group, and the keys of what overrides choose.

    Hydra gives the same text, but reads every file of ``conf/`` again for each of them.

    Raises:
        InputError: An override is unknown.
    """
    template = Template(_composed(overrides, with_hydra=True).hydra.help.template)
    groups = {group: choices(group) for group in choice_groups()}
    return template.substitute(
        APP_CONFIG_GROUPS="".join(f"{group}: {', '.join(names)}\n" for group, names in groups.items())
    )


def _composed(overrides: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    try:
        with hydra.initialize_config_module("wsiflow.conf", version_base="1.3"):
            return hydra.compose("config", overrides=literal(overrides), return_hydra_config=with_hydra)
    except Exception as error:
        if not is_refusal(error):
            raise
        raise explain_refusal(error, overrides) from error


def trials(overrides: Sequence[str]) -> dict[str, trial.TrialOverrides]:
    """Return the trials into which ``wsiflow run -m`` splits overrides, by name, all in the folder of one sweep.

    Raises:
        InputError: An override cannot be parsed.
    """
    overrides = literal(overrides, sweep=True)
    try:
        by_name = trial.named(trial.jobs(overrides, _experiment_axes(overrides)))
    except HydraException as error:
        raise explain_refusal(error, overrides) from error
    if "" in by_name or any(one.startswith("out=") for one in overrides):
        return by_name
    folder = f"out={quoted(_folder_of_sweep(overrides))}"
    return {name: job._replace(overrides=[*job.overrides, folder]) for name, job in by_name.items()}


def _folder_of_sweep(overrides: Sequence[str]) -> str:
    """Return the folder of a sweep without ``out=``: that of a run with the overrides that all trials share."""
    return str(_composed(trial.fixed(overrides)).out)


def _experiment_axes(overrides: Sequence[str]) -> list[str]:
    """Return the axes of the experiment that overrides choose, as overrides; none where they choose no experiment."""
    chosen = [one for one in overrides if one.startswith("experiment=")]
    if not chosen:
        return []
    with hydra.initialize_config_module("wsiflow.conf", version_base="1.3"):
        composed = hydra.compose("config", overrides=chosen[-1:], return_hydra_config=True)
    if not trial.is_grid(composed.hydra.sweeper):
        raise InputError(f"{chosen[-1]} is a search", f"start it with wsiflow run -m {chosen[-1]}", stage="sweep")
    params: Any = OmegaConf.to_container(composed.hydra.sweeper.params or OmegaConf.create(), resolve=False)
    return [f"{key}={value}" for key, value in params.items()]
