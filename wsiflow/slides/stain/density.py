"""Two stains in optical density: how much of each a pixel holds, and what it looks like in those of the target."""

import cv2
import numpy as np
from numpy.typing import NDArray

from wsiflow.slides.stain.params import (
    LEAST_OD,
    DensityFit,
    Floats,
    Pixels,
)
from wsiflow.slides.stain.pixels import SPARE_PX, STRIP_PX, in_strips

STRENGTH_PERCENTILE = 99.0
CODE_PENALTY = 0.01


def stain_codes(density: Floats, stains: Floats, penalty: float) -> Floats:
    """Split densities into amounts of two stains: the non-negative lasso, in closed form.

    The minimum of ``|density - codes @ stains|² / 2 + penalty * sum(codes)`` over codes of at least 0. For vectors of
    unit length at an angle of at most 90° it is, for either stain, the smaller of its amount beside the other and its
    amount alone, and never below 0.

    Args:
        density: Shape (3, n).
        stains: Shape (2, 3), rows of unit length, no negative scalar product.
        penalty: Weight of the sum of the amounts.

    Returns:
        Shape (2, n).
    """
    alone = np.einsum("kc,cn->kn", stains, density) - penalty
    common = float(np.einsum("c,c->", stains[0], stains[1]))
    beside = (alone - common * alone[::-1]) / max(1 - common**2, LEAST_OD)
    codes: Floats = np.maximum(np.minimum(alone, beside), 0)
    return codes


def density_table(white: float) -> Floats:
    """Return the optical density of the 256 grey values; 0 counts as 1."""
    intensity = np.clip(np.arange(256) * (255 / white), 1, 255)
    return np.asarray(np.maximum(-np.log(intensity / 255), LEAST_OD))


def principal(density: Floats) -> tuple[Floats, Floats]:
    """Return variances, the larger first, and directions, shape (3, 3) in rows, of densities of shape (3, n)."""
    centred = density - density.mean(axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(np.einsum("cn,dn->cd", centred, centred) / density.shape[1])
    return values[::-1], vectors.T[::-1]


def stain_transfer(rgb: Pixels, source: DensityFit, target: DensityFit) -> Pixels:
    """Split into stains, rescale their amounts, and paint with the target's stains.

    `stain_codes` written as two affine maps of the densities, their minimum and a maximum, in single precision.
    """
    table = density_table(source.white).astype(np.float32)
    to_alone, to_beside = _code_maps(source)
    to_log = _log_map(source, target)
    first, second, third = (np.zeros((1, STRIP_PX + SPARE_PX, 3), np.float32) for _ in range(3))

    def transform(pixels: Pixels, out: Pixels) -> None:
        count = pixels.shape[1]
        cv2.LUT(pixels, table, first[:, :count])
        cv2.transform(first, to_alone, second)
        cv2.transform(first, to_beside, third)
        cv2.min(second, third, second)
        cv2.threshold(second, 0, 0, cv2.THRESH_TOZERO, second)
        cv2.transform(second, to_log, third)
        cv2.exp(third, first)
        cv2.convertScaleAbs(first[:, :count], out)

    return in_strips(rgb, transform)


def _code_maps(source: DensityFit) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the affine maps, each of shape (3, 4), from densities to either stain's amount alone and beside the other.

    Their third row is 0, for OpenCV is fast only from three channels to three.
    """
    stains = np.array([source.haematoxylin, source.eosin])
    common = float(stains[0] @ stains[1])
    alone = np.zeros((3, 4))
    alone[:2, :3], alone[:2, 3] = stains, -CODE_PENALTY
    beside = np.zeros((3, 4))
    beside[:2] = (alone[:2] - common * alone[1::-1]) / max(1 - common**2, LEAST_OD)
    return alone.astype(np.float32), beside.astype(np.float32)


def _log_map(source: DensityFit, target: DensityFit) -> NDArray[np.float32]:
    """Return the affine map, shape (3, 4), from amounts of stain to the logarithm of the grey values painted."""
    painted = np.array([target.haematoxylin, target.eosin]) * (np.array(target.strengths) / source.strengths)[:, None]
    return np.column_stack([-painted.T, np.zeros(3), np.full(3, np.log(255))]).astype(np.float32)
