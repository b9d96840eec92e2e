"""Finish a run: balance the ledger, publish scores, write status tables and the report, and record the run in MLflow.

Scores come from a complete ledger only. Where slides are missing and ``allow_partial`` is set, the scores of the others
are written to ``evaluation-PARTIAL/``, the report lists the missing slides, and the exit code is 10. The scores shown
belong to the present state of the folder: scores of an earlier state are moved to ``evaluation-FORMER/``.
"""

import math
import shutil
import time
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from wsiflow.errors import PARTIAL, IntegrityError
from wsiflow.evaluation import matches
from wsiflow.run import ledger, trace
from wsiflow.run.config import RunConfig
from wsiflow.run.executor import driver, lifetime
from wsiflow.run.executor.kinds import KINDS
from wsiflow.run.executor.params import worker_count
from wsiflow.run.ledger import Ledger
from wsiflow.run.plan import Plan
from wsiflow.run.plan import read_plan as read_plan
from wsiflow.run.results import certified, cost, report, shown
from wsiflow.run.results.record import all_attempts, all_receipts, machines, published_names, settings, track
from wsiflow.run.results.scores import (
    ScoringInput,
    former_metrics,
    prepare_scoring,
    publish_scores,
    read_metrics,
    summarise,
)
from wsiflow.run.results.status import (
    FORMER,
    OWN_TABLE,
    Status,
    failure_text,
    may_be_scored,
    missing_slides,
    process_list,
    slide_statuses,
    with_fault,
)
from wsiflow.run.shards import Progress
from wsiflow.run.stages import certify, stitch
from wsiflow.run.stages.stitch import map_files
from wsiflow.system import energy, publish, tables
from wsiflow.system.machine import allocated_cores
from wsiflow.system.provenance import versions
from wsiflow.system.usage import Spending


class Summary(NamedTuple):
    """The result of a run.

    Attributes:
        exit_code: 0 for a complete run, 10 for a partial one, else the code of the worst failure.
        metrics: Every number of ``summary.json`` by name; empty where nothing was scored.
        text: The lines to show the user.
        statuses: How every slide ended; empty where the run ended before its slides did.
    """

    exit_code: int
    metrics: dict[str, float]
    text: str
    statuses: Sequence[Status] = ()


class Clock:
    """Wall time and energy since this start of the run, and the files that were published before it.

    Attributes:
        before: Names of the files that were already published at the start.
    """

    def __init__(self, config: RunConfig) -> None:
        """Start the clock; energy is measured only where all workers run on this machine."""
        self._start = time.perf_counter()
        Spending.begin()
        self.before = frozenset(published_names(config.out))
        self._energy = energy.EnergyMeter() if KINDS[config.executor.kind].is_local else None

    def energy(self) -> dict[str, float]:
        """Return ``energy.joules`` since the start; empty where the machine shows no counter."""
        joules = self._energy.joules() if self._energy else None
        return {} if joules is None else {"energy.joules": joules}

    def seconds(self) -> float:
        """Return the wall seconds since the start."""
        return time.perf_counter() - self._start


_SHOWN = ("evaluation", "evaluation-PARTIAL")
_Attempts = Sequence[Mapping[str, Any]]


class WorkLog(NamedTuple):
    """The work that was done in a run's folder.

    Attributes:
        receipts: Receipts of the published files, see `all_receipts`.
        attempts: Every attempt at a task, see `wsiflow.run.trace.attempts`.
        new: Names of the attempts of this start of the run.
    """

    receipts: Sequence[publish.Receipt]
    attempts: _Attempts
    new: Set[str]


def set_aside(plan_path: Path) -> None:
    """Move the scores of an earlier start to ``evaluation-FORMER/`` where the plan now has other slides.

    A reader of the folder, before this start ends or after it was killed, then finds no scores instead of stale ones.
    """
    root, plan = plan_path.parent, read_plan(plan_path)
    path = root / "evaluation/matches.json"
    if path.is_file():
        scored = {one.slide_id for one in matches.read_matches(path).slides}
        if plan.rejected or scored != {planned.slide_id for planned in plan.slides}:
            _keep_as_former(root, but="evaluation-PARTIAL")


