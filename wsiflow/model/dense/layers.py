"""The operation of each layer of a network on a map: sliding a kernel, mapping each position, or joining maps.

Input: one call in a traced network (a module, a function or a method) with its arguments. Output: an `Op`. Only layers
that are known to be local are accepted. A layer that uses the whole map, or that is not in the tables below, is
refused, since a wrong assumption would give scores that look right, but are not.

Pairs are (rows, cols). Maps are float32 (n, channels, rows, cols).
"""

import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional

from wsiflow.errors import InputError
from wsiflow.model.dense.operations import Pair


class Op(NamedTuple):
    """The operation of a layer on a map.

    Attributes:
        kind: ``conv``: convolution; ``max`` or ``mean``: pooling; ``linear``: linear layer over a whole flattened map;
            ``move``: padding, cropping or subsampling; ``each``: function of each position alone; ``join``: function of
            several maps on one grid; ``flat``: change of shape only.
        kernel: Size of the kernel.
        stride: Stride of the kernel.
        before: Padding in front (top, left); negative values crop.
        dilation: Dilation of the kernel.
        groups: Number of groups of channels.
        value: The value with which a ``move`` pads.
        counted: Whether a ``mean`` includes padding in its divisor.
    """

    kind: Literal["conv", "max", "mean", "linear", "move", "each", "join", "flat"]
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    before: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    value: float = 0.0
    counted: bool = True


EACH, JOIN, FLAT = Op("each"), Op("join"), Op("flat")

_EVERYWHERE = "every position depends on all others (attention)"
_OVER_MAP = "it normalises over the map, so a score would depend on everything around its window"
_UNKNOWN = "it is not known to be local"


def read(
    node: fx.Node, module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor
) -> Op:
    """Return the operation of a call on a map.

    Args:
        node: The call.
        module: The module that is called, or None for a function or method.
        args: Arguments of the call; maps are replaced by tensors with the shapes of one window's maps.
        kwargs: Keyword arguments of the call, in the same form.
        out: A tensor with the shape of the result.

    Raises:
        InputError: The operation is not local or not known; the message does not yet name the layer.
    """
    if module is not None:
        # Base classes are not considered, because a derived module may do something else.
        if type(module) not in _MODULES:
            raise cannot_run_dense(_reason(type(module)))
        return _MODULES[type(module)](module, out, *args)
    if node.target not in _CALLS:
        raise cannot_run_dense(_reason(node.target))
    try:
        return _CALLS[node.target](out, *args, **kwargs)
    except TypeError as error:  # the call has arguments that its reader does not have
        raise cannot_run_dense(f"it is called with arguments that are not supported: {error}") from error


def check(node: fx.Node, module: nn.Module | None) -> None:
    """Refuse a layer that is known not to be local, before any shapes are computed.

    Raises:
        InputError: The layer is attention or normalises over the map; the message does not yet name it.
    """
    target = node.target if module is None else type(module)
    if node.op.startswith("call") and _reason(target) != _UNKNOWN:
        raise cannot_run_dense(_reason(target))


def cannot_run_dense(reason: str) -> InputError:
    """Return the error of a layer or network that cannot run over whole regions."""
    return InputError(reason, "set inference.engine=window, which runs any network")


def _reason(target: Any) -> str:
    """Return the reason why a module type, function or method is refused."""
    return next((reason for reason, known in _REFUSED.items() if target in known), _UNKNOWN)


def _pair(value: Any) -> Pair:
    """Return an argument that PyTorch accepts as one or two numbers as a pair (rows, cols)."""
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _conv(module: nn.Conv2d, _out: torch.Tensor, _x: torch.Tensor) -> Op:
    if module.padding_mode != "zeros":
        raise cannot_run_dense(f"it pads with {module.padding_mode!r}, which repeats the window's border")
    kernel, dilation = _pair(module.kernel_size), _pair(module.dilation)
    if isinstance(module.padding, str):
        # PyTorch's padding "same" has its smaller half in front.
        same = module.padding == "same"
        before = tuple(d * (k - 1) // 2 if same else 0 for k, d in zip(kernel, dilation, strict=True))
    else:
        before = module.padding
    return Op("conv", kernel, _pair(module.stride), _pair(before), dilation, module.groups)


def _linear(_module: nn.Linear, _out: torch.Tensor, x: torch.Tensor) -> Op:
    if x.dim() != 2:
        raise cannot_run_dense("it is a linear layer, but its input is not the feature vector of a window")
    return Op("linear")


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d, _out: torch.Tensor, _x: torch.Tensor) -> Op:
    if module.running_mean is None or module.training:
        raise cannot_run_dense(
            "it normalises with statistics of the batch, so a score depends on its neighbours in the batch"
        )
    return EACH


