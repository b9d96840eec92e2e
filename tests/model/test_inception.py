"""The network without padding depends on its window only, and the shipped weights are those of their card."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import fx, nn

from wsiflow.errors import InputError
from wsiflow.evaluation import roc
from wsiflow.model import ModelSpec, load, read_card
from wsiflow.model.architectures.inception import inception_valid
from wsiflow.model.architectures.registry import build
from wsiflow.model.architectures.valid import ValidNetwork
from wsiflow.model.classifier import Classifier, normalise, predict
from wsiflow.slides.synthetic import tissue

SPEC = ModelSpec(card=Path("pkg:demo.json"), trust_torchscript=False, sha256="", positive_class="")
PATCHES = Path(__file__).parents[2] / "training" / "patches.py"
DEMO_WIDTH = 0.25


def network(width: float = DEMO_WIDTH, n_classes: int = 2) -> ValidNetwork:
    """Return a network with random weights, whose batch norms are no identity, in evaluation mode."""
    torch.manual_seed(3)
    net = inception_valid(n_classes, width=width, dropout=0.2)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return net.eval()


def macs(module: nn.Module, side_px: int) -> int:
    """Return the multiplications of all convolutions and linear layers for one image."""
    counts: list[int] = []

    def count(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        counts.append(output[0].numel() * layer.weight[0].numel())

    hooks = [
        layer.register_forward_hook(count) for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    with torch.inference_mode():
        module.eval()(torch.zeros(1, 3, side_px, side_px))
    for hook in hooks:
        hook.remove()
    return sum(counts)


def logit_map(net: nn.Module, block: torch.Tensor) -> torch.Tensor:
    """Return the logits (n_classes, r, c) of all windows of a block (1, 3, h, w), from one feature map."""
    means = nn.functional.avg_pool2d(net.features(block), 3, stride=1)
    return nn.functional.conv2d(means, net.classify.weight[:, :, None, None], net.classify.bias)[0]


def seen(net: ValidNetwork, row: int, col: int) -> torch.Tensor:
    """Return which pixels (240, 240) of a block of 240 px can move one element of its logit map."""
    torch.manual_seed(5)
    found = torch.zeros(240, 240, dtype=torch.bool)
    # Pooling and ReLU may block the gradient of a pixel in one image, but hardly in three.
    for _ in range(3):
        image = torch.rand(1, 3, 240, 240, requires_grad=True)
        logit_map(net, image)[1, row, col].backward()
        assert image.grad is not None
        found |= (image.grad[0] != 0).any(dim=0)
    return found


@pytest.mark.parametrize(("row", "col"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_logit_sees_its_window_whole_and_nothing_else(row: int, col: int) -> None:
    """Every pixel of the 224 px window has a gradient, corners too, and the 16 px next to it have none."""
    expected = torch.zeros(240, 240, dtype=torch.bool)
    expected[16 * row : 16 * row + 224, 16 * col : 16 * col + 224] = True
    torch.testing.assert_close(seen(network(), row, col), expected)


@pytest.mark.parametrize("width", [DEMO_WIDTH, 1.0])
def test_a_block_equals_its_windows(width: float) -> None:
    """One pass over 272 x 304 px gives the logits of all 4 x 6 windows at stride 16."""
    net = network(width)
    block = torch.rand(1, 3, 272, 304)
    with torch.inference_mode():
        dense = logit_map(net, block)
        windows = block.unfold(2, 224, 16).unfold(3, 224, 16)[0].permute(1, 2, 0, 3, 4)
        logits = torch.stack([net(row) for row in windows]).permute(2, 0, 1)
    assert dense.shape == logits.shape == (2, 4, 6)
    assert float(logits.std()) > 1e-4, "the windows must differ for the comparison to mean anything"
    torch.testing.assert_close(dense, logits, atol=1e-5, rtol=0)


def test_no_layer_pads_or_drops() -> None:
    """No layer pads, and the steps of every layer end at the last row of its input."""
    net, checked = network(), []

    def check(layer: nn.Module, inputs: tuple[torch.Tensor], _: torch.Tensor) -> None:
        kernel, stride = (np.broadcast_to(value, 2) for value in (layer.kernel_size, layer.stride))
        assert np.all((np.array(inputs[0].shape[-2:]) - kernel) % stride == 0), layer
        checked.append(layer)

    for layer in net.modules():
        assert "Pad" not in type(layer).__name__
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            assert np.all(np.array(layer.padding) == 0), layer
            assert not getattr(layer, "ceil_mode", False)
            layer.register_forward_hook(check)
    with torch.inference_mode():
        net(torch.zeros(1, 3, 224, 224))
    assert len(checked) == 3 + 6 * 6 + 3 + 6, "stem, branches, pools between, pools within"


def test_maps_have_the_sides_of_the_table() -> None:
    """The sides and channels are those in the module's docstring for width 1."""
    x, sides, channels = torch.zeros(1, 3, 224, 224), [], []
    with torch.inference_mode():
        for layer in network(1.0).features:
            x = layer(x)
            sides.append(x.shape[-1])
            channels.append(x.shape[1])
    assert sides == [110, 55, 55, 53, 26, 24, 22, 11, 9, 7, 5, 3]
    assert channels == [64, 64, 64, 192, 192, 256, 480, 480, 512, 512, 512, 528]


@pytest.mark.parametrize(
    ("width", "parameters", "window_mmac", "tile_mmac"),
    [(1.0, 2_468_642, 741.2, 1195.1), (DEMO_WIDTH, 167_890, 62.8, 93.3)],
    ids=["GoogLeNet's widths", "demo"],
)
def test_size_and_work(width: float, parameters: int, window_mmac: float, tile_mmac: float) -> None:
    """Parameters, and multiplications of one window and of each 224 px tile that a growing block adds."""
    net = inception_valid(2, width=width, dropout=0.0)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert round(macs(net, 224) / 1e6, 1) == window_mmac
    # The second difference of the multiplications for squares is that of the interior, without borders.
    sides = [macs(net, 224 * n) for n in (1, 2, 3)]
    assert (sides[0] - 2 * sides[1] + sides[2]) / 2 / 1e6 == pytest.approx(tile_mmac, abs=0.1)


