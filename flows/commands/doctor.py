"""The command ``wsiflow doctor``: whether this machine or site can do a run, one line for each thing that a run needs.

Each line begins with ``ok``, ``note`` (a run works, but a user should know) or ``FAULT`` (a run would fail), and what
is not ok is followed by its remedy. The configuration is that of ``wsiflow run`` with the same overrides. With
``--cluster`` a real worker of its executor does a task.
"""

import fcntl
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from wsiflow.errors import EnvironmentFault, Failure, InputError, WsiflowError
from wsiflow.model.engines.cache import cache_folder
from wsiflow.run.config import RunConfig
from wsiflow.run.executor import jobs
from wsiflow.run.executor.dialect import Dialect
from wsiflow.run.executor.params import ExecutorParams
from wsiflow.run.executor.protocol import Slice
from wsiflow.run.tracking.store import database
from wsiflow.system import faults, machine, provenance, publish

from ..compose import compose_config
from ..terminal import say

_LEAST_FREE = 10e9  # of a disk: a run of one real slide with store=hdf5
_LEAST_MEMORY = 4e9  # of a worker, see tiles.memory_mb
_SCHEDULERS = ("slurm_array", "sge_array", "pbs_array", "lsf_array")
_STAGE = "probe"

State = Literal["ok", "note", "FAULT"]


class Finding(NamedTuple):
    """What was found of one thing that a run needs, and what to do where that is not well."""

    state: State
    text: str
    remedy: str = ""


Check = Callable[[RunConfig], Iterator[Finding]]


def add_options(parser: ArgumentParser) -> None:
    """Add the overrides, and whether a run is sent through the executor."""
    parser.description = "Whether this machine or site can do a run: wsiflow doctor [overrides] [--cluster]"
    parser.add_argument("overrides", nargs="*", help="as for wsiflow run: executor=slurm_array out=/scratch/me/run")
    parser.add_argument(
        "--cluster", action="store_true", help="have a worker of the executor that the overrides name do a task, too"
    )


def main(arguments: Namespace) -> int:
    """Print what was found, and return 30 where a run would fail."""
    config = compose_config(["dataset=single", "dataset.path=none.svs", *_executor(arguments), *arguments.overrides])
    worst = [_told(name, check, config) for name, check in CHECKS.items()]
    if arguments.cluster and "FAULT" not in worst:
        worst.append(_told("cluster", _cluster, config))
    say("versions   " + ", ".join(f"{name} {version}" for name, version in provenance.versions().items()))
    return EnvironmentFault.exit_code if "FAULT" in worst else 0


def _told(name: str, check: Check, config: RunConfig) -> State:
    """Print the findings of a check, and return the worst state."""
    worst: State = "ok"
    try:
        findings = list(check(config))
    except WsiflowError as error:
        findings = [_fault(error.failure)]
    except OSError as error:
        findings = [_fault(faults.fault(error, path=faults.subject(error)).failure)]
    for state, text, remedy in findings:
        say(f"{name:11}{state:6}{text}{f'; {remedy}' if remedy else ''}")
        worst = max(worst, state, key=("ok", "note", "FAULT").index)
    return worst


def _fault(failure: Failure) -> Finding:
    cause = " ".join(failure.cause.split())
    return Finding("FAULT", f"{failure.path}: {cause}" if failure.path else cause, failure.remedy)


# --- the machine


def _python(_config: RunConfig) -> Iterator[Finding]:
    yield Finding("ok", f"{platform.python_version()} on {platform.platform()}, {sys.executable}")


def _cores(config: RunConfig) -> Iterator[Finding]:
    allowed, present = machine.allocated_cores(), os.cpu_count() or 1
    yield Finding("ok", f"{allowed} of {present} may be used by this process")
    wanted = config.executor.workers * config.executor.threads
    if config.executor.kind in {"process", "dask"} and wanted > allowed:
        text = f"executor.workers={config.executor.workers} with {config.executor.threads} threads want {wanted} cores"
        yield Finding("note", text, f"give executor.workers={max(1, allowed // config.executor.threads)}")


