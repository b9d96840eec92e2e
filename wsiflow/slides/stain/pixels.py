"""Preparation of pixels for the measurement of colours: brightness, white, samples and strips."""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from wsiflow.slides.stain.params import Pixels, StainParams, cannot_measure

WHITE_PERCENTILE = 95.0  # this percentile of L is white
BRIGHT_PERCENTILE = 90.0  # this percentile of all channels becomes white too, for Reinhard and Macenko per patch
TISSUE_L = 204  # 0.8 of 255; tissue is darker
SAMPLE_SEED = 0
STRIP_PX = 32_768  # the intermediate floats of a strip of this length fit in the CPU cache
SPARE_PX = 64  # OpenCV rounds the last few pixels of an array differently, so the image's are followed by spare ones


def stratified_indices(total: int, count: int) -> NDArray[np.intp]:
    """Return a stratified random sample of indices: one from each of ``count`` equal ranges of ``total`` indices.

    The sample is the same on every machine.

    Args:
        total: Number of indices to choose from.
        count: Size of the sample; where ``total`` is not larger, all indices are returned.

    Returns:
        intp (min(total, count),), in ascending order.
    """
    if total <= count:
        return np.arange(total)
    within = (np.random.PCG64(SAMPLE_SEED).random_raw(count) >> np.uint64(11)) * 2.0**-53
    edges = np.arange(count + 1) * total // count
    return edges[:-1] + (within * np.diff(edges)).astype(np.intp)


def sample(tiles: Pixels, tissue: NDArray[np.bool_] | None, params: StainParams) -> Pixels:
    """Return a sample of a slide's pixels, from which its colours are measured.

    The sample includes bright pixels inside the tissue, which determine white. `transfer.fit` excludes them from the
    measurement of the stains.

    Args:
        tiles: Shape (n, rows, cols, 3), RGB, tissue tiles that `stratified_indices` chose from the whole slide.
        tissue: bool (n, rows, cols), the pixels that may be sampled; None for all.
        params: The settings, of which ``sample_px`` is used.

    Returns:
        Shape (m, 3), where m is at most ``sample_px``.
    """
    flat = tiles.reshape(-1, 3)
    if tissue is None:
        return flat[stratified_indices(len(flat), params.sample_px)]
    candidates = np.flatnonzero(tissue)
    return flat[candidates[stratified_indices(len(candidates), params.sample_px)]]


def one_row(pixels: Pixels) -> Pixels:
    """Return pixels as an image of one row (1, n, 3), which OpenCV does not distribute among threads."""
    return np.ascontiguousarray(pixels).reshape(1, -1, 3)


def lightness_of(image: Pixels) -> Pixels:
    """Return the lightness L of CIELAB of an image (rows, cols, 3): uint8 (rows, cols), 0 to 255."""
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2LAB)[..., 0], np.uint8)


def white_lightness(image: Pixels) -> float:
    """Return the lightness L, 0 to 255, that counts as white in an image.

    Raises:
        InputError: The image is black.
    """
    lightness = float(np.percentile(lightness_of(image), WHITE_PERCENTILE))
    if lightness < 1:
        raise cannot_measure("the pixels are black")
    return lightness


def white_of(image: Pixels) -> float:
    """Return the grey value, 1 to 255, that counts as white in an image."""
    greys = np.arange(256, dtype=np.uint8)
    by_lightness = lightness_of(np.repeat(greys[None, :, None], 3, axis=2))[0]
    return max(1.0, float(np.interp(white_lightness(image), by_lightness, greys)))


def scaled(factor: float) -> Pixels:
    """Return a lookup table (256,) that multiplies grey values by a factor, rounds them and clips them to 0 to 255."""
    return np.asarray(np.rint(np.clip(np.arange(256) * factor, 0, 255)), np.uint8)


def standardised(image: Pixels, method: str) -> Pixels:
    """Return a patch with its luminosity standardised as in the reference system; the result depends on the method."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.LUT(lab[..., 0], scaled(255 / white_lightness(image)))
    light = np.asarray(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), np.uint8)
    if method == "vahadane":
        return light
    return np.asarray(cv2.LUT(light, scaled(255 / max(1.0, float(np.percentile(light, BRIGHT_PERCENTILE))))), np.uint8)


def in_strips(rgb: Pixels, transform: Callable[[Pixels, Pixels], None]) -> Pixels:
    """Return an image transformed strip by strip by a function of input and output pixels, each of shape (1, n, 3)."""
    image = one_row(rgb)
    out = np.empty_like(image)
    for start in range(0, image.shape[1], STRIP_PX):
        transform(image[:, start : start + STRIP_PX], out[:, start : start + STRIP_PX])
    return out.reshape(rgb.shape)
