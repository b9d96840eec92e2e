"""A heatmap per class from one pass of the network: a run with three classes against single windows, and its files."""

import json
from pathlib import Path

import numpy as np
import openslide
import pytest
import torch
from small_models import with_statistics
from small_runs import digests, over, rows, wsiflow

from flows import cli
from wsiflow.heatmap.files import read_heatmap
from wsiflow.model.architectures.registry import build
from wsiflow.model.save import save
from wsiflow.run.plan import latest_plan
from wsiflow.run.stages.stitch import class_stems

MEAN, STD = (0.7, 0.5, 0.7), (0.2, 0.25, 0.2)
CLASSES = ("normal", "tumor", "in situ")
WINDOW = 96
STRIDE = 56


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The card of a small network with three classes, which does not pad."""
    torch.manual_seed(5)
    network = with_statistics(build("compact_valid", 3, width=0.25, dropout=0.0), WINDOW)
    fields = {
        "name": "three",
        "architecture": "compact_valid",
        "architecture_args": {"width": 0.25, "dropout": 0.0},
        "class_names": CLASSES,
        "positive_class": "tumor",
        "window_px": WINDOW,
        "input_px": WINDOW,
        "spacing_um_px": 0.243,
        "mean": MEAN,
        "std": STD,
    }
    return save(network, fields, tmp_path_factory.mktemp("three"))


def start(slides: Path, out: Path, card: Path, *more: str) -> int:
    few = [f"inference.stride={STRIDE}", "dense.windows=8", "inference.backend=torch", "evaluation.bootstrap=0"]
    return wsiflow(*over(slides, out, "model=card", f"model.card={card}", *few, *more))


@pytest.fixture(scope="module")
def plain(tiny_slides: Path, card: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without further classes."""
    out = tmp_path_factory.mktemp("plain") / "run"
    assert start(tiny_slides, out, card) == 0
    return out


