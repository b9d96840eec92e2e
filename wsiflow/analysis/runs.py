"""Read finished runs for a comparison: their settings, their cost and the matches of their slides.

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
from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.evaluation.matches import EvaluationRecord, read_matches
from wsiflow.run import cases, tracking
from wsiflow.run.plan import latest_plan as latest_plan
from wsiflow.run.results import cost, record
from wsiflow.run.stages import ingest
from wsiflow.run.tracking import TrackingParams
from wsiflow.system import publish


class FinishedRun(NamedTuple):
    """A run that has scores and can be compared.

    Attributes:
        name: Name of the run in messages, unique in a comparison.
        where: Folder of the run, or its id in MLflow.
        identity: Identity of the run's folder, by which its record in MLflow is found; empty where it has none.
        sweep: Name of the sweep in MLflow that the run belongs to, or empty.
        params: Settings by dotted name.
        swept: What the sweep of the run varied, by the keys that were typed; empty for a run of no sweep.
        core_hours: Core-hours of everything that the run took; NaN where they are not known, as in former versions.
        line_core_hours: Core-hours of the line alone; NaN where they are not known.
        processor: CPU model that computed the heatmaps, or empty.
        matches: Matched lesions, scores and labels of the slides, as ``matches.json`` holds them.
        parent: Id of the parent run of the sweep in MLflow; empty for a single run, and for a folder.
    """

    name: str
    where: str
    identity: str
    sweep: str
    params: Mapping[str, str]
    swept: Mapping[str, str]
    core_hours: float
    line_core_hours: float
    processor: str
    matches: EvaluationRecord
    parent: str = ""


class RunSelection(NamedTuple):
    """Runs to compare, and sentences that say which runs were left out and why."""

    runs: Sequence[FinishedRun]
    notes: Sequence[str]


def holds_runs(folder: Path) -> bool:
    """Tell whether a folder, or a folder in it, has scores; else the name may be that of an MLflow experiment."""
    return folder.is_dir() and any(scores_folder(one) for one in (folder, *_subfolders(folder)))


def _subfolders(folder: Path) -> list[Path]:
    """Return the visible folders in a folder, in natural order; hidden ones hold the shared files of a sweep."""
    visible = (one for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
    return sorted(visible, key=lambda one: natural_key(one.name))


def runs_of_trials(folder: Path, failed: Collection[str]) -> RunSelection:
    """Return the runs below a sweep's folder that have scores, without the trials that failed.

    The folder of a failed trial may hold scores of an earlier start, which are out of date.

    Args:
        folder: The sweep's folder.
        failed: Names of the trials that failed; a mapping has their reasons as well.
    """
    below = _subfolders(folder) if folder.is_dir() else []
    selection = _select_scored([one for one in below if one.name not in failed])
    return selection._replace(notes=[*selection.notes, *failure_notes(failed)])


def failure_notes(failed: Collection[str]) -> list[str]:
    """Return a sentence for each trial without scores; ``failed`` may map the names to reasons."""
    reasons = failed if isinstance(failed, Mapping) else dict.fromkeys(failed, "")
    return [
        f"Left out, since it has no scores: {name}{': ' if reasons[name] else ''}{' '.join(reasons[name].split())}."
        for name in sorted(reasons, key=natural_key)
    ]


def _select_scored(folders: Sequence[Path]) -> RunSelection:
    scored = [one for one in folders if scores_folder(one)]
    unscored = [one.name for one in folders if not scores_folder(one) and publish.generations(one, "cases.json")]
    notes = [f"Left out, since not all of its slides have scores: {name}." for name in unscored]
    return RunSelection(_with_unique_names([_from_folder(one) for one in scored]), notes)


def runs_in_folders(folders: Sequence[Path]) -> RunSelection:
    """Return the runs of folders; each is the folder of a run or of an evaluation, or holds such folders.

    Raises:
        InputError: A folder does not exist, or holds no scored run.
    """
    runs: list[FinishedRun] = []
    notes: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            remedy = "name folders of runs, or one experiment of MLflow"
            raise InputError("there is no such folder", remedy, path=folder)
        is_run = scores_folder(folder) is not None
        selection = RunSelection([_from_folder(folder)], []) if is_run else _select_scored(_subfolders(folder))
        if not selection.runs:
            cause = "the folder holds no evaluation/matches.json"
            raise InputError(cause, "name the folders of finished runs", path=folder)
        runs += selection.runs
        notes += selection.notes
    return RunSelection(_with_unique_names(runs), notes)


def scores_folder(folder: Path) -> Path | None:
    """Return the folder that holds the scores of a run or an evaluation; None where they are missing or incomplete."""
    files = ("matches.json", "summary.json")  # a run killed between the two has no scores yet
    return next((one for one in (folder / "evaluation", folder) if all((one / name).is_file() for name in files)), None)


def _from_folder(root: Path) -> FinishedRun:
    folder = scores_folder(root) or root
    metrics = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    cases_path = ingest.newest_cases(root)
    params = {"run": root.name}
    if cases_path:
        plan, config = latest_plan(root), cases.read_cases(cases_path)[0]
        params = _texts(record.settings(config.model_dump(mode="json"), plan)) | record.digests(plan)
    elif (folder / "settings.json").is_file():
        params = _texts(json.loads((folder / "settings.json").read_text(encoding="utf-8")))
    return FinishedRun(
        name=root.name,
        where=str(root),
        identity=cases.folder_id(root),
        sweep="",
        params=params,
        swept=cases.swept(root),
        core_hours=_number(metrics.get(cost.TOTAL)),
        line_core_hours=_number(metrics.get(cost.LINE)),
        processor="; ".join(sorted(_processors(root))),
        matches=read_matches(folder / "matches.json"),
    )


def _processors(root: Path) -> set[str]:
    """Return the CPU models that computed the run's heatmaps, from the receipts."""
    names = (name for name in publish.receipt_names(root) if name.startswith("heatmaps/"))
    return {(publish.read_receipt(root, name) or {}).get("cpu", "") for name in names} - {""}


