"""What is released: everything a run needs is in it, nothing of the workshop, and it works where it is installed."""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import wsiflow

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sdist, and with the wheel that is built from it alone."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"  # a copy: building in place leaves files that a later build would take in
    for name in ("wsiflow", "conf", "flows", "docs", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(source)]
    built = subprocess.run(command, check=False, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_wheel_holds_conf_flows_and_weights(dist: Path) -> None:
    """Every YAML of ``conf/``, every module, the weights with their cards, the viewer and the licences; no test."""
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    expected = {f"wsiflow/conf/{path.relative_to(ROOT / 'conf')}" for path in (ROOT / "conf").rglob("*.yaml")}
    expected |= {f"wsiflow/{path.relative_to(ROOT / 'wsiflow')}" for path in (ROOT / "wsiflow").rglob("*.py")}
    expected |= {f"wsiflow/flows/{path.relative_to(ROOT / 'flows')}" for path in (ROOT / "flows").rglob("*.py")}
    expected |= {
        f"wsiflow/model/weights/{name}.{kind}" for name in ("demo", "pcam") for kind in ("json", "safetensors")
    }
    expected |= {"wsiflow/py.typed"}
    viewer = "wsiflow/run/results/viewer"
    expected |= {f"{viewer}/{name}" for name in ("viewer.js", "viewer.css", "openseadragon.min.js")}
    expected |= {f"{viewer}/openseadragon.LICENSE.txt"}
    assert expected <= names
    assert {Path(name).name for name in names if "/licenses/" in name} >= {"LICENSE", "NOTICE"}
    assert not [name for name in names if name.startswith("tests/")]


def test_the_sdist_has_what_its_readers_need(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"CITATION.cff", "CHANGELOG.md", "constraints.txt", "docs/exports.md", "conf/config.yaml"} <= names


def test_the_installed_wheel_runs_the_notebook(dist: Path, tmp_path: Path) -> None:
    """In an environment of its own, whose other packages are those of the tests, and far from the source.

    Every cell is run in a kernel; the page shows the main one word for word.
    """
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    python = _environment(tmp_path / "venv", next(dist.glob("*.whl")))
    notebook = nbformat.read(ROOT / "docs/from_python.ipynb", as_version=4)
    assert notebook.cells[3].source in (ROOT / "docs/python.md").read_text()
    notebook.cells.append(nbformat.v4.new_code_cell("print(wsiflow.__file__, wsiflow.predict.__code__.co_filename)"))
    nbformat.write(notebook, tmp_path / "notebook.ipynb")
    run = "import nbclient, nbformat, sys; n = nbformat.read('notebook.ipynb', 4); "
    run += "nbclient.NotebookClient(n, timeout=600, startup_timeout=600).execute(); nbformat.write(n, 'notebook.ipynb')"
    ended = subprocess.run(
        [python, "-c", run], cwd=tmp_path, env=_clean(tmp_path), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    cells = json.loads((tmp_path / "notebook.ipynb").read_text())["cells"]
    printed = "".join("".join(out.get("text", "")) for cell in cells for out in cell.get("outputs", ()))
    assert "FROC 1.000, AUC 1.000" in printed
    assert (
        len(re.findall(rf"{re.escape(str(tmp_path / 'venv'))}\S*/wsiflow/(?:__init__|flows/python)\.py", printed)) == 2
    )
    assert [cell for cell in cells for out in cell.get("outputs", ()) if "image/png" in out.get("data", {})]


def _environment(folder: Path, wheel: Path) -> str:
    """Install a wheel alone into a new environment that finds the other packages here; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/*/site-packages")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(packages)
    others = [path for path in (*site.getsitepackages(), *sys.path) if path.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(dict.fromkeys(others)))
    return str(folder / "bin/python")


def _clean(folder: Path) -> dict[str, str]:
    """Return an environment that names no source, and in which Jupyter keeps its files to a folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}
    return kept | {"JUPYTER_RUNTIME_DIR": str(folder / "jupyter"), "IPYTHONDIR": str(folder / "ipython")}


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == wsiflow.__version__
    assert citation["license"] == "Apache-2.0"
    assert citation["references"][0]["doi"] in (ROOT / "README.md").read_text()
