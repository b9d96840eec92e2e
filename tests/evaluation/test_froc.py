"""FROC: worked examples of the challenge's evaluator to the last digit, and laws of the strict mode."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage import measure

from wsiflow.errors import InputError
from wsiflow.evaluation import froc
from wsiflow.evaluation.froc import SlideFindings

RATES = ("0.25", "0.5", "1", "2", "4", "8")


def mask(shape, *boxes, um_px=25.0):
    """Return the evaluation mask of tumour boxes (rows, cols)."""
    tumour = np.zeros(shape, bool)
    for rows, cols in boxes:
        tumour[rows, cols] = True
    return froc.evaluation_mask(tumour, um_px)


def slide(slide_id, lesions, *detections, downsample=1):
    """Return the findings of one slide."""
    return SlideFindings(slide_id, lesions, np.array(detections, float).reshape(-1, 3), downsample)


def box(rows, cols):
    """Return a box from two ranges."""
    return slice(*rows), slice(*cols)


BLOB, ITC = box((5, 9), (3, 13)), box((15, 16), (20, 23))
PAIR = [box((4, 5), (2, 9)), box((4, 5), (11, 18)), box((12, 15), (25, 37))]


def e1():
    """Return example E1: an ITC, a dilated edge, a bridged gap, an empty slide."""
    a = slide("a", mask((20, 40), BLOB, ITC), (0.9, 6, 6), (0.6, 2, 4), (0.95, 20, 15), (0.4, 30, 2))
    b = slide("b", mask((20, 40), *PAIR), (0.7, 9, 4), (0.3, 30, 13), (0.25, 0, 19), (0.35, 39, 0))
    c = slide("c", None, (0.8, 5, 5), (0.2, 7, 7), (0.1, 8, 8), (0.05, 9, 9))
    return [a, b, c, slide("d", None)]


def e2(*extra):
    """Return example E2: no ITC and no missed lesion, hence no zero among the official hits."""
    a = slide("a", mask((20, 40), BLOB), (0.9, 6, 6), (0.5, 30, 2))
    b = slide("b", mask((20, 40), *PAIR), (0.7, 9, 4), (0.3, 30, 13), *extra)
    return [a, b, slide("c", None, (0.6, 5, 5))]


def perfect(*boxes):
    """Return E2's slides with every lesion found at confidence 1 and no false positive."""
    a = slide("a", mask((20, 40), *boxes), (1, 6, 6))
    return [a, slide("b", mask((20, 40), *PAIR), (1, 9, 4), (1, 30, 13)), slide("c", None)]


def e3_tumour():
    """Return example E3's tumour mask at 1/32: joined and separate boxes, strips, a ring."""
    tumour = np.zeros((100, 160), bool)
    for rows, cols in [
        ((20, 30), (10, 40)),
        ((20, 30), (48, 60)),
        ((20, 30), (69, 90)),
        ((60, 61), (10, 36)),
        ((60, 61), (100, 128)),
        ((70, 90), (60, 90)),
    ]:
        tumour[slice(*rows), slice(*cols)] = True
    tumour[74:86, 64:86] = False
    return tumour


E3_DETECTIONS = [
    (0.9, 1471, 831),
    (0.8, 384, 512),
    (0.7, 2405, 2565),
    (0.5, 640, 1920),
    (0.3, 3520, 1920),
    (0.3, 160, 640),
    (0.95, 2400, 800),
]


def e3():
    """Return example E3: the challenge's own constants."""
    lesions = froc.evaluation_mask(e3_tumour(), 0.243 * 32)
    return [
        slide("t", lesions, *E3_DETECTIONS, downsample=32),
        slide("s", None, (0.85, 100, 100), downsample=32),
        slide("n", None, (0.7, 640, 640), downsample=32),
    ]


def sensitivities(slides, mode="official"):
    """Return the six sensitivities."""
    prefix = "froc." if mode == "official" else "froc.strict_"
    scores = froc.evaluate(slides, mode=mode)
    return [scores[f"{prefix}sensitivity_at_{rate}"] for rate in RATES]


def points(slides, mode="official"):
    """Return the operating points as two lists."""
    curve = froc.curve([froc.match(one) for one in slides], mode=mode)
    return curve.fp_per_slide.tolist(), curve.sensitivity.tolist()


def table(lesions):
    """Return area, bounding box and major axis of each region."""
    boxes = ndimage.find_objects(lesions.labels)
    return [
        (int((lesions.labels == k).sum()), (r.start, c.start, r.stop, c.stop), round(float(axis), 4))
        for k, ((r, c), axis) in enumerate(zip(boxes, lesions.major_axis_px, strict=True), start=1)
    ]


