"""The stage ``certify``: it measures, on the tissue of each slide, how much accuracy a faster way costs.

Windows are drawn where decisions are made, and a few from all other tissue (`strata`). Their published scores are
compared with the scores of the same windows that are run one by one in fp32. Where the run uses a lower precision, one
block is computed in fp32 as well. The certificate holds the scores, see `certificates`.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import IntegrityError, WsiflowError
from wsiflow.evaluation.froc import labels_at
from wsiflow.evaluation.truth import Truth, planned_truth
from wsiflow.heatmap import assembly, lesions
from wsiflow.model.choice import Choice
from wsiflow.plan import geometry
from wsiflow.plan.blocks import size_px, window_corners_px
from wsiflow.plan.slide_plan import SlidePlan, read_cut
from wsiflow.run.costs import StageCost
from wsiflow.run.plan import Plan, Task, read_plan
from wsiflow.run.stages import certificates, ingest, passed_over, predict, strata
from wsiflow.run.stages.certificates import Certificate
from wsiflow.run.stages.network import check_numeric_class, fresh_scorer, scorer_for
from wsiflow.run.stages.pixels import planned_blocks
from wsiflow.run.stages.predict import published, read_scores
from wsiflow.run.stages.stage import Stage
from wsiflow.run.stages.stitch import cell_um, class_stems, make_room
from wsiflow.system import publish, usage
from wsiflow.system.provenance import facts
from wsiflow.system.usage import untimed

if TYPE_CHECKING:
    from wsiflow.model.scoring import DenseScorer, WindowScorer

_BATCH = 8  # a second network is in memory beside the run's own, and larger batches are hardly faster


def is_needed(plan: Plan) -> bool:
    """Tell whether the scores of a plan have to be compared with those of single windows in fp32."""
    choice = plan.settings.choice
    plain = choice.engine == "window" and choice.precision == "fp32" and not choice.refine
    return (not plain or plan.settings.cascade is not None) and plan.settings.certificate_windows > 0


class Sample(NamedTuple):
    """What is drawn of a slide.

    Attributes:
        drawn: The windows.
        prob: float64 (d,), confidence of each detection of the slide.
        hit: int64 (d,), number of the annotated region that each lies in; 0 for none, -1 where it is ignored.
        highest: Highest published score in each annotated region, by number; None where truth is not known.
        truth: The annotated regions; None where they are not known, or there are none.
        heat: float32 (rows, cols), the published scores.
        regions: int32 (rows, cols), the annotated region that each cell lies in, 0 for none; None where it is not known
            what is tumour.
    """

    drawn: strata.Drawn
    prob: NDArray[np.float64]
    hit: NDArray[np.int64]
    highest: dict[str, float] | None
    truth: Truth | None
    heat: NDArray[np.float32]
    regions: NDArray[np.int32] | None


def certify(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Compare a slide's scores with those of single windows in fp32, and publish ``certificates/<slide>.json``.

    A certificate that was computed from other truth, or by an earlier version, is replaced: nothing depends on it.

    Raises:
        IntegrityError: The scores differ by more than is allowed. The remedy names a setting that passes for sure.
    """
    plan = read_plan(source)
    root, planned = source.parent, plan.slides[index]
    receipts = [published(root, plan, Task(index, k)) for k in range(1, planned.n_groups + 1)]
    name = certificates.name_of(planned)
    key = certificates.key_of(plan, planned, [group["sha256"] for group in receipts])
    publish.withdraw_other(root, name, key)
    receipt, executed = publish.done(root, name, key), False
    if receipt is None:
        check_numeric_class(plan)
        make_room(planned.frame)
        _window_scorer(plan)  # loaded before the certificate's time is taken, as is the next one
        dense = _dense_scorer_in_fp32(plan)
        with publish.publishing(root, name, key, facts("certificate", planned.slide_id), publish.accept) as attempt:
            with attempt.timed("certify"):
                text = _compare(root, plan, index, dense).text()
            attempt.path.write_text(text, encoding="utf-8")
        receipt, executed = attempt.receipt, True
    _require(root, plan, index)
    return receipt, executed


