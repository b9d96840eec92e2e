"""Conversion of the layers of a window classifier into a network for maps of any size.

Input: layers, and the stride with which each runs. Output: a PyTorch module that shares their weights, from the map of
the first layer to that of the last. Operations use PyTorch's own padding where it has the same effect.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx
from torch.nn import functional

from wsiflow.model.dense import operations
from wsiflow.model.dense.facts import DenseStride
from wsiflow.model.dense.layers import NCHW, POOLINGS, Op
from wsiflow.model.dense.operations import Pair
from wsiflow.model.dense.receptive import Layer
from wsiflow.model.program import arguments, called, name_of

_LARGE_KERNEL = 64


def dense_module(
    traced: fx.GraphModule, network: Sequence[Layer], strides: Mapping[fx.Node, DenseStride]
) -> fx.GraphModule:
    """Return the network of consecutive layers for maps of any size.

    Args:
        traced: The program of the network, which contains the weights.
        network: The layers; the first one is the input of the new network.
        strides: How each layer runs.
    """
    graph = fx.Graph()
    done = {network[0].node: graph.placeholder("x")}
    for layer in network[1:]:
        if layer.node in done:
            continue
        chain = _linear_after_mean(network, layer)
        if chain:
            x = done[layer.inputs[0]]
            if layer.op.steps:  # before the linear layer, which takes channels first
                x = graph.call_function(operations.reshaped, (x, layer.op.steps))
            head = _emit(graph, chain[-1], strides, {chain[-1].inputs[0]: x})
            mean = layer._replace(op=layer.op._replace(steps=()))
            pooled = _emit(graph, mean, strides, {layer.inputs[0]: head})
            done.update(dict.fromkeys((layer.node, *(other.node for other in chain)), pooled))
        else:
            done[layer.node] = _emit(graph, layer, strides, done)
    graph.output(done[network[-1].node])
    return fx.GraphModule(traced, graph)


def _linear_after_mean(network: Sequence[Layer], mean: Layer) -> list[Layer]:
    """Return the layers after a mean over the window up to a linear layer that reduces the number of channels.

    The list is empty if the mean is not followed by such a layer. The linear layer is then computed before the mean.
    """
    if mean.op.kind != "mean" or mean.side != (1, 1) or mean.op.steps or any(mean.op.before) or any(mean.behind):
        return []
    chain = [mean]
    while True:
        users = [layer for layer in network if chain[-1].node in layer.inputs]
        if len(users) != 1:
            return []
        chain += users
        op = users[0].op
        if op.kind in {"conv", "linear"} and op._replace(axes=NCHW) == Op(op.kind):
            return chain[1:] if users[0].channels < mean.channels else []
        if op.kind != "flat" or op.steps:
            return []


def _emit(
    graph: fx.Graph,
    layer: Layer,
    strides: Mapping[fx.Node, DenseStride],
    done: Mapping[fx.Node, fx.Node],
) -> fx.Node:
    """Append the operation of a layer for maps of any size to the graph, and return its result."""
    op, stride = layer.op, strides[layer.node].stride
    if op.kind in {"each", "join"}:
        return _copied_layer(graph, layer, done)
    x = done[layer.inputs[0]]
    if op.steps:
        x = graph.call_function(operations.reshaped, (x, op.steps))
    if op.kind == "flat":
        return x
    if op.kind in {"conv", "linear"}:
        result = _conv(graph, layer, stride, x)
    elif op.kind in POOLINGS:
        result = _pooled(graph, layer, stride, x)
    else:
        result = graph.call_function(operations.fitted, (x, op.before, layer.behind, op.value))
        result = graph.call_function(operations.every, (result, stride)) if stride > 1 else result
    split = layer.stride // stride
    return graph.call_function(operations.phases, (result, split)) if split > 1 else result


def _conv(graph: fx.Graph, layer: Layer, stride: int, x: fx.Node) -> fx.Node:
    """Append a convolution, or a linear layer as a convolution over the windows of a map."""
    op, given = layer.op, arguments(layer.node)
    weight, bias = (
        None if part is None else graph.get_attr(str(part.target))
        for part in (given.get("weight", given.get("mat2")), given.get("bias", given.get("self")))
    )
    if op.kind == "linear":
        if name_of(layer.node) != "linear":  # a product of matrices has the weight the other way round
            weight = graph.call_method("t", (weight,))
        weight = graph.call_method("reshape", (weight, layer.channels, -1, *op.kernel))
    x, padding = _padded(graph, layer, stride, x)
    return graph.call_function(functional.conv2d, (x, weight, bias, stride, padding, op.dilation, op.groups))


def _pooled(graph: fx.Graph, layer: Layer, stride: int, x: fx.Node) -> fx.Node:
    """Append a pooling."""
    op = layer.op
    if op.kind == "norm":
        x = graph.call_method("square", (x,))
    for part in _parts_of_pooling(layer, stride):
        x = _max(graph, part, stride, x) if op.kind == "max" else _mean(graph, part, stride, x)
    if op.kind == "norm":  # at the border of a region it is that of as many places as a window has
        n_places = math.prod(layer.side if layer.map.everywhere else op.kernel)
        x = graph.call_method("sqrt", (graph.call_function(operator.mul, (x, n_places)),))
    return graph.call_function(operations.reshaped, (x, op.after)) if op.after else x


def _parts_of_pooling(layer: Layer, stride: int) -> list[Layer]:
    """Return a pooling, in two parts where its kernel is large or as large as a window around every place.

    One along rows and one along columns give the same with far fewer additions. Their sums round less, too: in float32
    a mean of a million equal numbers, as in a large window's background, has only three right digits.
    """
    is_large = layer.map.everywhere or min(layer.op.kernel) >= _LARGE_KERNEL
    if layer.op.kernel == (1, 1) or stride > 1 or not is_large:
        return [layer]
    op, (bottom, right) = layer.op, layer.behind
    along_rows = op._replace(kernel=(op.kernel[0], 1), before=(op.before[0], 0))
    along_cols = op._replace(kernel=(1, op.kernel[1]), before=(0, op.before[1]))
    return [layer._replace(op=along_rows, behind=(bottom, 0)), layer._replace(op=along_cols, behind=(0, right))]


def _mean(graph: fx.Graph, layer: Layer, stride: int, x: fx.Node) -> fx.Node:
    """Append a mean pooling."""
    op = layer.op
    if not op.counted and max(*op.before, *layer.behind) > 0:
        return graph.call_function(operations.mean_inside, (x, op.kernel, stride, op.before, layer.behind))
    x, padding = _padded(graph, layer, stride, x)
    return graph.call_function(functional.avg_pool2d, (x, op.kernel, stride, padding))


def _max(graph: fx.Graph, layer: Layer, stride: int, x: fx.Node) -> fx.Node:
    """Append a max pooling, if possible with its own padding: engines and quantisers handle infinity less well."""
    op, margins = layer.op, list(zip(layer.op.before, layer.behind, strict=True))
    if all(0 <= b - e < stride for b, e in margins):
        return _pool(graph, op, stride, x, op.before)
    if all(0 <= e - b < stride for b, e in margins):
        return _pool(graph, op, stride, x, op.before, ceil_mode=True)
    wide = [max(0, b, e) for b, e in margins]
    if stride == 1 and all(2 * p <= k for p, k in zip(wide, op.kernel, strict=True)):
        pooled = _pool(graph, op, stride, x, (wide[0], wide[1]))
        excess = [tuple(m - p for m, p in zip(side, wide, strict=True)) for side in (op.before, layer.behind)]
        return graph.call_function(operations.fitted, (pooled, *excess, 0.0))
    x = graph.call_function(operations.fitted, (x, op.before, layer.behind, -math.inf))
    return _pool(graph, op, stride, x, (0, 0))


def _pool(graph: fx.Graph, op: Op, stride: int, x: fx.Node, padding: Pair, *, ceil_mode: bool = False) -> fx.Node:
    """Append a max pooling with PyTorch's own padding."""
    return graph.call_function(functional.max_pool2d, (x, op.kernel, stride, padding, op.dilation, ceil_mode))


