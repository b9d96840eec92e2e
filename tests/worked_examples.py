"""The worked examples E1 to E3 of the FROC score: detections, outlines and masks."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsiflow.slides import pyramid

E1 = {
    "Tumor_A": ".9,6,6\n.6,2,4\n.95,20,15\n.4,30,2\n",
    "Tumor_B": ".7,9,4\n.3,30,13\n.25,0,19\n.35,39,0\n",
    "Normal_C": ".8,5,5\n.2,7,7\n.1,8,8\n.05,9,9\n",
    "Normal_D": "",
}
E2 = {"Tumor_A": ".9,6,6\n.5,30,2\n", "Tumor_B": ".7,9,4\n.3,30,13\n", "Normal_C": ".6,5,5\n"}
E3 = {
    "Tumor_T": ".9,1471,831\n.8,384,512\n.7,2405,2565\n.5,640,1920\n.3,3520,1920\n.3,160,640\n.95,2400,800\n",
    "Normal_S": ".85,100,100\n",
    "Normal_T": ".7,640,640\n",
}
E3_BOXES = [
    (20, 30, 10, 40),
    (20, 30, 48, 60),
    (20, 30, 69, 90),
    (60, 61, 10, 36),
    (60, 61, 100, 128),
    (70, 90, 60, 90),
]
E3_HOLE = (74, 86, 64, 86)
A_BOXES, A_ITC = [(5, 9, 3, 13)], (15, 16, 20, 23)
B_BOXES = [(4, 5, 2, 9), (4, 5, 11, 18), (12, 15, 25, 37)]


def painted(shape, boxes, hole=None):
    """Return a mask of 0 and 255 with boxes (first row, last row + 1, first column, last column + 1)."""
    mask = np.zeros(shape, np.uint8)
    for r0, r1, c0, c1 in boxes:
        mask[r0:r1, c0:c1] = 255
    if hole is not None:
        mask[hole[0] : hole[1], hole[2] : hole[3]] = 0
    return mask


def png(path, mask):
    """Write a mask image and return its path."""
    Image.fromarray(mask).save(path)
    return path


def xml(path, boxes, hole):
    """Write boxes of 1/32 px as ASAP outlines in level-0 px, with an exclusion, and return the path."""
    rows = []
    for group, (r0, r1, c0, c1) in [("Exclusion", hole), *(("Tumor", box) for box in boxes)]:
        corners = [(c0, r0), (c1, r0), (c1, r1), (c0, r1)]
        points = "".join(f'<Coordinate Order="{i}" X="{32 * x}" Y="{32 * y}" />' for i, (x, y) in enumerate(corners))
        rows.append(f'<Annotation Name="a" PartOfGroup="{group}"><Coordinates>{points}</Coordinates></Annotation>')
    path.write_text(f"<ASAP_Annotations><Annotations>{''.join(rows)}</Annotations></ASAP_Annotations>")
    return path


def e1_masks(tmp_path, *more):
    """Write the masks of E1 and E2."""
    return {
        "Tumor_A": png(tmp_path / "a.png", painted((20, 40), [*A_BOXES, *more])),
        "Tumor_B": png(tmp_path / "b.png", painted((20, 40), B_BOXES)),
    }


def e3_truth(kind, tmp_path):
    """Write E3's truth as an image at 1/32, as a mask pyramid of the whole slide, or as outlines."""
    mask = painted((100, 160), E3_BOXES, E3_HOLE)
    if kind == "png":
        return png(tmp_path / "t.png", mask)
    if kind == "xml":
        return xml(tmp_path / "t.xml", E3_BOXES, E3_HOLE)
    write_mask(tmp_path / "t.tif", np.kron(mask, np.ones((32, 32), np.uint8)), um_px=0.243)
    return tmp_path / "t.tif"


def write_mask(path: Path, mask: NDArray[np.bool_] | NDArray[np.uint8], *, um_px: float) -> None:
    """Write a mask as a pyramid with the values 0 and 255.

    A reduced level takes every second row and column, which keeps the expected area of lesions at every level.

    Args:
        path: The file to write.
        mask: Shape (rows, cols); every value but 0 is inside the mask.
        um_px: Spacing of the mask, um per px.
    """
    gray = np.where(mask, 255, 0).astype(np.uint8)
    pyramid.write_gray(path, pyramid.reduced_levels(gray, lambda level: level[::2, ::2]), um_px=um_px, description="")
