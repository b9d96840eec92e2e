"""The sliding window: every window of a block goes through the classifier on its own, as in the reference system.

Input: patches, uint8 (n, h, w, 3), and where in a patch the windows lie. Output: float32 (n, windows). It is the
measure other engines are compared with: exact for any network, and slow, since neighbouring windows share their pixels.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from wsiflow.errors import WsiflowError
from wsiflow.model.classifier import Classifier, infer, normalise, not_finite


def predict_blocks(
    classifier: Classifier, patches: NDArray[np.uint8], offsets_px: NDArray[np.int64], *, batch: int
) -> NDArray[np.float32]:
    """Return the probability of the positive class in every window of every patch.

    Batches run across rows and patches and all have the same shape, the last one filled up, so a probability does not
    depend on how many windows the others in a group have. One batch of windows is in memory at a time.

    Args:
        classifier: The classifier.
        patches: uint8 (n, h, w, 3), RGB.
        offsets_px: int (k, 2): x, y of the top-left corner of each window in its patch, px.
        batch: Windows per call of the network, at least 1.

    Returns:
        float32 (n, k), 0 to 1.

    Raises:
        InputError: A probability is not finite.
        WsiflowError: A window leaves its patch.
    """
    _check_inside(classifier.window_px, patches, offsets_px)
    side = classifier.input_px
    inputs = torch.zeros((batch, 3, side, side)).to(memory_format=torch.channels_last)
    found = np.empty(len(patches) * len(offsets_px), np.float32)
    with torch.inference_mode():
        for number, window in enumerate(_windows(classifier, patches, offsets_px)):
            slot = number % batch
            inputs[slot] = window
            if slot == batch - 1:
                found[number - slot : number + 1] = infer(classifier, inputs)[:, classifier.positive_index]
        rest = found.size % batch
        if rest:
            inputs[rest:] = 0
            found[found.size - rest :] = infer(classifier, inputs)[:rest, classifier.positive_index]
    return _finite(found.reshape(len(patches), len(offsets_px)), offsets_px)


def _windows(
    classifier: Classifier, patches: NDArray[np.uint8], offsets_px: NDArray[np.int64]
) -> Iterator[torch.Tensor]:
    """Yield the windows as the network takes them, patch by patch."""
    side = classifier.window_px
    for patch in patches:
        if classifier.input_px == side:
            # Once for the whole patch: for each window it would cost the small network half as much again.
            image = normalise(classifier, patch[None])[0]
            yield from (image[:, y : y + side, x : x + side] for x, y in offsets_px)
        else:
            yield from (normalise(classifier, patch[None, y : y + side, x : x + side])[0] for x, y in offsets_px)


def _check_inside(side: int, patches: NDArray[np.uint8], offsets_px: NDArray[np.int64]) -> None:
    """Refuse windows that leave their patch; slicing would only make them smaller."""
    rows, cols = patches.shape[1:3]
    outside = (offsets_px < 0).any(axis=1) | (offsets_px + side > (cols, rows)).any(axis=1)
    if outside.any():
        raise WsiflowError(
            f"the window of {side} px at {offsets_px[outside][0].tolist()} leaves its patch of {cols} x {rows} px",
            "window, tile and halo do not fit together: please report this",
            stage="predict",
        )


def _finite(found: NDArray[np.float32], offsets_px: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the probabilities when all of them are finite."""
    bad = np.argwhere(~np.isfinite(found))
    if bad.size:
        patch, window = bad[0]
        raise not_finite(f"the window at {offsets_px[window].tolist()} px of patch {patch}")
    return found
