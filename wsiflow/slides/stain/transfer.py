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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from wsiflow.errors import InputError

WHITE_PERCENTILE = 95.0  # of L: what counts as white
BRIGHT_PERCENTILE = 90.0  # of all channels: white once more, for Reinhard and Macenko patch by patch
TISSUE_L = 204  # 0.8 of 255; tissue is darker
STRENGTH_PERCENTILE = 99.0
LEAST_OD = 1e-6
DICTIONARY_PENALTY = 0.1
CODE_PENALTY = 0.01
MACENKO_LEAST_OD = 0.15  # in any channel; paler pixels say little about direction
MACENKO_PERCENTILES = (1.0, 99.0)
# Where the search for a dictionary begins: usual H and E, so that the same order and minimum are found everywhere.
FIRST_GUESS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11))
# Less than this is no pair of stains: their sine of angle, density of the darkest percent, variance of OD across the
# main direction, and standard deviation in steps of LAB.
LEAST_SINE, LEAST_STRENGTH, LEAST_VARIANCE, LEAST_LAB_STD = 0.05, 0.05, 1e-5, 0.5

SAMPLE_SEED = 0
STRIP_PX = 32_768  # intermediate floats of a strip stay in the cache
SPARE_PX = 64  # OpenCV rounds the last few pixels of an array otherwise; these are never the image's

Floats: TypeAlias = NDArray[np.float64]
Pixels: TypeAlias = NDArray[np.uint8]
Density = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Grey = Annotated[float, Field(ge=0, le=255, allow_inf_nan=False)]
Spread = Annotated[float, Field(ge=LEAST_LAB_STD, le=255, allow_inf_nan=False)]
Strength = Annotated[float, Field(ge=LEAST_STRENGTH, le=100, allow_inf_nan=False)]


@dataclass(frozen=True)
class LabFit:
    """The colours of a slide by Reinhard: mean and standard deviation of L, a and b."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    method: Literal["reinhard"]
    mean: tuple[Grey, Grey, Grey]
    std: tuple[Spread, Spread, Spread]


@dataclass(frozen=True)
class DensityFit:
    """The colours of a slide as two stains on a white ground."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    method: Literal["macenko", "vahadane"]
    white: Annotated[float, Field(ge=1, le=255, allow_inf_nan=False)]
    """Grey value that becomes 255 before densities are taken."""
    haematoxylin: tuple[Density, Density, Density]
    eosin: tuple[Density, Density, Density]
    strengths: tuple[Strength, Strength]
    """99th percentile of the amount of either stain."""


StainFit: TypeAlias = Annotated[LabFit | DensityFit, Field(discriminator="method")]


class Target(BaseModel, frozen=True, extra="forbid"):
    """The template's fit, measured both ways, for either is compared with its like only.

    Attributes:
        per_slide: Strengths, means and deviations over the template's tissue.
        per_patch: The same over all of the template.
    """

    per_slide: StainFit
    per_patch: StainFit


class StainParams(BaseModel, frozen=True, extra="forbid"):
    """How colours are normalised before prediction.

    Attributes:
        method: ``none`` leaves the scanner's colours; ``reinhard`` matches mean and spread in LAB; ``macenko`` and
            ``vahadane`` exchange the two stains and match their strengths.
        per_patch: Fit every patch by itself, as the reference does, instead of the slide once.
        on_failure: What becomes of a slide or patch without a usable fit: ``fail`` ends its task, ``raw`` leaves its
            colours as they are, and the run counts and lists it.
        sample_tiles: Tiles of a slide that are read for its fit.
        sample_px: Pixels of a slide, or of a patch, that its stains are searched in.
        min_tissue_px: Least number of tissue pixels among them.
        iterations: Steps of Vahadane's dictionary search.
        target: The template's colours; None with ``none``.
    """

    method: Literal["none", "reinhard", "macenko", "vahadane"]
    per_patch: bool
    on_failure: Literal["fail", "raw"]
    sample_tiles: int = Field(ge=1, le=10_000)
    sample_px: int = Field(ge=100, le=10_000_000)
    min_tissue_px: int = Field(ge=3)
    iterations: int = Field(ge=1, le=10_000)
    target: Target | None

    @model_validator(mode="after")
    def _target_is_of_the_method(self) -> "StainParams":
        methods = {self.target.per_slide.method, self.target.per_patch.method} if self.target else {"none"}
        if methods != {self.method}:
            found = " and ".join(sorted(methods))
            raise ValueError(
                f"target is of method {found}, method is {self.method}; choose both with stain={self.method}"
            )
        return self

    @property
    def target_fit(self) -> StainFit:
        """The target of this mode."""
        if self.target is None:
            raise InputError("stain.method is none, it has no target", "choose another method")
        return self.target.per_patch if self.per_patch else self.target.per_slide


