"""The certificate of a slide: its file, how far its scores deviate, and which limits they exceed.

A certificate holds pairs of scores by kind of comparison, and how the windows were drawn (`strata`). ``windows`` are
published scores and those of the same windows that are run one by one in fp32. ``precision``, where the run uses a
lower one, are the scores of one block, and those of the same engine in fp32. Further classes that a run maps are
compared likewise, each as a kind of its own: ``windows.<class>`` beside ``windows``. Whether the scores are within the
limits is decided each time the certificate is read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.evaluation.truth import files_sha256
from wsiflow.model import certificate
from wsiflow.model.certificate import Limits, ScoreDeviation, Weighing
from wsiflow.plan.slide_plan import SlidePlan
from wsiflow.run.plan import Plan
from wsiflow.run.stages import passed_over
from wsiflow.run.stages.passed_over import PassedOver
from wsiflow.run.stages.strata import KINDS
from wsiflow.system import publish

#: The kind of what a first pass has passed over, beside the kinds of comparison.
PASSED = "passed"

_FORM = 3  # of the file, and of how windows are drawn

Pairs = Mapping[str, list[float]]
"""``scores`` and what is ``expected`` of them, lists of equal length."""


class Certificate(NamedTuple):
    """The content of a certificate.

    Attributes:
        pairs: Pairs of scores by kind of comparison. The lists of ``windows`` are as long as those of the windows.
        kind, region, detection, weight, part, unit: Of each window, see `strata.Drawn`.
        prob: Confidence of each detection of the slide, the highest first.
        hit: Number of the annotated region that each detection lies in, 0 for none, -1 where it is ignored.
        highest: Highest published score in each annotated region, by the region's number. None where it is not known
            what is tumour, so that no window was drawn for it.
        itc: Numbers of the regions that are isolated tumour cells.
        n_regions: Number of annotated regions, those without a score included.
        passed: What the first pass of a cascade has passed over; None where there is none.
    """

    pairs: dict[str, dict[str, list[float]]]
    kind: list[int]
    region: list[int]
    detection: list[int]
    weight: list[float]
    part: list[int]
    unit: list[int]
    prob: list[float]
    hit: list[int]
    highest: dict[str, float] | None
    itc: list[int]
    n_regions: int
    passed: PassedOver | None = None

    def text(self) -> str:
        """Return the content as the text of a file."""
        values = self._asdict()
        passed = values.pop("passed")
        if passed is not None:
            values["passed"] = passed._asdict()
        return json.dumps(values, sort_keys=True)

    def windows(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the published scores of the windows and those in fp32, float64 (n,) each."""
        pairs = self.pairs["windows"]
        return np.array(pairs["scores"], np.float64), np.array(pairs["expected"], np.float64)

    def weighing(self) -> Weighing:
        """Return how the windows were drawn."""
        return Weighing(np.array(self.weight, np.float64), np.array(self.part, np.int64), np.array(self.unit, np.int64))


def name_of(planned: SlidePlan) -> str:
    """Return the name of the certificate of a slide, relative to the run's folder."""
    return f"certificates/{planned.slide_id}.json"


def key_of(plan: Plan, planned: SlidePlan, scores_sha256: list[str]) -> str:
    """Return the key of the certificate of a slide: what decides which windows are compared, and their scores."""
    truth_files = files_sha256(planned.annotation_path, planned.mask_path)
    first = {} if plan.settings.cascade is None else {"cascade": plan.settings.cascade.model_dump(mode="json")}
    return publish.key_of(
        **first,
        slide=planned.key,
        scores=scores_sha256,
        windows=plan.settings.certificate_windows,
        form=_FORM,
        lesions=plan.settings.lesions.model_dump(mode="json"),
        truth=[planned.label, *truth_files, plan.settings.evaluation.protocol()],
    )


def read(root: Path, planned: SlidePlan) -> Certificate:
    """Read the published certificate of a slide."""
    values = json.loads((root / name_of(planned)).read_text(encoding="utf-8"))
    passed = PassedOver(**values.pop("passed")) if "passed" in values else None
    return Certificate(**values, passed=passed)


def is_current(root: Path, planned: SlidePlan, key: str) -> bool:
    """Tell whether the certificate of a slide is published under a key."""
    receipt = publish.read_receipt(root, name_of(planned))
    return receipt is not None and receipt["key"] == key and publish.has_recorded_size(root, name_of(planned))


