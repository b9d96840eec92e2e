"""The stage ``detect``: it finds lesions on a heatmap, and draws the pictures of the heatmap."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError, WsiflowError
from wsiflow.evaluation.detections import format_detections, read_scores
from wsiflow.heatmap import files, lesions
from wsiflow.heatmap.overlay import overlay_png
from wsiflow.plan import cascade, geometry
from wsiflow.plan.slide_plan import SlidePlan
from wsiflow.run import first_pass
from wsiflow.run.costs import StageCost
from wsiflow.run.plan import Plan, Task, read_plan
from wsiflow.run.stages import ingest, overviews, stitch
from wsiflow.run.stages.pixels import open_planned
from wsiflow.run.stages.stage import Stage
from wsiflow.run.stages.stitch import cell_um, make_room
from wsiflow.system import publish, reread
from wsiflow.system.provenance import facts

_OVERVIEW_SIDE_PX = 3072
_OVERLAY_SIDE_PX = 1024


def detect(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Find lesions on the heatmap of a slide and publish ``detections/<slide>.csv``, empty where there are none.

    Three pictures are published beside it: the heatmap as an 8-bit pyramid for viewers, its overlay with the
    detections, and the overview of the slide.
    """
    plan = read_plan(source)
    root, planned = source.parent, plan.slides[index]
    name, key = STAGE.product_of(plan, index), STAGE.key_of(root, plan, index)
    done = publish.done(root, name, key)
    if done is not None and all(publish.done_if_present(root, each, key) for each in STAGE.beside_of(plan, index)):
        return done, False
    make_room(planned.frame)
    if done is not None:  # pictures were deleted: they are drawn again
        _publish_pictures(root, plan, index, *_detected(root, plan, index), key)
        return done, False
    with publish.publishing(root, name, key, facts("detections", planned.slide_id), publish.accept) as attempt:
        heat, l0 = _detected(root, plan, index)
        with attempt.uncounted():
            _publish_pictures(root, plan, index, heat, l0, key)
        attempt.path.write_text(format_detections(l0), encoding="utf-8", newline="")
    return attempt.receipt, True


