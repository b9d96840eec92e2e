"""Which Prefect server a run reports to: a real one, with and without a key, or a temporary one that leaves nothing."""

import os
import pwd
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_DATABASE_CONNECTION_URL,
    temporary_settings,
)

from flows import __main__ as command
from flows import server
from wsiflow.errors import EnvironmentFault

_A_DRIVER = """
import time
from flows.server import chosen_server
with chosen_server():
    print("ready", flush=True)
    time.sleep(600)
"""


def wait(what: Callable[[], bool], *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)


def test_a_temporary_server_ends_with_its_parent(tmp_path: Path) -> None:
    """The server creates its database, keeps it locked, and ends even where its parent was killed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    with subprocess.Popen(
        [sys.executable, "-c", _A_DRIVER],
        env=env | {"PREFECT_HOME": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    ) as driver:
        assert driver.stdout.readline() == "ready\n"
        (served,) = psutil.Process(driver.pid).children()
        assert os.getsid(served.pid) == served.pid, "a terminal's Ctrl-C does not reach it"
        driver.kill()
        driver.wait()
        wait(lambda: not served.is_running() or served.status() == psutil.STATUS_ZOMBIE)
    with temporary_settings({PREFECT_HOME: tmp_path}), server._own_database() as (where, _):
        assert where == ""


def test_a_server_with_a_key_is_used_with_it_and_refused_without(prefect_home: Path, monkeypatch) -> None:
    """Such a server is never replaced silently by a temporary one. A proxy is not asked for it."""
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "admin:open")
    with temporary_settings({PREFECT_HOME: prefect_home}), server._temporary_server(None) as url:
        monkeypatch.delenv("PREFECT_SERVER_API_AUTH_STRING")
        known = {PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: "admin:open"}
        with temporary_settings(known), server.chosen_server() as message:
            assert message == f"Prefect server: {url}"
            monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
            for name, given in (("NO_PROXY", "example.org"), ("no_proxy", "")):
                monkeypatch.setenv(name, given)
            assert not server.answers(url)
            command.reach_own_servers()
            assert server.answers(url)
            assert os.environ["NO_PROXY"] == "example.org,127.0.0.1,localhost,::1"
        refusal = pytest.raises(EnvironmentFault, match=r"refuses this user \(401\); set PREFECT_API_KEY")
        with temporary_settings({**known, PREFECT_API_AUTH_STRING: "admin:guessed"}), refusal:
            server.answers(url)


def test_nobody_there_is_no_answer() -> None:
    """No server answers at a closed port, an empty address or a malformed one."""
    assert not any(server.answers(url) for url in ("http://127.0.0.1:9/api", "", "not an address"))


def test_a_run_is_told_that_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address is named in one line, and a temporary server is used during the body."""

    @contextmanager
    def temporary(_lock: object) -> Iterator[str]:
        yield "http://127.0.0.1:10/api"

    monkeypatch.setattr(server, "_temporary_server", temporary)
    nobody = {PREFECT_HOME: tmp_path, PREFECT_API_URL: "http://127.0.0.1:9/api"}
    with temporary_settings(nobody), server.chosen_server() as message:
        assert message.startswith("no Prefect server answers at http://127.0.0.1:9/api: going on with a temporary one")
        assert PREFECT_API_URL.value() == os.environ["PREFECT_API_URL"] == "http://127.0.0.1:10/api"


def test_one_temporary_server_at_a_time_has_the_home_of_prefect(tmp_path: Path) -> None:
    """Of two runs without a server, the later one prints that it leaves no history, and leaves that of the other."""
    with temporary_settings({PREFECT_HOME: tmp_path}):
        with server._own_database() as (first, _):
            assert first == ""
            assert PREFECT_HOME.value() == tmp_path
            with server._own_database() as (second, _):
                assert "leaves no history, since another run has Prefect's home" in second
                passing = PREFECT_HOME.value()
                assert passing != tmp_path
        assert not passing.exists()
        with server._own_database() as (third, _):
            assert third == ""


def test_a_home_that_cannot_be_used_is_replaced(tmp_path: Path) -> None:
    """A temporary home replaces it, and a note says so: a user id in a container may have no usable home."""
    (tmp_path / "file").write_text("")
    with temporary_settings({PREFECT_HOME: tmp_path / "file/.prefect"}), server._own_database() as (where, lock):
        assert "leaves no history, since Prefect's home" in where
        assert lock is None
        assert Path(PREFECT_HOME.value()).is_dir()


def test_a_temporary_server_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is one line with the cause and with remedies, although the command's console is quiet."""
    monkeypatch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    broken = {
        PREFECT_HOME: tmp_path,
        PREFECT_SERVER_DATABASE_CONNECTION_URL: "sqlite+aiosqlite:////proc/none/prefect.db",
    }
    refusal = pytest.raises(EnvironmentFault, match=r"does not start \(.*unable to open .+\); .*orchestrator=none")
    settings = temporary_settings(broken, restore_defaults={PREFECT_API_URL})
    with settings, refusal as refused, server.chosen_server():
        pass
    assert "\n" not in str(refused.value)


def test_a_user_without_a_home_gets_a_temporary_one(monkeypatch, capsys) -> None:
    """A user without HOME and without an entry gets a folder for what libraries keep there."""

    def nobody(_uid: int) -> None:
        raise KeyError("no such user")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert command.main(["doctor"]) == 0
    assert Path(os.environ["HOME"]).is_dir()
    assert "report this" not in "".join(capsys.readouterr())
