"""``wsiflow model``: add a trained network, check that its card fits labelled patches, list what there is."""

import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiflow.errors import InputError

from ..options import positive
from ..terminal import say

if TYPE_CHECKING:
    from wsiflow.model.classifier import Classifier
    from wsiflow.model.dense.facts import DenseFacts

_IMAGENET = ("0.485,0.456,0.406", "0.229,0.224,0.225")
_FOLDER = Path("models")


def add_options(parser: ArgumentParser) -> None:
    """Add the three tasks with their arguments and options."""
    tasks = parser.add_subparsers(dest="task", required=True, metavar="add|check|list")
    _add_options(tasks.add_parser("add", help="make a card for trained weights, and try them"))
    check = tasks.add_parser("check", help="score labelled patches as the card says, and as it might have been meant")
    check.add_argument("card", type=Path)
    check.add_argument("--patches", type=Path, required=True, help="folder that holds a folder of images per class")
    check.add_argument("--limit", type=positive, default=100, help="patches of each class (100)")
    check.add_argument("--trust", action="store_true", help="run code that comes with the model")
    listed = tasks.add_parser("list", help="what ships with wsiflow, and the cards in some folders")
    listed.add_argument("folders", type=Path, nargs="*", help="folders of cards (models)")


def _add_options(parser: ArgumentParser) -> None:
    """Add the arguments and options of ``wsiflow model add``."""
    parser.add_argument(
        "file", type=Path, help=".pt2, .onnx, .safetensors, .pth, TorchScript, or a folder of Hugging Face or WSInfer"
    )
    parser.add_argument("--name", help="name of the model (that of the file)")
    parser.add_argument("--to", type=Path, default=_FOLDER, help="folder of the card and the weights (models)")
    parser.add_argument("--classes", help="names of the classes, in the order of the outputs: normal,tumor")
    parser.add_argument("--positive", help="the class to map, or several with + between them (the last one)")
    parser.add_argument("--window", help="side of the windows that it was trained on, px (224)")
    parser.add_argument("--input", help="side to which windows are resized, px (that of the window)")
    parser.add_argument(
        "--resize",
        choices=["torch", "pillow"],
        help="how windows are resized: as PyTorch does with tensors of 8 bits, or Pillow with images (torch)",
    )
    parser.add_argument("--spacing", help="spacing that it was trained at, um per px (0.5)")
    parser.add_argument("--mean", help=f"mean of red,green,blue from 0 to 1, which is subtracted ({_IMAGENET[0]})")
    parser.add_argument("--std", help=f"standard deviation, by which is divided ({_IMAGENET[1]})")
    parser.add_argument(
        "--output", help="logits, probabilities, sigmoid, or the name of one of several outputs, which has logits"
    )
    parser.add_argument("--output-name", help="the name where it is not logits that this output has")
    parser.add_argument(
        "--architecture", help="for weights alone: timm:resnet18, torchvision:..., python:module:function"
    )
    parser.add_argument("--args", help="further arguments of the architecture: key=value,key=value")
    parser.add_argument("--stride", type=positive, default=16, help="stride for which dense inference is shown (16)")
    parser.add_argument("--trust", action="store_true", help="run code that comes with the model")


def main(arguments: Namespace) -> int:
    """Do the task."""
    return {"add": _add, "check": _check, "list": _list}[arguments.task](arguments)


def _add(arguments: Namespace) -> int:
    """Write the card and the weights, and say what dense inference will do."""
    from wsiflow.model import add

    source = add.recognise(arguments.file)
    _require_trust(arguments, source.architecture)
    fields = _fields(arguments, source.known)
    if not source.architecture and "architecture" not in fields:
        add.require_weights(source.path)
        raise InputError(
            "the file holds weights alone, without the network",
            "give --architecture timm:NAME, torchvision:NAME or python:MODULE:FUNCTION",
            path=arguments.file,
        )
    card = add.add(source, fields, arguments.to)
    say(f"card     {card}")
    for line in _described(card, arguments.stride, trust=arguments.trust):
        say(line)
    say(f"use it   wsiflow run model=card model.card={card} dataset=folder dataset.folder=SLIDES")
    return 0