def _processor(_config: RunConfig) -> Iterator[Finding]:
    isa = machine.numeric_class(1)["isa"]
    precisions = ["fp32", *(["bf16"] if machine.cpu_supports_bf16() else []), "int8"]
    yield Finding("ok", f"{machine.cpu_model()} ({isa}): inference.precision may be {', '.join(precisions)}")


def _memory(_config: RunConfig) -> Iterator[Finding]:
    available = machine.free_memory_bytes()
    text = f"{available / 1e9:.1f} GB are free"
    if available < _LEAST_MEMORY:
        yield Finding("note", text, "give fewer executor.workers, or a smaller tiles.memory_mb")
    else:
        yield Finding("ok", text)


def _engine(config: RunConfig) -> Iterator[Finding]:
    """Run a small network, as a backend that does not fit this processor fails at its first call."""
    from wsiflow.model.engines import engine, openvino

    backends = engine.installed_backends()
    chosen = config.inference.backend
    if chosen != "auto" and chosen not in backends:
        yield Finding("FAULT", f"{chosen} is not installed", f"install it, or give inference.backend={backends[0]}")
    if "openvino" in backends and not openvino.computes_right():
        yield Finding("FAULT", "OpenVINO computes a wrong product here", "give inference.backend=torch")
    yield Finding("ok", f"{', '.join(backends)} are installed")


# --- disks


def _folder(config: RunConfig) -> Iterator[Finding]:
    """Publish in the folder of runs, as a run does first of all, and lock a file, as the store of MLflow does."""
    existing = _existing(config.out)
    with tempfile.TemporaryDirectory(dir=existing, prefix=".wsiflow-doctor-") as name:
        publish.preflight(Path(name))
        yield _with_free("files can be published in", existing)
        with tempfile.TemporaryFile(dir=name) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                text = f"this disk has no locks ({faults.cause(error)}); runs need none, but the store of MLflow does"
                yield Finding(
                    "note", text, "name a store elsewhere, or a server, as tracking.uri, or give tracking=off"
                )


def _existing(out: Path) -> Path:
    """Return a folder that is to be made, or the nearest one above it that is there."""
    whole = out.absolute()
    return next(each for each in (whole, *whole.parents) if each.exists())


def _temporary(_config: RunConfig) -> Iterator[Finding]:
    folder = Path(tempfile.gettempdir())
    with tempfile.NamedTemporaryFile(dir=folder):
        yield _with_free("temporary files go to", folder)


def _with_free(what: str, folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{what} {folder}, {free / 1e9:.0f} GB are free"
    return Finding("ok", text) if free > _LEAST_FREE else Finding("note", text, "free space there, or give store=none")


def _cache(_config: RunConfig) -> Iterator[Finding]:
    folder = cache_folder()
    if folder is None:
        text = "there is no home folder, so that networks are converted again by every worker"
        yield Finding("note", text, "set WSIFLOW_CACHE to a folder that all nodes see")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder):
        yield Finding("ok", f"converted networks are kept in {folder}")


def _processes(config: RunConfig) -> Iterator[Finding]:
    """Make a lock that processes share, which needs /dev/shm."""
    if config.executor.kind not in {"process", "dask"}:
        yield Finding("ok", f"executor.kind={config.executor.kind} starts none here")
        return
    try:
        multiprocessing.get_context("spawn").Lock()
    except OSError as error:
        raise faults.worker_fault(error, "or take executor=inline") from error
    yield Finding("ok", "worker processes can be started")


# --- services


def _slides(_config: RunConfig) -> Iterator[Finding]:
    from wsiflow.slides.readers.openslide_file import checked_version

    yield Finding("ok", f"OpenSlide {checked_version()} reads slides")


def _prefect(config: RunConfig) -> Iterator[Finding]:
    if config.orchestrator == "none":
        yield Finding("ok", "orchestrator=none needs no server")
        return
    from ..server import answers, set_url

    url = set_url()
    if url and answers(url):
        yield Finding("ok", f"the server at {url} answers")
    elif url:
        remedy = "start it, or unset PREFECT_API_URL"
        yield Finding("note", f"no server answers at {url}: a run starts a temporary one", remedy)
    else:
        yield Finding("note", "no server is set: a run starts a temporary one", "make prefect starts a lasting one")


