"""A run as shards of slides that advance stage by stage.

A shard is what one orchestrator task works on. Its value is `Progress`: which of its slides are still good, and how
every task so far ended. Nothing here knows who calls it.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from wsiflow.errors import Failure, InputError, IntegrityError
from wsiflow.run import ledger, trace
from wsiflow.run.cases import check_model, read_cases, write_cases
from wsiflow.run.config import RunConfig
from wsiflow.run.costs import COSTS, costs_of, slices
from wsiflow.run.executor.protocol import Executor, Outcome, Slice
from wsiflow.run.plan import Plan, read_plan
from wsiflow.run.stages import certify, extract, ingest, stain, work
from wsiflow.run.stages.calibrate import calibration_slides
from wsiflow.run.stages.choose import choice_key, describe_choice, describe_fallback, is_chosen
from wsiflow.run.stages.line import ROUGH, STAGES, names_of
from wsiflow.run.stages.network import calibration
from wsiflow.run.stages.stage import Stage
from wsiflow.slides.kinds import ManifestSlides, SyntheticSlides
from wsiflow.slides.manifest import load_dataset
from wsiflow.slides.synthetic.dataset import write_dataset, write_like
from wsiflow.slides.synthetic.tissue import UM_PX
from wsiflow.system import publish

_logger = logging.getLogger(__name__)

#: Shards under way at a time. Whoever has one only waits for workers, and all shards together keep every worker busy.
SIDE_BY_SIDE = 64

_SHARDS_WANTED = 40


class Ended(NamedTuple):
    """How a task ended, without its receipt, which is on disk.

    Attributes:
        stage, task: Which one.
        attempt: The name of the attempt that published its file; empty where it failed.
        executed: False where it was done already.
        failure: Why nothing was published; None where something was.
    """

    stage: str
    task: int
    attempt: str
    executed: bool
    failure: Failure | None = None


class Progress(NamedTuple):
    """How far the slides of a shard have come.

    Attributes:
        slides: Indices of the slides nothing has failed for.
        ended: Every task so far.
    """

    slides: tuple[int, ...]
    ended: tuple[Ended, ...] = ()


def begin(config: RunConfig) -> Path:
    """Prove the run's folder, list its slides, and publish both with the configuration.

    Returns:
        ``cases.json``.
    """
    for folder in filter(None, (config.out, config.share)):
        publish.preflight(folder)
        publish.sweep_attempts(folder)
    check_model(config)
    params = config.dataset
    if isinstance(params, SyntheticSlides):
        if params.like:
            _require_scaled_lengths(params, config.evaluation.l0_um_px)
        params = ManifestSlides(kind="manifest", manifest=_drawn(params), limit=params.limit)
    cases = load_dataset(params)
    _logger.info("%d slides to test, in %s", len(cases), config.out)
    return write_cases(config.out, config, cases)


def _require_scaled_lengths(params: SyntheticSlides, given: float | None) -> None:
    """Refuse to score small outlines by the lengths of real ones: most lesions would be isolated tumour cells.

    Raises:
        InputError: The spacing of the evaluation is not that of the outlines' real size.
    """
    meant = UM_PX / params.scale
    if given is None or abs(given / meant - 1) > 0.01:
        cause = f"outlines have {params.scale:g} of their real size, and the evaluation's spacing is {given}"
        raise InputError(cause, f"set evaluation.l0_um_px={meant:.4g}", stage="configuration")


def _drawn(params: SyntheticSlides) -> Path:
    """Write synthetic slides, or what is missing of them, and return their manifest."""
    if not params.like:
        return write_dataset(params.folder, size_px=params.size_px, seed=params.seed)
    if params.data is None:
        raise InputError("dataset.data is not given", "set dataset.data=<folder with camelyon16/ and patches/>")
    return write_like(params.folder, params.data, slides=params.slides, scale=params.scale, seed=params.seed)


def choose(pool: Executor, cases: Path) -> str:
    """Choose how scores are computed, in a worker: the choice may be measured, and workers are what does the work.

    Returns:
        What was chosen and why, where it is not what was asked for; else nothing.

    Raises:
        WsiflowError: The network or the machine cannot do what is asked for.
    """
    if not is_chosen(cases):
        once(pool, cases, "choose", choice_key(read_cases(cases)[0]))
    fallback = describe_fallback(cases)
    if not fallback:  # whoever is told that need not read the same again
        _logger.info("scores are computed by the %s", describe_choice(cases))
    return fallback


def measure_costs(pool: Executor, plan_path: Path) -> None:
    """Measure on a few blocks what the work costs where it is done, unless it was; slices are cut by it.

    A run can do without: where it fails, what is wrong shows in the tasks themselves, and rough costs are taken.
    """
    root, plan = plan_path.parent, read_plan(plan_path)
    if not (ledger.balance(root, plan).failed == 0 or (root / COSTS).exists()):
        _logger.info("measuring what tasks cost here")
        for outcome in pool.run(work.run_slice, plan_path, "measure", [Slice(0, 1)]):
            trace.note(root, "measure", "", 0, outcome)


def calibrate(pool: Executor, plan_path: Path, slice_s: float) -> Progress:
    """Quantise the network on the run's own tissue, where the run asks for int8.

    Returns:
        What was done to the slides for it.
    """
    plan = read_plan(plan_path)
    if not plan.n_groups or plan.settings.choice.precision != "int8":
        return Progress(())
    quantised = calibration(plan_path.parent, plan)
    if publish.done(plan_path.parent, *quantised) is not None:
        return Progress(())
    progress = Progress(tuple(calibration_slides(plan)))
    _logger.info("quantising the network on %d of the slides", len(progress.slides))
    for stage in (stain.STAGE, extract.EXTRACT):  # the pixels it looks at are those the network will see
        progress = advance(pool, plan_path, stage, progress, slice_s)
    once(pool, plan_path, "calibrate", quantised.key)
    return progress


def once(pool: Executor, source: Path, stage: str, key: str = "") -> None:
    """Do a stage that a run has only one task of.

    Args:
        pool: Where it runs.
        source: What the stage reads.
        stage: The stage.
        key: The key it has to publish under; empty where it publishes nothing.

    Raises:
        WsiflowError: It failed; the class is that of the task's error.
    """
    for ended in pool.run(work.run_slice, source, stage, [Slice(0, 1)]):
        outcome = _checked(ended, stage, key)
        trace.note(source.parent, stage, "", 0, outcome)
        if outcome.failure and not outcome.retried:
            raise outcome.failure.error()


def cut(sizes: Sequence[int], slides_each: int) -> list[tuple[int, ...]]:
    """Cut slides into shards of neighbours, whose tasks can travel together; the shard with the most work first.

    Args:
        sizes: How much work each slide is.
        slides_each: Slides per shard; 0 gives about 40 shards however many slides there are.
    """
    count = len(sizes)
    each = slides_each or -(-count // _SHARDS_WANTED)
    parts = [tuple(range(first, min(first + each, count))) for first in range(0, count, max(1, each))]
    return sorted(parts, key=lambda part: -sum(sizes[index] for index in part))


def case_sizes(cases: Path) -> list[int]:
    """Return the size in bytes of each case's slide, 0 where it cannot be told."""
    sizes = []
    for case in read_cases(cases)[1]:
        try:
            sizes.append(case.path.stat().st_size)
        except OSError:  # opening it tells what is wrong
            sizes.append(0)
    return sizes


