"""Slides like those of CAMELYON16: parts are disjoint, the truth is correct, and bad folders are refused."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import pytest

from flows.__main__ import main
from wsiflow.errors import InputError, IntegrityError
from wsiflow.slides import annotations
from wsiflow.slides.synthetic import camelyon16, dataset, textures
from wsiflow.slides.synthetic.atlas import Atlas, area, part_of, read_atlas
from wsiflow.slides.synthetic.tissue import UM_PX, Lesion
from wsiflow.system import publish

SCALE = 1 / 16


@pytest.fixture(scope="module")
def atlas(shared_data: Path) -> Atlas:
    """Return the real outlines and images."""
    return read_atlas(shared_data)


@pytest.fixture(scope="module")
def plans(atlas: Atlas) -> tuple[camelyon16.SyntheticSlide, ...]:
    """Return the descriptions of ten small test slides."""
    return camelyon16.plan_slides(atlas, "test", slides=10, scale=SCALE, seed=3)


def test_parts_are_disjoint(atlas: Atlas, plans: tuple[camelyon16.SyntheticSlide, ...]) -> None:
    """No image, section or set of metastases is in both parts, and slides use only their own part."""
    training = camelyon16.plan_slides(atlas, "train", slides=10, scale=SCALE, seed=3)
    parts = {picture.name: picture.part for picture in atlas.pictures}
    assert set(parts.values()) == {"train", "test"}
    for part, made in (("train", training), ("test", plans)):
        used = {name for one in made for name in (*one.normal, *one.other, *one.tumour)}
        assert {parts[name] for name in used} == {part}
        assert {part_of(name) for one in made for name in one.like if name} == {part}
        assert {one.part for one in made} == {part}
    pixels = {part: {one.codes.tobytes() for one in atlas.pictures if one.part == part} for part in ("train", "test")}
    assert not pixels["train"] & pixels["test"]


def test_the_slide_in_a_picture_s_name_decides_its_part() -> None:
    """One slide is for testing, whatever the class; without a slide in the name the hash decides."""
    assert part_of("tumor_073_45847_62304") == "test"
    assert part_of("tumor_001_45847_62304") == "train"
    assert {part_of(f"tumor_{number:03d}") for number in range(1, 40)} == {"train", "test"}


def test_every_other_slide_has_metastases(plans: tuple[camelyon16.SyntheticSlide, ...]) -> None:
    """These have metastases on their tissue and images of tumour; the others have neither."""
    assert [bool(one.lesions) for one in plans] == [False, True] * 5
    for one in plans:
        assert bool(one.tumour) == bool(one.lesions)
        width_px, height_px = one.size_px
        tissue = np.zeros((height_px, width_px), np.uint8)
        for outline in one.tissue:
            cv2.fillPoly(tissue, [np.array(outline, np.int32)], 1)
        for lesion in one.lesions:
            inside = np.zeros_like(tissue)
            cv2.fillPoly(inside, [np.array(lesion.outline, np.int32)], 1)
            assert tissue[inside > 0].mean() > 0.97
        assert not set(one.normal) & set(one.other)


def test_outlines_keep_their_real_size(atlas: Atlas, plans: tuple[camelyon16.SyntheticSlide, ...]) -> None:
    """A metastasis has the area of one on the real slide, times the square of the scale."""
    checked = 0
    for one in plans:
        real = np.array([area(outline) for outline in atlas.metastases[one.like[1]][0]]) if one.lesions else ()
        for lesion in one.lesions:
            found = area(np.array(lesion.outline, np.float64)) / SCALE**2
            if found > 1e5:  # smaller ones are rounded to whole pixels
                assert np.abs(real / found - 1).min() < 0.1
                checked += 1
    assert checked > 3


def test_a_slide_is_the_same_however_often_it_is_planned_and_painted(
    atlas: Atlas, plans: tuple[camelyon16.SyntheticSlide, ...]
) -> None:
    """Descriptions and pixels depend on the seed only, and another seed gives others."""
    assert camelyon16.plan_slides(atlas, "test", slides=10, scale=SCALE, seed=3) == plans
    assert camelyon16.plan_slides(atlas, "test", slides=4, scale=SCALE, seed=3) == plans[:4]
    assert camelyon16.plan_slides(atlas, "test", slides=4, scale=SCALE, seed=4) != plans[:4]
    small = min(plans, key=lambda one: one.size_px[0] * one.size_px[1])
    first = camelyon16.paint(small, atlas.pictures)
    assert first.shape == (small.size_px[1], small.size_px[0], 3)
    np.testing.assert_array_equal(first, camelyon16.paint(small, atlas.pictures[::-1]))


def test_truth_matches_pixels(atlas: Atlas, plans: tuple[camelyon16.SyntheticSlide, ...]) -> None:
    """Without its metastases a slide has the same pixels outside their outlines, and others inside."""
    sick = min((one for one in plans if one.lesions), key=lambda one: one.size_px[0] * one.size_px[1])
    clear = sick.appearance._replace(noise=0.0, blur_px=0.3)
    painted, healthy = (
        camelyon16.paint(one, atlas.pictures)
        for one in (sick._replace(appearance=clear), sick._replace(appearance=clear, lesions=()))
    )
    apart = (painted != healthy).any(axis=2)
    inside = camelyon16.filled([lesion.outline for lesion in sick.lesions], (0, 0), sick.size_px) > 0
    beyond = cv2.dilate(inside.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    assert not apart[~beyond].any()
    assert apart[inside].mean() > 0.1


def test_joints_of_pieces_do_not_reveal_the_class(atlas: Atlas) -> None:
    """In both classes neighbouring pixels differ as much at the joints of pieces as elsewhere."""
    for tumour in (False, True):
        chosen = [one.codes for one in atlas.pictures if one.part == "test" and one.tumour == tumour][:8]
        side = 8 * (textures.PIECE_PX - textures.OVERLAP_PX)
        field = textures.quilt(np.stack(chosen), np.ones((side, side), np.bool_), 11)[..., 0].astype(np.float64)
        columns = np.append(np.abs(np.diff(field, axis=1)).mean(axis=0), 0.0).reshape(8, -1)[:, :-1].mean(axis=0)
        meeting, within = columns[: textures.OVERLAP_PX].mean(), columns[textures.OVERLAP_PX :].mean()
        assert meeting == pytest.approx(within, rel=0.1), "tumour" if tumour else "normal"


@pytest.fixture(scope="module")
def written(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the manifest of two very small slides."""
    folder = tmp_path_factory.mktemp("like")
    return dataset.write_like(folder, shared_data, slides=2, scale=0.04, seed=5, workers=1)


