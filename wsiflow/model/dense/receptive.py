"""What each layer of a window classifier sees: receptive fields, strides and padding, and what it multiplies.

Input: a classifier. Output: its layers in order, each with the map it gives of one window. Only shapes are computed, on
PyTorch's meta device: nothing of a map's size is allocated.

A network is followed along one window. Pairs are (rows, cols).
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

# What a forward method may raise when it meets something that is no tensor.
_TRACING = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_BATCH = 2  # more than one, so that a flattened batch is not taken for a flattened map


class Span(NamedTuple):
    """One axis of a window's map.

    Where there is no padding behind cropping, `begin_px` and `end_px` are the receptive field of element 0; that of
    element i lies ``i * spacing_px`` further on. A region that contains it gives the element as any larger one does.

    Attributes:
        side: Elements.
        begin_px: Where a region may begin at the latest, from the window's begin.
        end_px: Where a region may end at the earliest, from the window's end.
        first: First element that sees no padding.
        last: One past the last such element; at most `first` where there is none.
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
        names: Modules that end with it, the outermost first.
        op: What it does.
        inputs: The maps it takes.
        channels: Channels of its map.
        spans: Rows and columns of its map.
        spacing_px: Distance of neighbouring elements in pixels.
        stride: Stride of the op: 1 where it gives one element, whatever it asks for.
        behind: Padding behind (bottom, right) that the op needs; negative: elements it leaves unused.
        macs: Multiplications for each place of its map.
        vector: Of a window it gives a vector of features, not a map.
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
        """Rows and columns of the window's map."""
        return (self.spans[0].side, self.spans[1].side)

    @property
    def window_macs(self) -> int:
        """Multiplications for one window."""
        return self.macs * math.prod(self.side)


def trace_layers(classifier: Classifier) -> tuple[fx.GraphModule, list[Layer]]:
    """Return the traced network and its layers, from the image to the logits.

    Raises:
        InputError: The network cannot run over whole regions; the layer and the reason are named.
    """
    traced = _traced(classifier)
    for node in traced.graph.nodes:
        with _named_errors(traced, node):
            layers.check(node, _module(traced, node))
    values = _values(traced, classifier.window_px)
    side = classifier.window_px
    found: dict[fx.Node, Layer] = {}
    for node in traced.graph.nodes:
        if node.op == "output":
            return traced, _named(_ended(found, node, len(classifier.class_names)))
        if node.op == "placeholder" and not found:
            span = Span(side, 0, 1 - side, 0, side)
            found[node] = Layer(node, (), layers.EACH, (), 3, (span, span), 1)
        elif isinstance(values[node], torch.Tensor) and node.op != "get_attr":
            found[node] = _layer(traced, node, values, found)
    raise cannot_run_dense("the network returns nothing")


def _traced(classifier: Classifier) -> fx.GraphModule:
    """Return the classifier's network as a graph."""
    module = classifier.module
    if isinstance(module, torch.jit.ScriptModule):
        raise cannot_run_dense("the model is a TorchScript program, whose layers cannot be read")
    if classifier.input_px != classifier.window_px:
        raise cannot_run_dense(
            f"the model resizes windows of {classifier.window_px} px to {classifier.input_px} px, each on its own"
        )
    try:
        return fx.symbolic_trace(module)
    except _TRACING as error:
        raise cannot_run_dense(f"the model cannot be traced: {str(error).splitlines()[0][:200]}") from error


