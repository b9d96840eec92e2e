"""Record each run, and comparisons of runs, in MLflow. No other package uses mlflow.

Input: metrics, figures, tables and files of a run. Output: the id of its MLflow run, or the reason why there is none;
and the recorded runs of an experiment.

Conventions:

* MLflow is a view. No result depends on it, and workers never talk to it. A store that cannot be reached costs some
  seconds and one warning: the files of the run are authoritative, and logging again later creates one record only.
* What is read in tables and charts is short: some rounded metrics, some settings. The artifacts have everything.
* A metric without a finite value is left out and named in the tag ``wsiflow.metrics_without_value``.
* Secrets are replaced before anything is sent, see `wsiflow.redaction`.
"""

from wsiflow.run.tracking.reading import TrackedRun, download, tracked_runs
from wsiflow.run.tracking.records import (
    ComparedRun,
    ComparisonRecord,
    DatasetRecord,
    LogResult,
    ModelRecord,
    RunRecord,
    RunStart,
)
from wsiflow.run.tracking.runs import begin_run, fail_run, log_run
from wsiflow.run.tracking.store import TrackingParams, default_uri
from wsiflow.run.tracking.sweeps import begin_sweep, log_comparison, log_sweep
from wsiflow.run.tracking.views import opening_lines

__all__ = [
    "ComparedRun",
    "ComparisonRecord",
    "DatasetRecord",
    "LogResult",
    "ModelRecord",
    "RunRecord",
    "RunStart",
    "TrackedRun",
    "TrackingParams",
    "begin_run",
    "begin_sweep",
    "default_uri",
    "download",
    "fail_run",
    "log_comparison",
    "log_run",
    "log_sweep",
    "opening_lines",
    "tracked_runs",
]
