"""An Inception network without padding, whose logits for a window do not depend on the surroundings of the window.

Input: float32 (n, 3, h, w), normalised by the mean and std of its card; h and w are 224 plus a multiple of 16.
Output: logits (n, n_classes).

The blocks have the numbers of channels of GoogLeNet, but no layer pads. A value of the feature map depends only on its
receptive field, so the map of a large block contains, at every 16 px, the logits of the 224 px window there, except for
float rounding. Every layer divides its map without a remainder, so no row or column of a window is dropped:

    layer          kernel/stride   map side   stride px   receptive field px
    conv1, 64            6/2         110          2               6
    pool1                2/2          55          4               8
    conv2a, 64           1/1          55          4               8
    conv2b, 192          3/1          53          4              16
    pool2                3/2          26          8              24
    3a, 256              3/1          24          8              40
    3b, 480              3/1          22          8              56
    pool3                2/2          11         16              64
    4a, 512              3/1           9         16              96
    4b, 512              3/1           7         16             128
    4c, 512              3/1           5         16             160
    4d, 528              3/1           3         16             192
    mean of 3 x 3                      1                        224

The receptive field of the mean over the 3 x 3 map is 192 + 2 * 16 = 224 px: exactly the window. A first layer of 7 x 7,
as in GoogLeNet, would drop a row and a column, because 224 - 7 is odd.
"""

from collections import OrderedDict

import torch
from torch import nn

from wsiflow.model.architectures.architecture import Architecture
from wsiflow.model.architectures.valid import ValidNetwork, conv, scaled

# Widths of a block: 1x1 | 1x1 -> 3x3 | 1x1 -> 3x3 | pool -> 1x1.
Widths = tuple[int, int, int, int, int, int]

_STEM = (64, 64, 192)
_STAGE_3: dict[str, Widths] = {"3a": (64, 96, 128, 16, 32, 32), "3b": (128, 128, 192, 32, 96, 64)}
_STAGE_4: dict[str, Widths] = {
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
}


class InceptionBlock(nn.Module):
    """Four branches with 3 x 3 kernels and no padding, concatenated; the output is one place smaller on each side."""

    def __init__(self, channels_in: int, widths: Widths) -> None:
        """Build the branches.

        Args:
            channels_in: Number of channels of the input.
            widths: Numbers of channels: 1x1; 1x1 and 3x3; 1x1 and second 3x3; 1x1 after the pool.
        """
        super().__init__()
        one, reduce_a, three_a, reduce_b, three_b, pooled = widths
        self.branch_0 = conv(channels_in, one, 1)
        self.branch_1 = nn.Sequential(conv(channels_in, reduce_a, 1), conv(reduce_a, three_a, 3))
        self.branch_2 = nn.Sequential(conv(channels_in, reduce_b, 1), conv(reduce_b, three_b, 3))
        self.branch_3 = nn.Sequential(nn.MaxPool2d(3, 1), conv(channels_in, pooled, 1))
        self.channels_out = one + three_a + three_b + pooled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (n, channels_out, h - 2, w - 2) from (n, channels_in, h, w)."""
        # The 1 x 1 branch is cropped to the places of the 3 x 3 branches.
        centre = x[:, :, 1:-1, 1:-1]
        return torch.cat([self.branch_0(centre), self.branch_1(x), self.branch_2(x), self.branch_3(x)], dim=1)


def inception_valid(n_classes: int, *, width: float, dropout: float) -> ValidNetwork:
    """Return the network with random weights.

    With two classes and width 1: 2,468,642 parameters and 0.741 GMAC for each 224 px window. As one map of a large
    block, with a logit every 16 px, it takes 1.195 GMAC for each 224 px tile of 196 windows.

    Args:
        n_classes: Number of classes.
        width: Factor on every number of channels, above 0; each becomes a multiple of 8. 1 has GoogLeNet's widths.
        dropout: Share of the features dropped while training, 0 to 1.

    Raises:
        ValueError: The width is not above 0.
    """
    one, two, three = (scaled(channels, width) for channels in _STEM)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=conv(3, one, 6, 2),
        pool1=nn.MaxPool2d(2, 2),
        conv2a=conv(one, two, 1),
        conv2b=conv(two, three, 3),
        pool2=nn.MaxPool2d(3, 2),
    )
    channels = _append(layers, three, _STAGE_3, width)
    layers["pool3"] = nn.MaxPool2d(2, 2)
    channels = _append(layers, channels, _STAGE_4, width)
    return ValidNetwork(layers, channels, n_classes, dropout=dropout)


def _append(layers: OrderedDict[str, nn.Module], channels_in: int, blocks: dict[str, Widths], width: float) -> int:
    """Append a sequence of blocks to the layers, and return the number of channels of the last one."""
    for name, widths in blocks.items():
        one, reduce_a, three_a, reduce_b, three_b, pooled = (scaled(channels, width) for channels in widths)
        block = InceptionBlock(channels_in, (one, reduce_a, three_a, reduce_b, three_b, pooled))
        layers[f"inception_{name}"] = block
        channels_in = block.channels_out
    return channels_in


ARCHITECTURE = Architecture("inception_valid", inception_valid)
