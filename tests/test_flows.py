"""Prefect: a real server on loopback, and none at all."""

import subprocess
import time
from pathlib import Path

from serving import BIN, PrefectServer, environment


def overrides(manifest: Path, out: Path) -> list[str]:
    line = ["dataset=manifest", f"dataset.manifest={manifest}", f"out={out}", "inference.stride=224", "tracking=off"]
    return [*line, "evaluation.bootstrap=0", "executor.workers=1", "shard_slides=2", "name=watched"]


def test_a_run_is_one_flow_with_a_task_per_shard(server: PrefectServer, small_slides: Path, tmp_path: Path) -> None:
    """Six slides in shards of two: three tasks to ingest them and three for the line, however many groups there are."""
    command = [BIN / "wsiflow", "run", *overrides(small_slides, tmp_path / "run")]
    done = subprocess.run(command, env=server.env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Prefect server: {server.url}" in done.stdout
    own = {"name": {"any_": ["watched"]}}
    for _ in range(200):  # the server records what it is told a little later
        tasks = server.ask("task_runs/filter", {"flow_runs": own})
        if len(tasks) == 6 and all(task["state_type"] == "COMPLETED" for task in tasks):
            break
        time.sleep(1)
    assert sorted(task["name"] for task in tasks) == [f"{part} {i}" for part in ("ingest", "slides") for i in (1, 2, 3)]
    flows = server.ask("flow_runs/filter", {"flow_runs": own})
    assert [(flow["name"], flow["state_type"]) for flow in flows] == [("watched", "COMPLETED")]


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
