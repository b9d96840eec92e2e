"""Folders of Hugging Face on disk: which weights they hold, for which network, and what else their files say.

Nothing is fetched. A folder that timm wrote names a network of timm. A folder that transformers wrote becomes a program
of torch.export, for which that package is needed once.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from wsiflow.errors import InputError
from wsiflow.model import transformers
from wsiflow.model.card import EXPORT
from wsiflow.model.formats.state_dict import tensors

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_BILINEAR = 2  # the number of Pillow
_AGAIN = "fetch the folder again"


class Folder(NamedTuple):
    """What a folder holds.

    Attributes:
        weights: The file of the weights.
        architecture: What the card has as its architecture.
        known: The fields of the card that the folder gives.
        convert: Returns the program for images of a side, px, that is written in place of the weights; or None.
    """

    weights: Path
    architecture: str
    known: dict[str, Any]
    convert: Callable[[int], bytes] | None


def read_folder(folder: Path) -> Folder:
    """Return what a folder holds.

    Args:
        folder: A folder with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``.

    Raises:
        InputError: The folder does not hold them, or its network is not an image classifier of timm or transformers.
        EnvironmentFault: The folder is of transformers, which is not installed.
    """
    config = _json(folder / "config.json")
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None or not config:
        raise InputError(
            f"the folder holds no model: neither torchscript_model.pt, nor config.json with {' or '.join(_WEIGHTS)}",
            "name the file of the weights",
            path=folder,
        )
    if "architecture" in config:
        return Folder(weights, f"timm:{config['architecture']}", _timm_fields(config), None)
    name = next(iter(config.get("architectures") or ["an unknown network"]))
    if not transformers.is_classifier(str(config.get("model_type")), name):
        raise InputError(
            f"the folder holds {name}, which is not an image classifier of timm or transformers",
            "export it once with torch.export, or load it in Python and use wsiflow.model.from_module",
            path=folder,
        )
    fields = _transformers_fields(config, folder)
    return Folder(weights, EXPORT, fields, partial(_program, config, weights))


def _program(config: dict[str, Any], weights: Path, side: int) -> bytes:
    """Return the network of a folder of transformers as a program."""
    try:
        return transformers.program(config, tensors(weights.read_bytes(), weights), side)
    except InputError as error:
        raise error.about(path=weights) from error


def _timm_fields(config: dict[str, Any]) -> dict[str, Any]:
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


def _transformers_fields(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the fields of a model card that the files of transformers give."""
    processor = _json(folder / "preprocessor_config.json") or _json(folder / "processor_config.json").get(
        "image_processor", {}
    )
    if processor.get("do_flip_channel_order"):
        raise InputError("the network takes channels in the order blue, green, red", "export one for RGB", path=folder)
    labels = config.get("id2label") or {}
    side = _side(processor, folder) or config.get("image_size")
    is_multi_label = config.get("problem_type") == "multi_label_classification"
    is_bilinear = processor.get("resample", _BILINEAR) == _BILINEAR
    fields = {
        "class_names": [str(labels[key]) for key in sorted(labels, key=int)],
        "window_px": side,
        "input_px": side,
        "output": "sigmoid" if is_multi_label else "logits",
        "notes": "" if is_bilinear else "trained on images resized otherwise than bilinearly, as windows are here",
        **_normalisation(processor),
    }
    return {name: value for name, value in fields.items() if value}


def _side(processor: dict[str, Any], folder: Path) -> int | None:
    """Return the side of images, px, that a preprocessing ends with; None where it does not say."""
    size = processor.get("crop_size") if processor.get("do_center_crop") else None
    size = size or processor.get("size")
    sides = [int(side) for side in (size.values() if isinstance(size, dict) else [size] if size else [])]
    if len(set(sides)) > 1:
        raise InputError(f"the network takes images of {size}", "export one for square windows", path=folder)
    return sides[0] if sides else None


def _normalisation(processor: dict[str, Any]) -> dict[str, Any]:
    """Return mean and std on a scale of 0 to 1.

    Transformers computes (factor * x - offset - mean) / std for values x of 0 to 255.
    """
    if not processor:
        return {}
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not processor.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    if not mean or not std:
        return {}
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    offset = 1.0 if processor.get("rescale_offset") else 0.0
    scale = factor * 255
    if abs(scale - 1) < 1e-6:  # 1 / 255 as written in decimals
        scale = 1.0
    return {"mean": [(value + offset) / scale for value in mean], "std": [value / scale for value in std]}


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one where there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"the file cannot be read: {error}", _AGAIN, path=path) from error
    return content if isinstance(content, dict) else {}