@pytest.mark.parametrize("width", [0.05, DEMO_WIDTH, 0.3, 1.5])
def test_channels_are_multiples_of_eight(width: float) -> None:
    """This holds for any width, so that vector units are used fully; there are at least eight."""
    outputs = {layer.out_channels for layer in network(width).modules() if isinstance(layer, nn.Conv2d)}
    assert min(outputs) >= 8
    assert not [n for n in outputs if n % 8]


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan")])
def test_an_invalid_width_is_refused(width: float) -> None:
    """A card with such a width is refused, and the message names it."""
    with pytest.raises(InputError, match=f"width is {width}, but must be above 0"):
        build("inception_valid", 2, width=width, dropout=0.2)


def test_logits_have_one_column_for_each_class() -> None:
    """Three windows and four classes give logits of shape (3, 4)."""
    with torch.inference_mode():
        assert network(n_classes=4)(torch.zeros(3, 3, 224, 224)).shape == (3, 4)


def test_the_graph_can_be_traced() -> None:
    """torch.fx traces plain operations with constant arguments, and the traced network gives the same logits."""
    net = network()
    traced = fx.symbolic_trace(net)
    image = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(traced(image), net(image), atol=0, rtol=0)
    called = {node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"}
    assert called == {"cat", "getitem"}


def test_it_trains() -> None:
    """Eight steps on eight patches reduce the loss clearly."""
    rng = np.random.default_rng(11)
    labels = torch.arange(8) % 2
    drawn = np.stack([tissue.patch(rng, tumour=bool(label), size_px=224) for label in labels])
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 128 - 1
    torch.manual_seed(0)
    net = inception_valid(2, width=DEMO_WIDTH, dropout=0.0).train()
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    """Return the shipped demo network."""
    return load(SPEC)


@pytest.fixture(scope="module")
def patches() -> SimpleNamespace:
    """Return the functions that selected the training patches, and so know the held-out ones."""
    return SimpleNamespace(**runpy.run_path(str(PATCHES)))


def middle(squares: np.ndarray) -> np.ndarray:
    """Return the 224 px windows in the middle of 256 px patches."""
    return np.ascontiguousarray(squares[:, 16:240, 16:240])


def test_the_card_describes_the_networks_input() -> None:
    """Window, spacing, classes and origin are in the card, and the weights are small enough to ship."""
    card = read_card(SPEC)
    assert (card.architecture, card.architecture_args["width"]) == ("inception_valid", DEMO_WIDTH)
    assert (card.window_px, card.spacing_um_px) == (224, tissue.UM_PX)
    assert (card.class_names, card.positive_class) == (("normal", "tumor"), "tumor")
    assert len(card.probe) >= 1
    assert "CAMELYON16" in card.trained_on
    assert "AUC" in card.notes
    folder = Path(read_card.__code__.co_filename).parent / "weights"
    assert (folder / card.weights).stat().st_size < 1_500_000


def test_better_than_chance_on_held_out_real_patches(
    classifier: Classifier, patches: SimpleNamespace, shared_data: Path
) -> None:
    """Real patches outside the training data are classified; training/README.md says how little that proves."""
    real = patches.read_real(shared_data, test=True)
    assert roc.auc(predict(classifier, middle(real.pixels)), real.labels) > 0.7


def test_no_patch_is_on_both_sides(patches: SimpleNamespace, shared_data: Path) -> None:
    """Training and test patches have no image in common, and every readable one is in one of them."""
    train, test = (patches.read_real(shared_data, test=side) for side in (False, True))
    seen = {image.tobytes() for image in train.pixels}
    assert not any(image.tobytes() in seen for image in test.pixels)
    assert len(train.labels) > len(test.labels) > 100


def test_new_synthetic_patches_are_classified(classifier: Classifier) -> None:
    """Patches of slides with seeds outside the training data are classified correctly."""
    rng = np.random.default_rng(77_777)
    labels = np.arange(80) % 2 == 1
    drawn = np.stack([tissue.patch(rng, tumour=bool(label), size_px=256) for label in labels])
    assert np.mean((predict(classifier, middle(drawn)) > 0.5) == labels) > 0.95


def test_glass_is_not_tumour(classifier: Classifier, patches: SimpleNamespace) -> None:
    """An empty slide has low scores, whatever its colour and noise."""
    assert predict(classifier, middle(patches.glass(50, 4321).pixels)).max() < 0.3


def test_a_block_of_tissue_scores_as_its_windows_do(classifier: Classifier) -> None:
    """With the shipped weights one pass gives every window's probability to 1e-5, for tumour and normal tissue."""
    rng = np.random.default_rng(5)
    halves = [tissue.patch(rng, tumour=tumour, size_px=304) for tumour in (False, True)]
    block = np.concatenate(halves, axis=1)
    offsets = [(16 * col, 16 * row) for row in range(6) for col in range(25)]
    with torch.inference_mode():
        dense = logit_map(classifier.module, normalise(classifier, block[None])).softmax(dim=0)[1]
    window = predict(classifier, np.stack([block[y : y + 224, x : x + 224] for x, y in offsets]))
    assert window.min() < 0.3, "both answers must occur for the comparison to mean anything"
    assert window.max() > 0.7
    np.testing.assert_allclose(dense.numpy().ravel(), window, atol=1e-5, rtol=0)
