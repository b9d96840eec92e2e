"""Publishing of files: a file appears under its final name whole or not at all, exactly once, and with a receipt.

A file is published in these steps. The caller writes and closes a private attempt file on the same file system, which
is then verified by the caller's function, hashed, flushed to disk and hard-linked to its final name, or renamed where
links cannot be, see `wsiflow.system.exclusive`. That fails if the name exists, so exactly one of any number of attempts
wins. The receipt is published last, in the same way. A final name is never replaced and never opened for writing. From
then on nobody has the permission to write to the file, so that a program which opens it to change it fails. An attempt
that loses the race compares hashes: equal bytes are a success, different bytes an `IntegrityError`, and both files are
kept.

A file is *done* when its receipt exists and has the requested key, and the size and the SHA-256 of the file are those
of the receipt. A deleted file from which others were computed is an error. A deleted file that is only derived from
others, or that may be deleted to save space, is computed again and must have the bytes that its receipt records.

Every change of the file system calls `_effect` first, so that a test can end the process before any of them.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wsiflow.errors import EnvironmentFault, IntegrityError
from wsiflow.system import exclusive, faults, processes
from wsiflow.system.processes import Process

Receipt = dict[str, Any]

_RESERVE_BYTES = 8_000_000  # for the structure of the file, for receipts, and for other processes that write
ATTEMPTS = ".attempts"
#: Variable that names a folder on the machine's own disk, in which attempts are written before they are copied.
SCRATCH = "WSIFLOW_SCRATCH"
_NAME = re.compile(r"(?P<host>.*)-(?P<pid>[0-9]+)-(?P<space>[0-9a-f]{12})-(?P<born>[0-9]*)-[0-9a-f]{32}")
RECEIPTS = "receipts"
_WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
# Of a disk that has no permissions, or where the file is another user's.
_NO_MODES = {errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_REQUIRED_KEYS = frozenset({"path", "key", "sha256", "bytes", "attempt"})


def _effect(name: str, path: Path) -> None:
    """Announce one change of the file system; this does nothing, but tests replace it."""


def key_of(**parts: Any) -> str:
    """Return the key of a piece of work: the SHA-256 of the canonical JSON of everything that decides its result.

    Args:
        parts: Hashes, settings and versions by name, but no times and no paths.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def receipt_path(root: Path, name: str) -> Path:
    """Return the path of the receipt of the published file ``name`` (relative to ``root``)."""
    return root / RECEIPTS / f"{name}.json"


def read_receipt(root: Path, name: str) -> Receipt | None:
    """Return the receipt of the file ``name``, or None where it has none.

    Raises:
        IntegrityError: The receipt cannot be parsed, or a required key is missing.
    """
    path = receipt_path(root, name)
    remedy = f"delete it and {name}, then run again"
    try:
        receipt = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise IntegrityError(f"the receipt cannot be read ({error})", remedy, path=path) from error
    if not isinstance(receipt, dict) or not receipt.keys() >= _REQUIRED_KEYS:
        cause = f"the receipt cannot be read (it does not have all of {', '.join(sorted(_REQUIRED_KEYS))})"
        raise IntegrityError(cause, remedy, path=path)
    return receipt


def receipt_names(root: Path) -> list[str]:
    """Return the sorted names of all files that have a receipt; hidden files among the receipts are ignored.

    Raises:
        EnvironmentFault: A folder of receipts cannot be listed.
    """
    folder = root / RECEIPTS
    with _as_fault(folder):
        files = [Path(place, name) for place, _, names in os.walk(folder, onerror=_raise) for name in names]
    receipts = (path.relative_to(folder) for path in files if path.suffix == ".json")
    visible = (path for path in receipts if not any(part.startswith(".") for part in path.parts))
    return sorted(path.as_posix().removesuffix(".json") for path in visible)


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def done(root: Path, name: str, key: str) -> Receipt | None:
    """Return the receipt of ``name`` if it is published with this key and intact, or None if it is not published.

    Raises:
        IntegrityError: The file was published with another key, was deleted, or differs from its receipt.
    """
    receipt = read_receipt(root, name)
    if receipt is None:
        return None
    if receipt["key"] != key:
        raise IntegrityError(
            f"the file was published for other inputs or settings (its key is {receipt['key'][:12]}, not {key[:12]})",
            "choose another out= folder",
            path=root / name,
        )
    check(root, receipt)
    return receipt