def test_e1_regions():
    """Dilation by one pixel, the bridge over a 2 px gap and the major axes are those of the worked example."""
    a, b = (one.lesions for one in e1()[:2])
    assert [(area, axis) for area, _, axis in table(a)] == [(72, 13.8082), (15, 5.6569)]
    assert a.itc == {2}
    assert [(area, axis) for area, _, axis in table(b)] == [(54, 20.7525), (70, 16.1245)]
    assert b.itc == frozenset()


def test_e1_curve_and_score():
    """E1 gives its eleven operating points and 0.888889."""
    fp, sens = points(e1())
    assert fp == [1.75, 1.5, 1.25, 1, 0.75, 0.75, 0.5, 0.25, 0.25, 0, 0]
    assert sens == [1, 1, 1, 1, 1, 2 / 3, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 0]
    assert sensitivities(e1()) == [2 / 3, 2 / 3, 1, 1, 1, 1]
    assert round(froc.evaluate(e1(), mode="official")["froc.score"], 6) == 0.888889


def test_e1_without_the_empty_slide():
    """A slide without detections still counts in the denominator: leaving it out changes the score."""
    assert sensitivities(e1()[:3]) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1], abs=1e-15)
    assert round(froc.evaluate(e1()[:3], mode="official")["froc.score"], 6) == 0.833333


def test_e1_counts():
    """Lesions, ITC and slides are counted in the same way in both modes."""
    for mode in ("official", "strict"):
        scores = froc.evaluate(e1(), mode=mode)
        assert [scores[f"froc.n_{what}"] for what in ("lesions", "itc", "slides")] == [3, 1, 4]


def test_e2_loses_its_lowest_threshold():
    """Without any zero among the hits the official mode drops a true positive; strict keeps it."""
    fp, sens = points(e2())
    assert fp == pytest.approx([2 / 3, 1 / 3, 0, 0, 0], abs=1e-15)
    assert sens == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1 / 3, 0], abs=1e-15)
    assert round(froc.evaluate(e2(), mode="official")["froc.score"], 6) == 0.666667
    assert sensitivities(e2(), "strict") == pytest.approx([2 / 3, 2 / 3, 1, 1, 1, 1], abs=1e-15)
    assert round(froc.evaluate(e2(), mode="strict")["froc.strict_score"], 6) == 0.888889


def test_e2b_a_false_positive_raises_the_official_score():
    """One more false positive, lower than all, takes the place of the dropped threshold."""
    fp, sens = points(e2((0.1, 0, 19)))
    assert fp == pytest.approx([2 / 3, 2 / 3, 1 / 3, 0, 0, 0], abs=1e-15)
    assert sens == pytest.approx([1, 2 / 3, 2 / 3, 2 / 3, 1 / 3, 0], abs=1e-15)
    assert round(froc.evaluate(e2((0.1, 0, 19)), mode="official")["froc.score"], 6) == 0.888889


def test_e2c_a_perfect_detector_scores_zero_officially():
    """All confidences equal and nothing missed: the only threshold is dropped; strict scores 1."""
    assert points(perfect(BLOB)) == ([0], [0])
    assert froc.evaluate(perfect(BLOB), mode="official")["froc.score"] == 0
    assert froc.evaluate(perfect(BLOB), mode="strict")["froc.strict_score"] == 1


def test_e2d_nothing_detected():
    """No detection at all is a single point and a score of 0 in both modes."""
    silent = [SlideFindings(one.slide_id, one.lesions, np.empty((0, 3)), 1) for one in e2()]
    assert points(silent) == ([0], [0])
    assert froc.evaluate(silent, mode="official")["froc.score"] == 0
    assert froc.evaluate(silent, mode="strict")["froc.strict_score"] == 0


def test_e2e_an_itc_rescues_the_perfect_detector():
    """An ITC adds a zero, which is the threshold that the official mode drops."""
    assert points(perfect(BLOB, ITC)) == ([0, 0], [1, 0])
    assert froc.evaluate(perfect(BLOB, ITC), mode="official")["froc.score"] == 1


def test_e3_regions():
    """The challenge's constants join at 8 px, keep apart at 9 px and fill the ring."""
    lesions = e3()[0].lesions
    assert table(lesions) == [
        (1020, (16, 6, 34, 64), 66.5171),
        (510, (16, 65, 34, 94), 32.8017),
        (294, (56, 6, 65, 40), 37.8421),
        (312, (56, 96, 65, 132), 40.1446),
        (1052, (66, 56, 94, 94), 43.4243),
    ]
    assert lesions.itc == {2}


