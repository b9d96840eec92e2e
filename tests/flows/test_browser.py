"""A sweep in MLflow as a user sees it: a real server and a real browser, on loopback."""

import json
import os
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

from wsiflow.analysis.tradeoff import comparison

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")

STRIDES = (16, 56, 224)
N_RUNS = 2 * 2 * len(STRIDES)


class Seen(NamedTuple):
    """A sweep that a server shows, and the tab to look at it."""

    url: str
    experiment: str
    parent: str
    runs: dict[str, Any]
    tab: browser.Tab
    pictures: Path

    def open(self, page: str, **query: str) -> browser.Tab:
        """Open a page of MLflow."""
        self.tab.open(f"{self.url}/#/{page}?{urllib.parse.urlencode(query, quote_via=urllib.parse.quote)}")
        return self.tab


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """A sweep of twelve settings, compared, behind a real MLflow server, and a browser."""
    folder = tmp_path_factory.mktemp("seen")
    params = store(f"sqlite:///{folder}/mlflow.db")
    log(params, stride_trials(STRIDES, repeats=1), folder)
    result = comparison.run_comparison(
        comparison.Request([], params, comparison.Options(resamples=200)), folder / "out"
    )
    assert result.logged is not None
    client = mlflow.MlflowClient(tracking_uri=params.uri)
    experiment = client.get_experiment_by_name("wsiflow").experiment_id
    runs = {one.info.run_id: one for one in client.search_runs([experiment], "tags.`wsiflow.role` = 'run'")}
    pictures = Path(os.environ.get("WSIFLOW_SCREENSHOTS", folder / "pictures"))
    with _server(folder) as url, browser.chromium(folder / "home") as tab:
        yield Seen(url, experiment, result.logged.run_id or "", runs, tab, pictures)


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    """Keep an MLflow server listening on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [BIN / "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("wb") as log:
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


def test_the_chart_page_draws_every_metric_of_the_runs(seen: Seen) -> None:
    """The page has one chart for each metric, with a bar for each run, and lists every run."""
    page = seen.open(
        f"experiments/{seen.experiment}/runs",
        compareRunsMode="CHART",
        orderByKey="metrics.`froc.score`",
        orderByAsc="false",
    )
    page.wait_for("froc.score", f"{N_RUNS + 1} matching runs")
    page.wait("document.querySelectorAll('.js-plotly-plot .bars .point').length >= 30")
    shown = set(page.value("[...document.querySelectorAll('.js-plotly-plot')].map(one => one.data[0].x.length)"))
    assert max(shown) == 10, "MLflow draws the ten runs that sort first"
    best = max(one.data.metrics["froc.score"] for one in seen.runs.values())
    text = page.text()
    assert f"{best:.2f}" in text
    assert text.index("inference.stride=16") < text.index("inference.stride=56")
    picture = page.picture(seen.pictures / "chart.png")
    assert coloured(picture) > 0.02, "the bars are seen; the page without them has 0.005"


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
    """The page of the sweep has the table as its description, its children, the numbers and the tags."""
    page = seen.open(f"experiments/{seen.experiment}/runs/{seen.parent}")
    text = page.wait_for("accuracy against core-hours", "Child runs", "common.digest.dataset", "compare.n_settings")
    assert "precision=bf16, stain=none, stride=224" in text
    cells = page.value("[...document.querySelectorAll('table')].map(one => one.rows.length)")
    assert N_RUNS + 1 in cells, "the description's table has a row per setting"
    page.picture(seen.pictures / "parent.png")


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
