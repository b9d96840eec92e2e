"""GeoJSON as QuPath exports it: a FeatureCollection, a bare list, one Feature or one geometry.

QuPath crops slides to the bounds that they state (MIRAX, Leica, Ventana), so that its coordinates count from there. The
class of an object is its group; a class such as ``Tumor: Positive`` is also known by its first part. Polygons have
holes; a MultiPolygon and a GeometryCollection are several areas. Points and lines enclose nothing; detections, cells
and tiles are what a program found, no truth that was drawn.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wsiflow.errors import InputError
from wsiflow.slides.annotations import xml_file
from wsiflow.slides.annotations.outlines import (
    Format,
    NoArea,
    Outline,
    SlidePlace,
    as_outline,
    ellipse,
    points,
)
from wsiflow.system import faults

_REMEDY = "export it from QuPath again (File > Export objects as GeoJSON)"
_FOUND = {"detection", "cell", "tile", "root", "tmacore", "tma_core"}
_GEOMETRIES = {"Polygon", "MultiPolygon", "GeometryCollection", "Point", "MultiPoint", "LineString", "MultiLineString"}


def read(path: Path, _slide: SlidePlace) -> Iterator[Outline | NoArea]:
    """Yield the annotations of a file.

    Raises:
        InputError: The file is not GeoJSON, or coordinates are not numbers.
        EnvironmentFault: The system refuses to read the file.
    """
    total = 0
    for number, feature in enumerate(_features(_loaded(path), path), start=1):
        for one in _annotations(feature, number, path):
            total += 0 if isinstance(one, NoArea) else len(one.polygon) + sum(map(len, one.holes))
            xml_file.require_points(total, path)
            yield one


def _loaded(path: Path) -> Any:
    try:
        xml_file.require_size(path)
        return json.loads(path.read_bytes())
    except OSError as error:
        raise faults.unreadable(error, "the annotation", "correct the path", path=path) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"the annotation is not well-formed JSON ({error})", _REMEDY, path=path) from error


def _features(value: Any, path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the features of a document, however they are wrapped; a bare geometry is a feature without properties."""
    if isinstance(value, list):
        for one in value:
            yield from _features(one, path)
        return
    kind = _text(value.get("type")) if isinstance(value, Mapping) else ""
    if kind == "FeatureCollection" and isinstance(value.get("features"), list):
        yield from _features(value["features"], path)
    elif kind == "Feature":
        yield value
    elif kind in _GEOMETRIES:
        yield {"geometry": value}
    else:
        cause = f"it holds {kind!r}" if kind else f"it holds a value of type {type(value).__name__}"
        raise InputError(f"{cause}, expected features of GeoJSON", _REMEDY, path=path)


def _annotations(feature: Mapping[str, Any], number: int, path: Path) -> Iterator[Outline | NoArea]:
    """Yield the areas of a feature."""
    properties = feature.get("properties") or {}
    properties = properties if isinstance(properties, Mapping) else {}
    group, own = _class(properties), _text(properties.get("name"))
    name = own or f"{group or 'object'} {number}"
    if (found := _object_type(feature, properties)) in _FOUND:
        yield NoArea(name, found)
        return
    hints = (*group.split(": ")[:-1], "" if group else own)  # a name may only say what a class does not
    for geometry in _geometries(feature.get("geometry"), name, path):
        if geometry["type"] != "Polygon":
            yield NoArea(name, geometry["type"])
            continue
        try:
            rings = [points(ring) for ring in geometry["coordinates"]]
        except (ValueError, TypeError, OverflowError) as error:
            cause = f"the coordinates of {name!r} are not pairs of numbers"
            raise InputError(cause, _REMEDY, path=path) from error
        if not all(np.isfinite(ring).all() for ring in rings):
            raise InputError(f"a coordinate of {name!r} is not finite", "write finite numbers", path=path)
        outer = rings[0] if rings else np.empty((0, 2))
        if geometry.get("isEllipse") is True and len(outer) >= 2:
            outer = ellipse(outer)
        yield as_outline(name, group, outer, holes=tuple(rings[1:]), hints=hints)


def _geometries(geometry: Any, name: str, path: Path) -> Iterator[dict[str, Any]]:
    """Yield the single geometries of a geometry: polygons one by one, and others as they are."""
    kind = _text(geometry.get("type")) if isinstance(geometry, Mapping) else ""
    if geometry is None:
        yield {"type": "no geometry"}
    elif kind == "GeometryCollection":
        for one in _parts(geometry, "geometries", name, path):
            yield from _geometries(one, name, path)
    elif kind == "MultiPolygon":
        yield from ({"type": "Polygon", "coordinates": one} for one in _parts(geometry, "coordinates", name, path))
    elif kind in _GEOMETRIES:
        yield {**geometry, "type": kind, "coordinates": geometry.get("coordinates") or []}
    else:
        raise InputError(f"the geometry of {name!r} is {kind!r}, which GeoJSON does not have", _REMEDY, path=path)


def _parts(geometry: Mapping[str, Any], key: str, name: str, path: Path) -> list[Any]:
    parts = geometry.get(key) or []
    if not isinstance(parts, list):
        raise InputError(f"the {key} of {name!r} are no list", _REMEDY, path=path)
    return parts


def _object_type(feature: Mapping[str, Any], properties: Mapping[str, Any]) -> str:
    """Return what QuPath calls an object: newer versions say so, older ones have the class of the object as its id."""
    stated = _text(properties.get("objectType") or properties.get("object_type")).lower()
    former = _text(feature.get("id"))
    if not stated and former.startswith("Path") and former.endswith("Object"):
        stated = former.removeprefix("Path").removesuffix("Object").lower()
    return stated


def _class(properties: Mapping[str, Any]) -> str:
    """Return the class of an object: a name, or the names that newer versions list."""
    value = properties.get("classification")
    if isinstance(value, Mapping):
        value = value.get("names") or value.get("name")
    return ": ".join(filter(None, map(_text, value))) if isinstance(value, list) else _text(value)


def _text(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""


FORMAT = Format("GeoJSON", lambda syntax: syntax.kind == "json", read, origin="bounds")
