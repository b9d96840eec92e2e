"""Patch classifiers: loading from a model card and weights, and prediction of probabilities.

Input: windows, uint8 (n, window_px, window_px, 3), RGB at the card's spacing. Output: float32 (n,), the probability of
the positive class. Weights are read once and hashed before they are parsed, by the format that the card names. A
classifier that does not reproduce the probes of its card is never returned.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from wsiflow.errors import InputError
from wsiflow.model.card import (
    ModelCard,
    ModelSpec,
    Probe,
    Resize,
    card_path,
    identity,
    map_indices,
    read_card,
    read_weights,
)
from wsiflow.model.formats.registry import does_not_run, network
from wsiflow.model.outputs import Outputs
from wsiflow.model.resize import resize
from wsiflow.model.scoring import not_finite

# The probabilities of the same weights differ by about 1e-6 between machines, because sums are taken in another order.
# Another class order, mean or layer changes a probability near one half by far more than this tolerance.
PROBE_TOLERANCE = 1e-4
PROBE_CELLS = 14
N_TRIALS = 4  # windows on which a model without probes is tried
_TRIAL_PX = 2 * 1024**2  # of windows in one batch of a trial, which fit into a worker's memory
SUM_TOLERANCE = 1e-3  # half precision included
_NEAR = 0.01  # to 0 or 1, as outputs of sigmoids are for pixels that are far from those of slides
_FAR = (-100.0, -10.0, 10.0, 100.0)  # times the pixels of trials: logits grow with them, and probabilities do not


@dataclass(frozen=True, eq=False)
class Classifier:
    """A network that is ready for prediction, and the parameters of its input and output.

    Attributes:
        module: The network in evaluation mode, from (n, 3, input_px, input_px) to its outputs (n, outputs).
        class_names: One name for each class.
        outputs: What the outputs of the network mean, which class is the score, and which further ones are mapped.
        window_px: Side of a window, px.
        input_px: Side of the network's input, px; windows are resized if it differs from ``window_px``.
        spacing_um_px: Spacing of a window, um per px.
        mean: Mean of red, green and blue on a scale of 0 to 1, which is subtracted.
        std: Standard deviation of red, green and blue on a scale of 0 to 1, by which is divided.
        sha256: Hash of the weights.
        identity: Hash of everything that can change a probability.
        resize: How windows are resized.
    """

    module: nn.Module
    class_names: tuple[str, ...]
    outputs: Outputs
    window_px: int
    input_px: int
    spacing_um_px: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sha256: str
    identity: str
    resize: Resize = "torch"


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
    try:
        module = network(data, card, weights_path)
    except InputError as error:
        raise error.about(path=path) from error
    classifier = as_classifier(module, card, map_indices(card, spec))
    check_answers(classifier, card, path)
    return classifier


def as_classifier(module: nn.Module, card: ModelCard, maps: tuple[int, ...] = ()) -> Classifier:
    """Return a network with loaded weights as a classifier; it is put into evaluation mode and single precision.

    Args:
        module: The network.
        card: Its card.
        maps: Indices of the further classes that are mapped.
    """
    # Channels-last is the memory order of images, and about twice as fast on CPUs.
    return Classifier(
        module.eval().float().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        class_names=card.class_names,
        outputs=Outputs(card.output, len(card.class_names), card.positive_indices, maps),
        window_px=card.window_px,
        input_px=card.input_px,
        spacing_um_px=card.spacing_um_px,
        mean=card.mean,
        std=card.std,
        sha256=card.sha256,
        identity=identity(card),
        resize=card.resize,
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
    each = probabilities(classifier, windows)[:, classifier.outputs.positive]
    return each[:, 0] if each.shape[1] == 1 else each.sum(axis=1)


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


def resized(classifier: Classifier, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return windows, uint8 (n, window_px, window_px, 3), with the side that the network takes; others as they are."""
    if classifier.input_px == classifier.window_px:
        return images
    return resize(images, classifier.input_px, classifier.resize)


def normalise(classifier: Classifier, images: NDArray[np.uint8]) -> torch.Tensor:
    """Return the network's input for images: (x / 255 - mean) / std in channels-last memory order.

    Args:
        classifier: The classifier.
        images: uint8 (n, h, w, 3), RGB; windows if the classifier resizes them, otherwise images of any size.

    Returns:
        float32 (n, 3, h, w), or (n, 3, input_px, input_px) where windows are resized.
    """
    # torch.tensor copies, so read-only arrays and views of patches are accepted too.
    pixels = torch.tensor(resized(classifier, images)).permute(0, 3, 1, 2)
    mean = torch.tensor(classifier.mean).view(1, 3, 1, 1) * 255
    std = torch.tensor(classifier.std).view(1, 3, 1, 1) * 255
    return pixels.to(torch.float32, memory_format=torch.channels_last).sub_(mean).div_(std)


def infer(classifier: Classifier, inputs: torch.Tensor) -> NDArray[np.float32]:
    """Return the probability of every class, float32 (n, classes), for normalised windows; call this in inference mode.

    Raises:
        InputError: The number of the network's outputs is not what its card says.
    """
    return np.asarray(classifier.outputs.probabilities(raw_outputs(classifier, inputs)).numpy(), np.float32)


def raw_outputs(classifier: Classifier, inputs: torch.Tensor) -> torch.Tensor:
    """Return what the network returns, (n, outputs), for normalised windows; call this in inference mode.

    Raises:
        InputError: It is not a tensor of the shape that the card says.
    """
    outputs: torch.Tensor = classifier.module(inputs)
    if outputs.dim() != 2 or len(outputs) != len(inputs) or not classifier.outputs.fits(outputs.shape[1]):
        raise InputError(
            f"the model returns an array of shape {tuple(outputs.shape)} for {len(inputs)} windows",
            _remedy_for_shape(classifier, tuple(outputs.shape), len(inputs)),
            stage="predict",
        )
    return outputs


