"""A cascade: a cheap first pass, the run's own pass where that is suspicious, and a certificate of the rest."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import overwrite
from small_models import with_statistics
from small_runs import attempts, digests, over, wsiflow

from flows.compose import compose_config
from wsiflow.evaluation.froc import LesionMask
from wsiflow.evaluation.truth import Truth
from wsiflow.heatmap import files
from wsiflow.model import save
from wsiflow.model.architectures.registry import build
from wsiflow.model.engines import engine
from wsiflow.plan.geometry import Frame
from wsiflow.run.forecast.cascade import looked_at
from wsiflow.run.plan import latest_plan
from wsiflow.run.progress import Follower
from wsiflow.run.stages import ingest
from wsiflow.run.stages import threshold as stage
from wsiflow.system import publish

CHEAP = ["inference.cascade.um_px=1", "inference.cascade.stride=56", "inference.cascade.threshold=0.2"]


def listed(small_slides: Path, folder: Path, *names: str) -> Path:
    """Write the manifest of some slides, and return its path."""
    with small_slides.open(newline="") as stream:
        rows = {row["slide_id"]: row for row in csv.DictReader(stream)}
    lines = ["slide_id,path,label,annotation_path"]
    for name in names:
        row = rows[name]
        outline = small_slides.parent / row["annotation_path"] if row["annotation_path"] else ""
        lines.append(f"{name},{small_slides.parent / row['path']},{row['label']},{outline}")
    path = folder / f"{'-'.join(names)}.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def pair(small_slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of a slide with lesions, of which the first pass passes over most, and of a normal slide."""
    return listed(small_slides, tmp_path_factory.mktemp("pair"), "tumor_001", "normal_001")


