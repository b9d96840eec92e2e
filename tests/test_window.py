"""The sliding window against a loop that is too simple to be wrong."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from wsiflow.errors import InputError, WsiflowError
from wsiflow.model.architectures import build
from wsiflow.model.card import ModelCard
from wsiflow.model.classifier import Classifier, as_classifier, predict
from wsiflow.model.window import predict_blocks


def card(window_px: int, input_px: int) -> ModelCard:
    return ModelCard(
        name="tiny",
        architecture="inception_valid",
        architecture_args={},
        class_names=("normal", "tumour"),
        positive_class="tumour",
        window_px=window_px,
        input_px=input_px,
        spacing_um_px=0.25,
        mean=(0.5, 0.4, 0.6),
        std=(0.2, 0.3, 0.2),
        weights="tiny.safetensors",
        sha256="0" * 64,
        probe=(),
        licence="",
        trained_on="",
        notes="",
    )


@pytest.fixture(scope="module")
def inception() -> Classifier:
    """A narrow padding-free Inception with random weights whose answers differ."""
    torch.manual_seed(0)
    network = build("inception_valid", 2, width=0.125, dropout=0.0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    # One pass gives the norms the statistics of real maps; without, random layers say the same of every window.
    network.train()(torch.from_numpy(patches(4, 224, 224)).permute(0, 3, 1, 2) / 64 - 2)
    return as_classifier(network, card(224, 224))


def small(input_px: int) -> Classifier:
    """A network of one convolution that sees windows of 16 px."""
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 5, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    return as_classifier(network, card(16, input_px))


def patches(n: int, rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (n, rows, cols, 3), dtype=np.uint8)


def naive(classifier: Classifier, images: np.ndarray, offsets_px: np.ndarray) -> np.ndarray:
    """Predict every window alone."""
    side = classifier.window_px
    return np.array(
        [[predict(classifier, image[None, y : y + side, x : x + side])[0] for x, y in offsets_px] for image in images]
    )


def grid(step_px: int, n: int) -> np.ndarray:
    return np.array([(x * step_px, y * step_px) for y in range(n) for x in range(n)])


def test_windows_of_an_inception_equal_a_naive_loop(inception: Classifier) -> None:
    """Two reference patches of 448 px with 16 windows each, in batches that cross rows and patches."""
    images, offsets = patches(2, 448, 448), grid(56, 4)
    found = predict_blocks(inception, images, offsets, batch=7)
    assert (found.dtype, found.shape) == (np.float32, (2, 16))
    assert found.std() > 1e-4
    np.testing.assert_allclose(found, naive(inception, images, offsets), atol=1e-6)


@pytest.mark.parametrize("input_px", [16, 24], ids=["as they are", "resized"])
def test_x_and_y_are_not_swapped(input_px: int) -> None:
    """Windows lie where the loop takes them, in a patch that is not square."""
    classifier, images = small(input_px), patches(3, 20, 40)
    offsets = np.array([(24, 0), (0, 4), (13, 3)])
    np.testing.assert_allclose(
        predict_blocks(classifier, images, offsets, batch=4), naive(classifier, images, offsets), atol=1e-6
    )


@settings(deadline=None, max_examples=30)
@given(batch=st.integers(1, 40), n=st.integers(1, 4), step=st.integers(1, 4))
def test_the_batch_does_not_change_a_score(batch: int, n: int, step: int) -> None:
    """Any batch size gives the same to 1e-6."""
    images, offsets = patches(n, 28, 28), grid(step, 4)
    classifier = small(16)
    one = predict_blocks(classifier, images, offsets, batch=1)
    np.testing.assert_allclose(predict_blocks(classifier, images, offsets, batch=batch), one, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 6), batch=st.integers(1, 20))
def test_a_patch_scores_the_same_in_any_company(n: int, batch: int) -> None:
    """With one batch size, the first patch alone has the very bits it has among others."""
    images, offsets = patches(6, 28, 28), grid(4, 4)
    classifier = small(16)
    every = predict_blocks(classifier, images, offsets, batch=batch)
    np.testing.assert_array_equal(predict_blocks(classifier, images[:n], offsets, batch=batch), every[:n])


def test_nothing_in_nothing_out() -> None:
    """No patch, or no window, is an empty array and no error."""
    assert predict_blocks(small(16), patches(0, 28, 28), grid(4, 4), batch=5).shape == (0, 16)
    assert predict_blocks(small(16), patches(2, 28, 28), np.empty((0, 2), np.int64), batch=5).shape == (2, 0)


@pytest.mark.parametrize("offset", [(-1, 0), (0, -1), (13, 0), (0, 5)])
def test_a_window_that_leaves_its_patch_is_refused(offset: tuple[int, int]) -> None:
    """A slice would silently be smaller, or begin at the other end."""
    with pytest.raises(WsiflowError, match=r"leaves its patch of 28 x 20 px"):
        predict_blocks(small(16), patches(1, 20, 28), np.array([(0, 0), offset]), batch=2)


class _Overflow(nn.Module):
    """Gives NaN for windows that begin with a black pixel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = x[:, :, 0, 0].sum(dim=1)
        return torch.stack([start, torch.where(start > -6, start, torch.nan)], dim=1)


def test_a_score_that_is_not_finite_names_patch_and_window() -> None:
    """NaN never becomes a score."""
    images = np.full((3, 32, 32, 3), 255, np.uint8)
    images[1, 8, 4] = 0
    with pytest.raises(InputError, match=r"no finite probability for the window at \[4, 8\] px of patch 1"):
        predict_blocks(as_classifier(_Overflow(), card(16, 16)), images, grid(4, 4), batch=5)
