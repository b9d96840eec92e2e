"""What of the lesions was looked at, why lesions were missed, and slides on which no tissue was found."""

import math
from dataclasses import replace

import numpy as np
import pytest
from test_evaluate import protocol

from wsiflow.errors import InputError
from wsiflow.evaluation import evaluate, missed
from wsiflow.evaluation.evaluate import Evidence
from wsiflow.evaluation.froc import evaluation_mask
from wsiflow.evaluation.missed import View, is_looked_at
from wsiflow.evaluation.truth import Truth
from wsiflow.heatmap.lesions import LesionParams, trace
from wsiflow.plan import geometry
from wsiflow.plan.geometry import Frame

# Cells of 8 px, tiles of 4 x 4 cells, and a pixel of the evaluation mask for each cell.
FRAME = Frame("centred", 192, 128, 1.0, 1.0, 32, 32, 8, 0, 1, 1, 0, 0, 6, 4)
PARAMS = protocol(downsample=8, l0_um_px=1.0, join_um=0, itc_um=0)
COMPONENTS = LesionParams(
    method="components",
    threshold=0.5,
    unit="cells",
    smoothing=0,
    morphology="none",
    kernel=1,
    min_area=2,
    confidence="max",
    position="peak",
    nms_radius=9,
)
NMS = COMPONENTS.model_copy(update={"method": "nms"})


def evidence(heat: np.ndarray, *boxes: tuple[slice, slice], params: LesionParams = COMPONENTS, **more) -> Evidence:
    """Return a tumour slide with lesions in some boxes of cells, looked at where the heatmap has scores."""
    tumour = np.zeros(FRAME.h_shape, np.bool_)
    for box in boxes:
        tumour[box] = True
    truth = Truth(evaluation_mask(tumour, 8.0, join_um=0, itc_um=0), tumour=tumour, m_um_px=8.0)
    found = trace(heat, params, cell_um=8.0).detections
    detections = np.column_stack([found[:, 0], geometry.l0_from_h(FRAME, found[:, 1:])])
    tiles = ~np.isnan(heat.reshape(4, 4, 6, 4)).all(axis=(1, 3))
    view = View(FRAME, tiles, params, lambda: heat)
    return Evidence("t", 1, truth, detections, view=view, **more)


def flat(score: float = 0.1, *patches: tuple[slice, slice, float]) -> np.ndarray:
    heat = np.full(FRAME.h_shape, score, np.float32)
    for rows, cols, value in patches:
        heat[rows, cols] = value
    return heat


def row(one: Evidence) -> dict[str, object]:
    return evaluate.match_slide(one, PARAMS).row


def test_cells_that_were_not_scored_were_not_looked_at() -> None:
    """In a tile of which a part is scored, a lesion in the other part was not looked at."""
    tiles = np.eye(4, dtype=np.bool_).repeat(2, axis=1)[:, :6]
    cells = np.ones((int(tiles.sum()), 4, 4), np.bool_)
    cells[0, :2] = False
    view = View(FRAME, tiles, COMPONENTS, lambda: flat(), cells=cells)
    points = geometry.l0_from_h(FRAME, np.array([[0.0, 1.0], [0.0, 2.0], [4.0, 0.0], [0.0, 4.0]]))
    assert is_looked_at(view, points).tolist() == [False, True, True, False]


A, B, C = np.s_[2:5, 2:5], np.s_[2:5, 8:11], np.s_[9:14, 17:22]


def test_each_missed_lesion_has_its_reason() -> None:
    """One was not looked at, one is below the threshold, one is too small to be a detection, and one is found."""
    found = np.s_[9:14, 2:7]
    heat = flat(0.1, (*B, 0.3), (*found, 0.9))
    heat[10, 18] = 0.7  # a single cell
    heat[:, 20:] = np.nan
    heat[:8, 16:20] = np.nan
    one = row(evidence(heat, np.s_[1:6, 17:20], B, C, found))
    assert one["missed"] == (
        "lesion 1: not looked at; lesion 2: below the threshold (at most 0.300 of 0.5); "
        "lesion 4: above the threshold (up to 0.700) but too small to be a detection"
    )
    assert (one["n_lesions"], one["n_looked_at"], one["n_found"]) == (4, 3, 1)
    assert one["lesion_recall_area"] == round((9 + 25 + 15) / (15 + 9 + 25 + 25), 6)


@pytest.mark.parametrize("params", [COMPONENTS, NMS], ids=["components", "nms"])
def test_a_lesion_that_was_merged_into_another_says_into_which(params: LesionParams) -> None:
    """Two lesions whose scores hang together, or lie near each other, have one detection, in one of them."""
    heat = flat(0.1, (*A, 0.9), (*B, 0.8), (slice(3, 4), slice(5, 8), 0.6))
    heat[3, 3] = 0.95
    one = row(evidence(heat, A, B, params=params))
    assert one["n_found"] == 1
    assert one["missed"] == "lesion 2: merged into lesion 1"


