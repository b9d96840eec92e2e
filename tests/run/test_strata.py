"""Which windows a certificate compares: every kind, with weights that give the slide's mean, and lesions above all."""

from types import SimpleNamespace

import numpy as np
import pytest

from wsiflow.heatmap.lesions import LesionParams
from wsiflow.model.certificate import score_deviation
from wsiflow.model.choice import Choice
from wsiflow.plan.blocks import BlockLimits, blocks, window_corners_px
from wsiflow.plan.geometry import Frame, h_from_t
from wsiflow.run.stages import certificates, passed_over, strata
from wsiflow.run.stages.certificates import Certificate
from wsiflow.run.stages.passed_over import PassedOver

FRAME = Frame("centred", 9000, 9000, 1.0, 0.243, 224, 224, 56, 112, 4, 6, 0, 0, 40, 40)
BLOCKS = blocks(np.ones((40, 40), np.bool_), BlockLimits(224, 112, 4, 6))
SEEDS = [f"{seed:016x}" for seed in range(40)]
LESION = np.s_[70:73, 80:84]
NMS = {"method": "nms", "threshold": 0.5, "unit": "um", "smoothing": 0, "morphology": "none", "kernel": 0}
PARAMS = LesionParams(**NMS, min_area=0, confidence="max", position="peak", nms_radius=187)


def scores_of(seed: int) -> np.ndarray:
    """Return the scores of a slide whose only tumour is a micrometastasis of twelve cells."""
    heat = (np.random.default_rng(seed).random(FRAME.h_shape) * 0.3).astype(np.float32)
    heat[LESION] = 0.9
    return heat


def regions() -> np.ndarray:
    marked = np.zeros(FRAME.h_shape, np.int32)
    marked[LESION] = 1
    return marked


def drawn_from(heat: np.ndarray, marked: np.ndarray | None, seed: str, peaks: tuple[tuple[int, int], ...] = ()):
    cells = np.array(peaks, np.int64).reshape(-1, 2)
    return strata.draw(strata.Scored(FRAME, BLOCKS, heat, 0.5, cells, marked), seed=seed, count=200)


def certified(published: np.ndarray, exact: np.ndarray, marked: np.ndarray | None, seed: str) -> Certificate:
    drawn = drawn_from(published, marked, seed)
    at = tuple(drawn.cells.T)
    weight, part, unit = (each.tolist() for each in drawn.weighing)
    return Certificate(
        pairs={"windows": {"scores": published[at].tolist(), "expected": exact[at].tolist()}},
        kind=drawn.kind.tolist(),
        region=drawn.region.tolist(),
        detection=drawn.detection.tolist(),
        weight=weight,
        part=part,
        unit=unit,
        prob=[],
        hit=[],
        highest=None if marked is None else {"1": float(published[LESION].max())},
        itc=[],
        n_regions=0 if marked is None else 1,
    )


def plan(threshold: float = 0.5, **choice: object) -> SimpleNamespace:
    """Return as much of a plan as says what is tolerated: by default that of a network that pads, at 0.1."""
    params = PARAMS.model_copy(update={"threshold": threshold})
    usual = Choice("dense", "openvino", "fp32", 32, 56, "", 96, False, 192, 4, 6)
    return SimpleNamespace(settings=SimpleNamespace(lesions=params, tolerance=0.1, choice=usual._replace(**choice)))


@pytest.mark.parametrize("choice", [{}, {"exact": True, "precision": "int8"}, {"engine": "window", "refine": 0.1}])
def test_an_engine_that_erases_every_tumour_window_never_passes(choice: dict) -> None:
    """Whatever is drawn: the lesion is lost, and the mean inside it beyond the tolerance. A near engine passes."""
    for number, seed in enumerate(SEEDS):
        exact = scores_of(number)
        erased = np.where(exact > 0.5, np.float32(0), exact)
        found = certificates.exceeded(plan(**choice), certified(erased, exact, regions(), seed))["windows"]
        assert any(text.startswith("inside lesions mean abs diff is 0.9") for text in found)
        assert found[-1] == "a lesion is lost: no score in it exceeds 0.5"
        near = np.clip(exact + np.float32(0.005), 0, 1)
        assert certificates.exceeded(plan(**choice), certified(near, exact, regions(), seed)) == {"windows": []}


def test_a_lesion_that_is_still_found_is_not_lost() -> None:
    """A window that was missed counts by its difference alone where another one of the lesion exceeds the threshold."""
    exact = scores_of(0)
    partly = exact.copy()
    partly[70] = 0.0
    one = certified(partly, exact, regions(), SEEDS[0])
    assert certificates.lost_lesions(plan(), one) == []
    assert certificates.lost_lesions(plan(), one._replace(highest={"1": 0.0})) == [1]
    assert certificates.lost_lesions(plan(), one._replace(highest=None)) == []


