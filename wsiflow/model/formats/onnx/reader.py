"""ONNX, which holds a network with its weights as a graph of operators, and no code.

The graph is translated to functions of PyTorch (`wsiflow.model.formats.onnx.operators`), so that a network from another
library runs like one that was built here, on every backend, and over whole regions.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from wsiflow.errors import InputError
from wsiflow.model.card import ONNX, ModelCard
from wsiflow.model.engines.spec import optional_package
from wsiflow.model.formats.format import Format
from wsiflow.model.formats.onnx.graph import DYNAMIC_BATCH, NodeFields, Translation
from wsiflow.model.formats.onnx.operators import translate
from wsiflow.system import faults

MAX_BYTES = 2**31 - 1  # of a file whose weights are inside
_EXTRA = "onnxruntime"
_SCOPES = "pkg.torch.onnx.name_scopes"  # a list of names as text, that of the innermost module last but one
_TOLERANCE = 1e-4  # relative, between images in a batch and the same images alone
_AGAIN = "fetch or export the file again"


def read(data: bytes, card: ModelCard, path: Path) -> nn.Module:
    """Return the network of an ONNX file.

    Args:
        data: Content of the file.
        card: The model card.
        path: Path of the file, for messages.

    Returns:
        The network, from (n, 3, input_px, input_px) to its output, or to a dictionary of its outputs.

    Raises:
        InputError: The file is damaged, its weights are in other files, which no hash of a card covers, or it holds a
            network that cannot be translated.
        EnvironmentFault: The package onnx is not installed.
    """
    try:
        return _network(_model(data, path), card).eval()
    except InputError as error:
        raise InputError(error.cause, error.remedy, path=path) from error


def embedded(path: Path) -> bytes:
    """Return the content of an ONNX file with all its weights inside.

    Raises:
        InputError: The file is damaged, weights are missing, or all of it is larger than 2 GB.
        EnvironmentFault: The package onnx is not installed, or the system refuses to read a file.
    """
    data = _bytes(path)
    model = _model(data, path)
    external = [tensor for tensor in _tensors(model.graph) if tensor.external_data]
    if not external:
        return data
    total = len(data)
    for tensor in external:
        tensor.raw_data = _external(tensor, path)
        total += len(tensor.raw_data)
        if total > MAX_BYTES:
            raise InputError("the network and its weights are larger than 2 GB", "export a smaller one", path=path)
        del tensor.external_data[:]
        tensor.data_location = type(tensor).DEFAULT
    content: bytes = model.SerializeToString()
    return content


def _bytes(path: Path) -> bytes:
    """Return the content of a file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise faults.unreadable(error, "the weights", "put the file into the folder of the model", path=path) from error


def _model(data: bytes, path: Path) -> Any:
    """Return the content of an ONNX file."""
    onnx = optional_package("onnx", _EXTRA)
    message = optional_package("google.protobuf.message", _EXTRA)
    try:
        model = onnx.ModelProto.FromString(data)
    except message.DecodeError as error:
        raise InputError("the file is truncated or not ONNX", _AGAIN, path=path) from error
    if not model.graph.node or not model.graph.output:
        raise InputError("the file holds no network, or is truncated", _AGAIN, path=path)
    if not model.functions:
        return model
    return optional_package("onnx.inliner", _EXTRA).inline_local_functions(model)


