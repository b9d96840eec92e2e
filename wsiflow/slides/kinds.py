"""What the slides of a run come from: one of four kinds, each with its own settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    model_serializer,
)

from wsiflow.slides.typed_paths import located
from wsiflow.system.paths import AbsolutePath


def _none_if_empty(value: object) -> object:
    """Let an empty text in YAML mean that the setting is absent."""
    return None if value == "" else value


def _as_typed(value: object) -> object:
    """Return the path that a text names; what is no path of this machine, such as an address, is refused."""
    return str(located(value, Path())) if isinstance(value, str) and value else value


_TypedPath = Annotated[AbsolutePath, BeforeValidator(_as_typed)]
_Limit = Annotated[
    Annotated[int, Field(ge=1)] | None,
    BeforeValidator(_none_if_empty),
    Field(description="Number of slides to take, from the first. null: all."),
]

_Mpp = Annotated[Annotated[FiniteFloat, Field(gt=0, le=100)] | None, BeforeValidator(_none_if_empty)]
_MPP_IF_NONE = Field(
    default=None,
    description="Micrometres per level-0 pixel of the slides that state none, or no plausible one. null: they are "
    "refused.",
)
_MPP_OF_ONE = Field(default=None, description="Micrometres per level-0 pixel of the slide. null: what it states.")


def _without_mpp_if_none(self: BaseModel, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
    """Leave out a pixel size that is not given: files of runs from before there was this key stay as they are."""
    values: dict[str, Any] = plain(self)
    if values.get("mpp", 0) is None:
        del values["mpp"]
    return values


class ManifestSlides(BaseModel, frozen=True, extra="forbid"):
    """The slides that a CSV file lists."""

    kind: Literal["manifest"] = Field(description="With manifest, a CSV file lists the slides.")
    manifest: _TypedPath = Field(description="CSV file that lists the slides.")
    limit: _Limit
    mpp: _Mpp = _MPP_IF_NONE

    _serialized = model_serializer(mode="wrap")(_without_mpp_if_none)


class FolderSlides(BaseModel, frozen=True, extra="forbid"):
    """The slides in a folder."""

    kind: Literal["folder"] = Field(description="With folder, they are those in a folder.")
    folder: _TypedPath = Field(description="Folder that is searched for slides, subfolders included.")
    limit: _Limit
    mpp: _Mpp = _MPP_IF_NONE

    _serialized = model_serializer(mode="wrap")(_without_mpp_if_none)


class SingleSlide(BaseModel, frozen=True, extra="forbid"):
    """One slide."""

    kind: Literal["single"] = Field(description="With single, there is one slide.")
    path: _TypedPath = Field(description="File of the one slide.")
    limit: _Limit
    mpp: _Mpp = _MPP_OF_ONE

    _serialized = model_serializer(mode="wrap")(_without_mpp_if_none)


class SyntheticSlides(BaseModel, frozen=True, extra="forbid"):
    """Slides with known lesions, which are drawn before the run: then they are those of a manifest."""

    kind: Literal["synthetic"] = Field(description="With synthetic, slides with known lesions are drawn.")
    folder: AbsolutePath = Field(description="Folder of synthetic slides; those that are missing in it are drawn.")
    limit: _Limit
    size_px: int = Field(ge=1024, le=100_000, description="Side of a synthetic slide, level-0 pixels.")
    seed: int = Field(ge=0, description="Seed of synthetic slides.")
    like: Literal["", "camelyon16"] = Field(
        description="What synthetic slides are like. camelyon16: those of CAMELYON16, whatever size_px is. Empty: "
        "nothing in particular."
    )
    data: Annotated[AbsolutePath | None, BeforeValidator(_none_if_empty)] = Field(
        description="Folder of the real outlines and pictures that slides like others are made of."
    )
    slides: int = Field(ge=1, le=10_000, description="Number of slides like others.")
    scale: float = Field(gt=0, le=1, description="Size of the outlines of slides like others. 1: as in reality.")


GivenSlides: TypeAlias = ManifestSlides | FolderSlides | SingleSlide
_KINDS: Mapping[str, type[BaseModel]] = {
    "manifest": ManifestSlides,
    "folder": FolderSlides,
    "single": SingleSlide,
    "synthetic": SyntheticSlides,
}
_ARE = {"manifest": "listed in a manifest", "folder": "in a folder", "single": "a single one", "synthetic": "synthetic"}

FLAT: Mapping[str, object] = {
    "manifest": "",
    "folder": "",
    "path": "",
    "limit": None,
    "size_px": 6144,
    "seed": 0,
    "like": "",
    "data": "",
    "slides": 40,
    "scale": 0.25,
}
"""What configurations of earlier versions hold, whatever the kind of the slides, of settings that are not given."""

RECORDED: Mapping[str, bool] = {"recorded": True}
"""Context in which a configuration is validated that a run has had already: what had no meaning then is passed over."""


def misplaced(name: str, kind: str) -> tuple[str, str] | None:
    """Return what is wrong with a setting that slides of another kind have, and the remedy; None where nothing is.

    Args:
        name: The setting, without its section.
        kind: What the slides of the run come from.
    """
    kinds = [f"dataset={other}" for other, form in _KINDS.items() if name in form.model_fields]
    if not kinds or f"dataset={kind}" in kinds:
        return None
    return f"dataset.{name} is given, but the slides are {_ARE.get(kind, kind)}", f"add {' or '.join(kinds)}"


def _of_its_kind(values: object, info: ValidationInfo) -> object:
    """Pass over what earlier versions wrote of other kinds; refuse what is given of them.

    Slides that are named and would not be read are an error: others would be scored in their place.
    """
    if not isinstance(values, Mapping):
        return values
    kind = str(values.get("kind", ""))
    if kind not in _KINDS:
        raise ValueError(f"dataset.kind is {kind or 'not given'}, it must be one of {', '.join(_KINDS)}")
    foreign = {name: problem for name in values if (problem := misplaced(name, kind))}
    for name, problem in foreign.items():
        if values[name] not in (None, "", FLAT[name]) and info.context != RECORDED:
            raise ValueError(": ".join(problem))
    return {name: value for name, value in values.items() if name not in foreign}


DatasetParams: TypeAlias = Annotated[
    GivenSlides | SyntheticSlides,
    Field(discriminator="kind", description="Where the slides of a run come from."),
    BeforeValidator(_of_its_kind),
]


def source_of(params: GivenSlides | SyntheticSlides) -> Path:
    """Return the file or folder that the slides come from."""
    if isinstance(params, ManifestSlides):
        return params.manifest
    return params.path if isinstance(params, SingleSlide) else params.folder
