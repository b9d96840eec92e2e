"""Where windows lie in the feature map that they share; nothing here imports PyTorch."""

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray


class Crops(NamedTuple):
    """The positions of windows in the feature map of a shared stem.

    Attributes:
        step: Distance between neighbouring windows, cells.
        every: Distance between neighbouring features of one window, cells.
        side: Number of features of a window along an axis.
        first: Number of cells before the first window.
    """

    step: int
    every: int
    side: int
    first: int


def window_crops(features: NDArray[np.float32], crops: Crops) -> NDArray[np.float32]:
    """Return the features of every window, the input of the tail, as a view without copies.

    Args:
        features: float32 (n, channels, y, x), the output of a stem.
        crops: Positions of the windows in it.

    Returns:
        float32 (n, rows, cols, channels, side, side), read-only.
    """
    reach = (crops.side - 1) * crops.every + 1
    inside = slice(crops.first, -crops.first or None)
    view = sliding_window_view(features[:, :, inside, inside], (reach, reach), axis=(2, 3))
    return np.moveaxis(view[:, :, :: crops.step, :: crops.step, :: crops.every, :: crops.every], 1, 3)
