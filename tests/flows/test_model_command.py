"""``wsiflow model``: from a file of weights to a run, on the command line."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import spec, with_statistics
from small_runs import over, wsiflow

from flows import cli
from wsiflow.model.architectures.registry import build
from wsiflow.model.card import read_card
from wsiflow.model.classifier import load, predict, probe_image

ABOUT = ["--architecture", "compact_valid", "--args", "width=0.5,dropout=0.2", "--window", "96", "--stride", "8"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small network, as a training script leaves them."""
    torch.manual_seed(0)
    network = with_statistics(build("compact_valid", 2, width=0.5, dropout=0.2), 96)
    path = tmp_path_factory.mktemp("trained") / "best.pth"
    torch.save({"state_dict": network.state_dict(), "epoch": 7}, path)
    return path


def test_weights_become_a_heatmap(
    weights: Path, tiny_slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`add` says what dense inference will do, `list` shows the model, and a run uses it."""
    models = tmp_path / "models"
    options = ["--classes", "normal,tumor", "--spacing", "0.243", "--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2"]
    assert cli.main(["model", "add", str(weights), *ABOUT, *options, "--to", str(models)]) == 0
    said = capsys.readouterr().out
    assert f"card     {models / 'best.json'}\n" in said
    assert "dense    a score every 8 px; scores are exact\n" in said
    assert "times fewer multiplications at stride 8" in said
    assert cli.main(["model", "list", str(models)]) == 0
    listed = capsys.readouterr().out
    assert "pkg:demo.json" in listed
    assert "compact_valid            96 px at 0.243 um/px: normal, tumor" in listed
    out = tmp_path / "run"
    assert wsiflow(*over(tiny_slides, out, "model=card", f"model.card={models / 'best.json'}")) == 0
    with (out / "process_list.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 2
    assert (out / "heatmaps/a.tif").exists()


def test_what_is_missing_is_named_at_once(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nobody can be asked; a file of weights alone needs its architecture."""
    assert cli.main(["model", "add", str(weights)]) == 20
    error = capsys.readouterr().err
    assert "classes and window and spacing and mean and std of the model are not known; give --classes" in error
    options = ["--classes", "a,b", "--window", "96", "--spacing", "0.5", "--mean", "0,0,0", "--std", "1,1,1"]
    assert cli.main(["model", "add", str(weights), *options]) == 20
    assert "give --architecture timm:NAME, torchvision:NAME or python:MODULE:FUNCTION" in capsys.readouterr().err
    assert cli.main(["model", "add", str(weights), *options, "--std", "1,1"]) == 20
    assert "--std is '1,1'; give three numbers" in capsys.readouterr().err
    assert cli.main(["model", "add", str(weights), *options, "--args", "width"]) == 20
    assert "--args is 'width'; give name=value" in capsys.readouterr().err
    assert cli.main(["model", "add", str(weights), *ABOUT, *options, "--window", "32"]) == 20
    assert "does not run on 4 windows of 32 px" in capsys.readouterr().err


def test_a_whole_network_is_not_taken_for_weights_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody is asked for an architecture that would not help."""
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pth")
    options = ["--classes", "a,b", "--window", "96", "--spacing", "0.5", "--mean", "0,0,0", "--std", "1,1,1"]
    assert cli.main(["model", "add", str(tmp_path / "whole.pth"), *options]) == 20
    assert "which could run any code; save the weights alone: torch.save(model.state_dict(), file)" in (
        capsys.readouterr().err
    )


def test_a_file_may_have_any_name(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That of the model is made of the characters that it may have."""
    path = tmp_path / "best model (1).pth"
    path.write_bytes(weights.read_bytes())
    options = ["--classes", "a,b", "--spacing", "0.5", "--mean", "0,0,0", "--std", "1,1,1", "--to", str(tmp_path)]
    assert cli.main(["model", "add", str(path), *ABOUT, *options]) == 0
    assert f"card     {tmp_path / 'best_model_1.json'}\n" in capsys.readouterr().out


def test_windows_are_resized_as_the_card_says(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The card has how, where windows are resized; dense inference says which card would need no resizing."""
    options = ["--classes", "a,b", "--spacing", "0.25", "--mean", "0,0,0", "--std", "1,1,1", "--to", str(tmp_path)]
    line = ["model", "add", str(weights), *ABOUT, *options, "--resize", "pillow", "--window"]
    assert cli.main([*line, "96"]) == 20
    assert "--resize is pillow, but windows of 96 px are not resized; give --input" in capsys.readouterr().err
    assert cli.main([*line, "192", "--input", "96"]) == 0
    assert read_card(spec(tmp_path / "best.json")).resize == "pillow"
    said = capsys.readouterr().out
    assert "windows  the model resizes windows of 192 px to 96 px, each by itself; a card with window_px 96" in said
    assert "at a spacing of 0.5 um/px" in said


def test_on_a_terminal_it_asks(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty answer takes the usual value."""
    controller, terminal = os.openpty()
    with os.fdopen(terminal) as keyboard:
        monkeypatch.setattr("sys.stdin", keyboard)
        os.write(controller, b"normal,tumor\n\n\n\n")
        assert cli.main(["model", "add", str(weights), *ABOUT, "--to", str(tmp_path), "--name", "asked"]) == 0
    os.close(controller)
    assert "spacing [0.5]: " in capsys.readouterr().out
    assert '"spacing_um_px": 0.5' in (tmp_path / "asked.json").read_text()
    with Path(os.devnull).open() as nobody:
        monkeypatch.setattr("sys.stdin", nobody)
        monkeypatch.setattr(nobody, "isatty", lambda: True, raising=False)
        assert cli.main(["model", "add", str(weights), *ABOUT, "--to", str(tmp_path)]) == 20
    assert "the questions were not answered" in capsys.readouterr().err


def test_a_program_that_is_code_is_listed_and_a_broken_card_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To read a card runs nothing of its model."""
    card = {"name": "t", "architecture": "torchscript", "class_names": ["a", "b"], "positive_class": "b"}
    card |= {"window_px": 32, "input_px": 32, "spacing_um_px": 1, "mean": [0, 0, 0], "std": [1, 1, 1]}
    card |= {"weights": "t.pt", "sha256": "0" * 64}
    (tmp_path / "code.json").write_text(json.dumps(card))
    (tmp_path / "broken.json").write_text(json.dumps({**card, "std": [1, 1]}))
    (tmp_path / "other.json").write_text("[1]")
    assert cli.main(["model", "list", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert "torchscript              32 px at 1 um/px: a, b" in listed
    assert "broken.json" in listed
    assert "cannot be used: model card: std" in listed
    assert "cannot be used: the model card is a JSON list" in listed


def test_patches_tell_whether_a_card_fits(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Patches that the model itself has labelled fit; with swapped names it says so."""
    options = ["--spacing", "0.5", "--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2", "--to", str(tmp_path)]
    for name, classes in (("right", "normal,tumor"), ("swapped", "tumor,normal")):
        line = ["model", "add", str(weights), *ABOUT, *options, "--classes", classes, "--name", name]
        assert cli.main(line) == 0
    images = np.stack([probe_image(seed, 96) for seed in range(60)])
    scores = predict(load(spec(tmp_path / "right.json")), images)
    for name, chosen in (("normal", np.argsort(scores)[:8]), ("tumor", np.argsort(scores)[-8:])):
        (tmp_path / "patches" / name).mkdir(parents=True)
        for index in chosen:
            Image.fromarray(images[index]).save(tmp_path / "patches" / name / f"{index}.png")
    capsys.readouterr()
    assert cli.main(["model", "check", str(tmp_path / "right.json"), "--patches", str(tmp_path / "patches")]) == 0
    assert "of 16 patches right" in capsys.readouterr().out
    assert cli.main(["model", "check", str(tmp_path / "swapped.json"), "--patches", str(tmp_path / "patches")]) == 20
    assert "The card does not fit. It would if the classes tumor and normal are swapped: by " in capsys.readouterr().out