def _keep_as_former(root: Path, *, but: str = "") -> None:
    """Move the shown scores and their report to ``evaluation-FORMER/``, where they are not mistaken for current ones.

    Args:
        root: The run's folder.
        but: Name of a folder of scores that stays, because it is written again.
    """
    shown = [name for name in _SHOWN if name != but and (root / name).is_dir()]
    if not shown:
        return
    page = root / "report.html"
    if "evaluation" in shown or not (root / FORMER).is_dir():  # partial scores never replace complete ones
        shutil.rmtree(root / FORMER, ignore_errors=True)
        (root / shown.pop(0)).rename(root / FORMER)
        if page.exists():
            page.rename(root / FORMER / page.name)
    for name in shown:
        shutil.rmtree(root / name)
    page.unlink(missing_ok=True)


def _show_alone(root: Path, folder: str) -> None:
    """Remove the folders of scores of earlier starts except ``folder``."""
    for name in {*_SHOWN, FORMER} - {folder}:
        if (root / name).is_dir():
            shutil.rmtree(root / name)


def finish(
    config: RunConfig, plan_path: Path, progress: Sequence[Progress], clock: Clock, first: Sequence[Progress] = ()
) -> Summary:
    """Score the published slides of a run, write its tables and report, and record it in MLflow.

    Args:
        config: The run's configuration.
        plan_path: The run's plan.
        progress: Outcomes of the tasks of each shard.
        clock: Wall time, energy and published files since this start.
        first: Outcomes of the tasks of the first pass of a cascade.

    Raises:
        IntegrityError: The ledger does not balance although no task failed.
    """
    root, plan = plan_path.parent, read_plan(plan_path)
    ended = [item for shard in progress for item in shard.ended]
    statuses, receipts, attempts = slide_statuses(plan, ended), all_receipts(root), all_attempts(root)
    publish.write_view(root, "process_list.csv", process_list(statuses, receipts).encode())
    trace.write_views(root, attempts)
    balance = _balanced(root, plan, plan_path, statuses)
    statuses, scoring = _scorable(root, config, plan, statuses)
    publish.write_view(root, "process_list.csv", process_list(statuses, receipts).encode())
    if missing_slides(statuses):
        _keep_as_former(root, but="evaluation-PARTIAL" if scoring else "")
    every = [*ended, *(item for shard in first for item in shard.ended)]
    work = WorkLog(receipts, attempts, {item.attempt for item in every if item.executed and item.attempt})
    if scoring is None:
        worst = max(status.exit_code for status in statuses)
        spent = _work_metrics(root, "evaluation", config, plan, work, clock) | _cost_so_far(root, work)
        _write_unscored_report(root, config, plan, spent, attempts)
        _note_spent(root, work)
        return Summary(worst, {}, failure_text(root, statuses), statuses)
    missing = missing_slides(statuses)
    folder = "evaluation-PARTIAL" if missing else "evaluation"
    published = publish_scores(root, folder, config, scoring)
    numbers = (
        _work_metrics(root, folder, config, plan, work, clock)
        | _counts(balance, len(every), len(work.new))
        | _certificates(root, folder, config, plan, statuses)
        | _colours(root, plan, receipts)
    )
    told = read_metrics(published.folder / "scores.json") | numbers | _cost_so_far(root, work)
    _write_report(root, folder, config, plan, told, attempts)
    metrics = summarise(root, folder, published, numbers | _total_cost(root, work))
    if not missing:
        _show_alone(root, folder)
    logged = track(root / folder, config, plan, published.key, metrics, machines(root, config, receipts))
    text = _success_text(root / folder, plan, statuses, metrics, len(work.new), logged)
    return Summary(PARTIAL if missing else 0, metrics, text, statuses)


def _balanced(root: Path, plan: Plan, plan_path: Path, statuses: Sequence[Status]) -> Ledger:
    """Return the ledger of the run.

    Raises:
        IntegrityError: No slide is missing, and yet not all tasks are published.
    """
    balance = ledger.balance(root, plan)
    if not missing_slides(statuses) and not balance.complete:
        _keep_as_former(root)
        cause = f"{balance.planned} tasks were planned and {balance.published} are published, although none failed"
        raise IntegrityError(cause, "run again; if that does not help, report this as a bug", path=plan_path)
    return balance


