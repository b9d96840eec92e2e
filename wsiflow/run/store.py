"""The HDF5 files of a run; the only user of h5py.

``patches/<slide>.h5`` contains the groups ``t1`` to ``tN`` of a slide. They are links to ``patches/<slide>/p<j>.h5``,
the parts that were each written by one task. A part has one of two layouts.

* Single tiles (``tiles=patch``): ``img`` uint8 (n, side, side, 3), the pixels of the blocks with halo. With a halo of
  112 px this is the layout of Li, Mikailov and Chen.
* Strips: blocks of any size one after another in ``img`` uint8 (bytes,). Block i is ``img[offset[i]:offset[i + 1]]``,
  and ``size[i]`` (rows, columns) is its shape. The attribute ``encoding`` says whether the bytes are pixels (``raw``:
  reshape to (rows, columns, 3)) or a JPEG image.

Both have ``coord`` int64 (n, 5): tile column, tile row, level-0 x and y of the top-left pixel read, and the width in
level-0 pixels. Both also have ``transparent`` float32 (n,): the share of pixels that the scanner never wrote, which are
shown as background.

``predictions/<slide>/t<k>.h5`` contains ``prob`` float32 (n, m, m), one map for each tissue tile, NaN in cells that are
not scored, and ``coord`` int64 (n, 5) with the same columns for tiles. Where a run maps further classes, ``maps``
float32 (k, n, m, m) holds the probabilities of each, and the attribute ``classes`` their names.

A file is written once by one writer, with a checksum on every chunk (fletcher32) and on the structure (``libver``
v110), so that reading a damaged file raises an error and never returns other pixels. Files are only opened with the
modes ``x`` and ``r``.

The places of data sets in a file follow from the order in which they are written to disk. HDF5 writes a data set when
it is closed, and Python closes it when nothing refers to it any more, which the thread of a profiler may delay. Data
sets are therefore flushed as soon as they are filled, so that equal content gives equal bytes.
"""

import contextlib
import errno
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import imagecodecs
import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import EnvironmentFault, IntegrityError, WsiflowError
from wsiflow.plan.geometry import Frame
from wsiflow.run.store_params import StoreParams
from wsiflow.system import faults

_STREAM_CHUNK_BYTES = 1 << 18

Pixels = tuple[NDArray[np.uint8], float]
"""A block, uint8 (rows, cols, 3), and the share of it that the scanner never wrote."""


class PatchGroup(NamedTuple):
    """A group of an open patches file; the pixels stay on disk until a block is read."""

    img: h5py.Dataset
    coord: NDArray[np.int64]
    offset: NDArray[np.int64] | None
    size: NDArray[np.int64] | None

    def block(self, index: int) -> NDArray[np.uint8]:
        """Return the pixels of a block, uint8 (rows, cols, 3).

        Raises:
            IntegrityError: The file is damaged, as a checksum shows.
            EnvironmentFault: The file cannot be read now.
        """
        try:
            if self.offset is None or self.size is None:
                patch: NDArray[np.uint8] = self.img[index]
                return patch
            data: NDArray[np.uint8] = self.img[self.offset[index] : self.offset[index + 1]]
            rows, cols = self.size[index].tolist()
            if self.img.attrs["encoding"] == "jpeg":
                data = imagecodecs.jpeg8_decode(data.tobytes())
            return data.reshape(rows, cols, 3)
        except (OSError, ValueError, imagecodecs.Jpeg8Error) as error:
            raise _unread(error, f"the pixels of block {index} cannot be read", self.img.file.filename) from error


