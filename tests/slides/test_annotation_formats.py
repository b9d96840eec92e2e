"""Annotations in the formats of several programs: which outlines they hold, where they lie, and what they enclose."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiflow.errors import InputError
from wsiflow.evaluation.truth import stated
from wsiflow.slides import annotations
from wsiflow.slides.annotations import Format, Outline, SlidePlace, formats
from wsiflow.slides.manifest import Case

PLACE = SlidePlace((1000, 800), (0, 0), (0.25, 0.25))
BOX = [[0, 0], [96, 0], [96, 96], [0, 96], [0, 0]]
HOLE = [[32, 32], [64, 32], [64, 64], [32, 64], [32, 32]]


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a text, or JSON values, to a file."""

    def written(content, name="a.xml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return written


def area(path, place=PLACE, **options):
    """Return the tumour of a file in level-0 px, counted at full resolution on 120 x 120 px."""
    outlines = annotations.read_outlines(path, place, **options)
    return int(annotations.tumour_mask(outlines, (120, 120), downsample=1).sum())


def boxes(path, place=PLACE):
    """Return the boxes around all outlines of a file: x0, y0, x1, y1."""
    drawn = annotations.read(path, place).outlines
    return [[*one.polygon.min(axis=0).round(3), *one.polygon.max(axis=0).round(3)] for one in drawn]


# --- GeoJSON


def feature(coordinates, kind="Polygon", group="Tumor", **properties):
    """Return a feature as QuPath writes it."""
    geometry = {"type": kind, "coordinates": coordinates}
    known = {"objectType": "annotation", "classification": {"name": group, "color": [200, 0, 0]}} if group else {}
    return {"type": "Feature", "id": "1a2b", "geometry": geometry, "properties": known | properties}


FEATURE = feature([BOX, HOLE])


@pytest.mark.parametrize(
    "document",
    [
        {"type": "FeatureCollection", "features": [FEATURE]},
        [FEATURE],
        FEATURE,
        {**FEATURE, "id": "PathAnnotationObject", "properties": {"classification": {"name": "Tumor", "colorRGB": -1}}},
        {**FEATURE, "properties": {"objectType": "annotation", "classification": {"names": ["Tumor", "Viable"]}}},
        {**FEATURE, "properties": {"objectType": "annotation", "classification": "tumor"}},
        {**FEATURE, "properties": {"objectType": "annotation", "classification": ["Tumor", "Viable"]}},
        {**FEATURE, "properties": {"objectType": "annotation", "name": "Tumour"}},
        feature([[BOX, HOLE]], "MultiPolygon"),
        {"type": "Feature", "geometry": {"type": "GeometryCollection", "geometries": [FEATURE["geometry"]]}}
        | {"properties": {"classification": {"name": "Metastasis"}}},
        feature([[[*point, 0] for point in ring] for ring in (BOX, HOLE)], group="Tumor: Positive"),
    ],
    ids=["collection", "list", "feature", "old", "names", "text", "texts", "name", "multi", "geometries", "derived"],
)
def test_every_way_in_which_qupath_wraps_a_polygon(write, document):
    """The hole is cut out, whatever the polygon is wrapped in, and the class is found under all of its keys."""
    assert area(write(document, "a.geojson")) == 96 * 96 - 32 * 32


def test_parts_are_united_and_a_hole_is_of_its_own_polygon(write):
    """A MultiPolygon's parts and overlapping features are one area; another polygon fills a hole."""
    other = [[x + 16, y + 16] for x, y in HOLE]
    assert area(write(feature([[BOX, HOLE], [other]], "MultiPolygon"))) == 96 * 96 - 16 * (2 * 32 - 16)
    assert area(write([FEATURE, feature([HOLE], group="Normal")])) == 96 * 96 - 32 * 32
    assert area(write([FEATURE, feature([HOLE])])) == 96 * 96
    assert area(write([feature([BOX]), feature([HOLE], group="Ignore*")])) == 96 * 96 - 32 * 32


def test_an_ellipse_of_qupath_is_one(write):
    """QuPath states an ellipse by its box."""
    ellipse = feature([BOX])
    ellipse["geometry"]["isEllipse"] = True
    assert area(write(ellipse)) == pytest.approx(np.pi * 48 * 48, rel=0.01)


def test_what_is_no_area_is_named_and_left_out(write):
    """Points, lines, detections and empty polygons enclose nothing."""
    drawn = annotations.read_outlines(
        write(
            [
                FEATURE,
                feature([[1, 1], [2, 2]], "MultiPoint", group="Tumor"),
                feature([[1, 1], [2, 2]], "LineString", group="", objectType="annotation", name="ruler"),
                feature([BOX], objectType="cell"),
                {**FEATURE, "id": "PathDetectionObject", "properties": {"classification": {"name": "Tumor"}}},
                feature([]),
                {"type": "Feature", "geometry": None, "properties": {"name": "nothing"}},
            ]
        ),
        PLACE,
    )
    named = ["Tumor 2 (MultiPoint)", "ruler (LineString)", "Tumor 4 (cell)", "Tumor 5 (detection)", "Tumor 6"]
    assert [str(one) for one in drawn.without_area] == [*named, "nothing (no geometry)"]
    assert len(drawn.tumour) == 1
    assert drawn.note.startswith("outlines without area: Tumor 2 (MultiPoint), ruler (LineString)")
    assert drawn.note.endswith("Tumor 6 and 1 more")


@pytest.mark.parametrize(("origin", "expected"), [(None, 100), ("bounds", 100), ("slide", 0)])
def test_qupath_counts_from_the_scanned_area(write, origin, expected):
    """The corner of the bounds is added, unless the outlines count from that of the slide."""
    path = write(FEATURE)
    place = SlidePlace((1000, 800), (100, 200))
    (one,) = annotations.read(path, place, origin=origin).outlines
    assert (one.polygon[0].tolist(), one.holes[0][0, 0]) == ([expected, 2 * expected], 32 + expected)
    with pytest.raises(InputError, match=r"a\.xml: GeoJSON counts from the corner of the scanned area"):
        annotations.read(path)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ('{"type": "Feature", ', "not well-formed JSON"),
        ({"type": "Topology"}, "it holds 'Topology', expected features"),
        ([1, 2], "it holds a value of type int"),
        (feature([[[1, 2], ["x", 2], [3, 4]]]), "the coordinates of 'Tumor 1' are not pairs of numbers"),
        (feature([[1, 2, 3]]), "not pairs of numbers"),
        (feature([[[1, 2], [float("nan"), 2], [3, 4]]]), "'Tumor 1' is not finite"),
        (feature([BOX], "Circle"), "is 'Circle', which GeoJSON does not have"),
        ("[" * 100_000, "not well-formed JSON"),
        ({"type": ["Feature"], "geometry": FEATURE["geometry"]}, "it holds a value of type dict"),
        (feature([BOX], ["Polygon"]), "is '', which GeoJSON does not have"),
        (feature(5, "MultiPolygon"), "the coordinates of 'Tumor 1' are no list"),
        ({**FEATURE, "geometry": {"type": "GeometryCollection", "geometries": 5}}, "the geometries of .* are no list"),
        (feature([[[10**400, 2], [3, 4], [5, 6]]]), "not pairs of numbers"),
    ],
)
def test_damaged_geojson_is_refused_with_its_path(write, document, message):
    """Truncated, foreign and wrong values are named with the file."""
    with pytest.raises(InputError, match=message) as caught:
        annotations.read(write(document, "a.geojson"), PLACE)
    assert "a.geojson" in str(caught.value)


