"""Contours of tissue as CLAM pickles them: a list of contours of OpenCV in level-0 px, and a list of holes for each."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from wsiflow.errors import InputError
from wsiflow.slides.annotations import Outline
from wsiflow.slides.annotations.outlines import as_outline, points
from wsiflow.system import faults

SUFFIXES = (".pkl", ".pickle")

_MAX_BYTES = 256 * 2**20
_REMEDY = "give the pickle that CLAM's segmentation wrote, with 'tissue' and 'holes'"


def read_contours(path: Path) -> list[Outline]:
    """Read the contours of a file; nothing in the pickle is run.

    Raises:
        InputError: The file does not hold contours, or is too large.
        EnvironmentFault: The system refuses to read the file.
    """
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise InputError(f"the file has {size} bytes, at most {_MAX_BYTES} are allowed", _REMEDY, path=path)
        data = path.read_bytes()
    except OSError as error:
        raise faults.unreadable(error, "the file of contours", "correct the path", path=path) from error
    try:
        contents = _ArrayUnpickler(io.BytesIO(data)).load()
        contours = contents["tissue"]
        holes = contents.get("holes") or [[] for _ in contours]
        areas = [
            as_outline(f"contour {number}", "", _flat(contour), holes=tuple(map(_flat, cut)))
            for number, (contour, cut) in enumerate(zip(contours, holes, strict=True), start=1)
        ]
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        cause = f"the file does not hold contours ({type(error).__name__}: {error})"
        raise InputError(cause, _REMEDY, path=path) from error
    return [one for one in areas if isinstance(one, Outline)]


def _flat(contour: Any) -> Any:
    """Return the points of a contour of OpenCV, (n, 1, 2), as (n, 2).

    Raises:
        ValueError: They are no pairs of finite numbers.
    """
    flat = points(np.asarray(contour, dtype=np.float64).reshape(-1, 2))
    if not np.isfinite(flat).all():
        raise ValueError("a coordinate is not finite")
    return flat


class _ArrayUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, numbers and arrays, and nothing that could run: a pickle is a program."""

    _ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"})

    def find_class(self, module: str, name: str) -> Any:
        """Return a constructor of arrays; refuse everything else."""
        if module.partition(".")[0] == "numpy" and name in self._ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):  # the bytes of arrays in old pickles
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no contour needs")
