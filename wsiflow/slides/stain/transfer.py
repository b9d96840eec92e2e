"""Stain: the colours of a scanner and a laboratory are mapped on those of a template.

Input and output: uint8 RGB. A `StainFit` describes the colours of one slide; it is measured once on a sample of the
slide's tissue (`sample`, `fit`) and used for every block (`normalise`), so that neighbours are treated alike. The
target, the fit of a template, comes as numbers from ``conf/`` (`fit_target` makes others).

Conventions: optical density (OD) is -ln(intensity / 255), white is 0. LAB is OpenCV's with 8 bits, L from 0 to 255 and
neutral a and b at 128. Stain vectors are OD in red, green and blue, of unit length, haematoxylin first, the one with
more red OD.

A slide's grey values are divided by its white before densities are taken, as light is by glass: it costs nothing.
With ``per_patch`` each patch is its own slide and its luminosity is stretched in LAB instead, as Li, Mikailov and Chen
do. The two differ by 1 to 3 grey levels where white is above 225, by 10 on dark scans with a white near 200.
What is left out of theirs: the dictionary's limit of one second, which makes the result depend on the machine, grey
values that wrap around, and patches passed on unchanged without a word.

Everything is deterministic and runs on the calling thread: images are handed to OpenCV as single rows, which it does
not share out, and sums are NumPy's, not those of a linear algebra library. A pixel's result does not depend on where it
lies in its block.
"""

import cv2
import numpy as np

from wsiflow.errors import InputError
from wsiflow.slides.stain.density import (
    CODE_PENALTY,
    STRENGTH_PERCENTILE,
    density_table,
    principal,
    stain_codes,
    stain_transfer,
)
from wsiflow.slides.stain.macenko import macenko_vectors
from wsiflow.slides.stain.params import (
    FIT,
    LEAST_SINE,
    LEAST_STRENGTH,
    LEAST_VARIANCE,
    DensityFit,
    Floats,
    LabFit,
    NormalisedBlock,
    Pixels,
    StainFit,
    StainParams,
    Target,
    cannot_measure,
)
from wsiflow.slides.stain.pixels import (
    TISSUE_L,
    lightness_of,
    one_row,
    scaled,
    standardised,
    stratified_indices,
    white_of,
)
from wsiflow.slides.stain.reinhard import fit_lab, lab_transfer
from wsiflow.slides.stain.vahadane import vahadane_vectors


def fit(pixels: Pixels, params: StainParams) -> StainFit:
    """Measure the colours of a slide on a sample of it, or with ``per_patch`` those of a patch.

    Args:
        pixels: Shape (n, 3) or (rows, cols, 3), RGB.
        params: The settings; the target is not used.

    Raises:
        InputError: There is too little tissue, or no two stains, or hardly any variation of colour.
    """
    if not pixels.size:
        raise cannot_measure("there are no pixels")
    image = one_row(pixels)
    if params.per_patch:
        return _fit_row(standardised(image, params.method), 255.0, params)
    return _fit_row(image, white_of(image), params)


def fit_target(template: Pixels, params: StainParams) -> Target:
    """Measure a template's colours in both ways; the result belongs under ``target`` in ``conf/stain/``.

    Its luminosity is standardised in LAB first, so that slides are mapped on what the reference maps patches on.

    Args:
        template: Shape (rows, cols, 3), RGB.
        params: The settings; their target and ``per_patch`` are not used.

    Raises:
        InputError: As `fit`.
    """
    image = standardised(one_row(template), params.method)
    ways = [_fit_row(image, 255.0, params.model_copy(update={"per_patch": way})) for way in (False, True)]
    return Target(per_slide=ways[0], per_patch=ways[1])


def normalise(rgb: Pixels, source: StainFit, target: StainFit) -> Pixels:
    """Give a block the colours of the target.

    White stays white with two stains: no density, no stain. Reinhard shifts all colours alike, white included.

    Args:
        rgb: Shape (rows, cols, 3), any pixels.
        source: The fit of the block's slide.
        target: The fit of the template, of the same method.

    Returns:
        Shape (rows, cols, 3), rounded and clipped to 0..255.

    Raises:
        InputError: The fits are of different methods.
    """
    if source.method != target.method:
        cause = f"a fit of {source.method} cannot be mapped on a target of {target.method}"
        raise InputError(cause, "fit the slide with the method of the target", stage="stain")
    if isinstance(source, LabFit) and isinstance(target, LabFit):
        return lab_transfer(rgb, source, target)
    assert isinstance(source, DensityFit)
    assert isinstance(target, DensityFit)
    return stain_transfer(rgb, source, target)


