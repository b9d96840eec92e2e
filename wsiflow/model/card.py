"""Model cards, which describe everything about a classifier except its weights.

Input: the path of a card (JSON) and the settings of the model. Output: a validated `ModelCard`.
Two formats are read: wsiflow's own, with weights as safetensors in the same folder, and WSInfer's, with a TorchScript
program there. Both are converted to a `ModelCard`. This module does not parse weights or import torch, so a plan can
name a model without loading it.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails

from wsiflow.errors import InputError
from wsiflow.system import faults
from wsiflow.system.paths import NamedPath

# The architecture in a card whose weights file is a program: TorchScript, torch.export's, or ONNX.
TORCHSCRIPT = "torchscript"
EXPORT = "export"
ONNX = "onnx"
PYTHON = "python:"  # in front of the function that builds the network
OutputKind = Literal["logits", "probabilities", "sigmoid"]
Resize = Literal["torch", "pillow"]
PACKAGED = "pkg:"
WSINFER_WEIGHTS = "torchscript_model.pt"  # beside WSInfer's model JSON
MAX_CARD_BYTES = 1_000_000
_LARGEST_SCALE = 2  # of mean and std, whose pixels are from 0 to 1

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Positive = Annotated[FiniteFloat, Field(gt=0)]
Side = Annotated[int, Field(ge=16, le=4096)]

_Form = TypeVar("_Form", bound=BaseModel)


def _independent_of_folder(card: Path) -> Path:
    """Return the path of a card, made absolute unless the card ships with wsiflow."""
    return card if str(card).startswith(PACKAGED) else card.absolute()


CardPath = Annotated[NamedPath, AfterValidator(_independent_of_folder)]


class ModelSpec(BaseModel, frozen=True, extra="forbid"):
    """Which model a run uses."""

    card: CardPath = Field(
        description="Path of the model's card: one of wsiflow, or WSInfer's JSON. pkg:NAME is one that ships with "
        "wsiflow."
    )
    trust_torchscript: bool = Field(
        description="Whether a TorchScript program may be run; it can do whatever its author wanted."
    )
    trust_python: bool = Field(
        default=False,
        description="Whether the function that a card names as python:MODULE:FUNCTION may be run to build the network.",
    )
    sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = Field(
        description="SHA-256 that the weights must have, whatever the card says. Empty: the card's word is enough."
    )
    maps: str | tuple[str, ...] = Field(
        default=(),
        description="Names of classes that have a heatmap of their own beside that of the positive class. all: every "
        "class. Empty: none.",
    )
    positive_class: str | tuple[str, ...] = Field(
        description="Name of the class whose probability is mapped, or a list of names whose probabilities are added. "
        "Empty: the card's."
    )

    @model_serializer(mode="wrap")
    def _without_unused(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what earlier versions did not have, where it is not used, so that files and keys stay the same."""
        values: dict[str, Any] = dump(self)
        return {name: value for name, value in values.items() if name not in {"maps", "trust_python"} or value}


class Probe(BaseModel, frozen=True, extra="forbid"):
    """An image generated from a seed, and the probabilities that the weights gave for it when the card was written.

    Attributes:
        seed: Seed of `wsiflow.model.classifier.probe_image`.
        probabilities: Probability of every class, in the order of the class names.
    """

    seed: Annotated[int, Field(ge=0, lt=2**64)]
    probabilities: tuple[Annotated[FiniteFloat, Field(ge=0, le=1)], ...]


