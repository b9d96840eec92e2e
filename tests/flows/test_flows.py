"""Prefect: a real server on loopback, and none at all."""

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from serving import BIN, PrefectServer, environment
from small_runs import over

from flows import compose, line
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


def test_without_a_server_a_run_says_so_and_goes_on(prefect_home: Path, tiny_slides: Path, tmp_path: Path) -> None:
    """An address where no server answers gives one line, and the run goes on."""
    env = environment(prefect_home, PREFECT_API_URL="http://127.0.0.1:9/api")
    command = [BIN / "wsiflow", "run", *overrides(tiny_slides, tmp_path / "run"), "dataset.limit=1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "Prefect" in line]
    assert len(lines) == 1
    assert lines[0].startswith("no Prefect server answers at http://127.0.0.1:9/api: going on")
    assert done.stderr == ""


_AGAIN = """
import sys
from flows.__main__ import main
assert main(sys.argv[1:]) == 0
print(sorted({"prefect", "mlflow", "torch", "openvino"} & sys.modules.keys()))
"""


def test_a_finished_run_is_looked_through_without_prefect(
    finished: Path, small_slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start with nothing left to do imports neither Prefect nor other libraries that take seconds."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    command = [sys.executable, "-c", _AGAIN, "run", *over(small_slides, out), "orchestrator=prefect"]
    env = environment(tmp_path / "home")
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 tasks done now" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    next((out / "detections").glob("*.csv")).unlink()
    config = compose.compose_config(over(small_slides, out))
    assert line.finished(config) is None, "something is left to do"


# Last, since its server is busy as long as it listens.
def test_a_run_is_one_flow_with_a_task_per_shard(server: PrefectServer, small_slides: Path, tmp_path: Path) -> None:
    """Six slides in shards of two: three tasks to ingest them and three for the line, however many groups there are."""
    command = [BIN / "wsiflow", "run", *overrides(small_slides, tmp_path / "run")]
    command += ["tracking.uri='http://joe:canary@127.0.0.1:9/?token=canary'"]
    env = server.env | {"WSIFLOW_PROGRESS_S": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Prefect server: {server.url}" in done.stdout
    own = {"name": {"any_": ["watched"]}}
    for _ in range(200):  # the server records reports a little later
        tasks = server.ask("task_runs/filter", {"flow_runs": own})
        if len(tasks) == 6 and all(task["state_type"] == "COMPLETED" for task in tasks):
            break
        time.sleep(1)
    assert sorted(task["name"] for task in tasks) == [f"{part} {i}" for part in ("ingest", "slides") for i in (1, 2, 3)]
    flows = server.ask("flow_runs/filter", {"flow_runs": own})
    assert [(flow["name"], flow["state_type"]) for flow in flows] == [("watched", "COMPLETED")]
    assert flows[0]["parameters"]["config"]["tracking"]["uri"] == "http://[redacted]@127.0.0.1:9/?token=[redacted]"
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"canary" in path.read_bytes()]
    assert not written
    assert "canary" not in done.stdout + done.stderr
    check_what_its_page_shows(server, flows[0]["id"])


def check_what_its_page_shows(server: PrefectServer, flow_run_id: str) -> None:
    """See that the page shows the run's records, those of tasks with the tasks, and the progress."""
    own = {"flow_run_id": {"any_": [flow_run_id]}}
    (artifact,) = server.ask("artifacts/filter", {"artifacts": {**own, "key": {"any_": ["wsiflow-progress"]}}})
    assert (artifact["type"], artifact["data"]) == ("progress", 100)
    assert re.fullmatch(r"watched: 6 of 6 slides, ([\d,]+) of \1 tiles, [\d.,]+ tiles/s", artifact["description"])
    records = server.ask("logs/filter", {"logs": own, "limit": 200})
    steps = [record for record in records if record["name"].startswith("wsiflow.")]
    assert min(record["level"] for record in steps) == logging.INFO
    assert len([1 for step in steps if step["message"].startswith("plan: 6 slides, 0 rejected, ")]) == 1
    shards = [step["task_run_id"] for step in steps if step["message"].startswith("shard done: 2 of its 2 slides")]
    assert len(set(shards) - {None}) == len(shards) == 3
    assert "canary" not in str(records)
