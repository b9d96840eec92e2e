"""A small network without padding and with a window of 96 px, the size of a PatchCamelyon patch.

Input: float32 (n, 3, h, w), normalised by the mean and std of its card; h and w are 96 plus a multiple of 8.
Output: logits (n, n_classes).

As in `wsiflow.model.architectures.inception`, no layer pads, and every layer divides its map without a remainder. The
map of a large block therefore contains, at every 8 px, the logits of the 96 px window there, except for float rounding:

    layer      kernel/stride   map side   stride px   receptive field px
    conv1, 24      4/2            47          2               4
    conv2, 32      3/1            45          2               8
    pool1          3/2            22          4              12
    conv3, 48      3/1            20          4              20
    conv4, 64      3/1            18          4              28
    pool2          2/2             9          8              32
    conv5, 96      3/1             7          8              48
    conv6, 96      3/1             5          8              64
    conv7, 96      3/1             3          8              80
    mean of 3 x 3                  1                         96
"""

from collections import OrderedDict

from torch import nn

from wsiflow.model.architectures.architecture import Architecture
from wsiflow.model.architectures.valid import ValidNetwork, conv, scaled

_BEFORE_POOL_1 = ((24, 4, 2), (32, 3, 1))
_BEFORE_POOL_2 = ((48, 3, 1), (64, 3, 1))
_LAST = ((96, 3, 1), (96, 3, 1), (96, 3, 1))
_POOLS = {len(_BEFORE_POOL_1): (3, 2), len(_BEFORE_POOL_1 + _BEFORE_POOL_2): (2, 2)}


def compact_valid(n_classes: int, *, width: float, dropout: float) -> ValidNetwork:
    """Return the network with random weights.

    With two classes and width 1: 271,826 parameters and 0.037 GMAC for each 96 px window.

    Args:
        n_classes: Number of classes.
        width: Factor on every number of channels, above 0; each becomes a multiple of 8.
        dropout: Share of the features dropped while training, 0 to 1.

    Raises:
        ValueError: The width is not above 0.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for number, (channels_out, kernel, stride) in enumerate(_BEFORE_POOL_1 + _BEFORE_POOL_2 + _LAST):
        if number in _POOLS:
            layers[f"pool{len(layers) - number + 1}"] = nn.MaxPool2d(*_POOLS[number])
        layers[f"conv{number + 1}"] = conv(channels, scaled(channels_out, width), kernel, stride)
        channels = scaled(channels_out, width)
    return ValidNetwork(layers, channels, n_classes, dropout=dropout)


ARCHITECTURE = Architecture("compact_valid", compact_valid)
