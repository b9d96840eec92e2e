"""Prepare what the trials of a sweep share, name the trials, and learn how they ended.

Trials run one after another in this process, at once in processes of joblib, or as jobs of Slurm through submitit. They
share a parent run in MLflow and a Prefect server, and read from the environment what they have to know of the sweep.
Each trial records how it ended in a folder that belongs to this sweep alone; one that leaves no record has failed.
"""

import contextlib
import fcntl
import hashlib
import importlib
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import unicodedata
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf

from wsiflow import redaction
from wsiflow.errors import PARTIAL, EnvironmentFault, InputError
from wsiflow.run import cases, tracking
from wsiflow.run.config import RunConfig
from wsiflow.run.executor import jobs as array_jobs
from wsiflow.run.executor.kinds import KINDS
from wsiflow.system import exclusive, processes
from wsiflow.system.machine import cpu_supports_bf16
from wsiflow.system.usage import Spending

from . import logs, stopping, terminal

_VARIABLE = "WSIFLOW_SWEEP"
_RECORDS = ".trials"
_WRITTEN = "multirun.yaml"
_LONGEST_BYTES = 255  # of a name, on every common file system
_SHOWN_BYTES = 200  # of a name that is cut short
_UNSAFE = re.compile(r"[/\\?#%~]")  # ~ stands before the hash, so no plain name ends like a hashed one
_SECTION = re.compile(r"(?<![^,])[\w/@]+\.(?:[\w/@]+\.)*(?=[\w/@]+=)")  # inference. of inference.stride=56
_LIBRARIES = ("matplotlib.backends.backend_agg", "matplotlib.figure", "scipy.stats", "skimage.measure")
_started = ExitStack()
_planned: list[str] = []  # names of the trials by number, where the sweeper is Hydra's own
_servers: list[str] = []  # what was said of the server that the trials of this process share
# Sections whose overrides name a trial that differs from no other.
_SETTINGS = {"model", "geometry", "tissue", "tiles", "inference", "dense", "stain", "store", "lesions"}


class Trial(NamedTuple):
    """How a trial ended; one that left no record counts as a fault of the environment.

    Attributes:
        name: Name of the trial.
        exit_code: Its exit code.
        reason: Why it has no scores, where that is known.
        skipped: Whether it was not started, since this machine cannot do it.
        reported: Whether it has left a record.
    """

    name: str
    exit_code: int
    reason: str = ""
    skipped: bool = False
    reported: bool = True

    @property
    def failed(self) -> bool:
        """Whether the trial should have scores, and has none."""
        return self.exit_code not in {0, PARTIAL}


class TrialOverrides(NamedTuple):
    """Overrides of a trial, and those of them that differ from trial to trial."""

    overrides: list[str]
    swept: list[str]


class SweepCallback(Callback):
    """Functions that Hydra calls before the first trial and after the last."""

    def on_multirun_start(self, config: DictConfig, **_kwargs: Any) -> None:
        """Prepare what the trials share, before they would compete for it."""
        values: Any = OmegaConf.to_container(config, resolve=False)
        overrides, sweeper = values["hydra"]["overrides"]["task"], values["hydra"]["sweeper"]
        axes = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        out = Path(config.out).absolute()
        folder = out / _RECORDS / uuid.uuid4().hex
        name = name_of(config.tracking.sweep, config.name, out)
        shared: dict[str, Any] = {"name": name, "out": str(out), "folder": str(folder), "pid": os.getpid()}
        _planned.clear()
        os.environ[_VARIABLE] = json.dumps({**shared, "overrides": overrides, "alike": []})
        jobs = _jobs_or_none(overrides, axes)
        alike = sorted(_alike(one for job in jobs for one in job.swept))
        is_basic = is_grid(sweeper)
        count = len(jobs) if is_basic else sweeper.get("n_trials", 0)
        shared |= {"overrides": [*axes, *overrides], "alike": alike, "count": count}
        os.environ[_VARIABLE] = json.dumps(shared)
        if is_basic:
            _planned.extend(_name_of_job(job.swept, job.overrides) or str(number) for number, job in enumerate(jobs))
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
    named = tracking.TrackingParams.model_validate({**params, "sweep": name()})
    asked: Any = OmegaConf.to_container(config.compare, resolve=True)
    options = rows.Options(
        resamples=config.evaluation.bootstrap, seed=config.seed, **asked | {"families": asked["families"] or {}}
    )
    failed = {
        trial.name: f"skipped: {trial.reason}" if trial.skipped else trial.reason
        for trial in _trials()
        if trial.failed or trial.skipped
    }
    compare_sweep(folder(), named, options, failed)


