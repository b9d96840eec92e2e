"""A cache folder for results that take long to compute and can be computed again at any time.

Each result is one file: the SHA-256 of the content, then the content. A damaged file counts as missing, and a folder
that cannot be written only costs time. Files are renamed into place, so any number of processes may share the folder.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

_DIGEST_BYTES = 32


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the user's cache folder, or None for a user without a home, as in containers with an arbitrary user id.

    The folder is ``WSIFLOW_CACHE``, or ``wsiflow`` in ``XDG_CACHE_HOME`` or ``~/.cache``. It can always be deleted.
    """
    if environ.get("WSIFLOW_CACHE"):
        return Path(environ["WSIFLOW_CACHE"])
    base = environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "wsiflow"
    except RuntimeError:
        return None


def cached(folder: Path | None, key: str, make: Callable[[], bytes]) -> bytes:
    """Return the cached content for a key; if it is missing or damaged, compute and store it.

    Args:
        folder: The cache folder; None to compute the content without a cache.
        key: Hash of everything that decides the content.
        make: Function that computes the content.
    """
    content = kept(folder, key)
    if content is not None:
        return content
    content = make()
    if folder is not None:
        _keep(folder / key, hashlib.sha256(content).digest() + content)
    return content


def kept(folder: Path | None, key: str) -> bytes | None:
    """Return the cached content for a key, or None if it is missing or damaged, or there is no cache folder."""
    if folder is None:
        return None
    try:
        data = (folder / key).read_bytes()
    except OSError:
        return None
    digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return content if digest == hashlib.sha256(content).digest() else None


def _keep(path: Path, data: bytes) -> None:
    """Write a file and rename it into place, if that is possible; of two processes the later one wins."""
    attempt = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as stream:
            attempt = Path(stream.name)
            stream.write(data)
        attempt.replace(path)
    except OSError:
        if attempt is not None:
            attempt.unlink(missing_ok=True)
