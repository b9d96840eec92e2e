"""The stage ``threshold``: it chooses from which score of a first pass on a cascade looks at a place.

The first pass has scored named slides with annotated lesions, in the folder ``development`` of the run. A lesion is
kept where any first score on it reaches the threshold. The highest threshold is taken that keeps the wanted share of
the lesions; isolated tumour cells do not count, nor do lesions without a first score, which are looked at anyway. The
choice is kept in the user's cache folder by the hash of the slides, their truth and all settings that it depends on.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError
from wsiflow.evaluation.truth import Truth, files_sha256, planned_truth
from wsiflow.heatmap import files
from wsiflow.model.engines.cache import cache_folder, cached, kept
from wsiflow.plan.geometry import Frame
from wsiflow.run import cases, first_pass
from wsiflow.run.plan import Plan, read_plan
from wsiflow.run.stages import ingest, stitch
from wsiflow.system import publish
from wsiflow.system.provenance import NUMERICS, facts


def choose(source: Path, _index: int) -> tuple[publish.Receipt, bool]:
    """Choose the threshold from the heatmaps of the development slides, and publish it as ``threshold.json``.

    Args:
        source: The plan of the first pass over the development slides.

    Raises:
        InputError: No lesion of these slides has a first score.
    """
    plan, root = read_plan(source), source.parent
    name, key = first_pass.THRESHOLD, key_of(root, plan)
    done = publish.done(root, name, key)
    if done is not None:
        return done, False
    with publish.publishing(root, name, key, facts("threshold", ""), publish.accept) as attempt:
        attempt.path.write_bytes(cached(cache_folder(), key, lambda: _chosen(root, plan)))
    return attempt.receipt, True


def is_chosen(source: Path) -> bool:
    """Tell whether the threshold is published, or kept in the user's cache folder, from where it is published."""
    plan, root = read_plan(source), source.parent
    key = key_of(root, plan)
    if publish.done(root, first_pass.THRESHOLD, key) is None and kept(cache_folder(), key) is not None:
        choose(source, 0)
    return publish.done(root, first_pass.THRESHOLD, key) is not None


def key_of(root: Path, plan: Plan) -> str:
    """Return the key of the threshold: what decides the first scores and the lesions, and the wanted share."""
    return publish.key_of(
        numerics=NUMERICS,
        first=plan.settings.of_scores,
        slides=[
            [planned.key, planned.label, *files_sha256(planned.annotation_path, planned.mask_path)]
            for planned in plan.slides
        ],
        evaluation=plan.settings.evaluation.model_dump(mode="json"),
        sensitivity=_sensitivity(root),
    )


def require_other_slides(plan: Plan, development: Plan) -> None:
    """Refuse development slides that are under test, and those that cannot be used.

    Args:
        plan: The plan of the first pass over the slides under test.
        development: That over the development slides.

    Raises:
        InputError: One of them is.
    """
    if development.rejected:
        one = development.rejected[0]
        raise InputError(f"a development slide cannot be used: {one.reason}", "correct it, or remove its line")
    named = {planned.sha256 for planned in development.slides}
    both = [planned for planned in plan.slides if planned.sha256 in named]
    if both:
        more = f" and {len(both) - 1} more" if len(both) > 1 else ""
        cause = f"the threshold of the first pass would be chosen on a slide under test{more}"
        remedy = "name other slides with inference.cascade.development, or give inference.cascade.threshold"
        raise InputError(cause, remedy, slide=both[0].slide_id, path=both[0].path)


def _sensitivity(root: Path) -> float:
    config, _ = cases.read_cases(publish.generations(root.parent, "cases.json")[-1])
    return config.inference.cascade.sensitivity


def _chosen(root: Path, plan: Plan) -> bytes:
    """Return the record of the choice as JSON."""
    highest: list[float] = []
    for index, planned in enumerate(plan.slides):
        truth = planned_truth(planned, ingest.case_of(planned), plan.settings.evaluation)
        if truth is not None:
            heat, _ = files.read_heatmap(root / stitch.STAGE.product_of(plan, index))
            highest += highest_scores(heat, planned.frame, truth, downsample=plan.settings.evaluation.downsample)
    sensitivity = _sensitivity(root)
    threshold = threshold_that_keeps(highest, sensitivity)
    if threshold is None:
        cause = "the development slides have no annotated lesion with a score of the first pass"
        raise InputError(cause, "name slides with lesions that are larger than isolated tumour cells")
    record = {
        "threshold": threshold,
        "sensitivity": sensitivity,
        "lesions": len(highest),
        "kept": sum(score >= threshold for score in highest),
        "development": [planned.sha256 for planned in plan.slides],
    }
    return json.dumps(record, indent=1, sort_keys=True).encode()


def highest_scores(heat: NDArray[np.float32], frame: Frame, truth: Truth, *, downsample: int) -> list[float]:
    """Return the highest first score on each lesion; isolated tumour cells and lesions without a score are left out.

    Args:
        heat: float32 (rows, cols), heatmap of the first pass; NaN where there is no score.
        frame: Its transform, in the centred convention.
        truth: The annotated regions.
        downsample: Level-0 pixels per pixel of the truth's mask.
    """
    labels = truth.lesions.labels
    labels = labels if truth.tumour is None else np.where(truth.tumour, labels, 0)
    rows, cols = np.nonzero(labels)
    side = frame.stride_px * frame.l0_per_px
    places = [np.floor((each + 0.5) * downsample / side).astype(np.int64) for each in (rows, cols)]
    inside = (places[0] < heat.shape[0]) & (places[1] < heat.shape[1])
    top = np.full(truth.lesions.n_regions + 1, np.nan, np.float32)
    np.fmax.at(top, labels[rows, cols][inside], heat[places[0][inside], places[1][inside]])
    counted = [number for number in range(1, len(top)) if number not in truth.lesions.itc]
    return [float(top[number]) for number in counted if np.isfinite(top[number])]


def threshold_that_keeps(highest: Sequence[float], sensitivity: float) -> float | None:
    """Return the highest threshold that a share of scores reaches; None where there are no scores."""
    if not highest:
        return None
    needed = math.ceil(round(sensitivity * len(highest), 9))
    return sorted(highest, reverse=True)[max(1, needed) - 1]
