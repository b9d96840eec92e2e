"""Model cards and loading: what is accepted, and what is refused with which message."""

import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_models import spec, windows, with_statistics
from torch import nn

from wsiflow import model
from wsiflow.errors import InputError
from wsiflow.model.architectures.architecture import Architecture
from wsiflow.model.architectures.registry import ARCHITECTURES, build
from wsiflow.model.card import ModelSpec, card_path, identity, read_card
from wsiflow.model.classifier import as_classifier, normalise, predict, probe_image
from wsiflow.model.save import save

FIELDS = {
    "name": "tiny",
    "architecture": "inception_valid",
    "architecture_args": {"width": 0.125, "dropout": 0.2},
    "class_names": ["normal", "tumour"],
    "positive_class": "tumour",
    "window_px": 224,
    "input_px": 224,
    "spacing_um_px": 0.25,
    "mean": [0.7, 0.5, 0.7],
    "std": [0.2, 0.2, 0.2],
    "licence": "Apache-2.0",
    "trained_on": "nothing",
    "notes": "",
}


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Return a network with random weights whose probabilities differ between images."""
    torch.manual_seed(0)
    return with_statistics(build("inception_valid", 2, width=0.125, dropout=0.0), 224)


@pytest.fixture(scope="module")
def saved(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of the network's card, which no test changes."""
    return save(network, FIELDS, tmp_path_factory.mktemp("saved"))


@pytest.fixture
def card(saved: Path, tmp_path: Path) -> Path:
    """Return the path of a copy of the card, with its weights, in a folder of its own."""
    return Path(shutil.copytree(saved.parent, tmp_path, dirs_exist_ok=True)) / saved.name


def edit(card: Path, **changes: Any) -> ModelSpec:
    """Change keys of a card; the value None removes a key."""
    keys = {key: value for key, value in (json.loads(card.read_text()) | changes).items() if value is not None}
    card.write_text(json.dumps(keys))
    return spec(card)


def reseal(card: Path, data: bytes) -> ModelSpec:
    """Replace the weights, and their hash in the card."""
    (card.parent / "tiny.safetensors").write_bytes(data)
    return edit(card, sha256=hashlib.sha256(data).hexdigest())


def test_a_saved_model_loads_and_answers(card: Path) -> None:
    """A saved network loads as a classifier in evaluation mode with the values of its card."""
    classifier = model.load(spec(card))
    found = predict(classifier, windows(5, 224))
    assert (found.dtype, found.shape) == (np.float32, (5,))
    assert ((found >= 0) & (found <= 1)).all()
    assert len(set(found.tolist())) == 5
    assert not classifier.module.training
    assert (classifier.window_px, classifier.spacing_um_px, classifier.outputs.positive) == (224, 0.25, (1,))


