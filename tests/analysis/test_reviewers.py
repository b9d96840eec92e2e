"""Exports for reviewers of complete and partial runs, and of folders that a test has damaged."""

import argparse
import csv
import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from swept import matches, slide

from flows import cli
from flows.cli import main
from flows.commands.export import FORMATS
from flows.compose import compose_config
from wsiflow.analysis import scored
from wsiflow.analysis.reviewers import calibration, subgroups
from wsiflow.analysis.reviewers.format import Format
from wsiflow.analysis.reviewers.imrmc import export_imrmc
from wsiflow.analysis.reviewers.regulatory import _repeat_yaml
from wsiflow.errors import InputError, IntegrityError
from wsiflow.evaluation import roc
from wsiflow.evaluation.matches import read_matches
from wsiflow.heatmap import files
from wsiflow.plan import geometry
from wsiflow.plan.geometry import Frame
from wsiflow.run.config import RunConfig


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def export(run: Path, out: Path, *more: str) -> Path:
    assert cli.main(["export", "regulatory", str(run), "--out", str(out), *more]) == 0
    return out


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an export with the label as a subgroup."""
    return export(finished, tmp_path_factory.mktemp("export"), "--subgroups", "label")


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture(scope="module")
def partial(small_slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with a rejected slide, an excluded slide, and one beyond the limit."""
    folder = tmp_path_factory.mktemp("partial")
    manifest = folder / "cases.csv"
    lines = [f"{row['slide_id']},{small_slides.parent / row['path']},{row['mpp']},{row['label']},"
             f"{small_slides.parent / row['annotation_path'] if row['annotation_path'] else ''},{scanner}"
             for row, scanner in zip(rows(small_slides)[2:], ("A", "A", "B", ""), strict=True)]  # fmt: skip
    gone = f"gone,{folder}/gone.tif,,normal,,B"
    manifest.write_text("\n".join(["slide_id,path,mpp,type,annotation,center", gone, *lines, ""]))
    common = ["dataset=manifest", f"dataset.manifest={manifest}", "inference.stride=112", "dense.windows=0"]
    common += ["executor=inline", "orchestrator=none", "tracking=off", "evaluation.bootstrap=20"]
    common += ["dataset.limit=4", "allow_partial=true", "evaluation.exclude=[tumor_002]"]
    assert main(["run", f"out={folder / 'run'}", *common]) == 10
    return folder / "run"


# --- iMRMC


def parsed(text: str) -> tuple[dict[str, int], dict[str, int], dict[tuple[str, str, str], float]]:
    """Parse iMRMC text as iMRMC does: sizes, truth by case, scores by reader, case and modality."""
    lines = text.split("\n")
    start = lines.index("BEGIN DATA:")
    sizes = {line[:2]: int(line[3:]) for line in lines[:start] if line[:3] in {"NR:", "N0:", "N1:", "NM:"}}
    truth: dict[str, int] = {}
    found: dict[tuple[str, str, str], float] = {}
    assert lines[-1] == "", "the file ends with a line's end"
    for line in lines[start + 1 : -1]:
        reader, case, modality, score = line.split(",")
        if reader == "-1":
            assert case not in truth
            truth[case] = int(score)
        else:
            assert (reader, case, modality) not in found
            found[reader, case, modality] = float(score)
    return sizes, truth, found


def slides_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)


def write_slides(arguments: argparse.Namespace) -> list[str]:
    names = [case.slide_id for case in scored.read(arguments.run).cases]
    arguments.out.write_text("\n".join(names))
    return [f"{len(names)} slides: {arguments.out}"]