def done_if_present(root: Path, name: str, key: str) -> Receipt | None:
    """Return what `done` returns, but None for a deleted file: for files that can be computed again at any time."""
    return done(root, name, key) if (root / name).exists() else None


def withdraw_other(root: Path, name: str, key: str) -> None:
    """Remove a file that was published under another key, of which no other file was computed, and its receipt."""
    receipt = read_receipt(root, name)
    if receipt is None or receipt["key"] == key:
        return
    with _as_fault(root / name):
        (root / name).unlink(missing_ok=True)
        receipt_path(root, name).unlink(missing_ok=True)  # last: a process that is killed here begins again


def has_recorded_size(root: Path, name: str) -> bool:
    """Return whether ``name`` is published and has the size of its receipt; quick, since nothing is hashed."""
    receipt = read_receipt(root, name)
    try:
        return receipt is not None and (root / name).stat().st_size == receipt["bytes"]
    except OSError:
        return False


def check(root: Path, receipt: Receipt, *, largest: int | None = None) -> None:
    """Verify a published file against its receipt.

    Args:
        root: Folder of the run.
        receipt: Receipt of the file.
        largest: Size in bytes above which a file is not hashed and only its size is compared; None to hash any file.

    Raises:
        IntegrityError: The file does not exist, or its size or SHA-256 is not that of the receipt.
        EnvironmentFault: They are not, while another program has the file open for writing.
    """
    path = root / receipt["path"]
    remedy = f"delete {path} and {receipt_path(root, receipt['path'])}, then run again"
    if not path.is_file():
        raise IntegrityError("the file was published, but no longer exists", remedy, path=path)
    hashed = largest is None or receipt["bytes"] <= largest
    if path.stat().st_size != receipt["bytes"] or (hashed and file_sha256(path) != receipt["sha256"]):
        if _is_written(path):
            cause = "another program has it open for writing, so that it is not as its receipt says"
            raise EnvironmentFault(cause, "close it there, then run again", path=path)
        raise IntegrityError("the file's size or SHA-256 is not that of its receipt", remedy, path=path)


def _is_written(path: Path) -> bool:
    """Tell whether a program has locked a file as HDF5 does while it writes: until then the file may be whole again."""
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # the disk has no locks
        pass
    return False


def attempt_folder(root: Path) -> Path:
    """Return the path of a new private folder, named after this process so that others can tell if it has ended."""
    host, pid, space, born = processes.current()
    return root / ATTEMPTS / f"{host}-{pid}-{space}-{born}-{uuid.uuid4().hex}"


