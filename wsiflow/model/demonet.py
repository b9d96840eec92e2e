"""The demo network: small, padding-free, made to be right at every position of a large map.

Input: float32 (n, 3, h, w), normalised as its card says, h and w = 224 + a multiple of 16.
Output: logits (n, n_classes).

No layer pads, so a value of the feature map depends on its own receptive field and on nothing else: the map of a large
block holds, at every 16 px, exactly what a 224 px window placed there would have given. Sizes divide at every layer,
so no row or column of a window is dropped:

    layer          kernel/stride   map side   stride px   receptive field px
    conv, 16             8/4          55          4               8
    conv, 32             3/1          53          4              16
    max pool             3/2          26          8              24
    conv, 32             3/1          24          8              40
    conv, 64             3/1          22          8              56
    max pool             2/2          11         16              64
    conv, 64             3/1           9         16              96
    conv, 128            3/1           7         16             128
    mean of 7 x 7                      1                        224

The mean over the 7 x 7 map sees 128 + 6 * 16 = 224 px: the whole window and nothing beyond it.
"""

import torch
from torch import nn


def _conv(channels_in: int, channels_out: int, kernel: int, stride: int) -> list[nn.Module]:
    """Return a valid convolution, its batch norm and a ReLU."""
    return [
        nn.Conv2d(channels_in, channels_out, kernel, stride, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    ]


class DemoNet(nn.Module):
    """146 thousand parameters and 43 MMAC for each 224 px window."""

    def __init__(self, n_classes: int, *, dropout: float) -> None:
        """Build the network with random weights.

        Args:
            n_classes: Number of classes.
            dropout: Share of the 128 features dropped while training, 0 to 1.
        """
        super().__init__()
        self.features = nn.Sequential(
            *_conv(3, 16, 8, 4),
            *_conv(16, 32, 3, 1),
            nn.MaxPool2d(3, 2),
            *_conv(32, 32, 3, 1),
            *_conv(32, 64, 3, 1),
            nn.MaxPool2d(2, 2),
            *_conv(64, 64, 3, 1),
            *_conv(64, 128, 3, 1),
        )
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(128, n_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits (n, n_classes) of images (n, 3, h, w): of 224 px windows, where h = w = 224."""
        pooled = self.features(x).mean(dim=(2, 3))
        logits: torch.Tensor = self.classify(self.dropout(pooled))
        return logits
