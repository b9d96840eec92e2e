"""The shards of a run: groups of slides that advance stage by stage.

One task of the orchestrator works on one shard. The state of a shard is its `Progress`: the slides without a failure,
and how every task so far ended. The functions are the same for every orchestrator, and without one.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from wsiflow.errors import Failure, InputError, IntegrityError
from wsiflow.run import first_pass, ledger, trace
from wsiflow.run.cases import check_model, read_cases, write_cases
from wsiflow.run.config import RunConfig
from wsiflow.run.costs import COSTS, costs_of, slices
from wsiflow.run.executor.protocol import Executor, Outcome, Slice
from wsiflow.run.plan import Plan, read_plan
from wsiflow.run.stages import advice, certificates, certify, extract, ingest, stain, threshold, work
from wsiflow.run.stages.calibrate import calibration_slides
from wsiflow.run.stages.choose import choice_key, describe_choice, describe_fallback, is_chosen
from wsiflow.run.stages.line import ROUGH, STAGES, names_of
from wsiflow.run.stages.network import calibration
from wsiflow.run.stages.stage import Stage
from wsiflow.slides.kinds import ManifestSlides, SyntheticSlides, source_of
from wsiflow.slides.manifest import Case, find_dataset
from wsiflow.slides.synthetic.dataset import write_dataset, write_like
from wsiflow.slides.synthetic.tissue import UM_PX
from wsiflow.system import publish

_logger = logging.getLogger(__name__)

#: Most shards in progress at a time. A thread of a shard only waits for workers; all together keep every worker busy.
SIDE_BY_SIDE = 64

_DEFAULT_SHARDS = 40
_NAMED_SLIDES = 2  # in the name of a shard


class Ended(NamedTuple):
    """How a task ended, without its receipt, which is on disk.

    Attributes:
        stage, task: Name of the stage, and index of the task in it.
        attempt: Name of the attempt that published the file; empty where the task failed.
        executed: Whether the task was executed; False where its file was published already.
        failure: Why the task failed; None where it did not.
    """

    stage: str
    task: int
    attempt: str
    executed: bool
    failure: Failure | None = None


class Progress(NamedTuple):
    """The state of a shard.

    Attributes:
        slides: Indices of the slides for which no task has failed.
        ended: How every task so far ended.
    """

    slides: tuple[int, ...]
    ended: tuple[Ended, ...] = ()


Note = Callable[[str, int], None]
"""``note(text, level)`` shows the user a note."""


def _log(text: str, level: int) -> None:
    _logger.log(level, "%s", text)


def begin(config: RunConfig, note: Note = _log) -> Path:
    """Check the folders of a run and its model, list its slides, and publish them with the configuration.

    Args:
        config: The configuration.
        note: Shows how many slides were found, which of them are skipped, and why.

    Returns:
        The ``cases.json`` of the run.

    Raises:
        InputError: The model, the data set or the evaluation's spacing cannot be used.
        EnvironmentFault: A folder cannot be written, or its file system lacks an operation.
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
    dataset = find_dataset(params)
    for line in dataset.describe(source_of(params)):
        note(line, logging.INFO)
    _logger.info("%d slides to test, in %s", len(dataset.cases), config.out)
    return write_cases(config.out, config, dataset.cases)


def begin_first_pass(cases: Path) -> Path:
    """Check the folder and the model of the first pass of a run, and publish its slides and its configuration.

    Args:
        cases: The ``cases.json`` of the run.

    Returns:
        The ``cases.json`` of the first pass.

    Raises:
        InputError: The model of the first pass cannot be used.
        EnvironmentFault: A folder cannot be written, or its file system lacks an operation.
    """
    config, listed = read_cases(cases)
    return _begin_first(
        first_pass.config_of(config, first_pass.folder_of(cases.parent)), first_pass.without_truth(listed)
    )


def begin_development(cases: Path) -> Path:
    """Check and publish the development slides of a cascade likewise, with their truth; return their ``cases.json``.

    Raises:
        InputError: The manifest or the model of the first pass cannot be used.
        EnvironmentFault: A folder cannot be written, or its file system lacks an operation.
    """
    config, _ = read_cases(cases)
    named = ManifestSlides(kind="manifest", manifest=config.inference.cascade.development, limit=None)
    listed = find_dataset(named).cases
    return _begin_first(first_pass.config_of(config, cases.parent / first_pass.DEVELOPMENT), listed)


