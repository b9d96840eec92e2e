"""Document how to repeat a run and how to check that the repetition gives the same bytes (``repeat.json``).

Input: a scored run. Output: JSON values. Machines and versions come from the run's receipts, not from the machine that
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
from wsiflow.slides.kinds import SyntheticSlides
from wsiflow.system import publish

_MACHINE = ("host", "cpu", "versions", "numeric_class")


def document(run: ScoredRun, table: Path | None, exported: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of ``repeat.json`` as JSON values.

    Args:
        run: The run.
        table: The table of subgroups that was read beside the manifest, or None.
        exported: SHA-256 of the other exported files, by name.
    """
    receipts = _receipts(run.root)
    manifest, slides = scored.manifest(run), run.config.dataset
    return {
        "numbers": json.loads((run.folder / "summary.json").read_text(encoding="utf-8")),
        "partial": run.is_partial,
        "config": redaction.redacted(run.config.model_dump(mode="json")),
        "settings": run.plan.settings.numbers(),
        "plan": {
            "hash": run.plan.hash,
            "slides": len(run.plan.slides),
            "tasks": run.plan.n_groups,
            "choice": run.plan.settings.choice._asdict(),
        },
        "protocol": run.record.protocol,
        "protocol_hash": run.record.protocol_hash,
        "seeds": {"run": run.config.seed, "dataset": slides.seed if isinstance(slides, SyntheticSlides) else None},
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
    """Return the commands that verify, repeat and compare the run, for the folder of the exported files."""
    root = shlex.quote(str(run.root.absolute()))
    return [
        f"wsiflow verify {root}",
        "wsiflow run --config-dir . --config-name repeat out=runs/again",
        f"wsiflow compare-maps {root} runs/again --bound 0",
        "wsiflow export regulatory runs/again --out again",
    ]


def _receipts(root: Path) -> list[publish.Receipt]:
    """Return the receipts of a run's published files, ordered by file name."""
    return [receipt for name in publish.receipt_names(root) if (receipt := publish.read_receipt(root, name))]


def _is_output(name: str) -> bool:
    """Tell whether a repetition of the run must publish this file with the same bytes."""
    return name.startswith(("heatmaps/", "maps/", "detections/", "evaluations/")) and not name.endswith(".png")


def _machines(receipts: list[publish.Receipt]) -> list[dict[str, Any]]:
    """Return host, CPU, versions and numeric class of every process that published files, with the number of files."""
    machines: dict[str, dict[str, Any]] = {}
    for receipt in receipts:
        about = {name: receipt[name] for name in _MACHINE if name in receipt}
        if "numeric_class" in about:
            one = machines.setdefault(json.dumps(about, sort_keys=True), {**about, "files": 0})
            one["files"] += 1
    return [machines[key] for key in sorted(machines)]


def _model(run: ScoredRun) -> dict[str, Any]:
    """Return the identity of the model, and its card where the card still exists and is still the one of the run."""
    identity = run.plan.settings.model_identity
    try:
        model_card = card.read_card(run.config.model)
    except InputError as error:
        return {"identity": identity, "card": None, "note": str(error)}
    if card.identity(model_card) != identity:
        return {"identity": identity, "card": None, "note": "the card is no longer that of the run"}
    return {"identity": identity, "weights_sha256": model_card.sha256, "card": model_card.model_dump(mode="json")}
