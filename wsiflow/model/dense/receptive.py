"""The layers of a window classifier with their receptive fields, strides, padding and multiplications.

Input: a classifier. Output: its layers in order, each with its map of one window. Only shapes are computed, on
PyTorch's meta device, so no map is allocated.

The network is traced for one window. Pairs are (rows, cols).
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from wsiflow.errors import InputError
from wsiflow.model.classifier import Classifier
from wsiflow.model.dense import layers
from wsiflow.model.dense.layers import Op, cannot_run_dense
from wsiflow.model.dense.operations import Pair

# Exceptions that a forward method may raise if its input is not a real tensor.
_TRACING = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_BATCH = 2  # greater than one, so that a flattened batch differs from a flattened map


class Span(NamedTuple):
    """One axis of a window's map.

    Unless a layer pads after another has cropped, `begin_px` and `end_px` are the receptive field of element 0. That of
    element i is ``i * spacing_px`` further on. An element is the same in all regions that contain its receptive field.

    Attributes:
        side: Number of elements.
        begin_px: Last position, relative to the begin of the window, at which a region may begin.
        end_px: First position, relative to the end of the window, at which a region may end.
        first: First element whose receptive field contains no padding.
        last: One past the last such element; at most `first` if there is none.
    """

    side: int
    begin_px: int
    end_px: int
    first: int
    last: int


class Layer(NamedTuple):
    """One step of the network.

    Attributes:
        node: The call in the traced network.
        names: Paths of the modules that end with this step, the outermost first.
        op: Its operation.
        inputs: The calls whose maps it takes.
        channels: Number of channels of its map.
        spans: Rows and columns of its map.
        spacing_px: Distance between neighbouring elements of its map, px.
        stride: Stride of the operation; 1 if its map has one element, whatever its nominal stride.
        behind: Padding behind (bottom, right) that the operation needs; negative for elements that it leaves unused.
        macs: Multiplications for each element of its map.
        vector: Whether its result for a window is a feature vector and not a map.
    """

    node: fx.Node
    names: tuple[str, ...]
    op: Op
    inputs: tuple[fx.Node, ...]
    channels: int
    spans: tuple[Span, Span]
    spacing_px: int
    stride: int = 1
    behind: Pair = (0, 0)
    macs: int = 0
    vector: bool = False

    @property
    def side(self) -> Pair:
        """Number of rows and columns of the window's map."""
        return (self.spans[0].side, self.spans[1].side)

    @property
    def window_macs(self) -> int:
        """Multiplications of this layer for one window."""
        return self.macs * math.prod(self.side)


def trace_layers(classifier: Classifier) -> tuple[fx.GraphModule, list[Layer]]:
    """Return the traced network of a classifier and its layers, from the image to the logits.

    Raises:
        InputError: The network cannot run over whole regions; the message names the layer and the reason.
    """
    traced = _traced(classifier)
    for node in traced.graph.nodes:
        with _named_errors(traced, node):
            layers.check(node, _module(traced, node))
    values = _values(traced, classifier.window_px)
    side = classifier.window_px
    known: dict[fx.Node, Layer] = {}
    for node in traced.graph.nodes:
        if node.op == "output":
            return traced, _with_module_names(_needed_layers(known, node, len(classifier.class_names)))
        if node.op == "placeholder" and not known:
            span = Span(side, 0, 1 - side, 0, side)
            known[node] = Layer(node, (), layers.EACH, (), 3, (span, span), 1)
        elif isinstance(values[node], torch.Tensor) and node.op != "get_attr":
            known[node] = _layer(traced, node, values, known)
    raise cannot_run_dense("the network returns nothing")


def _traced(classifier: Classifier) -> fx.GraphModule:
    """Return the traced graph of the classifier's network."""
    module = classifier.module
    if isinstance(module, torch.jit.ScriptModule):
        raise cannot_run_dense("the model is a TorchScript program, whose layers cannot be read")
    if classifier.input_px != classifier.window_px:
        raise cannot_run_dense(
            f"the model resizes windows of {classifier.window_px} px to {classifier.input_px} px, each by itself"
        )
    try:
        return fx.symbolic_trace(module)
    except _TRACING as error:
        raise cannot_run_dense(f"the model cannot be traced: {str(error).splitlines()[0][:200]}") from error