def test_a_data_set_is_written(written: Path) -> None:
    """Manifest, annotation, sources and slides are consistent."""
    with written.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["label"] for row in rows] == ["normal", "tumor"]
    assert {row["split"] for row in rows} == {"test"}
    assert {row["scanner"] for row in rows} <= {"center_0", "center_1"}
    assert len({row["patient_id"] for row in rows}) == 2
    with openslide.OpenSlide(written.parent / rows[1]["path"]) as slide:
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(UM_PX)
        outline = annotations.read_outlines(written.parent / rows[1]["annotation_path"])
        assert annotations.tumour_mask(outline, slide.dimensions[::-1], downsample=1).any()
    sources = json.loads((written.parent / "sources.json").read_text())
    assert all(part_of(Path(name).stem) == "test" for one in sources.values() for name in one["pictures"])
    assert "evaluation.l0_um_px=6.075" in (written.parent / "README.md").read_text()


def test_a_complete_data_set_is_left_alone(written: Path, shared_data: Path) -> None:
    """A complete data set is unchanged, and another seed in the same folder is refused."""
    before = {path.name: path.stat().st_mtime_ns for path in written.parent.glob("*.*")}
    dataset.write_like(written.parent, shared_data, slides=2, scale=0.04, seed=5, workers=1)
    assert {path.name: path.stat().st_mtime_ns for path in written.parent.glob("*.*")} == before
    with pytest.raises(IntegrityError):
        dataset.write_like(written.parent, shared_data, slides=2, scale=0.04, seed=6, workers=1)


