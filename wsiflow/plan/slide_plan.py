"""What is planned for one slide, and how its tissue is cut into blocks and groups.

A slide's tissue, blocks and groups lie beside the plan of the run in ``cuts/<slide>.json``, whose content the slide's
key names: a worker reads those of the slides it works on, and a plan of a million groups stays small.
"""

import base64
import hashlib
import json
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import IntegrityError
from wsiflow.plan.blocks import Block, BlockLimits, blocks_at, groups
from wsiflow.plan.blocks import blocks as blocks_of
from wsiflow.plan.geometry import Frame
from wsiflow.system import faults, publish

Runs = tuple[tuple[int, int, int], ...]


class SlidePlan(NamedTuple):
    """What is planned for one slide.

    Attributes:
        slide_id, path, sha256, um_px_l0: The slide, its content and its level-0 spacing.
        label: 1 tumour, 0 normal, None unknown.
        annotation_path, mask_path: Truth, empty where there is none.
        overview_downsample: Level-0 pixels per pixel of the tissue mask.
        frame: The transform stored with every array of this slide.
        n_tiles, n_blocks, n_groups: How much there is to do: tissue tiles, and the blocks and groups they are cut into.
        key: What identifies the slide's pixels and their cutting, see `slide_key`.
    """

    slide_id: str
    path: str
    sha256: str
    um_px_l0: float
    label: int | None
    annotation_path: str
    mask_path: str
    overview_downsample: float
    frame: Frame
    n_tiles: int
    n_blocks: int
    n_groups: int
    key: str


class SlideCut(NamedTuple):
    """A slide's tissue, cut.

    Attributes:
        tile_runs: Selected tiles as runs along rows: row, first column, length.
        blocks: The blocks, in order.
        group_ranges: Half-open ranges of blocks, one per group.
        cell_bits: Which heatmap cells of the selected tiles are scored, bool (n, m, m) packed to bits; empty where all
            are.
    """

    tile_runs: Runs
    blocks: tuple[Block, ...]
    group_ranges: tuple[tuple[int, int], ...]
    cell_bits: bytes = b""

    def group(self, k: int) -> Sequence[Block]:
        """Return the blocks of group ``k``, counted from 1."""
        lo, hi = self.group_ranges[k - 1]
        return self.blocks[lo:hi]

    @property
    def n_tiles(self) -> int:
        """Number of tiles in blocks: the selected ones of which any cell is scored."""
        return sum(len(block.tissue) for block in self.blocks)

    def scored(self, frame: Frame) -> NDArray[np.bool_] | None:
        """Return the scored cells of each selected tile, bool (n, m, m), row by row; None where all cells are."""
        if not self.cell_bits:
            return None
        m, n = frame.cells_per_tile, sum(length for _, _, length in self.tile_runs)
        bits = np.unpackbits(np.frombuffer(self.cell_bits, np.uint8), count=n * m * m)
        return bits.astype(np.bool_).reshape(n, m, m)

    def as_dict(self) -> dict[str, Any]:
        """Return the cut as plain JSON values: which of a block's tiles hold tissue follows from the runs and cells."""
        cells = {"cells": base64.b64encode(zlib.compress(self.cell_bits)).decode()} if self.cell_bits else {}
        return self._rectangles() | cells

    def identity(self) -> dict[str, Any]:
        """Return what identifies the cut, as plain JSON values; the bytes of compressed cells differ by library."""
        cells = {"cells": hashlib.sha256(self.cell_bits).hexdigest()} if self.cell_bits else {}
        return self._rectangles() | cells

    def _rectangles(self) -> dict[str, Any]:
        return {
            "tile_runs": self.tile_runs,
            "blocks": [block[:4] for block in self.blocks],
            "group_ranges": self.group_ranges,
        }


