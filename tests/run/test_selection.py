"""Where slides are looked at: slides without tissue, pale and grey slides, given tissue, regions of interest."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from small_runs import over, rows

from flows import cli
from flows.compose import compose_config
from wsiflow.errors import InputError
from wsiflow.plan.slide_plan import tissue_grid
from wsiflow.run.cases import read_cases, write_cases
from wsiflow.run.intake import describe_unused_tissue
from wsiflow.run.results.record import main_metrics
from wsiflow.run.results.scores import read_metrics
from wsiflow.run.stages import ingest
from wsiflow.run.stages.selection import region_hashes
from wsiflow.slides import pyramid
from wsiflow.slides.manifest import Case
from wsiflow.slides.readers.reader import GREY

GLASS, TISSUE, PALE = (240, 240, 240), (190, 120, 180), (226, 221, 225)
SHAPE = (1200, 1600)


def slide(path: Path, *boxes: tuple[int, int, int, int], colour: tuple[int, int, int] = TISSUE) -> None:
    """Write a slide of 1,600 x 1,200 px with boxes (left, top, right, bottom) of a colour on glass."""
    rng = np.random.default_rng(0)
    pixels = np.full((*SHAPE, 3), GLASS, np.float64)
    for left, top, right, bottom in boxes:
        pixels[top:bottom, left:right] = colour
    image = np.clip(pixels + rng.normal(0, 2, pixels.shape), 0, 255).astype(np.uint8)
    pyramid.write_rgb(path, iter([image]), shape=SHAPE, um_px=0.243, quality=95)


def outlined(path: Path, left: int, top: int, right: int, bottom: int) -> None:
    """Write a box as a tumour outline of ASAP."""
    corners = ((left, top), (right, top), (right, bottom), (left, bottom))
    points = "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate(corners))
    annotation = (
        f'<Annotation Name="t" PartOfGroup="Tumor" Type="Polygon"><Coordinates>{points}</Coordinates></Annotation>'
    )
    path.write_text(f"<ASAP_Annotations><Annotations>{annotation}</Annotations></ASAP_Annotations>")


def tiles(case: Case, *overrides: str) -> tuple[np.ndarray, str]:
    """Return which of the 6 x 8 tiles of a slide are looked at, and the remark about it."""
    config = compose_config(["dataset=single", f"dataset.path={case.path}", *overrides])
    found = ingest._inspect(config.out, case, config)
    grid = np.zeros((6, 8), np.bool_)
    part = tissue_grid(found["tile_runs"])
    grid[: part.shape[0], : part.shape[1]] = part
    return grid, "; ".join(found["remarks"])


def box_of_tiles(rows: slice, cols: slice) -> np.ndarray:
    grid = np.zeros((6, 8), np.bool_)
    grid[rows, cols] = True
    return grid


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides with tissue, with pale or grey tissue, and of glass alone."""
    folder = tmp_path_factory.mktemp("slides")
    slide(folder / "good.tif", (300, 300, 1100, 900))
    slide(folder / "pale.tif", (300, 300, 800, 700), colour=PALE)
    for name in ("empty", "glass", "unknown"):
        slide(folder / f"{name}.tif")
    slide(folder / "grey.tif", (300, 300, 1100, 900), colour=(120, 120, 120))
    outlined(folder / "lesion.xml", 300, 300, 800, 700)
    return folder


def test_slides_without_tissue_are_told_and_not_scored(slides: Path, tmp_path: Path, capsys) -> None:
    """They are on the console, in cases.csv and in the report's first box, and the scores are those of the others."""
    lines = ("good,good.tif,tumor,lesion.xml", "empty,empty.tif,tumor,lesion.xml", "glass,glass.tif,normal,")
    text = "\n".join(("slide_id,path,label,annotation_path", *lines, "x,unknown.tif,,", ""))
    (slides / "m.csv").write_text(text)
    out = tmp_path / "run"
    assert cli.main(["run", *over(slides / "m.csv", out, "evaluation.itc_um=0")]) == 0
    printed = capsys.readouterr()
    output = " ".join((printed.out + printed.err).split())
    assert "no tissue was found on 1 of 4 slides, tumour: empty; not scored" in output
    assert "no tissue was found on 1 of 4 slides, normal: glass; not scored" in output
    assert "no tissue was found on 1 of 4 slides, without a label: x; empty maps" in output
    assert "NO TISSUE nothing was looked at on 3 of 4 slides; 2 with a label are not scored" in output
    assert "looked at 50.0% of the lesions, 50.0% of their annotated area" in output
    cases = {row["slide_id"]: row for row in rows(out / "evaluation/cases.csv")}
    row = cases["empty"]
    assert (row["score"], row["n_lesions"], row["n_looked_at"], row["lesion_recall_area"]) == ("", "", "0", "0.0")
    assert row["missed"] == "lesion 1: not looked at"
    assert row["note"] == cases["glass"]["note"] == "no tissue was found: not scored"
    assert cases["x"]["note"] == "no label: not scored"
    assert cases["good"]["n_looked_at"] == "1"
    numbers = json.loads((out / "evaluation/summary.json").read_text())
    assert (numbers["froc.n_slides"], numbers["roc.n_tumour"], numbers["roc.n_normal"]) == (1, 1, 0)
    assert (numbers["tissue.lesion_recall"], numbers["tissue.lesion_recall_area"]) == (0.5, 0.5)
    assert (numbers["tissue.n_lesions_not_looked_at"], numbers["tissue.n_slides_empty"]) == (1, 2)
    assert main_metrics(read_metrics(out / "evaluation/summary.json"))["tissue.lesion_recall"] == 0.5
    page = (out / "report.html").read_text()
    assert page.index("empty (tumour), glass (normal)") < page.index("FROC score, official")
    assert "2 with a label are not scored" in page
    assert "lesion 1: not looked at" in page
    assert "every slide has a result" not in page


