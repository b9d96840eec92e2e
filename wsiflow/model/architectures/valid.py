"""What networks without padding are made of: valid convolutions, a mean over the map, a linear layer."""

from collections import OrderedDict

import torch
from torch import nn


def scaled(channels: int, width: float) -> int:
    """Return a number of channels times the width, to the nearest multiple of 8 (halves up), at least 8.

    Raises:
        ValueError: The width is not above 0.
    """
    if not width > 0:
        raise ValueError(f"width is {width}, but must be above 0")
    return max(8, 8 * int(channels * width / 8 + 0.5))


def conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return a valid convolution, its batch norm and a ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class ValidNetwork(nn.Module):
    """Layers without padding, and a linear layer on the mean of the map that they leave of a window."""

    def __init__(self, layers: OrderedDict[str, nn.Module], channels: int, n_classes: int, *, dropout: float) -> None:
        """Take the layers and add the last one, with random weights.

        Args:
            layers: The layers by name, each fed by the one before.
            channels: Channels of the map that they leave.
            n_classes: Number of classes.
            dropout: Share of the features dropped while training, 0 to 1.
        """
        super().__init__()
        self.features = nn.Sequential(layers)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(channels, n_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits (n, n_classes) of images (n, 3, h, w), each the size of a window."""
        pooled = self.features(x).mean(dim=(2, 3))
        logits: torch.Tensor = self.classify(self.dropout(pooled))
        return logits
