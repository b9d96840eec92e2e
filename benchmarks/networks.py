"""Networks to measure, the pixels that they see, and the window loop of the reference system.

Weights are random unless a card is given, since speed does not depend on them. They are drawn so that activations keep
their magnitude from layer to layer, and the last layer is weak, so that wsiflow's checks of precision pass.
"""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import nn

from wsiflow.model import scorer, scoring
from wsiflow.model.architectures.registry import build
from wsiflow.model.card import ModelSpec
from wsiflow.model.choice import Choice
from wsiflow.model.classifier import Classifier, load
from wsiflow.model.save import save
from wsiflow.slides.synthetic import dataset
from wsiflow.slides.synthetic.tissue import patch, render
from wsiflow.system.usage import untimed

WINDOW_PX = TILE_PX = 224
STRIDE_PX = 16
BATCH = 14  # the reference's
WINDOWS_PER_TILE = (TILE_PX // STRIDE_PX) ** 2
_MEAN, _STD = (0.7, 0.55, 0.7), (0.2, 0.22, 0.18)
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"dropout": 0.5},
    "inception_valid": {"width": 1.0, "dropout": 0.2},
}


def demo() -> Classifier:
    """Return the demo classifier of the package."""
    return load(spec("pkg:demo.json"))


def spec(card: str | Path) -> ModelSpec:
    """Return the model settings of a run with this card."""
    return ModelSpec(card=Path(card), trust_torchscript=False, sha256="", positive_class="")


def random_card(architecture: str, folder: Path) -> Path:
    """Save an architecture with random weights and return its card."""
    network = _random(architecture)
    with torch.no_grad():
        network.classify.weight.mul_(0.05)  # type: ignore[union-attr, operator]
    return save(network, _fields(architecture), folder)


def _random(architecture: str) -> nn.Module:
    """Return an architecture with random weights that keep the magnitude of activations from layer to layer."""
    torch.manual_seed(0)
    network = build(architecture, 2, **_ARGUMENTS[architecture])
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return network.eval()


def fitted_card(architecture: str, folder: Path) -> Path:
    """Save an architecture with random weights whose last layer is fitted to synthetic patches, and return its card.

    The last layer is a logistic regression on what the random layers make of the patches. The card says how many fresh
    patches it has right. This is a classifier that finds tumour on synthetic slides after a minute, and no more.
    """
    network = _random(architecture)
    known, fresh = (_patches(seed, count) for seed, count in ((0, 600), (1, 200)))
    features, labels = _features(network, known[0]), known[1]
    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-6
    fitted = LogisticRegression(C=0.01, max_iter=1000).fit((features - mean) / deviation, labels)
    weight = fitted.coef_[0] / deviation
    with torch.no_grad():
        both = torch.from_numpy(np.stack([np.zeros_like(weight), weight]))
        network.classify.weight.copy_(both.view_as(network.classify.weight))  # type: ignore[union-attr, operator, arg-type]
        bias = torch.tensor([0.0, float(fitted.intercept_[0] - weight @ mean)])
        network.classify.bias.copy_(bias)  # type: ignore[union-attr, operator]
        right = network(fresh[0]).argmax(dim=1).numpy() == fresh[1]
    notes = f"{right.mean():.1%} of {len(right)} fresh synthetic patches are right."
    trained_on = f"{len(labels)} synthetic patches: the last layer alone, all other weights are random"
    return save(network, {**_fields(architecture), "trained_on": trained_on, "notes": notes}, folder)


def _patches(seed: int, count: int) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """Return the input of a network for synthetic patches, float32 (n, 3, 224, 224), and their labels, 1 for tumour."""
    rng, labels = np.random.default_rng(seed), np.arange(count) % 2
    drawn = np.stack([patch(rng, tumour=bool(label), size_px=WINDOW_PX) for label in labels]).astype(np.float32) / 255
    scaled = (drawn - np.array(_MEAN, np.float32)) / np.array(_STD, np.float32)
    return torch.from_numpy(scaled.transpose(0, 3, 1, 2).copy()), labels.astype(np.int64)


def _features(network: nn.Module, images: torch.Tensor) -> NDArray[np.float64]:
    """Return what the last layer of a network gets for images, float64 (n, channels)."""
    seen: list[torch.Tensor] = []
    handle = network.classify.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _layer, inputs: seen.append(inputs[0].flatten(1))
    )
    with torch.inference_mode():
        for batch in images.split(20):
            network(batch)
    handle.remove()
    return torch.cat(seen).numpy().astype(np.float64)