def _scorable(
    root: Path, config: RunConfig, plan: Plan, statuses: list[Status]
) -> "tuple[list[Status], ScoringInput | None]":
    """Return the status of every slide, also of slides with unusable truth, and the slides to score.

    The second value is None where slides are missing and ``allow_partial`` is not set.
    """
    if not may_be_scored(config, statuses):
        return statuses, None
    scoring = prepare_scoring(root, config, plan, statuses)
    statuses = [with_fault(status, scoring.faults) for status in statuses]
    return statuses, scoring if may_be_scored(config, statuses) else None


def _certificates(
    root: Path, folder: str, config: RunConfig, plan: Plan, statuses: Sequence[Status]
) -> dict[str, float]:
    """Write ``certificates.csv``, and return the metrics over all slides.

    Where no slide has a certificate, nothing is written and the metrics are empty.
    """
    if not certify.is_needed(plan):
        return {}
    good = {status.slide_id for status in statuses if not status.exit_code}
    slides = [planned for planned in plan.slides if planned.slide_id in good]
    record = matches.read_matches(root / folder / "matches.json")
    rows, metrics = certified.summarise(root, plan, slides, record, seed=config.seed)
    if rows:
        publish.write_view(root, f"{folder}/certificates.csv", tables.csv_text(rows).encode())
    return metrics


def _colours(root: Path, plan: Plan, receipts: Sequence[publish.Receipt]) -> dict[str, float]:
    """Write ``stain_failures.csv``, a row per slide or patch without stain normalisation, and return their number."""
    params = plan.settings.stain
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


def _work_metrics(
    root: Path, folder: str, config: RunConfig, plan: Plan, work: WorkLog, clock: Clock
) -> dict[str, float]:
    """Return the throughput and cost metrics by name.

    Cost counts every file published in the folder, whenever and by whatever trial it was computed. Rates count what
    this start executed; a start that executed nothing keeps the rates of the last one that did.
    """
    area = {s.slide_id: cost.tile_area_mm2(s.frame.tile_px, s.frame.um_px) for s in plan.slides}
    executed = [receipt for receipt in work.receipts if receipt["attempt"] in work.new]
    n_workers = worker_count(config.executor, cores=allocated_cores()) or trace.peak_workers(work.attempts)
    workers = n_workers * config.executor.threads
    rates = cost.summarise(executed, run_wall_s=clock.seconds(), workers=workers, tile_mm2=area)
    used = clock.energy()
    if not executed:
        former = former_metrics(root, folder)
        rates |= {name: value for name, value in former.items() if name in rates}
        used = {name: value for name, value in former.items() if name == "energy.joules"}
    elif len(executed) < len(work.receipts):
        used = {}  # the energy of a part of the work would stand beside the cost of all of it
    whole = cost.summarise(work.receipts, run_wall_s=clock.seconds(), workers=workers, tile_mm2=area)
    whole |= cost.origin_core_seconds(work.receipts, clock.before)
    whole["cost.warmup_core_s"] = trace.warmup_s(work.attempts)
    if plan.settings.cascade is not None:
        whole["cost.first_pass_core_s"] = cost.first_pass_core_seconds(work.receipts)
    return rates | used | {name: value for name, value in whole.items() if name in _WHOLE or name.startswith("cost.")}


def _total_cost(root: Path, work: WorkLog) -> dict[str, float]:
    """Return what everything has cost so far, this start included."""
    _note_spent(root, work)
    drivers, elsewhere_s = driver.spent(root), lifetime.allocated_core_s(lifetime.read(root))
    bill = cost.allocated_metrics(drivers, work.attempts, elsewhere_s)
    return cost.total_metrics(drivers, work.attempts, work.receipts) | bill


def _cost_so_far(root: Path, work: WorkLog) -> dict[str, float]:
    """Return what `_total_cost` would, for the report, which is itself part of the cost; nothing is recorded."""
    drivers = driver.spent(root)
    if work.new and drivers:
        start_s = Spending.start_s or 0.0
        drivers[-1] = drivers[-1]._replace(core_s=start_s + Spending.uncharged(), start_s=start_s)
    return cost.total_metrics(drivers, work.attempts, work.receipts)