def _remedy_for_shape(classifier: Classifier, shape: tuple[int, ...], n: int) -> str:
    """Return what to do about outputs of an unexpected shape for n windows."""
    names, n_classes = list(classifier.class_names), len(classifier.class_names)
    if shape == (n, 1) and n_classes == 2:
        return (
            "one output is the second of two classes: say that it is a sigmoid, or probabilities where the "
            "network ends with one (output in the card, --output of wsiflow model add)"
        )
    if len(shape) == 2 and shape[0] == n:
        return f"name its {shape[1]} classes (class_names in the card, --classes), which are {names} now"
    if shape in {(n,), ()}:
        return "have the network return (windows, 1): leave out the squeeze at the end of its forward method"
    return f"have the network return (windows, {n_classes}), a number for each of {names}: maps and features are none"


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


def check_answers(classifier: Classifier, card: ModelCard, path: Path) -> None:
    """Refuse a classifier that does not run, does not reproduce its probes, or whose outputs are of another kind.

    Where the card has no probes, outputs are tried on a few images: they must not depend on the batch or on chance.

    Args:
        classifier: The classifier.
        card: Its card.
        path: The path that messages name.

    Raises:
        InputError: It is such a classifier.
    """
    seeds = [probe.seed for probe in card.probe] or list(range(N_TRIALS))
    images = np.stack([probe_image(seed, card.window_px) for seed in seeds])
    size = max(1, _TRIAL_PX // card.input_px**2)
    batches = [images[first : first + size] for first in range(0, len(images), size)]
    try:
        outputs = _outputs(classifier, batches)
        answers = np.concatenate([probabilities(classifier, batch) for batch in batches])
        if not card.probe:
            _check_repeatable(classifier, batches, outputs)
    except RuntimeError as error:
        raise does_not_run(error, len(images), card).about(path=path) from error
    except InputError as error:
        raise error.about(path=path) from error
    for probe, answer in zip(card.probe, answers, strict=False):
        _check_probe(probe, answer, path)
    _check_kind(classifier, batches, outputs, card, path)


def _outputs(classifier: Classifier, batches: Iterable[NDArray[np.uint8]]) -> torch.Tensor:
    """Return what the network returns, (n, outputs), for batches of windows, uint8 (n, window_px, window_px, 3)."""
    with torch.inference_mode():
        return torch.cat([raw_outputs(classifier, normalise(classifier, batch)) for batch in batches])


def _check_repeatable(classifier: Classifier, batches: Sequence[NDArray[np.uint8]], outputs: torch.Tensor) -> None:
    """Refuse a network whose outputs for a window depend on the other windows of a batch, or on chance.

    Args:
        classifier: The classifier.
        batches: Windows, uint8 (n, window_px, window_px, 3); only large ones are alone in a batch.
        outputs: Its outputs for these batches.

    Raises:
        InputError: The outputs depend on the batch or differ from time to time.
    """
    again = _outputs(classifier, batches)
    alone = _outputs(classifier, (image[None] for batch in batches for image in batch))
    scale = max(1.0, float(outputs.abs().max()))
    for others, cause in (
        (again, "gives other outputs for the same windows each time (dropout in training mode?)"),
        (alone, "gives a window other outputs alone than among others (batch norm in training mode?)"),
    ):
        if float((others - outputs).abs().max()) > PROBE_TOLERANCE * scale:
            raise InputError(f"the model {cause}", "export it in evaluation mode: model.eval()")


def _check_kind(
    classifier: Classifier, batches: Sequence[NDArray[np.uint8]], outputs: torch.Tensor, card: ModelCard, path: Path
) -> None:
    """Refuse outputs that are plainly not what the card says: probabilities instead of logits, or the other way round.

    Args:
        classifier: The classifier.
        batches: Windows, uint8 (n, window_px, window_px, 3).
        outputs: Its outputs for these batches, (n, outputs).
        card: The model card.
        path: Path of the card, for the message.

    Raises:
        InputError: The outputs are of another kind.
    """
    sum_to_one = outputs.shape[1] > 1 and bool(((outputs.sum(1) - 1).abs() < SUM_TOLERANCE).all())
    far = _far_outputs(classifier, batches)
    are_shares = _are_shares(outputs) and (sum_to_one or _are_shares(far))
    if card.output == "probabilities" and not are_shares:
        cause = "the model's outputs are no probabilities: they are not always from 0 to 1"
        remedy = "say that they are logits or sigmoid (output in the card, --output of wsiflow model add)"
        raise InputError(cause, remedy, path=path)
    # A network that hardly depends on its pixels, as one that was not trained, has logits from 0 to 1 by chance.
    are_plain = are_shares and (sum_to_one or float((far - 0.5).abs().max()) > 0.5 - _NEAR)
    if card.output != "probabilities" and are_plain:
        cause = f"the model's outputs are probabilities already: they are always from 0 to 1, not {card.output}"
        remedy = "say that they are probabilities (output in the card, --output of wsiflow model add)"
        raise InputError(cause, remedy, path=path)


def _are_shares(outputs: torch.Tensor) -> bool:
    return bool(((outputs >= 0) & (outputs <= 1)).all())


def _far_outputs(classifier: Classifier, batches: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
    """Return the outputs for pixels as no slide has them, (n, outputs)."""
    with torch.inference_mode():
        return torch.cat(
            [raw_outputs(classifier, normalise(classifier, batch) * scale) for scale in _FAR for batch in batches]
        )


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
