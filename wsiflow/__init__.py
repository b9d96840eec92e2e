"""Test patch classifiers on whole-slide images: dense inference, lesion scores, and what they cost."""

from importlib.metadata import version
from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from wsiflow.evaluation import froc, roc
    from wsiflow.run import store
    from wsiflow.slides import annotations

__all__ = ["__version__", "annotations", "froc", "roc", "store"]
__version__ = version("wsiflow")

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__, submod_attrs={"evaluation": ["froc", "roc"], "run": ["store"], "slides": ["annotations"]}
)
