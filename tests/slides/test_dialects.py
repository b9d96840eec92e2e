"""Manifests of other tools whose masks are of tissue."""

import pytest

from wsiflow.errors import InputError
from wsiflow.slides import dialects
from wsiflow.slides.manifest import read_manifest

TISSUE_MASKS = [
    ("sample_id,image_path,mask_path", "hs2p or slide2vec"),
    ("sample_id,image_path,mask_path,spacing_at_level_0", "hs2p or slide2vec"),
    ("slide_id,path,mask_path,spacing_at_level_0", "hs2p or slide2vec"),
    ("Sample ID,Image Path,Mask Path,label", "hs2p or slide2vec"),
    ("wsi_path,mask_path", "hs2p or slide2vec"),
    ("wsi,mpp,mask_path", "TRIDENT"),
    ("slide_id,path,process,seg_level,mask", "CLAM"),
]


@pytest.mark.parametrize(("header", "tool"), TISSUE_MASKS)
def test_masks_of_tissue_are_not_taken_for_truth(tmp_path, header, tool):
    """A manifest of a tool whose masks are of tissue is refused, with the column to rename."""
    path = tmp_path / "m.csv"
    path.write_text(f"{header}\n")
    with pytest.raises(
        InputError, match=f"those of {tool}, where mask.* holds tissue; .* to tissue_mask_path, or to truth_mask_path"
    ):
        read_manifest(path)


@pytest.mark.parametrize(
    "header",
    [
        "sample_id,image_path,truth_mask_path,spacing_at_level_0",
        "sample_id,image_path,mask_path,tissue_mask_path",
        "slide_id,wsi_path,label,mask_path",
        "slide_id,path,mask_path",
        "sample_id,image_path,spacing_at_level_0",
    ],
)
def test_masks_that_are_truth(header):
    """A column of its own for tissue, labels, or an own name for the truth say that the masks are truth."""
    dialects.require_truth_masks(header.split(","), "m.csv")
