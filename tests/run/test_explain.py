"""``wsiflow explain`` and ``wsiflow retry``, from the files of a run alone."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from flows import cli as command
from flows.commands import retry
from wsiflow.errors import InputError
from wsiflow.run import cases, explain

COARSE = ["inference.stride=224", "executor=inline", "orchestrator=none", "tracking=off", "evaluation.bootstrap=0"]


@pytest.fixture(scope="module")
def finished(small_slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with two slides, one of which is missing."""
    folder = tmp_path_factory.mktemp("explained")
    with small_slides.open(newline="") as stream:
        rows = list(csv.DictReader(stream))[:2]
    for row in rows:
        row["path"] = str(small_slides.parent / row["path"])
    with (folder / "cases.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["slide_id", "path", "label"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows([*rows, {"slide_id": "gone", "path": "gone.tif", "label": "normal"}])
    out = folder / "run"
    overrides = ["dataset=manifest", f"dataset.manifest={folder / 'cases.csv'}", f"out={out}", *COARSE]
    assert command.main(["run", *overrides]) == 20
    return out


def said(root: Path, *words: str) -> str:
    return "\n".join(explain.explain(root, words))


def slide_of(root: Path) -> str:
    return sorted((root / "predictions").iterdir())[0].name


def test_a_task_is_told_with_its_key_and_attempts(finished: Path) -> None:
    """Host, time, key and every attempt of a task are stated."""
    text = said(finished, "predict", slide_of(finished), "1")
    assert "t1.h5 published" in text
    assert "numeric class" in text
    assert f"attempt 1 at predict {slide_of(finished)} 1: ok" in text


def test_a_slide_is_told_stage_by_stage(finished: Path) -> None:
    """A stage that the run does not need is stated too, here the stain normalisation."""
    text = said(finished, slide_of(finished))
    assert "stain:" in text
    assert "this run does not need it" in text
    assert "heatmaps/" in text


def test_a_rejected_slide_is_told_with_its_reason(finished: Path) -> None:
    """The reason is that of the plan."""
    assert "slide gone was not planned" in said(finished, "gone")


@pytest.mark.parametrize("words", [("nobody",), ("dance", "gone2"), ("predict", "x", "1")])
def test_a_task_that_is_not_there_is_bad_input(finished: Path, words: tuple[str, ...]) -> None:
    """The message says how tasks are named."""
    with pytest.raises(InputError, match=r"no task .*as in trace\.csv"):
        said(finished, *words)


def test_retry_does_what_is_missing_from_the_folder_alone(finished: Path, tmp_path: Path) -> None:
    """Without overrides a deleted file is computed again, and a failed slide is tried again."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    name = slide_of(out)
    for path in (out / f"predictions/{name}/t1.h5", out / f"receipts/predictions/{name}/t1.h5.json"):
        path.unlink()
    assert command.main(["retry", str(out)]) == 20
    assert (out / f"predictions/{name}/t1.h5").read_bytes() == (finished / f"predictions/{name}/t1.h5").read_bytes()
    assert f"attempt 2 at predict {name} 1: ok" in said(out, "predict", name, "1")


@pytest.mark.parametrize("spelled", ["./x/../run/", "link"])
def test_retry_publishes_nothing_however_the_folder_is_spelled(
    moved: Path, monkeypatch: pytest.MonkeyPatch, spelled: str
) -> None:
    """Another path to the same folder is not another configuration."""
    before = sorted(moved.glob("*.json"))
    monkeypatch.chdir(moved.parent)
    assert command.main(["retry", spelled]) == 20
    assert sorted(moved.glob("*.json")) == before


@pytest.fixture(scope="module")
def moved(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the run that was started once at its new place, and a link to it."""
    folder = tmp_path_factory.mktemp("moved")
    shutil.copytree(finished, folder / "run")
    (folder / "x").mkdir()
    (folder / "link").symlink_to(folder / "run")
    assert command.main(["retry", str(folder / "run")]) == 20
    assert json.loads((folder / "run/cases.2.json").read_text())["config"]["out"] == str(folder / "run")
    return folder / "run"


def test_nodes_must_see_a_slide_of_each_folder(finished: Path) -> None:
    """The model ships with wsiflow, and the folder of the missing slide is not here either."""
    listed = cases.read_cases(finished / "cases.json")[1]
    assert [case.path.exists() for case in listed] == [True, True, False]
    assert cases.needed_paths(finished / "cases.json") == [listed[0].path]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("inference.stride=8", "inference.stride=8 is no setting of the executor; give executor.KEY=VALUE"),
        ("executor", "executor is no setting of the executor"),
        ("executor.workers=-1", "executor.workers: Input should be greater than or equal to 0"),
        ("executor.array.memory_mb=9", "executor.array.dialect: Field required"),
    ],
)
def test_retry_takes_settings_of_the_executor_alone(
    finished: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    """What a message advises can be given to ``retry``; what would be another run is refused before it starts."""
    params = cases.read_cases(finished / "cases.json")[0].executor
    changed = retry._changed(params, ["executor.workers=3", "executor.slice_s=7"])
    assert (changed.workers, changed.slice_s, changed.kind) == (3, 7.0, params.kind)
    assert command.main(["retry", str(finished), setting]) == 20
    assert message in capsys.readouterr().err


def test_retry_of_a_folder_without_a_run_is_bad_input(tmp_path: Path) -> None:
    """A folder without a run ends with one line and exit code 20."""
    assert command.main(["retry", str(tmp_path)]) == 20
