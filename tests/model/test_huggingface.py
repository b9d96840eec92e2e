"""Folders of Hugging Face: of timm, and of transformers, whose networks become programs."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from small_models import spec, windows

from wsiflow import model
from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.model import huggingface
from wsiflow.model.add import add, recognise
from wsiflow.model.card import read_card
from wsiflow.model.classifier import probabilities

CONFIG = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 64,
    "id2label": {"1": "tumour", "0": "normal"},
}
PROCESSOR = {
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.2, 0.2],
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 64, "width": 64},
    "resample": 3,
}


def folder(path: Path, config: dict[str, Any], processor: dict[str, Any] | None = None) -> Path:
    """Write a folder with something for weights."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(processor))
    save_file({"weight": torch.zeros(1)}, path / "model.safetensors")
    return path


def test_a_folder_of_timm_is_read(tmp_path: Path) -> None:
    """It gives the network, the classes, the window and the normalisation; a folder without weights is refused."""
    config = {
        "architecture": "resnet18",
        "num_classes": 2,
        "label_names": ["normal", "tumour"],
        "pretrained_cfg": {"input_size": [3, 224, 224], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]},
    }
    source = recognise(folder(tmp_path, config))
    assert (source.architecture, source.known["window_px"]) == ("timm:resnet18", 224)
    assert (source.known["class_names"], source.known["mean"]) == (["normal", "tumour"], [0.5, 0.4, 0.3])
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="the folder holds no model"):
        recognise(tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "window_px": 64}),
        ({"do_normalize": False}, {"mean": [0, 0, 0], "std": [1, 1, 1]}),
        ({"do_rescale": False}, {"mean": [0.5 / 255, 0.4 / 255, 0.3 / 255], "std": [0.2 / 255] * 3}),
        ({"rescale_factor": 2 / 255, "rescale_offset": True}, {"mean": [0.75, 0.7, 0.65], "std": [0.1] * 3}),
        ({"do_center_crop": True, "crop_size": 48, "size": {"shortest_edge": 56}}, {"window_px": 48}),
        ({"size": None}, {"window_px": 64}),
    ],
)
def test_what_transformers_does_to_pixels_becomes_fields_of_the_card(
    changes: dict[str, Any], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It scales, shifts and normalises, and a card has one mean and one standard deviation for all of that."""
    monkeypatch.setattr(huggingface.transformers, "is_classifier", lambda *_: True)
    known = recognise(folder(tmp_path, CONFIG, PROCESSOR | changes)).known
    assert known["class_names"] == ["normal", "tumour"]
    for name, value in expected.items():
        np.testing.assert_allclose(known[name], value, rtol=1e-12)


@pytest.mark.parametrize(
    ("config", "processor", "message"),
    [
        ({}, {"do_flip_channel_order": True}, "blue, green, red; export one for RGB"),
        ({}, {"size": {"height": 64, "width": 96}}, "images of {'height': 64, 'width': 96}; export one for square"),
    ],
)
def test_images_that_windows_are_not_are_refused(
    config: dict[str, Any], processor: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface.transformers, "is_classifier", lambda *_: True)
    with pytest.raises(InputError, match=re.escape(message)):
        recognise(folder(tmp_path, CONFIG | config, PROCESSOR | processor))


def test_without_transformers_the_remedy_installs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EnvironmentFault, match=r"transformers cannot be used.*pip install 'wsiflow\[hub\]'"):
        recognise(folder(tmp_path, CONFIG))


def test_a_classifier_of_transformers_becomes_a_program(tmp_path: Path) -> None:
    """The card has the classes and the normalisation; what does not fit, or is no classifier, is refused by name.

    The weights are stored in half precision, and the network is one of single precision.
    """
    zoo.require()
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    network = ViTForImageClassification(ViTConfig.from_dict(dict(CONFIG))).eval()
    source = folder(tmp_path / "vit", CONFIG, PROCESSOR)
    network.half().save_pretrained(source)
    network.float()
    known = recognise(source)
    card = add(known, {"name": "vit", "positive_class": "tumour", "spacing_um_px": 0.5, **known.known}, tmp_path)
    assert (read_card(spec(card)).architecture, "bilinearly" in read_card(spec(card)).notes) == ("export", True)
    pixels = torch.from_numpy(windows(3, 64)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(PROCESSOR[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
    with torch.no_grad():
        expected = torch.softmax(network((pixels - mean) / std).logits, 1).numpy()
    np.testing.assert_allclose(probabilities(model.load(spec(card)), windows(3, 64)), expected, atol=1e-6)

    weights = load_file(source / "model.safetensors")
    bias = weights.pop("classifier.bias")
    save_file(weights, source / "model.safetensors")
    with pytest.raises(InputError, match=r"do not fit ViTForImageClassification: 1 are missing \(classifier.bias"):
        known.convert(64)
    save_file(weights | {"classifier.bias": bias, "other": bias.clone()}, source / "model.safetensors")
    with pytest.raises(InputError, match=r"1 have no place in the network \(other"):
        known.convert(64)
    save_file(weights | {"classifier.bias": torch.zeros(3)}, source / "model.safetensors")
    with pytest.raises(InputError, match=r"1 are of another shape \(classifier.bias"):
        known.convert(64)
    for name in ("ViTModel", "MineForImageClassification"):
        with pytest.raises(InputError, match=f"holds {name}, which is not an image classifier of timm or transformers"):
            recognise(folder(source, CONFIG | {"architectures": [name]}))
