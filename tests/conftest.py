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