# --- ASAP


def asap(*parts):
    """Return ASAP XML of (type, group, points with their order) triples."""
    rows = (
        f'<Annotation Name="A{number}" Type="{kind}" PartOfGroup="{group}"><Coordinates>'
        + "".join(f'<Coordinate Order="{order}" X="{x}" Y="{y}" />' for order, x, y in points)
        + "</Coordinates></Annotation>"
        for number, (kind, group, points) in enumerate(parts)
    )
    return f"<ASAP_Annotations><Annotations>{''.join(rows)}</Annotations></ASAP_Annotations>"


SQUARE = [(0, 0, 0), (1, 96, 0), (2, 96, 96), (3, 0, 96)]


def test_points_of_asap_are_no_areas(write):
    """Point sets, dots and measurements are named; splines and rectangles are areas."""
    kinds = ["Polygon", "PointSet", "Dot", "Measurement", "Spline", "Rectangle"]
    drawn = annotations.read_outlines(write(asap(*((kind, "Tumor", SQUARE) for kind in kinds))))
    assert [str(one) for one in drawn.without_area] == ["A1 (PointSet)", "A2 (Dot)", "A3 (Measurement)"]
    assert [one.name for one in drawn.tumour] == ["A0", "A4", "A5"]
    assert area(write(asap(("Rectangle", "Tumor", [(0, 0, 0), (1, 96, 96)])))) == 96 * 96


