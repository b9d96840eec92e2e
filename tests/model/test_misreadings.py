"""Labelled patches tell which likely misreading of a card fits better than the card."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from wsiflow.errors import InputError
from wsiflow.model.add import from_module
from wsiflow.model.classifier import Classifier
from wsiflow.model.misreadings import readings
from wsiflow.slides import patches

MEAN, STD = (0.7, 0.5, 0.6), (0.1, 0.1, 0.1)


class Reddish(nn.Module):
    """Calls a patch positive where red exceeds green, after the normalisation that it was trained with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        red, green, _ = ((x * std + mean) * 255).mean((2, 3)).T
        # Far from the colours that it was trained on it is lost, as a trained network would be.
        level = torch.exp(-(((red + green) / 2 - 128) ** 2) / 5000)
        return torch.stack([green - red, red - green], 1) * level[:, None] / 20


@pytest.fixture(scope="module")
def labelled() -> tuple[np.ndarray, np.ndarray]:
    """Patches of noise around a colour, red ones of class 1 and green ones of class 0."""
    rng = np.random.default_rng(0)
    classes = np.arange(60) % 2
    colours = np.where(classes[:, None], [150, 110, 128], [110, 150, 128])
    pixels = colours[:, None, None] + rng.normal(0, 20, (60, 32, 32, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8), classes.astype(np.int64)


@pytest.fixture(scope="module")
def right() -> Classifier:
    return from_module(Reddish(), classes=["green", "red"], window=32, spacing=0.5, mean=MEAN, std=STD)


def test_a_card_that_fits_is_not_doubted(right: Classifier, labelled: tuple[np.ndarray, np.ndarray]) -> None:
    """Nothing fits clearly better, and the loss and accuracy of the card are those of its probabilities."""
    card, *others = readings(right, *labelled)
    assert card.meaning == ""
    assert card.accuracy == 1.0
    assert not any(other.is_better for other in others)
    assert [other.loss for other in others] == sorted(other.loss for other in others)


@pytest.mark.parametrize(
    ("changes", "flipped", "meaning"),
    [
        ({}, True, "blue, green, red"),
        ({"mean": (0.0,) * 3, "std": (1.0,) * 3}, False, "ImageNet's normalisation"),
        ({"class_names": ("red", "green")}, False, "swapped"),
    ],
    ids=["BGR", "another normalisation", "classes"],
)
def test_a_misreading_is_named(
    right: Classifier,
    labelled: tuple[np.ndarray, np.ndarray],
    changes: dict[str, Any],
    flipped: bool,
    meaning: str,
) -> None:
    """The reading that the network was trained for fits best."""
    if meaning.startswith("ImageNet"):
        model = from_module(
            _Rescaled(),
            classes=["green", "red"],
            window=32,
            spacing=0.5,
            mean=(0.485, 0.456, 0.406),
            std=(0.2, 0.2, 0.2),
        )
        model = replace(model, **changes)
    else:
        model = replace(right, **changes)
    pixels, classes = labelled
    if flipped:
        pixels = np.ascontiguousarray(pixels[..., ::-1])
    if meaning == "swapped":
        classes = 1 - classes
    card, best, *_ = readings(model, pixels, classes)
    assert meaning in best.meaning
    assert best.is_better
    assert best.loss < card.loss


class _Rescaled(Reddish):
    """The same network, trained with ImageNet's normalisation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        own_mean, own_std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        return super().forward((x * std + mean - own_mean) / own_std)


def test_patches_are_read_by_class(tmp_path: Path) -> None:
    """The middle of larger images is taken; names of folders may be written in capitals."""
    for folder, side, colour in (("Normal", 40, 10), ("tumour", 32, 200)):
        (tmp_path / folder).mkdir()
        for number in range(3):
            name = f"{number}.{'webp' if number == 1 else 'png'}"
            Image.new("RGB", (side, side), (colour + number,) * 3).save(tmp_path / folder / name, lossless=True)
    images, classes = patches.read_labelled(tmp_path, ["normal", "tumour"], 32, limit=2)
    assert images.shape == (4, 32, 32, 3)
    assert classes.tolist() == [0, 0, 1, 1]
    assert images[:, 0, 0, 0].tolist() == [10, 11, 200, 201]
    with pytest.raises(InputError, match="only \\['tumour'\\] have a folder with images"):
        patches.read_labelled(tmp_path, ["stroma", "tumour"], 32, limit=2)
    with pytest.raises(InputError, match=r"32 x 32 px, windows of the model have 64|40 x 40 px"):
        patches.read_labelled(tmp_path, ["normal", "tumour"], 64, limit=2)
    (tmp_path / "Normal" / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"0\.png.* cannot be read"):
        patches.read_labelled(tmp_path, ["normal", "tumour"], 32, limit=2)
