"""The stage ``certify``: it measures, on the tissue of each slide, how much accuracy a faster engine costs.

Some windows are drawn by the key of the slide. Their published scores are compared with the scores of the same windows
that are run one by one in fp32. Where the run uses a lower precision, one block is computed in fp32 as well. The
certificate holds the scores; whether they are within the limits is decided each time it is read. Further classes that a
run maps are compared likewise, each as a kind of its own: ``windows.<class>`` beside ``windows``.
"""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError, IntegrityError
from wsiflow.model import certificate
from wsiflow.model.certificate import Limits, ScoreDeviation
from wsiflow.model.choice import Choice
from wsiflow.plan.blocks import Block, window_corners_px
from wsiflow.plan.geometry import Frame
from wsiflow.plan.slide_plan import SlidePlan, read_cut
from wsiflow.run.costs import StageCost
from wsiflow.run.plan import Plan, Task, read_plan
from wsiflow.run.stages import predict
from wsiflow.run.stages.network import check_numeric_class, planned_classifier, scorer_for
from wsiflow.run.stages.pixels import planned_blocks
from wsiflow.run.stages.predict import published, read_scores
from wsiflow.run.stages.stage import Stage
from wsiflow.run.stages.stitch import class_stems
from wsiflow.system import publish, usage
from wsiflow.system.provenance import facts, thread_count
from wsiflow.system.usage import untimed

if TYPE_CHECKING:
    from wsiflow.model.scorer import DenseScorer, WindowScorer

#: Name of the file with the result of the search for a setting, relative to the run's folder.
ADVICE = "advice.json"

_CERTIFIED_BLOCKS = 8
_SEARCH_CPU_S = 60.0
_CUTS_TRIED = 4
_BATCH = 8  # a second network is in memory beside the run's own, and larger batches are hardly faster


def is_needed(plan: Plan) -> bool:
    """Tell whether the scores of a plan have to be compared with those of single windows in fp32."""
    choice = plan.settings.choice
    plain = choice.engine == "window" and choice.precision == "fp32"
    return not plain and plan.settings.certificate_windows > 0


def certificate_name(planned: SlidePlan) -> str:
    """Return the name of the certificate of a slide, relative to the run's folder."""
    return f"certificates/{planned.slide_id}.json"


def certificate_key(plan: Plan, planned: SlidePlan, scores_sha256: Sequence[str]) -> str:
    """Return the key of the certificate of a slide, from the published scores and the number of windows compared."""
    windows = plan.settings.certificate_windows
    return publish.key_of(slide=planned.key, scores=scores_sha256, windows=windows)


class _Sample(NamedTuple):
    """The windows of a slide whose scores are compared.

    Attributes:
        blocks: The blocks that contain the windows, with their pixels, uint8 (rows, cols, 3).
        windows: For each block, int64 (n,): indices of its windows, in the order of the scores of the block.
        scores: For each block, float32 (m, 1 + k): the published scores of all of its windows, and the probabilities of
            the further classes.
    """

    blocks: list[tuple[Block, NDArray[np.uint8]]]
    windows: list[NDArray[np.int64]]
    scores: list[NDArray[np.float32]]


