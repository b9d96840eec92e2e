"""What a run ends with: the ledger balanced, scores, status tables, the report and the MLflow record.

Scores come from a complete ledger only. When slides are missing and the run allows it (``allow_partial``), the others
are shown under ``evaluation-PARTIAL/``, the report says what is missing, and the exit code is 10. What is shown is of
the folder as it is now: scores of an earlier state go to ``evaluation-FORMER/`` as soon as they are no longer true.
"""

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow import redaction
from wsiflow.errors import PARTIAL, IntegrityError, WsiflowError
from wsiflow.evaluation import evaluate, matches
from wsiflow.evaluation.detections import read_detections
from wsiflow.evaluation.truth import planned_truth
from wsiflow.plan import plan
from wsiflow.plan.plan import Plan, SlidePlan
from wsiflow.run import ledger, trace, tracking
from wsiflow.run.config import RunConfig
from wsiflow.run.executor import worker_count
from wsiflow.run.ledger import Ledger
from wsiflow.run.results import cost, report
from wsiflow.run.shards import Ended, Progress, named
from wsiflow.run.stages import certify, ingest, line, pixels
from wsiflow.slides.manifest import Case
from wsiflow.system import energy, publish, tables
from wsiflow.system.faults import unreadable
from wsiflow.system.machine import allocated_cores
from wsiflow.system.provenance import facts, versions

_OWN = ("a table of the run", "run again")


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


class Status(NamedTuple):
    """How one slide ended: a row of ``process_list.csv``."""

    slide_id: str
    status: str
    reason: str
    exit_code: int
    n_tiles: int
    n_groups: int
    attempts: int


_SHOWN = ("evaluation", "evaluation-PARTIAL")
_FORMER = "evaluation-FORMER"


