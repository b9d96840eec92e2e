"""The formats of weights files, and the network of a model card."""

import re
from pathlib import Path

import torch
from torch import fx, nn

from wsiflow.errors import InputError
from wsiflow.model.architectures.registry import ARCHITECTURES
from wsiflow.model.card import ModelCard
from wsiflow.model.formats import export, onnx, state_dict, torchscript
from wsiflow.model.formats.format import Format

#: The formats that hold a network with its weights, by what a card names as ``architecture``.
FORMATS: dict[str, Format] = {each.name: each for each in (export.FORMAT, onnx.FORMAT, torchscript.FORMAT)}


def network(data: bytes, card: ModelCard, path: Path) -> nn.Module:
    """Return the network of a card in evaluation mode, from (n, 3, input_px, input_px) to its outputs (n, outputs).

    Args:
        data: Content of the weights file.
        card: The model card.
        path: Path of the weights file.

    Raises:
        InputError: The file is damaged or does not fit the card, or a weight is not finite.
        EnvironmentFault: A package that the card needs is not installed.
    """
    module = FORMATS.get(card.architecture, state_dict.FORMAT).read(data, card, path).eval().float()
    for name, tensor in module.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"the weight {name} is not finite", "export the weights again", path=path)
    return module if card.architecture in ARCHITECTURES and not card.output_name else _with_one_output(module, card)


def does_not_run(error: RuntimeError, n: int, card: ModelCard) -> InputError:
    """Return the error of a network that does not run on windows of the card's size."""
    reason = str(error).strip().splitlines()[-1][:200]
    remedy = "correct window_px or input_px in the card, or export the model for batches of any size"
    if any(name in reason for name in ("Half", "BFloat16")):
        remedy = "export it in single precision: model.float()"
    elif re.search(r"missing (value for|\d+ required positional) argument", reason):
        remedy = "export a network that takes images and nothing else"
    elif "but got 3 channels" in reason:
        remedy = "export a network that takes red, green and blue"
    return InputError(f"the model does not run on {n} windows of {card.input_px} px: {reason}", remedy)


class NamedOutput(nn.Module):
    """A network of whose outputs one is used."""

    def __init__(self, module: nn.Module, name: str | int) -> None:
        """Build the module.

        Args:
            module: A network that returns a dictionary or a sequence of tensors.
            name: Key or index of the output to return.
        """
        super().__init__()
        self.module, self.name = module, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output with the name, for images (n, 3, h, w)."""
        chosen: torch.Tensor = self.module(x)[self.name]
        return chosen


def _with_one_output(module: nn.Module, card: ModelCard) -> nn.Module:
    """Return a network that returns one tensor: itself, or the output that the card names, or its only one.

    Raises:
        InputError: The network does not run, or the card does not name one of its several outputs, or one that is not
            there.
    """
    try:
        with torch.inference_mode():
            outputs = module(torch.zeros(2, 3, card.input_px, card.input_px))
    except RuntimeError as error:
        raise does_not_run(error, 2, card) from error
    if isinstance(outputs, torch.Tensor):
        if card.output_name:
            raise InputError(
                f"the model returns one output without a name, and output_name is {card.output_name!r}",
                "leave output_name out of the card; output is logits, probabilities or sigmoid",
            )
        return module
    named = dict(outputs) if isinstance(outputs, dict) else dict(enumerate(outputs))
    only_one = len(named) == 1 and not card.output_name
    matches = [name for name in named if only_one or str(name) == card.output_name]
    if len(matches) == 1:
        if isinstance(module, fx.GraphModule):
            return _cut_to_one_output(module, matches[0])
        return NamedOutput(module, matches[0]).eval()
    shapes = ", ".join(f"{name} {tuple(getattr(value, 'shape', ()))}" for name, value in named.items())
    raise InputError(
        f"the model returns {len(named)} outputs ({shapes}), and output_name is {card.output_name!r}",
        f"name the one that holds {list(card.class_names)} (output_name in the card, --output-name)",
    )


def _cut_to_one_output(module: fx.GraphModule, name: str | int) -> fx.GraphModule:
    """Return a program that computes one of its outputs alone."""
    # As a part of another module its calls would lose the names of their layers.
    (output,) = module.graph.find_nodes(op="output")
    (results,) = output.args
    output.args = (results[name],)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module
