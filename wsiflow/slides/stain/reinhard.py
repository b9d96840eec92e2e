"""Means and spreads in CIELAB (Reinhard et al. 2001)."""

import cv2
import numpy as np

from wsiflow.slides.stain.params import LEAST_LAB_STD, LabFit, Pixels, cannot_measure
from wsiflow.slides.stain.pixels import in_strips


def fit_lab(pixels: Pixels) -> LabFit:
    """Return mean and standard deviation of pixels of shape (n, 3) in LAB."""
    lab = cv2.cvtColor(pixels.reshape(1, -1, 3), cv2.COLOR_RGB2LAB)[0]
    mean, std = lab.mean(axis=0).tolist(), lab.std(axis=0).tolist()
    if min(std) < LEAST_LAB_STD:
        raise cannot_measure(
            f"the tissue is of one colour (standard deviations in LAB {', '.join(f'{s:.2f}' for s in std)})"
        )
    return LabFit("reinhard", (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


def lab_transfer(rgb: Pixels, source: LabFit, target: LabFit) -> Pixels:
    """Shift and stretch each channel of LAB."""
    values = np.arange(256)[:, None]
    moved = (values - np.array(source.mean)) * (np.array(target.std) / source.std) + target.mean
    table = np.rint(np.clip(moved, 0, 255)).astype(np.uint8)[None]

    def transform(pixels: Pixels, out: Pixels) -> None:
        lab = cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB)
        cv2.LUT(lab, table, lab)
        cv2.cvtColor(lab, cv2.COLOR_LAB2RGB, out)

    return in_strips(rgb, transform)
