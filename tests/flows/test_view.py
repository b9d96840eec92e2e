"""``wsiflow view`` and the report as a pathologist sees them: a real browser, a real slide, and who else may ask."""

import io
import json
import os
import shutil
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
from damage import overwrite
from PIL import Image
from serving import BIN
from small_runs import COARSE, wsiflow

from flows.commands import view
from wsiflow.analysis.viewer import server
from wsiflow.analysis.viewer.served import TILE_PX, ServedRun, n_levels
from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.run.plan import latest_plan
from wsiflow.slides.slide import open_slide

needs_browser = pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")


@contextmanager
def served(*roots: Path) -> Iterator[server.Viewer]:
    """Keep a viewer of runs answering."""
    runs = {root.name: ServedRun(root) for root in roots}
    with server.listening(runs) as viewer:
        thread = threading.Thread(target=viewer.serve_forever)
        thread.start()
        try:
            yield viewer
        finally:
            viewer.shutdown()
            thread.join()


def get(url: str, **headers: str) -> tuple[int, bytes]:
    """Return status and content of an address, asked without a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=100) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def pixels(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over a real slide."""
    out = tmp_path_factory.mktemp("real") / "run"
    path = shared_data / "wsi/good/CMU-1-Small-Region.svs"
    assert wsiflow("dataset=single", f"dataset.path={path}", "geometry.max_upsample=2.1", f"out={out}", *COARSE) == 0
    return out


def test_tiles_are_the_slide(finished: Path) -> None:
    """Tiles of the last level have the slide's pixels, those of others its means; the first level is one tile."""
    run = ServedRun(finished)
    number = next(i for i, one in enumerate(run.described.entries) if one["id"] == "tumor_001")
    planned = next(one for one in latest_plan(finished).slides if one.slide_id == "tumor_001")
    last = n_levels(planned) - 1
    with Image.open(planned.path) as slide:
        level_0 = np.asarray(slide.convert("RGB")).astype(int)
    tile = pixels(run.tile(number, last, 2, 1))
    assert tile.shape == (TILE_PX, TILE_PX, 3)
    assert np.abs(tile - level_0[TILE_PX : 2 * TILE_PX, 2 * TILE_PX : 3 * TILE_PX]).mean() < 3
    whole = pixels(run.tile(number, 0, 0, 0))
    assert max(whole.shape) <= TILE_PX
    assert np.abs(whole.mean(axis=(0, 1)) - level_0.mean(axis=(0, 1))).max() < 2
    for level, col, row in ((last, 99, 0), (last + 1, 0, 0)):
        with pytest.raises(InputError, match="there is no tile"):
            run.tile(number, level, col, row)
    run.close()


def test_nobody_else_is_answered(finished: Path) -> None:
    """Another token, another host's name and addresses that are no numbers get nothing."""
    with served(finished) as viewer:
        token = viewer.link.split("/")[3]
        root = viewer.link.removesuffix(f"/{token}/")
        assert viewer.server_address[0] == "127.0.0.1"
        status, page = get(viewer.link)
        assert (status, b"wsiflow-index" in page) == (200, True)
        assert get(viewer.link, Host="localhost:9999")[0] == 200, "a tunnel ends at another port"
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
            assert viewer.answer(host, f"/{token}/").status == 403
        for path in ("/", "/x/", f"/{token}x/", f"/{token[:-1]}/"):
            assert get(root + path) == (403, b"open the link that wsiflow view printed\n")
        for path in ("../plan.json", "%2e%2e/plan.json", "0/slide/99999.json", "9/slide/0.json", "0/slide/-1.json"):
            assert get(viewer.link + path)[0] == 404
        status, slide = get(viewer.link + "0/slide/0.json")
        assert status == 200
        assert {"tiles", "heat", "detections", "regions"} <= set(json.loads(slide))
        status, heat = get(viewer.link + "0/heat/0/0/0_0.png")
        assert (status, Image.open(io.BytesIO(heat)).mode) == (200, "L")


def test_several_browsers_see_the_same(finished: Path) -> None:
    """Tiles that are asked for at once, by more askers than slides stay open, are those that one asker gets."""
    with served(finished) as viewer:
        tiles = [
            f"{viewer.link}0/{kind}/{slide}/0/0_0.{ending}"
            for slide in range(6)
            for kind, ending in (("tile", "jpg"), ("heat", "png"))
        ] + [f"{viewer.link}0/small/{slide}.jpg" for slide in range(6)]
        with ThreadPoolExecutor(12) as askers:
            several = list(askers.map(get, tiles * 4))
        assert several == [get(tile) for tile in tiles] * 4
        assert {status for status, _ in several} == {200}


