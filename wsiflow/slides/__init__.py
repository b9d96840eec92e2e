"""The slides of a run: manifests, slide files, their identity and colours, annotations, and synthetic data sets."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from wsiflow.slides import annotations
    from wsiflow.slides.kinds import DatasetParams
    from wsiflow.slides.manifest import Case, load_dataset
    from wsiflow.slides.slide import Slide, open_slide
    from wsiflow.slides.stain.params import StainParams
    from wsiflow.slides.stain.transfer import normalise

__all__ = [
    "Case",
    "DatasetParams",
    "Slide",
    "StainParams",
    "annotations",
    "load_dataset",
    "normalise",
    "open_slide",
]

# Each module is imported when a name of it is first used, because most commands need few of them.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submodules=["annotations"],
    submod_attrs={
        "kinds": ["DatasetParams"],
        "manifest": ["Case", "load_dataset"],
        "slide": ["Slide", "open_slide"],
        "stain.params": ["StainParams"],
        "stain.transfer": ["normalise"],
    },
)
