"""Sweeps as MLflow and folders have them, with scores that tests choose."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flows.compose import trials
from wsiflow.evaluation import evaluate
from wsiflow.evaluation.matches import EvaluationRecord, SlideRecord
from wsiflow.run import tracking
from wsiflow.run.config import evaluation_params
from wsiflow.run.results import record
from wsiflow.run.tracking import TrackingParams

PROTOCOL = evaluation_params("own_spacing", {})


class Trial(NamedTuple):
    """One run of a sweep."""

    params: dict[str, Any]
    core_hours: float
    matches: EvaluationRecord


def slide(slide_id: str, label: int, best: Sequence[float | None] = (), false: Sequence[float] = ()) -> SlideRecord:
    """Return a slide of ``matches.json``: its lesions' best hits, its false positives, and the highest as its score."""
    hits = [one for one in best if one is not None]
    return SlideRecord(
        slide_id=slide_id,
        label=label,
        score=max([0.0, *hits, *false]),
        in_froc=True,
        in_auc=True,
        reason="",
        truth=f"truth of {slide_id}",
        best=list(best),
        n_itc=0,
        itc=[],
        false_positives=list(false),
    )


def matches(slides: Sequence[SlideRecord], **protocol: Any) -> EvaluationRecord:
    """Return an evaluation of these slides."""
    rules = evaluation_params("own_spacing", protocol)
    return EvaluationRecord(protocol=rules.protocol(), protocol_hash=rules.protocol_hash(), slides=list(slides))


def drawn(skill: float, seed: int = 1, n_slides: int = 40) -> EvaluationRecord:
    """Return an evaluation of slides whose lesions are the same for a seed, and found the better the more skill."""
    rng, slides = np.random.default_rng(seed), []
    for number in range(n_slides):
        is_tumour = number % 2
        hardness, clutter = rng.random(rng.integers(1, 4)), rng.random(rng.integers(0, 4)) * 0.85
        found = np.clip(skill + 0.25 - 0.6 * hardness + rng.normal(0, 0.05, len(hardness)), 0, 1).round(4)
        best = [float(one) if one > 0.15 else None for one in found] if is_tumour else []
        slides.append(slide(f"case_{number:03d}", is_tumour, best, (clutter * (1.3 - skill / 2)).clip(0, 1).tolist()))
    return matches(slides)


def stride_trials(strides: Sequence[int] = (16, 32, 56, 112, 224), repeats: int = 3) -> list[Trial]:
    """Return a sweep over stride, precision and stain: coarser and narrower is cheaper and a little worse."""
    rng = np.random.default_rng(3)
    trials = []
    for stain, colour in (("none", 0.0), ("macenko", 0.03)):
        for precision, loss, share in (("fp32", 0.0, 1.0), ("bf16", 0.002, 0.6)):
            for stride in strides:
                params = {"inference.stride": stride, "inference.precision": precision, "stain.method": stain}
                params |= {"tiles.halo_px": 112 + stride, "model.card": "pkg:demo.json", "lesions.threshold": 0.5}
                found = drawn(0.75 - 0.09 * np.log2(stride / 16) / 2 - loss + colour)
                for repeat in range(1, repeats + 1):
                    hours = share * (0.02 + 24 / stride**1.4) * (1.1 if stain == "macenko" else 1.0)
                    own = {**params, "repeat": repeat}
                    trials.append(Trial(own, hours * float(rng.normal(1, 0.04)), found))
    return trials


def store(uri: str, sweep: str | None = "strides", experiment: str = "wsiflow") -> TrackingParams:
    """Return how tests reach a store."""
    given = {"kind": "mlflow", "timeout_s": 5, "retries": 0, "lock_wait_s": 60}
    return TrackingParams(uri=uri, experiment=experiment, sweep=sweep, **given)


def log(params: TrackingParams, trials: Sequence[Trial], folder: Path, **changes: Any) -> list[str]:
    """Record trials as `results` does and return their run ids."""
    ids = []
    for number, trial in enumerate(trials):
        document = folder / f"{params.sweep}-{number}" / "matches.json"
        document.parent.mkdir(parents=True, exist_ok=True)
        document.write_text(trial.matches.model_dump_json())
        setting = trial.matches.setting("")
        numbers = evaluate._froc_metrics(setting) | evaluate._roc_metrics(setting)
        low, high = np.clip(numbers["froc.score"] + np.array([-0.1, 0.1]), 0, 1)
        numbers |= {"froc.score_ci_low": float(low), "froc.score_ci_high": float(high)}
        numbers |= {"cost.total_core_hours": trial.core_hours, "throughput.core_hours": trial.core_hours / 2}
        (document.parent / "summary.json").write_text(json.dumps(numbers))
        own = ("inference.stride", "inference.precision", "stain.method", "repeat")
        name = ",".join(f"{key}={trial.params[key]}" for key in own if key in trial.params)
        content: dict[str, Any] = {
            "name": record.short_name(name) or "run",
            "key": f"{params.sweep}{number}",
            "plan_hash": "feed",
            "partial": False,
            "params": trial.params,
            "metrics": record.main_metrics(numbers),
            "tags": {
                "digest.dataset": "d1",
                "digest.model": "m1",
                "wsiflow.folder": f"{params.sweep}{number}",
                "wsiflow.out": str(folder / str(params.sweep) / str(number)),
                **record.intervals(numbers),
            },
            "sweep_folder": str(folder / params.sweep) if params.sweep else "",
            "dataset": tracking.DatasetRecord("cases.csv", "d1", "/data/cases.csv", 40),
            "artifacts": [document, document.with_name("summary.json")],
            "figures": {},
            "tables": {},
        }
        logged = tracking.log_run(params, tracking.RunRecord(**{**content, **changes}))
        assert logged.run_id, logged.reason
        ids.append(logged.run_id)
    return ids


def write_folder(root: Path, found: EvaluationRecord, core_hours: float | None = None) -> Path:
    """Write the part of a run's folder that a comparison reads."""
    (root / "evaluation").mkdir(parents=True)
    (root / "evaluation/matches.json").write_text(found.model_dump_json())
    costs = {} if core_hours is None else {"cost.total_core_hours": core_hours, "throughput.core_hours": core_hours / 2}
    (root / "evaluation/summary.json").write_text(json.dumps(costs))
    return root


def jobs_of(overrides: Sequence[str]) -> dict[str, list[str]]:
    """Return the overrides of every job that ``wsiflow run -m`` would make of these, by the job's name."""
    return {name: job.overrides for name, job in trials(overrides).items()}