def _archive(path: Path, text: bytes) -> None:
    """Write an archive with one file of outlines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as opened:
        about = tarfile.TarInfo("x/Normal_001.json")
        about.size = len(text)
        opened.addfile(about, io.BytesIO(text))


def _cut_short(path: Path) -> None:
    """Truncate a file to its first half, like an interrupted download."""
    _archive(path, b'{"positive": [], "negative": []}' + bytes(1000) + np.random.default_rng(0).bytes(5000))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _leave_training_pictures(patches: Path) -> None:
    """Leave only normal images of the training part."""
    for path in patches.glob("*/*/*"):
        if path.parent.name != "normal" or part_of(path.stem) != "train":
            path.unlink()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda data: (data / "camelyon16/tissue_normal_json.tar.gz").unlink(), "tissue_normal_json"),
        (lambda data: _archive(data / "camelyon16/tissue_normal_json.tar.gz", b"{"), "tissue_normal_json"),
        (lambda data: _cut_short(data / "camelyon16/annotations_train_json.tar.gz"), "annotations_train_json"),
        (lambda data: _leave_training_pictures(data / "patches"), "the test part has 0 readable normal images"),
        (lambda _: None, "the test part has no outlines"),
        (lambda data: (data / "patches").rename(data / "other"), "contains no images of tissue"),
    ],
)
def test_a_bad_data_folder_is_named(
    spoil: Callable[[Path], object], named: str, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message is one line about what is missing, and the exit code is that of bad input."""
    for folder in ("camelyon16_256/normal", "camelyon16_256/tumor", "dldp_256/normal", "dldp_256/tumor"):
        (tmp_path / "patches" / folder).mkdir(parents=True)
        for path in sorted((shared_data / "patches" / folder).iterdir())[::3]:
            (tmp_path / "patches" / folder / path.name).symlink_to(path)
    (tmp_path / "camelyon16").mkdir()
    for name in ("tissue_normal_json.tar.gz", "annotations_train_json.tar.gz"):
        _archive(tmp_path / "camelyon16" / name, b'{"positive": [], "negative": []}')
    (tmp_path / "camelyon16/tables").symlink_to(shared_data / "camelyon16/tables")
    spoil(tmp_path)
    assert main(["synth", str(tmp_path / "out"), "--like", "camelyon16", "--data", str(tmp_path)]) == 20
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1


def test_a_run_is_not_scored_by_the_lengths_of_real_slides(shared_data: Path, tmp_path: Path, capsys: Any) -> None:
    """At this scale most lesions would count as isolated tumour cells; the run is refused before rendering."""
    given = ["dataset=synthetic", "dataset.like=camelyon16", f"dataset.data={shared_data}", "dataset.scale=0.125"]
    given += [f"dataset.folder={tmp_path / 'slides'}", f"out={tmp_path / 'run'}", "orchestrator=none", "tracking=off"]
    assert main(["run", *given]) == 20
    assert "set evaluation.l0_um_px=1.944" in capsys.readouterr().err
    assert not (tmp_path / "slides").exists()


def test_a_folder_of_another_data_set_is_refused_before_drawing(
    shared_data: Path, atlas: Atlas, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set with more slides would begin with the same slides, but is another one."""
    monkeypatch.setattr(dataset, "read_atlas", lambda _: atlas)  # because reading it takes long
    (tmp_path / "sources.json").write_text("{}")
    publish.publish_bytes(tmp_path, "manifest.csv", b"other", publish.key_of(text="other"), {"kind": "synthetic"})
    monkeypatch.setattr(dataset, "_each", lambda *_: pytest.fail("something was drawn"))
    assert main(["synth", str(tmp_path), "--like", "camelyon16", "--data", str(shared_data), "--slides", "1"]) == 40
    assert "manifest.csv" in capsys.readouterr().err


def test_no_room_for_decoys_is_no_error() -> None:
    """If metastases cover all tissue, there is no room for decoys."""
    tissue = np.ones((4, 4), np.uint8)
    shapes = (np.array([[0.0, 0], [9, 0], [9, 9]]),)
    assert camelyon16._decoys(np.random.default_rng(0), shapes, tissue, tissue > 0, 1.0) == ()


def test_data_must_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The option --like needs a data folder."""
    assert main(["synth", str(tmp_path), "--like", "camelyon16"]) == 20
    assert "--data" in capsys.readouterr().err


def test_no_outlines_is_an_error(atlas: Atlas) -> None:
    """For a part without outlines there are no slides."""
    with pytest.raises(InputError, match="the test part has no outlines"):
        camelyon16.plan_slides(atlas._replace(metastases={}), "test", slides=2, scale=SCALE, seed=0)


def test_keys_of_existing_data_sets_stay() -> None:
    """The key of a slide does not depend on the names of classes, so existing folders can be continued."""
    outline = ((0, 0), (5, 0), (5, 5))
    appearance = textures.Appearance((0.1, 0.2, 0.3), (0.1, 0.2, 0.3), (1.0, 1.0), (240.0, 240.0, 240.0), 0.5, 1.0)
    lesion = Lesion(outline, (outline,))
    names = ("a",), ("b",), ("c",)
    slide = camelyon16.SyntheticSlide(
        *("test_001", "test", "0", 7, (10, 20), (outline,), (lesion,), (outline,), (0.5,), *names),
        appearance,
        ("x", "y"),
    )
    assert dataset._like_key(slide, "00").startswith("5ec6110077ff92fe")