class Attempt:
    """One attempt to publish a file: the path at which to write it, and its future receipt."""

    def __init__(self, root: Path, name: str, key: str, facts: Mapping[str, Any]) -> None:
        """Choose a private path without creating it; the arguments are those of `publishing`."""
        self.root, self.name = root, name
        folder = attempt_folder(root)
        scratch = os.environ.get(SCRATCH)
        self.path = (Path(scratch) / folder.name if scratch else folder) / Path(name).name
        self._clock, self._cpu = time.perf_counter(), time.process_time()
        self.receipt: Receipt = {
            "path": name,
            "key": key,
            **facts,
            "counts": {},
            "seconds": {},
            "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "attempt": self.path.parent.name,
        }

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the wall seconds of the body to the receipt's sum for this step."""
        start = time.perf_counter()
        yield
        seconds = self.receipt["seconds"]
        seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - start

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Exclude the time of the body, which other receipts record, from this receipt."""
        clock, cpu = time.perf_counter(), time.process_time()
        yield
        self._clock += time.perf_counter() - clock
        self._cpu += time.process_time() - cpu

    def charge(self, receipt: Receipt) -> None:
        """Add the cost of a part of the work that was done elsewhere or earlier, and mark the receipt as shared.

        Args:
            receipt: Receipt of that part.
        """
        self._clock -= receipt["wall_s"]
        self._cpu -= receipt["cpu_s"]
        self.receipt["shared"] = True

    def finish(self) -> None:
        """Complete the receipt with the facts that are known once the file is closed: hash, size, times and memory."""
        self.receipt |= {
            "sha256": file_sha256(self.path),
            "bytes": self.path.stat().st_size,
            "wall_s": time.perf_counter() - self._clock,
            "cpu_s": time.process_time() - self._cpu,
            "max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "ended": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }


@contextlib.contextmanager
def publishing(
    root: Path, name: str, key: str, facts: Mapping[str, Any], verify: Callable[[Path], None]
) -> Iterator[Attempt]:
    """Publish the file that the body writes at ``attempt.path``.

    Args:
        root: Folder of the run.
        name: Final name, relative to the folder of the run.
        key: Key of the content, see `key_of`.
        facts: Further entries of the receipt, for example kind, slide, group and versions.
        verify: Function that reads the closed attempt file and raises if its content is wrong.

    Yields:
        The attempt to write.

    Raises:
        EnvironmentFault: The file system refused an operation on the attempt.
        OSError: The system refused another operation of the body, for example to read a slide.
        IntegrityError: Another attempt has published different bytes.
    """
    attempt = Attempt(root, name, key, facts)
    with _as_fault(root / name):
        _make_folder(attempt.path.parent)
        _effect("write", attempt.path)
    try:
        yield attempt
        verify(attempt.path)
    except BaseException as error:  # a failed attempt may be as large as a slide
        _forget(attempt.path.parent)
        if isinstance(error, OSError) and _is_of_attempt(error, attempt):
            raise _fault(error, root / name) from error
        raise  # an input cannot be read: the code that reads it describes the error
    with _as_fault(root / name):
        attempt.finish()
        _give_name(root, name, _in_run(root, attempt), attempt.receipt)


def _in_run(root: Path, attempt: Attempt) -> Path:
    """Return the path of a finished attempt in the folder of the run, to which it is copied from a scratch folder.

    Raises:
        EnvironmentFault: The copy has other bytes.
    """
    if attempt.path.is_relative_to(root):
        return attempt.path
    path = root / ATTEMPTS / attempt.path.parent.name / attempt.path.name
    _make_folder(path.parent)
    _effect("copy", path)
    shutil.copyfile(attempt.path, path)
    if file_sha256(path) != attempt.receipt["sha256"]:
        _forget(path.parent)
        cause = f"the copy of {attempt.path} has other bytes"
        raise EnvironmentFault(cause, "see that both disks work, then run again", path=root / attempt.name)
    _forget(attempt.path.parent)
    return path


def adopt(root: Path, name: str, source: Path, receipt: Receipt) -> Receipt:
    """Publish a file of another folder as a hard link, or as a copy where links are impossible.

    Args:
        root: Folder of the run.
        name: Final name, relative to the folder of the run.
        source: The file, complete and final; it stays where it is.
        receipt: Receipt of the file in its own folder, which records its cost.

    Returns:
        The receipt in the folder of the run.

    Raises:
        EnvironmentFault: The file system refused an operation.
        IntegrityError: A file with different bytes already has this name.
    """
    folder = attempt_folder(root)
    path = folder / Path(name).name
    own = receipt | {"path": name, "attempt": folder.name}
    with _as_fault(root / name):
        _make_folder(folder)
        _effect("link", path)
        try:
            os.link(source, path)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source, path)
        _give_name(root, name, path, own)
    return own


def _give_name(root: Path, name: str, path: Path, receipt: Receipt) -> None:
    """Link the file of an attempt to its final name, and publish its receipt."""
    final = root / name
    _require_former(root, name, path, receipt)
    _make_folder(final.parent)
    _link(path, final, receipt["sha256"])
    note = path.with_name("receipt.json")
    _effect("write", note)
    note.write_text(json.dumps(receipt, indent=1, sort_keys=True), encoding="utf-8")
    _make_folder(receipt_path(root, name).parent)
    _link(note, receipt_path(root, name), None)
    _forget(path.parent)


def _require_former(root: Path, name: str, path: Path, receipt: Receipt) -> None:
    """Refuse to replace a deleted file by one with other bytes, because other files were computed from the former."""
    former = None if (root / name).exists() else read_receipt(root, name)
    if former is None or (former["sha256"], former["key"]) == (receipt["sha256"], receipt["key"]):
        return
    _forget(path.parent)
    cause = (
        f"the file was deleted, and computed again it has other bytes (SHA-256 {receipt['sha256'][:12]}) or another key"
    )
    raise IntegrityError(cause, f"delete {receipt_path(root, name)}, then run again", path=root / name)


def publish_bytes(root: Path, name: str, data: bytes, key: str, facts: Mapping[str, Any]) -> Receipt:
    """Publish a small file from memory, unless it is already done, and return its receipt."""
    receipt = done_if_present(root, name, key)
    if receipt is not None:
        return receipt
    with publishing(root, name, key, facts, accept) as attempt, attempt.timed("write"):
        attempt.path.write_bytes(data)
    return attempt.receipt


def accept(_path: Path) -> None:
    """Accept a file without verification: the ``verify`` for files that are written from memory."""


def generations(root: Path, name: str) -> list[Path]:
    """Return the paths of all published generations of ``name``, oldest first: ``plan.json``, ``plan.2.json``, ..."""
    stem, suffix = name.rsplit(".", 1)
    later = sorted(number for path in root.glob(f"{stem}.*.{suffix}") if (number := _generation(path, name)))
    files = (root / name, *(root / f"{stem}.{number}.{suffix}" for number in later))
    return [path for path in files if path.is_file()]


def _generation(path: Path, name: str) -> int:
    """Return the number, from 2, of a later generation of ``name``, or 0 for a file whose name is only similar."""
    stem, suffix = name.rsplit(".", 1)
    match = re.fullmatch(rf"{re.escape(stem)}\.([1-9][0-9]*)\.{re.escape(suffix)}", path.name)
    return int(match[1]) if match and match[1] != "1" else 0


def publish_generation(root: Path, name: str, data: bytes, facts: Mapping[str, Any]) -> Path:
    """Publish a new generation of a file, for example of the plan, next to the former ones.

    Nothing is published where the newest generation already has these bytes.

    Returns:
        The path of the newest generation, which contains ``data``.
    """
    files = generations(root, name)
    stem, suffix = name.rsplit(".", 1)
    known = bool(files) and files[-1].read_bytes() == data  # though its receipt may still be missing
    if files:
        latest = files[-1].name if known else f"{stem}.{max(1, _generation(files[-1], name)) + 1}.{suffix}"
    else:
        latest = name
    publish_bytes(root, latest, data, hashlib.sha256(data).hexdigest(), facts)
    return root / latest


def write_view(root: Path, name: str, data: bytes) -> None:
    """Write a view: a file that later runs may replace as a whole, and from which no result is computed."""
    path, folder = root / name, attempt_folder(root)
    with _as_fault(path):
        _make_folder(folder)
        _make_folder(path.parent)
        draft = folder / path.name
        _effect("write", draft)
        draft.write_bytes(data)
        _sync(draft)
        _effect("rename", path)
        draft.replace(path)
        _forget(folder)


def append_line(path: Path, text: str, *, sync: bool = False) -> None:
    """Append a line to a log; an incomplete last line of a process that was killed stays a separate line.

    Args:
        path: The log.
        text: The line, without a line end.
        sync: Whether to flush the line to disk before returning.

    Raises:
        EnvironmentFault: The file system refused to write.
    """
    with _as_fault(path), path.open("a+b") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 1))
        torn = size and stream.read(1) != b"\n"
        stream.write((b"\n" if torn else b"") + text.encode() + b"\n")
        if sync:
            stream.flush()
            os.fsync(stream.fileno())


def sweep_attempts(root: Path) -> None:
    """Remove the private folders of processes that are known to have ended.

    Folders of another machine, container or boot of this machine are kept, because their process may be at work.
    """
    for folder, process in _attempts(root):
        if processes.has_ended(process):
            _remove(folder)


def forget_attempts(root: Path, process: Process) -> None:
    """Remove the private folders of a process that the caller knows to have ended, wherever it ran."""
    for folder, whose in _attempts(root):
        if whose == process:
            _remove(folder)


def _attempts(root: Path) -> list[tuple[Path, Process]]:
    """Return all private folders, each with its process; folders with names of another form are ignored."""
    try:
        folders = sorted((root / ATTEMPTS).iterdir())
    except OSError:  # there are none, or they cannot be listed
        return []
    named = ((folder, _NAME.fullmatch(folder.name)) for folder in folders)
    return [
        (folder, Process(name["host"], int(name["pid"]), name["space"], name["born"])) for folder, name in named if name
    ]


@contextlib.contextmanager
def private_folder(root: Path) -> Iterator[Path]:
    """Provide a private folder and remove it afterwards; if this process is killed, another one will."""
    folder = attempt_folder(root)
    with _as_fault(folder):
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    _effect("rmdir", folder)
    shutil.rmtree(folder, ignore_errors=True)  # another process may be doing the same


def _link(source: Path, final: Path, sha256: str | None) -> None:
    """Give ``source`` its final name, unless that name exists.

    An existing file with the same bytes counts as success. Where a network file system loses the reply, the call fails
    although the name was given: the two names are then the same file, or only the final one is left.
    """
    _sync(source)
    _effect("link", final)
    try:
        exclusive.give_name(source, final)
    except OSError as error:
        was_given = final.exists() and (not source.exists() or source.samefile(final))
        if not isinstance(error, FileExistsError) and not was_given:
            raise
        if sha256 is not None and file_sha256(final) != sha256:
            raise IntegrityError(
                f"two attempts wrote different bytes (the other file is kept at {source})",
                "report this: the same inputs must give the same bytes on one kind of machine",
                path=final,
            ) from error
    _protect(final)
    _sync(final.parent)


def _protect(final: Path) -> None:
    """Take from everybody the permission to write to a published file; it can still be deleted.

    That comes after the hard link, which Linux refuses to users who may not write to a file that is another's, as all
    files are on a disk that takes every user for nobody.
    """
    mode = stat.S_IMODE(final.stat().st_mode)
    if not mode & _WRITE:  # another attempt has the name: whoever reads a slide takes a change of it for a change
        return
    _effect("chmod", final)
    try:
        final.chmod(mode & ~_WRITE)
    except OSError as error:
        if error.errno not in _NO_MODES:
            raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _effect("mkdir", folder)
        folder.mkdir(parents=True, exist_ok=True)


def _forget(folder: Path) -> None:
    """Remove a private folder; another process may be doing the same."""
    with contextlib.suppress(OSError):  # a folder that stays does no harm, and its error must not hide a former one
        for file in folder.iterdir():
            _effect("unlink", file)
            file.unlink(missing_ok=True)
        _effect("rmdir", folder)
        folder.rmdir()


@contextlib.contextmanager
def _as_fault(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _fault(error, path) from error


def _fault(error: OSError, path: Path) -> EnvironmentFault:
    """Return the error of the system as that of the published file, or of another file that the error names."""
    named = Path(faults.subject(error) or path)
    if not (path.is_relative_to(named) or named.is_relative_to(path) or {ATTEMPTS, RECEIPTS} & set(named.parts)):
        return faults.fault(error)
    cause = f"the file system refused: {faults.cause(error)}"
    return EnvironmentFault(cause, faults.remedy(error, "or choose another out="), path=path)


def _is_of_attempt(error: OSError, attempt: Attempt) -> bool:
    """Return whether an error is about the files that an attempt writes, and not about those it reads."""
    named = faults.subject(error)
    return Path(named).is_relative_to(attempt.path.parent) if named else faults.is_of_writing(error)


def require_space(root: Path, needed_bytes: int, *, less: str = "") -> None:
    """Refuse to begin a file for which the disk has too little space.

    On a full disk HDF5 ends the process with a segmentation fault, so that no error message is written.

    Args:
        root: Folder of the file.
        needed_bytes: Expected size of the file.
        less: A setting with which less space is needed, if there is one.

    Raises:
        EnvironmentFault: Less than ``needed_bytes`` plus a small reserve is free.
    """
    with _as_fault(root):
        free = shutil.disk_usage(root).free
    if free < needed_bytes + _RESERVE_BYTES:
        cause = f"{(needed_bytes + _RESERVE_BYTES) / 1e6:.0f} MB are needed, but only {free / 1e6:.0f} MB are free"
        remedy = f"free space there, or choose another out={f' ({less} needs far less)' if less else ''}"
        raise EnvironmentFault(cause, remedy, path=root)


def preflight(root: Path) -> None:
    """Verify, before any work is done, that files can be published in the folder of the run.

    Raises:
        EnvironmentFault: The folder cannot be created, or a file in it cannot be written, published or read back.
    """
    folder = attempt_folder(root)
    probe, final = folder / "probe", folder / "folder/final"  # files are published from one folder into another
    with _as_fault(root):
        _make_folder(final.parent)
        probe.write_bytes(b"probe")
        _link(probe, final, None)
        readable = final.read_bytes() == b"probe"
        _forget(final.parent)
        _forget(folder)
    if not readable:
        raise EnvironmentFault(
            "a file that is read back differs from what was written", "choose another out=", path=root
        )
