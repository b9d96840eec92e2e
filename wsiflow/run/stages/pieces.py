"""Slides that are reduced to a few of their blocks, for measuring: every stage can work through a plan of them."""

import json
from pathlib import Path

import numpy as np

from wsiflow.plan.blocks import scored_cells
from wsiflow.plan.slide_plan import SlideCut, SlidePlan, cut_name, make_cut, slide_key


def piece(cut: SlideCut, slide: SlidePlan, place: float, count: int, group_tiles: int) -> SlideCut:
    """Return the cut of a slide that is reduced to ``count`` successive blocks.

    Args:
        cut: The cut of the whole slide.
        slide: The slide.
        place: Where the blocks lie among all of the slide, 0 to 1.
        count: Number of blocks; all blocks of a slide that has fewer.
        group_tiles: Most tissue tiles of a group.
    """
    first = int(len(cut.blocks) * place) - count // 2
    first = max(0, min(first, len(cut.blocks) - count))
    blocks = cut.blocks[first : first + count]
    cols, rows = np.array([cell for block in blocks for cell in block.cells()]).T
    grid = np.zeros((slide.frame.t_rows, slide.frame.t_cols), dtype=np.bool_)
    grid[rows, cols] = True
    scored = None
    if cut.cell_bits:
        of_tiles = np.concatenate([scored_cells(block, slide.frame.cells_per_tile) for block in blocks])
        scored = of_tiles[np.lexsort((cols, rows))]
    return make_cut(grid, slide.frame, group_tiles=group_tiles, scored=scored)


def publish_piece(folder: Path, root: Path, slide: SlidePlan, cut: SlideCut, name: str) -> SlidePlan:
    """Write the files of a slide that tasks read: its cut, and the record of its content."""
    for path, text in (
        (folder / cut_name(name), json.dumps(cut.as_dict())),
        (folder / f"tissue/{name}.json", (root / f"tissue/{slide.slide_id}.json").read_text(encoding="utf-8")),
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return slide._replace(
        slide_id=name,
        n_tiles=cut.n_tiles,
        n_blocks=len(cut.blocks),
        n_groups=len(cut.group_ranges),
        key=slide_key(slide.sha256, slide.frame, cut),
    )
