"""The stage ``certify``: what a faster way costs in accuracy, measured on windows of each slide's own tissue.

The published scores of some windows, drawn by the slide's key, are compared with those of the same windows run one by
one in fp32; where the run uses a lower precision, a block is computed in fp32 as well. What was measured is published;
whether it is good enough is decided each time it is read.
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
from wsiflow.run import store
from wsiflow.run.costs import StageCost
from wsiflow.run.plan import Plan, Task, read_plan
from wsiflow.run.stages import predict
from wsiflow.run.stages.network import check_numeric_class, planned_classifier, scorer_for
from wsiflow.run.stages.pixels import planned_blocks
from wsiflow.run.stages.predict import prediction_name, published
from wsiflow.run.stages.stage import Stage
from wsiflow.system import publish, usage
from wsiflow.system.provenance import facts, thread_count
from wsiflow.system.usage import untimed

if TYPE_CHECKING:
    from wsiflow.model.scorer import DenseScorer, WindowScorer

#: Name of what the search for a setting found, relative to the run's folder.
ADVICE = "advice.json"

_CERTIFIED_BLOCKS = 8
_SEARCH_CPU_S = 60.0
_CUTS_TRIED = 4
_BATCH = 8  # memory for a second network beside the run's own; larger batches are hardly faster


def is_needed(plan: Plan) -> bool:
    """Tell whether the plan's scores are computed in a way that has to be compared with the plain one."""
    choice = plan.settings.choice
    plain = choice.engine == "window" and choice.precision == "fp32"
    return not plain and plan.settings.certificate_windows > 0


def certificate_name(planned: SlidePlan) -> str:
    """Return the name of a slide's certificate, relative to the run's folder."""
    return f"certificates/{planned.slide_id}.json"


def certificate_key(plan: Plan, planned: SlidePlan, scores_sha256: Sequence[str]) -> str:
    """Return what identifies a slide's certificate: the published scores, and how many windows are looked at again."""
    windows = plan.settings.certificate_windows
    return publish.key_of(slide=planned.key, scores=scores_sha256, windows=windows)


class _Sample(NamedTuple):
    """Windows of a slide that are looked at twice.

    Attributes:
        blocks: The blocks they lie in, with their pixels.
        places: For each block, indices of windows among those of its tissue tiles, in the order of the scores.
        scores: Their published scores, block by block.
    """

    blocks: list[tuple[Block, NDArray[np.uint8]]]
    places: list[NDArray[np.int64]]
    scores: list[NDArray[np.float32]]