def test_a_detection_outside_of_a_lesion_says_where_it_is() -> None:
    """Scores go beyond the lesion, and the detection lies in the middle of them."""
    heat = flat(0.1, (slice(2, 11), slice(2, 11), 0.9))
    assert row(evidence(heat, np.s_[2:4, 2:4]))["missed"] == (
        "lesion 1: merged into a detection outside of it, at 52, 52"
    )


def test_a_detection_in_an_ignored_region_is_no_hit() -> None:
    """Where the detection of a lesion lies in a region that is ignored, that is the reason."""
    one = evidence(flat(0.1, (*A, 0.9)), A)
    ignored = np.zeros(FRAME.h_shape, np.bool_)
    ignored[A] = True
    found = row(replace(one, truth=replace(one.truth, ignored=ignored)))
    assert found["missed"] == "lesion 1: its detection lies in an ignored region"


def test_a_slide_that_does_not_pass_the_gate_says_so() -> None:
    """Its lesions are above the threshold, and have no detection."""
    gate = COMPONENTS.model_copy(update={"gate": 0.5})
    one = evidence(flat(0.1, (*A, 0.9)), A, params=gate)
    gated = replace(one, detections=one.detections[:0], view=one.view._replace(read_score=lambda: 0.5))
    assert row(gated)["missed"] == "lesion 1: the slide's score, 0.500, does not pass the gate of 0.5"
    assert row(replace(one, view=one.view._replace(read_score=lambda: 0.6)))["missed"] == ""


def test_lesions_with_one_reason_stand_together() -> None:
    """The column stays readable where many lesions were missed for one reason."""
    assert row(evidence(flat(np.nan), A, B, C))["missed"] == "lesions 1, 2, 3: not looked at"
    assert missed.text({}) == ""


def test_the_metrics_count_all_slides() -> None:
    """Recall is by lesion and by area over all slides; a part of a lesion is enough for the first."""
    half = flat(0.9)
    half[:, 4:] = np.nan
    slides = [evidence(flat(np.nan), A), replace(evidence(half, np.s_[2:4, 2:6], B), slide_id="u")]
    metrics = evaluate.evaluate_cases(slides, PARAMS, seed=0).metrics
    assert metrics["tissue.lesion_recall"] == pytest.approx(1 / 3)
    assert metrics["tissue.lesion_recall_area"] == pytest.approx(4 / (9 + 8 + 9))
    assert metrics["tissue.n_lesions_not_looked_at"] == 2


def test_isolated_tumour_cells_count_by_area_alone() -> None:
    """They are no lesions of the score, so that nobody misses them; their area may still lie outside the tissue."""
    one = evidence(flat(np.nan), A)
    truth = replace(one.truth, lesions=replace(one.truth.lesions, itc=frozenset({1})))
    matched = evaluate.match_slide(replace(one, truth=truth), PARAMS)
    assert (matched.row["missed"], matched.row["n_looked_at"], matched.row["lesion_recall_area"]) == ("", 0, 0.0)
    metrics = evaluate.evaluate_matched([matched], PARAMS, seed=0).metrics
    assert math.isnan(metrics["tissue.lesion_recall"])
    assert metrics["tissue.lesion_recall_area"] == 0


def test_without_a_view_nothing_is_said() -> None:
    """Detections that another program wrote do not say what it looked at."""
    scores = evaluate.evaluate_cases([replace(evidence(flat(), A), view=None)], PARAMS, seed=0)
    assert not any(name.startswith("tissue.") for name in scores.metrics)
    assert "missed" not in scores.cases[0]


@pytest.mark.parametrize("label", [0, 1, None])
@pytest.mark.parametrize("policy", ["leave_out", "score", "fail"])
def test_a_slide_without_tissue(policy: str, label: int | None) -> None:
    """With a label it is left out, counts as 0, or fails, as the protocol says; without one there is nothing to say."""
    params = protocol(downsample=8, l0_um_px=1.0, no_tissue=policy)
    one = Evidence("t", label, None, np.empty((0, 3)), score=0.0, is_empty=True)
    if policy == "fail" and label is not None:
        with pytest.raises(InputError, match=r"slide t.*no tissue was found.*tissue=all"):
            evaluate.match_slide(one, params)
        return
    matched = evaluate.match_slide(one, params)
    counts = policy == "score" and label is not None
    assert (matched.record.in_auc, matched.record.in_froc) == (counts, counts and label == 0)
    assert matched.row["score"] == ("" if policy == "leave_out" and label is not None else 0.0)
    assert ("no tissue was found" in matched.row["note"]) == (label is not None)


def test_the_policy_is_a_rule_of_the_protocol_where_it_is_set() -> None:
    """Scores that count empty slides are not compared with scores that do not; the default has the hash of before."""
    assert "no_tissue" not in protocol().protocol()
    assert protocol(no_tissue="score").protocol_hash() != protocol().protocol_hash()