class PatchWriter:
    """A patches file that is written one group after another."""

    def __init__(self, file: h5py.File, frame: Frame, params: StoreParams) -> None:
        """Store the open file and the settings."""
        self._file, self._frame, self._params = file, frame, params
        self._filter = None if params.compression in {"none", "jpeg"} else params.compression

    def add_group(self, k: int, coord: NDArray[np.int64], blocks: Iterator[Pixels]) -> None:
        """Write group ``t<k>``.

        Args:
            k: Number of the group, counted from 1.
            coord: int64 (n, 5), see the module.
            blocks: The n blocks in the order of ``coord``.
        """
        group = self._file.create_group(f"t{k}")
        write = self._add_patches if _is_patches(self._frame, self._params) else self._add_stream
        shares = write(group, len(coord), blocks)
        _table(group, "coord", coord)
        unwritten = [np.nan] * (len(coord) - len(shares))
        _table(group, "transparent", np.array(shares + unwritten, dtype=np.float32))
        group.attrs["written"] = len(shares)

    def _add_patches(self, group: h5py.Group, n: int, blocks: Iterator[Pixels]) -> list[float]:
        side, shares = self._frame.block_px(1), []
        form = {"shape": (n, side, side, 3), "chunks": (1, side, side, 3)}
        img = group.create_dataset("img", dtype="u1", fletcher32=True, compression=self._filter, **form)
        for i, (pixels, share) in enumerate(blocks):
            img[i] = pixels
            shares.append(share)
        img.flush()
        return shares

    def _add_stream(self, group: h5py.Group, _n: int, blocks: Iterator[Pixels]) -> list[float]:
        form = {"shape": (0,), "maxshape": (None,), "chunks": (_STREAM_CHUNK_BYTES,)}
        img = group.create_dataset("img", dtype="u1", fletcher32=True, compression=self._filter, **form)
        img.attrs["encoding"] = "jpeg" if self._params.compression == "jpeg" else "raw"
        shares, offset, size = [], [0], []
        for pixels, share in blocks:
            data = self._encoded(pixels)
            offset.append(offset[-1] + len(data))
            img.resize((offset[-1],))
            img[offset[-2] :] = data
            shares.append(share)
            size.append(pixels.shape[:2])
        img.flush()
        _table(group, "offset", np.array(offset, dtype=np.int64))
        _table(group, "size", np.array(size, dtype=np.int64))
        return shares

    def _encoded(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self._params.compression != "jpeg":
            return pixels.reshape(-1)
        data = imagecodecs.jpeg8_encode(pixels, level=self._params.quality, subsampling="444")
        return np.frombuffer(data, dtype=np.uint8)


def _is_patches(frame: Frame, params: StoreParams) -> bool:
    """Tell whether the blocks are single tiles, whose pixels are stored in one array."""
    return frame.block_rows == frame.block_cols == 1 and params.compression != "jpeg"


@contextlib.contextmanager
def create_patches(path: Path, frame: Frame, facts: Mapping[str, Any], params: StoreParams) -> Iterator[PatchWriter]:
    """Create a patches file, and yield its writer.

    The file is not locked: no other process knows it yet, and not every file system has locks.

    Args:
        path: The file, which must not exist.
        frame: The frame of the slide, which becomes an attribute.
        facts: Other attributes by name: slide, hashes, versions and key.
        params: The settings.
    """
    with h5py.File(path, "x", libver=("v110", "v110"), locking=False) as file:
        _describe(file, frame.pixel_settings(), facts)
        yield PatchWriter(file, frame, params)


@contextlib.contextmanager
def open_patches(path: Path) -> Iterator[h5py.File]:
    """Open a patches file for reading, without a lock, because published files never change.

    Raises:
        IntegrityError: The file is missing or damaged.
        EnvironmentFault: The file cannot be read now.
    """
    with _reading(path) as file:
        yield file


def patch_group(file: h5py.File, k: int) -> PatchGroup:
    """Return group ``t<k>`` of an open patches file.

    Raises:
        IntegrityError: The group is missing, or was not written to its end.
    """
    try:
        group = file[f"t{k}"]
        img, coord = group["img"], group["coord"][:]
        offset, size = (group[name][:] if name in group else None for name in ("offset", "size"))
        blocks = len(img) if offset is None else len(offset) - 1
        whole = blocks == len(coord) == group.attrs["written"] and (offset is None or offset[-1] == len(img))
    except (KeyError, OSError) as error:
        raise _unread(error, f"group t{k} cannot be read", file.filename) from error
    if not whole:
        raise IntegrityError(f"group t{k} was not written to its end", _AGAIN, path=file.filename)
    return PatchGroup(img, coord, offset, size)


def check_patches(path: Path, sizes: Mapping[int, Sequence[tuple[int, int]]]) -> None:
    """Check that a patches file contains exactly the planned blocks, and that every chunk was written.

    Args:
        path: The closed file.
        sizes: By number of the group, the rows and columns in pixels of each of its blocks.

    Raises:
        IntegrityError: It does not.
    """
    with _reading(path) as file:
        names = sorted(file, key=lambda name: int(name[1:]))
        if names != [f"t{k}" for k in sizes]:
            raise IntegrityError(f"it holds groups {names}, {len(sizes)} were planned", _AGAIN, path=path)
        for k, planned in sizes.items():
            group = patch_group(file, k)
            shapes = [group.img.shape[1:3]] * len(group.coord) if group.size is None else group.size.tolist()
            chunks = -(-len(group.img) // group.img.chunks[0])
            if [tuple(shape) for shape in shapes] != list(planned) or group.img.id.get_num_chunks() != chunks:
                raise IntegrityError(f"group t{k} holds other blocks than planned", _AGAIN, path=path)


def write_index(path: Path, frame: Frame, facts: Mapping[str, Any], links: Mapping[str, Iterable[int]]) -> None:
    """Write a patches file whose groups are links to other files.

    Args:
        path: The file, which must not exist.
        frame: The frame of the slide, which becomes an attribute.
        facts: Other attributes by name.
        links: Numbers of groups by the name of the file that contains them, relative to the folder of ``path``.
    """
    with h5py.File(path, "x", libver=("v110", "v110"), locking=False) as file:
        _describe(file, frame.pixel_settings(), facts)
        for name, numbers in links.items():
            for k in numbers:
                file[f"t{k}"] = h5py.ExternalLink(name, f"/t{k}")


def write_predictions(
    path: Path,
    frame: Frame,
    coord: NDArray[np.int64],
    prob: NDArray[np.float32],
    facts: Mapping[str, Any],
    maps: NDArray[np.float32] | None = None,
) -> None:
    """Write the scores of one group: ``coord`` int64 (n, 5), ``prob`` float32 (n, m, m) and ``maps`` (k, n, m, m)."""
    with h5py.File(path, "x", libver=("v110", "v110"), locking=False) as file:
        _describe(file, frame._asdict(), facts)
        file.create_dataset("prob", data=prob, chunks=prob.shape, fletcher32=True, fillvalue=np.nan).flush()
        _table(file, "coord", coord)
        if maps is not None and len(maps):  # a class has a chunk of its own, so that it is read without the others
            form = {"chunks": (1, *prob.shape), "fletcher32": True, "fillvalue": np.nan}
            file.create_dataset("maps", data=maps, **form).flush()


def read_predictions(
    path: Path, number: int = 0, scored: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return ``coord`` int64 (n, 5) and the scores of one group, float32 (n, m, m).

    Args:
        path: The file.
        number: 0 for the positive score, otherwise the number of a further class, counted from 1.
        scored: bool (n, m, m), the cells that have scores; the others are NaN. None: all have.

    Raises:
        IntegrityError: The file is missing or damaged, or a score is not a number in [0, 1].
        EnvironmentFault: The file cannot be read now.
    """
    with _reading(path) as file:
        try:
            coord, prob = file["coord"][:], file["maps"][number - 1] if number else file["prob"][:]
        except (KeyError, IndexError, OSError) as error:
            raise _unread(error, "the scores cannot be read", path) from error
    given = np.ones(prob.shape, np.bool_) if scored is None else scored
    right = prob.shape == given.shape and (np.isnan(prob) | given).all() and ((prob >= 0) & (prob <= 1))[given].all()
    if len(coord) != len(prob) or not right:
        raise IntegrityError("scores are missing or are not numbers in [0, 1]", _AGAIN, path=path)
    return coord, prob


_AGAIN = "delete it and its receipt, then run again"
_OPEN_ELSEWHERE = "file is already open for write"  # part of a message of HDF5


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[h5py.File]:
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        raise _unread(error, "it is not a whole HDF5 file", path) from error
    with file:
        yield file


def _unread(error: Exception, what: str, path: object) -> WsiflowError:
    """Return the error for a file that cannot be read.

    A file that is damaged or missing has to be deleted and computed again. A file that the system cannot read now must
    not be deleted: it may be whole.
    """
    if isinstance(error, OSError) and _OPEN_ELSEWHERE in str(error):
        remedy = f"close it there, then run again; if no program has, {_AGAIN}"
        return EnvironmentFault("another program has it open for writing", remedy, path=path)
    if isinstance(error, OSError) and faults.number(error) not in {0, errno.ENOENT}:
        return faults.fault(error, path=path)
    return IntegrityError(f"{what} ({error})", _AGAIN, path=path)


def _describe(file: h5py.File, frame: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    file.attrs["frame"] = json.dumps(frame)
    file.attrs["spacing_um_px"] = frame["um_px"]
    for name, value in facts.items():
        file.attrs[name] = value if isinstance(value, str | int | float) else json.dumps(value, sort_keys=True)


def _table(parent: h5py.Group, name: str, values: NDArray[Any]) -> None:
    parent.create_dataset(name, data=values, chunks=values.shape, fletcher32=True).flush()
