"""GoogLeNet (Inception v1) in the variant of TF-slim, which the reference system trained.

Input: float32 (n, 3, h, w), normalised by the mean and std of its card; h and w are multiples of 32 (224 in the
reference). Output: logits (n, n_classes).

The network differs from that of the paper: the "5x5" branches are 3 x 3, convolutions have neither bias nor batch norm,
the last pool is 2 x 2, and there is no local response normalisation and no auxiliary head.

Padding is TensorFlow's SAME, so that weights trained there give the same results here. It is symmetric with stride 1
and an odd kernel, but not with stride 2 and an even side: of the k - 2 padded rows or columns the smaller half is in
front (top, left). The 7 x 7 convolution therefore pads 2 in front and 3 behind, and the 3 x 3 pools pad 0 and 1. For
the pools PyTorch's ``ceil_mode`` has this effect, and like TensorFlow it ignores the places outside.
"""

import torch
from torch import nn

from wsiflow.model.architectures.architecture import Architecture

# Widths of a block: 1x1 | 1x1 -> 3x3 | 1x1 -> 3x3 (the "5x5") | pool -> 1x1.
_BLOCKS_28 = ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64))
_BLOCKS_14 = (
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
)
_BLOCKS_7 = ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128))


def _conv(channels_in: int, channels_out: int, kernel: int) -> nn.Sequential:
    """Return a convolution with stride 1 that keeps the size of the map, followed by a ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False), nn.ReLU(inplace=True)
    )


class Inception(nn.Module):
    """An Inception block: four branches over one map, concatenated along the channels."""

    def __init__(self, channels_in: int, widths: tuple[int, int, int, int, int, int]) -> None:
        """Build the branches.

        Args:
            channels_in: Number of channels of the input.
            widths: Numbers of channels: 1x1; 1x1 and 3x3; 1x1 and second 3x3; 1x1 after the pool.
        """
        super().__init__()
        one, reduce_a, three_a, reduce_b, three_b, pooled = widths
        self.branch_0 = _conv(channels_in, one, 1)
        self.branch_1 = nn.Sequential(_conv(channels_in, reduce_a, 1), _conv(reduce_a, three_a, 3))
        self.branch_2 = nn.Sequential(_conv(channels_in, reduce_b, 1), _conv(reduce_b, three_b, 3))
        self.branch_3 = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), _conv(channels_in, pooled, 1))
        self.channels_out = one + three_a + three_b + pooled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (n, channels_out, h, w) from (n, channels_in, h, w)."""
        return torch.cat([self.branch_0(x), self.branch_1(x), self.branch_2(x), self.branch_3(x)], dim=1)


def _stage(channels_in: int, blocks: tuple[tuple[int, int, int, int, int, int], ...]) -> nn.Sequential:
    """Return the sequence of blocks between two pools."""
    stage = nn.Sequential()
    for widths in blocks:
        block = Inception(channels_in, widths)
        stage.append(block)
        channels_in = block.channels_out
    return stage


class GoogLeNet(nn.Module):
    """The network; with two classes it has 5,587,394 parameters and needs 1.497 GMAC for a 224 px window."""

    def __init__(self, n_classes: int, *, dropout: float) -> None:
        """Build the network with random weights.

        Args:
            n_classes: Number of classes, 2 in the reference.
            dropout: Fraction of the 1,024 features that are dropped in training, 0 to 1; 0.5 in the reference.
        """
        super().__init__()
        # These are the names in the paper's table; settings name the layer up to which windows share the network.
        self.features = nn.Sequential()
        for name, layer in {
            "conv1": nn.Sequential(
                nn.ZeroPad2d((2, 3, 2, 3)), nn.Conv2d(3, 64, 7, stride=2, bias=False), nn.ReLU(inplace=True)
            ),
            "pool1": nn.MaxPool2d(3, 2, ceil_mode=True),
            "conv2": _conv(64, 64, 1),
            "conv3": _conv(64, 192, 3),
            "pool2": nn.MaxPool2d(3, 2, ceil_mode=True),
            "stage3": _stage(192, _BLOCKS_28),
            "pool3": nn.MaxPool2d(3, 2, ceil_mode=True),
            "stage4": _stage(480, _BLOCKS_14),
            "pool4": nn.MaxPool2d(2, 2),
            "stage5": _stage(832, _BLOCKS_7),
        }.items():
            self.features.add_module(name, layer)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Conv2d(1024, n_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits (n, n_classes) of windows (n, 3, h, w); h and w are multiples of 32."""
        pooled = self.features(x).mean(dim=(2, 3), keepdim=True)
        logits: torch.Tensor = self.classify(self.dropout(pooled)).flatten(1)
        return logits


ARCHITECTURE = Architecture("googlenet", GoogLeNet)
