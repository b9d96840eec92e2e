"""The progress of a run, from its folder alone."""

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from flows import cli
from wsiflow.run import progress
from wsiflow.run.executor import driver, jobs
from wsiflow.run.plan import latest_plan
from wsiflow.run.progress import Follower, Snapshot
from wsiflow.run.stages.line import ROUGH
from wsiflow.system import publish


@pytest.fixture
def half(finished: Path, tmp_path: Path) -> Path:
    """The folder of a run without the scores of one slide and all that follows from them, and without attempts."""
    root = Path(shutil.copytree(finished, tmp_path / "run"))
    (root / "attempts.jsonl").unlink()
    slide_id = latest_plan(root).slides[0].slide_id
    shutil.rmtree(root / f"predictions/{slide_id}")
    for name in (f"heatmaps/{slide_id}.tif", f"detections/{slide_id}.csv"):
        publish.receipt_path(root, name).unlink()
    return root


def note(root: Path, now: datetime, stage: str, slide: int, seconds: tuple[float, float], **more: Any) -> None:
    """Log an attempt that began and ended given seconds before ``now``, one moment for all attempts of a test."""
    moments = (now - timedelta(seconds=ago) for ago in seconds)
    started, ended = (moment.isoformat(timespec="milliseconds") for moment in moments)
    row = {"stage": stage, "slide": latest_plan(root).slides[slide].slide_id, "group": 1, "index": slide, "error": ""}
    row |= {"started": started, "ended": ended, "exit_class": "ok", **more}
    with (root / "attempts.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def test_durations_have_fitting_units() -> None:
    """Durations are in seconds, hours or days as fits; one that is unknown is left out."""
    whole = Snapshot({}, (12, 40), (1203, 4000), 0.3, 85.2, 1900.0)
    assert whole.as_text() == "12 of 40 slides, 1,203 of 4,000 tiles, 85 tiles/s, about 32 min left"
    assert whole._replace(tiles_per_s=None, left_s=None).as_text() == "12 of 40 slides, 1,203 of 4,000 tiles"
    said = {
        seconds: whole._replace(left_s=seconds).as_text().partition("about ")[2] for seconds in (0.2, 9e3, 3e5, 0.0)
    }
    assert list(said.values()) == ["1 s left", "2.5 h left", "3.5 days left", ""]
    assert Snapshot({"ingest": (3, 1000)}).as_text() == "ingest 3 of 1,000 slides"


def test_status_shows_the_speed_of_a_running_run(half: Path, capsys) -> None:
    """The speed is that of the attempts since the start, and the time left follows from it and the costs of tasks."""
    slides, now = latest_plan(half).slides, datetime.now(UTC)
    began = (now - timedelta(seconds=60)).isoformat(timespec="milliseconds")
    for slide, seconds in ((1, (40, 30)), (2, (30, 20)), (3, (9000, 10))):  # the last one is of an earlier start
        note(half, now, "predict", slide, seconds)
    assert cli.main(["status", str(half)]) == 0
    tiles = sum(each.n_tiles for each in slides)
    counted = f"5 of 6 slides, {tiles - slides[0].n_tiles:,} of {tiles:,} tiles"
    assert f"\n{counted}\n" in capsys.readouterr().out, "no driver runs"
    (half / driver.LOG).write_text(json.dumps({"event": "driver", "at": began, **jobs.identity()}) + "\n")
    assert cli.main(["status", str(half)]) == 0
    said = capsys.readouterr().out
    assert f"\n{counted}, {(slides[1].n_tiles + slides[2].n_tiles) / 20:.1f} tiles/s, about " in said
    assert "  predict " in said
    reached = progress.snapshot(half, latest_plan(half), began)
    left = sum(ROUGH.task_s(stage, slides[0].n_tiles) for stage in ("predict", "stitch", "detect"))
    done = sum(ROUGH.task_s("predict", slides[index].n_tiles) for index in (1, 2))
    assert reached.left_s == pytest.approx(left / (done / 20), rel=1e-3)
    assert 0.5 < reached.share < 1


def test_a_follower_sees_what_the_disk_holds(half: Path) -> None:
    """A follower sees files that are published meanwhile, and slides that failed, for which no time is left."""
    follower, begun = Follower(half), datetime.now(UTC)
    slides = latest_plan(half).slides
    before = follower.snapshot()
    assert before is not None
    assert (before.slides, before.stages["detect"], before.left_s) == ((5, 6), (5, 6), None)
    note(half, begun, "predict", 1, (-1, -11))
    waiting = follower.snapshot()
    assert waiting is not None
    assert waiting.left_s
    note(half, begun, "stitch", 0, (-1, -2), error="no space left", exit_class="environment")
    given_up = follower.snapshot()
    assert given_up is not None
    assert (given_up.slides, given_up.left_s) == ((5, 6), 0.0)
    assert given_up.share < 1
    for name in (f"heatmaps/{slides[0].slide_id}.tif", f"detections/{slides[0].slide_id}.csv"):
        publish.receipt_path(half, name).write_text("{}")
    now = follower.snapshot()
    assert now is not None
    assert now.stages["detect"] == (6, 6)
    (half / "plan.json").unlink()
    assert follower.snapshot() == Snapshot({"ingest": (6, 6)})
    assert Follower(half / "nowhere").snapshot() is None
