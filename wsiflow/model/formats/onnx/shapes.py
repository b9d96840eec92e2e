"""The operators of ONNX that move values: parts, joins, changes of shape, and resizing.

Input: an `Operation`. Output: its result, or several in a tuple.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from wsiflow.model.formats.onnx.graph import BATCH, DYNAMIC_BATCH, Value, batch_length, count_to_batch, readable
from wsiflow.model.formats.onnx.layers import is_whole, padded
from wsiflow.model.formats.onnx.operation import Operation

# --- parts and joins


def _concat(op: Operation) -> Value:
    parts = [part for part in op.inputs if op.shape(part) != (0,)]
    if op.translation.fixed_batch == 1 and any(op.shape(part)[0] == BATCH for part in parts):
        # What such a file has once, it has once for each image.
        parts = [
            _expanded(op, part, (BATCH, *op.shape(part)[1:])) if op.shape(part)[0] == 1 else part for part in parts
        ]
    return op(torch.cat, tuple(parts), op.attribute("axis"))


def _split(op: Operation) -> Value:
    x, n = op.input(0), len(op.fields.outputs)
    (axis,) = op.axes([op.attribute("axis", 0)], len(op.shape(x)))
    sizes, length = op.numbers("split", 1), op.shape(x)[axis]
    op.attribute("num_outputs")
    if sizes is None:
        size = -(-length // n)
        sizes = [min(size, length - i * size) for i in range(n)]
    parts = op(torch.split, x, tuple(sizes), axis)
    return tuple(op(operator.getitem, parts, i) for i in range(n))


def _slice(op: Operation) -> Value:
    x, starts, ends = op.input(0), op.numbers("starts", 1), op.numbers("ends", 2)
    assert starts is not None
    assert ends is not None
    axes, steps = op.numbers("axes", 3) or range(len(starts)), op.numbers("steps", 4) or [1] * len(starts)
    for axis, start, end, step in zip(op.axes(axes, len(op.shape(x))), starts, ends, steps, strict=True):
        x = _part(op, x, axis, slice(start, end, step))
    return x


def _part(op: Operation, x: Value, axis: int, part: slice) -> Value:
    """Return a part of a value along an axis."""
    length = op.shape(x)[axis]
    kept = range(length)[part]
    if kept == range(length):
        return x
    if length % BATCH == 0:
        raise op.refuse("takes a part of the batch", DYNAMIC_BATCH)
    if kept.step < 0:
        return op(torch.index_select, x, axis, torch.tensor(list(kept)))
    slices = (*(slice(None),) * axis, slice(kept.start, kept.stop, kept.step))
    return op(operator.getitem, x, slices)


def _gather(op: Operation) -> Value:
    x, shape = op.input(0), op.shape(op.input(0))
    (axis,) = op.axes([op.attribute("axis", 0)], len(shape))
    in_order = _in_order(op, shape, op.input(1))
    if in_order is not None:
        return _reshaped(op, x, in_order)
    indices = op.constant(1)
    assert indices is not None
    indices = torch.where(indices < 0, indices + shape[axis], indices)
    if indices.dim() == 0:
        return op(torch.select, x, axis, int(indices))
    picked = op(torch.index_select, x, axis, indices.flatten())
    return picked if indices.dim() == 1 else op(torch.unflatten, picked, axis, tuple(indices.shape))


def _in_order(op: Operation, shape: tuple[int, ...], indices: Value) -> tuple[int, ...] | None:
    """Return the shape of a list of features that is picked completely and in order, which exporters write; or None."""
    lengths = op.shape(indices)
    if len(shape) != 1 or not lengths or shape[0] % BATCH:
        return None
    if isinstance(indices, torch.Tensor):  # of a file for one image
        is_whole = lengths[0] == op.translation.fixed_batch == 1 and math.prod(lengths) * BATCH == shape[0]
        return (BATCH, *lengths[1:]) if is_whole and _counts(indices) else None
    if not op.translation.is_count(indices):
        return None
    is_counted = all(_counts(op.translation.at_batch(indices, n)) for n in (2, 3))
    return lengths if is_counted and math.prod(lengths) == shape[0] else None


def _counts(indices: torch.Tensor) -> bool:
    """Return whether indices are 0, 1, 2 and so on."""
    return torch.equal(indices.flatten(), torch.arange(indices.numel()))


def _pad(op: Operation) -> Value:
    x, mode, pads = op.input(0), op.attribute("mode", "constant"), op.numbers("pads", 1)
    assert pads is not None
    value, rank = op.attribute("value"), len(op.shape(x))
    given = op.constant(2)
    value = value if value is not None else 0.0 if given is None else given.item()
    axes, n = op.axes(op.numbers("axes", 3) or range(len(pads) // 2), rank), len(pads) // 2
    before, behind = ({axis: pads[i + k] for i, axis in enumerate(axes)} for k in (0, n))
    first = min((axis for axis in axes if before[axis] or behind[axis]), default=rank)
    first = first if mode == "constant" else min(first, 2)
    pairs = [(before.get(axis, 0), behind.get(axis, 0)) for axis in range(first, rank)]
    names = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if mode == "constant":
        return padded(op, x, [pair[0] for pair in pairs], [pair[1] for pair in pairs], value)
    return op(functional.pad, x, [width for pair in reversed(pairs) for width in pair], mode=names[mode])


def _where(op: Operation) -> Value:
    return op(torch.where, *op.inputs)


def _scatter_nd(op: Operation) -> Value:
    data, indices, updates = op.inputs
    if op.attribute("reduction", "none") != "none":
        raise op.refuse("adds to what it replaces")
    return op(torch.index_put, data, op(torch.unbind, indices, -1), updates)


# --- shapes


def _sizes(op: Operation, lengths: Sequence[int]) -> tuple[Any, ...]:
    """Return the lengths of axes, those of the batch as nodes."""
    sizes: list[Any] = []
    for length in lengths:
        _check_length(op, length)
        is_batch = length >= BATCH and length % BATCH == 0
        sizes.append(op(batch_length, op.translation.image, length // BATCH) if is_batch else length)
    return tuple(sizes)


def _check_length(op: Operation, length: int) -> None:
    """Refuse a length that is neither a number nor a multiple of the batch's."""
    if length >= BATCH // 2 and length % BATCH:
        raise op.refuse("computes a length from the number of images in the batch", DYNAMIC_BATCH)


