"""Comparison of runs: settings, refusals, the Pareto front, the files written, and the record in MLflow."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from PIL import Image
from swept import Trial, drawn, log, matches, slide, store, stride_trials, write_folder

from flows.__main__ import main
from wsiflow.analysis.runs import FinishedRun, RunSelection, runs_in_folders, runs_of_sweep, runs_of_trials
from wsiflow.analysis.tradeoff import comparison, report, rows
from wsiflow.analysis.tradeoff.rows import Options
from wsiflow.analysis.tradeoff.values import Tradeoff
from wsiflow.errors import InputError
from wsiflow.evaluation.matches import EvaluationRecord
from wsiflow.run import tracking
from wsiflow.system import processes

QUICK = Options(resamples=200)


def some(n_found: int) -> EvaluationRecord:
    """Return matches of four tumour slides with one lesion each, of which some are hit, and four normal slides."""
    tumour = [slide(f"t{i}", 1, [0.9 if i < n_found else None]) for i in range(4)]
    return matches([*tumour, *(slide(f"n{i}", 0, false=[0.1]) for i in range(4))])


def run(name: str, found: EvaluationRecord, core_hours: float = 1.0, **params: Any) -> FinishedRun:
    """Return a run, half of whose cost is the line's; in the names of parameters ``__`` stands for a point."""
    settings = {key.replace("__", "."): str(value) for key, value in params.items()}
    costs = core_hours, core_hours / 2
    return FinishedRun(name, f"id-{name}", f"folder-{name}", "s", settings, {}, *costs, "CPU", found)


def compared(*runs: FinishedRun, **options: Any) -> Tradeoff:
    return rows.compare_runs(RunSelection(runs, []), "s", QUICK._replace(**options))


# --- settings


def test_settings_are_named_by_what_differs() -> None:
    """Names show differing settings only, and numbers are in numeric order."""
    common = {"lesions__threshold": 0.5}
    runs = [
        run(f"r{stride}", some(2), stride=stride, out=f"/{stride}", tiles__halo_px=stride + 100, **common)
        for stride in (16, 112, 8)
    ]
    found = compared(*runs)
    assert [row.name for row in found.rows] == ["stride=8", "stride=16", "stride=112"]
    assert found.common == {"lesions.threshold": "0.5"}
    assert found.notes == ["Differing along with the parameters shown: tiles.halo_px."]


def test_settings_are_named_by_what_was_swept() -> None:
    """Keys that the user typed name settings, unless they leave two settings the same name."""
    runs = [
        run(f"{model}{stride}", some(2), halo_px=reach + stride, card=f"{model}.json", stride=stride)._replace(
            swept={"model": model, "inference.stride": str(stride)}
        )
        for model, reach in (("demo", 0), ("pcam", -92))
        for stride in (112, 56)
    ]
    names = [f"model={model}, stride={stride}" for model in ("demo", "pcam") for stride in (56, 112)]
    assert [row.name for row in compared(*runs).rows] == names
    alike = [one._replace(swept={"model": one.swept["model"]}) for one in runs]
    assert [row.name for row in compared(*alike).rows] == ["halo_px=-36", "halo_px=20", "halo_px=56", "halo_px=112"]


def test_a_name_that_means_two_things_stays_whole() -> None:
    """The last part of a dotted name is used where it is unique; a method is named by its group."""
    runs = [
        run(f"{a}{b}{stain}", some(2), stain__method=stain, tissue__limit=a, lesions__limit=b)
        for a in (1, 2)
        for b in (3, 4)
        for stain in ("none", "macenko")
    ]
    found = compared(*runs).rows
    assert "tissue.limit=1" in found[0].name
    assert "stain=macenko" in found[0].name
    assert len(found) == 8


def test_a_kind_stands_for_what_comes_with_it() -> None:
    """The name of a method stands for the parameters that come with it."""
    runs = [
        run("plain", some(2), stain__target="None", stain__method="none", stain__space="None"),
        run("even", some(2), stain__target="", stain__method="macenko", stain__space="od"),
    ]
    assert [row.name for row in compared(*runs).rows] == ["stain=macenko", "stain=none"]


