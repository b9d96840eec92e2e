"""Prefect: a real server on loopback, and none at all."""

import csv
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from uuid import UUID

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from serving import BIN, PrefectServer
from small_runs import over

from flows import compose, line, reported
from flows.__main__ import ensure_home
from wsiflow.model.engines import cache


def overrides(manifest: Path, out: Path) -> list[str]:
    line = ["dataset=manifest", f"dataset.manifest={manifest}", f"out={out}", "inference.stride=224", "tracking=off"]
    return [*line, "evaluation.bootstrap=0", "dense.windows=0", "executor=inline", "shard_slides=2", "name=watched"]


def test_a_user_without_a_home_gets_a_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user in a container may have no home, or one that does not exist."""

    def absent() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for home in (absent, lambda: tmp_path / "nowhere"):
        monkeypatch.setattr(Path, "home", home)
        ensure_home()
        assert Path(os.environ["HOME"]).parent == tmp_path
        assert cache.cache_folder({}) is None or home is not absent
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("HOME", "mine")
    ensure_home()
    assert os.environ["HOME"] == "mine"


def test_a_run_that_lacks_a_file_is_not_finished(finished: Path, small_slides: Path, tmp_path: Path) -> None:
    """Such a start is shown by Prefect; one that has nothing to do is answered without it."""
    out = shutil.copytree(finished, tmp_path / "run")
    config = compose.compose_config(over(small_slides, out))
    assert line.finished(config) is not None
    next((out / "detections").glob("*.csv")).unlink()
    assert line.finished(config) is None


def with_a_broken_slide(manifest: Path, folder: Path) -> Path:
    """Return a manifest with the slides of another one, and a file that is no slide."""
    (folder / "broken.tif").write_text("no slide")
    with manifest.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        row |= {name: str(manifest.parent / row[name]) for name in ("path", "annotation_path") if row[name]}
    broken = dict.fromkeys(rows[0], "") | {"slide_id": "broken", "path": str(folder / "broken.tif"), "label": "normal"}
    with (folder / "manifest.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows([*rows, broken])
    return folder / "manifest.csv"


# Last, since their server is busy as long as it listens.
def test_a_run_is_one_flow_with_a_task_per_step(server: PrefectServer, small_slides: Path, tmp_path: Path) -> None:
    """Seven slides in shards of two: a task to ingest each shard and one to predict it, however many groups there are.

    One slide is none: its task has failed and says why, and the run is partial.
    """
    manifest = with_a_broken_slide(small_slides, tmp_path)
    command = [BIN / "wsiflow", "run", *overrides(manifest, tmp_path / "run"), "allow_partial=true"]
    command += ["tracking.uri='http://joe:canary@127.0.0.1:9/?token=canary'"]
    env = server.env | {"WSIFLOW_PROGRESS_S": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 10, done.stderr
    assert f"Prefect server: {server.url}" in done.stdout
    check_its_tasks(server)
    (flow,) = server.ask("flow_runs/filter", {"flow_runs": WATCHED})
    assert (flow["name"], flow["state_type"], flow["state_name"]) == ("watched", "COMPLETED", "Partial")
    assert flow["state"]["message"].startswith("1 of 7 slides failed: slide broken, ingest")
    assert flow["tags"] == ["data: manifest.csv", "model: demo", "wsiflow"]
    assert flow["parameters"]["config"]["tracking"]["uri"] == "http://[redacted]@127.0.0.1:9/?token=[redacted]"
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"canary" in path.read_bytes()]
    assert not written
    assert "canary" not in done.stdout + done.stderr
    check_what_its_page_shows(server, flow["id"])
    with temporary_settings({PREFECT_API_URL: server.url}):
        reported.cancel(UUID(flow["id"]))
    assert server.ask(f"flow_runs/{flow['id']}")["state_type"] == "CANCELLED", "as a run that is stopped"


WATCHED = {"name": {"any_": ["watched"]}}


def check_its_tasks(server: PrefectServer) -> None:
    """See that tasks tell by their names what they do, and that the one that lost its slide has failed."""
    for _ in range(200):  # the server records reports a little later
        tasks = {task["name"]: task for task in server.ask("task_runs/filter", {"flow_runs": WATCHED})}
        if len(tasks) == 10 and all(task["end_time"] for task in tasks.values()):
            break
        time.sleep(1)
    pairs = ("normal_001, normal_002", "normal_003, tumor_001", "tumor_002, tumor_003")
    shards = [f"{step} {slides}" for step in ("ingest", "predict") for slides in pairs]
    assert sorted(tasks) == sorted([*shards, "ingest broken", "choose engine", "plan", "score"])
    assert [name for name, task in tasks.items() if task["state_type"] != "COMPLETED"] == ["ingest broken"]
    assert "1 of 1 slides failed: slide broken, ingest" in tasks["ingest broken"]["state"]["message"]
    inputs = tasks["predict normal_001, normal_002"]["task_inputs"]
    assert inputs["slides"] == [{"input_type": "parameter", "name": "normal_001, normal_002"}]
    assert inputs["after"] == [{"input_type": "task_run", "id": tasks["plan"]["id"]}]


def check_what_its_page_shows(server: PrefectServer, flow_run_id: str) -> None:
    """See that the page shows the run's records, those of tasks with the tasks, the progress and the result."""
    own = {"flow_run_id": {"any_": [flow_run_id]}}
    artifacts = {one["key"].rpartition("-")[2]: one for one in server.ask("artifacts/filter", {"artifacts": own})}
    assert sorted(artifacts) == ["failures", "progress", "result"]
    assert all(re.fullmatch(r"wsiflow-watched-[0-9a-f]{8}-\w+", one["key"]) for one in artifacts.values())
    progress = artifacts["progress"]
    assert (progress["type"], progress["data"]) == ("progress", 100)
    assert re.fullmatch(r"6 of 6 slides, ([\d,]+) of \1 tiles, [\d.,]+ tiles/s", progress["description"])
    (failure,) = json.loads(artifacts["failures"]["data"])
    assert (failure["slide"], failure["stage"]) == ("broken", "ingest")
    assert "not a slide in a format" in failure["cause"]
    assert "remove it or its line" in failure["remedy"]
    assert "**Partial**: 1 of 7 slides have no result" in artifacts["result"]["data"]
    records = server.ask("logs/filter", {"logs": own, "limit": 200})
    steps = [record for record in records if record["name"].startswith("wsiflow.")]
    assert min(record["level"] for record in steps) == logging.INFO
    assert len([1 for step in steps if step["message"].startswith("plan: 6 slides, 1 rejected, ")]) == 1
    shards = [step["task_run_id"] for step in steps if step["message"].endswith(": 2 of 2 slides are finished")]
    assert len(set(shards) - {None}) == len(shards) == 3
    assert any(
        re.match(r"extract \w+, \w+: 2 of 2 tasks done, \d+ tiles in .* tiles/s", one["message"]) for one in steps
    )
    assert "canary" not in str(records)


_LOST = """
import sys
import psutil
from flows.__main__ import main
from wsiflow.run.results import finish

complete, pid = finish.finish, int(sys.argv[1])

def lose_server(*arguments):
    served = psutil.Process(pid)
    for one in (served, *served.children(recursive=True)):
        one.kill()
    return complete(*arguments)

finish.finish = lose_server
sys.exit(main(sys.argv[2:]))
"""


def test_a_run_outlives_its_server(server: PrefectServer, tiny_slides: Path, tmp_path: Path) -> None:
    """Where the server is lost in the middle, the run says so in one line and ends as without it."""
    command = [sys.executable, "-c", _LOST, str(server.pid), "run", *overrides(tiny_slides, tmp_path / "run")]
    done = subprocess.run(
        [*command, "dataset.limit=1"],
        env=server.env,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"the Prefect server at {server.url} no longer answers" in done.stdout
    assert "slides     1 of 1" in done.stdout
    assert done.stderr == ""
