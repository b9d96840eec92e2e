"""Outlines and mask images: which pixels are tumour, and which files are refused."""

import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline

from wsiflow.errors import InputError
from wsiflow.slides import annotations
from wsiflow.slides.annotations import TruthOutlines, outlines, xml_file

SQUARE = [(0, 0), (96, 0), (96, 96), (0, 96)]


def asap(*outlines):
    """Return ASAP XML of (group, points) pairs."""
    parts = []
    for index, (group, points) in enumerate(outlines):
        rows = "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}" />' for i, (x, y) in enumerate(points))
        parts.append(
            f'<Annotation Name="Annotation {index}" Type="Polygon" PartOfGroup="{group}" Color="#F4FA58">'
            f"<Coordinates>{rows}</Coordinates></Annotation>"
        )
    groups = '<AnnotationGroups><Group Name="Tumor" PartOfGroup="None"><Attributes /></Group></AnnotationGroups>'
    return (
        f'<?xml version="1.0"?><ASAP_Annotations><Annotations>{"".join(parts)}</Annotations>{groups}</ASAP_Annotations>'
    )


@pytest.fixture
def write(tmp_path):
    """Return a function that writes text to an XML file."""

    def written(text):
        path = tmp_path / "slide.xml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return written


def outline(*tumour, exclusions=()):
    """Return outlines from lists of points."""
    kinds = (tumour, exclusions)
    return TruthOutlines(
        *(tuple(outlines.Outline("a", "", np.array(points, float)) for points in some) for some in kinds)
    )


@pytest.mark.parametrize("group", ["_0", "_1", "Tumor", "metastases", "tumor"])
def test_tumour_groups(write, group):
    """These groups of CAMELYON16 and 17 are tumour."""
    read = annotations.read_outlines(write(asap((group, SQUARE))))
    assert [one.polygon.tolist() for one in read.tumour] == [[list(point) for point in SQUARE]]
    assert read.exclusions == ()


@pytest.mark.parametrize("group", ["_2", "Exclusion", "None", "normal"])
def test_exclusion_groups(write, group):
    """These groups are cut out of the tumour."""
    read = annotations.read_outlines(write(asap(("Tumor", SQUARE), (group, SQUARE))))
    assert (len(read.tumour), len(read.exclusions)) == (1, 1)


def test_file_without_annotations(write):
    """An annotation file may be empty."""
    read = annotations.read_outlines(write(asap()))
    assert (read.tumour, read.exclusions, read.without_area) == ((), (), ())


def test_fractions_and_negative_coordinates_are_kept(write):
    """ASAP writes fractions, and a point may be slightly outside the slide."""
    read = annotations.read_outlines(write(asap(("Tumor", [(-1.5, 0.25), (9, 0), (9, 9.75)]))))
    assert annotations.check_on_slide(read, (9, 9), "slide.xml") == ()
    assert read.tumour[0].polygon.tolist() == [[-1.5, 0.25], [9, 0], [9, 9.75]]


def test_outline_of_two_points_is_named(write):
    """An outline of two points encloses nothing, but is reported, not silently dropped."""
    read = annotations.read_outlines(write(asap(("Tumor", [(1, 1), (2, 2)]), ("Tumor", SQUARE))))
    assert [str(one) for one in read.without_area] == ["Annotation 0"]
    assert len(read.tumour) == 1


def test_unknown_group_is_named(write):
    """An unknown group could be tumour or not, so it is refused."""
    with pytest.raises(InputError, match=r"'Annotation 1' has the unknown group 'Necrosis'.*metastases"):
        annotations.read_outlines(write(asap(("Tumor", SQUARE), ("Necrosis", SQUARE))))


@pytest.mark.parametrize(
    ("size", "remarks"),
    [
        ((5000, 90), ()),
        ((4950, 90), ()),
        ((4000, 3000), ("outlines are cut off at the slide's edge: 'Annotation 0' (36%)",)),
    ],
)
def test_outlines_over_the_edge_are_cut_off(write, size, remarks):
    """A few pixels need no word; an outline most of which lies on the slide is cut off, which is told."""
    path = write(asap(("Tumor", [(0, 0), (5000, 0), (5000, 90)])))
    drawn = annotations.read_outlines(path)
    assert annotations.check_on_slide(drawn, size, path) == remarks
    assert annotations.tumour_mask(drawn, (9, 9), downsample=500).shape == (9, 9)


def test_annotation_of_another_slide(write):
    """An outline most of which lies outside belongs to another slide; that x and y are exchanged is told."""
    path = write(asap(("Tumor", SQUARE), ("Tumor", [(0, 0), (90, 0), (90, 5000)]), ("_2", [(0, 9), (9, 0), (9, 4000)])))
    drawn = annotations.read_outlines(path)
    cause = r"'Annotation 1' has the point 90, 5000, but the slide has 5000 x 1000 px, and most of 2 of 3 annotations"
    with pytest.raises(InputError, match=cause + r".*with x and y exchanged"):
        annotations.check_on_slide(drawn, (5000, 1000), path)
    with pytest.raises(InputError, match=r"but the slide has 500 x 500 px") as caught:
        annotations.check_on_slide(drawn, (500, 500), path)
    assert "exchanged" not in str(caught.value)


