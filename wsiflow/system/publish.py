"""Files appear whole or not at all, once, with a receipt.

One file is published in this order: a private attempt file on the same file system; written and closed by the caller;
verified by the caller's check; hashed; flushed to disk; linked to its final name, which fails if that name exists, so
that of any number of attempts exactly one wins; then its receipt, published the same way. A final name is never
replaced and never opened for writing.

A file is *done* when its receipt exists, names the key that is asked for, and the file's size and SHA-256 are those of
the receipt. Where a file that others are computed from was deleted, that is told; what is made from others alone, or
may be deleted to save space, is made again, and must have the bytes that its receipt names. A loser of the race
compares hashes: equal is success, different is an `IntegrityError` and both are kept.

Every change to the file system goes through `_effect`, so that a test can end the process before any one of them.
"""

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wsiflow.errors import EnvironmentFault, IntegrityError
from wsiflow.system import faults, processes
from wsiflow.system.processes import Process

Receipt = dict[str, Any]

_RESERVE_BYTES = 8_000_000  # for the structure of the file, receipts, and others who write
ATTEMPTS = ".attempts"
_NAME = re.compile(r"(?P<host>.*)-(?P<pid>[0-9]+)-(?P<space>[0-9a-f]{12})-(?P<born>[0-9]*)-[0-9a-f]{32}")
RECEIPTS = "receipts"
_SAID = frozenset({"path", "key", "sha256", "bytes", "attempt"})


def _effect(name: str, path: Path) -> None:
    """Mark one change of the file system; does nothing, tests replace it."""


