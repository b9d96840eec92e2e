"""Operations on maps of any size that dense networks need in addition to those of PyTorch.

Input and output: float32 (n, channels, rows, cols). Pairs are (rows, cols). No function here reads the sides of a map,
so traces of these functions are valid for maps of other sizes.
"""

from typing import Any

import torch
from torch.nn import functional

Pair = tuple[int, int]
#: A change of shape: the name of a method of tensors, and its arguments.
Step = tuple[str, tuple[Any, ...]]


def fitted(x: torch.Tensor, before: Pair, behind: Pair, value: float) -> torch.Tensor:
    """Return a map that is padded with a value in front (top, left) and behind; negative numbers crop."""
    if min(*before, *behind) < 0:
        rows, cols = (slice(max(0, -b), min(0, e) or None) for b, e in zip(before, behind, strict=True))
        x = x[:, :, rows, cols]
    (top, left), (bottom, right) = ((max(0, pads[0]), max(0, pads[1])) for pads in (before, behind))
    return functional.pad(x, (left, right, top, bottom), value=value) if top + left + bottom + right else x


def every(x: torch.Tensor, step: int) -> torch.Tensor:
    """Return every ``step``-th row and column of a map."""
    return x[:, :, ::step, ::step]


def mean_inside(x: torch.Tensor, kernel: Pair, stride: int, before: Pair, behind: Pair) -> torch.Tensor:
    """Return a map's mean pooling in which padding is not included in the divisor."""
    ones = fitted(torch.ones_like(x[:, :1]), before, behind, 0.0)
    sums = functional.avg_pool2d(fitted(x, before, behind, 0.0), kernel, stride)
    return sums / functional.avg_pool2d(ones, kernel, stride)


def over_places(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight for vectors of features as one for maps of such vectors, whose places are the last two axes."""
    return weight.reshape(*weight.shape, 1, 1) if weight.dim() else weight


def layer_norm(
    x: torch.Tensor, shape: list[int], weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Return the layer normalisation of the features at each place."""
    return functional.layer_norm(x.permute(0, 2, 3, 1), shape, weight, bias, eps).permute(0, 3, 1, 2)


def reshaped(x: torch.Tensor, steps: tuple[Step, ...]) -> torch.Tensor:
    """Return a map after changes of its axes, none of which needs the number of its rows or columns."""
    for name, given in steps:
        x = getattr(x, name)(*given)
    return x


def phases(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Return the phases of a map: (n, c, r, q) becomes (factor * factor * n, c, ceil(r / factor), ceil(q / factor)).

    Phase (i, j) consists of every ``factor``-th row from i and column from j. Incomplete phases are filled with zeros,
    which affect only windows that reach beyond the map.
    """
    last = factor - 1
    x = functional.pad(x, (0, last, 0, last))
    # Each slice is as long as the map before padding, whatever that length was.
    cuts = [slice(i, (i - last) or None, factor) for i in range(factor)]
    return torch.cat([x[:, :, rows, cols] for rows in cuts for cols in cuts])


def interleave(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Return the map from its `phases`: (factor * factor * n, c, r, q) becomes (n, c, factor * r, factor * q)."""
    return functional.pixel_shuffle(torch.stack(x.chunk(factor * factor), dim=2).flatten(1, 2), factor)
