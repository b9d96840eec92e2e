"""A sweep in MLflow as a user sees it: a real server and a real browser, on loopback."""

import json
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import browser
import mlflow
import numpy as np
import pytest
from numpy.typing import NDArray
from serving import BIN
from swept import log, store, stride_trials

from wsiflow.analysis.tradeoff import comparison, rows
from wsiflow.run import tracking
from wsiflow.run.tracking import views
from wsiflow.system import processes

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")

STRIDES = (16, 56, 224)
N_RUNS = 2 * 2 * len(STRIDES)


class Seen(NamedTuple):
    """A sweep that a server shows, what its end printed, and the tab to look at it."""

    url: str
    experiment: str
    parent: str
    runs: dict[str, Any]
    links: list[str]
    tab: browser.Tab
    pictures: Path

    def open(self, page: str, **query: str) -> browser.Tab:
        """Open a page of MLflow."""
        self.tab.open(f"{self.url}/#/{page}?{urllib.parse.urlencode(query, quote_via=urllib.parse.quote)}")
        return self.tab


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """A sweep of twelve settings, compared, behind the server whose command it prints, and a browser.

    One more setting has failed, and another one is running.
    """
    folder = tmp_path_factory.mktemp("seen")
    params = store(f"sqlite:///{folder}/mlflow.db")
    log(params, stride_trials(STRIDES, repeats=1), folder)
    place = {"sweep_folder": str(folder / "strides"), "driver": processes.current()}
    failed, running = (tracking.RunStart(f"stride={n}", f"f{n}", f"{folder}/strides/{n}", **place) for n in (8, 4))
    tracking.fail_run(params, failed, "slide a, predict: the memory ended; use fewer workers")
    tracking.begin_run(params, running)
    result = comparison.run_comparison(comparison.Request([], params, rows.Options(resamples=200)), folder / "out")
    assert result.logged is not None
    client = mlflow.MlflowClient(tracking_uri=params.uri)
    experiment = client.get_experiment_by_name("wsiflow").experiment_id
    complete = "tags.`wsiflow.role` = 'run' and attributes.status = 'FINISHED'"
    runs = {one.info.run_id: one for one in client.search_runs([experiment], complete)}
    *links, command = (line[11:] for line in comparison.summary_text(result).splitlines()[-3:])
    pictures = folder / "pictures"
    with _server(folder, command.removeprefix("served by: ")) as url, browser.chromium(folder / "home") as tab:
        tab.open(url)
        tab.wait_for("Experiments")
        tab.value(
            "localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false')"
        )  # it covers a third of the first page
        links = [link.replace("http://127.0.0.1:5000", url) for link in links]
        yield Seen(url, experiment, result.logged.run_id or "", runs, links, tab, pictures)


