"""Runs of `array_work.work` on a real scheduler, and what is found in their folders, for tests."""

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from array_work import work

from wsiflow.run import executor
from wsiflow.run.executor import jobs
from wsiflow.run.executor.params import ExecutorParams
from wsiflow.run.executor.protocol import Outcome, Slice

CONF = Path(__file__).parents[1] / "conf/executor"
QUICK = {
    "poll_s": 0.3,
    "grace_s": 1.0,
    "idle_s": 5.0,
    "memory_mb": 200,
    "memory_limit_mb": 700,
    "minutes": 5,
    "minutes_limit": 8,
}


def settings(name: str, **changed: Any) -> ExecutorParams:
    """Return the shipped settings of a scheduler with short times."""
    values = yaml.safe_load((CONF / f"{name}_array.yaml").read_text())
    values["array"] |= {**QUICK, **changed}
    return ExecutorParams.model_validate(values)


def write_source(root: Path, **behaviour: Any) -> Path:
    """Write the source of `array_work.work`, which says how tasks misbehave."""
    (root / "plan.json").write_text(json.dumps(behaviour))
    return root / "plan.json"


def run(params: ExecutorParams, source: Path, slices: list[Slice]) -> list[Outcome]:
    with executor.make(params, cores=1, root=source.parent) as pool:
        return list(pool.run(work, source, "predict", slices))


def pairs(count: int) -> list[Slice]:
    return [Slice(lo, lo + 2) for lo in range(0, count, 2)]


def events(root: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in jobs.JobLog(root).lines() if line["event"] == kind]


def job_of(root: Path) -> str:
    """Return the id of the one array, once the driver has noted it: its elements may begin before."""
    wait_for(lambda: bool(events(root, "job")))
    (job,) = events(root, "job")
    return str(job["job"])


def taken(root: Path, stage: str) -> list[int]:
    """Return every task of a stage as often as an element took it."""
    return sorted(task for found in pieces_of(root, stage).values() for task in found)


def pieces_of(root: Path, stage: str) -> dict[str, list[int]]:
    """Return the tasks of each piece of a stage that an element took, with the element in front of its name."""
    found: dict[str, list[int]] = {}
    for path in (root / "arrays").glob("*/*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            if "taken" in line and line["taken"][0][2] == stage:
                element = f"{path.parent.name}.{path.name.partition('.')[0]}"
                found[f"{element}/{line['piece']}"] = list(range(*line["taken"][1:3]))
    return found


def squares(outcomes: list[Outcome]) -> dict[int, int]:
    return {outcome.task: outcome.receipt["square"] for outcome in outcomes if outcome.receipt}


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 250  # a busy machine may take minutes
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def began(root: Path, task: int) -> Callable[[], bool]:
    return lambda: (root / f"predict-{task}").exists()


def call(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def queued(scheduler: str) -> str:
    return call("squeue", "-h") if scheduler == "slurm" else call("qstat")


class Running:
    """A run in a thread of this process, so that a test can interfere."""

    def __init__(self, *arguments: Any) -> None:
        self.outcomes: list[Outcome] = []
        self._thread = threading.Thread(target=lambda: self.outcomes.extend(run(*arguments)))
        self._thread.start()

    def end(self) -> list[Outcome]:
        self._thread.join(250)
        assert not self._thread.is_alive()
        return self.outcomes


def charged(scheduler: str, job: str) -> list[float]:
    """Return the core-seconds of each element of an array."""
    if scheduler == "slurm":
        text = call("scontrol", "show", "job", job)
        numbers = re.findall(r"RunTime=(\d+):(\d+):(\d+) .*?NumCPUs=(\d+)", text, re.DOTALL)
        return [(int(h) * 3600 + int(m) * 60 + int(s)) * int(cpus) for h, m, s, cpus in numbers]
    wait_for(lambda: subprocess.run(["qacct", "-j", job], capture_output=True, check=False).returncode == 0)
    numbers = re.findall(r"^slots +(\d+).*?^ru_wallclock +([\d.]+)", call("qacct", "-j", job), re.DOTALL | re.MULTILINE)
    return [float(seconds) * int(slots) for slots, seconds in numbers]