@pytest.mark.parametrize(("order", "expected"), [((0, 2, 1, 3), 9216), ((0, 0, 0, 0), 4608), (("", "", "", ""), 4608)])
def test_points_follow_their_order(write, order, expected):
    """Points that are listed out of order are sorted; without an order they stay as they are: a bow tie."""
    corners = [(0, 0), (96, 96), (96, 0), (0, 96)]
    assert area(write(asap(("Polygon", "Tumor", [(o, *xy) for o, xy in zip(order, corners, strict=True)])))) == expected


# --- ImageScope and HALO


def layers(*layers, vertex="Vertex", **root):
    """Return the XML of ImageScope or HALO, of (layer's attributes, inner XML, regions) triples."""
    text = ""
    for attributes, inner, regions in layers:
        text += f"<Annotation {attributes}>{inner}<Regions><RegionAttributeHeaders />"
        for about, points in regions:
            listed = "".join(f'<{vertex} X="{x}" Y="{y}" Z="0" />' for x, y in points)
            text += f"<Region {about}><Attributes /><Vertices>{listed}</Vertices></Region>"
        text += "</Regions><Plots /></Annotation>"
    return f'<Annotations MicronsPerPixel="0.25">{text}</Annotations>'


@pytest.mark.parametrize(
    ("layer", "inner"),
    [
        ('Id="1" Name="Tumor"', ""),
        ('Id="1" Name=""', '<Attributes><Attribute Name="Tumor" Id="0" Value="" /></Attributes>'),
        ('Id="1" Name=""', '<Attributes><Attribute Name="Description" Id="0" Value="tumour" /></Attributes>'),
        ('Id="1" Name="Layer 1"', '<Attributes><Attribute Name="Description" Value="Tumor" /></Attributes>'),
    ],
)
def test_imagescope_names_its_layers_in_several_places(write, layer, inner):
    """The layer's name is its group, or that of its attribute; a negative region is a hole."""
    regions = [('Id="1" Type="0" NegativeROA="0"', BOX), ('Id="2" Type="0" NegativeROA="1" InputRegionId="1"', HOLE)]
    assert area(write(layers((layer, inner, regions)))) == 96 * 96 - 32 * 32


def test_regions_of_imagescope_outside_of_a_layer(write):
    """They have no group, and are not lost: the slide would be one without lesions."""
    points = "".join(f'<Vertex X="{x}" Y="{y}" />' for x, y in BOX)
    region = f"<Region><Vertices>{points}</Vertices></Region>"
    layer = layers(('Name="Normal"', "", [("", HOLE)]))
    for text in (f"<Annotations>{region}</Annotations>", layer.replace("<Annotation ", f"{region}<Annotation ", 1)):
        first = annotations.read(write(text)).outlines[0]
        assert first.polygon[0].tolist() == list(BOX[0])