def test_e3_curve_and_score():
    """float32(0.3) exceeds 0.3, which separates a hit from an equal false positive; float32(0.7) does not."""
    fp, sens = points(e3())
    assert fp == [1, 2 / 3, 2 / 3, 2 / 3, 2 / 3, 1 / 3, 0, 0]
    assert sens == [1, 1, 0.75, 0.5, 0.5, 0.25, 0.25, 0]
    assert sensitivities(e3()) == pytest.approx([0.25, 0.375, 1, 1, 1, 1], abs=1e-15)
    assert round(froc.evaluate(e3(), mode="official")["froc.score"], 6) == 0.770833


def test_e3_strict():
    """All comparisons are in float64, and equal confidences count together."""
    assert points(e3(), "strict") == ([1, 2 / 3, 2 / 3, 1 / 3, 0, 0], [1, 0.75, 0.5, 0.25, 0.25, 0])
    assert round(froc.evaluate(e3(), mode="strict")["froc.strict_score"], 6) == 0.770833


@pytest.mark.parametrize(("gap", "regions"), [(8, 1), (9, 2)])
def test_joining_distance(gap, regions):
    """Annotations with 8 background px between them are one lesion, with 9 px two."""
    tumour = np.zeros((30, 80), bool)
    tumour[10:20, 10:30] = tumour[10:20, 30 + gap : 60] = True
    assert froc.evaluation_mask(tumour, 0.243 * 32).n_regions == regions


@pytest.mark.parametrize(("length", "axis", "itc"), [(23, 34.390, True), (24, 35.541, False)])
def test_itc_limit_of_a_strip(length, axis, itc):
    """A 1 px strip of 23 px is ITC, of 24 px a lesion."""
    lesions = mask((30, 60), box((15, 16), (10, 10 + length)), um_px=0.243 * 32)
    assert round(lesions.major_axis_px[0], 3) == axis
    assert (lesions.n_lesions == 0) is itc


@pytest.mark.parametrize(("diameter", "axis", "itc"), [(26, 34.765, True), (27, 35.772, False)])
def test_itc_limit_of_a_disc(diameter, axis, itc):
    """A disc about a pixel centre, of diameter 26 px, is ITC, of 27 px a lesion."""
    y, x = np.mgrid[:60, :60] - 30
    lesions = froc.evaluation_mask(np.hypot(y, x) <= diameter / 2, 0.243 * 32)
    assert round(lesions.major_axis_px[0], 3) == axis
    assert (lesions.n_lesions == 0) is itc


def test_single_pixel_has_no_length():
    """Major axes are of pixel centres, so that one undilated pixel has length 0."""
    assert mask((9, 9), box((4, 5), (4, 5)), um_px=75.0).major_axis_px.tolist() == [0]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.floats(0.02, 0.4), st.sampled_from([0.243 * 32, 8.0, 25.0, 75.0]))
def test_mask_equals_the_plain_recipe(seed, density, um_px):
    """Regions equal those of a distance transform, hole filling and region properties of the whole mask."""
    rng = np.random.default_rng(seed)
    tumour = ndimage.zoom(rng.random((9, 11)) < density, 4, order=0)
    lesions = froc.evaluation_mask(tumour, um_px)
    near = ndimage.distance_transform_edt(~tumour) < 75 / (um_px * 2) if tumour.any() else tumour
    expected = measure.label(ndimage.binary_fill_holes(near), connectivity=2)
    assert np.array_equal(lesions.labels, expected)
    axes = [region.axis_major_length for region in measure.regionprops(expected)]
    assert lesions.major_axis_px == pytest.approx(axes, abs=1e-6)


def test_dilation_ends_before_its_radius():
    """A pixel whose centre is just 37.5 um away is not annotated, one a pixel nearer is."""
    lesions = mask((15, 15), box((7, 8), (7, 8)), um_px=12.5)
    assert np.flatnonzero(lesions.labels[7]).tolist() == [5, 6, 7, 8, 9]


def test_mask_without_tumour():
    """No tumour is a valid mask with no region."""
    lesions = mask((5, 5))
    assert (lesions.n_regions, lesions.n_lesions, lesions.labels.max()) == (0, 0, 0)


@pytest.mark.parametrize("um_px", [0.0, -1.0, math.nan, math.inf, 0.000243 * 32, 1e-300])
def test_impossible_spacing_is_refused(um_px):
    """A spacing of 0 or in mm is refused before the disc of the joining distance fills the memory."""
    with pytest.raises(InputError, match="um"):
        froc.evaluation_mask(np.ones((3, 3), bool), um_px)