def sample(root: Path, plan: Plan, index: int) -> Sample:
    """Draw windows of a slide, by its published scores, its detections and its truth."""
    planned, settings = plan.slides[index], plan.settings
    frame, cut = planned.frame, read_cut(root, planned)
    parts = [read_scores(root, plan, Task(index, k), 0) for k in range(1, planned.n_groups + 1)]
    m = frame.cells_per_tile
    coord = np.concatenate([np.empty((0, 5), np.int64), *(part[0] for part in parts)])
    heat = assembly.assemble(
        frame, coord[:, :2], np.concatenate([np.empty((0, m, m), np.float32), *(part[1] for part in parts)])
    )
    traces = lesions.trace(heat, settings.lesions, cell_um=cell_um(frame))
    truth, is_known = _truth(plan, planned)
    regions = np.zeros(heat.shape, np.int32) if is_known else None
    if truth is not None:
        regions = _regions(plan, planned, truth)
    threshold = settings.lesions.threshold
    slide = strata.Scored(frame, cut.blocks, heat, threshold, _peaks(heat, traces), regions)
    drawn = strata.draw(slide, seed=planned.key, count=settings.certificate_windows)
    prob = traces.detections[:, 0].astype(np.float32).astype(np.float64)
    highest = None if regions is None else _highest(heat, regions)
    hit = _hits(plan, planned, truth, traces.detections)
    return Sample(drawn, prob, hit, highest, truth, heat, regions)


def _peaks(heat: NDArray[np.float32], traces: lesions.Traces) -> strata.Cells:
    """Return the row and column of the highest scored cell of each detection."""
    number = traces.numbers[traces.areas].ravel()
    places = np.flatnonzero((number > 0) & np.isfinite(heat.ravel()))
    order = np.lexsort((-heat.ravel()[places], number[places]))
    _, first = np.unique(number[places][order], return_index=True)
    return np.stack(np.unravel_index(places[order][first], heat.shape), axis=1)


def _truth(plan: Plan, planned: SlidePlan) -> tuple[Truth | None, bool]:
    """Return the annotated regions of a slide, None for none, and whether it is known what is tumour.

    Truth that cannot be read is not known here: it fails the slide when the slide is scored.
    """
    try:
        truth = planned_truth(planned, ingest.case_of(planned), plan.settings.evaluation)
    except WsiflowError:
        return None, False
    return truth, truth is not None or planned.label == 0


def _regions(plan: Plan, planned: SlidePlan, truth: Truth) -> NDArray[np.int32]:
    """Return the annotated region that each cell of the heatmap lies in, int32 (rows, cols), 0 for none.

    Regions reach beyond what was annotated. A cell belongs to a region where tumour was annotated; only a region in
    which no cell has its place on annotated tumour takes all of its cells.
    """
    labels = truth.lesions.labels
    annotated = labels if truth.tumour is None else np.where(truth.tumour, labels, 0)
    inner, outer = (_at_cells(plan, planned, each) for each in (annotated, labels))
    missed = np.setdiff1d(outer, inner)
    return np.where((inner == 0) & np.isin(outer, missed), outer, inner)


