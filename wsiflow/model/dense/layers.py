"""The operation of each call of a program on a map: sliding a kernel, mapping each position, or joining maps.

Input: one call of an ATen operation, with its arguments. Output: an `Op`. Only operations that are known to be local
are accepted. One that uses the whole map, or that is not in the table below, is refused, since a wrong assumption would
give scores that look right, but are not.

Pairs are (rows, cols). A map of a window is a tensor with a batch axis, which is the first, any number of axes of
channels, and one axis of rows and of columns, in this order but anywhere. Where a network has pooled its map to a
vector, the rows and columns are gone; over a region they are there all the same, as the last two axes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from wsiflow.errors import InputError
from wsiflow.model.dense.operations import Pair, Step

NCHW: Pair = (2, 3)
POOLINGS = ("max", "mean", "norm")


class Map(NamedTuple):
    """The shape of a window's map.

    Attributes:
        shape: Lengths of its axes.
        axes: Which of them are rows and columns; None for a vector of features.
        everywhere: Whether it is one place, of which a region has one around every place of a map: it comes from a
            mean over the window that is taken around every place.
    """

    shape: tuple[int, ...]
    axes: Pair | None
    everywhere: bool = False

    @property
    def side(self) -> Pair:
        """Number of rows and columns; (1, 1) for a vector."""
        return (1, 1) if self.axes is None else (self.shape[self.axes[0]], self.shape[self.axes[1]])

    def repeats(self, other: "Map") -> bool:
        """Tell whether it has the features of another map, which may have another number of rows and columns."""
        lengths = ([n for axis, n in enumerate(each.shape) if axis not in (each.axes or ())] for each in (self, other))
        return self.axes == other.axes and next(lengths) == next(lengths)

    def axis(self, dim: int) -> int:
        """Return the index of an axis that may be counted from the end; refuse the batch axis."""
        dim %= len(self.shape)
        if dim == 0:
            raise cannot_run_dense("it works along the batch")
        return dim

    def channel_axis(self, dim: int, task: str) -> int:
        """Return the index of an axis, which must be one of channels."""
        dim = self.axis(dim)
        if self.axes is not None and dim in self.axes:
            raise cannot_run_dense(f"{task} another axis than the channels")
        return dim


class Op(NamedTuple):
    """The operation of a call on a map.

    Attributes:
        kind: ``conv``: convolution; ``max``, ``mean`` or ``norm``, the root of the sum of squares: pooling; ``linear``:
            linear layer over a whole flattened map; ``move``: padding, cropping or subsampling; ``each``: function of
            each position alone; ``join``: function of several maps, or of maps and weights, on one grid; ``flat``:
            change of shape only.
        axes: Which axes of the result are rows and columns; None for a vector.
        kernel: Size of the kernel.
        stride: Stride of the kernel.
        before: Padding in front (top, left); negative values crop.
        dilation: Dilation of the kernel.
        groups: Number of groups of channels.
        value: The value with which a ``move`` pads.
        counted: Whether a ``mean`` includes padding in its divisor.
        steps: Changes of shape that are made of a ``flat``, or before another operation.
        after: Changes of shape that are made of the result of a pooling.
        given: Arguments of an ``each`` or a ``join`` whose values differ from those of the call, by name.
    """

    kind: Literal["conv", "max", "mean", "norm", "linear", "move", "each", "join", "flat"]
    axes: Pair | None = NCHW
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    before: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    value: float = 0.0
    counted: bool = True
    steps: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()
    given: tuple[tuple[str, Any], ...] = ()


class Call(NamedTuple):
    """A call of an operation.

    Attributes:
        name: Name of the operation, as ``conv2d``.
        args: Its arguments by the names of the operation's schema; a map is a `Map`, a weight a tensor without data.
        out: A tensor without data with the shape of the result, or several.
    """

    name: str
    args: Mapping[str, Any]
    out: Any

    @property
    def map(self) -> Map:
        """The first map among the arguments."""
        return next(part for part in _flat(self.args.values()) if isinstance(part, Map))


def read(call: Call) -> Op:
    """Return the operation of a call on a map.

    Raises:
        InputError: The operation is not local or not known; the message does not yet name the layer.
    """
    if call.name not in _CALLS:
        raise cannot_run_dense(_REFUSED.get(call.name, "it is not known to be local"))
    return _CALLS[call.name](call)


def check(name: str) -> None:
    """Refuse an operation that is known not to be local, whatever its arguments.

    Raises:
        InputError: The operation is attention or normalises over the map; the message does not yet name the layer.
    """
    if name in _REFUSED:
        raise cannot_run_dense(_REFUSED[name])


def cannot_run_dense(reason: str) -> InputError:
    """Return the error of a layer or network that cannot run over whole regions."""
    return InputError(reason, "set inference.engine=window, which runs any network")


def _flat(values: Any) -> list[Any]:
    """Return the items of arguments, those of lists too."""
    return [part for value in values for part in (value if isinstance(value, list | tuple) else [value])] + [
        value for value in values if isinstance(value, Map)
    ]


def _pair(value: Any) -> Pair:
    """Return an argument that PyTorch accepts as one or two numbers as a pair (rows, cols)."""
    values = [value] if isinstance(value, int) else list(value)
    return (int(values[0]), int(values[-1]))


# --- kernels


def _image(call: Call) -> Map:
    """Return the map of a call, which must have the axes of an image."""
    image = call.map
    if image.axes != NCHW or len(image.shape) != 4:
        raise cannot_run_dense("its input does not have the axes (batch, channels, rows, columns)")
    return image


def _conv(call: Call) -> Op:
    args = call.args
    if args.get("transposed") or not isinstance(args["weight"], torch.Tensor):
        raise cannot_run_dense("it is a transposed convolution, or its kernel is computed from the pixels")
    _image(call)
    kernel, dilation, padding = _pair(args["weight"].shape[2:]), _pair(args["dilation"]), args["padding"]
    if isinstance(padding, str):
        # PyTorch's padding "same" has its smaller half in front.
        same = padding == "same"
        padding = tuple(d * (k - 1) // 2 if same else 0 for k, d in zip(kernel, dilation, strict=True))
    return Op("conv", NCHW, kernel, _pair(args["stride"]), _pair(padding), dilation, args["groups"])


def _linear(call: Call) -> Op:
    given = call.map
    if not isinstance(call.args.get("weight", call.args.get("mat2")), torch.Tensor):
        raise cannot_run_dense(_EVERYWHERE)
    if given.axes is None and len(given.shape) == 2:
        return Op("linear", None)
    given.channel_axis(-1, "it is a linear layer over")
    if given.axes is None:
        raise cannot_run_dense("it is a linear layer over a part of a vector")
    return Op("each", given.axes)


def _max_pool(call: Call) -> Op:
    _image(call)
    args = call.args
    kernel = args["kernel_size"]
    stride = args["stride"] or kernel
    return Op("max", NCHW, _pair(kernel), _pair(stride), _pair(args["padding"]), _pair(args["dilation"]))


def _mean_pool(call: Call) -> Op:
    _image(call)
    args = call.args
    if args["divisor_override"]:
        raise cannot_run_dense("it divides by a number that is not the size of its kernel")
    before = _pair(args["padding"])
    counted = bool(args["count_include_pad"]) and any(before)
    kernel = args["kernel_size"]
    return Op("mean", NCHW, _pair(kernel), _pair(args["stride"] or kernel), before, counted=counted)


def _adaptive(kind: Literal["max", "mean"]) -> Callable[[Call], Op]:
    def read_adaptive(call: Call) -> Op:
        image, out = _image(call), first(call.out)
        if tuple(out.shape) == image.shape:
            return Op("flat", NCHW)
        if tuple(out.shape[2:]) != (1, 1):
            raise cannot_run_dense("it pools to a fixed number of places greater than one")
        return Op(kind, NCHW, image.side)

    return read_adaptive


def _reduce(kind: Literal["max", "mean", "norm"] | None) -> Callable[[Call], Op]:
    """Return the reader of a reduction, which is a pooling where it is over rows and columns."""

    def read_reduction(call: Call) -> Op:
        given, dims, keep = call.map, call.args.get("dim"), bool(call.args.get("keepdim"))
        reduced = sorted({given.axis(dim) for dim in ([dims] if isinstance(dims, int) else dims or [])})
        axes = given.axes
        if axes is not None and reduced == list(axes) and kind and len(given.shape) == 4:
            if axes == NCHW:
                return Op(kind, NCHW if keep else None, given.side)
            if axes == (1, 2):
                after: tuple[Step, ...] = (("permute", (0, 2, 3, 1)),) if keep else ()
                return Op(kind, axes if keep else None, given.side, steps=(("permute", (0, 3, 1, 2)),), after=after)
        if not reduced or (axes is not None and set(axes) & set(reduced)):
            raise cannot_run_dense("it reduces other axes than rows and columns")
        gone = [] if keep else reduced
        kept = None if axes is None else _moved(axes, lambda axis: axis - sum(each < axis for each in gone))
        return Op("each", kept, given=(("dim", reduced if isinstance(dims, list | tuple) else reduced[0]),))

    return read_reduction


def _norm(call: Call) -> Op:
    if call.args["ord"] != 2:
        raise cannot_run_dense("it is a norm other than the root of the sum of squares")
    return _reduce("norm")(call)


def _moved(axes: Pair, move: Callable[[int], int]) -> Pair:
    """Return the indices of rows and columns after a change of the axes."""
    return (move(axes[0]), move(axes[1]))


def first(out: Any) -> Any:
    """Return a result, or the first of several."""
    return out[0] if isinstance(out, list | tuple) else out


# --- parts of a map


def _pad(call: Call) -> Op:
    args, given = call.args, call.map
    pad, mode, value = args["pad"], args.get("mode", "constant"), float(args.get("value") or 0.0)
    if mode != "constant":
        raise cannot_run_dense(f"it pads with {mode!r}, which repeats the window's border")
    # Pairs of numbers from the last axis to the first.
    widths = dict(zip(range(len(given.shape) - 1, 0, -1), zip(pad[::2], pad[1::2], strict=True), strict=False))
    padded = {axis for axis, width in widths.items() if any(width)}
    if given.axes is None or not padded & set(given.axes):
        if given.axes is None:
            raise cannot_run_dense("it pads a vector")
        return Op("each", given.axes)
    if given.axes != NCHW or len(given.shape) != 4 or padded - set(NCHW):
        raise cannot_run_dense("it pads channels and places at once")
    return Op("move", before=(int(widths.get(2, (0, 0))[0]), int(widths[3][0])), value=value)


def _slice(call: Call) -> Op:
    args, given = call.args, call.map
    if tuple(call.out.shape) == given.shape:
        return Op("flat", given.axes)
    axis = given.axis(args["dim"])
    part = range(given.shape[axis])[args["start"] : args["end"] : args["step"]]
    if given.axes is None or axis not in given.axes:
        return Op("each", given.axes, given=(("dim", axis), ("start", part.start), ("end", part.stop)))
    if given.axes != NCHW or len(given.shape) != 4:
        raise cannot_run_dense("it takes a part of a map whose axes are not (batch, channels, rows, columns)")
    return _cropped(axis - 2, part)


def _cropped(axis: int, part: range) -> Op:
    """Return the operation that takes a range of rows (0) or columns (1)."""
    rows, cols = (part, range(1)) if axis == 0 else (range(1), part)
    return Op("move", stride=(rows.step, cols.step), before=(-rows.start, -cols.start))


def _select(call: Call) -> Op:
    given = call.map
    axis = given.channel_axis(call.args["dim"], "it takes one place of")
    after = None if given.axes is None else _moved(given.axes, lambda each: each - (axis < each))
    return Op("each", after, given=(("dim", axis),))


def _split(call: Call) -> Op:
    given = call.map
    return Op("each", given.axes, given=(("dim", given.channel_axis(call.args["dim"], "it splits")),))


def _gather(call: Call) -> Op:
    given = call.map
    return Op("each", given.axes, given=(("dim", given.channel_axis(call.args["dim"], "it picks from")),))


# --- shapes


def _reshape(call: Call) -> Op:
    """Return the change of shape, which must keep rows and columns apart from channels and from each other."""
    given, shape = call.map, tuple(call.out.shape)
    if shape == given.shape:
        return Op("flat", given.axes)
    if shape[0] != given.shape[0] or math.prod(shape) != math.prod(given.shape):
        raise cannot_run_dense("it changes the shape of the map")
    if given.side == (1, 1):
        return _reshaped_vector(given, shape)
    assert given.axes is not None
    rows, cols = given.axes
    if len(shape) == 2 and given.axes == NCHW and len(given.shape) == 4:
        return Op("flat", None)  # a flattened map, of which a linear layer makes a vector
    for axes in ((r, c) for r in range(1, len(shape)) for c in range(r + 1, len(shape))):
        parts = ((1, rows), (rows + 1, cols), (cols + 1, len(given.shape)))
        others = ((1, axes[0]), (axes[0] + 1, axes[1]), (axes[1] + 1, len(shape)))
        pairs = [(given.shape[a:b], shape[c:d]) for (a, b), (c, d) in zip(parts, others, strict=True)]
        same = all(math.prod(old) == math.prod(new) for old, new in pairs)
        if (shape[axes[0]], shape[axes[1]]) == given.side and same:
            return Op("flat", axes, steps=_regrouped([(a, *pair) for (a, _), pair in zip(parts, pairs, strict=True)]))
    raise cannot_run_dense("it changes the shape of the map")


def _reshaped_vector(given: Map, shape: tuple[int, ...]) -> Op:
    """Return the change of shape of a map with one place, whose rows and columns become the last two axes."""
    channels = given.shape[1:]
    steps: tuple[Step, ...] = ()
    if given.axes is not None:
        kept = [axis for axis in range(len(given.shape)) if axis not in given.axes]
        order = (*kept, *given.axes)
        steps = () if order == tuple(range(len(given.shape))) else (("permute", order),)
        channels = tuple(given.shape[axis] for axis in kept[1:])
    has_places = len(shape) >= 4 and shape[-2:] == (1, 1)
    after = shape[1:-2] if has_places else shape[1:]
    axes = (len(shape) - 2, len(shape) - 1) if has_places else None
    return Op("flat", axes, steps=(*steps, *_regrouped([(1, channels, after)])))


def _regrouped(parts: Sequence[tuple[int, tuple[int, ...], tuple[int, ...]]]) -> tuple[Step, ...]:
    """Return the steps that give runs of axes other lengths: (first axis, old lengths, new lengths) of each run."""
    steps: list[Step] = []
    for first, old, new in reversed(parts):  # from the last, so that the axes of earlier runs keep their places
        if old == new:
            continue
        if not old:
            steps.append(("unsqueeze", (first,)))
        elif len(old) > 1:
            steps.append(("flatten", (first, first + len(old) - 1)))
        if not new:
            steps.append(("squeeze", (first,)))
        elif len(new) > 1:
            steps.append(("unflatten", (first, new)))
    return tuple(steps)


def _permute(call: Call) -> Op:
    given, dims = call.map, list(range(len(call.map.shape)))
    if call.name == "permute":
        dims = [dim % len(dims) for dim in call.args["dims"]]
    else:
        first, second = (call.args[name] % len(dims) for name in ("dim0", "dim1"))
        dims[first], dims[second] = second, first
    if dims[0]:
        raise cannot_run_dense("it moves the batch")
    if given.axes is None:
        return Op("flat", None, steps=(("permute", (*dims, len(dims), len(dims) + 1)),))
    axes = _moved(given.axes, dims.index)
    if axes[0] > axes[1]:
        raise cannot_run_dense("it swaps rows and columns")
    return Op("flat", axes, steps=(("permute", tuple(dims)),))


def _expand(call: Call) -> Op:
    """Return the repetition of features, which must not be that of a window's features at every place of a map."""
    given, shape = call.map, tuple(call.out.shape)
    if shape == given.shape or (given.everywhere and given.axes and Map(shape, given.axes).repeats(given)):
        return Op("flat", given.axes)
    raise cannot_run_dense(OF_THE_WHOLE if given.side == (1, 1) else "it repeats a map")