@pytest.mark.parametrize("xy", [(-1, 6), (6, -1), (40, 6), (6, 20), (1e300, 6)])
def test_outside_the_mask_is_a_false_positive(xy):
    """A detection outside the mask neither wraps around nor stops the evaluation."""
    matched = froc.match(slide("a", mask((20, 40), box((0, 20), (0, 40))), (0.9, *xy)))
    assert matched.false_positives.tolist() == [0.9]
    assert matched.best.tolist() == [-math.inf]


def test_coordinates_meet_the_mask_by_floor_division():
    """The last level-0 pixel of a mask pixel belongs to it; the next one does not."""
    lesions = mask((4, 4), box((2, 3), (1, 2)), um_px=75.0)
    hits = [(0.9, 32, 64), (0.8, 63, 95), (0.7, 31, 64), (0.6, 64, 64)]
    assert froc.match(slide("a", lesions, *hits, downsample=32)).false_positives.tolist() == [0.7, 0.6]


def test_no_lesions_has_no_sensitivity():
    """Without lesions the score is NaN in both modes, never 0 or 1."""
    normal = [slide("c", None, (0.5, 1, 1))]
    assert math.isnan(froc.evaluate(normal, mode="official")["froc.score"])
    assert math.isnan(froc.evaluate(normal, mode="strict")["froc.strict_score"])
    assert math.isnan(froc.evaluate([], mode="strict")["froc.strict_score"])


@pytest.mark.parametrize(
    "row", [(math.nan, 1, 1), (0.5, math.inf, 1), (0.5, 1, -math.inf), (-3.0, 1, 1), (-1e-30, 1, 1), (1.0000001, 1, 1)]
)
def test_what_is_no_probability_at_a_point_is_refused(row):
    """NaN and logits are refused with the name of the slide: below 0 every missed lesion would count as found."""
    with pytest.raises(InputError, match=r"slide bad.*from 0 to 1"):
        froc.match(slide("bad", None, (0.1, 2, 2), row))


def test_same_slide_twice_is_refused():
    """A slide that is counted twice would change every rate."""
    with pytest.raises(InputError, match="slide c"):
        froc.evaluate([slide("c", None), slide("c", None)], mode="strict")


def test_wrong_shape_is_refused():
    """Detections have three columns."""
    with pytest.raises(InputError, match=r"\(2, 4\)"):
        froc.match(SlideFindings("a", None, np.zeros((2, 4))))


def findings(draw_values):
    """Return a strategy for a small set of slides on one mask with two lesions."""
    lesions = mask((20, 40), *PAIR)
    detection = st.tuples(draw_values, st.integers(0, 39), st.integers(0, 19))
    tumour = st.lists(st.lists(detection, max_size=6), min_size=1, max_size=3)
    normal = st.lists(st.lists(detection, max_size=4), max_size=3)
    return st.builds(
        lambda t, n: (
            [slide(f"t{i}", lesions, *d) for i, d in enumerate(t)] + [slide(f"n{i}", None, *d) for i, d in enumerate(n)]
        ),
        tumour,
        normal,
    )


coarse = st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9])


@settings(deadline=None)
@given(findings(coarse), st.randoms(use_true_random=False), st.sampled_from(["official", "strict"]))
def test_order_does_not_matter(slides, random, mode):
    """Shuffled slides and rows give the same bits, ties or not."""
    shuffled = [
        SlideFindings(one.slide_id, one.lesions, np.array(random.sample(list(one.detections), len(one.detections))), 1)
        if len(one.detections)
        else one
        for one in random.sample(slides, len(slides))
    ]
    assert froc.evaluate(shuffled, mode=mode) == froc.evaluate(slides, mode=mode)


@settings(deadline=None)
@given(findings(coarse))
def test_strict_rises_with_the_rate_and_never_with_a_false_positive(slides):
    """Sensitivity grows with the rate, and a further false positive never raises it."""
    before = sensitivities(slides, "strict")
    assert before == sorted(before)
    worse = [*slides[:-1], SlideFindings(slides[-1].slide_id, slides[-1].lesions, _with_fp(slides[-1].detections), 1)]
    assert all(after <= was + 1e-12 for after, was in zip(sensitivities(worse, "strict"), before, strict=True))


def _with_fp(detections):
    """Return the slide with a further false positive outside the mask."""
    return np.concatenate([detections, [[0.6, -1, -1]]])