def test_shapes_of_imagescope(write):
    """Rectangles and ellipses are stated by their box; arrows and rulers are named; a text may give the group."""
    kinds = [("1", [(0, 0), (96, 96)]), ("2", [(0, 0), (96, 96)]), ("3", BOX[:2]), ("4", BOX[:2])]
    areas = [
        area(write(layers(('Name="Layer 2"', "", [(f'Type="{kind}" Text="Tumor"', points)]))))
        for kind, points in kinds[:2]
    ]
    assert areas == [9216, pytest.approx(np.pi * 48 * 48, rel=0.01)]
    drawn = annotations.read(
        write(layers(('Name="Tumor"', "", [(f'Type="{kind}"', points) for kind, points in kinds])))
    )
    assert [str(one) for one in drawn.without_area] == ["region 3 of Tumor (arrow)", "region 4 of Tumor (ruler)"]


def test_halo(write):
    """HALO names its types and writes V; a hole is cut from what it lies in, and an island in it stays."""
    island = [[44, 44], [52, 44], [52, 52], [44, 52]]
    regions = [
        ('Type="Polygon" HasEndcaps="0" NegativeROA="0"', BOX),
        ('Type="Rectangle" HasEndcaps="0" NegativeROA="1"', [(32, 32), (64, 64)]),
        ('Type="Polygon" HasEndcaps="0" NegativeROA="0"', island),
        ('Type="Ruler" HasEndcaps="1" NegativeROA="0"', BOX[:2]),
    ]
    path = write(layers(('Name="Metastasis" LineColor="255"', "", regions), vertex="V"), "a.annotations")
    assert area(path) == 96 * 96 - 32 * 32 + 64
    ellipse = write(layers(('Name="Tumor"', "", [('Type="Ellipse" NegativeROA="0"', [(0, 0), (96, 48)])]), vertex="V"))
    assert area(ellipse) == pytest.approx(np.pi * 48 * 24, rel=0.01)


def test_a_hole_without_an_outline_encloses_nothing(write):
    """HALO lets people draw negative regions alone."""
    drawn = annotations.read(write(layers(('Name="Tumor"', "", [('Id="7" NegativeROA="1"', HOLE)]))))
    assert [str(one) for one in drawn.without_area] == ["region 7 of Tumor (negative region)"]


# --- NDPA


def view(title, inner, unit="nanometers"):
    """Return an annotation of NDP.view."""
    text = f"<title>{title}</title><details /><coordformat>{unit}</coordformat><x>0</x><y>0</y>{inner}"
    return f'<ndpviewstate id="1">{text}</ndpviewstate>'


def freehand(points, closed=1):
    """Return a freehand outline."""
    listed = "".join(f"<point><x>{x}</x><y>{y}</y></point>" for x, y in points)
    more = f"<measuretype>0</measuretype><closed>{closed}</closed><pointlist>{listed}</pointlist>"
    return f'<annotation type="freehand" displayname="AnnotateFreehand" color="#f00">{more}</annotation>'


def test_ndpa_is_in_nanometres_from_the_centre_of_the_glass(write):
    """A point at the offset lies at the centre of the image; 1,000 nm are 4 px of 0.25 um."""
    place = SlidePlace((1000, 800), (0, 0), (0.25, 0.5), (5_000_000, -2_000_000))
    corners = [(5_000_000, -2_000_000), (5_001_000, -2_000_000), (5_001_000, -1_999_000)]
    circle = '<annotation type="circle"><x>5000000</x><y>-2000000</y><radius>1000</radius></annotation>'
    pin = '<annotation type="pin" displayname="AnnotatePin"><x>0</x><y>0</y><icon>pinred</icon></annotation>'
    views = [view("Tumor", freehand(corners)), view("a", circle), view("b", pin), view("c", freehand(corners, 0))]
    path = write(f"<annotations>{''.join(views)}</annotations>", "a.ndpi.ndpa")
    assert boxes(path, place) == [[500, 400, 504, 402], [496, 398, 504, 402]]
    drawn = annotations.read(path, place)
    assert [str(one) for one in drawn.without_area] == ["b (pin)", "c (freehand)"]
    assert len(annotations.sort_outlines(drawn, path).tumour) == 1
    with pytest.raises(InputError, match="does not state where it lies"):
        annotations.read(path, PLACE)
    pixels = write(f"<annotations>{view('Tumor', freehand([(1, 2), (3, 2), (3, 4)]), 'pixels')}</annotations>")
    assert boxes(pixels) == [[1, 2, 3, 4]]


