"""One node of an ONNX graph with its inputs, as the translation of its operator sees it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from wsiflow.errors import InputError
from wsiflow.model.formats.onnx.graph import NodeFields, Translation, Value

# Attributes that do not change the result of a network that runs and is not trained.
_IGNORED = {
    "momentum",
    "seed",
    "stash_type",
    "storage_order",
    "cubic_coeff_a",
    "extrapolation_value",
    "exclude_outside",
}
EXPORT_AGAIN = "export the model from PyTorch again, with opset_version=17"


class Operation:
    """A node of an ONNX graph with its inputs, and what is needed to translate it."""

    def __init__(self, translation: Translation, fields: NodeFields, inputs: Sequence[Value]) -> None:
        """Begin the translation of a node.

        Args:
            translation: The graph under translation.
            fields: The node.
            inputs: Its inputs; None for those that are not given.
        """
        self.translation, self.fields, self.opset = translation, fields, translation.opset
        self._inputs, self._read = inputs, set(_IGNORED)

    def input(self, index: int) -> Value:
        """Return an input, or None where it is not given."""
        return self._inputs[index] if index < len(self._inputs) else None

    @property
    def inputs(self) -> tuple[Value, ...]:
        """All inputs."""
        return tuple(self._inputs)

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute."""
        self._read.add(name)
        return self.fields.attributes.get(name, default)

    def constant(self, index: int) -> torch.Tensor | None:
        """Return an input that must not depend on the images, or None where it is not given."""
        value = self.input(index)
        if isinstance(value, fx.Node):
            raise self.refuse(f"computes its input {index} from the pixels")
        return value if value is None else torch.as_tensor(value)

    def numbers(self, name: str, index: int) -> list[int] | None:
        """Return whole numbers that are an attribute or, in later versions of an operator, an input."""
        value = self.attribute(name)
        if value is None:
            given = self.constant(index)
            value = None if given is None else given.flatten().tolist()
        return None if value is None else [int(each) for each in value]

    def shape(self, value: Value) -> tuple[int, ...]:
        """Return the lengths of a value's axes; that of the batch is `BATCH`."""
        return tuple((value.meta["val"] if isinstance(value, fx.Node) else value).shape)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Value:
        """Return the result of a function of PyTorch."""
        return self.translation.call(self.fields.name, function, args, kwargs)

    def refuse(self, reason: str, remedy: str = EXPORT_AGAIN) -> InputError:
        """Return the error of this node."""
        return self.fields.fault(reason, remedy)

    def check_attributes(self) -> None:
        """Refuse attributes that the translation did not read."""
        unknown = sorted(set(self.fields.attributes) - self._read)
        if unknown:
            raise self.refuse(f"has the attribute {unknown[0]}, which is not known")

    def axes(self, axes: Sequence[int], rank: int) -> list[int]:
        """Return axes counted from the first one."""
        if any(not -rank <= axis < rank for axis in axes):
            raise self.refuse(f"names the axes {list(axes)} of {rank}")
        return [axis % rank for axis in axes]
