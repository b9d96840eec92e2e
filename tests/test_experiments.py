"""Experiments: what their rules accept and refuse, and that each of them runs."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks import experiments
from benchmarks.experiments import FOLDER, POINTS, RULES, decide

SIMULATED = ["X1", "X10", "X16", "curve"]


def verdicts(check: dict, values: list[float], **more: list) -> list[bool]:
    rows = [{"x": i, "y": value} | {name: each[i] for name, each in more.items()} for i, value in enumerate(values)]
    axes = ["x", *(["group"] if "group" in more else [])]
    return [verdict.holds for verdict in decide({"says": "", "of": "y"} | check, rows, axes)]


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        ({"rule": "at_least", "bound": 2}, [2, 3], [1, 3]),
        ({"rule": "at_most", "bound": 2}, [2, 1], [1, 3]),
        ({"rule": "falls", "along": "x"}, [3, 2, 1], [3, 1, 2]),
        ({"rule": "falls", "along": "x", "tolerance": 0.2}, [3, 2, 2.2], [3, 2, 3.1]),
        ({"rule": "falls", "along": "x", "tolerance": 0.2}, [3, 2, 1], [3, 3, 3]),
        ({"rule": "rises", "along": "x"}, [1, 2, 3], [1, 3, 2]),
        ({"rule": "flat", "tolerance": 0.1}, [1, 1.05], [1, 1.2]),
        ({"rule": "valley", "along": "x", "margin": 0.1}, [2, 1, 2], [2, 1, 1.05]),
        ({"rule": "valley", "along": "x", "margin": 0.1}, [2, 1, 2], [3, 2, 1]),
        ({"rule": "below", "along": "x", "less": 1, "more": 0}, [2, 2], [2, 3]),
        ({"rule": "below", "along": "x", "less": 1, "more": 0, "factor": 0.5}, [2, 1], [2, 1.5]),
        ({"rule": "at_least", "bound": 2, "where": {"x": [1, 2]}}, [0, 2, 2], [5, 2, 1]),
    ],
)
def test_a_rule_accepts_its_shape_and_refuses_others(check: dict, good: list[float], bad: list[float]) -> None:
    """Every rule can fail."""
    assert verdicts(check, good) == [True]
    assert verdicts(check, bad) == [False]


def test_near_compares_two_numbers_of_a_point() -> None:
    """A model is near what it models, or is not."""
    check = {"rule": "near", "to": "model", "tolerance": 0.1}
    assert verdicts(check, [1.0, 2.0], model=[1.05, 1.9]) == [True]
    assert verdicts(check, [1.0, 2.0], model=[1.05, 1.5]) == [False]


def test_every_combination_of_the_other_axes_is_judged_by_itself() -> None:
    """One series that falls does not hide another that rises."""
    check = {"rule": "falls", "along": "x"}
    assert verdicts(check, [3, 1, 2, 4], group=["a", "b", "a", "b"]) == [True, False]


def test_a_rule_without_a_point_fails() -> None:
    """A typo in a condition is not a pass."""
    assert verdicts({"rule": "at_least", "bound": 0, "where": {"x": 7}}, [1, 2]) == [False]


def test_every_experiment_names_what_there_is() -> None:
    """Points and rules exist, repeats are three or more, quick sizes name axes."""
    files = sorted(FOLDER.glob("*.yaml"))
    assert {"X1", "X2", "X3", "X4", "X5", "X8", "X9", "X10", "X12", "X16"} <= {path.stem for path in files}
    for path in files:
        sweep = yaml.safe_load(path.read_text())
        assert sweep["point"] in POINTS
        assert sweep["repeats"] >= 3
        assert set(sweep.get("quick", {})) <= set(sweep["axes"])
        assert {check["rule"] for check in sweep["checks"]} <= set(RULES)


def test_simulated_experiments_run_and_the_papers_efficiency_comes_out(shared_data: Path, tmp_path: Path) -> None:
    """In a small size: results with verdicts, the reference's scheme above 0.85 where it has 25 waves."""
    experiments.main(["--quick", "--data", str(shared_data), "--out", str(tmp_path), "--only", *SIMULATED])
    assert {path.stem for path in tmp_path.glob("*.json")} == set(SIMULATED)
    strong = json.loads((tmp_path / "X1.json").read_text())
    held = {check["says"]: check["holds"] for check in strong["values"]["checks"]}
    assert held["the reference's scheme keeps 0.85 of its cores at 24 to 42 waves (the paper: 0.877)"]
    limits = json.loads((tmp_path / "X16.json").read_text())["values"]["checks"]
    assert all(check["holds"] for check in limits)


def test_real_processes_answer_like_the_points_of_an_experiment() -> None:
    """A fresh worker says when it has started, loaded and predicted."""
    found = POINTS["element"]({"group_tiles": 1}, seed=0)
    assert min(found["start_s"], found["load_s"], found["predict_s"]) > 0
    assert found["overhead_share"] > 0.5


def test_a_fit_for_each_patch_leaves_seams() -> None:
    """Two patches in two colours have a border; one fit for both has none, and the same pixels come out again."""
    settings = {"patch_px": 224, "quick": True, "method": "reinhard", "table": ""}
    slide, patch = (POINTS["colours"](settings | {"fitted": way}, seed=0) for way in ("slide", "patch"))
    assert slide["same_again"] == patch["same_again"] == 1
    assert slide["seam"] < 1.1 < patch["seam"]


def test_an_engine_is_compared_with_the_references_scores(shared_data: Path) -> None:
    """Windows that differ have the same scores, whole regions at once or one by one."""
    settings = {"network": "demo", "quick": True, "table": str(shared_data / "camelyon16/tables/patch_counts_dldp.csv")}
    for way in ("window openvino fp32", "dense openvino fp32"):
        found = POINTS["engine"](settings | {"way": way}, seed=0)
        assert found["score_range"] > 0.1
        assert found["max_diff"] < 1e-4
