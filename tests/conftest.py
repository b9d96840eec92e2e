"""Fixtures every test may use."""

import os

# Before NumPy and torch are imported anywhere: one thread, as the workers of a run have, and no reports to anyone.
os.environ.update({"OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"})
# How far a run is, is said as time goes by: what else it says must not depend on that.
os.environ["WSIFLOW_PROGRESS_S"] = "0"

import contextlib
import fcntl
import json
import logging
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import serving

SCHEDULERS = Path(__file__).parent / "schedulers"
STANDINS = Path(__file__).parent / "standins"

# A machine that is busy with other tests is slow: that is no fault of the code.
hypothesis.settings.register_profile("patient", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("patient")

Once = Callable[[str, Callable[[Path], object]], Path]

# What takes longest is begun first: a process that came to it at the end would go on alone.
_LONGEST = (
    "deployments",
    "arrays",
    "crash",
    "line",
    "sweep",
    "executors_agree",
    "certify",
    "dask",
    "experiments",
    "docs_commands",
    "slurm_site",
    "packaging",
    "site",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest."""
    ranks = {f"test_{name}": rank for rank, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture(autouse=True)
def _every_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Let each test see all warnings: NNCF raises the levels of the root logger and of all handlers that it finds."""
    caplog.set_level(logging.WARNING)
    caplog.handler.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real slides, patches and tables; tests that need it are skipped where it is absent."""
    root = Path(os.environ.get("WSIFLOW_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no real data at {root}")
    return root


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Makes a folder in whichever process of pytest-xdist needs it first, for all of them; nobody changes it later."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once"
    shared.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, whole = shared / name, shared / f"{name}.whole"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not whole.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                whole.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def small_slides(once: Once) -> Path:
    """The manifest of a small synthetic data set: six slides of 2,048 px with lesions."""
    from wsiflow.slides.synthetic import dataset

    return (
        once("slides", lambda folder: dataset.write_dataset(folder, size_px=2048, seed=1, workers=1)) / "manifest.csv"
    )


@pytest.fixture(scope="session")
def finished(small_slides: Path, once: Once) -> Path:
    """The folder of an undisturbed run in one process over the small data set, as `test_line.over` asks for it."""
    from small_runs import digests, over, wsiflow

    def make(folder: Path) -> None:
        assert wsiflow(*over(small_slides, folder / "fp32")) == 0
        (folder / "digests.json").write_text(json.dumps(digests(folder / "fp32")))

    return once("finished", make) / "fp32"


@pytest.fixture(scope="session")
def expected(finished: Path) -> dict[str, str]:
    """The digests of what that run published."""
    return dict(json.loads((finished.parent / "digests.json").read_text()))


@pytest.fixture(scope="session")
def two_settings(small_slides: Path, once: Once, finished: Path) -> tuple[Path, Path]:
    """The folders of two runs over the small data set: fp32, and bf16 (window by window where the CPU has no bf16)."""
    from small_runs import over, wsiflow

    from wsiflow.system.machine import cpu_supports_bf16

    other = "inference.precision=bf16" if cpu_supports_bf16() else "inference.engine=window"

    def make(folder: Path) -> None:
        assert wsiflow(*over(small_slides, folder / "other", other)) == 0

    return finished, once("other", make) / "other"


@pytest.fixture(scope="session")
def tiny_slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of two tiny slides, one with a tumour outline."""
    from wsiflow.slides import pyramid

    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    lines = ["slide_id,path,label,annotation_path"]
    for name, label, xml in (("a", "tumor", "a.xml"), ("b", "normal", "")):
        pixels = rng.normal(240, 2, (500, 600, 3))
        pixels[150:350, 150:450] = rng.normal((190, 120, 180), 12, (200, 300, 3))
        image = np.clip(pixels, 0, 255).astype(np.uint8)
        pyramid.write_rgb(folder / f"{name}.tif", iter([image]), shape=(500, 600), um_px=0.243, quality=90)
        lines.append(f"{name},{name}.tif,{label},{xml}")
    corners = "".join(
        f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate([(160, 160), (400, 160), (400, 340)])
    )
    outline = f'<Annotation Name="t" PartOfGroup="_0"><Coordinates>{corners}</Coordinates></Annotation>'
    (folder / "a.xml").write_text(f"<ASAP_Annotations><Annotations>{outline}</Annotations></ASAP_Annotations>")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.csv"


@pytest.fixture(scope="session")
def preloaded(once: Once) -> Callable[[str], dict[str, str]]:
    """Gives the environment in which processes meet an odd disk or clock, by the name of its file in `STANDINS`."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("there is no C compiler to build it with")

    def build(folder: Path, name: str) -> None:
        command = [compiler, "-shared", "-fPIC", "-o", folder / f"{name}.so", STANDINS / f"{name}.c", "-ldl"]
        subprocess.run(command, check=True)

    def environment(name: str) -> dict[str, str]:
        library = once(f"standin-{name}", lambda folder: build(folder, name)) / f"{name}.so"
        return {**os.environ, "LD_PRELOAD": str(library)}

    return environment


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What to add to the environment to use a real Slurm of one node, whose arrays have at most five elements.

    Its partition ``short`` allows two minutes, and ``labs`` is for accounts that do not exist.
    """
    _needs_root_and("slurmctld", "slurmd", "munged")
    folder = tmp_path_factory.mktemp("slurm")
    controller, node = _free_ports(2)
    here = socket.gethostname().partition(".")[0]
    extra = f"""MaxArraySize=5
PartitionName=short Nodes={here} MaxTime=2 State=UP
PartitionName=labs Nodes={here} AllowAccounts=labs State=UP"""
    ports = {"SLURMCTLD_PORT": controller, "SLURMD_PORT": node, "SLURM_EXTRA": extra}
    with _daemons("slurm", folder, ports):
        yield {"SLURM_CONF": str(folder / "slurm.conf")}


@pytest.fixture(scope="session")
def slurm_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What to add to the environment to use a real Slurm of three nodes of two cores, which keeps accounts.

    Jobs in its partition ``urgent`` preempt those in ``spare``, which are started again, and in ``spot``, which are
    cancelled. These are all of the first two nodes.
    """
    _needs_root_and("slurmctld", "slurmd", "munged", "slurmdbd", "mariadbd")
    folder = tmp_path_factory.mktemp("site")
    controller, accounts, *nodes = _free_ports(5)
    here = socket.gethostname().partition(".")[0]
    extra = f"""PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=spare Nodes={here},{here}-2 PriorityTier=1 PreemptMode=REQUEUE State=UP
PartitionName=spot Nodes={here},{here}-2 PriorityTier=1 PreemptMode=CANCEL State=UP
PartitionName=urgent Nodes={here},{here}-2 PriorityTier=9 PreemptMode=OFF State=UP"""
    ports = {"SLURMCTLD_PORT": controller, "SLURMDBD_PORT": accounts, "SLURMD_PORT": " ".join(nodes)}
    with _daemons("slurm", folder, {**ports, "SLURM_EXTRA": extra, "SLURM_NODE": "CPUs=2 RealMemory=4000"}):
        yield {"SLURM_CONF": str(folder / "slurm.conf")}


@pytest.fixture(scope="session")
def sge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What to add to the environment to use a real Grid Engine of one node, whose arrays have at most five elements."""
    _needs_root_and("sge_qmaster", "sge_execd")
    folder = tmp_path_factory.mktemp("sge")
    master, node = _free_ports(2)
    ports = {"SGE_QMASTER_PORT": master, "SGE_EXECD_PORT": node}
    with _daemons("sge", folder, {**ports, "SGE_AJ_TASKS": "5"}):
        yield {"SGE_ROOT": str(folder), "SGE_CELL": "default", **ports}


def _needs_root_and(*daemons: str) -> None:
    absent = [name for name in daemons if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if absent or os.geteuid():
        pytest.skip(f"a scheduler of our own needs root and {', '.join(absent or daemons)}")


def _free_ports(count: int) -> list[str]:
    """Return ports that nobody listens on."""
    with contextlib.ExitStack() as opened:
        listening = [opened.enter_context(socket.socket()) for _ in range(count)]
        for one in listening:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in listening]


@contextlib.contextmanager
def _daemons(name: str, folder: Path, settings: dict[str, str]) -> Iterator[None]:
    """Keep a scheduler's daemons running during the body."""
    try:
        up = subprocess.run([SCHEDULERS / f"{name}_up.sh", folder], env={**os.environ, **settings}, check=False)
        assert up.returncode == 0, (folder / "log/daemons.log").read_text()
        yield
    finally:
        subprocess.run([SCHEDULERS / "down.sh", folder], check=True)


@pytest.fixture(scope="session")
def new_prefect_home(once: Once) -> Callable[[Path], Path]:
    """Makes a folder a home of Prefect whose database is there and empty: to create one takes seconds."""
    created = once("prefect", serving.create_database)

    def new(home: Path) -> Path:
        return shutil.copytree(created, home, dirs_exist_ok=True)

    return new


@pytest.fixture
def prefect_home(new_prefect_home: Callable[[Path], Path], tmp_path: Path) -> Path:
    """A home of Prefect, with an empty database."""
    return new_prefect_home(tmp_path / "home")


@pytest.fixture(scope="module")
def server(
    new_prefect_home: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[serving.PrefectServer]:
    """A Prefect server that listens on loopback; it ends with the file of the tests, since it is busy all the time."""
    with serving.serving(new_prefect_home(tmp_path_factory.mktemp("prefect"))) as listening:
        yield listening