def _begin_first(first: RunConfig, listed: Sequence[Case]) -> Path:
    publish.preflight(first.out)
    publish.sweep_attempts(first.out)
    check_model(first)
    return write_cases(first.out, first, listed)


def has_threshold(first: Path, development: Path) -> bool:
    """Tell whether the threshold of a cascade was chosen already, for this run or on the same slides for another.

    Args:
        first: The plan of the first pass over the slides under test.
        development: The plan of that over the development slides.

    Raises:
        InputError: A development slide is under test, or cannot be used.
    """
    threshold.require_other_slides(read_plan(first), read_plan(development))
    return threshold.is_chosen(development)


def choose_threshold(pool: Executor, development: Path, ended: Sequence[Progress]) -> None:
    """Choose the threshold of a cascade in a worker, from the scores of the development slides.

    Args:
        pool: The executor.
        development: The plan of the first pass over the development slides.
        ended: How its tasks ended.

    Raises:
        WsiflowError: A development slide has no scores, or there is no lesion on these slides.
    """
    plan = read_plan(development)
    failures = failures_by_slide(plan, (item for one in ended for item in one.ended))
    for failure in failures.values():
        raise failure.error()
    once(pool, development, "threshold", threshold.key_of(development.parent, plan))


def describe_threshold(cases: Path) -> str:
    """Return how the threshold of a cascade was chosen."""
    record = first_pass.chosen_threshold(cases.parent)
    kept = f"{record['kept']} of {record['lesions']} lesions on {len(record['development'])} development slides"
    return f"cascade    threshold {record['threshold']:.3g} keeps {kept}"


def _require_scaled_lengths(params: SyntheticSlides, given: float | None) -> None:
    """Refuse to score reduced outlines at full scale: by their lengths most lesions would be isolated tumour cells.

    Raises:
        InputError: The spacing of the evaluation does not give the outlines their real size.
    """
    needed = UM_PX / params.scale
    if given is None or abs(given / needed - 1) > 0.01:
        cause = f"outlines have {params.scale:g} of their real size, and the evaluation's spacing is {given}"
        raise InputError(cause, f"set evaluation.l0_um_px={needed:.4g}", stage="configuration")


def _drawn(params: SyntheticSlides) -> Path:
    """Write the synthetic slides that are missing, and return their manifest."""
    if not params.like:
        return write_dataset(params.folder, size_px=params.size_px, seed=params.seed)
    if params.data is None:
        raise InputError("dataset.data is not given", "set dataset.data=<folder with camelyon16/ and patches/>")
    return write_like(params.folder, params.data, slides=params.slides, scale=params.scale, seed=params.seed)


def choose(pool: Executor, cases: Path) -> str:
    """Choose how scores are computed, in a worker, because the choice may depend on measurements of its machine.

    Returns:
        The choice and its reason, where it is not what was asked for; else an empty text.

    Raises:
        WsiflowError: The network or the machine cannot do what was asked for.
    """
    if not is_chosen(cases):
        once(pool, cases, "choose", choice_key(read_cases(cases)[0]))
    fallback = describe_fallback(cases)
    if not fallback:  # the caller shows the fallback, which says the same
        _logger.info("scores are computed by the %s", describe_choice(cases))
    return fallback


def measure_costs(pool: Executor, plan_path: Path) -> None:
    """Measure in a worker what tasks cost, unless it was measured; slices are cut by these costs.

    A failure is only recorded in the trace: the run continues with rough costs, and its own tasks show what is wrong.
    """
    root, plan = plan_path.parent, read_plan(plan_path)
    if not (ledger.balance(root, plan).failed == 0 or (root / COSTS).exists()):
        _logger.info("measuring what tasks cost here")
        for outcome in pool.run(work.run_slice, plan_path, "measure", [Slice(0, 1)]):
            trace.note(root, "measure", "", 0, outcome)


def calibrate(pool: Executor, plan_path: Path, slice_s: float) -> Progress:
    """Quantise the network on named slides or on the run's own tissue, where the run uses int8.

    Returns:
        The progress of the slides whose pixels were needed for it.

    Raises:
        WsiflowError: The calibration failed.
    """
    plan = read_plan(plan_path)
    if not plan.n_groups or plan.settings.choice.precision != "int8":
        return Progress(())
    quantised = calibration(plan_path.parent, plan)
    if publish.done(plan_path.parent, *quantised) is not None:
        return Progress(())
    if plan.settings.calibration:
        _logger.info("quantising the network on %d named slides", len(plan.settings.calibration))
        once(pool, plan_path, "calibrate", quantised.key)
        return Progress(())
    progress = Progress(tuple(calibration_slides(plan)))
    _logger.info("quantising the network on %d of the slides", len(progress.slides))
    for stage in (stain.STAGE, extract.EXTRACT):  # it is calibrated on the pixels that the network will see
        progress = advance(pool, plan_path, stage, progress, slice_s)
    once(pool, plan_path, "calibrate", quantised.key)
    return progress


