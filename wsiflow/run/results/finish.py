"""What a run ends with: the ledger balanced, scores, status tables, the report and the MLflow record.

Scores come from a complete ledger only. When slides are missing and the run allows it (``allow_partial``), the others
are shown under ``evaluation-PARTIAL/``, the report says what is missing, and the exit code is 10. What is shown is of
the folder as it is now: scores of an earlier state go to ``evaluation-FORMER/`` as soon as they are no longer true.
"""

import math
import shutil
import time
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from wsiflow.errors import PARTIAL, IntegrityError
from wsiflow.evaluation import matches
from wsiflow.plan import plan
from wsiflow.plan.plan import Plan
from wsiflow.run import ledger, trace
from wsiflow.run.config import RunConfig
from wsiflow.run.executor.params import worker_count
from wsiflow.run.ledger import Ledger
from wsiflow.run.results import cost, report
from wsiflow.run.results.record import all_receipts, machines, settings, track
from wsiflow.run.results.scores import ScoringInput, former_metrics, prepare_scoring, publish_scores, summarise
from wsiflow.run.results.status import (
    FORMER,
    OWN_TABLE,
    Status,
    failure_text,
    faulted,
    may_be_scored,
    missing_slides,
    process_list,
    slide_statuses,
)
from wsiflow.run.shards import Progress
from wsiflow.run.stages import certify, pixels
from wsiflow.system import energy, publish, tables
from wsiflow.system.machine import allocated_cores
from wsiflow.system.provenance import versions


class Summary(NamedTuple):
    """How a run ended.

    Attributes:
        exit_code: 0 complete, 10 partial, else the class of the worst failure.
        metrics: Every number of ``summary.json``.
        text: What to show the user.
    """

    exit_code: int
    metrics: dict[str, float]
    text: str


class Clock:
    """When this run started, and what there was then.

    Attributes:
        before: Names of the files that were published already.
    """

    def __init__(self, config: RunConfig) -> None:
        """Start; energy is counted where all of the work is done on this machine."""
        self._start = time.perf_counter()
        self.before = frozenset(publish.receipt_names(config.out))
        self._energy = energy.Meter() if config.executor.kind in {"inline", "process"} else None

    def energy(self) -> dict[str, float]:
        """Return ``energy.joules`` since the start, nothing where there is no counter."""
        joules = self._energy.joules() if self._energy else None
        return {} if joules is None else {"energy.joules": joules}

    def seconds(self) -> float:
        """Return the wall seconds since the start."""
        return time.perf_counter() - self._start


_SHOWN = ("evaluation", "evaluation-PARTIAL")


class Work(NamedTuple):
    """What was done in a folder.

    Attributes:
        receipts: Of everything that is published, see `all_receipts`.
        attempts: Every attempt at a task, see `wsiflow.run.trace.attempts`.
        new: Names of the attempts of this start.
    """

    receipts: Sequence[publish.Receipt]
    attempts: Sequence[Mapping[str, Any]]
    new: Set[str]


def set_aside(plan_path: Path) -> None:
    """Take what an earlier start showed out of the way, where the plan has other slides by now, or fewer.

    Whoever reads the folder before this start has ended, or after it was killed, finds no scores instead of old ones.
    """
    root, made = plan_path.parent, plan.read(plan_path)
    path = root / "evaluation/matches.json"
    if path.is_file():
        scored = {one.slide_id for one in matches.read_matches(path).slides}
        if made.rejected or scored != {planned.slide_id for planned in made.slides}:
            _keep_as_former(root, but="evaluation-PARTIAL")


def _keep_as_former(root: Path, *, but: str = "") -> None:
    """Move the scores that are shown, and their report, to where nobody takes them for those of now.

    Args:
        root: The run's folder.
        but: What stays where it is, since it is shown again.
    """
    shown = [name for name in _SHOWN if name != but and (root / name).is_dir()]
    if not shown:
        return
    page = root / "report.html"
    if "evaluation" in shown or not (root / FORMER).is_dir():  # those of a part never replace those of all slides
        shutil.rmtree(root / FORMER, ignore_errors=True)
        (root / shown.pop(0)).rename(root / FORMER)
        if page.exists():
            page.rename(root / FORMER / page.name)
    for name in shown:
        shutil.rmtree(root / name)
    page.unlink(missing_ok=True)


def _show_alone(root: Path, folder: str) -> None:
    """Remove what earlier starts showed in other places than this one."""
    for name in {*_SHOWN, FORMER} - {folder}:
        if (root / name).is_dir():
            shutil.rmtree(root / name)


