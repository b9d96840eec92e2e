"""Measure costs that grow with the size of a run: the plan, its status, a manifest, and the distribution of slices.

Slides are records as ingest publishes them; no pixels are read. The slices do no work, so their cost is orchestration,
which is given as a share of slices of ten seconds.
"""

import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measuring import ResultTable, arguments, finish, machine, say, significant
from flows.cluster import workers
from flows.compose import compose_config
from wsiflow.errors import InputError
from wsiflow.plan.geometry import Frame
from wsiflow.plan.slide_plan import make_cut
from wsiflow.run import executor, shards
from wsiflow.run.cases import write_cases
from wsiflow.run.executor.protocol import Executor, Outcome, Slice, Work
from wsiflow.run.plan import read_plan
from wsiflow.run.stages import ingest
from wsiflow.slides.manifest import Case, read_manifest
from wsiflow.system import publish
from wsiflow.system.usage import Meter

_GROUPS_PER_SLIDE = 100
_SLICE_S = 10.0
_FRAME = Frame("centred", 100_000, 100_000, 1.0, 0.243, 224, 224, 16, 200, 7, 8, 0, 0, 447, 447)


class Size(NamedTuple):
    """How much is measured."""

    groups: tuple[int, ...]
    status_groups: int
    manifest_rows: int
    slices: int


_QUICK = Size((1000,), 1000, 200, 50)
_FULL = Size((100_000, 1_000_000), 100_000, 10_000, 10_000)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure plans, status, manifests and slices by their number, and write ``scale.json``."""
    given = arguments(__doc__ or "").parse_args(argv)
    size, about = _QUICK if given.quick else _FULL, machine()
    values: dict[str, Any] = {}
    tables = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in (_plans, _status, _manifest, _slices):
            say(part.__name__.strip("_"))
            (folder / part.__name__).mkdir()
            values[part.__name__.strip("_")], table = part(folder / part.__name__, size)
            tables.append(table)
    finish(given, "scale", about, values, tables)


def _plans(folder: Path, size: Size) -> tuple[dict[str, Any], ResultTable]:
    """Make plans from the records of ingest, and read them as a worker does."""
    values, rows = {}, []
    for groups in size.groups:
        cases = _ingested(folder / str(groups), groups // _GROUPS_PER_SLIDE)
        plan_path, make_cost = _measured(lambda cases=cases: ingest.make_plan(*cases))
        read, read_cost = _measured(lambda plan_path=plan_path: read_plan(plan_path))
        assert read.n_groups == groups
        values[str(groups)] = {"make": make_cost, "read": read_cost, "bytes": plan_path.stat().st_size}
        row = [f"{groups:,}", f"{groups // _GROUPS_PER_SLIDE:,}"]
        for each in (make_cost, read_cost):
            row += [f"{each['wall_s']:.2f}", f"{each['peak_bytes'] / 1e6:.0f}"]
        rows.append([*row, f"{plan_path.stat().st_size / 1e6:.1f}"])
    values["cut_s"] = _cut_seconds()
    title = f"Plans (a slide of 22,000 tissue tiles is cut into blocks in {values['cut_s']:.2f} s when it is ingested)"
    columns = ["groups", "slides", "made in, s", "peak, MB", "read in, s", "peak, MB", "file, MB"]
    return values, ResultTable(title, columns, rows)


def _measured(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return the result of a call, its seconds, and its peak memory, which a second call measures."""
    read_plan.cache_clear()
    begin = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - begin
    read_plan.cache_clear()
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, {"wall_s": seconds, "peak_bytes": peak}


def _ingested(root: Path, count: int) -> tuple[Path, list[Outcome]]:
    """Write a run's folder as it is after ``count`` slides were ingested, and return its cases and outcomes."""
    root.mkdir()
    config = compose_config([f"out={root}", "tracking=off", "orchestrator=none", "executor=inline"])
    slides = tuple(Case(f"slide_{i:06d}", root / f"slide_{i:06d}.tif") for i in range(count))
    cases = write_cases(root, config, slides)
    with executor.make(config.executor, cores=1, root=root) as pool:
        shards.choose(pool, cases)
    (root / "tissue").mkdir()
    outcomes = []
    for i, case in enumerate(slides):
        record = {
            "sha256": f"{i:064x}",
            "signature": [],
            "um_px_l0": 0.243,
            "overview_downsample": 32.0,
            "frame": _FRAME._asdict(),
            "n_tiles": 400 * _GROUPS_PER_SLIDE,
            "n_blocks": 60 * _GROUPS_PER_SLIDE,
            "n_groups": _GROUPS_PER_SLIDE,
            "key": publish.key_of(slide=i),
        }
        name = f"tissue/{case.slide_id}.json"
        (root / name).write_text(json.dumps(record), encoding="utf-8")
        outcomes.append(Outcome(i, {"path": name}, executed=True))
    return cases, outcomes


