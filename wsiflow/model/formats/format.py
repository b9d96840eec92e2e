"""What a format of weights files is: one record, declared in the format's own file."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from wsiflow.model.card import ModelCard


class Format(NamedTuple):
    """A format.

    Attributes:
        name: What a model card has as its ``architecture``, where a file of this format holds the network as well.
        read: Returns the network of a file, from (n, 3, input_px, input_px) to whatever it returns, given the file's
            bytes, the card, and the path of the file for messages. Raises InputError where the file is damaged, is of
            another format, or holds a network that cannot be run here.
    """

    name: str
    read: Callable[[bytes, ModelCard, Path], nn.Module]