class ModelCard(BaseModel, frozen=True, extra="forbid"):
    """What has to be known to use a classifier rightly.

    Attributes:
        name: Name of the model; also that of its files.
        architecture: What the weights file is: ``export``, ``onnx`` or ``torchscript`` for one that holds its network;
            for weights alone what builds it: a key of `wsiflow.model.architectures.registry.ARCHITECTURES`,
            ``timm:NAME``, ``torchvision:NAME`` or ``python:MODULE:FUNCTION``.
        architecture_args: What its builder takes besides the number of outputs.
        source_sha256: Hash of the source file of a ``python:`` function.
        class_names: One name for each output, in order; at least two.
        positive_class: The class whose probability is mapped, or several whose probabilities are added.
        output: ``logits``: the probabilities are the softmax of the outputs; ``sigmoid``: each output is the logit of a
            class that does not exclude the others, or the only one that of the second of two classes;
            ``probabilities``: the outputs are probabilities.
        output_name: Key or index of the output that holds them, where the network returns several; empty for its only
            one.
        window_px: Side of the window the classifier sees, px at `spacing_um_px`.
        input_px: Side the network takes, px; a window is resized where it differs from `window_px`.
        resize: How a window is resized: ``torch``, as PyTorch does with tensors of 8 bits, or ``pillow``, as Pillow
            does with images.
        spacing_um_px: Spacing the classifier was trained at, um per px.
        mean: Mean of red, green, blue on a scale of 0 to 1: the input is (x / 255 - mean) / std.
        std: Standard deviation, on the same scale.
        weights: Name of the weights file, in the folder of the card.
        sha256: Hash of the weights file.
        probe: Answers to reproduce before the first window is believed; where there are none, it is only checked
            that answers are what `output` says, and that they do not depend on the batch.
        licence: Licence of the weights.
        trained_on: The data they were trained on.
        notes: What else a user should know.
    """

    name: Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    architecture: str
    architecture_args: dict[str, bool | int | FiniteFloat | str] = Field(default_factory=dict)
    source_sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    class_names: Annotated[tuple[str, ...], Field(min_length=2)]
    positive_class: str | tuple[str, ...]
    output: OutputKind = "logits"
    output_name: str = ""
    window_px: Side
    input_px: Side
    resize: Resize = "torch"
    spacing_um_px: Annotated[Positive, Field(le=100)]
    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat]
    std: tuple[Positive, Positive, Positive]
    weights: str
    sha256: Sha256
    probe: tuple[Probe, ...] = ()
    licence: str = ""
    trained_on: str = ""
    notes: str = ""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        """Verify conditions that involve several fields."""
        if len(set(self.class_names)) != len(self.class_names):
            raise ValueError(f"class_names {list(self.class_names)} holds a name twice")
        if not self.positive_names or set(self.positive_names) - set(self.class_names):
            raise ValueError(f"positive_class {self.positive_class!r} is not one of {list(self.class_names)}")
        if any(len(probe.probabilities) != len(self.class_names) for probe in self.probe):
            raise ValueError(f"a probe does not hold one probability for each of {list(self.class_names)}")
        if self.output == "sigmoid" and len(self.positive_names) > 1:
            raise ValueError(f"positive_class {self.positive_class!r} adds labels that do not exclude each other")
        if max(*map(abs, self.mean), *self.std) > _LARGEST_SCALE:
            raise ValueError(
                f"mean {list(self.mean)} and std {list(self.std)} are not of pixels from 0 to 1: divide both by 255"
            )
        if self.architecture.startswith(PYTHON) and not self.source_sha256:
            raise ValueError(f"architecture {self.architecture!r} needs source_sha256, the hash of its source file")
        if Path(self.weights).name != self.weights or self.weights in {"", ".."}:
            raise ValueError(f"weights {self.weights!r} is not a plain file name in the folder of the card")
        return self

    @property
    def is_built_in(self) -> bool:
        """Whether the architecture is one of wsiflow's own, all of which can run over whole regions."""
        return ":" not in self.architecture and self.architecture not in {TORCHSCRIPT, EXPORT, ONNX}

    @property
    def positive_names(self) -> tuple[str, ...]:
        """Names of the positive classes, without repetition."""
        names = (self.positive_class,) if isinstance(self.positive_class, str) else self.positive_class
        return tuple(dict.fromkeys(names))

    @property
    def positive_indices(self) -> tuple[int, ...]:
        """Indices of the positive classes among the classes, ascending."""
        return tuple(sorted(self.class_names.index(name) for name in self.positive_names))


