"""GoogLeNet is the network of the reference: its parameters, its multiplications and its padding."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from wsiflow.model.architectures.googlenet import GoogLeNet


def macs(module: nn.Module, side_px: int) -> int:
    """Return the multiplications of all convolutions and linear layers for one window."""
    counts: list[int] = []

    def count(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        counts.append(output[0].numel() * layer.weight[0].numel())

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.inference_mode():
        module.eval()(torch.zeros(1, 3, side_px, side_px))
    return sum(counts)


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_googlenet_has_the_size_and_the_work_of_the_reference() -> None:
    """O-7: 5,587,394 parameters and 1.497 GMAC for each window, 293.5 GMAC for the 196 windows of a tile."""
    network = GoogLeNet(2, dropout=0.5)
    work = macs(network, 224)
    assert n_parameters(network) == 5_587_394
    assert round(work / 1e9, 3) == 1.497
    assert round(196 * work / 1e9, 1) == 293.5


def test_googlenet_has_neither_bias_nor_batch_norm_before_the_head() -> None:
    """The only bias is that of the last layer."""
    biases = [name for name, _ in GoogLeNet(2, dropout=0.5).named_parameters() if name.endswith("bias")]
    assert biases == ["classify.bias"]
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in GoogLeNet(2, dropout=0.5).modules())


def test_maps_have_the_sides_of_the_reference() -> None:
    """224 px become 112, 56, 28, 14 and 7."""
    x, sides = torch.zeros(1, 3, 224, 224), []
    with torch.inference_mode():
        for layer in GoogLeNet(2, dropout=0.5).features:
            x = layer(x)
            sides.append(x.shape[-1])
    assert sorted(set(sides), reverse=True) == [112, 56, 28, 14, 7]
    assert x.shape == (1, 1024, 7, 7)


def same_windows(x: np.ndarray, kernel: int, reduce: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Apply a stride-2 operation with TensorFlow's SAME padding, place by place, ignoring those outside."""
    side = x.shape[-1]
    before = max((-(-side // 2) - 1) * 2 + kernel - side, 0) // 2
    starts = range(-before, side - before, 2)
    return np.array(
        [[reduce(x[max(r, 0) : r + kernel, max(c, 0) : c + kernel]) for c in starts] for r in starts], np.float32
    )


def test_pools_follow_tensorflow_same_padding() -> None:
    """A 3 x 3 pooling with stride 2 pads only at the bottom and the right."""
    image = np.random.default_rng(1).normal(size=(16, 16)).astype(np.float32)
    pools = [layer for layer in GoogLeNet(2, dropout=0.5).features if isinstance(layer, nn.MaxPool2d)]
    for pool, kernel in zip(pools, (3, 3, 3, 2), strict=True):
        found = pool(torch.from_numpy(image)[None, None])[0, 0].numpy()
        np.testing.assert_array_equal(found, same_windows(image, kernel, np.max))


def test_the_first_convolution_follows_tensorflow_same_padding() -> None:
    """The 7 x 7 convolution with stride 2 pads 2 px in front and 3 behind."""
    image = np.random.default_rng(2).normal(size=(16, 16)).astype(np.float32)
    pad, conv, _ = GoogLeNet(2, dropout=0.5).features.get_submodule("conv1")
    with torch.inference_mode():
        conv.weight.fill_(1.0)
        found = conv(pad(torch.from_numpy(image)[None, None].expand(1, 3, -1, -1)))[0, 0].numpy()
    np.testing.assert_allclose(found, 3 * same_windows(image, 7, np.sum), atol=1e-4)


def test_logits_have_one_column_for_each_class() -> None:
    """Three windows and four classes give logits of shape (3, 4)."""
    with torch.inference_mode():
        assert GoogLeNet(4, dropout=0.1).eval()(torch.zeros(3, 3, 224, 224)).shape == (3, 4)
