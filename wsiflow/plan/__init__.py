"""Where a slide is analysed and what a run will do: transforms, tissue, blocks, outlines and the plan of a run."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from wsiflow.plan.blocks import Block, TilesParams
    from wsiflow.plan.geometry import Frame, GeometryParams
    from wsiflow.plan.slide_plan import SlidePlan
    from wsiflow.plan.tissue import TissueParams, tissue_mask

__all__ = [
    "Block",
    "Frame",
    "GeometryParams",
    "SlidePlan",
    "TilesParams",
    "TissueParams",
    "tissue_mask",
]

# Each module is imported when a name of it is first used, because most commands need few of them.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "blocks": ["Block", "TilesParams"],
        "geometry": ["Frame", "GeometryParams"],
        "slide_plan": ["SlidePlan"],
        "tissue": ["TissueParams", "tissue_mask"],
    },
)