def striped(n_classes: int, *, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, n_classes, 16, stride), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_an_architecture_is_a_record_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card may name it, and its network is built, saved and loaded."""
    monkeypatch.setitem(ARCHITECTURES, "striped", Architecture("striped", striped))
    args = {"stride": 16}
    saved = save(build("striped", 2, **args), FIELDS | {"architecture": "striped", "architecture_args": args}, tmp_path)
    assert len(set(predict(model.load(spec(saved)), windows(3, 224)).tolist())) == 3


def test_saving_twice_gives_the_same_bytes(card: Path, tmp_path: Path) -> None:
    """A card contains nothing that depends on when or where it was written."""
    (tmp_path / "again").mkdir()
    again = save(model.load(spec(card)).module, FIELDS, tmp_path / "again")
    assert again.read_bytes() == card.read_bytes()
    assert (again.parent / "tiny.safetensors").read_bytes() == (card.parent / "tiny.safetensors").read_bytes()


def test_probes_are_taken_where_the_model_is_unsure(card: Path) -> None:
    """A saturated probe could not detect a wrong mean."""
    for probe in read_card(spec(card)).probe:
        assert max(probe.probabilities) < 0.99


CARD_FAULTS = [
    ({"colour": "pink"}, "colour: Extra inputs are not permitted", "a key nobody knows may be a mistyped one"),
    ({"spacing_um_px": None}, "spacing_um_px: Field required", "a missing spacing cannot be guessed"),
    ({"spacing_um_px": "0.25"}, "spacing_um_px: Input should be a valid number, but it is '0.25'", "text is no number"),
    ({"spacing_um_px": float("nan")}, "spacing_um_px: Input should be a finite number, but it is 'nan'", "NaN"),
    ({"mean": [0.5, float("inf"), 0.5]}, "mean.1: Input should be a finite number", "infinity"),
    ({"mean": [0.5, 0.5]}, "mean", "two channels"),
    ({"std": [0.2, 0.0, 0.2]}, "std.1: Input should be greater than 0, but it is '0.0'", "division by zero"),
    ({"window_px": 0}, "window_px: Input should be greater than or equal to 16, but it is '0'", "no window"),
    (
        {"class_names": ["tumour"]},
        "class_names: Tuple should have at least 2 items",
        "one class has nothing to compare",
    ),
    ({"class_names": ["tumour", "tumour"]}, "holds a name twice", "two outputs with one name"),
    ({"positive_class": "cancer"}, r"positive_class 'cancer' is not one of \['normal', 'tumour'\]", "unknown class"),
    ({"weights": "../other.safetensors"}, "'../other.safetensors' is not a plain file name", "leaves the folder"),
    ({"weights": "/etc/passwd"}, "'/etc/passwd' is not a plain file name", "absolute path"),
    ({"sha256": "abc"}, "sha256: String should match pattern", "not a hash"),
    ({"probe": [{"seed": 1, "probabilities": [1.0]}]}, "does not hold one probability for each", "half an answer"),
    (
        {"architecture": "resnet"},
        r"architecture 'resnet' is unknown; name one of \['compact_valid', 'googlenet', 'inception_valid'\]",
        "no code",
    ),
    ({"architecture_args": {"depth": 3}}, r"'inception_valid' cannot be built with \{'depth': 3\}", "no such argument"),
    (
        {"architecture": "googlenet", "architecture_args": {"dropout": 0.2}},
        "the weights do not fit googlenet with 2 classes",
        "other layers",
    ),
    ({"class_names": ["a", "b", "tumour"], "probe": []}, "do not fit inception_valid with 3 classes", "other head"),
    ({"window_px": 32, "input_px": 32}, "the model does not run on 3 windows of 32 px", "smaller than the network"),
]


@pytest.mark.parametrize(("changes", "message", "_reason"), CARD_FAULTS, ids=[reason for *_, reason in CARD_FAULTS])
def test_a_faulty_card_is_refused_by_name(card: Path, changes: dict[str, Any], message: str, _reason: str) -> None:
    """Every error is one line with key, value and file."""
    with pytest.raises(InputError, match=message) as caught:
        model.load(edit(card, **changes))
    assert "tiny." in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, r"the model card cannot be read \(No such file or directory\)"),
        (b"{", "the model card is not JSON: Expecting property name"),
        (b"[1]", "the model card is a JSON list, not an object"),
        (b"\xff\xfe", "the model card is not UTF-8 text: invalid start byte at byte 0"),
        (b"[" * 500_000, "the model card is not JSON: "),
        (b" " * 1_000_001, "the model card has more than 1000000 bytes"),
    ],
)
def test_a_file_that_is_no_card_is_refused(tmp_path: Path, data: bytes | None, message: str) -> None:
    """Missing, broken, foreign and oversized files have different messages."""
    path = tmp_path / "card.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_card(spec(path))


def test_a_packaged_card_lies_beside_the_code() -> None:
    """``pkg:`` means the weights folder of wsiflow.model, wherever it is installed."""
    folder = Path(model.__file__).parent / "weights"
    assert card_path(spec(Path("pkg:some.json"))) == folder / "some.json"
    assert card_path(spec(Path("some.json"))) == Path("some.json").absolute()


def test_weights_that_hash_to_something_else_are_refused(card: Path) -> None:
    """The message has the card, the expected hash and the actual one."""
    expected = read_card(spec(card)).sha256
    weights = card.parent / "tiny.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match=f"the weights have SHA-256 [0-9a-f]{{64}}, but tiny.json expects {expected}"):
        model.load(spec(card))


def test_missing_weights_are_named(card: Path) -> None:
    """The message names the missing file."""
    (card.parent / "tiny.safetensors").unlink()
    with pytest.raises(InputError, match=r"tiny\.safetensors: the weights cannot be read \(No such file"):
        model.load(spec(card))


def test_a_pinned_hash_must_be_the_cards(card: Path) -> None:
    """A wrong pinned hash is refused; the right one changes nothing."""
    right = read_card(spec(card)).sha256
    assert model.load(spec(card, sha256=right)).sha256 == right
    with pytest.raises(InputError, match=f"the card has sha256 {right}, but the configuration pins {'0' * 64}"):
        model.load(spec(card, sha256="0" * 64))


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 10_000_000_000) + b"{}",
        struct.pack("<Q", 2) + b"{}trailing",
        b"\x80\x04\x95pickle",
        b"",
        b"PK\x03\x04 a zip, as torch.save writes",
    ],
    ids=["10 GB header", "bytes nobody owns", "pickle", "empty", "zip"],
)
def test_hostile_weights_are_refused(card: Path, data: bytes) -> None:
    """A matching hash in the card does not make them weights, and of a pickle only weights are read."""
    with pytest.raises(
        InputError, match=r"not a safetensors file|more than weights|damaged or not one of weights|is empty"
    ):
        model.load(reseal(card, data))


def test_overlapping_tensors_are_refused(card: Path) -> None:
    """Two tensors must not share their bytes."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    with pytest.raises(InputError, match="not a safetensors file"):
        model.load(reseal(card, struct.pack("<Q", len(header)) + header + b"\0" * 4))


