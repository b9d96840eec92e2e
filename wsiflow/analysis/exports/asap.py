"""A run as ASAP's XML: tissue, truth and contours as polygons, detections as dots.

Coordinates are level-0 pixels from the corner of level 0, as ASAP counts them for every slide, whatever area was
scanned. ASAP draws no holes: those of a region are polygons of a group of their own, ``Exclusion`` for truth, which is
cut out where the file is read as truth again, and ``<group> hole`` for tissue and contours.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from xml.etree import ElementTree as ET

import numpy as np

from wsiflow.analysis.exports.export import add_run, each_slide
from wsiflow.analysis.exports.findings import EXCLUSION, IGNORED, TISSUE, TUMOUR, Findings, Region, Ring
from wsiflow.analysis.reviewers.format import Format

DETECTION = "Detection"

_COLOURS = {TISSUE: "#2E86AB", TUMOUR: "#C80000", EXCLUSION: "#00823C", IGNORED: "#787878", DETECTION: "#C2571A"}
_CONTOUR = "#8C2DA0"


class _Drawn(NamedTuple):
    """An annotation of ASAP: level-0 points, in order."""

    name: str
    group: str
    kind: str
    points: Ring


def asap_xml(found: Findings) -> bytes:
    """Return what a run knows of a slide as the text of an ASAP file; the same findings give the same bytes."""
    root = ET.Element("ASAP_Annotations")
    annotations, groups = ET.SubElement(root, "Annotations"), ET.SubElement(root, "AnnotationGroups")
    drawn = [*_regions(_tissue(found)), *_regions(found.truth), *_regions(found.contours), *_dots(found)]
    for one in drawn:
        name = "".join(letter for letter in one.name if letter.isprintable())  # XML has no control characters
        attributes = {"Name": name, "Type": one.kind, "PartOfGroup": one.group, "Color": _colour(one.group)}
        coordinates = ET.SubElement(ET.SubElement(annotations, "Annotation", attributes), "Coordinates")
        for place, (x, y) in enumerate(one.points.tolist()):
            ET.SubElement(coordinates, "Coordinate", {"Order": str(place), "X": f"{x:.10g}", "Y": f"{y:.10g}"})
    for name in dict.fromkeys(one.group for one in drawn):
        group = ET.SubElement(groups, "Group", {"Name": name, "PartOfGroup": "None", "Color": _colour(name)})
        ET.SubElement(group, "Attributes")
    ET.indent(root)
    text: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _tissue(found: Findings) -> Iterator[Region]:
    """Yield the tissue, of which the run keeps GeoJSON that counts from the corner of the scanned area."""
    for feature in found.tissue:
        outer, *holes = (
            np.array(ring[:-1], np.float64) + found.l0_corner for ring in feature["geometry"]["coordinates"]
        )
        yield Region(TISSUE, feature["properties"]["name"], outer, tuple(holes))


def _regions(regions: Sequence[Region] | Iterator[Region]) -> Iterator[_Drawn]:
    for region in regions:
        cut = EXCLUSION if region.kind in {TUMOUR, EXCLUSION, IGNORED} else f"{region.kind} hole"
        yield _Drawn(region.name, region.kind, "Polygon", region.outer)
        for number, hole in enumerate(region.holes, start=1):
            yield _Drawn(f"{region.name} hole {number}", cut, "Polygon", hole)


def _dots(found: Findings) -> Iterator[_Drawn]:
    for place, (prob, x, y) in enumerate(found.detections.tolist(), start=1):
        yield _Drawn(f"detection {place}: {prob:.3f}", DETECTION, "Dot", np.array([[x, y]]))


def _colour(group: str) -> str:
    return _COLOURS.get(group.removesuffix(" hole"), _CONTOUR)


def _export(arguments: Namespace) -> list[str]:
    return each_slide(arguments, lambda found, _note: {f"{found.slide_id}.xml": asap_xml(found)})


def _add_options(parser: ArgumentParser) -> None:
    add_run(parser)


FORMAT = Format("asap", "tissue, truth, contours and detections of a run as ASAP's XML", _add_options, _export)
