"""Adding a model: from a file of weights, and what is known about it, to a card that runs can name.

Input: a file or folder as its author has it, and the fields of the card. Output: two files in one folder, the weights
and ``<name>.json``. Weights of ``torch.save`` are written as safetensors, and a network is tried before anything is
written: that it runs, that its outputs are what the card says, and that they do not depend on the batch.
"""

import hashlib
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import nn

from wsiflow.errors import InputError
from wsiflow.model import huggingface
from wsiflow.model.architectures import function
from wsiflow.model.card import EXPORT, ONNX, PYTHON, TORCHSCRIPT, WSINFER_WEIGHTS, ModelCard, parse_card, wsinfer_fields
from wsiflow.model.classifier import Classifier, as_classifier, check_answers
from wsiflow.model.formats import export, foreign, onnx, state_dict
from wsiflow.model.formats.registry import network
from wsiflow.model.formats.torchscript import is_script
from wsiflow.model.save import probes, write_card
from wsiflow.system import faults

_NO_HASH = "0" * 64


class Source(NamedTuple):
    """A model as its author has it.

    Attributes:
        path: The file that holds the weights.
        architecture: What the card has as its architecture, if the file says it; else an empty text.
        known: Fields of the card that the folder of the file gives.
        convert: Returns what is written in place of the file, for images of a side, px; None to write what it holds.
    """

    path: Path
    architecture: str
    known: dict[str, Any]
    convert: Callable[[int], bytes] | None = None


def recognise(path: Path) -> Source:
    """Return what a file or folder holds, from its content.

    Args:
        path: A file of weights or a program, or a folder of Hugging Face or WSInfer.

    Raises:
        InputError: There is no such file, or it holds no model that is known.
    """
    if path.is_dir():
        foreign.refuse_folder(path)
        if (path / WSINFER_WEIGHTS).is_file():
            return Source(path / WSINFER_WEIGHTS, TORCHSCRIPT, wsinfer_fields(path / "config.json"))
        return Source(*huggingface.read_folder(path))
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise faults.unreadable(error, "the model", "name a file of weights, or a folder", path=path) from error
    foreign.refuse_file(path, start)
    return Source(path, _archived(path) if zipfile.is_zipfile(path) else _plain(path, start), {})


def _archived(path: Path) -> str:
    """Return what a zip archive holds; an empty text for weights alone, which ``torch.save`` writes into one."""
    names = zipfile.ZipFile(path).namelist()
    foreign.refuse_archive(path, names)
    if any("/code/" in name for name in names):
        return TORCHSCRIPT
    is_program = any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names)
    return EXPORT if is_program else ""


def _plain(path: Path, start: bytes) -> str:
    """Return what a file that is no archive holds, from its first bytes; an empty text for weights alone."""
    if path.suffix == ".onnx" or (start[:1] == b"\x08" and b"pytorch" in start):
        return ONNX
    return EXPORT if path.suffix == ".pt2" else ""  # a damaged one, of which its format says more


def require_weights(path: Path) -> None:
    """Refuse a file that does not hold weights.

    Raises:
        InputError: It is damaged, or holds more than weights; the message says which.
    """
    state_dict.tensors(path.read_bytes(), path)


def add(source: Source, fields: Mapping[str, Any], folder: Path) -> Path:
    """Write the weights and the card of a model; existing files of the same names are replaced.

    Args:
        source: The model.
        fields: The fields of `ModelCard` except ``weights``, ``sha256``, ``source_sha256`` and ``probe``, which are
            computed here.
        folder: Folder to write into; it is created.

    Returns:
        The path of the card.

    Raises:
        InputError: The fields are not those of a valid card, or the file does not hold the network that they describe.
        EnvironmentFault: A package that the model needs is not installed.
    """
    given = {"architecture": source.architecture, **source.known, **fields}
    if str(given["architecture"]).startswith(PYTHON):
        name = str(given["architecture"]).removeprefix(PYTHON)
        given["source_sha256"] = function.source_sha256(name, source.path.parent)
    bare = parse_card({**given, "weights": source.path.name, "sha256": _NO_HASH}, source.path)
    data = _content(source, bare)
    try:
        module = network(data, bare, source.path)
    except InputError as error:
        raise error.about(path=source.path) from error
    classifier = as_classifier(module, bare)
    check_answers(classifier, bare, source.path)
    architecture, suffix, weights = _encoded(module, bare, data)
    folder.mkdir(parents=True, exist_ok=True)
    if bare.architecture.startswith(PYTHON):
        _copy_source(bare, source.path.parent, folder)
    # A program that was converted returns the one output that was named.
    card = bare.model_copy(
        update={
            "architecture": architecture,
            "output_name": bare.output_name if architecture == bare.architecture else "",
            "weights": f"{bare.name}{suffix}",
            "sha256": hashlib.sha256(weights).hexdigest(),
            "probe": probes(classifier),
        }
    )
    (folder / card.weights).write_bytes(weights)
    return write_card(card, folder)


