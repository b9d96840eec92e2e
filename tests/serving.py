"""A Prefect server on loopback, and how tests talk to it."""

import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

import psutil

BIN = Path(sys.executable).parent
_NOWHERE = "http://127.0.0.1:9"
_PATIENCE_S = 120.0  # its SQLite is locked now and then, longer where the machine is busy


def environment(home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a client that has no network but this machine, and no settings of its user."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    offline = {"http_proxy": _NOWHERE, "https_proxy": _NOWHERE, "no_proxy": "127.0.0.1,localhost"}
    return kept | offline | {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"} | more


def create_database(home: Path) -> None:
    """Create Prefect's database in its home."""
    command = [BIN / "prefect", "server", "database", "upgrade", "--yes"]
    subprocess.run(command, env=environment(home), check=True, capture_output=True)


class PrefectServer(NamedTuple):
    """A server that listens, the environment of its clients, and its process."""

    url: str
    env: dict[str, str]
    pid: int

    def ask(self, path: str, body: object = None) -> Any:
        """Return what the server answers: to a body by POST."""
        return self.answer(path, body)[1]

    def answer(self, path: str, body: object = None) -> tuple[int, Any]:
        """Return the status of an answer, and the answer; a server that is busy is asked again, as clients do."""
        sent = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", sent, {"content-type": "application/json"})
        over = time.monotonic() + _PATIENCE_S
        while True:
            try:
                with urllib.request.urlopen(request, timeout=_PATIENCE_S) as found:
                    return found.status, json.load(found)
            except urllib.error.HTTPError as refused:
                if refused.code != HTTPStatus.SERVICE_UNAVAILABLE or time.monotonic() > over:
                    return refused.code, json.load(refused)
                time.sleep(0.5)

    def prefect(self, *arguments: str, cwd: Path) -> None:
        """Call ``prefect``, which must succeed."""
        command = [BIN / "prefect", "--no-prompt", *arguments]
        done = subprocess.run(command, env=self.env, cwd=cwd, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def serving(home: Path) -> Iterator[PrefectServer]:
    """Keep a server listening on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    env = environment(home, PREFECT_API_URL=url, PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS="10")
    command = [BIN / "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = PrefectServer(url, env, process.pid)
    try:
        while not _listens(server):
            assert process.poll() is None, "the Prefect server ended"
            time.sleep(0.2)
        yield server
    finally:
        end(process)


class _Mail(socketserver.StreamRequestHandler):
    """What a mail server says to whoever brings mails."""

    def handle(self) -> None:
        self._say("220 here")
        for line in self.rfile:
            if line.upper().startswith(b"DATA"):
                self._say("354 go on")
                self.server.mails.append(b"".join(iter(self.rfile.readline, b".\r\n")).decode())
            self._say("250 ok")

    def _say(self, text: str) -> None:
        self.wfile.write(f"{text}\r\n".encode())


class MailServer(socketserver.ThreadingTCPServer):
    """A mail server on loopback that keeps what it is sent."""

    daemon_threads = True

    def __init__(self) -> None:
        """Listen, on a port that nobody uses."""
        super().__init__(("127.0.0.1", 0), _Mail)
        self.mails: list[str] = []

    @property
    def address(self) -> str:
        """The address of a lab, as Apprise writes it."""
        return f"mailto://127.0.0.1:{self.server_address[1]}?from=wsiflow@example.org&to=lab@example.org"


@contextmanager
def receiving_mail() -> Iterator[MailServer]:
    """Keep a mail server listening."""
    with MailServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started, by force: nothing is kept, and Prefect's own ends take minutes or for ever."""
    with suppress(psutil.NoSuchProcess):
        for one in (process, *psutil.Process(process.pid).children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def _listens(server: PrefectServer) -> bool:
    try:
        return bool(server.ask("health"))
    except OSError:
        return False