def _max_pool(
    _out: torch.Tensor,
    _x: torch.Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,  # noqa: ARG001, FBT001, FBT002  PyTorch's signature; the output shape shows its effect
    return_indices: bool = False,  # noqa: FBT001, FBT002
) -> Op:
    if return_indices:
        raise cannot_run_dense("it returns positions within the window")
    return Op("max", _pair(kernel_size), _pair(stride or kernel_size), _pair(padding), _pair(dilation))


def _mean_pool(
    _out: torch.Tensor,
    _x: torch.Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,  # noqa: ARG001, FBT001, FBT002
    count_include_pad: bool = True,  # noqa: FBT001, FBT002
    divisor_override: int | None = None,
) -> Op:
    if divisor_override:
        raise cannot_run_dense("it divides by a number that is not the size of its kernel")
    before = _pair(padding)
    counted = count_include_pad and any(before)
    return Op("mean", _pair(kernel_size), _pair(stride or kernel_size), before, counted=counted)


def _adaptive(kind: Literal["max", "mean"]) -> Callable[..., Op]:
    def read_adaptive(out: torch.Tensor, x: torch.Tensor, _output_size: Any, return_indices: bool = False) -> Op:  # noqa: FBT001, FBT002
        if out.shape == x.shape:
            return FLAT
        if return_indices or tuple(out.shape[2:]) != (1, 1):
            raise cannot_run_dense("it pools to a fixed number of places greater than one")
        return Op(kind, _pair(x.shape[2:]))

    return read_adaptive


def _reduce(kind: Literal["max", "mean"]) -> Callable[..., Op]:
    def read_reduction(_out: torch.Tensor, x: torch.Tensor, dim: Any = None, keepdim: bool = False) -> Op:  # noqa: ARG001, FBT001, FBT002
        if x.dim() != 4 or not isinstance(dim, tuple | list) or {d % 4 for d in dim} != {2, 3}:
            raise cannot_run_dense("it reduces other axes than rows and columns")
        return Op(kind, _pair(x.shape[2:]))

    return read_reduction


