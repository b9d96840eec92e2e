"""Programs of torch.export (``.pt2``): a network and its weights in one file, read without running what is in it.

PyTorch's own loader evaluates expressions, resolves any function of PyTorch by name, and unpickles objects. Here the
program is built call by call from a list of operations that compute tensors from tensors. Nothing else of the file
reaches the source code that `torch.fx` generates from a graph: names are generated here, and paths of weights are
checked.
"""

import io
import json
import operator
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from wsiflow.errors import InputError
from wsiflow.model.card import EXPORT, ModelCard
from wsiflow.model.formats.archive import DTYPES, MALFORMED, Archive
from wsiflow.model.formats.format import Format
from wsiflow.model.formats.operations import ATEN, CHECKS, ON_SIZES, PLAIN, operation
from wsiflow.model.program import BATCH, TRACING

_HALF = {torch.float16, torch.bfloat16}
_LAYOUTS = {7: torch.strided}
_MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
_SCALARS: dict[str, Callable[[Any], Any]] = {
    "as_int": int,
    "as_float": float,
    "as_bool": bool,
    "as_string": str,
    # Weights in half precision become float32, and so does what a program converts to their type.
    "as_scalar_type": lambda number: torch.float32 if DTYPES[number] in _HALF else DTYPES[number],
    "as_memory_format": _MEMORY_FORMATS.__getitem__,
    "as_layout": _LAYOUTS.__getitem__,
    "as_device": lambda _device: torch.device("cpu"),
    "as_none": lambda _none: None,
}
_LISTS = {
    **{f"{name}s": name for name in ("as_int", "as_float", "as_bool", "as_string")},
    **{f"{name}s": name for name in ("as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool", "as_optional_tensor")},
}
_PART = re.compile(r"[A-Za-z0-9_]+", re.ASCII)
_WITHOUT_GRADIENTS = "torch.ops.higher_order.wrap_with_set_grad_enabled"
_EVALUATION = "export it in evaluation mode: model.eval()"


def read(data: bytes, card: ModelCard, path: Path) -> nn.Module:
    """Return the network of a program, as a graph of calls of ATen operations.

    Raises:
        InputError: The file is damaged, or its program has other inputs than a batch of images of the card's size,
            changes its weights, or calls something that is not a known operation.
    """
    try:
        return module_of(data, card.input_px)
    except InputError as error:
        raise error.about(path=path) from error


def module_of(data: bytes, side: int) -> fx.GraphModule:
    """Return the network of a program for images with a side in px; see `read`."""
    archive = Archive(data)
    try:
        program = archive.program()["graph_module"]
        weights = archive.tensors("constants") | archive.tensors("weights")
        return _Builder(weights, program, side).module()
    except MALFORMED as error:
        raise InputError(
            f"the program in the file is damaged or of an unknown version ({type(error).__name__}: {str(error)[:150]})",
            "write it again with torch.export.save",
        ) from error


def write(module: nn.Module, side: int) -> bytes:
    """Return a network as a ``.pt2`` archive for batches of any size; without sample inputs or names of files.

    Args:
        module: The network in evaluation mode.
        side: Side of its images, px.

    Raises:
        InputError: The network cannot be traced, or only for one batch size.
    """
    return packed(traced(module, side))


