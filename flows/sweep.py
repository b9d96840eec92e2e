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

from wsiflow import compare, ledger, stopping, terminal, tracking
from wsiflow.executor import jobs

_VARIABLE = "WSIFLOW_SWEEP"
_started = ExitStack()


class Sweep(Callback):
    """What Hydra calls before the first trial and after the last."""

    def on_multirun_start(self, config: DictConfig, **_kwargs: Any) -> None:
        """Prepare what trials would get into each other's way with."""
        values: Any = OmegaConf.to_container(config, resolve=False)
        folder = Path(config.hydra.sweep.dir).absolute() / ".trials"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        sweep = config.tracking.sweep or config.name
        given = values["hydra"]["overrides"]["task"]
        os.environ[_VARIABLE] = json.dumps({"name": sweep, "given": given, "folder": str(folder)})
        _started.enter_context(
            stopping.telling(lambda: ledger.told(one.parent for one in _trials(folder.parent, "plan.json")))
        )
        launcher = config.hydra.runtime.choices["hydra/launcher"]
        if launcher != "basic":
            at_slurm = launcher == "submitit_slurm"
            _started.enter_context(stopping.at_stop(lambda: _end_trials(folder.parent, at_slurm=at_slurm)))
            params: Any = OmegaConf.to_container(config.tracking, resolve=True)
            _begin_together({**params, "sweep": sweep}, prefect=config.orchestrator == "prefect")

    def on_multirun_end(self, config: DictConfig, **_kwargs: Any) -> None:
        """Compare the trials and stop what was started."""
        with _started:
            _compare(config)


def _trials(folder: Path, name: str) -> list[Path]:
    """Return the files of a name that trials of a sweep have."""
    return sorted(folder.glob(f"*/{name}"))


def _end_trials(folder: Path, *, at_slurm: bool) -> str | None:
    """End trials that run in processes or jobs of their own, and the array jobs that they submitted."""
    stopping.kill_descendants()  # or they would submit what is cancelled once more
    ids = sorted({path.name.partition("_")[0] for path in folder.glob(".submitit/*_*")}) if at_slurm else []
    if ids:
        jobs.call(["scancel", *ids])
    submitting = [log.parent for log in _trials(folder, jobs.LOG) if jobs.JobLog(log.parent).read().jobs]
    cancelled = sum(len(jobs.cancel(root)) - 1 for root in submitting)
    told = ["the trials' Slurm jobs"] * bool(ids) + [f"{cancelled} array jobs"] * bool(cancelled)
    return f"{' and '.join(told)} cancelled" if told else None


def _compare(config: DictConfig) -> None:
    """Compare the trials that have scores, in the sweep's folder."""
    from .comparing import end_of_sweep

    params: Any = OmegaConf.to_container(config.tracking, resolve=True)
    named = tracking.TrackingParams.model_validate({**params, "sweep": config.tracking.sweep or config.name})
    options = compare.Options(resamples=config.evaluation.bootstrap, seed=config.seed)
    end_of_sweep(Path(config.hydra.sweep.dir), named, options)


def _begin_together(params: Mapping[str, Any], *, prefect: bool) -> None:
    """Start and make, once, what trials that run at the same time would all start and make."""
    from .server import shared_server

    if prefect:
        terminal.say(_started.enter_context(shared_server()))
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