def certify(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Compare a slide's scores with those of single windows in fp32, and publish ``certificates/<slide>.json``.

    Raises:
        IntegrityError: The scores differ by more than is allowed; the message names what certainly passes.
    """
    plan = read_plan(source)
    root, planned = source.parent, plan.slides[index]
    receipts = [published(root, plan, Task(index, k)) for k in range(1, planned.n_groups + 1)]
    name, wanted = certificate_name(planned), plan.settings.certificate_windows
    key = certificate_key(plan, planned, [found["sha256"] for found in receipts])
    receipt, executed = publish.done(root, name, key), False
    if receipt is None:
        check_numeric_class(plan)
        _windows(plan)  # loaded here, it is not a part of what a certificate costs; nor is this
        dense = _dense_in_fp32(plan)
        with publish.publishing(root, name, key, facts("certificate", planned.slide_id), publish.accept) as attempt:
            with attempt.timed("certify"):
                found = _measured(plan, planned, _sample(root, plan, index, wanted), dense)
            attempt.path.write_text(json.dumps(found, sort_keys=True), encoding="utf-8")
        receipt, executed = attempt.receipt, True
    _require(root, plan, index)
    return receipt, executed


def _sample(root: Path, plan: Plan, index: int, wanted: int) -> _Sample:
    """Draw windows of a slide, a few from each of a few blocks, with their published scores."""
    planned = plan.slides[index]
    chosen = certificate.draw_indices(
        planned.key, among=planned.n_blocks, count=min(_CERTIFIED_BLOCKS, wanted)
    ).tolist()
    scores = [_block_scores(root, plan, index, number).ravel() for number in chosen]
    seeds = [publish.key_of(slide=planned.key, block=number) for number in chosen]
    each = -(-wanted // max(1, len(chosen)))
    places = [
        certificate.draw_indices(seed, among=len(found), count=each) for seed, found in zip(seeds, scores, strict=True)
    ]
    with planned_blocks(root, plan, planned, chosen) as parts:
        return _Sample(list(parts), places, scores)


def _block_scores(root: Path, plan: Plan, index: int, number: int) -> NDArray[np.float32]:
    """Return the published scores of a block's tissue tiles, float32 (n, m, m)."""
    cut = read_cut(root, plan.slides[index])
    k, (lo, _) = next((k, span) for k, span in enumerate(cut.group_ranges, 1) if span[0] <= number < span[1])
    _, prob = store.read_predictions(root / prediction_name(plan, Task(index, k)))
    before = sum(len(block.tissue) for block in cut.blocks[lo:number])
    return prob[before : before + len(cut.blocks[number].tissue)]


def _measured(plan: Plan, planned: SlidePlan, sample: _Sample, dense: "DenseScorer | None") -> dict[str, Any]:
    """Return the pairs of scores that the certificate compares.

    ``windows``: published scores and those of single windows in fp32. ``precision``: published scores of one block and
    the same computed by ``dense``, where there is one.
    """
    frame = planned.frame
    published_scores = [found[places] for found, places in zip(sample.scores, sample.places, strict=True)]
    expected = _windows(plan).run(_cut_windows(frame, sample, context_px=0), untimed)
    found = {"windows": _pairs(np.concatenate([np.empty(0, np.float32), *published_scores]), expected)}
    if dense is not None and sample.blocks:
        # The smallest block: a second network is in memory while it runs.
        least = min(range(len(sample.blocks)), key=lambda i: sample.blocks[i][1].size)
        again = dense.score(frame, [sample.blocks[least]], untimed).prob
        found["precision"] = _pairs(sample.scores[least], again.ravel())
    return found


def _windows(plan: Plan) -> "WindowScorer":
    """Return what computes scores window by window in fp32; prepared once per process."""
    choice = plan.settings.choice
    few = choice._replace(precision="fp32", engine="window", batch=min(choice.batch, _BATCH))
    return cast("WindowScorer", scorer_for(planned_classifier(plan), few))


def _dense_in_fp32(plan: Plan) -> "DenseScorer | None":
    """Return what computes dense scores in fp32 where the run uses less; not kept, its memory is as large again."""
    choice = plan.settings.choice
    if choice.precision == "fp32" or choice.engine != "dense":
        return None
    with usage.warming_up():
        return _dense(plan, choice._replace(precision="fp32"))


def _dense(plan: Plan, choice: Choice) -> "DenseScorer":
    """Return what computes dense scores otherwise than the run."""
    from wsiflow.model import scorer

    return cast("DenseScorer", scorer.make_scorer(planned_classifier(plan), choice, threads=thread_count()))


def _cut_windows(frame: Frame, sample: _Sample, *, context_px: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the windows of a sample with so much context around them."""
    side = frame.window_px + 2 * context_px
    for (block, pixels), places in zip(sample.blocks, sample.places, strict=True):
        for x, y in (window_corners_px(frame, block)[places] - context_px).tolist():
            yield pixels[y : y + side, x : x + side]


def _pairs(scores: NDArray[np.float32], expected: NDArray[np.float32]) -> dict[str, list[float]]:
    return {"scores": scores.tolist(), "expected": expected.tolist()}


def comparison(pairs: dict[str, list[float]]) -> ScoreDeviation:
    """Return how far the scores of a certificate lie apart."""
    return certificate.score_deviation(np.array(pairs["scores"], np.float32), np.array(pairs["expected"], np.float32))


def passes(root: Path, plan: Plan, index: int) -> bool:
    """Tell whether the run goes on with a slide's published certificate."""
    return plan.settings.on_excess == "report" or not any(_broken(root, plan, plan.slides[index]).values())


def _broken(root: Path, plan: Plan, planned: SlidePlan) -> dict[str, list[str]]:
    """Return, by kind of comparison, what of a slide's published certificate is beyond what the run allows."""
    choice = plan.settings.choice
    lower = certificate.PRECISION_LIMITS[choice.precision]
    limits = lower if choice.exact or choice.engine == "window" else _tolerated(plan)
    found = json.loads((root / certificate_name(planned)).read_text(encoding="utf-8"))
    told = {"windows": certificate.exceeded_limits(comparison(found["windows"]), limits)}
    if "precision" in found:
        told["precision"] = certificate.exceeded_limits(comparison(found["precision"]), lower)
    return told


def _require(root: Path, plan: Plan, index: int) -> None:
    """Refuse scores that differ by more than the run allows."""
    told = _broken(root, plan, plan.slides[index])
    if plan.settings.on_excess == "report" or not any(told.values()):
        return
    choice, slide_id = plan.settings.choice, plan.slides[index].slide_id
    path = root / certificate_name(plan.slides[index])
    if told["windows"]:
        cause = f"{choice.engine} {choice.precision} scores differ from single windows in fp32"
        raise IntegrityError(f"{cause}: {'; '.join(told['windows'])}", _plainly(choice), slide=slide_id, path=path)
    cause = f"{choice.precision} scores differ from fp32: {'; '.join(told['precision'])}"
    raise IntegrityError(cause, "set inference.precision=fp32, in another out= folder", slide=slide_id, path=path)


def _tolerated(plan: Plan) -> Limits:
    """Return how far scores of a network that pads may lie from those of single windows."""
    tolerance = plan.settings.tolerance
    return Limits(mean_abs_diff=tolerance, flips=tolerance)


def _plainly(choice: Choice) -> str:
    """Return the setting that certainly keeps the limits."""
    padded = choice.engine == "dense" and not choice.exact
    plain = "set inference.precision=fp32" if choice.precision != "fp32" and not padded else ""
    return f"{plain or 'set inference.engine=window'}, in another out= folder"


def slides_without_advice(root: Path, plan: Plan) -> list[int]:
    """Return the slides whose scores a setting between this one and single windows might bring within the tolerance.

    None where the run was advised already, or where no such setting can be tried.
    """
    choice = plan.settings.choice
    if choice.engine != "dense" or choice.exact or not plan.settings.shared_layers or advice(root, plan):
        return []
    there = [i for i, planned in enumerate(plan.slides) if publish.has_recorded_size(root, certificate_name(planned))]
    return [index for index in there if _broken(root, plan, plan.slides[index])["windows"]]


def advice(root: Path, plan: Plan) -> str:
    """Return what was found for the plan's settings, an empty text where nothing was looked for."""
    path = root / ADVICE
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return str(found["told"]) if found.get("key") == _advice_key(plan) else ""


def _advice_key(plan: Plan) -> str:
    return publish.key_of(settings=plan.settings.numbers(), work=plan.settings.work())


def advise(source: Path, _index: int) -> tuple[publish.Receipt, bool]:
    """Look for a setting that keeps the tolerance on one slide's windows, once for a run, and write ``advice.json``."""
    plan, root = read_plan(source), source.parent
    told = _what_would_pass(root, plan, slides_without_advice(root, plan)[0])
    publish.write_view(root, ADVICE, json.dumps({"key": _advice_key(plan), "told": told}).encode())
    return {"path": ADVICE, "attempt": ""}, True


def _what_would_pass(root: Path, plan: Plan, index: int) -> str:
    """Return which setting keeps the tolerance on the same windows, found by trying them in fp32.

    Layers are tried from those that cost a run least; one that can no longer keep the tolerance is given up at once.
    The search ends when it took as long as the slide's scores did, or what a short one may take.
    """
    choice, planned = plan.settings.choice, plan.slides[index]
    receipts = [published(root, plan, Task(index, k)) for k in range(1, planned.n_groups + 1)]
    until = time.process_time() + max(_SEARCH_CPU_S, sum(receipt["cpu_s"] for receipt in receipts))
    certified = json.loads((root / certificate_name(planned)).read_text(encoding="utf-8"))["windows"]
    expected = np.array(certified["expected"], np.float32)
    sample = _sample(root, plan, index, plan.settings.certificate_windows)
    cuts = plan.settings.shared_layers
    also = " and inference.precision=fp32" if choice.precision != "fp32" else ""
    for cut in cuts[:: -(-len(cuts) // _CUTS_TRIED) or 1]:
        if time.process_time() > until:
            return "no setting was found in the time that the search may take"
        try:
            shared = _dense(plan, choice._replace(share_until=cut, precision="fp32"))
        except InputError:  # windows at this stride cannot be cut from that layer
            continue
        regions = _cut_windows(planned.frame, sample, context_px=choice.context_px)
        scores = np.array([], np.float32)
        for pixels in regions:
            scores = np.concatenate([scores, shared.run(pixels, untimed).ravel()])
            if time.process_time() > until or _is_beyond(scores, expected, plan.settings.tolerance):
                break
        else:
            found = certificate.score_deviation(scores, expected)
            return f"set dense.share_until={cut}{also} (mean abs diff {found.mean_abs_diff:.2g} on its windows)"
    return "none of the layers up to which windows may share the network keeps the tolerance"


def _is_beyond(scores: NDArray[np.float32], expected: NDArray[np.float32], tolerance: float) -> bool:
    """Tell whether the first scores differ so much that all of them cannot be within the tolerance, as means."""
    found = certificate.score_deviation(scores, expected[: len(scores)])
    return max(found.mean_abs_diff, found.flips) * len(scores) > tolerance * len(expected)


def summary(root: Path, plan: Plan, slides: Sequence[SlidePlan]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return what the certificates of some slides say.

    Returns:
        A row for each slide and kind of comparison; and the metrics over all slides, by name: ``dense.mean_abs_diff``,
        ``p95_abs_diff``, ``max_abs_diff``, ``correlation``, ``flips``, ``n`` of scores against single windows in fp32
        (``precision.*`` against the same engine in fp32); and ``certificate.slides_beyond``, those beyond their limits.
    """
    if not is_needed(plan):
        return [], {}
    names = {"windows": "dense" if plan.settings.choice.engine == "dense" else "precision", "precision": "precision"}
    found = {
        planned.slide_id: json.loads((root / certificate_name(planned)).read_text(encoding="utf-8"))
        for planned in slides
    }
    rows = [
        {"slide_id": slide_id, "compared": names[kind], **comparison(pairs)._asdict()}
        for slide_id, kinds in found.items()
        for kind, pairs in kinds.items()
    ]
    beyond = sum(any(_broken(root, plan, planned).values()) for planned in slides)
    metrics = {"certificate.slides_beyond": float(beyond)}
    for kind in sorted({kind for kinds in found.values() for kind in kinds}):
        parts = [kinds[kind] for kinds in found.values() if kind in kinds]
        pooled = {side: [score for part in parts for score in part[side]] for side in ("scores", "expected")}
        metrics |= {f"{names[kind]}.{name}": float(value) for name, value in comparison(pooled)._asdict().items()}
    return rows, metrics


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