def traced(module: nn.Module, side: int) -> torch.export.ExportedProgram:
    """Return the program of a network for batches of any size; arguments and errors as for `write`."""
    image = torch.zeros(BATCH, 3, side, side)
    try:
        with torch.no_grad():
            return torch.export.export(module, (image,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    except TRACING as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"the model cannot be exported for batches of any size: {reason.strip()[:200]}",
            "write its forward method without control flow that depends on pixels or on the number of images",
        ) from error


def packed(program: torch.export.ExportedProgram) -> bytes:
    """Return a program as a ``.pt2`` archive without sample inputs or names of files; it is changed."""
    for node in program.graph.nodes:
        for note in ("stack_trace", "from_node"):  # they name the files of whoever exports
            node.meta.pop(note, None)
    program.example_inputs = None
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights that share memory are written as they are, and it remarks on that
        torch.export.save(program, stream)
    return stream.getvalue()


class _Builder:
    """The graph of a program that is built call by call."""

    def __init__(self, weights: Mapping[str, torch.Tensor], program: Any, side: int) -> None:
        """Keep the weights by their paths, the program as JSON, and the side of images, px."""
        self._weights, self._program, self._side = weights, program, side
        self._scope = program["graph"]  # the part of the program whose calls are added
        self._graph, self._root = fx.Graph(), nn.Module()
        self._values: dict[str, fx.Node] = {}
        self._n_inputs = 0

    def module(self) -> fx.GraphModule:
        """Return the network."""
        signature = self._program["signature"]
        for spec in signature["input_specs"]:
            self._add_input(*_union(spec))
        if self._n_inputs != 1:
            raise InputError(
                f"the program has {self._n_inputs} inputs, not one batch of images",
                "export a module whose forward method takes images alone",
            )
        for call in self._program["graph"]["nodes"]:
            self._add_call(call)
        self._graph.output(self._outputs([_union(spec) for spec in signature["output_specs"]]))
        self._graph.eliminate_dead_code()
        return fx.GraphModule(self._root, self._graph).eval()

    def _add_input(self, kind: str, spec: Any) -> None:
        """Add an input of the program: the images, a weight, or a constant."""
        if kind == "user_input":
            self._n_inputs += 1
            if self._n_inputs == 1:
                self._add_images(*_union(spec["arg"]))
        elif kind in {"parameter", "buffer", "tensor_constant"}:
            path = spec["tensor_constant_name" if kind == "tensor_constant" else f"{kind}_name"]
            _register(self._root, path, self._weights[path])
            self._values[spec["arg"]["name"]] = self._graph.get_attr(path)
        elif kind != "constant_input":  # an optional argument that was not given
            raise InputError(
                f"the program has an input that is no tensor ({kind})", "export a module without custom objects"
            )

    def _add_images(self, kind: str, value: Any) -> None:
        """Add the images, and refuse those that the card's windows are not."""
        if kind != "as_tensor":
            raise InputError("the input of the program is not a tensor", "export a module that takes a batch of images")
        meta = self._program["graph"]["tensor_values"][value["name"]]
        sizes = [size.get("as_int") for size in meta["sizes"]]
        if len(sizes) != 4 or any(n not in {None, e} for n, e in zip(sizes[1:], (3, *[self._side] * 2), strict=False)):
            raise InputError(
                f"the program takes images of {['n' if size is None else size for size in sizes]}, not of "
                f"[n, 3, {self._side}, {self._side}]",
                "correct window_px and input_px in the card, or export it for such images, channels first",
            )
        if not DTYPES[meta["dtype"]].is_floating_point:
            raise InputError(
                f"the program takes images of {DTYPES[meta['dtype']]}", "export it for normalised images, float32"
            )
        if sizes[0] is not None:
            raise InputError(
                f"the program was exported for batches of {sizes[0]} alone",
                "export it for any batch: torch.export.export(model.eval(), "
                f"(torch.zeros(2, 3, {self._side}, {self._side}),), "
                "dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))",
            )
        self._values[value["name"]] = self._graph.placeholder("x")

    def _add_call(self, call: Any) -> None:
        """Add a call and its results."""
        target = call["target"]
        if target in CHECKS:
            return
        if target == _WITHOUT_GRADIENTS:
            self._add_body(call)
            return
        if target == f"{ATEN}as_strided.default" and self._changes_no_place(call):
            call = {**call, "target": f"{ATEN}alias.default", "inputs": call["inputs"][:1]}
            target = call["target"]
        args: tuple[Any, ...]
        kwargs: dict[str, Any]
        if target in ON_SIZES:
            function, kwargs = ON_SIZES[target], {}
            args = tuple(self._value(*_union(each["arg"])) for each in call["inputs"])
        else:
            function = _operation(call)
            args, kwargs = self._arguments(function, {each["name"]: each["arg"] for each in call["inputs"]})
            if function._schema.name.endswith("_") and args[0].op == "get_attr":  # noqa: SLF001
                raise InputError(f"the program changes its own weight {args[0].target}", _EVALUATION)
        results = [_union(each) for each in call["outputs"]]
        reader = PLAIN.get(target.removeprefix(ATEN))
        plain = reader(*args) if reader else None
        function, args, kwargs = (*plain, {}) if plain else (function, args, kwargs)
        node = self._with_sizes(function, args) or self._graph.call_function(function, args, kwargs)
        stack = _module_stack(call["metadata"].get("nn_module_stack", ""))
        node.meta["nn_module_stack"] = stack or _owners(node) or self._inherited(node, call)
        self._add_results(node, results[:1] if plain else results)

    def _with_sizes(self, function: Any, args: tuple[Any, ...]) -> fx.Node | None:
        """Add a call that has to do with the number of images; None if it is of another kind.

        Backends trace the network for one number of images. They follow sizes through methods of tensors, but not
        through operations of ATen.
        """
        if function == torch.ops.aten.sym_size.int:
            return self._graph.call_method("size", args)
        name = {torch.ops.aten.reshape.default: "reshape", torch.ops.aten.expand.default: "expand"}.get(function)
        unknown = [size for size in args[1] if isinstance(size, fx.Node)] if name else []
        if not unknown:
            return None
        if name == "reshape" and len(unknown) == 1 and -1 not in args[1]:
            shape = [-1 if isinstance(size, fx.Node) else size for size in args[1]]
            return self._graph.call_function(function, (args[0], shape))
        return self._graph.call_method(str(name), args[:2])

    def _inherited(self, node: fx.Node, call: Any) -> dict[str, tuple[str, str]]:
        """Return the modules that all inputs of a call without weights are part of, if it changes no row or column."""
        kinds = [_union(each) for each in (*(each["arg"] for each in call["inputs"]), *call["outputs"])]
        tensors = [each for kind, value in kinds for each in {"as_tensor": [value], "as_tensors": value}.get(kind, [])]
        shapes = [self._scope["tensor_values"][each["name"]]["sizes"] for each in tensors]
        if len(shapes) < 2 or any([*each[:1], *each[2:]] != [*shapes[0][:1], *shapes[0][2:]] for each in shapes):
            return {}
        stacks = [list(each.meta.get("nn_module_stack", {}).items()) for each in node.all_input_nodes]
        return dict(first for first, *others in zip(*stacks, strict=False) if all(each == first for each in others))

    def _add_body(self, call: Any) -> None:
        """Add the calls of a part of the program for which gradients were switched on or off."""
        kinds = [_union(each["arg"]) for each in call["inputs"]]
        body = next(value["graph"] for kind, value in kinds if kind == "as_graph")
        given = [self._value(kind, value) for kind, value in kinds[2:]]
        outer = self._scope, self._values
        names = [_union(each)[1]["name"] for each in body["inputs"]]
        self._scope, self._values = body, dict(zip(names, given, strict=True))
        for each in body["nodes"]:
            self._add_call(each)
        results = [self._value(*_union(each)) for each in body["outputs"]]
        self._scope, self._values = outer
        parts = [_union(each) for each in call["outputs"]]
        if [kind for kind, _ in parts] == ["as_tensors"]:
            parts = [("as_tensor", each) for each in parts[0][1]]
        for result, (kind, value) in zip(results, parts, strict=True):
            self._add_result(result, kind, value)

    def _changes_no_place(self, call: Any) -> bool:
        """Return whether a call of as_strided, which depends on how maps are stored, has its input as its result."""
        graph, given = self._scope, [_union(each["arg"]) for each in call["inputs"]]
        meta = graph["tensor_values"][given[0][1]["name"]]
        sizes, strides = (
            [each if isinstance(each, dict) else {"as_int": each} for each in part] for _, part in given[1:]
        )
        sizes = [graph["sym_int_values"][each["as_name"]] if "as_name" in each else each for each in sizes]
        steps = [(a, b) for size, a, b in zip(sizes, strides, meta["strides"], strict=True) if size != {"as_int": 1}]
        return sizes == meta["sizes"] and all(a == b for a, b in steps)

    def _arguments(self, function: Any, given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call by their places, and those that are only given by name."""
        args, kwargs = [], {}
        for argument in function._schema.arguments:  # noqa: SLF001  operations have no other description
            has_value = argument.name in given
            value = self._value(*_union(given.pop(argument.name))) if has_value else argument.default_value
            if not has_value and not argument.has_default_value():
                raise ValueError(f"{function} lacks {argument.name}")
            if not argument.kwarg_only:
                args.append(value)
            elif has_value:
                kwargs[argument.name] = value
        if given:
            raise ValueError(f"{function} has no argument {sorted(given)[0]}")
        return tuple(args), kwargs

    def _value(self, kind: str, value: Any) -> Any:
        """Return an argument: the results of calls, or plain values."""
        if kind in _SCALARS:
            return _SCALARS[kind](value)
        if kind in _LISTS:
            return [self._value(_LISTS[kind], each) for each in value]
        if kind == "as_tensor":
            return self._values[value["name"]]
        if kind in {"as_sym_int", "as_sym_float", "as_sym_bool"}:
            inner, name = _union(value)
            return self._values[name] if inner == "as_name" else self._value(inner, name)
        if kind == "as_optional_tensor":
            return self._value(*_union(value))
        raise InputError(
            f"the program has an argument that is not a tensor or number ({kind})",
            "export a module of plain operations, without control flow of PyTorch and without custom objects",
        )

    def _add_results(self, node: fx.Node, results: list[tuple[str, Any]]) -> None:
        """Register the results of a call by the names that later calls have for them."""
        if len(results) == 1 and results[0][0] == "as_tensors":
            results = [("as_tensor", each) for each in results[0][1]]
        elif len(results) == 1:
            self._add_result(node, *results[0])
            return
        for place, (kind, value) in enumerate(results):
            part = self._graph.call_function(operator.getitem, (node, place))
            part.meta["nn_module_stack"] = node.meta["nn_module_stack"]
            self._add_result(part, kind, value)

    def _add_result(self, node: fx.Node, kind: str, value: Any) -> None:
        """Register one result by its name."""
        if kind == "as_tensor":
            self._values[value["name"]] = node
        elif kind in {"as_sym_int", "as_sym_float", "as_sym_bool"}:
            self._values[value["as_name"]] = node
        elif kind != "as_none":
            raise ValueError(f"a result is {kind}")

    def _outputs(self, specs: list[tuple[str, Any]]) -> Any:
        """Return the outputs of the network: one, several, or several with names."""
        if any(kind.endswith("mutation") for kind, _ in specs):
            raise InputError("the program changes its own weights or its input", _EVALUATION)
        kinds = [(kind, *_union(spec["arg"])) for kind, spec in specs]
        outputs = [self._values[value["name"]] for _, kind, value in kinds if kind == "as_tensor"]
        if not outputs:
            raise InputError("the program returns no tensor", "export a module that returns its outputs")
        names = _output_names(self._program)
        if len(kinds) == len(outputs) == len(names):
            return dict(zip(names, outputs, strict=True))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _operation(call: Any) -> Any:
    """Return the operation of a call; the message of one that is refused has the name of the layer."""
    try:
        return operation(call["target"])
    except InputError as error:
        paths = [path for path, _ in _module_stack(call["metadata"].get("nn_module_stack", "")).values() if path]
        layer = f" (layer {paths[-1]})" if paths else ""
        raise InputError(f"{error.cause}{layer}", error.remedy) from error


def _union(value: Any) -> tuple[str, Any]:
    """Return the kind and the content of a value that is of one of several kinds."""
    ((kind, content),) = value.items()
    return kind, content


def _register(root: nn.Module, path: str, value: torch.Tensor) -> None:
    """Register a weight under its path."""
    if not all(_PART.fullmatch(part) and not part.startswith("__") for part in path.split(".")):
        raise ValueError(f"{path!r} is no path of a weight")
    *folders, name = path.split(".")
    for folder in folders:
        if folder not in root._modules:  # noqa: SLF001  get_submodule also finds what is not a module of the tree
            root.add_module(folder, nn.Module())
        root = root._modules[folder]  # type: ignore[assignment]  # noqa: SLF001
    if name not in root._buffers:  # noqa: SLF001
        root.register_buffer(name, value.detach())


def _module_stack(text: str) -> dict[str, tuple[str, str]]:
    """Return the modules of a call, the outermost first, from ``key,path,class;key,path,class``."""
    stack = {}
    for item in filter(None, text.split(";")):
        key, _, rest = item.partition(",")
        path, _, kind = rest.rpartition(",")
        if path != key and item.isprintable():  # where both are equal, PyTorch knew no module
            stack[key] = (path, kind)
    return stack if any(path for path, _ in stack.values()) else {}


def _owners(node: fx.Node) -> dict[str, tuple[str, str]]:
    """Return the modules of a call by the path of its weight: a program from TorchScript knows no others."""
    weight = next((str(each.target) for each in node.all_input_nodes if each.op == "get_attr"), "")
    parts = weight.split(".")[:-1]
    paths = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return {path: (path, "") for path in paths}


def _output_names(program: Any) -> list[str]:
    """Return the names of the outputs, if the network returns a dictionary of tensors."""
    try:
        _, spec = json.loads(program["module_call_graph"][0]["signature"]["out_spec"])
        names = json.loads(spec["context"])
    except MALFORMED:
        return []
    is_flat = spec["type"] == "builtins.dict" and all(child["type"] is None for child in spec["children_spec"])
    return [str(name) for name in names] if is_flat else []


FORMAT = Format(EXPORT, read)
