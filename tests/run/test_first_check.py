"""What is wrong with slides and their truth is found before a pixel is read, and told in one list."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from small_runs import COARSE, over, rows, wsiflow

from flows.compose import compose_config
from wsiflow.errors import InputError
from wsiflow.run import intake, shards
from wsiflow.run.stages import ingest
from wsiflow.slides.slide import Slide


def geojson(folder, name, *classes_and_boxes):
    """Write boxes by class as GeoJSON; a box is x0, y0, x1, y1."""
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[[a, b], [c, b], [c, d], [a, d], [a, b]]]},
            "properties": {"objectType": "annotation", "classification": {"name": kind}},
        }
        for kind, (a, b, c, d) in classes_and_boxes
    ]
    (folder / name).write_text(json.dumps(features))


@pytest.fixture
def manifest(tiny_slides, tmp_path):
    """A manifest over two slides of 600 x 500 px, most of whose lines are wrong."""
    geojson(tmp_path, "far.geojson", ("Tumor", (590, 100, 2000, 300)))
    geojson(tmp_path, "over.geojson", ("Tumor", (160, 160, 680, 340)))
    geojson(tmp_path, "group.geojson", ("Tumor", (160, 160, 400, 340)), ("Fat", (0, 0, 90, 90)))
    geojson(tmp_path, "none.geojson", ("", (160, 160, 400, 340)))
    b = tiny_slides.parent / "b.tif"
    for name in ("far", "over", "group", "label", "none"):
        shutil.copy(tiny_slides.parent / "a.tif", tmp_path / f"{name}.tif")
    lines = [
        "slide_id,path,label,annotation_path",
        f"good,{b},normal,",
        "far,far.tif,tumor,far.geojson",
        "over,over.tif,tumor,over.geojson",
        "group,group.tif,tumor,group.geojson",
        "label,label.tif,normal,over.geojson",
        "none,none.tif,,none.geojson",
        f"missing,{tmp_path / 'x.tif'},,",
    ]
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "manifest.csv"


def test_all_faults_are_in_one_list_before_pixels_are_read(manifest, tmp_path, monkeypatch):
    """Lines of the manifest, slides, files and causes are named; a truth that two slides have is told as well."""
    for reading in ("read", "overview", "read_scaled"):
        monkeypatch.setattr(Slide, reading, lambda *_: pytest.fail("a pixel was read"))
    cases = shards.begin(compose_config(over(manifest, tmp_path / "out")))
    faults = intake.find_faults(cases)
    heading, *lines = intake.describe_faults(cases, faults)
    assert heading == "5 of 7 slides cannot be used:"
    starts = (
        "far (line 3), ",
        "group (line 5), ",
        "label (line 6), evaluation, ",
        "none (line 7), ",
        "missing (line 8), ",
    )
    assert all(line.startswith(f"rejected: slide {start}") for line, start in zip(lines, starts, strict=True))
    assert "but the slide has 600 x 500 px, and most of it lies outside" in lines[0]
    assert "unknown group 'Fat'" in lines[1]
    assert not any("\n" in line for line in lines)
    lines = intake.describe_faults(cases, {**faults, "second": faults["group"]._replace(slide="second", path="b.xml")})
    assert len(lines) == 6
    assert lines[2].startswith("rejected: 2 slides (group (line 5), second): annotation ")
    twice = intake.describe_shared_truth(cases)
    assert twice == [f"slides over, label have the same truth, {tmp_path / 'over.geojson'}"]


def test_bad_lines_are_kept_out_and_the_others_are_scored(manifest, tmp_path, capsys):
    """With allow_partial the score is that of the others; what is doubtful about their truth is told."""
    more = ["allow_partial=true", "evaluation.groups={Fat: ignore}", "tissue=hsv_otsu"]
    assert wsiflow(*over(manifest, tmp_path / "out", *more)) == 10
    told = capsys.readouterr().out
    assert "4 of 7 slides cannot be used:\nrejected: slide far (line 3), " in told
    before_result = told.partition("PARTIAL")[0]
    assert all(before_result.count(f"slide {slide} (line ") == 1 for slide in ("far", "label", "none", "missing"))
    assert before_result.count("rejected: ") == 4
    share = "100% of the tissue is annotated as tumour"
    assert f"slide over: {share}; if the mask is of tissue" in told
    notes = {row["slide_id"]: row["note"] for row in rows(tmp_path / "out" / "evaluation-PARTIAL" / "cases.csv")}
    assert list(notes) == ["good", "over", "group"]
    assert notes["over"] == f"outlines are cut off at the slide's edge: 'Tumor 1' (15%); {share}"


def test_truth_that_was_replaced_is_not_doubted_any_more(manifest, tmp_path, capsys):
    """A mask of tissue that was given as truth is told until the manifest says what it is."""
    Image.fromarray(np.full((500, 600), 255, np.uint8)).save(tmp_path / "mask.png")
    for column, label in (("mask_path", "tumor"), ("tissue_mask_path", "")):
        lines = [f"slide_id,path,label,{column}", f"a,far.tif,{label},mask.png", "b,over.tif,tumor,"]
        manifest.write_text("\n".join(lines) + "\n")
        wsiflow(*over(manifest, tmp_path / "out"))
        is_told = "slide a: 100% of the tissue is annotated as tumour" in capsys.readouterr().out
        assert is_told == (column == "mask_path")


def test_another_start_checks_once_what_is_still_to_be_ingested(manifest, tmp_path, monkeypatch, capsys):
    """What is rejected for reasons that the check did not know is named when the plan is there."""
    run = over(manifest, tmp_path / "out", "allow_partial=true", "evaluation.groups={Fat: ignore}", "tissue=hsv_otsu")
    assert wsiflow(*run) == 10
    checked = []
    monkeypatch.setattr(ingest, "check_slide", lambda case, _config: checked.append(case.slide_id))
    capsys.readouterr()
    assert wsiflow(*run) == 10
    assert sorted(checked) == ["far", "label", "missing", "none"]
    before_result = capsys.readouterr().out.partition("PARTIAL")[0]
    assert all(before_result.count(f"rejected: slide {slide}, ") == 1 for slide in checked)


def test_groups_are_set_on_the_command_line(tmp_path):
    """Names with blanks and stars can be given; without any the configuration is as it was."""
    config = compose_config([*COARSE, "evaluation.groups={Immune cells: normal, Foo*: ignore}"])
    assert config.evaluation.groups == {"foo*": "ignore", "immune cells": "normal"}
    text = compose_config([*COARSE, "evaluation.groups='{Fäule (alt): ignore, \"a: b\": normal}'"]).evaluation
    assert text.groups == {"a: b": "normal", "fäule (alt)": "ignore"}
    with pytest.raises(InputError, match="groups: Input should be a valid dictionary"):
        compose_config([*COARSE, "evaluation.groups=Necrosis"])
    assert "groups" not in compose_config(COARSE).model_dump()["evaluation"]
