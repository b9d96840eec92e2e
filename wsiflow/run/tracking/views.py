"""What MLflow's pages show when they are opened by our links: columns, order and charts, saved with the experiment.

Input: an experiment, and the settings that differ in a sweep. Output: tags of the experiment, and links.

MLflow keeps a *shared view* in the tag ``mlflow.sharedViewState.<key>`` of the experiment: a JSON object whose
``state`` is the state of the page, compressed. The form is not documented. A version of MLflow that ignores the tag
opens the same page with its own columns, so nothing is lost.
"""

import base64
import json
import shlex
import shutil
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from wsiflow.redaction import without_secrets
from wsiflow.run.tracking.records import LogResult
from wsiflow.run.tracking.store import TrackingParams

EXPERIMENT = "wsiflow"
"""Key of the view of all runs of an experiment."""

COLOUR = "mlflow.runColor"
"""Tag with the colour of a run in MLflow's tables and charts."""
FRONT, BEATEN = "#c2571a", "#8a939c"
"""Colours of runs that belong to the Pareto set, and of those that do not."""

PARETO, AGAINST, FROC, AUC = "wsiflow.pareto", "wsiflow.against_reference", "froc.interval", "auc.interval"
"""Tags that are columns of the views."""

_FIRST = ("1", "attributes.`Run Name`", "runDateAndNestInfo")  # MLflow's names of its first columns
_COST, _LINE_COST = "cost.total_core_hours", "throughput.core_hours"
_WIDTHS = {
    _FIRST[1]: 220,
    _FIRST[2]: 130,
    "metrics.`froc.score`": 90,
    f"metrics.`{_COST}`": 170,
    f"metrics.`{_LINE_COST}`": 170,
    f"tags.`{FROC}`": 120,
    f"tags.`{PARETO}`": 115,
    f"tags.`{AGAINST}`": 380,
    f"tags.`{AUC}`": 120,
}
_SECTION = "wsiflow"
_PORT = 5000
_WORKFLOW = "machine_learning"  # without it MLflow opens its pages for language models
_MAIN = ("inference.stride", "inference.precision", "stain.method", "model.card")


def key_of_sweep(parent: str) -> str:
    """Return the key of the view of a sweep, by the id of its parent run."""
    return f"sweep-{parent[:12]}"


def tag(key: str, *, name: str = "", axes: Sequence[str] = _MAIN, parent: str = "") -> tuple[str, str]:
    """Return name and value of the experiment's tag that holds a view.

    Args:
        key: Key of the view, which links name.
        name: Name of the view in MLflow's list of views; empty: its key.
        axes: Settings that are columns, by dotted name.
        parent: Id of the sweep's parent run, whose runs alone are shown; empty for all runs.
    """
    packed = base64.b64encode(zlib.compress(json.dumps(_state(axes, parent)).encode())).decode()
    now_ms = int(time.time() * 1000)
    view = {"name": name or key, "createdAt": now_ms, "updatedAt": now_ms, "state": f"deflate;{packed}"}
    return f"mlflow.sharedViewState.{key}", json.dumps(view)


def _state(axes: Sequence[str], parent: str) -> dict[str, Any]:
    """Return the state of MLflow's page of runs."""
    froc, auc, cost, line_cost = (f"metrics.`{name}`" for name in ("froc.score", "roc.auc", _COST, _LINE_COST))
    froc_interval, auc_interval, pareto, against = (f"tags.`{name}`" for name in (FROC, AUC, PARETO, AGAINST))
    settings = [f"params.`{name}`" for name in axes]
    of_sweep = [against] if parent else []
    columns = [*settings, froc, froc_interval, cost, line_cost, pareto, *of_sweep, auc, auc_interval]
    return {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent}'" if parent else "tags.`wsiflow.role` = 'run'",
        "orderByKey": cost if parent else "attributes.start_time",
        "orderByAsc": bool(parent),
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [*columns, "attributes.`Dataset`"],
        "columnOrder": [*_FIRST, *columns, "duration"],
        "columnWidths": {**dict.fromkeys(settings, 118), **_WIDTHS},
        "runsHiddenMode": "SHOWALL",
        "compareRunCharts": _charts(axes),
        "compareRunSections": [
            {"uuid": _SECTION, "name": "Score against cost", "display": True, "columns": 1, "cardHeight": 460, **_PLAIN}
        ],
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": False,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "globalLineChartConfig": {},
        "chartsSearchFilter": "",
    }


_PLAIN = {"isReordered": False, "deleted": False, "isGenerated": False}


def _charts(axes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the charts: scores against core-hours, the settings as parallel axes, and the scores as bars."""
    cost = {"key": _COST, "type": "METRIC"}
    charts: list[dict[str, Any]] = [
        {"type": "SCATTER", "xaxis": cost, "yaxis": {"key": score, "type": "METRIC"}}
        for score in ("froc.score", "roc.auc")
    ]
    charts.append(
        {
            "type": "PARALLEL",
            "selectedParams": list(axes),
            "selectedMetrics": [_COST, "froc.score"],
            "showAllRuns": False,
        }
    )
    charts += [{"type": "BAR", "metricKey": score} for score in ("froc.score", _COST)]
    shared = {"metricSectionId": _SECTION, "runsCountToCompare": 100, "deleted": False, "isGenerated": False}
    return [{"uuid": f"{_SECTION}-{place}", **shared, **chart} for place, chart in enumerate(charts)]


def opening_lines(params: TrackingParams, logged: LogResult, *, sweep: bool = False) -> list[str]:
    """Return the lines that say where a record is seen: the link, and for a file the command that serves it.

    Args:
        params: Where runs are recorded.
        logged: The record of a run, or of a sweep's parent.
        sweep: Whether the record is that of a sweep.
    """
    uri = without_secrets(params.uri).rstrip("/")
    is_server = uri.startswith(("http://", "https://"))
    server = uri if is_server else f"http://127.0.0.1:{_PORT}"
    key = key_of_sweep(logged.run_id or "") if sweep else EXPERIMENT
    query = {"workflowType": _WORKFLOW, "viewStateShareKey": key, "compareRunsMode": "TABLE"}
    runs = f"{server}/#/experiments/{quote(logged.experiment_id)}/runs"
    lines = [f"{runs}?{urlencode(query)}", f"{runs}/{logged.run_id}?workflowType={_WORKFLOW}"]
    return lines if is_server else [*lines, f"served by: {_command(uri)}"]


def _command(uri: str) -> str:
    """Return the command that serves a database, with the ``mlflow`` of this environment."""
    beside = Path(sys.executable).with_name("mlflow")
    name = "mlflow" if shutil.which("mlflow") or not beside.exists() else str(beside)
    return shlex.join([name, "server", "--workers", "1", "--port", str(_PORT), "--backend-store-uri", uri])
