"""The heatmap of a slide as a pyramidal OME-TIFF: float32 probabilities, NaN where not tissue.

``PhysicalSizeX`` and ``Y`` are the side of a heatmap cell, um. ``PositionX`` and ``Y`` of the plane are the place of
the corner of its first cell, um, from the corner from which viewers count. The map annotation has the same in level-0
pixels from the corner of level 0: a column begins at ``l0_x + column * l0_px_per_cell``, a row likewise.

A pixel of a reduced level (in SubIFDs, each half as large) is the largest known value of 2 x 2, as in the run's map.
"""

import io
import json
import uuid
from argparse import ArgumentParser, Namespace
from typing import Any

import tifffile

from wsiflow.analysis.exports.export import add_run, each_slide
from wsiflow.analysis.exports.findings import Findings
from wsiflow.analysis.reviewers.format import Format
from wsiflow.heatmap.files import heat_levels
from wsiflow.plan.geometry import l0_from_h_corner
from wsiflow.slides.pyramid import TILE_PX

_IDS = uuid.UUID("7b0a4f0c-0d0e-4d70-8b7e-3d1c1f2b9a52")


def ome_tiff(found: Findings) -> bytes:
    """Return the OME-TIFF of a slide's heatmap; the same findings give the same bytes."""
    levels, file = heat_levels(found.heat), io.BytesIO()
    cell_um = found.frame.um_px * found.frame.stride_px
    tiled: dict[str, Any] = {"tile": (TILE_PX, TILE_PX), "compression": "zlib", "photometric": "minisblack"}
    with tifffile.TiffWriter(file, ome=True, bigtiff=levels[0].nbytes > 2**31) as tiff:
        tiff.write(levels[0], subifds=len(levels) - 1, metadata=_metadata(found, cell_um), software="wsiflow", **tiled)
        for level in levels[1:]:
            tiff.write(level, subfiletype=1, **tiled)
    return file.getvalue()


def _metadata(found: Findings, cell_um: float) -> dict[str, Any]:
    x, y = l0_from_h_corner(found.frame, 0, 0)
    um_px = cell_um / found.l0_cell
    left, top = ((begin - corner) * um_px for begin, corner in zip((x, y), found.l0_corner, strict=True))
    sizes = {f"PhysicalSize{axis}": cell_um for axis in "XY"} | {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
    plane = {"PositionX": left, "PositionY": top, "PositionXUnit": "µm", "PositionYUnit": "µm"}
    about = {
        "slide_id": found.slide_id,
        "l0_x": f"{x:.10g}",
        "l0_y": f"{y:.10g}",
        "l0_px_per_cell": f"{found.l0_cell:.10g}",
        "l0_bounds_x": str(found.l0_corner[0]),
        "l0_bounds_y": str(found.l0_corner[1]),
        "frame": json.dumps(found.frame._asdict(), sort_keys=True),
    }
    return {
        "axes": "YX",
        "Creator": "wsiflow",
        "UUID": str(uuid.uuid5(_IDS, found.identity())),
        "Name": f"{found.slide_id} probability of {found.class_name}",
        "Channel": {"Name": [found.class_name]},
        "Plane": plane,
        "MapAnnotation": about,
        **sizes,
    }


def _add_options(parser: ArgumentParser) -> None:
    add_run(parser, contours=False)


def _export(arguments: Namespace) -> list[str]:
    return each_slide(arguments, lambda found, _note: {f"{found.slide_id}.ome.tif": ome_tiff(found)})


FORMAT = Format("ome-tiff", "heatmaps of a run as pyramidal OME-TIFF", _add_options, _export)