def _same(call: Call) -> Op:
    return Op("flat", call.map.axes)


def _item(call: Call) -> Op:
    """Return the operation that takes one of several results; of most operations only the first one is a map."""
    return Op("each", call.map.axes)


# --- functions of each position


def _each(call: Call) -> Op:
    return Op("each", call.map.axes)


def _batch_norm(call: Call) -> Op:
    args, given = call.args, call.map
    if args.get("training") or args["running_mean"] is None:
        raise cannot_run_dense(
            "it normalises with statistics of the batch, so a score depends on its neighbours in the batch"
        )
    given.channel_axis(1, "it normalises along")
    return Op("each", given.axes)


def _layer_norm(call: Call) -> Op:
    given, normalised = call.map, len(call.args["normalized_shape"])
    last = set(range(len(given.shape) - normalised, len(given.shape)))
    if given.axes is not None and last & set(given.axes):
        raise cannot_run_dense(_OVER_MAP)
    if given.axes is None and (normalised > 1 or len(given.shape) > 2):
        raise cannot_run_dense("it normalises a part of a vector")
    return Op("each", given.axes)


def _softmax(call: Call) -> Op:
    axis = call.map.channel_axis(call.args["dim"], "it is a softmax over")
    return Op("each", call.map.axes, given=(("dim", axis),))


