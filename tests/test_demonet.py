"""The weights in the repository do what their card says."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from wsiflow import roc, synthetic
from wsiflow.model import ModelSpec, load, read_card
from wsiflow.model.classifier import Classifier, predict

SPEC = ModelSpec(card=Path("pkg:demonet.json"), trust_torchscript=False, sha256="", positive_class="")
TRAINING = Path(__file__).parents[1] / "training" / "train_demonet.py"


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    """Return the shipped demo network."""
    return load(SPEC)


@pytest.fixture(scope="module")
def training() -> SimpleNamespace:
    """Return the functions of the training script, which knows what was held out."""
    return SimpleNamespace(**runpy.run_path(str(TRAINING)))


def middle(patches: np.ndarray) -> np.ndarray:
    """Return the 224 px windows in the middle of 256 px patches."""
    return np.ascontiguousarray(patches[:, 16:240, 16:240])


def test_card_tells_what_the_network_takes() -> None:
    """Window, spacing, classes and origin are in the card, and the weights are small enough to ship."""
    card = read_card(SPEC)
    assert (card.window_px, card.spacing_um_px) == (224, synthetic.UM_PX)
    assert (card.class_names, card.positive_class) == (("normal", "tumor"), "tumor")
    assert len(card.probe) >= 1
    assert "CAMELYON16" in card.trained_on
    assert "AUC" in card.notes
    folder = Path(read_card.__code__.co_filename).parent / "weights"
    assert (folder / card.weights).stat().st_size < 3_000_000


def test_better_than_chance_on_held_out_real_patches(
    classifier: Classifier, training: SimpleNamespace, shared_data: Path
) -> None:
    """Real patches that training never saw are told apart; how little that says is in training/README.md."""
    patches = training.read_real(shared_data, test=True)
    assert roc.auc(predict(classifier, middle(patches.pixels)), patches.labels) > 0.7


def test_no_patch_is_on_both_sides(training: SimpleNamespace, shared_data: Path) -> None:
    """Training and test patches have no image in common, and every readable one is on one side."""
    train, test = (training.read_real(shared_data, test=side) for side in (False, True))
    seen = {image.tobytes() for image in train.pixels}
    assert not any(image.tobytes() in seen for image in test.pixels)
    assert len(train.labels) > len(test.labels) > 100


def test_fresh_synthetic_patches_are_told_apart(classifier: Classifier) -> None:
    """Patches of slides that no seed of the training drew are right."""
    rng = np.random.default_rng(77_777)
    labels = np.arange(200) % 2 == 1
    patches = np.stack([synthetic.patch(rng, tumour=bool(label), size_px=256) for label in labels])
    assert np.mean((predict(classifier, middle(patches)) > 0.5) == labels) > 0.95


def test_glass_is_not_tumour(classifier: Classifier, training: SimpleNamespace) -> None:
    """An empty slide scores low whatever its colour and noise."""
    assert predict(classifier, middle(training.glass(50, 4321).pixels)).max() < 0.3