def test_an_export_format_is_a_record_in_the_table(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command knows its help, its options and what it writes by the record alone."""
    monkeypatch.setitem(FORMATS, "slides", Format("slides", "names of slides", slides_options, write_slides))
    with pytest.raises(SystemExit):
        cli.main(["export", "--help"])
    assert "    slides    names of slides" in capsys.readouterr().out
    out = tmp_path / "slides.txt"
    assert cli.main(["export", "slides", str(finished), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{len(out.read_text().splitlines())} slides: {out}\n"


def test_imrmc_of_two_runs(two_settings: tuple[Path, Path], tmp_path: Path) -> None:
    """Sizes, one truth per case, and scores that give each run's AUC to the bit."""
    out = tmp_path / "study.imrmc"
    assert cli.main(["export", "imrmc", *map(str, two_settings), "--out", str(out)]) == 0
    sizes, truth, found = parsed(out.read_text())
    assert sizes == {"NR": 1, "N0": 3, "N1": 3, "NM": 2}
    assert sum(truth.values()) == 3
    assert len(found) == 12
    for run in two_settings:
        scores = [found["wsiflow", case, run.name] for case in truth]
        summary = json.loads((run / "evaluation/summary.json").read_text())
        assert roc.auc(scores, list(truth.values())) == summary["roc.auc"]
        record = read_matches(run / "evaluation/matches.json").slides
        assert scores == [one.score for one in record]


def broken_matches(run: Path, change: Any) -> None:
    path = run / "evaluation/matches.json"
    matches = json.loads(path.read_text())
    change(matches["slides"])
    path.write_text(json.dumps(matches))


def drop_from_auc(slides: list[Any]) -> None:
    slides[0]["in_auc"] = False


def relabel(slides: list[Any]) -> None:
    for one in slides:
        if one["slide_id"] == "normal_002":
            one.update(label=1, in_froc=False)


@pytest.mark.parametrize(
    ("change", "cause"), [(drop_from_auc, "other cases than .*normal_001"), (relabel, "other labels than .*normal_002")]
)
def test_runs_over_different_cases_are_refused(finished: Path, copied: Path, change: Any, cause: str) -> None:
    broken_matches(copied, change)
    with pytest.raises(InputError, match=cause):
        export_imrmc([finished, copied], [], copied / "x.imrmc")


def test_a_missing_score_is_named(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken_matches(copied, lambda slides: slides[2].update(score=None))
    assert cli.main(["export", "imrmc", str(copied), "--out", str(copied / "x.imrmc")]) == 20
    message = capsys.readouterr().err
    assert "slides.2.score" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("names", "cause"),
    [("a,b,c", "3 names for 2 runs"), ("a,a", "two runs are called 'a'"), ("a b,c", "other characters than")],
)
def test_names_that_imrmc_cannot_tell_apart_are_refused(
    two_settings: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], names: str, cause: str
) -> None:
    out = str(tmp_path / "x.imrmc")
    assert cli.main(["export", "imrmc", *map(str, two_settings), "--names", names, "--out", out]) == 20
    assert cause in capsys.readouterr().err


