"""Pixels prepared for measuring colours: brightness, white, tissue, samples and strips."""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from wsiflow.slides.stain.params import Pixels, StainParams, cannot_measure

WHITE_PERCENTILE = 95.0  # of L: what counts as white
BRIGHT_PERCENTILE = 90.0  # of all channels: white once more, for Reinhard and Macenko patch by patch
TISSUE_L = 204  # 0.8 of 255; tissue is darker
SAMPLE_SEED = 0
STRIP_PX = 32_768  # intermediate floats of a strip stay in the cache
SPARE_PX = 64  # OpenCV rounds the last few pixels of an array otherwise; these are never the image's


def stratified_indices(total: int, count: int) -> NDArray[np.intp]:
    """Choose ``count`` of ``total`` things, one at random from each of ``count`` equal runs; all, if there are fewer.

    The same numbers give the same choice on every machine.

    Returns:
        Rising indices.
    """
    if total <= count:
        return np.arange(total)
    within = (np.random.PCG64(SAMPLE_SEED).random_raw(count) >> np.uint64(11)) * 2.0**-53
    edges = np.arange(count + 1) * total // count
    return edges[:-1] + (within * np.diff(edges)).astype(np.intp)


def sample(tiles: Pixels, tissue: NDArray[np.bool_] | None, params: StainParams) -> Pixels:
    """Draw the pixels of a slide that its fit is made of.

    Light pixels inside the tissue are drawn as well, for they tell what white is; `fit` leaves them out of the stains.

    Args:
        tiles: Shape (n, rows, cols, 3), RGB, tissue tiles that `stratified_indices` chose from the whole slide.
        tissue: Shape (n, rows, cols), which pixels may be drawn; None for all.
        params: The settings, of which ``sample_px`` is used.

    Returns:
        Shape (m, 3), m at most ``sample_px``.
    """
    flat = tiles.reshape(-1, 3)
    if tissue is None:
        return flat[stratified_indices(len(flat), params.sample_px)]
    candidates = np.flatnonzero(tissue)
    return flat[candidates[stratified_indices(len(candidates), params.sample_px)]]


def one_row(pixels: Pixels) -> Pixels:
    """View pixels as an image of one row, which OpenCV does not share out among threads."""
    return np.ascontiguousarray(pixels).reshape(1, -1, 3)


def lightness_of(image: Pixels) -> Pixels:
    """Return L of CIELAB, uint8 (rows, cols)."""
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2LAB)[..., 0], np.uint8)


def white_lightness(image: Pixels) -> float:
    """Return the L that counts as white.

    Raises:
        InputError: The image is black.
    """
    lightness = float(np.percentile(lightness_of(image), WHITE_PERCENTILE))
    if lightness < 1:
        raise cannot_measure("the pixels are black")
    return lightness


def white_of(image: Pixels) -> float:
    """Return the grey value that counts as white, at least 1."""
    greys = np.arange(256, dtype=np.uint8)
    by_lightness = lightness_of(np.repeat(greys[None, :, None], 3, axis=2))[0]
    return max(1.0, float(np.interp(white_lightness(image), by_lightness, greys)))


def scaled(factor: float) -> Pixels:
    """Return the table of grey values times a factor, rounded and clipped."""
    return np.asarray(np.rint(np.clip(np.arange(256) * factor, 0, 255)), np.uint8)


def standardised(image: Pixels, method: str) -> Pixels:
    """Standardise the luminosity of a patch as the reference does."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.LUT(lab[..., 0], scaled(255 / white_lightness(image)))
    light = np.asarray(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), np.uint8)
    if method == "vahadane":
        return light
    return np.asarray(cv2.LUT(light, scaled(255 / max(1.0, float(np.percentile(light, BRIGHT_PERCENTILE))))), np.uint8)


def in_strips(rgb: Pixels, transform: Callable[[Pixels, Pixels], None]) -> Pixels:
    """Apply a function of (pixels in, pixels out), each of shape (1, n, 3), to an image."""
    image = one_row(rgb)
    out = np.empty_like(image)
    for start in range(0, image.shape[1], STRIP_PX):
        transform(image[:, start : start + STRIP_PX], out[:, start : start + STRIP_PX])
    return out.reshape(rgb.shape)
