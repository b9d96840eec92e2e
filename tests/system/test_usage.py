"""Warm-up is counted separately, and energy is read from counters in the layout of real ones."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wsiflow.run.executor import driver, lifetime
from wsiflow.run.executor.driver import Spent
from wsiflow.run.results import cost
from wsiflow.system import energy, usage


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_warm_up_is_counted_once_and_with_its_task() -> None:
    """Nested loading is counted once, and other work is not counted as warm-up."""
    usage.not_a_worker()
    usage.Meter().usage()  # reports the warm-up of other tests
    meter, before = usage.Meter(), usage.warmup_s()
    with usage.warming_up():
        burn(0.05)
        with usage.warming_up():
            burn(0.05)
    burn(0.05)
    counted = usage.warmup_s() - before
    assert usage.Meter().usage(executed=False)["warmup_s"] == 0, "a task that found its work done is not in the trace"
    assert 0.1 <= counted < 0.15
    assert meter.usage()["warmup_s"] == pytest.approx(counted, abs=1e-3)
    assert usage.Meter().usage()["warmup_s"] == 0


@pytest.mark.parametrize(("first", "counted"), [("pass", True), ("usage.not_a_worker()", False)])
def test_the_start_of_a_worker_is_with_its_first_task(first: str, counted: bool) -> None:
    """A worker starts and imports for its tasks, so that is warm-up; a process with other work has none."""
    report = "print(*(usage.Meter().usage()['warmup_s'] for _ in range(2)))"
    code = f"from wsiflow.system import usage; {first}; {report}"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert (float(found[0]) > 0, float(found[1])) == (counted, 0.0)


def test_what_was_there_before_or_is_shared_was_not_executed() -> None:
    """Executed and cached tasks add up to all tasks."""
    receipts = [{"path": "a", "cpu_s": 1.0}, {"path": "b", "cpu_s": 2.0, "shared": True}, {"path": "c", "cpu_s": 4.0}]
    found = cost.origin_core_seconds(receipts, {"c"})
    assert found == {"cost.executed_core_s": 1.0, "cost.cached_core_s": 6.0}


def test_a_process_is_charged_for_its_descendants_once(tmp_path: Path) -> None:
    """Whether they still run or have ended: what was charged before is not charged again."""
    lasting = "import time; end = time.process_time() + 0.4\nwhile time.process_time() < end: pass\n{}"
    subprocess.run([sys.executable, "-c", lasting.format("")], check=True)
    usage.Spending.charge()
    began_s = time.process_time()
    wait = f"open({str(tmp_path / 'burnt')!r}, 'w').close(); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", lasting.format(wait)]) as child:
        while not (tmp_path / "burnt").exists():
            time.sleep(0.01)
        alive_s = usage.Spending.charge() - (time.process_time() - began_s)
        child.kill()
    assert 0.35 < alive_s < 1.0
    assert usage.Spending.charge() < 0.2


def test_runs_of_one_process_are_charged_the_same_start() -> None:
    """The start is all before the first run; what lies between two runs is charged to neither."""
    code = """
import time
from wsiflow.system.usage import Spending, tree_core_s
def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end: pass
Spending.started_for_runs()
burn(0.3)
Spending.begin_run()
burn(0.2)
first = Spending.charge()
burn(0.4)
Spending.begin_run()
print(Spending.start_s, first, Spending.charge())
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    start_s, first_s, second_s = map(float, found)
    assert start_s >= 0.3
    assert 0.15 < first_s < 0.3
    assert second_s < 0.1


def test_a_run_that_a_former_version_began_has_no_total(tmp_path: Path) -> None:
    """Its drivers recorded no cost, so that the sum of the others would be too small."""
    with driver.recorded(tmp_path, cores=2):
        driver.note_spent(tmp_path, 3.0, 1.0)
    (known,) = driver.spent(tmp_path)
    assert cost.total_metrics([known], [], []) == {
        "cost.total_core_s": 3.0,
        "cost.total_core_hours": 3.0 / 3600,
        "cost.start_core_s": 1.0,
    }
    log = tmp_path / driver.LOG
    log.write_text(json.dumps({"at": "2026-01-01", "event": "driver", "host": "h", "pid": 1}) + "\n" + log.read_text())
    assert driver.spent(tmp_path) == []