def describe_rejections(plan_path: Path) -> list[str]:
    """Say what is wrong with the slides that could not be planned: it is known hours before the others are done."""
    return [f"rejected: {one.reason}" for one in read_plan(plan_path).rejected]


def describe_duplicates(plan_path: Path) -> list[str]:
    """Say which slides have the same content: a manifest may list a file twice, and each line counts in the scores."""
    alike: dict[str, list[str]] = {}
    for planned in read_plan(plan_path).slides:
        alike.setdefault(planned.sha256, []).append(planned.slide_id)
    groups = (", ".join(slides) for slides in alike.values() if len(slides) > 1)
    return [f"the same slide under several names, each of which counts in the scores: {names}" for names in groups]


def slide_sizes(plan_path: Path) -> list[int]:
    """Return the tissue tiles of each planned slide."""
    return [planned.n_tiles for planned in read_plan(plan_path).slides]


def ingest_shard(pool: Executor, cases: Path, shard: Sequence[int]) -> list[Outcome]:
    """Ingest the cases of a shard."""
    config, found = read_cases(cases)
    tasks = [index for index in sorted(shard) if not ingest.is_ingested(cases, index)]
    seconds = [ROUGH.task_s("ingest", 0)] * len(tasks)
    cuts = slices(tasks, seconds, target_s=config.executor.slice_s)
    settings = ingest.plan_settings(cases.parent, config)
    # To see that a slide is still the one whose record is there takes no worker.
    outcomes = [work.run_task(cases, "ingest", index) for index in set(shard) - set(tasks)]
    for ended in pool.run(work.run_slice, cases, "ingest", [Slice(*span) for span in cuts]):
        outcome = _checked(ended, "ingest", ingest.record_key(found[ended.task], settings))
        trace.note(cases.parent, "ingest", found[outcome.task].slide_id, 0, outcome)
        if not outcome.retried:
            outcomes.append(outcome)
    usable = sum(outcome.receipt is not None for outcome in outcomes)
    _logger.info("shard ingested: %d of its %d slides can be used", usable, len(outcomes))
    return outcomes


