"""What the outputs of a network mean, at any number of them, over windows and over maps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from wsiflow.errors import InputError
from wsiflow.model.add import from_module
from wsiflow.model.card import ModelCard, identity, parse_card
from wsiflow.model.classifier import probabilities, probe_image
from wsiflow.model.dense.network import densify
from wsiflow.model.outputs import Outputs

FIELDS: dict[str, Any] = {
    "name": "net",
    "architecture": "export",
    "class_names": ["normal", "dcis", "tumour"],
    "positive_class": "tumour",
    "window_px": 32,
    "input_px": 32,
    "spacing_um_px": 0.5,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "weights": "net.pt2",
    "sha256": "0" * 64,
}
LOGITS = torch.tensor([[0.2, -1.0, 2.0], [1.0, 1.0, -3.0]])


def card(**changes: Any) -> ModelCard:
    return parse_card(FIELDS | changes, Path("net.json"))


@pytest.mark.parametrize("shape", [(), (4,), (2, 5)], ids=["windows", "a row", "a map"])
@pytest.mark.parametrize(
    ("kind", "outputs", "expected"),
    [
        ("logits", LOGITS, torch.softmax(LOGITS, 1)),
        ("probabilities", torch.softmax(LOGITS, 1), torch.softmax(LOGITS, 1)),
        ("sigmoid", LOGITS, torch.sigmoid(LOGITS)),
    ],
)
def test_outputs_become_probabilities(
    kind: Any, outputs: torch.Tensor, expected: torch.Tensor, shape: tuple[int, ...]
) -> None:
    """Places of a map are further axes; scores are those of one class, or the sum of several."""
    spread = outputs.reshape(2, 3, *(1,) * len(shape)).expand(2, 3, *shape)
    expected = expected.reshape(2, 3, *(1,) * len(shape)).expand(2, 3, *shape)
    torch.testing.assert_close(Outputs(kind, 3, (2,)).probabilities(spread), expected)
    torch.testing.assert_close(Outputs(kind, 3, (2,)).scores(spread), expected[:, 2])
    torch.testing.assert_close(Outputs(kind, 3, (1, 2)).scores(spread), expected[:, 1] + expected[:, 2])
    beside = Outputs(kind, 3, (2,), maps=(0, 1)).scores(spread)
    torch.testing.assert_close(beside, torch.stack([expected[:, 2], expected[:, 0], expected[:, 1]], dim=-1))


@pytest.mark.parametrize(
    ("kind", "outputs"), [("sigmoid", LOGITS[:, :1]), ("probabilities", torch.sigmoid(LOGITS[:, :1]))]
)
def test_one_output_is_the_second_of_two_classes(kind: Any, outputs: torch.Tensor) -> None:
    """The first class has what is left."""
    second = torch.sigmoid(LOGITS[:, 0])
    torch.testing.assert_close(Outputs(kind, 2, (1,)).scores(outputs), second)
    torch.testing.assert_close(Outputs(kind, 2, (0,)).scores(outputs), 1 - second)
    torch.testing.assert_close(Outputs(kind, 2, (1,)).probabilities(outputs), torch.stack([1 - second, second], 1))
    torch.testing.assert_close(Outputs(kind, 2, (1,), (0,)).scores(outputs), torch.stack([second, 1 - second], -1))
    assert Outputs(kind, 2, (1,)).fits(1)
    assert not Outputs("logits", 2, (1,)).fits(1)
    assert not Outputs(kind, 3, (1,)).fits(1)


def test_what_cards_said_before_keeps_its_identity() -> None:
    """A new key of the card is part of the identity only where it says something new."""
    old = card()
    assert identity(old) == identity(card(output="logits", output_name=""))
    others = [card(output="sigmoid"), card(output_name="logits"), card(positive_class=["dcis", "tumour"])]
    assert len({identity(each) for each in [old, *others]}) == 4
    assert identity(card(positive_class=["tumour"])) == identity(old)


def test_several_positive_classes_are_checked() -> None:
    """Each is a class, and labels that do not exclude each other have no sum."""
    assert card(positive_class=["tumour", "dcis", "tumour"]).positive_indices == (1, 2)
    with pytest.raises(InputError, match="is not one of"):
        card(positive_class=["tumour", "stroma"])
    with pytest.raises(InputError, match="labels that do not exclude each other"):
        card(positive_class=["tumour", "dcis"], output="sigmoid")


def test_all_faults_of_a_card_are_told_at_once() -> None:
    """Somebody who writes a card by hand needs one round."""
    with pytest.raises(InputError, match=r"spacing_um_px.*mean\.1.*window: Extra.*correct these keys"):
        card(spacing_um_px=-1, mean=[0.5, "a", 0.5], window=3)


class Net(nn.Module):
    """A convolution, a mean and a head, with what may follow it."""

    def __init__(self, n_outputs: int, ending: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.head, self.ending = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, n_outputs), ending or nn.Identity()
        nn.init.normal_(self.head.weight, std=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ending(self.head(torch.relu(self.conv(x)).mean((2, 3))))


ABOUT: dict[str, Any] = {"window": 32, "spacing": 0.5, "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.mark.parametrize(
    ("module", "output", "classes"),
    [
        (Net(3), "logits", "abc"),
        (Net(3, nn.Softmax(1)), "probabilities", "abc"),
        (Net(1), "sigmoid", "ab"),
        (Net(1, nn.Sigmoid()), "probabilities", "ab"),
        (Net(3), "sigmoid", "abc"),
        (Net(3, nn.Sigmoid()), "probabilities", "abc"),
    ],
    ids=["logits", "softmax", "one logit", "one probability", "labels", "probabilities of labels"],
)
def test_dense_scores_are_those_of_windows(module: nn.Module, output: str, classes: str) -> None:
    """Whatever the outputs are."""
    classifier = from_module(module, classes=list(classes), output=output, **ABOUT)
    image = probe_image(3, 96)
    dense = densify(classifier, 8).module
    assert dense is not None
    with torch.no_grad():
        pixels = (torch.tensor(image).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
        found = dense(pixels)[0].numpy()
    windows = np.stack([image[y : y + 32, x : x + 32] for y in range(0, 65, 8) for x in range(0, 65, 8)])
    expected = probabilities(classifier, windows)[:, len(classes) - 1].reshape(9, 9)
    np.testing.assert_allclose(found, expected, atol=1e-5)


class Halfway(nn.Module):
    """Logits that are from 0 to 1 by chance for ordinary pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 + x / 100


