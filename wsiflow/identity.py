"""Which files a slide consists of, and whether they are still the same.

Input: the path that names a slide. Output: hashes over all of its files. Nothing here opens the slide as an image.

That files were written shows in their sizes and times. It does not show at once where another machine writes into a
memory map, or where a file system keeps times no finer than what happens within them.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from wsiflow import faults
from wsiflow.errors import EnvironmentFault, InputError, Rewritten

COPY_AGAIN = "copy it again from its source, or remove its line"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a slide, hexadecimal.

    A slide of one file has that file's hash. A slide of several (MIRAX with its folder, the DICOM files of a folder,
    a Hamamatsu index with the files it names) has the hash of the list of their names and hashes.

    Raises:
        InputError: The file is missing or not a regular file.
        EnvironmentFault: A file may not be read.
    """
    parts = {name: _file_sha256(part) for name, part in _parts(path)}
    if len(parts) == 1:
        return next(iter(parts.values()))
    listing = "".join(f"{digest}  {name}\n" for name, digest in parts.items())
    return hashlib.sha256(listing.encode()).hexdigest()


def signature(path: Path) -> str:
    """Return a text that changes when a file of the slide is replaced or written: names, sizes, times and inodes.

    While it stays the same, a hash computed before may be taken as still valid.

    Raises:
        InputError: The file is missing or not a regular file.
    """
    parts = [(name, part.stat()) for name, part in _parts(path)]
    listing = "".join(f"{found.st_size} {found.st_mtime_ns} {found.st_ino} {name}\n" for name, found in parts)
    return hashlib.sha256(listing.encode()).hexdigest()


def stamp(path: Path) -> str:
    """Return a text that changes whenever something is done to a file of the slide.

    Unlike its `signature` it tells a file that was written from one that never was even where its times were set back,
    as copies do: nobody can set the time of a change. New links, owners or permissions show in it as well.

    Raises:
        InputError: The file is missing or not a regular file.
        EnvironmentFault: A file may not be read.
    """
    parts = [(name, _status(part)) for name, part in _parts(path)]
    listing = "".join(
        f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino} {name}\n" for name, found in parts
    )
    return hashlib.sha256(listing.encode()).hexdigest()


@contextlib.contextmanager
def unwritten(path: Path, slide_id: str = "") -> Iterator[str]:
    """See that nothing writes a slide while the body reads it; what has its old content at the end was written too.

    Yields:
        The slide's stamp.

    Raises:
        Rewritten: Something was done to its files; also where that made the body fail.
    """
    before = stamp(path)
    try:
        yield before
    except Exception as error:
        if stamp(path) != before:
            raise _rewritten(path, slide_id) from error
        raise
    if stamp(path) != before:
        raise _rewritten(path, slide_id)


def _rewritten(path: Path, slide_id: str) -> Rewritten:
    cause = "its file was written, replaced or given another owner, permission or link while it was read"
    return Rewritten(cause, "run again when the copy has ended", slide=slide_id, path=path)


def settled_sha256(path: Path) -> str:
    """Return the SHA-256 of a slide, which is computed once in a process while the slide is not touched.

    Raises:
        Rewritten: It was touched while it was hashed.
    """
    with unwritten(path) as stamped:
        return _sha256_of(path, stamped)


@lru_cache(maxsize=256)
def _sha256_of(path: Path, _stamped: str) -> str:
    return sha256(path)


def require_file(path: Path, slide_id: str = "") -> None:
    """Refuse what is not a regular file with something in it, before a library looks at it."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        cause, remedy = "the slide file does not exist", "correct the path, or remove its line"
        raise InputError(cause, remedy, slide=slide_id, path=path) from error
    except OSError as error:
        cause = f"the slide file is out of reach ({faults.cause(error)})"
        raise EnvironmentFault(cause, faults.remedy(error), path=path) from error
    if stat.S_ISDIR(found.st_mode):
        remedy = "name a file (of DICOM any .dcm in the folder) in its line, or use dataset=folder"
        raise InputError("the path is a folder, not a slide file", remedy, slide=slide_id, path=path)
    if not stat.S_ISREG(found.st_mode):
        raise InputError("the path is not a regular file", "remove its line", slide=slide_id, path=path)
    if found.st_size == 0:
        raise InputError("the slide file is empty (0 bytes)", COPY_AGAIN, slide=slide_id, path=path)


def _parts(path: Path) -> list[tuple[str, Path]]:
    """Return every file of a slide with its name relative to the slide's folder, sorted by name."""
    require_file(path)
    parts = {path, *_companions(path)}
    return sorted((part.relative_to(path.parent).as_posix(), part) for part in parts)


def _companions(path: Path) -> Iterator[Path]:
    """Yield the files that belong to a slide besides the one that names it."""
    kind = path.suffix.lower()
    if kind == ".mrxs":
        yield from (part for part in path.with_suffix("").rglob("*") if part.is_file())
    elif kind == ".dcm":
        yield from (part for part in path.parent.iterdir() if part.suffix.lower() == ".dcm" and part.is_file())
    elif kind in {".vms", ".vmu"}:
        index = path.read_text(encoding="utf-8", errors="replace")
        yield from (part for part in path.parent.iterdir() if part.name in index and part.is_file())


def _status(path: Path) -> os.stat_result:
    """Return size and times of a file; opened, for a network file system then asks its server."""
    with _as_slide_fault(path), path.open("rb") as stream:
        return os.fstat(stream.fileno())


def _file_sha256(path: Path) -> str:
    """Hash one file in pieces."""
    with _as_slide_fault(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def _as_slide_fault(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        cause = f"the slide file cannot be read ({faults.cause(error)})"
        raise EnvironmentFault(cause, faults.remedy(error), path=path) from error
