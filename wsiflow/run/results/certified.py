"""The certificates of a run: their rows and metrics, and what the fast way could cost in FROC.

The strict FROC score, which keeps every threshold, is computed twice over the same slides: as published, and with the
scores in fp32 in place of the published ones wherever a window was run again. A detection whose highest cell was run
again moves by the difference there, and is gone where that cell is not above the threshold any more; a cell inside an
annotated region that exceeds the threshold in fp32 alone is a detection more, and so is one that a first pass has
passed over. The difference and its interval are those of a paired comparison (`wsiflow.evaluation.paired`), which has a
width where nothing differs: it is about slides like these. It bounds what the windows that were drawn can show. Every
detection was; cells of a region that were not drawn keep their published scores, and false positives that fp32 alone
would have are not counted.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.evaluation import discordance, paired
from wsiflow.evaluation.froc import Matches
from wsiflow.evaluation.matches import EvaluationRecord
from wsiflow.model import certificate
from wsiflow.model.certificate import ScoreDeviation
from wsiflow.plan.slide_plan import SlidePlan
from wsiflow.run.plan import Plan
from wsiflow.run.stages import certificates, passed_over
from wsiflow.run.stages.certificates import Certificate
from wsiflow.run.stages.strata import KINDS

_ROUNDING = 1e-5  # deviations of sums in another order
_DRAWS = 500  # of the bootstrap: exchanges take seconds for hundreds of slides

Summary = tuple[list[dict[str, Any]], dict[str, float]]


def summarise(root: Path, plan: Plan, slides: Sequence[SlidePlan], record: EvaluationRecord, *, seed: int) -> Summary:
    """Summarise the certificates of some slides.

    Args:
        root: The run's folder.
        plan: The run's plan.
        slides: The slides that have results.
        record: The evaluation of these slides.
        seed: Seed of the bootstrap.

    Returns:
        A row for each slide, kind of comparison and kind of windows, and the metrics over all slides by name.
        ``dense.*`` compare scores with single windows in fp32 where the run's engine is dense, ``refine.*`` where not
        every window was run, ``precision.*`` compare them with the same engine in fp32, see `ScoreDeviation` for the
        last parts of the names; ``dense.lesion_mean_abs_diff`` is that inside annotated lesions. Further classes have
        rows and metrics of their own, as ``dense.<class>.n``. ``certificate.slides_beyond`` is the number of slides
        beyond their limits, ``certificate.lesions_lost`` that of lost lesions, ``certificate.slides_without_truth``
        that of slides of which it is not known what is tumour. ``certificate.froc_difference`` is the published strict
        FROC score minus that with the scores in fp32. ``cascade.*`` tell what a first pass has passed over.
    """
    read = {planned.slide_id: certificates.read(root, planned) for planned in slides}
    rows = [row for slide_id, one in read.items() for row in _rows(plan, slide_id, one)]
    metrics = {
        "certificate.slides_beyond": float(
            sum(any(certificates.exceeded(plan, one).values()) for one in read.values())
        ),
        "certificate.lesions_lost": float(sum(len(certificates.lost_lesions(plan, one)) for one in read.values())),
        "certificate.slides_without_truth": float(sum(one.highest is None for one in read.values())),
    }
    for kind in sorted({kind for one in read.values() for kind in one.pairs}):
        metrics |= _metrics(plan, kind, [one for one in read.values() if kind in one.pairs])
    metrics |= _of_first_pass(plan, [one for one in read.values() if one.passed is not None])
    return rows, metrics | froc_difference(plan, read, record, seed=seed)


def _of_first_pass(plan: Plan, parts: Sequence[Certificate]) -> dict[str, float]:
    """Return what the first pass of a cascade has passed over, over all slides, as metrics; empty without a first pass.

    ``cascade.passed_over`` is the share of all cells that were passed over, ``cascade.share_above`` the share of these
    that the run's own pass would score above the threshold of detections, ``cascade.cells_above`` their number, both
    with ``_at_most``, the upper 95 % bound; ``cascade.missed`` the share of all cells above the threshold that were
    passed over; ``cascade.lesions_lost`` the number of lesions that were lost by it.
    """
    if not parts:
        return {}
    threshold, passed = plan.settings.lesions.threshold, [one.passed for one in parts if one.passed is not None]
    found = passed_over.estimate(passed, threshold)
    every = found.cells + sum(one.scored for one in passed)
    lost = [passed_over.lost_lesions(one.passed, one.highest, one.itc, threshold) for one in parts]
    return {
        "cascade.n": float(found.n),
        "cascade.passed_over": found.cells / every if every else math.nan,
        "cascade.share_above": found.share,
        "cascade.share_above_at_most": found.share_at_most,
        "cascade.cells_above": found.share * found.cells,
        "cascade.cells_above_at_most": found.share_at_most * found.cells,
        "cascade.missed": found.missed,
        "cascade.lesions_lost": float(sum(map(len, lost))),
    }


def _rows(plan: Plan, slide_id: str, one: Certificate) -> list[dict[str, Any]]:
    """Return the rows of a slide: all windows of a kind of comparison, and those of each kind of windows."""
    rows = []
    for kind in one.pairs:
        chosen = [""] if certificates.method_of(kind) != "windows" else ["", *(KINDS[i] for i in sorted(set(one.kind)))]
        for which in chosen:
            found = certificates.deviation(plan, one, kind, which)._asdict()
            rows.append(
                {
                    "slide_id": slide_id,
                    "compared": certificates.shown_name(plan, kind),
                    "windows": which or "all",
                    **{name: "" if value != value else value for name, value in found.items()},
                }
            )
    return rows


def _metrics(plan: Plan, kind: str, parts: Sequence[Certificate]) -> dict[str, float]:
    """Return the metrics of a kind of comparison over all slides."""
    shown = certificates.shown_name(plan, kind)
    metrics = {f"{shown}.{name}": float(value) for name, value in _pooled(plan, kind, parts)._asdict().items()}
    if certificates.method_of(kind) != "windows":
        return {name: value for name, value in metrics.items() if not name.endswith("_at_most")}
    inside = _pooled(plan, kind, parts, KINDS.index("lesion"))
    if inside.n:
        metrics[f"{shown}.lesion_mean_abs_diff"] = inside.mean_abs_diff
    return metrics


def _pooled(plan: Plan, kind: str, parts: Sequence[Certificate], chosen: int | None = None) -> ScoreDeviation:
    """Return the deviation over all slides: each window stands for as many as on its slide."""
    scores, expected = (
        np.array([score for one in parts for score in one.pairs[kind][side]], np.float32)
        for side in ("scores", "expected")
    )
    threshold = plan.settings.lesions.threshold if "." not in kind else certificate.DECISION
    if certificates.method_of(kind) != "windows":
        return certificate.score_deviation(scores, expected, threshold=threshold)
    own = np.concatenate([np.empty(0, np.int64), *(np.array(one.kind, np.int64) for one in parts)])
    kept = np.ones(len(own), np.bool_) if chosen is None else own == chosen
    weighing = certificate.pooled([one.weighing() for one in parts]).of(kept)
    return certificate.score_deviation(scores[kept], expected[kept], threshold=threshold, weighing=weighing)


# --- FROC


def froc_difference(
    plan: Plan, read: Mapping[str, Certificate], record: EvaluationRecord, *, seed: int
) -> dict[str, float]:
    """Return the published strict FROC score minus that with scores in fp32, with its 95 % interval, as metrics.

    Slides whose matches the certificate does not give, because their truth has changed, keep their scores. Nothing is
    returned where no lesion counts, or where `lesions.second` or `lesions.gate` takes part in confidences.
    """
    published, params = record.setting("published"), plan.settings.lesions
    if params.second is not None or params.gate is not None:
        return {}  # confidences follow from more than the scores that were run again
    if not sum(one.n_lesions for one in published.matches):
        return {}
    exact = [_exchanged(plan, one, read.get(one.slide_id)) for one in published.matches]
    changed = any(not _alike(one, other) for one, other in zip(published.matches, exact, strict=True))
    n = min(plan.settings.evaluation.bootstrap, _DRAWS) if changed else 0  # without a difference all draws are equal
    settings = [published._replace(name="fp32", matches=exact), published]
    results = paired.bootstrap(settings, reference="fp32", n=n, seed=seed)
    difference = results.differences["published"]["froc.strict_score"]
    units = results.evidence["published"]["froc.strict_score"].units
    low, high = difference.low, difference.high
    if math.isnan(low) and units is not None:
        low, high = discordance.score_interval(units)
    name = "certificate.froc_difference"
    return {name: difference.value, f"{name}_ci_low": low, f"{name}_ci_high": high}


class _Detections(NamedTuple):
    """Detections of a slide: confidence, and the region that each lies in, 0 for none and -1 where it is ignored."""

    prob: NDArray[np.float64]
    hit: NDArray[np.int64]


def _exchanged(plan: Plan, published: Matches, one: Certificate | None) -> Matches:
    """Return the matches of a slide with the scores of recomputed windows in fp32."""
    if one is None or not _alike(_matches(one, _published(one), published), published):
        return published
    exact = _in_fp32(one, plan.settings.lesions.threshold)
    return _matches(one, exact, published)


def _published(one: Certificate) -> _Detections:
    return _Detections(np.array(one.prob, np.float64), np.array(one.hit, np.int64))


def _in_fp32(one: Certificate, threshold: float) -> _Detections:
    """Return the detections with the scores of recomputed windows in fp32."""
    (prob, hit), (scores, expected) = _published(one), one.windows()
    detection, region = np.array(one.detection, np.int64), np.array(one.region, np.int64)
    moved = np.where(np.abs(expected - scores) > _ROUNDING, expected - scores, 0.0)
    peaks = detection >= 0
    prob[detection[peaks]] = np.clip(prob[detection[peaks]] + moved[peaks], 0.0, 1.0)
    gone = detection[peaks & (moved < 0) & (scores > threshold) & (expected <= threshold)]
    more = (region > 0) & (moved > 0) & (scores <= threshold) & (expected > threshold)
    probs, hits = [np.delete(prob, gone), expected[more]], [np.delete(hit, gone), region[more]]
    if one.passed is not None:
        passed, of_region = one.passed.scores(), np.array(one.passed.region, np.int64)
        more = (of_region > 0) & (passed > threshold)
        probs, hits = [*probs, passed[more]], [*hits, of_region[more]]
    return _Detections(np.concatenate(probs), np.concatenate(hits))


def _matches(one: Certificate, found: _Detections, published: Matches) -> Matches:
    """Return detections as matches of a slide."""
    any_best = np.full(one.n_regions, -np.inf)
    np.maximum.at(any_best, found.hit[found.hit > 0] - 1, found.prob[found.hit > 0])
    best, itc = any_best.copy(), tuple(number - 1 for number in one.itc)
    best[list(itc)] = -np.inf
    known = None if published.any_best is None else any_best
    axes = published.major_axis_um
    return Matches(published.slide_id, best, len(itc), found.prob[found.hit == 0], itc, known, axes)


def _alike(one: Matches, other: Matches) -> bool:
    """Tell whether a slide has the same regions, hits and false positives."""
    return (
        one.itc == other.itc
        and np.array_equal(one.best, other.best)
        and np.array_equal(np.sort(one.false_positives), np.sort(other.false_positives))
    )


# --- sentences


def sentence(metrics: Mapping[str, float], threshold: float) -> str:
    """Return what the certificates of a run say, in one sentence; empty where nothing was compared."""
    kind = next((kind for kind in ("dense", "refine", "precision") if metrics.get(f"{kind}.n")), "")
    if not kind:
        return ""
    mean, mean_at_most, flips_at_most, beyond, largest = (
        metrics.get(f"{kind}.{name}", math.nan)
        for name in ("mean_abs_diff", "mean_abs_diff_at_most", "flips_at_most", "beyond_max_at_most", "max_abs_diff")
    )
    parts = [
        f"{metrics[f'{kind}.n']:.0f} windows run alone in fp32: mean |dp| {mean:.2g}, largest {largest:.2g}",
        f"of all windows (95 %) at most {_share(beyond)} are off by more, the mean of the others is at most "
        f"{mean_at_most:.2g}, and at most {_share(flips_at_most)} are on the other side of {threshold:g}",
        _froc_text(metrics),
    ]
    if unknown := metrics.get("certificate.slides_without_truth"):
        parts.append(f"{unknown:.0f} slides have no truth, so that none inside lesions were chosen there")
    if lost := metrics.get("certificate.lesions_lost"):
        parts.append(f"lesions lost: {lost:.0f}")
    if beyond_limits := metrics.get("certificate.slides_beyond"):
        parts.append(f"slides beyond the limits: {beyond_limits:.0f}")
    return "; ".join(filter(None, parts))


def cascade_sentence(metrics: Mapping[str, float], threshold: float) -> str:
    """Return what the first pass of a cascade has passed over, in one sentence; empty without a first pass."""
    if "cascade.n" not in metrics:
        return ""
    share, at_most, missed, lost = (
        metrics[f"cascade.{name}"] for name in ("share_above", "share_above_at_most", "missed", "lesions_lost")
    )
    parts = [
        f"{metrics['cascade.passed_over']:.1%} of the tissue passed over",
        f"of which {_share(share)}, at most {_share(at_most)} (95 %), would score above {threshold:g} "
        f"by {metrics['cascade.n']:.0f} windows, {missed:.1%} of all that do",
        f"lesions lost by it: {lost:.0f}",
    ]
    return "; ".join(parts)


def _share(value: float) -> str:
    return f"{100 * value:.2g} %"


def _froc_text(metrics: Mapping[str, float]) -> str:
    """Return what the fast way could cost in FROC."""
    value, low = (metrics.get(f"certificate.froc_difference{end}", math.nan) for end in ("", "_ci_low"))
    if math.isnan(value):
        return "what that costs in FROC is not known without annotated lesions, nor with lesions.second or lesions.gate"
    cost = f"FROC {value:+.4f} against fp32 there" if abs(value) >= 5e-5 else "FROC as in fp32 there"
    return cost + (f", a loss of more than {max(0.0, -low):.2g} is excluded (95 %)" if math.isfinite(low) else "")