def once(pool: Executor, source: Path, stage: str, key: str = "") -> None:
    """Do a stage that has only one task in a run.

    Args:
        pool: The executor.
        source: The file that the stage reads.
        stage: Name of the stage.
        key: The key that the published file must have; empty where no file is published.

    Raises:
        WsiflowError: The task failed; the class is that of its error.
    """
    for ended in pool.run(work.run_slice, source, stage, [Slice(0, 1)]):
        outcome = _checked(ended, stage, key)
        trace.note(source.parent, stage, "", 0, outcome)
        if outcome.failure and not outcome.retried:
            raise outcome.failure.error()


def cut(sizes: Sequence[int], slides_each: int) -> list[tuple[int, ...]]:
    """Divide slides into shards of neighbours, whose tasks can form slices.

    Args:
        sizes: Amount of work of each slide.
        slides_each: Number of slides of a shard. 0: about 40 shards, however many slides there are.

    Returns:
        The indices of the slides of each shard, the shard with the most work first.
    """
    count = len(sizes)
    each = slides_each or -(-count // _DEFAULT_SHARDS)
    parts = [tuple(range(first, min(first + each, count))) for first in range(0, count, max(1, each))]
    return sorted(parts, key=lambda part: -sum(sizes[index] for index in part))


def label(slides: Sequence[str]) -> str:
    """Return a name for a shard: its first slides, and how many more there are."""
    more = len(slides) - _NAMED_SLIDES
    return ", ".join(slides[:_NAMED_SLIDES]) + (f" (+{more})" if more > 0 else "")


def listed_slides(cases: Path, shard: Sequence[int]) -> list[str]:
    """Return the ids of the cases of a shard."""
    listed = read_cases(cases)[1]
    return [listed[index].slide_id for index in shard]


def planned_slides(plan_path: Path, shard: Sequence[int]) -> list[str]:
    """Return the ids of the planned slides of a shard."""
    plan = read_plan(plan_path)
    return [plan.slides[index].slide_id for index in shard]


def case_sizes(cases: Path) -> list[int]:
    """Return the size in bytes of the slide of each case; 0 where it is not known."""
    sizes = []
    for case in read_cases(cases)[1]:
        try:
            sizes.append(case.path.stat().st_size)
        except OSError:  # opening the slide will name the reason
            sizes.append(0)
    return sizes


def slide_sizes(plan_path: Path) -> list[int]:
    """Return the number of tissue tiles of each planned slide."""
    return [planned.n_tiles for planned in read_plan(plan_path).slides]


def ingest_shard(pool: Executor, cases: Path, shard: Sequence[int]) -> list[Outcome]:
    """Ingest the cases of a shard, and return the outcome of each."""
    config, listed = read_cases(cases)
    tasks = [index for index in sorted(shard) if not ingest.is_ingested(cases, index)]
    seconds = [ROUGH.task_s("ingest", 0)] * len(tasks)
    cuts = _slices(tasks, seconds, config.executor.slice_s)
    settings = ingest.plan_settings(cases.parent, config)
    # Checking that a slide still has the content of its record needs no worker.
    outcomes = [work.run_task(cases, "ingest", index) for index in set(shard) - set(tasks)]
    for ended in pool.run(work.run_slice, cases, "ingest", cuts):
        key = ingest.record_key(cases.parent, listed[ended.task], settings, config) if ended.receipt else ""
        outcome = _checked(ended, "ingest", key)
        trace.note(cases.parent, "ingest", listed[outcome.task].slide_id, 0, outcome)
        if not outcome.retried:
            outcomes.append(outcome)
    usable = sum(outcome.receipt is not None for outcome in outcomes)
    name = label(listed_slides(cases, shard))
    _logger.info("ingested %s: %d of %d slides can be used", name, usable, len(outcomes))
    return outcomes


def rejections(cases: Path, outcomes: Iterable[Outcome]) -> list[Failure]:
    """Return why cases cannot be planned, by what `ingest_shard` returned."""
    listed = read_cases(cases)[1]
    return [one.failure.about(slide=listed[one.task].slide_id) for one in outcomes if one.failure]


def failures_by_slide(plan: Plan, ended: Iterable[Ended]) -> dict[int, Failure]:
    """Return the first failure of each slide for which a task failed, by the slide's index."""
    failures: dict[int, Failure] = {}
    for item in {(item.stage, item.task): item for item in ended}.values():  # the last try of a task decides
        if item.failure:
            failures.setdefault(STAGES[item.stage].task(plan, item.task).slide, item.failure)
    return {index: failure.about(slide=plan.slides[index].slide_id) for index, failure in failures.items()}


def given_up(plan_path: Path, progress: Progress) -> list[Failure]:
    """Return why slides of a shard were given up, by what `line` returned."""
    return list(failures_by_slide(read_plan(plan_path), progress.ended).values())


def line(pool: Executor, plan_path: Path, shard: Sequence[int], slice_s: float, stages: Sequence[str] = ()) -> Progress:
    """Take the slides of a shard through the stages; a slide for which a task fails is given up.

    Args:
        pool: The executor.
        plan_path: The plan.
        shard: Indices of slides.
        slice_s: Core-seconds of a slice.
        stages: Names of the stages, in order; empty for all.

    Returns:
        The state of the shard after the last stage.
    """
    progress = Progress(tuple(shard))
    for name in stages or STAGES:
        progress = advance(pool, plan_path, STAGES[name], progress, slice_s)
    name = label(planned_slides(plan_path, shard))
    _logger.info("done %s: %d of %d slides are finished", name, len(progress.slides), len(shard))
    return progress


def advance(pool: Executor, plan_path: Path, stage: Stage, progress: Progress, slice_s: float) -> Progress:
    """Take the slides without a failure through one stage; only tasks that are not published are submitted.

    Args:
        pool: The executor.
        plan_path: The plan.
        stage: The stage.
        progress: The state of the shard before the stage.
        slice_s: Core-seconds of a slice.

    Returns:
        The state of the shard after the stage.
    """
    root, plan = plan_path.parent, read_plan(plan_path)
    keys = {index: _key(root, plan, stage, index) for index in _tasks(root, plan, stage, progress.slides)}
    done = {
        index: receipt
        for index, key in keys.items()
        if (receipt := _published(root, plan, stage, index, key)) is not None
    }
    missing = [index for index in keys if index not in done]
    costs = costs_of(root, ROUGH)
    seconds = [costs.task_s(stage.name, units(plan, stage, index)) for index in missing]
    cuts = _slices(missing, seconds, slice_s)
    if missing:
        counts = len(missing), len(cuts), len(done)
        _logger.debug("%s: %d tasks are submitted in %d slices, %d are done already", stage.name, *counts)
    ended = [Ended(stage.name, index, receipt["attempt"], executed=False) for index, receipt in done.items()]
    failed, start_s = set(), time.perf_counter()
    for ran in pool.run(work.run_slice, plan_path, stage.name, cuts):
        # What ended while no driver was running is told to the first shard that asks, whichever shard it belongs to.
        outcome, task = _checked(ran, stage.name, keys.get(ran.task, "")), stage.task(plan, ran.task)
        trace.note(root, stage.name, plan.slides[task.slide].slide_id, task.group, outcome)
        if outcome.retried:
            if outcome.failure:
                _logger.info("%s %s is tried again: %s", stage.name, plan.slides[task.slide].slide_id, outcome.failure)
            continue
        attempt = outcome.receipt["attempt"] if outcome.receipt else ""
        ended.append(Ended(stage.name, outcome.task, attempt, outcome.executed, outcome.failure))
        if outcome.failure:
            # The first failure of a slide gives it up; a line for each of its other failures would say no more.
            level = logging.DEBUG if task.slide in failed else logging.WARNING
            _logger.log(level, "failed: %s", outcome.failure.about(slide=plan.slides[task.slide].slide_id))
            failed.add(task.slide)
    _log_speed(plan, stage, ended[len(done) :], time.perf_counter() - start_s)
    return Progress(tuple(index for index in progress.slides if index not in failed), progress.ended + tuple(ended))


def _slices(tasks: Sequence[int], seconds: Sequence[float], target_s: float) -> list[Slice]:
    """Cut tasks into slices, see `wsiflow.run.costs.slices`."""
    cost = dict(zip(tasks, seconds, strict=True))
    return [
        Slice(lo, hi, sum(cost[task] for task in range(lo, hi))) for lo, hi in slices(tasks, seconds, target_s=target_s)
    ]


def _log_speed(plan: Plan, stage: Stage, ended: Sequence[Ended], wall_s: float) -> None:
    """Log what a stage has done for a shard, and how fast; nothing where there was nothing to do."""
    good = [item.task for item in ended if not item.failure]
    if not ended:
        return
    slides = sorted({stage.task(plan, item.task).slide for item in ended})
    tiles = sum(units(plan, stage, index) for index in good)
    what = label([plan.slides[index].slide_id for index in slides]), len(good), len(ended), tiles
    speed = f"{tiles / wall_s:,.{0 if tiles >= 10 * wall_s else 1}f} tiles/s" if wall_s > 0 else "at once"
    _logger.info("%s %s: %d of %d tasks done, %d tiles in %.1f s, %s", stage.name, *what, wall_s, speed)


def advise(pool: Executor, plan_path: Path) -> Iterator[str]:
    """Search a setting that keeps the tolerance, once for a run, where certificates exceed it.

    Yields:
        A sentence before the search, and one with its result; nothing where no certificate exceeds the tolerance.
    """
    root, plan = plan_path.parent, read_plan(plan_path)
    if plan.settings.on_excess == "report":
        return
    excess = advice.slides_without_advice(root, plan)
    if excess:
        slide_id = plan.slides[excess[0]].slide_id
        yield f"looking for a setting that keeps dense.tolerance={plan.settings.tolerance:g} on slide {slide_id}, once"
        for outcome in pool.run(work.run_slice, plan_path, "advise", [Slice(0, 1)]):
            trace.note(root, "advise", "", 0, outcome)
            if outcome.receipt is None and not outcome.retried:
                yield f"the search for a setting failed: {outcome.failure}"
    if found := advice.text(root, plan):
        yield f"advice     {found}"


def units(plan: Plan, stage: Stage, index: int) -> int:
    """Return the number of tissue tiles that a task of a stage works on."""
    slide = stage.task(plan, index).slide
    return round(plan.slides[slide].n_tiles / max(1, len(stage.tasks_of(plan, slide))))


def _tasks(root: Path, plan: Plan, stage: Stage, slides: Sequence[int]) -> list[int]:
    """Return the tasks that some slides need of a stage, in rising order."""
    due = [index for index in sorted(slides) if stage.is_due(plan, index)]
    if stage.serves_scores:  # pixels are needed only for missing scores and certificates
        due = [index for index in due if not _is_scored(root, plan, index)]
    return [task for index in due for task in stage.tasks_of(plan, index)]


def _key(root: Path, plan: Plan, stage: Stage, index: int) -> str:
    """Return the key that the file of a task must have; empty where it follows from files that are missing."""
    try:
        return stage.key_of(root, plan, index)
    except IntegrityError:
        return ""  # the task itself fails and names the missing file


def _checked(outcome: Outcome, stage: str, key: str) -> Outcome:
    """Return the outcome of a task, as a failure where its file has another key than the plan asks for."""
    receipt = outcome.receipt
    if receipt is None or not key or receipt["key"] == key:
        return outcome
    cause = f"it was published under the key {receipt['key'][:12]}, and the plan asks for {key[:12]}"
    remedy = "the worker followed another plan or version: restart the workers, and choose another out= folder"
    error = IntegrityError(cause, remedy, stage=stage, path=receipt["path"])
    return outcome._replace(receipt=None, failure=error.failure)


def _published(root: Path, plan: Plan, stage: Stage, index: int, key: str) -> publish.Receipt | None:
    """Return the receipt of a task whose files are all published, whole and under the plan's key, else None.

    `Stage.verified` says how the files are verified.
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
        return None  # the task itself fails and names the reason
    return receipt


def is_dispensable(root: Path, plan: Plan, name: str) -> bool:
    """Tell whether a run does not need a published file any more: pixels of a slide that has its scores."""
    for index, planned in enumerate(plan.slides):
        if name == f"patches/{planned.slide_id}.h5" or name.startswith(f"patches/{planned.slide_id}/"):
            return _is_scored(root, plan, index)
    return False


def _is_scored(root: Path, plan: Plan, index: int) -> bool:
    planned = plan.slides[index]
    if len(ledger.published_groups(root, planned)) != planned.n_groups:
        return False
    return not certify.is_needed(plan) or certificates.is_current(root, planned, _key(root, plan, certify.STAGE, index))