class Outcome(NamedTuple):
    """What became of a block."""

    rgb: Pixels
    """Shape (rows, cols, 3)."""
    failure: str
    """Why its colours were not normalised; empty where they were."""


def spread(total: int, count: int) -> NDArray[np.intp]:
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
        tiles: Shape (n, rows, cols, 3), RGB, tiles of tissue from all over the slide (`spread` chooses them).
        tissue: Shape (n, rows, cols), which pixels may be drawn; None for all.
        params: The settings, of which ``sample_px`` is used.

    Returns:
        Shape (m, 3), m at most ``sample_px``.
    """
    flat = tiles.reshape(-1, 3)
    if tissue is None:
        return flat[spread(len(flat), params.sample_px)]
    candidates = np.flatnonzero(tissue)
    return flat[candidates[spread(len(candidates), params.sample_px)]]


def fit(pixels: Pixels, params: StainParams) -> StainFit:
    """Measure the colours of a slide on a sample of it, or with ``per_patch`` those of a patch.

    Args:
        pixels: Shape (n, 3) or (rows, cols, 3), RGB.
        params: The settings; the target is not used.

    Raises:
        InputError: There is too little tissue, or no two stains, or hardly any variation of colour.
    """
    if not pixels.size:
        raise _failed("there are no pixels")
    image = _one_row(pixels)
    if params.per_patch:
        return _fit_prepared(_prepared(image, params.method), 255.0, params)
    return _fit_prepared(image, _white(image), params)


def fit_target(template: Pixels, params: StainParams) -> Target:
    """Measure a template's colours in both ways; the result belongs under ``target`` in ``conf/stain/``.

    Its luminosity is standardised in LAB first, so that slides are mapped on what the reference maps patches on.

    Args:
        template: Shape (rows, cols, 3), RGB.
        params: The settings; their target and ``per_patch`` are not used.

    Raises:
        InputError: As `fit`.
    """
    image = _prepared(_one_row(template), params.method)
    ways = [_fit_prepared(image, 255.0, params.model_copy(update={"per_patch": way})) for way in (False, True)]
    return Target(per_slide=ways[0], per_patch=ways[1])


def read_fit(values: Mapping[str, object]) -> StainFit:
    """Rebuild a fit from what ``dataclasses.asdict`` and JSON made of it.

    Raises:
        InputError: A value is missing, unknown or out of bounds.
    """
    try:
        return _ADAPTER.validate_python(dict(values))
    except ValidationError as error:
        problem = error.errors()[0]
        cause = f"not a stain fit: {'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        raise InputError(cause, "fit the slide again", stage="stain") from error


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
        return _lab_transfer(rgb, source, target)
    assert isinstance(source, DensityFit)
    assert isinstance(target, DensityFit)
    return _stain_transfer(rgb, source, target)


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
    image = _prepared(_one_row(rgb), params.method)
    source = _fit_prepared(image, 255.0, params)
    return normalise(image.reshape(rgb.shape), source, params.target_fit)


def normalise_block(rgb: Pixels, source: StainFit | None, params: StainParams) -> Outcome:
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
        return Outcome(rgb, "")
    try:
        return Outcome(_normalised(rgb, source, params), "")
    except InputError as error:
        if params.on_failure == "fail":
            raise
        return Outcome(rgb, error.cause)


def _normalised(rgb: Pixels, source: StainFit | None, params: StainParams) -> Pixels:
    if params.per_patch:
        return normalise_patch(rgb, params)
    if source is None:
        raise _failed("the slide has no stain fit")
    return normalise(rgb, source, params.target_fit)


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


_ADAPTER: TypeAdapter[StainFit] = TypeAdapter(StainFit)


def _failed(cause: str) -> InputError:
    return InputError(
        cause, "see whether the slide is stained, or set stain.on_failure=raw in another out= folder", stage="stain"
    )


def _one_row(pixels: Pixels) -> Pixels:
    """View pixels as an image of one row, which OpenCV does not share out among threads."""
    return np.ascontiguousarray(pixels).reshape(1, -1, 3)


def _lightness(image: Pixels) -> Pixels:
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2LAB)[..., 0], np.uint8)


def _white_lightness(image: Pixels) -> float:
    """Return the L that counts as white.

    Raises:
        InputError: The image is black.
    """
    lightness = float(np.percentile(_lightness(image), WHITE_PERCENTILE))
    if lightness < 1:
        raise _failed("the pixels are black")
    return lightness


def _white(image: Pixels) -> float:
    """Return the grey value that counts as white, at least 1."""
    greys = np.arange(256, dtype=np.uint8)
    by_lightness = _lightness(np.repeat(greys[None, :, None], 3, axis=2))[0]
    return max(1.0, float(np.interp(_white_lightness(image), by_lightness, greys)))


def _scaled(factor: float) -> Pixels:
    """Return the table of grey values times a factor, rounded and clipped."""
    return np.asarray(np.rint(np.clip(np.arange(256) * factor, 0, 255)), np.uint8)


def _prepared(image: Pixels, method: str) -> Pixels:
    """Standardise the luminosity of a patch as the reference does."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.LUT(lab[..., 0], _scaled(255 / _white_lightness(image)))
    light = np.asarray(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), np.uint8)
    if method == "vahadane":
        return light
    return np.asarray(cv2.LUT(light, _scaled(255 / max(1.0, float(np.percentile(light, BRIGHT_PERCENTILE))))), np.uint8)


