"""What a run is recorded as in MLflow."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wsiflow import redaction
from wsiflow.evaluation import matches
from wsiflow.run import tracking
from wsiflow.run.cases import folder_id
from wsiflow.run.config import RunConfig
from wsiflow.run.plan import Plan
from wsiflow.run.stages import choose
from wsiflow.slides.kinds import source_of
from wsiflow.system import publish
from wsiflow.system.provenance import versions

_KEPT = ("path", "kind", "slide", "attempt", "cpu", "cpu_s", "wall_s", "seconds", "counts", "shared", "stain_failures")


def all_receipts(root: Path) -> list[publish.Receipt]:
    """Return the receipt of everything computed for slides in this folder, and of what was computed for all of them.

    Each is read once, and of each only what the end of a run counts is kept: there are ten for every slide. How scores
    are computed is settled before there is a plan: that is warm-up.
    """
    names = publish.receipt_names(root)
    found = (receipt for name in names if (receipt := publish.read_receipt(root, name)) is not None)
    return [
        {name: receipt[name] for name in _KEPT if name in receipt}
        for receipt in found
        if receipt.get("slide") or receipt.get("kind") == "calibration"
    ]


def track(
    shown: Path, config: RunConfig, made: Plan, key: str, metrics: Mapping[str, float], machines: Mapping[str, str]
) -> str:
    """Record the run in MLflow and say where, or why not: the run is valid without it."""
    root = shown.parent
    curves = json.loads((shown / "froc.json").read_text(encoding="utf-8"))
    matched = matches.read_matches(shown / "matches.json")
    identity, found = folder_id(root), digests(made)
    record = tracking.RunRecord(
        name=config.out.name if config.tracking.sweep else config.name,
        # The same scores in another folder are another run: its cost is its own.
        key=publish.key_of(scores=key, folder=identity),
        plan_hash=made.hash,
        partial=shown.name != "evaluation",
        # Where a run lies is no setting: it would be an axis of every plot of MLflow.
        params=settings(config.model_dump(mode="json", exclude={"out", "share"}), made),
        metrics=metrics,
        tags={
            **{f"version.{name}": number for name, number in versions().items()},
            **found,
            **machines,
            "wsiflow.folder": identity,
            "wsiflow.out": str(config.out),
            "wsiflow.protocol_hash": matched.protocol_hash,
            "wsiflow.truth_hash": matched.truth_hash(),
        },
        artifacts=[
            *(path for path in sorted(shown.iterdir()) if path.suffix in {".json", ".csv"}),
            *(root / name for name in ("report.html", "process_list.csv")),
            publish.generations(root, "config.yaml")[-1],
        ],
        dataset=(source_of(config.dataset).name, found["digest.dataset"][:32]),
        figures={path.name: path.read_bytes() for path in sorted(shown.glob("*.png"))},
        tables={f"froc_{mode}.json": curves[mode] for mode in ("official", "strict")},
    )
    logged = tracking.log_run(config.tracking, record)
    where = f"{redaction.without_secrets(config.tracking.uri)} run {logged.run_id}"
    return f"MLflow     {where if logged.run_id else logged.reason}"


def machines(root: Path, config: RunConfig, receipts: Sequence[publish.Receipt]) -> dict[str, str]:
    """Return the CPUs of whoever did the work."""
    settled = json.loads((root / choose.choice_name(config)).read_text(encoding="utf-8"))
    return {
        "cpu.model": "; ".join(sorted({receipt["cpu"] for receipt in receipts if "cpu" in receipt})),
        "cpu.flags": " ".join(settled["cpu_flags"]),
    }


def settings(values: Mapping[str, Any], made: Plan) -> dict[str, Any]:
    """Return every setting by dotted name, with what was chosen in the place of what was left open.

    Args:
        values: The configuration as JSON values.
        made: The run's plan.
    """
    chosen = {f"inference.{name}": getattr(made.settings.choice, name) for name in ("engine", "backend", "precision")}
    sizes = {f"tiles.{name}": getattr(made.settings.choice, name) for name in ("halo_px", "block_rows", "block_cols")}
    return _flat(values) | chosen | sizes


def digests(made: Plan) -> dict[str, str]:
    """Return what stands for the model and for the pixels of the slides: SHA-256, by tag."""
    slides = sorted([planned.slide_id, planned.sha256] for planned in made.slides)
    return {"digest.model": made.settings.model_identity, "digest.dataset": publish.key_of(slides=slides)}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