def _note_spent(root: Path, work: WorkLog) -> None:
    """Record what this start has cost; one that executed nothing adds nothing."""
    if work.new:
        start_s = Spending.start_s or 0.0
        driver.note_spent(root, start_s + Spending.charge(), start_s)


_WHOLE = {"throughput.core_hours", "throughput.core_seconds_per_tile", "throughput.mm2_per_core_hour"}


def _counts(balance: Ledger, n_outcomes: int, n_executed: int) -> dict[str, float]:
    counts = {f"ledger.{name}": float(value) for name, value in balance._asdict().items()}
    return counts | {"cache.hit_rate": 1 - n_executed / n_outcomes if n_outcomes else 1.0}


def _write_report(
    root: Path, folder: str, config: RunConfig, plan: Plan, metrics: Mapping[str, float], attempts: _Attempts
) -> None:
    """Write ``report.html`` from the published tables, figures, findings and pictures."""
    scored = {row["slide_id"]: row for row in tables.read(root / folder / "cases.csv", *OWN_TABLE).rows()}
    figures = {name: (root / folder / name).read_bytes() for name in ("froc.png", "roc.png")}
    found = shown.read_findings(root / folder)
    _render(root, config, plan, _Content(metrics, scored, figures, found, attempts))


def _write_unscored_report(
    root: Path, config: RunConfig, plan: Plan, metrics: Mapping[str, float], attempts: _Attempts
) -> None:
    """Write ``report.html`` where nothing is scored because slides are missing: it shows the others, and why."""
    maps = {slide.slide_id: stitch.STAGE.product_of(plan, index) for index, slide in enumerate(plan.slides)}
    receipts = {slide_id: publish.read_receipt(root, name) for slide_id, name in maps.items()}
    scores = {slide_id: {"score": receipt.get("score", "")} for slide_id, receipt in receipts.items() if receipt}
    _render(root, config, plan, _Content(metrics, scores, {}, {}, attempts))


class _Content(NamedTuple):
    """What a report shows besides the status of every slide.

    Attributes:
        metrics: Numbers by name; without scores where nothing was scored.
        columns: More cells of the table of slides by column, by slide id.
        figures: Bytes of the figures by file name; none where nothing was scored.
        findings: What became of detections and regions by slide id; none where nothing was scored.
        attempts: Every attempt at a task, see `wsiflow.run.trace.attempts`.
    """

    metrics: Mapping[str, float]
    columns: Mapping[str, Mapping[str, Any]]
    figures: Mapping[str, bytes]
    findings: Mapping[str, Any]
    attempts: _Attempts


def _render(root: Path, config: RunConfig, plan: Plan, content: _Content) -> None:
    """Write ``report.html``: a row for every slide, and what is known of the whole."""
    rows = shown.slide_rows(root, plan, content.columns)
    planned_slides = {planned.slide_id: planned for planned in plan.slides}
    data = report.ReportData(
        name=config.name,
        metrics=content.metrics,
        slides=rows,
        described=shown.describe(root, planned_slides, rows, content.findings),
        pictures=lambda slide_id, most_bytes: shown.pictures(root, planned_slides[slide_id], most_bytes),
        maps=dict(zip(plan.settings.maps, map_files(plan.settings.maps), strict=True)),
        figures=content.figures,
        settings=settings(config.model_dump(mode="json"), plan),
        versions=versions(),
        plan_hash=plan.hash,
        inference=_inference(plan),
        busy_s=trace.last_busy_s(content.attempts, [one.since for one in driver.spent(root)]),
    )
    publish.write_view(root, "report.html", report.render(data).encode())


