"""The tiles of a run as HDF5 files of coordinates that CLAM and TRIDENT take in place of their own.

``coords`` int64 (n, 2) holds x and y of the top-left corners of the scored tiles, row by row, in level-0 pixels from
the corner of level 0; its attributes say what a patch is. Beside it ``prob`` float32 (n,) holds the highest probability
of a tile's cells, which neither program reads. Corners and sides are whole pixels: where slides are read at another
spacing than their own, each is rounded, by at most half a pixel.

``patch_size`` means something else in each program. CLAM counts the pixels of ``patch_level``; TRIDENT those at
``target_magnification``, and reads ``patch_size * level0_magnification / target_magnification`` level-0 pixels.
Magnifications are nominal, 10 over the spacing in um: where that of the reading spacing is no whole number, patches are
those of level 0, of the same area.
"""

import io
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np

from wsiflow.analysis.exports.export import Note, add_run, each_slide
from wsiflow.analysis.exports.findings import Findings
from wsiflow.analysis.reviewers.format import Format
from wsiflow.slides.slide import SlideFacts, open_slide

_SAME = 0.001  # relative difference of scales that counts as none
# Upper limits, um per px, of the magnification that scanners call by this name; TRIDENT draws them there too.
_NOMINAL = ((0.16, 80), (0.2, 60), (0.3, 40), (0.6, 20), (1.2, 10), (2.4, 5))


def clam_h5(found: Findings, facts: SlideFacts) -> bytes:
    """Return the file ``patches/<slide>.h5`` of CLAM; the same findings give the same bytes.

    Patches are those of the level at which the run read the slide, else of level 0, as large as a tile there.

    Args:
        found: What the run knows of the slide.
        facts: The levels of the slide.
    """
    near = [abs(downsample / found.frame.l0_per_px - 1) for downsample in facts.level_downsamples]
    level = int(np.argmin(near))
    size = found.frame.tile_px
    if near[level] > _SAME:
        level, size = 0, _l0_side(found)
    downsample, shape = facts.level_downsamples[level], np.array(facts.level_sizes_px[level], np.int64)
    attributes = {
        "patch_size": size,
        "patch_level": level,
        "downsample": np.array([downsample, downsample]),
        "downsampled_level_dim": shape,
        "level_dim": shape,
        "name": found.slide_id,
        "save_path": "patches",
    }
    return _coordinates(found, attributes)


def trident_h5(found: Findings) -> tuple[str, bytes]:
    """Return the name and the content of the file of patches of TRIDENT; the same findings give the same bytes."""
    frame = found.frame
    level0 = next((name for limit, name in _NOMINAL if found.um_px_l0 < limit), max(1, round(10 / found.um_px_l0)))
    target, size = round(level0 / frame.l0_per_px), frame.tile_px
    if target < 1 or abs(target * frame.l0_per_px / level0 - 1) > _SAME:
        target, size = level0, _l0_side(found)
    attributes = {
        "patch_size": size,
        "patch_size_level0": round(size * level0 / target),
        "level0_magnification": level0,
        "target_magnification": target,
        "overlap": 0,
        "level0_width": frame.l0_width_px,
        "level0_height": frame.l0_height_px,
        "name": found.slide_id,
        "savetodir": "patches",
    }
    folder = f"{target}x_{size}px_0px_overlap/patches"
    return f"{folder}/{found.slide_id}_patches.h5", _coordinates(found, attributes)


def _l0_side(found: Findings) -> int:
    return round(found.frame.tile_px * found.frame.l0_per_px)


def _coordinates(found: Findings, attributes: Mapping[str, Any]) -> bytes:
    tiles = list(found.tiles())
    corners = np.array([(round(tile.l0_x), round(tile.l0_y)) for tile in tiles], np.int64).reshape(-1, 2)
    file = io.BytesIO()
    with h5py.File(file, "w", libver=("v110", "v110")) as stored:
        coords = stored.create_dataset("coords", data=corners)
        for name, value in attributes.items():
            coords.attrs[name] = value
        stored.create_dataset("prob", data=np.array([tile.highest for tile in tiles], np.float32))
    return file.getvalue()


def _add_options(parser: ArgumentParser) -> None:
    add_run(parser, contours=False)


def _export_clam(arguments: Namespace) -> list[str]:
    def files(found: Findings, _note: Note) -> dict[str, bytes]:
        with open_slide(found.path, slide_id=found.slide_id) as opened:
            return {f"patches/{found.slide_id}.h5": clam_h5(found, opened.facts)}

    return each_slide(arguments, files)


def _export_trident(arguments: Namespace) -> list[str]:
    return each_slide(arguments, lambda found, _note: dict([trident_h5(found)]))


CLAM = Format("clam", "coordinates of a run's tiles, as CLAM extracts features at them", _add_options, _export_clam)
TRIDENT = Format(
    "trident", "coordinates of a run's tiles, as TRIDENT extracts features at them", _add_options, _export_trident
)