def test_decisions_are_those_at_the_threshold_of_detections() -> None:
    """A lesion that falls from 0.95 to 0.8 is lost at 0.9 and not at 0.5."""
    exact, published = scores_of(6), scores_of(6)
    exact[LESION], published[LESION] = 0.95, 0.8
    one = certified(published, exact, regions(), SEEDS[6])
    for threshold, lost in ((0.5, []), (0.9, [1])):
        at = plan(threshold)
        assert certificates.lost_lesions(at, one) == lost
        assert bool(certificates.deviation(at, one, "windows").flips) == bool(lost)


def test_without_truth_the_certificate_is_about_all_tissue() -> None:
    """No window is drawn for lesions, and no lesion can be lost."""
    one = certified(np.where(scores_of(1) > 0.5, 0, scores_of(1)), scores_of(1), None, SEEDS[1])
    assert strata.KINDS.index("lesion") not in one.kind
    assert certificates.exceeded(plan(), one)["windows"] == []


def test_every_cell_is_of_one_kind_and_the_weights_are_their_numbers() -> None:
    """Peaks stand for themselves, and the weights of each kind sum to its number of cells."""
    heat, seed = scores_of(2), SEEDS[2]
    heat[100:104, 20:60] = 0.45
    heat[:4, :4] = np.nan
    drawn = drawn_from(heat, regions(), seed, ((71, 81), (5, 150)))
    kind = [strata.KINDS[i] for i in drawn.kind]
    assert len(set(map(tuple, drawn.cells.tolist()))) == len(kind), "no window twice"
    sums = {name: drawn.weighing.weight[drawn.kind == i].sum() for i, name in enumerate(strata.KINDS)}
    assert sums == pytest.approx(
        {"detection": 2, "lesion": 11, "threshold": 160, "rest": np.isfinite(heat).sum() - 173}
    )
    assert sorted(drawn.detection[drawn.detection >= 0]) == [0, 1]
    assert kind.count("lesion") == 11
    assert 25 <= kind.count("threshold") <= 32
    assert 160 <= len(kind) <= 215
    assert len(np.unique(drawn.block[drawn.kind == 3])) == 8


def test_every_detection_has_a_window_however_many_there_are() -> None:
    """Three hundred detections all over the slide are run again, and a few windows of other tissue besides."""
    peaks = tuple((row, col) for row in range(0, 160, 8) for col in range(0, 150, 10))
    drawn = drawn_from(scores_of(2), None, SEEDS[2], peaks)
    own = drawn.kind == strata.KINDS.index("detection")
    assert sorted(drawn.detection[own]) == list(range(300))
    assert all(tuple(cell) == peaks[i] for cell, i in zip(drawn.cells[own].tolist(), drawn.detection[own], strict=True))
    assert (drawn.weighing.weight[own] == 1).all()
    assert 25 <= (~own).sum() <= 40


def test_every_region_has_a_window_however_many_there_are() -> None:
    """A hundred lesions of one cell each are all looked at."""
    marked = np.zeros(FRAME.h_shape, np.int32)
    marked[::16, ::16] = np.arange(1, 101).reshape(10, 10)
    drawn = drawn_from(scores_of(3), marked, SEEDS[3])
    assert sorted(drawn.region[drawn.region > 0]) == list(range(1, 101))


def test_windows_lie_where_their_cells_say() -> None:
    """The number of a window in its block gives the corner that is the centre of its cell less half a window."""
    drawn = drawn_from(scores_of(4), regions(), SEEDS[4])
    for number, window, (row, col) in zip(drawn.block, drawn.window, drawn.cells, strict=True):
        block = BLOCKS[number]
        x, y = window_corners_px(FRAME, block)[window] - FRAME.halo_px
        first_row, first_col = h_from_t(FRAME, block.t_col, block.t_row)
        centre = np.array([col - first_col, row - first_row]) * 56 + 28
        assert (np.array([x, y]) + 112 == centre).all()


ALIKE = np.zeros(FRAME.h_shape, np.float32)
ALIKE[:40], ALIKE[100:110] = 0.1, 0.02  # whole blocks deviate, so that windows of a block are alike
RARE = np.zeros(FRAME.h_shape, np.float32)
RARE[:, ::40] = 0.6