def test_repeats_are_one_setting_with_a_spread() -> None:
    """Three costs give mean, deviation and range; one cost has no deviation."""
    repeats = [run(f"a{i}", some(3), cost, stride=16, repeat=i, seed=i) for i, cost in enumerate((1.0, 2.0, 3.0))]
    coarse, fine = compared(run("b", some(2), 0.5, stride=224), *repeats).rows[::-1]
    assert fine.name == "stride=16"
    assert fine.cost == (2.0, 1.0, 1.0, 3.0, 3)
    assert coarse.cost[:1] + coarse.cost[2:] == (0.5, 0.5, 0.5, 1)
    assert math.isnan(coarse.cost.sd)
    assert fine.runs == ("id-a0", "id-a1", "id-a2")


def test_repeats_with_other_scores_are_refused() -> None:
    """Repeats of one setting must have the same scores."""
    with pytest.raises(InputError, match="a and b have the same settings and other scores, first for t2"):
        compared(run("a", some(2), stride=16), run("b", some(3), stride=16, repeat=2))


# --- scores


def test_scores_differences_and_the_front_are_right() -> None:
    """Hits of 4, 3 and 3 of 4 lesions: the dearer one of the equal settings is off the front."""
    runs = [
        run("fine", some(4), 8.0, stride=16),
        run("middle", some(3), 2.0, stride=56),
        run("odd", some(3), 3.0, stride=112),
    ]
    fine, middle, odd = compared(*runs).rows
    assert [row.metrics["froc.score"].value for row in (fine, middle, odd)] == [1.0, 0.75, 0.75]
    assert fine.metrics["roc.auc"].value == 1.0
    assert middle.metrics["roc.auc"].value == pytest.approx(0.75)
    assert [row.pareto for row in (fine, middle, odd)] == [True, True, False]
    assert not fine.differences, "the one that costs most is the reference"
    assert middle.differences["froc.score"].value == pytest.approx(-0.25)
    assert middle.differences["froc.score"].p_corrected >= middle.differences["froc.score"].p


def test_many_settings_are_drawn_often_enough_to_be_told_apart() -> None:
    """With 200 draws Holm's correction would exceed 0.05 from seven settings on."""
    found = compared(run("best", drawn(0.9), 9.0, stride=8), *(run(f"r{i}", drawn(0), stride=i + 9) for i in range(9)))
    assert found.counts["resamples"] == 900
    assert all(row.differences["froc.score"].p_corrected < 0.05 for row in found.rows[1:])
    assert compared(run("a", some(1), stride=1), run("b", some(2), stride=2)).counts["resamples"] == 200


def test_the_reference_can_be_chosen() -> None:
    """The reference is chosen by name; the message on another name lists all."""
    runs = [run("fine", some(4), 8.0, stride=16), run("coarse", some(3), 2.0, stride=224)]
    found = compared(*runs, reference="stride=224")
    assert found.rows[0].differences["froc.score"].value == pytest.approx(0.25)
    with pytest.raises(InputError, match="no setting 'stride=32'; name one with --reference: stride=16; stride=224"):
        compared(*runs, reference="stride=32")


def test_the_reference_is_the_finest_stride_in_fp32() -> None:
    """The setting that leaves out least is the reference, and not the one that costs most."""
    settings = {
        "coarse": ({"stride": 224, "precision": "fp32"}, 9.0),
        "narrow": ({"stride": 8, "precision": "bf16"}, 3.0),
        "fine": ({"stride": 16, "precision": "fp32"}, 2.0),
        "dyed": ({"stride": 16, "precision": "fp32", "stain": "macenko"}, 8.0),
        "passing over": ({"stride": 8, "precision": "fp32", "threshold": 0.2}, 9.0),
    }
    runs = [
        run(
            name,
            some(3),
            cost,
            inference__stride=own["stride"],
            inference__precision=own["precision"],
            stain__method=own.get("stain", "none"),
            **({"inference__cascade__threshold": own["threshold"]} if "threshold" in own else {}),
        )
        for name, (own, cost) in settings.items()
    ]
    assert compared(*runs).reference == "precision=fp32, stain=none, stride=16"
    assert compared(*runs[:2]).reference == "stride=224"
    assert compared(run("a", some(3), 1.0, k=1), run("b", some(3), 2.0, k=2)).reference == "k=2"


def lossy(n_lost: int, n: int = 200) -> EvaluationRecord:
    """Return matches of slides with one lesion each, all found but some, and twenty normal slides."""
    tumour = [slide(f"t{i}", 1, [None if i < n_lost else 0.9]) for i in range(n)]
    return matches([*tumour, *(slide(f"n{i}", 0, false=[0.1]) for i in range(20))])


