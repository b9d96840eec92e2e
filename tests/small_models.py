"""Small networks and their cards, for tests that load, add or run them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from wsiflow.model.card import ModelSpec
from wsiflow.model.classifier import probe_image


def spec(card: Path, **changes: Any) -> ModelSpec:
    """Return the settings that use a card and trust no code."""
    return ModelSpec(**({"card": card, "trust_torchscript": False, "sha256": "", "positive_class": ""} | changes))


def windows(n: int, side: int) -> np.ndarray:
    """Return images, uint8 (n, side, side, 3)."""
    return np.stack([probe_image(1000 + seed, side) for seed in range(n)])


def with_statistics(network: nn.Module, side: int) -> nn.Module:
    """Set the statistics of a network's norms by one pass: without it random layers give the same for every image."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    network.train()(torch.from_numpy(windows(4, side)).permute(0, 3, 1, 2) / 64 - 2)
    return network.eval()
