"""What the packages show of themselves: every name can be had, and none costs more than it must."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import wsiflow

PACKAGES = ["wsiflow", *(f"wsiflow.{one.name}" for one in pkgutil.iter_modules(wsiflow.__path__) if one.ispkg)]
HEAVY = {"torch", "h5py", "mlflow", "openslide", "openvino", "sklearn", "matplotlib", "prefect"}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_of_a_face_is_there(package: str) -> None:
    """A name that is told to type checkers alone, or was moved, fails here."""
    face = importlib.import_module(package)
    assert face.__doc__
    assert all(hasattr(face, name) for name in face.__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_function_is_called_like_a_file_beside_it(package: str) -> None:
    """After ``from wsiflow.heatmap import x`` it must not depend on what was imported before whether x is a module."""
    face = importlib.import_module(package)
    files = {one.name for one in pkgutil.iter_modules(face.__path__)}
    shown = {name: getattr(face, name) for name in face.__all__}
    assert {name for name, value in shown.items() if name in files and not isinstance(value, ModuleType)} == set()
    assert not any(inspect.isfunction(value) and value.__name__ in files for value in shown.values())


def test_a_face_loads_nothing_that_is_heavy() -> None:
    """Torch alone takes seconds; whoever asks for a name pays for that name."""
    code = f"import sys\nimport {', '.join(PACKAGES)}\nprint(*sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_names_that_users_have_known_stay() -> None:
    """Scripts begin with these."""
    from wsiflow import annotations, froc, roc, store

    assert [one.__name__ for one in (annotations, froc, roc, store)] == [
        "wsiflow.slides.annotations",
        "wsiflow.evaluation.froc",
        "wsiflow.evaluation.roc",
        "wsiflow.run.store",
    ]
    assert inspect.isfunction(wsiflow.model.load)
    assert inspect.isfunction(wsiflow.heatmap.assemble)
