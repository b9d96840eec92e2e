"""What the fast way could cost in FROC, from the windows that certificates recompute."""

from types import SimpleNamespace

import pytest

from wsiflow.evaluation.matches import EvaluationRecord, SlideRecord
from wsiflow.run.results import certified
from wsiflow.run.stages.certificates import Certificate
from wsiflow.run.stages.passed_over import PassedOver

PLAN = SimpleNamespace(
    settings=SimpleNamespace(
        lesions=SimpleNamespace(threshold=0.5, second=None, gate=None),
        evaluation=SimpleNamespace(bootstrap=200),
        tolerance=0.02,
    )
)


def slide(name: str, best: list[float | None], false: list[float]) -> SlideRecord:
    return SlideRecord(
        slide_id=name,
        label=int(bool(best)),
        score=max([*(one or 0 for one in best), *false, 0]),
        in_froc=True,
        in_auc=True,
        reason="",
        truth=name,
        best=best,
        n_itc=0,
        itc=[],
        false_positives=false,
    )


def certificate(
    prob: list[float], hit: list[int], windows: list[tuple[int, int, float, float]], n_regions: int
) -> Certificate:
    """Return a certificate of windows: detection, or -1; region, or 0; published score; score in fp32."""
    detection, region, scores, expected = (list(each) for each in zip(*windows, strict=True))
    n = len(windows)
    return Certificate(
        pairs={"windows": {"scores": scores, "expected": expected}},
        kind=[1 if number else 0 for number in region],
        region=region,
        detection=detection,
        weight=[1.0] * n,
        part=[0] * n,
        unit=list(range(n)),
        prob=prob,
        hit=hit,
        highest={str(number): 0.0 for number in range(1, n_regions + 1)},
        itc=[],
        n_regions=n_regions,
    )


def record(*slides: SlideRecord) -> EvaluationRecord:
    return EvaluationRecord(protocol={}, protocol_hash="", slides=list(slides))


NORMAL = [slide(f"n{k}", [], [0.6]) for k in range(6)]
TUMOUR = [slide(f"t{k}", [0.9, None], [0.7]) for k in range(6)]
SAME = certificate([0.9, 0.7], [1, 0], [(0, 0, 0.95, 0.95), (-1, 2, 0.1, 0.1)], 2)
LOST = certificate([0.9, 0.7], [1, 0], [(0, 0, 0.95, 0.95), (-1, 2, 0.1, 0.8)], 2)


def test_without_a_difference_the_interval_has_a_width() -> None:
    """All windows agree: the difference is 0, and with twelve lesions a loss is not excluded."""
    read = {one.slide_id: SAME for one in TUMOUR}
    found = certified.froc_difference(PLAN, read, record(*TUMOUR, *NORMAL), seed=1)
    assert found["certificate.froc_difference"] == 0
    assert found["certificate.froc_difference_ci_low"] < -0.05
    assert "FROC as in fp32 there, a loss of more than" in certified.sentence(found | {"dense.n": 9.0}, 0.5)


def test_lesions_that_fp32_finds_are_a_loss() -> None:
    """In four of twelve lesions a window alone exceeds the threshold: they are missed, and fp32 would find them."""
    read = {one.slide_id: LOST if k < 4 else SAME for k, one in enumerate(TUMOUR)}
    found = certified.froc_difference(PLAN, read, record(*TUMOUR, *NORMAL), seed=1)
    assert found["certificate.froc_difference"] == pytest.approx(-4 / 12, abs=0.05)
    assert found["certificate.froc_difference_ci_low"] < found["certificate.froc_difference"]


def test_lesions_that_a_first_pass_passes_over_are_a_loss() -> None:
    """Windows in four of twelve lesions exceed the threshold; those elsewhere count for nothing."""
    about = {
        "cells": 90,
        "scored": 10,
        "above": 0,
        "inside": 0,
        "first": [0.1, 0.1],
        "weight": [45.0] * 2,
        "part": [0, 0],
    }
    passed = PassedOver(**about, expected=[0.8, 0.9], region=[2, 0])
    read = {one.slide_id: SAME._replace(passed=passed) if k < 4 else SAME for k, one in enumerate(TUMOUR)}
    found = certified.froc_difference(PLAN, read, record(*TUMOUR, *NORMAL), seed=1)
    assert found["certificate.froc_difference"] == pytest.approx(-4 / 12, abs=0.05)
    metrics = certified._of_first_pass(PLAN, [one for one in read.values() if one.passed])
    assert (metrics["cascade.lesions_lost"], metrics["cascade.passed_over"]) == (4, 0.9)
    assert "90.0% of the tissue passed over" in certified.cascade_sentence(metrics, 0.5)


def test_a_detection_that_fp32_does_not_confirm_is_gone() -> None:
    """Its highest cell is not above the threshold in fp32; others move by the difference there."""
    one = certificate([0.9, 0.7], [1, 0], [(0, 0, 0.95, 0.85), (1, 0, 0.8, 0.4)], 2)
    exact = certified._in_fp32(one, 0.5)
    assert exact.prob == pytest.approx([0.8])
    assert exact.hit.tolist() == [1]


def test_a_slide_whose_truth_has_changed_keeps_its_scores() -> None:
    """The certificate has other matches than the evaluation: nothing of it is exchanged."""
    (published,) = record(slide("t0", [0.9], [])).setting("").matches
    assert certified._exchanged(PLAN, published, LOST) is published
    assert certified._exchanged(PLAN, published, None) is published


def test_nothing_is_said_of_froc_where_other_scores_take_part() -> None:
    """With a gate or a second map, confidences are not those of the windows that were run again."""
    for given in ({"gate": 0.5}, {"second": "run"}):
        lesions = SimpleNamespace(threshold=0.5, **{"second": None, "gate": None, **given})
        plan = SimpleNamespace(settings=SimpleNamespace(lesions=lesions))
        read = {one.slide_id: SAME for one in TUMOUR}
        assert certified.froc_difference(plan, read, record(*TUMOUR, *NORMAL), seed=1) == {}


def test_nothing_is_said_of_froc_without_lesions() -> None:
    """Where no lesion counts, there is no FROC score, and the sentence says so."""
    assert certified.froc_difference(PLAN, {}, record(*NORMAL), seed=1) == {}
    said = certified.sentence({"dense.n": 9.0, "dense.mean_abs_diff": 0.01, "certificate.lesions_lost": 2.0}, 0.5)
    assert "what that costs in FROC is not known" in said
    assert said.endswith("lesions lost: 2")
    assert certified.sentence({}, 0.5) == ""
