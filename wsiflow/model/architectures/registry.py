"""The registry of architectures that a model card may name; apart from TorchScript, no other code is run."""

from typing import Any

from torch import nn

from wsiflow.errors import InputError
from wsiflow.model.architectures import compact, googlenet, inception
from wsiflow.model.architectures.architecture import Architecture

#: The architectures by name, each described in its own file.
ARCHITECTURES: dict[str, Architecture] = {
    each.name: each for each in (compact.ARCHITECTURE, googlenet.ARCHITECTURE, inception.ARCHITECTURE)
}


def build(architecture: str, n_classes: int, **architecture_args: Any) -> nn.Module:
    """Return the named architecture with random weights.

    Args:
        architecture: A key of `ARCHITECTURES`.
        n_classes: Number of classes.
        architecture_args: Further arguments of its builder.

    Raises:
        InputError: The architecture is unknown, or its builder does not accept these arguments.
    """
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"architecture {architecture!r} is unknown",
            f"name one of {sorted(ARCHITECTURES)} in the model card, or register it in {__name__}",
        )
    try:
        return ARCHITECTURES[architecture].build(n_classes, **architecture_args)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"architecture {architecture!r} cannot be built with {architecture_args}: {error}",
            "correct architecture_args in the model card",
        ) from error
