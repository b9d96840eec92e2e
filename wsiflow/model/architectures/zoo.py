"""Architectures of timm and torchvision, which the extra ``wsiflow[zoo]`` installs; no weights are fetched."""

import difflib
import importlib
from typing import Any

from torch import nn

from wsiflow.errors import EnvironmentFault

_SHOWN = 3


def timm(name: str, n_outputs: int, **arguments: Any) -> nn.Module:
    """Return a network of timm with random weights.

    Args:
        name: Its name there, as ``resnet50``.
        n_outputs: Number of outputs.
        arguments: Further arguments of ``timm.create_model``.

    Raises:
        ValueError: timm does not know the name, or it is that of a network elsewhere.
        EnvironmentFault: timm is not installed.
    """
    if ":" in name:
        raise ValueError("nothing is fetched; download its folder, and give that to wsiflow model add")
    library = _library("timm")
    try:
        module: nn.Module = library.create_model(name, **{"num_classes": n_outputs, "pretrained": False} | arguments)
    except RuntimeError as error:  # timm says so when it does not know a name
        raise ValueError(f"{error}{_alike(name, library.list_models())}") from error
    return module


def torchvision(name: str, n_outputs: int, **arguments: Any) -> nn.Module:
    """Return a network of torchvision with random weights; arguments and errors as for `timm`."""
    models = _library("torchvision").models
    if name not in models.list_models():
        raise ValueError(f"torchvision has no {name}{_alike(name, models.list_models())}")
    module: nn.Module = models.get_model(name, **{"num_classes": n_outputs, "weights": None} | arguments)
    return module


def _alike(name: str, names: list[str]) -> str:
    """Return a part of a message that suggests names: the shortest that contain one, or else the nearest to it."""
    containing = sorted((each for each in names if name in each), key=len)
    alike = containing[:_SHOWN] or difflib.get_close_matches(name, names, _SHOWN)
    return f"; it has {', '.join(alike)}" if alike else ""


def _library(name: str) -> Any:
    """Return a library.

    Raises:
        EnvironmentFault: It is not installed, or does not go with the installed PyTorch.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        raise EnvironmentFault(
            f"the package {name} cannot be used: {error}",
            "pip install 'wsiflow[zoo]' -c <(pip freeze --exclude-editable) --extra-index-url "
            "https://download.pytorch.org/whl/cpu, which keeps the installed PyTorch and takes its torchvision",
        ) from error
