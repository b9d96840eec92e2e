"""A trained network becomes a card: weights of every kind, and what is refused with which message."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import spec, windows, with_statistics
from torch import nn

from wsiflow import model
from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.model.add import add, from_module, recognise
from wsiflow.model.architectures import zoo
from wsiflow.model.architectures.registry import build
from wsiflow.model.card import read_card
from wsiflow.model.classifier import predict, probabilities

ARCHITECTURE = {"architecture": "compact_valid", "architecture_args": {"width": 0.5, "dropout": 0.2}}
FIELDS: dict[str, Any] = {
    "name": "mine",
    "class_names": ["normal", "tumour"],
    "positive_class": "tumour",
    "window_px": 96,
    "input_px": 96,
    "spacing_um_px": 0.5,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
}
NETS = """
from torch import nn
def build(width):
    return nn.Sequential(nn.Conv2d(3, width, 8, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2))
"""


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(build("compact_valid", 2, width=0.5, dropout=0.2), 96)


def expected(network: nn.Module) -> np.ndarray:
    inputs = (torch.from_numpy(windows(3, 96)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.no_grad():
        return torch.softmax(network(inputs), 1)[:, 1].numpy()


def added(content: Any, tmp_path: Path, **changes: Any) -> Path:
    """Save something with ``torch.save``, and add it."""
    torch.save(content, tmp_path / "weights.pth")
    return add(recognise(tmp_path / "weights.pth"), FIELDS | ARCHITECTURE | changes, tmp_path / "models")


CHECKPOINTS: dict[str, Any] = {
    "state dict": lambda state: state,
    "several GPUs": lambda state: {f"module.{name}": value for name, value in state.items()},
    "Lightning": lambda state: {
        "epoch": 3,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {f"model.{name}": value for name, value in state.items()} | {"loss.weight": torch.ones(2)},
        "hyper_parameters": {"lr": 1e-3},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.1}]}],
    },
    "fastai": lambda state: {"model": state, "opt": {"state": [], "hypers": []}},
    "a script's own": lambda state: {
        "net": {f"net.module.{name}": value for name, value in state.items()},
        "best": 0.9,
    },
    "half precision": lambda state: {
        name: value.half() if value.is_floating_point() else value for name, value in state.items()
    },
    "bfloat16": lambda state: {
        name: value.bfloat16() if value.is_floating_point() else value for name, value in state.items()
    },
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_of_every_kind_are_read(kind: str, network: nn.Module, tmp_path: Path) -> None:
    """The card that is written loads, and its weights are safetensors."""
    card = added(CHECKPOINTS[kind](network.state_dict()), tmp_path)
    assert json.loads(card.read_text())["weights"] == "mine.safetensors"
    found = predict(model.load(spec(card)), windows(3, 96))
    tolerances = {"half precision": 2e-3, "bfloat16": 2e-2}
    np.testing.assert_allclose(found, expected(network), atol=tolerances.get(kind, 1e-6))
    assert len(read_card(spec(card)).probe) == 3


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (
            lambda net: {"state_dict": net.state_dict(), "hook": _Code()},
            {},
            "more than weights .*could run any code.*state_dict",
        ),
        (lambda net: net, {}, "more than weights .*could run any code; save the weights alone"),
        (lambda _: [1, 2], {}, "holds a list without weights"),
        (
            lambda net: net.state_dict(),
            {"output_name": "logit"},
            "one output without a name, and output_name is 'logit'",
        ),
        (
            lambda net: net.state_dict(),
            {"architecture": "googlenet", "architecture_args": {"dropout": 0.5}},
            "are missing .*, and the file has ",
        ),
        (
            lambda net: net.state_dict(),
            {"class_names": ["a", "b", "tumour"]},
            r"classify.weight is \[2, \d+\] in the file and \[3, ",
        ),
        (
            lambda net: net.state_dict() | {"other.weight": torch.ones(1)},
            {},
            "1 weights have no place in the network .other.weight",
        ),
        (
            lambda net: net.state_dict() | {"classify.bias": torch.full((2,), torch.nan)},
            {},
            "weight classify.bias is not finite",
        ),
        (
            lambda net: net.state_dict(),
            {"architecture": "timm:resnet18"},
            "timm cannot be used: .*zoo|are missing|cannot be built",
        ),
        (lambda net: net.state_dict(), {"spacing_um_px": 0, "std": [1, 1]}, r"spacing_um_px: .*; std.*these keys"),
    ],
    ids=[
        "code",
        "a network",
        "a list",
        "no such output",
        "another network",
        "three classes",
        "too many",
        "NaN",
        "timm",
        "two faults",
    ],
)
def test_what_is_refused(
    content: Any,
    changes: dict[str, Any],
    message: str,
    network: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line with the cause and the remedy, nothing is run, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((InputError, EnvironmentFault), match=message) as refused:
        added(content(network), tmp_path, **changes)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "models").exists()


def test_a_truncated_file_is_refused(network: nn.Module, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "whole.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    with pytest.raises(InputError, match="damaged"):
        add(recognise(tmp_path / "half.pth"), FIELDS | ARCHITECTURE, tmp_path / "models")
    (tmp_path / "half.pt2").write_bytes((tmp_path / "half.pth").read_bytes())
    with pytest.raises(InputError, match=r"not a whole archive of torch\.export"):
        add(recognise(tmp_path / "half.pt2"), FIELDS, tmp_path / "models")


def _zip(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "0")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "pointer of Git LFS .*git lfs pull"),
        ("a.safetensors", b"<!DOCTYPE html><html>404</html>", "a web page; fetch the file again"),
        ("a.h5", b"\x89HDF\r\n\x1a\n", r"HDF5, as Keras writes it; export the network as ONNX .*model\.export"),
        ("a.tflite", b"\x1c\0\0\0TFL3", "TensorFlow Lite; export the network as ONNX"),
        ("a.keras", ("metadata.json", "model.weights.h5"), "a network of Keras; export the network as ONNX"),
        ("a.npz", ("a.npy", "b.npy"), r"arrays of NumPy; save the tensors with safetensors"),
        ("a.zip", ("readme.txt",), "a zip archive without weights of PyTorch; unpack it"),
        ("saved/saved_model.pb", b"\x08", r"a network of TensorFlow; .*tf2onnx.* --saved-model saved"),
    ],
)
def test_what_holds_no_model_is_named(name: str, content: Any, message: str, tmp_path: Path) -> None:
    """It is said what the file is, and not that it may be dangerous."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        _zip(path, *content)
    with pytest.raises(InputError, match=message):
        recognise(path if path.parent == tmp_path else path.parent)


