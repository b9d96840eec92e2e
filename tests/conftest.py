"""Fixtures every test may use."""

import os

# Before NumPy and torch are imported anywhere: one thread, as the workers of a run have, and no reports to anyone.
os.environ.update({"OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"})

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import serving

SCHEDULERS = Path(__file__).parent / "schedulers"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real slides, patches and tables; tests that need it are skipped where it is absent."""
    root = Path(os.environ.get("WSIFLOW_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no real data at {root}")
    return root


@pytest.fixture(scope="session")
def small_slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of a small synthetic data set: six slides of 2,048 px with lesions."""
    from wsiflow import synth

    return synth.write_dataset(tmp_path_factory.mktemp("slides"), size_px=2048, seed=1, workers=1)


@pytest.fixture(scope="session")
def two_settings(small_slides: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of two runs over the small data set: fp32, and bf16 (window by window where the CPU has no bf16)."""
    from flows import run
    from wsiflow.model import engines

    folder = tmp_path_factory.mktemp("settings")
    other = "inference.precision=bf16" if engines.cpu_supports_bf16() else "inference.engine=window"
    common = ["dataset=manifest", f"dataset.manifest={small_slides}", "inference.stride=112", "dense.windows=40"]
    common += ["executor=inline", "orchestrator=none", "tracking=off", "evaluation.bootstrap=50"]
    for name, setting in (("fp32", "inference.precision=fp32"), ("other", other)):
        assert run.main(["run", f"out={folder / name}", setting, *common]) == 0
    return folder / "fp32", folder / "other"


@pytest.fixture(scope="session")
def tiny_slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of two tiny slides, one with a tumour outline."""
    from wsiflow import pyramid

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
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What to add to the environment to use a real Slurm of one node, whose arrays have at most five elements."""
    _needs_root_and("slurmctld", "slurmd", "munged")
    folder = tmp_path_factory.mktemp("slurm")
    controller, node = _free_ports()
    ports = {"SLURMCTLD_PORT": controller, "SLURMD_PORT": node, "SLURM_EXTRA": "MaxArraySize=5"}
    with _daemons("slurm", folder, ports):
        yield {"SLURM_CONF": str(folder / "slurm.conf")}


@pytest.fixture(scope="session")
def sge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What to add to the environment to use a real Grid Engine of one node, whose arrays have at most five elements."""
    _needs_root_and("sge_qmaster", "sge_execd")
    folder = tmp_path_factory.mktemp("sge")
    master, node = _free_ports()
    ports = {"SGE_QMASTER_PORT": master, "SGE_EXECD_PORT": node}
    with _daemons("sge", folder, {**ports, "SGE_AJ_TASKS": "5"}):
        yield {"SGE_ROOT": str(folder), "SGE_CELL": "default", **ports}


def _needs_root_and(*daemons: str) -> None:
    absent = [name for name in daemons if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if absent or os.geteuid():
        pytest.skip(f"a scheduler of our own needs root and {', '.join(absent or daemons)}")


def _free_ports() -> tuple[str, str]:
    """Return two ports that nobody listens on."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return str(first.getsockname()[1]), str(second.getsockname()[1])


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
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.PrefectServer]:
    """A Prefect server that listens on loopback."""
    with serving.serving(tmp_path_factory.mktemp("prefect")) as listening:
        yield listening
