"""The forms of the deployments, which the Prefect UI shows and whose bounds its server checks.

A form is a list of keys of the configuration. Its choices are the files of ``conf/``, its defaults the values there,
its bounds and descriptions those of `RunConfig`: nothing is declared a second time. A filled form becomes the overrides
of a ``wsiflow run``; ``conf/`` decides what is left empty.
"""

import re
from functools import cache
from importlib import resources
from typing import Any

import yaml
from pydantic import BaseModel, Field

from wsiflow.run.config import RunConfig, descriptions

from .compose import compose_config
from .overrides import choices, quoted

_CONF = resources.files("wsiflow.conf")
_BOUNDS = {"type", "enum", "minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "minLength", "anyOf"}
# Words that Hydra does not read as text, although they look like names.
_VALUES = {"null", "true", "false", "inf", "nan"}


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
    return {name: bound for name, bound in _schema_of(key).items() if name in _BOUNDS}


def knob(key: str) -> Any:
    """Return the field of one key, with its default."""
    return Field(default=_default(key), title=key, description=descriptions()[key], json_schema_extra=_allowed(key))


def axis(key: str) -> Any:
    """Return the field of a key that a sweep may vary."""
    return Field(
        default=[_default(key)],
        min_length=1,
        title=key,
        description=descriptions()[key],
        json_schema_extra={"items": _allowed(key)},
    )


def optional(key: str) -> Any:
    """Return the field of a value that each file of its group sets differently; None leaves it to the file."""
    allowed: Any = {"anyOf": [_allowed(key), {"type": "null"}]}
    return Field(
        default=None,
        title=key,
        description=f"{descriptions()[key]} null: as its group says.",
        json_schema_extra=allowed,
    )


def text(key: str) -> Any:
    """Return the field of a path or another text that may be left to ``conf/``."""
    return Field(default="", title=key, description=f"{descriptions()[key]} Empty: as the configuration says.")


def _number(schema: dict[str, Any]) -> None:
    """Number the fields, the free overrides last, since a PostgreSQL server does not keep their order."""
    fields = schema["properties"]
    fields["overrides"] = fields.pop("overrides")
    for place, field in enumerate(fields.values()):
        field["position"] = place


class Form(BaseModel, frozen=True, extra="forbid", json_schema_extra=_number):
    """The fields of every form.

    Attributes:
        overrides: Overrides of keys that the form has no field for; they come last.
    """

    overrides: list[str] = Field(
        default=[], description="Whatever else would stand behind wsiflow run, such as tiles.group_tiles=200."
    )

    def to_overrides(self) -> list[str]:
        """Return the form as overrides."""
        fields = {field.title: getattr(self, name) for name, field in type(self).model_fields.items() if field.title}
        filled = {key: value for key, value in fields.items() if value not in ("", None)}
        return [*(f"{key}={_override(value)}" for key, value in filled.items()), *self.overrides]


def _override(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_override, value))
    if isinstance(value, str) and (not re.fullmatch("[A-Za-z_][A-Za-z_0-9]*", value) or value.lower() in _VALUES):
        return quoted(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


class Named(Form):
    """A run: its name and folder, and where its tasks run."""

    name: str = knob("name")
    out: str = text("out")
    executor: str = knob("executor")
    workers: int | None = optional("executor.workers")


class Demo(Named):
    """Synthetic slides with known lesions."""

    size_px: int = knob("dataset.size_px")
    stride: int = knob("inference.stride")
    precision: str = knob("inference.precision")
    stain: str = knob("stain")
    store: str = knob("store")


class Slides(Named):
    """A data set and a model, for one run or many."""

    dataset: str = knob("dataset")
    manifest: str = text("dataset.manifest")
    folder: str = text("dataset.folder")
    path: str = text("dataset.path")
    limit: int | None = knob("dataset.limit")
    model: str = knob("model")
    card: str = text("model.card")
    geometry: str = knob("geometry")
    evaluation: str = knob("evaluation")
    bootstrap: int = knob("evaluation.bootstrap")
    tracking: str = knob("tracking")
    shard_slides: int = knob("shard_slides")
    seed: int = knob("seed")
    allow_partial: bool = knob("allow_partial")


class Run(Slides):
    """One run."""

    tissue: str = knob("tissue")
    tiles: str = knob("tiles")
    inference: str = knob("inference")
    stride: int = knob("inference.stride")
    precision: str = knob("inference.precision")
    backend: str = knob("inference.backend")
    stain: str = knob("stain")
    store: str = knob("store")
    compression: str = knob("store.compression")
    lesions: str = knob("lesions")


class Sweep(Slides):
    """A run for every combination of what is listed."""

    tissue: list[str] = axis("tissue")
    tiles: list[str] = axis("tiles")
    inference: list[str] = axis("inference")
    stride: list[int] = axis("inference.stride")
    precision: list[str] = axis("inference.precision")
    backend: list[str] = axis("inference.backend")
    stain: list[str] = axis("stain")
    store: list[str] = axis("store")
    compression: list[str] = axis("store.compression")
    lesions: list[str] = axis("lesions")


class Evaluate(Form):
    """Detections that lie on the disk, scored as ``wsiflow evaluate`` scores them."""

    manifest: str = Field(min_length=1, description="CSV with slide_id, path, and label, annotation or mask.")
    detections: str = Field(min_length=1, description="Folder with one <slide_id>.csv per slide: prob,x,y.")
    out: str = Field(min_length=1, description="Folder to write.")
    scores: str = Field(default="", description="CSV with slide_id,score. Empty: the highest detection counts.")
    mask_downsample: int | None = Field(
        default=None, ge=1, description="Scale at which mask images are read; 1: they are at evaluation resolution."
    )
    evaluation: str = knob("evaluation")
    downsample: int = knob("evaluation.downsample")
    bootstrap: int = knob("evaluation.bootstrap")
    seed: int = knob("seed")


class Compare(Form):
    """The runs of a sweep, compared."""

    folders: list[str] = Field(default=[], description="Folders of runs. Empty: the runs of the experiment in MLflow.")
    uri: str = text("tracking.uri")
    experiment: str = knob("tracking.experiment")
    sweep: str | None = Field(
        default=None, title="tracking.sweep", description="Sweep of the experiment to compare. null: its only one."
    )
    out: str = Field(min_length=1, description="Folder to write.")
    reference: str = Field(
        default="", description="Setting the others are compared with. Empty: the one that costs most."
    )
    bootstrap: int = knob("evaluation.bootstrap")
    seed: int = knob("seed")
