"""Mask images painted by pathologists or exported from their outlines: which of their values are tumour."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError

NAME_TUMOUR_VALUES = (
    "set which values are tumour, for example evaluation.mask_tumour=[2] in another out= folder"
    " (wsiflow evaluate: --mask-tumour 2)"
)
"""The remedy where the values of a mask do not show which of them are tumour."""


def tumour_from_mask(
    values: NDArray[np.uint8], path: Path, *, label: int | None = None, named: Sequence[int] = ()
) -> NDArray[np.bool_]:
    """Return the tumour mask of a mask image, whose set of values shows which value is tumour.

    {0, 255}: 255 is tumour, as in the CAMELYON16 challenge. {0, 1}: 1 is tumour, as ASAP writes it; in a slide that is
    labelled normal it is tissue. {0, 1, 2}: 2 is tumour and 1 is other tissue, as in masks with a tissue class. Any
    other set is refused: in a mask with values such as the 254 of a JPEG, tumour would be lost without notice.

    Args:
        values: uint8 (rows, cols), the pixels of the mask image.
        path: File of the mask image, for messages.
        label: Label of the slide, 0 for normal; None where it is unknown.
        named: The values that the user declares to be tumour; all other values are then not tumour.

    Returns:
        bool (rows, cols).

    Raises:
        InputError: The image has another set of values.
    """
    if named:
        chosen: NDArray[np.bool_] = np.isin(np.arange(256), named)[values]
        return chosen
    present = set(np.flatnonzero(np.bincount(values.ravel(), minlength=256)).tolist())
    for known, tumour in (({0, 255}, 255), ({0, 1}, 2 if label == 0 else 1), ({0, 1, 2}, 2)):
        if present <= known:
            mask: NDArray[np.bool_] = values == tumour
            return mask
    listed = ", ".join(map(str, sorted(present)[:8])) + (", ..." if len(present) > 8 else "")
    remedy = f"write a lossless mask of 0 and 255, of 0 and 1, or of 0, 1 and 2, or {NAME_TUMOUR_VALUES}"
    raise InputError(f"the mask has the values {listed}", remedy, path=path)