def _fit_prepared(image: Pixels, white: float, params: StainParams) -> StainFit:
    """Fit an image of one row whose white is known."""
    is_tissue = _lightness(np.asarray(cv2.LUT(image, _scaled(255 / white)), np.uint8)) < TISSUE_L
    if np.count_nonzero(is_tissue) < params.min_tissue_px:
        cause = (
            f"{np.count_nonzero(is_tissue)} of {is_tissue.size} pixels are tissue, {params.min_tissue_px} are needed"
        )
        raise _failed(cause)
    # The reference measures over everything; glass between tissue would make a slide's numbers those of its outline.
    measured = image[0] if params.per_patch else image[is_tissue]
    if params.method == "reinhard":
        return _fit_lab(measured)
    table = _density_table(white)
    tissue = image[is_tissue]
    tissue = tissue[spread(len(tissue), params.sample_px)]
    stains = _fit_stains(table[tissue.T], params)
    strengths = np.percentile(stain_codes(table[measured.T], stains, CODE_PENALTY), STRENGTH_PERCENTILE, axis=1)
    if strengths.min() < LEAST_STRENGTH:
        raise _failed(f"only one stain is found (densities {strengths[0]:.3f} and {strengths[1]:.3f})")
    return _ADAPTER.validate_python(
        {
            "method": params.method,
            "white": white,
            "haematoxylin": stains[0].tolist(),
            "eosin": stains[1].tolist(),
            "strengths": strengths.tolist(),
        }
    )


