"""Files appear whole or not at all, once and with a receipt, wherever the process is ended."""

import ctypes
import errno
import fcntl
import itertools
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from damage import overwrite

from wsiflow.errors import EnvironmentFault, IntegrityError
from wsiflow.system import processes, publish

KEY = "k" * 64
DATA = b"scores" * 1000
_DROP_CAPABILITY, _WRITE_ANYTHING = 24, 1  # PR_CAPBSET_DROP and CAP_DAC_OVERRIDE, which root has alone


def make(root: Path, data: bytes = DATA) -> publish.Receipt:
    return publish.publish_bytes(root, "a/b.bin", data, KEY, {"kind": "test"})


def published(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file() and publish.RECEIPTS not in path.parts)
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_a_published_file_has_a_receipt_that_fits(tmp_path: Path) -> None:
    """The receipt has the key, the size and the hash; no other file is left behind."""
    receipt = make(tmp_path)
    assert receipt["sha256"] == publish.file_sha256(tmp_path / "a/b.bin")
    assert json.loads(publish.receipt_path(tmp_path, "a/b.bin").read_text()) == receipt
    assert published(tmp_path) == {"a/b.bin": DATA}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_nobody_may_write_to_a_published_file(umask: int, tmp_path: Path) -> None:
    """Who may read it follows from the umask; a program that opens it to change it fails, and it can be deleted."""
    before = os.umask(umask)
    try:
        make(tmp_path)
    finally:
        os.umask(before)
    files = [tmp_path / "a/b.bin", publish.receipt_path(tmp_path, "a/b.bin")]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o444 & ~umask] * 2
    opened = subprocess.run(
        [sys.executable, "-c", "import h5py, sys; h5py.File(sys.argv[1], 'r+')", str(files[0])],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        preexec_fn=lambda: ctypes.CDLL(None).prctl(_DROP_CAPABILITY, _WRITE_ANYTHING),
    )
    assert "Permission denied" in opened.stderr
    publish.withdraw_other(tmp_path, "a/b.bin", "another")
    assert published(tmp_path) == {}


def test_a_disk_without_permissions_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be protected is published all the same; any other error is that of the file."""
    for code in (errno.EPERM, errno.EOPNOTSUPP):
        monkeypatch.setattr(Path, "chmod", _refusing(code))
        publish.publish_bytes(tmp_path, f"{code}.bin", DATA, KEY, {"kind": "test"})
        assert publish.done(tmp_path, f"{code}.bin", KEY)
    monkeypatch.setattr(Path, "chmod", _refusing(errno.EIO))
    with pytest.raises(EnvironmentFault, match=r"b\.bin.*Input/output error"):
        make(tmp_path)


def _refusing(code: int) -> Callable[..., None]:
    def refuse(*_args: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


def test_attempts_may_be_written_on_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is written in the scratch folder and copied when it is complete; nothing stays there, whatever happens."""
    scratch, root = tmp_path / "scratch", tmp_path / "run"
    monkeypatch.setenv(publish.SCRATCH, str(scratch))
    with publish.publishing(root, "a/b.bin", KEY, {"kind": "test"}, publish.accept) as attempt:
        assert attempt.path.is_relative_to(scratch)
        attempt.path.write_bytes(DATA)
    assert publish.done(root, "a/b.bin", KEY) == attempt.receipt
    assert published(root) == {"a/b.bin": DATA}
    monkeypatch.setattr(shutil, "copyfile", lambda _source, target: target.write_bytes(DATA[1:]))
    with pytest.raises(EnvironmentFault, match=r"the copy of .* has other bytes"):
        publish.publish_bytes(root, "c.bin", DATA, KEY, {"kind": "test"})
    assert published(root) == {"a/b.bin": DATA}
    with pytest.raises(ZeroDivisionError), publish.publishing(root, "d.bin", KEY, {}, lambda _: 1 / 0) as attempt:
        attempt.path.write_bytes(DATA)
    assert not list(scratch.rglob("d.bin"))


