"""Start small runs that take seconds, and read their files."""

import csv
import hashlib
import json
from pathlib import Path

from flows.cli import main

COARSE = [
    "inference.stride=112",
    "dense.windows=40",
    "executor=inline",
    "orchestrator=none",
    "tracking=off",
    "evaluation.bootstrap=50",
]
# Files that contain times; all other files have the same bytes in every run.
TIMED = {"summary.json", "trace.csv", "attempts.jsonl", "timing.json", "costs.json", "process_list.csv", "report.html"}
# Files that hold the configuration, which names the folder of the run.
INPUTS = {"config.yaml", "cases.json"}


def wsiflow(*arguments: str) -> int:
    return main(["run", *arguments])


def over(manifest: Path, out: Path, *more: str) -> list[str]:
    return ["dataset=manifest", f"dataset.manifest={manifest}", f"out={out}", *COARSE, *more]


def digests(out: Path) -> dict[str, str]:
    files = (path for path in out.rglob("*") if path.is_file() and path.name not in TIMED | INPUTS)
    kept = (
        path for path in files if not {"receipts", ".attempts", ".hydra", "workers"} & set(path.relative_to(out).parts)
    )
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def attempts(out: Path) -> dict[str, str]:
    return {str(p): json.loads(p.read_text())["attempt"] for p in (out / "receipts").rglob("*.json")}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))
