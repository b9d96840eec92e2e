"""The architectures a model card may name. Code comes from here and from nowhere else."""

from collections.abc import Callable
from typing import Any

from torch import nn

from wsiflow.model.demonet import DemoNet
from wsiflow.model.googlenet import GoogLeNet

# A builder takes the number of classes and the card's architecture_args as keywords.
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"demonet": DemoNet, "googlenet": GoogLeNet}


def build(architecture: str, n_classes: int, **architecture_args: Any) -> nn.Module:
    """Return the named architecture with random weights.

    Args:
        architecture: A key of `ARCHITECTURES`.
        n_classes: Number of classes.
        architecture_args: What its builder takes besides.

    Raises:
        KeyError: There is no such architecture.
        TypeError: The builder does not take these arguments.
    """
    return ARCHITECTURES[architecture](n_classes, **architecture_args)