def _start_shared(params: Mapping[str, Any], *, prefect: bool) -> None:
    """Start once the Prefect server and the MLflow record that trials which run at the same time would each start."""
    from .server import chosen_server

    if prefect:
        logs.note(f"{_started.enter_context(chosen_server())}, for all trials")
    logged = tracking.begin_sweep(tracking.TrackingParams.model_validate(params), folder())
    if logged.run_id is None and params["kind"] != "off":
        logs.note(f"MLflow: {logged.reason}", logging.WARNING)


def start_server(own: ExitStack) -> None:
    """Make sure that a Prefect server answers until the sweep ends, or where there is none until ``own`` is closed."""
    from .server import chosen_server

    if _servers:
        return
    is_shared = is_on() and not is_of_another_process()
    stack = _started if is_shared else own
    server = stack.enter_context(ExitStack())
    message = server.enter_context(chosen_server())
    stack.enter_context(stopping.at_stop(server.close, last=True))  # runs are shown as cancelled before
    logs.note(f"{message}, for all trials" if is_shared else message)
    if is_shared:
        _servers.append(message)


def name_of(configured: str | None, run: str, out: Path) -> str:
    """Return the name of a sweep: the configured one, else that of its runs, or of its folder where these have none."""
    return configured or (run if run != "run" else out.name)


def name() -> str:
    """Return the name of the trials' parent in MLflow, empty where there is no sweep."""
    return str(_shared()["name"]) if is_on() else ""


def folder() -> Path:
    """Return the folder of the sweep, which holds a folder for each trial."""
    return Path(_shared()["out"])


# --- the trials and their names


def title(config: RunConfig) -> str:
    """Return a name for a run that tells it from others: of a trial its number and what was swept."""
    if not is_on():
        return config.name
    total = _shared()["count"]
    return trial_title(HydraConfig.get().job.num + 1, total, config.out.name)


def trial_title(number: int, total: int, name: str) -> str:
    """Return how a trial is shown, such as ``trial 2 of 4: stride=56``; 0 in all where that is not known."""
    return f"{_place(number, total)}: {_SECTION.sub('', name)}"


def _place(number: int, total: int) -> str:
    return f"trial {number} of {total}" if total else f"trial {number}"


def jobs(overrides: Sequence[str], axes: Sequence[str] = ()) -> list[TrialOverrides]:
    """Return the trials into which Hydra's sweeper splits overrides, in its order.

    Args:
        overrides: The overrides that were typed.
        axes: Overrides of the chosen experiment; one that was typed replaces that of the same key.

    Raises:
        HydraException: An override cannot be parsed.
        InputError: The folder of the sweep is an axis, or an axis names no finite list of values.
    """
    texts, by_key, swept = [*axes, *overrides], dict[str, list[str]](), dict[str, None]()
    for text, override in zip(texts, OverridesParser.create().parse_overrides(texts), strict=True):
        key = override.get_key_element()
        swept.pop(key, None)
        by_key[key] = [text]
        if override.is_sweep_override():
            if not override.is_discrete_sweep():
                raise InputError(f"{text} names no values", f"list them: {key}=1,2,3", stage="configuration")
            by_key[key], swept[key] = [f"{key}={value}" for value in override.sweep_string_iterator()], None
    if "out" in swept:
        _refuse_out()
    varied = [key in swept for key in by_key]
    return [
        TrialOverrides(list(job), [text for text, varies in zip(job, varied, strict=True) if varies])
        for job in itertools.product(*by_key.values())
    ]


