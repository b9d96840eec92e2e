"""Modules from pixels to scores, whose graph includes the normalisation, so that their input has 8 bits per channel.

Input: uint8 (n, h, w, 3), RGB. Output: that of the module behind the normalisation.
"""

import torch
from torch import nn

from wsiflow.model.classifier import Classifier


class FromPixels(nn.Module):
    """The normalisation of a classifier, followed by another module."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, classifier: Classifier, body: nn.Module) -> None:
        """Build the module.

        Args:
            classifier: The classifier, which defines the normalisation.
            body: Module behind the normalisation, from float32 (n, 3, h, w) to any output.
        """
        super().__init__()
        self.body = body
        self.register_buffer("mean", torch.tensor(classifier.mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(classifier.std).view(1, 3, 1, 1) * 255)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the output of the body for pixels, uint8 (n, h, w, 3)."""
        x = pixels.permute(0, 3, 1, 2).float()
        result: torch.Tensor = self.body((x - self.mean) / self.std)
        return result


class WindowScores(nn.Module):
    """The network of a classifier and the meaning of its outputs, from normalised windows to scores."""

    def __init__(self, classifier: Classifier) -> None:
        """Build the module from the classifier's network and the meaning of its outputs."""
        super().__init__()
        self.network, self.outputs = classifier.module, classifier.outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the score, float32 (n,), of windows, float32 (n, 3, side, side)."""
        return self.outputs.scores(self.network(x))
