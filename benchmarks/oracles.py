"""Points of the experiment on worked examples (oracles): run the tests that hold each example.

Input: names of the tests of each example. Output: the number of test cases that passed, and of those that did not. The
examples and their expected results are in the tests only. A test that is renamed, skipped or missing did not pass.
"""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def _oracle(settings: Mapping[str, Any], *, seed: int) -> dict[str, float]:  # noqa: ARG001 - nothing is drawn
    tests: Mapping[str, Sequence[str]] = settings["tests"]
    every = tuple(sorted({name for names in tests.values() for name in names}))
    outcomes = _run(every, settings["data"])
    own = [outcomes.get(name, {"absent": 1}) for name in tests[settings["oracle"]]]
    passed = sum(each.get("passed", 0) for each in own)
    return {"tests": len(own), "cases": passed, "not_passed": sum(sum(each.values()) for each in own) - passed}


@cache
def _run(names: tuple[str, ...], data: str) -> Mapping[str, Mapping[str, int]]:
    """Run tests once and return, for each test function, the number of its cases by outcome."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *_files(names),
        ]
        command += ["-k", " or ".join(sorted({name.rpartition("::")[2] for name in names}))]
        subprocess.run(command, cwd=ROOT, env=_environment(data), check=False, capture_output=True)
        outcomes: dict[str, dict[str, int]] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            path = case.get("classname", "").replace(".", "/") + ".py"
            name = f"{path}::{case.get('name', '').partition('[')[0]}"
            outcome = next((child.tag for child in case if child.tag in {"failure", "error", "skipped"}), "passed")
            ended = outcomes.setdefault(name, {})
            ended[outcome] = ended.get(outcome, 0) + 1
        return outcomes


def _files(names: Sequence[str]) -> list[str]:
    return sorted({name.partition("::")[0] for name in names})


def _environment(data: str) -> dict[str, str]:
    return os.environ | {"WSIFLOW_TEST_DATA": str(Path(data).resolve())}


POINTS = {"oracle": _oracle}
