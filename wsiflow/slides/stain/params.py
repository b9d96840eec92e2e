"""How colours are normalised, and what is known of those of a slide."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from wsiflow.errors import InputError

LEAST_OD = 1e-6

# Less than this is no pair of stains: their sine of angle, density of the darkest percent, variance of OD across the
# main direction, and standard deviation in steps of LAB.
LEAST_SINE, LEAST_STRENGTH, LEAST_VARIANCE, LEAST_LAB_STD = 0.05, 0.05, 1e-5, 0.5
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


class NormalisedBlock(NamedTuple):
    """What became of a block."""

    rgb: Pixels
    """Shape (rows, cols, 3)."""
    failure: str
    """Why its colours were not normalised; empty where they were."""


def read_fit(values: Mapping[str, object]) -> StainFit:
    """Rebuild a fit from what ``dataclasses.asdict`` and JSON made of it.

    Raises:
        InputError: A value is missing, unknown or out of bounds.
    """
    try:
        return FIT.validate_python(dict(values))
    except ValidationError as error:
        problem = error.errors()[0]
        cause = f"not a stain fit: {'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        raise InputError(cause, "fit the slide again", stage="stain") from error


FIT: TypeAdapter[StainFit] = TypeAdapter(StainFit)


def cannot_measure(cause: str) -> InputError:
    """Return the error of colours that cannot be measured."""
    return InputError(
        cause, "see whether the slide is stained, or set stain.on_failure=raw in another out= folder", stage="stain"
    )