def _fit_lab(pixels: Pixels) -> LabFit:
    """Return mean and standard deviation of pixels of shape (n, 3) in LAB."""
    lab = cv2.cvtColor(pixels.reshape(1, -1, 3), cv2.COLOR_RGB2LAB)[0]
    mean, std = lab.mean(axis=0).tolist(), lab.std(axis=0).tolist()
    if min(std) < LEAST_LAB_STD:
        raise _failed(f"the tissue is of one colour (standard deviations in LAB {', '.join(f'{s:.2f}' for s in std)})")
    return LabFit("reinhard", (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


def _density_table(white: float) -> Floats:
    """Return the optical density of the 256 grey values; 0 counts as 1."""
    intensity = np.clip(np.arange(256) * (255 / white), 1, 255)
    return np.asarray(np.maximum(-np.log(intensity / 255), LEAST_OD))


def _fit_stains(density: Floats, params: StainParams) -> Floats:
    """Find two stains.

    Args:
        density: Shape (3, n), of tissue.
        params: The settings.

    Returns:
        Shape (2, 3), unit rows, not negative, haematoxylin first.

    Raises:
        InputError: The densities lie on one line, or the stains are alike.
    """
    variances, _ = _principal(density)
    if not variances[1] >= LEAST_VARIANCE:
        raise _failed(f"the tissue is of one colour (variance of density {variances[1]:.1e} across its main direction)")
    stains = _macenko(density) if params.method == "macenko" else _dictionary(density, params.iterations)
    stains = np.maximum(stains, 0)
    stains /= np.sqrt(np.square(stains).sum(axis=1, keepdims=True))
    sine = float(np.sqrt(np.square(np.cross(stains[0], stains[1])).sum()))
    if not sine >= LEAST_SINE:
        raise _failed(f"the two stains are alike (sine of their angle {sine:.3f}, at least {LEAST_SINE} is needed)")
    return stains if stains[0, 0] >= stains[1, 0] else stains[::-1].copy()


def _principal(density: Floats) -> tuple[Floats, Floats]:
    """Return variances, the larger first, and directions, shape (3, 3) in rows, of densities of shape (3, n)."""
    centred = density - density.mean(axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(np.einsum("cn,dn->cd", centred, centred) / density.shape[1])
    return values[::-1], vectors.T[::-1]


def _macenko(density: Floats) -> Floats:
    """Return the outer two directions of the densities in the plane of their largest variance; shape (2, 3)."""
    dense = density[:, (density > MACENKO_LEAST_OD).any(axis=0)]
    _, axes = _principal(dense)
    plane = axes[:2] * np.where(axes[:2, :1] < 0, -1.0, 1.0)
    along, across = np.einsum("kc,cn->kn", plane, dense)
    angles = np.percentile(np.arctan2(across, along), MACENKO_PERCENTILES)
    turned: Floats = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.asarray(np.einsum("ik,kc->ic", turned, plane))


def _dictionary(density: Floats, iterations: int) -> Floats:
    """Learn two non-negative vectors from which the densities are sparse sums.

    Minimises ``|density - codes @ stains|² / 2 + DICTIONARY_PENALTY * sum(codes)`` over codes and over unit
    vectors, by turns: the codes in closed form, then each vector (Mairal et al., ICML 2009, algorithm 2).

    Args:
        density: Shape (3, n).
        iterations: Turns.

    Returns:
        Shape (2, 3).
    """
    stains = np.array(FIRST_GUESS)
    stains /= np.sqrt(np.square(stains).sum(axis=1, keepdims=True))
    for _ in range(iterations):
        codes = stain_codes(density, stains, DICTIONARY_PENALTY)
        products = np.einsum("kn,ln->kl", codes, codes)
        targets = np.einsum("kn,cn->kc", codes, density)
        for k in (0, 1):
            if products[k, k] > 0:
                moved = np.maximum(stains[k] + (targets[k] - products[k] @ stains) / products[k, k], 0)
                stains[k] = moved / max(float(np.sqrt(np.square(moved).sum())), LEAST_OD)
    return stains


def _in_strips(rgb: Pixels, transform: Callable[[Pixels, Pixels], None]) -> Pixels:
    """Apply a function of (pixels in, pixels out), each of shape (1, n, 3), to an image."""
    image = _one_row(rgb)
    out = np.empty_like(image)
    for start in range(0, image.shape[1], STRIP_PX):
        transform(image[:, start : start + STRIP_PX], out[:, start : start + STRIP_PX])
    return out.reshape(rgb.shape)


def _lab_transfer(rgb: Pixels, source: LabFit, target: LabFit) -> Pixels:
    """Shift and stretch each channel of LAB."""
    values = np.arange(256)[:, None]
    moved = (values - np.array(source.mean)) * (np.array(target.std) / source.std) + target.mean
    table = np.rint(np.clip(moved, 0, 255)).astype(np.uint8)[None]

    def transform(pixels: Pixels, out: Pixels) -> None:
        lab = cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB)
        cv2.LUT(lab, table, lab)
        cv2.cvtColor(lab, cv2.COLOR_LAB2RGB, out)

    return _in_strips(rgb, transform)


def _stain_transfer(rgb: Pixels, source: DensityFit, target: DensityFit) -> Pixels:
    """Split into stains, rescale their amounts, and paint with the target's stains.

    `stain_codes` written as two affine maps of the densities, their minimum and a maximum, in single precision.
    """
    table = _density_table(source.white).astype(np.float32)
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

    return _in_strips(rgb, transform)


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