def method_of(kind: str) -> str:
    """Return what a kind of comparison compares with, ``windows`` or ``precision``, without the class."""
    return kind.partition(".")[0]


def deviation(plan: Plan, one: Certificate, kind: str, chosen: str = "") -> ScoreDeviation:
    """Return how far the scores of a kind of comparison deviate.

    Args:
        plan: The run's plan.
        one: The certificate.
        kind: The kind of comparison.
        chosen: Name of the windows that count, of `KINDS`; empty for all. The detections that peak inside an annotated
            region are of its windows too.
    """
    scores, expected = (np.array(one.pairs[kind][side], np.float32) for side in ("scores", "expected"))
    threshold = plan.settings.lesions.threshold if "." not in kind else certificate.DECISION
    if method_of(kind) != "windows":
        return certificate.score_deviation(scores, expected, threshold=threshold)
    weighing, own = one.weighing(), np.ones(len(scores), np.bool_)
    if chosen:
        own = np.array(one.kind, np.int64) == KINDS.index(chosen)
    return certificate.score_deviation(scores[own], expected[own], threshold=threshold, weighing=weighing.of(own))


def limits_of(plan: Plan, kind: str) -> Limits:
    """Return how far scores may differ from what is expected.

    Scores of a network that pads, and those of tiles that were not refined, differ from single windows by more than
    rounding, and the run says how much is tolerated.
    """
    choice, tolerance = plan.settings.choice, plan.settings.tolerance
    lower = certificate.PRECISION_LIMITS[choice.precision]
    is_near = choice.exact or choice.engine == "window"
    if method_of(kind) != "windows" or (is_near and not choice.refine):
        return lower
    return Limits(mean_abs_diff=tolerance, flips=tolerance)


def exceeded(plan: Plan, one: Certificate) -> dict[str, list[str]]:
    """Return, by kind of comparison, the limits that a certificate exceeds, as text.

    Limits hold for all windows of the slide. That of the mean holds inside annotated lesions too, which are a small
    part of the slide, and no lesion may be lost.
    """
    reasons = {}
    for kind in one.pairs:
        limits = limits_of(plan, kind)
        reasons[kind] = certificate.exceeded_limits(deviation(plan, one, kind), limits)
        if method_of(kind) == "windows":
            inside = deviation(plan, one, kind, "lesion")
            mean = Limits(mean_abs_diff=limits.mean_abs_diff)
            reasons[kind] += [f"inside lesions {text}" for text in certificate.exceeded_limits(inside, mean)]
    if lost := lost_lesions(plan, one):
        what = "a lesion is" if len(lost) == 1 else f"{len(lost)} lesions are"
        reasons["windows"].append(f"{what} lost: no score in it exceeds {plan.settings.lesions.threshold:g}")
    if one.passed is not None:
        reasons[PASSED] = _passed_over(plan, one, one.passed)
    return reasons


def _passed_over(plan: Plan, one: Certificate, passed: PassedOver) -> list[str]:
    """Return why the first pass of a cascade has passed over too much of a slide; empty where it has not."""
    settings = plan.settings
    lost = passed_over.lost_lesions(passed, one.highest, one.itc, settings.lesions.threshold)
    limits = {"threshold": settings.lesions.threshold, "tolerance": settings.tolerance}
    return passed_over.excess(passed, is_known=one.highest is not None, lost=len(lost), **limits)


def lost_lesions(plan: Plan, one: Certificate) -> list[int]:
    """Return the numbers of the annotated regions that the run lost: isolated tumour cells are among them.

    No published score in such a region exceeds the threshold of detections, and a window in it that is run alone does,
    by more than the tolerance.
    """
    (scores, expected), threshold = one.windows(), plan.settings.lesions.threshold
    limit = limits_of(plan, "windows").mean_abs_diff
    allowed = limit if np.isfinite(limit) else 0.0
    region = np.array(one.region, np.int64)
    above = (expected > threshold) & (expected - scores > allowed)
    return [
        int(number)
        for number, highest in (one.highest or {}).items()
        if highest <= threshold and above[region == int(number)].any()
    ]


def shown_name(plan: Plan, kind: str) -> str:
    """Return the name of a kind of comparison in tables and metrics, which say what is measured by it."""
    method, dot, stem = kind.partition(".")
    choice, name = plan.settings.choice, "precision"
    if method == "windows" and choice.engine == "dense":
        name = "dense"
    elif method == "windows" and choice.refine:
        name = "refine"
    return f"{name}{dot}{stem}"
