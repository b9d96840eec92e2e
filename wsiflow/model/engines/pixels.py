"""Modules from pixels to scores: the normalisation of a classifier's card is part of the graph, so pixels stay 8 bit.

Input: uint8 (n, h, w, 3), RGB. Output: what the module behind the normalisation gives.
"""

import torch
from torch import nn

from wsiflow.model.classifier import Classifier


class FromPixels(nn.Module):
    """Pixels, normalised as the classifier's card says, then another module."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, classifier: Classifier, body: nn.Module) -> None:
        """Take the module behind the normalisation: float32 (n, 3, h, w) to anything."""
        super().__init__()
        self.body = body
        self.side = classifier.input_px if classifier.input_px != classifier.window_px else None
        self.register_buffer("mean", torch.tensor(classifier.mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(classifier.std).view(1, 3, 1, 1) * 255)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return what the body makes of pixels, uint8 (n, h, w, 3)."""
        x = pixels.permute(0, 3, 1, 2)
        if self.side is not None:
            x = nn.functional.interpolate(x, size=[self.side, self.side], mode="bilinear", antialias=True)
        result: torch.Tensor = self.body((x.float() - self.mean) / self.std)
        return result


class WindowScores(nn.Module):
    """Normalised windows, float32 (n, 3, side, side), to the probability of the positive class, float32 (n,)."""

    def __init__(self, classifier: Classifier) -> None:
        """Take the classifier's network and the index of its positive class."""
        super().__init__()
        self.network, self.positive_index = classifier.module, classifier.positive_index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the probability of the positive class for each window."""
        # In 32 bit whatever the network runs in: a bfloat16 probability near one is a multiple of 1/256.
        return torch.softmax(self.network(x).float(), dim=1)[:, self.positive_index]