class _Transform(BaseModel, frozen=True, extra="forbid"):
    """One step of the preprocessing in WSInfer's model JSON."""

    name: Literal["Resize", "ToTensor", "Normalize"]
    arguments: dict[str, Any] | None = None


class _WSInferConfig(BaseModel, frozen=True, extra="ignore"):
    """The keys of WSInfer's model JSON that decide how the model is used; other keys are ignored."""

    num_classes: Annotated[int, Field(ge=2)]
    class_names: tuple[str, ...]
    transform: tuple[_Transform, ...]
    patch_size_pixels: Side
    spacing_um_px: Positive
    architecture: str

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        """Verify conditions that involve several fields."""
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}, but class_names are {list(self.class_names)}")
        return self


def card_path(spec: ModelSpec) -> Path:
    """Return the path of the card; the weights are in the same folder."""
    name = str(spec.card)
    return Path(__file__).parent / "weights" / name.removeprefix(PACKAGED) if name.startswith(PACKAGED) else spec.card


def shipped() -> list[str]:
    """Return the names of the cards that ship with wsiflow."""
    return sorted(path.name for path in (Path(__file__).parent / "weights").glob("*.json"))


def as_it_is(card: Path, *, trust: bool) -> ModelSpec:
    """Return the settings that use a model as its card says; with trust, also one that is code, pinned by its own hash.

    Raises:
        InputError: The card is missing or is not JSON.
        EnvironmentFault: The system refuses to read the card.
    """
    bare = ModelSpec(card=card, trust_torchscript=trust, trust_python=trust, sha256="", positive_class="")
    if not trust:
        return bare
    path = card_path(bare)
    return bare.model_copy(update={"sha256": str(_object(_read_text(path), path).get("sha256", ""))})


def read_card(spec: ModelSpec) -> ModelCard:
    """Read the card that the settings name; their positive class, if any, replaces that of the card.

    Raises:
        InputError: The card is missing, is not JSON, has unknown keys or missing or invalid values, has another hash
            than the settings pin, names a TorchScript program that the settings do not trust, or lacks a class that
            they name.
        EnvironmentFault: The system refuses to read the card.
    """
    path = card_path(spec)
    text = _read_text(path)
    card = _from_wsinfer(text, spec) if "num_classes" in _object(text, path) else _parse(ModelCard, text, path)
    _check_trust(card, spec)
    if spec.sha256 not in {"", card.sha256}:
        raise InputError(
            f"the card has sha256 {card.sha256}, but the configuration pins {spec.sha256}",
            "check the source of the card, then set model.sha256 to the hash of the intended weights",
            path=spec.card,
        )
    card = _with_positive_class(card, spec)
    map_indices(card, spec)
    return card


def map_indices(card: ModelCard, spec: ModelSpec) -> tuple[int, ...]:
    """Return the indices of the classes that are mapped beside the positive score, ascending.

    A class that is the positive score has that heatmap already.

    Raises:
        InputError: The settings name a class that the card does not have, or one twice.
    """
    if spec.maps == "all":
        names = card.class_names
    else:
        names = tuple(filter(None, (spec.maps,))) if isinstance(spec.maps, str) else spec.maps
    for name in names:
        if name not in card.class_names:
            lowered = {known.casefold(): known for known in card.class_names}
            near = difflib.get_close_matches(name.casefold(), lowered, n=1)
            cause = f"model.maps names {name!r}, which is not one of {list(card.class_names)}"
            cause += f" (did you mean {lowered[near[0]]}?)" if near else ""
            raise InputError(cause, "name classes of the card, or set model.maps=all", path=spec.card)
        if names.count(name) > 1:
            raise InputError(f"model.maps names {name!r} twice", "name each class once", path=spec.card)
    indices = sorted(card.class_names.index(name) for name in names)
    return tuple(index for index in indices if (index,) != card.positive_indices)


def map_names(card: ModelCard, spec: ModelSpec) -> tuple[str, ...]:
    """Return the names of the classes that `map_indices` returns."""
    return tuple(card.class_names[index] for index in map_indices(card, spec))


