"""Prepare what the trials of a sweep share, compare them at its end, and learn how they ended.

Trials run one after another in this process, at once in processes of joblib, or as jobs of Slurm through submitit. They
share a parent run in MLflow and a Prefect server. `trial` is what each of them knows of the sweep.
"""

import contextlib
import fcntl
import importlib
import json
import logging
import math
import multiprocessing
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from hydra.conf import HydraConf
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf

from wsiflow import redaction
from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.run import tracking
from wsiflow.run.config import RunConfig
from wsiflow.run.executor import jobs as array_jobs
from wsiflow.run.executor.kinds import KINDS
from wsiflow.system import processes
from wsiflow.system.machine import cpu_supports_bf16
from wsiflow.system.usage import Spending

from . import logs, stopping, terminal, trial

_RECORDS = ".trials"
_WRITTEN = "multirun.yaml"
_LIBRARIES = ("matplotlib.backends.backend_agg", "matplotlib.figure", "scipy.stats", "skimage.measure")
_started = ExitStack()
_planned: list[str] = []  # names of the trials by number, where the sweeper is Hydra's own
_servers: list[str] = []  # what was said of the server that the trials of this process share


class SweepCallback(Callback):
    """Functions that Hydra calls before the first trial and after the last."""

    def on_multirun_start(self, config: DictConfig, **_kwargs: Any) -> None:
        """Prepare what the trials share, before they would compete for it."""
        values: Any = OmegaConf.to_container(config, resolve=False)
        overrides, sweeper = values["hydra"]["overrides"]["task"], values["hydra"]["sweeper"]
        axes = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        out = Path(config.out).absolute()
        folder = out / _RECORDS / uuid.uuid4().hex
        name = trial.sweep_name_of(config.tracking.sweep, config.name, out)
        shared: dict[str, Any] = {"name": name, "out": str(out), "folder": str(folder), "pid": os.getpid()}
        _planned.clear()
        os.environ[trial.VARIABLE] = json.dumps({**shared, "overrides": overrides, "alike": []})
        jobs = _jobs_or_none(overrides, axes)
        alike = sorted(trial.texts_alike(one for job in jobs for one in job.swept))
        is_basic = trial.is_grid(sweeper)
        count = len(jobs) if is_basic else sweeper.get("n_trials", 0)
        shared |= {"overrides": [*axes, *overrides], "alike": alike, "count": count}
        os.environ[trial.VARIABLE] = json.dumps(shared)
        if is_basic:
            _planned.extend(
                trial.name_of_job(job.swept, job.overrides) or str(number) for number, job in enumerate(jobs)
            )
        _create_records(folder)
        if _is_secret(values):
            (out / _WRITTEN).touch(mode=0o600)
            (out / _WRITTEN).chmod(0o600)
        _started.enter_context(stopping.reporting(lambda: _what_is_done(out)))
        launcher = config.hydra.runtime.choices["hydra/launcher"]
        if launcher != "basic":
            at_slurm = launcher == "submitit_slurm"
            _started.enter_context(stopping.at_stop(lambda: _end_trials(out, at_slurm=at_slurm)))
            params: Any = OmegaConf.to_container(config.tracking, resolve=True)
            _start_shared({**params, "sweep": shared["name"]}, prefect=config.orchestrator == "prefect")

    def on_multirun_end(self, config: DictConfig, **_kwargs: Any) -> None:
        """Compare the trials, and stop what was started for them."""
        values: Any = OmegaConf.to_container(config, resolve=False)
        if _is_secret(values):
            OmegaConf.save(redaction.redacted(values), Path(config.hydra.sweep.dir) / _WRITTEN)
        with _started:
            if summary := _count_trials():
                terminal.say(summary)
            _compare(config)


def _what_is_done(folder: Path) -> str:
    """Return in words what the trials in the folder of a sweep have done."""
    from wsiflow.run import ledger

    return ledger.summary(one.parent for one in _files_of_trials(folder, "plan.json"))


def _is_secret(values: Mapping[str, Any]) -> bool:
    """Tell whether the configuration of a sweep, which Hydra writes to a file unchanged, holds a secret."""
    return redaction.holds_redacted(redaction.redacted(values))


def _files_of_trials(folder: Path, name: str) -> list[Path]:
    """Return the files of a name in the folders of a sweep's trials."""
    return sorted(folder.glob(f"*/{name}"))