class _Shapes(fx.Interpreter):
    """Runs a network without data and keeps what every call gave."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        # A tensor that is neither parameter nor buffer stays behind when a module moves.
        self.values[n] = result.to("meta") if isinstance(result, torch.Tensor) else result
        return self.values[n]


def _values(traced: fx.GraphModule, side: int) -> dict[fx.Node, Any]:
    """Return what each call gives of a window: a tensor without data, or a number, which then is a constant."""
    shapes = _Shapes(copy.deepcopy(traced).to("meta"))
    try:
        shapes.run(torch.empty((_BATCH, 3, side, side), device="meta"))
    except _TRACING as error:
        reason = str(error).splitlines()[0][:200]
        raise cannot_run_dense(
            f"the model does not run on the shapes of a window of {side} px alone: {reason}"
        ) from error
    values = {node.name: value for node, value in shapes.values.items()}
    return {node: values[node.name] for node in traced.graph.nodes}


def _maps(node: fx.Node, found: dict[fx.Node, Layer]) -> tuple[fx.Node, ...]:
    """Return the maps a call takes."""
    return tuple(other for other in node.all_input_nodes if other in found)


def _layer(traced: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], found: dict[fx.Node, Layer]) -> Layer:
    """Return the layer of a call."""
    out, inputs = values[node], tuple(found[other] for other in _maps(node, found))
    module = _module(traced, node)
    args = fx.node.map_arg(node.args, values.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
    with _named_errors(traced, node):
        if not inputs:
            raise cannot_run_dense("it makes a map that depends on the size of the window alone")
        op = layers.read(node, module, args, kwargs, out)
        _check_inputs(op, node, inputs, values, module)
        return _moved(node, op, inputs, out, module)


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the module a node calls, if it calls one."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


@contextmanager
def _named_errors(traced: fx.GraphModule, node: fx.Node) -> Iterator[None]:
    """Name the layer in what is refused inside."""
    try:
        yield
    except InputError as error:
        raise with_layer_name(node, error, _module(traced, node)) from error


def with_layer_name(node: fx.Node, error: InputError, module: nn.Module | None = None) -> InputError:
    """Return the error of a layer with its name."""
    path = next((path for path, _ in reversed(node.meta.get("nn_module_stack", {}).values())), "") or node.name
    kind = type(module).__name__ if module is not None else getattr(node.target, "__name__", node.target)
    return InputError(f"layer {path} ({kind}) cannot run over whole regions: {error.cause}", error.remedy)


def _check_inputs(
    op: Op, node: fx.Node, inputs: tuple[Layer, ...], values: dict[fx.Node, Any], module: nn.Module | None
) -> None:
    """Refuse maps that do not lie on one grid, and constants that differ from place to place."""
    if len({layer.side for layer in inputs}) > 1:
        raise cannot_run_dense("what is known of the whole map flows back into every place of it (squeeze-and-excite)")
    if len({layer.spacing_px for layer in inputs}) > 1:
        raise cannot_run_dense("maps of different strides meet in it")
    flattened = inputs[0].vector and inputs[0].side != (1, 1)
    weighted = module is not None and any(True for _ in module.parameters())
    if flattened and op.kind != "linear" and (op.kind != "each" or weighted):
        raise cannot_run_dense("it works on a flattened map")
    others = [other for other in node.all_input_nodes if other not in {layer.node for layer in inputs}]
    if op.kind in {"each", "join"} and any(other.op != "get_attr" for other in others):
        raise cannot_run_dense("it computes with the sides of the window")
    constants = [values[other] for other in others if isinstance(values[other], torch.Tensor)]
    if any(not inputs[0].vector and set(other.shape[-2:]) - {1} for other in constants):
        raise cannot_run_dense("it adds or multiplies numbers that differ from place to place")


def _moved(node: fx.Node, op: Op, inputs: tuple[Layer, ...], out: torch.Tensor, module: nn.Module | None) -> Layer:
    """Return the layer an op makes of the maps it takes."""
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
        raise cannot_run_dense("it counts padding, but not what overhangs the map (ceil_mode)")
    slid = tuple(
        _slid(span, source.spacing_px, n, k, b, stride)
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
    """Return the channels of a result; a flattened map keeps those it had."""
    return int(out.shape[1]) if out.dim() == 4 or source.side == (1, 1) else source.channels


def _pair_of(out: torch.Tensor) -> Pair:
    """Return rows and columns of a result; a pool that drops its axes gives one of each."""
    return (int(out.shape[2]), int(out.shape[3])) if out.dim() == 4 else (1, 1)


def _macs(module: nn.Module | None, op: Op) -> int:
    """Return the multiplications for each place of the result."""
    if isinstance(module, nn.Conv2d | nn.Linear) and op.kind in {"conv", "linear"}:
        return module.weight.numel()
    return 0


def _union(spans: Sequence[Span]) -> Span:
    """Return the span of maps of one grid that are joined."""
    return Span(
        spans[0].side,
        min(span.begin_px for span in spans),
        max(span.end_px for span in spans),
        max(span.first for span in spans),
        min(span.last for span in spans),
    )


def _slid(span: Span, spacing_px: int, side: int, reach: int, before: int, stride: int) -> Span:
    """Return the span after a kernel of `reach` elements slid over it."""
    shift = before * spacing_px
    # What the kernel covers has to see pixels, and has to exist: cropping removes it at the border of any region.
    return Span(
        side,
        min(span.begin_px, 0) - shift,
        max(span.end_px - spacing_px, -span.side * spacing_px) + reach * spacing_px - shift,
        max(0, -(-(span.first + before) // stride)),
        min(side, (span.last - reach + before) // stride + 1),
    )


def _ended(found: dict[fx.Node, Layer], output: fx.Node, n_classes: int) -> list[Layer]:
    """Return the layers up to the logits of one window, in order and without those nothing depends on."""
    (result,) = output.args
    if not isinstance(result, fx.Node) or result not in found:
        raise cannot_run_dense("the model returns something else than the logits of a window")
    if found[result].side != (1, 1) or found[result].channels != n_classes:
        raise cannot_run_dense(f"the model returns a map of {found[result].side} places instead of {n_classes} logits")
    needed = {result}
    for node in reversed(list(found)):
        if node in needed:
            needed.update(found[node].inputs)
    return [layer for node, layer in found.items() if node in needed]


def _named(network: list[Layer]) -> list[Layer]:
    """Return the layers with the names of the modules that end with them."""
    stacks = [[path for path, _ in layer.node.meta.get("nn_module_stack", {}).values()] for layer in network]
    ends = {path: place for place, stack in enumerate(stacks) for path in stack}
    return [
        layer._replace(names=tuple(path for path in stack if path and ends[path] == place))
        for place, (layer, stack) in enumerate(zip(network, stacks, strict=True))
    ]
