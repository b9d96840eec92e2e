"""A run as GeoJSON for QuPath: tissue, truth, contours and tiles of the heatmap, and detections, in QuPath's plane.

QuPath counts from the corner of the scanned area where a slide states one (MIRAX, Leica, Ventana), as
``tissue/<slide>.geojson`` does; ``detections/<slide>.csv`` counts from the corner of level 0, as OpenSlide does. All
coordinates are full-resolution pixels; fractions are kept to a hundredth.

A file is a FeatureCollection as QuPath 0.4 and newer write it: what an object is stands in ``objectType``, its class in
``classification`` and its numbers, an object of name and value, in ``measurements``.
"""

import json
import uuid
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from wsiflow.analysis.exports.export import add_run, each_slide
from wsiflow.analysis.exports.findings import EXCLUSION, IGNORED, TUMOUR, Findings, Region, Ring
from wsiflow.analysis.reviewers.format import Format

LAYERS = ("tissue", "truth", "contours", "tiles", "detections")
"""What a file may hold, in the order in which QuPath is given it."""

_IDS = uuid.UUID("5b0f1973-6a52-4f0e-9f7a-2f6d1e0c8a41")
_DETECTION_RGB, _CONTOUR_RGB = (194, 87, 26), (140, 45, 160)
_TRUTH_RGB = {TUMOUR: (200, 0, 0), EXCLUSION: (0, 130, 60), IGNORED: (120, 120, 120)}


def geojson(found: Findings, layers: Sequence[str] = LAYERS) -> bytes:
    """Return what a run knows of a slide as the text of a GeoJSON file; the same findings give the same bytes."""
    makers: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "tissue": lambda: found.tissue,
        "truth": lambda: (_area(one, found, _TRUTH_RGB[one.kind]) for one in found.truth),
        "contours": lambda: (_area(one, found, _CONTOUR_RGB) for one in found.contours),
        "tiles": lambda: _tiles(found),
        "detections": lambda: _detections(found),
    }
    return collection(feature for layer in LAYERS if layer in layers for feature in makers[layer]())


def collection(features: Iterable[dict[str, Any]]) -> bytes:
    """Return features as the text of a GeoJSON file."""
    texts = (json.dumps(feature, separators=(",", ":"), allow_nan=False) for feature in features)  # there may be 10^6
    return f'{{"type":"FeatureCollection","features":[{",".join(texts)}]}}\n'.encode()


def _area(region: Region, found: Findings, rgb: tuple[int, int, int]) -> dict[str, Any]:
    rings = [_closed(ring, found.l0_corner) for ring in (region.outer, *region.holes)]
    properties = {
        "objectType": "annotation",
        "name": region.name,
        "classification": {"name": region.kind, "color": list(rgb)},
        "isLocked": True,
    }
    measured = {"measurements": dict(region.measurements)} if region.measurements else {}
    return _feature([region.kind, region.name, rings], {"type": "Polygon", "coordinates": rings}, properties | measured)


def _tiles(found: Findings) -> Iterator[dict[str, Any]]:
    for tile in found.tiles():
        left, top = tile.l0_x - found.l0_corner[0], tile.l0_y - found.l0_corner[1]
        measured = {"Probability max": _short(tile.highest), "Probability mean": _short(tile.mean)}
        yield box(left, top, tile.l0_side, measured)


def box(left: float, top: float, side: float, measurements: dict[str, float]) -> dict[str, Any]:
    """Return a square as a tile of QuPath, with numbers by name; its corner is in the plane of the file."""
    right, bottom = left + side, top + side
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    ring = [[number(x), number(y)] for x, y in corners]
    properties = {"objectType": "tile", "isLocked": True, "measurements": measurements}
    return _feature(["tile", ring], {"type": "Polygon", "coordinates": [ring]}, properties)


def _detections(found: Findings) -> Iterator[dict[str, Any]]:
    """Yield the detections as points whose confidence is a measurement."""
    for place, (prob, x, y) in enumerate(found.detections.tolist(), start=1):
        at = [x - found.l0_corner[0], y - found.l0_corner[1]]
        properties = {
            "objectType": "annotation",
            "name": f"detection {place}: {prob:.3f}",
            "classification": {"name": "Detection", "color": list(_DETECTION_RGB)},
            "measurements": {"probability": prob},
        }
        yield _feature([place, prob, *at], {"type": "Point", "coordinates": at}, properties)


def _feature(identity: list[Any], geometry: dict[str, Any], properties: dict[str, Any]) -> dict[str, Any]:
    """Return a feature whose id follows from what it is."""
    own = str(uuid.uuid5(_IDS, json.dumps(identity)))
    return {"type": "Feature", "id": own, "geometry": geometry, "properties": properties}


def _closed(ring: Ring, corner: tuple[int, int]) -> list[list[float | int]]:
    points = [[number(x - corner[0]), number(y - corner[1])] for x, y in ring.tolist()]
    return [*points, points[0]]


def number(value: float) -> float | int:
    """Return a whole number as int, and any other rounded to a hundredth of a pixel."""
    return int(value) if float(value).is_integer() else round(float(value), 2)


def _short(probability: float) -> float:
    """Return a probability with the digits that float32 holds."""
    return float(f"{probability:.7g}")


def _add_options(parser: ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--layers",
        nargs="+",
        choices=LAYERS,
        default=LAYERS,
        metavar="LAYER",
        help=f"what is written, of {', '.join(LAYERS)} (all); a slide has a tile for each 224 px of tissue",
    )


def _export(arguments: Namespace) -> list[str]:
    return each_slide(arguments, lambda found, _note: {f"{found.slide_id}.geojson": geojson(found, arguments.layers)})


FORMAT = Format(
    "qupath", "tissue, truth, contours, tiles and detections of a run, as QuPath shows them", _add_options, _export
)