def test_a_receipt_has_the_cpu_seconds_of_its_work(tmp_path: Path) -> None:
    """All of them, those of a shared part included, and none that other receipts count."""
    before = time.process_time()
    with publish.publishing(tmp_path, "c.bin", KEY, {"kind": "test"}, publish.accept) as attempt:
        burn(0.2)
        with attempt.uncounted():
            burn(0.3)
        attempt.charge({"cpu_s": 100.0, "wall_s": 200.0})
        attempt.path.write_bytes(DATA)
    spent_s = time.process_time() - before
    assert 100.2 <= attempt.receipt["cpu_s"] <= 100.0 + spent_s - 0.3


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_second_call_does_nothing(tmp_path: Path) -> None:
    """A file that is done is not written again: the same receipt, with the same attempt, is returned."""
    assert make(tmp_path)["attempt"] == make(tmp_path)["attempt"]


def _make_until(root: Path, last: int) -> None:
    """Publish in a child process that ends before effect number ``last``."""
    seen = itertools.count()
    publish._effect = lambda *_: os._exit(137) if next(seen) == last else None
    make(root)
    os._exit(0)


def test_ending_the_process_before_any_effect_loses_nothing(tmp_path: Path) -> None:
    """Killed before effect 1, 2, ... n and restarted, the folder has the same bytes as without a kill."""
    survived, effects = 0, 0
    while survived == 0:
        root = tmp_path / str(effects)
        root.mkdir()
        child = os.fork()
        if child == 0:
            _make_until(root, effects)
        survived = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        before = published(root)
        assert before.get("a/b.bin", DATA) == DATA, "a final name is whole or absent"
        make(root)
        publish.sweep_attempts(root)
        assert published(root) == {"a/b.bin": DATA}
        assert publish.done(root, "a/b.bin", KEY)
        effects += 1
    assert effects > 8, "the sweep reached every effect"


def test_what_a_dead_process_left_is_swept_and_a_live_ones_is_not(tmp_path: Path) -> None:
    """Attempts have the host and the PID in their names, so a restart removes only those of dead processes."""
    child = os.fork()
    if child == 0:
        publish._effect = lambda name, _: os._exit(0) if name == "link" else None
        make(tmp_path)
    os.waitpid(child, 0)
    live = publish.Attempt(tmp_path, "x.bin", KEY, {}).path
    live.parent.mkdir(parents=True)
    assert len(list((tmp_path / publish.ATTEMPTS).iterdir())) == 2
    publish.sweep_attempts(tmp_path)
    assert list((tmp_path / publish.ATTEMPTS).iterdir()) == [live.parent]


def attempt_of(root: Path, **changed: object) -> Path:
    """Create a private folder as this process would, with the given fields of its identity replaced."""
    host, pid, space, born = processes.current()._replace(**changed)
    folder = root / publish.ATTEMPTS / f"{host}-{pid}-{space}-{born}-{'0' * 32}"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("changed", "swept"),
    [
        ({}, False),
        ({"born": "1"}, True),  # its PID is now that of another process
        ({"pid": 2**22 + 1}, True),
        ({"pid": 1, "born": ""}, False),
        (
            {"pid": 2**22 + 1, "space": "0a1b2c3d4e5f"},
            False,
        ),  # of another container or boot
        ({"pid": 2**22 + 1, "host": "elsewhere"}, False),
    ],
)
def test_only_what_is_known_to_have_ended_is_swept(tmp_path: Path, changed: dict[str, object], swept: bool) -> None:
    """A process is identified by its PID together with its host, boot, PID namespace and start time."""
    folder = attempt_of(tmp_path, **changed)
    publish.sweep_attempts(tmp_path)
    assert folder.exists() is not swept


