"""The pages of the documents as a site, in a real browser: nothing is missing on them, on a desk or on a phone."""

import functools
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import browser
import pytest
from serving import BIN

ROOT = Path(__file__).parents[1]
LINKS = "[...document.links].map(link => link.href)"
IDS = "[...document.querySelectorAll('[id],a[name]')].map(element => element.id || element.name)"
BROKEN = "[...document.images].filter(image => image.complete && !image.naturalWidth).map(image => image.src)"
LOADED = "document.readyState === 'complete' && [...document.images].every(image => image.complete)"
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site, as ``make site`` builds it."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [BIN / "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=False, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")
def test_pages_have_no_broken_link_picture_or_script(site: Path, address: str, tmp_path: Path) -> None:
    """Every page is opened; its pictures are there, its links lead somewhere, and it is no wider than a phone."""
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    ids: dict[str, set[str]] = {}
    links: dict[str, list[str]] = {}
    with browser.chromium(tmp_path / "home", size_px=(1280, 900)) as tab:
        for page in pages:
            tab.resize(1280, 900)
            tab.open(address + page)
            tab.wait(f"location.pathname === '/{page}' && {LOADED}")
            assert tab.value(BROKEN) == [], page
            ids[page], links[page] = set(tab.value(IDS)), tab.value(LINKS)
            if page == "index.html":
                tab.keep("site.png", tmp_path)
            tab.resize(390, 844, is_phone=True)
            assert tab.value(WIDER) <= 0, f"{page} is wider than a phone"
            if page == "viewing.html":
                tab.keep("site-phone.png", tmp_path)
        assert tab.faults == []
    assert len(pages) > 30
    broken = [
        f"{page}: {link}" for page, found in links.items() for link in found if not leads(link, address, site, ids)
    ]
    assert broken == []


def leads(link: str, address: str, site: Path, ids: dict[str, set[str]]) -> bool:
    """Return whether a link leads to a file of the site, and to a place on it; other sites are not asked."""
    if not link.startswith(address):
        return True
    parts = urlsplit(link)
    name, place = unquote(parts.path.lstrip("/")) or "index.html", unquote(parts.fragment)
    return (site / name).is_file() and (not place or name not in ids or place in ids[name])
