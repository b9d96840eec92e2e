"""A run as shards of slides that advance stage by stage, and the ledger that says when all of them are through.

A shard is what one orchestrator task works on. Its value is `Progress`: which of its slides are still good, and how
every task so far ended. Nothing here knows who calls it.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from wsiflow import annotations, certify, dataset, ingest, plan, publish, reading, scoring, steps, synth
from wsiflow.config import RunConfig
from wsiflow.errors import EnvironmentFault, InputError, IntegrityError, WsiflowError
from wsiflow.executor import Executor, Outcome
from wsiflow.plan import Plan, Task

#: Stages after the plan, in order.
LINE = ("stain", "extract", "predict", "certify", "stitch", "detect")

_SHARDS_WANTED = 40
_KINDS = {kind.exit_code: kind for kind in (InputError, EnvironmentFault, IntegrityError)}


class Progress(NamedTuple):
    """How far the slides of a shard have come.

    Attributes:
        slides: Indices of the slides nothing has failed for.
        outcomes: Stage and outcome of every task so far.
    """

    slides: tuple[int, ...]
    outcomes: tuple[tuple[str, Outcome], ...] = ()


class Ledger(NamedTuple):
    """Planned = published + quarantined + failed, in array tasks; a rejected slide counts as one task."""

    planned: int
    published: int
    quarantined: int
    failed: int

    @property
    def complete(self) -> bool:
        """Everything that was planned is published."""
        return self.planned == self.published


def begin(config: RunConfig) -> Path:
    """Prove the run's folder, settle what slides there are, and publish both with the configuration.

    Returns:
        ``cases.json``.
    """
    publish.preflight(config.out)
    publish.sweep_attempts(config.out)
    ingest.check_model(config)
    params = config.dataset
    if params.kind == "synthetic" and params.folder is not None:
        manifest = synth.write_dataset(params.folder, size_px=params.size_px, seed=params.seed)
        params = params.model_copy(update={"kind": "manifest", "manifest": manifest})
    cases = dataset.load_dataset(params)
    for case in cases:  # truth that cannot be read is told now, not after all the work
        if case.annotation_path is not None:
            annotations.read_asap(case.annotation_path)
    return ingest.write_cases(config.out, config, cases)


def choose(pool: Executor, cases: Path) -> str:
    """Settle how scores are computed, in a worker: the choice may be measured, and workers are what does the work.

    Returns:
        What was chosen and why, where it is not what was asked for; else nothing.

    Raises:
        WsiflowError: The network or the machine cannot do what is asked for.
    """
    _once(pool, cases, "choose")
    return ingest.surprise(cases)


def calibrate(pool: Executor, plan_path: Path) -> Progress:
    """Quantise the network on the run's own tissue, where the run asks for int8.

    Returns:
        What was done to the slides for it.
    """
    made = plan.read(plan_path)
    if not made.tasks or made.work["choice"]["precision"] != "int8":
        return Progress(())
    progress = Progress(tuple(scoring.calibration_slides(made)))
    for stage in ("stain", "extract"):  # the pixels it looks at are those the network will see
        progress = advance(pool, plan_path, stage, progress)
    _once(pool, plan_path, "calibrate")
    return progress


def _once(pool: Executor, source: Path, stage: str) -> None:
    """Do a stage that a run has only one task of."""
    for outcome in pool.run(steps.run_task, source, stage, [0]):
        if outcome.receipt is None:
            kind = _KINDS.get(outcome.exit_code, WsiflowError)
            cause, _, remedy = outcome.error.rpartition("; ")
            raise kind(cause, remedy)


def cut(count: int, slides_each: int) -> list[tuple[int, ...]]:
    """Cut ``count`` slides into shards of ``slides_each``; 0 gives about 40 shards however many slides there are."""
    each = slides_each or -(-count // _SHARDS_WANTED)
    return [tuple(range(first, min(first + each, count))) for first in range(0, count, max(1, each))]


def count_cases(cases: Path) -> int:
    """Return how many cases there are to ingest."""
    return len(ingest.read_cases(cases)[1])


def count_slides(plan_path: Path) -> int:
    """Return how many slides are planned."""
    return len(plan.read(plan_path).slides)


def ingest_shard(pool: Executor, cases: Path, shard: Sequence[int]) -> list[Outcome]:
    """Ingest the cases of a shard."""
    return list(pool.run(steps.run_task, cases, "ingest", shard))


def line(pool: Executor, plan_path: Path, shard: Sequence[int]) -> Progress:
    """Take the slides of a shard from pixels to detections; a slide for which a task fails goes no further."""
    progress = Progress(tuple(shard))
    for stage in LINE:
        progress = advance(pool, plan_path, stage, progress)
    return progress


def advance(pool: Executor, plan_path: Path, stage: str, progress: Progress) -> Progress:
    """Take the good slides of a shard through one stage."""
    made = plan.read(plan_path)
    indices = _indices(plan_path.parent, made, stage, progress.slides)
    outcomes = list(pool.run(steps.run_task, plan_path, stage, indices))
    failed = {slide_of(made, stage, outcome.task) for outcome in outcomes if outcome.receipt is None}
    return Progress(
        tuple(index for index in progress.slides if index not in failed),
        progress.outcomes + tuple((stage, outcome) for outcome in outcomes),
    )


def _indices(root: Path, made: Plan, stage: str, slides: Iterable[int]) -> list[int]:
    """Return the tasks of a stage for some slides."""
    if stage == "extract":
        # Pixels are only for scores and certificates that are still to be made.
        wanted = set(slides) if made.work["store"]["kind"] == "hdf5" else set()
        lacking = {task.slide for task in made.tasks if task.slide in wanted and not _is_published(root, made, task)}
        return sorted(lacking | {index for index in wanted if not _is_certified(root, made, index)})
    if stage == "stain":
        wanted = set(slides) if reading.fits_slides(reading.stain_params(made)) else set()
        return [index for index in sorted(wanted) if made.slides[index].n_tiles]
    if stage == "certify":
        return [index for index in slides if certify.is_needed(made)]
    if stage == "predict":
        wanted = set(slides)
        return [i for i, task in enumerate(made.tasks) if task.slide in wanted]
    return list(slides)


def slide_of(made: Plan, stage: str, index: int) -> int:
    """Return the slide that a task of a stage works on."""
    return made.tasks[index].slide if stage == "predict" else index


def ledger(root: Path, made: Plan) -> Ledger:
    """Count what the disk says: receipts of the plan's own keys, nothing an orchestrator remembers."""
    published = sum(_is_published(root, made, task) for task in made.tasks)
    planned = len(made.tasks) + len(made.rejected)
    return Ledger(planned, published, len(made.rejected), len(made.tasks) - published)


def _is_certified(root: Path, made: Plan, index: int) -> bool:
    name = certify.certificate_name(made.slides[index])
    return not certify.is_needed(made) or publish.read_receipt(root, name) is not None


def _is_published(root: Path, made: Plan, task: Task) -> bool:
    receipt = publish.read_receipt(root, scoring.prediction_name(made, task))
    return receipt is not None and receipt["key"] == plan.task_key(made, task)
