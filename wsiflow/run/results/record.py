"""Record a run in MLflow: collect its settings, metrics, digests, files and figures."""

import json
import math
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wsiflow import redaction
from wsiflow.errors import WsiflowError
from wsiflow.evaluation import matches
from wsiflow.model.card import read_card
from wsiflow.run import first_pass, trace, tracking
from wsiflow.run.cases import folder_id, swept
from wsiflow.run.config import RunConfig
from wsiflow.run.plan import Plan
from wsiflow.run.results.cost import core_hours_text
from wsiflow.run.stages import choose
from wsiflow.slides.kinds import source_of
from wsiflow.system import processes, publish
from wsiflow.system.provenance import versions

_KEPT = ("path", "kind", "slide", "attempt", "cpu", "cpu_s", "wall_s", "seconds", "counts", "shared", "stain_failures")


def published_names(root: Path) -> list[str]:
    """Return the names of all files with a receipt, those of a cascade's first pass with its folder in front."""
    first = publish.receipt_names(first_pass.folder_of(root))
    return [*publish.receipt_names(root), *(f"{first_pass.FOLDER}/{name}" for name in first)]


def all_receipts(root: Path) -> list[publish.Receipt]:
    """Return the receipts of all files that were computed for slides, and of the calibration for all slides.

    Each receipt is read once, and only the fields that the metrics need are kept, since there are about ten receipts
    per slide. The choice of engine and backend is warm-up and not among them. The files of a cascade's first pass are
    among them: their kinds and paths begin with its folder, so that its tiles are not counted a second time.
    """
    kept = []
    for folder in ("", f"{first_pass.FOLDER}/"):
        for name in publish.receipt_names(root / folder):
            receipt = publish.read_receipt(root / folder, name)
            if receipt is not None and (receipt.get("slide") or receipt.get("kind") == "calibration"):
                own = {field: receipt[field] for field in _KEPT if field in receipt}
                if folder:
                    own.pop("stain_failures", None)  # the run's own pass has them of the same slides
                kept.append(own | {field: f"{folder}{own[field]}" for field in ("path", "kind") if field in own})
    return kept


def all_attempts(root: Path) -> list[dict[str, Any]]:
    """Return every attempt at a task, in the order of their submission; those of a first pass are called so."""
    own, folder = trace.attempts(root), first_pass.folder_of(root)
    if not folder.is_dir():
        return own
    first = (
        row | {name: f"{first_pass.FOLDER} {row[name]}" for name in ("task", "stage")} for row in trace.attempts(folder)
    )
    return sorted([*own, *first], key=lambda row: str(row["submit"]))


def begin(config: RunConfig) -> None:
    """Record that a run has begun, in a thread: importing MLflow takes seconds, and the end of the run needs it too.

    The run's folder exists. A run whose folder has a finished record is not recorded again.
    """
    if config.tracking.kind == "off" or config.out in _begun:
        return
    arguments = (config.tracking, _start(config))
    thread = threading.Thread(target=tracking.begin_run, args=arguments, name="mlflow", daemon=True)
    _begun[config.out] = thread
    thread.start()


def fail(config: RunConfig, reason: str) -> None:
    """Record that a run ended without scores, and why."""
    if thread := _begun.pop(config.out, None):
        thread.join()
        tracking.fail_run(config.tracking, _start(config), reason)


# The records of runs of this process that are being begun: what is recorded next has to come after them.
_begun: dict[Path, threading.Thread] = {}


def _start(config: RunConfig) -> tracking.RunStart:
    return tracking.RunStart(
        name=_name(config),
        folder=folder_id(config.out),
        out=str(config.out),
        sweep_folder=_sweep_folder(config),
        driver=processes.current(),
    )


def _name(config: RunConfig) -> str:
    """Return the name of a run in lists: what distinguishes a trial from others, else its own or its folder's."""
    if config.tracking.sweep:
        return short_name(config.out.name)
    return config.name if config.name != "run" else config.out.name


