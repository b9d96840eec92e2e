"""The wheel: everything a run needs is in it, and nothing of the workshop."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_conf_flows_weights_and_viewer(tmp_path: Path) -> None:
    """Every YAML of ``conf/``, every module, the demo weights with their card, the viewer; no test."""
    source = tmp_path / "source"  # a copy: building in place leaves files that a later build would take in
    for name in ("wsiflow", "conf", "flows"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    expected = {f"wsiflow/conf/{path.relative_to(ROOT / 'conf')}" for path in (ROOT / "conf").rglob("*.yaml")}
    expected |= {f"wsiflow/{path.relative_to(ROOT / 'wsiflow')}" for path in (ROOT / "wsiflow").rglob("*.py")}
    expected |= {f"wsiflow/flows/{path.relative_to(ROOT / 'flows')}" for path in (ROOT / "flows").rglob("*.py")}
    expected |= {"wsiflow/model/weights/demo.json", "wsiflow/model/weights/demo.safetensors"}
    viewer = "wsiflow/run/results/viewer"
    expected |= {f"{viewer}/{name}" for name in ("viewer.js", "viewer.css", "openseadragon.min.js")}
    expected |= {f"{viewer}/openseadragon.LICENSE.txt"}
    assert expected <= names
    assert not [name for name in names if name.startswith("tests/")]