def read_weights(spec: ModelSpec, card: ModelCard) -> bytes:
    """Return the bytes of a card's weights file; it is read once, so that the bytes used are those that were hashed.

    Raises:
        InputError: The file is missing, or its hash is not that of the card.
        EnvironmentFault: The system refuses to read the file.
    """
    path = card_path(spec)
    weights = path.parent / card.weights
    try:
        data = weights.read_bytes()
    except OSError as error:
        advice = f"put the file that {path.name} names into its folder"
        raise faults.unreadable(error, "the weights", advice, path=weights) from error
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != card.sha256:
        raise InputError(
            f"the weights have SHA-256 {sha256}, but {path.name} expects {card.sha256}",
            "fetch the card and the weights again from their source",
            path=weights,
        )
    return data


def identity(card: ModelCard) -> str:
    """Return a SHA-256 in hexadecimal over exactly those values of a card that can change a probability."""
    relevant = card.model_dump(
        mode="json",
        include={
            "architecture",
            "architecture_args",
            "window_px",
            "input_px",
            "spacing_um_px",
            "mean",
            "std",
            "sha256",
        },
    )
    # A key that a card had before it could say more stays as it was, so that its runs go on.
    relevant |= (
        {"positive_index": card.positive_indices[0]}
        if len(card.positive_indices) == 1
        else {"positive_indices": card.positive_indices}
    )
    relevant |= card.model_dump(include={"output", "output_name", "source_sha256", "resize"}, exclude_defaults=True)
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def _read_text(path: Path) -> str:
    """Return the text of a card."""
    remedy = "set model.card to the JSON file of a model card"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CARD_BYTES + 1)
    except OSError as error:
        raise faults.unreadable(error, "the model card", remedy, path=path) from error
    if len(data) > MAX_CARD_BYTES:
        raise InputError(f"the model card has more than {MAX_CARD_BYTES} bytes", remedy, path=path)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"the model card is not UTF-8 text: {error.reason} at byte {error.start}", remedy, path=path
        ) from error


def _object(text: str, path: Path) -> dict[str, Any]:
    """Return a card's JSON object."""
    try:
        raw = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"the model card is not JSON: {error}", "correct the file", path=path) from error
    if not isinstance(raw, dict):
        raise InputError(f"the model card is a JSON {type(raw).__name__}, not an object", "correct the file", path=path)
    return raw


def _parse(model: type[_Form], text: str, path: Path) -> _Form:
    """Return the text of a card, validated as the given model."""
    try:
        # In strict mode the text "0.5" is not a number, and 1 is not a name.
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        faults_of_card = [_fault(each) for each in error.errors(include_url=False)]
        remedy = "correct this key of the card" if len(faults_of_card) == 1 else "correct these keys of the card"
        raise InputError(f"model card: {'; '.join(faults_of_card)}", remedy, path=path) from error


def _fault(fault: ErrorDetails) -> str:
    """Return the key, the message and the value of one of pydantic's errors."""
    key = ".".join(str(part) for part in fault["loc"])
    value = "" if fault["type"] in {"missing", "value_error"} else f", but it is {str(fault['input'])[:60]!r}"
    return ": ".join(filter(None, [key, fault["msg"].removeprefix("Value error, ")])) + value


def parse_card(fields: Mapping[str, Any], path: Path) -> ModelCard:
    """Return the fields of a card, validated.

    Args:
        fields: The fields of `ModelCard`.
        path: The path that messages name.

    Raises:
        InputError: Fields are missing, unknown or invalid; the message names all of them.
    """
    return _parse(ModelCard, json.dumps(dict(fields)), path)


def wsinfer_fields(path: Path) -> dict[str, Any]:
    """Return the fields of a card that WSInfer's model JSON gives: classes, window, spacing and normalisation.

    Raises:
        InputError: The file is missing, is not such a JSON, or describes a preprocessing that is not known.
        EnvironmentFault: The system refuses to read the file.
    """
    return _wsinfer_fields(_parse(_WSInferConfig, _read_text(path), path), path)