def finish(config: RunConfig, plan_path: Path, progress: Sequence[Progress], clock: Clock) -> Summary:
    """Score what the run published, write its tables and report, and log it.

    Raises:
        IntegrityError: The ledger does not balance although no task failed.
    """
    root, made = plan_path.parent, plan.read(plan_path)
    ended = [item for shard in progress for item in shard.ended]
    statuses, receipts, attempts = slide_statuses(made, ended), all_receipts(root), trace.attempts(root)
    publish.write_view(root, "process_list.csv", process_list(statuses, receipts).encode())
    trace.write_views(root, attempts)
    balance = _balanced(root, made, plan_path, statuses)
    statuses, scoring = _scorable(root, config, made, statuses)
    publish.write_view(root, "process_list.csv", process_list(statuses, receipts).encode())
    if missing_slides(statuses):
        _keep_as_former(root, but="evaluation-PARTIAL" if scoring else "")
    if scoring is None:
        worst = max(status.exit_code for status in statuses)
        return Summary(worst, {}, failure_text(root, statuses))
    missing = missing_slides(statuses)
    folder = "evaluation-PARTIAL" if missing else "evaluation"
    evaluated = publish_scores(root, folder, config, scoring)
    new = {item.attempt for item in ended if item.executed and item.attempt}
    work = Work(receipts, attempts, new)
    metrics = summarise(
        root,
        folder,
        evaluated,
        _work_metrics(root, folder, config, made, work, clock)
        | _counts(balance, len(ended), len(new))
        | _certificates(root, folder, made, statuses)
        | _colours(root, made, receipts),
    )
    _write_report(root, folder, config, made, statuses, metrics)
    if not missing:
        _show_alone(root, folder)
    logged = track(root / folder, config, made, evaluated.key, metrics, machines(root, config, receipts))
    text = _success_text(root / folder, made, statuses, metrics, len(new), logged)
    return Summary(PARTIAL if missing else 0, metrics, text)


def _balanced(root: Path, made: Plan, plan_path: Path, statuses: Sequence[Status]) -> Ledger:
    """Return the ledger, which must be complete where no slide is missing."""
    balance = ledger.balance(root, made)
    if not missing_slides(statuses) and not balance.complete:
        _keep_as_former(root)
        cause = f"{balance.planned} tasks were planned and {balance.published} are published, but none failed"
        raise IntegrityError(cause, "run again; if it stays so, report this", path=plan_path)
    return balance


def _scorable(
    root: Path, config: RunConfig, made: Plan, statuses: list[Status]
) -> "tuple[list[Status], ScoringInput | None]":
    """Return how the slides ended, those included whose truth cannot be used, and what to score, if that is wanted."""
    if not may_be_scored(config, statuses):
        return statuses, None
    scoring = prepare_scoring(root, config, made, statuses)
    statuses = [faulted(status, scoring.faults) for status in statuses]
    return statuses, scoring if may_be_scored(config, statuses) else None


def _certificates(root: Path, folder: str, made: Plan, statuses: Sequence[Status]) -> dict[str, float]:
    """Write ``certificates.csv``, a row per slide, and return the metrics over all; nothing where none is due."""
    good = {status.slide_id for status in statuses if not status.exit_code}
    rows, metrics = certify.summary(root, made, [planned for planned in made.slides if planned.slide_id in good])
    if rows:
        publish.write_view(root, f"{folder}/certificates.csv", tables.csv_text(rows).encode())
    return metrics


def _colours(root: Path, made: Plan, receipts: Sequence[publish.Receipt]) -> dict[str, float]:
    """Write ``stain_failures.csv``, a row per slide or patch whose colours stayed as they were, and return how many."""
    params = pixels.stain_params(made)
    if params.method == "none":
        return {}
    rows = [
        {"slide_id": receipt["slide"], "l0_x": x, "l0_y": y, "reason": reason}
        for receipt in receipts
        for x, y, reason in receipt.get("stain_failures", [])
    ]
    rows.sort(key=lambda row: (row["slide_id"], row["l0_y"], row["l0_x"]))
    publish.write_view(
        root, "stain_failures.csv", tables.csv_text(rows, ["slide_id", "l0_x", "l0_y", "reason"]).encode()
    )
    return {"stain.failures": float(len(rows))}


def _work_metrics(root: Path, folder: str, config: RunConfig, made: Plan, work: Work, clock: Clock) -> dict[str, float]:
    """Return throughput and cost.

    Cost is that of everything published in the folder, whenever it was made and by whatever trial. Rates are of what
    this run executed; a run that executed nothing keeps those of the run that did.
    """
    area = {s.slide_id: cost.tile_area_mm2(s.frame.tile_px, s.frame.um_px) for s in made.slides}
    executed = [receipt for receipt in work.receipts if receipt["attempt"] in work.new]
    known = worker_count(config.executor, cores=allocated_cores()) or trace.peak_workers(work.attempts)
    workers = known * config.executor.threads
    rates = cost.summarise(executed, run_wall_s=clock.seconds(), workers=workers, tile_mm2=area)
    used = clock.energy()
    if not executed:
        former = former_metrics(root, folder)
        rates |= {name: value for name, value in former.items() if name in rates}
        used = {name: value for name, value in former.items() if name == "energy.joules"}
    elif len(executed) < len(work.receipts):
        used = {}  # measured for a part of the work only, it would stand beside the cost of all
    whole = cost.summarise(work.receipts, run_wall_s=clock.seconds(), workers=workers, tile_mm2=area)
    whole |= cost.origin_core_seconds(work.receipts, clock.before)
    whole["cost.warmup_core_s"] = trace.warmup_s(work.attempts)
    return rates | used | {name: value for name, value in whole.items() if name in _WHOLE or name.startswith("cost.")}