class Weak(nn.Module):
    """A sigmoid of logits that hardly depend on the pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(0.2 + x / 1e4)


class Faint(nn.Module):
    """Logits that hardly depend on the pixels, and are from 0 to 1 by chance."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.2 + x / 1e6


@pytest.mark.parametrize(("ending", "output"), [(Weak(), "probabilities"), (Faint(), "sigmoid")])
def test_outputs_that_hardly_depend_on_pixels_are_what_they_are_said_to_be(ending: nn.Module, output: str) -> None:
    """They come near neither 0 nor 1, whatever the pixels."""
    assert from_module(Net(1, ending), classes=["a", "b"], output=output, **ABOUT).outputs.kind == output


class Batch(nn.Module):
    """Batch norm with the statistics of the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = x.mean((2, 3))[:, :2]
        return (pooled - pooled.mean(0)) * 9


class Chance(nn.Module):
    """Dropout that nobody switched off."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x.mean((2, 3))[:, :2] * 9, 0.5, training=True)


@pytest.mark.parametrize(
    ("module", "changes", "message"),
    [
        (Net(2, nn.Softmax(1)), {}, "probabilities already.*say that they are probabilities"),
        (Net(1, nn.Sigmoid()), {"output": "sigmoid"}, "probabilities already: .* not sigmoid; say that they are"),
        (Net(2, nn.Sigmoid()), {}, "probabilities already: .* not logits; say that they are"),
        (Net(2), {"output": "probabilities"}, "are no probabilities.*say that they are logits or sigmoid"),
        (Net(2, Halfway()), {"output": "probabilities"}, "are no probabilities.*not always from 0 to 1"),
        (Net(3), {}, r"shape \(4, 3\) for 4 windows; name its 3 classes .*, which are \['a', 'b'\] now"),
        (Net(1), {}, r"shape \(4, 1\) .* the second of two classes: say that it is a sigmoid"),
        (Net(1, nn.Flatten(0)), {}, r"shape \(4,\) .* leave out the squeeze"),
        (nn.Conv2d(3, 2, 1), {}, r"shape \(4, 2, 32, 32\) .* maps and features are none"),
        (Net(2), {"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, "from 0 to 1: divide both by 255"),
        (Batch(), {}, r"other outputs alone than among others .*model\.eval\(\)"),
        (Chance(), {}, "other outputs for the same windows each time"),
    ],
    ids=[
        "softmax twice",
        "sigmoid twice",
        "sigmoid of each class, softmax",
        "no probabilities",
        "logits near one half",
        "three outputs",
        "one logit",
        "squeezed",
        "segmentation",
        "mean of 8-bit pixels",
        "batch norm",
        "dropout",
    ],
)
def test_outputs_that_are_not_what_they_are_said_to_be(
    module: nn.Module, changes: dict[str, Any], message: str
) -> None:
    """It is found before the first slide, and the remedy is named."""
    with pytest.raises(InputError, match=message):
        from_module(module, classes=["a", "b"], **{**ABOUT, **changes})
