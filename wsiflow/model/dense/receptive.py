"""The layers of a window classifier with their receptive fields, strides, padding and multiplications.

Input: a classifier. Output: the layers of its program in order, each with its map of one window, and the calls that are
no layers because they need a window as a whole. Only shapes are computed, on PyTorch's meta device, so no map is
allocated.

Pairs are (rows, cols).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from wsiflow.errors import InputError
from wsiflow.model.classifier import Classifier
from wsiflow.model.dense import layers
from wsiflow.model.dense.layers import Call, Map, Op, cannot_run_dense
from wsiflow.model.dense.operations import Pair
from wsiflow.model.formats.torchscript import is_script
from wsiflow.model.outputs import Outputs
from wsiflow.model.program import BATCH, arguments, name_of, program


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
        node: The call in the program.
        names: Paths of the modules that end with this step, the outermost first.
        op: Its operation.
        inputs: The calls whose maps it takes.
        channels: Number of channels of its map.
        spans: Rows and columns of its map.
        spacing_px: Distance between neighbouring elements of its map, px.
        map: The shape of its map.
        stride: Stride of the operation; 1 if its map has one element, whatever its nominal stride.
        behind: Padding behind (bottom, right) that the operation needs; negative for elements that it leaves unused.
        macs: Multiplications for each element of its map.
        is_tuple: Whether its result is several maps, as those of a split.
    """

    node: fx.Node
    names: tuple[str, ...]
    op: Op
    inputs: tuple[fx.Node, ...]
    channels: int
    spans: tuple[Span, Span]
    spacing_px: int
    map: Map
    stride: int = 1
    behind: Pair = (0, 0)
    macs: int = 0
    is_tuple: bool = False

    @property
    def side(self) -> Pair:
        """Number of rows and columns of the window's map."""
        return (self.spans[0].side, self.spans[1].side)

    @property
    def window_macs(self) -> int:
        """Multiplications of this layer for one window."""
        return self.macs * (1 if self.map.everywhere else math.prod(self.side))


class Rest(NamedTuple):
    """A call that cannot run over regions, or that depends on one.

    Attributes:
        node: The call in the program.
        window_macs: Multiplications for one window.
    """

    node: fx.Node
    window_macs: int


class Network(NamedTuple):
    """What a window's outputs are computed from.

    Attributes:
        program: The program of the network, which contains the weights.
        layers: The calls that can run over regions, from the image on, in order.
        rest: The other calls, in order; empty where the whole network can run over regions.
        obstacle: Why `rest` cannot run over regions; None where it is empty.
    """

    program: fx.GraphModule
    layers: list[Layer]
    rest: list[Rest]
    obstacle: InputError | None


def read_network(classifier: Classifier, *, local: bool = False) -> Network:
    """Return the layers of a classifier, from the image on, and what cannot run over regions.

    Args:
        classifier: The classifier.
        local: Whether a mean or a maximum over the window that is combined with every place of a map is taken around
            each of these places instead. This changes scores.

    Raises:
        InputError: No part of the network can run over regions; the message has the reason.
    """
    traced = _program(classifier)
    values = _values(traced, classifier.window_px)
    known, refused = _read_calls(traced, values, classifier.window_px, local=local)
    needed = _needed(_checked_result(traced, values, known, classifier.outputs))
    order = [node for node in traced.graph.nodes if node in needed]
    rest = [Rest(node, _window_macs(node, values)) for node in order if node in refused]
    network = _with_module_names([known[node] for node in order if node in known], [each.node for each in rest])
    obstacle = next((refused[each.node] for each in rest if refused[each.node] is not None), None)
    return Network(traced, network, rest, _plainer(obstacle, rest) if obstacle else None)


_Refused = dict[fx.Node, InputError | None]  # with the reason, where that is not a call before it


def _read_calls(
    traced: fx.GraphModule, values: dict[fx.Node, Any], side: int, *, local: bool
) -> tuple[dict[fx.Node, Layer], _Refused]:
    """Return the calls that can run over regions, and those that cannot."""
    around: set[fx.Node] = set()
    while True:
        known, refused, more = _read_calls_once(traced, values, side, around)
        if not local or more <= around:
            return known, refused
        around |= more


def _read_calls_once(
    traced: fx.GraphModule, values: dict[fx.Node, Any], side: int, around: set[fx.Node]
) -> tuple[dict[fx.Node, Layer], _Refused, set[fx.Node]]:
    """Return the calls that can run over regions, those that cannot, and the poolings that prevent the first of these.

    Args:
        traced: The program of the network.
        values: The result of each call for windows.
        side: Side of a window, px.
        around: The poolings that are taken around every place.
    """
    span, image = Span(side, 0, 1 - side, 0, side), Map((BATCH, 3, side, side), layers.NCHW)
    known: dict[fx.Node, Layer] = {}
    refused: _Refused = {}
    poolings: set[fx.Node] = set()
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            known[node] = Layer(node, (), Op("each"), (), 3, (span, span), 1, image)
        elif node.op == "call_function" and any(other in refused for other in node.all_input_nodes):
            refused[node] = None
        elif node.op == "call_function" and any(other in known for other in node.all_input_nodes):
            try:
                known[node] = _layer(node, values, known, is_around=node in around)
            except InputError as error:
                refused[node] = with_layer_name(node, error)
                if error.cause == layers.OF_THE_WHOLE:
                    poolings |= _poolings_before(node, known)
    return known, refused, poolings


