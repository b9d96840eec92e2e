"""A cache of parsed files that a process reads again only when their content has changed.

A worker may outlive a run: persistent Dask workers, served flows and notebooks meet another plan, configuration or
model under a path they have read before. Cached results are therefore bound to the content of the file, which is
checked at each use.
"""

import hashlib
import os
import time
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import TypeVar

_Parsed = TypeVar("_Parsed")

# Two versions of a file that are written within one tick of the file system's clock have the same times.
_CLOCK_TICK_NS = 2_000_000_000

_State = tuple[int, ...]


def content_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, which is hashed again only if its inode, size or times have changed.

    Raises:
        OSError: The file cannot be read.
    """
    # Network file systems ask the server about an open file, but may answer from a cache about a path.
    with path.open("rb") as stream:
        status = os.fstat(stream.fileno())
        state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if abs(time.time_ns() - status.st_ctime_ns) < _CLOCK_TICK_NS:
        return _hashed(path)
    return _known_hash(path, state)


def cached_by_content(files: int) -> Callable[[Callable[[Path], _Parsed]], Callable[[Path], _Parsed]]:
    """Return a decorator for functions that read one file; it caches their results by the content of the file.

    Args:
        files: Number of files whose results are cached, the least recently used being dropped.
    """

    def decorate(read: Callable[[Path], _Parsed]) -> Callable[[Path], _Parsed]:
        @lru_cache(maxsize=files)
        def read_once(path: Path, _sha256: str) -> _Parsed:
            return read(path)

        @wraps(read)
        def read_if_changed(path: Path) -> _Parsed:
            try:
                sha256 = content_sha256(path)
            except OSError:
                return read(path)  # which raises an error of its own about the file
            return read_once(path, sha256)

        return read_if_changed

    return decorate


def _hashed(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@lru_cache(maxsize=64)
def _known_hash(path: Path, _state: _State) -> str:
    return _hashed(path)