_WHOLE = {"throughput.core_hours", "throughput.core_seconds_per_tile", "throughput.mm2_per_core_hour"}


def _counts(balance: Ledger, n_outcomes: int, n_executed: int) -> dict[str, float]:
    counts = {f"ledger.{name}": float(value) for name, value in balance._asdict().items()}
    return counts | {"cache.hit_rate": 1 - n_executed / n_outcomes if n_outcomes else 1.0}


def _write_report(
    root: Path, folder: str, config: RunConfig, made: Plan, statuses: Sequence[Status], metrics: Mapping[str, float]
) -> None:
    """Write ``report.html`` from what is published."""
    scored = {row["slide_id"]: row for row in tables.read(root / folder / "cases.csv", *OWN_TABLE).rows()}
    listed = list(tables.read(root / "process_list.csv", *OWN_TABLE).rows())
    good = [status.slide_id for status in statuses if not status.exit_code]
    data = report.ReportData(
        name=config.name,
        metrics=metrics,
        slides=[row | scored.get(row["slide_id"], {}) for row in listed],
        overlays={slide_id: root / f"heatmaps/{slide_id}.png" for slide_id in good},
        figures={name: (root / folder / name).read_bytes() for name in ("froc.png", "roc.png")},
        settings=settings(config.model_dump(mode="json"), made),
        versions=versions(),
        plan_hash=made.hash,
    )
    publish.write_view(root, "report.html", report.render(data).encode())


def _success_text(
    shown: Path, made: Plan, statuses: Sequence[Status], metrics: Mapping[str, float], executed: int, logged: str
) -> str:
    chosen = made.work["choice"]
    missing = [status for status in statuses if status.exit_code]
    lines = [f"PARTIAL: {status.slide_id} is missing: {status.reason}" for status in missing]
    lines += [
        f"slides     {len(statuses) - len(missing)} of {len(statuses)}, {executed} tasks done now",
        f"FROC       {_score_told(metrics, 'froc.score', 'froc.score')}",
        f"  strict   {_score_told(metrics, 'froc.strict_score', 'froc.strict_score')}",
        f"AUC        {_score_told(metrics, 'roc.auc', 'roc.auc')}",
        f"protocol   {made.settings['evaluation']['name']} {_protocol_hash(shown)[:12]}",
        f"throughput {metrics['throughput.tiles_per_s']:.1f} tiles/s, "
        f"{metrics['throughput.windows_per_s']:.0f} windows/s, {metrics['throughput.core_hours']:.4f} core-hours, "
        f"efficiency {metrics['throughput.efficiency']:.2f}",
        f"inference  {chosen['engine']}, {chosen['backend']} {chosen['precision']}: {made.work['told']}",
        *_certificate_line(metrics),
        f"report     {shown.parent / 'report.html'}",
        f"overlays   {shown.parent / 'heatmaps'}/*.png",
        f"scores     {shown / 'summary.json'}",
        logged,
    ]
    return "\n".join(lines)


def _score_told(metrics: Mapping[str, float], name: str, stem: str) -> str:
    """Return a score with its interval, or why there is none."""
    score, low, high = metrics[name], metrics[f"{stem}_ci_low"], metrics[f"{stem}_ci_high"]
    if math.isnan(score):
        if name.startswith("froc.") and metrics["froc.n_itc"] and not metrics["froc.n_lesions"]:
            return "not defined: all tumour is as small as isolated tumour cells, which are not counted"
        return "not defined: it needs truth for tumour and normal slides"
    if math.isnan(low) or math.isnan(high):
        return f"{score:.4f} (no interval: too few slides, or bootstrap=0)"
    return f"{score:.4f} (95 % interval {low:.4f} to {high:.4f})"


def _protocol_hash(shown: Path) -> str:
    return matches.read_matches(shown / "matches.json").protocol_hash


def _certificate_line(metrics: Mapping[str, float]) -> list[str]:
    """Return what the scores are worth against single windows in fp32, where that was measured."""
    kind = next((kind for kind in ("dense", "precision") if f"{kind}.n" in metrics), "")
    if not kind or not metrics[f"{kind}.n"]:
        return []
    count, mean, most, flips = (metrics[f"{kind}.{name}"] for name in ("n", "mean_abs_diff", "max_abs_diff", "flips"))
    return [
        f"certified  {count:.0f} windows run alone in fp32: mean |dp| {mean:.2g}, largest {most:.2g}, "
        f"{flips:.2%} on the other side of 0.5{_beyond(metrics['certificate.slides_beyond'])}"
    ]


def _beyond(slides: float) -> str:
    return f"; slides beyond the limits: {slides:.0f}" if slides else ""
