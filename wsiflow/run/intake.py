"""What a user is told of the slides of a run: before their pixels are read, and once they are ingested."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from wsiflow.errors import Failure, WsiflowError
from wsiflow.plan.slide_plan import SlidePlan
from wsiflow.run.cases import read_cases
from wsiflow.run.config import RunConfig
from wsiflow.run.plan import read_plan
from wsiflow.run.shards import label
from wsiflow.run.stages import ingest
from wsiflow.run.stages.choose import choice_record
from wsiflow.slides.manifest import Case

_logger = logging.getLogger(__name__)

_CHECKED_TOGETHER = 4  # slides, in threads: opening them and filling their outlines needs no lock of Python
_MOST_NAMED = 20  # slides in a warning


def find_faults(cases: Path) -> dict[str, Failure]:
    """Check all slides of a run before any pixel is read, and return what is wrong with them by slide id.

    Slides that were ingested have passed the check. Those that do not pass are rejected when they are ingested.
    """
    config, listed = read_cases(cases)
    waiting = not_ingested(cases)
    _logger.info("checking %d slides and their truth", len(waiting))
    with ThreadPoolExecutor(_CHECKED_TOGETHER) as threads:
        faults = threads.map(partial(_fault_of, config), [listed[index] for index in waiting])
    return {listed[index].slide_id: fault for index, fault in zip(waiting, faults, strict=True) if fault}


def _fault_of(config: RunConfig, case: Case) -> Failure | None:
    """Return why a slide cannot be used, as far as that is known before its pixels are read; None where it can."""
    try:
        ingest.check_slide(case, config)
    except WsiflowError as error:
        line = f" (line {case.line})" if case.line else ""
        return error.failure._replace(slide=f"{case.slide_id}{line}")
    return None


def not_ingested(cases: Path) -> list[int]:
    """Return the indices of the cases that are still to be ingested."""
    return [index for index in range(len(read_cases(cases)[1])) if not ingest.is_ingested(cases, index)]


def describe_faults(cases: Path, faults: Mapping[str, Failure]) -> list[str]:
    """Return the list of the slides that cannot be used, a line for each cause, by what `find_faults` returned."""
    by_cause: dict[str, list[Failure]] = {}
    for fault in faults.values():
        by_cause.setdefault(fault.cause, []).append(fault)
    heading = f"{len(faults)} of {len(read_cases(cases)[1])} slides cannot be used:"
    return [heading, *(f"rejected: {_joined(alike)}" for alike in by_cause.values())] if faults else []


def _joined(alike: Sequence[Failure]) -> str:
    """Return failures of one cause as one sentence; where they are several, the remedy is that of the first."""
    first, *others = alike
    if not others:
        return str(first)
    return f"{len(alike)} slides ({_some([one.slide for one in alike])}): {first._replace(slide='', path='')}"


def describe_shared_truth(cases: Path) -> list[str]:
    """Return a warning for each truth that several slides name; none where all slides are ingested."""
    by_truth: dict[Path, list[str]] = {}
    for case in read_cases(cases)[1]:
        for path in filter(None, (case.annotation_path, case.mask_path)):
            by_truth.setdefault(path, []).append(case.slide_id)
    twice = [f"slides {', '.join(ids)} have the same truth, {path}" for path, ids in by_truth.items() if len(ids) > 1]
    return twice if twice and not_ingested(cases) else []


def describe_rejections(plan_path: Path, faults: Mapping[str, Failure]) -> list[str]:
    """Return a warning for each slide that cannot be planned for a reason that `describe_faults` has not named.

    It is shown hours before the other slides are done.
    """
    return [f"rejected: {one.reason}" for one in read_plan(plan_path).rejected if one.slide_id not in faults]


def describe_usable(cases: Path, plan_path: Path) -> list[str]:
    """Return all warnings about usable slides, the data that go with them, and what they will cost."""
    return [
        *describe_unused_tissue(cases),
        *_describe_duplicates(plan_path),
        *_describe_remarks(plan_path),
        *_describe_tissue(plan_path),
        *_describe_truths(cases, plan_path),
        *_describe_cost_alone(cases, plan_path),
    ]


def describe_unused_tissue(cases: Path) -> list[str]:
    """Return a warning where the manifest names files of tissue that the run does not use."""
    config, listed = read_cases(cases)
    count = sum(case.tissue_mask_path is not None for case in listed)
    if not count or config.tissue.method == "given":
        return []
    return [
        f"tissue={config.tissue.method} finds tissue itself, and the tissue_mask_path of {count} slides is not used; "
        "tissue=given uses it"
    ]


def _describe_duplicates(plan_path: Path) -> list[str]:
    """Return a warning for each content that several slides have: each of them counts in the scores."""
    by_content: dict[str, list[SlidePlan]] = {}
    for planned in read_plan(plan_path).slides:
        by_content.setdefault(planned.sha256, []).append(planned)
    return [_describe_alike(slides) for slides in by_content.values() if len(slides) > 1]


def _describe_alike(slides: Sequence[SlidePlan]) -> str:
    names = ", ".join(one.slide_id for one in slides)
    if not any(one.label is not None or one.annotation_path or one.mask_path for one in slides):
        return f"the same slide under several names: {names}"
    labels = {one.label for one in slides} - {None}
    but = ", and their labels contradict each other" if len(labels) > 1 else ""
    return f"the same slide under several names, each of which counts in the scores: {names}{but}"


def _describe_remarks(plan_path: Path) -> list[str]:
    """Return what a user should know of how slides are read, each remark once with the slides that it is about."""
    slides: dict[str, list[str]] = {}
    for planned in read_plan(plan_path).slides:
        for remark in ingest.remarks(plan_path.parent, planned.slide_id):
            slides.setdefault(remark, []).append(planned.slide_id)
    return [f"{label(names)}: {remark}" for remark, names in slides.items()]


def _describe_tissue(plan_path: Path) -> list[str]:
    """Return warnings about slides on which no tissue was found."""
    plan = read_plan(plan_path)
    empty = [one for one in plan.slides if not one.n_tiles]
    policy = {
        "leave_out": "not scored (evaluation.no_tissue=score would count 0)",
        "score": "scored with 0 (evaluation.no_tissue=score)",
        "fail": "failed (evaluation.no_tissue=fail)",
    }[plan.settings.evaluation.no_tissue]
    remedy = "look at tissue/<slide>.png; tissue=all looks everywhere, tissue=given takes a mask"
    warnings = []
    for kind, slides, became in (
        ("tumour", [one.slide_id for one in empty if _is_tumour(one)], policy),
        ("normal", [one.slide_id for one in empty if one.label == 0], policy),
        ("without a label", [one.slide_id for one in empty if one.label is None and not _is_tumour(one)], "empty maps"),
    ):
        if slides:
            where = f"{len(slides)} of {len(plan.slides)} slides, {kind}: {_some(slides)}"
            warnings.append(f"no tissue was found on {where}; {became}; {remedy}")
    return warnings


def _some(names: Sequence[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _is_tumour(planned: SlidePlan) -> bool:
    """Tell whether a slide is labelled tumour, or has truth and no label."""
    return planned.label == 1 or (planned.label is None and bool(planned.annotation_path or planned.mask_path))


def _describe_truths(cases: Path, plan_path: Path) -> list[str]:
    """Return a warning for each slide nearly all of whose tissue is annotated as tumour: it may be a tissue mask."""
    planned = {one.slide_id for one in read_plan(plan_path).slides}
    usable = [case for case in read_cases(cases)[1] if case.slide_id in planned]
    shares = {case.slide_id: ingest.doubtful_share(cases.parent, case) for case in usable}
    return [
        f"slide {slide_id}: {share:.0%} of the tissue is annotated as tumour; if the mask is of tissue, give it as "
        "tissue_mask_path"
        for slide_id, share in shares.items()
        if share is not None
    ]


def _describe_cost_alone(cases: Path, plan_path: Path) -> list[str]:
    """Return a warning where the network forces single windows at a stride that makes them dear: their number and cost.

    It names the stride that would fit, and what that would cost.
    """
    record, plan = choice_record(cases.parent, read_cases(cases)[0]), read_plan(plan_path)
    if "window_s" not in record:
        return []
    stride, fitting = plan.settings.choice.stride_px, record["stride_alone"]
    windows = sum(one.n_tiles for one in plan.slides) * (plan.settings.tile_px // stride) ** 2
    hours = windows * record["window_s"] / 3600
    return [
        f"{windows:,} windows run one by one, about {hours:.2g} core-hours at stride {stride}; "
        f"inference.stride={fitting} would take about {hours * (stride / fitting) ** 2:.2g}, in another out= folder"
    ]
