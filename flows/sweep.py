"""What the trials of a sweep share: their parent in MLflow, a Prefect server, and who hears how they ended.

Trials run one after another in this process, at once in processes of joblib, or as jobs of Slurm through submitit. What
they have to know reaches them through the environment. Each leaves word of how it ended in a folder of this sweep
alone; one that leaves none has failed.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import unicodedata
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from wsiflow import redaction
from wsiflow.analysis.tradeoff import comparison
from wsiflow.errors import PARTIAL, EnvironmentFault, InputError
from wsiflow.run import ledger, tracking
from wsiflow.run.executor import jobs as array_jobs
from wsiflow.system import processes

from . import logs, stopping

_VARIABLE = "WSIFLOW_SWEEP"
_MARKS = ".trials"
_WRITTEN = "multirun.yaml"
_CLAIM = "receipts/trial"
_LONGEST_BYTES = 255  # of a name, on any file system in use
_SHOWN_BYTES = 200  # of a name that is cut short
_UNSAFE = re.compile(r"[/\\?#%~]")  # ~ stands before the hash, so no plain name ends like a hashed one
_started = ExitStack()
_planned: list[str] = []  # names of the trials by number, where the sweeper is Hydra's own


class Trial(NamedTuple):
    """How a trial ended; without a word of it, as a fault of the environment."""

    name: str
    exit_code: int
    told: bool = True

    @property
    def failed(self) -> bool:
        """It has no scores."""
        return self.exit_code not in {0, PARTIAL}


class TrialOverrides(NamedTuple):
    """A trial to be: its overrides, and those of them that differ from trial to trial."""

    overrides: list[str]
    swept: list[str]


class SweepCallback(Callback):
    """What Hydra calls before the first trial and after the last."""

    def on_multirun_start(self, config: DictConfig, **_kwargs: Any) -> None:
        """Prepare what trials would get into each other's way with."""
        values: Any = OmegaConf.to_container(config, resolve=False)
        given, sweeper = values["hydra"]["overrides"]["task"], values["hydra"]["sweeper"]
        axes = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        out = Path(config.out).absolute()
        folder = out / _MARKS / uuid.uuid4().hex
        name = name_of(config.tracking.sweep, config.name, out)
        shared = {"name": name, "out": str(out), "folder": str(folder), "pid": os.getpid()}
        _planned.clear()
        os.environ[_VARIABLE] = json.dumps({**shared, "given": given, "alike": []})
        jobs = _jobs_or_none(given, axes)
        alike = sorted(_alike(one for job in jobs for one in job.swept))
        os.environ[_VARIABLE] = json.dumps({**shared, "given": [*axes, *given], "alike": alike})
        if sweeper["_target_"].endswith(".BasicSweeper"):
            _planned.extend(folder_name(job.swept, alike) or str(number) for number, job in enumerate(jobs))
        _make_marks(folder)
        if _is_secret(values):
            (out / _WRITTEN).touch(mode=0o600)
            (out / _WRITTEN).chmod(0o600)
        _started.enter_context(
            stopping.telling(lambda: ledger.summary(one.parent for one in _files_of_trials(out, "plan.json")))
        )
        launcher = config.hydra.runtime.choices["hydra/launcher"]
        if launcher != "basic":
            at_slurm = launcher == "submitit_slurm"
            _started.enter_context(stopping.at_stop(lambda: _end_trials(out, at_slurm=at_slurm)))
            params: Any = OmegaConf.to_container(config.tracking, resolve=True)
            _begin_together({**params, "sweep": shared["name"]}, prefect=config.orchestrator == "prefect")

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


def _files_of_trials(folder: Path, name: str) -> list[Path]:
    """Return the files of a name that trials of a sweep have."""
    return sorted(folder.glob(f"*/{name}"))


def _end_trials(folder: Path, *, at_slurm: bool) -> str | None:
    """End trials that run in processes or jobs of their own, and the array jobs that they submitted."""
    stopping.kill_descendants()  # or they would submit what is cancelled once more
    ids = sorted({path.name.partition("_")[0] for path in folder.glob(".submitit/*_*")}) if at_slurm else []
    if ids:
        array_jobs.call(["scancel", *ids])
    submitting = [
        log.parent for log in _files_of_trials(folder, array_jobs.LOG) if array_jobs.JobLog(log.parent).read().jobs
    ]
    cancelled = sum(len(array_jobs.cancel(root)) - 1 for root in submitting)
    told = ["the trials' Slurm jobs"] * bool(ids) + [f"{cancelled} array jobs"] * bool(cancelled)
    return f"{' and '.join(told)} cancelled" if told else None


