"""Likely misreadings of a model: labelled patches are scored as the card says, and as it might have been meant.

Input: patches with their classes. Output: for every reading how likely it finds the true classes (mean logarithmic loss
and accuracy), and whether one fits clearly better than the card.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from wsiflow.model.classifier import Classifier, normalise

_BATCH = 32
_FLOOR = 1e-6  # a probability of 0 for the true class is no infinite loss
_CLEARLY = 2.0  # standard errors of the mean difference of losses
_LEAST_GAIN = 0.02  # nats for each patch

Input = Callable[[Classifier, NDArray[np.uint8]], torch.Tensor]


class Reading(NamedTuple):
    """How well a reading of the card fits labelled patches.

    Attributes:
        meaning: What the reading supposes, as a sentence; empty for the card itself.
        loss: Mean of minus the logarithm of the probability of the true class, nats.
        accuracy: Fraction of patches whose most probable class is the true one.
        gain: How much smaller the loss is than with the card, nats; 0 for the card itself.
        error: Standard error of the gain over the patches, nats.
    """

    meaning: str
    loss: float
    accuracy: float
    gain: float = 0.0
    error: float = 0.0

    @property
    def is_better(self) -> bool:
        """Whether it fits better than the card by more than chance and by something that matters."""
        return self.gain > max(_LEAST_GAIN, _CLEARLY * self.error)


def readings(classifier: Classifier, patches: NDArray[np.uint8], classes: NDArray[np.int64]) -> list[Reading]:
    """Return how the card and its likely misreadings fit, the card first, then the best fitting first.

    Args:
        classifier: The model.
        patches: uint8 (n, window_px, window_px, 3), RGB.
        classes: int64 (n,), the index of each patch's class.
    """
    card = _probabilities(classifier, patches, normalise)
    own, others = _losses(card, classes), []
    for meaning, probabilities in _others(classifier, patches, card):
        losses = _losses(probabilities, classes)
        gains = own - losses
        error = float(gains.std(ddof=1) / math.sqrt(len(gains))) if len(gains) > 1 else math.inf
        reading = Reading(meaning, float(losses.mean()), _accuracy(probabilities, classes), float(gains.mean()), error)
        others.append(reading)
    return [Reading("", float(own.mean()), _accuracy(card, classes)), *sorted(others, key=lambda each: each.loss)]


def _others(
    classifier: Classifier, patches: NDArray[np.uint8], own: NDArray[np.float64]
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Yield each misreading with the probabilities, float64 (n, classes), that it gives; `own` are the card's."""
    for meaning, prepare in _INPUTS.items():
        yield meaning, _probabilities(classifier, patches, prepare)
    for first in range(own.shape[1]):
        for second in range(first + 1, own.shape[1]):
            order = list(range(own.shape[1]))
            order[first], order[second] = second, first
            names = classifier.class_names
            yield f"the classes {names[first]} and {names[second]} are swapped", own[:, order]


def _probabilities(classifier: Classifier, patches: NDArray[np.uint8], prepare: Input) -> NDArray[np.float64]:
    """Return the probability of every class, float64 (n, classes)."""
    parts = [classifier.outputs.probabilities(out).numpy() for out in _outputs(classifier, patches, prepare)]
    return np.concatenate(parts).astype(np.float64)


def _outputs(classifier: Classifier, patches: NDArray[np.uint8], prepare: Input) -> Iterator[torch.Tensor]:
    """Yield the outputs of the network in batches."""
    with torch.inference_mode():
        for start in range(0, len(patches), _BATCH):
            yield classifier.module(prepare(classifier, patches[start : start + _BATCH]))


def _losses(probabilities: NDArray[np.float64], classes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return minus the logarithm of the probability of each patch's class, nats."""
    return -np.log(np.clip(probabilities[np.arange(len(classes)), classes], _FLOOR, 1.0))


def _accuracy(probabilities: NDArray[np.float64], classes: NDArray[np.int64]) -> float:
    return float((probabilities.argmax(axis=1) == classes).mean())


def _scaled(
    classifier: Classifier, patches: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Return patches normalised with another mean and standard deviation, on a scale of 0 to 1."""
    plain = normalise(classifier, patches)
    own_mean, own_std, mean_, std_ = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (classifier.mean, classifier.std, mean, std)
    )
    return (plain * own_std + own_mean - mean_) / std_


def _twice(classifier: Classifier, patches: NDArray[np.uint8]) -> torch.Tensor:
    """Return patches normalised twice."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (classifier.mean, classifier.std))
    return (normalise(classifier, patches) - mean) / std


def _zoomed(factor: float) -> Input:
    """Return the function that shows patches at another spacing: their middle enlarged, or reduced and mirrored."""

    def prepare(classifier: Classifier, patches: NDArray[np.uint8]) -> torch.Tensor:
        plain = normalise(classifier, patches)
        side = plain.shape[2]
        changed = nn.functional.interpolate(plain, scale_factor=factor, mode="bilinear", antialias=True)
        if factor > 1:
            first = (changed.shape[2] - side) // 2
            return changed[:, :, first : first + side, first : first + side]
        missing = side - changed.shape[2]
        before, behind = missing // 2, missing - missing // 2
        return nn.functional.pad(changed, (before, behind, before, behind), mode="reflect")

    return prepare


_INPUTS: dict[str, Input] = {
    "the channels are blue, green, red": lambda model, patches: normalise(
        model, np.ascontiguousarray(patches[..., ::-1])
    ),
    "the network takes values of 0 to 1 (mean 0,0,0 and std 1,1,1)": lambda model, patches: _scaled(
        model, patches, (0.0,) * 3, (1.0,) * 3
    ),
    "the network takes values of -1 to 1 (mean and std 0.5,0.5,0.5)": lambda model, patches: _scaled(
        model, patches, (0.5,) * 3, (0.5,) * 3
    ),
    "the network takes ImageNet's normalisation (mean 0.485,0.456,0.406, std 0.229,0.224,0.225)": (
        lambda model, patches: _scaled(model, patches, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    ),
    "the network takes values of 0 to 255 (mean 0,0,0 and std 1/255 each)": lambda model, patches: _scaled(
        model, patches, (0.0,) * 3, (1 / 255,) * 3
    ),
    "the normalisation is done twice": _twice,
    "the spacing is half of what the card says": _zoomed(2.0),
    "the spacing is twice what the card says": _zoomed(0.5),
}