def _poolings_before(node: fx.Node, known: dict[fx.Node, Layer]) -> set[fx.Node]:
    """Return the poolings over the window that a call's inputs with a single place come from; none if not all do."""
    found: set[fx.Node] = set()
    waiting = [other for other in node.all_input_nodes if other in known and known[other].side == (1, 1)]
    while waiting:
        layer = known[waiting.pop()]
        if all(known[other].side == (1, 1) for other in layer.inputs):
            waiting += layer.inputs
        elif layer.op.kind in layers.POOLINGS:
            found.add(layer.node)
        else:
            return set()
    return found


def _plainer(obstacle: InputError, rest: Sequence[Rest]) -> InputError:
    """Return the reason with the name of the operation for which a network flattens its map, where it is known."""
    if name_of(rest[0].node) in layers.RESHAPES:
        for each in rest:
            try:
                layers.check(name_of(each.node))
            except InputError as error:
                return with_layer_name(each.node, error)
    return obstacle


def _window_macs(node: fx.Node, values: dict[fx.Node, Any]) -> int:
    """Return the multiplications of a call for one window."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    with FlopCounterMode(display=False) as counter:
        node.target(*args, **kwargs)  # type: ignore[operator]
    return int(counter.get_total_flops()) // (2 * BATCH)


def _program(classifier: Classifier) -> fx.GraphModule:
    """Return the program of the classifier's network."""
    if is_script(classifier.module):
        raise cannot_run_dense("the model is a TorchScript program that cannot be converted to operations of layers")
    if classifier.input_px != classifier.window_px:
        raise cannot_run_dense(
            f"the model resizes windows of {classifier.window_px} px to {classifier.input_px} px, each by itself; a "
            f"card with window_px {classifier.input_px} reads as much tissue without resizing, at a spacing of "
            f"{classifier.spacing_um_px * classifier.window_px / classifier.input_px:.4g} um/px"
        )
    try:
        return program(classifier.module, classifier.window_px)
    except InputError as error:
        raise cannot_run_dense(error.cause) from error


class _Shapes(fx.Interpreter):
    """An interpreter that runs a program on the meta device, where tensors have no data, and stores every result."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}

    def fetch_attr(self, target: str) -> Any:
        return super().fetch_attr(target).to("meta")

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def _values(traced: fx.GraphModule, side: int) -> dict[fx.Node, Any]:
    """Return the result of each call for windows: tensors without data, or a number, which is a constant."""
    shapes = _Shapes(traced)
    shapes.run(torch.empty((BATCH, 3, side, side), device="meta"))
    return shapes.values


def _layer(node: fx.Node, values: dict[fx.Node, Any], known: dict[fx.Node, Layer], *, is_around: bool) -> Layer:
    """Return the layer of a call, given the results of all calls and the layers before it.

    Args:
        node: The call.
        values: The result of each call for windows.
        known: The layers before it.
        is_around: Whether it is a pooling over the window that is taken around every place.
    """
    inputs = tuple(known[other] for other in node.all_input_nodes if other in known)

    def given(other: fx.Node) -> Any:
        return known[other].map if other in known else values[other]

    if name_of(node) == "getitem":
        return _item_layer(node, inputs[0], values[node])
    call = Call(name_of(node), fx.node.map_arg(arguments(node), given), values[node])
    op = layers.read(call)
    _check_inputs(op, inputs, call)
    if is_around:
        # Places beyond the border of a region are left out, as a window knows none beyond its own.
        before = tuple((length - 1) // 2 for length in op.kernel)
        op = op._replace(before=(before[0], before[1]), counted=False)
    return _layer_of_op(node, op, inputs, call, is_around=is_around)


def _item_layer(node: fx.Node, source: Layer, value: Any) -> Layer:
    """Return the layer that takes one of the results of a call."""
    if source.op.kind != "each" and node.args[1] != 0:
        raise cannot_run_dense("it returns positions within the window")
    op = Op("each" if source.op.kind == "each" else "flat", source.map.axes)
    return _layer_of_op(node, op, (source,), Call("getitem", {}, value))


def with_layer_name(node: fx.Node, error: InputError) -> InputError:
    """Return the error of a layer with the layer's name in its message."""
    path, kind = next(iter(reversed(node.meta.get("nn_module_stack", {}).values())), ("", ""))
    owner = f" of {str(kind).rpartition('.')[2]}" if kind else ""
    name = f"{path or node.name} ({name_of(node)}{owner if path else ''})"
    return InputError(f"layer {name} cannot run over whole regions: {error.cause}", error.remedy)