def _mlflow(config: RunConfig) -> Iterator[Finding]:
    if config.tracking.kind == "off":
        yield Finding("ok", "tracking is off")
        return
    path = database(config.tracking.uri)
    yield Finding("ok", f"runs are recorded in {path or config.tracking.uri}")


def _scheduler(config: RunConfig) -> Iterator[Finding]:
    """Look for the commands of the executor's scheduler, or of any, and ask it something."""
    if config.executor.kind != "array":
        present = _present()
        text = f"found here: executor={' or '.join(present)}" if present else "no commands of one are in PATH"
        yield Finding("ok", text)
        return
    assert config.executor.array is not None
    dialect = config.executor.array.dialect
    if missing := _missing(dialect):
        remedy = "work on a machine that submits jobs, with the scheduler's commands in PATH"
        yield Finding("FAULT", f"{dialect.name}: there is no command {', '.join(missing)}", remedy)
        return
    jobs.require_answer(dialect)
    yield Finding("ok", f"{dialect.name} answers")


def _present() -> list[str]:
    """Return the executors all of whose commands are in PATH."""
    names = [["dataset=single", "dataset.path=none.svs", f"executor={name}"] for name in _SCHEDULERS]
    configs = zip(_SCHEDULERS, map(compose_config, names), strict=True)
    return [name for name, config in configs if config.executor.array and not _missing(config.executor.array.dialect)]


def _missing(dialect: Dialect) -> list[str]:
    commands = (dialect.submit, dialect.queue, dialect.cancel, dialect.inspect, dialect.limit)
    return sorted({command[0] for command in commands if command and not shutil.which(command[0])})


#: What is looked at, by the name in front of its lines.
CHECKS: dict[str, Check] = {
    "python": _python,
    "cores": _cores,
    "processor": _processor,
    "memory": _memory,
    "engine": _engine,
    "slides": _slides,
    "folder": _folder,
    "temporary": _temporary,
    "cache": _cache,
    "processes": _processes,
    "Prefect": _prefect,
    "MLflow": _mlflow,
    "scheduler": _scheduler,
}


# --- a real worker


def _executor(arguments: Namespace) -> list[str]:
    """Return the executor for ``--cluster`` where the overrides name none: the one whose commands are here."""
    if not arguments.cluster or any(each.startswith("executor=") for each in arguments.overrides):
        return []
    present = _present()
    if len(present) != 1:
        found = f"{len(present)} schedulers have" if present else "no scheduler has"
        remedy = f"name an executor: executor={' or '.join(present or _SCHEDULERS)}"
        raise InputError(f"--cluster: {found} all commands in PATH", remedy)
    return [f"executor={present[0]}"]


def _cluster(config: RunConfig) -> Iterator[Finding]:
    """Have one worker of the executor do a task that says where it ran, in a folder beside that of runs."""
    from wsiflow.run.executor import probe

    from ..cluster import workers

    parent = _existing(config.out)
    with tempfile.TemporaryDirectory(dir=parent, prefix="wsiflow-doctor-", ignore_cleanup_errors=True) as name:
        root = Path(name)
        root.chmod(0o755)  # workers may run as somebody else
        (root / publish.ATTEMPTS).mkdir()
        source = root / "source"
        source.write_text(root.name, encoding="utf-8")
        with workers(_brief(config.executor), root) as pool:
            outcomes = list(pool.run(probe.work, source, _STAGE, [Slice(0, 1)]))
    last = outcomes[-1]
    if last.failure is not None:
        yield _fault(last.failure)
        return
    facts, own = last.receipt or {}, provenance.versions()["wsiflow"]
    worker = f"{facts['host']}, {facts['cores']} cores ({facts['isa']})"
    text = f"a task of executor.kind={config.executor.kind} ran on {worker}"
    if facts["wsiflow"] == own:
        yield Finding("ok", text)
    else:
        yield Finding("FAULT", f"{text}, with wsiflow {facts['wsiflow']}", f"install wsiflow {own} there")


def _brief(params: ExecutorParams) -> ExecutorParams:
    """Return the settings of an executor with one worker, which does not wait for more work."""
    array = params.array and params.array.model_copy(update={"idle_s": 0.0})
    return params.model_copy(update={"workers": 1, "array": array})