def _success_text(
    shown: Path, plan: Plan, statuses: Sequence[Status], metrics: Mapping[str, float], executed: int, logged: str
) -> str:
    missing = [status for status in statuses if status.exit_code]
    lines = [f"PARTIAL: {status.slide_id} is missing: {status.reason}" for status in missing]
    lines += [
        *_empty_line(statuses, metrics, plan),
        f"slides     {len(statuses) - len(missing)} of {len(statuses)}, {executed} tasks done now",
        f"FROC       {_score_text(metrics, 'froc.score')}{_slides_of_froc(metrics)}",
        f"  strict   {_score_text(metrics, 'froc.strict_score')}",
        f"AUC        {_score_text(metrics, 'roc.auc')}",
        *_looked_at_line(metrics),
        f"protocol   {plan.settings.evaluation.name} {_protocol_hash(shown)[:12]}",
        f"throughput {metrics['throughput.tiles_per_s']:.1f} tiles/s, "
        f"{metrics['throughput.windows_per_s']:.0f} windows/s, "
        f"efficiency {metrics['throughput.efficiency']:.2f}",
        f"cost       {cost.core_hours_text(metrics)}",
        f"inference  {_inference(plan)}",
        *_certificate_line(metrics, plan),
        f"report     {shown.parent / 'report.html'}",
        f"overlays   {shown.parent / 'heatmaps'}/*.png",
        *(f"maps       {shown.parent / file.format(slide='*')}" for file in map_files(plan.settings.maps)),
        f"scores     {shown / 'summary.json'}",
        logged,
    ]
    return "\n".join(lines)


def _inference(plan: Plan) -> str:
    """Return how scores are computed, and why."""
    chosen = plan.settings.choice
    return f"{chosen.engine}, {chosen.backend} {chosen.precision}: {plan.settings.reason}"


def _empty_line(statuses: Sequence[Status], metrics: Mapping[str, float], plan: Plan) -> list[str]:
    """Return a line about the slides on which no tissue was found; no line where there are none."""
    count, labelled = sum(status.status == "no tissue" for status in statuses), metrics.get("tissue.n_slides_empty", 0)
    if not count:
        return []
    scored = "scored with 0" if plan.settings.evaluation.no_tissue == "score" else "not scored"
    with_label = f"; {labelled:.0f} with a label are {scored}" if labelled else ""
    return [f"NO TISSUE  nothing was looked at on {count} of {len(statuses)} slides{with_label}"]


def _looked_at_line(metrics: Mapping[str, float]) -> list[str]:
    """Return how much of the annotated lesions was looked at as a line; no line where this is not known."""
    recall, area = (metrics.get(f"tissue.lesion_recall{end}", math.nan) for end in ("", "_area"))
    if math.isnan(area):
        return []
    lesions = "" if math.isnan(recall) else f"{recall:.1%} of the lesions, "
    return [f"looked at  {lesions}{area:.1%} of their annotated area"]


def _score_text(metrics: Mapping[str, float], name: str) -> str:
    """Return a score with its 95 % interval, or the reason why it or the interval is not defined."""
    score, low, high = metrics[name], metrics[f"{name}_ci_low"], metrics[f"{name}_ci_high"]
    if math.isnan(score):
        if name.startswith("froc.") and metrics["froc.n_itc"] and not metrics["froc.n_lesions"]:
            return "not defined: all tumour is as small as isolated tumour cells, which are not counted"
        return "not defined: it needs truth for tumour and normal slides"
    if math.isnan(low) or math.isnan(high):
        return f"{score:.4f} (no interval: too few slides, or bootstrap=0)"
    return f"{score:.4f} (95 % interval {low:.4f} to {high:.4f})"


def _slides_of_froc(metrics: Mapping[str, float]) -> str:
    """Return how many slides a FROC score is over, and how many are normal: most false positives come from those."""
    if math.isnan(metrics["froc.score"]) or "froc.n_normal" not in metrics:
        return ""
    return f", {metrics['froc.n_slides']:.0f} slides, {metrics['froc.n_normal']:.0f} of them normal"


def _protocol_hash(shown: Path) -> str:
    return matches.read_matches(shown / "matches.json").protocol_hash


def _certificate_line(metrics: Mapping[str, float], plan: Plan) -> list[str]:
    """Return what the certificates say as a line; no line where nothing was compared."""
    threshold = plan.settings.lesions.threshold
    lines = {
        "certified": certified.sentence(metrics, threshold),
        "cascade": certified.cascade_sentence(metrics, threshold),
    }
    return [f"{name:<10} {text}" for name, text in lines.items() if text]