def key_of(**parts: Any) -> str:
    """Return the SHA-256 of the canonical JSON of what identifies a piece of work: content, never a time or a path."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def receipt_path(root: Path, name: str) -> Path:
    """Return where the receipt of the published file ``name`` (relative to ``root``) lies."""
    return root / RECEIPTS / f"{name}.json"


def read_receipt(root: Path, name: str) -> Receipt | None:
    """Return the receipt of ``name``, or None where there is none.

    Raises:
        IntegrityError: The receipt cannot be parsed.
    """
    path = receipt_path(root, name)
    remedy = f"delete it and {name}, then run again"
    try:
        receipt = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise IntegrityError(f"the receipt cannot be read ({error})", remedy, path=path) from error
    if not isinstance(receipt, dict) or not receipt.keys() >= _SAID:
        cause = f"the receipt cannot be read (it does not say {', '.join(sorted(_SAID))})"
        raise IntegrityError(cause, remedy, path=path)
    return receipt


def receipt_names(root: Path) -> list[str]:
    """Return the names of all files that have receipts, sorted; hidden files that others leave there are none.

    Raises:
        EnvironmentFault: Not all of their folders can be listed.
    """
    folder = root / RECEIPTS
    with _as_fault(folder):
        files = [Path(place, name) for place, _, names in os.walk(folder, onerror=_raise) for name in names]
    found = (path.relative_to(folder) for path in files if path.suffix == ".json")
    named = (path.as_posix().removesuffix(".json") for path in found if not any(p.startswith(".") for p in path.parts))
    return sorted(named)


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def done(root: Path, name: str, key: str) -> Receipt | None:
    """Return the receipt if ``name`` is published under ``key`` and whole, None if it has yet to be made.

    Raises:
        IntegrityError: A receipt is there, but for another key, or the file is gone or is not what the receipt says.
    """
    receipt = read_receipt(root, name)
    if receipt is None:
        return None
    if receipt["key"] != key:
        raise IntegrityError(
            f"it was published for other inputs or settings (key {receipt['key'][:12]}, wanted {key[:12]})",
            "choose another out= folder",
            path=root / name,
        )
    check(root, receipt)
    return receipt


def done_if_present(root: Path, name: str, key: str) -> Receipt | None:
    """Like `done`, of what can be made again at any time: None where the file was deleted."""
    return done(root, name, key) if (root / name).exists() else None


def has_recorded_size(root: Path, name: str) -> bool:
    """Tell whether ``name`` is published and still has its size: a look, no proof."""
    receipt = read_receipt(root, name)
    try:
        return receipt is not None and (root / name).stat().st_size == receipt["bytes"]
    except OSError:
        return False


def check(root: Path, receipt: Receipt, *, largest: int | None = None) -> None:
    """Compare a published file with its receipt.

    Args:
        root: The run's folder.
        receipt: The receipt.
        largest: Of a file of more bytes only the size is compared; None: every file is hashed.

    Raises:
        IntegrityError: The file is gone, or its size or SHA-256 is another.
    """
    path = root / receipt["path"]
    remedy = f"delete {path} and {receipt_path(root, receipt['path'])}, then run again"
    if not path.is_file():
        raise IntegrityError("it was published and is gone", remedy, path=path)
    hashed = largest is None or receipt["bytes"] <= largest
    if path.stat().st_size != receipt["bytes"] or (hashed and file_sha256(path) != receipt["sha256"]):
        raise IntegrityError("its bytes are not those of its receipt", remedy, path=path)


def attempt_folder(root: Path) -> Path:
    """Name a private folder, so that what a dead process leaves can be told from what is under way."""
    host, pid, space, born = processes.current()
    return root / ATTEMPTS / f"{host}-{pid}-{space}-{born}-{uuid.uuid4().hex}"


class Attempt:
    """One attempt at one file: where to write it, and what its receipt will say."""

    def __init__(self, root: Path, name: str, key: str, facts: Mapping[str, Any]) -> None:
        """Choose a private path; nothing is created yet."""
        self.root, self.name = root, name
        self.path = attempt_folder(root) / Path(name).name
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
        """Add the wall seconds of the body to the step's sum."""
        start = time.perf_counter()
        yield
        seconds = self.receipt["seconds"]
        seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - start

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leave the time of the body, for which there are other receipts, out of this one."""
        clock, cpu = time.perf_counter(), time.process_time()
        yield
        self._clock += time.perf_counter() - clock
        self._cpu += time.process_time() - cpu

    def charge(self, receipt: Receipt) -> None:
        """Count what a part of the work cost when it was done, elsewhere or earlier, and say so."""
        self._clock -= receipt["wall_s"]
        self._cpu -= receipt["cpu_s"]
        self.receipt["shared"] = True

    def finish(self) -> None:
        """Fill in what is known only once the file is closed."""
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
        root: The run's folder.
        name: Final name relative to the run's folder.
        key: What identifies the content, see `key_of`.
        facts: What else the receipt says, for example kind, slide, group, versions.
        verify: Opens the closed attempt again and raises if it is not what it should be.

    Yields:
        The attempt to write.

    Raises:
        EnvironmentFault: The file system refused what the attempt did.
        OSError: It refused what else the body did, for example to read a slide.
        IntegrityError: Another attempt published different bytes.
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
        raise  # what was read cannot be read: whoever reads says so
    with _as_fault(root / name):
        attempt.finish()
        _give_name(root, name, attempt.path, attempt.receipt)


def adopt(root: Path, name: str, source: Path, receipt: Receipt) -> Receipt:
    """Publish a file that another folder has, whole and final: as a link to it, or a copy where links cannot be.

    Args:
        root: The run's folder.
        name: Final name relative to the run's folder.
        source: The file; it stays where it is.
        receipt: Its receipt there, which says what it cost.

    Returns:
        The receipt in the run's folder.

    Raises:
        EnvironmentFault: The file system refused.
        IntegrityError: Other bytes have the name.
    """
    folder = attempt_folder(root)
    path = folder / Path(name).name
    own = receipt | {"path": name, "attempt": folder.name}
    with _as_fault(root / name):
        _make_folder(folder)
        _effect("link", path)
        try:
            os.link(source, path)
        except OSError:  # another file system, or none with links
            shutil.copyfile(source, path)
        _give_name(root, name, path, own)
    return own


def _give_name(root: Path, name: str, path: Path, receipt: Receipt) -> None:
    """Give the file of an attempt its final name, and publish its receipt."""
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
    """Refuse to make a file that was deleted with other bytes than it had: others were computed from those."""
    former = None if (root / name).exists() else read_receipt(root, name)
    if former is None or (former["sha256"], former["key"]) == (receipt["sha256"], receipt["key"]):
        return
    _forget(path.parent)
    cause = f"it was deleted, and made again it has other bytes (SHA-256 {receipt['sha256'][:12]}) or another key"
    raise IntegrityError(cause, f"delete {receipt_path(root, name)}, then run again", path=root / name)


def publish_bytes(root: Path, name: str, data: bytes, key: str, facts: Mapping[str, Any]) -> Receipt:
    """Publish a small file whose bytes are at hand, unless it is done already, and return its receipt."""
    receipt = done_if_present(root, name, key)
    if receipt is not None:
        return receipt
    with publishing(root, name, key, facts, accept) as attempt, attempt.timed("write"):
        attempt.path.write_bytes(data)
    return attempt.receipt


def accept(_path: Path) -> None:
    """Accept a file as it was written: the ``verify`` of those whose bytes came from memory."""


def generations(root: Path, name: str) -> list[Path]:
    """Return the published generations of ``name``, oldest first: ``plan.json``, ``plan.2.json``, ..."""
    stem, suffix = name.rsplit(".", 1)
    later = sorted(number for path in root.glob(f"{stem}.*.{suffix}") if (number := _generation(path, name)))
    files = (root / name, *(root / f"{stem}.{number}.{suffix}" for number in later))
    return [path for path in files if path.is_file()]


def _generation(path: Path, name: str) -> int:
    """Return the number of a later generation of ``name``; 0 for a file that has only a similar name."""
    stem, suffix = name.rsplit(".", 1)
    found = re.fullmatch(rf"{re.escape(stem)}\.([1-9][0-9]*)\.{re.escape(suffix)}", path.name)
    return int(found[1]) if found and found[1] != "1" else 0


def publish_generation(root: Path, name: str, data: bytes, facts: Mapping[str, Any]) -> Path:
    """Publish what a run was told, without ever replacing what it was told before.

    Returns:
        The newest generation, which holds ``data``: it is left alone where it does already.
    """
    files = generations(root, name)
    stem, suffix = name.rsplit(".", 1)
    known = bool(files) and files[-1].read_bytes() == data  # its receipt may still be missing
    if files:
        latest = files[-1].name if known else f"{stem}.{max(1, _generation(files[-1], name)) + 1}.{suffix}"
    else:
        latest = name
    publish_bytes(root, latest, data, hashlib.sha256(data).hexdigest(), facts)
    return root / latest


def write_view(root: Path, name: str, data: bytes) -> None:
    """Write a file that later runs may replace whole; no published byte is ever computed from it."""
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
    """Append a line to a log; what a process that was killed left of its last line stays a line of its own.

    Args:
        path: The log.
        text: The line, without its end.
        sync: Have it on disk before this returns.

    Raises:
        EnvironmentFault: The file system refused.
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
    """Remove what killed attempts left, as far as it is known that their processes have ended.

    What another machine, container or boot of this machine left stays: it may be under way.
    """
    for folder, process in _attempts(root):
        if processes.has_ended(process):
            _remove(folder)