def test_one_output_is_a_sigmoid_that_has_to_be_said(tmp_path: Path) -> None:
    """Weights of one output do not fit two classes, and the message says what they are."""
    one = build("compact_valid", 1, width=0.5, dropout=0.2)
    with pytest.raises(InputError, match="it has one output, of the second class: say that it is a sigmoid"):
        added(one.state_dict(), tmp_path)
    assert added(one.state_dict(), tmp_path, output="sigmoid").is_file()


def test_a_function_builds_the_network_where_it_is_trusted(tmp_path: Path) -> None:
    """Its source is part of the model: it is copied beside the card, and a change of it is refused."""
    (tmp_path / "nets.py").write_text(NETS)
    scope: dict[str, Any] = {}
    exec(NETS, scope)
    network = scope["build"](6)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    changes = {"architecture": "python:nets.py:build", "architecture_args": {"width": 6}}
    card = add(recognise(tmp_path / "weights.pth"), FIELDS | changes, tmp_path / "models")
    with pytest.raises(InputError, match=r"set model\.trust_python=true"):
        model.load(spec(card))
    found = predict(model.load(spec(card, trust_python=True)), windows(3, 96))
    np.testing.assert_allclose(found, expected(network.eval()), atol=1e-6)
    (tmp_path / "models/nets.py").write_text(NETS + "# changed\n")
    with pytest.raises(InputError, match=r"source of nets\.py:build has SHA-256 \w+, but the card expects"):
        model.load(spec(card, trust_python=True))


def test_a_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra that installs it, and where the build without GPUs is."""

    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(zoo.importlib, "import_module", absent)
    for name in ("timm:resnet18", "torchvision:densenet121"):
        with pytest.raises(EnvironmentFault, match=r"pip install 'wsiflow\[zoo\]'"):
            build(name, 2)


def test_a_module_of_a_notebook_is_a_classifier_and_a_card(network: nn.Module, tmp_path: Path) -> None:
    """What is written loads with the same answers, and needs no code of the notebook."""
    about: dict[str, Any] = {
        "classes": ["normal", "tumour"],
        "window": 96,
        "spacing": 0.5,
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
    }
    classifier = from_module(network, **about)
    np.testing.assert_allclose(predict(classifier, windows(3, 96)), expected(network), atol=1e-6)
    from_module(network, **about, name="noted", folder=tmp_path)
    again = model.load(spec(tmp_path / "noted.json"))
    np.testing.assert_allclose(predict(again, windows(3, 96)), expected(network), atol=1e-6)
    assert again.sha256 == hashlib.sha256((tmp_path / "noted.pt2").read_bytes()).hexdigest()


class _Several(nn.Module):
    """A network that returns a dictionary."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.network(x)
        return {"features": x.mean((2, 3)), "logits": logits}


def test_one_of_several_outputs_is_named(network: nn.Module, tmp_path: Path) -> None:
    """Without a name the message lists them."""
    program = torch.jit.trace(_Several(network), torch.zeros(2, 3, 96, 96), strict=False)
    program.save(str(tmp_path / "program.pt"))
    source = recognise(tmp_path / "program.pt")
    assert source.architecture == "torchscript"
    with pytest.raises(InputError, match=r"2 outputs \(features \(2, 3\), logits \(2, 2\)\).*output_name in the card"):
        add(source, FIELDS, tmp_path / "models")
    card = add(source, FIELDS | {"output_name": "logits"}, tmp_path / "models")
    loaded = model.load(spec(card, trust_torchscript=True, sha256=read_sha(card)))
    np.testing.assert_allclose(probabilities(loaded, windows(3, 96))[:, 1], expected(network), atol=1e-5)


def read_sha(card: Path) -> str:
    return str(json.loads(card.read_text())["sha256"])
