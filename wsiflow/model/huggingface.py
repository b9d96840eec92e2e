"""Folders of Hugging Face on disk: which weights they hold, for which network, and what else their files say.

Nothing is fetched. A folder that timm wrote names a network of timm; of other folders the network is read from the
weights' own names only where timm has it.
"""

import json
from pathlib import Path
from typing import Any

from wsiflow.errors import InputError

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def read_folder(folder: Path) -> tuple[Path, str, dict[str, Any]]:
    """Return the weights of a folder, the architecture for the card, and the fields of the card that the folder gives.

    Args:
        folder: A folder with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``.

    Raises:
        InputError: The folder does not hold them, or its network is not one of timm.
    """
    config = _json(folder / "config.json")
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None or not config:
        raise InputError(
            f"the folder holds no model: neither torchscript_model.pt, nor config.json with {' or '.join(_WEIGHTS)}",
            "name the file of the weights",
            path=folder,
        )
    if "architecture" not in config:
        kinds = config.get("architectures") or ["unknown"]
        raise InputError(
            f"the folder holds {kinds[0]}, which is not a network of timm",
            "export it once with torch.export, or load it in Python and use wsiflow.model.from_module",
            path=folder,
        )
    return weights, f"timm:{config['architecture']}", _fields(config)


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a model card that timm's configuration gives."""
    preprocessing = config.get("pretrained_cfg") or config
    names = config.get("label_names") or preprocessing.get("label_names")
    size = preprocessing.get("input_size")
    fields = {
        "class_names": names,
        "mean": preprocessing.get("mean"),
        "std": preprocessing.get("std"),
        "input_px": size[-1] if size else None,
        "window_px": size[-1] if size else None,
        "architecture_args": config.get("model_args"),
        "licence": preprocessing.get("license"),
    }
    return {name: value for name, value in fields.items() if value}


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one where there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"the file cannot be read: {error}", "fetch the folder again", path=path) from error
    return content if isinstance(content, dict) else {}