def _compare(config: DictConfig) -> None:
    """Compare the trials that have scores, in the sweep's folder."""
    from .comparing import compare_sweep

    params: Any = OmegaConf.to_container(config.tracking, resolve=True)
    named = tracking.TrackingParams.model_validate({**params, "sweep": name()})
    options = comparison.Options(resamples=config.evaluation.bootstrap, seed=config.seed)
    failed = {trial.name for trial in _trials() if trial.failed}
    compare_sweep(folder(), named, options, failed)


def _begin_together(params: Mapping[str, Any], *, prefect: bool) -> None:
    """Start and make, once, what trials that run at the same time would all start and make."""
    from .server import chosen_server

    if prefect:
        logs.note(f"{_started.enter_context(chosen_server())}, for all trials")
    why_not = tracking.begin_sweep(tracking.TrackingParams.model_validate(params))
    if why_not:
        logs.note(f"MLflow: {why_not}", logging.WARNING)


def name_of(given: str | None, run: str, out: Path) -> str:
    """Return the name of a sweep: as it was given, else the runs' own, or that of its folder where they have none."""
    return given or (run if run != "run" else out.name)


def name() -> str:
    """Return the name of the trials' parent in MLflow, empty where there is no sweep."""
    return str(_shared()["name"]) if is_on() else ""


def folder() -> Path:
    """Return the folder of the sweep, which has one for each trial."""
    return Path(_shared()["out"])


# --- what trials there are, and what they are called


def jobs(given: Sequence[str], axes: Sequence[str] = ()) -> list[TrialOverrides]:
    """Return the trials that Hydra's sweeper makes of overrides, in its order.

    Args:
        given: The overrides.
        axes: Overrides of the chosen experiment; what is given replaces those of the same key.

    Raises:
        HydraException: An override cannot be parsed.
        InputError: The folder of the sweep is an axis, or an axis has no end.
    """
    texts, by_key, swept = [*axes, *given], dict[str, list[str]](), dict[str, None]()
    for text, one in zip(texts, OverridesParser.create().parse_overrides(texts), strict=True):
        key = one.get_key_element()
        swept.pop(key, None)
        by_key[key] = [text]
        if one.is_sweep_override():
            if not one.is_discrete_sweep():
                raise InputError(f"{text} names no values", f"list them: {key}=1,2,3", stage="configuration")
            by_key[key], swept[key] = [f"{key}={value}" for value in one.sweep_string_iterator()], None
    if "out" in swept:
        _refuse_out()
    varied = [key in swept for key in by_key]
    return [
        TrialOverrides(list(job), [text for text, varies in zip(job, varied, strict=True) if varies])
        for job in itertools.product(*by_key.values())
    ]


def fixed(given: Sequence[str]) -> list[str]:
    """Return the overrides that are the same for every trial."""
    parsed = OverridesParser.create().parse_overrides(list(given))
    return [text for text, one in zip(given, parsed, strict=True) if not one.is_sweep_override()]


def _jobs_or_none(given: Sequence[str], axes: Sequence[str]) -> list[TrialOverrides]:
    """Return the trials as far as they are known beforehand: what is wrong is told by who runs them."""
    try:
        return jobs(given, axes)
    except (HydraException, InputError, AssertionError):  # the last: choices by a pattern of names
        return []


def _refuse_out() -> None:
    raise InputError("out is the folder of the whole sweep", "give one out=, trials have folders in it", stage="sweep")


def trial_name(overrides: Sequence[str]) -> str:
    """Return the name of a trial: the overrides that differ from trial to trial, such as ``inference.stride=32``."""
    return folder_name(_own(overrides), _shared()["alike"])


def claim(root: Path, swept: Sequence[str]) -> None:
    """See that a trial's folder is no other trial's, whatever their names became on this disk.

    Raises:
        InputError: Another trial has the folder.
    """
    path, text = root / _CLAIM, _kept(",".join(swept))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    draft.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        os.link(draft, path)
    except OSError:  # it is claimed, or there are no links here
        if not path.exists():
            draft.replace(path)
    draft.unlink(missing_ok=True)
    found = path.read_bytes().decode("utf-8", "surrogatepass")
    if found != text:
        cause = f"the folder is that of the trial {found!r}, this one is {text!r}"
        raise InputError(cause, "choose another out= folder", stage="sweep", path=root)


def end_with_it() -> None:
    """Let a trial in a process that the sweep started end with it: joblib's go on for ever when the sweep is killed."""
    if _shared().get("pid") == os.getppid():
        processes.end_with(os.getppid())


def claim_own(root: Path, overrides: Sequence[str]) -> None:
    """Claim a folder for the trial of this process, see `claim`."""
    claim(root, _own(overrides))


def _own(overrides: Sequence[str]) -> list[str]:
    given = _meant(_shared()["given"])
    own = [text for text, meant in zip(overrides, _meant(overrides), strict=True) if meant not in given]
    if any(text.startswith("out=") for text in own):
        _refuse_out()
    return own