def random_classifier(architecture: str) -> Classifier:
    """Return an architecture with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        return load(spec(random_card(architecture, Path(folder))))


def _fields(architecture: str) -> Mapping[str, Any]:
    return {
        "name": f"random_{architecture}",
        "architecture": architecture,
        "architecture_args": _ARGUMENTS[architecture],
        "class_names": ("normal", "tumor"),
        "positive_class": "tumor",
        "window_px": WINDOW_PX,
        "input_px": WINDOW_PX,
        "spacing_um_px": 0.243,
        "mean": _MEAN,
        "std": _STD,
        "licence": "",
        "trained_on": "nothing: random weights",
        "notes": "",
    }


def tissue(side_px: int) -> NDArray[np.uint8]:
    """Return a square of synthetic tissue, uint8 (side, side, 3), RGB."""
    whole_px = max(6144, 3 * side_px)
    plan = dataset.plan_slide("macro", width_px=whole_px * 19 // 12, height_px=whole_px, seed=0)
    first = [int((extent - side_px) // 2) for extent in (plan.width_px, plan.height_px)]
    return render(plan, first[0], first[1], side_px, side_px)


def choice(engine: str, backend: str, precision: str, *, stride_px: int = STRIDE_PX, context_px: int = 0) -> Choice:
    """Return a choice of engine, backend and precision for regions without halo, with ``context_px`` of context."""
    place = {"context_px": context_px, "exact": False, "halo_px": 0, "block_rows": 1, "block_cols": 1}
    return Choice(engine, backend, precision, BATCH, stride_px, "", **place)  # type: ignore[arg-type]


def windows(pixels: NDArray[np.uint8], count: int) -> list[NDArray[np.uint8]]:
    """Return the first ``count`` windows of a tile, row by row, as views of ``pixels``."""
    steps = range(0, TILE_PX, STRIDE_PX)
    corners = [(y, x) for y in steps for x in steps][:count]
    return [pixels[y : y + WINDOW_PX, x : x + WINDOW_PX] for y, x in corners]


class Reference:
    """The window loop of the reference system: plain PyTorch, fp32, channels first, batches of 14, no conversion."""

    def __init__(self, classifier: Classifier) -> None:
        """Copy the network in PyTorch's default memory order."""
        self._module = copy.deepcopy(classifier.module).to(memory_format=torch.contiguous_format)
        (self._positive,) = classifier.outputs.positive
        self._mean, self._std = (torch.tensor(values).view(1, 3, 1, 1) for values in (classifier.mean, classifier.std))

    def run(self, cut: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Return float32 (windows,), the score of each window."""
        scores = []
        with torch.no_grad():
            for first in range(0, len(cut), BATCH):
                pixels = torch.from_numpy(np.stack(cut[first : first + BATCH])).permute(0, 3, 1, 2).contiguous()
                logits = self._module((pixels.float() / 255 - self._mean) / self._std)
                scores.append(logits.softmax(1)[:, self._positive].numpy())
        return np.concatenate(scores)


def prepared(
    classifier: Classifier, how: Choice, pixels: NDArray[np.uint8], *, threads: int = 1
) -> scoring.WindowScorer | scoring.DenseScorer:
    """Return a scorer for a choice; int8 is calibrated on the pixels that it will score."""
    quantised = None
    if how.precision == "int8":
        samples = _calibration(how, pixels)
        quantised = scorer.quantise(classifier, how, samples)
    return scorer.make_scorer(classifier, how, threads=threads, quantised=quantised)


def _calibration(how: Choice, pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Return samples for the calibration of int8: four batches of windows, or four regions of up to 672 px a side."""
    if how.engine == "window":
        cut = np.stack(windows(pixels, WINDOWS_PER_TILE))
        return [cut[first : first + BATCH] for first in range(0, 4 * BATCH, BATCH)]
    side = min(672, pixels.shape[0])
    far = pixels.shape[0] - side
    return [pixels[None, y : y + side, x : x + side] for y in {0, far} for x in {0, far}]


def run_windows(made: scoring.WindowScorer, cut: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Return float32 (windows,), the score of each window."""
    return made.run(cut, untimed)


def run_region(made: scoring.DenseScorer, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the scores of a region as a float32 map."""
    return made.run(pixels, untimed)
