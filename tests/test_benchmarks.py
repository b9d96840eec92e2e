"""Benchmarks run, and say what they found."""

import json
from pathlib import Path

import pytest

from benchmarks import cascade_hours, core_hours, report
from benchmarks import engines as engines_benchmark
from benchmarks.measuring import Spread


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of results of a quick comparison of engines."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WSIFLOW_CACHE", str(folder / "cache"))
        engines_benchmark.main(["--quick", "--demo", "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def engines(results: Path) -> dict:
    """What it wrote."""
    return json.loads((results / "engines.json").read_text())


def test_a_result_says_what_it_was_measured_on(engines: dict) -> None:
    """Without the machine, a number means nothing."""
    assert engines["benchmark"] == "engines"
    assert engines["settings"]["quick"]
    machine = engines["machine"]
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert len(machine["load_average"]) == 3
    assert {"torch", "openvino"} <= set(machine["versions"])


def test_dense_is_faster_than_windows_by_far(engines: dict) -> None:
    """Both columns are given; five times is a floor that holds on any machine, however busy."""
    dense = engines["values"]["demo"]["dense, openvino fp32"]
    for column in ("against_reference", "against_window"):
        median, low, high = dense[column]
        assert low <= median <= high
        assert median > 5


def test_rounds_count_the_same_tiles(engines: dict) -> None:
    """Every contestant runs in every round, and half a tile of windows is not charged as a whole one."""
    values = engines["values"]["demo"]
    assert {len(each["rounds"]) for each in values.values()} == {2}
    for name, each in values.items():
        tiles = {tiles for _, _, tiles in each["rounds"]}
        # 43 x 43 scores of a region of 896 px, 28 windows of a loop
        assert tiles == {43 * 43 / 196 if name.startswith("dense") else 28 / 196}


def test_the_document_gets_tables_between_its_marks(results: Path, tmp_path: Path) -> None:
    """Text by hand stays; what was not measured says so; a second time changes nothing."""
    document = tmp_path / "performance.md"
    document.write_text(
        "by hand\n<!-- begin engines -->\nold\n<!-- end engines -->\n<!-- begin line -->\nold\n<!-- end line -->\n"
        "<!-- begin targets -->\n<!-- end targets -->\nafter\n"
    )
    report.main(["--results", str(results), "--document", str(document)])
    text = document.read_text()
    assert text.startswith("by hand\n")
    assert text.endswith("after\n")
    assert "| dense, openvino fp32 |" in text
    assert "<!-- begin line -->\nNot measured yet.\n<!-- end line -->" in text
    assert "not measured" in text.split("begin targets")[1]
    assert "old" not in text
    report.main(["--results", str(results), "--document", str(document)])
    assert document.read_text() == text


def test_core_hours_keep_apart_what_was_measured_and_what_is_extrapolated() -> None:
    """Pixels times the measured rate, and what each slide costs besides; all slides by their number and by boxes."""
    line = {
        "s_megapixel": Spread(0.5, 0.5, 0.5),
        "certificate_s": Spread(6.0, 6.0, 6.0),
        "other_s": Spread(3.0, 3.0, 3.0),
        "tasks_s": Spread(12.0, 12.0, 12.0),
        "foretold_s": 10.0,
        "foretold_between_s": [9.0, 11.0],
        "worker_once_s": {"start": 1.0},
    }
    counted = {"tissue_tiles": 4e6, "windows": 7200.0, "megapixels, touching": 720.0, "megapixels, all": 1440.0}
    values = {
        "lines": {"fp32, stride 16": line},
        "windows_s": {"fp32": Spread(1.0, 1.0, 1.0)},
        "counted": {"16": counted},
        "slides": ["a", "b"],
        "areas": {"a": 3.0, "b": 3.0, "e": 6.0},
        "boxes": {"a": 10, "b": 10, "e": 20, "c": 40, "d": 80, "f": 80},
    }
    values["core_h"] = core_hours._core_hours(values)
    hours = values["core_h"]["fp32, stride 16, touching"]
    assert hours == pytest.approx(
        {"outlines": 0.1 + 18 / 3600, "by slides": 0.4 + 54 / 3600, "by boxes": 1.2 + 54 / 3600}
    )
    assert values["core_h"]["fp32, stride 16, windows one by one"]["outlines"] == pytest.approx(2.0)
    _, estimates, foretold = core_hours._tables(values)
    assert [name.partition(":")[0] for name in estimates.columns[1:4]] == [
        "counted",
        "counted and measured",
        "extrapolated",
    ]
    assert foretold.rows[0][-1] == "**no**", "12 core-seconds are not within 9 to 11"


def test_core_hours_of_a_cascade_are_shares_of_those_without() -> None:
    """Of the pixels' cost the first and the own pass have a share, and every slide has more certificates."""
    line = {"s_megapixel": [0.5, 0.5, 0.5], "certificate_s": [6.0, 6.0, 6.0], "other_s": [3.0, 3.0, 3.0]}
    values = {
        "lines": {"bf16, stride 16": line},
        "counted": {"16": {"megapixels, touching": 720.0}},
        "slides": ["a"],
        "areas": {"a": 3.0},
        "boxes": {"a": 10, "b": 10},
        "core_h": {"bf16, stride 16, touching": {"by slides": 1.0, "by boxes": 2.0}},
    }
    parts = {"first pass": 0.0, "own pass": 100.0, "certificates": 10.0}
    cascade = {
        "bf16, stride 16: none": {"parts_s": parts},
        "bf16, stride 16: pcam": {"parts_s": {"first pass": 5.0, "own pass": 15.0, "certificates": 20.0}},
    }
    full = {"settings": {"quick": False}}
    results = {"core_hours": full | {"values": values}, "cascade": full | {"values": cascade}}
    [table] = cascade_hours.tables(results)
    hours = (720 * 0.5 * 0.2 * 2 + 2 * (2 * 6.0 + 3.0)) / 3600
    assert cascade_hours._hours(values, "bf16, stride 16", cascade_hours.Shares(0.05, 0.15, 2.0)) == pytest.approx(
        {"by slides": hours, "by boxes": hours}
    )
    assert table.rows == [["bf16, stride 16", "0.05", "0.15", "2.0", "1 to 2", "0 to 0", "35"]]
    assert cascade_hours.tables({**results, "cascade": {"settings": {"quick": True}}}) == []
    assert cascade_hours.tables({}) == []
