"""Fixtures every test may use."""

import os

# Before NumPy and torch are imported anywhere: one thread, as the workers of a run have, and no reports to anyone.
os.environ.update({"OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"})

from pathlib import Path

import pytest


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
