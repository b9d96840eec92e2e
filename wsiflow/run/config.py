"""The configuration of a run as one validated value.

The values are in ``conf/``. This module and the ``XParams`` of other modules have only names, units and bounds. Unknown
keys and values out of bounds are refused before anything else happens, with the dotted name of the key.
"""

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from wsiflow import redaction
from wsiflow.errors import InputError
from wsiflow.evaluation.protocol import EvaluationParams
from wsiflow.heatmap.lesions import LesionParams
from wsiflow.model.card import ModelSpec
from wsiflow.model.choice import DenseParams, InferenceParams
from wsiflow.plan.blocks import TilesParams
from wsiflow.plan.geometry import GeometryParams
from wsiflow.plan.tissue import TissueParams
from wsiflow.run.executor.params import ExecutorParams
from wsiflow.run.store_params import StoreParams
from wsiflow.run.tracking import TrackingParams
from wsiflow.slides.kinds import DatasetParams
from wsiflow.slides.stain.params import StainParams
from wsiflow.system.paths import AbsolutePath

# Parts of a path, none of which is hidden or leads upwards: the folder of a run lies below runs/.
_NAME = r"^[^/.\s][^/]*(/[^/.\s][^/]*)*$"


def _check_name(name: str) -> str:
    if not re.match(_NAME, name):
        raise ValueError("neither a name nor a part of one between slashes may be empty or begin with a dot or a blank")
    return name


_Name = Annotated[str, AfterValidator(_check_name), Field(min_length=1, json_schema_extra={"pattern": _NAME})]


class CompareParams(BaseModel, frozen=True, extra="forbid"):
    """How a sweep's trials are compared when it ends; it changes no number of a run."""

    families: Mapping[str, tuple[str, ...]] | None = Field(
        default=None,
        description="Families of comparisons, each with the keys in which its settings differ from the reference: "
        "{strides: [inference.stride], formats: [inference.precision]}. p-values are corrected within each. null: all "
        "settings are one family.",
    )
    margin: Annotated[FiniteFloat, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Largest loss that is accepted; says of each setting whether a larger one is excluded.",
    )
    metric: Literal["", "froc.score", "froc.strict_score", "roc.auc"] = Field(
        default="", description="Metric of the margin and the Pareto set. Empty: the FROC score, else the AUC."
    )


