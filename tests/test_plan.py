"""The plan: identity from content, and no silent change under a finished run."""

from pathlib import Path

import pytest

from wsiflow import plan
from wsiflow.errors import InputError
from wsiflow.geometry import Frame
from wsiflow.plan import Plan, Rejected, SlidePlan, Task

FRAME = Frame("centred", 896, 672, 1.0, 0.243, 224, 224, 112, 112, 1, 1, 0, 0, 4, 3)
SETTINGS = {"predict": {"stride": 112, "model": "m"}, "cut": {"halo": 112}}


def slide(name: str, key: str = "k1", path: str = "/data/a.svs") -> SlidePlan:
    return SlidePlan(name, path, "f" * 64, 0.243, 1, "", "", 32, FRAME, ((0, 1, 2), (2, 0, 4)), ((0, 3), (3, 6)), key)


def make(*slides: SlidePlan, settings: dict = SETTINGS, rejected: tuple[Rejected, ...] = ()) -> Plan:
    return Plan(settings, {"store": {"kind": "none"}}, slides, rejected)


def test_a_plan_comes_back_as_published(tmp_path: Path) -> None:
    """Writing and reading a plan changes nothing, its hash included."""
    made = make(slide("a"), slide("b"), rejected=(Rejected("c", "broken", 20),))
    again = plan.read(plan.publish_plan(tmp_path, made))
    assert again.hash == made.hash
    assert again.slides == made.slides
    assert list(again.tasks) == [Task(0, 1), Task(0, 2), Task(1, 1), Task(1, 2)]


def test_groups_are_ranges_of_the_slides_blocks() -> None:
    """Group 2 of a slide with runs (row 0: 1-2) and (row 2: 0-3) holds the last three tiles."""
    assert [(block.t_col, block.t_row) for block in slide("a").group(2)] == [(1, 2), (2, 2), (3, 2)]
    assert slide("a").n_tiles == 6


def test_a_task_key_follows_what_can_change_a_number() -> None:
    """Model, stride, slide content and blocks are in the key; the slide's place and the store are not."""
    base = plan.task_key(make(slide("a")), Task(0, 1))
    other_stride = {**SETTINGS, "predict": {"stride": 56, "model": "m"}}
    assert plan.task_key(make(slide("a"), settings=other_stride), Task(0, 1)) != base
    assert plan.task_key(make(slide("a", key="k2")), Task(0, 1)) != base
    assert plan.task_key(make(slide("a")), Task(0, 2)) != base
    assert plan.task_key(make(slide("a", path="/moved/a.svs")), Task(0, 1)) == base


def test_the_same_plan_again_is_the_same_file(tmp_path: Path) -> None:
    """A second identical run finds its plan."""
    assert plan.publish_plan(tmp_path, make(slide("a"))) == plan.publish_plan(tmp_path, make(slide("a")))
    assert len(list(tmp_path.glob("plan*.json"))) == 1


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    """A folder holds one set of settings; the message says which one differs and both values."""
    plan.publish_plan(tmp_path, make(slide("a")))
    with pytest.raises(InputError, match=r"predict.stride \(112 there, 56 now\); choose another out="):
        plan.publish_plan(tmp_path, make(slide("a"), settings={**SETTINGS, "predict": {"stride": 56, "model": "m"}}))


def test_a_mended_slide_may_join(tmp_path: Path) -> None:
    """A slide that was rejected and can now be read comes into a second generation of the plan."""
    plan.publish_plan(tmp_path, make(slide("a"), rejected=(Rejected("b", "missing", 20),)))
    assert plan.publish_plan(tmp_path, make(slide("a"), slide("b"))).name == "plan.2.json"


def test_a_planned_slide_may_not_change(tmp_path: Path) -> None:
    """Other pixels under the same id would mix two slides in one folder."""
    plan.publish_plan(tmp_path, make(slide("a"), slide("b")))
    with pytest.raises(InputError, match="have changed or are gone: b"):
        plan.publish_plan(tmp_path, make(slide("a"), slide("b", key="k2")))


def test_a_plan_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    """A damaged plan is one clear line."""
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(InputError, match="the plan cannot be read"):
        plan.read(tmp_path / "plan.json")
