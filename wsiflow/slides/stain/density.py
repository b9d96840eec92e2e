"""Stain separation in optical density: the amounts of two stains in pixels, and their transfer to a target's stains."""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from wsiflow.slides.stain.fits import (
    LEAST_OD,
    LEAST_SINE,
    LEAST_STRENGTH,
    LEAST_VARIANCE,
    DensityFit,
    Floats,
    Pixels,
    cannot_measure,
)
from wsiflow.slides.stain.method import MethodParams, PixelSample, StainMethod
from wsiflow.slides.stain.pixels import SPARE_PX, STRIP_PX, in_strips

STRENGTH_PERCENTILE = 99.0
CODE_PENALTY = 0.01

_FIT = TypeAdapter(DensityFit)


def density_method(
    name: str, vectors: Callable[[Floats, MethodParams], Floats], *, brightens: bool = True
) -> StainMethod:
    """Return a method that exchanges two stains.

    Args:
        name: Its name.
        vectors: Returns two stain vectors, float64 (2, 3) in any order, from densities (3, n) of tissue.
        brightens: See `StainMethod`.
    """

    def measure(sample: PixelSample, params: MethodParams) -> DensityFit:
        table = density_table(sample.white)
        stains = fit_stains(table[sample.tissue.T], lambda density: vectors(density, params))
        amounts = stain_codes(table[sample.measured.T], stains, CODE_PENALTY)
        strengths = np.percentile(amounts, STRENGTH_PERCENTILE, axis=1)
        if strengths.min() < LEAST_STRENGTH:
            raise cannot_measure(f"there is only one stain (densities {strengths[0]:.3f} and {strengths[1]:.3f})")
        return _FIT.validate_python(
            {
                "method": name,
                "white": sample.white,
                "haematoxylin": stains[0].tolist(),
                "eosin": stains[1].tolist(),
                "strengths": strengths.tolist(),
            }
        )

    return StainMethod(name, DensityFit, measure, stain_transfer, brightens)


def stain_codes(density: Floats, stains: Floats, penalty: float) -> Floats:
    """Return the amounts of two stains in optical densities: the solution of the non-negative lasso, in closed form.

    The amounts minimise ``|density - codes @ stains|² / 2 + penalty * sum(codes)`` over codes of at least 0. For stain
    vectors of unit length at an angle of at most 90°, the solution for either stain is the smaller of its amount in the
    joint fit of both stains and its amount in a fit without the other, or 0 if that is negative.

    Args:
        density: float64 (3, n), optical densities of pixels in red, green and blue.
        stains: float64 (2, 3), stain vectors of unit length whose scalar product is not negative.
        penalty: Weight of the sum of the amounts.

    Returns:
        float64 (2, n), the amounts of both stains.
    """
    alone = np.einsum("kc,cn->kn", stains, density) - penalty
    common = float(np.einsum("c,c->", stains[0], stains[1]))
    beside = (alone - common * alone[::-1]) / max(1 - common**2, LEAST_OD)
    codes: Floats = np.maximum(np.minimum(alone, beside), 0)
    return codes


def density_table(white: float) -> Floats:
    """Return the optical densities of the grey values 0 to 255, float64 (256,); 0 counts as 1.

    Args:
        white: Grey value of the background, which has no density.
    """
    intensity = np.clip(np.arange(256) * (255 / white), 1, 255)
    return np.asarray(np.maximum(-np.log(intensity / 255), LEAST_OD))


def principal(density: Floats) -> tuple[Floats, Floats]:
    """Return the principal components of densities (3, n): descending variances (3,), and directions in rows (3, 3)."""
    centred = density - density.mean(axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(np.einsum("cn,dn->cd", centred, centred) / density.shape[1])
    return values[::-1], vectors.T[::-1]


def fit_stains(density: Floats, vectors: Callable[[Floats], Floats]) -> Floats:
    """Return two stain vectors of tissue, checked and in order.

    Args:
        density: float64 (3, n), optical densities of tissue.
        vectors: Finds them.

    Returns:
        float64 (2, 3), non-negative rows of unit length, haematoxylin first.

    Raises:
        InputError: The densities lie on one line, or the two stain vectors are nearly equal.
    """
    variances, _ = principal(density)
    if not variances[1] >= LEAST_VARIANCE:
        raise cannot_measure(
            f"the tissue has only one colour (its density varies by {variances[1]:.1e} across its main direction)"
        )
    stains = np.maximum(vectors(density), 0)
    stains /= np.sqrt(np.square(stains).sum(axis=1, keepdims=True))
    sine = float(np.sqrt(np.square(np.cross(stains[0], stains[1])).sum()))
    if not sine >= LEAST_SINE:
        raise cannot_measure(
            f"the two stains are too similar (the sine of their angle is {sine:.3f}, at least {LEAST_SINE} is needed)"
        )
    return stains if stains[0, 0] >= stains[1, 0] else stains[::-1].copy()


def stain_transfer(rgb: Pixels, source: DensityFit, target: DensityFit) -> Pixels:
    """Return an image with its stains separated, their amounts rescaled, and the target's stains in their place.

    This computes `stain_codes` in single precision as two affine maps of the densities, their minimum, and a maximum.

    Args:
        rgb: Shape (rows, cols, 3).
        source: Fit of the slide.
        target: Fit of the template.

    Returns:
        Shape (rows, cols, 3).
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
    """Return two affine maps (3, 4) from densities to amounts of stain: fitted alone, and jointly with the other stain.

    Their third row is 0, because OpenCV is only fast from three channels to three.
    """
    stains = np.array([source.haematoxylin, source.eosin])
    common = float(stains[0] @ stains[1])
    alone = np.zeros((3, 4))
    alone[:2, :3], alone[:2, 3] = stains, -CODE_PENALTY
    beside = np.zeros((3, 4))
    beside[:2] = (alone[:2] - common * alone[1::-1]) / max(1 - common**2, LEAST_OD)
    return alone.astype(np.float32), beside.astype(np.float32)


def _log_map(source: DensityFit, target: DensityFit) -> NDArray[np.float32]:
    """Return the affine map, float32 (3, 4), from amounts of stain to the logarithms of the resulting grey values."""
    painted = np.array([target.haematoxylin, target.eosin]) * (np.array(target.strengths) / source.strengths)[:, None]
    return np.column_stack([-painted.T, np.zeros(3), np.full(3, np.log(255))]).astype(np.float32)