def loop_score(slides):
    """Return the official score by a plain loop: all thresholds but the lowest, float32 hits, float64 others."""
    hits, false, n_lesions = [], [], 0
    for one in slides:
        labels = np.zeros((1, 1), int) if one.lesions is None else one.lesions.labels
        itc = frozenset() if one.lesions is None else one.lesions.itc
        best = [0.0] * (0 if one.lesions is None else one.lesions.n_regions)
        for prob, x, y in one.detections.tolist():
            row, col = math.floor(y / one.downsample), math.floor(x / one.downsample)
            inside = 0 <= row < labels.shape[0] and 0 <= col < labels.shape[1]
            label = int(labels[row, col]) if inside else 0
            if not label:
                false.append(prob)
            elif label not in itc:
                best[label - 1] = max(best[label - 1], prob)
        hits += map(np.float32, best)
        n_lesions += len(best) - len(itc)
    rates, found = [0.0], [0.0]
    thresholds = sorted({*map(float, hits), *false})[1:]
    for t in reversed(thresholds):
        rates.append(sum(p >= t for p in false) / len(slides))
        found.append(sum(h >= np.float32(t) for h in hits) / n_lesions)
    return float(np.interp([0.25, 0.5, 1, 2, 4, 8], rates, found).mean())


@settings(deadline=None)
@given(findings(st.floats(0, 1)) | findings(coarse))
def test_official_equals_a_plain_loop(slides):
    """Ranking once gives the counts of a loop over all thresholds."""
    assert froc.evaluate(slides, mode="official")["froc.score"] == pytest.approx(loop_score(slides), abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(findings(coarse), st.integers(0, 1000), st.sampled_from(["official", "strict"]))
def test_bootstrap_equals_scoring_the_drawn_slides(slides, seed, mode):
    """A draw of the bootstrap has the score of its multiset of slides."""
    draw = np.random.default_rng(seed).integers(len(slides), size=len(slides))
    drawn = [
        SlideFindings(str(i), slides[k].lesions, slides[k].detections, slides[k].downsample) for i, k in enumerate(draw)
    ]
    name = "froc.score" if mode == "official" else "froc.strict_score"
    expected = froc.evaluate(drawn, mode=mode)[name]
    times = np.bincount(draw, minlength=len(slides))[None]
    found = froc.resample([froc.match(one) for one in slides], times, mode=mode)
    assert found.shape == (1, 6)
    assert found.mean() == pytest.approx(expected, nan_ok=True)


@settings(deadline=None, max_examples=40)
@given(findings(coarse), st.integers(0, 1000), st.sampled_from(["official", "strict"]))
def test_draws_equal_the_curve_of_the_drawn_slides(slides, seed, mode):
    """The sensitivities of a draw are those of its whole curve, whichever rates it reaches."""
    times = np.random.default_rng(seed).integers(0, 4, size=(5, len(slides)))
    matches = [froc.match(one) for one in slides]
    rates = [0, 0.25, 0.5]  # most sets have more false positives than the highest
    for row, found in zip(times, froc.resample(matches, times, mode=mode, rates=rates), strict=True):
        copies = [replace(one, slide_id=f"{i}#{k}") for i, one in enumerate(matches) for k in range(row[i])]
        whole = froc.curve(copies, mode=mode)
        expected = np.interp(rates, whole.fp_per_slide[::-1], whole.sensitivity[::-1])
        assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("mode", ["official", "strict"])
def test_a_draw_without_the_slide_of_most_false_positives(mode):
    """Its curve extends to confidences at which the other draws exceed every rate."""
    busy = froc.Matches("busy", np.empty(0), 0, np.linspace(0.5, 0.9, 100))
    lesion = froc.Matches("lesion", np.array([0.1, -np.inf]), 0, np.empty(0))
    drawn = froc.resample([busy, lesion], np.array([[0, 2], [1, 1]]), mode=mode)
    assert drawn.tolist() == [[0.5] * 6, [0] * 6]


def test_draws_without_lesions_or_slides_have_no_sensitivity():
    """A draw without any lesion, or without any slide, is NaN."""
    matches = [froc.match(one) for one in e1()]
    drawn = froc.resample(matches, np.array([[0, 0, 2, 2], [1, 1, 1, 1]]), mode="official")
    assert np.isnan(drawn[0]).all()
    assert drawn[1].tolist() == [2 / 3, 2 / 3, 1, 1, 1, 1]
    assert np.isnan(froc.resample([], np.zeros((2, 0), int), mode="strict")).all()
