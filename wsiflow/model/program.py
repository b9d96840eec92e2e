"""Networks as programs of ATen operations, the one form that dense conversion reads.

Input: a module, for images of a given side. Output: a graph of operations of ``torch.export`` without control flow,
without modules and without operations in place. How a network was written (as modules, with functions, in another
library, with Python's own control flow over sizes) does not matter for its program.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

from wsiflow.errors import InputError

BATCH = 2  # greater than one, so that an operation on the batch differs from one on a window
#: What a forward method may raise where it is traced.
TRACING = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
VIEWS = {"view", "reshape", "_unsafe_view"}  # operations that only change the shape

_programs: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, int], fx.GraphModule]]" = weakref.WeakKeyDictionary()


def program(module: nn.Module, side: int, batch: int = BATCH) -> fx.GraphModule:
    """Return the program of a network for images, float32 (batch, 3, side, side); it shares the network's weights.

    The nodes are weights (``get_attr``) and calls of ATen operations, whose ``meta["nn_module_stack"]`` names the
    modules that they were part of. What depends on weights alone is computed, and is a weight.

    Args:
        module: The network in evaluation mode.
        side: Side of the images, px.
        batch: Number of the images, which may be part of the arguments of calls.

    Raises:
        InputError: The network cannot be traced, for example because its control flow depends on the pixels.
    """
    known = _programs.setdefault(module, {})
    if (side, batch) not in known:
        known[side, batch] = _traced(module, side, batch)
    return known[side, batch]


def _traced(module: nn.Module, side: int, batch: int) -> fx.GraphModule:
    """Return the program of a network by tracing it."""
    try:
        with torch.no_grad():
            exported = torch.export.export(module, (torch.zeros(batch, 3, side, side),))
            traced = exported.module(check_guards=False)
            if any(map(_writes_into_a_part, traced.graph.nodes)):
                traced = exported.run_decompositions({}).module(check_guards=False)
    except TRACING as error:
        raise InputError(f"the model cannot be traced: {str(error).splitlines()[0][:200]}", "") from error
    assert isinstance(traced, fx.GraphModule)
    _without_writes(traced)
    _with_linear_layers(traced)
    _without_constant_calls(traced)
    return traced


def name_of(node: fx.Node) -> str:
    """Return the name of the operation that a node calls, as ``conv2d``."""
    if isinstance(node.target, OpOverload):
        return str(node.target.overloadpacket.__name__)
    return getattr(node.target, "__name__", str(node.target))


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by the names of the operation's schema, with its values for those not given."""
    values = {name: default for name, default, _ in _schema(node)}
    return values | dict(zip(values, node.args, strict=False)) | dict(node.kwargs)


def called(graph: fx.Graph, node: fx.Node, values: dict[str, Any]) -> fx.Node:
    """Append a call of a node's operation with other arguments, given by their names, to a graph."""
    by_keyword = {name for name, _, is_keyword in _schema(node) if is_keyword}
    args = tuple(value for name, value in values.items() if name not in by_keyword)
    return graph.call_function(node.target, args, {name: values[name] for name in values if name in by_keyword})  # type: ignore[arg-type]


def _schema(node: fx.Node) -> list[tuple[str, Any, bool]]:
    """Return name, default value, and whether it is only given by name, of each argument of a node's operation."""
    schema = node.target._schema  # type: ignore[union-attr]  # noqa: SLF001  the operations have no other description
    return [(argument.name, argument.default_value, argument.kwarg_only) for argument in schema.arguments]


def _writes_into_a_part(node: fx.Node) -> bool:
    """Tell whether a call changes a part of a tensor of which other calls read more, as where a mask is filled."""
    if not isinstance(node.target, OpOverload) or not name_of(node).endswith("_"):
        return False
    part = node.args[0]
    while isinstance(part, fx.Node) and isinstance(part.target, OpOverload):
        alias = part.target._schema.returns[0].alias_info  # noqa: SLF001  the operations have no other description
        if alias is None or alias.is_write or not isinstance(part.args[0], fx.Node):
            return False
        part = part.args[0]
        if len(part.users) > 1:
            return True
    return False