def short_name(trial: str) -> str:
    """Return the name of a trial with the last part of each key alone, such as ``stride=56, precision=bf16``."""
    keys = [_last_part(key) for key in _KEYS.findall(trial)]
    if len(set(keys)) < len(keys):
        return trial
    return _KEYS.sub(lambda found: f"{', ' if found.start() else ''}{_last_part(found[1])}=", trial)


def _last_part(key: str) -> str:
    return key.removesuffix(".method").removesuffix(".kind").rpartition(".")[2]


_KEYS = re.compile(r"(?:^|,)([A-Za-z_][\w.@/+]*)=")


def _sweep_folder(config: RunConfig) -> str:
    return str(config.out.parent) if config.tracking.sweep else ""


def track(
    shown: Path, config: RunConfig, plan: Plan, key: str, metrics: Mapping[str, float], machines: Mapping[str, str]
) -> str:
    """Record a run in MLflow, and return lines that say where, or why it was not recorded.

    The run is valid without its record.

    Args:
        shown: Folder of the scores: ``evaluation`` or ``evaluation-PARTIAL`` in the run's folder.
        config: The run's configuration.
        plan: The run's plan.
        key: Key of the scores.
        metrics: Every number of ``summary.json``.
        machines: The processors, see `machines`.
    """
    record = _record(shown, config, plan, key, metrics, machines)
    if thread := _begun.pop(config.out, None):
        thread.join()
    logged = tracking.log_run(config.tracking, record)
    if logged.run_id is None:
        return f"MLflow     {logged.reason}"
    if config.tracking.sweep:  # the end of the sweep says how to see it
        return f"MLflow     {redaction.without_secrets(config.tracking.uri)} run {logged.run_id}"
    return "MLflow     " + "\n           ".join(tracking.opening_lines(config.tracking, logged))


def _record(
    shown: Path, config: RunConfig, plan: Plan, key: str, metrics: Mapping[str, float], machines: Mapping[str, str]
) -> tracking.RunRecord:
    root = shown.parent
    curves = json.loads((shown / "froc.json").read_text(encoding="utf-8"))
    matched = matches.read_matches(shown / "matches.json")
    identity, digest_tags = folder_id(root), digests(plan)
    # The folder of a run is not a setting; as a parameter it would be an axis of every plot in MLflow.
    every = settings(config.model_dump(mode="json", exclude={"out", "share"}), plan)
    source = source_of(config.dataset)
    return tracking.RunRecord(
        name=_name(config),
        # The same scores in another folder are another run, which has its own cost.
        key=publish.key_of(scores=key, folder=identity),
        plan_hash=plan.hash,
        partial=shown.name != "evaluation",
        documents={
            "settings.json": every,
            "environment.json": {"versions": versions(), "cpu_flags": machines["cpu.flags"]},
        },
        params={name: every[name] for name in _MAIN_SETTINGS if name in every},
        metrics=main_metrics(metrics),
        tags={
            **digest_tags,
            "cpu.model": machines["cpu.model"],
            "wsiflow.folder": identity,
            "wsiflow.out": str(config.out),
            "wsiflow.swept": ",".join(f"{key}={value}" for key, value in swept(root).items()),
            "wsiflow.protocol_hash": matched.protocol_hash,
            "wsiflow.truth_hash": matched.truth_hash(),
            **intervals(metrics),
        },
        artifacts=[
            *(path for path in sorted(shown.iterdir()) if path.suffix in {".json", ".csv"}),
            *(root / name for name in ("report.html", "process_list.csv")),
            publish.generations(root, "config.yaml")[-1],
        ],
        dataset=tracking.DatasetRecord(
            source.name, digest_tags["digest.dataset"][:32], str(source), len(matched.slides)
        ),
        figures={path.name: path.read_bytes() for path in sorted(shown.glob("*.png"))},
        tables={f"froc_{mode}.json": curves[mode] for mode in ("official", "strict")},
        sweep_folder=_sweep_folder(config),
        description=_description(config, plan, metrics, len(matched.slides)),
        model=_model(config, plan),
    )


