"""The forms of the deployments, which the Prefect UI shows and whose bounds its server checks.

A form is a list of keys of the configuration. Its choices are the files of ``conf/``, its defaults the values there,
its bounds and descriptions those of `RunConfig`: nothing is declared a second time. A filled form becomes the overrides
of a ``wsiflow run``; ``conf/`` decides what is left empty.

The page shows the few fields that most runs need, and below them parts that are folded until somebody opens them. A
request by HTTP may name the fields of a part there or beside the others.
"""

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, Field, model_validator

from wsiflow.run.config import RunConfig, descriptions

from .compose import compose_config
from .overrides import choices, quoted

_CONF = resources.files("wsiflow.conf")
_BOUNDS = {
    "type",
    "enum",
    "minimum",
    "exclusiveMinimum",
    "maximum",
    "exclusiveMaximum",
    "minLength",
    "pattern",
    "anyOf",
}
# Words that Hydra does not read as text, although they look like names.
_VALUES = {"null", "true", "false", "inf", "nan"}
_NO_EXPERIMENT = "none"
# A path whose parts do not lead upwards.
_DOWNWARDS = r"^(?!(.*/)?\.\.(/|$))"
# The parts of the forms: titles and descriptions by name.
_PARTS = {
    "slides": ("More about the slides", "Single slides, a part of the data set, and what happens when slides fail."),
    "pixels": ("Pixels", "Geometry, tissue, tiles, colours, and how patches are stored."),
    "network": ("Network", "How windows are computed, in which number format, and by which library."),
    "scoring": ("Scores", "Lesions, the protocol of the evaluation, its intervals and seed."),
    "resources": ("Folder and machines", "Where the results lie, who computes, and where it is recorded."),
}


