"""Serve the viewer to the browsers of this machine, under a link that nobody can guess.

The server listens on loopback alone. Every address begins with a random token, so that neither other users of the
machine nor pages of the web can ask for anything, and a request must name this machine as its host, so that no name of
the web can be pointed here. Nothing is written, and addresses are numbers, never paths.
"""

import json
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from wsiflow.analysis.viewer.served import ServedRun, index_of
from wsiflow.errors import EnvironmentFault, WsiflowError
from wsiflow.run.results import page, shown

HOST = "127.0.0.1"
_HOSTS = ("127.0.0.1", "localhost")  # with any port, since a tunnel may end at another one
_SLIDE = re.compile(r"(\d{1,3})/slide/(\d{1,7})\.json")
_SMALL = re.compile(r"(\d{1,3})/small/(\d{1,7})\.jpg")
_TILE = re.compile(r"(\d{1,3})/(tile|heat)/(\d{1,7})/(\d{1,2})/(\d{1,6})_(\d{1,6})\.(?:jpg|png)")
_STYLE = "body{overflow:hidden}main{max-width:none;padding:0}@media(max-width:900px),print{body{overflow:auto}}"


class Answer(NamedTuple):
    """An answer to a request.

    Attributes:
        status: HTTP status.
        kind: Content type.
        body: The content.
        lasts: Whether the browser may keep it.
    """

    status: int
    kind: str
    body: bytes
    lasts: bool = False


class Viewer(ThreadingHTTPServer):
    """The server; use `listening`.

    Attributes:
        link: The address to open.
    """

    daemon_threads = True

    def __init__(self, runs: Mapping[str, ServedRun], port: int) -> None:
        """Listen on a port of loopback; 0 for any that is free."""
        self._runs, self._token = list(runs.values()), secrets.token_urlsafe(18)
        self._page = _page(runs).encode()
        super().__init__((HOST, port), _Handler)
        self.link = f"http://{HOST}:{self.server_address[1]}/{self._token}/"

    def answer(self, host: str, path: str) -> Answer:
        """Return the answer to a request for a path, with the host that it named."""
        if host.rsplit(":", 1)[0] not in _HOSTS:
            return _plain(403, "this server answers for 127.0.0.1 only")
        token, _, rest = path.partition("?")[0].removeprefix("/").partition("/")
        if not secrets.compare_digest(token.encode(), self._token.encode()):
            return _plain(403, "open the link that wsiflow view printed")
        try:
            return self._content(rest)
        except (WsiflowError, IndexError, OSError) as error:
            return _plain(404, str(error))

    def _content(self, rest: str) -> Answer:
        if not rest:
            return Answer(200, "text/html; charset=utf-8", self._page)
        if found := _SLIDE.fullmatch(rest):
            run, number = map(int, found.groups())
            return Answer(200, "application/json", json.dumps(self._runs[run].slide(number), allow_nan=False).encode())
        if found := _SMALL.fullmatch(rest):
            run, number = map(int, found.groups())
            return Answer(200, "image/jpeg", self._runs[run].small(number), lasts=True)
        if found := _TILE.fullmatch(rest):
            run, number, level, first, second = (int(found[i]) for i in (1, 3, 4, 5, 6))
            if found[2] == "tile":
                return Answer(200, "image/jpeg", self._runs[run].tile(number, level, first, second), lasts=True)
            return Answer(200, "image/png", self._runs[run].heat_tile(number, level, second, first), lasts=True)
        return _plain(404, "there is nothing here")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that browsers drop in the middle of a tile."""


class _Handler(BaseHTTPRequestHandler):
    """Answers requests of one connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "wsiflow", ""
    server: Viewer

    def do_GET(self) -> None:
        """Answer a request."""
        answer = self.server.answer(self.headers.get("Host", ""), self.path)
        self.send_response(answer.status)
        headers = {
            "Content-Type": answer.kind,
            "Content-Length": str(len(answer.body)),
            "Cache-Control": "private, max-age=3600" if answer.lasts else "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Frame-Options": "DENY",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name that http.server gives it
        """Log nothing: addresses hold the token."""


@contextmanager
def listening(runs: Mapping[str, ServedRun], port: int = 0) -> Iterator[Viewer]:
    """Give a server that listens for requests; ``serve_forever`` answers them.

    Args:
        runs: One run or two by their names.
        port: Port on loopback; 0 for any that is free.

    Raises:
        EnvironmentFault: The port cannot be used.
    """
    try:
        viewer = Viewer(runs, port)
    except (OSError, OverflowError) as error:
        raise EnvironmentFault(f"port {port} cannot be used ({error})", "choose another --port, or none") from error
    try:
        yield viewer
    finally:
        viewer.server_close()
        for run in runs.values():
            run.close()


def _page(runs: Mapping[str, ServedRun]) -> str:
    body = '<div id="wsiflow-viewer"></div>\n' + shown.script("wsiflow-index", index_of(runs))
    script = "\n".join(map(shown.asset, ("openseadragon.min.js", "viewer.js")))
    return page.document(" and ".join(runs), body, style=shown.asset("viewer.css") + _STYLE, script=script, asks=True)


def _plain(status: int, text: str) -> Answer:
    return Answer(status, "text/plain; charset=utf-8", f"{text}\n".encode())
