"""The number of CPU cores this process may use, and the class of machines on which its results are equal to the bit.

This module does not import torch, which reads the thread counts from environment variables once, on import.
"""

import functools
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
MEMINFO = Path("/proc/meminfo")
CPUINFO = Path("/proc/cpuinfo")

# Slurm (the second also where no cores per task were requested), Grid Engine, Torque, PBS Pro, LSF.
SCHEDULER_VARIABLES = (
    *("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "NSLOTS"),
    *("PBS_NUM_PPN", "NCPUS", "LSB_DJOB_NUMPROC"),
)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

# Instruction sets by which oneDNN, OpenVINO and MKL choose their kernels, the most capable first: a CPU has those below
# its own as well.
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
# Values of ONEDNN_MAX_CPU_ISA that leave out the instructions for bfloat16.
_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
# Environment variables that restrict torch, oneDNN or MKL to a part of the CPU's instruction sets.
ISA_PINS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")


def allocated_cores() -> int:
    """Return how many cores this process may use: the minimum of affinity, cgroup quotas and scheduler allocation.

    Raises:
        EnvironmentFault: A scheduler variable does not hold a whole number.
    """
    limits = [_affinity_cores(), *cgroup_cores(CGROUP_OF_SELF, CGROUP_ROOT), *scheduler_cores(os.environ)]
    return max(1, min(limits))


def limit_threads(n: int) -> None:
    """Limit the numerical libraries to n threads; call this before NumPy and torch are imported.

    Args:
        n: Number of threads, at least 1.

    Raises:
        EnvironmentFault: torch is already imported and uses another number of threads.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != n:
        raise EnvironmentFault(
            f"torch already runs with {torch.get_num_threads()} threads, but {n} are requested",
            f"set OMP_NUM_THREADS={n} before the process starts, or limit threads before importing torch",
        )
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(n)))
    # With a thread count that libraries adapt from call to call, sums would be taken in different orders.
    os.environ.update({"OMP_DYNAMIC": "FALSE", "MKL_DYNAMIC": "FALSE"})


def numeric_class(threads: int) -> dict[str, str]:
    """Return the properties of this machine and its software on which the last bits of a probability depend.

    Two runs of the same class give equal bits. Runs of different classes agree to about 1e-6.

    Args:
        threads: Number of threads with which the network runs.

    Returns:
        ``machine``, ``vendor`` and ``isa`` of the CPU; ``pins``, the variables of `ISA_PINS` that are set; the versions
        of ``torch``, ``openvino`` and ``onnxruntime`` (empty where it is not installed); and ``threads``.
    """
    vendor, flags = _cpu(CPUINFO)
    pins = [f"{name}={os.environ[name]}" for name in ISA_PINS if name in os.environ]
    return {
        "machine": platform.machine(),
        "vendor": vendor,  # MKL chooses its kernels by the vendor
        "isa": next((isa for isa, needed in _ISA_FLAGS.items() if needed <= flags), "generic"),
        "pins": " ".join(pins),
        "torch": installed_version("torch"),
        "openvino": installed_version("openvino"),
        "onnxruntime": installed_version("onnxruntime"),
        "threads": str(threads),
    }


def cpu_flags() -> set[str]:
    """Return the features of this CPU as Linux names them, for example ``avx512_bf16``; an empty set elsewhere."""
    return _cpu(CPUINFO)[1]


def cpu_supports_bf16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16 numbers, and libraries may use them.

    On other CPUs OpenVINO emulates them silently, three times slower than fp32 (measured on a CPU with only AVX512).
    """
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _WITHOUT_BF16:
        return False
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16"})


def cpu_model() -> str:
    """Return the model name of this CPU; several models are separated by commas."""
    lines = _text(CPUINFO).splitlines()
    if not lines:  # not Linux
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model")]
    return ", ".join(dict.fromkeys(name if not name.isdigit() else f"model {name}" for name in names))


def scheduler_cores(environ: Mapping[str, str]) -> list[int]:
    """Return the number of cores that each scheduler variable grants, of those that the environment has.

    Raises:
        EnvironmentFault: A scheduler variable does not hold a whole number.
    """
    return [_whole(name, environ[name]) for name in SCHEDULER_VARIABLES if environ.get(name)]


def job_cores(environ: Mapping[str, str]) -> int | None:
    """Return how many cores a scheduler has allocated to the job of this process on its node; None where none has."""
    return max(scheduler_cores(environ), default=None)


def cgroup_cores(membership: Path, root: Path) -> list[int]:
    """Return the number of whole cores of every CPU quota that applies to a process, for both versions of cgroups.

    Args:
        membership: The file ``/proc/<pid>/cgroup`` of the process.
        root: Folder where cgroups are mounted.
    """
    quotas = (_quota(folder) for folder in _cgroup_folders(_text(membership), root, "cpu"))
    # Rounded down: the kernel throttles a thread beyond the quota, and all others wait for it at every barrier.
    return [max(1, math.floor(cores)) for cores in quotas if cores is not None]


def free_memory_bytes(meminfo: Path = MEMINFO, membership: Path = CGROUP_OF_SELF, root: Path = CGROUP_ROOT) -> float:
    """Return how much memory this process may still take: what the machine has left, or a cgroup of it.

    Args:
        meminfo: The kernel's facts on memory.
        membership: The kernel's list of the process's cgroups.
        root: Where cgroups are mounted.

    Returns:
        Bytes; infinity where the kernel says nothing.
    """
    facts = dict(line.split(":", 1) for line in _text(meminfo).splitlines() if ":" in line)
    free = [1024.0 * int(facts["MemAvailable"].split()[0])] if "MemAvailable" in facts else []
    for folder in _cgroup_folders(_text(membership), root, "memory"):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
            if most.isdecimal() and used.isdecimal():
                free.append(max(0.0, float(most) - float(used)))
    return min(free, default=math.inf)


@functools.cache  # every task asks for it, and each answer parses the whole description of a package
def installed_version(package: str) -> str:
    """Return the version of a package, or an empty text where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _text(path: Path) -> str:
    """Return the text of a file of the kernel, or an empty text where it does not exist or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _affinity_cores() -> int:
    """Return on how many cores the process may be scheduled."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _whole(name: str, value: str) -> int:
    """Return the number of cores that a scheduler variable holds."""
    if not value.isdecimal():
        raise EnvironmentFault(f"{name} is {value!r}, but must be a number of cores", f"correct or unset {name}")
    return int(value)


def _cgroup_folders(membership: str, root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders whose limits apply: the cgroup of the process and all its ancestors."""
    for line in membership.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if not controllers:  # version 2, alone or beside version 1
            mounts = [root, root / "unified"]
        elif controller in controllers.split(","):
            mounts = [root / controller, root / controllers]
        else:
            continue
        # In a container the group has the path that the host sees, and perhaps only the mount point itself exists.
        group = Path(name.lstrip("/"))
        yield from (mount / part for mount in mounts for part in (group, *group.parents) if ".." not in part.parts)


def _quota(folder: Path) -> float | None:
    """Return how many cores a cgroup folder grants, or None where it sets no limit."""
    fields = _text(folder / "cpu.max").split()  # version 2
    fields = fields or [*_text(folder / "cpu.cfs_quota_us").split(), *_text(folder / "cpu.cfs_period_us").split()]
    if len(fields) != 2 or not all(field.isdecimal() for field in fields):  # no limit ("max" or -1), or unreadable
        return None
    return int(fields[0]) / max(1, int(fields[1]))


def _cpu(cpuinfo: Path) -> tuple[str, set[str]]:
    """Return the vendor and the flags of the first CPU; without that file, the processor's name and no flags."""
    text = _text(cpuinfo)
    if not text:  # not Linux
        return platform.processor(), set()
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    facts = {key.strip(): value.strip() for key, _, value in lines}
    vendor = facts.get("vendor_id", facts.get("CPU implementer", ""))
    return vendor, set(facts.get("flags", facts.get("Features", "")).split())
