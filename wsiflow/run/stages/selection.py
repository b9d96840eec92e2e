"""Which tiles of a slide are looked at: where tissue is found or given, inside the regions of interest."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import WsiflowError
from wsiflow.evaluation.truth import place_of
from wsiflow.plan import glass, tissue
from wsiflow.plan.geometry import Frame
from wsiflow.plan.tissue import TissueParams
from wsiflow.run.config import RunConfig
from wsiflow.slides import regions, slide
from wsiflow.slides.manifest import Case
from wsiflow.slides.readers.reader import GREY
from wsiflow.slides.regions import Chosen, Plane
from wsiflow.system import publish
from wsiflow.system.faults import unreadable

_LIGHTS = {
    "grey": GREY,  # as the reader notes where the file itself is grey
    "dark": "the slide is dark, as in fluorescence: tissue is what is bright, and a model for stained tissue may fail",
}


class Selection(NamedTuple):
    """Which tiles of a slide are looked at.

    Attributes:
        mask: bool (rows, cols), the tissue on the overview.
        downsample: Level-0 pixels per pixel of the mask.
        tiles: bool (rows, cols), the tile grid.
        frame: The slide's transform.
        note: A remark for the user; empty where there is none.
    """

    mask: NDArray[np.bool_]
    downsample: float
    tiles: NDArray[np.bool_]
    frame: Frame
    note: str = ""


def region_files(case: Case, config: RunConfig) -> dict[str, Path]:
    """Return the files that say where a slide is looked at: of its tissue and its regions of interest, where given.

    Raises:
        InputError: Tissue is to be given, and there is no file for the slide.
    """
    files = {}
    if config.tissue.method == "given":
        files["tissue"] = regions.find_tissue_file(case, config.tissue.folder)
    if case.roi_path is not None:
        files["roi"] = case.roi_path
    return files


def region_hashes(case: Case, config: RunConfig) -> dict[str, str]:
    """Return the SHA-256 of the files that say where a slide is looked at; empty where there is none.

    Raises:
        WsiflowError: A file is missing or cannot be read.
    """
    hashes = {}
    for name, path in region_files(case, config).items():
        try:
            hashes[f"{name}_sha256"] = publish.file_sha256(path)
        except OSError as error:
            fault = unreadable(error, f"the file of its {name}", "correct the path", path=path)
            raise fault.about(slide=case.slide_id) from error
    return hashes


def check_regions(opened: slide.Slide, case: Case, config: RunConfig) -> None:
    """Check the files that say where a slide is looked at, before its pixels are read.

    Raises:
        WsiflowError: A file is missing, cannot be read, or does not belong to the slide.
    """
    plane = _plane(opened, config.tissue.downsample)
    try:
        for name, path in region_files(case, config).items():
            regions.check_region(path, plane, _chosen(config.tissue)[name])
    except WsiflowError as error:
        raise error.about(slide=case.slide_id) from error


def select(opened: slide.Slide, frame: Frame, case: Case, config: RunConfig) -> Selection:
    """Return which tiles of a slide are looked at.

    Raises:
        WsiflowError: The slide cannot be read, or a file that says where to look at it cannot be used.
    """
    if config.geometry.convention == "reference":
        return _select_like_the_reference(opened, frame, case, config)
    params, side = config.tissue, frame.tile_px * frame.l0_per_px
    plane = _plane(opened, params.downsample)
    note = ""
    given = _given(case, config, plane)
    mask = given.get("tissue")
    if mask is None:
        overview = opened.overview(params.downsample)
        mask = tissue.tissue_mask(overview, params)
        if params.method == "adaptive" and mask.any():
            note = _LIGHTS.get(glass.find_glass(overview).light, "")
    else:
        mask = tissue.cleaned(mask, params)
    grid = (frame.t_rows, frame.t_cols)
    region = given.get("roi")
    if region is not None:
        mask &= region
    coverage = tissue.tile_coverage(mask, downsample=params.downsample, tile_l0_px=side, grid=grid)
    tiles = tissue.select_tiles(coverage, params)
    if region is not None:  # a tile beside tissue may lie outside
        tiles &= tissue.tile_coverage(region, downsample=params.downsample, tile_l0_px=side, grid=grid) > 0
    return Selection(mask, params.downsample, tiles, frame, note)


def _select_like_the_reference(opened: slide.Slide, frame: Frame, case: Case, config: RunConfig) -> Selection:
    """Return the tiles of the reference system: a pixel of its thumbnail stands for a tile."""
    thumbnail = opened.reference_thumbnail()
    mask = tissue.reference_mask(thumbnail)
    plane = Plane(opened.facts.l0_size_px, frame.tile_px, mask.shape[:2], place_of(opened.facts))
    given = _given(case, config, plane)
    mask = given.get("tissue", mask) & given.get("roi", np.True_)
    index = tissue.reference_index_of(mask)
    _, _, _, xmin, _, ymin, _, nrows, ncols = (int(value) for value in index.vector)
    cropped = frame._replace(t_col0=xmin, t_row0=ymin, t_cols=ncols, t_rows=nrows) if nrows else frame
    return Selection(index.mask, frame.tile_px, index.mask, cropped)


def _given(case: Case, config: RunConfig, plane: Plane) -> dict[str, NDArray[np.bool_]]:
    """Return what files say about a slide, by name: its tissue and its regions of interest, bool (rows, cols)."""
    chosen = _chosen(config.tissue)
    try:
        return {
            name: regions.read_region(path, plane, chosen[name]) for name, path in region_files(case, config).items()
        }
    except WsiflowError as error:
        raise error.about(slide=case.slide_id) from error


def _chosen(params: TissueParams) -> dict[str, Chosen]:
    """Return what of the files of a slide is meant, by the names of `region_files`."""
    return {
        "tissue": Chosen(params.outlines, regions.TISSUE, params.values),
        "roi": Chosen(params.regions, names_key="tissue.regions", values_key=""),
    }


def _plane(opened: slide.Slide, downsample: float) -> Plane:
    width, height = opened.facts.l0_size_px
    shape = (int(np.ceil(height / downsample)), int(np.ceil(width / downsample)))
    return Plane((width, height), downsample, shape, place_of(opened.facts))
