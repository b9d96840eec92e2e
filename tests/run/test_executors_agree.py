"""One plan with five executors gives the same published bytes, the same ledger and the same tasks."""

import csv
import json
import re
from pathlib import Path

import pytest
from small_runs import COARSE, digests, wsiflow

# Slices of several tasks, parts of slides, arrays cut under the schedulers' limit of five elements.
CUT = ["dataset.limit=2", "shard_slides=1", "tiles.block_rows=2", "tiles.block_cols=2"]
CUT += ["tiles.group_tiles=9", "store.part_tiles=20"]
QUICK = ["executor.slice_s=2", "executor.array.poll_s=0.5", "executor.array.memory_mb=900"]
EXECUTORS = {
    "process": ["executor=process", "executor.workers=2"],
    "dask": ["executor=dask", "executor.workers=2", "executor.slice_s=0"],
    "slurm": ["executor=slurm_array", *QUICK],
    "sge": ["executor=sge_array", *QUICK],
}
NATIVE_IDS = {"process": "", "dask": "[01]", "slurm": r"\d+_\d", "sge": r"\d+\.\d"}
# Where and when something ran, and nothing of what came out.
OF_THE_WAY = ("arrays", "logs", "jobs")
OF_THE_LEDGER = ("slide_id", "status", "reason", "n_tiles", "n_groups")


def run(manifest: Path, out: Path, *more: str) -> Path:
    assert wsiflow("dataset=manifest", f"dataset.manifest={manifest}", f"out={out}", *COARSE, *CUT, *more) == 0
    return out


def published(out: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(out).items() if not name.startswith(OF_THE_WAY)}


def ledger(out: Path) -> tuple[list[dict[str, str]], dict[str, float]]:
    with (out / "process_list.csv").open(newline="") as stream:
        rows = [{name: row[name] for name in OF_THE_LEDGER} for row in csv.DictReader(stream)]
    summary = json.loads((out / "evaluation/summary.json").read_text())
    return rows, {name: value for name, value in summary.items() if name.startswith("ledger.")}


def tasks(out: Path) -> list[str]:
    """Return every executed task once, except the measurement of costs, which is not part of the line."""
    with (out / "trace.csv").open(newline="") as stream:
        return sorted(row["task"] for row in csv.DictReader(stream) if row["stage"] != "measure")


def native_ids(out: Path) -> set[str]:
    with (out / "trace.csv").open(newline="") as stream:
        return {row["native_id"] for row in csv.DictReader(stream)}


@pytest.fixture(scope="module")
def inline(small_slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run with the inline executor."""
    return run(small_slides, tmp_path_factory.mktemp("inline") / "run")


@pytest.mark.parametrize("kind", EXECUTORS)
def test_the_executor_does_not_change_a_byte(
    kind: str,
    inline: Path,
    small_slides: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Worker processes, Dask workers and array jobs of a real Slurm and Grid Engine agree with one process."""
    if kind in {"slurm", "sge"}:
        for name, value in request.getfixturevalue(kind).items():
            monkeypatch.setenv(name, value)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    out = run(small_slides, tmp_path / "run", *EXECUTORS[kind])
    mine, theirs = published(out), published(inline)
    assert mine.keys() == theirs.keys()
    assert {name for name in mine if mine[name] != theirs[name]} == set()
    assert ledger(out) == ledger(inline)
    assert tasks(out) == tasks(inline)
    assert len(tasks(out)) > 30
    assert all(re.fullmatch(NATIVE_IDS[kind], found) for found in native_ids(out))
    assert list((tmp_path / "here").iterdir()) == [], "nothing is left where the command was given"
    assert any(task.startswith("extract") and task.endswith(" 2") for task in tasks(out)), "a slide in several parts"
