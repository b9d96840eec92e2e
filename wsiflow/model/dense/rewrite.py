"""Conversion of the layers of a window classifier into a network for maps of any size.

Input: layers, and the stride with which each runs. Output: a PyTorch module that shares their weights, from the map of
the first layer to that of the last. Operations use PyTorch's own padding where it has the same effect.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn
from torch.nn import functional

from wsiflow.model.dense import operations
from wsiflow.model.dense.facts import DenseStride
from wsiflow.model.dense.layers import Op
from wsiflow.model.dense.operations import Pair
from wsiflow.model.dense.receptive import Layer


def dense_module(
    traced: fx.GraphModule, network: Sequence[Layer], strides: Mapping[fx.Node, DenseStride]
) -> fx.GraphModule:
    """Return the network of consecutive layers for maps of any size.

    Args:
        traced: The traced network, which contains the weights.
        network: The layers; the first one is the input of the new network.
        strides: How each layer runs.
    """
    graph = fx.Graph()
    done = {network[0].node: graph.placeholder("x")}
    for layer in network[1:]:
        if layer.node in done:
            continue
        chain = _linear_after_mean(traced, network, layer)
        if chain:
            head = _emit(graph, traced, chain[-1], strides, {chain[-1].inputs[0]: done[layer.inputs[0]]})
            pooled = _emit(graph, traced, layer, strides, {layer.inputs[0]: head})
            done.update(dict.fromkeys((layer.node, *(other.node for other in chain)), pooled))
        else:
            done[layer.node] = _emit(graph, traced, layer, strides, done)
    graph.output(done[network[-1].node])
    return fx.GraphModule(traced, graph)


def _linear_after_mean(traced: fx.GraphModule, network: Sequence[Layer], mean: Layer) -> list[Layer]:
    """Return the layers after a mean over the window up to a linear layer that reduces the number of channels.

    The list is empty if the mean is not followed by such a layer. The linear layer is then computed before the mean.
    """
    if mean.op.kind != "mean" or mean.side != (1, 1) or any(mean.op.before) or any(mean.behind):
        return []
    chain = [mean]
    while True:
        users = [layer for layer in network if chain[-1].node in layer.inputs]
        if len(users) != 1:
            return []
        chain += users
        op = users[0].op
        if op.kind in {"conv", "linear"} and op == Op(op.kind):
            return chain[1:] if users[0].channels < mean.channels else []
        if op.kind != "flat" and not _is_dropout(traced, users[0].node):
            return []


def _is_dropout(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a layer has no effect in evaluation mode."""
    if node.op == "call_module":
        return isinstance(traced.get_submodule(str(node.target)), nn.Dropout | nn.Dropout2d | nn.Identity)
    return node.target in {functional.dropout, functional.dropout2d}


def _emit(
    graph: fx.Graph,
    traced: fx.GraphModule,
    layer: Layer,
    strides: Mapping[fx.Node, DenseStride],
    done: Mapping[fx.Node, fx.Node],
) -> fx.Node:
    """Append the operation of a layer for maps of any size to the graph, and return its result."""
    op, stride = layer.op, strides[layer.node].stride
    if op.kind == "flat":
        return done[layer.inputs[0]]
    if op.kind in {"each", "join"}:
        return _copied_layer(graph, traced, layer, done)
    x = done[layer.inputs[0]]
    if op.kind in {"conv", "linear"}:
        result = _conv(graph, traced, layer, stride, x)
    elif op.kind == "max":
        result = _max(graph, layer, stride, x)
    elif op.kind == "mean":
        result = _mean(graph, layer, stride, x)
    else:
        result = graph.call_function(operations.fitted, (x, op.before, layer.behind, op.value))
        result = graph.call_function(operations.every, (result, stride)) if stride > 1 else result
    split = layer.stride // stride
    return graph.call_function(operations.phases, (result, split)) if split > 1 else result


def _conv(graph: fx.Graph, traced: fx.GraphModule, layer: Layer, stride: int, x: fx.Node) -> fx.Node:
    """Append a convolution, or a linear layer as a convolution over the windows of a map."""
    op, target = layer.op, str(layer.node.target)
    weight = graph.get_attr(f"{target}.weight")
    bias = None if traced.get_submodule(target).bias is None else graph.get_attr(f"{target}.bias")
    if op.kind == "linear":
        weight = graph.call_method("reshape", (weight, layer.channels, -1, *op.kernel))
    x, padding = _padded(graph, layer, stride, x)
    return graph.call_function(functional.conv2d, (x, weight, bias, stride, padding, op.dilation, op.groups))


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


def _copied_layer(graph: fx.Graph, traced: fx.GraphModule, layer: Layer, done: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Append a copy of a layer whose operation is the same for maps of any size."""
    node = layer.node
    module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, nn.BatchNorm1d):
        # BatchNorm1d refuses maps, although it computes the same as BatchNorm2d.
        names = ("running_mean", "running_var", "weight", "bias")
        parts = [None if getattr(module, part) is None else graph.get_attr(f"{node.target}.{part}") for part in names]
        return graph.call_function(functional.batch_norm, (done[layer.inputs[0]], *parts, False, 0.0, module.eps))

    def mapped(other: fx.Node) -> fx.Node:
        if other in done:
            return done[other]
        constant = graph.get_attr(str(other.target))
        return graph.call_function(operations.along_channels, (constant,)) if layer.vector else constant

    if node.target in {torch.cat, torch.concat}:  # the axis may be counted from the end of a vector
        tensors = node.args[0] if node.args else node.kwargs["tensors"]
        return graph.call_function(torch.cat, (fx.node.map_arg(tensors, mapped), 1))
    return graph.create_node(
        node.op, node.target, fx.node.map_arg(node.args, mapped), fx.node.map_arg(node.kwargs, mapped)
    )