def fixed(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that are the same for every trial."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [text for text, override in zip(overrides, parsed, strict=True) if not override.is_sweep_override()]


def _jobs_or_none(overrides: Sequence[str], axes: Sequence[str]) -> list[TrialOverrides]:
    """Return the trials, or none where overrides are wrong: Hydra's own sweeper then raises the error."""
    try:
        return jobs(overrides, axes)
    except (HydraException, InputError, AssertionError):  # the last for choices that a pattern names
        return []


def _refuse_out() -> None:
    raise InputError(
        "out is the folder of the whole sweep", "give one out=, in which each trial has a folder", stage="sweep"
    )


def trial_name(overrides: Sequence[str]) -> str:
    """Return the name of a trial: the overrides that differ from trial to trial, such as ``inference.stride=32``."""
    return _name_of_job(_swept(overrides), overrides)


def _name_of_job(swept: Sequence[str], overrides: Sequence[str]) -> str:
    """Return the name of a trial; one that differs from no other trial is named after its settings, or not at all."""
    named_by = swept or [text for text in overrides if re.split("[.=]", text.lstrip("+"))[0] in _SETTINGS]
    return folder_name(named_by, _shared()["alike"])


def heading(number: int, name: str) -> str:
    """Return the words that say which trial of the sweep something is about, such as ``trial 2 of 4: stain=none``."""
    return f"{_place(number + 1, _shared()['count'])}: {name}"


def is_grid(sweeper: Mapping[str, Any]) -> bool:
    """Tell whether a sweeper is Hydra's own, which runs every combination of the values that are listed."""
    return str(sweeper["_target_"]).endswith(".BasicSweeper")


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


def claim(root: Path, swept: Sequence[str]) -> None:
    """Claim a folder for a trial, so that no other trial uses it, even where a disk takes their names for one.

    Raises:
        InputError: Another trial has the folder.
    """
    path, text = root / cases.CLAIM, _without_secrets(",".join(swept))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    draft.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(FileExistsError):  # the folder is claimed
        exclusive.give_name(draft, path)
    draft.unlink(missing_ok=True)
    owner = path.read_bytes().decode("utf-8", "surrogatepass")
    if owner != text:
        cause = f"the folder belongs to the trial {owner!r}, this one is {text!r}"
        raise InputError(cause, "choose another out= folder", stage="sweep", path=root)


def prepare_process() -> None:
    """Prepare a process of joblib for a trial: it ends with its sweep, and may start processes of its own.

    It would outlive a sweep that is killed. Its way of starting processes is not known to those that it starts, which
    would die of that, so that the usual way takes its place.
    """
    if _shared().get("pid") == os.getppid():
        processes.end_with(os.getppid())
    if is_of_another_process():
        Spending.started_for_runs()
    if multiprocessing.get_start_method(allow_none=True) not in {None, *multiprocessing.get_all_start_methods()}:
        multiprocessing.set_start_method("spawn", force=True)


def load_libraries(config: RunConfig) -> None:
    """Import what the first trial of this process would import later: to its start, which every trial is charged."""
    if is_on():
        tracked = ["mlflow"] if config.tracking.kind == "mlflow" else []
        inside = ["torch", "torch.export", "openvino"] if config.executor.kind == "inline" else []
        for library in (*_LIBRARIES, *tracked, *inside):
            importlib.import_module(library)


def claim_own(root: Path, overrides: Sequence[str]) -> None:
    """Claim a folder for the trial of this process; see `claim`."""
    claim(root, _swept(overrides))


def _swept(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a trial that differ from trial to trial."""
    typed = dict(_parsed(_shared()["overrides"]))  # of a key that was typed twice the last one counts
    swept = [
        text
        for text, (key, value) in zip(overrides, _parsed(overrides), strict=True)
        if key not in typed or typed[key] != value
    ]
    if any(text.startswith("out=") for text in swept):
        _refuse_out()
    return swept


def _parsed(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """Return key and value of overrides, since Hydra quotes values of a trial differently than they were typed."""
    return [
        (override.get_key_element(), override.value())
        for override in OverridesParser.create().parse_overrides(list(overrides))
    ]


def named(trials: Sequence[TrialOverrides]) -> dict[str, TrialOverrides]:
    """Return trials by the names of their folders, which differ on every disk."""
    alike = _alike(text for trial in trials for text in trial.swept)
    return {folder_name(trial.swept, alike): trial for trial in trials}


def _alike(texts: Iterator[str]) -> set[str]:
    """Return the texts that a disk may take for another one, but for the one of each kind that keeps its name."""
    by_form: dict[str, set[str]] = {}
    for text in texts:
        by_form.setdefault(unicodedata.normalize("NFKC", text).casefold(), set()).add(text)
    return {text for members in by_form.values() for text in sorted(members, reverse=True)[1:]}


def folder_name(swept: Sequence[str], alike: Collection[str] = ()) -> str:
    """Return the name of a trial's folder: its overrides, with a hash where these are unsafe, too long or ambiguous.

    Args:
        swept: The overrides.
        alike: Overrides of the sweep that a disk may take for others.
    """
    plain = ",".join(swept)
    public = redaction.without_secrets(plain)
    if public == plain and _is_safe(plain) and not any(text in alike for text in swept):
        return plain
    safe = _UNSAFE.sub("_", public.replace(redaction.REDACTED, "redacted"))
    printable = "".join(character if character.isprintable() else "_" for character in safe)
    return f"{printable.encode()[:_SHOWN_BYTES].decode(errors='ignore')}~{_digest(plain)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:10]


def _without_secrets(text: str) -> str:
    """Return a text without its secrets, followed by a hash where it has any."""
    public = redaction.without_secrets(text)
    return text if public == text else f"{public}~{_digest(text)}"


def _is_safe(plain: str) -> bool:
    """Tell whether a text names one and the same folder on every disk."""
    return (
        plain.isprintable()
        and not _UNSAFE.search(plain)
        and plain == plain.strip(" .")
        and plain == unicodedata.normalize("NFC", plain)
        and len(plain.encode()) <= _LONGEST_BYTES
    )


# --- how the trials ended


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


def record_end(number: int, trial: Trial) -> None:
    """Record how a trial ended; one that cannot, since the sweep has ended or the disk is full, counts as failed."""
    with contextlib.suppress(OSError):
        (Path(_shared()["folder"]) / f"{number}.json").write_text(json.dumps(trial), encoding="utf-8")


def write_composition(out: Path, composed: DictConfig, hydra_config: HydraConf) -> None:
    """Write how Hydra composed a run to ``.hydra`` in its folder, in the files that Hydra writes, without secrets."""
    folder = out / ".hydra"
    folder.mkdir(exist_ok=True)
    parts: dict[str, Any] = {"config": composed, "hydra": OmegaConf.create({"hydra": hydra_config})}
    for name, part in parts.items():
        public = redaction.redacted(cast("dict[str, Any]", OmegaConf.to_container(part, resolve=False)))
        OmegaConf.save(OmegaConf.create(public), folder / f"{name}.yaml")
    overrides = [_without_secrets(text) for text in hydra_config.overrides.task]
    OmegaConf.save(OmegaConf.create(overrides), folder / "overrides.yaml")


def _count_trials() -> str:
    """Return a line on how many trials of the sweep have scores, and which have none; empty where all have."""
    trials = _trials()
    failed = [trial.name for trial in trials if trial.failed]
    skipped = [trial.name for trial in trials if trial.skipped]
    kinds = [
        f"{len(names)} {kind}: {'; '.join(names)}"
        for kind, names in (("failed", failed), ("skipped", skipped))
        if names
    ]
    return f"trials     {len(trials)}, {', '.join(kinds)}" if kinds else ""


def is_on() -> bool:
    """Tell whether this process belongs to a sweep."""
    return _VARIABLE in os.environ


def is_of_another_process() -> bool:
    """Tell whether another process drives the sweep of this trial, so that other trials may run at the same time."""
    return is_on() and _shared()["pid"] != os.getpid()


def end() -> list[Trial]:
    """End the sweep, if there is one, and return how its trials ended."""
    _started.close()
    _servers.clear()
    if not is_on():
        return []
    trials = _trials()
    shutil.rmtree(_shared()["folder"], ignore_errors=True)
    with contextlib.suppress(OSError):  # another sweep has its folder there
        Path(_shared()["folder"]).parent.rmdir()
    del os.environ[_VARIABLE]
    return trials


def _trials() -> list[Trial]:
    """Return how the trials ended by their records; trials that were planned and left no record have failed."""
    recorded: dict[int, Trial] = {}
    for path in Path(_shared()["folder"]).glob("*.json"):
        with contextlib.suppress(ValueError, OSError):  # the trial was killed while it wrote
            recorded[int(path.stem)] = Trial(*json.loads(path.read_text(encoding="utf-8")))
    lost = {number: Trial(name, EnvironmentFault.exit_code, reported=False) for number, name in enumerate(_planned)}
    return list((lost | recorded).values())


def _shared() -> dict[str, Any]:
    shared: dict[str, Any] = json.loads(os.environ[_VARIABLE])
    return shared
