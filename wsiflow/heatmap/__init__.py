"""Heatmaps: maps assembled from tile scores, their files, lesion detection, overlays and features."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from wsiflow.heatmap.assembly import assemble, subsample
    from wsiflow.heatmap.files import Heatmap, open_heatmap, read_heatmap, write_heatmap
    from wsiflow.heatmap.lesions import LesionParams, detect

__all__ = [
    "Heatmap",
    "LesionParams",
    "assemble",
    "detect",
    "open_heatmap",
    "read_heatmap",
    "subsample",
    "write_heatmap",
]

# Loaded by whoever asks first: most commands need little of it.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "assembly": ["assemble", "subsample"],
        "files": ["Heatmap", "open_heatmap", "read_heatmap", "write_heatmap"],
        "lesions": ["LesionParams", "detect"],
    },
)
