"""Where to look on a slide, and what will be done: transforms, tissue, blocks, outlines and the plan of a run."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from wsiflow.plan.blocks import Block, TilesParams
    from wsiflow.plan.geometry import Frame, GeometryParams
    from wsiflow.plan.plan import Plan, SlidePlan, Task
    from wsiflow.plan.tissue import TissueParams, tissue_mask

__all__ = [
    "Block",
    "Frame",
    "GeometryParams",
    "Plan",
    "SlidePlan",
    "Task",
    "TilesParams",
    "TissueParams",
    "tissue_mask",
]

# Loaded by whoever asks first: most commands need little of it.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "blocks": ["Block", "TilesParams"],
        "geometry": ["Frame", "GeometryParams"],
        "plan": ["Plan", "SlidePlan", "Task"],
        "tissue": ["TissueParams", "tissue_mask"],
    },
)
