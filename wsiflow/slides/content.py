"""The files of which a slide consists, and whether they have changed.

Input: the path of a slide. Output: hashes over all of its files. This module does not open the slide as an image.

Changes are detected by the sizes and times of the files. A change may be missed for a while where another machine
writes through a memory map, or where the times of a file system are coarser than the interval between two changes.
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
from wsiflow.slides import dicom
from wsiflow.slides.readers.formats import is_slide_folder
from wsiflow.system import faults

COPY_AGAIN = "copy it again from its source, or remove its line"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a slide in hexadecimal.

    The hash of a slide that is one file is that of the file. A slide may also consist of several files: MIRAX with its
    folder, the DICOM files of a series, or a Hamamatsu index with the files it names. Its hash is that of the list of
    their hashes and names.

    Raises:
        InputError: The file is missing or not a regular file.
        EnvironmentFault: The system refuses to read a file.
    """
    parts = {name: _file_sha256(part) for name, part in _parts(path)}
    if len(parts) == 1:
        return next(iter(parts.values()))
    listing = "".join(f"{digest}  {name}\n" for name, digest in parts.items())
    return hashlib.sha256(listing.encode()).hexdigest()


def signature(path: Path) -> str:
    """Return a hash of the names, sizes, modification times and inodes of a slide's files.

    It changes when a file is written or replaced. While it is unchanged, a former SHA-256 of the slide remains valid.

    Raises:
        InputError: The file is missing or not a regular file.
    """
    parts = [(name, part.stat()) for name, part in _parts(path)]
    listing = "".join(f"{status.st_size} {status.st_mtime_ns} {status.st_ino} {name}\n" for name, status in parts)
    return hashlib.sha256(listing.encode()).hexdigest()


def stamp(path: Path) -> str:
    """Return a hash that changes with any modification of a slide's files, including links, owners and permissions.

    Unlike `signature` it covers the status change times (ctime), which no program can set. It therefore also detects a
    file that was written and whose modification time was then set back, as copying tools do.

    Raises:
        InputError: The file is missing or not a regular file.
        EnvironmentFault: The system refuses to read a file.
    """
    parts = [(name, _status(part)) for name, part in _parts(path)]
    listing = "".join(
        f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino} {name}\n" for name, status in parts
    )
    return hashlib.sha256(listing.encode()).hexdigest()


