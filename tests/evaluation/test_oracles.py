"""The experiment on worked examples names an existing test for each, and notices tests that did not pass."""

import re
from pathlib import Path

import yaml

from benchmarks.experiments import FOLDER, POINTS

ROOT = Path(__file__).parents[2]
# O-8, a published row of features, needs a heatmap that is not published.
EVERY = {"E1", "E2", "E3", *(f"O-{number}" for number in range(1, 15) if number != 8)}


def test_every_oracle_has_tests_that_exist() -> None:
    """E1 to E3 and O-1 to O-14 but O-8 have existing tests; a renamed test fails here first."""
    sweep = yaml.safe_load((FOLDER / "X13.yaml").read_text())
    named = sweep["settings"]["tests"]
    assert set(named) == set(sweep["axes"]["oracle"]) == EVERY
    for names in named.values():
        for name in names:
            path, _, function = name.partition("::")
            assert re.search(rf"^def {function}\(", (ROOT / path).read_text(), re.MULTILINE), name


def test_a_test_that_is_missing_or_skipped_has_not_passed(tmp_path: Path) -> None:
    """A test that is skipped for lack of data does not count as passed."""
    tests = {
        "good": ["tests/evaluation/test_roc.py::test_worked_example"],
        "absent": [
            "tests/evaluation/test_roc.py::test_worked_example",
            "tests/evaluation/test_roc.py::test_that_is_not_there",
        ],
        "skipped": ["tests/evaluation/test_roc.py::test_published_scores"],
    }
    found = {
        name: POINTS["oracle"]({"tests": tests, "oracle": name, "data": str(tmp_path / "none")}, seed=0)
        for name in tests
    }
    assert found["good"] == {"tests": 1, "cases": 1, "not_passed": 0}
    assert found["absent"] == {"tests": 2, "cases": 1, "not_passed": 1}
    assert found["skipped"] == {"tests": 1, "cases": 0, "not_passed": 3}
