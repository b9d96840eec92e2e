"""What receipts say about where numbers came from."""

import os
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from wsiflow.system import machine

_LIBRARIES = (
    "wsiflow",
    "torch",
    "openvino",
    "numpy",
    "h5py",
    "openslide-python",
    "openslide-bin",
    "imagecodecs",
    "pillow",
    "opencv-python-headless",
)
#: Raised whenever a change of code changes the numbers that come out for the same settings.
NUMERICS = 3

_PIXEL_LIBRARIES = {"openslide-bin", "imagecodecs", "pillow", "opencv-python-headless", "numpy"}


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Return the versions that can change a number."""
    return {name: version(name) for name in _LIBRARIES}


def pixel_versions() -> dict[str, str]:
    """Return the versions of what decodes, resamples and normalises pixels."""
    return {name: found for name, found in versions().items() if name in _PIXEL_LIBRARIES}


def thread_count() -> int:
    """Return how many threads the numerical libraries of this process use."""
    return int(os.environ.get("OMP_NUM_THREADS", "1"))


def numeric_class() -> dict[str, str]:
    """Return the numeric class of this process."""
    return machine.numeric_class(thread_count())


@lru_cache(maxsize=1)
def cpu() -> str:
    """Return the CPU that this process runs on."""
    return machine.cpu_model()


def facts(kind: str, slide_id: str, **more: Any) -> dict[str, Any]:
    """Return what the receipt of a file says besides its hash and times."""
    return {
        "kind": kind,
        "slide": slide_id,
        "cpu": cpu(),
        "versions": versions(),
        "numeric_class": numeric_class(),
        **more,
    }
