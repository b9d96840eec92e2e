"""Explain why a task of a run is done or not done, from the files of the run alone."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from wsiflow.errors import InputError
from wsiflow.run import trace
from wsiflow.run.plan import Plan
from wsiflow.run.plan import latest_plan as latest_plan
from wsiflow.run.stages.line import STAGES
from wsiflow.run.stages.stage import Stage
from wsiflow.system import publish


def explain(root: Path, words: Sequence[str]) -> Iterator[str]:
    """Describe a task: its slide, its published files and its attempts.

    Args:
        root: The run's folder.
        words: The task as ``trace.csv`` names it: stage, slide, and group or part where a slide has several; or a slide
            alone.

    Yields:
        Lines of text.

    Raises:
        InputError: The folder holds no plan, or the plan has no such task.
    """
    plan = latest_plan(root)
    given = [*words] if len(words) > 1 else ["", *words]
    stage, name, number = (*given, "")[:3]
    rejected = {item.slide_id: item for item in plan.rejected}
    if name in rejected:
        yield f"slide {name} was not planned: {rejected[name].reason}"
        yield from _attempts(root, "", name, "")
        return
    slides = [index for index, planned in enumerate(plan.slides) if planned.slide_id == name]
    if not slides or (stage and stage not in STAGES):
        remedy = f"give a stage ({', '.join(STAGES)}), a slide, and a group, as in trace.csv; or a slide"
        raise InputError(f"there is no task {' '.join(words)!r}", remedy, path=root)
    yield from _slide(plan, slides[0])
    for each in [STAGES[stage]] if stage else STAGES.values():
        yield from _stage(root, plan, each, slides[0], number)
    yield from _attempts(root, stage, name, number)


def _slide(plan: Plan, slide: int) -> Iterator[str]:
    planned = plan.slides[slide]
    yield f"slide {planned.slide_id}: {planned.path}, {planned.um_px_l0:g} um/px, SHA-256 {planned.sha256[:12]}"
    counts = f"{planned.n_tiles} tiles, {planned.n_blocks} blocks, {planned.n_groups} groups"
    yield f"planned: {counts}, key {planned.key[:12]}"


def _stage(root: Path, plan: Plan, stage: Stage, slide: int, number: str) -> Iterator[str]:
    """Yield the lines on the files that a stage publishes for a slide; several files are counted in one line."""
    indices = stage.tasks_of(plan, slide)
    if number:
        chosen = [index for index in indices if str(stage.task(plan, index).group) == number]
        if not chosen:
            cause = f"{stage.name} has no task {number} of this slide"
            raise InputError(cause, f"give a number from 1 to {len(indices)}", path=root)
        yield from _file(root, plan, stage, chosen[0])
    elif len(indices) == 1:
        yield from _file(root, plan, stage, indices[0])
    else:
        there = sum(publish.has_recorded_size(root, stage.product_of(plan, index)) for index in indices)
        yield f"{stage.name}: {there} of {len(indices)} published"


def _file(root: Path, plan: Plan, stage: Stage, index: int) -> Iterator[str]:
    name = stage.product_of(plan, index)
    receipt = publish.read_receipt(root, name)
    if receipt is None:
        due = stage.is_due(plan, stage.task(plan, index).slide)
        yield f"{stage.name}: {name} is not published{'' if due else ', and this run does not need it'}"
        return
    gone = "" if (root / name).exists() else ", and was deleted since"
    yield f"{stage.name}: {name} published {receipt['ended']} on {receipt['host']}, {receipt['wall_s']:.1f} s{gone}"
    yield f"  key {receipt['key'][:12]}, SHA-256 {receipt['sha256'][:12]}, {receipt['bytes']} bytes"
    for each in stage.beside_of(plan, stage.task(plan, index).slide):
        yield f"  beside it: {each}{'' if publish.has_recorded_size(root, each) else ', which is missing'}"
    if stage.unit == "group":
        planned_key = stage.key_of(root, plan, index)
        if planned_key != receipt["key"]:
            yield f"  its key is not the planned one ({planned_key[:12]}): other inputs or settings led to it"
        yield f"  numeric class {' '.join(f'{k}={v}' for k, v in receipt['numeric_class'].items())}"


def _attempts(root: Path, stage: str, slide: str, number: str) -> Iterator[str]:
    """Yield a line for each attempt at the tasks of a slide."""
    for row in trace.attempts(root):
        if row["slide"] != slide or (stage and row["stage"] != stage) or (number and str(row["group"]) != number):
            continue
        where = " ".join(str(row[name]) for name in ("host", "native_id") if row.get(name))
        seconds = f", {row['wall_s']:.1f} s" if row.get("wall_s") else ""
        yield f"attempt {row['attempt']} at {row['task']}: {row['exit_class']} {where}{seconds} {row['error']}".rstrip()
