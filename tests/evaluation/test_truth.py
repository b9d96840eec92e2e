"""Truth of a slide: what is ignored, where outlines lie on slides with bounds, and which truth is doubted."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from worked_examples import painted, png

from wsiflow.errors import InputError
from wsiflow.evaluation import evaluate, froc, matches, truth
from wsiflow.evaluation.evaluate import Evidence
from wsiflow.evaluation.froc import SlideFindings
from wsiflow.evaluation.protocol import EvaluationParams
from wsiflow.slides.annotations import SlidePlace
from wsiflow.slides.manifest import Case


def protocol(**changes):
    """Return the rules of a small evaluation."""
    values = {"name": "test", "downsample": 1, "l0_um_px": 25.0, "join_um": 75.0, "itc_um": 275.0}
    return EvaluationParams(**{**values, "exclude": [], "exclude_froc": [], "bootstrap": 0, **changes})


def box(x0, y0, x1, y1):
    """Return a closed ring."""
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def geojson(path, *classes_and_rings):
    """Write boxes by class as GeoJSON, and return the path."""
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"classification": {"name": name}, "name": f"{name} {number}"},
        }
        for number, (name, ring) in enumerate(classes_and_rings)
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def case(tmp_path, *outlines, **more):
    """Return a case with GeoJSON truth; its slide does not exist."""
    return Case("s", tmp_path / "s.tif", annotation_path=geojson(tmp_path / "s.geojson", *outlines), **more)


LESION, IGNORED = ("Tumor", box(10, 10, 40, 40)), ("Ignore*", box(60, 10, 80, 40))
DETECTIONS = [(0.9, 20, 20), (0.8, 70, 20), (0.7, 70, 30), (0.6, 5, 60)]


@pytest.mark.parametrize("mode", ["official", "strict"])
def test_ignored_regions_take_neither_hits_nor_false_positives(tmp_path, mode):
    """Two of three detections beside the lesion are ignored: in both modes, the row, and the recorded matches."""
    params = protocol()
    read = truth.read_truth(case(tmp_path, LESION, IGNORED), params, l0_size_px=(100, 80))
    found = Evidence("s", 1, read, np.array(DETECTIONS, float))
    scores = evaluate.evaluate_cases([found], params, seed=0)
    (row,), (record,) = scores.cases, scores.matches.slides
    assert (row["n_found"], row["n_false_positives"], row["n_detections"]) == (1, 1, 4)
    assert row["note"] == "2 detections in ignored regions"
    assert (record.best, record.false_positives) == ([0.9], [0.6])
    (tmp_path / "matches.json").write_text(evaluate.documents(scores)["matches.json"])
    setting = matches.read_matches(tmp_path / "matches.json").setting("again")
    kept = [froc.score([froc.match(SlideFindings("s", read.lesions, found.detections[[0, 3]], 1))], mode=mode)]
    assert [froc.score(setting.matches, mode=mode)] == kept


def test_an_ignored_part_of_a_lesion_is_no_lesion(tmp_path):
    """A detection there is no hit, and a lesion that is ignored whole is none; normal slides have ignored parts."""
    params = protocol()
    half = truth.read_truth(case(tmp_path, LESION, ("ignore", box(25, 0, 99, 79))), params, l0_size_px=(100, 80))
    found = evaluate.match_slide(Evidence("s", None, half, np.array([(0.9, 35, 20), (0.5, 15, 20)])), params)
    assert found.record.best == [0.5]
    normal = truth.read_truth(case(tmp_path, IGNORED, label=0), params, l0_size_px=(100, 80))
    row = evaluate.match_slide(Evidence("s", 0, normal, np.array(DETECTIONS, float)), params).row
    assert (row["label"], row["n_false_positives"]) == (0, 2)
    whole = case(tmp_path, LESION, ("ignore", box(0, 0, 99, 79)))
    with pytest.raises(InputError, match="hold no pixel of the evaluation mask"):
        truth.read_truth(whole, params, l0_size_px=(100, 80))


def test_what_is_ignored_is_part_of_the_truth(tmp_path):
    """Its digest differs from that of the truth without it, and not with the extent of the mask."""
    params, digests = protocol(), []
    for outlines, size in (([LESION], (100, 80)), ([LESION, IGNORED], (100, 80)), ([LESION, IGNORED], None)):
        read = truth.read_truth(case(tmp_path, *outlines), params, l0_size_px=size)
        digests.append(truth.truth_sha256(1, read.lesions, read.ignored))
    assert digests[0] != digests[1] == digests[2]


def test_groups_and_origin_are_part_of_the_protocol(tmp_path):
    """They are stated only where they are set, so that protocols of earlier versions keep their hash."""
    assert not {"groups", "outline_origin"} & set(protocol().protocol())
    mapped = protocol(groups={"Necrosis ": "ignore", "FAT": "normal"}, outline_origin="bounds")
    assert mapped.protocol()["groups"] == {"fat": "normal", "necrosis": "ignore"}
    assert EvaluationParams(**mapped.model_dump()) == mapped
    hashes = {
        protocol(**one).protocol_hash() for one in ({}, {"groups": {"fat": "normal"}}, {"outline_origin": "slide"})
    }
    assert len(hashes) == 3
    read = truth.read_truth(case(tmp_path, LESION, ("Necrosis", box(60, 10, 80, 40))), mapped, l0_size_px=(100, 80))
    assert read.ignored.sum() == 600


@pytest.mark.parametrize(("origin", "column"), [("auto", 30), ("bounds", 30), ("slide", 10)])
def test_outlines_on_a_slide_with_bounds(tmp_path, origin, column):
    """Those of QuPath count from the scanned area, whatever is known besides; the protocol may say another thing."""
    params = protocol(outline_origin=origin)
    read = truth.check_truth(case(tmp_path, LESION), params, SlidePlace((100, 80), (20, 0)))
    assert np.flatnonzero(read.tumour.any(axis=0))[0] == column


@pytest.mark.parametrize("suffix", [".mrxs", ".scn", ".bif"])
def test_a_slide_with_bounds_is_needed(tmp_path, suffix):
    """Without the slide nobody knows where the outlines of QuPath lie on it; most formats have no bounds."""
    missing = replace(case(tmp_path, LESION), path=tmp_path / f"s{suffix}")
    with pytest.raises(InputError, match=r"slide s, .*which only the slide states; .*outline_origin=slide"):
        truth.read_truth(missing, protocol())
    assert truth.read_truth(missing, protocol(outline_origin="slide")).lesions.n_lesions == 1
    assert truth.read_truth(replace(missing, path=tmp_path / "s.svs"), protocol()).lesions.n_lesions == 1


def test_outlines_that_are_cut_off_are_noted(tmp_path):
    """The note is that of the file, with the part that lies outside."""
    over = case(tmp_path, LESION, ("Tumor", box(150, 0, 400, 90)))
    read = truth.read_truth(over, protocol(), l0_size_px=(300, 90))
    assert read.note == "outlines are cut off at the slide's edge: 'Tumor 1' (40%)"
    assert read.lesions.labels.shape == (90, 300)


def test_a_mask_in_colours_is_no_truth(tmp_path):
    """A lesion that is painted in green is not taken for a normal slide."""
    green = np.zeros((80, 100, 3), np.uint8)
    green[8:40, 8:40, 1] = 255
    Image.fromarray(green).save(tmp_path / "m.png")
    with pytest.raises(InputError, match=r"slide s, .*m\.png: the mask is a picture in colours"):
        truth.read_truth(Case("s", tmp_path, mask_path=tmp_path / "m.png"), protocol())


def test_a_truth_that_covers_nearly_all_tissue(tmp_path):
    """The share is told from nine tenths on, at any two scales."""
    tissue = np.zeros((20, 25), np.bool_)
    tissue[2:18, 2:22] = True
    for share, cols in ((1.0, 88), (None, 60)):
        path = png(tmp_path / "m.png", painted((80, 100), [(8, 72, 8, cols)]))
        marks = truth.check_truth(Case("s", tmp_path, mask_path=path), protocol(), SlidePlace((100, 80), (0, 0)))
        assert truth.share_of_tissue(marks, tissue, downsample=4.0, m_downsample=1) == share
    assert truth.share_of_tissue(None, tissue, downsample=4.0, m_downsample=1) is None
