"""Evaluation through files: the worked examples as a user would evaluate them, and every fault of the files."""

import contextlib
import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from worked_examples import (
    A_ITC,
    E1,
    E2,
    E3,
    E3_BOXES,
    E3_HOLE,
    e1_masks,
    e3_truth,
    painted,
    png,
    xml,
)

from wsiflow.errors import InputError
from wsiflow.evaluation import evaluate, froc, matches, paired, roc
from wsiflow.evaluation.detections import detection_files, format_detections, read_detections, read_scores
from wsiflow.evaluation.evaluate import Evidence
from wsiflow.evaluation.protocol import EvaluationParams
from wsiflow.evaluation.truth import Truth, check_truth, read_truth
from wsiflow.run.config import evaluation_params
from wsiflow.slides import manifest, names
from wsiflow.slides.annotations import SlidePlace


def protocol(**changes):
    """Return the rules of a small evaluation."""
    values = {"name": "test", "downsample": 1, "l0_um_px": 25.0, "join_um": 75.0, "itc_um": 275.0}
    return EvaluationParams(**{**values, "exclude": [], "exclude_froc": [], "bootstrap": 50, **changes})


E1_PARAMS = protocol()
E3_PARAMS = protocol(downsample=32, l0_um_px=0.243)


@pytest.fixture
def project(tmp_path):
    """Return a function that writes detections and a manifest and reads the manifest's cases."""

    def write_project(detections, truth, header="slide_id,path,label,mask_path,annotation_path,mpp"):
        folder = tmp_path / "detections"
        folder.mkdir(exist_ok=True)
        lines = [header]
        for slide_id, text in detections.items():
            (folder / f"{slide_id}.csv").write_text(text)
            path = truth.get(slide_id)
            columns = ("", path.name) if path is not None and path.suffix == ".xml" else (path.name if path else "", "")
            label = "tumour" if slide_id.startswith("Tumor") else "normal"
            lines.append(f"{slide_id},{slide_id}.tif,{label},{columns[0]},{columns[1]},")
        (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
        return manifest.read_manifest(tmp_path / "manifest.csv"), folder

    return write_project


def sensitivities(metrics, mode="official"):
    """Return the six sensitivities."""
    prefix = "froc." if mode == "official" else "froc.strict_"
    return [metrics[f"{prefix}sensitivity_at_{rate}"] for rate in ("0.25", "0.5", "1", "2", "4", "8")]


def test_e1_through_files(project, tmp_path):
    """Masks, detection files and a manifest give E1's score, counts and slide AUC."""
    cases, folder = project(E1, e1_masks(tmp_path, A_ITC))
    scores = evaluate.evaluate_folder(cases, folder, E1_PARAMS, seed=0)
    assert sensitivities(scores.metrics) == [2 / 3, 2 / 3, 1, 1, 1, 1]
    assert round(scores.metrics["froc.score"], 6) == 0.888889
    assert [scores.metrics[f"froc.n_{what}"] for what in ("lesions", "itc", "slides")] == [3, 1, 4]
    assert scores.metrics["froc.score_ci_low"] <= scores.metrics["froc.score_ci_high"]
    assert scores.metrics["roc.auc"] == 0.75  # .95 and .7 against .8 and 0


def test_e1_without_the_empty_slide(project, tmp_path):
    """The manifest, not the files, says which slides there are; without Normal_D the score is lower."""
    e1 = {slide_id: text for slide_id, text in E1.items() if slide_id != "Normal_D"}
    cases, folder = project(e1, e1_masks(tmp_path, A_ITC))
    metrics = evaluate.evaluate_folder(cases, folder, E1_PARAMS, seed=0).metrics
    assert round(metrics["froc.score"], 6) == 0.833333


@pytest.mark.parametrize(
    ("changed", "itc", "official", "strict"),
    [
        ({}, False, 0.666667, 0.888889),
        ({"Tumor_B": E2["Tumor_B"] + ".1,0,19\n"}, False, 0.888889, 0.888889),
        ({"Tumor_A": "1,6,6\n", "Tumor_B": "1,9,4\n1,30,13\n", "Normal_C": ""}, False, 0, 1),
        ({"Tumor_A": "", "Tumor_B": "", "Normal_C": ""}, False, 0, 0),
        ({"Tumor_A": "1,6,6\n", "Tumor_B": "1,9,4\n1,30,13\n", "Normal_C": ""}, True, 1, 1),
    ],
    ids=["E2", "E2b", "E2c", "E2d", "E2e"],
)
def test_e2_through_files(project, tmp_path, changed, itc, official, strict):
    """E2 and its variants, in both modes."""
    cases, folder = project(E2 | changed, e1_masks(tmp_path, *([A_ITC] if itc else [])))
    metrics = evaluate.evaluate_folder(cases, folder, E1_PARAMS, seed=0).metrics
    assert (round(metrics["froc.score"], 6), round(metrics["froc.strict_score"], 6)) == (official, strict)


@pytest.mark.parametrize(("kind", "mask_downsample"), [("png", 1), ("tif", None), ("xml", None)])
def test_e3_through_files(project, tmp_path, kind, mask_downsample):
    """E3 gives its score to the last digit from a mask, from outlines and in any file format."""
    cases, folder = project(E3, {"Tumor_T": e3_truth(kind, tmp_path)})
    scores = evaluate.evaluate_folder(cases, folder, E3_PARAMS, seed=0, mask_downsample=mask_downsample)
    assert sensitivities(scores.metrics) == pytest.approx([0.25, 0.375, 1, 1, 1, 1], abs=1e-15)
    assert round(scores.metrics["froc.score"], 6) == 0.770833
    assert round(scores.metrics["froc.strict_score"], 6) == 0.770833
    assert scores.froc["official"]["fp_per_slide"] == [1, 2 / 3, 2 / 3, 2 / 3, 2 / 3, 1 / 3, 0, 0]
    assert scores.froc["official"]["sensitivity"] == [1, 1, 0.75, 0.5, 0.5, 0.25, 0.25, 0]
    assert [scores.metrics[f"froc.n_{what}"] for what in ("lesions", "itc", "slides")] == [4, 1, 3]


@pytest.mark.parametrize("size", [None, (5120, 3200)])
def test_outlines_give_the_mask_of_e3(tmp_path, size):
    """With or without the slide's size, outlines on pixel borders give E3's regions."""
    case = manifest.Case("t", tmp_path, annotation_path=e3_truth("xml", tmp_path))
    labels = read_truth(case, E3_PARAMS, l0_size_px=size).lesions.labels
    expected = froc.evaluation_mask(painted((100, 160), E3_BOXES, E3_HOLE) > 0, 0.243 * 32).labels
    rows, cols = (min(a, b) for a, b in zip(labels.shape, expected.shape, strict=True))
    assert np.array_equal(labels[:rows, :cols], expected[:rows, :cols])
    assert labels.max() == expected.max() == expected[:rows, :cols].max()
    assert size is None or labels.shape == (100, 160)


def evidence(slide_id, label, n_lesions=None, detections=(), score=None):
    """Return the evidence of a slide with lesions side by side, or with unknown lesions."""
    truth = None
    if n_lesions is not None:
        mask = painted((30, 400), [(5, 9, 5 + 30 * k, 20 + 30 * k) for k in range(n_lesions)])
        truth = Truth(froc.evaluation_mask(mask > 0, 25.0))
    return Evidence(slide_id, label, truth, np.array(detections, float).reshape(-1, 3), score)


def test_rows_tell_what_a_slide_counted_for():
    """A row per slide has lesions, hits, false positives, and why the slide does not count."""
    slides = [
        evidence("both", 1, 2, [(0.9, 8, 6), (0.8, 8, 6), (0.7, 0, 0)]),
        evidence("auc", 1, None, [(0.6, 1, 1)]),
        evidence("unknown", None),
        evidence("normal", 0, 0, [(0.5, 1, 1)], score=0.25),
    ]
    scores = evaluate.evaluate_cases(slides, E1_PARAMS, seed=0)
    rows = [(r["n_lesions"], r["n_found"], r["n_false_positives"], r["score"], r["note"]) for r in scores.cases]
    assert rows == [
        (2, 1, 1, 0.9, ""),
        ("", "", "", 0.6, "no truth: not in FROC"),
        ("", "", "", 0, "no label: not scored"),
        (0, 0, 1, 0.25, ""),
    ]
    assert (scores.metrics["froc.n_slides"], scores.metrics["roc.n_tumour"], scores.metrics["roc.n_normal"]) == (
        2,
        2,
        1,
    )


def test_truth_labels_a_slide_without_label():
    """Regions make it a tumour slide; a truth without any makes it a normal one."""
    scores = evaluate.evaluate_cases([evidence("t", None, 1), evidence("n", None, 0)], E1_PARAMS, seed=0)
    assert [row["label"] for row in scores.cases] == [1, 0]


@pytest.mark.parametrize(("label", "n", "message"), [(0, 1, "label says normal"), (1, 0, "label says tumour")])
def test_label_against_truth(label, n, message):
    """A label that contradicts the truth is refused, since one of the two belongs to another slide."""
    with pytest.raises(InputError, match=f"slide s, evaluation: the {message}"):
        evaluate.evaluate_cases([evidence("s", label, n)], E1_PARAMS, seed=0)


@pytest.mark.parametrize("score", [math.nan, -0.5, 2.0])
def test_slide_score_must_be_a_probability(score):
    """NaN and logits are refused and never become a decision."""
    with pytest.raises(InputError, match=r"slide s.*from 0 to 1"):
        evaluate.evaluate_cases([evidence("s", 0, score=score)], E1_PARAMS, seed=0)


def test_nothing_labelled_gives_no_number():
    """Without labels every metric is NaN, and the files are still valid."""
    scores = evaluate.evaluate_cases([evidence("s", None)], E1_PARAMS, seed=0)
    assert math.isnan(scores.metrics["froc.score"])
    assert math.isnan(scores.metrics["roc.auc"])
    assert json.loads(evaluate.documents(scores)["summary.json"])["froc.score"] is None


def test_documents_are_reproducible_and_readable(project, tmp_path):
    """Same input, same bytes; JSON holds no NaN or infinity; the table has a line per slide."""
    cases, folder = project(E1, e1_masks(tmp_path, A_ITC))
    first, again = (evaluate.documents(evaluate.evaluate_folder(cases, folder, E1_PARAMS, seed=3)) for _ in range(2))
    assert first == again
    assert sorted(first) == ["cases.csv", "findings.json", "froc.json", "matches.json", "roc.json", "summary.json"]
    assert json.loads(first["froc.json"])["strict"]["thresholds"][-1] is None
    assert json.loads(first["summary.json"])["froc.n_lesions"] == 3
    assert [row["slide_id"] for row in csv.DictReader(io.StringIO(first["cases.csv"]))] == list(E1)


def test_given_scores_replace_the_highest_detection(project, tmp_path):
    """A CSV of slide scores decides the AUC."""
    cases, folder = project(E1, e1_masks(tmp_path, A_ITC))
    (tmp_path / "scores.csv").write_text("slide_id,score\nTumor_A,.9\nTumor_B,.8\nNormal_C,.1\nNormal_D,.2\n")
    scores = evaluate.evaluate_folder(cases, folder, E1_PARAMS, seed=0, scores=tmp_path / "scores.csv")
    assert scores.metrics["roc.auc"] == 1


def test_missing_and_stray_detection_files_are_all_named(project, tmp_path):
    """A slide without file is not scored as empty, and no file is ignored."""
    cases, folder = project(E1, e1_masks(tmp_path))
    for slide_id in ("Tumor_A", "Normal_D"):
        (folder / f"{slide_id}.csv").rename(folder / f"{slide_id.lower()}.csv")
    with pytest.raises(
        InputError, match=r"no detection file for Normal_D, Tumor_A and there is a .* for normal_d, tumor_a"
    ):
        evaluate.evaluate_folder(cases, folder, E1_PARAMS, seed=0)


def test_detections_folder_must_exist(project, tmp_path):
    """A wrong path is refused, not taken for a folder without detections."""
    cases, _ = project(E1, e1_masks(tmp_path))
    with pytest.raises(InputError, match="not a folder"):
        evaluate.evaluate_folder(cases, tmp_path / "none", E1_PARAMS, seed=0)


def test_missing_scores_are_named(project, tmp_path):
    """Every slide needs a score where scores are given."""
    cases, folder = project(E1, e1_masks(tmp_path))
    (tmp_path / "scores.csv").write_text("slide_id,score\nTumor_A,.9\nTumor_B,.8\nOther,.8\n")
    with pytest.raises(InputError, match="no score for Normal_C, Normal_D and there is a score for Other"):
        evaluate.evaluate_folder(cases, folder, E1_PARAMS, seed=0, scores=tmp_path / "scores.csv")


def test_spacing_must_come_from_somewhere(project, tmp_path):
    """Without an mpp in the manifest or a fixed spacing the size of a lesion is unknown."""
    cases, folder = project(E1, e1_masks(tmp_path))
    own = protocol(l0_um_px=None, bootstrap=0)
    with pytest.raises(InputError, match=r"slide Tumor_A.*add its mpp"):
        evaluate.evaluate_folder(cases, folder, own, seed=0)


def test_own_spacing_decides_what_is_itc(tmp_path):
    """The same mask is a lesion at 25 um and ITC at 10 um per pixel."""
    path = png(tmp_path / "a.png", painted((60, 60), [(25, 35, 25, 35)]))
    own = protocol(l0_um_px=None, bootstrap=0)
    n = [
        read_truth(manifest.Case("a", tmp_path, mpp=mpp, mask_path=path), own).lesions.n_lesions for mpp in (25.0, 10.0)
    ]
    assert n == [1, 0]


def test_mask_of_another_scale(tmp_path):
    """A mask of half the slide's size is refused; one padded by less than a tile passes."""
    case = manifest.Case("t", tmp_path, mask_path=e3_truth("tif", tmp_path))
    assert read_truth(case, E3_PARAMS, l0_size_px=(5000, 3100)).lesions.n_lesions == 4
    with pytest.raises(InputError, match=r"160 x 100 px where the slide is 320 x 200"):
        read_truth(case, E3_PARAMS, l0_size_px=(10240, 6400))


@pytest.mark.parametrize(
    ("side", "fits"), [(300, False), (530, False), (600, True), (620, True), (1024, True), (1200, False)]
)
def test_a_small_slides_mask_of_another_scale(tmp_path, side, fits):
    """On a slide of a few tiles another scale differs by fewer pixels than a tile has: only padding may be large."""
    path = png(tmp_path / "a.png", np.zeros((side, side), np.uint8))
    case = manifest.Case("t", tmp_path, mpp=0.25, label=0, mask_path=path)
    with contextlib.nullcontext() if fits else pytest.raises(InputError, match="where the slide is 19 x 19"):
        check_truth(case, protocol(downsample=32), SlidePlace((600, 600), (0, 0)))


def test_outline_at_an_impossible_place(tmp_path):
    """An outline in another unit is refused before it exhausts the memory."""
    path = xml(tmp_path / "t.xml", [(0, 10**6, 0, 10**6)], E3_HOLE)
    with pytest.raises(InputError, match=r"slide t.*mask px"):
        read_truth(manifest.Case("t", tmp_path, annotation_path=path), E3_PARAMS)


def test_outline_without_area_is_told_in_the_row(tmp_path):
    """An outline without area is mentioned in the row of its slide."""
    path = xml(tmp_path / "t.xml", E3_BOXES, E3_HOLE)
    point = '<Coordinates><Coordinate X="1" Y="1" /></Coordinates>'
    stray = f'<Annotation Name="stray" PartOfGroup="Tumor">{point}</Annotation>'
    path.write_text(path.read_text().replace("<Annotations>", f"<Annotations>{stray}"))
    truth = read_truth(manifest.Case("t", tmp_path, annotation_path=path), E3_PARAMS)
    scores = evaluate.evaluate_cases([Evidence("t", 1, truth, np.empty((0, 3)))], E3_PARAMS, seed=0)
    assert scores.cases[0]["note"] == "outlines without area: stray"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",probability,x_coordinate,y_coordinate\n0,.5,1,2\n", "line 1 has 4 cells .an index column"),
        ("prob,x,y\n.5,1,2\n", "line 1: 'prob' is not a number .a header"),
        (".5,1,2\n.5,1\n", "line 2 has 2 cells"),
        (".5,1,2\n.5,one,2\n", "line 2: 'one' is not a number"),
        (".5,1,2\nnan,1,2\n", "line 2: 'nan' is not finite"),
        (".5,1,inf\n", "not finite"),
        (".5,1,2\n,1,2\n.5,,2\n", r"line 2: '' is not finite, and so in 2 of 3 lines \(2, 3\)"),
        ("1.0000001,1,2\n", r"the first is 1\.0000001; "),
        (".5,1,2\n-3.1,1,2\n", "line 2: 1 of 2 confidences lie outside 0 to 1, the first is -3.1; .*logits"),
        ("1.5,1,2\n", "line 1: 1 of 1 confidences lie outside 0 to 1, the first is 1.5"),
        (".5;1;2\n", "line 1 has 1 cells"),
        ('".5,1,2\n', "line 1 is not CSV"),
    ],
)
def test_damaged_detection_files(tmp_path, text, message):
    """The message names file and line."""
    path = tmp_path / "slide.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_detections(path)
    assert "slide.csv" in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n", "\ufeff"])
