"""Tissue and regions of interest that are given by files: masks of any size, GeoJSON, ASAP, contours of CLAM."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from wsiflow.errors import InputError
from wsiflow.plan import outline
from wsiflow.slides import clam, regions
from wsiflow.slides.annotations import SlidePlace
from wsiflow.slides.manifest import Case
from wsiflow.slides.regions import Chosen, Plane, read_region

# A slide of 3,200 x 1,600 px, seen at 1/32.
PLANE = Plane((3200, 1600), 32, (50, 100), SlidePlace((3200, 1600), (0, 0)))
MOVED = PLANE._replace(place=SlidePlace((3200, 1600), (320, 64)))
BOX = [[800, 400], [1600, 400], [1600, 1200], [800, 1200], [800, 400]]
HOLE = [[960, 640], [1280, 640], [1280, 960], [960, 960], [960, 640]]


def expected(*, hole: bool = False) -> NDArray[np.bool_]:
    """Return the mask of the box on the plane, with or without its hole."""
    mask = np.zeros(PLANE.shape, np.bool_)
    mask[13:37, 25:50] = True  # the row at 400 px begins at 12.5
    mask[12] = False
    mask[12, 25:50] = True
    if hole:
        mask[20:30, 30:40] = False
    mask[37] = False
    return mask


def feature(*rings: object, kind: str = "Polygon", **about: object) -> dict[str, object]:
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": list(rings)}, "properties": about}


def written(folder: Path, document: object, name: str = "s.geojson") -> Path:
    path = folder / name
    path.write_text(json.dumps(document))
    return path


# --- masks


def painted(shape: tuple[int, int], value: int = 255, background: int = 0) -> NDArray[np.uint8]:
    """Return a mask of some size in which the box of 800 to 1,600 and 400 to 1,200 px has a value."""
    rows, cols = shape
    mask = np.full(shape, background, np.uint8)
    mask[rows // 4 : rows * 3 // 4, cols // 4 : cols // 2] = value
    return mask


@pytest.mark.parametrize("shape", [(1600, 3200), (400, 800), (50, 100), (8, 16), (53, 107), (4, 8)])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_mask_may_have_any_size(shape: tuple[int, int], suffix: str, tmp_path: Path) -> None:
    """A mask is stretched over the slide; its pixels are taken at the centres of those of the overview."""
    path = tmp_path / f"m{suffix}"
    Image.fromarray(painted(shape)).save(path) if suffix == ".png" else tifffile.imwrite(path, painted(shape))
    mask = read_region(path, PLANE, Chosen())
    assert mask.shape == (50, 100)
    assert mask[14:36, 26:49].all()
    around = mask.copy()
    around[11:39, 23:52] = False
    assert not around.any()


@pytest.mark.parametrize("shape", [(100, 100), (3200, 1600), (1600, 3000), (50, 120)])
def test_a_mask_of_other_proportions_is_refused(shape: tuple[int, int], tmp_path: Path) -> None:
    """It belongs to another slide, or to a part of this one; that sides are swapped is said."""
    Image.fromarray(painted(shape)).save(tmp_path / "m.png")
    with pytest.raises(InputError, match="proportions") as caught:
        read_region(tmp_path / "m.png", PLANE, Chosen())
    assert ("swapped" in str(caught.value)) == (shape == (3200, 1600))
    assert "3200 x 1600" in str(caught.value)


@pytest.mark.parametrize(
    ("tissue", "glass", "others", "values"),
    [
        (255, 0, [], ()),
        (1, 0, [], ()),
        (1, 0, [2], (1, 2)),  # tissue and tumour in it, as ASAP writes them
        (2, 0, [1], (2,)),
        (1, 7, [2, 3, 4, 5, 6], ()),  # GrandQC: 1 is clean, 7 is background
        (1, 7, [], ()),
        (1, 0, [7, 4], ()),
        (0, 1, [], (0,)),  # GrandQC's first stage: 0 is tissue
        (40, 200, [90], (40,)),
    ],
)
def test_the_values_of_masks(
    tissue: int, glass: int, others: list[int], values: tuple[int, ...], tmp_path: Path
) -> None:
    """Known sets of values say what is tissue; others are named in the settings."""
    mask = painted((50, 100), tissue, glass)
    mask[0, : len(others)] = others
    Image.fromarray(mask).save(tmp_path / "m.png")
    found = read_region(tmp_path / "m.png", PLANE, Chosen(values=values))
    np.testing.assert_array_equal(found[1:], painted((50, 100), 1)[1:] > 0)
    assert found[0, : len(others)].tolist() == [other in values for other in others]


@pytest.mark.parametrize("present", [[0, 128], [0, 254, 255], [3, 9], list(range(256))])
def test_unknown_values_are_refused(present: list[int], tmp_path: Path) -> None:
    """A picture, or a mask that was saved as JPEG, does not say what is tissue; the setting that would is named."""
    mask = np.resize(np.array(present, np.uint8), (50, 100))
    Image.fromarray(mask).save(tmp_path / "m.png")
    with pytest.raises(InputError, match=r"do not say what is meant.*tissue\.values="):
        read_region(tmp_path / "m.png", PLANE, Chosen())


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_mask_in_colours_is_refused(tmp_path: Path, suffix: str) -> None:
    """Its first channel alone would say something else; a grey one of three equal channels is a mask."""
    path = tmp_path / f"m{suffix}"
    grey = np.repeat(painted((50, 100))[..., np.newaxis], 3, axis=2)
    Image.fromarray(grey).save(path)
    np.testing.assert_array_equal(read_region(path, PLANE, Chosen()), painted((50, 100)) > 0)
    grey[..., 1] = 255
    Image.fromarray(grey).save(path)
    with pytest.raises(InputError, match="picture in colours"):
        read_region(path, PLANE, Chosen())


def test_palettes_and_single_bits_are_masks_too(tmp_path: Path) -> None:
    """A palette image has the values of its indices, and an image of single bits 0 and 1."""
    indexed = Image.fromarray(painted((50, 100), 1, 7))
    indexed.putpalette([9, 9, 9] * 8)
    indexed.save(tmp_path / "p.png")
    Image.fromarray(painted((50, 100)) > 0).save(tmp_path / "b.png")
    for name in ("p.png", "b.png"):
        np.testing.assert_array_equal(read_region(tmp_path / name, PLANE, Chosen()), painted((50, 100)) > 0)


@pytest.mark.parametrize("name", ["m.jpg", "m.npy", "m", "m.h5"])
def test_other_files_are_refused_with_what_is_read(name: str, tmp_path: Path) -> None:
    """The message names the extensions that are read."""
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=r"\.png, \.tif.*\.geojson"):
        read_region(tmp_path / name, PLANE, Chosen())


# --- outlines


@pytest.mark.parametrize(
    "document",
    [
        {"type": "FeatureCollection", "features": [feature(BOX, HOLE)]},
        [feature(BOX, HOLE)],
        feature(BOX, HOLE),
        {"type": "Polygon", "coordinates": [BOX, HOLE]},
        feature([BOX, HOLE], kind="MultiPolygon"),
        {"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": [BOX, HOLE]}]},
        [feature(BOX, HOLE), {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 1]}}],
    ],
    ids=["collection", "list", "feature", "geometry", "multi", "geometries", "with-a-point"],
)
def test_geojson_in_all_its_wrappings(document: object, tmp_path: Path) -> None:
    """Holes are cut, and points have no area."""
    found = read_region(written(tmp_path, document), PLANE, Chosen())
    np.testing.assert_array_equal(found, expected(hole=True))


def test_a_piece_in_a_hole_stays(tmp_path: Path) -> None:
    """A hole is cut out of its own polygon, and not out of others."""
    piece = [[1056, 736], [1184, 736], [1184, 864], [1056, 864]]
    document = [feature(piece), feature(BOX, HOLE)]
    found = read_region(written(tmp_path, document), PLANE, Chosen())
    assert found[23:27, 33:37].all()
    assert found.sum() == expected(hole=True).sum() + 16


def test_outlines_are_chosen_by_name(tmp_path: Path) -> None:
    """Names and classes count in any case; without them tissue is meant, where an outline is called so, else all."""
    other = [[2400, 400], [2720, 400], [2720, 720], [2400, 720]]
    path = written(
        tmp_path,
        [
            feature(BOX, classification={"name": "Tissue"}, name="piece 1"),
            feature(other, classification={"name": "Tumor"}),
        ],
    )
    both = read_region(path, PLANE, Chosen())
    assert both.sum() == expected().sum() + 100
    for names in (("tissue",), ("Piece 1",)):
        np.testing.assert_array_equal(read_region(path, PLANE, Chosen(names)), expected())
    np.testing.assert_array_equal(read_region(path, PLANE, Chosen(preferred="tissue")), expected())
    assert read_region(path, PLANE, Chosen(("TUMOR",))).sum() == 100
    with pytest.raises(InputError, match=r"no outline is called stroma.*piece 1, Tissue, Tumor.*tissue\.regions"):
        read_region(path, PLANE, Chosen(("stroma",), names_key="tissue.regions"))


def test_excluded_outlines_are_cut_out(tmp_path: Path) -> None:
    """Artefacts and ignored areas are no tissue, whatever their order in the file."""
    path = written(tmp_path, [feature(HOLE, classification={"name": "Ignore*"}), feature(BOX)])
    np.testing.assert_array_equal(read_region(path, PLANE, Chosen()), expected(hole=True))


def test_the_outlines_of_a_run_are_its_tissue_again(tmp_path: Path) -> None:
    """What wsiflow writes for QuPath is read to the pixel, also where a scanner counts from another corner."""
    mask = np.random.default_rng(0).random(PLANE.shape) > 0.5
    corner = (320, 64)
    text = outline.tissue_geojson(mask, downsample=32, offset=(-corner[0], -corner[1]))
    (tmp_path / "s.geojson").write_text(text)
    found = read_region(tmp_path / "s.geojson", MOVED, Chosen(preferred="tissue"))
    np.testing.assert_array_equal(found, mask)


def test_contours_of_trident_count_from_level_0(tmp_path: Path) -> None:
    """They have an id of the tissue, and do not know the corner of the scanned area."""
    path = written(tmp_path, {"type": "FeatureCollection", "features": [feature(BOX, tissue_id=0)]})
    found = read_region(path, MOVED, Chosen(preferred="tissue"))
    np.testing.assert_array_equal(found, expected())


def contours() -> dict[str, object]:
    """Return what CLAM pickles: contours of OpenCV in level-0 px, and the holes of each."""
    return {
        "tissue": [np.array(BOX[:4], np.int32)[:, np.newaxis]],
        "holes": [[np.array(HOLE[:4], np.int32)[:, np.newaxis]]],
    }


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_contours_of_clam(protocol: int, tmp_path: Path) -> None:
    """The pickle of CLAM's segmentation is read, in every version of the format."""
    (tmp_path / "s.pkl").write_bytes(pickle.dumps(contours(), protocol=protocol))
    np.testing.assert_array_equal(read_region(tmp_path / "s.pkl", PLANE, Chosen()), expected(hole=True))


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch harmed",)