@pytest.fixture(scope="module")
def mapped(tiny_slides: Path, card: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run with two further classes; the positive one is named too."""
    out = tmp_path_factory.mktemp("mapped") / "run"
    assert start(tiny_slides, out, card, "model.maps=all") == 0
    return out


def alone(card: Path, slide: Path, corners: np.ndarray) -> np.ndarray:
    """Return the probabilities of the windows with these corners (x, y), each run alone: float32 (n, 3)."""
    from safetensors.torch import load_file

    network = build("compact_valid", 3, width=0.25, dropout=0.0)
    network.load_state_dict(load_file(card.with_suffix(".safetensors")))
    network.eval()
    found = []
    with openslide.OpenSlide(slide) as opened, torch.inference_mode():
        for corner in corners.tolist():
            pixels = np.array(opened.read_region(corner, 0, (WINDOW, WINDOW)))[..., :3]
            x = (pixels / 255 - np.array(MEAN)) / np.array(STD)
            logits = network(torch.tensor(x.astype(np.float32)).permute(2, 0, 1)[None])[0].double()
            found.append((logits.exp() / logits.exp().sum()).numpy())
    return np.array(found)


def maps_of(out: Path, slide: str) -> list[np.ndarray]:
    """Return the maps of a slide in the order of `CLASSES`."""
    names = (f"maps/{slide}.normal.tif", f"heatmaps/{slide}.tif", f"maps/{slide}.in_situ.tif")
    return [read_heatmap(out / name)[0] for name in names]


@pytest.mark.parametrize("slide", ["a", "b"])
def test_each_class_has_the_scores_of_its_windows(tiny_slides: Path, card: Path, mapped: Path, slide: str) -> None:
    """Every cell of each map is the probability of its class for the window around the cell, run alone."""
    maps = maps_of(mapped, slide)
    frame = next(one.frame for one in latest_plan(mapped).slides if one.slide_id == slide)
    cells = np.argwhere(np.isfinite(maps[0]))
    first = np.array([frame.t_row0, frame.t_col0]) * frame.tile_px
    corners = (cells * STRIDE + first + STRIDE // 2 - WINDOW // 2)[:, ::-1]
    inside = (corners >= 0).all(axis=1) & (corners + WINDOW <= (600, 500)).all(axis=1)
    assert inside.sum() > 20
    expected = alone(card, tiny_slides.parent / f"{slide}.tif", corners[inside])
    assert np.ptp(expected, axis=0).min() > 0.01, "the classes differ from window to window"
    for heat, one in zip(maps, expected.T, strict=True):
        assert np.array_equal(np.isnan(heat), np.isnan(maps[0]))
        np.testing.assert_allclose(heat[tuple(cells[inside].T)], one, atol=2e-6)


def test_the_positive_score_stays_what_it_is(plain: Path, mapped: Path) -> None:
    """Heatmap, detections and pictures are those of a run without further classes, and so are the scores."""
    for slide in ("a", "b"):
        assert maps_of(mapped, slide)[1].tobytes() == read_heatmap(plain / f"heatmaps/{slide}.tif")[0].tobytes()
    before, after = digests(plain), digests(mapped)
    folders = ("heatmaps/a.p", "heatmaps/b.p", "detections/", "tissue/", "cuts/", "evaluation/cases", "evaluation/froc")
    same = [name for name in before if name.startswith(folders)]
    assert len(same) > 12
    assert [after[name] for name in same] == [before[name] for name in same]
    assert {name for name in after if name.startswith("maps/")} == {
        f"maps/{slide}.{stem}.tif" for slide in "ab" for stem in ("in_situ", "normal")
    }
    assert "maps" not in (plain / "plan.json").read_text() + (plain / "config.yaml").read_text()


def test_certificates_cover_the_further_classes(mapped: Path) -> None:
    """Their probabilities are compared with single windows too, each as a row and metrics of its own."""
    certified = {row["compared"] for row in rows(mapped / "evaluation/certificates.csv")}
    assert certified == {"dense", "dense.normal", "dense.in_situ"}
    summary = json.loads((mapped / "evaluation/summary.json").read_text())
    assert 0 < summary["dense.in_situ.max_abs_diff"] < 1e-4


def test_what_is_missing_is_done_again(
    tiny_slides: Path, card: Path, mapped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A map that is deleted, and a run that ended before its scores, are completed with the same bytes."""
    before = digests(mapped)
    (mapped / "maps/a.in_situ.tif").unlink()
    capsys.readouterr()
    assert cli.main(["verify", str(mapped)]) == 40
    assert "maps/a.in_situ.tif" in capsys.readouterr().err
    assert cli.main(["explain", str(mapped), "stitch", "a"]) == 0
    assert "maps/a.in_situ.tif, which is missing" in capsys.readouterr().out
    assert start(tiny_slides, mapped, card, "model.maps=all") == 0
    assert digests(mapped) == before
    for name in ("predictions/b/t1.h5", "heatmaps/b.tif", "maps/b.normal.tif", "maps/b.in_situ.tif"):
        (mapped / name).unlink()
        (mapped / f"receipts/{name}.json").unlink()
    assert cli.main(["retry", str(mapped)]) == 0
    assert digests(mapped) == before
    assert cli.main(["verify", str(mapped)]) == 0
    assert 'href="maps/a.in_situ.tif">in situ</a>' in (mapped / "report.html").read_text()


def test_runs_are_compared_by_class(plain: Path, mapped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``compare-maps --map`` compares the maps of a class, and refuses one that a run does not map."""
    assert cli.main(["compare-maps", str(mapped), str(mapped), "--map", "in situ", "--bound", "0"]) == 0
    assert "lesions" not in capsys.readouterr().out.splitlines()[-2]
    assert cli.main(["compare-maps", str(mapped), str(plain), "--map", "in situ"]) == 20
    assert "has no map of class 'in situ'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ("[Tumour]", "is not one of ['normal', 'tumor', 'in situ'] (did you mean tumor?)"),
        ("[normal,normal]", "model.maps names 'normal' twice"),
        ("[normal] tiles.group_tiles=4000000", "take 768 MB for a group of 4000000 tiles, more than half of"),
    ],
)
def test_wrong_names_are_refused(
    tiny_slides: Path, card: Path, tmp_path: Path, maps: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown class, one that is named twice, and more than fit into memory end in one line before any slide."""
    assert start(tiny_slides, tmp_path / "run", card, *f"model.maps={maps}".split()) == 20
    shown = capsys.readouterr().err.strip().splitlines()
    assert message in shown[-1]
    assert not (tmp_path / "run/tissue").exists()


def test_names_of_classes_are_told_apart() -> None:
    """Classes become parts of names of files, without dots, and no two are alike where case is ignored."""
    assert class_stems(["In situ", "in/situ", "in.situ", "", "…"]) == [
        "In_situ",
        "in_situ-2",
        "in_situ-3",
        "class",
        "class-2",
    ]