def _end_trials(folder: Path, *, at_slurm: bool) -> str | None:
    """End trials that run in processes or jobs of their own, and the array jobs that they submitted."""
    stopping.kill_descendants()  # first, or they would submit again what is cancelled
    ids = sorted({path.name.partition("_")[0] for path in folder.glob(".submitit/*_*")}) if at_slurm else []
    if ids:
        array_jobs.call(["scancel", *ids])
    submitting = [
        log.parent for log in _files_of_trials(folder, array_jobs.LOG) if array_jobs.JobLog(log.parent).read().jobs
    ]
    cancelled = sum(len(array_jobs.cancel(root)) - 1 for root in submitting)
    kinds = ["the trials' Slurm jobs"] * bool(ids) + [f"{cancelled} array jobs"] * bool(cancelled)
    return f"{' and '.join(kinds)} cancelled" if kinds else None


def _compare(config: DictConfig) -> None:
    """Compare the trials that have scores, in the sweep's folder."""
    from wsiflow.analysis.tradeoff import rows

    from .comparing import compare_sweep

    params: Any = OmegaConf.to_container(config.tracking, resolve=True)
    named = tracking.TrackingParams.model_validate({**params, "sweep": trial.sweep_name()})
    asked: Any = OmegaConf.to_container(config.compare, resolve=True)
    options = rows.Options(
        resamples=config.evaluation.bootstrap, seed=config.seed, **asked | {"families": asked["families"] or {}}
    )
    failed = {
        trial.name: f"skipped: {trial.reason}" if trial.skipped else trial.reason
        for trial in _trials()
        if trial.failed or trial.skipped
    }
    compare_sweep(trial.sweep_folder(), named, options, failed)


def _start_shared(params: Mapping[str, Any], *, prefect: bool) -> None:
    """Start once the Prefect server and the MLflow record that trials which run at the same time would each start."""
    from .server import chosen_server

    if prefect:
        logs.note(f"{_started.enter_context(chosen_server())}, for all trials")
    logged = tracking.begin_sweep(tracking.TrackingParams.model_validate(params), trial.sweep_folder())
    if logged.run_id is None and params["kind"] != "off":
        logs.note(f"MLflow: {logged.reason}", logging.WARNING)


def start_server(own: ExitStack) -> None:
    """Make sure that a Prefect server answers until the sweep ends, or where there is none until ``own`` is closed."""
    from .server import chosen_server

    if _servers:
        return
    is_shared = trial.is_on() and not trial.is_of_another_process()
    stack = _started if is_shared else own
    server = stack.enter_context(ExitStack())
    message = server.enter_context(chosen_server())
    stack.enter_context(stopping.at_stop(server.close, last=True))  # runs are shown as cancelled before
    logs.note(f"{message}, for all trials" if is_shared else message)
    if is_shared:
        _servers.append(message)


def _jobs_or_none(overrides: Sequence[str], axes: Sequence[str]) -> list[trial.TrialOverrides]:
    """Return the trials, or none where overrides are wrong: Hydra's own sweeper then raises the error."""
    try:
        return trial.jobs(overrides, axes)
    except (HydraException, InputError, AssertionError):  # the last for choices that a pattern names
        return []


def reason_to_skip(config: RunConfig) -> str:
    """Return why this machine cannot run a trial, in words; empty where it can, or where other machines run it."""
    if config.inference.precision != "bf16" or not KINDS[config.executor.kind].is_local or cpu_supports_bf16():
        return ""
    return "this CPU has no bfloat16 instructions (avx512_bf16 or amx_bf16), which inference.precision=bf16 needs"


def objectives(metrics: Mapping[str, float], sweeper: Any) -> float | tuple[float, ...] | None:
    """Return what a sweeper optimises: the score, and where it has two directions, all core-hours as well.

    Args:
        metrics: The numbers of a run.
        sweeper: Configuration of the sweeper. Optuna has ``direction``.

    Returns:
        The FROC score, or the AUC where that is not defined; None where neither is. Where a trial's total is not known,
        since a former version began it, its cost is that of the line, and a note says so.
    """
    defined = (metrics.get(name, math.nan) for name in ("froc.score", "roc.auc"))
    score = next(filter(math.isfinite, defined), None)
    direction = OmegaConf.select(sweeper, "direction")
    if score is None or not isinstance(direction, ListConfig):
        return score
    from wsiflow.run.results import cost  # it imports all stages, which a typo does not need

    if math.isfinite(total := metrics.get(cost.TOTAL, math.nan)):
        return score, total
    logs.note("a former version began this trial: its cost is that of the line alone", logging.WARNING)
    return score, metrics[cost.LINE]


