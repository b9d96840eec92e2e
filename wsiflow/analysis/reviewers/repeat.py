"""``repeat.json``: everything needed to get a run's number again, and to see that it is the same.

Input: a scored run. Output: JSON values. What was computed where comes from the receipts, not from the machine that
exports.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wsiflow import redaction
from wsiflow.analysis import scored
from wsiflow.analysis.scored import ScoredRun
from wsiflow.errors import InputError
from wsiflow.model import card
from wsiflow.system import publish

_MACHINE = ("host", "cpu", "versions", "numeric_class")


def document(run: ScoredRun, table: Path | None, exported: Mapping[str, str]) -> dict[str, Any]:
    """Return the record.

    Args:
        run: The run.
        table: A table of subgroups that was read beside the manifest, or None.
        exported: SHA-256 of the other exported files, by name.
    """
    receipts = _receipts(run.root)
    manifest = scored.manifest(run)
    return {
        "numbers": json.loads((run.folder / "summary.json").read_text(encoding="utf-8")),
        "partial": run.is_partial,
        "config": redaction.redacted(run.config.model_dump(mode="json")),
        "settings": run.plan.settings,
        "plan": {
            "hash": run.plan.hash,
            "slides": len(run.plan.slides),
            "tasks": run.plan.n_groups,
            "choice": run.plan.work["choice"],
        },
        "protocol": run.record.protocol,
        "protocol_hash": run.record.protocol_hash,
        "seeds": {"run": run.config.seed, "dataset": run.config.dataset.seed},
        "dataset": {
            "sha256": publish.key_of(slides=sorted([one.slide_id, one.sha256] for one in run.plan.slides)),
            "truth_sha256": publish.key_of(truth=sorted([one.slide_id, one.truth] for one in run.record.slides)),
            "slides": {one.slide_id: one.sha256 for one in run.plan.slides},
            "manifest": None if manifest is None else publish.file_sha256(manifest),
            "table": None if table is None else publish.file_sha256(table),
        },
        "model": _model(run),
        "machines": _machines(receipts),
        "outputs": {receipt["path"]: receipt["sha256"] for receipt in receipts if _is_output(receipt["path"])},
        "scores": {path.name: publish.file_sha256(path) for path in sorted(run.folder.iterdir()) if path.is_file()},
        "exported": dict(exported),
        "commands": _commands(run),
    }


def _commands(run: ScoredRun) -> list[str]:
    """Return what to type, in the folder of the exported files."""
    root = shlex.quote(str(run.root.absolute()))
    return [
        f"wsiflow verify {root}",
        "wsiflow run --config-dir . --config-name repeat out=runs/again",
        f"wsiflow compare-maps {root} runs/again --bound 0",
        "wsiflow export regulatory runs/again --out again",
    ]


def _receipts(root: Path) -> list[publish.Receipt]:
    """Return what was published in a run's folder, in the order of the names."""
    return [receipt for name in publish.receipt_names(root) if (receipt := publish.read_receipt(root, name))]


def _is_output(name: str) -> bool:
    """Tell what a repeated run has to have the same bytes of."""
    return name.startswith(("heatmaps/", "detections/", "evaluations/")) and not name.endswith(".png")


def _machines(receipts: list[publish.Receipt]) -> list[dict[str, Any]]:
    """Return every kind of machine and process that computed something, with how many files it published."""
    found: dict[str, dict[str, Any]] = {}
    for receipt in receipts:
        about = {name: receipt[name] for name in _MACHINE if name in receipt}
        if "numeric_class" in about:
            one = found.setdefault(json.dumps(about, sort_keys=True), {**about, "files": 0})
            one["files"] += 1
    return [found[key] for key in sorted(found)]


def _model(run: ScoredRun) -> dict[str, Any]:
    """Return what identifies the model; its card only while it is still there and the same."""
    identity = run.plan.settings["predict"]["model"]
    try:
        found = card.read_card(run.config.model)
    except InputError as error:
        return {"identity": identity, "card": None, "note": str(error)}
    if card.identity(found) != identity:
        return {"identity": identity, "card": None, "note": "the card is no longer that of the run"}
    return {"identity": identity, "weights_sha256": found.sha256, "card": found.model_dump(mode="json")}
