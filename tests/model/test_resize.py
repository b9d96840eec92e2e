"""Resized windows: the pixels of both ways follow from their arithmetic, and networks get the same on every backend."""

import numpy as np
import pytest
from numpy.typing import NDArray

from wsiflow.model.card import Resize
from wsiflow.model.resize import resize

SIZES = [(64, 32), (96, 28), (28, 96), (30, 29), (224, 16), (16, 17)]


def coefficients(old: int, new: int, how: Resize) -> tuple[NDArray[np.int64], int]:
    """Return the weights of old pixels in new ones, int64 (new, old), and the number of their bits."""
    scale = old / new
    reach = max(scale, 1.0)
    weights = np.zeros((new, old))
    for cell in range(new):
        centre = scale * (cell + 0.5)
        first, end = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), old)
        apart = np.abs(np.arange(first, end) - centre + 0.5) / reach
        weights[cell, first:end] = np.maximum(1 - apart, 0)
        weights[cell] /= weights[cell].sum()
    most = weights.max()
    # PyTorch takes as many bits as the largest weight leaves room for in 16 with a sign.
    bits = 22 if how == "pillow" else next(n for n in range(23) if int(0.5 + most * 2 ** (n + 1)) >= 2**15)
    return (weights * 2**bits + 0.5).astype(np.int64), bits


@pytest.mark.parametrize("how", ["torch", "pillow"])
@pytest.mark.parametrize(("old", "new"), SIZES)
def test_pixels_are_those_of_the_arithmetic(old: int, new: int, how: Resize) -> None:
    """Rows first, then columns, weights of whole numbers, rounded to 8 bits after each."""
    images = np.random.default_rng(old).integers(0, 256, (2, old, old, 3), dtype=np.uint8)
    weights, bits = coefficients(old, new, how)
    half = 1 << (bits - 1)
    wide = (np.einsum("nyxc,wx->nywc", images.astype(np.int64), weights) + half) >> bits
    both = (np.einsum("nywc,hy->nhwc", wide, weights) + half) >> bits
    images.flags.writeable = False
    np.testing.assert_array_equal(resize(images, new, how), both)


def test_the_two_ways_differ_by_a_grey_level_at_most() -> None:
    """A card that names the wrong one gives nearly the same scores."""
    images = np.random.default_rng(0).integers(0, 256, (1, 300, 300, 3), dtype=np.uint8)
    apart = np.abs(resize(images, 299, "torch").astype(int) - resize(images, 299, "pillow"))
    assert apart.max() == 1
    assert 0 < apart.mean() < 0.01


def test_no_windows_are_resized_to_none() -> None:
    """As many come out as go in."""
    for how in ("torch", "pillow"):
        assert resize(np.zeros((0, 32, 32, 3), np.uint8), 16, how).shape == (0, 16, 16, 3)