def test_a_missing_slide_is_named_and_its_overview_shown(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """The command says in one line which slide is gone; the others are shown themselves."""
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    gone = next(one.path for one in latest_plan(root).slides if one.slide_id == "tumor_002")
    overwrite(root / "plan.json", (root / "plan.json").read_text().replace(gone, f"{gone}.gone"))
    monkeypatch.setattr(server.Viewer, "serve_forever", lambda _self: None)
    assert view.main(view_arguments(root)) == 0
    out, err = capsys.readouterr()
    assert err == f"overviews are shown of 1 slides: slide tumor_002: {gone}.gone is not there\n"
    assert out.startswith("open http://127.0.0.1:")
    run = ServedRun(root)
    for number, one in enumerate(run.described.entries):
        slide = run.slide(number)
        assert ("picture" in slide, "tiles" in slide) == (one["id"] == "tumor_002", one["id"] != "tumor_002")
        assert ("the overview of the run is shown" in slide.get("remark", "")) == ("picture" in slide)
    run.close()


def view_arguments(*roots: Path, port: int = 0) -> Any:
    """Return the arguments of the command as its parser gives them."""
    from argparse import ArgumentParser

    parser = ArgumentParser()
    view.add_options(parser)
    return parser.parse_args([*map(str, roots), "--port", str(port)])


def test_bad_folders_and_ports_are_refused(finished: Path, tmp_path: Path) -> None:
    """One line says what is wrong."""
    with pytest.raises(InputError, match="it holds no plan; name the out= folder of a run"):
        view.main(view_arguments(tmp_path))
    for port in (99999, -1):
        with pytest.raises(EnvironmentFault, match=f"port {port} cannot be used"):
            view.main(view_arguments(finished, port=port))


def test_ctrl_c_ends_it_in_one_line(finished: Path) -> None:
    command = [BIN / "wsiflow", "view", str(finished)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("open http://127.0.0.1:")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert (process.returncode, errors) == (130, "stopped: the viewer has ended\n")


# --- in a browser


@pytest.fixture
def pictured(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A run with a slide of it; for the picture of the documents that is the demo, in full."""
    if browser.DOCUMENT not in os.environ:
        return finished, "tumor_002"
    monkeypatch.chdir(tmp_path)
    assert wsiflow("name=demo", f"out={tmp_path}/demo/run", "orchestrator=none", "tracking=off") == 0
    return tmp_path / "demo/run", "tumor_002"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Tab]:
    folder = tmp_path_factory.mktemp("browser")
    with browser.chromium(folder / "home", size_px=(1280, 800)) as opened:
        yield opened


SMALL = "[...document.querySelectorAll('.wsv-small')].every(image => image.complete && image.naturalWidth > 30)"
AT_REST = """wsiflow.panes.every(({osd, heat}) => osd.isOpen() && osd.world.getItemAt(0).getFullyLoaded()
    && [...heat.tiles.values()].every(tile => tile) && ["zoomSpring", "centerSpringX", "centerSpringY"].every(
        name => osd.viewport[name].isAtTargetValue()))"""
ONLY_MAP = "for (const name of ['truth', 'detections']) document.querySelector(`input[name=${name}]`).click()"

TO_WHOLE_PIXELS = """(() => { const [pane] = wsiflow.panes, {viewport} = pane.osd;
    viewport.zoomTo(viewport.imageToViewportZoom(1), null, true);
    const {x, y, scale} = pane.view(), [right, down] = [x, y].map(at => (at - Math.round(at)) / scale / pane.span);
    viewport.panBy(new OpenSeadragon.Point(right, down), true) })()"""


def moved(tab: browser.Tab, name: str, value: float) -> None:
    """Move a slider."""
    field = f"document.querySelector('input[name={name}]')"
    tab.value(f"{field}.value = {value}; {field}.dispatchEvent(new Event('input'))")


def at_rest(tab: browser.Tab, slide_id: str) -> None:
    """Wait until a slide is shown, with all its tiles."""
    tab.wait(f"document.querySelector('#wsiflow-viewer[data-slide=\"{slide_id}\"]') && {AT_REST}")


def pressed(tab: browser.Tab, key: str) -> None:
    tab.value(f"document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}', bubbles: true}}))")


def stage(picture: Any, tab: browser.Tab) -> Any:
    """Return the part of a picture of the page that the slide is shown in, without scale bar and small overview."""
    x, y, w, h = tab.value("Object.values(wsiflow.panes[0].osd.container.getBoundingClientRect().toJSON()).slice(0, 4)")
    return picture[round(y) + round(h / 4) : round(y + h) - 60, round(x) : round(x + w)].astype(int)


@needs_browser
def test_a_report_is_looked_at(finished: Path, tab: browser.Tab, tmp_path: Path) -> None:
    """The picture has the map where scores are, and nothing over glass; findings, sliders and keys work in a file."""
    tab.open(f"file://{finished}/report.html#slide=tumor_002")
    at_rest(tab, "tumor_002")
    text = tab.wait_for(
        "The slides, what went wrong first", "Isolated tumour cells", "1 false positive, up to 0.8", "FROC"
    )
    assert "tumor_002 tumour, score 0." in text
    assert tab.value("document.documentElement.scrollWidth <= window.innerWidth")
    tab.value("document.querySelector('.looked').scrollIntoView()")
    tab.value(ONLY_MAP)
    shown = stage(tab.picture(tmp_path / "map.png"), tab)
    moved(tab, "opacity", 0)
    bare = stage(tab.picture(tmp_path / "bare.png"), tab)
    tinted = np.abs(shown - bare).max(axis=2) > 8
    cells = """(() => { const {heat, stage} = wsiflow.panes[0], view = wsiflow.panes[0].view();
        const [tile] = heat.tiles.values(), side = heat.heat.cell * heat.heat.levels[0].scale * view.scale;
        return tile.values.filter(value => (value - 1) / 254 >= 0.1).length * side * side })()"""
    assert tinted.sum() == pytest.approx(tab.value(cells), rel=0.15), "no haze over what has low scores"
    moved(tab, "opacity", 1)
    moved(tab, "from", 1)
    assert np.abs(stage(tab.picture(tmp_path / "clear.png"), tab) - bare).max() < 9
    scale = tab.value("wsiflow.panes[0].view().scale")
    tab.value("wsiflow.panes[0].stage.focus()")
    pressed(tab, "n")
    tab.wait(f"wsiflow.panes[0].view().scale > 1.3 * {scale}")
    assert tab.value("document.querySelector('.wsv-items [aria-current=true]').innerText").startswith("False positive")
    pressed(tab, "j")
    at_rest(tab, "normal_001")
    assert tab.value("location.hash") == "#slide=normal_001"
    tab.wait(SMALL)


@needs_browser
def test_a_slide_of_a_report_is_seen_at_once(pictured: tuple[Path, str], tab: browser.Tab, tmp_path: Path) -> None:
    """List, picture, findings and keys are in sight together."""
    root, slide_id = pictured
    tab.open(f"file://{root}/report.html#slide={slide_id}")
    at_rest(tab, slide_id)
    tab.value("document.querySelector('.looked').scrollIntoView()")
    tab.wait(SMALL)
    seen = (
        "(({top, bottom}) => [top >= 0, bottom <= innerHeight])(document.querySelector('.wsv').getBoundingClientRect())"
    )
    assert tab.value(seen) == [True, True]
    tab.keep("view-report.png", tmp_path)


NOTE_SHEETS = """window.addEventListener('beforeprint', () => { window.sheets =
    [...document.querySelectorAll('.wsv-sheet')].map(sheet => { const canvas = sheet.querySelector('canvas');
        const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        const has = (...rgb) => data.some((_, i) => i % 4 === 0 && rgb.every((value, k) => data[i + k] === value));
        return {text: sheet.innerText, hit: has(0, 162, 107), miss: has(255, 59, 48), fp: has(255, 176, 0)} }) })"""


@needs_browser
def test_a_report_is_printed(finished: Path, tab: browser.Tab) -> None:
    """Each slide of the list has a page with its picture, its outlines and its findings, at the confidence chosen."""
    tab.open(f"file://{finished}/report.html")
    at_rest(tab, "tumor_002")
    tab.wait(
        "wsiflow.printed.images.size === 6 && [...wsiflow.printed.images.values()].every(({picture, heat}) =>"
        " picture.complete && heat.complete)"
    )
    tab.value(NOTE_SHEETS)
    assert tab.pdf().count(b"/Type /Page\n") > 8
    sheets = {sheet["text"].split()[0]: sheet for sheet in tab.value("sheets")}
    assert list(sheets)[:2] == ["tumor_002", "normal_001"]
    assert len(sheets) == 6
    assert "False positives, triangles (1)False positive: confidence 0.8" in sheets["tumor_002"]["text"]
    found = sheets["tumor_001"]
    assert (found["hit"], found["miss"], found["fp"]) == (True, False, False)
    assert tab.value("document.querySelectorAll('.wsv-sheet').length") == 0, "they are there while it is printed"
    moved(tab, "least", 0.9999)
    tab.pdf()
    missed = next(sheet for sheet in tab.value("sheets") if sheet["text"].startswith("tumor_001"))
    assert (missed["hit"], missed["miss"]) == (False, True)
    assert "Detections from 1.00." in missed["text"]


ACTIVE = "document.activeElement.innerText || document.activeElement.ariaLabel"


@needs_browser
def test_the_keyboard_is_enough(finished: Path, tab: browser.Tab) -> None:
    """The list of slides is one stop of the tab key, in which arrows choose; what has the focus has a frame."""
    tab.open(f"file://{finished}/report.html")
    at_rest(tab, "tumor_002")
    tab.value("document.querySelector('input[type=search]').focus()")
    seen = []
    for _ in range(4):
        tab.press_key("Tab", 9)
        seen.append(tab.value(ACTIVE))
        assert tab.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        if len(seen) == 2:
            tab.press_key("ArrowDown", 40)
            at_rest(tab, "normal_001")
            assert tab.value(ACTIVE).startswith("normal_001")
    assert seen[1].startswith("tumor_002")
    assert seen[2].startswith("normal_001: picture")
    assert seen[3] == "Whole slide"


@needs_browser
def test_a_real_slide_is_viewed(real: Path, tab: browser.Tab, tmp_path: Path) -> None:
    """A slide is shown from its own pixels, down to a pixel of it on a pixel of the screen, with its scale."""
    with served(real) as viewer:
        tab.open(viewer.link)
        at_rest(tab, "CMU-1-Small-Region")
        tab.wait_for("CMU-1-Small-Region", "no truth")
        tab.wait(SMALL)
        tab.value(ONLY_MAP)
        moved(tab, "opacity", 0)
        tab.value(TO_WHOLE_PIXELS)
        at_rest(tab, "CMU-1-Small-Region")
        seen = stage(tab.picture(tmp_path / "slide.png"), tab)
        view = tab.value("wsiflow.panes[0].view()")
        assert view["scale"] == pytest.approx(1)
        loaded = "performance.getEntriesByType('resource').filter(one => /tile/.test(one.name)).length"
        assert tab.value(loaded) > 4
        (planned,) = latest_plan(real).slides
        rows, cols, _ = seen.shape
        left, top = -round(view["x"]), round(tab.value("wsiflow.panes[0].osd.container.clientHeight") / 4 - view["y"])
        with open_slide(Path(planned.path), slide_id="a") as slide:
            near = [slide.read(left + x, top + y, 0, (cols, rows)).rgb for x in (-1, 0, 1) for y in (-1, 0, 1)]
            elsewhere = slide.read(left + 40, top + 40, 0, (cols, rows)).rgb
        errors = [np.abs(seen - each).mean() for each in (*near, elsewhere)]
        assert min(errors) < errors[-1] / 2, "the same pixels, up to compression and a part of a pixel"
        tab.value(ONLY_MAP)
        moved(tab, "opacity", 0.6)
        tab.value("wsiflow.zoom(0)")
        at_rest(tab, "CMU-1-Small-Region")
        tab.keep("view-slide.png", tmp_path)


@needs_browser
def test_two_runs_move_together(two_settings: tuple[Path, Path], tab: browser.Tab, tmp_path: Path) -> None:
    """Both pictures show the same part of the slide, and what one run finds alone is said."""
    with served(*two_settings) as viewer:
        tab.open(f"{viewer.link}#slide=tumor_001")
        at_rest(tab, "tumor_001")
        tab.wait_for("Both find the same lesions", "fp32: Lesions found (1)", "other: Lesions found (1)")
        tab.value("wsiflow.zoom(2)")
        bounds = "wsiflow.panes.map(({osd}) => Object.values(osd.viewport.getBounds(true)).slice(0, 4))"
        tab.wait(f"{AT_REST} && wsiflow.panes[0].osd.viewport.getZoom() > 1.1")
        first, second = tab.value(bounds)
        assert second == pytest.approx(first, abs=0.002)
        tab.value("void wsiflow.panes[1].osd.viewport.zoomBy(1.5)")
        tab.wait(f"{AT_REST} && wsiflow.panes[0].osd.viewport.getBounds(true).width < {first[2] / 1.3}")
        first, second = tab.value(bounds)
        assert second == pytest.approx(first, abs=0.002)
        tab.keep("view-two.png", tmp_path)
