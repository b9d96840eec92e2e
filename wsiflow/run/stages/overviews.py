"""Overviews of slides: a picture of each for people, and those that are kept for the stages.

The picture, ``overviews/<slide>.jpg``, is what the report shows, and the viewer where the slide itself is gone.

Kept are those of large slides without a pyramid, which are read whole to be seen small.
Finding the tissue reads such a slide once, which may take longer than prediction. Its overview is then published as
``overviews/<slide>.png``, and the picture of the heatmap is drawn on it. Slides with a pyramid have no such file.
"""

import io
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsiflow.plan.outline import png_bytes
from wsiflow.plan.slide_plan import SlidePlan
from wsiflow.slides.slide import Slide
from wsiflow.system import publish

_QUALITY = 82  # of JPEG, 1 to 95
_LEAST_SIDE_PX = 480  # on a smaller picture, lesions would hardly be seen


def name_of(slide_id: str) -> str:
    """Return the name of the kept overview of a slide, relative to the run's folder."""
    return f"overviews/{slide_id}.png"


def picture_of(slide_id: str) -> str:
    """Return the name of the picture of a slide, relative to the run's folder."""
    return f"overviews/{slide_id}.jpg"


def as_jpeg(overview: NDArray[np.uint8], quality: int = _QUALITY) -> bytes:
    """Return an overview, uint8 (rows, cols, 3), as a JPEG."""
    out = io.BytesIO()
    Image.fromarray(overview).save(out, "JPEG", quality=quality)
    return out.getvalue()


def reduced(overview: NDArray[np.uint8], side_px: int) -> NDArray[np.uint8]:
    """Return an overview, uint8 (rows, cols, 3), averaged to a long side of at most ``side_px`` pixels."""
    rows, cols = overview.shape[:2]
    scale = side_px / max(rows, cols)
    if scale >= 1:
        return overview
    size_px = (max(1, round(cols * scale)), max(1, round(rows * scale)))
    return np.array(Image.fromarray(overview).resize(size_px, Image.Resampling.BOX))


def as_png(overview: NDArray[np.uint8]) -> bytes:
    """Return an overview, uint8 (rows, cols, 3), as a PNG."""
    return png_bytes(Image.fromarray(overview))


def read_overview(root: Path, planned: SlidePlan, opened: Slide, *, side_px: int) -> tuple[NDArray[np.uint8], float]:
    """Return an overview of a planned slide whose long side has about ``side_px`` pixels, and its downsample.

    Where the slide's pixels would all be read for it, the overview of the tissue is used, with its own scale or a whole
    fraction of it. If its file was deleted, it is read again, so that the picture is the same.
    """
    side_l0_px, kept_downsample = max(opened.facts.l0_size_px), planned.overview_downsample
    downsample = max(1.0, side_l0_px / side_px)
    is_kept = planned.frame.convention != "reference" and opened.facts.is_costly(kept_downsample)
    if not is_kept or not opened.facts.is_costly(downsample) or side_l0_px / kept_downsample < _LEAST_SIDE_PX:
        return opened.overview(downsample), downsample
    name = name_of(planned.slide_id)
    if publish.has_recorded_size(root, name):
        with Image.open(io.BytesIO((root / name).read_bytes())) as image:
            overview = image.convert("RGB")
    else:
        overview = Image.fromarray(opened.overview(kept_downsample))
    times = max(1, math.ceil(side_l0_px / kept_downsample / side_px))
    return np.array(overview.reduce(times)), kept_downsample * times