@pytest.mark.skipif(os.geteuid() != 0, reason="a PID namespace of its own needs root")
@pytest.mark.parametrize("mount", [["--mount-proc"], []])
def test_a_container_of_the_same_name_does_not_harm_a_live_attempt(tmp_path: Path, mount: list[str]) -> None:
    """PIDs start again in a PID namespace; what a killed process left there is only removed from there."""
    live = publish.Attempt(tmp_path, "x.bin", KEY, {}).path
    live.parent.mkdir(parents=True)
    code = """if True:
        import os, pathlib, sys
        from wsiflow.system import processes, publish
        root = pathlib.Path(sys.argv[1])
        if (child := os.fork()) == 0:
            publish.Attempt(root, "y.bin", "k", {}).path.parent.mkdir(parents=True)
            os._exit(0)
        os.waitpid(child, 0)
        own = publish.Attempt(root, "z.bin", "k", {}).path.parent
        own.mkdir()
        publish.sweep_attempts(root)
        print(len(list((root / publish.ATTEMPTS).iterdir())), own.is_dir())
    """
    command = ["unshare", "-p", "-f", *mount, sys.executable, "-c", code, str(tmp_path)]
    completed = subprocess.run(command, check=False, capture_output=True, text=True)
    if "unshare" in completed.stderr:
        pytest.skip(completed.stderr.strip())
    assert completed.stdout.split() == ["2", "True"], completed.stderr
    assert live.parent.is_dir()
    publish.sweep_attempts(tmp_path)
    assert len(list((tmp_path / publish.ATTEMPTS).iterdir())) == 2, "nor does a start out here harm what is in there"


def test_what_is_not_an_attempt_is_left_alone(tmp_path: Path) -> None:
    """Files, links and folders with other names, including those of former versions, are harmless and stay."""
    root = tmp_path / publish.ATTEMPTS
    (root / "a-b-c").mkdir(parents=True)
    (root / f"{socket.gethostname()}-{2**22 + 1}-{'a' * 32}").mkdir()  # without a PID namespace
    (root / f"a-b-{'a' * 12}-c-{'d' * 32}").mkdir()
    (root / "x-1-y").write_text("")
    host, _, space, _ = processes.current()
    (root / f"{host}-{2**22 + 1}-{space}-1-{'0' * 32}").symlink_to(tmp_path)
    (root / ".DS_Store").write_text("")
    before = sorted(root.iterdir())
    (root / f"{host}-{2**70}-{space}-1-{'0' * 32}").mkdir()  # a PID that no process can have
    publish.sweep_attempts(tmp_path)
    publish.forget_attempts(tmp_path, processes.current())
    assert sorted(root.iterdir()) == before
    shutil.rmtree(root)
    root.write_text("a file in the place of the folder")
    publish.sweep_attempts(tmp_path)


def test_receipts_that_cannot_be_listed_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If receipts cannot be listed, a check of all files must not succeed."""
    assert publish.receipt_names(tmp_path) == []
    make(tmp_path)
    assert publish.receipt_names(tmp_path) == ["a/b.bin"]
    listed = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("receipts/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(EnvironmentFault, match="Permission denied; correct the permissions"):
        publish.receipt_names(tmp_path)


def test_of_eight_attempts_at_once_one_wins(tmp_path: Path) -> None:
    """Of simultaneous attempts with equal bytes all succeed, and there is one file."""
    with ThreadPoolExecutor(8) as pool:
        receipts = list(pool.map(lambda _: make(tmp_path), range(8)))
    assert {receipt["sha256"] for receipt in receipts} == {publish.file_sha256(tmp_path / "a/b.bin")}
    assert len(list(tmp_path.rglob("b.bin"))) == 1


_DISKS = {
    "links within a folder": {"WSIFLOW_LINKS": "folder"},
    "no links": {"WSIFLOW_LINKS": "none"},
    "links within a folder, renames that overwrite": {"WSIFLOW_LINKS": "folder", "WSIFLOW_RENAMES": "plain"},
    "neither": {"WSIFLOW_LINKS": "none", "WSIFLOW_RENAMES": "plain"},
}
_PUBLISH = """if True:
    import os, pathlib, sys
    from concurrent.futures import ThreadPoolExecutor
    from wsiflow.errors import IntegrityError, WsiflowError
    from wsiflow.system import publish
    root = pathlib.Path(sys.argv[1])

    def attempt(data):
        try:
            with publish.publishing(root, "a/b.bin", "k", {}, publish.accept) as one:
                one.path.write_bytes(data)
        except IntegrityError as error:
            return "other bytes" in str(error) or "different bytes" in str(error)

    try:
        publish.preflight(root)
    except WsiflowError as error:
        sys.exit(str(error))
    with ThreadPoolExecutor(8) as threads:
        assert not any(threads.map(attempt, [b"scores"] * 8))
    assert attempt(b"others")
    print((root / "a/b.bin").read_text(), publish.done(root, "a/b.bin", "k")["bytes"])
    print(sorted(path.name for path in (root / "a").iterdir()), len(list((root / ".attempts").iterdir())))
