"""The windows of a run as WSInfer writes its own: a CSV and a GeoJSON for each slide.

``model-outputs-csv/<slide>.csv`` has a row for a window: ``minx,miny,width,height`` in whole level-0 pixels from the
corner of level 0, and its probability ``prob_<class>``. ``model-outputs-geojson/<slide>.geojson`` holds the same
windows as tiles of QuPath, from the corner from which QuPath counts.

WSInfer's windows touch and do not overlap. Those of a run lie a stride apart, so that by default one in as many is
taken, along rows and columns, as make windows touch; ``--every 1`` takes all of them.
"""

import csv
import io
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from wsiflow.analysis.exports.export import Note, add_run, each_slide
from wsiflow.analysis.exports.findings import Findings
from wsiflow.analysis.exports.qupath import box, collection
from wsiflow.analysis.reviewers.format import Format
from wsiflow.plan.geometry import l0_from_h, window_offsets_px

_MOST_TILES = 500_000  # a file of 150 MB


class Window(NamedTuple):
    """A scored window: its top-left corner and its side, whole level-0 px, and its probability."""

    minx: int
    miny: int
    side: int
    prob: float


def windows(found: Findings, every: int) -> Iterator[Window]:
    """Yield the scored windows of a heatmap, row by row: one in ``every`` along rows and columns.

    Corners are rounded to whole pixels, as WSInfer's are. Patches that the reference geometry shifts at the slide's
    border are given where their scores belong.
    """
    frame, taken = found.frame, found.heat[::every, ::every]
    half = 0.5 if frame.convention == "centred" else 0.0
    to_corner = (window_offsets_px(frame)[0] - half * frame.stride_px) * frame.l0_per_px
    side = round(frame.window_px * frame.l0_per_px)
    for row, scores in enumerate(taken):  # a map may have 10^8 cells
        (cols,) = np.nonzero(np.isfinite(scores))
        cells = np.column_stack([cols, np.full_like(cols, row)]).astype(np.float64) * every
        corners = np.rint(l0_from_h(frame, cells) + to_corner).astype(np.int64)
        for (x, y), prob in zip(corners.tolist(), scores[cols].tolist(), strict=True):
            yield Window(x, y, side, prob)


def csv_text(found: Findings, every: int) -> bytes:
    """Return the CSV of a slide."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["minx", "miny", "width", "height", f"prob_{found.class_name}"])
    rows.writerows((one.minx, one.miny, one.side, one.side, f"{one.prob:.7g}") for one in windows(found, every))
    return text.getvalue().encode()


def geojson(found: Findings, every: int) -> bytes:
    """Return the GeoJSON of a slide."""
    left, top = found.l0_corner
    name = f"prob_{found.class_name}"
    return collection(
        box(one.minx - left, one.miny - top, one.side, {name: float(f"{one.prob:.7g}")})
        for one in windows(found, every)
    )


def touching(found: Findings) -> int:
    """Return how many cells lie from a window to the next one that does not overlap it."""
    return math.ceil(found.frame.window_px / found.frame.stride_px)


def _add_options(parser: ArgumentParser) -> None:
    add_run(parser, contours=False)
    parser.add_argument(
        "--every", type=_natural, help="one window in this many along rows and columns (those that touch)"
    )


def _natural(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _export(arguments: Namespace) -> list[str]:
    def files(found: Findings, note: Note) -> dict[str, bytes]:
        every = arguments.every or touching(found)
        written = {f"model-outputs-csv/{found.slide_id}.csv": csv_text(found, every)}
        count = int(np.isfinite(found.heat[::every, ::every]).sum())
        if count > _MOST_TILES:
            note(f"slide {found.slide_id}: no GeoJSON of {count:,} windows, which is too much for QuPath; see the CSV")
            return written
        return written | {f"model-outputs-geojson/{found.slide_id}.geojson": geojson(found, every)}

    return each_slide(arguments, files)


FORMAT = Format("wsinfer", "scored windows of a run as WSInfer's CSV and GeoJSON", _add_options, _export)