def test_pale_tissue_is_looked_at(slides: Path) -> None:
    """The default finds a slide that is pale all over, which a threshold of saturation does not."""
    pale = Case("pale", slides / "pale.tif")
    assert tiles(pale)[0][1:4, 1:4].all()
    assert not tiles(pale, "tissue=hsv_otsu")[0].any()


def test_a_grey_slide_is_looked_at_and_told(slides: Path, tmp_path: Path) -> None:
    """A slide of one grey has tissue by the default; that a model for colours may fail on it is told."""
    grid, note = tiles(Case("grey", slides / "grey.tif"))
    assert grid[1:4, 1:5].all()
    assert note == GREY
    one_channel = tmp_path / "one_channel.tif"
    pixels = np.full(SHAPE, 240, np.uint8)
    pixels[300:900, 400:1200] = 150
    tifffile.imwrite(one_channel, pixels, tile=(256, 256), resolution=(1e4 / 0.243,) * 2, resolutionunit="CENTIMETER")
    assert tiles(Case("one_channel", one_channel))[1] == GREY
    assert not tiles(Case("good", slides / "good.tif"))[1]


def test_tissue_may_be_given(slides: Path, tmp_path: Path) -> None:
    """By a file of the manifest, or one in a folder; every tile with some of it is looked at, and no other."""
    mask = np.zeros((12, 16), np.uint8)
    mask[7:10, 11:14] = 255  # 700 to 1,000 px and 1,100 to 1,400 px, in tiles of 224 px
    Image.fromarray(mask).save(tmp_path / "given.png")
    expected = box_of_tiles(np.s_[3:5], np.s_[4:7])
    named = Case("a", slides / "good.tif", tissue_mask_path=tmp_path / "given.png")
    np.testing.assert_array_equal(tiles(named, "tissue=given")[0], expected)
    (tmp_path / "given.png").rename(tmp_path / "b.png")
    found, _ = tiles(Case("b", slides / "empty.tif"), "tissue=given", f"tissue.folder={tmp_path}")
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(InputError, match=r"slide c.*no file says where its tissue is"):
        tiles(Case("c", slides / "empty.tif"), "tissue=given", f"tissue.folder={tmp_path}")


def test_the_reference_takes_given_tissue_too(slides: Path, tmp_path: Path) -> None:
    """Its thumbnail is then that of the mask."""
    Image.fromarray(np.full((12, 16), 1, np.uint8)).save(tmp_path / "given.png")
    case = Case("a", slides / "good.tif", tissue_mask_path=tmp_path / "given.png")
    assert tiles(case, "tissue=given", "geometry=reference", "tiles=patch")[0][:5, :7].all()


def test_regions_of_interest_limit_where_a_slide_is_looked_at(slides: Path, tmp_path: Path) -> None:
    """Only tiles that touch them are looked at, even where tissue goes on; names choose among outlines."""
    features = [
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {"name": name}}
        for name, ring in (
            ("roi", [[350, 350], [600, 350], [600, 600], [350, 600]]),
            ("spot", [[1000, 800], [1090, 800], [1090, 890], [1000, 890]]),
        )
    ]
    (tmp_path / "roi.json").write_text(json.dumps(features))
    case = Case("good", slides / "good.tif", roi_path=tmp_path / "roi.json")
    expected = box_of_tiles(np.s_[1:3], np.s_[1:3])
    np.testing.assert_array_equal(tiles(case, "tissue.regions=[ROI]")[0], expected)
    np.testing.assert_array_equal(tiles(case, "tissue=all", "tissue.regions=roi")[0], expected)
    expected[3, 4] = True
    np.testing.assert_array_equal(tiles(case, "tissue=all")[0], expected)
    with pytest.raises(InputError, match=r"slide good.*no outline is called stroma"):
        tiles(case, "tissue.regions=[stroma]")


def test_another_mask_is_another_key(slides: Path, tmp_path: Path) -> None:
    """What the files of a slide say is in its key, and where they lie is not; without files keys are what they were."""
    case = Case("a", slides / "good.tif", tissue_mask_path=tmp_path / "given.png")
    config = compose_config(["dataset=single", f"dataset.path={case.path}", "tissue=given"])
    hashes = []
    for mask in (np.eye(12, 16), np.zeros((12, 16))):
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "given.png")
        hashes.append(region_hashes(case, config)["tissue_sha256"])
    assert len(set(hashes)) == 2
    assert region_hashes(Case("a", slides / "good.tif"), compose_config(["dataset=demo"])) == {}
    (tmp_path / "given.png").unlink()
    with pytest.raises(InputError, match="slide a"):
        region_hashes(case, config)


def test_settings_of_given_tissue_need_it() -> None:
    """A folder of masks that would not be used is refused, since the slides would be looked at elsewhere."""
    with pytest.raises(InputError, match="add tissue=given"):
        compose_config(["dataset=demo", "tissue.folder=masks"])


def test_a_column_that_is_not_used_is_told(tmp_path: Path) -> None:
    """A manifest with masks of tissue is run without them only if that is said."""
    case = Case("a", tmp_path / "a.tif", tissue_mask_path=tmp_path / "m.png")
    for method, told in (("adaptive", True), ("given", False)):
        config = compose_config(["dataset=demo", f"tissue={method}", f"out={tmp_path / method}"])
        source = write_cases(tmp_path / method, config, [case])
        assert bool(describe_unused_tissue(source)) == told
        assert read_cases(source)[1] == (case,)