# What is read in tables and charts; summary.json and settings.json have everything.
_MAIN_METRICS = (
    "froc.score",
    "froc.score_ci_low",
    "froc.score_ci_high",
    "froc.strict_score",
    "froc.n_normal",
    "roc.auc",
    "roc.auc_ci_low",
    "roc.auc_ci_high",
    "cost.total_core_hours",
    "cost.allocated_core_hours",
    "throughput.core_hours",
    "throughput.tiles_per_s",
    "throughput.efficiency",
    "energy.joules",
    "certificate.froc_difference_ci_low",
    "certificate.slides_beyond",
    "cascade.missed",
    "tissue.lesion_recall",
    "tissue.n_slides_empty",
)
_MAIN_SETTINGS = (
    "model.card",
    "geometry.convention",
    "geometry.spacing",
    "inference.engine",
    "inference.backend",
    "inference.precision",
    "inference.stride",
    "inference.cascade.threshold",
    "stain.method",
    "tissue.method",
    "lesions.method",
    "evaluation.name",
    "executor.kind",
    "executor.workers",
    "repeat",
)


def main_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that a run is judged by, each with four significant digits."""
    return {name: float(f"{metrics[name]:.4g}") for name in _MAIN_METRICS if name in metrics}


def intervals(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return the intervals of the scores as tags, which are columns of MLflow's table."""
    return {"froc.interval": _interval(metrics, "froc.score"), "auc.interval": _interval(metrics, "roc.auc")}


def _interval(metrics: Mapping[str, float], name: str) -> str:
    low, high = (metrics.get(f"{name}_ci_{end}", math.nan) for end in ("low", "high"))
    return f"{low:.3f} to {high:.3f}" if math.isfinite(low) and math.isfinite(high) else "none"


def _normal_slides(metrics: Mapping[str, float]) -> str:
    return f", {metrics['froc.n_normal']:.0f} normal slides" if "froc.n_normal" in metrics else ""


def _description(config: RunConfig, plan: Plan, metrics: Mapping[str, float], n_slides: int) -> str:
    """Return what a reader of the run's page wants to know first, as Markdown with the figures."""
    chosen = plan.settings.choice
    missing = len(plan.slides) + len(plan.rejected) - n_slides
    scores = [
        f"**{name} {metrics[metric]:.3f}** ({_interval(metrics, metric)}{over})"
        for name, metric, over in (("FROC", "froc.score", _normal_slides(metrics)), ("AUC", "roc.auc", ""))
        if math.isfinite(metrics[metric])
    ]
    return (
        f"{', '.join(scores) or 'No scores: there is no truth'}; {core_hours_text(metrics)}.\n\n"
        f"{n_slides} slides of `{source_of(config.dataset)}`{f', {missing} are missing' if missing else ''}; model "
        f"`{config.model.card}`, stride {chosen.stride_px}, {chosen.engine}, {chosen.backend} "
        f"{chosen.precision}. Folder: `{config.out}`.\n\n"
        + " ".join(f"![{name}](get-artifact?path=figures%2F{name}.png&run_uuid={{run}})" for name in ("froc", "roc"))
    )


def _model(config: RunConfig, plan: Plan) -> tracking.ModelRecord | None:
    """Return the classifier for the model registry; None where its card has gone since it was planned."""
    try:
        card = read_card(config.model)
    except WsiflowError:
        return None
    about = {"Trained on": card.trained_on, "Licence": card.licence, "Notes": card.notes}
    return tracking.ModelRecord(
        name=card.name,
        identity=plan.settings.model_identity,
        architecture=card.architecture,
        card=card.model_dump_json(indent=1),
        description="\n\n".join(f"**{name}:** {text}" for name, text in about.items() if text),
    )


def machines(root: Path, config: RunConfig, receipts: Sequence[publish.Receipt]) -> dict[str, str]:
    """Return the models and flags of the CPUs that did the work, by name."""
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
