"""Colour transfer by means and standard deviations in CIELAB (Reinhard et al. 2001)."""

import cv2
import numpy as np

from wsiflow.slides.stain.params import LEAST_LAB_STD, LabFit, Pixels, cannot_measure
from wsiflow.slides.stain.pixels import in_strips


def fit_lab(pixels: Pixels) -> LabFit:
    """Return the mean and standard deviation in LAB of pixels of shape (n, 3), RGB.

    Raises:
        InputError: The pixels have hardly any variation of colour.
    """
    lab = cv2.cvtColor(pixels.reshape(1, -1, 3), cv2.COLOR_RGB2LAB)[0]
    mean, std = lab.mean(axis=0).tolist(), lab.std(axis=0).tolist()
    if min(std) < LEAST_LAB_STD:
        deviations = ", ".join(f"{s:.2f}" for s in std)
        raise cannot_measure(f"the tissue has only one colour (its standard deviations in LAB are {deviations})")
    return LabFit("reinhard", (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


def lab_transfer(rgb: Pixels, source: LabFit, target: LabFit) -> Pixels:
    """Return an image (rows, cols, 3), its LAB channels scaled and shifted from the source's fit to the target's."""
    values = np.arange(256)[:, None]
    moved = (values - np.array(source.mean)) * (np.array(target.std) / source.std) + target.mean
    table = np.rint(np.clip(moved, 0, 255)).astype(np.uint8)[None]

    def transform(pixels: Pixels, out: Pixels) -> None:
        lab = cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB)
        cv2.LUT(lab, table, lab)
        cv2.cvtColor(lab, cv2.COLOR_LAB2RGB, out)

    return in_strips(rgb, transform)
