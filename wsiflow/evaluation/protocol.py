"""Define the scoring protocol: the rules that must be equal before two scores may be compared."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, Field, FiniteFloat, SerializerFunctionWrapHandler, model_serializer

from wsiflow.slides.annotations.groups import Meaning, folded
from wsiflow.system import publish


def _folded(value: object) -> object:
    """Return names sorted, without repetition and in lower case, so that equal sets of names compare equal."""
    if isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(one, str) for one in value):
        return sorted({one.casefold() for one in value})
    return value


def _listed(value: object) -> object:
    """Return whole numbers sorted and without repetition, so that equal sets compare equal; one number is a list."""
    values = [value] if isinstance(value, int) else value
    whole = isinstance(values, Sequence) and all(isinstance(one, int) for one in values)
    return sorted(set(values)) if whole and isinstance(values, Sequence) else values


def _by_folded_name(value: object) -> object:
    """Return what groups enclose by their names as these are compared, sorted, so that equal settings compare equal."""
    if value is None:
        return {}
    if isinstance(value, str):  # in quotes, as names are written that Hydra cannot read as keys
        with suppress(yaml.YAMLError):
            value = yaml.safe_load(value)
    if not isinstance(value, Mapping):
        return value
    return dict(sorted((folded("none" if name is None else str(name)), what) for name, what in value.items()))


_Slides = Annotated[tuple[str, ...], BeforeValidator(_folded)]
_Grey = Annotated[int, Field(ge=0, le=255)]


class EvaluationParams(BaseModel, frozen=True, extra="forbid"):
    """How detections are scored: a protocol, all of which is in its hash, and how often the cases are resampled."""

    name: str = Field(min_length=1, description="Name of the protocol.")
    downsample: int = Field(ge=1, le=256, description="Level-0 pixels per pixel of the evaluation mask.")
    l0_um_px: Annotated[FiniteFloat, Field(gt=0)] | None = Field(
        description="Spacing of level 0 that is assumed for every slide, um per pixel; 0.243 in the CAMELYON16 "
        "evaluator. null: each slide's own."
    )
    join_um: FiniteFloat = Field(ge=0, le=10_000, description="Annotations nearer than this are one lesion, um.")
    itc_um: FiniteFloat = Field(
        ge=0,
        le=10_000,
        description="A lesion whose major axis, joining distance included, is shorter than this is isolated tumour "
        "cells, um.",
    )
    exclude: _Slides = Field(description="Names of slides that count for nothing, in any case of their letters.")
    exclude_froc: _Slides = Field(description="Names of slides that count for the slide AUC alone.")
    # Protocols, plans and folders from before there were these keys are still valid: they are only stated where set.
    mask_tumour: Annotated[tuple[_Grey, ...], BeforeValidator(_listed)] = Field(
        default=(),
        description="Values of mask images that are tumour; every other value is none. Empty: 255 of 0 and 255, 2 of "
        "0, 1 and 2, and 1 of 0 and 1 in a slide labelled tumour.",
    )
    no_tissue: Literal["leave_out", "score", "fail"] = Field(
        default="leave_out",
        description="What a slide with a label or truth is on which no tissue was found. leave_out: it counts for "
        "nothing, and this is reported. score: it counts with the score 0 and no detection. fail: it has failed.",
    )
    groups: Annotated[Mapping[str, Meaning], BeforeValidator(_by_folded_name)] = Field(
        default_factory=dict,
        description="What groups and classes of annotations enclose, by their names in any case of the letters, over "
        "those that are known already. tumour: tumour. normal: it is cut out of the tumour. ignore: it takes neither "
        "hits nor false positives. other: it counts for nothing. null: none besides.",
    )
    outline_origin: Literal["auto", "slide", "bounds"] = Field(
        default="auto",
        description="Where the coordinates of annotations count from. slide: the corner of level 0. bounds: the corner "
        "of the scanned area, where the slide states one (MIRAX, Leica, Ventana). auto: bounds for GeoJSON, as QuPath "
        "does, and slide for all others.",
    )
    bootstrap: int = Field(
        ge=0,
        le=100_000,
        description="Number of resamples of the cases for the intervals; no part of the protocol. 0: no intervals.",
    )

    @model_serializer(mode="wrap")
    def _without_default(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = plain(self)
        unset = {"mask_tumour": (), "groups": {}, "outline_origin": "auto", "no_tissue": "leave_out"}
        return {name: value for name, value in values.items() if getattr(self, name) != unset.get(name, self)}

    def protocol(self) -> dict[str, Any]:
        """Return the parameters that must be equal before two scores may be compared, as JSON values."""
        return self.model_dump(mode="json", exclude={"bootstrap"})

    def protocol_hash(self) -> str:
        """Return the SHA-256 of the protocol as canonical JSON."""
        return publish.key_of(**self.protocol())

    def excluded(self, slide_id: str) -> str:
        """Return what the protocol excludes a slide from: ``all``, ``froc``, or an empty text."""
        name = slide_id.casefold()
        return "all" if name in self.exclude else "froc" if name in self.exclude_froc else ""
