"""The settings of stain normalisation, and the measured colours of a slide."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from wsiflow.errors import InputError

LEAST_OD = 1e-6

# Colours below one of these bounds are not two stains: sine of the angle between the stains, density of the darkest
# percent of pixels, variance of the optical density across its main direction, and standard deviation in LAB.
LEAST_SINE, LEAST_STRENGTH, LEAST_VARIANCE, LEAST_LAB_STD = 0.05, 0.05, 1e-5, 0.5
Floats: TypeAlias = NDArray[np.float64]
Pixels: TypeAlias = NDArray[np.uint8]
Density = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Grey = Annotated[float, Field(ge=0, le=255, allow_inf_nan=False)]
Spread = Annotated[float, Field(ge=LEAST_LAB_STD, le=255, allow_inf_nan=False)]
Strength = Annotated[float, Field(ge=LEAST_STRENGTH, le=100, allow_inf_nan=False)]


@dataclass(frozen=True)
class LabFit:
    """The colours of a slide for Reinhard's method: mean and standard deviation of L, a and b, 0 to 255."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    method: Literal["reinhard"]
    mean: tuple[Grey, Grey, Grey]
    std: tuple[Spread, Spread, Spread]


@dataclass(frozen=True)
class DensityFit:
    """The colours of a slide as two stains on a white background; the vectors are optical densities in R, G, B."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    method: Literal["macenko", "vahadane"]
    white: Annotated[float, Field(ge=1, le=255, allow_inf_nan=False)]
    """Grey value of the background, which is scaled to 255 before densities are computed."""
    haematoxylin: tuple[Density, Density, Density]
    eosin: tuple[Density, Density, Density]
    strengths: tuple[Strength, Strength]
    """99th percentiles of the amounts of haematoxylin and eosin."""


StainFit: TypeAlias = Annotated[LabFit | DensityFit, Field(discriminator="method")]


class Target(BaseModel, frozen=True, extra="forbid"):
    """The colours of the template, measured in the same two ways as those of slides.

    Attributes:
        per_slide: The fit over the template's tissue, the target where slides are fitted once.
        per_patch: The fit over the whole template, the target where every patch is fitted by itself.
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
            target = " and ".join(sorted(methods))
            raise ValueError(
                f"target is of method {target}, but method is {self.method}; choose both with stain={self.method}"
            )
        return self

    @property
    def target_fit(self) -> StainFit:
        """The target for the chosen mode, per slide or per patch."""
        if self.target is None:
            raise InputError("stain.method is none, which has no target", "choose another method")
        return self.target.per_patch if self.per_patch else self.target.per_slide


class NormalisedBlock(NamedTuple):
    """The result of normalising a block."""

    rgb: Pixels
    """Shape (rows, cols, 3)."""
    failure: str
    """The reason why the colours were not normalised; empty if they were."""


def read_fit(values: Mapping[str, object]) -> StainFit:
    """Return a fit from its values by name, as written by ``dataclasses.asdict`` and read from JSON.

    Raises:
        InputError: A value is missing, unknown or out of bounds.
    """
    try:
        return FIT.validate_python(dict(values))
    except ValidationError as error:
        problem = error.errors()[0]
        cause = f"the stain fit is invalid: {'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        raise InputError(cause, "fit the slide again", stage="stain") from error


FIT: TypeAdapter[StainFit] = TypeAdapter(StainFit)


def cannot_measure(cause: str) -> InputError:
    """Return the error of colours that cannot be measured."""
    return InputError(
        cause, "check that the slide is stained, or set stain.on_failure=raw in another out= folder", stage="stain"
    )
