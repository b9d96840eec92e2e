"""Debian's Chromium without a window, driven through its DevTools: what a user sees, as text and as picture."""

import base64
import io
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium")
DOCUMENT = "WSIFLOW_DOCS_PICTURES"  # with this variable set, tests write the pictures of the documentation again
DOCS = Path(__file__).parents[1] / "docs"
_SWITCHES = (
    "--headless=new",
    "--no-sandbox",  # tests run as root in containers
    "--use-angle=swiftshader",  # WebGL, in which Prefect draws the graph of a run, on the processor
    "--enable-unsafe-swiftshader",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--remote-debugging-port=0",
    "--remote-debugging-address=127.0.0.1",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",  # no page reaches further than this machine
    "--hide-scrollbars",
)


class Tab:
    """A page that is open.

    Attributes:
        faults: What the browser's console has shown as an error so far, network errors included.
    """

    def __init__(self, socket: ClientConnection) -> None:
        """Take over a tab."""
        self._socket, self._asked = socket, 0
        self.faults: list[str] = []
        for domain in ("Log", "Runtime"):
            self._ask(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Go to an address."""
        self._ask("Page.navigate", url="about:blank")  # an address that differs after # alone would load nothing
        self._ask("Page.navigate", url=url)

    def value(self, script: str) -> Any:
        """Return what a JavaScript expression gives."""
        answer = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def text(self) -> str:
        """Return the text that is shown."""
        return str(self.value("document.body ? document.body.innerText : ''"))

    def wait(self, script: str, *, seconds: float = 200.0) -> Any:
        """Return the first true value of a JavaScript expression."""
        end = time.monotonic() + seconds
        while not (found := self.value(script)):
            assert time.monotonic() < end, f"{script} stayed {found!r} on:\n{self.text()[:2000]}"
            time.sleep(0.2)
        return found

    def wait_for(self, *words: str, seconds: float = 200.0) -> str:
        """Return the page's text once it has all of these words."""
        listed = json.dumps(words)
        self.wait(f"{listed}.every(word => document.body && document.body.innerText.includes(word))", seconds=seconds)
        return self.text()

    def click(self, script: str) -> None:
        """Press and release the mouse on the element that a JavaScript expression gives, once it is there."""
        place = f"(() => {{ const found = {script}; if (!found) return null; found.scrollIntoView({{block: 'center'}});"
        x, y, w, h = self.wait(
            f"{place} const r = found.getBoundingClientRect(); return [r.x, r.y, r.width, r.height] }})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._ask("Input.dispatchMouseEvent", type=kind, x=x + w / 2, y=y + h / 2, button="left", clickCount=1)

    def press(self, button: str, done: str) -> None:
        """Press a button until a condition holds: a page that is still loading takes no notice of it at first.

        Args:
            button: JavaScript expression that gives the button.
            done: JavaScript expression that is true once the page has taken notice.
        """
        end = time.monotonic() + 200
        self.wait(f"!!{button}")
        while True:
            self.value(f"{button}.click()")
            with suppress(AssertionError):
                self.wait(done, seconds=10)
                return
            assert time.monotonic() < end, f"{done} never held on:\n{self.text()[:2000]}"

    def type(self, text: str, script: str) -> None:
        """Replace the text of the field that a JavaScript expression gives."""
        self.click(script)
        self.value("document.activeElement.select()")
        self._ask("Input.insertText", text=text)

    def picture(self, path: Path, *, whole: bool = False) -> NDArray[np.uint8]:
        """Save what is seen as PNG, in few colours so that it is small, and return it, uint8 (rows, cols, 3)."""
        shot = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        seen = Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB")
        path.parent.mkdir(parents=True, exist_ok=True)
        seen.quantize(200, dither=Image.Dither.NONE).save(path, optimize=True)
        return np.array(seen)

    def pdf(self) -> bytes:
        """Return what is printed, as PDF."""
        return base64.b64decode(self._ask("Page.printToPDF", printBackground=True)["data"])

    def press_key(self, key: str, code: int) -> None:
        """Press and release a key, given its name and its number, as a keyboard does."""
        for kind in ("rawKeyDown", "keyUp"):
            self._ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def resize(self, width_px: int, height_px: int, *, is_phone: bool = False) -> None:
        """Show pages as a window of such a size does, or the screen of a phone."""
        size = {"width": width_px, "height": height_px, "deviceScaleFactor": 1}
        self._ask("Emulation.setDeviceMetricsOverride", mobile=is_phone, **size)

    def keep(self, name: str, folder: Path) -> NDArray[np.uint8]:
        """Save what is seen as a small PNG in a folder, or in docs/ where `DOCUMENT` is set, and return it."""
        return self.picture((DOCS if os.environ.get(DOCUMENT) else folder) / name)

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._asked += 1
        self._socket.send(json.dumps({"id": self._asked, "method": method, "params": params}))
        while True:
            answer = json.loads(self._socket.recv(timeout=200))
            self._note(answer.get("method", ""), answer.get("params", {}))
            if answer.get("id") == self._asked:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])

    def _note(self, event: str, told: dict[str, Any]) -> None:
        """Keep an event that is an error."""
        if event == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.faults.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
        elif event == "Runtime.exceptionThrown":
            self.faults.append(str(told["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and told["type"] == "error":
            self.faults.append(str(told["args"]))


@contextmanager
def chromium(home: Path, *, size_px: tuple[int, int] = (1600, 1200)) -> Iterator[Tab]:
    """Keep a browser running, with one tab in a window of such a width and height."""
    own = [f"--window-size={size_px[0]},{size_px[1]}", f"--user-data-dir={home}"]
    command = [str(CHROMIUM), *_SWITCHES, *own, "about:blank"]
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    log = (home.parent / "chromium.log").open("wb")
    process = subprocess.Popen(command, env={**environment, "HOME": str(home)}, stdout=log, stderr=log)
    try:
        with connect(_tab_address(home), max_size=None, proxy=None, ping_interval=None) as socket:  # it may be busy
            yield Tab(socket)
    finally:
        process.kill()  # with its children; nothing of it is kept
        process.wait()
        log.close()


def _tab_address(home: Path) -> str:
    """Return the address of the tab's DevTools, once the browser has written its port."""
    end = time.monotonic() + 200
    while time.monotonic() < end:
        written = home / "DevToolsActivePort"
        if written.exists() and written.read_text():
            url = f"http://127.0.0.1:{written.read_text().splitlines()[0]}/json/list"
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=200) as answer:
                tabs = [one for one in json.load(answer) if one["type"] == "page"]
            if tabs:
                return str(tabs[0]["webSocketDebuggerUrl"])
        time.sleep(0.2)
    raise AssertionError((home.parent / "chromium.log").read_text())