def test_one_class_has_no_study_and_the_rest_is_written(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without normal slides the export is written without study.imrmc, and a note says so."""

    def only_tumour(slides: list[Any]) -> None:
        for one in slides:
            one["in_auc"] = one["in_auc"] and one["label"] == 1

    broken_matches(copied, only_tumour)
    out = export(copied, copied / "out")
    assert "no study.imrmc: 3 tumour and 0 normal slides" in capsys.readouterr().out
    assert not (out / "study.imrmc").exists()
    assert json.loads((out / "calibration.json").read_text())["slides"]["slope"]["value"] is None


# --- the case list


def test_the_case_list_has_every_slide_of_the_manifest(partial: Path, tmp_path: Path) -> None:
    """Every slide of the manifest has a row with status and reason, and they add up."""
    out = export(partial, tmp_path / "out", "--subgroups", "center", "--no-cells")
    listed = {row["slide_id"]: row for row in rows(out / "case_list.csv")}
    assert {name: row["status"] for name, row in listed.items()} == {
        "gone": "rejected",
        "normal_003": "evaluated",
        "tumor_001": "evaluated",
        "tumor_002": "excluded",
        "tumor_003": "excluded",
    }
    assert "does not exist" in listed["gone"]["reason"]
    assert listed["tumor_002"]["reason"]
    assert "dataset.limit is 4" in listed["tumor_003"]["reason"]
    slide = partial.parent / rows(partial.parent / "cases.csv")[1]["path"]
    assert listed["normal_003"]["slide_sha256"] == hashlib.sha256(slide.read_bytes()).hexdigest()
    digest = hashlib.sha256((out / "case_list.csv").read_bytes()).hexdigest()
    assert (out / "case_list.csv.sha256").read_text() == f"{digest}  case_list.csv\n"
    assert json.loads((out / "repeat.json").read_text())["partial"] is True
    groups = [(row["group"], row["slides"]) for row in rows(out / "subgroups.csv")]
    assert groups == [("", "2"), ("A", "2")]


def test_slides_without_an_outcome_are_never_passed_over(copied: Path) -> None:
    """A missing and an additional line of the process list are errors."""
    path = copied / "process_list.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], ""]))
    with pytest.raises(IntegrityError, match="not those that the run completed: tumor_003"):
        scored.read(copied)
    broken_matches(copied, lambda slides: slides.pop())
    with pytest.raises(IntegrityError, match="without an outcome: tumor_003"):
        scored.case_list(scored.read(copied))


def test_a_failed_slide_is_listed_with_its_reason(copied: Path) -> None:
    """A slide that failed in a partial run keeps its reason and has no score."""
    path = copied / "process_list.csv"
    text = path.read_text().replace("normal_001,done,", "normal_001,failed,the disk was full")
    path.write_text(text)
    broken_matches(copied, lambda slides: slides.pop(0))
    shutil.move(copied / "evaluation", copied / "evaluation-PARTIAL")
    run = scored.read(copied)
    assert run.is_partial
    listed = scored.case_list(run)
    assert listed[0][:3] == ("normal_001", "failed", "the disk was full")
    assert scored.counts(listed) == {"planned": 6, "evaluated": 5, "excluded": 0, "failed": 1, "rejected": 0}


# --- calibration


def test_cells_are_compared_with_the_outlines_as_drawn(finished: Path, exported: Path) -> None:
    """Counts and Brier score equal those of a loop over single cells."""
    run = scored.read(finished)
    total, positives, squares = 0, 0, 0.0
    for planned, case in zip(run.plan.slides, run.cases, strict=True):
        heat, _ = files.read_heatmap(finished / f"heatmaps/{planned.slide_id}.tif")
        mask, ignored = calibration._marks(run, case, planned)
        assert (mask.any(), ignored) == (case.label == 1, None)
        for row, col in np.argwhere(np.isfinite(heat)).tolist():
            x, y = geometry.l0_from_h(planned.frame, np.array([[col, row]], np.float64))[0] // 32
            truth = bool(mask.any() and mask[int(y), int(x)])
            total, positives = total + 1, positives + truth
            squares += (float(heat[row, col]) - truth) ** 2
    found = json.loads((exported / "calibration.json").read_text())["cells"]
    assert (found["n"], found["positives"]) == (total, positives)
    assert found["brier"] == pytest.approx(squares / total)
    assert positives > 50


def test_cells_beyond_the_mask_are_no_tumour(tmp_path: Path) -> None:
    """Cells outside a mask that is all tumour count as normal."""
    frame = Frame("centred", 320, 320, 1.0, 1.0, 32, 32, 32, 0, 1, 1, 0, 0, 10, 10)
    heat = np.full((10, 10), 0.5, np.float32)
    heat[0] = np.nan
    files.write_heatmap(tmp_path / "h.tif", heat, um_px=32.0, description={"frame": frame._asdict()})
    (found,) = calibration.cell_bins(tmp_path / "h.tif", frame, np.ones((4, 3), bool), 32)
    assert (found.total, found.positives.sum()) == (90, 3 * 3)
    ignored = np.ones((2, 10), bool)  # of whose cells half have no score
    (found,) = calibration.cell_bins(tmp_path / "h.tif", frame, np.ones((4, 3), bool), 32, ignored=ignored)
    assert (found.total, found.positives.sum()) == (80, 2 * 3)


# --- subgroups


def test_subgroups_have_the_scores_of_their_slides(finished: Path, exported: Path) -> None:
    """The first row has the run's own scores; small groups are marked."""
    summary = json.loads((finished / "evaluation/summary.json").read_text())
    everything, normal, tumour = rows(exported / "subgroups.csv")
    assert (float(everything["auc"]), float(everything["froc"])) == (summary["roc.auc"], summary["froc.score"])
    assert (normal["group"], normal["tumour"], normal["auc"]) == ("normal", "0", "")
    assert (tumour["group"], tumour["slides"]) == ("tumour", "3")
    assert "small: 3 tumour and 0 normal slides" in tumour["note"]
    assert float(everything["sensitivity_low"]) == pytest.approx(0.025 ** (1 / 3))  # Clopper and Pearson, 3 of 3


def test_a_slide_at_the_threshold_is_positive() -> None:
    """A normal slide that scores just the threshold is a false positive, and a tumour slide a true one."""
    found = matches(
        [slide("t", 1, [0.5]), slide("u", 1, [0.4]), *(slide(f"n{i}", 0, false=[0.5 - i / 9]) for i in range(4))]
    )
    row = subgroups._row(found, "all", "", subgroups.SubgroupOptions(threshold=0.5, bootstrap=0, seed=0))
    assert (row["sensitivity"], row["specificity"]) == (0.5, 0.75)


def test_columns_come_from_a_table_too(finished: Path, tmp_path: Path) -> None:
    """A table may name slides that the run does not have; slides that it lacks form a group."""
    table = tmp_path / "t.csv"
    table.write_text("slide_id,Lesion_Class\ntumor_001,macro\ntumor_002,itc\nother,micro\n")
    found = scored.values(scored.read(finished), ["lesion_class"], table)["lesion_class"]
    assert found["tumor_001"] == "macro"
    assert found["tumor_003"] == found["normal_001"] == scored.NOT_GIVEN


@pytest.mark.parametrize(
    ("columns", "table", "cause"),
    [
        ("stainer", None, "no column 'stainer'.*label"),
        ("a", "slide_id,a\nx,1\nx,2\n", "slide x has 2 lines"),
        ("a", "name,a\nx,1\n", "no column slide_id"),
        ("a", "slide_id,a\nx\n", "line 2 has 1 cells"),
        ("a", "", "the table of slides is empty"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(
    finished: Path, tmp_path: Path, columns: str, table: str | None, cause: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(table or "")
    with pytest.raises(InputError, match=cause):
        scored.values(scored.read(finished), [columns], None if table is None else path)


def test_too_many_groups_are_refused(finished: Path) -> None:
    """A column with a value per slide does not define subgroups."""
    record = scored.read(finished).record
    many = [one.model_copy(update={"slide_id": f"s{k}"}) for k in range(60) for one in record.slides[:1]]
    with pytest.raises(InputError, match="60 values for 60 slides"):
        subgroups.table(
            record.model_copy(update={"slides": many}),
            {"patient_id": {one.slide_id: one.slide_id for one in many}},
            subgroups.SubgroupOptions(0.5, 0, 0),
        )


# --- repeating


def test_the_exported_configuration_is_that_of_the_run(finished: Path, exported: Path, tmp_path: Path) -> None:
    """Hydra composes repeat.yaml to the same configuration, whose run is equal within a bound of 0."""
    record = json.loads((exported / "repeat.json").read_text())
    config = RunConfig.model_validate(record["config"])
    assert config == scored.read(finished).config
    assert config != compose_config([])
    command = next(line for line in record["commands"] if "--config-name" in line)
    again = command.replace("--config-dir .", f"--config-dir {exported}").replace("runs/again", str(tmp_path / "again"))
    assert main(again.split()[1:]) == 0
    assert scored.read(tmp_path / "again").config == config.model_copy(update={"out": tmp_path / "again"})
    assert cli.main(["compare-maps", str(finished), str(tmp_path / "again"), "--bound", "0"]) == 0
    second = export(tmp_path / "again", tmp_path / "second", "--subgroups", "label")
    for name in ("calibration.json", "case_list.csv", "subgroups.csv"):
        assert (second / name).read_bytes() == (exported / name).read_bytes()
    other = json.loads((second / "repeat.json").read_text())
    assert len(record["outputs"]) > 18
    assert other["outputs"] == record["outputs"], "the same bytes: heatmaps, detections, scores"
    assert other["plan"]["hash"] == record["plan"]["hash"]


def test_a_trial_is_repeated_by_itself(finished: Path) -> None:
    """A repeated trial shares no files of its sweep and does not join it in MLflow."""
    run = scored.read(finished)
    tracking = run.config.tracking.model_copy(update={"sweep": "strides"})
    trial = run.config.model_copy(update={"share": Path("/runs/strides/.shared"), "tracking": tracking})
    settings = yaml.safe_load(_repeat_yaml(dataclasses.replace(run, config=trial)))
    assert (settings["share"], settings["tracking"]["sweep"]) == (None, None)


def test_outlines_that_have_changed_since_are_refused(copied: Path) -> None:
    """Cells must be compared with the truth of the scores."""

    def other(slides: list[dict[str, Any]]) -> None:
        slides[-1]["truth"] = "0" * 64

    broken_matches(copied, other)
    with pytest.raises(
        IntegrityError, match=r"tumor_003.*the annotated regions are no longer those that the slide was scored with"
    ):
        calibration.documents(scored.read(copied), cells=True)


def test_every_file_has_its_hash(exported: Path) -> None:
    """SHA256SUMS covers all files except itself, and repeat.json all files before it."""
    listed = dict(reversed(line.split("  ")) for line in (exported / "SHA256SUMS").read_text().splitlines())
    there = {path.name: path for path in exported.iterdir() if path.is_file()}
    assert listed.keys() == there.keys() - {"SHA256SUMS"}
    assert all(hashlib.sha256(there[name].read_bytes()).hexdigest() == digest for name, digest in listed.items())
    record = json.loads((exported / "repeat.json").read_text())
    assert record["exported"] == {name: listed[name] for name in listed if name != "repeat.json"}
    assert len(record["protocol_hash"]) == len(record["model"]["weights_sha256"]) == 64
    assert sum(machine["files"] for machine in record["machines"]) > 20
    assert not any(isinstance(value, float) and math.isnan(value) for value in record["numbers"].values())


@pytest.mark.parametrize(
    ("gone", "cause"),
    [
        ("cases.json", "the folder holds no run"),
        ("process_list.csv", "has not ended yet"),
        ("evaluation/matches.json", "not scored by this version"),
    ],
)
def test_what_was_not_scored_ends_in_one_line(
    copied: Path, capsys: pytest.CaptureFixture[str], gone: str, cause: str
) -> None:
    (copied / gone).unlink()
    assert cli.main(["export", "regulatory", str(copied), "--out", str(copied / "out")]) == 20
    message = capsys.readouterr().err
    assert cause in message
    assert message.count("\n") == 1
    assert not (copied / "out").exists()


# --- QuPath