def test_weights_that_are_not_finite_are_refused(card: Path) -> None:
    """NaN would become a decision."""
    tensors = safetensors.torch.load((card.parent / "tiny.safetensors").read_bytes())
    tensors["classify.bias"][1] = float("nan")
    with pytest.raises(InputError, match=r"weight classify\.bias is not finite"):
        model.load(reseal(card, safetensors.torch.save(tensors)))


@pytest.mark.parametrize(
    "changes",
    [
        {"mean": [0.5, 0.5, 0.5]},
        {"mean": [0.7, 0.5, 0.72]},
        {"std": [0.22, 0.2, 0.2]},
        {"input_px": 240},
    ],
    ids=["other mean", "slightly other mean", "other std", "resized"],
)
def test_other_preprocessing_fails_the_probe(card: Path, changes: dict[str, Any]) -> None:
    """A card with another preprocessing than in training is refused before the first window."""
    with pytest.raises(InputError, match=r"probe \d+ gives .*, at most 0.0001 is allowed"):
        model.load(edit(card, **changes))


def test_swapped_outputs_fail_the_probe(card: Path) -> None:
    """Weights with swapped outputs are refused, even if the hash matches."""
    tensors = safetensors.torch.load((card.parent / "tiny.safetensors").read_bytes())
    swapped = {key: tensor.flip(0) if key.startswith("classify") else tensor for key, tensor in tensors.items()}
    with pytest.raises(InputError, match=r"probe \d+ gives"):
        model.load(reseal(card, safetensors.torch.save(swapped)))


def test_a_run_may_map_another_class(card: Path) -> None:
    """With two classes the probability of the other one is the complement."""
    tumour, normal = model.load(spec(card)), model.load(spec(card, positive_class="normal"))
    np.testing.assert_allclose(predict(tumour, windows(3, 224)) + predict(normal, windows(3, 224)), 1, atol=1e-6)
    assert tumour.identity != normal.identity
    with pytest.raises(InputError, match=r"model\.positive_class 'stroma' is not one of \['normal', 'tumour'\]"):
        model.load(spec(card, positive_class="stroma"))


def test_a_run_may_map_further_classes(card: Path) -> None:
    """The positive class is the score already; settings without further classes are written as they always were."""
    every = spec(card, maps="all")
    assert model.load(every).outputs.maps == (0,)
    assert model.load(spec(card, maps=("tumour",))).outputs.maps == ()
    assert model.load(spec(card, maps="normal", positive_class=("normal", "tumour"))).outputs.maps == (0,)
    assert "maps" not in spec(card).model_dump()
    assert every.model_dump()["maps"] == "all"
    with pytest.raises(
        InputError, match=r"'Tumor', which is not one of \['normal', 'tumour'\] \(did you mean tumour\?\)"
    ):
        read_card(spec(card, maps=("Tumor",)))


def test_identity_follows_what_can_change_a_number(card: Path) -> None:
    """Notes and licence do not change the identity; preprocessing and weights do."""
    before = read_card(spec(card))
    same = before.model_copy(update={"notes": "better words", "licence": "MIT", "name": "renamed"})
    assert identity(same) == identity(before)
    for change in ({"mean": (0.7, 0.5, 0.71)}, {"sha256": "0" * 64}, {"spacing_um_px": 0.5}, {"input_px": 240}):
        assert identity(before.model_copy(update=change)) != identity(before)
    larger = before.model_copy(update={"window_px": 448})
    assert identity(larger.model_copy(update={"resize": "pillow"})) != identity(larger)


