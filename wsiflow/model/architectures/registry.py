"""The architectures that a model card may name: those of wsiflow, of timm and torchvision, and functions of a user.

The names of others have the name of their source in front, as ``timm:resnet50``.
"""

from pathlib import Path
from typing import Any

from torch import nn

from wsiflow.errors import InputError
from wsiflow.model.architectures import compact, function, googlenet, inception, zoo
from wsiflow.model.architectures.architecture import Architecture

#: The architectures by name, each described in its own file.
ARCHITECTURES: dict[str, Architecture] = {
    each.name: each for each in (compact.ARCHITECTURE, googlenet.ARCHITECTURE, inception.ARCHITECTURE)
}


def build(architecture: str, n_outputs: int, *, folder: Path = Path(), **architecture_args: Any) -> nn.Module:
    """Return the named architecture with random weights.

    Args:
        architecture: A key of `ARCHITECTURES`, or ``timm:NAME``, ``torchvision:NAME`` or ``python:MODULE:FUNCTION``.
        n_outputs: Number of outputs, which a function of the user's knows itself.
        folder: Folder of the model card.
        architecture_args: Further arguments of its builder.

    Raises:
        InputError: The architecture is unknown, or its builder does not accept these arguments.
        EnvironmentFault: The package that has the architecture is not installed.
    """
    source, _, name = architecture.partition(":")
    try:
        if source == "timm":
            return zoo.timm(name, n_outputs, **architecture_args)
        if source == "torchvision":
            return zoo.torchvision(name, n_outputs, **architecture_args)
        if source == "python":
            return function.network(name, folder, **architecture_args)
        if architecture in ARCHITECTURES:
            return ARCHITECTURES[architecture].build(n_outputs, **architecture_args)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"architecture {architecture!r} cannot be built with {architecture_args}: {error}",
            "correct architecture, or its arguments (architecture_args in the card, --args name=value,name=value)",
        ) from error
    raise InputError(
        f"architecture {architecture!r} is unknown",
        f"name one of {sorted(ARCHITECTURES)}, timm:NAME, torchvision:NAME or python:MODULE:FUNCTION in the model card",
    )
