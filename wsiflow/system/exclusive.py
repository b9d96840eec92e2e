"""Give a file its final name, unless something has that name: nothing is ever overwritten.

A hard link does that on most file systems. Some have none (exFAT, SMB) or only within a folder (BeeGFS): there the file
is moved by a rename that does not overwrite, or moved beside its name and linked there.
"""

import ctypes
import errno
import os
import uuid
from contextlib import suppress
from pathlib import Path

from wsiflow.errors import EnvironmentFault
from wsiflow.system import faults

_CURRENT_FOLDER = -100  # AT_FDCWD
_KEEP_EXISTING = 1  # RENAME_NOREPLACE
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EINVAL}
_NO_RENAME = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


def give_name(source: Path, final: Path) -> None:
    """Give a file the name ``final`` on the same file system; where links cannot be, it loses the name ``source``.

    Raises:
        FileExistsError: Something has the name.
        EnvironmentFault: The file system has no way to do that.
        OSError: The file system refused.
    """
    try:
        os.link(source, final)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename(source, final)


def _rename(source: Path, final: Path) -> None:
    """Rename a file, unless something has the new name."""
    try:
        _rename_by_kernel(source, final)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        _link_beside(source, final)


def _rename_by_kernel(source: Path, final: Path) -> None:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:  # not Linux, or an old C library
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if rename(_CURRENT_FOLDER, os.fsencode(source), _CURRENT_FOLDER, os.fsencode(final), _KEEP_EXISTING):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(source), None, str(final))


def _link_beside(source: Path, final: Path) -> None:
    """Move a file into the folder of its name, and link it there.

    Raises:
        EnvironmentFault: There are no links within a folder either.
    """
    beside = final.with_name(f".{uuid.uuid4().hex}")
    source.rename(beside)
    try:
        os.link(beside, final)
    except FileExistsError:
        beside.rename(source)  # the caller compares the two
        raise
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        if error.errno not in _NO_LINKS:
            raise
        cause = f"the file system has neither hard links ({faults.cause(error)}) nor renames that never overwrite"
        raise EnvironmentFault(cause, "choose another out=", path=final) from error
    beside.unlink()