def line(pool: Executor, plan_path: Path, shard: Sequence[int], slice_s: float) -> Progress:
    """Take the slides of a shard from pixels to detections; a slide for which a task fails goes no further.

    Args:
        pool: Where tasks run.
        plan_path: The plan.
        shard: Indices of slides.
        slice_s: Seconds of work to hand out at once.
    """
    progress = Progress(tuple(shard))
    for stage in STAGES.values():
        progress = advance(pool, plan_path, stage, progress, slice_s)
    _logger.info("shard done: %d of its %d slides are finished", len(progress.slides), len(shard))
    return progress


def advance(pool: Executor, plan_path: Path, stage: Stage, progress: Progress, slice_s: float) -> Progress:
    """Take the good slides of a shard through one stage: what is published already is not handed out again."""
    root, plan = plan_path.parent, read_plan(plan_path)
    keys = {index: _key(root, plan, stage, index) for index in _tasks(root, plan, stage, progress.slides)}
    found = {
        index: receipt
        for index, key in keys.items()
        if (receipt := _published(root, plan, stage, index, key)) is not None
    }
    lacking = [index for index in keys if index not in found]
    costs = costs_of(root, ROUGH)
    seconds = [costs.task_s(stage.name, units(plan, stage, index)) for index in lacking]
    cuts = [Slice(*span) for span in slices(lacking, seconds, target_s=slice_s)]
    if lacking:
        counts = len(lacking), len(cuts), len(found)
        _logger.debug("%s: %d tasks are handed out in %d slices, %d are done already", stage.name, *counts)
    ended = [Ended(stage.name, index, receipt["attempt"], executed=False) for index, receipt in found.items()]
    failed = set()
    for ran in pool.run(work.run_slice, plan_path, stage.name, cuts):
        outcome, task = _checked(ran, stage.name, keys[ran.task]), stage.task(plan, ran.task)
        trace.note(root, stage.name, plan.slides[task.slide].slide_id, task.group, outcome)
        if outcome.retried:
            continue
        attempt = outcome.receipt["attempt"] if outcome.receipt else ""
        ended.append(Ended(stage.name, outcome.task, attempt, outcome.executed, outcome.failure))
        if outcome.failure:
            # A slide that failed once is given up; for whatever reason its other tasks fail, one line is enough.
            level = logging.DEBUG if task.slide in failed else logging.WARNING
            _logger.log(level, "failed: %s", outcome.failure.about(slide=plan.slides[task.slide].slide_id))
            failed.add(task.slide)
    return Progress(tuple(index for index in progress.slides if index not in failed), progress.ended + tuple(ended))