def _from_wsinfer(text: str, spec: ModelSpec) -> ModelCard:
    """Return WSInfer's model JSON as a `ModelCard`; the hash of the weights is the one that the configuration pins."""
    config = _parse(_WSInferConfig, text, spec.card)
    if not spec.positive_class:
        raise InputError(
            f"WSInfer's model JSON does not say which of {list(config.class_names)} is the positive class",
            "set model.positive_class to one of them",
            path=spec.card,
        )
    fields = {
        "name": "wsinfer",
        "architecture": TORCHSCRIPT,
        "positive_class": config.class_names[0],
        "weights": WSINFER_WEIGHTS,
        # Without a pinned hash the card is refused later, in _check_trust.
        "sha256": spec.sha256 or "0" * 64,
    }
    return parse_card(fields | _wsinfer_fields(config, spec.card), spec.card)


def _wsinfer_fields(config: _WSInferConfig, path: Path) -> dict[str, Any]:
    """Return the fields of a card that WSInfer's model JSON gives."""
    input_px, mean, std = _preprocessing(config, path)
    return {
        "class_names": config.class_names,
        "window_px": config.patch_size_pixels,
        "input_px": input_px,
        # Its transform is that of torchvision on an image of Pillow.
        "resize": "torch" if input_px == config.patch_size_pixels else "pillow",
        "spacing_um_px": config.spacing_um_px,
        "mean": mean,
        "std": std,
        "notes": f"read from WSInfer's model JSON: {config.architecture}",
    }


def _preprocessing(config: _WSInferConfig, path: Path) -> tuple[Any, Any, Any]:
    """Return the input side, mean and std from the steps Resize (optional), ToTensor and Normalize (optional)."""
    steps = {step.name: step.arguments or {} for step in config.transform}
    expected = [name for name in ("Resize", "ToTensor", "Normalize") if name in steps]
    allowed = {"Resize": {"size"}, "ToTensor": set(), "Normalize": {"mean", "std"}}
    known = all(set(arguments) == allowed[name] for name, arguments in steps.items())
    if [step.name for step in config.transform] != expected or "ToTensor" not in steps or not known:
        raise InputError(
            f"transform {[(step.name, step.arguments) for step in config.transform]} is not Resize(size), ToTensor(), "
            "Normalize(mean, std)",
            "only these steps in this order can be reproduced; the first and the last may be absent",
            path=path,
        )
    normalize = steps.get("Normalize", {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    return steps.get("Resize", {"size": config.patch_size_pixels})["size"], normalize["mean"], normalize["std"]


def _check_trust(card: ModelCard, spec: ModelSpec) -> None:
    """Refuse a TorchScript program unless the settings trust it and pin its hash, and a function unless they do."""
    if card.architecture.startswith(PYTHON) and not spec.trust_python:
        raise InputError(
            f"{card.architecture} is code that can do anything with the rights of this account",
            "if you trust its source, set model.trust_python=true",
            path=spec.card,
        )
    if card.architecture != TORCHSCRIPT or (spec.trust_torchscript and spec.sha256):
        return
    raise InputError(
        f"{card.weights} is TorchScript, a program that can do anything with the rights of this account",
        "if you trust its source, set model.trust_torchscript=true and model.sha256=<its SHA-256>",
        path=spec.card,
    )


def _with_positive_class(card: ModelCard, spec: ModelSpec) -> ModelCard:
    """Return the card with the positive class of the settings, if they name one."""
    if not spec.positive_class or spec.positive_class == card.positive_class:
        return card
    chosen = card.model_copy(update={"positive_class": spec.positive_class})
    if set(chosen.positive_names) - set(card.class_names):
        raise InputError(
            f"model.positive_class {spec.positive_class!r} is not one of {list(card.class_names)}",
            "set it to one of them, or leave it empty for that of the card",
            path=spec.card,
        )
    return chosen
