"""Annotations by pathologists: outlines in the formats of several programs, and mask images.

Input: a file of annotations, or the pixels of a mask image. Output: outlines in level-0 px by name and group, and bool
masks (rows, cols) at a reduced scale; see `fill` for which pixels an outline holds, and `groups` for what it encloses.
"""

from wsiflow.slides.annotations.fill import painted
from wsiflow.slides.annotations.formats import FORMATS, format_of, read
from wsiflow.slides.annotations.groups import (
    GROUPS,
    Meaning,
    TruthOutlines,
    check_on_slide,
    read_outlines,
    sort_outlines,
    tumour_mask,
)
from wsiflow.slides.annotations.masks import NAME_TUMOUR_VALUES, tumour_from_mask
from wsiflow.slides.annotations.outlines import COMPANION_SUFFIXES, Drawing, Format, NoArea, Outline, SlidePlace

__all__ = [
    "COMPANION_SUFFIXES",
    "FORMATS",
    "GROUPS",
    "NAME_TUMOUR_VALUES",
    "Drawing",
    "Format",
    "Meaning",
    "NoArea",
    "Outline",
    "SlidePlace",
    "TruthOutlines",
    "check_on_slide",
    "format_of",
    "painted",
    "read",
    "read_outlines",
    "sort_outlines",
    "tumour_from_mask",
    "tumour_mask",
]
