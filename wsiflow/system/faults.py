"""What the system refused, told so that it can be mended: the file it is about, the cause, and the remedy that fits.

Python's own errors have a number; HDF5 writes it into the text of an error that has none.
"""

import errno
import os
import re

from wsiflow.errors import EnvironmentFault, InputError, WsiflowError

_SPACE = "free space there"
_ACCESS = "correct the permissions there"
_LOCKS = "use a disk with a lock service"
_ELSEWHERE = "see that the disk or network it lies on works"
_PATH = "correct the path"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _SPACE),
    errno.EFBIG: "use a disk that takes files of this size",
    **dict.fromkeys((errno.EACCES, errno.EPERM), _ACCESS),
    errno.EROFS: "mount it for writing",
    **dict.fromkeys((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP), _LOCKS),
    **dict.fromkeys((errno.EAGAIN, errno.EDEADLK, errno.ETXTBSY, errno.EBUSY), "end what else uses it"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files (ulimit -n)"),
    errno.ENOMEM: "free memory, or use fewer workers",
    **dict.fromkeys((errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.EREMOTEIO), _ELSEWHERE),
    **dict.fromkeys((errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH), _ELSEWHERE),
    errno.ECONNREFUSED: "see that it runs and can be reached",
    errno.ENAMETOOLONG: "choose a shorter name",
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL), _PATH),
    **dict.fromkeys((errno.EEXIST, errno.ENOTEMPTY), "remove what is in its place"),
}
_AGAIN = "then run again"
_OF_PROCESS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
# What a path or a file is wrong for, wherever it is read; all else may pass.
_OF_INPUT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
_OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OF_SEMAPHORES = {errno.EROFS, errno.EACCES, errno.ENOSPC, errno.ENOENT, errno.ENOSYS}
_NUMBER = re.compile(r"errno = (\d+)")
_FILE = re.compile(r"name = '([^']+)'")


def number(error: OSError) -> int:
    """Return the number of an error, from its text where HDF5 wrote it; 0 where there is none."""
    found = _NUMBER.search(str(error))
    return int(found[1]) if found else error.errno or 0


def subject(error: OSError) -> str:
    """Return the file that an error names; empty where it names none."""
    found = _FILE.search(str(error))
    if found:
        return found[1]
    return os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else ""


def cause(error: OSError) -> str:
    """Say what the system refused, without the file."""
    code = number(error)
    return os.strerror(code) if code else " ".join(str(error).split()) or type(error).__name__


def remedy(error: OSError, otherwise: str = _AGAIN) -> str:
    """Say what to do about it.

    Args:
        error: What the system said.
        otherwise: What else helps where the place is what is wrong, and not the process.
    """
    code = number(error)
    return f"{_REMEDIES.get(code, 'mend it')}, {_AGAIN if code in _OF_PROCESS else otherwise}"


def is_of_machine(error: OSError) -> bool:
    """Tell whether an error says nothing of the file that is read: there or later it may be read."""
    return number(error) not in {0, *_OF_INPUT}


def error_named_in(text: str) -> OSError | None:
    """Return the error of the machine that a library tells in words, None where it tells another."""
    codes = (code for code in _REMEDIES if code not in _OF_INPUT)
    return next((OSError(code, os.strerror(code)) for code in codes if os.strerror(code) in text), None)


def is_of_writing(error: OSError) -> bool:
    """Tell whether only who writes can meet the error."""
    return number(error) in _OF_WRITING


def fault(error: OSError, *, path: object = "", stage: str = "") -> EnvironmentFault:
    """Return the error as one of the environment.

    Args:
        error: What the system said.
        path: The file concerned, where the error does not name it.
        stage: The step of the line.
    """
    return EnvironmentFault(cause(error), remedy(error), path=subject(error) or path, stage=stage)


def unreadable(error: OSError, what: str, advice: str, *, path: object, slide: str = "") -> WsiflowError:
    """Return the error of an input that cannot be read: its own, or that of the machine it is read on.

    Args:
        error: What the system said.
        what: What cannot be read, for example ``the manifest``.
        advice: What to do where the path or the file is wrong.
        path: The file.
        slide: The slide it belongs to.
    """
    told = f"{what} cannot be read ({cause(error)})"
    if number(error) in _OF_INPUT:
        return InputError(told, advice, path=path, slide=slide)
    return EnvironmentFault(told, remedy(error), path=path, slide=slide)


def worker_fault(error: OSError, otherwise: str = _AGAIN) -> EnvironmentFault:
    """Return the error of worker processes that cannot be started; their locks are files of the shared memory."""
    place = "/dev/shm" if number(error) in _OF_SEMAPHORES and not subject(error) else ""
    told = f"worker processes cannot be started ({cause(error)})"
    return EnvironmentFault(told, remedy(error, otherwise), path=subject(error) or place)
