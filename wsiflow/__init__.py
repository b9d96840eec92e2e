"""Test patch classifiers on whole-slide images: dense inference, lesion scores, and what they cost."""

from importlib.metadata import version
from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from wsiflow.evaluation import froc, roc
    from wsiflow.flows.python import Run, Tissue, evaluate, find_tissue, predict
    from wsiflow.heatmap.files import Heatmap, read_heatmap
    from wsiflow.run import store
    from wsiflow.slides import annotations
    from wsiflow.slides.slide import Slide, open_slide

__all__ = [
    "Heatmap",
    "Run",
    "Slide",
    "Tissue",
    "__version__",
    "annotations",
    "evaluate",
    "find_tissue",
    "froc",
    "open_slide",
    "predict",
    "read_heatmap",
    "roc",
    "store",
]
__version__ = version("wsiflow")

# Loaded when a name is first used: nobody waits for what they do not need. `flows` is a package beside this one in the
# source, and below it once installed.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "evaluation": ["froc", "roc"],
        "flows.python": ["Run", "Tissue", "evaluate", "find_tissue", "predict"],
        "heatmap.files": ["Heatmap", "read_heatmap"],
        "run": ["store"],
        "slides": ["annotations"],
        "slides.slide": ["Slide", "open_slide"],
    },
)