def _prelu(call: Call) -> Op:
    call.map.channel_axis(1, "it has slopes along")
    return Op("each", call.map.axes)


def _mean_of_channels(call: Call) -> Op:
    """Return the operation of a pooling over three axes, of which only the first may be pooled."""
    args, given = call.args, call.map
    if given.axes != (3, 4) or any((*args["kernel_size"][1:], *args["stride"][1:])[i] != 1 for i in range(4)):
        raise cannot_run_dense("it pools channels and places at once")
    return Op("each", given.axes)


def _dropout(call: Call) -> Op:
    if call.args["train"] if "train" in call.args else call.args["training"]:
        raise cannot_run_dense("it drops features at random, even in evaluation mode")
    return Op("flat", call.map.axes)


# --- functions of several maps


def _cat(call: Call) -> Op:
    _check_axes(call)
    axis = call.map.channel_axis(call.args["dim"], "it concatenates maps along")
    return Op("join", call.map.axes, given=(("dim", axis),))


def _join(call: Call) -> Op:
    _check_axes(call)
    return Op("join", call.map.axes)


def _check_axes(call: Call) -> None:
    """Refuse maps whose rows and columns are other axes, and weights that vary over the map."""
    given = call.map
    for part in _flat(call.args.values()):
        if isinstance(part, Map) and (part.axes != given.axes or len(part.shape) != len(given.shape)):
            raise cannot_run_dense("it joins maps whose axes differ")
        if isinstance(part, torch.Tensor) and given.axes is not None:
            lengths = dict(zip(range(len(given.shape) - 1, -1, -1), reversed(part.shape), strict=False))
            if any(lengths.get(axis, 1) > 1 for axis in given.axes):
                raise cannot_run_dense("it adds or multiplies constants that vary over the map")


