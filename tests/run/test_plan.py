"""The plan: it is identified by its content, and does not change silently under a finished run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from damage import overwrite

from flows.compose import compose_config
from wsiflow.errors import InputError, IntegrityError
from wsiflow.model.choice import Choice
from wsiflow.plan.geometry import Frame
from wsiflow.plan.slide_plan import SlidePlan, cut_name, make_cut, read_cut, slide_key
from wsiflow.run.plan import Plan, Rejected, Task, publish_plan, read_plan, task_key
from wsiflow.run.settings import PlanSettings

FRAME = Frame("centred", 896, 672, 1.0, 0.243, 224, 224, 112, 112, 1, 1, 0, 0, 4, 3)
CONFIG = compose_config(["out=run", "stain=macenko"])
CHOICE = Choice("window", "torch", "fp32", 8, 112, "", 0, exact=True, halo_px=112, block_rows=1, block_cols=1)
SETTINGS = PlanSettings(
    geometry=CONFIG.geometry,
    tissue=CONFIG.tissue,
    tile_px=224,
    group_tiles=3,
    window_px=224,
    trained_um_px=0.243,
    choice=CHOICE,
    stain=CONFIG.stain,
    store=CONFIG.store.model_copy(update={"part_tiles": 3}),
    model=CONFIG.model,
    model_identity="m",
    pixel_versions={"openslide-bin": "4"},
    numeric_class={"isa": "avx2", "threads": "1"},
    certificate_windows=0,
    lesions=CONFIG.lesions,
    evaluation=CONFIG.evaluation,
    seed=0,
    tolerance=0.01,
    on_excess="fail",
    shared_layers=("pool",),
    reason="windows are run one by one, as asked",
)
OTHER_STRIDE = SETTINGS.model_copy(update={"choice": CHOICE._replace(stride_px=56)})
AROUND = SETTINGS.model_copy(update={"choice": CHOICE._replace(local=True)})


TISSUE = np.array([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=bool)
CUT = make_cut(TISSUE, FRAME, group_tiles=3)


def slide(name: str, key: str = "k1", path: str = "/data/a.svs") -> SlidePlan:
    return SlidePlan(name, path, "f" * 64, 0.243, 1, "", "", 32, FRAME, 6, 6, 2, key)


def make(*slides: SlidePlan, settings: PlanSettings = SETTINGS, rejected: tuple[Rejected, ...] = ()) -> Plan:
    return Plan(settings, slides, rejected)


def publish_cut(root: Path, planned: SlidePlan) -> SlidePlan:
    """Write the cut of a slide in the run's folder, and return the slide with the key of its content."""
    path = root / cut_name(planned.slide_id)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(CUT.as_dict()))
    return planned._replace(key=slide_key(planned.sha256, FRAME, CUT))


def test_a_plan_comes_back_as_published(tmp_path: Path) -> None:
    """Writing and reading a plan changes nothing, its hash included."""
    plan = make(slide("a"), slide("b"), rejected=(Rejected("c", "broken", 20),))
    again = read_plan(publish_plan(tmp_path, plan))
    assert again.hash == plan.hash
    assert again.slides == plan.slides
    assert again.settings == plan.settings
    assert again.n_groups == 4
    assert [again.task("group", index) for index in range(4)] == [Task(0, 1), Task(0, 2), Task(1, 1), Task(1, 2)]


def test_means_around_every_place_decide_keys_only_where_they_are_taken() -> None:
    """Plans and keys of other runs stay those of earlier versions, which did not know them."""
    assert "local" not in SETTINGS.work()["choice"] | SETTINGS.of_scores["inference"]
    assert AROUND.work()["choice"]["local"]
    assert AROUND.of_scores["inference"]["local"]
    assert PlanSettings.from_values(AROUND.numbers(), AROUND.work()) == AROUND


def test_tasks_of_slides_without_tissue_are_none() -> None:
    """Tasks are numbered through slides with and without groups, and their numbers give the slides back."""
    sizes = [0, 2, 0, 0, 3, 1, 0]
    plan = make(*(slide(str(i))._replace(n_groups=count) for i, count in enumerate(sizes)))
    expected = [Task(i, k) for i, count in enumerate(sizes) for k in range(1, count + 1)]
    assert [plan.task("group", index) for index in range(plan.n_groups)] == expected
    for i, count in enumerate(sizes):
        tasks = plan.tasks_of("group", i)
        assert len(tasks) == count
        assert all(plan.task("group", index).slide == i for index in tasks)
    assert plan.task("slide", 4) == Task(4, 0)


def test_a_long_slide_is_extracted_in_parts() -> None:
    """Every group is in one part, and only a part of a single group may exceed the requested number of tiles."""
    store = CONFIG.store.model_copy(update={"part_tiles": 900})
    settings = SETTINGS.model_copy(update={"store": store, "group_tiles": 400})
    long = make(slide("a")._replace(n_groups=7), settings=settings)
    assert long.count("part") == 4
    assert [list(long.part(0, j)) for j in range(1, 5)] == [[1, 2], [3, 4], [5, 6], [7]]
    assert [long.part_of(k) for k in range(1, 8)] == [1, 1, 2, 2, 3, 3, 4]


def test_groups_are_ranges_of_the_slides_blocks(tmp_path: Path) -> None:
    """Group 2 of a slide with runs (row 0: 1-2) and (row 2: 0-3) holds the last three tiles."""
    cut = read_cut(tmp_path, publish_cut(tmp_path, slide("a")))
    assert cut == CUT
    assert [(block.t_col, block.t_row) for block in cut.group(2)] == [(1, 2), (2, 2), (3, 2)]