def _check_inputs(op: Op, inputs: tuple[Layer, ...], call: Call) -> None:
    """Refuse maps that are not on the same grid."""
    if len({layer.side for layer in inputs}) > 1:
        raise cannot_run_dense(layers.OF_THE_WHOLE)
    if len({layer.spacing_px for layer in inputs}) > 1:
        raise cannot_run_dense("it joins maps of different strides")
    is_flattened = _is_flattened(inputs[0])
    has_weights = any(isinstance(value, torch.Tensor) for value in call.args.values())
    is_plain = op.kind in {"each", "flat"} and not op.given and not op.steps and not has_weights
    if is_flattened and op.kind != "linear" and not is_plain:
        raise cannot_run_dense("it works on a flattened map")


def _is_flattened(layer: Layer) -> bool:
    """Tell whether a layer's map is a flattened one of several places."""
    return layer.map.axes is None and layer.side != (1, 1) and not layer.map.everywhere


def _layer_of_op(node: fx.Node, op: Op, inputs: tuple[Layer, ...], call: Call, *, is_around: bool = False) -> Layer:
    """Return the layer of an operation on its input maps."""
    source, out = inputs[0], layers.first(call.out)
    spans = tuple(_union([layer.spans[axis] for layer in inputs]) for axis in (0, 1))
    maps, result = tuple(layer.node for layer in inputs), Map(tuple(out.shape), op.axes)
    is_everywhere = all(layer.map.everywhere for layer in inputs) and result.side == (1, 1)
    result = result._replace(everywhere=is_around or is_everywhere)
    if op.kind in {"each", "join", "flat"}:
        channels = source.channels if op.kind == "flat" else _channels(call.out, result, source)
        place, macs = (spans[0], spans[1]), _macs(call, op)
        several = isinstance(call.out, list | tuple)
        return Layer(node, (), op, maps, channels, place, source.spacing_px, result, macs=macs, is_tuple=several)
    if op.kind == "linear":
        op = op._replace(kernel=source.map.side if source.map.everywhere else source.side)
    if source.map.everywhere and (op.kernel != (1, 1) or any(op.before)):
        raise cannot_run_dense("its kernel reaches beyond the single place of its input")
    side = source.side if result.everywhere else result.side
    strides = {s for s, elements in zip(op.stride, result.side, strict=True) if elements > 1} or {1}
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
        out.numel() // (BATCH * math.prod(result.side)),
        (slid[0], slid[1]),
        source.spacing_px * stride,
        result,
        stride,
        (behind[0], behind[1]),
        _macs(call, op),
    )


def _channels(out: Any, result: Map, source: Layer) -> int:
    """Return the number of features at each place of one or several results; that of a flattened map is unchanged."""
    if result.axes is None and _is_flattened(source):
        return source.channels
    parts: Sequence[torch.Tensor] = out if isinstance(out, list | tuple) else [out]
    return sum(part.numel() for part in parts) // (BATCH * math.prod(result.side))


def _macs(call: Call, op: Op) -> int:
    """Return the number of multiplications for each place of the result."""
    weight = call.args.get("weight", call.args.get("mat2"))
    if call.name in {"linear", "addmm", "mm"} or op.kind == "conv":
        assert isinstance(weight, torch.Tensor)
        return weight.numel()
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


def _checked_result(
    traced: fx.GraphModule, values: dict[fx.Node, Any], known: dict[fx.Node, Layer], outputs: Outputs
) -> fx.Node:
    """Return the result of a program, which must be the outputs of a window."""
    (output,) = traced.graph.find_nodes(op="output")
    (results,) = output.args
    result = results[0] if isinstance(results, list | tuple) and len(results) == 1 else results
    if (
        not isinstance(result, fx.Node)
        or not isinstance(values[result], torch.Tensor)
        or not _needed(result) & set(known)
    ):
        raise cannot_run_dense("the model does not return the logits of a window")
    if result in known and known[result].map.everywhere:
        raise cannot_run_dense("a mean over the window is combined with every place, and is an output too")
    if result in known:
        side, channels = known[result].side, known[result].channels
    else:
        shape = values[result].shape
        side, channels = (math.prod(shape[2:]), 1), shape[1] if len(shape) > 1 and shape[0] == BATCH else 0
    if side != (1, 1) or not outputs.fits(channels):
        raise cannot_run_dense(
            f"the model returns a map of {side} places instead of the outputs of {outputs.n_classes} classes"
        )
    return result


def _needed(result: fx.Node) -> set[fx.Node]:
    """Return the nodes on which a result depends, and itself."""
    needed, found = {result}, [result]
    while found:
        new = [node for node in found.pop().all_input_nodes if node not in needed]
        needed.update(new)
        found += new
    return needed


def _with_module_names(network: list[Layer], rest: list[fx.Node]) -> list[Layer]:
    """Return the layers, each with the names of the modules that end with it, where no later call is part of them."""
    stacks = [_modules(layer.node) for layer in network]
    unfinished = {path for node in rest for path in _modules(node)}
    ends = {path: place for place, stack in enumerate(stacks) for path in stack if path not in unfinished}
    return [
        layer._replace(names=tuple(path for path in stack if path and ends.get(path) == place))
        for place, (layer, stack) in enumerate(zip(network, stacks, strict=True))
    ]


def _modules(node: fx.Node) -> list[str]:
    """Return the paths of the modules that a call is part of, the outermost first."""
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
