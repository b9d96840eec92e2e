"""Errors of the system are reported with the file, the cause and a remedy that fits."""

import errno
import io
import os
import sys
from pathlib import Path

import pytest

from flows import terminal
from wsiflow.errors import EnvironmentFault, InputError, WsiflowError
from wsiflow.run.executor import process
from wsiflow.run.stages import work
from wsiflow.run.stages.line import STAGES
from wsiflow.slides.readers import openslide_file
from wsiflow.system import faults, publish

KEY = "k" * 64
REMEDIES = {
    "ENOSPC": "free space",
    "EDQUOT": "free space",
    "EFBIG": "files of this size",
    "EACCES": "permissions",
    "EPERM": "permissions",
    "EROFS": "mount it for writing",
    "ENOLCK": "lock service",
    "EAGAIN": "what else uses it",
    "EMFILE": "ulimit -n",
    "ENFILE": "ulimit -n",
    "ENOMEM": "free memory",
    "EIO": "disk or network",
    "ENXIO": "disk or network",
    "ESTALE": "disk or network",
    "ETIMEDOUT": "disk or network",
    "ENAMETOOLONG": "shorter name",
    "EISDIR": "correct the path",
    "ENOTDIR": "correct the path",
    "ENOENT": "correct the path",
    "EEXIST": "in its place",
}


def refused(name: str, path: object = None) -> OSError:
    code = getattr(errno, name)
    return OSError(code, os.strerror(code), path)


@pytest.mark.parametrize("name", REMEDIES)
def test_each_cause_has_the_remedy_that_fits(name: str) -> None:
    """Each errno has its own remedy, and the message names the file."""
    message = str(faults.fault(refused(name, "/a/b.tif")))
    assert message.startswith(f"/a/b.tif: {os.strerror(getattr(errno, name))}; ")
    assert [text for text in sorted(set(REMEDIES.values())) if text in message] == [REMEDIES[name]]
    assert message.endswith(", then run again")


HDF5 = (
    "Can't synchronously write data (file write failed: time = Mon Jan  1, filename = '/out/.attempts/a/t1.h5', "
    "file descriptor = 5, errno = 28, error message = 'No space left on device', buf = 0x1)"
)


@pytest.mark.parametrize(
    ("error", "number", "subject"),
    [
        (OSError(HDF5), errno.ENOSPC, "/out/.attempts/a/t1.h5"),
        (
            OSError(f"Unable to open file (unable to open file: name = 'x.h5', errno = {errno.ENOENT}, flags = 0)"),
            errno.ENOENT,
            "x.h5",
        ),
        (BlockingIOError(11, "unable to lock file, errno = 37, error message = 'No locks'"), errno.ENOLCK, ""),
        (OSError("file signature not found"), 0, ""),
        (refused("EIO", b"/a/\xff"), errno.EIO, "/a/\udcff"),
        (refused("EIO", 7), errno.EIO, ""),
    ],
)  # fmt: skip
def test_numbers_and_files_are_found_where_they_are(error: OSError, number: int, subject: str) -> None:
    """HDF5 writes errno and file into its text; Python's errors have them as attributes."""
    assert (faults.number(error), faults.subject(error)) == (number, subject)
    assert faults.cause(error)


