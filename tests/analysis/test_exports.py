"""What other programs are given of a run: places in level-0 px, read again by libraries of their own."""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image
from small_runs import over, wsiflow

from flows import cli
from wsiflow.analysis.exports import asap, coordinates, dicom_seg, findings, ome_tiff, qupath, wsinfer
from wsiflow.analysis.exports.findings import Findings, Region, contours
from wsiflow.evaluation.detections import read_detections
from wsiflow.heatmap.files import read_heatmap
from wsiflow.plan.geometry import Frame, l0_from_h, l0_from_h_corner
from wsiflow.run.plan import latest_plan
from wsiflow.slides import annotations
from wsiflow.slides import slide as slide_files
from wsiflow.slides.annotations import SlidePlace

GOLDEN = Path(__file__).with_name("golden")
CORNER = (100, 40)
PLACE = SlidePlace(l0_bounds_corner=CORNER)
SCALE = 1.25  # level-0 px per reading px


@pytest.fixture(scope="module")
def run(tiny_slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a run over slides that state a scanned area, read at 0.3 um/px where they have 0.243."""
    read_facts = slide_files._facts

    def cropped(*given: Any) -> slide_files.SlideFacts:
        return dataclasses.replace(read_facts(*given), l0_bounds_corner=CORNER)

    out = tmp_path_factory.mktemp("exported") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(slide_files, "_facts", cropped)
        more = ("evaluation.bootstrap=0", "lesions=nms", "lesions.threshold=0", "geometry.spacing=0.3")
        assert wsiflow(*over(tiny_slides, out, *more)) == 0
        yield out


def export(run: Path, name: str, out: Path, *more: str) -> Path:
    assert cli.main(["export", str(run), "--to", name, "--out", str(out), *more]) == 0
    return out


def frame(**changes: Any) -> Frame:
    sizes = {"tile_px": 224, "window_px": 224, "stride_px": 112, "halo_px": 112, "block_rows": 1, "block_cols": 1}
    whole: dict[str, Any] = {"convention": "centred", "l0_width_px": 1500, "l0_height_px": 1000}
    return Frame(
        **{
            **whole,
            "l0_per_px": SCALE,
            "um_px": 0.3,
            **sizes,
            "t_col0": 1,
            "t_row0": 0,
            "t_cols": 2,
            "t_rows": 2,
            **changes,
        }
    )


def one_slide(**changes: Any) -> Findings:
    """Return what a run might know of a slide of 0.24 um/px: a contour with a hole, and an outline with one."""
    heat = np.full((4, 4), 0.75, np.float32)
    heat[1, 1], heat[3] = 0.25, np.nan
    square = np.array([(400, 100), (800, 100), (800, 500), (400, 500)], np.float64)
    hole = np.array([(500.5, 200), (600, 200), (600, 300.25)], np.float64)
    tissue = {
        "type": "Feature",
        "id": "t",
        "geometry": {"type": "Polygon", "coordinates": [[[180, 0], [700, 0], [700, 400], [180, 0]]]},
        "properties": {"objectType": "annotation", "name": "tissue 1", "classification": {"name": "Tissue"}},
    }
    values: dict[str, Any] = {
        "slide_id": "a",
        "path": Path("a.mrxs"),
        "um_px_l0": 0.24,
        "frame": frame(),
        "l0_corner": CORNER,
        "class_name": "tumor",
        "heat": heat,
        "detections": np.array([[0.9, 450, 250], [0.5, 600, 120]]),
        "tissue": [tissue],
        "truth": [Region("Tumor", "metastasis <1>", square, (hole,)), Region("Ignore*", "fold", square + 500)],
        "contours": contours(heat, frame(), 0.5),
    }
    return Findings(**{**values, **changes})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.geojson", qupath.geojson(one_slide())),
        ("a.xml", asap.asap_xml(one_slide())),
        ("a.csv", wsinfer.csv_text(one_slide(), 2)),
        ("a.windows.geojson", wsinfer.geojson(one_slide(), 2)),
    ],
)
def test_texts_are_as_they_were(name: str, text: bytes) -> None:
    """A change of what others read is seen; WSIFLOW_GOLDEN=1 writes the files again, to be looked at."""
    if os.environ.get("WSIFLOW_GOLDEN"):
        (GOLDEN / name).write_bytes(text)
    assert text == (GOLDEN / name).read_bytes()


def area(ring: np.ndarray) -> float:
    x, y = ring.T
    return abs(float(x @ np.roll(y, -1) - np.roll(x, -1) @ y)) / 2


def test_a_contour_follows_the_cells_at_or_above_the_threshold() -> None:
    """Its area is theirs, the cell below is a hole, and it begins where the first cell does."""
    (found,) = one_slide().contours
    cell = 112 * SCALE
    assert found.outer.min(axis=0).tolist() == list(l0_from_h_corner(frame(), 0, 0)) == [280, 0]
    assert area(found.outer) - area(found.holes[0]) == pytest.approx(11 * cell**2)
    assert found.holes[0].min(axis=0).tolist() == [280 + cell, cell]
    assert dict(found.measurements) == {"Probability max": 0.75}
    assert len(contours(one_slide().heat, frame(), 0.75)) == 1  # at the threshold is in
    assert contours(one_slide().heat, frame(), 0.8) == []


def test_regions_come_back_from_qupath_and_asap(tmp_path: Path) -> None:
    """Our readers, each in the plane of its format, find the same level-0 px up to the rounding of GeoJSON."""
    (tmp_path / "a.geojson").write_bytes(qupath.geojson(one_slide()))
    (tmp_path / "a.xml").write_bytes(asap.asap_xml(one_slide()))
    expected = [one.outer for one in (*one_slide().truth, *one_slide().contours)]
    for name, apart in (("a.geojson", 0.005), ("a.xml", 1e-6)):
        groups = {"heatmap 0.5": "other", "heatmap 0.5 hole": "other", "tissue": "other", "detection": "other"}
        truth = annotations.read_outlines(tmp_path / name, PLACE, groups=groups)
        drawn = annotations.read(tmp_path / name, PLACE).outlines
        contour = next(one for one in drawn if one.group == "Heatmap 0.5")
        found = [truth.tumour[0].polygon, truth.ignored[0].polygon, contour.polygon]
        for ours, theirs in zip(expected, found, strict=True):
            assert np.abs(ours - theirs).max() <= apart
        holes = truth.tumour[0].holes or [one.polygon for one in truth.exclusions]
        assert np.abs(holes[0] - one_slide().truth[0].holes[0]).max() <= apart
        tissue = next(one for one in drawn if one.group == "Tissue")
        assert tissue.polygon.min(axis=0).tolist() == [280, 40]


def test_detections_outlines_and_tiles_of_a_run_are_in_qupaths_plane(run: Path, tmp_path: Path) -> None:
    """Where a slide states a scanned area all count from its corner; the files of the run count from level 0."""
    features = json.loads((export(run, "qupath", tmp_path) / "a.geojson").read_text())["features"]
    points = [one["geometry"]["coordinates"] for one in features if one["geometry"]["type"] == "Point"]
    detections = read_detections(run / "detections/a.csv")
    assert len(points) > 0
    assert np.array_equal(np.array(points) + CORNER, detections[:, 1:])
    tissue = json.loads((run / "tissue/a.geojson").read_text())["features"]
    assert features[: len(tissue)] == tissue
    rings = [one["geometry"]["coordinates"][0] for one in tissue]
    planned = latest_plan(run).slides[0]
    l0_tissue = np.argwhere(np.array(Image.open(run / "tissue/a.png")))[:, ::-1] * planned.overview_downsample
    assert np.concatenate(rings).min(axis=0).tolist() == pytest.approx(l0_tissue.min(axis=0) - CORNER)
    (truth,) = [one for one in features if one["properties"].get("classification", {}).get("name") == "Tumor"]
    drawn = np.array(truth["geometry"]["coordinates"][0][:-1]) + CORNER
    assert drawn.tolist() == [[160, 160], [400, 160], [400, 340]]
    heat, _ = read_heatmap(run / "heatmaps/a.tif")
    boxes = [one for one in features if one["properties"]["objectType"] == "tile"]
    side = 224 * planned.frame.l0_per_px
    assert planned.frame.l0_per_px == pytest.approx(0.3 / 0.243)
    for one in boxes:
        left, top = np.array(one["geometry"]["coordinates"][0]).min(axis=0) + CORNER
        col, row = round(left / side) * 2, round(top / side) * 2
        cells = heat[row : row + 2, col : col + 2]
        assert (left, top) == pytest.approx((col / 2 * side, row / 2 * side), abs=0.01)
        assert one["properties"]["measurements"]["Probability max"] == pytest.approx(np.nanmax(cells), rel=1e-6)
    assert len(boxes) == np.isfinite(heat.reshape(2, 2, -1, 2)).any(axis=(1, 3)).sum()


def test_layers_thresholds_and_slides_can_be_chosen(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The words before ``--to`` were the first form, and stay."""
    words = ["--layers", "contours", "--threshold", "0", "1", "--slide", "a", "--out", str(tmp_path)]
    assert cli.main(["export", "qupath", str(run), *words]) == 0
    features = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert {one["properties"]["classification"]["name"] for one in features} == {"Heatmap 0"}
    assert [path.name for path in tmp_path.glob("*.geojson")] == ["a.geojson"]
    assert cli.main(["export", str(run), "--to=asap", "--slide", "c"]) == 20
    assert "the run has no slide c" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["export", str(run), "--to", "qupath", "--threshold", "1.5"])


