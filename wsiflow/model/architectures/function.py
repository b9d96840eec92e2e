"""Networks that a function of the user's builds; it is code, and runs only where the settings trust it.

A card names it as ``python:package.module:function``, a module that Python finds, or as ``python:file.py:function``, a
file in the folder of the card. The card has the SHA-256 of the source, which is part of the model's identity.
"""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from torch import nn

from wsiflow.errors import InputError


def source_path(name: str, folder: Path) -> Path:
    """Return the path of the source file of ``module:function``.

    Args:
        name: What stands behind ``python:`` in the card.
        folder: The folder of the card.

    Raises:
        InputError: There is no such module or file.
    """
    module, _, function = name.partition(":")
    if not module or not function.isidentifier():
        raise InputError(f"architecture 'python:{name}' is not python:module:function", "correct it in the model card")
    if module.endswith(".py"):
        path = folder / module
        if Path(module).name == module and path.is_file():
            return path
        raise InputError(
            f"there is no file {module} beside the model card", "put it there, or name a module", path=path
        )
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.origin:
        raise InputError(
            f"Python does not find the module {module}",
            "install its package, or put its folder into PYTHONPATH, on every machine that runs tasks",
        )
    return Path(found.origin)


def source_sha256(name: str, folder: Path) -> str:
    """Return the SHA-256 of the source file; arguments and errors as for `source_path`."""
    return hashlib.sha256(source_path(name, folder).read_bytes()).hexdigest()


def network(name: str, folder: Path, **arguments: Any) -> nn.Module:
    """Return what the function returns for the card's ``architecture_args``.

    Args:
        name: What stands behind ``python:`` in the card.
        folder: The folder of the card.
        arguments: Arguments of the function.

    Raises:
        InputError: There is no such function, or it does not return a network.
        TypeError: The function does not take these arguments.
    """
    path = source_path(name, folder)
    module_name, _, function = name.partition(":")
    if module_name.endswith(".py"):
        found = importlib.util.spec_from_file_location(path.stem, path)
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules.setdefault(path.stem, module)
        found.loader.exec_module(module)
    else:
        module = importlib.import_module(module_name)
    if not hasattr(module, function):
        raise InputError(f"{path.name} has no function {function}", "correct architecture in the model card", path=path)
    built = getattr(module, function)(**arguments)
    if not isinstance(built, nn.Module):
        raise InputError(f"{function} returns a {type(built).__name__}, not a torch.nn.Module", "correct it", path=path)
    return built
