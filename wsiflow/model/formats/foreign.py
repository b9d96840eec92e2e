"""Files and folders that hold no model that is read: what they are, and what to do."""

from collections.abc import Collection
from pathlib import Path

from wsiflow.errors import InputError

_TO_ONNX = "export the network as ONNX once, with the program that made it"
_FROM_KERAS = f"{_TO_ONNX}: model.export('model.onnx', format='onnx')"
_AGAIN = "fetch the file again: this is the page of a login or of an error"
_TENSORS = "save the tensors with safetensors.torch.save_file, or torch.save(model.state_dict(), file)"
# What a file begins with, where its name says nothing; the first that fits.
_BEGINNINGS = (
    (0, b"version https://git-lfs", "a pointer of Git LFS in place of the weights", "fetch them with git lfs pull"),
    (0, b"<!doctype", "a web page", _AGAIN),
    (0, b"<html", "a web page", _AGAIN),
    (0, b"\x89hdf\r\n", "HDF5, as Keras writes it", _FROM_KERAS),
    (4, b"tfl3", "a network of TensorFlow Lite", _TO_ONNX),
    (0, b"\x93numpy", "an array of NumPy", _TENSORS),
    (0, b"\x1f\x8b", "compressed with gzip", "unpack it with gunzip or tar"),
)


def refuse_file(path: Path, start: bytes) -> None:
    """Refuse a file that begins like one of a form that is not read.

    Raises:
        InputError: It does; the message says what it is.
    """
    head = start.lower()
    for offset, beginning, what, remedy in _BEGINNINGS:
        if head.startswith(beginning, offset):
            raise InputError(f"the file is {what}", remedy, path=path)


def refuse_archive(path: Path, names: Collection[str]) -> None:
    """Refuse a zip archive without a model.

    Args:
        path: The archive.
        names: The files in it.

    Raises:
        InputError: It holds none; the message says what it is.
    """
    if any(name.endswith(("data.pkl", "archive_format", "serialized_exported_program.json")) for name in names):
        return
    if any(name.endswith("weights.h5") for name in names):
        raise InputError("the file is a network of Keras", _FROM_KERAS, path=path)
    if names and all(name.endswith(".npy") for name in names):
        raise InputError("the file holds arrays of NumPy", _TENSORS, path=path)
    raise InputError("the file is a zip archive without weights of PyTorch", "unpack it, and name the file", path=path)


def refuse_folder(path: Path) -> None:
    """Refuse a folder of TensorFlow.

    Raises:
        InputError: It is one.
    """
    if (path / "saved_model.pb").is_file():
        remedy = f"{_TO_ONNX}: python -m tf2onnx.convert --saved-model {path.name} --output model.onnx"
        raise InputError("the folder holds a network of TensorFlow", remedy, path=path)
