"""The operations that a program of torch.export may call.

Input: the name of an operation in a program. Output: the function of PyTorch. A program after ``run_decompositions``
calls operations that return more than a network uses, as the indices of a pooling, and that not every backend knows:
`PLAIN` has those that compute their first results alone.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch

from wsiflow.errors import InputError

#: In front of the names of operations in programs.
ATEN = "torch.ops.aten."
# The operations of ATen that a program may call. Others may write files, as aten.save does, or return memory that was
# never written. Those in place have the same names with an underscore behind.
_NAMES = frozenset(
    (
        *("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose2d", "linear", "addmm", "mm", "matmul", "bmm"),
        *("baddbmm", "einsum", "dot", "mv", "outer", "scaled_dot_product_attention", "_native_multi_head_attention"),
        *("_scaled_dot_product_flash_attention_for_cpu", "batch_norm", "_native_batch_norm_legit_no_training"),
        *("_native_batch_norm_legit", "_batch_norm_no_update", "native_batch_norm", "cudnn_batch_norm"),
        *("instance_norm", "group_norm", "native_group_norm", "layer_norm", "native_layer_norm", "rms_norm"),
        *("linalg_vector_norm", "norm", "local_response_norm", "max_pool2d", "max_pool2d_with_indices", "avg_pool1d"),
        *("avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d"),
        *("adaptive_max_pool1d", "adaptive_max_pool2d", "max_pool1d", "relu", "relu6", "leaky_relu", "rrelu", "elu"),
        *("selu", "celu", "gelu", "silu", "mish", "softplus", "softsign", "sigmoid", "log_sigmoid", "tanh"),
        *("log_sigmoid_forward", "hardtanh", "hardsigmoid", "hardswish", "threshold", "prelu", "glu", "softmax"),
        *("log_softmax", "_softmax", "_log_softmax", "_safe_softmax", "dropout", "feature_dropout", "alpha_dropout"),
        *("feature_alpha_dropout", "native_dropout", "add", "sub", "rsub", "mul", "div", "true_divide", "floor_divide"),
        *("remainder", "fmod", "pow", "addcmul", "addcdiv", "maximum", "minimum", "clamp", "clamp_min", "clamp_max"),
        *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "square", "abs", "neg", "sign"),
        *("reciprocal", "erf", "sin", "cos", "floor", "ceil", "round", "trunc", "lerp", "where", "masked_fill", "eq"),
        *("ne", "lt", "le", "gt", "ge", "logical_not", "logical_and", "logical_or", "bitwise_not", "bitwise_and"),
        *("bitwise_or", "sum", "mean", "var", "std", "var_mean", "std_mean", "amax", "amin", "max", "min", "argmax"),
        *("prod", "cumsum", "logsumexp", "any", "all", "topk", "sort", "cat", "concat", "stack", "split", "chunk"),
        *(
            "split_with_sizes",
            "unbind",
            "slice",
            "select",
            "narrow",
            "index",
            "index_select",
            "gather",
            "take_along_dim",
        ),
        *("roll", "flip", "rot90", "pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "view"),
        *("reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t"),
        *("movedim", "swapaxes", "view_as", "reshape_as", "expand", "expand_as", "repeat", "repeat_interleave", "tile"),
        *("broadcast_to", "contiguous", "clone", "alias", "detach", "lift_fresh_copy", "copy", "to", "_to_copy"),
        *("type_as", "float", "half", "numpy_T", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
        *("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "im2col"),
        *("_upsample_bicubic2d_aa", "grid_sampler", "grid_sampler_2d", "affine_grid_generator", "unfold"),
        *("arange", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "fill"),
        *("new_full", "scalar_tensor", "tril", "triu", "eye", "linspace", "meshgrid", "embedding", "sym_size"),
        *("sym_numel", "slice_scatter", "select_scatter", "zero"),
    )
)
#: Checks of what is true for every batch that is run here, and notes of PyTorch for itself.
CHECKS = frozenset(
    f"{ATEN}{name}"
    for name in (
        *("_assert_scalar.default", "_assert_async.msg", "_assert_tensor_metadata.default"),
        *("sym_constrain_range.default", "sym_constrain_range_for_size.default"),
    )
)
#: Arithmetic on sizes.
ON_SIZES: dict[str, Callable[..., Any]] = {
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
    },
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not")},
}

Plain = tuple[Any, tuple[Any, ...]] | None
_aten = torch.ops.aten


def operation(target: str) -> Any:
    """Return the operation of a call.

    Raises:
        InputError: It is not among those that are run here.
    """
    parts = target.removeprefix(ATEN).split(".")
    if target.startswith(ATEN) and len(parts) == 2:
        packet, overload = parts
        known = packet in _NAMES or (packet.endswith("_") and packet[:-1] in _NAMES)
        operations = getattr(torch.ops.aten, packet) if known and hasattr(torch.ops.aten, packet) else None
        if operations is not None and overload in operations.overloads() and "out" not in overload.split("_"):
            return getattr(operations, overload)
    raise InputError(
        f"the program calls {target[:100]!r}, which is not among the operations that are run here",
        "export the network alone, without preprocessing, control flow and operators of other libraries",
    )


# Each function below takes the arguments of an operation, and returns the operation that computes its first result
# alone, with its arguments; or None where there is none.


def _convolution(x: Any, weight: Any, bias: Any, stride: Any, *given: Any) -> Plain:
    padding, dilation, is_transposed, _, groups = given
    if is_transposed or len(stride) != 2:
        return None
    return _aten.conv2d.default, (x, weight, bias, stride, padding, dilation, groups)


def _batch_norm(*given: Any) -> Plain:
    *tensors, momentum, eps = given
    return _aten.batch_norm.default, (*tensors, False, momentum, eps, False)


def _group_norm(x: Any, weight: Any, bias: Any, *given: Any) -> Plain:
    *_, groups, eps = given
    return _aten.group_norm.default, (x, groups, weight, bias, eps, False)


def _softmax(operation: Any) -> Callable[..., Plain]:
    return lambda x, dim, to_float: None if to_float else (operation, (x, dim))


def _reshape(x: Any, shape: Any) -> Plain:
    # A map that is stored channels last, as maps are here, cannot always be viewed as one stored channels first.
    return _aten.reshape.default, (x, shape)


#: By the name of the operation.
PLAIN: dict[str, Callable[..., Plain]] = {
    "convolution.default": _convolution,
    "_native_batch_norm_legit_no_training.default": _batch_norm,
    "native_group_norm.default": _group_norm,
    "native_layer_norm.default": lambda *given: (_aten.layer_norm.default, (*given, False)),
    "max_pool2d_with_indices.default": lambda *given: (_aten.max_pool2d.default, given),
    "_adaptive_avg_pool2d.default": lambda *given: (_aten.adaptive_avg_pool2d.default, given),
    "_softmax.default": _softmax(_aten.softmax.int),
    "_log_softmax.default": _softmax(_aten.log_softmax.int),
    "view.default": _reshape,
    "_unsafe_view.default": _reshape,
}