@pytest.mark.parametrize(
    "given",
    [np.zeros((1, 200, 200, 3), np.uint8), np.zeros((1, 224, 224, 3), np.float32), np.zeros((224, 224, 3), np.uint8)],
    ids=["small", "float", "no batch axis"],
)
def test_windows_of_another_form_are_refused(card: Path, given: np.ndarray) -> None:
    """The message has the given and the expected shape and dtype."""
    with pytest.raises(InputError, match=r"the model takes uint8 \(n, 224, 224, 3\)"):
        predict(model.load(spec(card)), given)


class _Overflow(nn.Module):
    """A module that returns NaN for windows that begin with a black pixel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = x[:, :, 0, 0].sum(dim=1)
        return torch.stack([start, torch.where(start > 0, start, torch.nan)], dim=1)


def test_a_probability_that_is_not_finite_names_its_window(card: Path) -> None:
    """NaN is an error of the model, never a score."""
    plain = read_card(spec(card)).model_copy(update={"mean": (0.0, 0.0, 0.0)})
    images = np.full((4, 224, 224, 3), 255, np.uint8)
    images[2] = 0
    with pytest.raises(InputError, match="no finite probability for window 2 of 4"):
        predict(as_classifier(_Overflow(), plain), images)


def test_the_answer_does_not_depend_on_the_batch(card: Path) -> None:
    """One by one or together, probabilities agree to 1e-6, since nothing is averaged over a batch."""
    classifier = model.load(spec(card))
    together = predict(classifier, windows(9, 224))
    alone = np.concatenate([predict(classifier, window[None]) for window in windows(9, 224)])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_normalisation_is_that_of_the_card(card: Path) -> None:
    """The result is (x / 255 - mean) / std, red first."""
    classifier = model.load(spec(card))
    image = windows(1, 224)
    expected = (image[0].astype(np.float64) / 255 - np.array(classifier.mean)) / np.array(classifier.std)
    np.testing.assert_allclose(normalise(classifier, image)[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_resizing_follows_pillow(card: Path) -> None:
    """The resized input is that of torchvision's Resize to within one grey level."""
    shrunk = as_classifier(
        nn.Identity(), read_card(spec(card)).model_copy(update={"input_px": 96, "mean": (0.0,) * 3, "std": (1.0,) * 3})
    )
    image = windows(1, 224)[0]
    expected = np.asarray(Image.fromarray(image).resize((96, 96), Image.Resampling.BILINEAR), np.float32)
    found = normalise(shrunk, image[None])[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(found - expected).max() < 1.01


@given(st.integers(0, 2**64 - 1), st.integers(14, 64))
def test_probe_images_are_fixed_by_their_seed(seed: int, side: int) -> None:
    """The same seed gives the same image with the requested side."""
    image = probe_image(seed, side)
    assert (image.shape, image.dtype) == ((side, side, 3), np.uint8)
    np.testing.assert_array_equal(image, probe_image(seed, side))


def test_the_probe_of_seed_zero_never_changes() -> None:
    """Existing cards depend on these bytes."""
    corner = [[[83, 138, 121], [159, 127, 74]], [[195, 63, 84], [92, 141, 105]]]
    assert probe_image(0, 14)[:2, :2].tolist() == corner


# WSInfer's format.

WSINFER = {
    "spec_version": "1.0",
    "architecture": "tiny",
    "num_classes": 2,
    "class_names": ["Other", "Tumor"],
    "patch_size_pixels": 64,
    "spacing_um_px": 0.5,
    "transform": [
        {"name": "Resize", "arguments": {"size": 32}},
        {"name": "ToTensor"},
        {"name": "Normalize", "arguments": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}},
    ],
}