def _pad(_out: torch.Tensor, x: torch.Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Op:
    if mode != "constant" or len(pad) != 4 or x.dim() != 4:
        raise cannot_run_dense(f"it pads with {mode!r} or along the channels")
    return Op("move", before=(int(pad[2]), int(pad[0])), value=float(value or 0.0))


def _index(out: torch.Tensor, x: torch.Tensor, key: Any) -> Op:
    keys = (key if isinstance(key, tuple) else (key,)) + (slice(None),) * 4
    if x.dim() == 4 and out.dim() < 4:
        return _reshape(out, x)
    if x.dim() != 4 or Ellipsis in keys or not all(isinstance(part, slice) for part in keys):
        raise cannot_run_dense("it selects single rows, columns or channels")
    rows, cols = (range(side)[part] for part, side in zip(keys[2:4], x.shape[2:], strict=True))
    if keys[0] != slice(None) or (out.shape[1] != x.shape[1] and out.shape[2:] != x.shape[2:]):
        raise cannot_run_dense("it slices the batch, or channels and map at once")
    return (
        Op("move", stride=(rows.step, cols.step), before=(-rows.start, -cols.start))
        if x.shape[1] == out.shape[1]
        else EACH
    )


def _reshape(out: torch.Tensor, x: torch.Tensor, *_: Any, **__: Any) -> Op:
    same = out.shape[0] == x.shape[0] and out.numel() == x.numel()
    pooled = x.shape[2:].numel() == 1 and out.shape[1] == x.shape[1]
    if not same or not (pooled or out.dim() == 2):
        raise cannot_run_dense("it changes the shape of the map")
    return FLAT


def _softmax(_out: torch.Tensor, _x: torch.Tensor, dim: int | None = None, **_: Any) -> Op:
    if dim != 1:
        raise cannot_run_dense("it is a softmax over another axis than the channels")
    return EACH


def _dropout(_out: torch.Tensor, _x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Op:  # noqa: ARG001, FBT001, FBT002
    if training:
        raise cannot_run_dense("it drops features at random, even in evaluation mode")
    return EACH


def _cat(out: torch.Tensor, _tensors: Any, dim: int = 0) -> Op:
    if dim % out.dim() != 1:
        raise cannot_run_dense("it concatenates maps along another axis than the channels")
    return JOIN


def _join(_out: torch.Tensor, *_: Any, **__: Any) -> Op:
    return JOIN


def _each(_out: torch.Tensor, _x: torch.Tensor, *_: Any, **__: Any) -> Op:
    return EACH


def _each_module(_module: nn.Module, _out: torch.Tensor, _x: torch.Tensor) -> Op:
    return EACH


_MODULES: dict[type[nn.Module], Callable[..., Op]] = {
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.MaxPool2d: lambda m, out, x: _max_pool(
        out, x, m.kernel_size, m.stride, m.padding, m.dilation, return_indices=m.return_indices
    ),
    nn.AvgPool2d: lambda m, out, x: _mean_pool(
        out,
        x,
        m.kernel_size,
        m.stride,
        m.padding,
        count_include_pad=m.count_include_pad,
        divisor_override=m.divisor_override,
    ),
    nn.AdaptiveAvgPool2d: lambda m, out, x: _adaptive("mean")(out, x, m.output_size),
    nn.AdaptiveMaxPool2d: lambda m, out, x: _adaptive("max")(out, x, m.output_size, m.return_indices),
    nn.ConstantPad2d: lambda m, out, x: _pad(out, x, m.padding, value=m.value),
    nn.ZeroPad2d: lambda m, out, x: _pad(out, x, m.padding),
    nn.Flatten: lambda _m, out, x: _reshape(out, x),
    nn.Softmax: lambda m, out, x: _softmax(out, x, m.dim),
    nn.LogSoftmax: lambda m, out, x: _softmax(out, x, m.dim),
    **dict.fromkeys(
        (
            *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.LocalResponseNorm, nn.PReLU),
            *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
            *(nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish),
        ),
        _each_module,
    ),
}

_CALLS: dict[Any, Callable[..., Op]] = {
    functional.max_pool2d: _max_pool,
    functional.avg_pool2d: _mean_pool,
    functional.adaptive_avg_pool2d: _adaptive("mean"),
    functional.adaptive_max_pool2d: _adaptive("max"),
    functional.pad: _pad,
    functional.dropout: _dropout,
    functional.dropout2d: _dropout,
    operator.getitem: _index,
    **dict.fromkeys((torch.mean, "mean"), _reduce("mean")),
    **dict.fromkeys((torch.amax, "amax"), _reduce("max")),
    **dict.fromkeys((torch.flatten, "flatten", "view", torch.reshape, "reshape", torch.squeeze, "squeeze"), _reshape),
    **dict.fromkeys((torch.softmax, functional.softmax, functional.log_softmax, "softmax", "log_softmax"), _softmax),
    **dict.fromkeys((torch.cat, torch.concat), _cat),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _join),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), _join),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), _join),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div", "div_"), _join),
    **dict.fromkeys((torch.maximum, torch.minimum, "maximum", "minimum"), _join),
    **dict.fromkeys((torch.relu, functional.relu, "relu", "relu_", functional.relu6, functional.leaky_relu), _each),
    **dict.fromkeys((functional.elu, functional.gelu, functional.silu, functional.mish, functional.softplus), _each),
    **dict.fromkeys((functional.hardswish, functional.hardsigmoid, functional.hardtanh), _each),
    **dict.fromkeys((torch.sigmoid, functional.sigmoid, "sigmoid", torch.tanh, functional.tanh, "tanh"), _each),
    **dict.fromkeys((functional.local_response_norm, "contiguous", "clone", torch.clamp, "clamp"), _each),
}

_REFUSED: dict[str, set[Any]] = {
    _EVERYWHERE: {
        *(nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer),
        *(functional.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.einsum, operator.matmul),
        *("matmul", "bmm"),
    },
    _OVER_MAP: {
        *(nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm, nn.RMSNorm),
        *(functional.group_norm, functional.instance_norm, functional.layer_norm),
    },
}
