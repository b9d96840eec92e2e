"""Errors of the operating system, translated into the file concerned, the cause and a remedy that fits.

Errors that Python raises carry an errno. Errors that HDF5 raises carry none, but their text contains it.
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
# These errors mean that the path or the file is wrong, on any machine; all others may pass.
_OF_INPUT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
_OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OF_SEMAPHORES = {errno.EROFS, errno.EACCES, errno.ENOSPC, errno.ENOENT, errno.ENOSYS}
# Under a limit of address space these are all that is seen of it: no signal, and no exit code.
_OF_MEMORY = re.compile(
    r"MemoryError|cannot allocate memory|failed to map segment|bad[ _]alloc|out of memory|not enough memory"
    r"|memory allocation .*failed|failed to allocate",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"errno = (\d+)")
_FILE = re.compile(r"name = '([^']+)'")


def number(error: OSError) -> int:
    """Return the errno of an error, read from the text where HDF5 wrote it there; 0 where there is none."""
    match = _NUMBER.search(str(error))
    return int(match[1]) if match else error.errno or 0


def subject(error: OSError) -> str:
    """Return the file that an error names, or an empty text where it names none."""
    match = _FILE.search(str(error))
    if match:
        return match[1]
    return os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else ""


def cause(error: OSError) -> str:
    """Return the system's description of an error, without the file."""
    code = number(error)
    return os.strerror(code) if code else " ".join(str(error).split()) or type(error).__name__


def remedy(error: OSError, otherwise: str = _AGAIN) -> str:
    """Return what the user can do about an error.

    Args:
        error: The error of the system.
        otherwise: The alternative that is offered where the place is at fault, and not the process: for a process
            without memory another folder does not help.
    """
    code = number(error)
    return f"{_REMEDIES.get(code, 'correct the cause')}, {_AGAIN if code in _OF_PROCESS else otherwise}"


def is_of_machine(error: OSError) -> bool:
    """Return whether an error is the machine's and not the file's: elsewhere or later the file may be readable."""
    return number(error) not in {0, *_OF_INPUT}


def tells_of_memory(text: str) -> bool:
    """Tell whether a message of a library or a program says that memory was lacking."""
    return _OF_MEMORY.search(text) is not None


def is_of_memory(error: BaseException) -> bool:
    """Tell whether an error, or one of those that caused it, means that memory was lacking."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or tells_of_memory(str(error)):
        return True
    before = error.__cause__ or error.__context__
    return before is not None and is_of_memory(before)


def error_named_in(text: str) -> OSError | None:
    """Return the error of the machine that a library's message describes in words, or None where it describes none."""
    codes = (code for code in _REMEDIES if code not in _OF_INPUT)
    return next((OSError(code, os.strerror(code)) for code in codes if os.strerror(code) in text), None)


def is_of_writing(error: OSError) -> bool:
    """Return whether an error can only occur while a file is written."""
    return number(error) in _OF_WRITING


def as_text(name: str) -> str:
    """Return a file's name with those of its bytes escaped that are no UTF-8 text."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def fault(error: OSError, *, path: object = "", stage: str = "") -> EnvironmentFault:
    """Return the error of the system as an `EnvironmentFault`.

    Args:
        error: The error of the system.
        path: The file concerned, where the error does not name it.
        stage: The stage of the run.
    """
    return EnvironmentFault(cause(error), remedy(error), path=subject(error) or path, stage=stage)


def unreadable(error: OSError, what: str, advice: str, *, path: object, slide: str = "") -> WsiflowError:
    """Return the error of an input file that cannot be read.

    Args:
        error: The error of the system.
        what: What cannot be read, for example ``the manifest``.
        advice: The remedy where the path or the file is wrong.
        path: The file.
        slide: Id of the slide to which the file belongs.

    Returns:
        An `InputError` where the path or the file is wrong, an `EnvironmentFault` where the machine is at fault.
    """
    message = f"{what} cannot be read ({cause(error)})"
    if number(error) in _OF_INPUT:
        return InputError(message, advice, path=path, slide=slide)
    return EnvironmentFault(message, remedy(error), path=path, slide=slide)


def worker_fault(error: OSError, otherwise: str = _AGAIN) -> EnvironmentFault:
    """Return the error of worker processes that cannot be started; their semaphores are files in shared memory."""
    place = "/dev/shm" if number(error) in _OF_SEMAPHORES and not subject(error) else ""
    message = f"worker processes cannot be started ({cause(error)})"
    return EnvironmentFault(message, remedy(error, otherwise), path=subject(error) or place)