def test_a_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle is a program: whatever is not an array is refused before it does anything."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.pkl").write_bytes(pickle.dumps({"tissue": [_Harmful()], "holes": [[]]}))
    with pytest.raises(InputError, match="which no contour needs"):
        clam.read_contours(tmp_path / "s.pkl")
    assert not (tmp_path / "harmed").exists()


def test_outlines_of_asap(tmp_path: Path) -> None:
    """Polygons of any group are areas."""
    points = "".join(f'<Coordinate Order="{k}" X="{x}" Y="{y}"/>' for k, (x, y) in enumerate(BOX[:4]))
    annotation = (
        f'<Annotation Name="a" PartOfGroup="roi" Type="Polygon"><Coordinates>{points}</Coordinates></Annotation>'
    )
    (tmp_path / "s.xml").write_text(f"<ASAP_Annotations><Annotations>{annotation}</Annotations></ASAP_Annotations>")
    np.testing.assert_array_equal(read_region(tmp_path / "s.xml", PLANE, Chosen(("ROI",))), expected())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not well-formed JSON"),
        ("[]", "outlines no area"),
        ("[1]", "expected features of GeoJSON"),
        (json.dumps([feature(BOX[:2])]), "outlines no area"),
        (json.dumps([feature([["a", 1], [2, 3], [4, 5]])]), "not pairs of numbers"),
        ('[{"type": "Polygon", "coordinates": [[[0, 0], [NaN, 1], [2, 2]]]}]', "not finite"),
        (json.dumps([feature([[10, 10], [9000, 10], [9000, 900]])]), r"9000.*3200 x 1600"),
    ],
)
def test_broken_outlines_are_named(text: str, message: str, tmp_path: Path) -> None:
    """Each fault of a file is one line."""
    (tmp_path / "s.geojson").write_text(text)
    with pytest.raises(InputError, match=message):
        read_region(tmp_path / "s.geojson", PLANE, Chosen())


# --- which file


def test_the_file_of_a_slide(tmp_path: Path) -> None:
    """It is that of the manifest, else the one in the folder, or beside the slide, that is called as the slide."""
    case = Case("s", tmp_path / "slides/s.svs")
    with pytest.raises(InputError, match=r"tissue_mask_path"):
        regions.find_tissue_file(case, None)
    beside, elsewhere = tmp_path / "slides/tissue", tmp_path / "masks"
    for folder, name in ((beside, "s.geojson"), (elsewhere, "s.svs_mask.png"), (elsewhere, "other.png")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert regions.find_tissue_file(case, None) == beside / "s.geojson"
    assert regions.find_tissue_file(case, elsewhere) == elsewhere / "s.svs_mask.png"
    named = Case("s", tmp_path / "slides/s.svs", tissue_mask_path=tmp_path / "x.png")
    assert regions.find_tissue_file(named, elsewhere) == tmp_path / "x.png"
    (elsewhere / "s.tif").touch()
    with pytest.raises(InputError, match=r"several files.*s\.svs_mask\.png, s\.tif"):
        regions.find_tissue_file(case, elsewhere)