def test_without_a_folder_files_lie_in_that_of_the_run(run: Path) -> None:
    assert cli.main(["export", str(run), "--to", "asap"]) == 0
    (dot, *_) = [one for one in (run / "exports/asap/a.xml").read_text().splitlines() if "Coordinate Order" in one][-1:]
    x, y = read_detections(run / "detections/a.csv")[-1, 1:]
    assert f'X="{x:.10g}" Y="{y:.10g}"' in dot


def test_a_truth_that_was_moved_is_left_out_and_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = latest_plan(run).slides[0].annotation_path
    Path(moved).rename(tmp_path / "a.xml")
    try:
        export(run, "qupath", tmp_path / "out", "--layers", "truth")
    finally:
        (tmp_path / "a.xml").rename(moved)
    assert "the truth of slide a is left out" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/a.geojson").read_text())["features"] == []


def test_truth_masks_become_outlines(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask at 1/32 of level 0 is drawn along its pixels, in level-0 px."""
    planned, (case, *_) = latest_plan(run).slides[0], findings.read_cases(findings.ingest.newest_cases(run))[1]
    mask = np.zeros((16, 19), np.bool_)
    mask[4:6, 5:9] = True
    marks = findings.planned_marks(planned, case, latest_plan(run).settings.evaluation)
    monkeypatch.setattr(findings, "planned_marks", lambda *_: marks._replace(tumour=mask))
    masked = dataclasses.replace(case, mask_path=case.annotation_path)
    (found,) = findings._truth(planned, masked, latest_plan(run), print)
    assert found.kind == "Tumor"
    assert (found.outer.min(axis=0) / 32).tolist() == [5, 4]
    assert area(found.outer) == 8 * 32**2


def read_coords(data: bytes) -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
    with h5py.File(io.BytesIO(data)) as file:
        return file["coords"][:], dict(file["coords"].attrs), file["prob"][:]


def facts(*downsamples: float) -> slide_files.SlideFacts:
    sizes = tuple((round(1500 / each), round(1000 / each)) for each in downsamples)
    return slide_files.SlideFacts("a", Path("a"), "generic", (1500, 1000), None, sizes, downsamples, (255, 255, 255))


@pytest.mark.parametrize(
    ("downsamples", "level", "size"),
    [((1.0, 4.0), 0, 280), ((1.0, 1.25, 4.0), 1, 224), ((1.0, 1.26), 0, 280)],
)
def test_clam_reads_the_area_of_a_tile(downsamples: tuple[float, ...], level: int, size: int) -> None:
    """``patch_size`` pixels of ``patch_level``: that level if the run read it, level 0 if not."""
    coords, attributes, prob = read_coords(coordinates.clam_h5(one_slide(), facts(*downsamples)))
    assert coords.dtype == np.int64
    assert coords.tolist() == [[280, 0], [560, 0], [280, 280], [560, 280]]
    assert (attributes["patch_level"], attributes["patch_size"]) == (level, size)
    assert attributes["patch_size"] * downsamples[attributes["patch_level"]] == pytest.approx(224 * SCALE, abs=0.5)
    assert tuple(attributes["level_dim"]) == facts(*downsamples).level_sizes_px[level]
    assert prob.tolist() == [0.75] * 4


@pytest.mark.parametrize(
    ("um_px_l0", "l0_per_px", "folder"),
    [
        (0.24, 1.0, "40x_224px_0px_overlap"),
        (0.25, 2.0, "20x_224px_0px_overlap"),
        (0.24, 1.25, "32x_224px_0px_overlap"),
        (0.24, 0.3 / 0.243, "40x_277px_0px_overlap"),
        (4.0, 1.0, "2x_224px_0px_overlap"),
    ],
)
def test_trident_reads_the_area_of_a_tile(um_px_l0: float, l0_per_px: float, folder: str) -> None:
    """It reads patch_size * level0_magnification / target_magnification level-0 px."""
    found = one_slide(um_px_l0=um_px_l0, frame=frame(l0_per_px=l0_per_px))
    name, data = coordinates.trident_h5(found)
    coords, attributes, _ = read_coords(data)
    assert name == f"{folder}/patches/a_patches.h5"
    side = attributes["patch_size"] * attributes["level0_magnification"] / attributes["target_magnification"]
    assert side == pytest.approx(224 * l0_per_px, abs=0.5)
    assert attributes["patch_size_level0"] == round(side)
    assert np.abs(coords - np.array([[1, 0], [2, 0], [1, 1], [2, 1]]) * 224 * l0_per_px).max() <= 0.5


def test_clam_and_trident_get_the_tiles_of_a_run(run: Path, tmp_path: Path) -> None:
    for name, file in (("clam", "patches/a.h5"), ("trident", "40x_277px_0px_overlap/patches/a_patches.h5")):
        coords, _, prob = read_coords((export(run, name, tmp_path) / file).read_bytes())
        heat, _ = read_heatmap(run / "heatmaps/a.tif")
        assert len(coords) == np.isfinite(heat.reshape(2, 2, -1, 2)).any(axis=(1, 3)).sum()
        assert prob.max() == pytest.approx(np.nanmax(heat))


@pytest.mark.parametrize("convention", ["centred", "reference"])
def test_windows_are_where_the_network_looked(convention: str) -> None:
    """The centre of a window is the place of its score, to the rounding of corners and of the side to whole px."""
    found = one_slide(frame=frame(convention=convention))
    rows = list(csv.DictReader(io.StringIO(wsinfer.csv_text(found, 1).decode())))
    cells = np.argwhere(np.isfinite(found.heat))
    centres = np.array([(int(r["minx"]) + int(r["width"]) / 2, int(r["miny"]) + int(r["height"]) / 2) for r in rows])
    assert np.abs(centres - l0_from_h(found.frame, cells[:, ::-1])).max() <= 1
    assert {(r["width"], r["height"]) for r in rows} == {("280", "280")}
    assert [float(r["prob_tumor"]) for r in rows] == found.heat[tuple(cells.T)].tolist()


def test_windows_of_a_run_touch(run: Path, tmp_path: Path) -> None:
    """By default none is written that overlaps another; QuPath's are off by the scanned corner."""
    out = export(run, "wsinfer", tmp_path)
    with (out / "model-outputs-csv/a.csv").open(newline="") as stream:
        corners = [(int(row["minx"]), int(row["miny"])) for row in csv.DictReader(stream)]
    features = json.loads((out / "model-outputs-geojson/a.geojson").read_text())["features"]
    boxes = np.array([one["geometry"]["coordinates"][0][0] for one in features])
    assert np.array_equal(boxes + CORNER, corners)
    assert min(np.diff(sorted({x for x, _ in corners}))) >= 277 - 1
    with pytest.raises(SystemExit):
        cli.main(["export", str(run), "--to", "wsinfer", "--every", "0"])


def test_more_windows_than_a_viewer_takes_are_in_the_csv_alone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wsinfer, "_MOST_TILES", 3)
    out = export(run, "wsinfer", tmp_path, "--every", "1", "--slide", "a")
    assert "slide a: no GeoJSON of " in capsys.readouterr().out
    assert (out / "model-outputs-csv/a.csv").is_file()
    assert not (out / "model-outputs-geojson").exists()