def from_module(  # noqa: PLR0913  these are the fields of a card
    module: nn.Module,
    *,
    classes: list[str],
    window: int,
    spacing: float,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    positive: str | list[str] = "",
    output: str = "logits",
    name: str = "model",
    folder: Path | None = None,
) -> Classifier:
    """Return a network of this process as a classifier, and write it if a folder is given, so that runs can name it.

    Args:
        module: The network; it is put into evaluation mode and single precision.
        classes: A name for each class.
        window: Side of the windows that it classifies, px.
        spacing: Spacing at which it was trained, um per px.
        mean: Mean of red, green and blue on a scale of 0 to 1, which is subtracted.
        std: Standard deviation on the same scale, by which is divided.
        positive: The class, or the classes, whose probability is mapped; the last one if empty.
        output: ``logits``, ``probabilities`` or ``sigmoid``.
        name: Name of the model.
        folder: Folder for ``<name>.json`` and ``<name>.pt2``; None to write nothing.

    Raises:
        InputError: The values are not those of a card, the network does not run on such windows, its outputs are not
            what they are said to be, or (where a folder is given) it cannot be exported.
    """
    fields = {
        "name": name,
        "architecture": EXPORT,
        "class_names": classes,
        "positive_class": positive or classes[-1],
        "output": output,
        "window_px": window,
        "input_px": window,
        "spacing_um_px": spacing,
        "mean": mean,
        "std": std,
    }
    bare = parse_card({**fields, "weights": f"{name}.pt2", "sha256": _NO_HASH}, Path(name))
    classifier = as_classifier(module, bare)
    check_answers(classifier, bare, Path(name))
    if folder is not None:
        weights = export.write(module, window)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / bare.weights).write_bytes(weights)
        card = bare.model_copy(update={"sha256": hashlib.sha256(weights).hexdigest(), "probe": probes(classifier)})
        write_card(card, folder)
    return classifier


def _content(source: Source, card: ModelCard) -> bytes:
    """Return the network with its weights, or the weights alone, as the card's architecture says."""
    if source.convert is not None and card.architecture == source.architecture:
        return source.convert(card.input_px)
    return onnx.embedded(source.path) if card.architecture == ONNX else source.path.read_bytes()


def _encoded(module: nn.Module, card: ModelCard, data: bytes) -> tuple[str, str, bytes]:
    """Return the architecture, the suffix and the content of the weights file to write."""
    if card.architecture == TORCHSCRIPT:
        if is_script(module):
            return TORCHSCRIPT, ".pt", data
        return EXPORT, ".pt2", export.write(module, card.input_px)
    if card.architecture in {EXPORT, ONNX}:
        return card.architecture, ".pt2" if card.architecture == EXPORT else ".onnx", data
    # Weights that share memory are written twice, as safetensors asks for.
    own = {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}
    return card.architecture, ".safetensors", safetensors.torch.save(own)


def _copy_source(card: ModelCard, old: Path, new: Path) -> None:
    """Copy the source file of a function that lies beside the weights to where the card will be."""
    path = function.source_path(card.architecture.removeprefix(PYTHON), old)
    if path.parent == old and old.resolve() != new.resolve():
        shutil.copyfile(path, new / path.name)
