"""The graph of an ONNX file as a graph of PyTorch's functions, for batches of any size.

Input: the nodes and weights of a graph. Output: an ``fx.GraphModule``. What depends on weights and on lengths of axes
alone is computed while the graph is translated, so that no arithmetic on shapes is left in the result.

Shapes are computed on PyTorch's meta device, with a batch of `BATCH` images. No other axis is as long, and `BATCH` is a
prime number, so a length that it divides is the batch, or a multiple of it, wherever arithmetic on shapes has put it.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from wsiflow.errors import InputError

BATCH = 1_000_000_007
#: A constant, which is a tensor, or what depends on the images, which is a node of the translated graph.
Value = Any
# Functions after which a number no longer shows that it was computed from the length of the batch.
_HIDING = frozenset({torch.div, torch.pow, torch.sqrt, torch.reciprocal, torch.exp, torch.log, torch.sin, torch.cos})
DYNAMIC_BATCH = (
    'export it with a dynamic batch: torch.onnx.export(model, (image,), file, dynamic_shapes=({0: "batch"},)), or '
    'dynamic_axes={"input": {0: "batch"}} with dynamo=False'
)


class NodeFields(NamedTuple):
    """A node of an ONNX graph.

    Attributes:
        kind: Name of the operator, as ``Conv``.
        name: Name of the node, for messages.
        inputs: Names of its inputs; empty for optional ones that are not given.
        outputs: Names of its outputs.
        attributes: Its attributes; tensors are PyTorch's.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def fault(self, reason: str, remedy: str) -> InputError:
        """Return the error of this node."""
        return InputError(f"operator {self.kind} (node {self.name!r}) {reason}", remedy)


class Operator(nn.Module):
    """A function as a module, whose path is the name that messages about a layer have."""

    def __init__(self, function: Callable[..., Any]) -> None:
        """Build the module.

        Args:
            function: The function to call.
        """
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the function's result."""
        return self.function(*args, **kwargs)


def batch_length(image: torch.Tensor, factor: int) -> int:
    """Return the number of images, times a factor."""
    return image.shape[0] * factor


def count_to_batch(image: torch.Tensor, start: int, factor: int, step: int) -> torch.Tensor:
    """Return the whole numbers from one on below the number of images times a factor."""
    return torch.arange(start, image.shape[0] * factor, step, device=image.device)


