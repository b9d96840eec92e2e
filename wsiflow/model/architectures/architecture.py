"""What an architecture is: one record, declared in the architecture's own file."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn


class Architecture(NamedTuple):
    """An architecture.

    Attributes:
        name: Its name in model cards.
        build: Returns it with random weights, from the number of classes and the card's ``architecture_args`` as
            keywords. Raises TypeError or ValueError where they do not fit.
    """

    name: str
    build: Callable[..., nn.Module]
