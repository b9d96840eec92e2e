"""Stain normalisation: the colours of a scanner and a laboratory are mapped to those of a template.

Input and output: uint8 RGB. A `StainFit` describes the colours of one slide. It is measured once on a sample of the
slide's tissue (`sample`, `fit`) and used for all blocks (`normalise`), so that neighbours are treated equally. The
target is the fit of a template. Its values are in ``conf/``; `fit_target` computes those of other templates.

Conventions: optical density (OD) is -ln(intensity / 255), and 0 for white. LAB is OpenCV's with 8 bits: L is 0 to 255,
and neutral a and b are 128. Stain vectors are OD in red, green and blue and have unit length; haematoxylin, the one
with more red OD, comes first.

The grey values of a slide are divided by its white before densities are computed, at no cost. With ``per_patch`` each
patch is fitted like a slide of its own, and its luminosity is stretched in LAB instead, as Li, Mikailov and Chen do.
Results differ by 1 to 3 grey levels where white is above 225, and by 10 in dark scans with a white near 200. Not
adopted from their system are: the time limit of one second for the dictionary, with which results depend on the
machine; grey values that wrap around; and patches that are passed on unchanged without notice.

Everything is deterministic and runs on the calling thread: OpenCV gets images as single rows, which it does not
distribute among threads, and sums are NumPy's, not those of a linear algebra library. The result for a pixel does not
depend on its position in the block.
"""

import cv2
import numpy as np

from wsiflow.errors import InputError
from wsiflow.slides.stain.fits import Pixels, cannot_measure
from wsiflow.slides.stain.method import PixelSample
from wsiflow.slides.stain.methods import METHODS
from wsiflow.slides.stain.params import NormalisedBlock, StainFit, StainParams, Target
from wsiflow.slides.stain.pixels import (
    TISSUE_L,
    lightness_of,
    one_row,
    scaled,
    standardised,
    stratified_indices,
    white_of,
)


def fit(pixels: Pixels, params: StainParams) -> StainFit:
    """Measure the colours of a slide on a sample of its pixels, or with ``per_patch`` those of a patch.

    Args:
        pixels: Shape (n, 3) or (rows, cols, 3), RGB.
        params: The settings; the target is not used.

    Raises:
        InputError: The pixels have too little tissue, fewer than two stains, or hardly any variation of colour.
    """
    if not pixels.size:
        raise cannot_measure("there are no pixels")
    image = one_row(pixels)
    if params.per_patch:
        return _fit_row(_standardised(image, params), 255.0, params)
    return _fit_row(image, white_of(image), params)


def fit_target(template: Pixels, params: StainParams) -> Target:
    """Measure the colours of a template in both ways; the result belongs under ``target`` in ``conf/stain/``.

    Its luminosity is standardised in LAB first, so that the target is that of the reference system.

    Args:
        template: Shape (rows, cols, 3), RGB.
        params: The settings; their target and ``per_patch`` are not used.

    Raises:
        InputError: As `fit`.
    """
    image = _standardised(one_row(template), params)
    ways = [_fit_row(image, 255.0, params.model_copy(update={"per_patch": way})) for way in (False, True)]
    return Target(per_slide=ways[0], per_patch=ways[1])


def normalise(rgb: Pixels, source: StainFit, target: StainFit) -> Pixels:
    """Return a block with its colours mapped from the source's fit to the target's.

    With two stains white stays white, since it has no density. Reinhard's method shifts all colours, including white.

    Args:
        rgb: Shape (rows, cols, 3).
        source: Fit of the block's slide.
        target: Fit of the template by the same method.

    Returns:
        Shape (rows, cols, 3), rounded and clipped to 0..255.

    Raises:
        InputError: The fits are of different methods.
    """
    if source.method != target.method:
        cause = f"a fit by {source.method} cannot be mapped to a target of {target.method}"
        raise InputError(cause, "fit the slide with the method of the target", stage="stain")
    return METHODS[source.method].transfer(rgb, source, target)


def normalise_patch(rgb: Pixels, params: StainParams) -> Pixels:
    """Return a patch with its colours mapped by its own fit, as in the reference system, but rounded, not truncated.

    Args:
        rgb: Shape (rows, cols, 3), a patch (448 px a side in the reference).
        params: The settings.

    Returns:
        Shape (rows, cols, 3).

    Raises:
        InputError: The colours of the patch cannot be measured.
    """
    image = _standardised(one_row(rgb), params)
    source = _fit_row(image, 255.0, params)
    return normalise(image.reshape(rgb.shape), source, params.target_fit)


def normalise_block(rgb: Pixels, source: StainFit | None, params: StainParams) -> NormalisedBlock:
    """Normalise a block according to the settings; ``on_failure`` decides about a block that cannot be normalised.

    Args:
        rgb: Shape (rows, cols, 3).
        source: Fit of the slide; None if it has none, and with ``per_patch``, which needs none.
        params: The settings.

    Returns:
        The pixels for prediction, and the reason if they are not normalised, which the caller counts.

    Raises:
        InputError: The block cannot be normalised, and ``on_failure`` is ``fail``.
    """
    if params.method == "none":
        return NormalisedBlock(rgb, "")
    try:
        return NormalisedBlock(_normalised(rgb, source, params), "")
    except InputError as error:
        if params.on_failure == "fail":
            raise
        return NormalisedBlock(rgb, error.cause)


def _normalised(rgb: Pixels, source: StainFit | None, params: StainParams) -> Pixels:
    if params.per_patch:
        return normalise_patch(rgb, params)
    if source is None:
        raise cannot_measure("the slide has no stain fit")
    return normalise(rgb, source, params.target_fit)


def _standardised(image: Pixels, params: StainParams) -> Pixels:
    return standardised(image, brighten=METHODS[params.method].brightens)


def _fit_row(image: Pixels, white: float, params: StainParams) -> StainFit:
    """Measure the colours of an image of one row (1, n, 3) whose white has this grey value."""
    is_tissue = lightness_of(np.asarray(cv2.LUT(image, scaled(255 / white)), np.uint8)) < TISSUE_L
    if np.count_nonzero(is_tissue) < params.min_tissue_px:
        found = f"{np.count_nonzero(is_tissue)} of {is_tissue.size} pixels are tissue"
        raise cannot_measure(f"{found}, at least {params.min_tissue_px} are needed")
    # The reference measures over all pixels of a patch. In a slide, the glass around the tissue would bias the result.
    measured = image[0] if params.per_patch else image[is_tissue]
    tissue = image[is_tissue]
    tissue = tissue[stratified_indices(len(tissue), params.sample_px)]
    fit: StainFit = METHODS[params.method].measure(PixelSample(tissue, measured, white), params)
    return fit
