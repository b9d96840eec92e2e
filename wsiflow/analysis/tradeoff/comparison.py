"""Compare runs and show the result: as files, in MLflow and on the console.

Input: the runs of a sweep from MLflow, or folders of runs. Output: ``compare.md``, ``compare.csv``, figures as PNG and
SVG, and ``report.html``. In MLflow the runs of the Pareto set are tagged, and the rest is logged to the sweep's parent.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from wsiflow.analysis.runs import (
    FinishedRun,
    RunSelection,
    failure_notes,
    folder_identity,
    holds_runs,
    runs_in_folders,
    runs_of_sweep,
    runs_of_trials,
    tracking_params,
)
from wsiflow.analysis.tradeoff import figures, report
from wsiflow.analysis.tradeoff.rows import Options, compare_runs
from wsiflow.analysis.tradeoff.values import SettingRow, Tradeoff, title
from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.run import tracking
from wsiflow.run.tracking import ComparedRun, ComparisonRecord, LogResult, TrackingParams
from wsiflow.system import publish, tables


def write_files(out: Path, tradeoff: Tradeoff) -> dict[str, bytes]:
    """Write every file of a comparison and return their bytes by name.

    Raises:
        EnvironmentFault: The folder cannot be written.
    """
    publish.preflight(out)
    pictures = figures.figures(tradeoff)
    files = {name: text.encode() for name, text in report.texts(tradeoff, pictures).items()}
    files |= {f"{name}.png": data for name, data in pictures.items()}
    files |= {f"{name}.svg": data for name, data in figures.figures(tradeoff, "svg").items()}
    for name, data in files.items():
        publish.write_view(out, name, data)
    return files


def log_to_mlflow(
    params: TrackingParams, folder: Path | None, runs: Sequence[FinishedRun], result: "ComparisonResult"
) -> LogResult:
    """Record a comparison in MLflow: mark the runs of the Pareto set and log the rest to the sweep's parent run.

    Args:
        params: Where the runs are recorded, and the name of their sweep.
        folder: Folder of the sweep; None where the runs come from MLflow.
        runs: The runs that were compared.
        result: The comparison, and the bytes of its files.
    """
    tradeoff = result.tradeoff
    if params.kind == "off":
        return LogResult(None, "tracking is off")
    identities = {run.where: run.identity for run in runs}
    rows = {identities[where]: row for row in tradeoff.rows for where in row.runs}
    try:
        tracked = [one for one in tracking.tracked_runs(params) if folder_identity(one) in rows]
    except (InputError, EnvironmentFault) as error:  # the comparison is complete on disk
        return LogResult(None, str(error))
    parents = {one.parent for one in tracked if one.parent}
    return tracking.log_comparison(
        params,
        ComparisonRecord(
            sweep_folder=str(folder or ""),
            parent=parents.pop() if len(parents) == 1 else "",
            runs={one.run_id: _compared(tradeoff, rows[folder_identity(one)]) for one in tracked},
            axes=list(tradeoff.rows[0].dotted),
            metrics=_metrics(tradeoff, len(runs)),
            tags={
                "wsiflow.metric": tradeoff.metric,
                "wsiflow.best": _best(tradeoff).name,
                "wsiflow.reference": tradeoff.reference,
                "wsiflow.pareto_set": "; ".join(row.name for row in tradeoff.pareto),
                "wsiflow.protocol_hash": tradeoff.protocol[1],
            },
            description=report.description(tradeoff, result.files),
            files={**result.files, "common.json": tables.json_text(tradeoff.common).encode()},
        ),
    )


def _compared(tradeoff: Tradeoff, row: SettingRow) -> ComparedRun:
    return ComparedRun(row.pareto, row.dotted, report.against(tradeoff, row))


def _best(tradeoff: Tradeoff) -> SettingRow:
    return max(tradeoff.rows, key=lambda row: np.nan_to_num(row.metrics[tradeoff.metric].value, nan=-1.0))


def _metrics(tradeoff: Tradeoff, n_runs: int) -> dict[str, float]:
    best = _best(tradeoff).metrics[tradeoff.metric]
    costs = [row.cost.mean for row in tradeoff.rows if math.isfinite(row.cost.mean)]
    return {
        "compare.n_settings": len(tradeoff.rows),
        "compare.n_runs": n_runs,
        "compare.n_pareto": len(tradeoff.pareto),
        "compare.best_score": report.rounded(best.value),
        "compare.best_score_ci_low": report.rounded(best.low),
        "compare.best_score_ci_high": report.rounded(best.high),
        "compare.reference_score": report.rounded(tradeoff.base.metrics[tradeoff.metric].value),
        "compare.least_core_hours": report.rounded(min(costs, default=math.nan)),
        "compare.most_core_hours": report.rounded(max(costs, default=math.nan)),
    }


_NO_TAGS: Mapping[str, str] = MappingProxyType({})


class Request(NamedTuple):
    """What a user wants to have compared.

    Attributes:
        folders: Folders of runs; empty where the runs of an MLflow experiment are compared.
        params: The MLflow experiment and the sweep in it; None where folders are given.
        options: How the runs are compared.
        tags: Tags that the runs of the experiment have, by name, of whatever sweep; empty: the runs of the sweep.
    """

    folders: Sequence[Path]
    params: TrackingParams | None
    options: Options
    tags: Mapping[str, str] = _NO_TAGS


def parse_request(
    names: Sequence[str], uri: str, sweep: str | None, options: Options, tags: Mapping[str, str] = _NO_TAGS
) -> Request:
    """Decide whether names mean folders of runs, or one experiment of the MLflow store at ``uri``."""
    folders = [Path(name) for name in names]
    if not tags and (len(folders) > 1 or holds_runs(folders[0])):
        return Request(folders, None, options)
    return Request([], tracking_params(uri, names[0], sweep), options, tags)


class ComparisonResult(NamedTuple):
    """A comparison whose files are written.

    Attributes:
        tradeoff: The comparison.
        out: Folder of its files.
        files: Bytes of the files by name.
        logged: What came of recording it in MLflow; None where the runs did not come from MLflow.
        params: Where it is recorded; None where the runs did not come from MLflow.
    """

    tradeoff: Tradeoff
    out: Path
    files: Mapping[str, bytes]
    logged: LogResult | None
    params: TrackingParams | None


def run_comparison(request: Request, out: Path) -> ComparisonResult:
    """Compare the requested runs and write the files to ``out``; a sweep from MLflow is also recorded there.

    Raises:
        InputError: A folder, experiment or sweep does not exist, or see `compare_runs`.
        EnvironmentFault: The store cannot be read, or the folder cannot be written.
    """
    if request.params is None:
        selection = runs_in_folders(request.folders)
        name = request.folders[0].name if len(request.folders) == 1 else out.name
        tradeoff = compare_runs(selection, name, request.options)
        return ComparisonResult(tradeoff, out, write_files(out, tradeoff), None, None)
    selection = runs_of_sweep(request.params, request.tags)
    sweeps = {(run.parent, run.sweep) for run in selection.runs}
    params = request.params.model_copy(update={"sweep": (len(sweeps) == 1 and sweeps.pop()[1]) or None})
    result = _compare(selection, params.sweep or params.experiment, request.options, out)
    return result._replace(logged=log_to_mlflow(params, None, selection.runs, result), params=params)


def compare_sweep_folder(
    out: Path, params: TrackingParams, options: Options, failed: Collection[str] = ()
) -> ComparisonResult | None:
    """Compare the runs below a sweep's folder, write the files there and record the comparison in MLflow.

    Args:
        out: The sweep's folder.
        params: Where the runs are recorded, and the name of their sweep.
        options: How the runs are compared.
        failed: Names of the trials that failed, which are left out whatever their folders hold; a mapping has their
            reasons as well.

    Returns:
        The comparison; None where fewer than two runs have scores.

    Raises:
        InputError: See `compare_runs`.
        EnvironmentFault: The folder cannot be written.
    """
    selection = runs_of_trials(out, failed)
    if len(selection.runs) < 2:
        return None
    result = _compare(selection, params.sweep or out.name, options, out)
    return result._replace(logged=log_to_mlflow(params, out, selection.runs, result), params=params)


def describe_sweep(out: Path, params: TrackingParams, reason: str, failed: Collection[str]) -> LogResult:
    """Say on the page of a sweep in MLflow why its runs were not compared, and which trials failed."""
    sentences = [f"The runs of this sweep were not compared: {reason}.", *failure_notes(failed)]
    return tracking.log_sweep(params, out, "\n\n".join(sentences))


def _compare(selection: RunSelection, name: str, options: Options, out: Path) -> ComparisonResult:
    tradeoff = compare_runs(selection, name, options)
    return ComparisonResult(tradeoff, out, write_files(out, tradeoff), None, None)


def summary_text(result: ComparisonResult) -> str:
    """Return the lines that a user sees once a comparison is done: Pareto set, files, and the record in MLflow."""
    tradeoff = result.tradeoff
    name = title(tradeoff.metric)
    lines = [f"compared   {len(tradeoff.rows)} settings with {tradeoff.reference}; Pareto set of {name}:"]
    lines += (
        [] if tradeoff.pareto else ["           none: no setting has a cost and a score that guessing does not reach"]
    )
    lines += [f"           {line}" for line in report.front(tradeoff)]
    lines += [
        f"margin     {row[0]}: {row[1]}, bound {row[2]}, {row[5]} slides" for row in report.verdict_rows(tradeoff)
    ]
    lines += [
        f"power      {row[0]}: {row[1]} now, {row[3]} slides for the difference, {row[5]} for the margin if equal"
        for row in report.power_rows(tradeoff)
    ]
    lines.append(f"comparison {result.out / 'report.html'}, compare.md, compare.csv, figures")
    if result.logged is not None and result.params is not None:
        lines += mlflow_lines(result.params, result.logged)
    return "\n".join(lines)


def mlflow_lines(params: TrackingParams, logged: LogResult) -> list[str]:
    """Return the lines that say where a sweep is seen in MLflow, or why it was not recorded."""
    lines = tracking.opening_lines(params, logged, sweep=True) if logged.run_id else [logged.reason]
    return [f"{'' if place else 'MLflow':11}{line}" for place, line in enumerate(lines)]
