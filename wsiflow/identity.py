"""Which files a slide consists of, and whether they are still the same.

Input: the path that names a slide. Output: hashes over all of its files. Nothing here opens the slide as an image.
"""

import hashlib
import stat
from collections.abc import Iterator
from pathlib import Path

from wsiflow import faults
from wsiflow.errors import EnvironmentFault, InputError

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


def _file_sha256(path: Path) -> str:
    """Hash one file in pieces."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        cause = f"the slide file cannot be read ({faults.cause(error)})"
        raise EnvironmentFault(cause, faults.remedy(error), path=path) from error
