"""Operations of core ATen as those that they are parts of.

A program after ``run_decompositions`` calls operations that return more than a network uses, as the indices of a
pooling, and that not every backend knows. Each function here takes the arguments of such an operation, and returns the
operation that computes its first result alone, with its arguments; or None where there is none.
"""

from collections.abc import Callable
from typing import Any

import torch

Plain = tuple[Any, tuple[Any, ...]] | None
_aten = torch.ops.aten


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
