"""The part of a network behind the features that windows share, as the program has it, for any number of windows.

Input: a network, and the layer whose map is shared. Output: a PyTorch module from the maps of windows to their outputs.
Nothing in it needs to be local. A program holds the number of images that it was written for wherever a network changes
the shape of its maps, so a second program for another number tells which constants those are.
"""

import operator
from typing import Any

import torch
from torch import fx

from wsiflow.model.classifier import Classifier
from wsiflow.model.dense.layers import cannot_run_dense
from wsiflow.model.dense.receptive import Layer, Network
from wsiflow.model.program import BATCH, VIEWS, name_of, program, weight_of

_OTHER_BATCH = BATCH + 1
_MANY = "its program depends on the number of windows in a way that cannot be followed"


def module_alone(classifier: Classifier, network: Network, shared: Layer) -> fx.GraphModule:
    """Return the network behind a layer, from maps (n, channels, side, side) to outputs (n, outputs, 1, 1).

    Args:
        classifier: The classifier.
        network: Its network.
        shared: The layer, on whose map alone everything later depends.

    Raises:
        InputError: The program cannot be run for other numbers of windows.
    """
    other = program(classifier.module, classifier.window_px, _OTHER_BATCH)
    mine, theirs = ([(node.op, node.target) for node in each.graph.nodes] for each in (network.program, other))
    if mine != theirs:
        raise cannot_run_dense(_MANY)
    part = _Part(network.program, other, shared.node)
    needed = {layer.node for layer in network.layers} | {call.node for call in network.rest}
    for node, twin in zip(network.program.graph.nodes, other.graph.nodes, strict=True):
        if node in needed and any(each in part.done for each in node.all_input_nodes):
            outputs = part.done[node] = part.copied(node, twin)  # the last one needed is the result
    part.graph.output(part.graph.call_method("reshape", (outputs, (part.windows, -1, 1, 1))))
    part.graph.eliminate_dead_code()
    return fx.GraphModule(network.program, part.graph)


class _Part:
    """The new graph, and the nodes of the program that it has copies of."""

    def __init__(self, traced: fx.GraphModule, other: fx.GraphModule, shared: fx.Node) -> None:
        self.traced, self.other, self.graph = traced, other, fx.Graph()
        self.done = {shared: self.graph.placeholder("x")}
        self.windows = self.graph.call_method("size", (self.done[shared], 0))

    def copied(self, node: fx.Node, twin: fx.Node) -> fx.Node:
        """Append a copy of a call for any number of windows."""
        args, kwargs = self._value(node.args, twin.args), self._value(node.kwargs, twin.kwargs)
        if name_of(node) in VIEWS:
            # Features of windows need not have the layout in memory that a view of the program's maps relies on. The
            # method, unlike the operation, keeps the number of windows variable where backends trace this module.
            return self.graph.call_method("reshape", args, kwargs)
        return self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]

    def _value(self, value: Any, other: Any) -> Any:
        """Return an argument for any number of windows, from those for two numbers."""
        if isinstance(value, fx.Node):
            return self.done[value] if value in self.done else self._weight(value, other)
        if isinstance(value, list | tuple):
            return type(value)(self._value(*pair) for pair in zip(value, other, strict=True))
        if isinstance(value, dict):
            return {key: self._value(value[key], other[key]) for key in value}
        return self._windows(value) if value != other and self._is_count(value, other) else value

    def _is_count(self, value: Any, other: Any) -> bool:
        """Tell whether two different constants are multiples of the numbers of windows; refuse all others."""
        if not isinstance(value, int) or value * _OTHER_BATCH != other * BATCH:
            raise cannot_run_dense(_MANY)
        return True

    def _windows(self, count: int) -> fx.Node:
        """Return a multiple of the number of windows."""
        each = count // BATCH
        return self.graph.call_function(operator.mul, (self.windows, each)) if each > 1 else self.windows

    def _weight(self, node: fx.Node, twin: fx.Node) -> fx.Node:
        """Return a weight, or one that is repeated for every window, as a class token is."""
        weight, other = weight_of(self.traced, node), weight_of(self.other, twin)
        mine = self.graph.get_attr(str(node.target))
        if weight.shape == other.shape:
            return mine
        expected = (_OTHER_BATCH, *weight.shape[1:])
        if weight.shape[0] != BATCH or other.shape != expected or not torch.equal(weight[0].expand(expected), other):
            raise cannot_run_dense(_MANY)
        one = self.graph.call_function(torch.ops.aten.slice.Tensor, (mine, 0, 0, 1))
        return self.graph.call_method("expand", (one, self.windows, *weight.shape[1:]))
