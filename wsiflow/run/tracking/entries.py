"""What every record is written with: names and tags that MLflow accepts, and where a record comes from."""

import getpass
import logging
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiflow.redaction import redacted_list
from wsiflow.run.tracking import views
from wsiflow.run.tracking.records import LogResult
from wsiflow.run.tracking.store import TrackingParams, experiment_id, one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

_logger = logging.getLogger(__name__)

# Limits of MLflow's API.
PARAM_CHARS, TAG_CHARS, _KEY_CHARS = 6000, 8000, 250
ENTRIES_PER_CALL, METRICS_PER_CALL = 100, 1000
_NOT_IN_NAMES = re.compile(r"[^\w.\- :/]")

NOTE, REASON = "mlflow.note.content", "wsiflow.reason"
FOLDER, SWEEP, SWEEP_FOLDER = "wsiflow.folder", "wsiflow.sweep", "wsiflow.sweep_folder"
OFF = LogResult(None, "tracking is off")
_GIT_S = 5.0


def experiment_with_view(client: "MlflowClient", params: TrackingParams) -> str:
    """Return the id of the experiment, created with its view if absent."""
    found = experiment_id(client, params)
    view = views.tag(views.EXPERIMENT)
    if view[0] not in client.get_experiment(found).tags:
        save_view(client, found, view)
    return found


def save_view(client: "MlflowClient", experiment: str, view: tuple[str, str]) -> None:
    """Save a view with an experiment; a store that refuses it shows its own columns."""
    from mlflow.exceptions import MlflowException

    try:
        client.set_experiment_tag(experiment, *view)
    except MlflowException as error:
        _logger.info("MLflow did not take the view of its page: %s", one_line(error))


def origin() -> dict[str, str]:
    """Return the tags that say who recorded a run, and from what: the columns User, Source and Version of MLflow."""
    program = Path(sys.argv[0]).name
    words = shlex.join(map(str, redacted_list(sys.argv[1:])))
    # MLflow shows what stands behind the last slash of the source, so the arguments are a tag of their own.
    tags = {"mlflow.source.name": program, "mlflow.source.type": "LOCAL", "wsiflow.command": f"{program} {words}"}
    commit = git_commit(Path(__file__).parents[3])
    tags |= {"mlflow.source.git.commit": commit} if commit else {}
    try:
        return {**tags, "mlflow.user": getpass.getuser()}
    except (KeyError, OSError):  # a container may run as a user without a name
        return tags


def git_commit(checkout: Path) -> str:
    """Return the commit of a source checkout; empty for an installed package, and where git fails."""
    command = ["git", "-C", str(checkout), "rev-parse", "--verify", "HEAD"]
    quiet = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}
    try:
        if not (checkout / ".git").exists():
            return ""
        result = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, env=quiet, timeout=_GIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):  # a record without a commit is better than none
        return ""
    commit = result.stdout.decode("ascii", "replace").strip()
    return commit if re.fullmatch(r"[0-9a-f]{40,64}", commit) else ""


def yes_no(flag: bool) -> str:  # noqa: FBT001 - the text of a flag
    """Return the value of a tag that says whether something is so."""
    return "yes" if flag else "no"


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that have a value."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def accepted_name(text: str) -> str:
    """Return a name with the characters and the length that MLflow accepts."""
    return _NOT_IN_NAMES.sub("_", text)[:_KEY_CHARS]


def set_tags(client: "MlflowClient", run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run, their names and values cut to what MLflow accepts."""
    from mlflow.entities import RunTag

    listed = [RunTag(accepted_name(key), text[:TAG_CHARS]) for key, text in tags.items()]
    for first in range(0, len(listed), ENTRIES_PER_CALL):
        client.log_batch(run_id, tags=listed[first : first + ENTRIES_PER_CALL])


def metric_entries(metrics: Mapping[str, float]) -> list[Any]:
    """Return the metrics that have a value as MLflow takes them."""
    from mlflow.entities import Metric

    now_ms = int(time.time() * 1000)
    return [Metric(accepted_name(key), value, now_ms, 0) for key, value in finite(metrics).items()]


def log_bytes(client: "MlflowClient", run_id: str, files: Mapping[str, bytes], folder: str | None = None) -> None:
    """Log the bytes of files by name, below a folder of the artifacts if one is given."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, data in files.items():
            (Path(scratch) / name).write_bytes(data)
        client.log_artifacts(run_id, scratch, folder)