class _Shapes(fx.Interpreter):
    """An interpreter that runs a network on the meta device and stores the result of every call."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        # A tensor that is neither a parameter nor a buffer is not moved to the device with its module.
        self.values[n] = result.to("meta") if isinstance(result, torch.Tensor) else result
        return self.values[n]


def _values(traced: fx.GraphModule, side: int) -> dict[fx.Node, Any]:
    """Return the result of each call for a window: a tensor without data, or a number, which is a constant."""
    shapes = _Shapes(copy.deepcopy(traced).to("meta"))
    try:
        shapes.run(torch.empty((_BATCH, 3, side, side), device="meta"))
    except _TRACING as error:
        reason = str(error).splitlines()[0][:200]
        raise cannot_run_dense(
            f"the model does not run on PyTorch's meta device with a window of {side} px: {reason}"
        ) from error
    values = {node.name: value for node, value in shapes.values.items()}
    return {node: values[node.name] for node in traced.graph.nodes}


def _maps(node: fx.Node, known: dict[fx.Node, Layer]) -> tuple[fx.Node, ...]:
    """Return the inputs of a call that are maps of known layers."""
    return tuple(other for other in node.all_input_nodes if other in known)


def _layer(traced: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], known: dict[fx.Node, Layer]) -> Layer:
    """Return the layer of a call, given the results of all calls and the layers before it."""
    out, inputs = values[node], tuple(known[other] for other in _maps(node, known))
    module = _module(traced, node)
    args = fx.node.map_arg(node.args, values.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
    with _named_errors(traced, node):
        if not inputs:
            raise cannot_run_dense("it creates a map that depends only on the size of the window")
        op = layers.read(node, module, args, kwargs, out)
        _check_inputs(op, node, inputs, values, module)
        return _layer_of_op(node, op, inputs, out, module)


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls, or None."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


@contextmanager
def _named_errors(traced: fx.GraphModule, node: fx.Node) -> Iterator[None]:
    """Add the name of the layer to every `InputError` of the body."""
    try:
        yield
    except InputError as error:
        raise with_layer_name(node, error, _module(traced, node)) from error


def with_layer_name(node: fx.Node, error: InputError, module: nn.Module | None = None) -> InputError:
    """Return the error of a layer with the layer's name in its message."""
    path = next((path for path, _ in reversed(node.meta.get("nn_module_stack", {}).values())), "") or node.name
    kind = type(module).__name__ if module is not None else getattr(node.target, "__name__", node.target)
    return InputError(f"layer {path} ({kind}) cannot run over whole regions: {error.cause}", error.remedy)


def _check_inputs(
    op: Op, node: fx.Node, inputs: tuple[Layer, ...], values: dict[fx.Node, Any], module: nn.Module | None
) -> None:
    """Refuse maps that are not on the same grid, and constants that vary over the map."""
    if len({layer.side for layer in inputs}) > 1:
        raise cannot_run_dense("it combines every place of a map with features of the whole map (squeeze-and-excite)")
    if len({layer.spacing_px for layer in inputs}) > 1:
        raise cannot_run_dense("it joins maps of different strides")
    flattened = inputs[0].vector and inputs[0].side != (1, 1)
    weighted = module is not None and any(True for _ in module.parameters())
    if flattened and op.kind != "linear" and (op.kind != "each" or weighted):
        raise cannot_run_dense("it works on a flattened map")
    others = [other for other in node.all_input_nodes if other not in {layer.node for layer in inputs}]
    if op.kind in {"each", "join"} and any(other.op != "get_attr" for other in others):
        raise cannot_run_dense("it uses the size of the window in a computation")
    constants = [values[other] for other in others if isinstance(values[other], torch.Tensor)]
    if any(not inputs[0].vector and set(other.shape[-2:]) - {1} for other in constants):
        raise cannot_run_dense("it adds or multiplies constants that vary over the map")