def test_the_heatmap_comes_back_from_ome_tiff_at_its_place(run: Path, tmp_path: Path) -> None:
    """Values, NaN, cell size, and the corner of the first cell in um from the scanned corner."""
    heat, _ = read_heatmap(run / "heatmaps/a.tif")
    with tifffile.TiffFile(export(run, "ome-tiff", tmp_path) / "a.ome.tif") as tiff:
        assert tiff.is_ome
        assert np.array_equal(tiff.series[0].asarray(), heat, equal_nan=True)
        pixels = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]
    assert (pixels["PhysicalSizeX"], pixels["PhysicalSizeXUnit"]) == (pytest.approx(112 * 0.3), "µm")
    place = (pixels["Plane"]["PositionX"], pixels["Plane"]["PositionY"])
    first = latest_plan(run).slides[0].frame
    expected = (np.array(l0_from_h_corner(first, 0, 0)) - CORNER) * 0.243
    assert place == pytest.approx(tuple(expected))


def test_a_large_heatmap_has_levels() -> None:
    large = frame(t_cols=300, t_rows=150)
    heat = np.random.default_rng(0).random(large.h_shape, np.float32)
    heat[:100] = np.nan
    data = ome_tiff.ome_tiff(one_slide(frame=large, heat=heat))
    assert data == ome_tiff.ome_tiff(one_slide(frame=large, heat=heat))
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        levels = [level.asarray() for level in tiff.series[0].levels]
        stated = tifffile.xml2dict(tiff.ome_metadata)["OME"]["StructuredAnnotations"]["MapAnnotation"]["Value"]["M"]
    assert [level.shape for level in levels] == [(300, 600), (150, 300), (75, 150)]
    assert levels[1][60, 7] == heat[120:122, 14:16].max()
    assert {one["K"]: one["value"] for one in stated}["l0_x"] == 280