class RunConfig(BaseModel, frozen=True, extra="forbid"):
    """All settings of a run; see the ``XParams`` of each part."""

    out: AbsolutePath = Field(description="Folder of the run.")
    name: _Name = Field(
        description="Name of the run, and of its folder below runs/ where out= is not given. None of its parts between "
        "slashes begins with a dot or a blank."
    )
    seed: int = Field(ge=0, description="Seed of everything that is drawn at random, which is the bootstrap.")
    repeat: int = Field(
        ge=1,
        description="Number of this repeat of a run. It changes no result, and repeats share nothing that is measured.",
    )
    share: AbsolutePath | None = Field(
        description="Folder of what the trials of a sweep have in common and compute once. null: they share nothing."
    )
    allow_partial: bool = Field(
        description="Whether the slides that have results are scored when others failed. The scores are then marked "
        "PARTIAL, and the exit code is 10."
    )
    shard_slides: int = Field(
        ge=0, description="Slides of one Prefect task. 0: about 40 tasks, however many slides there are."
    )
    orchestrator: Literal["prefect", "none"] = Field(
        description="Who calls the stages. prefect: a Prefect flow. none: wsiflow itself, with the same functions."
    )
    dataset: DatasetParams
    model: ModelSpec
    geometry: GeometryParams
    tissue: TissueParams
    tiles: TilesParams
    inference: InferenceParams
    dense: DenseParams
    stain: StainParams
    store: StoreParams
    lesions: LesionParams
    evaluation: EvaluationParams
    executor: ExecutorParams
    tracking: TrackingParams
    compare: CompareParams = CompareParams()

    @model_validator(mode="after")
    def _fits_together(self) -> "RunConfig":
        strides: dict[str, object] = {name: getattr(self.inference, name) for name in ("stride", "stride_alone")}
        if self.inference.cascade.is_on:
            self._check_cascade()
            strides["cascade.stride"] = self.inference.cascade.stride
        for name, stride in strides.items():
            if isinstance(stride, int) and stride and self.tiles.tile_px % stride:
                divisors = [d for d in range(1, self.tiles.tile_px + 1) if self.tiles.tile_px % d == 0]
                raise ValueError(f"inference.{name} is {stride}, it must divide tiles.tile_px: one of {divisors}")
        if self.inference.refine:
            self._check_refinement()
        if self.stain.per_patch and not self.tiles.block_rows == self.tiles.block_cols == 1:
            raise ValueError("stain.per_patch is true, it needs single patches (tiles=patch)")
        if self.geometry.convention == "reference":
            self._check_reference()
        return self

    def _check_cascade(self) -> None:
        """Refuse a cascade with settings that it does not fit, and one that could not be certified or would not pay.

        Raises:
            ValueError: A setting does not fit.
        """
        cascade, inference = self.inference.cascade, self.inference
        refused = {
            "geometry=centred": self.geometry.convention != "centred",
            "inference.refine=0: a first pass at a coarser inference.cascade.stride does the same": inference.refine
            > 0,
            "stain.per_patch=false": self.stain.per_patch,
            "dense.windows=200: what is passed over is certified by windows": not self.dense.windows,
        }
        for remedy, is_refused in refused.items():
            if is_refused:
                raise ValueError(f"inference.cascade.threshold is {cascade.threshold}, it needs {remedy}")
        like_own = cascade.model in {None, self.model.card} and cascade.um_px in {"model", self.geometry.spacing}
        if like_own and cascade.stride <= inference.stride:
            cause = "the first pass of inference.cascade would cost as much as the run's own"
            raise ValueError(f"{cause}: set inference.cascade.model, or a coarser inference.cascade.um_px or stride")

    def _check_refinement(self) -> None:
        """Refuse refinement where maps are computed whole, or where scores are compared with single windows.

        Raises:
            ValueError: The engine, the precision or the coarse stride does not allow it.
        """
        inference = self.inference
        if inference.engine != "window" or inference.precision != "fp32":
            raise ValueError("inference.refine needs inference.engine=window and inference.precision=fp32")
        if inference.refine_from % inference.stride or self.tiles.tile_px % inference.refine_from:
            cause = f"inference.refine_from is {inference.refine_from}, it must be a multiple of inference.stride"
            raise ValueError(f"{cause} ({inference.stride}) and divide tiles.tile_px ({self.tiles.tile_px})")

    def _check_reference(self) -> None:
        """Refuse settings that differ from the reference's geometry, whose tiles are 224 level-0 pixels.

        Raises:
            ValueError: A setting differs.
        """
        values = {
            "geometry.spacing": self.geometry.spacing,
            "tiles.tile_px": self.tiles.tile_px,
            "tiles.halo_px": self.tiles.halo_px,
            "tiles.block_rows": self.tiles.block_rows,
            "tiles.block_cols": self.tiles.block_cols,
        }
        for (key, value), needed in zip(values.items(), ("native", 224, 112, 1, 1), strict=True):
            if value != needed:
                raise ValueError(f"{key} is {value}, geometry=reference needs {needed} (tiles=patch has these sizes)")


def validate(values: Mapping[str, Any]) -> RunConfig:
    """Return composed values as a `RunConfig`.

    Raises:
        InputError: Keys are unknown or missing, or values are out of bounds; each key is named.
    """
    return _validated(RunConfig, values, "correct the override or the YAML file")


class _Entry(NamedTuple):
    key: str
    description: str
    is_section: bool
    values: tuple[str, ...]
    types: frozenset[object]


@cache
def known_keys() -> tuple[str, ...]:
    """Return all dotted keys that a configuration may have."""
    return tuple(dict.fromkeys(entry.key for entry in _entries(RunConfig, "") if not entry.is_section))


@cache
def descriptions() -> dict[str, str]:
    """Return the descriptions of all keys and sections by dotted name; those of a key of several kinds are joined."""
    texts_by_key: dict[str, list[str]] = {}
    for entry in _entries(RunConfig, ""):
        texts_by_key.setdefault(entry.key, []).append(entry.description)
    return {key: " ".join(dict.fromkeys(texts)) for key, texts in texts_by_key.items()}


def _entries(form: type[BaseModel], prefix: str) -> Iterator[_Entry]:
    """Yield the fields of a form and of its parts; a part without a description has that of its own form."""
    for name, field in form.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        parts = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        about = field.description or next(filter(None, map(inspect.getdoc, parts)), "")
        values, types = _listed_values(field.annotation), _types(field.annotation)
        yield _Entry(f"{prefix}{name}", about.partition("\n")[0], bool(parts), values, types)
        for part in parts:
            yield from _entries(part, f"{prefix}{name}.")