def test_equivalence_is_corrected_on_both_sides() -> None:
    """A gain of 2 of 200 excludes one of 0.04 alone, and not among three settings; the loss is excluded in both."""
    better = [run(f"r{n}", lossy(0), 5.0 - n, inference__stride=20 + n) for n in range(3)]
    for others, is_equivalent in ((better[:1], True), (better, False)):
        found = compared(run("base", lossy(2), 9.0, inference__stride=16), *others, margin=0.04)
        (_, one, *_) = [row.verdict for row in found.rows]
        assert (one.verdict, one.equivalent) == ("shown", is_equivalent)


def test_a_margin_is_shown_or_not() -> None:
    """No loss of 200 excludes one of 0.04, a loss of 3 does not, and one of 40 is worse; the numbers of slides fit."""
    runs = [run(f"r{n}", lossy(n), 9.0 - n, inference__stride=16 + n) for n in (0, 3, 40)]
    runs.append(run("same", lossy(0), 1.0, inference__stride=20))
    found = compared(*runs, margin=0.04, power=True)
    verdicts = {row.name.removeprefix("stride="): row.verdict for row in found.rows if row.verdict}
    assert {name: one.verdict for name, one in verdicts.items()} == {"19": "not shown", "20": "shown", "56": "worse"}
    assert verdicts["20"].equivalent
    assert not verdicts["56"].equivalent
    assert -0.04 < verdicts["20"].bound < 0
    assert verdicts["20"].slides == pytest.approx(1.96**2 * 0.96 / 0.04 * 1.1, rel=0.01), (
        "ten of eleven slides have one"
    )
    assert verdicts["19"].p < 0.1 < verdicts["56"].p
    power = {row.name.removeprefix("stride="): row.power for row in found.rows if row.power}
    assert power["56"].now > 0.99
    assert power["56"].slides < 100
    assert math.isinf(power["56"].slides_if_observed)
    assert power["19"].slides_if_observed > power["19"].slides_if_equal > verdicts["20"].slides


def test_families_are_corrected_by_themselves() -> None:
    """Settings that differ in the stride alone are one family, those in the precision another, the rest a third."""
    runs = [
        run(
            f"{stride}{precision}",
            drawn(0.8 - stride / 900),
            1.0,
            inference__stride=stride,
            inference__precision=precision,
        )
        for stride in (16, 56, 112, 224)
        for precision in ("fp32", "bf16")
    ]
    families = {"strides": ["inference.stride"], "formats": ["precision"]}
    rows = {row.name: row for row in compared(*runs, families=families).rows}
    assert [row.family for row in rows.values()].count("strides") == 3
    assert rows["precision=bf16, stride=16"].family == "formats"
    assert rows["precision=bf16, stride=56"].family == ""
    one = rows["precision=fp32, stride=224"].differences["froc.score"]
    assert one.p_corrected <= 3 * one.p + 1e-12
    with pytest.raises(InputError, match="family colours has 'stain', in which no settings differ"):
        compared(*runs, families={"colours": ["stain"]})


def test_the_metric_can_be_named() -> None:
    """Pareto set and verdicts are of the named metric; a metric that there is not is refused."""
    runs = [run("a", some(4), 2.0, stride=16), run("b", some(3), 1.0, stride=56)]
    assert compared(*runs, metric="roc.auc").metric == "roc.auc"
    with pytest.raises(InputError, match="no run has the metric 'froc'"):
        compared(*runs, metric="froc")


def test_the_score_is_the_official_one() -> None:
    """Where every lesion is found the official score leaves the lowest threshold out, and the strict one does not."""
    found = matches([slide(f"t{i}", 1, [0.3 + i / 10]) for i in range(4)] + [slide("n", 0, false=[0.35])])
    (row,) = compared(run("a", found, stride=8)).rows
    assert row.metrics["froc.score"].value == pytest.approx(0.75)
    assert row.metrics["froc.strict_score"].value == 1.0


def test_costs_that_cannot_be_told_apart_are_not_ranked() -> None:
    """Of equal scores the dearer one stays where repeats say that its cost is the same; shares of redraws are told."""
    noisy = [run(f"a{i}", some(3), cost, stride=16, repeat=i) for i, cost in enumerate((1.0, 1.4))]
    other = [run(f"b{i}", some(3), cost, stride=56, repeat=i) for i, cost in enumerate((1.1, 1.2))]
    dear = [run(f"c{i}", some(3), cost, stride=224, repeat=i) for i, cost in enumerate((9.0, 9.1))]
    found = compared(*noisy, *other, *dear)
    assert [row.pareto for row in found.rows] == [True, True, False]
    assert [row.membership for row in found.rows] == [1.0, 1.0, 0.0]