WHOLE = asap(("Tumor", SQUARE))
BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x "x"><!ENTITY y "&x;&x;">]><ASAP_Annotations>&y;</ASAP_Annotations>'
EXTERNAL = '<!DOCTYPE a SYSTEM "file:///etc/hostname"><ASAP_Annotations />'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (WHOLE[: len(WHOLE) // 2], "not well-formed"),
        ("", "neither XML nor JSON"),
        (WHOLE.replace("</Annotation>", ""), "not well-formed"),
        (b"\x89PNG\r\n\x1a\n", "is an image"),
        ('<?xml version="1.0" encoding="nonsense"?><ASAP_Annotations />', "not well-formed"),
        (BOMB, "document type"),
        (EXTERNAL, "document type"),
        (
            "<Measurements />",
            "of no known format: its root element is 'Measurements'; give one of ASAP XML, ImageScope",
        ),
        (WHOLE.replace('X="96"', 'X="96,5"'), "coordinate"),
        (WHOLE.replace('X="96"', 'X="nan"'), "finite"),
        (WHOLE.replace('X="96"', ""), "coordinate"),
    ],
)
def test_damaged_files_are_refused_with_their_path(write, text, message):
    """Truncated, foreign or malicious XML, and coordinates that are not numbers, are refused."""
    with pytest.raises(InputError, match=message) as caught:
        annotations.read_outlines(write(text))
    assert "slide.xml" in str(caught.value)


def test_missing_file(tmp_path):
    """A path that does not exist is bad input."""
    with pytest.raises(InputError, match=r"none\.xml.*No such file"):
        annotations.read_outlines(tmp_path / "none.xml")


@pytest.mark.parametrize("limit", ["MAX_BYTES", "MAX_POINTS"])
def test_too_large_files_are_refused(write, monkeypatch, limit):
    """A file beyond the limits is refused before it exhausts the memory."""
    monkeypatch.setattr(xml_file, limit, 3)
    with pytest.raises(InputError, match="simplify"):
        annotations.read_outlines(write(WHOLE))


def test_a_pixel_belongs_by_its_centre():
    """A square of 3 x 3 mask pixels is shifted by slightly less and slightly more than half a pixel."""
    for shift, first in ((15, 0), (16, 0), (17, 1)):
        square = [(x + shift, y + shift) for x, y in SQUARE]
        mask = annotations.tumour_mask(outline(square), (6, 6))
        assert np.flatnonzero(mask.any(axis=0)).tolist() == [first, first + 1, first + 2]
        assert mask.sum() == 9


def test_downsample_scales_the_points():
    """The same square at 1/96 is one pixel."""
    assert annotations.tumour_mask(outline(SQUARE), (2, 2), downsample=96).tolist() == [[True, False], [False, False]]


def test_outlines_overlap_without_making_holes_and_exclusions_do():
    """Tumour outlines are united; an exclusion is cut out of all of them, even if it comes first in the file."""
    big, small = [(0, 0), (320, 0), (320, 320), (0, 320)], [(96, 96), (224, 96), (224, 224), (96, 224)]
    assert annotations.tumour_mask(outline(big, small), (10, 10)).all()
    cut = annotations.tumour_mask(outline(big, small, exclusions=[small]), (10, 10))
    assert (~cut).sum() == 16
    assert not cut[3:7, 3:7].any()


def test_outline_that_crosses_itself_has_no_hole():
    """The middle of a pentagram is filled."""
    star = [(100 + 90 * np.sin(4 * np.pi * k / 5), 100 - 90 * np.cos(4 * np.pi * k / 5)) for k in range(5)]
    assert annotations.tumour_mask(outline(star), (200, 200), downsample=1)[100, 100]


def test_neighbours_share_no_pixel_and_leave_none():
    """Two triangles along a diagonal fill their square without overlap."""
    upper, lower = [SQUARE[0], SQUARE[1], SQUARE[2]], [SQUARE[0], SQUARE[2], SQUARE[3]]
    masks = [annotations.tumour_mask(outline(one), (96, 96), downsample=1) for one in (upper, lower)]
    assert (masks[0] ^ masks[1]).all()


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-8, 24), st.floats(-8, 24)), min_size=3, max_size=9))
def test_mask_equals_a_test_of_every_centre(points):
    """Rasterising equals a test of the centre of each pixel, also for outlines beyond the borders."""
    mask = annotations.tumour_mask(outline(points), (16, 17), downsample=1)
    y, x = np.mgrid[:16, :17] + 0.5
    centres = np.column_stack([x.ravel(), y.ravel()])
    start, end = np.array(points), np.roll(points, -1, axis=0)
    winding = np.zeros(len(centres), int)
    for (x0, y0), (x1, y1) in zip(start, end, strict=True):
        side = (x1 - x0) * (centres[:, 1] - y0) - (centres[:, 0] - x0) * (y1 - y0)
        winding += (y0 <= centres[:, 1]) & (centres[:, 1] < y1) & (side > 1e-9)
        winding -= (y1 <= centres[:, 1]) & (centres[:, 1] < y0) & (side < -1e-9)
    near = _near(centres, start, end)
    assert np.array_equal(mask.ravel()[~near], (winding != 0)[~near])