def _tensors(graph: Any) -> Iterable[Any]:
    """Yield the tensors of a graph: weights, and attributes of nodes, with those of branches."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from [attribute.t] if attribute.HasField("t") else []
            yield from _tensors(attribute.g) if attribute.HasField("g") else []


def _external(tensor: Any, path: Path) -> bytes:
    """Return the bytes of a weight that is in another file of the folder."""
    fields = {entry.key: entry.value for entry in tensor.external_data}
    name = fields.get("location", "")
    if not name or Path(name).name != name or name in {".", ".."} or "\\" in name:
        raise InputError(
            f"the weight {tensor.name} is in {name!r}, which is not a plain file name in the folder of the model",
            "export the weights beside the file, or inside it: torch.onnx.export(..., external_data=False)",
            path=path,
        )
    try:
        with (path.parent / name).open("rb") as file:
            file.seek(int(fields.get("offset", 0)))
            content: bytes = file.read(int(fields.get("length", -1)))
    except (OSError, ValueError) as error:
        remedy = f"put {name} into the folder of {path.name}"
        raise InputError(f"weights of the network are in {name}, which cannot be read", remedy, path=path) from error
    if len(content) < int(fields.get("length", 0)):
        raise InputError(f"{name} ends before the weight {tensor.name} does", _AGAIN, path=path)
    return content


def _tensor(tensor: Any) -> torch.Tensor:
    """Return a tensor of the file."""
    onnx = optional_package("onnx", _EXTRA)
    if tensor.external_data:
        name = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        raise InputError(
            f"weights of the network are in {name!r}, which the sha256 of the card does not cover",
            "write a card for a file with its weights inside: wsiflow model add FILE.onnx",
        )
    try:
        values = np.array(onnx.numpy_helper.to_array(tensor))
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"the weight {tensor.name} cannot be read: {str(error)[:200]}", _AGAIN) from error
    is_whole = values.dtype.kind in "iu" or values.dtype == bool
    return torch.from_numpy(values if is_whole else values.astype(np.float32))


def _network(model: Any, card: ModelCard) -> fx.GraphModule:
    """Return the network of a file."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    image = _image_input(graph, weights)
    opset = max((each.version for each in model.opset_import if each.domain in {"", "ai.onnx"}), default=0)
    lengths = _lengths(image, card)
    fixed_batch = lengths[0] or None
    translation = Translation(opset, card.input_px, fixed_batch=fixed_batch)
    values: dict[str, Any] = {"": None, image.name: translation.image}
    if lengths[3] == 3 and lengths[1] != 3:
        values[image.name] = translation.call("image", torch.permute, (translation.image, (0, 2, 3, 1)), {})
    for name, tensor in weights.items():
        values[name] = translation.weight(_tensor(tensor), name)
    _run(graph, values, translation)
    module = translation.finish({output.name: values[output.name] for output in graph.output})
    if fixed_batch is not None:
        _check_batch(module, card, fixed_batch)
    return module


def _run(graph: Any, values: dict[str, Any], translation: Translation) -> None:
    """Translate the nodes of a graph, and add their results to the values by their names."""
    for node in _needed(graph):
        fields = _fields(node)
        missing = [name for name in fields.inputs if name not in values]
        if missing:
            raise fields.fault(f"takes {missing[0]!r}, which nothing returns", _AGAIN)
        condition = values[fields.inputs[0]] if fields.kind == "If" else None
        if isinstance(condition, torch.Tensor):  # it depends on shapes alone, which are known
            branches = {attribute.name: attribute.g for attribute in node.attribute}
            branch = branches["then_branch" if bool(condition) else "else_branch"]
            within = dict(values)
            within.update({tensor.name: _tensor(tensor) for tensor in branch.initializer})
            _run(branch, within, translation)
            results = tuple(within[output.name] for output in branch.output)
        else:
            results = translate(translation, fields, [values[name] for name in fields.inputs])
        values.update(zip(fields.outputs, results, strict=False))


