"""Tests of core counts, thread limits and the numeric class."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from wsiflow.errors import EnvironmentFault
from wsiflow.system import machine
from wsiflow.system.machine import (
    SCHEDULER_VARIABLES,
    allocated_cores,
    cgroup_cores,
    cpu_flags,
    free_memory_bytes,
    numeric_class,
    scheduler_cores,
)


def run(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environ, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", SCHEDULER_VARIABLES)
def test_a_scheduler_limits_the_cores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slot of a scheduler is one core, however many the machine has; Slurm names those of the node in any case."""
    assert {"SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "NSLOTS"} < {*SCHEDULER_VARIABLES}
    monkeypatch.setenv(name, "1")
    assert allocated_cores() == 1


def test_a_generous_scheduler_does_not_add_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU affinity applies if it grants fewer cores than the scheduler."""
    monkeypatch.setenv("NSLOTS", "4096")
    assert 1 <= allocated_cores() <= len(os.sched_getaffinity(0))


def test_affinity_limits_the_cores() -> None:
    """A process that is pinned to one core has one core."""
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from wsiflow.system.machine import allocated_cores; print(allocated_cores())"
    )
    assert run(code).stdout.strip() == "1"


def test_an_empty_variable_grants_nothing_and_a_word_is_refused() -> None:
    """An empty variable counts as missing; any other text must be a number."""
    assert scheduler_cores({"NSLOTS": "", "NCPUS": "6"}) == [6]
    with pytest.raises(EnvironmentFault, match="NSLOTS is 'many', but must be a number of cores"):
        scheduler_cores({"NSLOTS": "many"})


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_version_2_quotas_of_all_ancestors_count(tmp_path: Path) -> None:
    """The quotas of the group and its ancestors are rounded down, and ``max`` means no limit."""
    write(tmp_path / "proc", "0::/user.slice/job\n")
    write(tmp_path / "cg/cpu.max", "max 100000\n")
    write(tmp_path / "cg/user.slice/cpu.max", "350000 100000\n")
    write(tmp_path / "cg/user.slice/job/cpu.max", "50000 100000\n")
    assert sorted(cgroup_cores(tmp_path / "proc", tmp_path / "cg")) == [1, 3]


def test_version_1_quota_counts(tmp_path: Path) -> None:
    """The quota of the cpu controller applies; -1 means no limit, and other controllers are ignored."""
    write(tmp_path / "proc", "5:cpu,cpuacct:/job\n4:memory:/job\n")
    write(tmp_path / "cg/cpu/cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "cg/cpu/cpu.cfs_period_us", "100000\n")
    write(tmp_path / "cg/cpu/job/cpu.cfs_quota_us", "200000\n")
    write(tmp_path / "cg/cpu/job/cpu.cfs_period_us", "100000\n")
    write(tmp_path / "cg/memory/job/cpu.cfs_quota_us", "1\n")
    assert cgroup_cores(tmp_path / "proc", tmp_path / "cg") == [2]


def test_a_container_whose_group_is_not_mounted_has_the_quota_of_the_mount(tmp_path: Path) -> None:
    """A group with the host's path does not exist in the container; the quota of the mount point applies."""
    write(tmp_path / "proc", "0::/docker/0123abcd\n")
    write(tmp_path / "cg/cpu.max", "400000 100000\n")
    assert cgroup_cores(tmp_path / "proc", tmp_path / "cg") == [4]


def test_no_cgroup_is_no_limit(tmp_path: Path) -> None:
    """Without cgroups there is no limit."""
    assert cgroup_cores(tmp_path / "absent", tmp_path) == []


@pytest.mark.parametrize(
    ("membership", "files", "free"),
    [
        ("0::/job\n", {"job/memory.max": "max", "job/memory.current": "1"}, 2_048_000),
        ("0::/a/job\n", {"a/memory.max": "900", "a/memory.current": "300"}, 600),
        ("4:memory:/job\n", {"memory/job/memory.limit_in_bytes": "70", "memory/job/memory.usage_in_bytes": "90"}, 0),
    ],
)
def test_free_memory_is_that_of_the_machine_or_of_a_group(
    membership: str, files: dict[str, str], free: float, tmp_path: Path
) -> None:
    """The least of what the machine has left and what the groups of the process may still take."""
    write(tmp_path / "proc", membership)
    write(tmp_path / "meminfo", "MemTotal:  9000 kB\nMemAvailable:  2000 kB\n")
    for name, text in files.items():
        write(tmp_path / "cg" / name, text)
    assert free_memory_bytes(tmp_path / "meminfo", tmp_path / "proc", tmp_path / "cg") == free


def test_a_limit_set_before_torch_is_what_torch_uses() -> None:
    """If one thread is requested before the import, torch runs with one."""
    code = (
        "from wsiflow.system.machine import limit_threads; limit_threads(1)\n"
        "import torch; print(torch.get_num_threads())"
    )
    assert run(code).stdout.strip() == "1"


def test_a_limit_set_after_torch_is_refused_when_it_differs() -> None:
    """Some libraries would keep the former number, so a later change is an error."""
    code = (
        "import torch; from wsiflow.system.machine import limit_threads\n"
        "limit_threads(torch.get_num_threads())\n"
        "limit_threads(torch.get_num_threads() + 1)"
    )
    result = run(code, OMP_NUM_THREADS="1")
    assert "torch already runs with 1 threads, but 2 are requested" in result.stderr


def test_cards_and_threads_do_not_import_torch() -> None:
    """Help texts and plans must not wait for torch, and thread limits must be set before its import."""
    code = "import sys, wsiflow.model, wsiflow.model.card, wsiflow.system.machine; print('torch' in sys.modules)"
    assert run(code).stdout.strip() == "False"


def test_the_numeric_class_depends_on_threads_and_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads or a restricted instruction set give another class; a second call gives the same."""
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    plain = numeric_class(1)
    assert plain == numeric_class(1)
    assert plain != numeric_class(2)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert "ATEN_CPU_CAPABILITY=avx2" in numeric_class(1)["pins"]
    assert plain["torch"].startswith("2.")


AVX512 = "fma avx avx2 avx512f avx512bw avx512dq avx512vl"


@pytest.mark.parametrize(
    ("flags", "isa"),
    [
        ("sse4_2", "generic"),
        ("sse4_2 avx", "avx"),
        ("avx avx2", "avx"),  # no fused multiply-add: oneDNN's AVX2 kernels need it
        ("fma avx avx2", "avx2"),
        ("fma avx avx2 avx_vnni", "avx2_vnni"),
        ("fma avx avx2 avx512f", "avx2"),  # Knights Landing
        (AVX512, "avx512"),
        (f"{AVX512} avx512_vnni", "avx512_vnni"),
        (f"{AVX512} avx512_vnni avx512_bf16 avx_vnni", "avx512_bf16"),
        (f"{AVX512} avx512_vnni avx512_bf16 amx_tile amx_bf16 amx_int8", "amx"),
        (f"{AVX512} avx512_vnni avx512_bf16 amx_tile", "avx512_bf16"),
    ],
)
def test_the_numeric_class_names_the_best_kernels_of_a_cpu(
    flags: str, isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vector width, int8 and bf16 products and matrix tiles select other kernels, with other last bits."""
    write(tmp_path / "cpuinfo", f"processor : 0\nvendor_id : GenuineIntel\nflags : {flags}\n\nprocessor : 1\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert numeric_class(1)["isa"] == isa
    assert cpu_flags() == set(flags.split())


@pytest.mark.parametrize(
    ("flags", "pin", "able"),
    [
        (f"{AVX512} avx512_vnni", "", False),
        (f"{AVX512} avx512_vnni avx512_bf16", "", True),
        (f"{AVX512} avx512_vnni avx512_bf16 amx_tile amx_bf16", "AVX512_CORE_AMX", True),
        (f"{AVX512} avx512_vnni avx512_bf16 amx_tile amx_bf16", "avx2", False),
    ],
)
def test_bf16_is_not_used_where_libraries_may_not(
    flags: str, pin: str, able: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable that keeps libraries from the instructions of the CPU would have them emulated, or refused."""
    write(tmp_path / "cpuinfo", f"processor : 0\nflags : {flags}\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", pin)
    assert machine.cpu_supports_bf16() is able


def test_the_numeric_class_names_what_runs_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of a backend is another class; a backend that is not installed has an empty version."""
    versions = {"torch": "2.10.0", "openvino": "2026.1.0"}

    def version(package: str) -> str:
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(machine, "installed_version", machine.installed_version.__wrapped__)  # without its memory
    monkeypatch.setattr(importlib.metadata, "version", version)
    found = numeric_class(1)
    assert (found["torch"], found["openvino"], found["onnxruntime"]) == ("2.10.0", "2026.1.0", "")
    versions["onnxruntime"] = "1.32.0"
    assert numeric_class(1) == found | {"onnxruntime": "1.32.0"}