@cache
def _default_choices() -> dict[str, str]:
    """Return the default choice of every group, as ``conf/config.yaml`` lists them."""
    listed = yaml.safe_load((_CONF / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    return {group: name for one in listed if isinstance(one, dict) for group, name in one.items()}


@cache
def _defaults() -> dict[str, Any]:
    return compose_config([]).model_dump(mode="json")


@cache
def _schema() -> dict[str, Any]:
    return RunConfig.model_json_schema()


def _default(key: str) -> Any:
    if key in _default_choices():
        return _default_choices()[key]
    value: Any = _defaults()
    for part in key.split("."):
        value = value[part]
    return value


def _schema_of(key: str) -> dict[str, Any]:
    """Return the schema of a value."""
    nodes = [_schema()]
    for part in key.split("."):
        nodes = [one for node in nodes if part in node["properties"] for one in _kinds(node["properties"][part])]
    return nodes[0]


def _kinds(node: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the schemas of a section, one for each of its kinds, or the one schema of a value."""
    listed = node.get("oneOf", [node])
    return [_schema()["$defs"][one["$ref"].rpartition("/")[2]] if "$ref" in one else one for one in listed]


def _allowed(key: str) -> dict[str, Any]:
    """Return the JSON schema of the values that a key may have: files of its group, or values within bounds."""
    if key in _default_choices():
        return {"type": "string", "enum": choices(key)}
    if key == "inference.stride":
        return {"type": "integer", "enum": _strides()}
    return {name: bound for name, bound in _schema_of(key).items() if name in _BOUNDS}


def _strides() -> list[int]:
    """Return the strides that divide a tile of any file of ``conf/tiles``."""
    files = [_CONF.joinpath("tiles", f"{name}.yaml") for name in choices("tiles")]
    sizes = {yaml.safe_load(file.read_text(encoding="utf-8"))["tile_px"] for file in files}
    return [stride for stride in range(1, max(sizes) + 1) if any(size % stride == 0 for size in sizes)]


def knob(key: str, part: str = "") -> Any:
    """Return the field of one key, with its default."""
    return Field(
        default=_default(key),
        title=key,
        description=descriptions()[key],
        json_schema_extra={**_allowed(key), "part": part},
    )


def required(key: str) -> Any:
    """Return the field of one key that everybody fills in, whatever its default is."""
    return Field(title=key, description=descriptions()[key], min_length=1, json_schema_extra=_allowed(key))


def axis(key: str, part: str = "") -> Any:
    """Return the field of a key that a sweep may vary."""
    return Field(
        default=[_default(key)],
        min_length=1,
        title=key,
        description=descriptions()[key],
        json_schema_extra={"items": _allowed(key), "part": part},
    )


def optional(key: str, part: str = "") -> Any:
    """Return the field of a value that each file of its group sets differently; None leaves it to the file."""
    allowed: Any = {"anyOf": [_allowed(key), {"type": "null"}], "part": part}
    return Field(
        default=None,
        title=key,
        description=f"{descriptions()[key]} null: as its group says.",
        json_schema_extra=allowed,
    )


def text(key: str, part: str = "") -> Any:
    """Return the field of a path or another text that may be left to ``conf/``."""
    description = f"{descriptions()[key]} Empty: as the configuration says."
    return Field(default="", title=key, description=description, json_schema_extra={"part": part})


def _check_downwards(path: str) -> str:
    if not re.match(_DOWNWARDS, path):
        raise ValueError("a path of a form may not lead upwards: write it without ..")
    return path


# A folder to write, which lies below where the flow works or is absolute.
_Folder = Annotated[str, AfterValidator(_check_downwards), Field(json_schema_extra={"pattern": _DOWNWARDS})]


def own(description: str, part: str, **more: Any) -> Any:
    """Return the field of a value that is no key of the configuration."""
    return Field(description=description, json_schema_extra={"part": part}, **more)


def _arrange(schema: dict[str, Any]) -> None:
    """Fold the fields of parts, with the free overrides last; a request may name the fields of parts without them."""
    parts: dict[str, dict[str, Any]] = {"": {}}
    for name, field in schema["properties"].items():
        parts.setdefault(field.pop("part", ""), {})[name] = field
    shown = parts.pop("")
    overrides = shown.pop("overrides")
    folded = {name: _part(name, parts[name]) for name in _PARTS if name in parts}
    schema["properties"] = _numbered({**shown, **folded, "overrides": overrides})
    schema["patternProperties"] = {
        f"^{name}$": {bound: value for bound, value in field.items() if bound in _BOUNDS | {"items", "minItems"}}
        for fields in parts.values()
        for name, field in fields.items()
    }


def _part(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a part: an empty object, of which the page shows nothing, or one with the part's fields."""
    title, description = _PARTS[name]
    kinds = {"as it is": {}, "change": _numbered(fields)}
    return {
        "title": title,
        "description": description,
        "default": {},
        "anyOf": [
            {"type": "object", "title": title, "properties": properties, "additionalProperties": False}
            for title, properties in kinds.items()
        ],
    }


def _numbered(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields with their places, since a PostgreSQL server does not keep their order."""
    return {name: {**field, "position": place} for place, (name, field) in enumerate(fields.items())}


class Form(BaseModel, frozen=True, extra="forbid", json_schema_extra=_arrange):
    """The fields of every form.

    Attributes:
        overrides: Overrides of keys that the form has no field for; they come last.
    """

    overrides: list[str] = Field(
        default=[], description="Whatever else would stand behind wsiflow run, such as tiles.group_tiles=200."
    )

    @model_validator(mode="before")
    @classmethod
    def _unfold(cls, values: Any) -> Any:
        """Return what was filled in without the parts in which the page shows it."""
        if not isinstance(values, dict):
            return values
        flat = {name: value for name, value in values.items() if name not in _PARTS}
        return flat | {name: value for part in _PARTS for name, value in (values.get(part) or {}).items()}

    def to_overrides(self) -> list[str]:
        """Return the form as overrides."""
        filled = {key: value for key, value in self._values().items() if value not in ("", None)}
        if all(_is_usual(filled, key) for key in ("inference", "inference.stride")):
            filled.pop("inference.stride", None)  # it counts as not given: networks that it does not fit get another
        return [*(f"{key}={_override(value)}" for key, value in filled.items()), *self.overrides]

    def _values(self) -> dict[str, Any]:
        """Return the values of the fields that set keys, by key."""
        return {field.title: getattr(self, name) for name, field in type(self).model_fields.items() if field.title}


def _is_usual(values: Mapping[str, Any], key: str) -> bool:
    """Tell whether a key has its default, alone where several values may be listed."""
    return key not in values or values[key] in (_default(key), [_default(key)])


def _override(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_override, value))
    if isinstance(value, str) and (not re.fullmatch("[A-Za-z_][A-Za-z_0-9]*", value) or value.lower() in _VALUES):
        return quoted(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


class Named(Form):
    """A run: its name and folder, and where its tasks run."""

    name: str = required("name")
    out: _Folder = text("out", "resources")
    executor: str = knob("executor", "resources")
    workers: int | None = optional("executor.workers", "resources")


class Demo(Named):
    """Six synthetic slides with known lesions, which are drawn first. Submit starts the demo as it is."""

    size_px: int = knob("dataset.size_px")
    stride: int = knob("inference.stride")
    precision: str = knob("inference.precision", "network")
    stain: str = knob("stain", "pixels")
    store: str = knob("store", "pixels")

    def _values(self) -> dict[str, Any]:
        """Return the values by key; slides of another size than usual have a folder of their own."""
        folder = {} if self.size_px == _default("dataset.size_px") else {"dataset.folder": f"demo/data-{self.size_px}"}
        return super()._values() | folder


class Slides(Named):
    """A data set and a model, for one run or many."""

    dataset: str = knob("dataset")
    manifest: str = text("dataset.manifest")
    folder: str = text("dataset.folder")
    path: str = text("dataset.path", "slides")
    limit: int | None = knob("dataset.limit", "slides")
    allow_partial: bool = knob("allow_partial", "slides")
    shard_slides: int = knob("shard_slides", "slides")
    model: str = knob("model")
    card: str = text("model.card")
    geometry: str = knob("geometry", "pixels")
    evaluation: str = knob("evaluation", "scoring")
    bootstrap: int = knob("evaluation.bootstrap", "scoring")
    seed: int = knob("seed", "scoring")
    tracking: str = knob("tracking", "resources")


class Run(Slides):
    """Test a classifier on whole-slide images; most runs need only what is above the parts."""

    stride: int = knob("inference.stride")
    tissue: str = knob("tissue", "pixels")
    tiles: str = knob("tiles", "pixels")
    stain: str = knob("stain", "pixels")
    store: str = knob("store", "pixels")
    compression: str = knob("store.compression", "pixels")
    inference: str = knob("inference", "network")
    precision: str = knob("inference.precision", "network")
    backend: str = knob("inference.backend", "network")
    lesions: str = knob("lesions", "scoring")


class Sweep(Slides):
    """A run for every combination of what is listed."""

    # What it says holds for every field that is left as it is.
    experiment: str = Field(
        default=_NO_EXPERIMENT,
        title="experiment",
        description="A sweep that is ready to use. Fields that are changed add to it or replace its values.",
        json_schema_extra={"enum": [_NO_EXPERIMENT, *choices("experiment")]},
    )
    stride: list[int] = axis("inference.stride")
    repeat: list[int] = axis("repeat")
    tissue: list[str] = axis("tissue", "pixels")
    tiles: list[str] = axis("tiles", "pixels")
    stain: list[str] = axis("stain", "pixels")
    store: list[str] = axis("store", "pixels")
    compression: list[str] = axis("store.compression", "pixels")
    inference: list[str] = axis("inference", "network")
    precision: list[str] = axis("inference.precision", "network")
    backend: list[str] = axis("inference.backend", "network")
    lesions: list[str] = axis("lesions", "scoring")

    def _values(self) -> dict[str, Any]:
        values = super()._values()
        if values.pop("experiment") == _NO_EXPERIMENT:
            return values
        fields = {field.title: field for field in type(self).model_fields.values()}
        changed = {key: value for key, value in values.items() if value != fields[key].default}
        return {"experiment": self.experiment, **changed}


class Evaluate(Form):
    """Detections that lie on the disk, scored as ``wsiflow evaluate`` scores them."""

    manifest: str = Field(min_length=1, description="CSV with slide_id, path, and label, annotation or mask.")
    detections: str = Field(min_length=1, description="Folder with one <slide_id>.csv per slide: prob,x,y.")
    out: _Folder = Field(min_length=1, description="Folder to write.")
    scores: str = own("CSV with slide_id,score. Empty: the highest detection counts.", "scoring", default="")
    mask_downsample: int | None = own(
        "Scale at which mask images are read; 1: they are at evaluation resolution.", "scoring", default=None, ge=1
    )
    unit: Literal["px", "um"] = own(
        "What x and y of detections are in: px of level 0, or um from its corner.", "scoring", default="px"
    )
    evaluation: str = knob("evaluation")
    downsample: int = knob("evaluation.downsample", "scoring")
    bootstrap: int = knob("evaluation.bootstrap", "scoring")
    seed: int = knob("seed", "scoring")


class Compare(Form):
    """The runs of a sweep, compared."""

    folders: list[str] = Field(default=[], description="Folders of runs. Empty: the runs of the experiment in MLflow.")
    experiment: str = knob("tracking.experiment")
    sweep: str | None = Field(
        default=None, title="tracking.sweep", description="Sweep of the experiment to compare. null: its only one."
    )
    out: _Folder = Field(min_length=1, description="Folder to write.")
    reference: str = own(
        "Setting the others are compared with. Empty: the finest stride in fp32.", "scoring", default=""
    )
    bootstrap: int = knob("evaluation.bootstrap", "scoring")
    seed: int = knob("seed", "scoring")
    uri: str = text("tracking.uri", "resources")