def _image_input(graph: Any, weights: Mapping[str, Any]) -> Any:
    """Return the input of a graph that is not a weight."""
    inputs = [each for each in graph.input if each.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(repr(each.name) for each in inputs) or "none"
        raise InputError(f"the network has {len(inputs)} inputs ({names})", "export one that takes images alone")
    return inputs[0]


def _lengths(image: Any, card: ModelCard) -> list[int]:
    """Return the lengths of the input's axes; 0 for those that may have any length."""
    onnx, kind = optional_package("onnx", _EXTRA), image.type.tensor_type
    if kind.elem_type != onnx.TensorProto.FLOAT:
        name = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
        raise InputError(
            f"the network takes {name} numbers as {image.name!r}",
            "export one that takes float32 images, normalised as the card says",
        )
    lengths = [dim.dim_value for dim in kind.shape.dim]
    shape = [dim.dim_value or dim.dim_param or "?" for dim in kind.shape.dim]
    is_last = len(lengths) == 4 and lengths[3] == 3 and lengths[1] != 3
    if len(lengths) != 4 or (lengths[1] not in {0, 3} and not is_last):
        raise InputError(
            f"the input {image.name!r} has the shape {shape}",
            "export a network that takes (n, 3, h, w) or (n, h, w, 3)",
        )
    sides = set(lengths[1:3] if is_last else lengths[2:]) - {0}
    if sides - {card.input_px}:
        raise InputError(
            f"the input {image.name!r} has the shape {shape}, and input_px is {card.input_px}",
            "correct input_px in the card, or export the network for images of any size",
        )
    return lengths


def _needed(graph: Any) -> list[Any]:
    """Return the nodes in order on which the outputs depend."""
    names = {output.name for output in graph.output}
    needed = []
    for node in reversed(graph.node):
        if names & set(node.output):
            names.update(_names(node))
            needed.append(node)
    return needed[::-1]


def _names(node: Any) -> Iterable[str]:
    """Yield the names of values that a node takes, those of its branches too."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node if attribute.HasField("g") else ():
            yield from _names(inner)
        yield from (output.name for output in attribute.g.output)


def _fields(node: Any) -> NodeFields:
    """Return a node of the file."""
    domain = "" if node.domain in {"", "ai.onnx"} else f"{node.domain}."
    attributes = {each.name: _attribute(each) for each in node.attribute}
    outputs = tuple(node.output)
    while outputs and not outputs[-1]:
        outputs = outputs[:-1]
    return NodeFields(domain + node.op_type, _name(node), tuple(node.input), outputs, attributes)


def _name(node: Any) -> str:
    """Return the name of a node, behind that of the module that it was part of where the exporter noted it."""
    name = str(node.name or (node.output[0] if node.output else ""))
    scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
    modules = re.findall("'([^']*)'", scopes)[:-1]  # the last one is the node itself
    return f"/{modules[-1]}/{name}" if modules and modules[-1] else name


def _attribute(attribute: Any) -> Any:
    """Return the value of an attribute."""
    onnx = optional_package("onnx", _EXTRA)
    if attribute.HasField("t"):
        return _tensor(attribute.t)
    if attribute.name == "to":
        return _dtype(attribute.i)
    if attribute.type in {onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS}:
        return None
    value = onnx.helper.get_attribute_value(attribute)
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _dtype(number: int) -> torch.dtype:
    """Return the type of numbers that has a number in ONNX."""
    onnx = optional_package("onnx", _EXTRA)
    name = onnx.TensorProto.DataType.Name(number).lower()
    reals = dict.fromkeys(("float", "double", "float16", "bfloat16"), torch.float32)  # all run as float32
    found = {**reals, "bool": torch.bool}.get(name, getattr(torch, name, None))
    if not isinstance(found, torch.dtype):
        raise InputError(f"the network converts numbers to {name}", "export it without this conversion")
    return found


def _check_batch(module: nn.Module, card: ModelCard, fixed_batch: int) -> None:
    """Refuse a network for a fixed batch that gives other outputs in a batch of another size."""
    images = torch.rand(2, 3, card.input_px, card.input_px, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together, alone = module.eval()(images), [module(image[None]) for image in images]
    for name in together if isinstance(together, dict) else [...]:
        expected = torch.cat([each[name] for each in alone])
        actual = together[name]
        if actual.shape != expected.shape or (actual - expected).abs().max() > _TOLERANCE * expected.abs().max():
            raise InputError(f"the network only runs on batches of {fixed_batch}", DYNAMIC_BATCH)


FORMAT = Format(ONNX, read)