def test_empty_detection_file(tmp_path, text):
    """An empty file is a slide without detections."""
    (tmp_path / "slide.csv").write_text(text, encoding="utf-8")
    assert read_detections(tmp_path / "slide.csv").shape == (0, 3)


def test_detection_file_of_another_system(tmp_path):
    """A byte order mark, CRLF and fractions of pixels are read."""
    (tmp_path / "slide.csv").write_bytes(b"\xef\xbb\xbf0.5,1,2\r\n1e-3,3.5,4\r\n")
    assert read_detections(tmp_path / "slide.csv").tolist() == [[0.5, 1, 2], [0.001, 3.5, 4]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line is ''"),
        ("a,0.5\n", "first line is 'a,0.5'"),
        ("slide_id,score\na,x\n", "line 2"),
        ("slide_id,score\na\n", "line 2 has 1 cells"),
        ("slide_id,score\na,.5\na,.5\n", "line 3 is a second score"),
        ("slide_id,score\na,-2\n", "line 2: '-2' is outside 0 to 1"),
    ],
)
def test_damaged_score_files(tmp_path, text, message):
    """Header, numbers and duplicates are checked."""
    (tmp_path / "scores.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_scores(tmp_path / "scores.csv")


def test_text_of_detections():
    """Pixels are floored, lines ordered by falling confidence, y and x, and digits give the float32 again."""
    detections = np.array([[0.3, 5.9, 7], [0.5, 9, 9], [0.5, 3, 9], [0.5, 8, 2], [0.3, -0.5, 6.2]])
    assert format_detections(detections) == (
        "0.5,8,2\n0.5,3,9\n0.5,9,9\n0.30000001192092896,-1,6\n0.30000001192092896,5,7\n"
    )
    assert format_detections(np.empty((0, 3))) == ""


@given(arrays(np.float64, st.tuples(st.integers(0, 6), st.just(3)), elements=st.floats(0, 1)))
def test_written_detections_read_back(tmp_path_factory, detections):
    """What is read is exactly float32 and written again gives the same text, in any order of the rows."""
    path = tmp_path_factory.mktemp("d") / "slide.csv"
    path.write_text(format_detections(detections * [1, 1e5, 1e5]))
    read = read_detections(path)
    assert sorted(read[:, 0].tolist()) == sorted(detections[:, 0].astype(np.float32).astype(float).tolist())
    assert format_detections(read[::-1]) == path.read_text()


def test_a_mask_of_0_and_1_needs_a_label(tmp_path):
    """A value of 1 may be tumour, or tissue in a mask that could also hold 2."""
    mask = png(tmp_path / "m.png", (painted((100, 160), E3_BOXES) > 0).astype(np.uint8))
    case = manifest.Case("a", tmp_path / "a.tif", mpp=0.243, mask_path=mask)
    with pytest.raises(InputError, match="may mean tumour, or tissue"):
        read_truth(case, E3_PARAMS, mask_downsample=1)
    labelled = manifest.Case("a", tmp_path / "a.tif", mpp=0.243, mask_path=mask, label=1)
    assert read_truth(labelled, E3_PARAMS, mask_downsample=1).lesions.n_regions > 0


@pytest.mark.parametrize("dtype", [np.uint8, bool])
def test_every_remedy_for_a_mask_of_0_and_1_works(tmp_path, dtype):
    """Either label makes it scorable, and so does naming the value; the tissue of a normal slide is no tumour."""
    mask = png(tmp_path / "m.png", (painted((100, 160), E3_BOXES) > 0).astype(dtype))

    def n_regions(label, **rule):
        case = manifest.Case("a", tmp_path / "a.tif", mpp=0.243, mask_path=mask, label=label)
        params = protocol(**rule)
        truth = read_truth(case, params, mask_downsample=1)
        return evaluate.match_slide(Evidence("a", label, truth, np.empty((0, 3))), params).row["n_lesions"]

    assert n_regions(0) == 0
    assert n_regions(1) == n_regions(None, mask_tumour=[1]) == n_regions(1, mask_tumour=1) > 0
    assert n_regions(0, mask_tumour=[2]) == 0


def test_outlines_that_mark_nothing_need_a_label(tmp_path):
    """Outlines in another unit would silently make a tumour slide a normal one."""
    path = xml(tmp_path / "t.xml", [(1 / 64, 1 / 48, 1 / 64, 1 / 48)], E3_HOLE)
    case = manifest.Case("t", tmp_path, annotation_path=path)
    with pytest.raises(InputError, match=r"slide t, .*t\.xml: 1 tumour outlines hold no pixel.*\(label\)"):
        read_truth(case, E3_PARAMS, l0_size_px=(5120, 3200))
    labelled = manifest.Case("t", tmp_path, annotation_path=path, label=0)
    assert read_truth(labelled, E3_PARAMS, l0_size_px=(5120, 3200)).lesions.n_regions == 0


def test_all_broken_truths_are_told_at_once(tmp_path, project):
    """All faults are in one message, so that a user can fix them at once."""
    (tmp_path / "a.png").write_bytes(b"II*\0" + bytes(8))
    (tmp_path / "b.xml").write_text("no XML")
    truth = {
        "Tumor_A": tmp_path / "a.png",
        "Tumor_B": tmp_path / "b.xml",
        "Tumor_C": png(tmp_path / "c.png", painted((9, 9), [])),
    }
    cases, folder = project(dict.fromkeys((*truth, "Normal_D"), ""), truth)
    with pytest.raises(InputError, match=r"3 slides cannot be scored.*Tumor_A.*a\.png.*Tumor_B.*b\.xml.*Tumor_C"):
        evaluate.evaluate_folder(cases, folder, E3_PARAMS, seed=0, mask_downsample=1)


# --- protocol and matches.json


def camelyon16(**changes):
    """Return the protocol as the command reads it."""
    return evaluation_params("camelyon16", changes)


def challenge():
    """Return slides of the challenge with the names that its protocol knows, and two others."""
    return [
        evidence("test_001", 1, 2, [(0.9, 8, 6), (0.3, 0, 0)]),
        evidence("Test_049", 1, 1, [(0.9, 8, 6)]),
        evidence("test_114", 1, 1, [(0.8, 8, 6)]),
        evidence("NORMAL_086", 0, 1, [(0.7, 1, 1)]),  # the label is wrong, as it was
        evidence("normal_001", 0, None, [(0.85, 1, 1)]),
    ]


def test_camelyon16_leaves_out_what_publications_leave_out():
    """Two slides count for nothing, one for the AUC alone, in any case of the letters; each has its row and reason."""
    scores = evaluate.evaluate_cases(challenge(), camelyon16(downsample=1, bootstrap=20), seed=0)
    counts = [scores.metrics[name] for name in ("froc.n_slides", "roc.n_tumour", "roc.n_normal", "roc.auc")]
    assert counts == [2, 2, 1, 0.5]  # .9 and .8 against .85
    assert [(row["slide_id"], row["note"]) for row in scores.cases] == [
        ("test_001", ""),
        ("Test_049", "not scored: protocol camelyon16 excludes it"),
        ("test_114", "not in FROC: protocol camelyon16 excludes it"),
        ("NORMAL_086", "not scored: protocol camelyon16 excludes it"),
        ("normal_001", ""),
    ]
    recorded = [(one.in_froc, one.in_auc, bool(one.reason)) for one in scores.matches.slides]
    assert recorded == [
        (True, True, False),
        (False, False, True),
        (False, True, True),
        (False,) * 2 + (True,),
        (True, True, False),
    ]


def test_truth_of_an_excluded_slide_is_not_read(tmp_path):
    """A broken annotation of an excluded slide does not stop an evaluation."""
    (tmp_path / "t.xml").write_text("no XML")
    case = manifest.Case("TEST_049", tmp_path, annotation_path=tmp_path / "t.xml")
    assert read_truth(case, camelyon16()) is None
    with pytest.raises(InputError):
        read_truth(case, E3_PARAMS)


def test_protocol_hash_is_of_the_rules_alone():
    """Every rule changes it; the number of draws, and order and case of the excluded slides, do not."""
    base = camelyon16().protocol_hash()
    assert base == "3f105944333af872a8a10d12ed8eb4f43bb4887ffb8f6c5c0195f871f695002a", (
        "evaluations of earlier versions stay comparable"
    )
    assert camelyon16(bootstrap=7).protocol_hash() == base
    assert camelyon16(exclude=["TEST_049", "normal_086", "test_049"]).protocol_hash() == base
    changes = [("name", "mine"), ("downsample", 16), ("l0_um_px", 0.25), ("join_um", 70), ("itc_um", 200)]
    changes += [("exclude", ["test_049"]), ("exclude_froc", []), ("mask_tumour", [2])]
    hashes = {camelyon16(**{key: value}).protocol_hash() for key, value in changes}
    assert len(hashes | {base}) == len(changes) + 1


def test_distances_of_the_protocol_decide_regions(tmp_path):
    """Annotations 10 px apart join at a larger distance, and the limit says what is isolated tumour cells."""
    path = png(tmp_path / "a.png", painted((60, 90), [(20, 30, 10, 30), (20, 30, 40, 60)]))
    case = manifest.Case("a", tmp_path, mask_path=path, label=1)
    found = [
        read_truth(case, protocol(l0_um_px=10.0, **rule)).lesions
        for rule in ({}, {"join_um": 120.0}, {"itc_um": 400.0})
    ]
    assert [(one.n_regions, one.n_lesions) for one in found] == [(2, 2), (1, 1), (2, 0)]


def test_matches_give_the_scores_again(project, tmp_path):
    """matches.json gives the same scores, ITC, protocol and truth when it is read back."""
    cases, folder = project(E1, e1_masks(tmp_path, A_ITC))
    scores = evaluate.evaluate_folder(cases, folder, E1_PARAMS, seed=0)
    (tmp_path / "matches.json").write_text(evaluate.documents(scores)["matches.json"])
    read = matches.read_matches(tmp_path / "matches.json")
    assert read == scores.matches
    assert read.protocol["name"] == "test"
    assert [(one.slide_id, one.n_itc, one.itc) for one in read.slides[:2]] == [("Tumor_A", 1, [1]), ("Tumor_B", 0, [])]
    assert read.slides[0].best == [0.9, None]
    setting = read.setting("again")
    assert froc.score(setting.matches, mode="official").items() <= scores.metrics.items()
    assert roc.auc(setting.scores, setting.labels) == scores.metrics["roc.auc"]
    found = paired.bootstrap([setting], reference="again", n=50, seed=0).intervals["again"]
    assert found["roc.auc_bootstrap"].low == scores.metrics["roc.auc_bootstrap_ci_low"]
    assert found["roc.auc"].low == scores.metrics["roc.auc_ci_low"]
    assert found["froc.sensitivity_at_1"].high == scores.metrics["froc.sensitivity_at_1_ci_high"]


def truths(*slides):
    """Return the hash of the truth of an evaluation and the digests of its slides."""
    found = evaluate.evaluate_cases(slides, protocol(bootstrap=0), seed=0).matches
    return found.truth_hash(), [one.truth for one in found.slides]


def test_truth_hash_follows_the_truth_alone():
    """Detections, order and case do not change it; a lesion or a label does; so does what a slide counts for."""
    a, n = evidence("a", 1, 2), evidence("n", 0)
    base, digests = truths(a, n)
    assert truths(evidence("N", None, 0, [(0.2, 3, 3)]), evidence("a", 1, 2, [(0.9, 8, 6)], score=0.1))[0] == base
    assert len({base, *(truths(*other)[0] for other in ([evidence("a", 1, 3), n], [evidence("a", 1), n], [a]))}) == 4
    assert digests[0] != digests[1]
    assert truths(evidence("u", None), evidence("a", 1))[1] == [None, None]


def test_a_truth_is_the_same_however_far_its_mask_reaches(tmp_path):
    """With and without the slide's size known, outlines have one digest: two runs of one slide can be compared."""
    case = manifest.Case("t", tmp_path, label=1, annotation_path=e3_truth("xml", tmp_path))
    found = [
        truths(Evidence("t", 1, read_truth(case, E3_PARAMS, l0_size_px=size), np.empty((0, 3))))
        for size in (None, (5120, 3200), (6400, 6400))
    ]
    assert found[0] == found[1] == found[2]


def test_patients_are_numbered_and_not_named():
    """Slides of one patient share a number, by which they are drawn together; no name leaves the manifest."""
    slides = [evidence("a", 1, 1), evidence("n", 0), evidence("b", 1, 1), evidence("m", 0)]
    named = [replace(one, patient_id=patient) for one, patient in zip(slides, ("Eve", "", "Eve", "Bob"), strict=True)]
    scores = evaluate.evaluate_cases(named, E1_PARAMS, seed=0)
    assert scores.matches.setting("x").clusters == {"a": 0, "b": 0, "m": 1}
    assert "Eve" not in "".join(evaluate.documents(scores).values())


def spoiled(change):
    """Return the text of a matches.json after a change of its values."""
    scores = evaluate.evaluate_cases([evidence("a", 1, 2, [(0.9, 8, 6)])], E1_PARAMS, seed=0)
    values = json.loads(evaluate.documents(scores)["matches.json"])
    change(values)
    return json.dumps(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("protocol_hash"), "protocol_hash: Field required"),
        (lambda v: v["protocol"].update(itc_um=1), "does not have the hash that the file states"),
        (lambda v: v["slides"][0].update(score="high"), r"slides.0.score: .*valid number"),
        (lambda v: v["slides"][0].update(score=math.nan), r"slides.0.score: "),
        (lambda v: v["slides"][0].update(score=-1.5), r"slides.0.score: .*greater than or equal to 0"),
        (lambda v: v["slides"][0].update(best=[3.0]), r"slides.0.best.0.*less than or equal to 1"),
        (lambda v: v["slides"][0].update(false_positives=[-4.0]), r"slides.0.false_positives.0.*greater than"),
        (lambda v: v["slides"].append({**v["slides"][0], "slide_id": "A"}), "slide A.*recorded twice"),
        (lambda v: v["slides"][0].update(itc=[0], n_itc=1), r"slide a.*itc \[0\] does not fit"),
        (lambda v: v["slides"][0].update(n_itc=1), r"slide a.*itc \[\] does not fit n_itc 1"),
        (lambda v: v["slides"][0].update(label=None), "slide a.*has no label"),
    ],
)
def test_spoiled_matches_are_named(tmp_path, change, message):
    """A changed or truncated file is refused; the message names file and entry."""
    path = tmp_path / "matches.json"
    path.write_text(spoiled(change))
    with pytest.raises(InputError, match=message) as error:
        matches.read_matches(path)
    assert str(path) in str(error.value)


def test_matches_that_are_no_file_or_no_json(tmp_path):
    """A missing file and another format end in one line each."""
    with pytest.raises(
        InputError, match=r"the file of matches cannot be read .No such file or directory.; give the matches.json"
    ):
        matches.read_matches(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"protocol": ')
    with pytest.raises(InputError, match=r"cut.json.*the file: Invalid JSON"):
        matches.read_matches(tmp_path / "cut.json")


def test_detections_and_scores_may_have_the_names_of_slides(tmp_path: Path) -> None:
    """Other programs write the name that the manifest has, which is no safe file name for ours."""
    (tmp_path / "Fälle, 1.csv").touch()
    scores = tmp_path.parent / "scores.csv"
    scores.write_text('slide_id,score\n"Fälle, 1",0.5\n')
    escaped = names.slide_id("Fälle, 1")
    assert detection_files([escaped], tmp_path) == {escaped: tmp_path / "Fälle, 1.csv"}
    assert read_scores(scores) == {escaped: 0.5}
