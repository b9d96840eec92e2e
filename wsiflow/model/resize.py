"""Windows resized to the side that a network takes, in one of the two ways in which networks are trained.

Input: windows, uint8 (n, side, side, 3). Output: uint8 of another side. Both ways are bilinear with antialiasing, first
along rows, then along columns, and round to 8 bits after each. They differ by a grey level in about one of a thousand
pixels, because PyTorch's weights have 15 bits, and Pillow's 22. Windows are resized before a backend sees them, so that
all backends and precisions get the same pixels.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from wsiflow.model.card import Resize


def resize(images: NDArray[np.uint8], side: int, how: Resize) -> NDArray[np.uint8]:
    """Return images of another size.

    Args:
        images: uint8 (n, h, w, 3).
        side: Height and width of the result, px.
        how: ``torch``: as PyTorch resizes tensors of 8 bits; ``pillow``: as Pillow resizes images.

    Returns:
        uint8 (n, side, side, 3).
    """
    if how == "pillow":
        resized = [Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR) for image in images]
        return np.array(resized, np.uint8).reshape(-1, side, side, 3)
    # torch.tensor copies, so read-only arrays and views of patches are accepted too.
    pixels = torch.tensor(images).permute(0, 3, 1, 2)
    smaller = nn.functional.interpolate(pixels, size=[side, side], mode="bilinear", antialias=True)
    return np.ascontiguousarray(smaller.permute(0, 2, 3, 1).numpy())