def advise(pool: Executor, plan_path: Path) -> Iterator[str]:
    """Look, once for a run, for a setting that passes where certificates are beyond the tolerance.

    Yields:
        What is done, before it is done, and what was found; nothing where all is well.
    """
    root, plan = plan_path.parent, read_plan(plan_path)
    if plan.settings.on_excess == "report":
        return
    beyond = certify.slides_without_advice(root, plan)
    if beyond:
        slide_id = plan.slides[beyond[0]].slide_id
        yield f"looking for a setting that keeps dense.tolerance={plan.settings.tolerance:g} on slide {slide_id}, once"
        for outcome in pool.run(work.run_slice, plan_path, "advise", [Slice(0, 1)]):
            trace.note(root, "advise", "", 0, outcome)
            if outcome.receipt is None and not outcome.retried:
                yield f"none was found: {outcome.failure}"
    if told := certify.advice(root, plan):
        yield f"advice     {told}"


def units(plan: Plan, stage: Stage, index: int) -> int:
    """Return how many tissue tiles a task of a stage works on."""
    slide = stage.task(plan, index).slide
    return round(plan.slides[slide].n_tiles / max(1, len(stage.tasks_of(plan, slide))))


def _tasks(root: Path, plan: Plan, stage: Stage, slides: Sequence[int]) -> list[int]:
    """Return the tasks of a stage for some slides, rising."""
    wanted = [index for index in sorted(slides) if stage.is_due(plan, index)]
    if stage.serves_scores:  # pixels are only for scores and certificates that are still to be made
        wanted = [index for index in wanted if not _is_scored(root, plan, index)]
    return [task for index in wanted for task in stage.tasks_of(plan, index)]


def _key(root: Path, plan: Plan, stage: Stage, index: int) -> str:
    """Return the key that the plan asks a task for; empty where that follows from files that are gone."""
    try:
        return stage.key_of(root, plan, index)
    except IntegrityError:
        return ""  # the task itself tells what is missing


def _checked(outcome: Outcome, stage: str, key: str) -> Outcome:
    """Return how a task ended: as failed where the worker published under another key than the plan asks for."""
    receipt = outcome.receipt
    if receipt is None or not key or receipt["key"] == key:
        return outcome
    cause = f"it was published under the key {receipt['key'][:12]}, and the plan asks for {key[:12]}"
    remedy = "the worker followed another plan or version: start the workers anew, and choose another out= folder"
    error = IntegrityError(cause, remedy, stage=stage, path=receipt["path"])
    return outcome._replace(receipt=None, failure=error.failure)


def _published(root: Path, plan: Plan, stage: Stage, index: int, key: str) -> publish.Receipt | None:
    """Return the receipt of what a task publishes, where all of it is published under the plan's key and whole.

    Some are only looked at, see `Stage.verified`.
    """
    slide = stage.task(plan, index).slide
    try:
        receipt = publish.read_receipt(root, stage.product_of(plan, index))
        if receipt is not None and receipt["key"] != key:
            return None
        if not all(publish.has_recorded_size(root, name) for name in names_of(stage, plan, slide, index)):
            return None
        if receipt is not None and stage.verified == "hash":
            publish.check(root, receipt)
        if not stage.is_good(root, plan, slide):
            return None
    except (IntegrityError, OSError):
        return None  # the task itself tells what is wrong
    return receipt


def is_dispensable(root: Path, plan: Plan, name: str) -> bool:
    """Tell whether a run can do without a published file: pixels of a slide whose scores are there."""
    for index, planned in enumerate(plan.slides):
        if name == f"patches/{planned.slide_id}.h5" or name.startswith(f"patches/{planned.slide_id}/"):
            return _is_scored(root, plan, index)
    return False


def _is_scored(root: Path, plan: Plan, index: int) -> bool:
    planned = plan.slides[index]
    certificate = certify.certificate_name(planned)
    certified = not certify.is_needed(plan) or publish.has_recorded_size(root, certificate)
    return certified and len(ledger.published_groups(root, planned)) == planned.n_groups
