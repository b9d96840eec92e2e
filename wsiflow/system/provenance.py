"""The facts about software and hardware that receipts record."""

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
    """Return the versions of wsiflow and of the libraries that can change a result."""
    return {name: version(name) for name in _LIBRARIES}


def pixel_versions() -> dict[str, str]:
    """Return the versions of the libraries that decode, resample and normalise pixels."""
    return {name: version for name, version in versions().items() if name in _PIXEL_LIBRARIES}


def thread_count() -> int:
    """Return how many threads the numerical libraries of this process use."""
    return int(os.environ.get("OMP_NUM_THREADS", "1"))


def numeric_class() -> dict[str, str]:
    """Return the numeric class of this process, see `wsiflow.system.machine.numeric_class`."""
    return machine.numeric_class(thread_count())


@lru_cache(maxsize=1)
def cpu() -> str:
    """Return the model name of the CPU on which this process runs."""
    return machine.cpu_model()


def facts(kind: str, slide_id: str, **more: Any) -> dict[str, Any]:
    """Return the facts that the receipt of a file records besides its hash and times.

    Args:
        kind: Kind of the file, for example ``predictions``.
        slide_id: The slide, or an empty text.
        more: Further facts by name.
    """
    return {
        "kind": kind,
        "slide": slide_id,
        "cpu": cpu(),
        "versions": versions(),
        "numeric_class": numeric_class(),
        **more,
    }