def runs_of_sweep(params: TrackingParams, tags: Mapping[str, str] | None = None) -> RunSelection:
    """Return the runs of a sweep from MLflow: of the sweep that ``params`` names, else of the experiment's only one.

    Where the experiment has no sweep, its single runs are returned.

    Args:
        params: The store, the experiment and the sweep: its name, its folder or the id of its parent run.
        tags: Tags of the runs to compare, by name, of whatever sweep; empty: the runs of the sweep.

    Raises:
        InputError: The experiment or the sweep does not exist, or there are several sweeps and none is named.
        EnvironmentFault: The store cannot be read.
    """
    tracked = tracking.tracked_runs(params, tags)
    chosen = tracked if tags else _of_one_sweep(params, tracked)
    if not chosen:
        asked = " and ".join(f"{name}={value}" for name, value in (tags or {}).items())
        remedy = "tag runs on their page in MLflow, or see their tags there"
        raise InputError(f"experiment {params.experiment} has no finished run with {asked}", remedy)
    with tempfile.TemporaryDirectory() as scratch:
        return RunSelection(_with_unique_names([_from_record(params, one, Path(scratch)) for one in chosen]), [])


def _of_one_sweep(params: TrackingParams, tracked: Sequence[tracking.TrackedRun]) -> list[tracking.TrackedRun]:
    """Return the runs of the sweep that is named, or of the only one.

    Raises:
        InputError: There is none, or there are several.
    """
    names = {one.parent: one.sweep for one in tracked if one.sweep}
    if params.sweep is None and not names:
        chosen = list(tracked)
    else:
        parents = [parent for parent in names if params.sweep in {None, *_names_of_sweep(parent, names, tracked)}]
        if len(parents) > 1:
            raise _ambiguous(params, {parent: names[parent] for parent in parents}, tracked)
        chosen = [one for one in tracked if one.sweep and [one.parent] == parents]
    if not chosen:
        known = ", ".join(sorted(set(names.values())))
        remedy = f"name one of its sweeps: {known}" if names else "it has no finished run: run one first"
        raise InputError(f"experiment {params.experiment} has no run of sweep {params.sweep}", remedy)
    return chosen