def _padded(graph: fx.Graph, layer: Layer, stride: int, x: fx.Node) -> tuple[fx.Node, Pair]:
    """Return a map, padded with zeros if the operation's own padding is not sufficient, and the latter's width."""
    if all(0 <= b - e < stride for b, e in zip(layer.op.before, layer.behind, strict=True)):
        return x, layer.op.before
    return graph.call_function(operations.fitted, (x, layer.op.before, layer.behind, 0.0)), (0, 0)


def _copied_layer(graph: fx.Graph, layer: Layer, done: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Append a copy of a call whose operation is the same for maps of any size."""
    node, is_vector = layer.node, layer.op.axes is None

    def mapped(other: fx.Node) -> fx.Node:
        if other in done:
            return done[other]
        weight = graph.get_attr(str(other.target))
        over_places = is_vector and layer.op.kind == "join"
        return graph.call_function(operations.over_places, (weight,)) if over_places else weight

    if name_of(node) == "getitem":
        return graph.call_function(operator.getitem, (done[layer.inputs[0]], node.args[1]))
    given: dict[str, Any] = arguments(node) | dict(layer.op.given)
    given = {name: fx.node.map_arg(value, mapped) for name, value in given.items()}
    if is_vector and name_of(node) in {"layer_norm", "native_layer_norm"}:
        return graph.call_function(operations.layer_norm, tuple(given.values())[:5])
    return called(graph, node, given)