def dicom_slide(folder: Path, *, size: tuple[int, int] = (1500, 1000)) -> Any:
    """Return the header of a DICOM slide of 0.24 by 0.25 um/px, turned and shifted on the glass, and write it."""
    pydicom = pytest.importorskip("pydicom")
    pytest.importorskip("highdicom")
    made = pydicom.Dataset()
    made.SOPClassUID, made.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.77.1.6", "1.2.3.4"
    made.StudyInstanceUID, made.SeriesInstanceUID, made.FrameOfReferenceUID = "1.2.3", "1.2.3.1", "1.2.3.2"
    for name in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime"):
        setattr(made, name, "")
    for name in ("AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator"):
        setattr(made, name, "")
    made.ImageType, made.Modality = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], "SM"
    made.Rows = made.Columns = 512
    made.TotalPixelMatrixColumns, made.TotalPixelMatrixRows = size
    made.NumberOfFrames, made.SamplesPerPixel = 6, 3
    made.ImageOrientationSlide, made.DimensionOrganizationType = [0, -1, 0, -1, 0, 0], "TILED_FULL"
    made.ContainerIdentifier, made.ContainerTypeCodeSequence = "c", []
    made.IssuerOfTheContainerIdentifierSequence, made.SpecimenDescriptionSequence = [], []
    origin, measures, shared = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem = 20.5, 40.25
    measures.PixelSpacing, measures.SliceThickness = [0.00025, 0.00024], 0.001
    shared.PixelMeasuresSequence = [measures]
    made.TotalPixelMatrixOriginSequence, made.SharedFunctionalGroupsSequence = [origin], [shared]
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    made.save_as(folder / "a.dcm", enforce_file_format=True)
    return made