def _listed_values(annotation: Any) -> tuple[str, ...]:
    """Return the values of a key that has only a few, as they are typed; none where they cannot be listed."""
    if annotation is bool:
        return ("true", "false")
    members = (annotation, *get_args(annotation))
    return tuple(str(value) for member in members if get_origin(member) is Literal for value in get_args(member))


def _types(annotation: Any) -> frozenset[object]:
    """Return the types that a value may have; of a list, that of the list alone."""
    if get_origin(annotation) in {Union, UnionType}:
        return frozenset[object]().union(*map(_types, get_args(annotation)))
    return _types(get_args(annotation)[0]) if get_origin(annotation) is Annotated else frozenset([annotation])


@cache
def path_keys() -> frozenset[str]:
    """Return the keys whose values are paths."""
    return frozenset(entry.key for entry in _entries(RunConfig, "") if Path in entry.types)


@cache
def text_keys() -> frozenset[str]:
    """Return the keys whose values are texts, and no lists of texts."""
    return frozenset(entry.key for entry in _entries(RunConfig, "") if str in entry.types <= {str, type(None)})


#: Keys of words of a shell, which may be typed as a list or as one text.
WORD_KEYS = frozenset({"executor.array.extra", "executor.array.prologue"})


@cache
def optional_keys() -> frozenset[str]:
    """Return the keys whose values may be null."""
    return frozenset(entry.key for entry in _entries(RunConfig, "") if type(None) in entry.types)


@cache
def listed_values() -> dict[str, tuple[str, ...]]:
    """Return the values of each key that has only a few, as they are typed, by dotted name."""
    return {entry.key: entry.values for entry in _entries(RunConfig, "") if entry.values}


def nearest(key: str) -> str:
    """Return the key or section that an unknown key most resembles, or an empty text where it resembles none."""
    name = key.rpartition(".")[2]
    alone = {one.rpartition(".")[2]: one for one in reversed(known_keys())}
    near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.8) or [
        alone[one] for one in difflib.get_close_matches(name, alone, n=1, cutoff=0.75)
    ]
    sections = {one.partition(".")[0] for one in known_keys()}
    near = near or difflib.get_close_matches(key, sections, n=1, cutoff=0.75)
    return near[0] if near else ""


_Params = TypeVar("_Params", bound=BaseModel)


def _validated(form: type[_Params], values: Mapping[str, Any], remedy: str) -> _Params:
    try:
        return form.model_validate(values)
    except ValidationError as error:
        problems = [_problem(item["loc"], item["type"], item["msg"], item.get("input")) for item in error.errors()]
        raise InputError("; ".join(problems), remedy, stage="configuration") from error


def _problem(loc: tuple[int | str, ...], kind: str, message: str, value: object) -> str:
    parts = [str(part) for part in loc]
    if parts[:1] == ["dataset"] and len(parts) > 2:
        del parts[1]  # the kind of the data set, which is not a part of the key
    key = ".".join(parts)
    if kind == "extra_forbidden":
        return f"there is no key {key}" + (f" (did you mean {near}?)" if (near := nearest(key)) else "")
    if kind == "missing":
        return f"{key} has no value"
    text = message.removeprefix("Value error, ")
    (kept,) = redaction.redacted({key: value}).values()
    shown = f" (got {kept!r})" if isinstance(value, str | int | float) else ""
    return f"{key}: {text}{shown}" if key else text


def evaluation_params(protocol: str, changes: Mapping[str, Any]) -> EvaluationParams:
    """Return a protocol of ``conf/evaluation`` with the changes of the options of a command.

    Args:
        protocol: Name of the file, for example ``camelyon16``.
        changes: Values by key; None stands for the value of the file.

    Raises:
        InputError: There is no such protocol, or an option is out of bounds.
    """
    folder = resources.files("wsiflow.conf") / "evaluation"
    known = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    if protocol not in known:
        raise InputError(f"there is no protocol {protocol!r}", f"use one of {', '.join(known)}", stage="configuration")
    values = yaml.safe_load((folder / f"{protocol}.yaml").read_text(encoding="utf-8"))
    given = {key: value for key, value in changes.items() if value is not None}
    return _validated(EvaluationParams, values | given, "correct the option")