def _without_writes(traced: fx.GraphModule) -> None:
    """Replace operations in place by those that return a new tensor, which later operations then read."""
    for node in list(traced.graph.nodes):
        name = name_of(node)
        if not isinstance(node.target, OpOverload) or not name.endswith("_"):
            continue
        overload = str(node.target).rpartition(".")[2]
        node.target = getattr(getattr(torch.ops.aten, name[:-1]), overload)
        later = set(_after(node))
        node.args[0].replace_all_uses_with(node, delete_user_cb=later.__contains__)
    traced.recompile()


def _with_linear_layers(traced: fx.GraphModule) -> None:
    """Replace products of matrices, for which maps were reshaped to matrices of all their places, by linear layers.

    Such products are what is left of linear layers in programs of core operations alone.
    """
    for node in list(traced.graph.nodes):
        if name_of(node) not in {"addmm", "mm", "matmul"} or node.kwargs:
            continue
        *bias, rows, weight = node.args
        source, results = (rows, [node]) if name_of(node) == "matmul" else _reshaped_around(node, rows)
        if source is None or len(_lengths(weight)) != 2 or not _is_weight(weight):
            continue
        with traced.graph.inserting_before(node):
            turned = traced.graph.call_function(torch.ops.aten.t.default, (weight,))
            linear = traced.graph.call_function(torch.ops.aten.linear.default, (source, turned, *bias))
        linear.meta = dict(results[0].meta)
        for result in results:
            result.replace_all_uses_with(linear)
    traced.graph.eliminate_dead_code()


def _reshaped_around(node: fx.Node, rows: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
    """Return the map that a product's rows are the places of, and its results as maps of the same places."""
    if name_of(rows) not in VIEWS:
        return None, []
    source, results = rows.args[0], list(node.users)
    assert isinstance(source, fx.Node)
    shape = (*_lengths(source)[:-1], *_lengths(node)[-1:])
    same = _lengths(source)[-1:] == _lengths(rows)[-1:] and len(shape) > 2
    are_maps = all(name_of(each) in VIEWS and _lengths(each) == shape for each in results)
    return (source, results) if same and are_maps and results else (None, [])


def _is_weight(node: fx.Node) -> bool:
    """Return whether a matrix is a weight, or one with its axes exchanged."""
    is_turned = name_of(node) in {"t", "permute", "transpose"} and node.all_input_nodes[0].op == "get_attr"
    return node.op == "get_attr" or is_turned


def _lengths(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a result."""
    return tuple(getattr(node.meta.get("val"), "shape", ()))


def _after(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes behind a node."""
    while node.next.op != "root":
        node = node.next
        yield node


def _without_constant_calls(traced: fx.GraphModule) -> None:
    """Compute what depends on weights alone, and register it as a weight."""
    values: dict[fx.Node, torch.Tensor] = {}
    for node in list(traced.graph.nodes):
        if node.op == "get_attr":
            values[node] = weight_of(traced, node)
        elif node.op == "call_function" and all(other in values for other in node.all_input_nodes):
            args, kwargs = (fx.node.map_arg(part, values.__getitem__) for part in (node.args, node.kwargs))
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
            if isinstance(values[node], torch.Tensor):
                name = f"_computed_{node.name}"
                traced.register_buffer(name, values[node])
                with traced.graph.inserting_before(node):
                    weight = traced.graph.get_attr(name)
                values[weight] = values[node]
                node.replace_all_uses_with(weight)
    traced.graph.eliminate_dead_code()
    traced.recompile()


def weight_of(traced: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    """Return the weight that a node of a program gets."""
    owner, _, name = str(node.target).rpartition(".")
    value: torch.Tensor = getattr(traced.get_submodule(owner), name)
    return value