def normalise_patch(rgb: Pixels, params: StainParams) -> Pixels:
    """Give a patch the colours of the target by its own fit, as the reference does, but rounded where that truncates.

    Args:
        rgb: Shape (rows, cols, 3), what the reference calls a patch (448 px).
        params: The settings.

    Returns:
        Shape (rows, cols, 3).

    Raises:
        InputError: The patch has no fit.
    """
    image = standardised(one_row(rgb), params.method)
    source = _fit_row(image, 255.0, params)
    return normalise(image.reshape(rgb.shape), source, params.target_fit)


def normalise_block(rgb: Pixels, source: StainFit | None, params: StainParams) -> NormalisedBlock:
    """Normalise a block as the settings say, and what cannot be normalised as their policy says.

    Args:
        rgb: Shape (rows, cols, 3).
        source: The fit of the slide; None where it has none, and with ``per_patch``, where none is needed.
        params: The settings.

    Returns:
        The pixels to predict on, and the reason where they are not normalised: the caller counts these.

    Raises:
        InputError: There is no fit and the policy is ``fail``.
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


def _fit_row(image: Pixels, white: float, params: StainParams) -> StainFit:
    """Fit an image of one row whose white is known."""
    is_tissue = lightness_of(np.asarray(cv2.LUT(image, scaled(255 / white)), np.uint8)) < TISSUE_L
    if np.count_nonzero(is_tissue) < params.min_tissue_px:
        cause = (
            f"{np.count_nonzero(is_tissue)} of {is_tissue.size} pixels are tissue, {params.min_tissue_px} are needed"
        )
        raise cannot_measure(cause)
    # The reference measures over everything; glass between tissue would make a slide's numbers those of its outline.
    measured = image[0] if params.per_patch else image[is_tissue]
    if params.method == "reinhard":
        return fit_lab(measured)
    table = density_table(white)
    tissue = image[is_tissue]
    tissue = tissue[stratified_indices(len(tissue), params.sample_px)]
    stains = fit_stains(table[tissue.T], params)
    strengths = np.percentile(stain_codes(table[measured.T], stains, CODE_PENALTY), STRENGTH_PERCENTILE, axis=1)
    if strengths.min() < LEAST_STRENGTH:
        raise cannot_measure(f"only one stain is found (densities {strengths[0]:.3f} and {strengths[1]:.3f})")
    return FIT.validate_python(
        {
            "method": params.method,
            "white": white,
            "haematoxylin": stains[0].tolist(),
            "eosin": stains[1].tolist(),
            "strengths": strengths.tolist(),
        }
    )


def fit_stains(density: Floats, params: StainParams) -> Floats:
    """Find two stains.

    Args:
        density: Shape (3, n), of tissue.
        params: The settings.

    Returns:
        Shape (2, 3), unit rows, not negative, haematoxylin first.

    Raises:
        InputError: The densities lie on one line, or the stains are alike.
    """
    variances, _ = principal(density)
    if not variances[1] >= LEAST_VARIANCE:
        raise cannot_measure(
            f"the tissue is of one colour (variance of density {variances[1]:.1e} across its main direction)"
        )
    stains = macenko_vectors(density) if params.method == "macenko" else vahadane_vectors(density, params.iterations)
    stains = np.maximum(stains, 0)
    stains /= np.sqrt(np.square(stains).sum(axis=1, keepdims=True))
    sine = float(np.sqrt(np.square(np.cross(stains[0], stains[1])).sum()))
    if not sine >= LEAST_SINE:
        raise cannot_measure(
            f"the two stains are alike (sine of their angle {sine:.3f}, at least {LEAST_SINE} is needed)"
        )
    return stains if stains[0, 0] >= stains[1, 0] else stains[::-1].copy()