def prepare_process() -> None:
    """Prepare a process of joblib for a trial: it ends with its sweep, and may start processes of its own.

    It would outlive a sweep that is killed. Its way of starting processes is not known to those that it starts, which
    would die of that, so that the usual way takes its place.
    """
    if trial.shared().get("pid") == os.getppid():
        processes.end_with(os.getppid())
    if trial.is_of_another_process():
        Spending.started_for_runs()
    if multiprocessing.get_start_method(allow_none=True) not in {None, *multiprocessing.get_all_start_methods()}:
        multiprocessing.set_start_method("spawn", force=True)


def load_libraries(config: RunConfig) -> None:
    """Import what the first trial of this process would import later: to its start, which every trial is charged."""
    if trial.is_on():
        tracked = ["mlflow"] if config.tracking.kind == "mlflow" else []
        inside = ["torch", "torch.export", "openvino"] if config.executor.kind == "inline" else []
        for library in (*_LIBRARIES, *tracked, *inside):
            importlib.import_module(library)


def _create_records(folder: Path) -> None:
    """Create the folder for the records of this sweep's trials, and remove those of sweeps that have ended.

    A sweep holds a lock in its folder as long as it runs, on whatever machine. A folder without a lock file is left.
    """
    folder.mkdir(parents=True)
    with contextlib.suppress(OSError):  # a disk without locks keeps the folders of sweeps that were killed
        lock = _started.enter_context((folder / "new").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / "new").rename(folder / "lock")
    for other in folder.parent.iterdir():
        if other != folder and _is_abandoned(other):
            shutil.rmtree(other, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    """Tell whether no sweep holds the lock of a folder any more."""
    try:
        with (folder / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_composition(out: Path, composed: DictConfig, hydra_config: HydraConf) -> None:
    """Write how Hydra composed a run to ``.hydra`` in its folder, in the files that Hydra writes, without secrets."""
    folder = out / ".hydra"
    folder.mkdir(exist_ok=True)
    parts: dict[str, Any] = {"config": composed, "hydra": OmegaConf.create({"hydra": hydra_config})}
    for name, part in parts.items():
        public = redaction.redacted(cast("dict[str, Any]", OmegaConf.to_container(part, resolve=False)))
        OmegaConf.save(OmegaConf.create(public), folder / f"{name}.yaml")
    overrides = [trial.without_secrets(text) for text in hydra_config.overrides.task]
    OmegaConf.save(OmegaConf.create(overrides), folder / "overrides.yaml")


def _count_trials() -> str:
    """Return a line on how many trials of the sweep have scores, and which have none; empty where all have."""
    ended = _trials()
    failed = [trial.name for trial in ended if trial.failed]
    skipped = [trial.name for trial in ended if trial.skipped]
    kinds = [
        f"{len(names)} {kind}: {'; '.join(names)}"
        for kind, names in (("failed", failed), ("skipped", skipped))
        if names
    ]
    return f"trials     {len(ended)}, {', '.join(kinds)}" if kinds else ""


def end() -> list[trial.Trial]:
    """End the sweep, if there is one, and return how its trials ended."""
    _started.close()
    _servers.clear()
    if not trial.is_on():
        return []
    ended = _trials()
    shutil.rmtree(trial.shared()["folder"], ignore_errors=True)
    with contextlib.suppress(OSError):  # another sweep has its folder there
        Path(trial.shared()["folder"]).parent.rmdir()
    del os.environ[trial.VARIABLE]
    return ended


def _trials() -> list[trial.Trial]:
    """Return how the trials ended by their records; trials that were planned and left no record have failed."""
    recorded: dict[int, trial.Trial] = {}
    for path in Path(trial.shared()["folder"]).glob("*.json"):
        with contextlib.suppress(ValueError, OSError):  # the trial was killed while it wrote
            recorded[int(path.stem)] = trial.Trial(*json.loads(path.read_text(encoding="utf-8")))
    lost = {
        number: trial.Trial(name, EnvironmentFault.exit_code, reported=False) for number, name in enumerate(_planned)
    }
    return list((lost | recorded).values())