def _shape(op: Operation) -> Value:
    shape = op.shape(op.input(0))
    return op.translation.lengths(shape[op.attribute("start", 0) : op.attribute("end")])


def _reshape(op: Operation) -> Value:
    x, target = op.input(0), op.numbers("shape", 1)
    assert target is not None
    shape, keeps_zero = op.shape(x), not op.attribute("allowzero", 0)
    target = [shape[i] if length == 0 and keeps_zero else length for i, length in enumerate(target)]
    return _reshaped(op, x, _with_batch(op, shape, target))


def _with_batch(op: Operation, shape: Sequence[int], target: list[int]) -> list[int]:
    """Return a target shape in which a file for one image has the batch in front."""
    written_out = not any(length >= BATCH for length in target) and target and target[0] > 0
    if op.translation.fixed_batch == 1 and any(length % BATCH == 0 for length in shape) and written_out:
        return [target[0] * BATCH, *target[1:]]
    return target


def _reshaped(op: Operation, x: Value, target: Sequence[int]) -> Value:
    """Return a value with another shape; one length may be -1."""
    while op.translation.function_of(x) in {torch.reshape, torch.flatten}:
        x = x.args[0]  # of a value that has been reshaped only the last shape counts
    shape = op.shape(x)
    known = math.prod(length for length in target if length != -1)
    lengths = [math.prod(shape) // max(known, 1) if length == -1 else length for length in target]
    loses_batch = shape[:1] == (BATCH,) and bool(lengths) and lengths[0] < BATCH
    if math.prod(lengths) != math.prod(shape) or loses_batch:
        raise op.refuse(
            f"has the number of images written out: {list(target)} for {readable(str(list(shape)))}", DYNAMIC_BATCH
        )
    for length in lengths:
        _check_length(op, length)
    if tuple(lengths) == tuple(shape):
        return x
    if sum(length >= BATCH for length in lengths) > 1:
        raise op.refuse("combines images of the batch", DYNAMIC_BATCH)
    return op(torch.reshape, x, tuple(-1 if length >= BATCH else length for length in lengths))


def _flatten(op: Operation) -> Value:
    x, shape = op.input(0), op.shape(op.input(0))
    axis = op.attribute("axis", 1)
    axis += len(shape) if axis < 0 else 0
    if axis == 1:
        return op(torch.flatten, x, 1)
    return _reshaped(op, x, [math.prod(shape[:axis]), math.prod(shape[axis:])])


def _transpose(op: Operation) -> Value:
    x = op.input(0)
    order = tuple(op.attribute("perm", reversed(range(len(op.shape(x))))))
    return x if order == tuple(range(len(order))) else op(torch.permute, x, order)


def _squeeze(op: Operation) -> Value:
    x, shape = op.input(0), op.shape(op.input(0))
    axes = op.numbers("axes", 1)
    dims = op.axes(axes, len(shape)) if axes else [i for i, length in enumerate(shape) if length == 1]
    if any(shape[dim] != 1 for dim in dims):
        raise op.refuse("removes the axis of the batch", DYNAMIC_BATCH)
    for dim in sorted(dims, reverse=True):
        x = op(torch.squeeze, x, dim)
    return x


def _unsqueeze(op: Operation) -> Value:
    x, axes = op.input(0), op.numbers("axes", 1) or []
    for axis in sorted(op.axes(axes, len(op.shape(x)) + len(axes))):
        x = op(torch.unsqueeze, x, axis)
    return x


def _expand(op: Operation) -> Value:
    x, target = op.input(0), op.numbers("shape", 1)
    assert target is not None
    shape = op.shape(x)
    return _expanded(op, x, np.broadcast_shapes(shape, tuple(target)))


def _expanded(op: Operation, x: Value, lengths: Sequence[int]) -> Value:
    """Return a value repeated along axes of length one."""
    own = (1,) * (len(lengths) - len(op.shape(x))) + op.shape(x)
    added = len(lengths) - len(op.shape(x))
    if tuple(lengths) == op.shape(x):
        return x
    sizes = [-1 if i >= added and old == new else new for i, (old, new) in enumerate(zip(own, lengths, strict=True))]
    return op(torch.Tensor.expand, x, _sizes(op, sizes))


def _constant_of_shape(op: Operation) -> Value:
    lengths, value = op.numbers("shape", 0), op.attribute("value", torch.zeros(1))
    return _expanded(op, value.flatten(), lengths or ()) if lengths else value.flatten()[0]


def _tile(op: Operation) -> Value:
    repeats = op.numbers("repeats", 1)
    assert repeats is not None
    return op(torch.Tensor.repeat, op.input(0), _sizes(op, repeats))


def _constant(op: Operation) -> Value:
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        value = op.attribute(name)
        if value is not None:
            return torch.as_tensor(value)
    raise op.refuse("holds neither a tensor nor numbers")


def _range(op: Operation) -> Value:
    bounds = [op.constant(i) for i in range(3)]
    start, limit, step = (None if bound is None else int(bound) if is_whole(op) else float(bound) for bound in bounds)
    if limit is not None and limit >= BATCH // 2:
        _check_length(op, int(limit))
        return op(count_to_batch, op.translation.image, start, int(limit) // BATCH, step)
    return op(torch.arange, start, limit, step)


# --- positions


def _depth_to_space(op: Operation) -> Value:
    x, size = op.input(0), op.attribute("blocksize")
    if op.attribute("mode", "DCR") == "CRD":
        return op(functional.pixel_shuffle, x, size)
    n, channels, rows, cols = op.shape(x)
    parts = _reshaped(op, x, [n, size, size, channels // size**2, rows, cols])
    moved = op(torch.permute, parts, (0, 3, 4, 1, 5, 2))
    return _reshaped(op, moved, [n, channels // size**2, rows * size, cols * size])


def _space_to_depth(op: Operation) -> Value:
    x, size = op.input(0), op.attribute("blocksize")
    n, channels, rows, cols = op.shape(x)
    parts = _reshaped(op, x, [n, channels, rows // size, size, cols // size, size])
    moved = op(torch.permute, parts, (0, 3, 5, 1, 2, 4))
    return _reshaped(op, moved, [n, channels * size**2, rows // size, cols // size])


def _resize(op: Operation) -> Value:
    x, shape = op.input(0), op.shape(op.input(0))
    mode, place = op.attribute("mode", "nearest"), op.attribute("coordinate_transformation_mode", "half_pixel")
    rounding = op.attribute("nearest_mode", "round_prefer_floor")
    policy = op.attribute("keep_aspect_ratio_policy", "stretch")
    if op.attribute("antialias", 0) or policy != "stretch" or len(shape) != 4:
        raise op.refuse("smooths what it makes smaller, keeps the ratio of sides, or has another map than an image")
    sides, scales = _resized(op, shape)
    if sides == shape[2:]:
        return x
    if mode == "linear" and place in {"half_pixel", "pytorch_half_pixel"} and min(sides) > 1:
        by_size = op.constant(3) is not None
        given = {"size": sides} if by_size else {"scale_factor": scales}
        return op(functional.interpolate, x, **given, mode="bilinear", align_corners=False)
    if mode == "linear" and place == "align_corners":
        return op(functional.interpolate, x, sides, mode="bilinear", align_corners=True)
    if mode != "nearest" or place not in _PLACES or rounding not in _ROUNDED:
        raise op.refuse(f"has the mode {mode} with {place} and {rounding}")
    for axis in (2, 3):
        indices = _nearest(shape[axis], sides[axis - 2], scales[axis - 2], (place, rounding))
        x = op(torch.index_select, x, axis, torch.tensor(indices))
    return x


def _resized(op: Operation, shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[float, float]]:
    """Return the sides of a resized image, and by how much it is enlarged."""
    axes = op.axes(op.attribute("axes", range(4)), 4)
    given = [op.constant(i) for i in (2, 3)]
    factors, sizes = (None if part is None or not part.numel() else part.tolist() for part in given)
    if factors is None:
        assert sizes is not None
        sizes = [
            shape[0] if axis == 0 and n == op.translation.fixed_batch else n
            for axis, n in zip(axes, sizes, strict=True)
        ]
        factors = [size / shape[axis] for size, axis in zip(sizes, axes, strict=True)]
    by_axis = dict(zip(axes, factors, strict=True))
    if by_axis.get(0, 1) != 1 or by_axis.get(1, 1) != 1:
        raise op.refuse("resizes other axes than rows and columns")
    rows, cols = (
        int(dict(zip(axes, sizes, strict=True)).get(axis, shape[axis]))
        if sizes
        else int(shape[axis] * by_axis.get(axis, 1))
        for axis in (2, 3)
    )
    return (rows, cols), (float(by_axis.get(2, 1)), float(by_axis.get(3, 1)))


_HALF = np.float32(0.5)
_PLACES: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "half_pixel": lambda i, scale, _old, _new: (i + _HALF) / scale - _HALF,
    "pytorch_half_pixel": lambda i, scale, _old, new: (i + _HALF) / scale - _HALF if new > 1 else 0.0,
    "asymmetric": lambda i, scale, _old, _new: i / scale,
    "align_corners": lambda i, _scale, old, new: i * (old - 1) / (new - 1) if new > 1 else 0.0,
}
_ROUNDED: dict[str, Callable[[float], int]] = {
    "round_prefer_floor": lambda place: math.ceil(place - _HALF),
    "round_prefer_ceil": lambda place: math.floor(place + _HALF),
    "floor": math.floor,
}


def _nearest(old: int, new: int, scale: float, modes: tuple[str, str]) -> list[int]:
    """Return which rows or columns of an image are those of the resized one."""
    place, rounding = modes
    one = np.float32  # with other numbers a place halfway between two pixels would be rounded otherwise
    found = (_ROUNDED[rounding](_PLACES[place](one(i), one(scale), one(old), one(new))) for i in range(new))
    return [min(max(index, 0), old - 1) for index in found]


OPERATORS: dict[str, Callable[[Operation], Value]] = {
    "Where": _where,
    "Identity": lambda op: op.input(0),
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "ScatterND": _scatter_nd,
    "Pad": _pad,
    "Shape": _shape,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Tile": _tile,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Resize": _resize,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
}
