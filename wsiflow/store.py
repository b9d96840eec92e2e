"""The HDF5 files of a run; the only user of h5py.

``patches/<slide>.h5`` holds groups ``t1`` .. ``tN``, each with ``img`` uint8 (n, side, side, 3), the pixels of its
blocks with halo, and ``coord`` int64 (n, 5): tile column, tile row, level-0 x and y of the top-left pixel read, and the
side in level-0 pixels. ``transparent`` float32 (n,) is the share of pixels the scanner never wrote (shown as
background). With one tile a block and a halo of 112 px this is the layout of Li, Mikailov and Chen.

``predictions/<slide>/t<k>.h5`` holds ``prob`` float32 (n, m, m), one map per tissue tile, and ``coord`` int64 (n, 5)
likewise for tiles.

Files are made once, in one go, by one writer, with a checksum on every chunk (fletcher32) and on the structure
(``libver`` v110), so that damage is an error on reading and never other pixels. Files are only ever opened with mode
``x`` or ``r``.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from wsiflow.errors import IntegrityError
from wsiflow.geometry import Frame


class StoreParams(BaseModel, frozen=True, extra="forbid"):
    """Where pixels wait between extraction and prediction.

    Attributes:
        kind: ``hdf5`` writes them to ``patches/``; ``none`` reads the slide again in each prediction task.
        compression: HDF5 filter for pixels; lossless.
        read_blocks: Blocks held in memory at a time by a reader or writer.
    """

    kind: Literal["hdf5", "none"]
    compression: Literal["none", "lzf", "gzip"]
    read_blocks: int = Field(ge=1)


class PatchGroup(NamedTuple):
    """One group of an open patches file."""

    img: h5py.Dataset
    coord: NDArray[np.int64]


class PatchWriter:
    """A patches file being written, one group after another."""

    def __init__(self, file: h5py.File, side_px: int, compression: str) -> None:
        """Hold the open file."""
        self._file, self._side_px = file, side_px
        self._compression = None if compression == "none" else compression

    def add_group(
        self, k: int, coord: NDArray[np.int64], parts: Iterator[tuple[NDArray[np.uint8], list[float]]]
    ) -> None:
        """Write group ``t<k>``.

        Args:
            k: Number of the group, from 1.
            coord: int64 (n, 5).
            parts: Runs of blocks, uint8 (<= n, side, side, 3), with the transparent share of each; together n blocks.
        """
        n, side = len(coord), self._side_px
        group = self._file.create_group(f"t{k}")
        img = group.create_dataset(
            "img", (n, side, side, 3), "u1", chunks=(1, side, side, 3), fletcher32=True, compression=self._compression
        )
        shares, written = np.full(n, np.nan, dtype=np.float32), 0
        for pixels, transparent in parts:
            img[written : written + len(pixels)] = pixels
            shares[written : written + len(pixels)] = transparent
            written += len(pixels)
        _table(group, "coord", coord)
        _table(group, "transparent", shares)
        group.attrs["written"] = written


@contextlib.contextmanager
def create_patches(path: Path, frame: Frame, facts: Mapping[str, Any], compression: str) -> Iterator[PatchWriter]:
    """Create a patches file; ``facts`` (slide, hashes, versions, key) become attributes beside the transform."""
    with h5py.File(path, "x", libver=("v110", "v110")) as file:
        _describe(file, frame, facts)
        yield PatchWriter(file, frame.patch_px, compression)


@contextlib.contextmanager
def open_patches(path: Path) -> Iterator[h5py.File]:
    """Open a patches file for reading, without locks: published files never change.

    Raises:
        IntegrityError: The file is not whole.
    """
    with _reading(path) as file:
        yield file


def patch_group(file: h5py.File, k: int) -> PatchGroup:
    """Return group ``t<k>`` of an open patches file; pixels stay on disk until they are sliced.

    Raises:
        IntegrityError: The group is absent or was not written to its end.
    """
    try:
        group = file[f"t{k}"]
        img, coord = group["img"], group["coord"][:]
        whole = len(img) == len(coord) == group.attrs["written"]
    except (KeyError, OSError) as error:
        raise IntegrityError(f"group t{k} cannot be read ({error})", _AGAIN, path=file.filename) from error
    if not whole:
        raise IntegrityError(f"group t{k} was not written to its end", _AGAIN, path=file.filename)
    return PatchGroup(img, coord)


def read_img(group: PatchGroup, first: int, last: int) -> NDArray[np.uint8]:
    """Return the pixels of blocks ``first`` to ``last`` (exclusive) of a group, uint8 (n, side, side, 3).

    Raises:
        IntegrityError: A checksum does not fit: the file is damaged.
    """
    try:
        pixels: NDArray[np.uint8] = group.img[first:last]
    except OSError as error:
        raise IntegrityError(f"pixels cannot be read ({error})", _AGAIN, path=group.img.file.filename) from error
    return pixels


def check_patches(path: Path, counts: list[int], frame: Frame) -> None:
    """Raise unless the file holds exactly the planned groups, every chunk of them written and with a good checksum."""
    with _reading(path) as file:
        found = sorted(file, key=lambda name: int(name[1:]))
        if found != [f"t{k}" for k in range(1, len(counts) + 1)]:
            raise IntegrityError(f"it holds groups {found}, {len(counts)} were planned", _AGAIN, path=path)
        for k, n in enumerate(counts, 1):
            img, _ = patch_group(file, k)
            if img.shape != (n, frame.patch_px, frame.patch_px, 3) or img.id.get_num_chunks() != n:
                raise IntegrityError(f"group t{k} has shape {img.shape}, {n} blocks were planned", _AGAIN, path=path)


def write_predictions(
    path: Path, frame: Frame, coord: NDArray[np.int64], prob: NDArray[np.float32], facts: Mapping[str, Any]
) -> None:
    """Write the scores of one group: ``prob`` float32 (n, m, m) and ``coord`` int64 (n, 5)."""
    with h5py.File(path, "x", libver=("v110", "v110")) as file:
        _describe(file, frame, facts)
        file.create_dataset("prob", data=prob, chunks=prob.shape, fletcher32=True, fillvalue=np.nan)
        _table(file, "coord", coord)


def read_predictions(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return ``coord`` int64 (n, 5) and ``prob`` float32 (n, m, m) of one group.

    Raises:
        IntegrityError: The file is damaged, or a score is not a number in [0, 1].
    """
    with _reading(path) as file:
        try:
            coord, prob = file["coord"][:], file["prob"][:]
        except (KeyError, OSError) as error:
            raise IntegrityError(f"the scores cannot be read ({error})", _AGAIN, path=path) from error
    if len(coord) != len(prob) or not ((prob >= 0) & (prob <= 1)).all():
        raise IntegrityError("scores are missing or are not numbers in [0, 1]", _AGAIN, path=path)
    return coord, prob


_AGAIN = "delete it and its receipt, then run again"


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[h5py.File]:
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        raise IntegrityError(f"it is not a whole HDF5 file ({error})", _AGAIN, path=path) from error
    with file:
        yield file


def _describe(file: h5py.File, frame: Frame, facts: Mapping[str, Any]) -> None:
    file.attrs["frame"] = json.dumps(frame._asdict())
    file.attrs["spacing_um_px"] = frame.um_px
    for name, value in facts.items():
        file.attrs[name] = value if isinstance(value, str | int | float) else json.dumps(value, sort_keys=True)


def _table(parent: h5py.Group, name: str, values: NDArray[Any]) -> None:
    parent.create_dataset(name, data=values, chunks=values.shape, fletcher32=True)