def test_a_dicom_segmentation_lies_where_the_heatmap_does(tmp_path: Path) -> None:
    """The centre of each cell is the same point of the glass, by the header of the slide and by that of the file."""
    source = dicom_slide(tmp_path)
    import highdicom as hd

    notes: list[str] = []
    found = one_slide(path=tmp_path / "a.dcm")
    (written,) = dicom_seg._files(found, notes.append).values()
    seg = hd.seg.segread(io.BytesIO(written))
    values = seg.get_total_pixel_matrix(segment_numbers=[1], rescale_fractional=True)[..., 0]
    assert np.abs(values - np.nan_to_num(found.heat)).max() <= 0.5 / 255
    assert (seg.SegmentationFractionalType, seg.FrameOfReferenceUID) == ("PROBABILITY", "1.2.3.2")
    cells = np.argwhere(np.isfinite(found.heat))[:, ::-1]
    on_slide = hd.spatial.ImageToReferenceTransformer.for_image(source, for_total_pixel_matrix=True)
    on_map = hd.spatial.ImageToReferenceTransformer.for_image(seg, for_total_pixel_matrix=True)
    apart_mm = np.abs(on_slide(l0_from_h(found.frame, cells)) - on_map(cells + 0.5)).max()
    assert apart_mm < 0.1 * 0.00024
    again = hd.seg.segread(io.BytesIO(next(iter(dicom_seg._files(found, notes.append).values()))))
    assert (again.SOPInstanceUID, again.PixelData) == (seg.SOPInstanceUID, seg.PixelData)
    assert notes == []


def test_slides_that_a_segmentation_cannot_refer_to_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of another format, and one of another size than that of the run."""
    dicom_slide(tmp_path, size=(1500, 1001))
    assert cli.main(["export", str(run), "--to", "dicom-seg", "--out", str(tmp_path / "out")]) == 20
    assert "slide a is left out: a segmentation refers to a slide in DICOM, this is a.tif" in capsys.readouterr().err
    notes: list[str] = []
    assert dicom_seg._files(one_slide(path=tmp_path / "a.dcm"), notes.append) == {}
    assert "level 0 is 1500 x 1001 px, 1500 x 1000 was planned" in notes[0]


def test_a_slide_without_a_place_on_the_glass_is_named(shared_data: Path) -> None:
    """A real one has no origin in its header."""
    pytest.importorskip("highdicom")
    notes: list[str] = []
    path = shared_data / "wsi/good/multi_frame_jpeg2000_camelyon_challenge_image.dcm"
    assert dicom_seg._files(one_slide(path=path), notes.append) == {}
    assert "the header has no TotalPixelMatrixOriginSequence" in notes[0]
