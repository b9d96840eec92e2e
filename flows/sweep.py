"""What the trials of a sweep share: their parent in MLflow, a Prefect server, and who hears how they ended.

Trials run one after another in this process, at once in processes of joblib, or as jobs of Slurm through submitit. What
they have to know reaches them through the environment, and how each of them ended is in a file.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from wsiflow import compare, redaction, terminal, tracking

_VARIABLE = "WSIFLOW_SWEEP"
_WRITTEN = "multirun.yaml"
_started = ExitStack()


class Sweep(Callback):
    """What Hydra calls before the first trial and after the last."""

    def on_multirun_start(self, config: DictConfig, **_kwargs: Any) -> None:
        """Prepare what trials would get into each other's way with."""
        values: Any = OmegaConf.to_container(config, resolve=False)
        folder = Path(config.hydra.sweep.dir).absolute() / ".trials"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if _is_secret(values):
            (folder.parent / _WRITTEN).touch(mode=0o600)
            (folder.parent / _WRITTEN).chmod(0o600)
        sweep = config.tracking.sweep or config.name
        given = values["hydra"]["overrides"]["task"]
        os.environ[_VARIABLE] = json.dumps({"name": sweep, "given": given, "folder": str(folder)})
        if config.hydra.runtime.choices["hydra/launcher"] != "basic":
            params: Any = OmegaConf.to_container(config.tracking, resolve=True)
            _begin_together({**params, "sweep": sweep}, prefect=config.orchestrator == "prefect")

    def on_multirun_end(self, config: DictConfig, **_kwargs: Any) -> None:
        """Compare the trials and stop what was started."""
        values: Any = OmegaConf.to_container(config, resolve=False)
        if _is_secret(values):
            OmegaConf.save(redaction.redacted(values), Path(config.hydra.sweep.dir) / _WRITTEN)
        with _started:
            _compare(config)


def _is_secret(values: Mapping[str, Any]) -> bool:
    """Tell whether the configuration of a sweep, which Hydra writes as it was given, holds a secret."""
    return redaction.holds_redacted(redaction.redacted(values))


def _compare(config: DictConfig) -> None:
    """Compare the trials that have scores, in the sweep's folder."""
    from .comparing import end_of_sweep

    params: Any = OmegaConf.to_container(config.tracking, resolve=True)
    named = tracking.TrackingParams.model_validate({**params, "sweep": config.tracking.sweep or config.name})
    options = compare.Options(resamples=config.evaluation.bootstrap, seed=config.seed)
    end_of_sweep(Path(config.hydra.sweep.dir), named, options)


def _begin_together(params: Mapping[str, Any], *, prefect: bool) -> None:
    """Start and make, once, what trials that run at the same time would all start and make."""
    from .server import chosen_server

    if prefect:
        terminal.say(f"{_started.enter_context(chosen_server())}, for all trials")
    why_not = tracking.begin_sweep(tracking.TrackingParams.model_validate(params))
    if why_not:
        terminal.say(f"MLflow: {why_not}")


def name() -> str:
    """Return the name of the trials' parent in MLflow, empty where there is no sweep."""
    return str(_shared()["name"]) if is_on() else ""


def trial_name(overrides: Sequence[str], number: int) -> str:
    """Return the name of a trial: the overrides that differ from trial to trial, such as ``inference.stride=32``."""
    given = _meant(_shared()["given"])
    own = [text for text, meant in zip(overrides, _meant(overrides), strict=True) if meant not in given]
    return joined(own) or str(number)


def _meant(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """Return key and value of overrides: Hydra writes values otherwise for a trial than they were given (quotes)."""
    return [(one.get_key_element(), one.value()) for one in OverridesParser.create().parse_overrides(list(overrides))]


def joined(swept: Iterable[str]) -> str:
    """Return overrides as the name of a folder."""
    return ",".join(swept).replace("/", "_")


def ended(number: int, exit_code: int) -> None:
    """Leave word of how a trial ended."""
    (Path(_shared()["folder"]) / str(number)).write_text(str(exit_code), encoding="ascii")


def is_on() -> bool:
    """Tell whether there is a sweep."""
    return _VARIABLE in os.environ


def end() -> list[int]:
    """End the sweep, if there is one, and return the exit codes of its trials."""
    if not is_on():
        return []
    folder = Path(_shared()["folder"])
    codes = [int(path.read_text(encoding="ascii")) for path in folder.iterdir()]
    shutil.rmtree(folder)
    del os.environ[_VARIABLE]
    return codes


def _shared() -> dict[str, Any]:
    shared: dict[str, Any] = json.loads(os.environ[_VARIABLE])
    return shared