def test_ndpa_on_a_real_slide(write, shared_data):
    """The slide states where it lies on the glass; the point there is the centre of its image."""
    path = shared_data / "wsi" / "good" / "test3-DAPI-2-387.ndpi"
    if not path.exists():
        pytest.skip(f"no slide at {path}")
    place = stated(Case("s", path)).place
    x, y = (round(one) for one in place.centre_offset_nm)
    drawn = write(f"<annotations>{view('t', freehand([(x, y), (x + 2282, y), (x + 2282, y + 2282)]))}</annotations>")
    assert boxes(drawn, place) == [pytest.approx([1984, 2432, 1994, 2442], abs=0.01)]


@settings(max_examples=20)
@given(st.lists(st.lists(st.tuples(*[st.integers(-9, 130)] * 2), min_size=3, max_size=7), min_size=1, max_size=3))
def test_every_format_gives_the_same_mask(tmp_path_factory, polygons):
    """The same outlines enclose the same pixels in every format, whatever they look like."""
    place = SlidePlace((120, 100), (0, 0), (0.25, 0.25), (1000, 2000))
    nm = [[((x - 60) * 250 + 1000, (y - 50) * 250 + 2000) for x, y in one] for one in polygons]
    texts = [
        asap(*(("Polygon", "Tumor", [(i, *xy) for i, xy in enumerate(one)]) for one in polygons)),
        layers(('Name="Tumor"', "", [('Type="0"', one) for one in polygons])),
        layers(('Name="Tumor"', "", [('Type="Polygon"', one) for one in polygons]), vertex="V"),
        f"<annotations>{''.join(view('Tumor', freehand(one)) for one in nm)}</annotations>",
        json.dumps([feature([one]) for one in polygons]),
        json.dumps([feature([[*one, one[0]]]) for one in polygons]),
    ]
    path = tmp_path_factory.mktemp("formats") / "a"
    masks = []
    for text in texts:
        path.write_text(text)
        masks.append(annotations.tumour_mask(annotations.read_outlines(path, place), (100, 120), downsample=1))
    assert all(np.array_equal(mask, masks[0]) for mask in masks[1:])


# --- groups


def groups_of(write, *names, label=None, **groups):
    """Return the numbers of outlines of tumour, excluded and ignored, and the remarks, of GeoJSON with some classes."""
    read = annotations.read_outlines(
        write([feature([BOX], group=name) for name in names]), PLACE, groups=groups, label=label
    )
    return len(read.tumour), len(read.exclusions), len(read.ignored), list(read.remarks)


def test_groups_are_mapped_by_name(write):
    """Known groups need no word; others are given a meaning, in any case of their letters, also over a known one."""
    assert groups_of(write, "Tumor", "METASTASIS", "normal", "Ignore*") == (2, 1, 1, [])
    assert groups_of(write, "Tumor", "Necrosis", "Stroma", necrosis="ignore", STROMA="normal") == (1, 1, 1, [])
    assert groups_of(write, "Tumor", "Normal", Normal="tumour")[:3] == (2, 0, 0)
    other = "outlines that count for nothing: 'Region* 2'"
    assert groups_of(write, "Tumor", "Region*") == (1, 0, 0, [other])
    assert groups_of(write, "Tumor", "") == (1, 0, 0, ["outlines that count for nothing: 'object 2'"])