def _names_of_sweep(parent: str, names: Mapping[str, str], tracked: Sequence[tracking.TrackedRun]) -> set[str]:
    """Return what a sweep may be called: its name, the id of its parent run, and its folder."""
    return {names[parent], parent, _folder_of_sweep(parent, tracked)}


def _folder_of_sweep(parent: str, tracked: Sequence[tracking.TrackedRun]) -> str:
    return next((str(Path(one.tags.get("wsiflow.out", "")).parent) for one in tracked if one.parent == parent), "")


def _ambiguous(params: TrackingParams, names: Mapping[str, str], tracked: Sequence[tracking.TrackedRun]) -> InputError:
    """Return the error that names the sweeps of which one has to be chosen, by their folders where names are alike."""
    is_unique = len(set(names.values())) == len(names)
    shown = sorted(names.values()) if is_unique else sorted(_folder_of_sweep(parent, tracked) for parent in names)
    what = "sweeps and none is named" if params.sweep is None else f"sweeps of the name {params.sweep}"
    return InputError(
        f"experiment {params.experiment} has {len(names)} {what}", f"name one with --sweep: {', '.join(shown)}"
    )


def _from_record(params: TrackingParams, one: tracking.TrackedRun, scratch: Path) -> FinishedRun:
    folder = scratch / one.run_id
    folder.mkdir()
    files = tracking.download(params, one.run_id, ("matches.json", "summary.json", "settings.json"), folder)
    if "matches.json" not in files:
        cause = f"the MLflow run {one.run_id} ({one.name}) has no artifact matches.json"
        raise EnvironmentFault(cause, "delete the run in MLflow, or name folders of runs", stage="comparison")
    summary, settings = (_document(files.get(name)) for name in ("summary.json", "settings.json"))
    return FinishedRun(
        name=one.name,
        where=one.run_id,
        identity=folder_identity(one),
        sweep=one.sweep,
        # The records of earlier versions have all settings as parameters; now the artifact has them.
        params={
            **(_texts(settings) or one.params),
            **{key: one.tags[key] for key in ("digest.dataset", "digest.model") if key in one.tags},
        },
        swept=cases.parse_swept(one.tags.get("wsiflow.swept", "")),
        core_hours=_number(summary.get(cost.TOTAL, one.metrics.get(cost.TOTAL))),
        line_core_hours=_number(summary.get(cost.LINE, one.metrics.get(cost.LINE))),
        processor=one.tags.get("cpu.model", ""),
        matches=read_matches(files["matches.json"]),
        parent=one.parent,
    )


def _document(path: Path | None) -> dict[str, Any]:
    """Return the values of a JSON file; none where there is no file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path else {}


def folder_identity(one: tracking.TrackedRun) -> str:
    """Return the identity of the folder that a run in MLflow was recorded from; its run id where none is recorded."""
    return one.tags.get("wsiflow.folder", one.run_id)


def _with_unique_names(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """Return the runs, their place added to each name that several of them have."""
    names = [run.name for run in runs]
    return [run._replace(name=f"{run.name} ({run.where})") if names.count(run.name) > 1 else run for run in runs]


def _texts(settings: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in redaction.redacted(settings).items()}


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def tracking_params(uri: str, experiment: str, sweep: str | None) -> TrackingParams:
    """Return the parameters of ``conf/tracking/mlflow.yaml`` with another store, experiment and sweep."""
    text = (resources.files("wsiflow.conf") / "tracking/mlflow.yaml").read_text(encoding="utf-8")
    return TrackingParams.model_validate(yaml.safe_load(text) | {"uri": uri, "experiment": experiment, "sweep": sweep})


def natural_key(text: str) -> list[tuple[int, float, str]]:
    """Return a sort key that orders numbers in a text by value, so that ``stride=8`` comes before ``stride=16``."""
    parts = re.split(r"((?:(?<![\w.)])-)?\d+(?:\.\d+)?)", text)  # a sign is none behind a word
    return [(0, float(part), "") if place % 2 else (1, 0.0, part) for place, part in enumerate(parts) if part]