def make_cut(
    tissue: NDArray[np.bool_], frame: Frame, *, group_tiles: int, scored: NDArray[np.bool_] | None = None
) -> SlideCut:
    """Cut a slide's tissue into blocks and groups balanced by cost: a block counts for its tissue tiles.

    Args:
        tissue: bool (rows, cols), the tile grid.
        frame: The slide's transform, with the sizes of blocks.
        group_tiles: Tissue tiles that a group should not exceed on average.
        scored: bool (n, m, m), the heatmap cells of each tissue tile that are scored, row by row; None for all.
    """
    runs = tile_runs(tissue)
    limits = BlockLimits(frame.tile_px, frame.halo_px, frame.block_rows, frame.block_cols)
    tiles, cells = _with_cells(tissue_grid(runs), scored)
    blocks = blocks_of(tiles, limits, cells)
    costs = np.array([len(block.tissue) for block in blocks], dtype=np.float64)
    bits = b"" if scored is None else np.packbits(scored).tobytes()
    return SlideCut(runs, tuple(blocks), tuple(groups(costs, limit=group_tiles)), bits)


def _with_cells(
    selected: NDArray[np.bool_], scored: NDArray[np.bool_] | None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_] | None]:
    """Return the selected tiles of which any cell is scored, and the scored cells of these, (n, m, m)."""
    if scored is None:
        return selected, None
    any_scored = scored.any(axis=(1, 2))
    tiles = selected.copy()
    tiles[selected] = any_scored
    return tiles, scored[any_scored]


def slide_key(sha256: str, frame: Frame, cut: SlideCut) -> str:
    """Return what identifies a slide's pixels and their cutting."""
    return publish.key_of(sha256=sha256, frame=frame._asdict(), **cut.identity())


def pixels_key(planned: SlidePlan, cut: SlideCut) -> str:
    """Return what identifies the pixels of a slide's blocks, whatever windows are cut from them."""
    return publish.key_of(sha256=planned.sha256, frame=planned.frame.pixel_settings(), **cut.identity())


def cut_name(slide_id: str) -> str:
    """Return the name of the file with a slide's cut, relative to the run's folder."""
    return f"cuts/{slide_id}.json"


@lru_cache(maxsize=8)
def read_cut(root: Path, planned: SlidePlan) -> SlideCut:
    """Read how a slide is cut.

    Raises:
        IntegrityError: It is not what was planned.
    """
    path = root / cut_name(planned.slide_id)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        runs = tuple((row, first, length) for row, first, length in data["tile_runs"])
        ranges = tuple((lo, hi) for lo, hi in data["group_ranges"])
        bits = zlib.decompress(base64.b64decode(data["cells"])) if "cells" in data else b""
        cut = SlideCut(runs, (), ranges, bits)
        tiles, cells = _with_cells(tissue_grid(runs), cut.scored(planned.frame))
        crop = planned.frame.block_rows * planned.frame.block_cols > 1
        cut = cut._replace(blocks=tuple(blocks_at(tiles, data["blocks"], cells, crop=crop)))
    except (OSError, ValueError, TypeError, KeyError, zlib.error) as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise faults.fault(error, path=path) from error
        cause = f"the slide's tiles cannot be read ({error})"
        raise IntegrityError(cause, "choose another out= folder", slide=planned.slide_id, path=path) from error
    if slide_key(planned.sha256, planned.frame, cut) != planned.key:
        cause = "the slide's tiles are not those that were planned"
        raise IntegrityError(cause, "choose another out= folder", slide=planned.slide_id, path=path)
    return cut


def tile_runs(tissue: NDArray[np.bool_]) -> Runs:
    """Return a tissue grid as runs along its rows: row, first column, length."""
    runs = []
    for row in np.flatnonzero(tissue.any(axis=1)):
        edges = np.flatnonzero(np.diff(np.pad(tissue[row].astype(np.int8), 1)))
        runs += [(int(row), int(first), int(end - first)) for first, end in edges.reshape(-1, 2)]
    return tuple(runs)


def tissue_grid(runs: Runs) -> NDArray[np.bool_]:
    """Return the tissue grid, bool (rows, cols), as far as there is tissue; the inverse of `tile_runs`."""
    rows = max((row for row, _, _ in runs), default=-1) + 1
    cols = max((first + length for _, first, length in runs), default=0)
    grid = np.zeros((rows, cols), dtype=bool)
    for row, first, length in runs:
        grid[row, first : first + length] = True
    return grid