def test_unknown_groups_are_all_named(write):
    """They could be tumour or not, so that they are asked for, together and with the key."""
    message = (
        r"3 annotations have unknown groups: 'Necrosis' \(2\), 'Fat' \(1\); .*evaluation.groups={Necrosis: ignore}"
    )
    with pytest.raises(InputError, match=message):
        groups_of(write, "Tumor", "Necrosis", "Necrosis", "Fat")


@pytest.mark.parametrize("kind", ["asap", "geojson"])
def test_outlines_without_a_known_group_need_a_label(write, kind):
    """They make the slide neither normal nor tumour; the label does, and so does a meaning of the group."""
    group = "None" if kind == "asap" else ""
    path = write(asap(("Polygon", "None", SQUARE)) if kind == "asap" else [feature([BOX], group="")])
    with pytest.raises(
        InputError, match=rf"'(A0|object 1)': the outline has .*\(label\).*groups={{{group or 'none'}: tu"
    ):
        annotations.read_outlines(path, PLACE)
    assert area(path, label=1) == 96 * 96
    assert area(path, label=0) == 0
    assert area(path, groups={"none": "tumour"}) == 96 * 96
    assert "as the label says" in annotations.read_outlines(path, PLACE, label=1).note


@pytest.mark.parametrize(
    "document",
    [
        asap(("PointSet", "Tumor", SQUARE)),
        [feature([BOX], group="Region*")],
        [feature([BOX], group="Ignore*"), feature([HOLE], group="")],
        [feature([BOX], group="Tumor", objectType="detection")],
    ],
    ids=["points", "region", "ignored", "detections"],
)
def test_what_does_not_say_what_a_slide_is_needs_a_label(write, document):
    """Points, regions and ignored parts make a slide neither normal nor tumour; an empty file does make it normal."""
    path = write(document)
    with pytest.raises(InputError, match=r"does not say whether .*\(label\)"):
        annotations.read_outlines(path, PLACE)
    assert area(path, label=0) == 0
    assert len(annotations.read_outlines(path, PLACE, label=1).tumour) == ("Ignore" in str(document))
    assert annotations.read_outlines(write([]), PLACE).tumour == ()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (asap(("Polygon", "Tumor", SQUARE)), "ASAP XML"),
        (layers(('Name="a"', "", [])), "ImageScope or HALO XML"),
        ("<annotations />", "Hamamatsu NDPA"),
        ('\ufeff {"type": "FeatureCollection", "features": []}', "GeoJSON"),
    ],
)
def test_a_format_is_known_by_what_the_file_holds(write, text, name):
    """The name of the file does not matter."""
    assert annotations.format_of(write(text, "a.txt")).name == name


def test_an_image_is_no_outline(write):
    """A mask image in the column of outlines is told apart."""
    path = write("", "a.tif")
    path.write_bytes(b"II*\0" + bytes(20))
    with pytest.raises(InputError, match="is an image; give a mask image as mask_path"):
        annotations.read(path)


def test_a_format_is_added_by_a_file_and_a_line(write, monkeypatch):
    """What reads files of another kind is one record; nothing else knows the formats."""
    outline = Outline("mine", "Tumor", np.array(BOX[:4], float))
    added = Format("mine", lambda syntax: syntax.root == "mine", lambda _path, _slide: iter([outline]))
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, added))
    assert area(write("<mine />")) == 96 * 96


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "iso-8859-1"])
def test_encodings_of_xml(write, encoding):
    """Programs on Windows write byte order marks and UTF-16."""
    path = write("")
    text = f'<?xml version="1.0" encoding="{encoding.removesuffix("-sig").upper()}"?>'
    path.write_bytes((text + asap(("Polygon", "Tumor", SQUARE))).encode(encoding))
    assert area(path) == 96 * 96
