"""A folder of results that take long to make and can be made again at any time.

Each is one file: the SHA-256 of the content, then the content. A file that is not whole counts as none; a folder that
cannot be written costs time and nothing else. Files appear whole, so any number of processes may share the folder.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

_DIGEST_BYTES = 32


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return where a user's results are kept between runs; the folder can be deleted at any time.

    None for a user without a home, as in containers that run under any number.
    """
    if environ.get("WSIFLOW_CACHE"):
        return Path(environ["WSIFLOW_CACHE"])
    base = environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "wsiflow"
    except RuntimeError:
        return None


def cached(folder: Path | None, key: str, make: Callable[[], bytes]) -> bytes:
    """Return what is kept under a key.

    Args:
        folder: The folder, None for none.
        key: Names the content: the hash of all that decides it.
        make: Makes the content where it is not there, or not whole.
    """
    if folder is None:
        return make()
    content = _whole(folder / key)
    if content is None:
        content = make()
        _keep(folder / key, hashlib.sha256(content).digest() + content)
    return content


def _whole(path: Path) -> bytes | None:
    """Return the content of a file, None where there is none or it is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return content if digest == hashlib.sha256(content).digest() else None


def _keep(path: Path, data: bytes) -> None:
    """Write a file under its name, where that is possible; of two processes the later one wins."""
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
