"""A synthetic data set is complete, readable by the readers of real ones, and resumable."""

import csv
from pathlib import Path

import numpy as np
import openslide
import pytest

from wsiflow.errors import IntegrityError
from wsiflow.slides import annotations
from wsiflow.slides.synthetic import dataset
from wsiflow.slides.synthetic.tissue import UM_PX

SIZE_PX = 1024


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of small slides."""
    return dataset.write_dataset(tmp_path_factory.mktemp("set"), size_px=SIZE_PX, seed=3, workers=1)


def rows(manifest: Path) -> list[dict[str, str]]:
    """Return the rows of a manifest."""
    with manifest.open(newline="") as file:
        return list(csv.DictReader(file))


def pixels_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a data set except receipts."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_manifest_names_three_normal_and_three_tumour_slides(manifest: Path) -> None:
    """Paths are relative to the manifest, and every tumour slide has its annotation."""
    found = rows(manifest)
    assert [row["label"] for row in found] == ["normal"] * 3 + ["tumor"] * 3
    assert all((manifest.parent / row["path"]).is_file() for row in found)
    assert all(bool(row["annotation_path"]) == (row["label"] == "tumor") for row in found)


def test_openslide_reads_spacing_and_levels(manifest: Path) -> None:
    """Every slide is a pyramid with the spacing in the manifest."""
    for row in rows(manifest):
        with openslide.OpenSlide(manifest.parent / row["path"]) as slide:
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(UM_PX)
            assert float(row["mpp"]) == UM_PX
            assert slide.level_count >= 3
            assert slide.dimensions[1] == SIZE_PX


def test_annotations_lie_on_tissue(manifest: Path) -> None:
    """The regions that the XML marks as tumour are darker than glass, on every tumour slide."""
    for row in rows(manifest)[3:]:
        with openslide.OpenSlide(manifest.parent / row["path"]) as slide:
            cols, rows_px = slide.level_dimensions[2]
            image = np.asarray(slide.read_region((0, 0), 2, (cols, rows_px)))[..., 1].astype(float)
            outline = annotations.read_outlines(manifest.parent / row["annotation_path"])
        tumour = annotations.tumour_mask(outline, image.shape, downsample=4)
        assert tumour.any()
        assert np.mean(image[tumour]) < 190


def test_one_slide_has_an_exclusion(manifest: Path) -> None:
    """The large lesion has an island of group _2."""
    outlines = [annotations.read_outlines(manifest.parent / row["annotation_path"]) for row in rows(manifest)[3:]]
    assert [len(outline.exclusions) for outline in outlines] == [1, 0, 0]


def test_second_call_writes_nothing(manifest: Path) -> None:
    """A complete data set is not written again."""
    before = {path: path.stat().st_mtime_ns for path in manifest.parent.rglob("*")}
    assert dataset.write_dataset(manifest.parent, size_px=SIZE_PX, seed=3, workers=1) == manifest
    assert {path: path.stat().st_mtime_ns for path in manifest.parent.rglob("*")} == before


def test_workers_do_not_change_the_bytes(manifest: Path, tmp_path: Path) -> None:
    """Two processes write the same bytes as one."""
    dataset.write_dataset(tmp_path, size_px=SIZE_PX, seed=3, workers=2)
    assert pixels_of(tmp_path) == pixels_of(manifest.parent)


def test_folder_of_another_set_is_refused(manifest: Path) -> None:
    """Slides of one seed are not mixed with those of another."""
    with pytest.raises(IntegrityError, match="other inputs"):
        dataset.write_dataset(manifest.parent, size_px=SIZE_PX, seed=4, workers=1)


@pytest.mark.parametrize("seed", range(8))
def test_full_size_plans_hold_the_classes_they_promise(seed: int) -> None:
    """At the size of the demo slides there is a macro, two or three micro, and a micro with two ITC."""
    macro = dataset.plan_slide("macro", width_px=9728, height_px=6144, seed=seed)
    micro = dataset.plan_slide("micro", width_px=6144, height_px=6144, seed=seed)
    mixed = dataset.plan_slide("micro+itc", width_px=6144, height_px=6144, seed=seed)
    assert [lesion.kind for lesion in macro.lesions] == ["macro"]
    assert {lesion.kind for lesion in micro.lesions} == {"micro"}
    assert len(micro.lesions) in (2, 3)
    assert [lesion.kind for lesion in mixed.lesions] == ["micro", "itc", "itc"]


@pytest.mark.parametrize("content", ["none", "macro", "micro", "micro+itc"])
def test_tissue_covers_a_quarter_to_under_half(content: dataset.Content) -> None:
    """There is tissue to analyse and glass to leave out."""
    spec = dataset.plan_slide(content, width_px=3072, height_px=2048, seed=1)
    area = sum(polygon_area(piece) for piece in spec.tissue)
    assert 0.25 < area / (3072 * 2048) < 0.45


def polygon_area(outline: tuple[tuple[int, int], ...]) -> float:
    """Return the area of a polygon (shoelace formula)."""
    x, y = np.array(outline, float).T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)
