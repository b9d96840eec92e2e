"""What a process imports at each door: it starts hundreds of times, and each library costs tenths of seconds."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import over

ROOT = Path(__file__).parents[1]
FLOWS = {"prefect", "mlflow", "dask", "distributed"}
NETWORKS = {"torch", "openvino", "onnxruntime"}
PARTS = {"scipy.special", "scipy.ndimage", "scipy.optimize", "scipy.stats", "skimage.filters", "skimage.measure"}
BOUNDS = {"scipy.special", "scipy.optimize"}  # of certificates, which are summarised whenever a run ends
FIGURES = {"matplotlib", "pandas", "sklearn"}
_COMMAND = """
import sys
from flows.__main__ import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
print(code, *sys.modules, file=sys.stderr)
"""
_TASKS = """
import sys
from pathlib import Path
from wsiflow.run.stages import work
for stage in sys.argv[2:]:
    outcome = work.run_task(Path(sys.argv[1]), stage, 0)
    assert outcome.executed and outcome.failure is None, outcome
print(0, *sys.modules, file=sys.stderr)
"""


def imported(code: str, *arguments: str) -> tuple[int, set[str]]:
    """Return the exit code that a program reports, and the modules that it has imported."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    exit_code, *modules = done.stderr.splitlines()[-1].split()
    return int(exit_code), set(modules)


def test_help_imports_no_library() -> None:
    """It is what completes a word, and what a script asks."""
    exit_code, modules = imported(_COMMAND, "--help")
    assert exit_code == 0
    assert not modules & {"numpy", "pydantic", "yaml", "hydra", *FLOWS, *NETWORKS}


@pytest.mark.parametrize("typo", ["inference.strid=8", "inference.stride=0"])
def test_a_typo_is_refused_before_what_would_run_is_imported(typo: str) -> None:
    """An unknown key needs Hydra and the names of all keys, a value out of bounds these settings."""
    exit_code, modules = imported(_COMMAND, "run", typo)
    assert exit_code == 20
    assert not modules & {"h5py", "tifffile", "imagecodecs", "wsiflow.run.shards", "wsiflow.run.results.finish"}
    assert not (found := modules & {*FLOWS, *NETWORKS, *PARTS, *FIGURES}), found


@pytest.mark.parametrize("orchestrator", ["none", "prefect"])
def test_a_finished_run_imports_nothing_that_computes(
    orchestrator: str, small_slides: Path, finished: Path, tmp_path: Path
) -> None:
    """With Prefect no server is asked or started, since nothing is left to do."""
    out = shutil.copytree(finished, tmp_path / "run")
    exit_code, modules = imported(_COMMAND, "run", *over(small_slides, out, f"orchestrator={orchestrator}"))
    assert exit_code == 0
    assert not (found := modules & {*FLOWS, *NETWORKS, *(PARTS - BOUNDS), *FIGURES}), found


@pytest.fixture
def unscored(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, in which the pixels, scores and certificates are missing."""
    out = shutil.copytree(finished, tmp_path / "run")
    for name in ("patches", "predictions", "certificates"):
        shutil.rmtree(out / name)
        shutil.rmtree(out / "receipts" / name)
    return out


def test_an_element_that_reads_imports_no_network(unscored: Path) -> None:
    """It decodes pixels and writes them."""
    _, modules = imported(_TASKS, str(unscored / "plan.json"), "extract")
    assert not modules & {*FLOWS, *NETWORKS, *PARTS, *FIGURES, "hydra"}


def test_a_network_that_was_converted_before_runs_without_torch(unscored: Path, finished: Path) -> None:
    """Scores and the certificate have the bytes that the process with PyTorch gave them."""
    plan = str(unscored / "plan.json")
    _, modules = imported(_TASKS, plan, "extract", "index", "predict", "certify")
    assert "openvino" in modules
    assert not (found := modules & {"torch", *FLOWS, *(PARTS - BOUNDS), *FIGURES, "hydra"}), found
    for name in ("predictions", "certificates"):
        for path in (one for one in (unscored / name).rglob("*") if one.is_file()):
            assert path.read_bytes() == (finished / path.relative_to(unscored)).read_bytes()


def test_what_was_chosen_before_is_chosen_again_without_torch(finished: Path, tmp_path: Path) -> None:
    """A run with other slides needs no PyTorch either, and publishes the same choice."""
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(finished / "cases.json", out)
    _, modules = imported(_TASKS, str(out / "cases.json"), "choose")
    assert not modules & {*NETWORKS, *FLOWS}
    (chosen,) = (out / "engine").glob("*.json")
    assert chosen.read_bytes() == (finished / "engine" / chosen.name).read_bytes()