@contextlib.contextmanager
def unmodified(path: Path, slide_id: str = "") -> Iterator[str]:
    """Verify that no file of a slide is modified while the body reads it, not even back to its former content.

    Yields:
        The stamp of the slide, see `stamp`.

    Raises:
        SlideModified: A file was modified; this replaces any error of the body, which the modification may have caused.
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
    cause = "the slide was written, replaced or given another owner, permission or link while it was read"
    return SlideModified(cause, "run again when copying has ended", slide=slide_id, path=path)


def cached_sha256(path: Path) -> str:
    """Return the SHA-256 of a slide, which this process computes again only if the slide's stamp has changed.

    Raises:
        SlideModified: A file of the slide was modified while it was hashed.
    """
    with unmodified(path) as stamped:
        return _sha256_of(path, stamped)


@lru_cache(maxsize=256)
def _sha256_of(path: Path, _stamped: str) -> str:
    return sha256(path)


def require_file(path: Path, slide_id: str = "", *, what: str = "slide") -> None:
    """Refuse a path that is not a regular file with content, before a library opens it.

    Args:
        path: The file.
        slide_id: Id of the slide, for messages.
        what: What the file contains, for messages.

    Raises:
        InputError: The file does not exist, is empty, is a folder or is not a regular file.
        EnvironmentFault: The system refuses to access it.
    """
    status = _file_status(path, slide_id, what)
    if stat.S_ISDIR(status.st_mode):
        if what == "slide" and is_slide_folder(path):
            return
        remedy = "name a file (of DICOM any .dcm in the folder) in its line, or use dataset=folder"
        raise InputError(f"the path is a folder, not a {what} file", remedy, slide=slide_id, path=path)
    if not stat.S_ISREG(status.st_mode):
        raise InputError("the path is not a regular file", "remove it or its line", slide=slide_id, path=path)
    if status.st_size == 0:
        raise InputError(f"the {what} file is empty (0 bytes)", COPY_AGAIN, slide=slide_id, path=path)


def require_readable(path: Path) -> None:
    """Verify that the files of a slide can be read; libraries report a file without permission as an unknown format.

    Raises:
        EnvironmentFault: The system refuses to read a file.
    """
    for _, part in _parts(path):
        with _as_slide_fault(part), part.open("rb") as stream:
            stream.read(1)


def unlisted(error: OSError) -> EnvironmentFault:
    """Return the error of a folder that cannot be listed; without it the files in there would be left out silently."""
    cause = f"the folder cannot be listed ({faults.cause(error)})"
    return EnvironmentFault(cause, faults.remedy(error), path=error.filename or "")


def _file_status(path: Path, slide_id: str, what: str) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise _absent(path, slide_id, what, error) from error


def _absent(path: Path, slide_id: str, what: str, error: OSError) -> WsiflowError:
    """Return the error of a file that cannot be accessed: it is missing, is a broken link, or the system refuses it."""
    if isinstance(error, FileNotFoundError | NotADirectoryError) or error.errno == errno.ELOOP:
        if path.is_symlink():
            cause = f"the {what} file is a broken link ({path.readlink()})"
            return InputError(cause, "correct the link, or remove it or its line", slide=slide_id, path=path)
        cause, remedy = f"the {what} file does not exist", "correct the path, or remove its line"
        return InputError(cause, remedy, slide=slide_id, path=path)
    cause = f"the {what} file cannot be accessed ({faults.cause(error)})"
    return EnvironmentFault(cause, faults.remedy(error), slide=slide_id, path=path)


def _parts(path: Path) -> list[tuple[str, Path]]:
    """Return all files of a slide, each with its name relative to the folder of the slide, sorted by name."""
    require_file(path)
    parts = {*([] if path.is_dir() else [path]), *_companions(path)}
    return sorted((part.relative_to(path.parent).as_posix(), part) for part in parts)


def _companions(path: Path) -> Iterator[Path]:
    """Yield the files that belong to a slide besides the one at its path.

    Raises:
        InputError: One of them is not a regular file; if it were skipped, the hash would silently not cover it.
        EnvironmentFault: The files cannot be listed or read.
    """
    for part in _candidates(path):
        kind = _file_status(part, "", "slide's data").st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            raise InputError("the file belongs to a slide, but is not a regular file", "remove it", path=part)
        if stat.S_ISREG(kind):
            yield part


def companions(path: Path) -> list[Path]:
    """Return the files that by their names belong to a slide besides the one at its path; none if they are unknown."""
    try:
        return list(_candidates(path))
    except WsiflowError:
        return []


def _candidates(path: Path) -> Iterator[Path]:
    """Yield the files and folders that by their names belong to a slide, according to its format."""
    kind, data = path.suffix.lower(), path.with_suffix("")
    if path.is_dir() and is_slide_folder(path):
        yield from _below(path)
    elif kind == ".mrxs" and data.is_dir():
        yield from _below(data)
    elif kind == ".dcm":
        yield from _of_series(path)
    elif kind in {".vms", ".vmu"}:
        try:
            index = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise _unread(path, error) from error
        yield from (part for part in _listed(path.parent) if part.name in index)


def _of_series(path: Path) -> list[Path]:
    """Return the files of a DICOM series: other slides may be in the same folder."""
    try:
        return dicom.files_of_series(path)
    except OSError as error:
        raise unlisted(error) from error


def _below(folder: Path) -> Iterator[Path]:
    for here, _, names in os.walk(folder, onerror=_raise_unlisted):
        yield from (Path(here, name) for name in names)


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
    """Return the status of a file; it is opened first, so that a network file system asks its server."""
    with _as_slide_fault(path), path.open("rb") as stream:
        return os.fstat(stream.fileno())


def _file_sha256(path: Path) -> str:
    """Return the SHA-256 of one file."""
    with _as_slide_fault(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def _as_slide_fault(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unread(path, error) from error
