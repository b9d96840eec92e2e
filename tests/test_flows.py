"""Prefect: a real server on loopback, and none at all."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return kept | {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"} | more


def ask(url: str, path: str) -> list[dict]:
    request = urllib.request.Request(f"{url}/{path}", b"{}", {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def overrides(manifest: Path, out: Path) -> list[str]:
    line = ["dataset=manifest", f"dataset.manifest={manifest}", f"out={out}", "inference.stride=224", "tracking=off"]
    return [*line, "evaluation.bootstrap=0", "executor.workers=1", "shard_slides=2", "name=watched"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a client of a Prefect server that listens on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    env = environment(tmp_path_factory.mktemp("prefect"), PREFECT_API_URL=url)
    command = [BIN / "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(1)
        yield env
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_a_run_is_one_flow_with_a_task_per_shard(server, small_slides: Path, tmp_path: Path) -> None:
    """Six slides in shards of two: three tasks to ingest them and three for the line, however many groups there are."""
    command = [BIN / "wsiflow", "run", *overrides(small_slides, tmp_path / "run")]
    done = subprocess.run(command, env=server, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Prefect server: {server['PREFECT_API_URL']}" in done.stdout
    for _ in range(30):  # the server records what it is told a little later
        tasks = ask(server["PREFECT_API_URL"], "task_runs/filter")
        if len(tasks) == 6 and all(task["state_type"] == "COMPLETED" for task in tasks):
            break
        time.sleep(1)
    assert sorted(task["name"] for task in tasks) == [f"{part} {i}" for part in ("ingest", "slides") for i in (1, 2, 3)]
    flows = ask(server["PREFECT_API_URL"], "flow_runs/filter")
    assert [(flow["name"], flow["state_type"]) for flow in flows] == [("watched", "COMPLETED")]


def test_a_deployment_runs_what_the_form_says(server, small_slides: Path, tmp_path: Path) -> None:
    """``deployments/prefect.yaml`` deploys, and a worker runs it with the overrides of the form."""

    def prefect(*arguments: str) -> None:
        done = subprocess.run(
            [BIN / "prefect", "--no-prompt", *arguments],
            env=server,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    out = tmp_path / "run"
    prefect("work-pool", "create", "local", "--type", "process")
    prefect("deploy", "--prefect-file", "deployments/prefect.yaml", "--all")
    prefect("deployment", "run", "wsiflow run/run", "-p", f"overrides={json.dumps(overrides(small_slides, out))}")
    prefect("worker", "start", "--pool", "local", "--run-once")
    for _ in range(120):
        if (out / "report.html").exists():
            break
        time.sleep(1)
    assert (out / "evaluation/summary.json").exists()


def test_without_a_server_a_run_says_so_and_goes_on(small_slides: Path, tmp_path: Path) -> None:
    """An address where nobody answers costs one line."""
    env = environment(tmp_path / "home", PREFECT_API_URL="http://127.0.0.1:9/api")
    command = [BIN / "wsiflow", "run", *overrides(small_slides, tmp_path / "run"), "dataset.limit=1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "Prefect" in line]
    assert len(said) == 1
    assert said[0].startswith("no Prefect server answers at http://127.0.0.1:9/api: going on")
    assert done.stderr == ""