@pytest.fixture(scope="module")
def cascaded(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished cascade."""
    out = tmp_path_factory.mktemp("cascade") / "run"
    assert wsiflow(*over(pair, out, *CHEAP)) == 0
    return out


def summary(out: Path) -> dict[str, float]:
    return json.loads((out / "evaluation/summary.json").read_text())


def test_only_what_is_suspicious_is_scored_again(cascaded: Path) -> None:
    """The own pass scores the planned cells alone; the map of passes says so of each cell, and detections lie there."""
    plan = latest_plan(cascaded)
    for planned in plan.slides:
        heat, _ = files.read_heatmap(cascaded / f"heatmaps/{planned.slide_id}.tif")
        passes = files.read_passes(cascaded / f"heatmaps/{planned.slide_id}.passes.tif")
        near = ingest.not_passed_over(cascaded, planned.slide_id, planned.frame, plan.settings.cascade)
        np.testing.assert_array_equal(passes == files.OWN_PASS, np.isfinite(heat))
        assert (near[passes == files.OWN_PASS]).all()
        assert not near[passes == files.FIRST_PASS].any()
        text = (cascaded / f"detections/{planned.slide_id}.csv").read_text().split()
        side = planned.frame.stride_px * planned.frame.l0_per_px
        for _, x, y in (map(float, line.split(",")) for line in text):
            assert passes[int(y // side), int(x // side)] == files.OWN_PASS
    assert 0 < summary(cascaded)["cascade.passed_over"] < 1


def test_scores_are_those_of_a_run_without_a_first_pass(cascaded: Path, finished: Path) -> None:
    """Blocks lie elsewhere, so that scores differ by rounding alone."""
    for name in ("tumor_001", "normal_001"):
        heat, whole = (files.read_heatmap(out / f"heatmaps/{name}.tif")[0] for out in (cascaded, finished))
        scored = np.isfinite(heat)
        np.testing.assert_allclose(heat[scored], whole[scored], atol=1e-5)


def test_both_passes_are_charged_and_verified(cascaded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cost of the first pass is a part of that of the line; its tiles are not counted as scored ones."""
    from flows.cli import main

    found, plan = summary(cascaded), latest_plan(cascaded)
    names = ("first/predictions", "predictions", "first/tissue", "certificates")
    spent = dict.fromkeys(names, 0.0)
    for path in cascaded.rglob("receipts/**/*.json"):
        receipt = json.loads(path.read_text())
        name = "first/" * ("first" in path.parts) + receipt.get("path", "").partition("/")[0]
        if name in spent:
            spent[name] += receipt["cpu_s"]
    assert all(spent.values())
    assert found["cost.first_pass_core_s"] >= spent["first/predictions"] + spent["first/tissue"]
    assert found["throughput.core_hours"] * 3600 >= sum(spent.values())
    tiles = sum(planned.n_tiles for planned in plan.slides)
    assert found["throughput.core_seconds_per_tile"] == pytest.approx(found["throughput.core_hours"] * 3600 / tiles)
    (cascaded_copy := cascaded.parent / "copy").mkdir()
    damaged = Path(shutil.copytree(cascaded, cascaded_copy / "run"))
    overwrite(damaged / "first/heatmaps/normal_001.tif", b"no")
    assert main(["verify", str(cascaded)]) == 0
    assert main(["verify", str(damaged)]) == 40
    assert "heatmaps/normal_001.tif" in capsys.readouterr().err


def test_progress_is_that_of_the_first_pass_until_the_run_has_a_plan(
    cascaded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The console, the page and `wsiflow status` show one text, with the stages of a first pass alone."""
    from flows.cli import main

    out = Path(shutil.copytree(cascaded, tmp_path / "run"))
    follower = Follower(out)
    (out / "plan.json").unlink()
    publish.receipt_path(out / "first", "heatmaps/normal_001.tif").unlink()
    seen = follower.snapshot()
    assert seen is not None
    assert (seen.which, seen.slides, set(seen.stages)) == ("first pass", (1, 2), {"predict", "stitch"})
    assert seen.as_text().startswith("first pass: 1 of 2 slides, ")
    assert main(["status", str(out)]) == 0
    assert f"there is no plan yet\ningest 2 of 2\n{seen.as_text()}\n" in capsys.readouterr().out
    (out / "first/plan.json").unlink()
    begun = follower.snapshot()
    assert begun is not None
    assert begun.as_text() == "first pass: ingest 2 of 2 slides"


def test_a_plan_tells_what_both_passes_take_as_a_range(
    pair: Path, cascaded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first pass is counted as the run does it; what the own pass looks at is given, or known from its plan."""
    from flows.cli import main

    out, report = tmp_path / "run", tmp_path / "report.json"
    arguments = ["plan", *over(pair, out, *CHEAP), "--workers", "1,2", "--json", str(report)]
    assert main([*arguments, "--looked-at", "0.05,0.4"]) == 0
    told = json.loads(report.read_text())
    tasks = Counter(receipt["path"].partition("/")[0] for receipt in receipts(cascaded / "first"))
    assert told["first_pass"]["tasks"]["predict"] == tasks["predictions"]
    assert told["first_pass"]["tasks"]["certify"] == 0
    first, whole = (sum(told[which]["core_hours"].values()) for which in ("first_pass", "whole"))
    least, most = told["core_hours_between"]
    assert first < least < most < first + 1.5 * whole
    assert told["forecasts"]["least"][0]["makespan_s"] < told["forecasts"]["most"][0]["makespan_s"]
    assert "it looks at 5% to 40% of the tissue: as given with --looked-at" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "it looks at 0% to 100% of the tissue: not known before the first pass" in capsys.readouterr().out
    assert not (out / "plan.json").exists()
    assert (out / "first/plan.json").read_bytes() == (cascaded / "first/plan.json").read_bytes()
    assert main(["plan", *over(pair, cascaded, *CHEAP), "--json", str(report)]) == 0
    assert json.loads(report.read_text())["core_hours"] == {}


def receipts(root: Path) -> list[dict[str, str]]:
    """Return the receipts of the files of a folder."""
    every = (json.loads(path.read_text()) for path in (root / "receipts").rglob("*.json"))
    return [receipt for receipt in every if "path" in receipt]


def test_a_cascade_resumes_on_other_executors_to_the_same_bytes(pair: Path, cascaded: Path, tmp_path: Path) -> None:
    """Nothing is done twice; what was deleted of either pass is done again, by processes, and has the same bytes."""
    out, expected = Path(shutil.copytree(cascaded, tmp_path / "run")), digests(cascaded)
    before = attempts(out)
    assert wsiflow(*over(pair, out, *CHEAP)) == 0
    assert {name: attempt for name, attempt in attempts(out).items() if name in before} == before
    assert wsiflow(*over(pair, out, *CHEAP)) == 0
    for folder, name in (
        ("first", "heatmaps/normal_001.tif"),
        ("first", "predictions/tumor_001/t1.h5"),
        ("", "cuts/tumor_001.json"),
        ("", "predictions/tumor_001/t1.h5"),
        ("", "heatmaps/tumor_001.passes.tif"),
    ):
        (out / folder / name).unlink()
        (out / folder / "receipts" / f"{name}.json").unlink()
    assert wsiflow(*over(pair, out, *CHEAP, "executor=process", "executor.workers=1")) == 0
    assert {name: value for name, value in digests(out).items() if name in expected} == expected


def test_other_settings_of_a_cascade_are_refused_by_name(
    pair: Path, cascaded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The threshold decides what is planned, so that a folder has one of them; the first pass is not touched."""
    for change, said in (
        ("inference.cascade.threshold=0.3", "cut.cascade.threshold (0.2 there, 0.3 now)"),
        ("inference.cascade.um_px=2", "cut.geometry.spacing (1.0 there, 2.0 now)"),
    ):
        assert wsiflow(*over(pair, cascaded, *CHEAP, change)) == 20
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["inference.cascade.um_px=model"], "would cost as much as the run's own"),
        (["inference.cascade.stride=100"], "inference.cascade.stride is 100, it must divide tiles.tile_px"),
        (["dense.windows=0"], "it needs dense.windows=200"),
        (["geometry=reference", "tiles=patch"], "it needs geometry=centred"),
        (["inference=window", "inference.refine=0.1"], "it needs inference.refine=0"),
    ],
)
def test_what_a_cascade_cannot_do_is_refused(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], said: str
) -> None:
    """Before any slide is opened, with the key and what to do."""
    assert wsiflow(*over(pair, tmp_path / "run", *CHEAP, *changes)) == 20
    assert said in capsys.readouterr().err


def test_a_slide_that_cannot_be_read_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And not that the first pass has no scores of it."""
    (tmp_path / "a.tif").write_bytes(b"no slide")
    (tmp_path / "manifest.csv").write_text("slide_id,path\na,a.tif\n")
    assert wsiflow(*over(tmp_path / "manifest.csv", tmp_path / "run", *CHEAP)) == 20
    said = capsys.readouterr()
    assert "a.tif: " in said.out + said.err
    assert "no scores of the slide" not in said.out + said.err


def random_card(folder: Path) -> Path:
    """Write a card of a network that sees nothing: its weights are random."""
    torch.manual_seed(0)
    network = with_statistics(build("compact_valid", 2, width=0.5, dropout=0.0), 224)
    fields = json.loads((Path(engine.__file__).parents[1] / "weights/demo.json").read_text())
    fields = {name: value for name, value in fields.items() if name not in {"weights", "sha256", "probe"}}
    fields |= {"name": "random", "architecture": "compact_valid", "architecture_args": {"width": 0.5, "dropout": 0.0}}
    return save.save(network.eval(), fields, folder)


def test_a_first_pass_that_sees_nothing_is_caught(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights pass over most of the lesion: windows in it are run, and the slide fails."""
    blind = [*CHEAP, f"inference.cascade.model={random_card(tmp_path)}", "inference.cascade.threshold=1"]
    out = tmp_path / "run"
    assert wsiflow(*over(pair, out, *blind)) == 40
    assert "the first pass passes over too much: " in (said := capsys.readouterr().err)
    assert "of all scores above 0.5 in annotated lesions would be there, allowed 50%" in said
    assert "set a lower inference.cascade.threshold" in said
    assert wsiflow(*over(pair, out, *blind, "dense.on_excess=report")) == 0
    found = summary(out)
    assert found["certificate.slides_beyond"] == 1
    assert found["cascade.missed"] > 0.5
    assert 0 < found["cascade.share_above"] < found["cascade.share_above_at_most"] < 1


def test_trials_that_differ_in_the_threshold_share_the_first_pass(small_slides: Path, tmp_path: Path) -> None:
    """The scores of the first pass are computed once, and each trial is charged for them."""
    trials, one = [], listed(small_slides, tmp_path, "normal_001")
    for threshold in ("0.2", "0.6"):
        out = tmp_path / threshold
        more = [f"inference.cascade.threshold={threshold}", f"share={tmp_path / 'shared'}", "dense.on_excess=report"]
        assert wsiflow(*over(one, out, *CHEAP, *more)) == 0
        trials.append(out)
    names = [path.relative_to(trials[0]) for path in (trials[0] / "first/predictions").rglob("*.h5")]
    assert names
    assert all((trials[0] / name).samefile(trials[1] / name) for name in names)
    costs = [summary(out)["cost.first_pass_core_s"] for out in trials]
    assert costs[1] > 0.5 * costs[0]
    passed = [summary(out)["cascade.passed_over"] for out in trials]
    assert passed[0] < passed[1]


def test_a_threshold_is_chosen_on_other_slides_once(
    small_slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It keeps the lesion of the development slide; another run finds it by the hash of the slides, and scores none."""
    monkeypatch.setenv("WSIFLOW_CACHE", str(tmp_path / "cache"))
    tested, other = (listed(small_slides, tmp_path, name) for name in ("normal_002", "tumor_001"))
    auto = [*CHEAP, "inference.cascade.threshold=auto", f"inference.cascade.development={other}"]
    assert wsiflow(*over(tested, tmp_path / "a", *auto)) == 0
    assert "keeps 1 of 1 lesions on 1 development slides" in capsys.readouterr().out
    threshold = json.loads((tmp_path / "a/development/threshold.json").read_text())["threshold"]
    assert latest_plan(tmp_path / "a").settings.cascade.threshold == threshold
    looked = looked_at(compose_config(over(tested, tmp_path / "a", *auto)), ())
    assert 0 < looked.least == looked.most < 1
    assert looked.origin == "as on the development slides (1)"
    heat, _ = files.read_heatmap(tmp_path / "a/development/heatmaps/tumor_001.tif")
    assert 0 < threshold <= np.nanmax(heat)
    assert wsiflow(*over(tested, tmp_path / "b", *auto)) == 0
    assert not (tmp_path / "b/development/predictions").exists()
    assert digests(tmp_path / "b/first") == digests(tmp_path / "a/first")
    assert wsiflow(*over(other, tmp_path / "c", *auto)) == 20
    assert "the threshold of the first pass would be chosen on a slide under test" in capsys.readouterr().err


@pytest.mark.parametrize(("sensitivity", "threshold"), [(1.0, 0.1), (0.76, 0.1), (0.75, 0.3), (0.5, 0.5), (0.01, 0.9)])
def test_a_threshold_keeps_the_wanted_share(sensitivity: float, threshold: float) -> None:
    """At least that share of the lesions reaches it, and no higher one of their scores does so."""
    assert stage.threshold_that_keeps([0.5, 0.1, 0.9, 0.3], sensitivity) == threshold
    assert stage.threshold_that_keeps([], sensitivity) is None


def test_the_score_of_a_lesion_is_the_highest_on_it() -> None:
    """Isolated tumour cells and lesions without a score are left out; regions count where tumour was annotated."""
    frame = Frame("centred", 4096, 4096, 4.0, 1.0, 224, 224, 32, 112, 1, 1, 0, 0, 5, 5)
    heat = np.arange(35 * 35, dtype=np.float32).reshape(35, 35) / 2000
    heat[20:] = np.nan
    labels = np.zeros((128, 128), np.int32)  # of 32 level-0 px: four of them make a side of a cell of 128
    labels[2, 3], labels[8:12, 8:13], labels[40, 40], labels[100, 100] = 1, 2, 3, 4
    tumour = labels > 0
    tumour[8:12, 12] = False
    truth = Truth(LesionMask(labels, frozenset({3}), np.ones(4)), "", tumour=tumour)
    assert stage.highest_scores(heat, frame, truth, downsample=32) == [heat[0, 0], heat[2, 2]]
