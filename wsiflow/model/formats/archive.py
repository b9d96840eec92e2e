"""The archives that torch.export.save writes, read without running anything in them.

Input: the bytes of a ``.pt2`` file of PyTorch 2.6 or later. Output: its program as JSON, and its tensors. PyTorch's own
loader unpickles objects, which can do anything. Here tensors are read from their raw bytes, and a pickle, which older
versions wrote for all tensors, only with the loader that knows tensors and nothing else.
"""

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from wsiflow.errors import InputError

#: The data types of tensors by their numbers in an archive.
DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
_OLD_PROGRAM = "serialized_exported_program.json"  # up to PyTorch 2.7, beside pickles of the weights and constants
_OLD_TENSORS = {"weights": "serialized_state_dict.pt", "constants": "serialized_constants.pt"}
_MARK = "archive_format"  # in the folder that holds all members, whose name is that of the file
_COMPILED = "data/aotinductor/"
_SAVE_AGAIN = "write it again with torch.export.save"
#: What reading a file raises whose content is not of the form that it should have.
MALFORMED = (
    *(ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError),
    *(EOFError, zipfile.BadZipFile, pickle.UnpicklingError),
)


class Archive:
    """The members of an archive, by their names in the folder that holds all of them."""

    def __init__(self, data: bytes) -> None:
        """Open an archive.

        Raises:
            InputError: The file is not such an archive, or holds more or other things than one program.
        """
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except MALFORMED as error:
            raise InputError(f"the file is not a whole archive of torch.export: {error}", _SAVE_AGAIN) from error
        names = self._zip.namelist()
        folder = next((name.removesuffix(_MARK) for name in names if name.count("/") == 1 and name.endswith(_MARK)), "")
        self._members = {each.filename.removeprefix(folder): each for each in self._zip.infolist()}
        if any(name.startswith(_COMPILED) for name in self._members):
            raise InputError(
                "the archive holds code that was compiled for one machine (AOTInductor)",
                "save the program that it was compiled from: torch.export.save(torch.export.export(...))",
            )
        names = [name for name in self._members if name.startswith("models/") and name.endswith(".json")]
        names = names or [name for name in self._members if name == _OLD_PROGRAM]
        if len(names) != 1:
            raise InputError(f"the file holds {len(names)} programs of torch.export instead of one", _SAVE_AGAIN)
        self._name = names[0]

    def program(self) -> Any:
        """Return the program."""
        return json.loads(self._content(self._name))

    def tensors(self, kind: str) -> dict[str, torch.Tensor]:
        """Return the tensors by their paths in the network; those that share memory do so here as well.

        Args:
            kind: ``weights`` or ``constants``.

        Raises:
            InputError: There are other objects than tensors among them.
        """
        model = self._name.removeprefix("models/").removesuffix(".json")
        pickled = _OLD_TENSORS[kind] if self._name == _OLD_PROGRAM else f"data/{kind}/{model}.pt"
        if pickled in self._members:
            values = self._unpickled(pickled)
            return _checked(dict(values) if isinstance(values, Mapping) else {pickled: values})
        config = f"data/{kind}/{model}_{kind}_config.json"
        if kind == "constants" and config not in self._members:
            return {}
        records: dict[str, torch.Tensor] = {}
        payloads = json.loads(self._content(config))["config"]
        return _checked({name: self._payload(f"data/{kind}/", each, records) for name, each in payloads.items()})

    def _payload(self, folder: str, payload: Any, records: dict[str, torch.Tensor]) -> Any:
        """Return a tensor, given its description and the records that have been read before."""
        name, meta = payload["path_name"], payload["tensor_meta"]
        if not name.startswith(("weight_", "tensor_")):
            raise InputError(f"the archive holds an object of Python, {name!r}, that is not a tensor", _SAVE_AGAIN)
        if payload["use_pickle"]:
            return self._unpickled(folder + name)
        if name not in records:
            content = bytearray(self._content(folder + name))
            dtype = DTYPES[meta["dtype"]]
            # The clone is aligned in memory as all tensors of PyTorch are.
            records[name] = torch.frombuffer(content, dtype=dtype).clone() if content else torch.empty(0, dtype=dtype)
        sizes, strides = ([int(each["as_int"]) for each in meta[part]] for part in ("sizes", "strides"))
        return records[name].as_strided(sizes, strides, int(meta["storage_offset"]["as_int"]))

    def _content(self, name: str) -> bytes:
        """Return the bytes of a member; compressed ones are refused, since they may be of any size."""
        if name not in self._members:
            raise InputError(f"the archive of torch.export lacks {name}", _SAVE_AGAIN)
        if self._members[name].compress_type != zipfile.ZIP_STORED:
            raise InputError(f"{name} in the archive is compressed, which PyTorch never does", _SAVE_AGAIN)
        return self._zip.read(self._members[name])

    def _unpickled(self, name: str) -> Any:
        """Return the content of a pickle of tensors."""
        try:
            return torch.load(io.BytesIO(self._content(name)), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), "")
            raise InputError(
                f"{name} in the archive holds other objects than tensors, which could run code. {reason.strip()}",
                f"{_SAVE_AGAIN} of PyTorch 2.9 or later",
            ) from error


def _checked(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Refuse other objects than tensors on the CPU."""
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{name} in the archive is a {type(value).__name__}, not a tensor", _SAVE_AGAIN)
    return tensors
