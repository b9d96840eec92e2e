"""The settings of stain normalisation."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias, Union

from pydantic import BaseModel, Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator

from wsiflow.errors import InputError
from wsiflow.slides.stain.fits import DensityFit, LabFit, Pixels
from wsiflow.slides.stain.methods import METHODS
from wsiflow.system.choices import OneOf


def _form(fit: Any) -> str:
    """Return the name of the form in which a fit's method measures colours; of an unknown method that of the method."""
    name = fit.get("method") if isinstance(fit, Mapping) else getattr(fit, "method", None)
    method = METHODS.get(str(name))
    return method.form.__name__ if method else str(name)


if TYPE_CHECKING:
    StainFit: TypeAlias = LabFit | DensityFit
else:
    _FORMS = dict.fromkeys(method.form for method in METHODS.values())
    _UNION = Union[tuple(Annotated[form, Tag(form.__name__)] for form in _FORMS)]  # noqa: UP007 - as many as there are
    StainFit = Annotated[_UNION, Discriminator(_form)]


class Target(BaseModel, frozen=True, extra="forbid"):
    """The colours of the template, measured in the same two ways as those of slides."""

    per_slide: StainFit = Field(description="Strengths, means and deviations over the template's tissue.")
    per_patch: StainFit = Field(description="Strengths, means and deviations over all of the template.")


class StainParams(BaseModel, frozen=True, extra="forbid"):
    """How colours are normalised before prediction."""

    method: Annotated[str, OneOf(METHODS, "none")] = Field(
        description="How colours are normalised. none: they stay the scanner's. reinhard: mean and spread in LAB "
        "become the template's. macenko and vahadane: the two stains and their strengths become the template's."
    )
    per_patch: bool = Field(
        description="Whether every patch is fitted by itself, as in the reference, instead of the slide once."
    )
    on_failure: Literal["fail", "raw"] = Field(
        description="What becomes of a slide or patch without a usable fit. fail: its task fails. raw: its colours "
        "stay as they are, and the run counts and lists it."
    )
    sample_tiles: int = Field(ge=1, le=10_000, description="Number of tiles of a slide that are read for its fit.")
    sample_px: int = Field(
        ge=100,
        le=10_000_000,
        description="Number of pixels of a slide, or of a patch, in which its stains are searched.",
    )
    min_tissue_px: int = Field(
        ge=3, description="Least number of tissue pixels among those that are sampled; with fewer there is no fit."
    )
    iterations: int = Field(ge=1, le=10_000, description="Number of steps of Vahadane's dictionary search.")
    target: Target | None = Field(description="Colours of the template. null: there is none, for the method none.")

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
        cause = f"the stain fit is invalid: {'.'.join(map(str, problem['loc'][1:]))}: {problem['msg']}"
        raise InputError(cause, "fit the slide again", stage="stain") from error


FIT: TypeAdapter[StainFit] = TypeAdapter(StainFit)
