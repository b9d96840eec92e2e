"""Patch classifiers: loading from a model card and weights, and prediction of probabilities.

Input: windows, uint8 (n, window_px, window_px, 3), RGB at the card's spacing. Output: float32 (n,), the probability of
the positive class. Weights are read once and hashed before they are parsed. A classifier that does not reproduce the
probes of its card is never returned. No pickle is read: weights are safetensors, or a TorchScript program that the
settings trust by its hash.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import nn

from wsiflow.errors import InputError
from wsiflow.model.architectures.registry import build
from wsiflow.model.card import TORCHSCRIPT, ModelCard, ModelSpec, Probe, card_path, identity, read_card, read_weights

# The probabilities of the same weights differ by about 1e-6 between machines, because sums are taken in another order.
# Another class order, mean or layer changes a probability near one half by far more than this tolerance.
PROBE_TOLERANCE = 1e-4
PROBE_CELLS = 14


@dataclass(frozen=True, eq=False)
class Classifier:
    """A network that is ready for prediction, and the parameters of its input and output.

    Attributes:
        module: The network in evaluation mode, from (n, 3, input_px, input_px) to logits (n, classes).
        class_names: One name for each output.
        positive_index: Index of the class whose probability becomes the heatmap.
        window_px: Side of a window, px.
        input_px: Side of the network's input, px; windows are resized if it differs from ``window_px``.
        spacing_um_px: Spacing of a window, um per px.
        mean: Mean of red, green and blue on a scale of 0 to 1, which is subtracted.
        std: Standard deviation of red, green and blue on a scale of 0 to 1, by which is divided.
        sha256: Hash of the weights.
        identity: Hash of everything that can change a probability.
    """

    module: nn.Module
    class_names: tuple[str, ...]
    positive_index: int
    window_px: int
    input_px: int
    spacing_um_px: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sha256: str
    identity: str


def load(spec: ModelSpec) -> Classifier:
    """Load the classifier that the settings name, and verify it.

    Raises:
        InputError: The card or the weights are missing or invalid, their hash or the probes are not reproduced, the
            weights are not finite or do not fit the architecture, or are a program that the settings do not trust.
        EnvironmentFault: The system refuses to read a file.
    """
    card, path = read_card(spec), card_path(spec)
    weights_path = path.parent / card.weights
    data = read_weights(spec, card)
    module = _torchscript(data, weights_path) if card.architecture == TORCHSCRIPT else _registered(data, card, path)
    classifier = as_classifier(module, card)
    _check_answers(classifier, card, path)
    return classifier


def as_classifier(module: nn.Module, card: ModelCard) -> Classifier:
    """Return a network with loaded weights as a classifier; the network is put into evaluation mode."""
    # Channels-last is the memory order of images, and about twice as fast on CPUs.
    return Classifier(
        module.eval().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        class_names=card.class_names,
        positive_index=card.positive_index,
        window_px=card.window_px,
        input_px=card.input_px,
        spacing_um_px=card.spacing_um_px,
        mean=card.mean,
        std=card.std,
        sha256=card.sha256,
        identity=identity(card),
    )


def predict(classifier: Classifier, windows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the probability of the positive class for each window.

    Args:
        classifier: The classifier.
        windows: uint8 (n, window_px, window_px, 3), RGB.

    Returns:
        float32 (n,), 0 to 1.

    Raises:
        InputError: The windows have another shape or dtype, or a probability is not finite.
    """
    return probabilities(classifier, windows)[:, classifier.positive_index]