def _near(centres, start, end):
    """Return which centres lie on an edge within rounding, where both answers are right."""
    along = end - start
    length = np.maximum((along**2).sum(axis=1), 1e-300)
    t = np.clip(((centres[:, None] - start) * along).sum(axis=2) / length, 0, 1)
    return (np.linalg.norm(centres[:, None] - start - t[..., None] * along, axis=2) < 1e-6).any(axis=1)


def test_convex_outline_equals_matplotlib():
    """The point-in-polygon test of another library gives the same disc."""
    angles = np.linspace(0, 2 * np.pi, 37)[:-1]
    points = np.column_stack([50.3 + 40 * np.cos(angles), 49.1 + 30 * np.sin(angles)])
    y, x = np.mgrid[:100, :100] + 0.5
    expected = Outline(points).contains_points(np.column_stack([x.ravel(), y.ravel()])).reshape(100, 100)
    assert np.array_equal(annotations.tumour_mask(outline(points), (100, 100), downsample=1), expected)


def test_outline_outside_the_mask():
    """An outline outside the mask leaves it empty, and does not wrap around."""
    assert not annotations.tumour_mask(outline([(x + 1000, y) for x, y in SQUARE]), (9, 9)).any()
    assert not annotations.tumour_mask(outline([(x - 1000, y) for x, y in SQUARE]), (9, 9)).any()


@pytest.mark.parametrize(
    ("values", "tumour"),
    [
        ([0, 255], [False, True]),
        ([0, 1], [False, True]),
        ([0, 1, 2], [False, False, True]),
        ([0, 2], [False, True]),
        ([0, 0], [False, False]),
        ([255, 255], [True, True]),
    ],
)
def test_mask_values(values, tumour):
    """255 is tumour, or 1 if there is no larger value, or 2 if 1 is other tissue."""
    assert annotations.tumour_from_mask(np.array([values], np.uint8), "m.tif").tolist() == [tumour]


def test_what_1_means_depends_on_the_label():
    """In a mask of 0 and 1, the 1 is tissue in a slide labelled normal, and tumour in one labelled tumour."""
    values = np.array([[0, 1]], np.uint8)
    assert annotations.tumour_from_mask(values, "m.tif", label=1).tolist() == [[False, True]]
    assert annotations.tumour_from_mask(values, "m.tif", label=0).tolist() == [[False, False]]


def test_values_that_are_named_are_tumour():
    """Values that the user declares are tumour, whatever other values there are."""
    values = np.array([[0, 1, 2, 3, 254]], np.uint8)
    found = annotations.tumour_from_mask(values, "m.tif", label=0, named=(1, 3))
    assert found.tolist() == [[False, True, False, True, False]]


@pytest.mark.parametrize("values", [[0, 254, 255], [0, 1, 255], [0, 128], [0, 1, 2, 3]])
def test_other_mask_values_are_refused(values):
    """JPEG noise and label images of other objects are not taken for tumour or for its absence."""
    with pytest.raises(InputError, match=rf"m\.tif: the mask has the values {values[0]}, {values[1]}"):
        annotations.tumour_from_mask(np.array([values], np.uint8), "m.tif")


def test_every_real_annotation(shared_data, tmp_path):
    """All CAMELYON16 training outlines are read, and their masks have the area of the polygons."""
    with tarfile.open(shared_data / "camelyon16" / "asap_xml_train.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    paths = sorted(tmp_path.glob("*.xml"))
    read = [annotations.read_outlines(path) for path in paths]
    assert (len(paths), sum(len(one.tumour) + len(one.exclusions) for one in read)) == (110, 2587)
    assert {p.stem: one.note for p, one in zip(paths, read, strict=True) if one.note} == {
        "tumor_054": "outlines without area: Annotation 8"
    }
    for one in read[:12]:
        area = sum(_area(each.polygon) for each in one.tumour) - sum(_area(each.polygon) for each in one.exclusions)
        assert annotations.tumour_mask(one, (7000, 3600)).sum() * 1024 == pytest.approx(area, rel=0.05)


def _area(polygon):
    """Return the area of a simple polygon in level-0 px."""
    (x, y), (x1, y1) = polygon.T, np.roll(polygon, -1, axis=0).T
    return abs((x * y1 - x1 * y).sum()) / 2