def _meant(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """Return key and value of overrides: Hydra writes values otherwise for a trial than they were given (quotes)."""
    return [(one.get_key_element(), one.value()) for one in OverridesParser.create().parse_overrides(list(overrides))]


def named(found: Sequence[TrialOverrides]) -> dict[str, TrialOverrides]:
    """Return trials by the name of their folders, no two of which are one on any disk."""
    alike = _alike(one for job in found for one in job.swept)
    return {folder_name(job.swept, alike): job for job in found}


def _alike(texts: Iterator[str]) -> set[str]:
    """Return the texts that a disk may take for another one, which is left out: it keeps its name."""
    by_form: dict[str, set[str]] = {}
    for text in texts:
        by_form.setdefault(unicodedata.normalize("NFKC", text).casefold(), set()).add(text)
    return {text for members in by_form.values() for text in sorted(members, reverse=True)[1:]}


def folder_name(swept: Sequence[str], alike: Collection[str] = ()) -> str:
    """Return overrides as the name of a folder: as they are, or with a hash where that is unsafe, long or ambiguous.

    Args:
        swept: The overrides.
        alike: Those that a disk may take for others of the sweep.
    """
    plain = ",".join(swept)
    told = redaction.without_secrets(plain)
    if told == plain and _is_safe(plain) and not any(one in alike for one in swept):
        return plain
    plainly = _UNSAFE.sub("_", told.replace(redaction.REDACTED, "redacted"))
    shown = "".join(one if one.isprintable() else "_" for one in plainly)
    return f"{shown.encode()[:_SHOWN_BYTES].decode(errors='ignore')}~{_digest(plain)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:10]


def _kept(text: str) -> str:
    """Return a text as a file may hold it: with a hash in the place of its secrets."""
    told = redaction.without_secrets(text)
    return text if told == text else f"{told}~{_digest(text)}"


def _is_safe(plain: str) -> bool:
    """Tell whether a text names one folder, and the same one, on any disk."""
    return (
        plain.isprintable()
        and not _UNSAFE.search(plain)
        and plain == plain.strip(" .")
        and plain == unicodedata.normalize("NFC", plain)
        and len(plain.encode()) <= _LONGEST_BYTES
    )


# --- how they ended


def _make_marks(folder: Path) -> None:
    """Make this sweep's own folder of marks, and remove those of sweeps that are gone.

    A sweep holds a lock in its folder as long as it lives, on whatever machine; a folder without one is not judged.
    """
    folder.mkdir(parents=True)
    with contextlib.suppress(OSError):  # a disk without locks keeps what dead sweeps leave
        lock = _started.enter_context((folder / "new").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / "new").rename(folder / "lock")
    for other in folder.parent.iterdir():
        if other != folder and _is_left(other):
            shutil.rmtree(other, ignore_errors=True)


def _is_left(folder: Path) -> bool:
    try:
        with (folder / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def ended(number: int, name: str, exit_code: int) -> None:
    """Leave word of how a trial ended; where nobody waits for it any more, there is nowhere to leave it."""
    with contextlib.suppress(FileNotFoundError):
        (Path(_shared()["folder"]) / f"{number}.json").write_text(json.dumps([name, exit_code]), encoding="utf-8")


def is_on() -> bool:
    """Tell whether there is a sweep."""
    return _VARIABLE in os.environ


def is_of_another_process() -> bool:
    """Tell whether this process does a trial of a sweep that another one drives: others may run at the same time."""
    return is_on() and _shared()["pid"] != os.getpid()


def end() -> list[Trial]:
    """End the sweep, if there is one, and return how its trials ended."""
    _started.close()
    if not is_on():
        return []
    found = _trials()
    shutil.rmtree(_shared()["folder"], ignore_errors=True)
    with contextlib.suppress(OSError):  # another sweep has its marks there
        Path(_shared()["folder"]).parent.rmdir()
    del os.environ[_VARIABLE]
    return found


def _trials() -> list[Trial]:
    """Return how the trials ended, as far as they left word; those that were planned and left none have failed."""
    told: dict[int, Trial] = {}
    for path in Path(_shared()["folder"]).glob("*.json"):
        with contextlib.suppress(ValueError, OSError):  # torn: it was killed as it wrote
            told[int(path.stem)] = Trial(*json.loads(path.read_text(encoding="utf-8")))
    lost = {number: Trial(name, EnvironmentFault.exit_code, told=False) for number, name in enumerate(_planned)}
    return list((lost | told).values())


def _shared() -> dict[str, Any]:
    shared: dict[str, Any] = json.loads(os.environ[_VARIABLE])
    return shared
