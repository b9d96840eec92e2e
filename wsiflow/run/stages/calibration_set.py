"""The slides that ``inference.calibration`` names for the calibration of int8: the first ones of a manifest."""

import dataclasses
from pathlib import Path

from wsiflow.slides import content
from wsiflow.slides.kinds import ManifestSlides
from wsiflow.slides.manifest import Case, find_dataset

#: Number of blocks that int8 is calibrated on; they come from as many slides, where there are so many.
CALIBRATION_BLOCKS = 16


def named_slides(manifest: Path) -> list[Case]:
    """Return the first slides of a manifest, without their truth, which decides nothing here.

    Raises:
        InputError: The manifest cannot be used.
    """
    listed = find_dataset(ManifestSlides(kind="manifest", manifest=manifest, limit=CALIBRATION_BLOCKS)).cases
    return [dataclasses.replace(case, label=None, annotation_path=None, mask_path=None) for case in listed]


def named_sha256(manifest: Path) -> list[str]:
    """Return the hashes of these slides, in order.

    Raises:
        InputError: The manifest or a slide cannot be read.
    """
    return [content.cached_sha256(case.path) for case in named_slides(manifest)]