"""


@pytest.mark.parametrize("disk", _DISKS)
def test_a_disk_without_links_is_published_on_without_overwriting(preloaded, disk: str, tmp_path: Path) -> None:
    """Where links cannot be, a rename that does not overwrite gives the name; a disk with neither is named at once."""
    env = preloaded("links") | _DISKS[disk]
    done = subprocess.run(
        [sys.executable, "-c", _PUBLISH, tmp_path], env=env, check=False, capture_output=True, text=True
    )
    if disk == "neither":
        assert done.returncode == 1
        assert "neither hard links (Operation not permitted) nor renames that never overwrite" in done.stderr
        assert "choose another out=" in done.stderr
        return
    assert done.stdout.splitlines() == ["scores 6", "['b.bin'] 1"], done.stderr  # the other bytes are kept


def test_attempts_with_other_bytes_stop_the_run_and_keep_both(tmp_path: Path) -> None:
    """The same key must give the same bytes; if it does not, no file is overwritten."""
    make(tmp_path)
    publish.receipt_path(tmp_path, "a/b.bin").unlink()
    with pytest.raises(IntegrityError, match="different bytes"):
        make(tmp_path, b"other")
    assert sorted(published(tmp_path).values()) == [b"other", DATA]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: overwrite(path, b"x" + DATA[1:]), "size or SHA-256 is not that"),
        (lambda path: path.unlink(), "no longer exists"),
    ],
)
def test_damage_to_a_published_file_is_noticed(tmp_path: Path, damage, message: str) -> None:
    """A changed byte or a deleted file is an error that names the file and the remedy."""
    make(tmp_path)
    damage(tmp_path / "a/b.bin")
    with pytest.raises(IntegrityError, match=message) as caught:
        publish.done(tmp_path, "a/b.bin", KEY)
    assert "b.bin" in str(caught.value)
    assert "delete" in str(caught.value)


def test_a_file_that_another_program_writes_is_not_called_damaged(tmp_path: Path) -> None:
    """HDF5 marks a file while it is open for writing, and takes the mark away: to delete it would be a loss."""
    make(tmp_path)
    (tmp_path / "a/b.bin").chmod(0o644)
    with (tmp_path / "a/b.bin").open("r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b"open")
        other.flush()
        with pytest.raises(EnvironmentFault, match=r"another program has it open for writing.*; close it there"):
            publish.done(tmp_path, "a/b.bin", KEY)
        other.seek(0)
        other.write(DATA[:4])
    assert publish.done(tmp_path, "a/b.bin", KEY)


def test_a_file_computed_again_has_its_former_bytes(tmp_path: Path) -> None:
    """The receipt of a deleted file remains valid: other bytes are refused, and the remedy works."""
    receipt = make(tmp_path)
    (tmp_path / "a/b.bin").unlink()
    with pytest.raises(IntegrityError, match="it has other bytes") as caught:
        make(tmp_path, b"other")
    assert f"delete {publish.receipt_path(tmp_path, 'a/b.bin')}, then" in str(caught.value)
    make(tmp_path)
    assert publish.done(tmp_path, "a/b.bin", KEY) == receipt
    (tmp_path / "a/b.bin").unlink()
    publish.receipt_path(tmp_path, "a/b.bin").unlink()
    make(tmp_path, b"other")
    assert published(tmp_path)["a/b.bin"] == b"other"


def test_another_key_is_never_taken_for_the_same_work(tmp_path: Path) -> None:
    """A file that was published with other settings is refused, and not reused."""
    make(tmp_path)
    with pytest.raises(IntegrityError, match="other inputs or settings"):
        publish.done(tmp_path, "a/b.bin", "z" * 64)


def test_a_failed_check_publishes_nothing(tmp_path: Path) -> None:
    """A file that fails its verification never gets its final name."""

    def refuse(path: Path) -> None:
        raise IntegrityError("not what it should be", "run again", path=path)

    with (
        pytest.raises(IntegrityError, match="should be"),
        publish.publishing(tmp_path, "a/b.bin", KEY, {}, refuse) as attempt,
    ):
        attempt.path.write_bytes(DATA)
    assert not (tmp_path / "a/b.bin").exists()
    assert publish.done(tmp_path, "a/b.bin", KEY) is None


def test_generations_keep_the_former_ones(tmp_path: Path) -> None:
    """The same text gives the same generation; another text gets the next number."""
    names = [
        publish.publish_generation(tmp_path, "plan.json", text, {}).name for text in (b"1", b"1", b"2", b"3", b"3")
    ]
    assert names == ["plan.json", "plan.json", "plan.2.json", "plan.3.json", "plan.3.json"]


def test_files_of_similar_names_are_no_generations(tmp_path: Path) -> None:
    """Files that editors, other systems and users leave next to a plan are ignored, and not replaced."""
    for text in (b"1", b"2"):
        publish.publish_generation(tmp_path, "plan.json", text, {})
    strays = ["plan.x.json", "plan.002.json", "plan.1.json", "plan.\u00b2.json", "._plan.3.json", "plan.old.3.json"]
    for name in strays:
        (tmp_path / name).write_text("stray")
    (tmp_path / "plan.9.json").mkdir()
    names = [path.name for path in publish.generations(tmp_path, "plan.json")]
    assert names == ["plan.json", "plan.2.json"]
    assert publish.publish_generation(tmp_path, "plan.json", b"3", {}).name == "plan.3.json"
    (tmp_path / "plan.2.json").unlink()
    assert publish.publish_generation(tmp_path, "plan.json", b"4", {}).name == "plan.4.json"


@pytest.mark.parametrize("text", ["", '{"path": "a/b', "null", "[]", "{}", '{"path": "a/b.bin"}', "\x00\x00"])
def test_an_invalid_receipt_is_named(tmp_path: Path, text: str) -> None:
    """For an empty, truncated or foreign receipt the message gives the remedy, and is not that of a defect."""
    make(tmp_path)
    overwrite(publish.receipt_path(tmp_path, "a/b.bin"), text)
    with pytest.raises(IntegrityError, match=r"the receipt cannot be read .*delete it and a/b.bin, then run again"):
        publish.done(tmp_path, "a/b.bin", KEY)


def test_receipts_are_listed_without_what_others_left(tmp_path: Path) -> None:
    """Hidden files, backups of editors and folders are not receipts."""
    make(tmp_path)
    folder = tmp_path / publish.RECEIPTS / "a"
    for name in ("._b.bin.json", ".DS_Store", "b.bin.json~", "#b.bin.json#", "b.bin.json.bak"):
        (folder / name).write_text("stray")
    assert publish.receipt_names(tmp_path) == ["a/b.bin"]
    assert publish.receipt_names(tmp_path / "nowhere") == []


def test_a_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    """A file in the place of the folder is an environment fault whose message names the path."""
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="choose another out="):
        publish.preflight(tmp_path / "file" / "out")


def test_a_file_the_disk_has_no_room_for_is_not_begun(tmp_path: Path) -> None:
    """The message has the space that is needed and the space that is free."""
    publish.require_space(tmp_path, 1000)
    with pytest.raises(EnvironmentFault, match=r"MB are needed, but only .* MB are free; free space there"):
        publish.require_space(tmp_path, 10**18)


def test_key_is_of_content_only() -> None:
    """The order of the parts does not change the key, but every part does."""
    assert publish.key_of(a=1, b={"x": 2, "y": 3}) == publish.key_of(b={"y": 3, "x": 2}, a=1)
    assert publish.key_of(a=1) != publish.key_of(a=2)
