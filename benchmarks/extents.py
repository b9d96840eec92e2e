"""Count what is scored, read and computed on real tissue: the outlines of 158 normal slides of CAMELYON16.

The outlines are drawn at the default scale of overviews and planned like slides, with each way to choose windows, with
the halo of a network that does not pad and of one that does, and with largest blocks of several sizes. Every area is
given as a multiple of the tissue's.
"""

import json
import math
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.measuring import ResultTable, arguments, finish, machine, say
from flows.compose import compose_config
from wsiflow.plan.blocks import size_px
from wsiflow.plan.geometry import Frame, grid_shape
from wsiflow.plan.slide_plan import make_cut
from wsiflow.plan.tissue import select_tiles, tile_coverage, touching_cells
from wsiflow.slides.annotations.fill import painted
from wsiflow.slides.annotations.outlines import Outline

_ARCHIVE = "camelyon16/tissue_normal_json.tar.gz"
_WINDOW_PX, _STRIDE_PX, _UM_PX = 224, 16, 0.243
_REACH_PX = (_WINDOW_PX - _STRIDE_PX) // 2
_CONTEXT_PX = 96  # of networks that pad
_WAYS = ("all", "touching")
# The first two are those of the default memory, for networks that pad and for others; the third needs 4 times as much.
_BLOCKS = ((7, 8), (8, 9), (18, 18))

Mask = NDArray[np.bool_]


def main(argv: Sequence[str] | None = None) -> None:
    """Plan every slide in each way, and write ``extents.json``."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {_ARCHIVE}")
    parser.add_argument("--every", type=int, default=1, help="every n-th slide alone; a slide takes 5 CPU-s")
    given = parser.parse_args(argv)
    about, slides = machine(), {}
    for name, mask in masks(given.data, every=20 if given.quick else given.every):
        say(name)
        slides[name] = _areas(mask)
    total = {name: sum(each[name] for each in slides.values()) for name in next(iter(slides.values()))}
    finish(given, "extents", about, {"slides": slides, "total": total}, _tables(total, len(slides)))


def masks(data: Path, *, every: int) -> Iterator[tuple[str, Mask]]:
    """Yield the name and the tissue mask of every n-th slide."""
    downsample = compose_config([]).tissue.downsample
    with tarfile.open(data / _ARCHIVE) as files:
        names = sorted(member.name for member in files if member.name.endswith(".json"))
        for name in names[::every]:
            stream = files.extractfile(name)
            assert stream is not None
            drawn = [np.array(each["vertices"], np.float64) for each in json.load(stream)["negative"]]
            width, height = np.ceil(np.max([polygon.max(axis=0) for polygon in drawn], axis=0) / downsample) + 8
            outlines = [Outline(Path(name).stem, "", polygon) for polygon in drawn]
            yield Path(name).stem, painted(outlines, (int(height), int(width)), downsample=downsample)


def _areas(mask: Mask) -> dict[str, float]:
    """Return areas on one slide by name, reading pixels; none of them depends on the machine."""
    params = compose_config([]).tissue
    frame = frame_of(mask, params.downsample, 0, (1, 1))
    tile_px2, coverage = frame.tile_px**2, coverage_of(mask, frame, params.downsample)
    tiles = {grown: select_tiles(coverage, params.model_copy(update={"dilate_tiles": grown})) for grown in (0, 1)}
    scored = touching_cells(mask, tiles[1], frame, downsample=params.downsample)
    areas = {
        "tissue": float(mask.sum()) * params.downsample**2,
        "scored cells": float(scored.sum()) * _STRIDE_PX**2,
        "pixels of their windows": _windows_px2(tiles[1], scored),
        "selected tiles": float(tiles[0].sum()) * tile_px2,
        "selected tiles and their neighbours": float(tiles[1].sum()) * tile_px2,
    }
    for context_px in (0, _CONTEXT_PX):
        for largest in _BLOCKS:
            of_run = frame_of(mask, params.downsample, _REACH_PX + context_px, largest)
            for windows, cells in (("all", None), ("touching", scored)):
                cut = make_cut(tiles[1], of_run, group_tiles=400, scored=cells)
                halo_px2 = [math.prod(size_px(of_run, block)) for block in cut.blocks]
                bare = of_run._replace(halo_px=0)
                areas[f"{windows} without halo, {context_px}, {largest}"] = float(
                    sum(math.prod(size_px(bare, block)) for block in cut.blocks)
                )
                areas[f"{windows}, {context_px}, {largest}"] = float(sum(halo_px2))
    return areas


def _windows_px2(tiles: Mask, scored: Mask) -> float:
    """Return the area that the scored windows cover together, which one block of any shape would read."""
    m, reach = scored.shape[1], _REACH_PX / _STRIDE_PX
    cells = np.zeros((*tiles.shape, m, m), np.bool_)
    cells[tiles] = scored
    heat = cells.swapaxes(1, 2).reshape(tiles.shape[0] * m, -1)
    half_cells = heat.repeat(2, axis=0).repeat(2, axis=1).astype(np.uint8)  # a window reaches 6.5 cells beyond its own
    side = 2 * int(2 * reach) + 1
    grown = cv2.dilate(half_cells, np.ones((side, 1), np.uint8))
    return float(cv2.dilate(grown, np.ones((1, side), np.uint8)).sum()) * (_STRIDE_PX / 2) ** 2


def frame_of(
    mask: Mask, downsample: float, halo_px: int, largest: tuple[int, int], *, stride_px: int = _STRIDE_PX
) -> Frame:
    """Return the transform of a slide that is as large as its mask."""
    height, width = (round(side * downsample) for side in mask.shape)
    tile_px = compose_config([]).tiles.tile_px
    rows, cols = grid_shape(width, height, l0_per_px=1.0, tile_px=tile_px)
    sides = (tile_px, _WINDOW_PX, stride_px, halo_px)
    return Frame("centred", width, height, 1.0, _UM_PX, *sides, *largest, 0, 0, cols, rows)


def coverage_of(mask: Mask, frame: Frame, downsample: float) -> NDArray[np.float64]:
    """Return the share of each tile that is tissue, float64 (rows, cols)."""
    grid = (frame.t_rows, frame.t_cols)
    return tile_coverage(mask, downsample=downsample, tile_l0_px=frame.tile_px, grid=grid)


def _tables(total: Mapping[str, float], count: int) -> list[ResultTable]:
    """Return tables of areas as multiples of the tissue's area."""

    def times(name: str) -> str:
        return f"{total[name] / total['tissue']:.2f}"

    tile_px2 = compose_config([]).tiles.tile_px ** 2
    places = ["tissue", "scored cells", "pixels of their windows", *(name for name in total if "selected" in name)]
    first = ResultTable(
        f"What there is to score on {count} real slides",
        ["what", "tiles of 224 px, mean slide", "of the tissue's area"],
        [[name, f"{total[name] / count / tile_px2:,.0f}", times(name)] for name in places],
    )
    rows = [
        [
            f"{context_px} px",
            f"{rows} x {cols}",
            *(
                times(f"{windows}{halo}, {context_px}, {(rows, cols)}")
                for halo in (" without halo", "")
                for windows in _WAYS
            ),
        ]
        for context_px in (0, _CONTEXT_PX)
        for rows, cols in _BLOCKS
    ]
    columns = ["context", "largest block, tiles"]
    columns += [
        f"{what}, tissue.windows={ways}" for what in ("blocks without halo", "read and computed") for ways in _WAYS
    ]
    return [first, ResultTable("What is read and computed, of the tissue's area", columns, rows)]


if __name__ == "__main__":
    main()