@pytest.fixture
def wsinfer(tmp_path: Path) -> tuple[Path, str]:
    """Return a model in WSInfer's format: the path of its JSON and the hash of its TorchScript file."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    program = tmp_path / "torchscript_model.pt"
    torch.jit.trace(network.eval(), torch.zeros(1, 3, 32, 32)).save(str(program))
    (tmp_path / "config.json").write_text(json.dumps(WSINFER))
    return tmp_path / "config.json", hashlib.sha256(program.read_bytes()).hexdigest()


@pytest.mark.parametrize("trust", [{}, {"trust_torchscript": True}, {"sha256": "right"}], ids=["none", "word", "hash"])
def test_torchscript_is_refused_without_trust_and_hash(wsinfer: tuple[Path, str], trust: dict[str, Any]) -> None:
    """A program needs both, and the message names the settings."""
    path, sha256 = wsinfer
    trust = {key: sha256 if value == "right" else value for key, value in trust.items()}
    with pytest.raises(InputError, match=r"set model\.trust_torchscript=true and model\.sha256=<its SHA-256>"):
        model.load(spec(path, positive_class="Tumor", **trust))


def test_torchscript_with_another_hash_is_refused(wsinfer: tuple[Path, str]) -> None:
    """The hash makes bytes trusted, not a file name."""
    path, sha256 = wsinfer
    with pytest.raises(InputError, match=f"the weights have SHA-256 {sha256}, but config.json expects {'0' * 64}"):
        model.load(spec(path, positive_class="Tumor", trust_torchscript=True, sha256="0" * 64))


def test_trusted_torchscript_gives_the_numbers_of_its_program(wsinfer: tuple[Path, str]) -> None:
    """Resizing, scaling, normalising and softmax are those of Pillow and the program itself."""
    path, sha256 = wsinfer
    classifier = model.load(spec(path, positive_class="Tumor", trust_torchscript=True, sha256=sha256))
    image = probe_image(5, 64)
    small = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR), np.float32)
    inputs = torch.from_numpy((small / 255 - 0.5) / 0.25).permute(2, 0, 1)[None]
    expected = torch.softmax(torch.jit.load(str(path.parent / "torchscript_model.pt"))(inputs), 1)[0, 1]
    assert (classifier.window_px, classifier.input_px, classifier.spacing_um_px) == (64, 32, 0.5)
    assert abs(float(predict(classifier, image[None])[0]) - float(expected)) < 1e-6


def test_a_frozen_program_loads(wsinfer: tuple[Path, str]) -> None:
    """WSInfer's own converter freezes the traced network, so that it has no parameters."""
    path, _ = wsinfer
    program = path.parent / "torchscript_model.pt"
    torch.jit.freeze(torch.jit.load(str(program))).save(str(program))
    sha256 = hashlib.sha256(program.read_bytes()).hexdigest()
    trusted = spec(path, positive_class="Tumor", trust_torchscript=True, sha256=sha256)
    assert 0 < predict(model.load(trusted), probe_image(5, 64)[None])[0] < 1


def test_a_file_that_is_no_program_is_refused(wsinfer: tuple[Path, str]) -> None:
    """A pickle with a matching hash is refused, since it is not TorchScript."""
    path, _ = wsinfer
    data = b"\x80\x04\x95 pickle"
    (path.parent / "torchscript_model.pt").write_bytes(data)
    trusted = spec(path, positive_class="Tumor", trust_torchscript=True, sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(InputError, match="the file is not TorchScript"):
        model.load(trusted)


WSINFER_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"class_names": ["Other"]}, r"num_classes is 2, but class_names are \['Other'\]"),
    ({"num_classes": 1}, "num_classes: Input should be greater than or equal to 2"),
    ({"patch_size_pixels": "350"}, "patch_size_pixels: Input should be a valid integer"),
    ({"transform": [{"name": "ColorJitter"}]}, "transform.0.name: Input should be 'Resize', 'ToTensor' or 'Normalize'"),
    ({"transform": [{"name": "ToTensor"}, {"name": "Resize", "arguments": {"size": 32}}]}, "steps in this order"),
    ({"transform": []}, "only these steps in this order"),
    (
        {
            "transform": [
                {"name": "Resize", "arguments": {"size": 32, "interpolation": "nearest"}},
                {"name": "ToTensor"},
            ]
        },
        "only these steps in this order",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WSINFER_FAULTS)
def test_a_faulty_wsinfer_json_is_refused(wsinfer: tuple[Path, str], changes: dict[str, Any], message: str) -> None:
    """A preprocessing that cannot be reproduced exactly is refused."""
    path, sha256 = wsinfer
    path.write_text(json.dumps(WSINFER | changes))
    with pytest.raises(InputError, match=message):
        read_card(spec(path, positive_class="Tumor", trust_torchscript=True, sha256=sha256))


def test_wsinfer_needs_a_positive_class(wsinfer: tuple[Path, str]) -> None:
    """WSInfer maps every class; a run maps one, which must be set."""
    path, sha256 = wsinfer
    with pytest.raises(InputError, match=r"which of \['Other', 'Tumor'\] is the positive class; set model"):
        read_card(spec(path, trust_torchscript=True, sha256=sha256))


def test_a_wrong_number_of_outputs_is_refused(wsinfer: tuple[Path, str]) -> None:
    """A program with two outputs does not fit a card with three classes."""
    path, sha256 = wsinfer
    path.write_text(json.dumps(WSINFER | {"num_classes": 3, "class_names": ["a", "b", "c"]}))
    with pytest.raises(InputError, match=r"the model returns an array of shape \(4, 2\) for 4 windows"):
        model.load(spec(path, positive_class="a", trust_torchscript=True, sha256=sha256))