class Translation:
    """A graph under translation."""

    def __init__(self, opset: int, side: int, *, fixed_batch: int | None) -> None:
        """Begin the translation of a graph.

        Args:
            opset: Version of the operators.
            side: Side of the images, px.
            fixed_batch: Number of images for which the file was exported; None for any number.
        """
        self.opset, self.fixed_batch = opset, fixed_batch
        self.graph = fx.Graph()
        self.image = self.graph.placeholder("x")
        self.image.meta["val"] = torch.empty((BATCH, 3, side, side), device="meta")
        self._members: dict[str, Any] = {}  # modules and weights of the result by their paths
        self._names: dict[int, str] = {}  # of weights, by their identity
        self._nodes: dict[int, fx.Node] = {}  # of weights, by their identity
        self._batches: set[int] = set()  # identities of constants that hold the length of the batch
        self._alive: list[torch.Tensor] = []  # an identity is only unique among those that exist

    def call(self, path: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Value:
        """Return the result of a function: a constant if its arguments are constants, or a new node of the graph.

        Args:
            path: Name of the node in the file.
            function: The function.
            args: Its arguments: constants, nodes, numbers, and tuples of them.
            kwargs: Likewise.
        """
        if not any(isinstance(value, fx.Node) for value in _leaves((args, kwargs))):
            return self._computed(function, args, kwargs)
        args, kwargs = _mapped(args, self._as_node), _mapped(kwargs, self._as_node)
        node = self.graph.call_module(self._add(path_of(path), Operator(function)), args, kwargs)
        node.meta["val"] = function(*_mapped(args, _meta), **_mapped(kwargs, _meta))
        return node

    def function_of(self, value: Value) -> Callable[..., Any] | None:
        """Return the function whose result a value is, or None for a constant or the images."""
        member = self._members[str(value.target)] if isinstance(value, fx.Node) and value.op == "call_module" else None
        return None if member is None else member.function

    def is_count(self, value: Value) -> bool:
        """Return whether a value depends on the images through their number alone."""
        if not isinstance(value, fx.Node) or self.function_of(value) in {batch_length, count_to_batch}:
            return True
        return value is not self.image and all(map(self.is_count, value.all_input_nodes))

    def at_batch(self, value: Value, batch: int) -> Value:
        """Return a value that depends on the number of images alone, for a number of them."""
        if not isinstance(value, fx.Node):
            return value
        if value is self.image:
            return torch.empty((batch, 3, 1, 1))
        member = self._members[str(value.target)]
        if isinstance(member, torch.Tensor):
            return member
        args, kwargs = (_mapped(part, lambda other: self.at_batch(other, batch)) for part in (value.args, value.kwargs))
        return member.function(*args, **kwargs)

    def weight(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Return a weight, whose name in the file is known from now on."""
        self._names[id(tensor)] = name
        self._alive.append(tensor)
        return tensor

    def lengths(self, lengths: Sequence[int]) -> torch.Tensor:
        """Return lengths of axes as a constant."""
        return self._noted(torch.tensor(lengths, dtype=torch.int64))

    def finish(self, outputs: Mapping[str, Value]) -> fx.GraphModule:
        """Return the translated graph, which returns its only output, or several by their names."""
        nodes = {name: self._as_node(value) for name, value in outputs.items()}
        self.graph.output(next(iter(nodes.values())) if len(nodes) == 1 else nodes)
        module = fx.GraphModule(self._members, self.graph)
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
        for name, tensor in list(module.named_buffers(recurse=False)):
            if id(tensor) not in self._names:  # not a weight of the file, which may be infinite, as a mask is
                module.register_buffer(name, tensor, persistent=False)
        return module

    def _computed(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Value:
        """Return the result of a function of constants."""
        result = function(*args, **kwargs)
        if any(id(value) in self._batches for value in _leaves((args, kwargs))):
            for tensor in _leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self._noted(tensor, always=tensor.is_floating_point() and function in _HIDING)
        return result

    def _noted(self, tensor: torch.Tensor, *, always: bool = False) -> torch.Tensor:
        """Return a constant, noted as one that holds the length of the batch if it does."""
        if always or (tensor.dtype != torch.bool and bool((tensor.abs() >= BATCH // 2).any())):
            self._batches.add(id(tensor))
            self._alive.append(tensor)
        return tensor

    def _as_node(self, value: Any) -> Any:
        """Return a constant as the node of a weight; anything else is returned as it is."""
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in self._batches:
            raise ValueError("it computes with the number of images in the batch")
        if id(value) not in self._nodes:
            name = re.sub(r"\W", "_", self._names.get(id(value), "constant"))
            node = self.graph.get_attr(self._add(f"_{name}", value))
            node.meta["val"] = value.to("meta")
            self._nodes[id(value)] = node
            self._alive.append(value)
        return self._nodes[id(value)]

    def _add(self, path: str, member: Any) -> str:
        """Add a module or a weight under a path that is not taken, and return the path."""
        number, free = 1, path
        while free in self._members:
            number += 1
            free = f"{path}_{number}"
        self._members[free] = member
        return free


def readable(text: str) -> str:
    """Return a text in which the length of the batch, and a multiple of it, have a name."""

    def named(match: re.Match[str]) -> str:
        factor, rest = divmod(int(match[0]), BATCH)
        return match[0] if rest or not factor else "batch" if factor == 1 else f"{factor}*batch"

    return re.sub(r"\d+", named, text)


def path_of(name: str) -> str:
    """Return the name of a node as the path of a module: ``/layer1/layer1.0/Conv`` is ``layer1.0.Conv``."""
    scopes: list[str] = []
    for scope in filter(None, name.split("/")):
        if scopes and scope.startswith(f"{scopes[-1]}."):
            scopes.pop()
        scopes.append(scope)
    return ".".join(re.sub(r"\W", "_", part) or "_" for scope in scopes for part in scope.split(".")) or "node"


def _meta(value: Any) -> Any:
    """Return the result of a node without its data; anything else is returned as it is."""
    return value.meta["val"] if isinstance(value, fx.Node) else value


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return arguments with a function applied to each of them, those in sequences and dictionaries too."""
    if isinstance(value, dict):
        return {name: _mapped(part, function) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_mapped(part, function) for part in value)
    return function(value)


def _leaves(value: Any) -> Iterable[Any]:
    """Yield arguments, those in sequences and dictionaries too."""
    if isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield value