def _cut_seconds() -> float:
    """Return the seconds to cut a slide into blocks that has as much tissue as those of CAMELYON16."""
    rng = np.random.default_rng(0)
    coarse = rng.random((27, 27)) < 0.12  # patches of tissue of 16 tiles a side
    tissue = np.kron(coarse, np.ones((16, 16), bool))
    begin = time.perf_counter()
    make_cut(tissue, _FRAME._replace(t_cols=432, t_rows=432), group_tiles=400)
    return time.perf_counter() - begin


def _status(folder: Path, size: Size) -> tuple[dict[str, Any], ResultTable]:
    """Measure the command ``wsiflow status`` on a folder in which every other group is published."""
    cases, outcomes = _ingested(folder / "run", size.status_groups // _GROUPS_PER_SLIDE)
    run_plan = read_plan(ingest.make_plan(cases, outcomes))
    for planned in run_plan.slides:
        there = folder / "run" / publish.RECEIPTS / "predictions" / planned.slide_id
        there.mkdir(parents=True)
        for k in range(1, planned.n_groups, 2):
            (there / f"t{k}.h5.json").write_text("{}", encoding="ascii")
    command = [sys.executable, "-m", "wsiflow.flows", "status", str(folder / "run")]
    begin = time.perf_counter()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds = time.perf_counter() - begin
    assert f"published {size.status_groups // 2}" in output
    title = "wsiflow status, imports included"
    rows = [[f"{size.status_groups:,}", f"{seconds:.2f}"]]
    return {"groups": size.status_groups, "wall_s": seconds}, ResultTable(title, ["groups", "s"], rows)


def _manifest(folder: Path, size: Size) -> tuple[dict[str, Any], ResultTable]:
    """Measure reading a correct manifest, and one in which every tenth row is wrong."""
    good, bad = folder / "good.csv", folder / "bad.csv"
    for path, every in ((good, 0), (bad, 10)):
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["slide_id", "path", "mpp", "label"])
            for i in range(size.manifest_rows):
                wrong = every and i % every == 0
                writer.writerow([f"slide_{i}", f"slide_{i}.svs", "zero" if wrong else "0.25", "tumor"])
    begin = time.perf_counter()
    assert len(read_manifest(good)) == size.manifest_rows
    good_s, begin = time.perf_counter() - begin, time.perf_counter()
    try:
        read_manifest(bad)
        message = ""
    except InputError as error:
        message = str(error)
    bad_s, wrong = time.perf_counter() - begin, -(-size.manifest_rows // 10)
    assert message.count("is not a number") == wrong
    count = f"{size.manifest_rows:,}"
    rows = [[count, "0", f"{good_s:.2f}"], [count, f"{wrong:,}", f"{bad_s:.2f}"]]
    values = {"rows": size.manifest_rows, "good_s": good_s, "bad_s": bad_s, "errors_told": wrong}
    return values, ResultTable("A manifest", ["rows", "wrong rows, all named", "s"], rows)


def nothing(_source: Path, _stage: str, lo: int, hi: int) -> Iterator[Outcome]:
    """Do nothing, and yield an outcome per task as a real task does."""
    for index in range(lo, hi):
        yield Outcome(index, {"attempt": str(index)}, executed=True).with_usage(**Meter().usage())


class _Idle:
    """An executor whose tasks do nothing."""

    def __init__(self, pool: Executor) -> None:
        self._pool = pool

    def run(self, _work: Work, source: Path, stage: str, slices: Sequence[Slice]) -> Iterator[Outcome]:
        return self._pool.run(nothing, source, stage, slices)


def _slices(folder: Path, size: Size) -> tuple[dict[str, Any], ResultTable]:
    """Run slices that do nothing through a stage with each executor, plan, trace and progress included."""
    values, rows = {}, []
    slides = -(-size.slices // _GROUPS_PER_SLIDE)
    for kind in ("inline", "process", "dask"):
        root = folder / kind
        plan_path = ingest.make_plan(*_ingested(root, slides))
        params = compose_config([f"executor={kind}", "executor.workers=2", f"out={root}", "tracking=off"]).executor
        with workers(params, root) as pool:
            shards.advance(_Idle(pool), plan_path, "stitch", shards.Progress((0,)), 0.0)  # workers are up
            begin, cpu = time.perf_counter(), _cpu_s()
            progress = shards.Progress(tuple(range(slides)))
            done = shards.advance(_Idle(pool), plan_path, "predict", progress, 0.0)
            wall_s, core_s = time.perf_counter() - begin, _cpu_s() - cpu
        count = len(done.ended)
        values[kind] = {"slices": count, "wall_s": wall_s, "driver_core_s": core_s, "share": core_s / count / _SLICE_S}
        cells = [f"{count:,}", significant(1e3 * wall_s / count), significant(1e3 * core_s / count)]
        rows.append([kind, *cells, f"{core_s / count / _SLICE_S:.4%}"])
    columns = ["executor", "slices", "wall, ms per slice", "driver, core-ms per slice", "of slices of 10 s"]
    return values, ResultTable("Orchestration: slices of which each holds nothing, two workers", columns, rows)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
