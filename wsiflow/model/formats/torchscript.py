"""TorchScript, a program that its author exported, and that can do anything: it runs only where settings trust it."""

import io
from pathlib import Path

import torch
from torch import nn

from wsiflow.errors import InputError
from wsiflow.model.card import TORCHSCRIPT, ModelCard
from wsiflow.model.formats.format import Format


def read(data: bytes, _card: ModelCard, path: Path) -> nn.Module:
    """Return the program in a TorchScript file.

    Raises:
        InputError: The file is not TorchScript.
    """
    try:
        module: nn.Module = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the file is not TorchScript: {str(error)[:200]}", "save the model with torch.jit.save", path=path
        ) from error
    return module


FORMAT = Format(TORCHSCRIPT, read)
