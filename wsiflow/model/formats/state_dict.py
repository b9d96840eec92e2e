"""Weights alone, for a network that is built here: safetensors, or a file of ``torch.save`` that holds no code.

Such a file of ``torch.save`` is a pickle, and is read with the loader of PyTorch that knows tensors, numbers, texts and
lists of them, and nothing else. A checkpoint of Lightning or fastai, or of a training script, holds the weights under
one of its keys, and their names may have a prefix, as ``module.`` of a network that was trained on several GPUs.
"""

import io
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from wsiflow.errors import InputError
from wsiflow.model.architectures.function import source_sha256
from wsiflow.model.architectures.registry import build
from wsiflow.model.card import PYTHON, ModelCard
from wsiflow.model.formats.format import Format

# Keys under which training scripts and libraries keep the weights of a checkpoint, the most specific ones first.
_KEYS = ("state_dict", "model_state_dict", "state_dict_ema", "model_ema", "model", "net", "network", "weights")
_HEADER_BYTES = 8  # the length of a safetensors header, before the header, which is JSON
_SHOWN = 3


def read(data: bytes, card: ModelCard, path: Path) -> nn.Module:
    """Return the network that a card names, with the weights of a file.

    Raises:
        InputError: The architecture is unknown, the file is not one of weights alone, or its weights do not fit.
        EnvironmentFault: The package that builds the architecture is not installed.
    """
    if card.architecture.startswith(PYTHON):
        _check_source(card, path)
    weights = tensors(data, path)
    n_classes = len(card.class_names)
    remedy = "correct architecture, architecture_args or class_names in the card (--architecture, --args, --classes)"
    problems = []
    for n_outputs in (2, 1) if n_classes == 2 else (n_classes,):  # one output is the second of two classes
        module = build(card.architecture, n_outputs, folder=path.parent, **card.architecture_args)
        problem = _loaded(module, weights)
        if not problem and (n_outputs == n_classes or card.output != "logits"):
            return module
        if not problem:
            remedy = (
                "it has one output, of the second class: say that it is a sigmoid (output in the card, --output of "
                "wsiflow model add), or probabilities where the network ends with one"
            )
        problems.append(problem)
    raise InputError(
        f"the weights do not fit {card.architecture} with {n_classes} classes: {problems[0]}", remedy, path=path
    )


def _check_source(card: ModelCard, path: Path) -> None:
    """Refuse a function whose source is not the one for which the card was written."""
    name = card.architecture.removeprefix(PYTHON)
    sha256 = source_sha256(name, path.parent)
    if sha256 != card.source_sha256:
        raise InputError(
            f"the source of {name} has SHA-256 {sha256}, but the card expects {card.source_sha256}",
            "bring back the source for which the card was written, or add the model again",
            path=path,
        )


def tensors(data: bytes, path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a file by their names.

    Raises:
        InputError: The file is damaged, or holds more than weights.
    """
    if data[_HEADER_BYTES : _HEADER_BYTES + 1] == b"{":
        try:
            return dict(safetensors.torch.load(data))
        except safetensors.SafetensorError as error:
            raise InputError(
                f"the weights are not a safetensors file: {error}", "fetch or save them again", path=path
            ) from error
    return _pickled(data, path)


def _pickled(data: bytes, path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a file of ``torch.save``."""
    if not data:
        raise InputError("the file is empty", "fetch or save it again", path=path)
    if zipfile.is_zipfile(io.BytesIO(data)):
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
        if any("/code/" in name for name in names):
            raise InputError(
                "the file is a TorchScript program, not weights alone",
                'name it "torchscript" as architecture',
                path=path,
            )
        if any(name.endswith("archive_format") for name in names):
            raise InputError(
                "the file is a program of torch.export, not weights alone",
                'name it "export" as architecture',
                path=path,
            )
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, OSError) as error:
        reason = str(error).replace("\n", " ")
        if "Unsupported global" in reason or "weights_only" in reason.lower():
            name = reason.partition("GLOBAL ")[2].partition(" ")[0]
            cause = f"the file holds more than weights{f' ({name})' if name else ''}, which could run any code"
            remedy = "save the weights alone: torch.save(model.state_dict(), file), or safetensors"
        else:
            cause, remedy = (
                f"the file is damaged or not one of weights: {_first_sentence(reason)}",
                "fetch or save it again",
            )
        raise InputError(cause, remedy, path=path) from error
    found = next(_state_dicts(content), None)
    if found is None:
        raise InputError(
            f"the file holds a {type(content).__name__} without weights",
            "save the weights alone: torch.save(model.state_dict(), file)",
            path=path,
        )
    return found


def _first_sentence(text: str) -> str:
    """Return the first sentence of a text, of at most 200 characters."""
    return text.partition(". ")[0][:200]


def _state_dicts(content: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the dictionaries of weights in the content of a checkpoint."""
    if not isinstance(content, Mapping):
        return
    weights = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if weights and len(weights) >= len(content) / 2:
        yield weights
    for key in _KEYS:
        yield from _state_dicts(content.get(key))


def _loaded(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> str:
    """Load weights into a network; return why they do not fit, or an empty text."""
    expected = {
        name: tensor for name, tensor in module.state_dict().items() if not name.endswith("num_batches_tracked")
    }
    prefix = _prefix(list(expected), weights)
    renamed = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    missing = [name for name in expected if name not in renamed]
    if missing:
        others = [name for name in renamed if name not in expected]
        instead = f", and the file has {', '.join(others[:_SHOWN])}, ..." if others else ""
        return f"{len(missing)} of {len(expected)} weights are missing ({', '.join(missing[:_SHOWN])}, ...){instead}"
    others = [
        f"{name} is {list(renamed[name].shape)} in the file and {list(tensor.shape)} in the network"
        for name, tensor in expected.items()
        if renamed[name].shape != tensor.shape
    ]
    if others:
        return "; ".join(others[:_SHOWN])
    extra = [name for name in renamed if name not in expected and not name.endswith("num_batches_tracked")]
    if extra and not prefix:
        return f"{len(extra)} weights have no place in the network ({', '.join(extra[:_SHOWN])}, ...)"
    own = module.state_dict()  # which has the versions of its layers too
    own.update({name: renamed[name] for name in own if name in renamed})
    module.load_state_dict(own)
    return ""


def _prefix(expected: list[str], weights: Mapping[str, torch.Tensor]) -> str:
    """Return the prefix of the names in a file under which most of the expected weights are found."""
    first = expected[0] if expected else ""
    candidates = {name[: -len(first)] for name in weights if name.endswith("." + first)} | {""}
    return max(sorted(candidates), key=lambda prefix: sum(prefix + name in weights for name in expected))


FORMAT = Format("", read)