@contextmanager
def _server(folder: Path, printed: str) -> Iterator[str]:
    """Keep the MLflow server of a printed command listening on loopback, at a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert " --port 5000 " in printed
    _, *arguments = shlex.split(printed.replace(" --port 5000 ", f" --port {port} "))
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("wb") as log:
        command = [BIN / "mlflow", *arguments]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(port, process, folder / "server.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # the group of this very process: server and its workers
            process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 250
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.3)


def coloured(picture: NDArray[np.uint8]) -> float:
    """Return the share of pixels that are neither grey nor nearly so."""
    return float((picture.max(axis=2).astype(int) - picture.min(axis=2) > 60).mean())


def test_the_printed_link_opens_the_table_and_one_click_the_chart(seen: Seen) -> None:
    """The table has settings, scores with intervals, cost and Pareto set; the chart tells the set from the rest."""
    page = seen.tab
    page.open(seen.links[0])
    order = [
        "Run Name",
        "inference.stride",
        "froc.score",
        "froc.interval",
        "cost.total_core_hours",
        "throughput.core_hours",
    ]
    page.wait_for(f"{N_RUNS + 2} matching runs", *order)
    left = "[...document.querySelectorAll('[role=columnheader]')].find(one => one.innerText == name)"
    page.wait(f"{order}.map(name => {left}.getBoundingClientRect().left).every((x, i, all) => !i || x > all[i - 1])")
    text = page.text()
    best = max(seen.runs.values(), key=lambda one: one.data.metrics["froc.score"])
    assert f"{best.data.metrics['froc.score']:.4g}" in text
    assert best.data.tags["froc.interval"] in text
    assert "stride=8" in text, "the one that failed"
    assert "stride=4" in text, "the one that runs"
    page.keep("mlflow-table.png", seen.pictures)
    page.click("document.querySelector('input[name=runs-view-mode][value=CHART]').parentElement")
    page.wait("[...document.querySelectorAll('.js-plotly-plot')].some(one => /^scatter/.test(one.data[0].type))")
    points = page.value("document.querySelector('.js-plotly-plot').data[0].marker.color")
    assert len(points) == N_RUNS
    front = [one for one in seen.runs.values() if one.data.tags["wsiflow.pareto"] == "yes"]
    assert sum(colour == views.FRONT for colour in points) == len(front)
    assert set(points) == {views.FRONT, views.BEATEN}
    assert coloured(page.keep("mlflow-scatter.png", seen.pictures)) > 0.0005


def test_the_compare_page_tells_the_settings_apart(seen: Seen) -> None:
    """The page shows every run with its parameters and scores, and a plot of one against the other."""
    page = seen.open("compare-runs", runs=json.dumps(list(seen.runs)), experiments=json.dumps([seen.experiment]))
    text = page.wait_for(
        f"Comparing {N_RUNS} Runs", "Run details", "inference.stride", "stain.method", "wsiflow.pareto"
    )
    for one in seen.runs.values():
        assert one.info.run_name in text
    assert text.count("macenko") >= N_RUNS
    page.wait("document.querySelectorAll('.js-plotly-plot svg').length > 0")
    assert page.picture(seen.pictures / "compare.png").std() > 10
    page.click("[...document.querySelectorAll('[role=tab]')].find(one => one.innerText == 'Scatter Plot')")
    page.wait("[...document.querySelectorAll('.js-plotly-plot')].some(one => one.data[0].type == 'scattergl')")
    points = page.value("document.querySelector('.js-plotly-plot').data.map(one => one.x.length)")
    assert sum(points) == N_RUNS
    assert page.picture(seen.pictures / "scatter.png").std() > 10


def test_the_parent_shows_the_comparison(seen: Seen) -> None:
    """The second link is the page of the sweep: its answer, table and figures, its children and the failed one."""
    page = seen.tab
    page.open(seen.links[1])
    page.wait_for("Worth their cost", "Child runs", "compare.n_settings")
    page.click("[...document.querySelectorAll('button')].find(one => one.innerText == 'Show more')")
    text = page.wait_for("precision=bf16, stain=none, stride=224", "core-h (", "stride=8 failed: slide a, predict")
    assert "reference" in text
    cells = page.value("[...document.querySelectorAll('table')].map(one => one.rows.length)")
    assert N_RUNS + 1 in cells, "the description's table has a row per setting"
    page.wait("[...document.images].filter(one => one.naturalWidth > 900).length == 3")
    page.keep("mlflow-parent.png", seen.pictures)


def test_the_figure_is_seen_among_the_artifacts(seen: Seen) -> None:
    """The artifacts are shown: the tradeoff as PNG, and the report as a page of its own."""
    page = seen.open(f"experiments/{seen.experiment}/runs/{seen.parent}/artifacts/tradeoff.png")
    page.wait_for("compare.csv", "differences.png", "report.html", "tradeoff.svg")
    page.wait(
        "[...document.querySelectorAll('img')].some(one => one.naturalWidth > 900) || "
        "[...document.querySelectorAll('.js-plotly-plot image, .js-plotly-plot svg')].length > 0"
    )
    assert coloured(page.picture(seen.pictures / "artifacts.png")) > 0.001


def test_a_filter_finds_the_pareto_set(seen: Seen) -> None:
    """A filter in the search field shows the runs on the front and no other."""
    front = [one for one in seen.runs.values() if one.data.tags["wsiflow.pareto"] == "yes"]
    assert 0 < len(front) < N_RUNS
    page = seen.open(
        f"experiments/{seen.experiment}/runs",
        searchFilter="tags.\"wsiflow.pareto\" = 'yes'",
        orderByKey="metrics.`froc.score`",
    )
    text = page.wait_for(f"{len(front)} matching runs", *(one.info.run_name for one in front))
    others = {one.info.run_name for one in seen.runs.values() if one not in front}
    assert not [name for name in others if name in text]
    page.picture(seen.pictures / "pareto.png")


def test_the_report_is_a_page_that_fits(seen: Seen, tmp_path: Path) -> None:
    """The report, opened as a file, has three figures and its tables, none wider than the page."""
    page = seen.tab
    (tmp_path / "report.html").write_bytes(_artifact(seen, "report.html"))
    page.open(f"file://{tmp_path}/report.html")
    text = page.wait_for("Tradeoff", "Differences", "FROC", "Pareto set")
    assert page.value("[...document.images].filter(one => one.naturalWidth > 500).length") == 3
    assert page.value("document.documentElement.scrollWidth <= window.innerWidth")
    assert str(N_RUNS) in text
    assert coloured(page.picture(seen.pictures / "report.png", whole=True)) > 0.001


def _artifact(seen: Seen, name: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{seen.url}/get-artifact?path={name}&run_uuid={seen.parent}", timeout=200) as answer:
        return bytes(answer.read())