class Work(NamedTuple):
    """What was done in a folder.

    Attributes:
        receipts: Of everything that is published, see `_all_receipts`.
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
    if "evaluation" in shown or not (root / _FORMER).is_dir():  # those of a part never replace those of all slides
        shutil.rmtree(root / _FORMER, ignore_errors=True)
        (root / shown.pop(0)).rename(root / _FORMER)
        if page.exists():
            page.rename(root / _FORMER / page.name)
    for name in shown:
        shutil.rmtree(root / name)
    page.unlink(missing_ok=True)


def _show_alone(root: Path, folder: str) -> None:
    """Remove what earlier starts showed in other places than this one."""
    for name in {*_SHOWN, _FORMER} - {folder}:
        if (root / name).is_dir():
            shutil.rmtree(root / name)


def finish(config: RunConfig, plan_path: Path, progress: Sequence[Progress], clock: Clock) -> Summary:
    """Score what the run published, write its tables and report, and log it.

    Raises:
        IntegrityError: The ledger does not balance although no task failed.
    """
    root, made = plan_path.parent, plan.read(plan_path)
    ended = [item for shard in progress for item in shard.ended]
    statuses, receipts, attempts = _statuses(made, ended), _all_receipts(root), trace.attempts(root)
    publish.write_view(root, "process_list.csv", _process_list(statuses, receipts).encode())
    trace.write_views(root, attempts)
    balance = _balanced(root, made, plan_path, statuses)
    statuses, judged = _scorable(root, config, made, statuses)
    publish.write_view(root, "process_list.csv", _process_list(statuses, receipts).encode())
    if _missing(statuses):
        _keep_as_former(root, but="evaluation-PARTIAL" if judged else "")
    if judged is None:
        worst = max(status.exit_code for status in statuses)
        return Summary(worst, {}, _failure_text(root, statuses))
    missing = _missing(statuses)
    folder = "evaluation-PARTIAL" if missing else "evaluation"
    evaluated = _evaluate(root, folder, config, judged)
    new = {item.attempt for item in ended if item.executed and item.attempt}
    work = Work(receipts, attempts, new)
    metrics = _summarise(
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
    machines = _machines(root, config, receipts)
    logged = _track(root / folder, config, made, evaluated.key, metrics, machines)
    text = _success_text(root / folder, made, statuses, metrics, len(new), logged)
    return Summary(PARTIAL if missing else 0, metrics, text)


def _balanced(root: Path, made: Plan, plan_path: Path, statuses: Sequence[Status]) -> Ledger:
    """Return the ledger, which must be complete where no slide is missing."""
    balance = ledger.balance(root, made)
    if not _missing(statuses) and not balance.complete:
        _keep_as_former(root)
        cause = f"{balance.planned} tasks were planned and {balance.published} are published, but none failed"
        raise IntegrityError(cause, "run again; if it stays so, report this", path=plan_path)
    return balance


def _scorable(
    root: Path, config: RunConfig, made: Plan, statuses: list[Status]
) -> "tuple[list[Status], _Judgement | None]":
    """Return how the slides ended, those included whose truth cannot be used, and what to score, if that is wanted."""
    if not _may_be_scored(config, statuses):
        return statuses, None
    judged = _judge(root, config, made, statuses)
    statuses = [_faulted(status, judged.faults) for status in statuses]
    return statuses, judged if _may_be_scored(config, statuses) else None


def _missing(statuses: Sequence[Status]) -> list[Status]:
    """Return how the slides without a result ended."""
    return [status for status in statuses if status.exit_code]


def _may_be_scored(config: RunConfig, statuses: Sequence[Status]) -> bool:
    """Tell whether there is something to score, and the user wants it although slides may be missing."""
    missing = _missing(statuses)
    return not missing or (config.allow_partial and len(missing) < len(statuses))


def _faulted(status: Status, faults: Mapping[str, WsiflowError]) -> Status:
    """Return how a slide ended once it turned out that it cannot be scored."""
    fault = faults.get(status.slide_id)
    return status if fault is None else status._replace(status="failed", reason=str(fault), exit_code=fault.exit_code)


def _statuses(made: Plan, ended: Sequence[Ended]) -> list[Status]:
    """Return how every slide ended, in the order of the plan, the rejected ones last."""
    failures: dict[int, Ended] = {}
    attempts: dict[int, int] = {}
    for item in ended:
        index = made.task(item.stage, item.task).slide
        attempts[index] = attempts.get(index, 0) + item.executed
    for item in {(item.stage, item.task): item for item in ended}.values():  # a later try of a task is what counts
        if not item.attempt:
            failures.setdefault(made.task(item.stage, item.task).slide, item)
    rows = []
    for index, planned in enumerate(made.slides):
        failure = failures.get(index)
        status = "failed" if failure else "no tissue" if not planned.n_tiles else "done"
        reason, code = (named(failure.error, planned.slide_id), failure.exit_code) if failure else ("", 0)
        rows.append(
            Status(
                planned.slide_id,
                status,
                reason,
                code,
                planned.n_tiles,
                planned.n_groups,
                attempts.get(index, 0),
            )
        )
    return rows + [
        Status(slide, "rejected", named(reason, slide), code, 0, 0, 1) for slide, reason, code in made.rejected
    ]


def _process_list(statuses: Sequence[Status], receipts: Sequence[publish.Receipt]) -> str:
    """Return ``process_list.csv``: a row per slide, its times summed over everything published for it."""
    seconds = cost.seconds_by_slide(receipts)
    columns = ["slide_id", "status", "reason", "n_tiles", "n_groups", "attempts"]
    timed = [f"seconds_{step}" for step in (*cost.STEPS, "wall", "cpu")]
    rows = [
        {name: getattr(status, name) for name in columns}
        | {name: f"{value:.3f}" for name, value in seconds.get(status.slide_id, {}).items()}
        for status in statuses
    ]
    return tables.csv_text(rows, [*columns, *timed])


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
        former = _former(root, folder)
        rates |= {name: value for name, value in former.items() if name in rates}
        used = {name: value for name, value in former.items() if name == "energy.joules"}
    elif len(executed) < len(work.receipts):
        used = {}  # measured for a part of the work only, it would stand beside the cost of all
    whole = cost.summarise(work.receipts, run_wall_s=clock.seconds(), workers=workers, tile_mm2=area)
    whole |= cost.origin_core_seconds(work.receipts, clock.before)
    whole["cost.warmup_core_s"] = trace.warmup_s(work.attempts)
    return rates | used | {name: value for name, value in whole.items() if name in _WHOLE or name.startswith("cost.")}


_WHOLE = {"throughput.core_hours", "throughput.core_seconds_per_tile", "throughput.mm2_per_core_hour"}


_KEPT = ("path", "kind", "slide", "attempt", "cpu", "cpu_s", "wall_s", "seconds", "counts", "shared", "stain_failures")


def _all_receipts(root: Path) -> list[publish.Receipt]:
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


def _counts(balance: Ledger, n_outcomes: int, n_executed: int) -> dict[str, float]:
    counts = {f"ledger.{name}": float(value) for name, value in balance._asdict().items()}
    return counts | {"cache.hit_rate": 1 - n_executed / n_outcomes if n_outcomes else 1.0}


class Evaluated(NamedTuple):
    """What was scored: the key of settings, detections and truth, and where its published files lie."""

    key: str
    folder: Path


class _Judgement(NamedTuple):
    """What there is to score.

    Attributes:
        key: What identifies settings, detections and truth of the slides that can be scored.
        slides: What was judged; None where the scores are published already.
        faults: What is wrong with the slides that cannot be scored.
    """

    key: str
    slides: list[evaluate.Judged] | None
    faults: Mapping[str, WsiflowError]


_SCORES = ("scores.json", "cases.csv", "froc.json", "roc.json", "matches.json", "froc.png", "roc.png")


def _judge(root: Path, config: RunConfig, made: Plan, statuses: Sequence[Status]) -> _Judgement:
    """Judge the slides that have results, unless their scores are published.

    Scores follow the detections and the truth: a slide that joins or a corrected outline gives other scores under
    another key, and never touches the former ones. Truth that broke after its slide was planned costs no other slide.
    """
    cases = {case.slide_id: case for case in ingest.read_cases(publish.generations(root, "cases.json")[-1])[1]}
    good = {status.slide_id for status in statuses if not status.exit_code}
    planned = {one.slide_id: i for i, one in enumerate(made.slides) if one.slide_id in good}
    truth, faults = _truth_sha256([cases[slide_id] for slide_id in planned], config)
    slides = {slide_id: i for slide_id, i in planned.items() if slide_id in truth}
    key = _scores_key(root, made, slides, cases, truth)
    if all(publish.at_hand(root, f"evaluations/{key[:12]}/{name}", key) is not None for name in _SCORES):
        return _Judgement(key, None, faults)
    readers = {slide_id: partial(_found, root, made, i, cases[slide_id], config) for slide_id, i in slides.items()}
    judged, wrong = evaluate.judge_all(readers, config.evaluation)
    if wrong:
        kept = {slide_id: i for slide_id, i in slides.items() if slide_id in judged}
        key = _scores_key(root, made, kept, cases, truth)
    return _Judgement(key, list(judged.values()), faults | wrong)


def _scores_key(
    root: Path,
    made: Plan,
    slides: Mapping[str, int],
    cases: Mapping[str, Case],
    truth: Mapping[str, list[Any]],
) -> str:
    return publish.key_of(
        settings=made.settings,
        detections=[_published(root, made, "detect", i)["sha256"] for i in slides.values()],
        truth=[[slide_id, *truth[slide_id]] for slide_id in slides],
        patients=[cases[slide_id].patient_id for slide_id in slides],  # whose slides are drawn together
    )


def _evaluate(root: Path, view: str, config: RunConfig, judged: _Judgement) -> Evaluated:
    """Publish scores and curves under ``evaluations/<key>``, or find them, and show the latest under ``view``."""
    evaluated = Evaluated(judged.key, root / "evaluations" / judged.key[:12])
    if judged.slides is not None:
        scores = evaluate.evaluate_judged(judged.slides, config.evaluation, seed=config.seed)
        documents = {name: text.encode() for name, text in evaluate.documents(scores).items()}
        documents["scores.json"] = documents.pop("summary.json")
        documents |= {"froc.png": report.froc_figure(scores.froc), "roc.png": report.roc_figure(scores.roc)}
        for name in _SCORES:
            published = f"evaluations/{judged.key[:12]}/{name}"
            publish.publish_bytes(root, published, documents[name], judged.key, facts("evaluation", ""))
    for name in _SCORES[1:]:
        publish.write_view(root, f"{view}/{name}", (evaluated.folder / name).read_bytes())
    return evaluated


def _summarise(root: Path, view: str, evaluated: Evaluated, work: Mapping[str, float]) -> dict[str, float]:
    """Write ``summary.json``, scores and work by name, and return it; what is not defined is null there, NaN here."""
    scores = _numbers(evaluated.folder / "scores.json")
    publish.write_view(root, f"{view}/summary.json", tables.json_text({**scores, **work}).encode())
    return scores | dict(work)


def _former(root: Path, view: str) -> dict[str, float]:
    paths = [root / name / "summary.json" for name in (view, _FORMER)]
    return next((_numbers(path) for path in paths if path.exists()), {})


def _numbers(path: Path) -> dict[str, float]:
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: math.nan if value is None else value for name, value in found.items()}


def _found(root: Path, made: Plan, index: int, case: Case, config: RunConfig) -> evaluate.Evidence:
    """Return what one slide is scored by; its score is the highest probability on its heatmap."""
    detections = read_detections(root / line.product(made, "detect", index))
    return evidence(made.slides[index], case, config, detections, _published(root, made, "stitch", index)["score"])


def evidence(
    planned: SlidePlan, case: Case, config: RunConfig, detections: NDArray[np.float64], score: float
) -> evaluate.Evidence:
    """Return what a slide is scored by.

    Args:
        planned: The slide.
        case: The same in the manifest.
        config: How it is scored.
        detections: float64 (n, 3): prob, x, y in level-0 px, as `wsiflow.evaluation.detections.read_detections`
            returns them.
        score: How likely the slide holds tumour.
    """
    return evaluate.Evidence(
        slide_id=planned.slide_id,
        label=case.label,
        truth=planned_truth(planned, case, config.evaluation),
        detections=detections,
        score=score,
        patient_id=case.patient_id,
    )


def _truth_sha256(cases: Sequence[Case], config: RunConfig) -> tuple[dict[str, list[Any]], dict[str, WsiflowError]]:
    """Return label and hashes of each slide's truth, and what is wrong where it cannot be read, both by slide.

    What a slide has that counts for nothing is hashed as far as that is possible.
    """
    found: dict[str, list[Any]] = {}
    faults: dict[str, WsiflowError] = {}
    for case in cases:
        hashes: list[str | None] = []
        for path in (case.annotation_path, case.mask_path):
            try:
                hashes.append(publish.file_sha256(path) if path else None)
            except OSError as error:
                hashes.append(None)
                if config.evaluation.excluded(case.slide_id) != "all":
                    told = unreadable(error, "its truth", "correct the path", path=path or "")
                    faults[case.slide_id] = told.about(slide=case.slide_id, stage="evaluation")
        if case.slide_id not in faults:
            found[case.slide_id] = [case.label, *hashes]
    return found, faults


def _published(root: Path, made: Plan, stage: str, index: int) -> publish.Receipt:
    """Return the receipt of what a task has published, which must be what the plan asks for."""
    name = line.product(made, stage, index)
    receipt, wanted = _receipt(root, name), line.key(root, made, stage, index)
    if receipt["key"] != wanted:
        cause = f"it was published under the key {receipt['key'][:12]}, and the plan asks for {wanted[:12]}"
        raise IntegrityError(cause, "choose another out= folder", path=root / name)
    return receipt


def _receipt(root: Path, name: str) -> publish.Receipt:
    receipt = publish.read_receipt(root, name)
    if receipt is None:
        raise IntegrityError("it has no receipt", "run again", path=root / name)
    return receipt


def _failure_text(root: Path, statuses: Sequence[Status]) -> str:
    bad = [status for status in statuses if status.exit_code]
    lines = [f"{status.status}: {status.reason}" for status in bad]
    others = f"; the others are in {root}" if len(bad) < len(statuses) else ""
    lines.append(f"{len(bad)} of {len(statuses)} slides have no result, so nothing was scored{others}")
    partly = ", or score without them: allow_partial=true" if len(bad) < len(statuses) else ""
    lines.append(f"mend them and run the same command again{partly}")
    if (root / _FORMER).is_dir():
        lines.append(f"scores of an earlier state of the folder are in {root / _FORMER}")
    return "\n".join(lines)


def _write_report(
    root: Path, folder: str, config: RunConfig, made: Plan, statuses: Sequence[Status], metrics: Mapping[str, float]
) -> None:
    """Write ``report.html`` from what is published."""
    scored = {row["slide_id"]: row for row in tables.read(root / folder / "cases.csv", *_OWN).rows()}
    listed = list(tables.read(root / "process_list.csv", *_OWN).rows())
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


def _track(
    shown: Path, config: RunConfig, made: Plan, key: str, metrics: Mapping[str, float], machines: Mapping[str, str]
) -> str:
    """Record the run in MLflow and say where, or why not: the run is valid without it."""
    root = shown.parent
    curves = json.loads((shown / "froc.json").read_text(encoding="utf-8"))
    matched = matches.read_matches(shown / "matches.json")
    folder_id, found = ingest.folder_id(root), digests(made)
    record = tracking.RunRecord(
        name=config.out.name if config.tracking.sweep else config.name,
        # The same scores in another folder are another run: its cost is its own.
        key=publish.key_of(scores=key, folder=folder_id),
        plan_hash=made.hash,
        partial=shown.name != "evaluation",
        # Where a run lies is no setting: it would be an axis of every plot of MLflow.
        params=settings(config.model_dump(mode="json", exclude={"out", "share"}), made),
        metrics=metrics,
        tags={
            **{f"version.{name}": number for name, number in versions().items()},
            **found,
            **machines,
            "wsiflow.folder": folder_id,
            "wsiflow.out": str(config.out),
            "wsiflow.protocol_hash": matched.protocol_hash,
            "wsiflow.truth_hash": matched.truth_hash(),
        },
        artifacts=[
            *(path for path in sorted(shown.iterdir()) if path.suffix in {".json", ".csv"}),
            *(root / name for name in ("report.html", "process_list.csv")),
            publish.generations(root, "config.yaml")[-1],
        ],
        dataset=(_dataset_name(config), found["digest.dataset"][:32]),
        figures={path.name: path.read_bytes() for path in sorted(shown.glob("*.png"))},
        tables={f"froc_{mode}.json": curves[mode] for mode in ("official", "strict")},
    )
    logged = tracking.log_run(config.tracking, record)
    where = f"{redaction.without_secrets(config.tracking.uri)} run {logged.run_id}"
    return f"MLflow     {where if logged.run_id else logged.reason}"


def _machines(root: Path, config: RunConfig, receipts: Sequence[publish.Receipt]) -> dict[str, str]:
    """Return the CPUs of whoever did the work."""
    settled = json.loads((root / ingest.choice_name(config)).read_text(encoding="utf-8"))
    return {
        "cpu.model": "; ".join(sorted({receipt["cpu"] for receipt in receipts if "cpu" in receipt})),
        "cpu.flags": " ".join(settled["cpu_flags"]),
    }


def _dataset_name(config: RunConfig) -> str:
    """Return the file or folder that the slides are of, without where it lies."""
    found = config.dataset.manifest or config.dataset.folder or config.dataset.path
    return found.name if found else config.dataset.kind


def settings(values: Mapping[str, Any], made: Plan) -> dict[str, Any]:
    """Return every setting by dotted name, with what was chosen in the place of what was left open.

    Args:
        values: The configuration as JSON values.
        made: The run's plan.
    """
    chosen = {f"inference.{name}": made.work["choice"][name] for name in ("engine", "backend", "precision")}
    sizes = {f"tiles.{name}": made.work["choice"][name] for name in ("halo_px", "block_rows", "block_cols")}
    return _flat(values) | chosen | sizes


def digests(made: Plan) -> dict[str, str]:
    """Return what stands for the model and for the pixels of the slides: SHA-256, by tag."""
    slides = sorted([planned.slide_id, planned.sha256] for planned in made.slides)
    return {"digest.model": made.settings["predict"]["model"], "digest.dataset": publish.key_of(slides=slides)}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


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