@pytest.mark.parametrize("off", [ALIKE, RARE], ids=["blocks", "rare"])
def test_means_are_those_of_the_slide_and_bounds_hold(off: np.ndarray) -> None:
    """Over many draws the estimates scatter around the truth, and the bounds are above it in 95 % at least."""
    exact = scores_of(5)
    published, means, held = np.clip(exact + off, 0, 1), [], []
    truth = float(np.abs(published.astype(np.float64) - exact).mean())
    for seed in SEEDS:
        drawn = drawn_from(published, regions(), seed)
        at = tuple(drawn.cells.T)
        found = score_deviation(published[at], exact[at], weighing=drawn.weighing)
        means.append(found.mean_abs_diff)
        held.append(found.mean_abs_diff_at_most >= truth)
        if found.max_abs_diff < off.max() - 0.01:  # then it is the bound of the share beyond that says how many
            held[-1] = found.beyond_max_at_most >= float((off > 0.02).mean())
    assert np.mean(means) == pytest.approx(truth, abs=3 * np.std(means) / len(SEEDS) ** 0.5)
    assert np.mean(held) >= 0.95


def passed_over_lesion(exact: np.ndarray, marked: np.ndarray | None, seed: str, first: float = 0.02) -> PassedOver:
    """Return the certificate of a slide of which a first pass passes over everything but a corner."""
    passed = np.ones(FRAME.h_shape, np.bool_)
    passed[:4, :4] = False
    low = np.full(FRAME.h_shape, first, np.float32)
    drawn = strata.draw_passed_over(passed, low, marked, seed=seed, count=200)
    weight, part, _ = (each.tolist() for each in drawn.weighing)
    inside = {"above": 0, "inside": 0, "cells": int(passed.sum()), "scored": 16}
    expected = exact[tuple(drawn.cells.T)].tolist()
    return PassedOver(**inside, first=[], expected=expected, region=drawn.region.tolist(), weight=weight, part=part)


def test_what_is_passed_over_is_estimated_by_weighted_windows() -> None:
    """Weights add up to all cells; the share above the threshold is unbiased, and its bound holds in 90 % and more."""
    heat = (np.random.default_rng(1).random(FRAME.h_shape) * 0.6).astype(np.float32)
    truth, shares, held = (heat > 0.5).mean(), [], 0
    for seed in SEEDS:
        one = passed_over_lesion(heat, regions(), seed)
        assert sum(one.weight) == pytest.approx(one.cells)
        assert one.region.count(1) == 12
        found = passed_over.estimate([one], 0.5)
        shares.append(found.share)
        held += found.share_at_most >= truth
    assert np.mean(shares) == pytest.approx(truth, abs=0.01)
    assert held >= 0.9 * len(SEEDS)
    pooled = passed_over.estimate([passed_over_lesion(heat, None, seed) for seed in SEEDS], 0.5)
    assert truth < pooled.share_at_most < truth + 0.02
    assert pooled.missed == 1.0


def test_half_of_the_other_windows_are_where_the_first_pass_scores_highest() -> None:
    """A tenth of the cells has half of the windows; where there are few cells, all are drawn, and no bound is above."""
    rng = np.random.default_rng(2)
    first = rng.random(FRAME.h_shape).astype(np.float32)
    drawn = strata.draw_passed_over(np.ones(FRAME.h_shape, np.bool_), first, None, seed=SEEDS[3], count=100)
    highest = first[tuple(drawn.cells.T)] > np.quantile(first, 0.9)
    assert (highest.sum(), len(highest)) == (50, 100)
    few = np.zeros(FRAME.h_shape, np.bool_)
    few[0, :30] = True
    assert len(strata.draw_passed_over(few, first, None, seed=SEEDS[3], count=100).cells) == 30
    assert not len(strata.draw_passed_over(~few & few, first, None, seed=SEEDS[3], count=100).cells)


def test_a_lesion_that_is_passed_over_is_lost() -> None:
    """Truth decides where it is known, else shares; isolated tumour cells and false positives are no loss."""
    limits = {"threshold": 0.5, "tolerance": 0.02}
    one = passed_over_lesion(scores_of(3), regions(), SEEDS[0])
    assert passed_over.lost_lesions(one, {}, [], 0.5) == [1]
    assert passed_over.lost_lesions(one, {"1": 0.9}, [], 0.5) == []
    assert passed_over.lost_lesions(one, {}, [1], 0.5) == []
    (lost, most) = passed_over.excess(one, is_known=True, lost=1, **limits)
    assert lost.startswith("a lesion is lost")
    assert most == "100% of all scores above 0.5 in annotated lesions would be there, allowed 50%"
    false = scores_of(4) * 0.0 + (np.arange(160) < 20).astype(np.float32)  # an eighth of the slide
    known, unknown = (passed_over_lesion(false, marked, SEEDS[1]) for marked in (regions(), None))
    assert passed_over.excess(known, is_known=True, lost=0, **limits) == []
    share, _ = passed_over.excess(unknown, is_known=False, lost=0, **limits)
    assert share.endswith("of it would score above 0.5, allowed 0.02")