def _at_cells(plan: Plan, planned: SlidePlan, labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the label at the place of the score of each cell; 0 outside the mask."""
    rows, cols = planned.frame.h_shape
    diagonal = np.stack([np.arange(max(rows, cols), dtype=np.float64)] * 2, axis=1)
    m_x, m_y = np.floor(geometry.l0_from_h(planned.frame, diagonal) / plan.settings.evaluation.downsample).T
    row_at, col_at = m_y[:rows].astype(np.int64), m_x[:cols].astype(np.int64)
    is_row, is_col = (row_at < labels.shape[0]) & (row_at >= 0), (col_at < labels.shape[1]) & (col_at >= 0)
    found = np.zeros((rows, cols), np.int32)
    found[np.ix_(is_row, is_col)] = labels[np.ix_(row_at[is_row], col_at[is_col])]
    return found


def _highest(heat: NDArray[np.float32], regions: NDArray[np.int32]) -> dict[str, float]:
    """Return the highest score in each region, by the region's number as JSON has it."""
    scored = np.isfinite(heat) & (regions > 0)
    top = np.full(int(regions.max(initial=0)) + 1, -np.inf)
    np.maximum.at(top, regions[scored], heat[scored])
    return {str(number): float(value) for number, value in enumerate(top) if np.isfinite(value)}


def _hits(plan: Plan, planned: SlidePlan, truth: Truth | None, detections: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the annotated region that each detection lies in, as it is scored; 0 for none, -1 where it is ignored."""
    if truth is None:
        return np.zeros(len(detections), np.int64)
    downsample = plan.settings.evaluation.downsample
    l0 = np.floor(geometry.l0_from_h(planned.frame, detections[:, 1:3]))
    hit = labels_at(truth.lesions.labels, l0, downsample).astype(np.int64)
    if truth.ignored is not None:
        hit[labels_at(truth.ignored.astype(np.int32), l0, downsample) > 0] = -1
    return hit


def _compare(root: Path, plan: Plan, index: int, dense: "DenseScorer | None") -> Certificate:
    """Draw windows, compute their scores in fp32, and return the certificate."""
    planned, stems = plan.slides[index], class_stems(plan.settings.maps)
    one = sample(root, plan, index)
    drawn = one.drawn
    run = partial(_window_scorer(plan).run, timed=untimed)
    expected = run(windows_of(root, plan, planned, drawn, context_px=0))
    scores = [each[drawn.window[drawn.block == number]] for number, each in _block_scores(root, plan, index, drawn)]
    none = np.empty((0, 1 + len(stems)), np.float32)
    pairs = _pairs("windows", stems, np.concatenate([none, *scores]), expected)
    if dense is not None and len(drawn.block):
        pairs |= _pairs("precision", stems, *_smallest_block(root, plan, index, drawn, dense))
    passed = None
    if plan.settings.cascade is not None:
        passed = passed_over.look(root, plan, planned, one.heat, one.regions, run)
    return Certificate(
        pairs=pairs,
        kind=drawn.kind.tolist(),
        region=drawn.region.tolist(),
        detection=drawn.detection.tolist(),
        weight=drawn.weighing.weight.tolist(),
        part=drawn.weighing.part.tolist(),
        unit=drawn.weighing.unit.tolist(),
        prob=one.prob.tolist(),
        hit=one.hit.tolist(),
        highest=one.highest,
        itc=sorted(one.truth.lesions.itc) if one.truth is not None else [],
        n_regions=one.truth.lesions.n_regions if one.truth is not None else 0,
        passed=passed,
    )


def windows_of(
    root: Path, plan: Plan, planned: SlidePlan, drawn: strata.Drawn, *, context_px: int
) -> Iterator[NDArray[np.uint8]]:
    """Yield the pixels of drawn windows, and ``context_px`` reading pixels around them, uint8 (side, side, 3).

    One block is in memory at a time.
    """
    side = planned.frame.window_px + 2 * context_px
    numbers = np.unique(drawn.block).tolist()
    with planned_blocks(root, plan, planned, numbers) as parts:
        for number, (block, pixels) in zip(numbers, parts, strict=True):
            corners = window_corners_px(planned.frame, block)[drawn.window[drawn.block == number]] - context_px
            for x, y in corners.tolist():
                yield pixels[y : y + side, x : x + side].copy()


def _block_scores(root: Path, plan: Plan, index: int, drawn: strata.Drawn) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the number of each block with drawn windows, and its published scores, float32 (n, 1 + k)."""
    cut, maps = read_cut(root, plan.slides[index]), range(1 + len(plan.settings.maps))
    numbers = set(drawn.block.tolist())
    for k, (lo, hi) in enumerate(cut.group_ranges, 1):
        own = sorted(numbers & set(range(lo, hi)))
        if not own:
            continue
        tiles = np.stack([read_scores(root, plan, Task(index, k), each)[1] for each in maps], axis=-1)
        ends = np.cumsum([0, *(len(block.tissue) for block in cut.blocks[lo:hi])])
        for number in own:
            yield number, _scored(tiles[ends[number - lo] : ends[number - lo + 1]])


def _scored(tiles: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the scores of the scored windows of tiles, float32 (n, m, m, 1 + k), as float32 (windows, 1 + k)."""
    return tiles[~np.isnan(tiles[..., 0])]


def _smallest_block(
    root: Path, plan: Plan, index: int, drawn: strata.Drawn, dense: "DenseScorer"
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the published scores of a block, and those that ``dense`` computes.

    The smallest block with windows that decide is taken, else the smallest with any, because a second network is in
    memory while it runs.
    """
    planned = plan.slides[index]
    blocks = read_cut(root, planned).blocks

    def area(number: int) -> int:
        return math.prod(size_px(planned.frame, blocks[number]))

    deciding = drawn.block[drawn.kind != strata.KINDS.index("rest")]
    least = min(set((deciding if len(deciding) else drawn.block).tolist()), key=lambda number: (area(number), number))
    scores = next(each for number, each in _block_scores(root, plan, index, drawn) if number == least)
    with planned_blocks(root, plan, planned, [least]) as parts:
        again = dense.score(planned.frame, parts, untimed)
    return scores, _scored(np.stack([again.prob, *again.maps], axis=-1))


def _window_scorer(plan: Plan) -> "WindowScorer":
    """Return the scorer that runs single windows in fp32; a process prepares it once."""
    choice = plan.settings.choice
    few = choice._replace(precision="fp32", engine="window", batch=min(choice.batch, _BATCH), refine=0.0)
    return cast("WindowScorer", scorer_for(plan, few))


def _dense_scorer_in_fp32(plan: Plan) -> "DenseScorer | None":
    """Return a dense scorer in fp32 where the run uses a lower precision; it is not kept, because it is large."""
    choice = plan.settings.choice
    if choice.precision == "fp32" or choice.engine != "dense":
        return None
    with usage.warming_up():
        return dense_scorer(plan, choice._replace(precision="fp32"))


def dense_scorer(plan: Plan, choice: Choice) -> "DenseScorer":
    """Return a dense scorer for another choice than the run's."""
    return cast("DenseScorer", fresh_scorer(plan.settings.model, choice))


def _pairs(
    kind: str, stems: Sequence[str], scores: NDArray[np.float32], expected: NDArray[np.float32]
) -> dict[str, dict[str, list[float]]]:
    """Return the pairs of the positive scores as ``kind``, and of further classes as ``kind.<stem>``."""
    columns = zip(
        [kind, *(f"{kind}.{stem}" for stem in stems)], scores.T, expected.reshape(scores.shape).T, strict=True
    )
    return {name: {"scores": one.tolist(), "expected": other.tolist()} for name, one, other in columns}


def passes(root: Path, plan: Plan, index: int) -> bool:
    """Tell whether a run accepts the published certificate of a slide."""
    return plan.settings.on_excess == "report" or not any(_exceeded(root, plan, index).values())


def _exceeded(root: Path, plan: Plan, index: int) -> dict[str, list[str]]:
    return certificates.exceeded(plan, certificates.read(root, plan.slides[index]))


def _require(root: Path, plan: Plan, index: int) -> None:
    """Refuse the scores of a slide that differ by more than the run allows.

    Raises:
        IntegrityError: They do.
    """
    exceeded = _exceeded(root, plan, index)
    if plan.settings.on_excess == "report" or not any(exceeded.values()):
        return
    choice, slide_id = plan.settings.choice, plan.slides[index].slide_id
    path = root / certificates.name_of(plan.slides[index])
    if passed := exceeded.pop(certificates.PASSED, []):
        cause = f"the first pass passes over too much: {'; '.join(passed)}"
        remedy = "set a lower inference.cascade.threshold, or another first pass, in another out= folder"
        raise IntegrityError(cause, remedy, slide=slide_id, path=path)
    is_of_windows = {kind: certificates.method_of(kind) == "windows" for kind in exceeded}
    kind = min(
        (each for each, reasons in exceeded.items() if reasons), key=lambda each: (not is_of_windows[each], each)
    )
    of_class, reason = kind.partition(".")[2], "; ".join(exceeded[kind])
    scores = f"scores of class {of_class}" if of_class else "scores"
    if is_of_windows[kind]:
        cause = f"{choice.engine} {choice.precision} {scores} differ from single windows in fp32"
        raise IntegrityError(f"{cause}: {reason}", _exact_setting(choice), slide=slide_id, path=path)
    cause = f"{choice.precision} {scores} differ from fp32: {reason}"
    raise IntegrityError(cause, "set inference.precision=fp32, in another out= folder", slide=slide_id, path=path)


def _exact_setting(choice: Choice) -> str:
    """Return, as a remedy, the setting that keeps the limits for sure."""
    padded = choice.engine == "dense" and not choice.exact
    plain = "set inference.precision=fp32" if choice.precision != "fp32" and not padded else ""
    if choice.refine:
        plain = "set inference.refine=0"
    # Means that are taken around every place are the larger part of what scores differ by.
    nearer = "dense.local=false, or to be sure " if choice.local else ""
    return f"{plain or f'set {nearer}inference.engine=window'}, in another out= folder"


def _key(root: Path, plan: Plan, task: Task) -> str:
    return certificates.key_of(plan, plan.slides[task.slide], predict.STAGE.published(root, plan, task.slide))


STAGE = Stage(
    name="certify",
    unit="slide",
    work=certify,
    product=lambda plan, task: certificates.name_of(plan.slides[task.slide]),
    key=_key,
    cost=StageCost(7.5, 0.0),
    steps=("certify",),
    is_due=lambda plan, _slide: is_needed(plan),
    is_good=passes,
    loads_network=True,
)