OF_THE_WHOLE = "it combines every place of a map with features of the whole map (squeeze-and-excite)"
_EVERYWHERE = "every position depends on all others (attention)"
_OVER_MAP = "it normalises over the map, so a score would depend on everything around its window"

RESHAPES = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")

_CALLS: dict[str, Callable[[Call], Op]] = {
    **dict.fromkeys(("conv2d", "convolution"), _conv),
    **dict.fromkeys(("linear", "addmm", "mm"), _linear),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"), _batch_norm),
    **dict.fromkeys(("layer_norm", "native_layer_norm"), _layer_norm),
    **dict.fromkeys(("max_pool2d", "max_pool2d_with_indices"), _max_pool),
    "avg_pool2d": _mean_pool,
    "avg_pool3d": _mean_of_channels,
    **dict.fromkeys(("adaptive_avg_pool2d", "_adaptive_avg_pool2d"), _adaptive("mean")),
    "adaptive_max_pool2d": _adaptive("max"),
    "mean": _reduce("mean"),
    "amax": _reduce("max"),
    "linalg_vector_norm": _norm,
    **dict.fromkeys(("sum", "amin"), _reduce(None)),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "slice": _slice,
    "select": _select,
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    "index_select": _gather,
    "getitem": _item,
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(("permute", "transpose"), _permute),
    **dict.fromkeys(("expand", "expand_as"), _expand),
    **dict.fromkeys(("contiguous", "clone", "alias", "detach", "lift_fresh_copy"), _same),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax"), _softmax),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), _dropout),
    "prelu": _prelu,
    **dict.fromkeys(("cat", "concat"), _cat),
    **dict.fromkeys(("add", "sub", "rsub", "mul", "div", "maximum", "minimum", "addcmul", "pow"), _join),
    **dict.fromkeys(("where", "masked_fill", "eq", "ne", "lt", "le", "gt", "ge"), _join),
    **dict.fromkeys(
        (
            *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus"),
            *("sigmoid", "log_sigmoid", "tanh", "hardtanh", "hardsigmoid", "hardswish", "threshold", "clamp"),
            *("clamp_min", "clamp_max", "exp", "log", "sqrt", "rsqrt", "square", "abs", "neg", "reciprocal", "erf"),
            *("logical_not", "logical_and", "logical_or"),
            *("to", "_to_copy", "type_as"),
        ),
        _each,
    ),
}

_REFUSED: dict[str, str] = {
    **dict.fromkeys(("matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"), _EVERYWHERE),
    **dict.fromkeys(("group_norm", "native_group_norm", "instance_norm"), _OVER_MAP),
    **dict.fromkeys(
        ("reflection_pad2d", "replication_pad2d"), "it pads with the window's border, which is not there over a region"
    ),
}
