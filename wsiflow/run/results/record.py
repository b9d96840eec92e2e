"""Record a run in MLflow: collect its settings, metrics, digests, files and figures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wsiflow import redaction
from wsiflow.evaluation import matches
from wsiflow.run import tracking
from wsiflow.run.cases import folder_id, swept
from wsiflow.run.config import RunConfig
from wsiflow.run.plan import Plan
from wsiflow.run.stages import choose
from wsiflow.slides.kinds import source_of
from wsiflow.system import publish
from wsiflow.system.provenance import versions

_KEPT = ("path", "kind", "slide", "attempt", "cpu", "cpu_s", "wall_s", "seconds", "counts", "shared", "stain_failures")


def all_receipts(root: Path) -> list[publish.Receipt]:
    """Return the receipts of all files that were computed for slides, and of the calibration for all slides.

    Each receipt is read once, and only the fields that the metrics need are kept, since there are about ten receipts
    per slide. The choice of engine and backend is warm-up and not among them.
    """
    names = publish.receipt_names(root)
    receipts = (receipt for name in names if (receipt := publish.read_receipt(root, name)) is not None)
    return [
        {name: receipt[name] for name in _KEPT if name in receipt}
        for receipt in receipts
        if receipt.get("slide") or receipt.get("kind") == "calibration"
    ]


def track(
    shown: Path, config: RunConfig, plan: Plan, key: str, metrics: Mapping[str, float], machines: Mapping[str, str]
) -> str:
    """Record a run in MLflow, and return a line that says where, or why it was not recorded.

    The run is valid without its record.

    Args:
        shown: Folder of the scores: ``evaluation`` or ``evaluation-PARTIAL`` in the run's folder.
        config: The run's configuration.
        plan: The run's plan.
        key: Key of the scores.
        metrics: Every number of ``summary.json``.
        machines: Tags of the processors, see `machines`.
    """
    root = shown.parent
    curves = json.loads((shown / "froc.json").read_text(encoding="utf-8"))
    matched = matches.read_matches(shown / "matches.json")
    identity, digest_tags = folder_id(root), digests(plan)
    record = tracking.RunRecord(
        name=config.out.name if config.tracking.sweep else config.name,
        # The same scores in another folder are another run, which has its own cost.
        key=publish.key_of(scores=key, folder=identity),
        plan_hash=plan.hash,
        partial=shown.name != "evaluation",
        # The folder of a run is not a setting; as a parameter it would be an axis of every plot in MLflow.
        params=settings(config.model_dump(mode="json", exclude={"out", "share"}), plan),
        metrics=metrics,
        tags={
            **{f"version.{name}": number for name, number in versions().items()},
            **digest_tags,
            **machines,
            "wsiflow.folder": identity,
            "wsiflow.out": str(config.out),
            "wsiflow.swept": ",".join(f"{key}={value}" for key, value in swept(root).items()),
            "wsiflow.protocol_hash": matched.protocol_hash,
            "wsiflow.truth_hash": matched.truth_hash(),
        },
        artifacts=[
            *(path for path in sorted(shown.iterdir()) if path.suffix in {".json", ".csv"}),
            *(root / name for name in ("report.html", "process_list.csv")),
            publish.generations(root, "config.yaml")[-1],
        ],
        dataset=(source_of(config.dataset).name, digest_tags["digest.dataset"][:32]),
        figures={path.name: path.read_bytes() for path in sorted(shown.glob("*.png"))},
        tables={f"froc_{mode}.json": curves[mode] for mode in ("official", "strict")},
    )
    logged = tracking.log_run(config.tracking, record)
    where = f"{redaction.without_secrets(config.tracking.uri)} run {logged.run_id}"
    return f"MLflow     {where if logged.run_id else logged.reason}"


def machines(root: Path, config: RunConfig, receipts: Sequence[publish.Receipt]) -> dict[str, str]:
    """Return the models and flags of the CPUs that did the work, as MLflow tags."""
    choice = json.loads((root / choose.choice_name(config)).read_text(encoding="utf-8"))
    return {
        "cpu.model": "; ".join(sorted({receipt["cpu"] for receipt in receipts if "cpu" in receipt})),
        "cpu.flags": " ".join(choice["cpu_flags"]),
    }


def settings(values: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Return every setting by dotted name, with the plan's engine, backend, precision, halo and block as chosen.

    Args:
        values: The configuration as JSON values.
        plan: The run's plan.
    """
    chosen = {f"inference.{name}": getattr(plan.settings.choice, name) for name in ("engine", "backend", "precision")}
    sizes = {f"tiles.{name}": getattr(plan.settings.choice, name) for name in ("halo_px", "block_rows", "block_cols")}
    return _flat(values) | chosen | {"inference.stride": plan.settings.choice.stride_px} | sizes


def digests(plan: Plan) -> dict[str, str]:
    """Return the SHA-256 of the model and of the slides' contents, by MLflow tag."""
    slides = sorted([planned.slide_id, planned.sha256] for planned in plan.slides)
    return {"digest.model": plan.settings.model_identity, "digest.dataset": publish.key_of(slides=slides)}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
