"""Operations on maps of any size that networks over whole regions need besides PyTorch's.

Input and output: float32 (n, channels, rows, cols). Pairs are (rows, cols). Nothing here asks for the sides of a map,
so a trace of these functions holds for other maps too.
"""

import torch
from torch.nn import functional

Pair = tuple[int, int]


def fitted(x: torch.Tensor, before: Pair, behind: Pair, value: float) -> torch.Tensor:
    """Return a map padded in front (top, left) and behind; negative numbers crop."""
    if min(*before, *behind) < 0:
        rows, cols = (slice(max(0, -b), min(0, e) or None) for b, e in zip(before, behind, strict=True))
        x = x[:, :, rows, cols]
    (top, left), (bottom, right) = ((max(0, pads[0]), max(0, pads[1])) for pads in (before, behind))
    return functional.pad(x, (left, right, top, bottom), value=value) if top + left + bottom + right else x


def every(x: torch.Tensor, step: int) -> torch.Tensor:
    """Return every n-th row and column."""
    return x[:, :, ::step, ::step]


def mean_inside(x: torch.Tensor, kernel: Pair, stride: int, before: Pair, behind: Pair) -> torch.Tensor:
    """Return the mean of a kernel over what lies inside the map."""
    ones = fitted(torch.ones_like(x[:, :1]), before, behind, 0.0)
    sums = functional.avg_pool2d(fitted(x, before, behind, 0.0), kernel, stride)
    return sums / functional.avg_pool2d(ones, kernel, stride)


def along_channels(constant: torch.Tensor) -> torch.Tensor:
    """Return one number for each feature of a vector as (1, features, 1, 1)."""
    return constant.reshape(1, -1, 1, 1)


def phases(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Split a map into its phases, (n, c, r, q) to (factor * factor * n, c, ceil(r / factor), ceil(q / factor)).

    Phase (i, j) has every factor-th row from i and column from j. Zeros fill up the last ones; they are seen by windows
    that leave the map alone.
    """
    last = factor - 1
    x = functional.pad(x, (0, last, 0, last))
    # Each slice spans as much as the map was long, whatever it was.
    cuts = [slice(i, (i - last) or None, factor) for i in range(factor)]
    return torch.cat([x[:, :, rows, cols] for rows in cuts for cols in cuts])


def interleave(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Undo `phases`, (factor * factor * n, c, r, q) to (n, c, factor * r, factor * q)."""
    return functional.pixel_shuffle(torch.stack(x.chunk(factor * factor), dim=2).flatten(1, 2), factor)
