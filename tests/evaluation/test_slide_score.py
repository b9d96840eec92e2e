"""Features of real runs, a forest trained on one of them, and its scores of another, through the commands."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flows.__main__ import main
from wsiflow.errors import InputError
from wsiflow.evaluation import detections, forest, roc, slide_score
from wsiflow.evaluation.forest import Choices
from wsiflow.evaluation.slide_score import FeatureRow, sample_of
from wsiflow.heatmap import files
from wsiflow.heatmap.features import LEVELS, NAMES, describe
from wsiflow.run.plan import latest_plan
from wsiflow.slides import manifest, pyramid

Call = Callable[..., str]


@pytest.fixture(scope="module")
def trained(finished: Path, small_slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with features of a run, a forest trained on them, and one for slides of other names."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["features", str(finished), "--out", str(folder / "features.csv")]) == 0
    for name, path in (("features.csv", small_slides), ("other_features.csv", small_slides.with_name("other.csv"))):
        for source, target in ((folder / "features.csv", folder / name), (small_slides, path)):
            if source != target:
                target.write_text(source.read_text().replace("\nnormal_", "\nn_").replace("\ntumor_", "\nt_"))
        options = ["--features", str(folder / name), "--manifest", str(path), "--trees", "6"]
        assert (
            main(["forest", "train", *options, "--out", str(folder / name.replace("features.csv", "forest.json"))]) == 0
        )
    return folder


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command that must end with exit code 20, and return its one line."""

    def call(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 20
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return call


def test_the_table_has_the_features_of_the_heatmaps(trained: Path, finished: Path) -> None:
    """The table has a row per slide and threshold with all digits, and tissue from the mask."""
    with (trained / "features.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 6 * len(LEVELS)
    planned = next(slide for slide in latest_plan(finished).slides if slide.slide_id == "tumor_001")
    heat, _ = files.read_heatmap(finished / "heatmaps/tumor_001.tif")
    mask = pyramid.read_level(finished / "tissue/tumor_001.png", 1) > 0
    tissue_px = mask.sum() * planned.overview_downsample**2
    (row,) = [row for row in rows if (row["slide_id"], row["threshold"]) == ("tumor_001", "0.7")]
    expected = describe(heat, threshold=0.7, tissue_l0_px2=tissue_px, cell_l0_px=112)
    assert [float(row[name]) for name in NAMES] == expected.tolist()
    assert float(row["cell_um"]) == pytest.approx(112 * 0.243)
    scored = np.isfinite(heat).sum() * 112**2
    assert 0.3 * scored < tissue_px < 1.1 * scored


def test_scores_go_into_evaluate(trained: Path, finished: Path, small_slides: Path) -> None:
    """Scores of a forest that was not trained on these slides give the AUC of ``wsiflow evaluate``."""
    scores, out = trained / "scores.csv", trained / "evaluated"
    options = ["--forest", str(trained / "other_forest.json"), "--out", str(scores)]
    assert main(["forest", "score", str(finished), *options]) == 0
    found = detections.read_scores(scores)
    other = forest.load(trained / "other_forest.json")
    table = {(row.slide_id, row.threshold): row for row in slide_score.read_features(trained / "features.csv")}
    rows = np.array([table[slide_id, other.card.settings.threshold].values for slide_id in found])
    assert list(found.values()) == other.predict(rows).tolist()
    options = ["--manifest", str(small_slides), "--detections", str(finished / "detections"), "--scores", str(scores)]
    assert main(["evaluate", *options, "--bootstrap", "0", "--out", str(out)]) == 0
    with (out / "cases.csv").open() as stream:
        assert {row["slide_id"]: float(row["score"]) for row in csv.DictReader(stream)} == found
    labels = [int(slide_id.startswith("tumor")) for slide_id in found]
    assert json.loads((out / "summary.json").read_text())["roc.auc"] == roc.auc(list(found.values()), labels)


def test_the_reference_flag_gives_other_features(trained: Path, finished: Path) -> None:
    """Shares in cells of 16 px are 49 times smaller at stride 112, and versions do not mix."""
    out = trained / "reference.csv"
    assert main(["features", str(finished), "--reference", "--out", str(out)]) == 0
    ours, theirs = (slide_score.read_features(path) for path in (trained / "features.csv", out))
    pairs = [(one, other) for one, other in zip(ours, theirs, strict=True) if other.values[0] > 0]
    assert pairs
    assert all(one.values[0] == pytest.approx(49 * other.values[0]) for one, other in pairs)
    assert {row.version for row in theirs} == {"reference-1"}


def test_slides_of_the_training_are_not_scored_unasked(trained: Path, finished: Path, fails: Call) -> None:
    """Training slides are scored only with --also-training."""
    options = ["--forest", str(trained / "forest.json"), "--out", str(trained / "own.csv")]
    assert "was trained on 6 of these slides: normal_001" in fails("forest", "score", finished, *options)
    assert not (trained / "own.csv").exists()
    assert main(["forest", "score", str(finished), *options, "--also-training"]) == 0
    assert len(detections.read_scores(trained / "own.csv")) == 6


def test_maps_of_another_stride_are_not_scored(trained: Path, finished: Path, fails: Call) -> None:
    """A forest refuses heatmaps with cells of another size."""
    other = forest.load(trained / "other_forest.json")
    path = trained / "fine.json"
    forest.save(other._replace(card=other.card._replace(cell_um=16 * 0.243)), path)
    message = fails("forest", "score", finished, "--forest", path, "--out", trained / "never.csv")
    assert "cells of 27.22 um where the forest was trained on 3.888 um" in message


def test_a_slide_in_two_runs_and_a_folder_without_a_run_are_refused(
    finished: Path, tmp_path: Path, fails: Call
) -> None:
    """Both are named in the message, and nothing is written."""
    assert "slide normal_001" in fails("features", finished, finished, "--out", tmp_path / "f.csv")
    assert "it holds no plan" in fails("features", tmp_path, "--out", tmp_path / "f.csv")
    assert not (tmp_path / "f.csv").exists()


def test_a_table_that_is_none_is_refused(tmp_path: Path, small_slides: Path, fails: Call) -> None:
    """Another CSV, text for a number, a short line and a cell size of 0 are refused."""
    table = tmp_path / "f.csv"
    header = ",".join(slide_score.COLUMNS)
    for text in (
        "a,b\n1,2\n",
        "",
        f"{header}\na,0.5,1,3.9,{','.join(['x'] * 30)}\n",
        f"{header}\na,0.5,1,3.9{',0' * 29}\n",
        f"{header}\na,0.5,1,0{',0' * 30}\n",
        f"{header}\na,0.5,1,nan{',0' * 30}\n",
    ):
        table.write_text(text)
        options = ["--features", table, "--manifest", small_slides, "--out", tmp_path / "forest.json"]
        assert str(table) in fails("forest", "train", *options)


# --- which slides are trained on


def rows_of(*slide_ids: str, **more: object) -> list[FeatureRow]:
    """Return feature rows of some slides, all with the same values."""
    row = FeatureRow("", 0.5, "1", 3.9, np.zeros(len(NAMES)))
    return [row._replace(slide_id=slide_id, threshold=t, **more) for slide_id in slide_ids for t in (0.5, 0.9)]


def case(slide_id: str, label: int | None, **more: str) -> manifest.Case:
    return manifest.Case(slide_id, Path(slide_id), label=label, **more)


def test_test_slides_and_slides_without_label_are_left_out() -> None:
    """Test slides and unlabelled slides are not used for training."""
    cases = [case("a", 1, patient_id="p"), case("b", 0), case("c", 1, split="Test"), case("d", None)]
    sample = sample_of(rows_of("a", "b", "c", "d", "e"), cases)
    assert sample.slide_ids == ("a", "b")
    assert sample.labels.tolist() == [1, 0]
    assert sample.groups == ("p", "slide b")
    assert {t: values.shape for t, values in sample.features.items()} == {0.5: (2, 30), 0.9: (2, 30)}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (rows_of("a"), "no features of b"),
        (rows_of("a", "b", "a"), "slide a.*given twice"),
        (rows_of("a") + rows_of("b", version="reference-1"), "versions 1, reference-1"),
        (rows_of("a", "a1") + rows_of("b", cell_um=15.6), "slide b.*cells of 15.6 um where most have 3.9 um"),
        (rows_of("a") + rows_of("b")[:1], "slide b.*no features at some of the thresholds"),
    ],
)
def test_features_that_do_not_belong_together_are_refused(rows: list[FeatureRow], message: str) -> None:
    """A missing or inconsistent slide would silently change the training sample."""
    cases = [case("a", 1), case("b", 0)]
    extra = [replace(cases[0], slide_id="a1")] if any(row.slide_id == "a1" for row in rows) else []
    with pytest.raises(InputError, match=message):
        sample_of(rows, [*cases, *extra])
    with pytest.raises(InputError, match="no labelled slides"):
        sample_of(rows, [])


def test_a_patient_is_a_group(trained: Path) -> None:
    """The manifest's patients group the slides: two patients are too few, three are enough."""
    rows = slide_score.read_features(trained / "features.csv")
    names = sorted({row.slide_id for row in rows})
    cases = [case(name, int(name.startswith("t")), patient_id=name[:1] + name[-1]) for name in names]
    few = [replace(one, patient_id=one.patient_id.replace("3", "2")) for one in cases]
    choices = Choices(max_features=(5,), min_leaf=(1,), trees=3, trees_choosing=2)
    assert forest.train(sample_of(rows, cases), seed=0, choices=choices).card.n_patients == 6
    with pytest.raises(InputError, match="at least three patients"):
        forest.train(sample_of(rows, few), seed=0, choices=choices)