def probabilities(classifier: Classifier, windows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the probability of every class, float32 (n, classes); arguments and errors as for `predict`."""
    side = classifier.window_px
    if windows.dtype != np.uint8 or windows.shape[1:] != (side, side, 3):
        raise InputError(
            f"windows are {windows.dtype} {windows.shape}, but the model takes uint8 (n, {side}, {side}, 3)",
            "read patches of the size and spacing in the model card",
            stage="predict",
        )
    with torch.inference_mode():
        result = infer(classifier, normalise(classifier, windows))
    bad = np.flatnonzero(~np.isfinite(result).all(axis=1))
    if bad.size:
        raise not_finite(f"window {bad[0]} of {len(result)}")
    return result


def normalise(classifier: Classifier, images: NDArray[np.uint8]) -> torch.Tensor:
    """Return the network's input for images: (x / 255 - mean) / std in channels-last memory order.

    Args:
        classifier: The classifier.
        images: uint8 (n, h, w, 3), RGB; windows if the classifier resizes them, otherwise images of any size.

    Returns:
        float32 (n, 3, h, w), or (n, 3, input_px, input_px) where windows are resized.
    """
    # torch.tensor copies, so read-only arrays and views of patches are accepted too.
    pixels = torch.tensor(images).permute(0, 3, 1, 2)
    if classifier.input_px != classifier.window_px:
        side = [classifier.input_px, classifier.input_px]
        # Windows are resized as 8-bit images with antialiasing, as in WSInfer's pipeline.
        pixels = nn.functional.interpolate(pixels, size=side, mode="bilinear", antialias=True)
    mean = torch.tensor(classifier.mean).view(1, 3, 1, 1) * 255
    std = torch.tensor(classifier.std).view(1, 3, 1, 1) * 255
    return pixels.to(torch.float32, memory_format=torch.channels_last).sub_(mean).div_(std)


def infer(classifier: Classifier, inputs: torch.Tensor) -> NDArray[np.float32]:
    """Return the probability of every class, float32 (n, classes), for normalised windows; call this in inference mode.

    Raises:
        InputError: The number of the network's outputs is not the number of class names in its card.
    """
    logits = classifier.module(inputs)
    if logits.shape != (len(inputs), len(classifier.class_names)):
        raise InputError(
            f"the model returns an array of shape {tuple(logits.shape)} for {len(inputs)} windows",
            f"correct class_names in its card, which are {list(classifier.class_names)}",
            stage="predict",
        )
    return np.asarray(torch.softmax(logits, dim=1).numpy(), np.float32)


def not_finite(window: str) -> InputError:
    """Return the error of a window whose probability is NaN or infinite."""
    return InputError(
        f"the model returns no finite probability for {window}",
        "its weights overflow on this input: use another model, or correct mean and std in its card",
        stage="predict",
    )


def probe_image(seed: int, window_px: int) -> NDArray[np.uint8]:
    """Return the image of a probe: 14 x 14 squares with random colours around one random colour.

    Only the raw stream of PCG64 is used, which NumPy guarantees not to change, unlike its distributions.

    Args:
        seed: Seed of PCG64.
        window_px: Side of the image, px.

    Returns:
        uint8 (window_px, window_px, 3).
    """
    n_words = (PROBE_CELLS**2 + 1) * 3
    raw = (np.random.PCG64(seed).random_raw(n_words) >> np.uint64(56)).astype(np.uint16)  # the top byte of each word
    cells, base = raw[3:].reshape(PROBE_CELLS, PROBE_CELLS, 3), raw[:3]
    cell = np.arange(window_px) * PROBE_CELLS // window_px
    return ((cells[np.ix_(cell, cell)] + base) // 2).astype(np.uint8)


def _registered(data: bytes, card: ModelCard, path: Path) -> nn.Module:
    """Return the network of a card from the registry, with its weights loaded."""
    try:
        module = build(card.architecture, len(card.class_names), **card.architecture_args)
    except InputError as error:
        raise error.about(path=path) from error
    weights = path.parent / card.weights
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise InputError(
            f"the weights are not a safetensors file: {error}", "save them with wsiflow.model.save", path=weights
        ) from error
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise InputError(
            f"the weights do not fit {card.architecture} with {len(card.class_names)} classes: {error}",
            "correct architecture, architecture_args or class_names in the card",
            path=weights,
        ) from error
    _check_finite(module, weights)
    return module


def _check_finite(module: nn.Module, path: Path) -> None:
    """Refuse weights that contain NaN or infinity."""
    for name, tensor in module.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"the weight {name} is not finite", "export the weights again", path=path)


def _torchscript(data: bytes, path: Path) -> nn.Module:
    """Return the program in a TorchScript file, which the settings must trust."""
    try:
        module: nn.Module = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the file is not TorchScript: {str(error)[:200]}", "save the model with torch.jit.save", path=path
        ) from error
    _check_finite(module, path)
    return module


def _check_answers(classifier: Classifier, card: ModelCard, path: Path) -> None:
    """Refuse a classifier that does not run, or does not reproduce the probabilities of its probes."""
    if not card.probe and card.architecture != TORCHSCRIPT:
        raise InputError("the model card has no probe", "write weights and card with wsiflow.model.save", path=path)
    seeds = [probe.seed for probe in card.probe] or [0]
    images = np.stack([probe_image(seed, card.window_px) for seed in seeds])
    try:
        answers = probabilities(classifier, images)
    except RuntimeError as error:
        raise InputError(
            f"the model does not run on windows of {card.window_px} px: {error}",
            "correct window_px or input_px in the card",
            path=path,
        ) from error
    for probe, answer in zip(card.probe, answers, strict=False):
        _check_probe(probe, answer, path)


def _check_probe(probe: Probe, answer: NDArray[np.float32], path: Path) -> None:
    """Refuse probabilities that differ from those of a probe by more than `PROBE_TOLERANCE`."""
    error = float(np.abs(answer - np.array(probe.probabilities)).max())
    if error > PROBE_TOLERANCE:
        raise InputError(
            f"probe {probe.seed} gives {np.round(answer, 6).tolist()}, but the card has {list(probe.probabilities)}: "
            f"the difference is {error:.2g}, at most {PROBE_TOLERANCE} is allowed",
            "correct class order, mean, std, window or architecture in the card, or use the weights that belong to it",
            path=path,
        )
