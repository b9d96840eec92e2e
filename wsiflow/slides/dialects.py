"""Manifests of other tools in which the column ``mask_path`` holds tissue, whereas here it holds truth.

A tissue mask that is taken for truth makes one lesion of a whole slide, and a perfect score of any classifier. Such a
manifest is recognised by its other columns and refused; renaming one column says what the masks are.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from wsiflow.errors import InputError

TRUTH_MASKS = ("mask_path", "mask", "truth_mask_path", "tumour_mask_path", "tumor_mask_path")
"""Names of the column of masks that are truth; the last three are never taken for tissue."""

_AMBIGUOUS = TRUTH_MASKS[:2]
_TISSUE = {"tissue_mask_path", "tissue_mask"}
_LABELS = {"label", "type", "class", "annotation_path", "annotation", "xml"}
_CLAM = {"process", "seg_level", "sthresh", "mthresh", "use_otsu", "a_t", "a_h", "keep_ids", "exclude_ids", "bbox_ids"}


def require_truth_masks(header: Sequence[str], path: Path) -> None:
    """Refuse a manifest whose masks are probably of tissue.

    Args:
        header: The names of its columns as they are written.
        path: The manifest, for messages.

    Raises:
        InputError: Its other columns are those of a tool in whose manifests masks are of tissue.
    """
    names = {re.sub(r"[\s-]+", "_", name.strip().lower()) for name in header}
    mask = next((name for name in _AMBIGUOUS if name in names), "")
    tool = _tool(names)
    if not mask or not tool or names & _TISSUE:
        return
    cause = f"the columns are those of {tool}, where {mask} holds tissue; here it would be truth"
    remedy = f"rename {mask} to tissue_mask_path, or to truth_mask_path where the masks are annotated tumour"
    raise InputError(cause, remedy, path=path)


def _tool(names: set[str]) -> str:
    """Return the tool that writes such columns; empty where none is known."""
    if {"sample_id", "image_path"} <= names or "spacing_at_level_0" in names:
        return "hs2p or slide2vec"
    if len(names & _CLAM) > 1:
        return "CLAM"
    if names & _LABELS:  # somebody who gives labels here wrote this manifest for scoring
        return ""
    if "wsi" in names:
        return "TRIDENT"
    return "hs2p or slide2vec" if "wsi_path" in names else ""
