"""What ``wsiflow doctor`` says of this machine, and of one on which a run would fail."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from wsiflow.flows.__main__ import main
from wsiflow.flows.commands.doctor import CHECKS
from wsiflow.flows.compose import compose_config

BIN = Path(sys.executable).parent
PLAIN = ("orchestrator=none", "tracking=off")


def screen(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, str]]:
    """Return the exit code of the command, and its last line for each thing that a run needs."""
    code = main(["doctor", *words])
    return code, {line[:11].strip(): line[11:] for line in capsys.readouterr().out.splitlines()}


def test_a_machine_that_can_do_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is at fault, nothing is left in the folder, and the versions are those a bug report needs."""
    code, lines = screen(capsys, *PLAIN, f"out={tmp_path}/runs/first")
    assert code == 0
    assert not [name for name, text in lines.items() if text.startswith("FAULT")]
    assert lines["folder"].startswith(f"ok    files can be published in {tmp_path}, ")
    assert lines["engine"] == "ok    openvino, onnxruntime, torch are installed"
    assert "may be used by this process" in lines["cores"]
    assert "openslide-bin" in lines["versions"]
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_would_fail_of_is_named_with_its_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler without commands, and a folder that cannot be written, are faults."""
    monkeypatch.setenv("PATH", str(tmp_path))
    code, lines = screen(capsys, *PLAIN, "executor=slurm_array", "out=/proc/runs/first")
    assert code == 30
    faults = {name for name, text in lines.items() if text.startswith("FAULT")}
    assert faults == {"folder", "scheduler"}
    assert "there is no command sbatch, scancel, scontrol, squeue; work on a machine that" in lines["scheduler"]
    assert "/proc" in lines["folder"]


def test_a_server_that_does_not_answer_is_told() -> None:
    """A run goes on without it."""
    config = compose_config(["dataset=single", "dataset.path=none.svs"])
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        (found,) = CHECKS["Prefect"](config)
    assert found.state == "note"
    assert found.text == "no server answers at http://127.0.0.1:9/api: a run starts a temporary one"


def test_more_workers_than_cores_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A worker more than there are cores slows down all others."""
    cores = len(os.sched_getaffinity(0))
    _, lines = screen(capsys, *PLAIN, f"executor.workers={cores + 1}")
    assert lines["cores"].endswith(f"give executor.workers={cores}")


def test_a_cluster_needs_a_scheduler(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an executor the one whose commands are in PATH is taken, and there is none."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["doctor", "--cluster"]) == 20
    assert "no scheduler has all commands in PATH; name an executor: executor=slurm_array or" in capsys.readouterr().err


def test_disks_without_links_and_a_real_worker(preloaded, tmp_path: Path) -> None:
    """A disk on which nothing can be published is a fault; on a better one a worker of the executor does a task."""
    env = preloaded("links") | {"WSIFLOW_LINKS": "none", "WSIFLOW_RENAMES": "plain", "HOME": str(tmp_path)}
    command = [BIN / "wsiflow", "doctor", *PLAIN, f"out={tmp_path}/run"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 30
    assert re.search(r"^folder +FAULT .*neither hard links .* nor renames .*; choose another out=$", done.stdout, re.M)
    assert main([*command[1:], "--cluster", "executor=inline"]) == 0
    assert not [path for path in tmp_path.iterdir() if "doctor" in path.name]
