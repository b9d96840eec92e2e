"""Which files a slide consists of, and whether they are still the same.

Input: the path that names a slide. Output: hashes over all of its files. Nothing here opens the slide as an image.

That files were written shows in their sizes and times. It does not show at once where another machine writes into a
memory map, or where a file system keeps times no finer than what happens within them.
"""

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from wsiflow.errors import EnvironmentFault, InputError, SlideModified, WsiflowError
from wsiflow.system import faults

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
def unmodified(path: Path, slide_id: str = "") -> Iterator[str]:
    """See that nothing writes a slide while the body reads it; what has its old content at the end was written too.

    Yields:
        The slide's stamp.

    Raises:
        SlideModified: Something was done to its files; also where that made the body fail.
    """
    before = stamp(path)
    try:
        yield before
    except Exception as error:
        if stamp(path) != before:
            raise _modified(path, slide_id) from error
        raise
    if stamp(path) != before:
        raise _modified(path, slide_id)


def _modified(path: Path, slide_id: str) -> SlideModified:
    cause = "its file was written, replaced or given another owner, permission or link while it was read"
    return SlideModified(cause, "run again when the copy has ended", slide=slide_id, path=path)


def cached_sha256(path: Path) -> str:
    """Return the SHA-256 of a slide, which is computed once in a process while the slide is not touched.

    Raises:
        SlideModified: It was touched while it was hashed.
    """
    with unmodified(path) as stamped:
        return _sha256_of(path, stamped)


@lru_cache(maxsize=256)
def _sha256_of(path: Path, _stamped: str) -> str:
    return sha256(path)


def require_file(path: Path, slide_id: str = "", *, what: str = "slide") -> None:
    """Refuse what is not a regular file with something in it, before a library looks at it.

    Args:
        path: The file.
        slide_id: Name of the slide for messages.
        what: What the file holds.

    Raises:
        InputError: There is no such file, or something else has the name.
        EnvironmentFault: It may not be looked at.
    """
    found = _looked_at(path, slide_id, what)
    if stat.S_ISDIR(found.st_mode):
        remedy = "name a file (of DICOM any .dcm in the folder) in its line, or use dataset=folder"
        raise InputError(f"the path is a folder, not a {what} file", remedy, slide=slide_id, path=path)
    if not stat.S_ISREG(found.st_mode):
        raise InputError("the path is not a regular file", "remove it or its line", slide=slide_id, path=path)
    if found.st_size == 0:
        raise InputError(f"the {what} file is empty (0 bytes)", COPY_AGAIN, slide=slide_id, path=path)


def require_readable(path: Path) -> None:
    """See that the system lets us read a slide's files, of which a library says no more than that it knows no such one.

    Raises:
        EnvironmentFault: It does not.
    """
    for _, part in _parts(path):
        with _as_slide_fault(part), part.open("rb") as stream:
            stream.read(1)


def unlisted(error: OSError) -> EnvironmentFault:
    """Return what to say of a folder that may not be listed: what it holds would be left out without a word."""
    cause = f"the folder cannot be listed ({faults.cause(error)})"
    return EnvironmentFault(cause, faults.remedy(error), path=error.filename or "")


def _looked_at(path: Path, slide_id: str, what: str) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise _absent(path, slide_id, what, error) from error


def _absent(path: Path, slide_id: str, what: str, error: OSError) -> WsiflowError:
    """Return why a file cannot be looked at: a link that leads nowhere is not a file out of reach."""
    if isinstance(error, FileNotFoundError | NotADirectoryError) or error.errno == errno.ELOOP:
        if path.is_symlink():
            cause = f"the {what} file is a link that leads nowhere ({path.readlink()})"
            return InputError(cause, "mend the link, or remove it or its line", slide=slide_id, path=path)
        cause, remedy = f"the {what} file does not exist", "correct the path, or remove its line"
        return InputError(cause, remedy, slide=slide_id, path=path)
    cause = f"the {what} file is out of reach ({faults.cause(error)})"
    return EnvironmentFault(cause, faults.remedy(error), slide=slide_id, path=path)


def _parts(path: Path) -> list[tuple[str, Path]]:
    """Return every file of a slide with its name relative to the slide's folder, sorted by name."""
    require_file(path)
    parts = {path, *_companions(path)}
    return sorted((part.relative_to(path.parent).as_posix(), part) for part in parts)


def _companions(path: Path) -> Iterator[Path]:
    """Yield the files that belong to a slide besides the one that names it.

    Raises:
        InputError: One of them is no file: left out, it would be missing from the hash without a word.
        EnvironmentFault: They may not be listed or read.
    """
    for part in _named_so(path):
        kind = _looked_at(part, "", "slide's data").st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            raise InputError("it is among the slide's files and no regular file", "remove it", path=part)
        if stat.S_ISREG(kind):
            yield part


def _named_so(path: Path) -> Iterator[Path]:
    """Yield what belongs to a slide by its name."""
    kind, data = path.suffix.lower(), path.with_suffix("")
    if kind == ".mrxs" and data.is_dir():
        for folder, _, names in os.walk(data, onerror=_raise_unlisted):
            yield from (Path(folder, name) for name in names)
    elif kind == ".dcm":
        yield from (part for part in _listed(path.parent) if part.suffix.lower() == ".dcm")
    elif kind in {".vms", ".vmu"}:
        try:
            index = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise _unread(path, error) from error
        yield from (part for part in _listed(path.parent) if part.name in index)


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise unlisted(error) from error


def _raise_unlisted(error: OSError) -> None:
    raise unlisted(error) from error


def _unread(path: Path, error: OSError) -> EnvironmentFault:
    cause = f"the slide file cannot be read ({faults.cause(error)})"
    return EnvironmentFault(cause, faults.remedy(error), path=path)


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
        raise _unread(path, error) from error
