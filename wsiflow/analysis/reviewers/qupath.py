"""Write the detections and the tissue outlines of a run as GeoJSON for QuPath, all in the plane that QuPath shows.

QuPath counts from the corner of the scanned area where a slide states one (MIRAX, Leica, Ventana), as
``tissue/<slide>.geojson`` does; ``detections/<slide>.csv`` counts from the corner of level 0, as OpenSlide does.
"""

import json
import uuid
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wsiflow.analysis.reviewers.format import Format
from wsiflow.errors import InputError
from wsiflow.evaluation.detections import read_detections
from wsiflow.evaluation.truth import stated
from wsiflow.run.cases import read_cases
from wsiflow.run.plan import latest_plan
from wsiflow.run.stages import ingest
from wsiflow.slides.manifest import Case
from wsiflow.system import publish

_IDS = uuid.UUID("5b0f1973-6a52-4f0e-9f7a-2f6d1e0c8a41")
_COLOUR = [194, 87, 26]


def export_qupath(root: Path, out: Path) -> tuple[int, int]:
    """Write ``<slide>.geojson`` for each slide of a run that has detections.

    Args:
        root: Folder of the run.
        out: The folder to write.

    Returns:
        The number of slides, and that of their detections.

    Raises:
        InputError: The folder holds no run, or a slide that may state a scanned area cannot be opened.
        EnvironmentFault: The folder cannot be written.
    """
    cases_path = ingest.newest_cases(root)
    if cases_path is None:
        raise InputError("the folder holds no run", "name the out= folder of a run", path=root)
    cases = {case.slide_id: case for case in read_cases(cases_path)[1]}
    publish.preflight(out.absolute())
    counts = []
    for planned in latest_plan(root).slides:
        detections = root / f"detections/{planned.slide_id}.csv"
        if not detections.is_file():
            continue
        corner = _corner(cases[planned.slide_id])
        rows = read_detections(detections).tolist()
        found = [_feature(number, row, corner) for number, row in enumerate(rows, start=1)]
        tissue = json.loads((root / f"tissue/{planned.slide_id}.geojson").read_text(encoding="utf-8"))["features"]
        text = json.dumps({"type": "FeatureCollection", "features": [*tissue, *found]}, separators=(",", ":"))
        publish.write_view(out.absolute(), f"{planned.slide_id}.geojson", f"{text}\n".encode())
        counts.append(len(found))
    return len(counts), sum(counts)


def _corner(case: Case) -> tuple[int, int]:
    """Return the level-0 pixel from which QuPath counts.

    Raises:
        InputError: The slide cannot be opened, and slides of its format may state a scanned area.
    """
    corner = stated(case).place.l0_bounds_corner
    if corner is None:
        cause = "the slide cannot be opened, so that it is not known from where QuPath counts"
        raise InputError(cause, "export where the slide lies", slide=case.slide_id, path=case.path)
    return corner


def _feature(number: int, detection: Sequence[float], corner: tuple[int, int]) -> dict[str, Any]:
    """Return a detection, prob, x, y in level-0 px, as a point whose confidence is a measurement."""
    prob, l0_x, l0_y = detection
    at = [l0_x - corner[0], l0_y - corner[1]]
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_IDS, json.dumps([number, prob, *at]))),
        "geometry": {"type": "Point", "coordinates": at},
        "properties": {
            "objectType": "annotation",
            "name": f"detection {number}: {prob:.3f}",
            "classification": {"name": "Detection", "color": _COLOUR},
            "measurements": {"probability": prob},
        },
    }


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, with a file for each slide")


def _export(arguments: Namespace) -> list[str]:
    n_slides, n_detections = export_qupath(arguments.run, arguments.out)
    return [f"{n_slides} slides, {n_detections} detections: {arguments.out}"]


FORMAT = Format("qupath", "detections and tissue outlines of a run, as QuPath shows them", _add_options, _export)
