"""The operators of ONNX that compute: kernels, normalisation, functions of each position, products and reductions.

Input: an `Operation`. Output: its result.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from wsiflow.model.formats.onnx.graph import Value
from wsiflow.model.formats.onnx.operation import Operation

# --- kernels


def _pads(op: Operation, x: Value, kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the padding in front of and behind each axis of the image."""
    mode, given, n = op.attribute("auto_pad", "NOTSET"), op.attribute("pads"), len(kernel)
    strides = op.attribute("strides", [1] * n)
    dilations = op.attribute("dilations", [1] * n)
    if mode in {"NOTSET", "VALID"}:
        given = [0] * 2 * n if mode == "VALID" or given is None else given
        return list(given[:n]), list(given[n:])
    sides = op.shape(x)[2:]
    total = [
        max(0, (-(-side // stride) - 1) * stride + (size - 1) * dilation + 1 - side)
        for side, stride, size, dilation in zip(sides, strides, kernel, dilations, strict=True)
    ]
    smaller, larger = [each // 2 for each in total], [each - each // 2 for each in total]
    return (smaller, larger) if mode == "SAME_UPPER" else (larger, smaller)


def padded(op: Operation, x: Value, before: Sequence[int], behind: Sequence[int], value: float = 0.0) -> Value:
    """Return a map padded along its last axes."""
    widths = [width for pair in zip(reversed(before), reversed(behind), strict=True) for width in pair]
    return op(functional.pad, x, widths, value=value) if any(widths) else x


def _conv(op: Operation) -> Value:
    x, weight, bias = op.input(0), op.input(1), op.input(2)
    kernel = op.shape(weight)[2:]
    run = {1: functional.conv1d, 2: functional.conv2d}.get(len(kernel))
    if run is None or list(op.attribute("kernel_shape", kernel)) != list(kernel):
        raise op.refuse(f"has a kernel of {kernel}")
    before, behind = _pads(op, x, kernel)
    if before != behind:
        x, before = padded(op, x, before, behind), [0] * len(kernel)
    ones = (1,) * len(kernel)
    stride, dilation = op.attribute("strides", ones), op.attribute("dilations", ones)
    return op(run, x, weight, bias, tuple(stride), tuple(before), tuple(dilation), op.attribute("group", 1))


# By the number of axes that are pooled.
_MAX = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_MEAN = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


def _pool_shape(op: Operation) -> tuple[Value, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the map, kernel, stride and dilation of a pooling."""
    x, kernel = op.input(0), tuple(op.attribute("kernel_shape"))
    if len(kernel) not in _MAX:
        raise op.refuse(f"pools over {len(kernel)} axes")
    ones = (1,) * len(kernel)
    return x, kernel, tuple(op.attribute("strides", ones)), tuple(op.attribute("dilations", ones))


def _missing(op: Operation, before: Sequence[int], behind: Sequence[int]) -> list[int]:
    """Return the padding behind with which a pooling that rounds down has as many places as this one."""
    if not op.attribute("ceil_mode", 0) or op.attribute("auto_pad", "NOTSET") != "NOTSET":
        return list(behind)
    x, kernel, stride, dilation = _pool_shape(op)
    found = []
    for side, k, s, d, b, e in zip(op.shape(x)[2:], kernel, stride, dilation, before, behind, strict=True):
        reach = (k - 1) * d + 1
        last = -(-(side + b + e - reach) // s)
        last -= last * s >= side + b  # a window that holds padding behind alone is left out
        found.append(last * s + reach - side - b)
    return found


def _max_pool(op: Operation) -> Value:
    if len(op.fields.outputs) > 1:
        raise op.refuse("returns positions within the window")
    x, kernel, stride, dilation = _pool_shape(op)
    before, behind = _pads(op, x, kernel)
    ceil = bool(op.attribute("ceil_mode", 0)) and op.attribute("auto_pad", "NOTSET") == "NOTSET"
    if before != behind or any(2 * b > k for b, k in zip(before, kernel, strict=True)):
        x = padded(op, x, before, _missing(op, before, behind), -math.inf)
        before, ceil = [0] * len(kernel), False
    return op(_MAX[len(kernel)], x, kernel, stride, tuple(before), dilation, ceil)


def _average_pool(op: Operation) -> Value:
    x, kernel, stride, dilation = _pool_shape(op)
    before, behind = _pads(op, x, kernel)
    counted = bool(op.attribute("count_include_pad", 0))
    ceil = bool(op.attribute("ceil_mode", 0)) and op.attribute("auto_pad", "NOTSET") == "NOTSET"
    run = _MEAN[len(kernel)]
    if set(dilation) != {1}:
        raise op.refuse("has a dilated kernel")
    if before == behind and all(2 * b <= k for b, k in zip(before, kernel, strict=True)):
        return op(run, x, kernel, stride, tuple(before), ceil, counted)
    behind = behind if counted else _missing(op, before, behind)
    if counted and ceil:
        raise op.refuse("counts padding that differs between its sides, and rounds up")
    sums = op(run, padded(op, x, before, behind), kernel, stride)
    if counted:
        return sums
    ones = padded(op, torch.ones(1, 1, *op.shape(x)[2:]), before, behind)
    return op(torch.div, sums, op(run, ones, kernel, stride))


def _global_average(op: Operation) -> Value:
    x = op.input(0)
    rank = len(op.shape(x))
    return (
        op(functional.adaptive_avg_pool2d, x, 1)
        if rank == 4
        else op(torch.mean, x, tuple(range(2, rank)), keepdim=True)
    )


def _global_max(op: Operation) -> Value:
    return op(torch.amax, op.input(0), tuple(range(2, len(op.shape(op.input(0))))), keepdim=True)


# --- normalisation


def _batch_norm(op: Operation) -> Value:
    if op.attribute("training_mode", 0) or not op.attribute("spatial", 1):
        raise op.refuse("normalises with statistics of the batch", "export the model in evaluation mode")
    x, scale, bias, mean, variance = op.inputs
    return op(functional.batch_norm, x, mean, variance, scale, bias, eps=op.attribute("epsilon", 1e-5))


def _layer_norm(op: Operation) -> Value:
    x, scale, bias = op.input(0), op.input(1), op.input(2)
    shape = op.shape(x)
    normalised = shape[op.attribute("axis", -1) :]
    scale, bias = (None if part is None else op(torch.Tensor.expand, part, normalised) for part in (scale, bias))
    return op(functional.layer_norm, x, normalised, scale, bias, op.attribute("epsilon", 1e-5))


def _group_norm(op: Operation) -> Value:
    x, scale, bias = op.inputs
    groups, channels = op.attribute("num_groups"), op.shape(x)[1]
    if op.shape(scale) != (channels,):  # before opset 21 there is one number for each group
        scale, bias = (op(torch.repeat_interleave, part, channels // groups) for part in (scale, bias))
    return op(functional.group_norm, x, groups, scale, bias, op.attribute("epsilon", 1e-5))


def _instance_norm(op: Operation) -> Value:
    x, scale, bias = op.inputs
    return op(functional.instance_norm, x, weight=scale, bias=bias, eps=op.attribute("epsilon", 1e-5))


def _local_response(op: Operation) -> Value:
    size = op.attribute("size")
    if size % 2 == 0:
        raise op.refuse(f"has the even size {size}")
    alpha, beta, bias = op.attribute("alpha", 1e-4), op.attribute("beta", 0.75), op.attribute("bias", 1.0)
    return op(functional.local_response_norm, op.input(0), size, alpha, beta, bias)


# --- functions of each position


def _plain(function: Callable[..., Any], *names: str, **defaults: Any) -> Callable[[Operation], Value]:
    """Return the translation of an operator as a function of its inputs, and of attributes with these defaults."""

    def translated(op: Operation) -> Value:
        given = [op.attribute(name, default) for name, default in zip(names, defaults.values(), strict=True)]
        return op(function, *op.inputs, *given)

    return translated


def _hard_sigmoid(op: Operation) -> Value:
    alpha, beta = op.attribute("alpha", 0.2), op.attribute("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return op(functional.hardsigmoid, op.input(0))
    return op(torch.clamp, op(torch.add, op(torch.mul, op.input(0), alpha), beta), 0.0, 1.0)


def _selu(op: Operation) -> Value:
    alpha, gamma = op.attribute("alpha", 1.67326319217681884765625), op.attribute("gamma", 1.05070102214813232421875)
    return op(torch.mul, op(functional.elu, op.input(0), alpha), gamma)


def _prelu(op: Operation) -> Value:
    x, slope = op.inputs
    shape, lengths = op.shape(x), op.shape(slope)
    places = (1,) * (len(shape) - 2)
    if math.prod(lengths) == 1 or lengths[-len(shape) + 1 :] == (shape[1], *places):
        return op(functional.prelu, x, op(torch.flatten, slope))
    negative = op(torch.mul, op(torch.clamp, x, max=0.0), slope)
    return op(torch.add, op(functional.relu, x), negative)


def _gelu(op: Operation) -> Value:
    return op(functional.gelu, op.input(0), approximate=op.attribute("approximate", "none"))


def _clip(op: Operation) -> Value:
    x, limits = op.input(0), []
    for index, name in ((1, "min"), (2, "max")):
        value = op.attribute(name)
        given = op.input(index) if value is None else value
        limits.append(given if given is None or isinstance(given, float | fx.Node) else given.item())
    if any(isinstance(limit, fx.Node) for limit in limits):
        raise op.refuse("computes its limits from the pixels")
    return x if limits == [None, None] else op(torch.clamp, x, *limits)


def _div(op: Operation) -> Value:
    return op(torch.div, *op.inputs, rounding_mode="trunc") if is_whole(op) else op(torch.div, *op.inputs)


def is_whole(op: Operation) -> bool:
    """Return whether the first input holds whole numbers."""
    first = op.input(0)
    return not (first.meta["val"] if isinstance(first, fx.Node) else first).is_floating_point()


def _pow(op: Operation) -> Value:
    x, power = op.inputs
    scalar = isinstance(power, torch.Tensor) and power.numel() == 1 and isinstance(x, fx.Node)
    return op(torch.pow, x, float(power) if scalar else power)


def _mod(op: Operation) -> Value:
    return op(torch.fmod if op.attribute("fmod", 0) else torch.remainder, *op.inputs)


def _variadic(function: Callable[..., Any]) -> Callable[[Operation], Value]:
    return lambda op: functools.reduce(lambda a, b: op(function, a, b), op.inputs)


def _cast(op: Operation) -> Value:
    dtype = op.attribute("to")
    op.attribute("saturate")
    x = op.input(0)
    if dtype == torch.int32 and isinstance(x, torch.Tensor):
        dtype = torch.int64  # in which a multiple of the batch is not too large
    same = (x.meta["val"] if isinstance(x, fx.Node) else x).dtype == dtype
    return x if same else op(torch.Tensor.to, x, dtype)


def _softmax(function: Callable[..., Any]) -> Callable[[Operation], Value]:
    def translated(op: Operation) -> Value:
        x, shape = op.input(0), op.shape(op.input(0))
        (axis,) = op.axes([op.attribute("axis", -1 if op.opset >= 13 else 1)], len(shape))
        if op.opset >= 13 or math.prod(shape[axis + 1 :]) == 1:
            return op(function, x, axis)
        # Before opset 13 the axis and all behind it are one.
        return op(torch.unflatten, op(function, op(torch.flatten, x, axis), -1), -1, shape[axis:])

    return translated


def _dropout(op: Operation) -> Value:
    op.attribute("ratio")
    training = op.constant(2)
    if training is not None and bool(training):
        raise op.refuse("drops features at random", "export the model in evaluation mode")
    return op.input(0)


# --- products


def _gemm(op: Operation) -> Value:
    a, b, c = op.input(0), op.input(1), op.input(2)
    alpha, beta = op.attribute("alpha", 1.0), op.attribute("beta", 1.0)
    a = op(torch.t, a) if op.attribute("transA", 0) else a
    b = b if op.attribute("transB", 0) else op(torch.t, b)
    b = b if alpha == 1 else op(torch.mul, b, alpha)
    c = c if beta == 1 or c is None else op(torch.mul, c, beta)
    if c is not None and len(op.shape(c)) == 1 and op.shape(c)[0] == op.shape(b)[0]:
        return op(functional.linear, a, b, c)
    product = op(functional.linear, a, b)
    return product if c is None else op(torch.add, product, c)


def _matmul(op: Operation) -> Value:
    a, b = op.inputs
    if isinstance(b, torch.Tensor) and b.dim() == 2:
        return op(functional.linear, a, op(torch.t, b))
    return op(torch.matmul, a, b)


def _einsum(op: Operation) -> Value:
    return op(torch.einsum, op.attribute("equation"), *op.inputs)


# --- reductions


def _reduce(function: Callable[..., Any]) -> Callable[[Operation], Value]:
    def translated(op: Operation) -> Value:
        x, keep = op.input(0), bool(op.attribute("keepdims", 1))
        axes, rank = op.numbers("axes", 1), len(op.shape(x))
        if op.attribute("noop_with_empty_axes", 0) and not axes:
            return x
        return op(function, x, tuple(op.axes(axes or range(rank), rank)), keep)

    return translated


def _product(x: torch.Tensor, dims: Sequence[int], keep: bool) -> torch.Tensor:  # noqa: FBT001  as those of PyTorch
    """Return the product along axes."""
    for dim in sorted(dims, reverse=True):
        x = torch.prod(x, dim, keep)
    return x


def _norm(x: torch.Tensor, dims: Sequence[int], keep: bool) -> torch.Tensor:  # noqa: FBT001  as those of PyTorch
    """Return the Euclidean norm along axes."""
    norm: torch.Tensor = torch.linalg.vector_norm(x, 2, dims, keep)
    return norm


OPERATORS: dict[str, Callable[[Operation], Value]] = {
    "Conv": _conv,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average,
    "GlobalMaxPool": _global_max,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _local_response,
    "Relu": _plain(functional.relu),
    "LeakyRelu": _plain(functional.leaky_relu, "alpha", alpha=0.01),
    "Elu": _plain(functional.elu, "alpha", alpha=1.0),
    "Celu": _plain(functional.celu, "alpha", alpha=1.0),
    "Selu": _selu,
    "PRelu": _prelu,
    "Sigmoid": _plain(torch.sigmoid),
    "Tanh": _plain(torch.tanh),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _plain(functional.hardswish),
    "Softplus": _plain(functional.softplus),
    "Softsign": _plain(functional.softsign),
    "Erf": _plain(torch.erf),
    "Gelu": _gelu,
    "Mish": _plain(functional.mish),
    "Clip": _clip,
    "Add": _plain(torch.add),
    "Sub": _plain(torch.sub),
    "Mul": _plain(torch.mul),
    "Div": _div,
    "Mod": _mod,
    "Pow": _pow,
    "Sqrt": _plain(torch.sqrt),
    "Exp": _plain(torch.exp),
    "Log": _plain(torch.log),
    "Neg": _plain(torch.neg),
    "Abs": _plain(torch.abs),
    "Reciprocal": _plain(torch.reciprocal),
    "Floor": _plain(torch.floor),
    "Ceil": _plain(torch.ceil),
    "Min": _variadic(torch.minimum),
    "Max": _variadic(torch.maximum),
    "Sum": _variadic(torch.add),
    "Equal": _plain(torch.eq),
    "Greater": _plain(torch.gt),
    "GreaterOrEqual": _plain(torch.ge),
    "Less": _plain(torch.lt),
    "LessOrEqual": _plain(torch.le),
    "Not": _plain(torch.logical_not),
    "And": _plain(torch.logical_and),
    "Or": _plain(torch.logical_or),
    "IsNaN": _plain(torch.isnan),
    "Cast": _cast,
    "Dropout": _dropout,
    "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax),
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Einsum": _einsum,
    "ReduceMean": _reduce(torch.mean),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum),
    "ReduceProd": _reduce(_product),
    "ReduceL2": _reduce(_norm),
}