def _layer_of_op(
    node: fx.Node, op: Op, inputs: tuple[Layer, ...], out: torch.Tensor, module: nn.Module | None
) -> Layer:
    """Return the layer of an operation on its input maps."""
    source = inputs[0]
    spans = tuple(_union([layer.spans[axis] for layer in inputs]) for axis in (0, 1))
    maps = tuple(layer.node for layer in inputs)
    if op.kind in {"each", "join", "flat"}:
        channels = source.channels if op.kind == "flat" else _features(out, source)
        place = (spans[0], spans[1])
        return Layer(node, (), op, maps, channels, place, source.spacing_px, vector=out.dim() == 2)
    if op.kind == "linear":
        op = op._replace(kernel=source.side)
    side = _pair_of(out) if op.kind != "linear" else (1, 1)
    strides = {s for s, elements in zip(op.stride, side, strict=True) if elements > 1} or {1}
    if len(strides) > 1:
        raise cannot_run_dense(f"its stride is {op.stride[0]} along rows and {op.stride[1]} along columns")
    (stride,) = strides
    reach = tuple((k - 1) * d + 1 for k, d in zip(op.kernel, op.dilation, strict=True))
    behind = tuple(
        stride * (n - 1) + k - b - span.side for n, k, b, span in zip(side, reach, op.before, spans, strict=True)
    )
    if op.kind == "mean" and op.counted and any(e > b for e, b in zip(behind, op.before, strict=True)):
        raise cannot_run_dense("it includes padding in its divisor, but not the places outside of it (ceil_mode)")
    slid = tuple(
        _span_after_kernel(span, source.spacing_px, n, k, b, stride)
        for span, n, k, b in zip(spans, side, reach, op.before, strict=True)
    )
    return Layer(
        node,
        (),
        op,
        maps,
        int(out.shape[1]),
        (slid[0], slid[1]),
        source.spacing_px * stride,
        stride,
        (behind[0], behind[1]),
        _macs(module, op),
        out.dim() == 2,
    )


def _features(out: torch.Tensor, source: Layer) -> int:
    """Return the number of channels of a result; that of a flattened map is unchanged."""
    return int(out.shape[1]) if out.dim() == 4 or source.side == (1, 1) else source.channels


def _pair_of(out: torch.Tensor) -> Pair:
    """Return the rows and columns of a result; (1, 1) after a pooling that removes these axes."""
    return (int(out.shape[2]), int(out.shape[3])) if out.dim() == 4 else (1, 1)


def _macs(module: nn.Module | None, op: Op) -> int:
    """Return the number of multiplications for each element of the result."""
    if isinstance(module, nn.Conv2d | nn.Linear) and op.kind in {"conv", "linear"}:
        return module.weight.numel()
    return 0


def _union(spans: Sequence[Span]) -> Span:
    """Return the span of the result of joining maps on the same grid."""
    return Span(
        spans[0].side,
        min(span.begin_px for span in spans),
        max(span.end_px for span in spans),
        max(span.first for span in spans),
        min(span.last for span in spans),
    )


def _span_after_kernel(span: Span, spacing_px: int, side: int, reach: int, before: int, stride: int) -> Span:
    """Return the span of the map after sliding a kernel, which covers `reach` elements, over a map with this span."""
    shift = before * spacing_px
    # The elements under the kernel must exist and see no padding; cropping removes those at the border of any region.
    return Span(
        side,
        min(span.begin_px, 0) - shift,
        max(span.end_px - spacing_px, -span.side * spacing_px) + reach * spacing_px - shift,
        max(0, -(-(span.first + before) // stride)),
        min(side, (span.last - reach + before) // stride + 1),
    )


def _needed_layers(known: dict[fx.Node, Layer], output: fx.Node, n_classes: int) -> list[Layer]:
    """Return those layers in order on which the logits of a window depend."""
    (result,) = output.args
    if not isinstance(result, fx.Node) or result not in known:
        raise cannot_run_dense("the model does not return the logits of a window")
    if known[result].side != (1, 1) or known[result].channels != n_classes:
        raise cannot_run_dense(f"the model returns a map of {known[result].side} places instead of {n_classes} logits")
    needed = {result}
    for node in reversed(list(known)):
        if node in needed:
            needed.update(known[node].inputs)
    return [layer for node, layer in known.items() if node in needed]


def _with_module_names(network: list[Layer]) -> list[Layer]:
    """Return the layers, each with the names of the modules that end with it."""
    stacks = [[path for path, _ in layer.node.meta.get("nn_module_stack", {}).values()] for layer in network]
    ends = {path: place for place, stack in enumerate(stacks) for path in stack}
    return [
        layer._replace(names=tuple(path for path in stack if path and ends[path] == place))
        for place, (layer, stack) in enumerate(zip(network, stacks, strict=True))
    ]