def publishing(root: Path, error: Exception) -> None:
    """Publish a file whose body raises an error."""
    with publish.publishing(root, "a/b.bin", KEY, {}, publish.accept) as attempt:
        attempt.path.write_bytes(b"half")
        if isinstance(error, OSError) and error.filename == "attempt":
            error = OSError(error.errno, error.strerror, attempt.path)
        raise error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refused("ENOSPC"), "a/b.bin: the file system refused: No space left on device; free space there, or choose"),
        (OSError(HDF5.replace("/out/.attempts/a/t1.h5", "")), "a/b.bin: the file system refused: No space left"),
        (refused("EACCES", "attempt"), "a/b.bin: the file system refused: Permission denied; correct the permissions"),
        (refused("ENOLCK", "attempt"), "No locks available; use a disk with a lock service, or choose another out="),
        (refused("EMFILE", "attempt"), r"Too many open files; allow more open files \(ulimit -n\), then run again"),
    ],
)
def test_what_an_attempt_cannot_write_names_the_output(tmp_path: Path, error: OSError, message: str) -> None:
    """The output is named, whether the error, HDF5 or nothing names a file, and the attempt is removed."""
    with pytest.raises(EnvironmentFault, match=message):
        publishing(tmp_path, error)
    assert not list((tmp_path / publish.ATTEMPTS).iterdir())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refused("EIO", "/slides/s.tif"), "predict, /slides/s.tif: Input/output error; see that the disk"),
        (refused("EACCES", "/models/m.json"), "predict, /models/m.json: Permission denied; correct the permissions"),
        (refused("EIO"), "predict: Input/output error; see that the disk or network"),
        (refused("ENOMEM"), "predict: Cannot allocate memory; free memory, or use fewer workers, then run again"),
        (refused("ENOSPC", "/tmp/x"), "predict, /tmp/x: No space left on device; free space there, then run again"),
        (MemoryError("3 GB"), r"predict: out of memory (3 GB); free memory"),
    ],
)
def test_what_cannot_be_read_is_not_blamed_on_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    """An error about an input names the input, and the message does not mention the output folder."""

    def stage(source: Path, _index: int) -> None:
        publishing(source.parent, error)

    monkeypatch.setitem(STAGES, "predict", STAGES["predict"]._replace(work=stage))
    outcome = work.run_task(tmp_path / "plan.json", "predict", 0)
    assert outcome.exit_code == 30
    assert str(outcome.failure).startswith(message)
    assert str(tmp_path) not in str(outcome.failure)
    assert "out=" not in str(outcome.failure)


def test_a_lost_attempt_does_not_hide_the_first_error(tmp_path: Path) -> None:
    """If the private folder was removed in the meantime, the first error is still the one reported."""

    def lose() -> None:
        with publish.publishing(tmp_path, "a/b.bin", KEY, {}, publish.accept) as attempt:
            attempt.path.parent.rmdir()
            raise InputError("the slide is damaged", "copy it again")

    with pytest.raises(InputError, match="damaged"):
        lose()


def test_a_command_names_what_was_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is one line with the file and the remedy, and the exit code is 30."""
    monkeypatch.delenv("WSIFLOW_DEBUG", raising=False)

    def command() -> int:
        raise refused("EROFS", "/data/x")

    assert terminal.bounded(command) == 30
    assert capsys.readouterr().err == "wsiflow: /data/x: Read-only file system; mount it for writing, then run again\n"


def test_an_error_is_printed_where_the_stream_lacks_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters that the locale cannot encode, or file names that are not text, are written as escapes."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    terminal.say("Präparat \udcff")
    assert out.buffer.getvalue() == b"Pr\\xe4parat \\udcff\n"


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("ENOENT", InputError, "the card cannot be read (No such file or directory); give another"),
        ("EISDIR", InputError, "give another"),
        ("EACCES", EnvironmentFault, "correct the permissions there"),
        ("EIO", EnvironmentFault, "see that the disk or network"),
        ("EMFILE", EnvironmentFault, "ulimit"),
    ],
)
def test_an_input_is_wrong_or_the_machine_is(name: str, kind: type[WsiflowError], message: str) -> None:
    """A wrong path is an InputError; a failing disk is an EnvironmentFault."""
    error = faults.unreadable(refused(name), "the card", "give another", path="/x")
    assert type(error) is kind
    assert message in str(error)


@pytest.mark.parametrize("name", ["EMFILE", "EIO", "ESTALE", "ENOMEM", "EACCES"])
def test_a_slide_that_the_system_refuses_to_read_is_not_called_damaged(name: str) -> None:
    """OpenSlide reports refusals in words: too few open files must not look like a damaged slide."""
    words = f"the slide cannot be opened (Couldn't open /s.tif: {os.strerror(getattr(errno, name))})"
    assert REMEDIES[name] in str(openslide_file._damaged(words, Path("/s.tif")))
    assert "copy it again" in str(openslide_file._damaged("the slide cannot be opened (no marker)", Path("/s.tif")))


def test_workers_without_semaphores_name_the_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a read-only /dev/shm names no file, but the message names /dev/shm."""

    def refuse(*_: object, **__: object) -> None:
        raise refused("EROFS")

    monkeypatch.setattr(process, "ProcessPoolExecutor", refuse)
    message = r"/dev/shm: worker processes .*Read-only file system.*mount it for writing, or take executor=inline"
    with pytest.raises(EnvironmentFault, match=message), process.ProcessPool(1, threads=1) as pool:
        pool._start(1)
