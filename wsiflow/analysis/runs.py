"""Finished runs as a comparison needs them: settings, cost and what they are compared by.

Input: folders of runs, or an MLflow experiment. Output: `FinishedRun` values, ordered by folder name or by record.
"""

import json
import math
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from wsiflow import redaction
from wsiflow.errors import InputError
from wsiflow.evaluation.matches import EvaluationRecord, read_matches
from wsiflow.plan import plan
from wsiflow.run import cases, tracking
from wsiflow.run.results import record
from wsiflow.run.stages import ingest
from wsiflow.run.tracking import TrackingParams
from wsiflow.system import publish


class FinishedRun(NamedTuple):
    """One run that can be compared.

    Attributes:
        name: What messages call it.
        where: Its folder, or its id in MLflow.
        identity: What its record in MLflow is found by: of its folder; empty where it has none.
        sweep: Name of its sweep in MLflow, or empty.
        params: Its settings by dotted name.
        core_hours: What it cost; NaN where that is not known.
        processor: The CPU that computed it, or an empty text.
        matches: What it is compared by.
    """

    name: str
    where: str
    identity: str
    sweep: str
    params: Mapping[str, str]
    core_hours: float
    processor: str
    matches: EvaluationRecord


class RunSelection(NamedTuple):
    """Runs to compare, and what was left out and why."""

    runs: Sequence[FinishedRun]
    notes: Sequence[str]


def holds_runs(folder: Path) -> bool:
    """Tell whether there is something to compare in a folder: the same name may be that of an experiment."""
    return folder.is_dir() and any(scores_of(one) for one in (folder, *_below(folder)))


def _below(folder: Path) -> list[Path]:
    """Return the folders in a folder, but for those that hold what trials share and tell."""
    found = (one for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
    return sorted(found, key=lambda one: natural(one.name))


def trials_of(folder: Path, failed: Collection[str]) -> RunSelection:
    """Return the runs below a sweep's folder that have scores, but for trials that failed: those are not of now."""
    below = _below(folder) if folder.is_dir() else []
    lost = [one.name for one in below if one.name in failed]
    found = _found([one for one in below if one.name not in failed])
    return found._replace(notes=[*found.notes, *(f"Left out, since it failed: {name}." for name in lost)])


def _found(below: Sequence[Path]) -> RunSelection:
    scored = [one for one in below if scores_of(one)]
    unscored = [one.name for one in below if not scores_of(one) and publish.generations(one, "cases.json")]
    notes = [f"Left out, since not all of its slides have scores: {name}." for name in unscored]
    return RunSelection(_named_apart([_from_folder(one) for one in scored]), notes)


def in_folders(folders: Sequence[Path]) -> RunSelection:
    """Return the runs of folders: each a run's, an evaluation's, or one that holds such folders.

    Raises:
        InputError: A folder holds nothing that was scored.
    """
    runs: list[FinishedRun] = []
    notes: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(
                "there is no such folder", "name folders of runs, or one experiment of MLflow", path=folder
            )
        found = RunSelection([_from_folder(folder)], []) if scores_of(folder) else _found(_below(folder))
        if not found.runs:
            raise InputError("it holds no evaluation/matches.json", "name the folders of finished runs", path=folder)
        runs += found.runs
        notes += found.notes
    return RunSelection(_named_apart(runs), notes)


def scores_of(folder: Path) -> Path | None:
    """Return where a folder has its scores."""
    files = ("matches.json", "summary.json")  # a run that died between them has none yet
    return next((one for one in (folder / "evaluation", folder) if all((one / name).is_file() for name in files)), None)


def _from_folder(root: Path) -> FinishedRun:
    folder = scores_of(root) or root
    metrics = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    told = ingest.told(root)
    params = {"run": root.name}
    if told:
        made, values = plan.latest(root), json.loads(told.read_text(encoding="utf-8"))["config"]
        params = _texts(record.settings(values, made)) | record.digests(made)
    elif (folder / "settings.json").is_file():
        params = _texts(json.loads((folder / "settings.json").read_text(encoding="utf-8")))
    return FinishedRun(
        name=root.name,
        where=str(root),
        identity=cases.folder_id(root),
        sweep="",
        params=params,
        core_hours=_number(metrics.get("throughput.core_hours")),
        processor="; ".join(sorted(_processors(root))),
        matches=read_matches(folder / "matches.json"),
    )


def _processors(root: Path) -> set[str]:
    """Return the CPUs that the run's heatmaps came from."""
    names = (name for name in publish.receipt_names(root) if name.startswith("heatmaps/"))
    return {(publish.read_receipt(root, name) or {}).get("cpu", "") for name in names} - {""}


def of_sweep(params: TrackingParams) -> RunSelection:
    """Return the runs of a sweep that MLflow has: of the one that is named, or the experiment's only one.

    Runs that belong to no sweep are compared where there is none.

    Raises:
        InputError: There is no such experiment or sweep, or it has several sweeps and none is named.
        EnvironmentFault: The store cannot be read.
    """
    listed = tracking.tracked_runs(params)
    sweeps = sorted({one.sweep for one in listed if one.sweep})
    if params.sweep is None and len(sweeps) > 1:
        raise InputError(f"experiment {params.experiment} has {len(sweeps)} sweeps", f"--sweep: {', '.join(sweeps)}")
    wanted = params.sweep or next(iter(sweeps), "")
    chosen = [one for one in listed if one.sweep == wanted]
    if not chosen:
        known = f"it has the sweeps {', '.join(sweeps)}" if sweeps else "it has no finished run"
        raise InputError(f"experiment {params.experiment} has no run of sweep {params.sweep}", known)
    with tempfile.TemporaryDirectory() as passing:
        return RunSelection(_named_apart([_from_record(params, one, Path(passing)) for one in chosen]), [])


def _from_record(params: TrackingParams, one: tracking.TrackedRun, passing: Path) -> FinishedRun:
    folder = passing / one.run_id
    folder.mkdir()
    return FinishedRun(
        name=one.name,
        where=one.run_id,
        identity=identity(one),
        sweep=one.sweep,
        params={**one.params, **{key: one.tags[key] for key in ("digest.dataset", "digest.model") if key in one.tags}},
        core_hours=_number(one.metrics.get("throughput.core_hours")),
        processor=one.tags.get("cpu.model", ""),
        matches=read_matches(tracking.download(params, one.run_id, "matches.json", folder)),
    )


def identity(one: tracking.TrackedRun) -> str:
    """Return what stands for the folder that a record is of."""
    return one.tags.get("wsiflow.folder", one.run_id)


def _named_apart(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """Return the runs with names of their own."""
    names = [run.name for run in runs]
    return [run._replace(name=f"{run.name} ({run.where})") if names.count(run.name) > 1 else run for run in runs]


def _texts(settings: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in redaction.redacted(settings).items()}


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def store(uri: str, experiment: str, sweep: str | None) -> TrackingParams:
    """Return how to reach a store, as ``conf/tracking/mlflow.yaml`` says but for what is given."""
    text = (resources.files("wsiflow.conf") / "tracking/mlflow.yaml").read_text(encoding="utf-8")
    return TrackingParams.model_validate(yaml.safe_load(text) | {"uri": uri, "experiment": experiment, "sweep": sweep})


def natural(text: str) -> list[tuple[int, float, str]]:
    """Return a key by which 8 comes before 16."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(0, float(part), "") if place % 2 else (1, 0.0, part) for place, part in enumerate(parts) if part]