def certify(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Compare a slide's scores with those of single windows in fp32, and publish ``certificates/<slide>.json``.

    Raises:
        IntegrityError: The scores differ by more than is allowed. The remedy names a setting that passes for sure.
    """
    plan = read_plan(source)
    root, planned = source.parent, plan.slides[index]
    receipts = [published(root, plan, Task(index, k)) for k in range(1, planned.n_groups + 1)]
    name = certificate_name(planned)
    key = certificate_key(plan, planned, [group["sha256"] for group in receipts])
    receipt, executed = publish.done(root, name, key), False
    if receipt is None:
        check_numeric_class(plan)
        _window_scorer(plan)  # loaded before the certificate's time is taken, as is the next one
        dense = _dense_scorer_in_fp32(plan)
        with publish.publishing(root, name, key, facts("certificate", planned.slide_id), publish.accept) as attempt:
            with attempt.timed("certify"):
                pairs = _score_pairs(plan, planned, _sample(root, plan, index), dense)
            attempt.path.write_text(json.dumps(pairs, sort_keys=True), encoding="utf-8")
        receipt, executed = attempt.receipt, True
    _require(root, plan, index)
    return receipt, executed


def _sample(root: Path, plan: Plan, index: int) -> _Sample:
    """Draw windows of a slide with their published scores: a few windows from each of a few blocks."""
    planned, n_windows = plan.slides[index], plan.settings.certificate_windows
    n_blocks = min(_CERTIFIED_BLOCKS, n_windows)
    drawn = certificate.draw_indices(planned.key, among=planned.n_blocks, count=n_blocks).tolist()
    scores = [_block_scores(root, plan, index, number) for number in drawn]
    seeds = [publish.key_of(slide=planned.key, block=number) for number in drawn]
    each = -(-n_windows // max(1, len(drawn)))
    windows = [
        certificate.draw_indices(seed, among=len(block), count=each) for seed, block in zip(seeds, scores, strict=True)
    ]
    with planned_blocks(root, plan, planned, drawn) as parts:
        return _Sample(list(parts), windows, scores)


def _block_scores(root: Path, plan: Plan, index: int, number: int) -> NDArray[np.float32]:
    """Return the published scores of the windows of a block and those of further classes, float32 (n, 1 + k)."""
    cut = read_cut(root, plan.slides[index])
    k, (lo, _) = next((k, span) for k, span in enumerate(cut.group_ranges, 1) if span[0] <= number < span[1])
    before = sum(len(block.tissue) for block in cut.blocks[lo:number])
    tiles, task = slice(before, before + len(cut.blocks[number].tissue)), Task(index, k)
    maps = range(1 + len(plan.settings.maps))
    return _columns([read_scores(root, plan, task, each)[1][tiles] for each in maps])


def _columns(maps: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the scores of the scored windows of tiles, float32 (n, m, m) in each map, as a column for each map."""
    return np.stack([each[~np.isnan(each)] for each in maps], axis=1)


def _score_pairs(plan: Plan, planned: SlidePlan, sample: _Sample, dense: "DenseScorer | None") -> dict[str, Any]:
    """Return the pairs of scores that a certificate holds.

    Returns:
        By kind of comparison, lists of equal length. ``windows``: published scores, and those of single windows in
        fp32. ``precision``: published scores of one block, and those that ``dense`` computes; absent where it is None.
        Both also with the stem of each further class, whose probabilities are compared.
    """
    frame, stems = planned.frame, class_stems(plan.settings.maps)
    published_scores = [block[windows] for block, windows in zip(sample.scores, sample.windows, strict=True)]
    expected = _window_scorer(plan).run(_cut_windows(frame, sample, context_px=0), untimed)
    none = np.empty((0, 1 + len(stems)), np.float32)
    pairs = _pairs("windows", stems, np.concatenate([none, *published_scores]), expected)
    if dense is not None and sample.blocks:
        # The smallest block is taken, because a second network is in memory while it runs.
        least = min(range(len(sample.blocks)), key=lambda i: sample.blocks[i][1].size)
        again = dense.score(frame, [sample.blocks[least]], untimed)
        expected = _columns([again.prob, *again.maps])
        pairs |= _pairs("precision", stems, sample.scores[least], expected)
    return pairs


def _window_scorer(plan: Plan) -> "WindowScorer":
    """Return the scorer that runs single windows in fp32; a process prepares it once."""
    choice = plan.settings.choice
    few = choice._replace(precision="fp32", engine="window", batch=min(choice.batch, _BATCH))
    return cast("WindowScorer", scorer_for(planned_classifier(plan), few))


def _dense_scorer_in_fp32(plan: Plan) -> "DenseScorer | None":
    """Return a dense scorer in fp32 where the run uses a lower precision; it is not kept, because it is large."""
    choice = plan.settings.choice
    if choice.precision == "fp32" or choice.engine != "dense":
        return None
    with usage.warming_up():
        return _dense_scorer(plan, choice._replace(precision="fp32"))


def _dense_scorer(plan: Plan, choice: Choice) -> "DenseScorer":
    """Return a dense scorer for another choice than the run's."""
    from wsiflow.model import scorer

    return cast("DenseScorer", scorer.make_scorer(planned_classifier(plan), choice, threads=thread_count()))


def _cut_windows(frame: Frame, sample: _Sample, *, context_px: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the windows of a sample with ``context_px`` reading pixels around them, uint8 (side, side, 3)."""
    side = frame.window_px + 2 * context_px
    for (block, pixels), windows in zip(sample.blocks, sample.windows, strict=True):
        for x, y in (window_corners_px(frame, block)[windows] - context_px).tolist():
            yield pixels[y : y + side, x : x + side]


def _pairs(
    kind: str, stems: Sequence[str], scores: NDArray[np.float32], expected: NDArray[np.float32]
) -> dict[str, dict[str, list[float]]]:
    """Return the pairs of the positive scores as ``kind``, and of further classes as ``kind.<stem>``."""
    columns = zip(
        [kind, *(f"{kind}.{stem}" for stem in stems)], scores.T, expected.reshape(scores.shape).T, strict=True
    )
    return {name: {"scores": one.tolist(), "expected": other.tolist()} for name, one, other in columns}


def _method(kind: str) -> str:
    """Return what a kind of pairs compares with, ``windows`` or ``precision``, without the class."""
    return kind.partition(".")[0]


def deviation(pairs: dict[str, list[float]]) -> ScoreDeviation:
    """Return how far the two lists of scores of a certificate differ."""
    return certificate.score_deviation(np.array(pairs["scores"], np.float32), np.array(pairs["expected"], np.float32))


def passes(root: Path, plan: Plan, index: int) -> bool:
    """Tell whether a run accepts the published certificate of a slide."""
    return plan.settings.on_excess == "report" or not any(_exceeded(root, plan, plan.slides[index]).values())


def _exceeded(root: Path, plan: Plan, planned: SlidePlan) -> dict[str, list[str]]:
    """Return, by kind of comparison, the limits that the published certificate of a slide exceeds, as text."""
    choice = plan.settings.choice
    lower = certificate.PRECISION_LIMITS[choice.precision]
    limits = lower if choice.exact or choice.engine == "window" else _tolerated(plan)
    pairs = json.loads((root / certificate_name(planned)).read_text(encoding="utf-8"))
    return {
        kind: certificate.exceeded_limits(deviation(each), limits if _method(kind) == "windows" else lower)
        for kind, each in pairs.items()
    }


def _require(root: Path, plan: Plan, index: int) -> None:
    """Refuse the scores of a slide that differ by more than the run allows.

    Raises:
        IntegrityError: They do.
    """
    exceeded = _exceeded(root, plan, plan.slides[index])
    if plan.settings.on_excess == "report" or not any(exceeded.values()):
        return
    choice, slide_id = plan.settings.choice, plan.slides[index].slide_id
    path = root / certificate_name(plan.slides[index])
    kind = min(
        (each for each, reasons in exceeded.items() if reasons), key=lambda each: (_method(each) != "windows", each)
    )
    of_class, reason = kind.partition(".")[2], "; ".join(exceeded[kind])
    scores = f"scores of class {of_class}" if of_class else "scores"
    if _method(kind) == "windows":
        cause = f"{choice.engine} {choice.precision} {scores} differ from single windows in fp32"
        raise IntegrityError(f"{cause}: {reason}", _exact_setting(choice), slide=slide_id, path=path)
    cause = f"{choice.precision} {scores} differ from fp32: {reason}"
    raise IntegrityError(cause, "set inference.precision=fp32, in another out= folder", slide=slide_id, path=path)


def _tolerated(plan: Plan) -> Limits:
    """Return how far the scores of a network that pads may differ from those of single windows."""
    tolerance = plan.settings.tolerance
    return Limits(mean_abs_diff=tolerance, flips=tolerance)


def _exact_setting(choice: Choice) -> str:
    """Return, as a remedy, the setting that keeps the limits for sure."""
    padded = choice.engine == "dense" and not choice.exact
    plain = "set inference.precision=fp32" if choice.precision != "fp32" and not padded else ""
    # Means that are taken around every place are the larger part of what scores differ by.
    nearer = "dense.local=false, or to be sure " if choice.local else ""
    return f"{plain or f'set {nearer}inference.engine=window'}, in another out= folder"


def slides_without_advice(root: Path, plan: Plan) -> list[int]:
    """Return the indices of the slides beyond the tolerance for which a search for a setting may find one.

    The list is empty where the search was done already, or where there is no setting between this one and single
    windows.
    """
    choice = plan.settings.choice
    if choice.engine != "dense" or choice.exact or not plan.settings.shared_layers or advice(root, plan):
        return []
    certified = [
        i for i, planned in enumerate(plan.slides) if publish.has_recorded_size(root, certificate_name(planned))
    ]
    return [index for index in certified if _exceeded(root, plan, plan.slides[index])["windows"]]


def advice(root: Path, plan: Plan) -> str:
    """Return the result of the search for a setting as a sentence; empty where there was no search for this plan."""
    path = root / ADVICE
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return str(record["told"]) if record.get("key") == _advice_key(plan) else ""


def _advice_key(plan: Plan) -> str:
    return publish.key_of(settings=plan.settings.numbers(), work=plan.settings.work())


def advise(source: Path, _index: int) -> tuple[publish.Receipt, bool]:
    """Search a setting that keeps the tolerance on the windows of one slide, and write ``advice.json``; once a run."""
    plan, root = read_plan(source), source.parent
    result = _search_setting(root, plan, slides_without_advice(root, plan)[0])
    publish.write_view(root, ADVICE, json.dumps({"key": _advice_key(plan), "told": result}).encode())
    return {"path": ADVICE, "attempt": ""}, True


def _search_setting(root: Path, plan: Plan, index: int) -> str:
    """Return, as a sentence, a setting that keeps the tolerance on the certified windows of a slide, tried in fp32.

    Layers up to which windows share the network are tried, the cheapest for a run first. A layer is given up as soon as
    it can no longer keep the tolerance. The search may take as many CPU seconds as the scores of the slide took, and at
    least `_SEARCH_CPU_S`.
    """
    choice, planned = plan.settings.choice, plan.slides[index]
    receipts = [published(root, plan, Task(index, k)) for k in range(1, planned.n_groups + 1)]
    until = time.process_time() + max(_SEARCH_CPU_S, sum(receipt["cpu_s"] for receipt in receipts))
    certified = json.loads((root / certificate_name(planned)).read_text(encoding="utf-8"))["windows"]
    expected = np.array(certified["expected"], np.float32)
    sample = _sample(root, plan, index)
    cuts = plan.settings.shared_layers
    also = " and inference.precision=fp32" if choice.precision != "fp32" else ""
    for cut in cuts[:: -(-len(cuts) // _CUTS_TRIED) or 1]:
        if time.process_time() > until:
            return "no setting was found in the time that the search may take"
        try:
            shared = _dense_scorer(plan, choice._replace(share_until=cut, precision="fp32"))
        except InputError:  # windows at this stride cannot be cut from the map of that layer
            continue
        regions = _cut_windows(planned.frame, sample, context_px=choice.context_px)
        scores = np.array([], np.float32)
        for pixels in regions:
            each = shared.run(pixels, untimed)
            scores = np.concatenate([scores, (each[..., 0] if plan.settings.maps else each).ravel()])
            if time.process_time() > until or _exceeds_for_sure(scores, expected, plan.settings.tolerance):
                break
        else:
            difference = certificate.score_deviation(scores, expected)
            return f"set dense.share_until={cut}{also} (mean abs diff {difference.mean_abs_diff:.2g} on its windows)"
    return "none of the layers up to which windows may share the network keeps the tolerance"


def _exceeds_for_sure(scores: NDArray[np.float32], expected: NDArray[np.float32], tolerance: float) -> bool:
    """Tell whether the first scores differ so much that the mean over all of them exceeds the tolerance for sure."""
    first = certificate.score_deviation(scores, expected[: len(scores)])
    return max(first.mean_abs_diff, first.flips) * len(scores) > tolerance * len(expected)


def summary(root: Path, plan: Plan, slides: Sequence[SlidePlan]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Summarise the certificates of some slides.

    Returns:
        A row for each slide and kind of comparison, and the metrics over all slides by name. ``dense.mean_abs_diff``,
        ``p95_abs_diff``, ``max_abs_diff``, ``correlation``, ``flips`` and ``n`` compare scores with single windows in
        fp32; ``precision.*`` compare them with the same engine in fp32. ``certificate.slides_beyond`` is the number of
        slides beyond their limits. Further classes have rows and metrics of their own, as ``dense.<class>.n``. Both are
        empty where no certificate is needed.
    """
    if not is_needed(plan):
        return [], {}
    certificates = {
        planned.slide_id: json.loads((root / certificate_name(planned)).read_text(encoding="utf-8"))
        for planned in slides
    }
    rows = [
        {"slide_id": slide_id, "compared": _shown(plan, kind), **deviation(pairs)._asdict()}
        for slide_id, kinds in certificates.items()
        for kind, pairs in kinds.items()
    ]
    excess = sum(any(_exceeded(root, plan, planned).values()) for planned in slides)
    metrics = {"certificate.slides_beyond": float(excess)}
    for kind in sorted({kind for kinds in certificates.values() for kind in kinds}):
        parts = [kinds[kind] for kinds in certificates.values() if kind in kinds]
        pooled = {side: [score for part in parts for score in part[side]] for side in ("scores", "expected")}
        shown = _shown(plan, kind)
        metrics |= {f"{shown}.{name}": float(value) for name, value in deviation(pooled)._asdict().items()}
    return rows, metrics


def _shown(plan: Plan, kind: str) -> str:
    """Return the name of a kind of pairs in tables and metrics, which say what is measured by it."""
    method, dot, stem = kind.partition(".")
    dense = method == "windows" and plan.settings.choice.engine == "dense"
    return f"{'dense' if dense else 'precision'}{dot}{stem}"


def _key(root: Path, plan: Plan, task: Task) -> str:
    return certificate_key(plan, plan.slides[task.slide], predict.STAGE.published(root, plan, task.slide))


STAGE = Stage(
    name="certify",
    unit="slide",
    work=certify,
    product=lambda plan, task: certificate_name(plan.slides[task.slide]),
    key=_key,
    cost=StageCost(7.5, 0.0),
    steps=("certify",),
    is_due=lambda plan, _slide: is_needed(plan),
    is_good=passes,
    loads_network=True,
)
