"""A classifier over whole regions gives the scores of its windows, at any stride and position."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from wsiflow import model
from wsiflow.errors import InputError
from wsiflow.model.architectures.googlenet import GoogLeNet
from wsiflow.model.classifier import Classifier
from wsiflow.model.dense import layers, operations
from wsiflow.model.dense.crops import window_crops
from wsiflow.model.dense.network import DenseClassifier, densify, describe
from wsiflow.model.dense.operations import Pair
from wsiflow.model.dense.receptive import read_network
from wsiflow.model.engines.openvino import core as silent_core  # imported plainly, it would report its usage
from wsiflow.model.outputs import Outputs

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(5)
    with torch.no_grad():
        yield


def map_shape(dense: DenseClassifier, h: int, w: int) -> tuple[int, int]:
    """Return the rows and columns that the map of a region of h x w px must have."""
    rows, cols = ((side - 2 * dense.context_px - dense.window_px) // dense.stride + 1 for side in (h, w))
    return rows, cols


def classifier(module: nn.Module, window_px: int, *, input_px: int = 0, n_classes: int = 2) -> Classifier:
    return Classifier(
        module.eval().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        class_names=tuple("abc"[:n_classes]),
        outputs=Outputs("logits", n_classes, (1,)),
        window_px=window_px,
        input_px=input_px or window_px,
        spacing_um_px=0.5,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        sha256="",
        identity="",
    )


def trained(module: nn.Module, window_px: int) -> nn.Module:
    """Return a network with weights for which windows differ and scores are neither 0 nor 1."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            layer.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.normal_(0, 0.1)
    head = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)][-1]
    logits = module.eval()(texture(16, window_px, window_px))
    head.weight /= logits.std(0).view(-1, *[1] * (head.weight.dim() - 1))
    head.bias.copy_(-(logits - head.bias).mean(0) / logits.std(0))  # type: ignore[union-attr]
    return module