def test_tiles_that_are_not_those_planned_are_refused(tmp_path: Path) -> None:
    """The key of a slide contains its tiles: a changed file is an error with its name."""
    planned = publish_cut(tmp_path, slide("a"))
    path = tmp_path / cut_name("a")
    path.write_text(path.read_text().replace("[2, 0, 4]", "[2, 0, 3]"))
    with pytest.raises(IntegrityError, match=r"slide a.*cuts/a\.json.*not those that were planned"):
        read_cut(tmp_path, planned)
    path.write_text("{")
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_cut(tmp_path, planned)


def test_overlapping_blocks_come_back_as_published(tmp_path: Path) -> None:
    """A piece of tissue in the hollow of another is in the same block when the cut of a slide is read."""
    ring = np.ones((7, 7), np.bool_)
    ring[1:-1, 1:-1] = False
    ring[3, 3] = True
    frame = FRAME._replace(block_rows=9, block_cols=9)
    cut = make_cut(ring, frame, group_tiles=1000)
    planned = publish_cut(tmp_path, slide("a"))._replace(frame=frame)
    (tmp_path / cut_name("a")).write_text(json.dumps(cut.as_dict()))
    again = read_cut(tmp_path, planned._replace(key=slide_key(planned.sha256, frame, cut)))
    assert again == cut
    assert again.n_tiles == ring.sum()


def test_scored_cells_come_back_as_published(tmp_path: Path) -> None:
    """The cut of a slide says which cells are scored, and its key contains them; one without says that all are."""
    scored = np.random.default_rng(0).random((6, FRAME.cells_per_tile, FRAME.cells_per_tile)) < 0.5
    scored[3] = False  # this tile is in no block
    cut = make_cut(TISSUE, FRAME, group_tiles=3, scored=scored)
    planned = publish_cut(tmp_path, slide("a"))
    key = slide_key(planned.sha256, FRAME, cut)
    (tmp_path / cut_name("a")).write_text(json.dumps(cut.as_dict()))
    again = read_cut(tmp_path, planned._replace(key=key))
    assert again == cut
    assert np.array_equal(again.scored(FRAME), scored)
    assert sum(len(block.tissue) for block in cut.blocks) == int(scored.any(axis=(1, 2)).sum()) < 6
    assert key != planned.key
    assert CUT.scored(FRAME) is None
    assert "cells" not in CUT.as_dict()


def test_a_task_key_follows_what_can_change_a_number(tmp_path: Path) -> None:
    """The key depends on the model, the stride, the content and the blocks, but not on the slide's place or store."""
    planned = publish_cut(tmp_path, slide("a"))
    base = task_key(tmp_path, make(planned), Task(0, 1))
    assert task_key(tmp_path, make(planned, settings=OTHER_STRIDE), Task(0, 1)) != base
    (tmp_path / "other").mkdir()
    other = publish_cut(tmp_path / "other", planned._replace(sha256="e" * 64))
    assert task_key(tmp_path / "other", make(other), Task(0, 1)) != base
    assert task_key(tmp_path, make(planned), Task(0, 2)) != base
    assert task_key(tmp_path, make(planned._replace(path="/moved/a.svs")), Task(0, 1)) == base


def test_the_same_plan_again_is_the_same_file(tmp_path: Path) -> None:
    """A second identical run finds the plan published already."""
    assert publish_plan(tmp_path, make(slide("a"))) == publish_plan(tmp_path, make(slide("a")))
    assert len(list(tmp_path.glob("plan*.json"))) == 1


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    """A folder has one set of settings; the message names the setting that differs, and both values."""
    publish_plan(tmp_path, make(slide("a")))
    with pytest.raises(
        InputError, match=r"cut.stride \(112 there, 56 now\), predict.inference.stride_px .*; choose another out="
    ):
        publish_plan(tmp_path, make(slide("a"), settings=OTHER_STRIDE))


def test_a_fixed_slide_may_join(tmp_path: Path) -> None:
    """A rejected slide that can be read later joins the second generation of the plan."""
    publish_plan(tmp_path, make(slide("a"), rejected=(Rejected("b", "missing", 20),)))
    assert publish_plan(tmp_path, make(slide("a"), slide("b"))).name == "plan.2.json"


def test_a_planned_slide_may_not_change(tmp_path: Path) -> None:
    """A slide with other pixels under the same id is refused: it would mix two slides in one folder."""
    publish_plan(tmp_path, make(slide("a"), slide("b")))
    with pytest.raises(InputError, match="have changed or are gone: b"):
        publish_plan(tmp_path, make(slide("a"), slide("b", key="k2")))


def test_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    """A damaged plan is refused with one clear line."""
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(InputError, match="the plan cannot be read"):
        read_plan(tmp_path / "plan.json")


def test_an_unknown_setting_is_named(tmp_path: Path) -> None:
    """A plan with a setting that this version does not know is refused, and the setting is named."""
    path = publish_plan(tmp_path, make(slide("a")))
    text = path.read_text()
    overwrite(path, text.replace('"beyond": "stop"', '"beyond": "perhaps"'))
    with pytest.raises(
        InputError, match=r"plan\.json: .* not those of this version \(on_excess: Input should be .*\); read"
    ):
        read_plan(path)
    overwrite(path, re.sub('"settings": .*', '"settings": null,', text))
    with pytest.raises(InputError, match=r"plan\.json: .*settings are not those of this version"):
        read_plan(path)
