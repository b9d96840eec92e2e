"""How many cores this process was given, and the class of machines on which its numbers are the same to the bit.

Nothing here imports torch: thread counts are environment variables that it reads once, when it is imported.
"""

import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from wsiflow.errors import EnvironmentFault

CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUP_OF_SELF = Path("/proc/self/cgroup")
CPUINFO = Path("/proc/cpuinfo")

# Slurm, Grid Engine, Torque, PBS Pro, LSF.
SCHEDULER_VARIABLES = ("SLURM_CPUS_PER_TASK", "NSLOTS", "PBS_NUM_PPN", "NCPUS", "LSB_DJOB_NUMPROC")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

# Best first: what oneDNN, OpenVINO and MKL choose kernels by. Each step of a vendor's ladder holds those below it.
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_ISA_FLAGS = {
    "amx": {*_AVX512, "amx_tile", "amx_bf16", "amx_int8"},
    "avx512_bf16": {*_AVX512, "avx512_vnni", "avx512_bf16"},
    "avx512_vnni": {*_AVX512, "avx512_vnni"},
    "avx512": _AVX512,
    "avx2_vnni": {"avx2", "fma", "avx_vnni"},
    "avx2": {"avx2", "fma"},
    "avx": {"avx"},
    "sve": {"sve"},
    "neon": {"asimd"},
}
# Settings that make torch, oneDNN or MKL use less than the CPU has.
ISA_PINS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")


def allocated_cores() -> int:
    """Return how many cores this process may use: the least of affinity, cgroup quota and scheduler allocation.

    Raises:
        EnvironmentFault: A scheduler variable does not hold a whole number.
    """
    limits = [_affinity_cores(), *cgroup_cores(CGROUP_OF_SELF, CGROUP_ROOT), *scheduler_cores(os.environ)]
    return max(1, min(limits))


def limit_threads(n: int) -> None:
    """Let the numerical libraries use n threads; to be called before NumPy and torch are imported.

    Args:
        n: Number of threads, at least 1.

    Raises:
        EnvironmentFault: torch is imported already and uses another number.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != n:
        raise EnvironmentFault(
            f"torch already runs with {torch.get_num_threads()} threads, {n} are asked for",
            f"set OMP_NUM_THREADS={n} before the process starts, or limit threads before importing torch",
        )
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(n)))
    # A thread count the libraries choose from call to call would change the order of sums.
    os.environ.update({"OMP_DYNAMIC": "FALSE", "MKL_DYNAMIC": "FALSE"})


def numeric_class(threads: int) -> dict[str, str]:
    """Return what decides the last bits of a probability besides model and pixels.

    Two runs of one class give the same bits; between classes they agree to about 1e-6.

    Args:
        threads: Threads the network runs with.

    Returns:
        machine, vendor and isa of the CPU, settings that restrict it, versions of what runs networks (empty where it
        is not installed), and threads.
    """
    vendor, flags = _cpu(CPUINFO)
    pins = [f"{name}={os.environ[name]}" for name in ISA_PINS if name in os.environ]
    return {
        "machine": platform.machine(),
        "vendor": vendor,  # MKL chooses its kernels by it
        "isa": next((isa for isa, needed in _ISA_FLAGS.items() if needed <= flags), "generic"),
        "pins": " ".join(pins),
        "torch": importlib.metadata.version("torch"),
        "openvino": importlib.metadata.version("openvino"),
        "onnxruntime": _version("onnxruntime"),
        "threads": str(threads),
    }


def cpu_flags() -> set[str]:
    """Return the features of this CPU as Linux names them, for example ``avx512_bf16``; none on other systems."""
    return _cpu(CPUINFO)[1]


def cpu_model() -> str:
    """Return the name of this CPU; models, where there are several, one after the other."""
    lines = _text(CPUINFO).splitlines()
    if not lines:  # not Linux
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model")]
    return ", ".join(dict.fromkeys(name if not name.isdigit() else f"model {name}" for name in names))


def scheduler_cores(environ: Mapping[str, str]) -> list[int]:
    """Return the cores each scheduler variable in an environment grants.

    Raises:
        EnvironmentFault: One does not hold a whole number.
    """
    return [_whole(name, environ[name]) for name in SCHEDULER_VARIABLES if environ.get(name)]


def cgroup_cores(membership: Path, root: Path) -> list[int]:
    """Return the whole cores of every CPU quota above a process, for both versions of cgroups.

    Args:
        membership: The ``/proc/<pid>/cgroup`` of the process.
        root: Where cgroups are mounted.
    """
    quotas = (_quota(folder) for folder in _cgroup_folders(_text(membership), root))
    # Rounded down: a thread more than the quota is throttled, and holds the others up at every barrier.
    return [max(1, math.floor(cores)) for cores in quotas if cores is not None]


def _version(package: str) -> str:
    """Return the version of an optional package, empty where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _text(path: Path) -> str:
    """Return what the kernel tells in a file; nothing where there is none or it does not let us read it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _affinity_cores() -> int:
    """Return how many cores the process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _whole(name: str, value: str) -> int:
    """Return the number a scheduler variable holds."""
    if not value.isdecimal():
        raise EnvironmentFault(f"{name} is {value!r}, a number of cores is expected", f"correct or unset {name}")
    return int(value)


def _cgroup_folders(membership: str, root: Path) -> Iterator[Path]:
    """Yield the folders whose quotas bind: the group of the process and all above it."""
    for line in membership.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if not controllers:  # version 2, alone or beside version 1
            mounts = [root, root / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [root / "cpu", root / controllers]
        else:
            continue
        # In a container the group is named as the host sees it, and only the mount itself may exist.
        group = Path(name.lstrip("/"))
        yield from (mount / part for mount in mounts for part in (group, *group.parents) if ".." not in part.parts)


def _quota(folder: Path) -> float | None:
    """Return the cores a cgroup folder grants, or None where it sets no limit."""
    told = _text(folder / "cpu.max").split()  # version 2
    told = told or [*_text(folder / "cpu.cfs_quota_us").split(), *_text(folder / "cpu.cfs_period_us").split()]
    if len(told) != 2 or not all(number.isdecimal() for number in told):  # max, -1, or nothing that can be read
        return None
    return int(told[0]) / max(1, int(told[1]))


def _cpu(cpuinfo: Path) -> tuple[str, set[str]]:
    """Return vendor and flags of the first CPU; the processor's name and no flags where there is no such file."""
    text = _text(cpuinfo)
    if not text:  # not Linux
        return platform.processor(), set()
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    facts = {key.strip(): value.strip() for key, _, value in lines}
    vendor = facts.get("vendor_id", facts.get("CPU implementer", ""))
    return vendor, set(facts.get("flags", facts.get("Features", "")).split())
