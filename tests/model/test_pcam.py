"""The compact network depends on its 96 px window only; the lymph node classifier is as good as its card says."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import COARSE
from torch import nn

from flows import cli as command
from wsiflow.evaluation import roc
from wsiflow.heatmap import files
from wsiflow.model import ModelSpec, load, read_card
from wsiflow.model.architectures.compact import compact_valid
from wsiflow.model.architectures.valid import ValidNetwork
from wsiflow.model.classifier import Classifier, predict

ROOT = Path(__file__).parents[2]
SPEC = ModelSpec(card=Path("pkg:pcam.json"), trust_torchscript=False, sha256="", positive_class="")
REAL_SLIDE = "wsi/good/CMU-1-Small-Region.svs"


def network() -> ValidNetwork:
    """Return a network with random weights, whose batch norms are no identity, in evaluation mode."""
    torch.manual_seed(3)
    net = compact_valid(2, width=1.0, dropout=0.2)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return net.eval()


def logit_map(net: ValidNetwork, block: torch.Tensor) -> torch.Tensor:
    """Return the logits (n_classes, r, c) of every window of a block (1, 3, h, w), all from one feature map."""
    means = nn.functional.avg_pool2d(net.features(block), 3, stride=1)
    return nn.functional.conv2d(means, net.classify.weight[:, :, None, None], net.classify.bias)[0]


def test_a_logit_sees_its_window_whole_and_nothing_else() -> None:
    """Every pixel of the 96 px window has a gradient, and the pixels next to it have none."""
    net, found = network(), torch.zeros(112, 112, dtype=torch.bool)
    for _ in range(4):  # pooling and ReLU may block the gradient of a pixel in one image, but hardly in four
        image = torch.rand(1, 3, 112, 112, requires_grad=True)
        logit_map(net, image)[1, 1, 1].backward()
        assert image.grad is not None
        found |= (image.grad[0] != 0).any(dim=0)
    expected = torch.zeros(112, 112, dtype=torch.bool)
    expected[8:104, 8:104] = True
    torch.testing.assert_close(found, expected)


def test_a_block_equals_its_windows() -> None:
    """One pass over 120 x 136 px gives the logits of all 4 x 6 windows at stride 8."""
    net, block = network(), torch.rand(1, 3, 120, 136)
    with torch.inference_mode():
        dense = logit_map(net, block)
        windows = block.unfold(2, 96, 8).unfold(3, 96, 8)[0].permute(1, 2, 0, 3, 4)
        logits = torch.stack([net(row) for row in windows]).permute(2, 0, 1)
    assert dense.shape == logits.shape == (2, 4, 6)
    assert float(logits.std()) > 1e-4, "the windows must differ for the comparison to mean anything"
    torch.testing.assert_close(dense, logits, atol=1e-5, rtol=0)


def test_maps_have_the_sides_and_channels_of_the_table() -> None:
    """The network also has the number of parameters in its docstring."""
    x, sides, channels = torch.zeros(1, 3, 96, 96), [], []
    with torch.inference_mode():
        for layer in network().features:
            x = layer(x)
            sides.append(x.shape[-1])
            channels.append(x.shape[1])
    assert sides == [47, 45, 22, 20, 18, 9, 7, 5, 3]
    assert channels == [24, 32, 32, 48, 64, 64, 96, 96, 96]
    assert sum(one.numel() for one in network().parameters()) == 271_826


def test_width_must_be_positive() -> None:
    """A network without channels is refused."""
    with pytest.raises(ValueError, match="width is 0"):
        compact_valid(2, width=0, dropout=0.0)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    """Return the network that ships with wsiflow."""
    return load(SPEC)


@pytest.fixture(scope="module")
def training() -> SimpleNamespace:
    """Return the functions of its training script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "training"))
        return SimpleNamespace(**runpy.run_path(str(ROOT / "training/pcam.py")))


def test_the_card_describes_the_networks_input() -> None:
    """Window, spacing, classes and origin are in the card, and the weights are small enough to ship."""
    card = read_card(SPEC)
    assert (card.architecture, card.window_px, card.spacing_um_px) == ("compact_valid", 96, 0.97)
    assert (card.class_names, card.positive_class) == (("normal", "tumor"), "tumor")
    assert "PatchCamelyon" in card.trained_on
    assert "not by slide" in card.notes
    folder = Path(read_card.__code__.co_filename).parent / "weights"
    assert (folder / card.weights).stat().st_size < 5_000_000


@pytest.fixture(scope="module")
def held_out(training: SimpleNamespace, shared_data: Path) -> SimpleNamespace:
    """Return the validation patches and their labels."""
    return training.read(shared_data, "val")[0]


def test_held_out_auc_is_that_of_the_card(
    classifier: Classifier, training: SimpleNamespace, held_out: SimpleNamespace
) -> None:
    """The validation patches, unused in any choice, give all numbers of the card, and an AUC above 0.85."""
    found = predict(classifier, held_out.pixels).astype(np.float64)
    low, _ = roc.auc_interval(found, held_out.labels)
    assert len(held_out.labels) == 800
    assert roc.auc(found, held_out.labels) > 0.85
    assert low > 0.85
    assert read_card(SPEC).notes == training.notes(found, held_out.labels)


def test_no_patch_is_on_both_sides(training: SimpleNamespace, held_out: SimpleNamespace, shared_data: Path) -> None:
    """Training and validation patches have no image in common."""
    train, _ = training.read(shared_data, "train")
    seen = {image.tobytes() for image in train.pixels}
    assert not any(image.tobytes() in seen for image in held_out.pixels)


def test_calibration_error_of_known_scores(training: SimpleNamespace) -> None:
    """Scores of 0.25 and 0.75 where a half and all are tumour both have an error of 0.25."""
    found, labels = np.repeat([0.25, 0.75], 100), np.r_[np.tile([0, 1], 50), np.ones(100, int)]
    assert "expected calibration error 0.250." in training.measured(found, labels)


@pytest.mark.parametrize(
    ("more", "um_px", "warned"),
    [([], 0.97, False), (["geometry.spacing=2"], 2.0, True)],
)
def test_a_real_slide_has_a_heatmap(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], um_px: float, warned: bool
) -> None:
    """At its own spacing there is no warning, at another there is one; the window keeps its pixels."""
    out = tmp_path / "run"
    given = ["dataset=single", f"dataset.path={shared_data / REAL_SLIDE}", "model=pcam", *COARSE, f"out={out}", *more]
    assert command.main(["run", *given]) == 0
    assert ("the model was trained at 0.97" in "".join(capsys.readouterr())) is warned
    heat, about = files.read_heatmap(out / "heatmaps/CMU-1-Small-Region.tif")
    assert about["frame"]["um_px"] == pytest.approx(um_px, rel=0.01)
    assert about["frame"]["window_px"] == 96
    assert np.isfinite(heat).any()
