"""The series to which a DICOM file belongs, read from its header.

Input: a file. Output: the UIDs of its class and of its series. The files of one slide share a series, and a folder may
hold those of many slides, which nothing but their headers tells apart. Neither pixels nor what identifies a patient is
kept: elements are passed over by their lengths up to that of the series.
"""

import os
import struct
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

SUFFIX = ".dcm"
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
"""The class of the images of which a slide consists."""

_PREAMBLE_BYTES = 128
_SYNTAX, _CLASS, _SERIES = (0x0002, 0x0010), (0x0008, 0x0016), (0x0020, 0x000E)
_IMPLICIT, _BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_ITEM, _ITEM_END, _SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
_LONG_LENGTHS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_UNDEFINED = 0xFFFFFFFF
_LONGEST_UID = 64
_DEEPEST = 32  # of sequences within sequences


class Header(NamedTuple):
    """The UIDs of the class and of the series of a file; each is empty where the file has none."""

    sop_class: str
    series: str


class _Encoding(NamedTuple):
    order: str
    explicit: bool


class _Element(NamedTuple):
    tag: tuple[int, int]
    kind: bytes
    length: int


class _NotDicomError(ValueError):
    """The bytes do not follow the rules of DICOM."""


def read_header(path: Path) -> Header | None:
    """Return the UIDs of a file; None where it cannot be read, or is not DICOM."""
    try:
        status = path.stat()
        return _header(path, (status.st_ino, status.st_size, status.st_mtime_ns))
    except OSError:
        return None


def files_of_series(path: Path) -> list[Path]:
    """Return the DICOM files next to a file that belong to its series, sorted; those without a series are one.

    Raises:
        OSError: The folder cannot be listed.
    """
    own = _series(path)
    return sorted(part for part in _files_in(path.parent) if part.name == path.name or _series(part) == own)


def name_of_slide(path: Path) -> str:
    """Return the name of the slide to which a DICOM file belongs.

    It is that of the folder where all of its files are one slide, else that of the slide's first file.

    Raises:
        OSError: The folder cannot be listed.
    """
    group = _group(path)
    if group is None or group.is_one_file:
        return path.stem
    return path.parent.name if group.is_alone else group.first.stem


def first_of_series(path: Path) -> Path:
    """Return the first file of the series to which a DICOM file belongs.

    Raises:
        OSError: The folder cannot be listed.
    """
    group = _group(path)
    return path if group is None else group.first


class _Group(NamedTuple):
    """A series in a folder: its first file, whether no other is of slides, and whether it is one file."""

    first: Path
    is_alone: bool
    is_one_file: bool


def _group(path: Path) -> _Group | None:
    status = path.parent.stat()
    return _grouped(path.parent, (status.st_ino, status.st_mtime_ns)).get(_series(path))


@lru_cache(maxsize=64)
def _grouped(folder: Path, _stamp: tuple[int, int]) -> dict[str, _Group]:
    """Return the series of a folder by UID; thousands of slides in one folder are named without reading it again."""
    files: dict[str, list[Path]] = {}
    for path in sorted(_files_in(folder)):
        files.setdefault(_series(path), []).append(path)
    n_slides = sum(any(map(is_of_slide, each)) for each in files.values())
    return {series: _Group(each[0], n_slides <= 1, len(each) == 1) for series, each in files.items()}


def _files_in(folder: Path) -> list[Path]:
    return [part for part in folder.iterdir() if is_named_like_one(part)]


def is_of_slide(path: Path) -> bool:
    """Tell whether a file holds an image of a slide, as far as that is known."""
    header = read_header(path)
    return header is None or not header.series or header.sop_class in {"", WHOLE_SLIDE}


def is_named_like_one(path: Path) -> bool:
    """Tell whether a path that is no folder has the extension of DICOM files."""
    # Path.is_dir would raise for a link that cannot be followed.
    return path.suffix.lower() == SUFFIX and not os.path.isdir(path)  # noqa: PTH112


def _series(path: Path) -> str:
    header = read_header(path)
    return header.series if header else ""


@lru_cache(maxsize=65536)
def _header(path: Path, _stamp: tuple[int, int, int]) -> Header | None:
    with path.open("rb") as stream:
        try:
            return _parsed(stream)
        except (_NotDicomError, struct.error):
            return None


def _parsed(stream: BinaryIO) -> Header | None:
    stream.seek(_PREAMBLE_BYTES)
    if stream.read(4) != b"DICM":
        return None
    meta = _values(stream, _Encoding("<", explicit=True), {_SYNTAX}, last_group=0x0002)
    syntax = meta.get(_SYNTAX, "")
    if syntax == _DEFLATED:
        return None
    encoding = _Encoding(">" if syntax == _BIG_ENDIAN else "<", explicit=syntax != _IMPLICIT)
    values = _values(stream, encoding, {_CLASS, _SERIES}, last_group=_SERIES[0])
    return Header(values.get(_CLASS, ""), values.get(_SERIES, ""))


def _values(
    stream: BinaryIO, encoding: _Encoding, tags: set[tuple[int, int]], *, last_group: int
) -> dict[tuple[int, int], str]:
    """Return the texts of some elements, and leave the stream where the groups up to the last one end."""
    values: dict[tuple[int, int], str] = {}
    while len(values) < len(tags) or last_group == _SYNTAX[0]:
        begin = stream.tell()
        group = stream.read(2)
        stream.seek(begin)
        # What follows the last group may be in another encoding.
        if len(group) < 2 or struct.unpack(f"{encoding.order}H", group)[0] > last_group:
            break
        element = _element(stream, encoding)
        if element is None:
            break
        if element.tag in tags and element.length <= _LONGEST_UID:
            values[element.tag] = stream.read(element.length).decode("ascii", "replace").strip("\0 ")
        else:
            _pass_over(stream, element, encoding, 0)
    return values


def _element(stream: BinaryIO, encoding: _Encoding) -> _Element | None:
    """Read the tag and the length of the next element; None at the end of the file."""
    start = stream.read(8)
    if len(start) < 8:
        return None
    group, number = struct.unpack(f"{encoding.order}HH", start[:4])
    kind = start[4:6]
    if not encoding.explicit or group == _ITEM[0]:
        return _Element((group, number), b"", struct.unpack(f"{encoding.order}I", start[4:])[0])
    if not kind.isalpha():
        raise _NotDicomError
    if kind in _LONG_LENGTHS:
        return _Element((group, number), kind, struct.unpack(f"{encoding.order}I", stream.read(4))[0])
    return _Element((group, number), kind, struct.unpack(f"{encoding.order}H", start[6:])[0])


def _pass_over(stream: BinaryIO, element: _Element, encoding: _Encoding, depth: int) -> None:
    """Move behind the value of an element."""
    if element.length != _UNDEFINED:
        stream.seek(element.length, os.SEEK_CUR)
        return
    if depth > _DEEPEST:
        raise _NotDicomError
    inner = encoding._replace(explicit=False) if element.kind == b"UN" else encoding
    end = _ITEM_END if element.tag == _ITEM else _SEQUENCE_END
    while (part := _element(stream, inner)) is not None and part.tag != end:
        _pass_over(stream, part, inner, depth + 1)
    if part is None:
        raise _NotDicomError
