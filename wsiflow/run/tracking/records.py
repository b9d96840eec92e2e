"""The content of what MLflow is given: runs, sweeps and comparisons, as plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from wsiflow.system.processes import Process


class DatasetRecord(NamedTuple):
    """The slides of a run as MLflow lists them.

    Attributes:
        name: Name of the manifest or the folder.
        digest: Hash of the slides, at most 36 characters.
        source: Path of the manifest or the folder.
        n_slides: Number of slides.
    """

    name: str
    digest: str
    source: str = ""
    n_slides: int = 0


class ModelRecord(NamedTuple):
    """The classifier of a run as the model registry lists it.

    Attributes:
        name: Name of the card.
        identity: Hash of the card and the weights; each has one version of the registered model.
        architecture: What the weights file is.
        card: The card as JSON.
        description: What the card says of the model, as Markdown.
    """

    name: str
    identity: str
    architecture: str
    card: str
    description: str


@dataclass(frozen=True)
class RunRecord:
    """The content of one run in MLflow.

    Attributes:
        name: Name of the run in MLflow's lists.
        key: Identity of the run, letters and digits. A run is recorded once per key, so repeats that measure time need
            different keys.
        plan_hash: The plan's hash.
        partial: Whether slides are missing from the scores.
        documents: Values that become JSON files, by file name; ``settings.json`` has all settings by dotted name.
        params: The settings that are shown as parameters.
        metrics: Metrics by name.
        tags: Further tags by name.
        dataset: The slides.
        artifacts: Paths of files, and of folders with all their files.
        figures: PNG bytes by file name.
        tables: Columns by file name, which ends in ``.json``; the columns of a table have equal length.
        sweep_folder: Folder of the sweep that the run belongs to, by which its parent is found; empty for a single run.
        description: Markdown that the page of the run shows; ``{run}`` in it becomes the run's id.
        model: The classifier; None where it is not registered.
    """

    name: str
    key: str
    plan_hash: str
    partial: bool
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    dataset: DatasetRecord
    artifacts: Sequence[Path]
    figures: Mapping[str, bytes]
    tables: Mapping[str, Mapping[str, Sequence[Any]]]
    documents: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sweep_folder: str = ""
    description: str = ""
    model: ModelRecord | None = None


class RunStart(NamedTuple):
    """A run that has begun.

    Attributes:
        name: Name of the run in MLflow's lists.
        folder: Identity of the run's folder, by which a later start and the final record find this one.
        out: Path of the run's folder.
        sweep_folder: Folder of the sweep; empty for a single run.
        driver: The process that drives the run.
    """

    name: str
    folder: str
    out: str
    sweep_folder: str
    driver: Process


class ComparedRun(NamedTuple):
    """What a comparison adds to the record of a run.

    Attributes:
        pareto: Whether the run's setting belongs to the Pareto set.
        params: Settings that differ in the comparison, by dotted name.
        against: What the setting saves and loses against the reference, as a sentence.
    """

    pareto: bool
    params: Mapping[str, str]
    against: str


@dataclass(frozen=True)
class ComparisonRecord:
    """The content of a comparison in MLflow, which belongs to the parent run of a sweep.

    Attributes:
        sweep_folder: Folder of the sweep.
        parent: Id of the sweep's parent run; empty where it is found by the folder.
        runs: What it adds to each run, by run id.
        axes: Settings that differ, by dotted name: columns of the sweep's table.
        metrics: Metrics of the comparison by name.
        tags: Tags of the comparison by name.
        description: Markdown that the page of the parent run shows; ``{run}`` in it becomes the run's id.
        files: Bytes of the artifacts by name.
    """

    sweep_folder: str
    parent: str
    runs: Mapping[str, ComparedRun]
    axes: Sequence[str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    description: str
    files: Mapping[str, bytes]


class LogResult(NamedTuple):
    """What came of recording something.

    Attributes:
        run_id: Id of the recorded MLflow run; None where it was not recorded.
        reason: Why it was not recorded, in one line.
        experiment_id: Id of the experiment that has the record.
    """

    run_id: str | None
    reason: str
    experiment_id: str = ""