def _detected(root: Path, plan: Plan, index: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return the heatmap of a slide, (rows, cols), and the detections on it, (n, 3): prob, x, y in level-0 px."""
    frame = plan.slides[index].frame
    heat, _ = files.read_heatmap(root / stitch.STAGE.product_of(plan, index))
    params = plan.settings.lesions
    detections = lesions.detect(heat, params, cell_um=cell_um(frame), second=second_map(plan, index))
    if params.gate is not None:
        detections = lesions.gated(detections, gate_score(root, plan, index), params.gate)
    return heat, np.column_stack([detections[:, 0], geometry.l0_from_h(frame, detections[:, 1:3])])


def second_map(plan: Plan, index: int) -> NDArray[np.float32] | None:
    """Return the map that takes part in the confidences of a slide's lesions; None where there is to be none.

    Raises:
        InputError: The other run has no heatmap of the slide, or one of another geometry.
    """
    path = _second_path(plan, index)
    if path is None:
        return None
    planned = plan.slides[index]
    heat, about = files.read_heatmap(path)
    frame = json.loads(json.dumps(planned.frame._asdict()))
    if about.get("frame") != frame:
        cause = "the map of the other run covers other cells of the slide"
        remedy = "run both models with the same geometry, tissue and inference.stride"
        raise InputError(cause, remedy, slide=planned.slide_id, path=path)
    return heat


def _second_path(plan: Plan, index: int) -> Path | None:
    folder = plan.settings.lesions.second
    return None if folder is None else folder / f"heatmaps/{plan.slides[index].slide_id}.tif"


def gate_score(root: Path, plan: Plan, index: int) -> float:
    """Return the score of a slide that has to pass the gate.

    Raises:
        InputError: The file of scores cannot be read, or has none of the slide.
    """
    path, slide_id = plan.settings.lesions.slide_scores, plan.slides[index].slide_id
    if path is None:
        return float((publish.read_receipt(root, stitch.STAGE.product_of(plan, index)) or {})["score"])
    scores = _read_scores(path)
    if slide_id not in scores:
        raise InputError("the file has no score of the slide", "add a line slide_id,score", slide=slide_id, path=path)
    return scores[slide_id]


_read_scores = reread.cached_by_content(4)(read_scores)


def _publish_pictures(
    root: Path, plan: Plan, index: int, heat: NDArray[np.float32], detections: NDArray[np.float64], key: str
) -> None:
    """Publish the pictures of a heatmap that are missing: the pyramid for viewers, the overview and the overlay.

    Args:
        root: The run's folder.
        plan: The run's plan.
        index: Index of the slide.
        heat: The heatmap.
        detections: The detections, (n, 3): prob, x, y in level-0 px.
        key: The key of the slide's detections.
    """
    planned, (preview, overlay, overview) = plan.slides[index], STAGE.beside_of(plan, index)
    if plan.settings.cascade is not None:  # people see the scores of the first pass where there are no others
        first = cascade.first_scores(*first_pass.read_heatmap(root, planned.slide_id), planned.frame)
        heat = np.where(ingest.cells_of_passes(root, plan, planned)[1], first, heat)
    receipt_facts = facts("overlay", planned.slide_id)
    if publish.done_if_present(root, preview, key) is None:
        with publish.publishing(root, preview, key, receipt_facts, publish.accept) as attempt, attempt.timed("write"):
            files.write_preview(attempt.path, heat, um_px=cell_um(planned.frame))
    missing = [name for name in (overview, overlay) if publish.done_if_present(root, name, key) is None]
    if not missing:
        return
    with open_planned(root, planned) as opened:
        pixels, downsample = overviews.read_overview(root, planned, opened, side_px=_OVERVIEW_SIDE_PX)
    if overview in missing:
        publish.publish_bytes(root, overview, overviews.as_jpeg(pixels), key, receipt_facts)
    if overlay in missing:
        small = overviews.reduced(pixels, _OVERLAY_SIDE_PX)
        png = _overlay(planned, small, downsample * pixels.shape[1] / small.shape[1], heat, detections)
        publish.publish_bytes(root, overlay, png, key, receipt_facts)


def _overlay(
    planned: SlidePlan,
    overview: NDArray[np.uint8],
    downsample: float,
    heat: NDArray[np.float32],
    detections: NDArray[np.float64],
) -> bytes:
    """Return the picture of a heatmap on the overview of its slide, with the detections, prob, x, y in level-0 px."""
    corner = geometry.l0_from_h_corner(planned.frame, 0, 0)
    return overlay_png(
        overview,
        heat,
        cell_px=planned.frame.stride_px * planned.frame.l0_per_px / downsample,
        origin_px=(corner[0] / downsample, corner[1] / downsample),
        detections=detections / (1.0, downsample, downsample),
    )


def _key(root: Path, plan: Plan, task: Task) -> str:
    (heatmap,) = stitch.STAGE.published(root, plan, task.slide)
    params = plan.settings.lesions
    # Where the other run and the file of scores lie changes no number.
    values = params.model_dump(exclude={"second", "slide_scores"})
    return publish.key_of(heatmap=heatmap, lesions=values, **_given(plan, task.slide))


def _given(plan: Plan, index: int) -> dict[str, str]:
    """Return what of files beside the run decides a slide's detections; what cannot be read fails the task itself."""
    given = {}
    if (path := _second_path(plan, index)) is not None:
        receipt = publish.read_receipt(path.parents[1], f"heatmaps/{path.name}")
        given["second"] = receipt["sha256"] if receipt else ""
    if (scores := plan.settings.lesions.slide_scores) is not None:
        with suppress(WsiflowError):
            given["score"] = repr(_read_scores(scores).get(plan.slides[index].slide_id))
    return given


STAGE = Stage(
    name="detect",
    unit="slide",
    work=detect,
    product=lambda plan, task: f"detections/{plan.slides[task.slide].slide_id}.csv",
    key=_key,
    cost=StageCost(1.0, 0.0005),
    steps=("write",),
    beside=lambda _maps, _passes: (
        "heatmaps/{slide}.preview.tif",
        "heatmaps/{slide}.png",
        overviews.picture_of("{slide}"),
    ),
)
