"""Files that a process reads once, and again when they have changed.

A worker may outlive a run: Dask workers at an address, served flows and notebooks meet another plan, another
configuration or another model under a path they have seen before. What is remembered of a file is therefore bound to
its content, and whether that is still the same is asked at each use.
"""

import hashlib
import os
import time
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import TypeVar

_Parsed = TypeVar("_Parsed")

# Within a tick of its clock a file system gives two versions of a file the same times.
_CLOCK_TICK_NS = 2_000_000_000

_State = tuple[int, ...]


def content_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes; they are hashed again only where the file was touched.

    Raises:
        OSError: It cannot be read.
    """
    # A file that is opened is asked about anew on network file systems; by its path it may be an old answer.
    with path.open("rb") as stream:
        found = os.fstat(stream.fileno())
        state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    if abs(time.time_ns() - found.st_ctime_ns) < _CLOCK_TICK_NS:
        return _hashed(path)
    return _known_hash(path, state)


def cached_by_content(files: int) -> Callable[[Callable[[Path], _Parsed]], Callable[[Path], _Parsed]]:
    """Return a decorator for functions that read one file: what they returned is kept while its content is the same.

    Args:
        files: How many files are remembered at a time.
    """

    def decorate(read: Callable[[Path], _Parsed]) -> Callable[[Path], _Parsed]:
        @lru_cache(maxsize=files)
        def known(path: Path, _sha256: str) -> _Parsed:
            return read(path)

        @wraps(read)
        def look(path: Path) -> _Parsed:
            try:
                sha256 = content_sha256(path)
            except OSError:
                return read(path)  # which says what is wrong in its own words
            return known(path, sha256)

        return look

    return decorate


def _hashed(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@lru_cache(maxsize=64)
def _known_hash(path: Path, _state: _State) -> str:
    return _hashed(path)