def test_an_attempt_reports_the_process_since_the_last_one() -> None:
    """With the start of the process, and with what it did between attempts: all adds up to what the process used."""
    code = (
        "import os; from wsiflow.system import usage\n"
        "print(sum(usage.Meter().usage(executed=x)['core_s'] for x in (True, False, True)), sum(os.times()[:2]))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert float(found[0]) == pytest.approx(float(found[1]), abs=0.03)


def test_drivers_and_workers_elsewhere_add_up() -> None:
    """A driver knows its descendants; workers elsewhere, and what a killed driver left, are known by their attempts."""
    rows = [{"submit": f"2026-01-0{day}T00:00:00", "core_s": core_s} for day, core_s in ((1, 1.0), (3, 2.0), (5, 4.0))]
    drivers = [
        Spent("2026-01-01T00:00:00", None, local=True),  # it was killed
        Spent("2026-01-02T00:00:00", 10.0, local=True),  # with attempts of its own descendants
        Spent("2026-01-04T00:00:00", 20.0, local=False),
    ]
    receipts = [{"cpu_s": 100.0, "shared": True}, {"cpu_s": 1000.0}]
    assert cost.total_core_seconds(drivers, rows, receipts) == 1.0 + 10.0 + 20.0 + 4.0 + 100.0
    assert math.isnan(cost.total_core_seconds([], rows, receipts))
    named = [row | {"driver": one.since} for row, one in zip(rows, drivers, strict=True)]
    earlier = [row | {"submit": "2025-01-01T00:00:00"} for row in named]  # the clock was set back
    assert cost.total_core_seconds(drivers, earlier, receipts) == 1.0 + 10.0 + 20.0 + 4.0 + 100.0


def test_what_was_allocated_is_time_times_cores() -> None:
    """Of workers here while the driver lives, of a killed one to its last attempt; of others what they note."""
    rows = [
        {"submit": "2026-01-01T00:00:01", "end": "2026-01-01T00:00:05"},
        {"submit": "", "end": "2026-01-09T00:00:00"},
    ]
    drivers = [
        Spent("2026-01-01T00:00:00", None, local=True, cores=2),  # it was killed
        Spent("2026-01-02T00:00:00", 10.0, local=True, cores=4, elapsed_s=8.0),
        Spent("2026-01-03T00:00:00", 1.0, local=False, cores=0, elapsed_s=50.0),
    ]
    found = cost.allocated_metrics(drivers, rows, 100.0)
    assert found == {"cost.allocated_core_s": 142.0, "cost.allocated_core_hours": 142.0 / 3600}
    text = cost.core_hours_text(found | {"cost.total_core_hours": 0.01, "throughput.core_hours": 0.001})
    assert text == "0.01 core-hours, 0.001 of them the line; 0.0394 allocated"
    former = drivers[0]._replace(cores=None)
    assert math.isnan(cost.allocated_metrics([former, *drivers[1:]], rows, 100.0)["cost.allocated_core_s"])


def test_workers_of_a_job_share_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job is charged once with all its cores, each start of it by itself; a lent worker for what is used of it."""
    for names in (("SLURM_CPUS_ON_NODE", "4"), ("SLURM_JOB_ID", "7")):
        monkeypatch.setenv(*names)
    for restarts in ("", "", "1"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        lifetime.Recorder(tmp_path, threads=1).end()
    with lifetime.Recorder(tmp_path, threads=3, lent=True):
        pass
    lives = lifetime.read(tmp_path)
    assert sorted(life.cores for life in lives) == [3, 4, 4, 4]
    (lent,) = (life for life in lives if life.cores == 3)
    job_s = max(life.lived_s for life in lives)
    assert lent.lived_s < 1 < job_s, "the job began when this session did"
    assert lifetime.allocated_core_s(lives) == pytest.approx(2 * 4 * job_s, abs=5.0)


def test_the_life_of_a_killed_worker_is_known(tmp_path: Path) -> None:
    """It notes its life as it lives, from the start of its process on."""
    code = "import sys, time; from pathlib import Path; from wsiflow.run.executor import lifetime\n"
    code += "lifetime.Recorder(Path(sys.argv[1]), threads=1).end_soon(); print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as worker:
        began_s = time.monotonic()
        worker.stdout.readline()
        (first,) = lifetime.read(tmp_path)
        while lifetime.read(tmp_path)[0].lived_s <= first.lived_s:
            time.sleep(0.05)
        worker.kill()
    assert lifetime.read(tmp_path)[0].lived_s <= time.monotonic() - began_s + 1


def counters(root: Path, **microjoules: int) -> Path:
    """Write the counters of a machine with two processors as Linux shows them."""
    names = {"0": "package-0", "0:0": "core", "0:1": "dram", "1": "package-1", "2": "psys"}
    for place, name in names.items():
        folder = root / f"intel-rapl:{place}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text("262143328850\n")
        (folder / "energy_uj").write_text(f"{microjoules.get(name.replace('-', '_'), 0)}\n")
    mmio = root / "intel-rapl-mmio:0"
    mmio.mkdir(exist_ok=True)
    (mmio / "name").write_text("package-0\n")
    (mmio / "energy_uj").write_text("7\n")
    (root / "intel-rapl").mkdir(exist_ok=True)
    return root


def test_energy_is_that_of_processors_and_memory(tmp_path: Path) -> None:
    """Parts of a processor, the board, and the same counter under another name are not added."""
    meter = energy.EnergyMeter(counters(tmp_path, package_0=5_000_000, core=1, dram=1_000_000, package_1=100, psys=0))
    counters(tmp_path, package_0=8_000_000, core=3_000_000, dram=1_500_000, package_1=100, psys=9_000_000)
    assert meter.joules() == pytest.approx(3.5)


def test_a_counter_that_wraps_goes_on(tmp_path: Path) -> None:
    """When a counter wraps, its range is added each time."""
    meter = energy.EnergyMeter(counters(tmp_path, package_0=262_143_000_000), poll_s=0.01)
    counters(tmp_path, package_0=671_150)
    end = time.monotonic() + 200
    while meter._last[tmp_path / "intel-rapl:0"] != 671_150 and time.monotonic() < end:
        time.sleep(0.01)
    counters(tmp_path, package_0=0)
    assert meter.joules() == pytest.approx(1.0 + 262_143.328850 - 0.671150)


def test_without_counters_there_is_no_energy(tmp_path: Path) -> None:
    """Without a folder, or with unreadable counters, the result is None and not 0."""
    assert energy.EnergyMeter(tmp_path / "none").joules() is None
    counters(tmp_path)
    (tmp_path / "intel-rapl:0/energy_uj").unlink()
    assert energy.EnergyMeter(tmp_path).joules() is None