def texture(n: int, h: int, w: int) -> torch.Tensor:
    """Return images that vary on every scale, like tissue."""
    image = torch.zeros(n, 3, h, w)
    for cell in (2, 8, 32, 128):
        coarse = torch.randn(n, 3, h // cell + 2, w // cell + 2)
        image += functional.interpolate(coarse, scale_factor=cell, mode="bilinear")[:, :, :h, :w]
    return image / 2


def windows_scores(classifier: Classifier, pixels: torch.Tensor, stride: int) -> torch.Tensor:
    """Return the scores of each window of an image, run alone."""
    side = classifier.window_px
    cut = pixels.unfold(2, side, stride).unfold(3, side, stride)[0].permute(1, 2, 0, 3, 4)
    scores = [classifier.module(row.contiguous()).softmax(1)[:, 1] for row in cut]
    return torch.stack(scores)


def scores_of(dense: DenseClassifier, pixels: torch.Tensor) -> torch.Tensor:
    assert dense.module is not None
    scores: torch.Tensor = dense.module(pixels)
    return scores


class Block(nn.Module):
    """An Inception block that pads only in its branch of two convolutions."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True))
        self.three = nn.Sequential(nn.Conv2d(channels, out, 3), nn.SiLU(inplace=True))
        self.two_threes = nn.Sequential(nn.Conv2d(channels, out, 3, padding=1), nn.GELU(), nn.Conv2d(out, out, 5))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1), nn.Conv2d(channels, out, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = x.shape[2]
        return torch.cat(
            [self.one(x[:, :, 1:-1, 1 : side - 1]), self.three(x), self.pooled(x), self.two_threes(x)[:, :, :, :]], 1
        )


class ValidBlock(Block):
    """The same block, without padding in the branch of two convolutions either."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out)
        self.two_threes = nn.Sequential(nn.Conv2d(channels, out, (3, 1)), nn.GELU(), nn.Conv2d(out, out, (1, 3)))


def inception() -> nn.Module:
    """An Inception network with total stride 8 and window 48."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2),
        nn.ReLU(inplace=True),
        nn.LocalResponseNorm(5),
        ValidBlock(8, 4),
        nn.MaxPool2d(3, 2),
        ValidBlock(16, 6),
        nn.MaxPool2d(2, 2),
        nn.Conv2d(24, 32, 3, groups=2),
        nn.PReLU(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(32, 2),
    )


class Residual(nn.Module):
    """Strided shortcuts with another length than the strided branch; total stride 8, window 75."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, 2)
        self.main_1 = nn.Sequential(nn.Conv2d(8, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.short_1 = nn.Conv2d(8, 8, 1, 2)
        self.main_2 = nn.Sequential(nn.Conv2d(8, 12, 3, 2), nn.ReLU(), nn.Conv2d(12, 12, 3, dilation=1))
        self.short_2 = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(8, 12, 1))
        self.scale = nn.Parameter(torch.rand(12, 1, 1) + 0.5)
        self.norm = nn.BatchNorm1d(12)
        self.classify = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.stem(x))  # 36
        out = self.main_1(x)  # 17, 15
        out += self.short_1(x[:, :, 3:-3, 3:-3])  # 30, 15
        x = functional.relu(out)
        y = self.main_2(x)  # 7, 5
        y = y * self.scale + self.short_2(x[:, :, 2:-2, 2:-2])  # 11, 5
        return self.classify(self.norm(y.mean([2, 3])))


class Vgg(nn.Module):
    """A hidden layer over the flattened map; three classes; total stride 4, window 30."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1, self.conv_2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.pool = nn.AdaptiveMaxPool2d((6, 6))
        self.hidden, self.norm, self.classify = nn.Linear(288, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(torch.relu(self.conv_1(x)), 2)
        x = self.pool(functional.max_pool2d(self.conv_2(x).relu_(), 2))
        x = functional.dropout(x.reshape(x.size(0), -1), 0.5, self.training)
        return self.classify(self.norm(functional.relu(self.hidden(x))))


class Padded(nn.Module):
    """All kinds of padding, some of it on one side only; total stride 8, window 50."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ConstantPad2d((2, 3, 2, 3), 0.5)
        self.conv_1 = nn.Conv2d(3, 6, 7, stride=2)
        self.pool_1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv_2 = nn.Conv2d(6, 6, 3, padding=1, padding_mode="zeros")
        self.pool_2 = nn.AvgPool2d(3, 2, padding=1, count_include_pad=False)
        self.mean_3 = nn.AvgPool2d(3, 1, padding=1)
        self.pool_3 = nn.MaxPool2d(3, 1, padding=1)
        self.classify = nn.Conv2d(12, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool_1(functional.relu(self.conv_1(self.pad(x))))
        x = self.pool_2(functional.relu(self.conv_2(x)))
        x = torch.cat([self.mean_3(x), self.pool_3(x)], dim=1)
        return self.classify(functional.adaptive_avg_pool2d(x, 1)).flatten(1)


VALID: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "inception": (inception, 48, 2),
    "residual": (Residual, 75, 2),
    "vgg": (Vgg, 30, 3),
}


def valid(name: str) -> Classifier:
    build, window_px, n_classes = VALID[name]
    return classifier(trained(build(), window_px), window_px, n_classes=n_classes)


@pytest.fixture(scope="module")
def demo() -> Classifier:
    """Return the network that ships with wsiflow."""
    card = yaml.safe_load((ROOT / "conf/model/demo.yaml").read_text())["card"]
    return model.load(model.ModelSpec(card=card, trust_torchscript=False, sha256="", positive_class=""))


@pytest.fixture(scope="module")
def region() -> torch.Tensor:
    torch.manual_seed(3)
    return texture(1, 800, 800)


@pytest.fixture(scope="module")
def googlenet(region: torch.Tensor) -> Classifier:
    """Return GoogLeNet with random weights whose scores vary by a few hundredths around one half."""
    torch.manual_seed(4)
    with torch.no_grad():
        network = trained(GoogLeNet(2, dropout=0.5), 224)
        pooled = functional.avg_pool2d(network.features(region), 7, 1)
        logits = functional.conv2d(pooled, network.classify.weight, network.classify.bias)
        scale = 0.14 / logits.std((0, 2, 3))
        network.classify.weight *= scale.view(-1, 1, 1, 1)
        network.classify.bias.copy_(scale * (network.classify.bias - logits.mean((0, 2, 3))))
        return classifier(network, 224)


@pytest.fixture(scope="module")
def whole(googlenet: Classifier, region: torch.Tensor) -> torch.Tensor:
    """Return the map of the region with the exact context, at stride 16."""
    with torch.no_grad():
        return scores_of(densify(googlenet, 16, context_px=192), region)[0]


@pytest.mark.parametrize("stride", [1, 2, 4, 6, 8, 16, 24])
@pytest.mark.parametrize("name", VALID)
def test_dense_equals_window_at_every_position(name: str, stride: int) -> None:
    """The stride is finer than the network's, equal, or a multiple; the sides of the region are arbitrary."""
    network = valid(name)
    side = network.window_px
    pixels = texture(1, side + 13, side + 26 if stride < 8 else side + 50)
    expected = windows_scores(network, pixels, stride)
    dense = densify(network, stride)
    found = scores_of(dense, pixels)
    assert found.shape[1:] == expected.shape == map_shape(dense, *pixels.shape[2:])
    assert float(expected.std()) > 0.01, "the windows must differ for the comparison to mean anything"
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stride", [4, 8, 16, 48])
def test_dense_equals_window_for_the_network_that_ships(demo: Classifier, stride: int) -> None:
    """The stride is a quarter, a half, once and twice that of the network."""
    assert not describe(demo, stride).padded
    side = demo.window_px
    pixels = texture(1, side + 17, side + 53 if stride > 4 else side + 22)
    dense = scores_of(densify(demo, stride), pixels)[0]
    torch.testing.assert_close(dense, windows_scores(demo, pixels, stride), atol=1e-5, rtol=0)


def test_images_of_a_batch_keep_apart() -> None:
    """Phases are along the batch axis too, but each image has its own map."""
    network = valid("inception")
    pixels = texture(3, 70, 61)
    dense = densify(network, 2)
    torch.testing.assert_close(scores_of(dense, pixels), torch.cat([scores_of(dense, one[None]) for one in pixels]))


@pytest.mark.parametrize(("stride", "context_px"), [(8, 16), (4, 12), (16, 24)])
def test_context_moves_the_first_window_inwards(stride: int, context_px: int) -> None:
    """With context the map is that of the region without its border."""
    network = valid("inception")
    pixels = texture(1, 101, 120)
    inner = pixels[:, :, context_px:-context_px, context_px:-context_px]
    dense = densify(network, stride, context_px=context_px)
    assert map_shape(dense, 101, 120) == tuple(scores_of(dense, pixels).shape[1:])
    torch.testing.assert_close(scores_of(dense, pixels), scores_of(densify(network, stride), inner), atol=1e-6, rtol=0)


def test_context_must_lie_on_the_grid() -> None:
    with pytest.raises(InputError, match=r"context of 12 px is not a multiple of the 8 px"):
        densify(valid("inception"), 8, context_px=12)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_phases_of_a_padded_network_equal_shifted_maps(stride: int) -> None:
    """Away from the region's border, finer maps equal the coarse maps of shifted regions."""
    network = classifier(trained(Padded(), 50), 50)
    facts = describe(network, 8)
    before, after = (8 * -(-px // 8) for px in facts.overhang_px)
    pixels = texture(1, 50 + before + after + 48, 50 + before + after + 40)
    fine, coarse = densify(network, stride), densify(network, 8)
    assert (fine.facts.grid_px, coarse.facts.grid_px, facts.padded) == (stride, 8, True)
    found = scores_of(fine, pixels)[0]
    for y in range(0, 8, stride):
        for x in range(0, 8, stride):
            shifted = scores_of(coarse, pixels[:, :, y:, x:])[0]
            same = found[y // stride :: 8 // stride, x // stride :: 8 // stride]
            rows, cols = (slice(before // 8, length - after // 8) for length in shifted.shape)
            assert shifted[rows, cols].numel() >= 20
            torch.testing.assert_close(same[rows, cols], shifted[rows, cols], atol=1e-5, rtol=0)


def footprint(dense: DenseClassifier, side: int) -> tuple[int, int, int, int]:
    """Return the rows and columns of an image on which its first score depends."""
    assert dense.module is not None
    pixels = torch.ones(1, 3, side, side, requires_grad=True)
    with torch.enable_grad():
        dense.module.logits(pixels)[0, 1, 0, 0].backward()  # type: ignore[operator]
    assert pixels.grad is not None
    seen = pixels.grad[0].abs().sum(0)
    rows, cols = seen.sum(1).nonzero(), seen.sum(0).nonzero()
    return int(rows[0]), int(rows[-1]) + 1, int(cols[0]), int(cols[-1]) + 1


class Smooth(nn.Module):
    """A mean pooling of the size of a max pooling, whose gradient reaches everything in its window."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, count_include_pad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(x)


def test_overhang_is_what_the_gradient_reaches() -> None:
    """For GoogLeNet it is 571 px, 166 before the window and 181 after it, and one pixel less is not exact."""
    network = GoogLeNet(2, dropout=0.5)
    features = network.features
    for block in [features, *(module for module in features.modules() if hasattr(module, "branch_3"))]:
        parent = block.branch_3 if hasattr(block, "branch_3") else block
        for name, layer in parent.named_children():
            if isinstance(layer, nn.MaxPool2d):
                parent.add_module(name, Smooth(layer))
    for weight in network.parameters():
        weight.fill_(1 / weight[0].numel())
    smooth = classifier(network, 224)
    facts = describe(smooth, 32)
    assert facts == describe(classifier(GoogLeNet(2, dropout=0.5), 224), 32)
    assert facts.overhang_px == (166, 181)
    assert sum(facts.overhang_px) + 224 == 571
    begin, end = 192 - 166, 192 + 224 + 181
    assert footprint(densify(smooth, 32, context_px=192), 224 + 2 * 192) == (begin, end, begin, end)


class CroppedThenPadded(nn.Module):
    """A network that pads after cropping; total stride 2, window 33."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1, self.conv_2 = nn.Conv2d(3, 6, 5, 2), nn.Conv2d(6, 6, 3, padding=1)
        self.classify = nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_2(self.conv_1(x)[:, :, 3:-2, 3:-2])
        return self.classify(functional.relu(x).amax((2, 3), keepdim=True)).flatten(1)


@pytest.mark.parametrize(("build", "window_px"), [(CroppedThenPadded, 33), (Padded, 50)])
def test_overhang_is_the_context_that_makes_maps_exact(build: Callable[[], nn.Module], window_px: int) -> None:
    """With the next multiple of the grid the border has no influence; with one step less it has."""
    network = classifier(trained(build(), window_px), window_px)
    facts = describe(network, 2)
    assert facts.padded
    enough = -(-max(facts.overhang_px) // 2) * 2
    assert enough > 0
    region = texture(1, window_px + 160, window_px + 164)
    expected = scores_of(densify(network, 2, context_px=80), region)
    for context_px, exact in [(enough, True), (enough - 2, False)]:
        inner = slice(80 - context_px, context_px - 80)
        found = scores_of(densify(network, 2, context_px=context_px), region[:, :, inner, inner])
        assert (float((found - expected).abs().max()) <= 1e-6) is exact


def test_googlenet_works_as_much_as_was_measured(googlenet: Classifier) -> None:
    """It needs 1.497 GMAC for a window, and 1.50, 1.84 and 4.76 for a 224 px tile at stride 32, 16 and 8."""
    tiles = {stride: describe(googlenet, stride).dense_macs_px * 224**2 / 1e9 for stride in (64, 32, 16, 8)}
    assert {stride: round(macs, 2) for stride, macs in tiles.items()} == {64: 1.5, 32: 1.5, 16: 1.84, 8: 4.76}
    facts = describe(googlenet, 16)
    assert round(facts.window_macs / 1e9, 3) == 1.497
    assert (facts.grid_px, facts.native_px, facts.align_px, facts.padded) == (16, 32, 16, True)
    # The peak is at the output of the 7 x 7 convolution (64 channels, a quarter of the pixels) and of its pooling.
    assert facts.activation_bytes_px == 4 * (64 / 4 + 64 / 16)


@pytest.mark.parametrize(("name", "stride"), [("inception", 2), ("residual", 4), ("vgg", 4), ("vgg", 1)])
def test_multiplications_are_those_of_a_real_pass(name: str, stride: int) -> None:
    """The counted multiplications grow with the area as the facts state."""
    network = valid(name)
    dense = densify(network, stride)
    counts = []
    for steps in range(3):
        with FlopCounterMode(display=False) as counter:
            scores_of(dense, torch.zeros(1, 3, *[network.window_px + 48 * steps] * 2))
        counts.append(counter.get_total_flops() / 2)
    growth = (counts[2] - 2 * counts[1] + counts[0]) / 2  # the second difference of a parabola is its quadratic term
    assert growth == pytest.approx(dense.facts.dense_macs_px * 48**2)
    with FlopCounterMode(display=False) as counter:
        network.module(torch.zeros(1, 3, network.window_px, network.window_px))
    assert dense.facts.window_macs == counter.get_total_flops() / 2


def test_features_that_see_no_padding_are_those_known(googlenet: Classifier) -> None:
    """The percentage of a window's features that equal those of a region decreases to 0 in 4e."""
    shares = {}
    for layer in read_network(googlenet).layers:
        rows, cols = (max(0, span.last - span.first) / span.side for span in layer.spans)
        shares.update(dict.fromkeys(layer.names, 100 * rows * cols))
    names = ("conv1", "pool2", "stage3.0", "stage3.1", "pool3", "stage4.0", "stage4.1", "stage4.2", "stage4.3")
    found = [round(shares[f"features.{name}"]) for name in names]
    assert found == [95, 80, 67, 56, 41, 25, 13, 5, 1]
    assert shares["features.stage4.4"] < 1
    assert shares["features.stage5"] == 0


@pytest.mark.parametrize(("share_until", "stride"), [("features.pool3", 16), ("pool3", 32)])
def test_stem_and_tail_are_those_of_the_network(googlenet: Classifier, share_until: str, stride: int) -> None:
    """GoogLeNet split after pool3: crops of 14 x 14 features, each run through the tail with its own padding."""
    network = googlenet.module
    assert isinstance(network, GoogLeNet)
    dense = densify(googlenet, stride, context_px=32, share_until=share_until)
    assert dense.module is None
    pixels = texture(1, 320, 352)
    features, expected = pixels, []
    for name, layer in network.features.named_children():
        features = layer(features)
        if name == "pool3":
            break
    rows, cols = map_shape(dense, 320, 352)
    for row in range(rows):
        for col in range(cols):
            y, x = 2 + row * stride // 16, 2 + col * stride // 16
            crop = features[:, :, y : y + 14, x : x + 14]
            for name in ("stage4", "pool4", "stage5"):
                crop = network.features.get_submodule(name)(crop)
            expected.append(network.classify(crop.mean((2, 3), keepdim=True)).softmax(1)[0, 1, 0, 0])
    assert float(torch.stack(expected).std()) > 0.005
    torch.testing.assert_close(shared_scores(dense, pixels), torch.stack(expected).view(rows, cols), atol=1e-5, rtol=0)


def shared_scores(dense: DenseClassifier, pixels: torch.Tensor) -> torch.Tensor:
    assert dense.stem is not None
    assert dense.tail is not None
    assert dense.crops is not None
    crops = window_crops(dense.stem(pixels).numpy(), dense.crops)
    assert crops.shape[1:3] == map_shape(dense, *pixels.shape[2:])
    scores: torch.Tensor = dense.tail(torch.tensor(crops.reshape(-1, *crops.shape[3:])))
    return scores.view(crops.shape[1:3])


@pytest.mark.parametrize("stride", [2, 4, 8, 16])
@pytest.mark.parametrize("cut", ["0", "3", "4", "6", "7"])
def test_sharing_a_part_equals_window_without_padding(cut: str, stride: int) -> None:
    """This holds for every split, also where the shared features are in phases."""
    network = valid("inception")
    pixels = texture(1, 81, 94)
    dense = densify(network, stride, context_px=8 if stride == 8 else 0, share_until=cut)
    inner = pixels[:, :, 8:-8, 8:-8] if stride == 8 else pixels
    expected = windows_scores(network, inner, stride)
    torch.testing.assert_close(shared_scores(dense, pixels), expected, atol=1e-5, rtol=0)


def test_split_points_are_those_up_to_which_windows_share(googlenet: Classifier) -> None:
    """The deepest comes first; 58 % of a window's multiplications are before the end of pool3."""
    cuts = describe(googlenet, 16).cuts
    shares = {cut.name: round(cut.share, 2) for cut in cuts}
    assert shares["features.pool3"] == 0.58
    assert [cut.share for cut in cuts] == sorted((cut.share for cut in cuts), reverse=True)
    assert not any("branch" in cut.name for cut in cuts), "a branch holds only a part of what later layers need"
    with pytest.raises(InputError, match=r"windows cannot share the network up to 'pool9'; name one of \['features"):
        densify(googlenet, 16, share_until="pool9")
    with pytest.raises(InputError, match="up to 'branch_1'"):
        densify(googlenet, 16, share_until="branch_1")


@pytest.mark.parametrize(("context_px", "tolerance"), [(96, 1e-2), (128, 1e-3), (192, 1e-5)])
def test_a_region_in_pieces_gives_the_same_map(
    googlenet: Classifier, region: torch.Tensor, whole: torch.Tensor, context_px: int, tolerance: float
) -> None:
    """For a network that pads, little of the border's influence is left after some context; none at the exact one.

    Random weights forget the border more slowly than trained ones.
    """
    assert max(describe(googlenet, 16).overhang_px) <= 192
    pieces = densify(googlenet, 16, context_px=context_px)
    side = 224 + 2 * context_px
    differences = []
    for row, col in [(0, 0), (5, 3), (11, 12)]:
        y, x = (192 - context_px + 16 * cell for cell in (row, col))
        piece = scores_of(pieces, region[:, :, y : y + side + 16, x : x + side])[0]
        assert piece.shape == (2, 1)
        differences.append(float((piece[:, 0] - whole[row : row + 2, col]).abs().max()))
    assert whole.shape == (13, 13)
    assert 0.45 < float(whole.mean()) < 0.55
    assert 0.018 <= float(whole.std()) <= 0.04
    assert max(differences) <= tolerance


@pytest.mark.parametrize("name", ["inception", "padded"])
def test_openvino_runs_other_sides_than_it_was_converted_with(name: str) -> None:
    """Only height, width and batch are dynamic, also where the map consists of phases."""
    core = silent_core()
    import openvino

    network = classifier(trained(Padded(), 50), 50) if name == "padded" else valid(name)
    dense = densify(network, 2, context_px=16)
    side = network.window_px + 32
    converted = openvino.convert_model(dense.module, example_input=torch.zeros(1, 3, side + 16, side + 16))
    compiled = core.compile_model(converted, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})
    for shape in [(1, 3, side + 31, side + 8), (2, 3, side, side + 50)]:
        pixels = texture(shape[0], *shape[2:])
        found = torch.tensor(compiled(pixels.numpy())[0])
        torch.testing.assert_close(found, scores_of(dense, pixels), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["inception", "transformer"])
def test_openvino_runs_stem_and_tail(name: str) -> None:
    """This also holds where the shared features are in phases, and where the tail needs windows as a whole."""
    core = silent_core()
    import openvino

    if name == "inception":
        dense, features = densify(valid("inception"), 2, share_until="6"), (24, 4, 4)
    else:
        dense, features = densify(classifier(trained(Tokens(), 40), 40), 2, share_until="stem"), (8, 9, 9)
    assert dense.stem is not None
    assert dense.tail is not None
    pixels = texture(1, 71, 90)
    for part, example, inputs in [
        (dense.stem, torch.zeros(1, 3, 60, 60), pixels),
        (dense.tail, torch.zeros(2, *features), torch.randn(5, *features)),  # batches are converted with two images
    ]:
        compiled = core.compile_model(
            openvino.convert_model(part, example_input=example), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        found = torch.tensor(compiled(inputs.numpy())[0])
        torch.testing.assert_close(found, part(inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_holds_for_other_sides() -> None:
    """The exported graph is not bound to the region with which it was traced."""
    dense = densify(valid("residual"), 4, context_px=8)
    traced = torch.jit.trace(dense.module, torch.zeros(1, 3, 100, 100))  # type: ignore[no-untyped-call]
    pixels = texture(2, 131, 118)
    torch.testing.assert_close(traced(pixels), scores_of(dense, pixels))


class SqueezeExcite(nn.Module):
    """A gate that depends on the whole map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.classify = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        x = x * torch.sigmoid(self.gate(functional.adaptive_avg_pool2d(x, 1)))
        return self.classify(x.mean((2, 3)))


class Attention(nn.Module):
    """Attention written as matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.classify = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.conv(x).reshape(-1, 8, 16)
        return self.classify(torch.matmul(torch.matmul(tokens, tokens.transpose(1, 2)), tokens).mean(2))


class Heads(nn.Module):
    """The attention module of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.attend, self.classify = nn.Conv2d(3, 8, 8, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return self.classify(self.attend(tokens, tokens, tokens)[0].mean(1))


class Positions(nn.Module):
    """A learned constant for each place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.where, self.classify = nn.Conv2d(3, 8, 3), nn.Parameter(torch.rand(8, 30, 30)), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify((self.conv(x) + self.where).mean((2, 3)))


class Uneven(nn.Module):
    """Two branches with strides 4 and 3 that are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 4, 4), nn.Conv2d(3, 2, 9, 3, dilation=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.a(x) + self.b(x)).mean((2, 3))


class Branching(nn.Module):
    """A network whose control flow depends on the pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))[:, :2] if float(x.sum()) > 0 else x.mean((2, 3))[:, 1:]


class Call(nn.Module):
    """A convolution, one call, and a mean."""

    def __init__(self, call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.call = nn.Conv2d(3, 2, 3), call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.conv(x)).mean((2, 3))


def ending(*layers: nn.Module) -> nn.Module:
    """Return a network of a convolution, some layers, and a head."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "group norm": (
        lambda: ending(nn.GroupNorm(2, 8)),
        r"layer 1 \(group_norm of GroupNorm\) .* normalises over the map",
    ),
    "instance norm": (
        lambda: ending(nn.InstanceNorm2d(8)),
        r"layer 1 \(instance_norm of InstanceNorm2d\) .* normalises over the map",
    ),
    "layer norm": (
        lambda: ending(nn.LayerNorm([30, 30])),
        r"layer 1 \(layer_norm of LayerNorm\) .* normalises over the map",
    ),
    "batch statistics": (
        lambda: ending(nn.BatchNorm2d(8, track_running_stats=False)),
        r"layer 1 \(batch_norm of BatchNorm2d\) .* statistics of the batch",
    ),
    "squeeze and excite": (SqueezeExcite, r"layer mul \(mul\) .*\(squeeze-and-excite\)"),
    "attention by hand": (Attention, r"layer matmul \(matmul\) .*\(attention\)"),
    "attention": (Heads, r"layer attend \(\w+ of MultiheadAttention\) .*\(attention\)"),
    "positions": (Positions, r"layer add \(add\) .* vary over the map"),
    "strides that do not meet": (Uneven, r"layer add \(add\) .* joins maps of different strides"),
    "reflection": (
        lambda: ending(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")),
        r"layer 1 \(pad of Conv2d\) .* pads with 'reflect'",
    ),
    "upsampling": (
        lambda: ending(nn.Upsample(scale_factor=2)),
        r"layer 1 \(upsample_nearest2d of Upsample\) .* not known",
    ),
    "pool to a fixed size": (
        lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(1), nn.Flatten()),
        r"layer 1 \(adaptive_avg_pool2d of AdaptiveAvgPool2d\) .* fixed number of places",
    ),
    "dropout outside of training": (lambda: Call(functional.dropout), "at random, even in evaluation mode"),
    "turned maps": (lambda: Call(lambda x: x.flip(2)), r"\(flip\) .* not known"),
    "mean of columns": (lambda: Call(lambda x: x - x.mean(2, keepdim=True)), "other axes than rows and columns"),
    "softmax over rows": (lambda: Call(lambda x: functional.softmax(x, dim=2)), "another axis than the channels"),
    "one row": (lambda: Call(lambda x: x[:, :, :, 3:4] + x), "squeeze-and-excite"),
    "centred by its mean": (lambda: Call(lambda x: x - x.mean((2, 3), keepdim=True)), "squeeze-and-excite"),
    "a map": (lambda: nn.Sequential(nn.Conv2d(3, 2, 3)), "returns a map"),
    "depends on its input": (Branching, "cannot be traced"),
    "TorchScript": (lambda: torch.jit.script(ending()), "TorchScript program"),
}


def reason_in_part(network: Classifier) -> str:
    """Return why a network cannot run over regions as a whole, or not even a part of it."""
    try:
        return describe(network, 8).obstacle
    except InputError as error:
        return error.cause


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_local_is_refused(name: str) -> None:
    """The message has the layer, the reason and the engine that supports it."""
    build, message = REFUSED[name]
    module = build()
    network = Classifier(**{**vars(classifier(ending(), 32)), "module": module.eval()})
    with pytest.raises(InputError, match=message) as refusal:
        densify(network, 8)
    assert "inference.engine=window, which runs any network" in str(refusal.value)
    assert reason_in_part(network) == refusal.value.cause


class Gated(nn.Module):
    """Squeeze-and-excitation, with linear layers or with convolutions; total stride 4, window 40."""

    def __init__(self, *, linear: bool, padding: int = 0) -> None:
        super().__init__()
        layer = nn.Linear if linear else (lambda a, b: nn.Conv2d(a, b, 1))
        self.linear, self.shrink, self.widen = linear, layer(8, 4), layer(4, 8)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=padding))
        self.last, self.classify = nn.Conv2d(8, 8, 3), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        pooled = x.mean((2, 3)) if self.linear else functional.adaptive_avg_pool2d(x, 1)
        gate = torch.sigmoid(self.widen(functional.relu(self.shrink(pooled))))
        x = x * (gate.view(x.size(0), -1, 1, 1).expand_as(x) if self.linear else gate)
        return self.classify(functional.relu(self.last(x)).mean((2, 3)))


class Tokens(nn.Module):
    """A vision transformer behind two convolutions: class token, positions, two heads, the batch as second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 8, 2))
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 82, 8))
        self.norm_of_places, self.norm = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attend, self.classify = nn.MultiheadAttention(8, 2), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.norm_of_places(x.permute(0, 2, 3, 1)).reshape(x.shape[0], -1, 8)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        tokens = self.norm(x).transpose(0, 1)
        x = x + self.attend(tokens, tokens, tokens)[0].transpose(0, 1)
        return self.classify(functional.gelu(x[:, 0]))


class Masked(nn.Module):
    """A window of which a part is added to all of it, with a mask that is filled part by part."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.classify = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 2)), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        mask = x.new_zeros(x.shape[2:])
        for i in range(2):
            mask[4 * i : 4 * i + 3, : 5 + i].fill_(i + 1)
        return self.classify((x * mask).relu().flatten(2).roll(1, 2).mean(2))


PARTLY: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gate of convolutions": (lambda: Gated(linear=False), "squeeze-and-excite"),
    "gate of linear layers": (lambda: Gated(linear=True), "squeeze-and-excite"),
    "transformer": (Tokens, "attention"),
    "mask": (Masked, "not known to be local"),
    "group norm": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
        ),
        "normalises over the map",
    ),
}


@pytest.mark.parametrize("stride", [2, 4, 12])
@pytest.mark.parametrize("name", PARTLY)
def test_windows_share_what_can_run_over_regions(name: str, stride: int) -> None:
    """The rest, which needs a window as a whole, runs for each window alone; without padding nothing differs."""
    build, reason = PARTLY[name]
    network = classifier(trained(build(), 40), 40)
    facts = describe(network, stride)
    assert reason in facts.obstacle
    assert (facts.padded, facts.overhang_px) == (False, (0, 0))
    deepest = facts.cuts[0]
    with FlopCounterMode(display=False) as counter:
        network.module(torch.zeros(1, 3, 40, 40))
    assert facts.window_macs == counter.get_total_flops() / 2
    alone = (1 - deepest.share) * facts.window_macs / stride**2
    assert alone < facts.dense_macs_px < facts.window_macs / stride**2
    pixels = texture(1, 61, 66)
    expected = windows_scores(network, pixels, stride)
    assert float(expected.std()) > 0.01
    for cut in {deepest.name, facts.cuts[-1].name}:
        dense = densify(network, stride, share_until=cut)
        torch.testing.assert_close(shared_scores(dense, pixels), expected, atol=1e-5, rtol=0)


def test_overhang_of_a_part_is_that_of_its_last_layer() -> None:
    """A padded stem needs as much context as its own features see; less is not exact."""
    network = classifier(trained(Gated(linear=False, padding=1), 40), 40)
    facts = describe(network, 4)
    assert (facts.padded, facts.overhang_px, facts.align_px) == (True, (4, 4), 4)
    region = texture(1, 80, 84)
    expected = shared_scores(densify(network, 4, context_px=8, share_until="stem"), region)
    for context_px, exact in [(4, True), (0, False)]:
        inner = slice(8 - context_px, context_px - 8)
        found = shared_scores(
            densify(network, 4, context_px=context_px, share_until="stem"), region[:, :, inner, inner]
        )
        assert (float((found - expected).abs().max()) <= 1e-6) is exact


@pytest.mark.parametrize(
    "call", [lambda x: functional.batch_norm(x, None, None, training=True), functional.dropout], ids=["batch", "chance"]
)
def test_a_rest_whose_scores_depend_on_other_windows_is_refused(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A window that runs alone in a batch must not depend on what else is in it, nor on chance."""
    network = classifier(nn.Sequential(nn.Conv2d(3, 3, 3), Call(call)), 32)
    with pytest.raises(InputError, match="other scores than over its windows"):
        densify(network, 8, share_until="0")


def around(x: torch.Tensor, side: int) -> torch.Tensor:
    """Return the means over squares around every place, without what is not there; an even square has more behind."""
    before, behind = (side - 1) // 2, side // 2 + 1
    rows = [x[:, :, max(0, i - before) : i + behind] for i in range(x.shape[2])]
    return torch.stack(
        [
            torch.stack([row[..., max(0, j - before) : j + behind].mean((2, 3)) for j in range(x.shape[3])], 2)
            for row in rows
        ],
        2,
    )


class Gates(nn.Module):
    """Squeeze-and-excitation on a map of 10 x 10, and split attention on one of 7 x 7; total stride 4, window 40."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate_1 = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 1)
        self.mid, self.parts, self.gate_2 = nn.Conv2d(8, 8, 4), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(4, 8, 1)
        self.last, self.classify = nn.Conv2d(4, 8, 2), nn.Linear(8, 2)

    def first(self, x: torch.Tensor, pool: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
        x = self.stem(x)
        return functional.relu(self.mid(x * torch.sigmoid(self.gate_1(pool(x, 10)))))

    def second(self, x: torch.Tensor, pool: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
        parts = self.parts(x).unflatten(1, (2, 4))
        weights = self.gate_2(pool(parts.sum(1), 7)).unflatten(1, (2, 4)).softmax(1)
        return functional.relu(self.last((parts * weights).sum(1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(self.second(self.first(x, over_window), over_window).mean((2, 3)))


def over_window(x: torch.Tensor, _side: int) -> torch.Tensor:
    return functional.adaptive_avg_pool2d(x, 1)


@pytest.fixture
def gates() -> Classifier:
    return classifier(trained(Gates(), 40), 40)


def test_means_around_every_place_are_those_of_a_plain_network(gates: Classifier) -> None:
    """With local=True windows share all layers; the map is that of the network with sliding means, built by hand."""
    module = gates.module
    assert isinstance(module, Gates)
    assert "squeeze-and-excite" in describe(gates, 4).obstacle
    remedy = r"set dense.share_until=stem, .*; or dense.local=true, .*; or inference.engine=window"
    with pytest.raises(InputError, match=remedy):
        densify(gates, 4)
    facts = describe(gates, 4, local=True)
    assert (facts.obstacle, facts.padded, facts.local) == ("", True, True)
    pixels = texture(1, 68, 92)
    features = module.second(module.first(pixels, around), around)
    pooled = functional.avg_pool2d(features, 6, 1)[0].permute(1, 2, 0)
    expected = module.classify(pooled).softmax(2)[..., 1]
    assert float(expected.std()) > 0.01
    torch.testing.assert_close(scores_of(densify(gates, 4, local=True), pixels)[0], expected, atol=1e-5, rtol=0)
    assert float((expected - windows_scores(gates, pixels, 4)).abs().max()) > 1e-3, "they are not those of windows"


def test_maxima_around_every_place_are_those_of_a_plain_network() -> None:
    """A maximum over the window is treated like a mean."""
    network = classifier(trained(Call(lambda x: x - x.amax((2, 3), keepdim=True)), 20), 20)
    module, pixels = network.module, texture(1, 30, 33)
    assert isinstance(module, Call)
    features = module.conv(pixels)
    highest = functional.max_pool2d(functional.pad(features, (8, 9, 8, 9), value=-torch.inf), 18, 1)
    logits = functional.avg_pool2d(features - highest, 18, 1)
    torch.testing.assert_close(scores_of(densify(network, 1, local=True), pixels), logits.softmax(1)[:, 1])


@pytest.mark.parametrize("axes", [(2, 3), (1, 2)], ids=["channels first", "channels last"])
def test_norms_around_every_place_are_those_of_a_plain_network(axes: tuple[int, int]) -> None:
    """Global response normalisation: the root of a sum of squares, by its mean over the channels."""
    channels = 1 if axes == (2, 3) else 3

    def normalised(x: torch.Tensor, norms: torch.Tensor, channels: int) -> torch.Tensor:
        return torch.addcmul(x, norms / (norms.mean(channels, keepdim=True) + 1e-6), x)

    def call(x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1) if channels == 3 else x
        x = normalised(x, x.norm(p=2, dim=axes, keepdim=True), channels)
        return x.permute(0, 3, 1, 2) if channels == 3 else x

    network = classifier(trained(Call(call), 20), 20)
    module, pixels = network.module, texture(1, 30, 33)
    assert isinstance(module, Call)
    features = module.conv(pixels)
    norms = (around(features.square(), 18) * 18**2).sqrt()
    logits = functional.avg_pool2d(normalised(features, norms, 1), 18, 1)
    torch.testing.assert_close(scores_of(densify(network, 1, local=True), pixels), logits.softmax(1)[:, 1])


def test_a_part_with_means_around_every_place_is_shared(gates: Classifier) -> None:
    """Up to a layer means are taken around every place, behind it over each window."""
    module = gates.module
    assert isinstance(module, Gates)
    pixels = texture(1, 52, 48)
    dense = densify(gates, 4, share_until="parts", local=True)
    crops = module.first(pixels, around)[0].unfold(1, 7, 1).unfold(2, 7, 1).permute(1, 2, 0, 3, 4)
    expected = [module.classify(module.second(row, over_window).mean((2, 3))).softmax(1)[:, 1] for row in crops]
    torch.testing.assert_close(shared_scores(dense, pixels), torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("build", [Gates, lambda: Gated(linear=True)], ids=["convolutions", "linear"])
def test_means_around_every_place_hold_in_phases(build: Callable[[], nn.Module]) -> None:
    """Away from the region's border, finer maps equal those of shifted regions; multiplications are as counted."""
    network = classifier(trained(build(), 40), 40)
    fine, coarse = densify(network, 2, local=True), densify(network, 4, local=True)
    before, after = (4 * -(-px // 4) for px in coarse.facts.overhang_px)
    pixels = texture(1, 40 + before + after + 16, 40 + before + after + 20)
    found = scores_of(fine, pixels)[0]
    for y, x in [(0, 0), (0, 2), (2, 2)]:
        shifted = scores_of(coarse, pixels[:, :, y:, x:])[0]
        rows, cols = (slice(before // 4, length - after // 4) for length in shifted.shape)
        assert shifted[rows, cols].numel() >= 12
        same = found[y // 2 :: 2, x // 2 :: 2]
        torch.testing.assert_close(same[rows, cols], shifted[rows, cols], atol=1e-5, rtol=0)
    counts = []
    for steps in range(3):
        with FlopCounterMode(display=False) as counter:
            scores_of(fine, torch.zeros(1, 3, *[40 + 48 * steps] * 2))
        counts.append(counter.get_total_flops() / 2)
    assert (counts[2] - 2 * counts[1] + counts[0]) / 2 == pytest.approx(fine.facts.dense_macs_px * 48**2)
    with FlopCounterMode(display=False) as counter:
        network.module(torch.zeros(1, 3, 40, 40))
    assert fine.facts.window_macs == counter.get_total_flops() / 2


def test_means_around_every_place_that_count_the_border_are_refused(
    gates: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that reach over the whole window from each of its places are its means, or else the check fails."""

    def with_border(x: torch.Tensor, kernel: Pair, stride: int, before: Pair, behind: Pair) -> torch.Tensor:
        return functional.avg_pool2d(operations.fitted(x, before, behind, 0.0), kernel, stride)

    monkeypatch.setattr(operations, "mean_inside", with_border)
    with pytest.raises(InputError, match="other scores than over its windows"):
        densify(gates, 4, local=True)


class BothWays(nn.Module):
    """A mean that is both a gate and a part of the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.classify = nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        pooled = x.mean((2, 3), keepdim=True)
        return (self.classify(x * pooled).mean((2, 3), keepdim=True) + pooled).flatten(1)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (BothWays, "is an output too"),
        (lambda: Call(lambda x: x[:, :, :, 3:4] + x), "squeeze-and-excite"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 3), Attention()), "attention"),
    ],
    ids=["both ways", "one column", "attention"],
)
def test_what_is_no_mean_over_the_window_stays_refused(build: Callable[[], nn.Module], reason: str) -> None:
    """Neither can a mean be taken around every place and over the window at once."""
    for local in (False, True):
        with pytest.raises(InputError, match=reason if local else "inference.engine=window") as refusal:
            densify(classifier(build(), 34), 8, local=local)
        assert "dense.local" not in str(refusal.value)


def test_means_over_large_windows_do_not_round() -> None:
    """In the background of a slide all numbers are equal, and the errors of a long sum have one sign."""
    torch.manual_seed(0)
    model = classifier(trained(ending(nn.ReLU()), 400), 400)
    pixels = torch.full((1, 3, 416, 416), 0.7)
    pixels[:, :, :100, :100] = texture(1, 100, 100)
    dense = densify(model, 16)
    with torch.inference_mode():
        found = scores_of(dense, pixels).flatten()
        exact = copy.deepcopy(model.module).double()
        windows = torch.cat([pixels[:, :, y : y + 400, x : x + 400] for y in (0, 16) for x in (0, 16)]).double()
        expected = exact(windows).softmax(1)[:, 1]
    assert (found - expected).abs().max() < 1e-6


def test_resized_windows_are_refused() -> None:
    """Each window is resized alone, with its own border."""
    with pytest.raises(InputError, match=r"resizes windows of 64 px to 32 px.*inference.engine=window"):
        densify(classifier(ending(), 64, input_px=32), 8)


def test_a_conversion_that_gives_other_scores_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is converted wrongly is found before the first slide."""
    network = classifier(ending(nn.InstanceNorm2d(8, affine=True)), 32)
    monkeypatch.delitem(layers._REFUSED, "instance_norm")
    monkeypatch.setitem(layers._CALLS, "instance_norm", layers._each)
    with pytest.raises(
        InputError, match=r"other scores than over its windows: .* in logits; set inference.engine=window"
    ):
        densify(network, 8)