def test_a_setting_that_finds_nothing_is_worth_nothing() -> None:
    """The cheapest setting is not in the Pareto set where its score is 0, and a note says so."""
    found = compared(run("fine", some(4), 8.0, stride=16), run("blind", some(0), 0.1, stride=224))
    assert [row.pareto for row in found.rows] == [True, False]
    assert "Not worth any cost, since their FROC score is 0 or not defined: stride=224." in found.notes


def test_a_cost_that_nobody_measured_is_not_cheap() -> None:
    """A setting without core-hours is compared and never on the front."""
    known, unknown = compared(run("a", some(2), 1.0, stride=16), run("b", some(4), math.nan, stride=8)).rows[::-1]
    assert (known.pareto, unknown.pareto) == (True, False)


def test_processors_that_differ_are_told() -> None:
    """A note warns where core-hours come from different processors."""
    runs = [run("a", some(2), stride=16), run("b", some(3), stride=8)._replace(processor="Another")]
    assert "Another; CPU" in compared(*runs).notes[-1]


# --- refusals

REFUSED = {
    "another slide": (lambda one: matches([*one.slides, slide("t9", 1, [0.5])]), "different slides for FROC: t9"),
    "an exclusion": (
        lambda one: matches([one.slides[0].model_copy(update={"in_froc": False}), *one.slides[1:]]),
        "different slides for FROC: t0",
    ),
    "another protocol": (lambda one: matches(one.slides, itc_um=200.0), "different protocols"),
    "another outline": (
        lambda one: matches([one.slides[0].model_copy(update={"truth": "corrected"}), *one.slides[1:]]),
        "different truth for t0",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_runs_over_different_cases_are_refused(what: str) -> None:
    """The message names the runs and what differs."""
    change, said = REFUSED[what]
    with pytest.raises(InputError, match=said) as refused:
        compared(run("first", some(2), stride=16), run("second", change(some(3)), stride=8))
    assert "first and second" in str(refused.value)
    assert refused.value.exit_code == 20


def test_runs_without_truth_are_refused() -> None:
    """Without truth there is no score to compare."""
    unknown = matches([slide("a", 0, false=[0.3]).model_copy(update={"in_froc": False, "in_auc": False})])
    with pytest.raises(InputError, match="no run has a score"):
        compared(run("a", unknown, stride=8), run("b", unknown, stride=16))


# --- folders


def test_folders_are_compared_from_the_command_line(tmp_path: Path, capsys: Any) -> None:
    """Two folders, or the folder that holds them, give the same files."""
    folders = [
        write_folder(tmp_path / "sweep" / name, some(n), cost) for name, n, cost in (("x", 4, 2.0), ("y", 3, 1.0))
    ]
    out = tmp_path / "out"
    assert main(["compare", *map(str, folders), "--out", str(out), "--bootstrap", "100"]) == 0
    assert "run=y: 0.750" in capsys.readouterr().out
    written = {path.name for path in out.iterdir() if path.is_file()}
    figures = {f"{name}.{kind}" for name in ("froc", "tradeoff", "differences") for kind in ("png", "svg")}
    assert written == {"compare.md", "compare.csv", "report.html"} | figures
    with (out / "compare.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["run"], float(row["froc.score"]), row["pareto"]) for row in rows] == [
        ("x", 1.0, "yes"),
        ("y", 0.75, "yes"),
    ]
    assert float(rows[1]["froc.score_difference"]) == pytest.approx(-0.25)
    page = (out / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page), "the page needs no other file"
    assert page.count("data:image/png") == 3
    assert "| run=x | 1.000" in (out / "compare.md").read_text()
    assert main(["compare", str(tmp_path / "sweep"), "--out", str(tmp_path / "again"), "--bootstrap", "100"]) == 0
    assert (tmp_path / "again/compare.csv").read_bytes() == (out / "compare.csv").read_bytes()


def test_two_families_of_one_name_are_refused(tmp_path: Path, capsys: Any) -> None:
    """The first of them would be left out, and its settings corrected for with all others."""
    given = ["compare", str(tmp_path), "--family", "a=stride", "--family", "a=stain"]
    assert main(given) == 20
    assert "there are two families 'a'; give --family a=stride,stain" in capsys.readouterr().err


def test_a_folder_without_scores_is_refused(tmp_path: Path, capsys: Any) -> None:
    """A folder without scores, and a missing one, are named with exit code 20."""
    good = write_folder(tmp_path / "good", some(3))
    (tmp_path / "empty").mkdir()
    for bad in ("empty", "absent"):
        assert main(["compare", str(good), str(tmp_path / bad), "--out", str(tmp_path / "o")]) == 20
        assert bad in capsys.readouterr().err


def test_what_is_beside_the_scored_runs_is_told(tmp_path: Path) -> None:
    """A trial that did not finish is named in the notes."""
    write_folder(tmp_path / "a", some(3))
    (tmp_path / "b").mkdir()
    (tmp_path / "b/cases.json").write_text("{}")
    assert runs_in_folders([tmp_path]).notes == ["Left out, since not all of its slides have scores: b."]


def test_costs_of_everything_and_of_the_line_are_not_mixed() -> None:
    """Where a run of a former version has the line's cost alone, all are compared by that, and a note says so."""
    fine, coarse = run("a", some(3), 4.0, stride=16), run("b", some(3), 3.0, stride=32)
    fine, coarse = fine._replace(line_core_hours=1.0), coarse._replace(line_core_hours=2.0)
    both = compared(fine, coarse)
    assert ([row.pareto for row in both.rows], both.of_line) == ([False, True], False)
    assert [(row.cost.mean, row.line.mean) for row in both.rows] == [(4.0, 1.0), (3.0, 2.0)]
    former = compared(fine, coarse._replace(core_hours=math.nan))
    assert ([row.pareto for row in former.rows], former.of_line) == ([True, False], True)
    assert [row.cost.mean for row in former.rows] == [1.0, 2.0]
    assert any("those of the line alone" in note and note.endswith("have run b.") for note in former.notes)
    assert "recorded no others" in report.texts(former, {})["compare.md"]
    assert compared(fine, coarse._replace(core_hours=math.nan, line_core_hours=math.nan)).rows[0].cost.mean == 4.0


# --- figures


def test_figures_show_what_there_is(tmp_path: Path) -> None:
    """There are three figures, and one where costs and differences are missing."""
    many = [
        run(str(i), one.matches, one.core_hours, **one.params)
        for i, one in enumerate(stride_trials((16, 224), repeats=1))
    ]
    comparison.write_files(tmp_path / "many", compared(*many))
    for name in ("froc", "tradeoff", "differences"):
        pixels = np.asarray(Image.open(tmp_path / f"many/{name}.png").convert("HSV"))
        assert (pixels[..., 1] > 100).mean() > 0.001, f"{name} has no colour"
        assert b"<svg" in (tmp_path / f"many/{name}.svg").read_bytes()
    alone = comparison.write_files(tmp_path / "one", compared(run("a", some(3), math.nan)))
    assert [name for name in alone if name.endswith(".png")] == ["froc.png"]
    assert "There is nothing to draw" in (tmp_path / "one/report.html").read_text()


def test_the_same_comparison_is_the_same_bytes(tmp_path: Path) -> None:
    """Figures and pages contain no date and no random name."""
    runs = [run("a", some(3), 2.0, stride=8), run("b", some(2), 1.0, stride=16)]
    first, again = (comparison.write_files(tmp_path / name, compared(*runs)) for name in ("1", "2"))
    assert first == again


# --- MLflow


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the address of a store for all tests, each of which has its own experiment."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(scope="module")
def recorded(uri: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the ids of a sweep of four runs, two of which are repeats."""
    trials = [
        Trial({"inference.stride": 16, "repeat": 1}, 4.0, some(4)),
        Trial({"inference.stride": 16, "repeat": 2}, 6.0, some(4)),
        Trial({"inference.stride": 56, "repeat": 1}, 1.0, some(3)),
        Trial({"inference.stride": 224, "repeat": 1}, 2.0, some(2)),
    ]
    return log(store(uri), trials, tmp_path_factory.mktemp("recorded"))


def test_a_filter_finds_the_front_in_mlflow(uri: str, recorded: list[str], tmp_path: Path) -> None:
    """Runs are tagged, and the parent has table, figures, report, metrics and common settings."""
    ids = recorded
    assert main(["compare", "wsiflow", "--uri", uri, "--out", str(tmp_path / "out"), "--bootstrap", "100"]) == 0
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("wsiflow").experiment_id
    front = client.search_runs([experiment], "tags.\"wsiflow.pareto\" = 'yes'")
    assert {one.info.run_id for one in front} == set(ids[:3])
    assert client.get_run(ids[3]).data.tags["wsiflow.pareto"] == "no"
    (parent,) = client.search_runs([experiment], "tags.`wsiflow.role` = 'sweep'")
    assert parent.data.metrics["compare.n_settings"] == 3
    assert parent.data.metrics["compare.best_score"] == 1.0
    assert parent.data.metrics["compare.most_core_hours"] == 5.0
    assert parent.data.tags["wsiflow.best"] == parent.data.tags["wsiflow.reference"] == "stride=16"
    common = json.loads(Path(client.download_artifacts(parent.info.run_id, "common.json", str(tmp_path))).read_text())
    assert {common["digest.dataset"], common["digest.model"]} == {"d1", "m1"}
    against = "saves 4 core-h (80 %), FROC -0.250"
    assert against in client.get_run(ids[2]).data.tags["wsiflow.against_reference"]
    assert against in parent.data.tags["mlflow.note.content"]
    assert (
        f"![tradeoff](get-artifact?path=tradeoff.png&run_uuid={parent.info.run_id})"
        in parent.data.tags["mlflow.note.content"]
    )
    assert "| stride=56 | 0.750" in parent.data.tags["mlflow.note.content"]
    files = {one.path for one in client.list_artifacts(parent.info.run_id)}
    assert files >= {"compare.md", "compare.csv", "report.html", "froc.png", "tradeoff.png", "differences.png"}
    inputs = client.get_run(ids[0]).inputs.dataset_inputs
    assert [(one.dataset.name, one.dataset.digest) for one in inputs] == [("cases.csv", "d1")]


def test_a_later_comparison_replaces_the_former(uri: str, tmp_path: Path) -> None:
    """An added run changes tags and table, and outdated common settings are removed."""
    params = store(uri, experiment="later")
    first = [Trial({"inference.stride": s, "lesions.k": 1}, 1.0 + s / 100, some(3)) for s in (16, 56)]
    ids = log(params, first, tmp_path)
    out = tmp_path / "out"
    comparison.run_comparison(comparison.Request([], params, QUICK), out)
    client = mlflow.MlflowClient(tracking_uri=uri)
    assert client.get_run(ids[0]).data.tags["wsiflow.pareto"] == "yes"
    joined = [*first, Trial({"inference.stride": 16, "lesions.k": 2}, 0.5, some(4))]
    log(params, joined, tmp_path)
    result = comparison.run_comparison(comparison.Request([], params, QUICK), out)
    assert len(result.tradeoff.rows) == 3
    assert client.get_run(ids[0]).data.tags["wsiflow.pareto"] == "no"
    parent = client.get_run(result.logged.run_id)
    assert "lesions.k" not in Path(client.download_artifacts(parent.info.run_id, "common.json", str(out))).read_text()
    assert parent.data.metrics["compare.n_settings"] == 3


def test_of_a_folder_the_latest_record_counts(uri: str, tmp_path: Path) -> None:
    """Of a folder that was scored again only the latest record is compared."""
    params = store(uri, experiment="latest")
    more = matches([*some(3).slides, slide("t9", 1, [0.5])])
    for number, found in enumerate((some(3), more)):
        log(params, [Trial({"inference.stride": 16}, 1.0, found)], tmp_path, key=f"k{number}")
    log(params, [Trial({"inference.stride": 56}, 1.0, more)], tmp_path, key="k3", tags={"wsiflow.folder": "other"})
    assert [len(one.matches.slides) for one in runs_of_sweep(params).runs] == [9, 9]


def test_a_sweep_has_to_be_named_where_there_are_two(uri: str, tmp_path: Path) -> None:
    """With two sweeps none is compared, and the message names both."""
    for sweep in ("coarse", "fine"):
        log(store(uri, sweep, "two"), [Trial({"inference.stride": 16}, 1.0, some(3))], tmp_path)
    with pytest.raises(InputError, match="2 sweeps and none is named; name one with --sweep: coarse, fine"):
        runs_of_sweep(store(uri, None, "two"))
    with pytest.raises(InputError, match="no run of sweep other; name one of its sweeps: coarse, fine"):
        runs_of_sweep(store(uri, "other", "two"))
    assert len(runs_of_sweep(store(uri, "fine", "two")).runs) == 1
    elsewhere = {"wsiflow.folder": "elsewhere", "wsiflow.out": str(tmp_path / "b/fine/0")}
    log(
        store(uri, "fine", "two"),
        [Trial({"inference.stride": 56}, 1.0, some(3))],
        tmp_path / "b",
        key="b",
        tags=elsewhere,
    )
    both = f"{tmp_path}/b/fine, {tmp_path}/fine"
    with pytest.raises(InputError, match=f"2 sweeps of the name fine; name one with --sweep: {both}"):
        runs_of_sweep(store(uri, "fine", "two"))
    assert len(runs_of_sweep(store(uri, str(tmp_path / "fine"), "two")).runs) == 1


def test_runs_are_compared_by_tag(uri: str, recorded: list[str], tmp_path: Path, capsys: Any) -> None:
    """Runs of whatever sweep that have all tags are compared; where none has, the message names the tags."""
    client = mlflow.MlflowClient(tracking_uri=uri)
    for one in recorded[2:]:
        client.set_tag(one, "paper", "it's")
    given = ["compare", "wsiflow", "--uri", uri, "--bootstrap", "100", "--out", str(tmp_path / "out")]
    assert main([*given, "--tag", "paper=it's", "--tag", "digest.model=m1"]) == 0
    assert "compared   2 settings with stride=56" in capsys.readouterr().out
    assert main([*given, "--tag", "paper=it's", "--tag", "digest.model=m2"]) == 20
    assert "no finished run with paper=it's and digest.model=m2" in capsys.readouterr().err


def test_single_runs_do_not_join_the_only_sweep(uri: str, tmp_path: Path) -> None:
    """Single runs of the same experiment are left out of the sweep's comparison."""
    for sweep, folder in ((None, "single"), ("fine", "fine")):
        log(store(uri, sweep, "one"), [Trial({"inference.stride": 16}, 1.0, some(3))], tmp_path, key=folder)
    assert [one.sweep for one in runs_of_sweep(store(uri, None, "one")).runs] == ["fine"]


def test_what_is_not_in_a_store_is_named(uri: str, recorded: list[str], tmp_path: Path, capsys: Any) -> None:
    """A missing database or experiment ends with exit code 20 and creates nothing."""
    assert main(["compare", "x", "--uri", f"sqlite:///{tmp_path}/absent.db"]) == 20
    assert not list(tmp_path.iterdir())
    assert main(["compare", "absent", "--uri", uri]) == 20
    said = capsys.readouterr().err
    assert "absent.db: there is no such MLflow store" in said
    assert re.search("no experiment 'absent'; name one of: .*wsiflow", said)


def test_folders_and_mlflow_agree(uri: str, tmp_path: Path) -> None:
    """The folders of a sweep are compared, and their records are found by the identity of the folder and tagged."""
    params = store(uri, experiment="folders")
    out = tmp_path / "sweep"
    ids = []
    for name, n_found, cost in (("a", 4, 2.0), ("b", 3, 3.0)):
        write_folder(out / name, some(n_found), cost)
        (out / name / "receipts").mkdir()
        receipt = {"attempt": f"folder-{name}", "path": "config.yaml", "key": "k", "sha256": "0" * 64, "bytes": 0}
        (out / name / "receipts/config.yaml.json").write_text(json.dumps(receipt))
        trial = Trial({"run": name}, cost, some(n_found))
        ids += log(params, [trial], tmp_path / name, key=f"k{name}", tags={"wsiflow.folder": f"folder-{name}"})
    (out / "died/evaluation").mkdir(parents=True)  # between two files
    (out / "died/evaluation/matches.json").write_text("{}")
    result = comparison.compare_sweep_folder(out, params, QUICK)
    assert result is not None
    assert (out / "report.html").exists()
    client = mlflow.MlflowClient(tracking_uri=params.uri)
    assert [client.get_run(one).data.tags["wsiflow.pareto"] for one in ids] == ["yes", "no"]


def test_trials_that_failed_are_named(tmp_path: Path) -> None:
    """A trial that failed is left out with its reason, whether or not it has a folder."""
    write_folder(tmp_path / "a", some(3))
    write_folder(tmp_path / "b", some(3))
    selection = runs_of_trials(tmp_path, {"b": "the memory\nended", "stride=30": "it must divide 224"})
    assert [one.name for one in selection.runs] == ["a"]
    assert selection.notes == [
        "Left out, since it has no scores: b: the memory ended.",
        "Left out, since it has no scores: stride=30: it must divide 224.",
    ]


def test_a_sweep_that_is_not_compared_is_described(uri: str, tmp_path: Path) -> None:
    """The page of the sweep says why there is no comparison, and how its trials ended."""
    params = store(uri, "lost", "described")
    start = tracking.RunStart("stride=8", "f8", str(tmp_path / "8"), str(tmp_path), processes.current())
    tracking.fail_run(params, start, "slide a: the memory ended; use fewer workers")
    logged = comparison.describe_sweep(tmp_path, params, "no run has a score", {"stride=30": "it must divide 224"})
    note = mlflow.MlflowClient(tracking_uri=uri).get_run(logged.run_id).data.tags["mlflow.note.content"]
    assert "were not compared: no run has a score." in note
    assert "stride=30: it must divide 224." in note
    assert "- **stride=8** failed: slide a: the memory ended; use fewer workers" in note


def test_one_run_is_no_sweep(tmp_path: Path) -> None:
    """Nothing is written for a single run, or where no run has scores."""
    off = tracking.TrackingParams.model_validate({**store("x").model_dump(), "kind": "off"})
    write_folder(tmp_path / "sweep/a", some(3))
    assert comparison.compare_sweep_folder(tmp_path / "sweep", off, QUICK) is None
    assert comparison.compare_sweep_folder(tmp_path / "absent", off, QUICK) is None
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["a"]


def test_skill_is_told_from_luck() -> None:
    """On forty slides a worse setting differs significantly, and an equally good one does not."""
    found = compared(
        run("good", drawn(0.8), 3.0, stride=16),
        run("same", drawn(0.8), 2.0, stride=32),
        run("bad", drawn(0.3), 1.0, stride=224),
    )
    p = {row.name: row.differences["froc.score"].p_corrected for row in found.rows if row.differences}
    assert p["stride=224"] < 0.05
    assert p["stride=32"] == 1.0


# --- a sweep


_ASKED_OF_A_SWEEP = ("compare.margin=0.5", "compare.families={strides: [inference.stride]}")
_ASKED = ("--margin", "0.5", "--family", "strides=inference.stride")


def test_a_sweep_ends_with_its_comparison(small_slides: Path, tmp_path: Path, capsys: Any) -> None:
    """A sweep over two strides leaves the comparison in its folder, and front and figures in MLflow."""
    out = tmp_path / "sweep"
    quick = ["executor=inline", "orchestrator=none", "dense.windows=4", "evaluation.bootstrap=20", "store=none"]
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    given = ["dataset=manifest", f"dataset.manifest={small_slides}", f"out={out}", "name=strides", *quick]
    assert main(["run", "-m", "inference.stride=112,224", *given, *_ASKED_OF_A_SWEEP, f"tracking.uri={uri}"]) == 0
    said = capsys.readouterr().out
    assert "compared   2 settings" in said
    assert re.search(r"MLflow     http://127.0.0.1:5000/#/experiments/1/runs\?.*viewStateShareKey=sweep-", said)
    with (out / "compare.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["stride"], row["family"], bool(row["margin_verdict"])) for row in rows] == [
        ("112", "", False),
        ("224", "strides", True),
    ]
    for row in rows:
        summary = json.loads((out / f"inference.stride={row['stride']}/evaluation/summary.json").read_text())
        assert float(row["froc.score"]) == pytest.approx(summary["froc.score"])
        assert float(row["roc.auc"]) == pytest.approx(summary["roc.auc"])
        assert float(row["core_hours_mean"]) == summary["cost.total_core_s"] / 3600
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("wsiflow").experiment_id
    runs = client.search_runs([experiment], "tags.`wsiflow.role` = 'run'")
    assert {one.info.run_name: one.data.tags["wsiflow.pareto"] for one in runs} == {
        f"stride={row['stride']}": row["pareto"] for row in rows
    }
    assert max(len(kind) for one in runs for kind in (one.data.metrics, one.data.params)) <= 15
    assert all(
        "![froc](get-artifact?path=figures%2Ffroc.png&run_" in one.data.tags["mlflow.note.content"] for one in runs
    )
    assert len({one.data.tags["digest.dataset"] for one in runs}) == 1
    (parent,) = client.search_runs([experiment], "tags.`wsiflow.role` = 'sweep'")
    assert "tradeoff.png" in {one.path for one in client.list_artifacts(parent.info.run_id)}
    again = tmp_path / "again"
    assert main(["compare", "wsiflow", "--uri", uri, "--bootstrap", "20", "--out", str(again), *_ASKED]) == 0
    columns = set(rows[0]) - {"runs"}
    with (again / "compare.csv").open(newline="") as stream:
        assert [{key: row[key] for key in columns} for row in csv.DictReader(stream)] == [
            {key: row[key] for key in columns} for row in rows
        ], "folders and MLflow tell the same"
