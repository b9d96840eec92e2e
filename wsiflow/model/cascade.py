"""The settings of a cascade: a cheap first pass over all tissue, and the run's own pass where that is suspicious."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, FiniteFloat, model_validator

from wsiflow.model.card import CardPath
from wsiflow.system.paths import AbsolutePath


class CascadeParams(BaseModel, frozen=True, extra="forbid"):
    """A cheap first pass; the run's own model scores only what it does not pass over."""

    threshold: Annotated[FiniteFloat, Field(ge=0, le=1)] | Literal["auto"] | None = Field(
        default=None,
        description="Score of the first pass from which on the run's own pass looks at a place. auto: the highest one "
        "that keeps the sensitivity on the development slides. null: there is no first pass.",
    )
    model: CardPath | None = Field(
        default=None, description="Card of the first pass's model. null: the run's own model, at another spacing."
    )
    um_px: Literal["model"] | Annotated[FiniteFloat, Field(gt=0, le=100)] = Field(
        default="model",
        description="Spacing at which the first pass reads slides, um per pixel. model: that of its card.",
    )
    stride: int = Field(
        default=32, ge=1, description="Distance between the windows of the first pass, its own reading pixels."
    )
    margin_um: float = Field(
        default=100.0,
        ge=0,
        le=10_000,
        description="Width around suspicious cells of the first pass that the run's own pass looks at as well, um.",
    )
    development: AbsolutePath | None = Field(
        default=None,
        description="For threshold=auto: a manifest of slides with annotated lesions that are not under test.",
    )
    sensitivity: float = Field(
        default=0.98,
        gt=0,
        le=1,
        description="For threshold=auto: the share of the development slides' lesions that must not be passed over.",
    )

    @property
    def is_on(self) -> bool:
        """Whether there is a first pass."""
        return self.threshold is not None

    @model_validator(mode="after")
    def _has_development(self) -> "CascadeParams":
        if self.threshold == "auto" and self.development is None:
            raise ValueError("threshold=auto needs development=<manifest of slides that are not under test>")
        return self
