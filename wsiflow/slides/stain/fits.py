"""The colours of a slide as they are measured, in the two forms that the methods use."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

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
    method: str
    mean: tuple[Grey, Grey, Grey]
    std: tuple[Spread, Spread, Spread]


@dataclass(frozen=True)
class DensityFit:
    """The colours of a slide as two stains on a white background; the vectors are optical densities in R, G, B."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    method: str
    white: Annotated[float, Field(ge=1, le=255, allow_inf_nan=False)]
    """Grey value of the background, which is scaled to 255 before densities are computed."""
    haematoxylin: tuple[Density, Density, Density]
    eosin: tuple[Density, Density, Density]
    strengths: tuple[Strength, Strength]
    """99th percentiles of the amounts of haematoxylin and eosin."""


def cannot_measure(cause: str) -> InputError:
    """Return the error of colours that cannot be measured."""
    return InputError(
        cause, "see whether the slide is stained, or set stain.on_failure=raw in another out= folder", stage="stain"
    )
