"""A stage is one record: a stage that is added to the table is run and reported without any other change."""

from pathlib import Path

import pytest
from small_runs import attempts, over, rows, wsiflow

from flows import cli
from wsiflow.run.costs import StageCost
from wsiflow.run.plan import Plan, Task, read_plan
from wsiflow.run.stages import detect
from wsiflow.run.stages.line import ROUGH, STAGES
from wsiflow.run.stages.stage import Stage
from wsiflow.system import publish
from wsiflow.system.provenance import facts


def tally(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Publish the number of lesions of a slide."""
    plan, root = read_plan(source), source.parent
    name, key = TALLY.product_of(plan, index), TALLY.key_of(root, plan, index)
    done = publish.done(root, name, key)
    if done is not None:
        return done, False
    lines = (root / detect.STAGE.product_of(plan, index)).read_text().count("\n")
    with publish.publishing(root, name, key, facts("tally", plan.slides[index].slide_id), publish.accept) as attempt:
        attempt.path.write_text(f"{lines}\n")
    return attempt.receipt, True


def key(root: Path, plan: Plan, task: Task) -> str:
    return publish.key_of(detections=detect.STAGE.published(root, plan, task.slide))


TALLY = Stage(
    name="tally",
    unit="slide",
    work=tally,
    product=lambda plan, task: f"tallies/{plan.slides[task.slide].slide_id}.txt",
    key=key,
    cost=StageCost(0.1, 0.0),
    steps=("write",),
)


def test_a_stage_that_is_added_to_the_table_is_a_stage_like_any(
    tiny_slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards, trace, status, explain, plan and a second start need only its record."""
    monkeypatch.setitem(STAGES, TALLY.name, TALLY)
    monkeypatch.setitem(ROUGH.stages, TALLY.name, TALLY.cost)  # what the table gives where the record is in its file
    out = tmp_path / "run"
    assert wsiflow(*over(tiny_slides, out)) == 0
    lesions = {path.stem: path.read_text().count("\n") for path in (out / "detections").glob("*.csv")}
    assert {path.stem: int(path.read_text()) for path in (out / "tallies").glob("*.txt")} == lesions
    assert {row["slide"] for row in rows(out / "trace.csv") if row["stage"] == "tally"} == lesions.keys()
    kept = attempts(out)
    assert wsiflow(*over(tiny_slides, out)) == 0
    assert attempts(out) == kept
    capsys.readouterr()
    assert cli.main(["status", str(out)]) == 0
    assert "  tally 2 of 2" in capsys.readouterr().out
    assert cli.main(["explain", str(out), "tally", "a"]) == 0
    assert "tally: tallies/a.txt published" in capsys.readouterr().out
    (out / "tallies/a.txt").unlink()
    assert wsiflow(*over(tiny_slides, out)) != 0, "other files may be computed from it: that it was deleted is an error"


def test_the_steps_and_costs_of_the_line_are_those_of_its_stages() -> None:
    """The report and the forecast take the steps and the costs from the record of a stage."""
    assert list(STAGES) == ["stain", "extract", "index", "predict", "certify", "stitch", "detect"]
    assert {name: ROUGH.stages[name] for name in STAGES} == {name: stage.cost for name, stage in STAGES.items()}