def _require_trust(arguments: Namespace, architecture: str) -> None:
    """Refuse a model that is code, unless the command line trusts it."""
    is_code = architecture == "torchscript" or str(arguments.architecture or "").startswith("python:")
    if is_code and not arguments.trust:
        raise InputError(
            "the model is code that can do anything with the rights of this account",
            "if you trust its source, give --trust",
            path=arguments.file,
        )


def _fields(arguments: Namespace, known: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the card from the command line, from what the folder says, and from answers."""
    raw: dict[str, str | None] = {
        "classes": arguments.classes or (",".join(known["class_names"]) if "class_names" in known else None),
        "window": arguments.window or _text(known.get("window_px")),
        "spacing": arguments.spacing or _text(known.get("spacing_um_px")),
        "mean": arguments.mean or _joined(known.get("mean")),
        "std": arguments.std or _joined(known.get("std")),
    }
    usual = {"window": "224", "spacing": "0.5", "mean": _IMAGENET[0], "std": _IMAGENET[1]}
    answers = _completed(raw, usual)
    classes = [name.strip() for name in answers["classes"].split(",")]
    window = _number(answers["window"], "--window", int)
    fields: dict[str, Any] = {
        "name": arguments.name or re.sub("[^A-Za-z0-9._-]+", "_", arguments.file.stem).strip("._-") or "model",
        "class_names": classes,
        "positive_class": _positive(arguments.positive, classes),
        "window_px": window,
        "input_px": _number(arguments.input, "--input", int) if arguments.input else known.get("input_px", window),
        "spacing_um_px": _number(answers["spacing"], "--spacing", float),
        "mean": _numbers(answers["mean"], "--mean"),
        "std": _numbers(answers["std"], "--std"),
    }
    if arguments.architecture:
        fields["architecture"] = arguments.architecture
    if arguments.args:
        fields["architecture_args"] = _pairs(arguments.args)
    return fields | _resize(arguments.resize, known.get("resize"), fields) | _output(arguments, known)


def _resize(how: str | None, known: str | None, fields: dict[str, Any]) -> dict[str, str]:
    """Return how windows are resized, if the command line or the model's folder says it.

    Raises:
        InputError: The command line says how, but windows are not resized.
    """
    if fields["window_px"] != fields["input_px"]:
        how = how or known
    elif how:
        cause = f"--resize is {how}, but windows of {fields['window_px']} px are not resized"
        raise InputError(cause, "give --input with the side to which they are, or leave --resize out")
    return {"resize": how} if how else {}


def _completed(given: dict[str, str | None], usual: dict[str, str]) -> dict[str, str]:
    """Return the values, asking on a terminal for those that were not given.

    Raises:
        InputError: Values are missing, and nobody can be asked; the message names all of them.
    """
    missing = [name for name, value in given.items() if not value]
    if missing and not sys.stdin.isatty():
        options = " ".join(f"--{name} {usual.get(name, 'normal,tumor')}" for name in missing)
        raise InputError(f"{' and '.join(missing)} of the model are not known", f"give {options}")
    answers = {name: value for name, value in given.items() if value}
    for name in missing:
        default = usual.get(name, "")
        answers[name] = _answer(f"{name}{f' [{default}]' if default else ''}: ") or default
    return answers


def _answer(question: str) -> str:
    try:
        return input(question).strip()
    except EOFError as error:
        raise InputError("the questions were not answered", "answer them, or give the options of --help") from error


def _output(arguments: Namespace, known: dict[str, Any]) -> dict[str, str]:
    """Return what the card says of the outputs."""
    kind = arguments.output or known.get("output", "logits")
    if kind in {"logits", "probabilities", "sigmoid"}:
        return {"output": kind, "output_name": arguments.output_name or ""}
    return {"output": "logits", "output_name": kind}


def _positive(text: str | None, classes: list[str]) -> str | list[str]:
    """Return the positive class or classes."""
    if not text or text in classes:
        return text or classes[-1]
    return [name.strip() for name in text.split("+")]


def _number(text: str, option: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise InputError(f"{option} is {text!r}", "give a number") from error


def _numbers(text: str, option: str) -> list[float]:
    """Return three numbers, one for each of red, green and blue."""
    parts = text.split(",")
    if len(parts) != 3:
        raise InputError(f"{option} is {text!r}", "give three numbers with commas between them: red,green,blue")
    return [_number(part, option, float) for part in parts]


def _pairs(text: str) -> dict[str, Any]:
    """Return arguments of an architecture from ``key=value,key=value``."""
    import yaml

    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and value for name, _, value in pairs):
        raise InputError(f"--args is {text!r}", "give name=value, with commas between several")
    return {name.strip(): yaml.safe_load(value) for name, _, value in pairs}


def _joined(values: Any) -> str | None:
    return ",".join(str(value) for value in values) if values else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _described(card: Path, stride: int, *, trust: bool) -> list[str]:
    """Return lines that say what dense inference does with a model."""
    from wsiflow.model import classifier, scorer
    from wsiflow.model.card import as_it_is

    loaded = classifier.load(as_it_is(card, trust=trust))
    try:
        facts = scorer.describe(loaded, stride)
    except InputError as error:
        return [f"windows  {error.cause}", *_described_local(loaded, stride)]
    speed = f"speed    {_gain(facts, stride)} than window by window"
    if facts.obstacle:
        deepest = facts.cuts[0]
        dense = f"dense    windows share it up to {deepest.name} ({deepest.share:.0%}); {facts.obstacle}"
        return [dense, speed, *_described_local(loaded, stride)]
    exact = "scores are exact" if not facts.padded else "scores differ from those of windows, as runs certify"
    return [f"dense    a score every {facts.grid_px} px; {exact}", speed]


def _described_local(loaded: "Classifier", stride: int) -> list[str]:
    """Return a line that says what ``dense.local=true`` does with a model; none where it changes nothing."""
    from wsiflow.model import scorer

    try:
        facts = scorer.describe(loaded, stride, local=True)
    except InputError:
        return []
    if facts.obstacle:
        return []
    return [f"or       dense.local=true: {_gain(facts, stride)}; scores differ from those of windows, as runs certify"]


def _gain(facts: "DenseFacts", stride: int) -> str:
    gain = facts.window_macs / (facts.dense_macs_px * stride**2)
    return f"{gain:.1f} times fewer multiplications at stride {stride}"


def _check(arguments: Namespace) -> int:
    """Say how the card fits labelled patches, and which misreading fits better."""
    from wsiflow.model import classifier, misreadings
    from wsiflow.model.card import as_it_is
    from wsiflow.slides import patches

    loaded = classifier.load(as_it_is(arguments.card, trust=arguments.trust))
    images, classes = patches.read_labelled(
        arguments.patches, loaded.class_names, loaded.window_px, limit=arguments.limit
    )
    card, *others = misreadings.readings(loaded, images, classes)
    say(f"the card         {card.accuracy:.1%} of {len(images)} patches right, loss {card.loss:.3f}")
    for other in others[:3]:
        say(f"if instead {other.meaning}: {other.accuracy:.1%} right, loss {other.loss:.3f}")
    if others and others[0].is_better:
        say(f"The card does not fit. It would if {others[0].meaning}: by {others[0].gain:.2f} nats per patch.")
        return InputError.exit_code
    say("The card fits better than every likely misreading of it.")
    return 0


def _list(arguments: Namespace) -> int:
    """Print a line for each card."""
    from wsiflow.model.card import PACKAGED, as_it_is, read_card, shipped

    cards = [Path(f"{PACKAGED}{name}") for name in shipped()]
    for folder in arguments.folders or [_FOLDER]:
        if arguments.folders and not folder.is_dir():
            raise InputError("there is no such folder", "name a folder of model cards", path=folder)
        cards += sorted(folder.glob("*.json"))
    for path in cards:
        try:
            card = read_card(as_it_is(path, trust=True))  # nothing of the model is run to read its card
        except InputError as error:
            say(f"{path!s:40} cannot be used: {error.cause}")
            continue
        about = f"{card.window_px} px at {card.spacing_um_px:g} um/px: {', '.join(card.class_names)}"
        say(f"{path!s:40} {card.architecture:24} {about}")
    return 0