def forget_attempts(root: Path, process: Process) -> None:
    """Remove what a process left that is known to be gone, wherever it ran; what cannot be removed stays."""
    for folder, whose in _attempts(root):
        if whose == process:
            _remove(folder)


def _attempts(root: Path) -> list[tuple[Path, Process]]:
    """Return the private folders there are, each with its process; what has another name is not ours to touch."""
    try:
        there = sorted((root / ATTEMPTS).iterdir())
    except OSError:  # none, or nothing that can be looked at
        return []
    named = ((folder, _NAME.fullmatch(folder.name)) for folder in there)
    return [
        (folder, Process(name["host"], int(name["pid"]), name["space"], name["born"])) for folder, name in named if name
    ]


@contextlib.contextmanager
def private_folder(root: Path) -> Iterator[Path]:
    """Give a folder that is gone afterwards, and that others sweep away where this process is killed."""
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
    """Give ``source`` its final name if that name is free.

    Where the name is taken, an equal file counts as success. A reply lost on a network file system looks like a
    failure although the link was made; whether both are one file tells.
    """
    _sync(source)
    _effect("link", final)
    try:
        os.link(source, final)
    except OSError as error:
        if not isinstance(error, FileExistsError) and not (final.exists() and source.samefile(final)):
            raise
        if sha256 is not None and file_sha256(final) != sha256:
            raise IntegrityError(
                f"two attempts gave different bytes (the other one is kept at {source})",
                "report this: the same inputs must give the same bytes on one kind of machine",
                path=final,
            ) from error
    _sync(final.parent)


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
    """Remove a folder of attempts; another process may be doing the same."""
    with contextlib.suppress(OSError):  # what cannot be removed harms nobody, and must not hide what went wrong
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
    """Return the error as one of a published file, or of another that it names."""
    named = Path(faults.subject(error) or path)
    if not (path.is_relative_to(named) or named.is_relative_to(path) or {ATTEMPTS, RECEIPTS} & set(named.parts)):
        return faults.fault(error)
    cause = f"the file system refused: {faults.cause(error)}"
    return EnvironmentFault(cause, faults.remedy(error, "or choose another out="), path=path)


def _is_of_attempt(error: OSError, attempt: Attempt) -> bool:
    """Tell whether an error is about what an attempt writes, and not about what it reads."""
    named = faults.subject(error)
    return Path(named).is_relative_to(attempt.path.parent) if named else faults.is_of_writing(error)


def require_space(root: Path, needed_bytes: int, *, less: str = "") -> None:
    """Refuse to begin a file that the disk has no room for.

    HDF5 does not survive a full disk: the process ends with a segmentation fault, and nobody is told why.

    Args:
        root: The folder it belongs to.
        needed_bytes: Its size.
        less: A setting that needs less room, where there is one.

    Raises:
        EnvironmentFault: Less than ``needed_bytes`` and a small reserve are free.
    """
    with _as_fault(root):
        free = shutil.disk_usage(root).free
    if free < needed_bytes + _RESERVE_BYTES:
        cause = f"{(needed_bytes + _RESERVE_BYTES) / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free"
        remedy = f"free space there, or choose another out={f' ({less} needs far less)' if less else ''}"
        raise EnvironmentFault(cause, remedy, path=root)


def preflight(root: Path) -> None:
    """Prove that the run's folder can hold published files, before any work is done.

    Raises:
        EnvironmentFault: It cannot be created, written, linked or read back.
    """
    folder = attempt_folder(root)
    probe, twin = folder / "probe", folder / "linked"
    with _as_fault(root):
        _make_folder(folder)
        probe.write_bytes(b"probe")
        _sync(probe)
        os.link(probe, twin)
        readable = twin.read_bytes() == b"probe"
        _forget(folder)
    if not readable:
        raise EnvironmentFault("what was written is not what is read back", "choose another out=", path=root)
