"""Compare runs: what each setting scores and costs, how it differs from a reference, and which are worth their cost.

Input: the runs of a sweep as MLflow has them, or their folders. Output: ``compare.md``, ``compare.csv``, figures as PNG
and SVG, and ``report.html``; in MLflow the Pareto set as tags of the runs, the rest with the sweep's parent.

Runs whose settings are the same are repeats of one setting: their scores have to be equal and their costs have a
spread. Only runs over the same slides, exclusions, protocol and truth are compared.
"""

import json
import math
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from wsiflow import comparison, evaluation, plan, publish, results, tracking, tradeoff, tradeoff_report
from wsiflow.errors import InputError
from wsiflow.tracking import ComparisonRecord, Logged, TrackingParams
from wsiflow.tradeoff import Cost, Row, Tradeoff

# What makes no setting: names, places, who is told, and what tells repeats apart.
_NO_SETTING = re.compile(
    r"(name|out|share|seed|repeat|orchestrator|allow_partial|shard_slides|evaluation\.bootstrap|tracking\..*)"
)
# What follows from other settings more often than it is set; shown only where it tells settings apart.
_FOLLOWS = re.compile(r"(tiles|dense|executor)\..*|.*digest")
_SAME = 1e-5  # the same settings on another processor give probabilities that agree to about 1e-6
_SHOWN = 5


class Run(NamedTuple):
    """One run that can be compared.

    Attributes:
        name: What messages call it.
        where: Its folder, or its id in MLflow.
        identity: What its record in MLflow is found by: of its folder; empty where it has none.
        params: Its settings by dotted name.
        core_hours: What it cost; NaN where that is not known.
        processor: The CPU that computed it, or an empty text.
        matches: What it is compared by.
    """

    name: str
    where: str
    identity: str
    params: Mapping[str, str]
    core_hours: float
    processor: str
    matches: evaluation.Recorded


class Found(NamedTuple):
    """Runs to compare, and what was left out and why."""

    runs: Sequence[Run]
    notes: Sequence[str]


class Options(NamedTuple):
    """How to compare.

    Attributes:
        reference: Name of the setting that others are compared with; empty: the one that costs most.
        resamples: Draws of the intervals.
        seed: Seed of the draws.
    """

    reference: str = ""
    resamples: int = 2000
    seed: int = 0


# --- runs


def in_folders(folders: Sequence[Path]) -> Found:
    """Return the runs of folders: each a run's, an evaluation's, or one that holds such folders.

    Raises:
        InputError: A folder holds nothing that was scored.
    """
    runs, notes = [], []
    for folder in folders:
        scored, unscored = [folder] if _scores(folder) else [], []
        if not scored:
            below = sorted((one for one in folder.iterdir() if one.is_dir()), key=lambda one: _natural(one.name))
            scored = [one for one in below if _scores(one)]
            unscored = [one.name for one in below if not _scores(one) and publish.generations(one, "cases.json")]
        if not scored:
            raise InputError("it holds no evaluation/matches.json", "name the folders of finished runs", path=folder)
        runs += [_from_folder(one) for one in scored]
        notes += [f"Left out, since not all of its slides have scores: {name}." for name in unscored]
    return Found(_named_apart(runs), notes)


def _scores(folder: Path) -> Path | None:
    """Return where a folder has its scores."""
    return next((one for one in (folder / "evaluation", folder) if (one / "matches.json").is_file()), None)


def _from_folder(root: Path) -> Run:
    folder = _scores(root) or root
    metrics = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    told, receipt = publish.generations(root, "cases.json"), publish.read_receipt(root, "config.yaml")
    params = {"run": root.name}
    if told:
        made, values = plan.latest(root), json.loads(told[-1].read_text(encoding="utf-8"))["config"]
        params = _texts(results.settings(values, made)) | results.digests(made)
    return Run(
        name=root.name,
        where=str(root),
        identity=receipt["attempt"] if receipt else "",
        params=params,
        core_hours=_number(metrics.get("throughput.core_hours")),
        processor=str(receipt.get("cpu", "")) if receipt else "",
        matches=evaluation.read_matches(folder / "matches.json"),
    )


def of_sweep(params: TrackingParams) -> Found:
    """Return the runs of a sweep that MLflow has, or those of an experiment that has no or one sweep.

    Raises:
        InputError: There is no such experiment or sweep, or it has several sweeps and none is named.
        EnvironmentFault: The store cannot be read.
    """
    listed = tracking.recorded(params)
    sweeps = sorted({one.sweep for one in listed if one.sweep})
    if params.sweep is None and len(sweeps) > 1:
        raise InputError(f"experiment {params.experiment} has {len(sweeps)} sweeps", f"--sweep: {', '.join(sweeps)}")
    chosen = [one for one in listed if params.sweep in (None, one.sweep)]
    if not chosen:
        known = f"it has the sweeps {', '.join(sweeps)}" if sweeps else "it has no finished run"
        raise InputError(f"experiment {params.experiment} has no run of sweep {params.sweep}", known)
    with tempfile.TemporaryDirectory() as passing:
        return Found(_named_apart([_from_record(params, one, Path(passing)) for one in chosen]), [])


def _from_record(params: TrackingParams, one: tracking.Recorded, passing: Path) -> Run:
    folder = passing / one.run_id
    folder.mkdir()
    return Run(
        name=one.name,
        where=one.run_id,
        identity=one.tags.get("wsiflow.folder", one.run_id),
        params=one.params | {key: one.tags[key] for key in ("dataset.digest", "model.digest") if key in one.tags},
        core_hours=_number(one.metrics.get("throughput.core_hours")),
        processor=one.tags.get("cpu.model", ""),
        matches=evaluation.read_matches(tracking.download(params, one.run_id, "matches.json", folder)),
    )


def _named_apart(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with names of their own."""
    names = [run.name for run in runs]
    return [
        run._replace(name=f"{run.name} ({run.where})") if names.count(run.name) > 1 else run for run in runs
    ]


def _texts(settings: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in tracking.redacted(settings).items()}


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def store(uri: str, experiment: str, sweep: str | None) -> TrackingParams:
    """Return how to reach a store, as ``conf/tracking/mlflow.yaml`` says but for what is given."""
    text = (resources.files("wsiflow.conf") / "tracking/mlflow.yaml").read_text(encoding="utf-8")
    return TrackingParams.model_validate(yaml.safe_load(text) | {"uri": uri, "experiment": experiment, "sweep": sweep})


# --- comparing


def compare(found: Found, name: str, options: Options) -> Tradeoff:
    """Compare runs.

    Raises:
        InputError: Runs are over different slides, exclusions, protocols or truth; repeats differ in their scores;
            nothing has truth; or the reference is none of the settings.
    """
    _refuse_unequal(found.runs)
    groups, following = _settings(found.runs)
    settings = [runs[0].matches.setting(setting) for setting, _, runs in groups]
    costs = [_cost(run.core_hours for run in runs) for _, _, runs in groups]
    reference = _reference(options.reference, [one.name for one in settings], costs)
    compared = comparison.compare(settings, reference=reference, n=options.resamples, seed=options.seed)
    metric = _metric(compared)
    front = comparison.pareto([one.mean for one in costs], [_value(compared, one.name, metric) for one in settings])
    rows = [
        Row(
            setting,
            shown,
            tuple(run.where for run in runs),
            cost,
            compared.intervals[setting],
            compared.differences.get(setting, {}),
            compared.bands[setting],
            bool(on_front),
        )
        for (setting, shown, runs), cost, on_front in zip(groups, costs, front, strict=True)
    ]
    first = found.runs[0].matches
    return Tradeoff(
        name=name,
        reference=reference,
        metric=metric,
        rows=rows,
        common=_common(found.runs),
        counts=_counts(first, options.resamples),
        protocol=(str(first.protocol.get("name", "")), first.protocol_hash),
        notes=[*found.notes, *following, *_processors(found.runs)],
    )


def _refuse_unequal(runs: Sequence[Run]) -> None:
    reasons = comparison.incomparable([run.matches.setting(run.name) for run in runs])
    if reasons:
        more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
        remedy = "compare runs over the same slides, exclusions, protocol and truth"
        raise InputError("; ".join(reasons[:_SHOWN]) + more, remedy, stage="comparison")


def _metric(compared: comparison.Compared) -> str:
    for metric in ("froc.score", "roc.auc"):
        if any(math.isfinite(_value(compared, name, metric)) for name in compared.intervals):
            return metric
    raise InputError("no run has a score", "compare runs over slides with truth, tumour and normal", stage="comparison")


def _value(compared: comparison.Compared, name: str, metric: str) -> float:
    return compared.intervals[name][metric].value


def _cost(core_hours: Iterable[float]) -> Cost:
    known = np.array([value for value in core_hours if math.isfinite(value)])
    if not known.size:
        return Cost(math.nan, math.nan, math.nan, math.nan, 0)
    sd = float(known.std(ddof=1)) if known.size > 1 else math.nan
    return Cost(float(known.mean()), sd, float(known.min()), float(known.max()), known.size)


def _reference(wanted: str, names: Sequence[str], costs: Sequence[Cost]) -> str:
    if wanted:
        if wanted not in names:
            raise InputError(f"there is no setting {wanted!r}", f"--reference: {'; '.join(names)}", stage="comparison")
        return wanted
    return names[int(np.argmax([-1 if math.isnan(cost.mean) else cost.mean for cost in costs]))]


def _counts(first: evaluation.Recorded, resamples: int) -> dict[str, int]:
    froc = [one for one in first.slides if one.in_froc]
    return {
        "slides": len(first.slides),
        "for FROC": len(froc),
        "for AUC": sum(one.in_auc for one in first.slides),
        "lesions": sum(len(one.best) - one.n_itc for one in froc),
        "resamples": resamples,
    }


def _processors(runs: Sequence[Run]) -> list[str]:
    found = sorted({run.processor for run in runs if run.processor})
    if len(found) < 2:
        return []
    return [f"Core-hours were measured on different processors and are not strictly comparable: {'; '.join(found)}."]


# --- settings


def _settings(runs: Sequence[Run]) -> tuple[list[tuple[str, dict[str, str], list[Run]]], list[str]]:
    """Group runs by their settings.

    Returns:
        Name, parameters that differ, by short name, and runs of each setting, in natural order; and what to say of
        parameters that differ along with those.
    """
    keys = _differing(runs)
    shown = _telling(runs, keys)
    shown.sort(key=lambda key: len({run.params.get(key, "") for run in runs}))
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run.params.get(key, "") for key in shown), []).append(run)
    for members in groups.values():
        _refuse_unlike_repeats(members)
    short = _short(shown)
    texts = {key: _short_values([values[place] for values in groups]) for place, key in enumerate(shown)}
    named = []
    for values, members in sorted(groups.items(), key=lambda item: [_natural(value) for value in item[0]]):
        params = {name: texts[key][value] for name, key, value in zip(short, shown, values, strict=True)}
        named.append((", ".join(f"{key}={value}" for key, value in params.items()) or members[0].name, params, members))
    along = [key for key in keys if key not in shown]
    return named, [f"Differing along with the parameters shown: {', '.join(along)}."] if along else []


def _differing(runs: Sequence[Run]) -> list[str]:
    """Return the parameters that are not the same in all runs, but for what makes no setting."""
    keys = dict.fromkeys(key for run in runs for key in run.params)
    return [
        key
        for key in keys
        if not _NO_SETTING.fullmatch(key) and len({run.params.get(key, "") for run in runs}) > 1
    ]


def _telling(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    """Return as few of the parameters as tell the runs apart as all do: the ones with most values."""

    def apart(some: Sequence[str]) -> int:
        return len({tuple(run.params.get(key, "") for key in some) for run in runs})

    def least(key: str) -> tuple[int, bool, int]:
        return len({run.params.get(key, "") for run in runs}), not _FOLLOWS.fullmatch(key), -len(key)

    kept, wanted = list(keys), apart(keys)
    for key in sorted(keys, key=least):
        others = [one for one in kept if one != key]
        if apart(others) == wanted:
            kept = others
    return kept


def _refuse_unlike_repeats(members: Sequence[Run]) -> None:
    """Refuse runs of one setting whose scores are not the same."""
    first = members[0]
    for other in members[1:]:
        odd = [
            one.slide_id
            for one, its in zip(first.matches.slides, _aligned(first, other), strict=True)
            if not _same(one, its)
        ]
        if odd:
            cause = f"{first.name} and {other.name} have the same settings and other scores, first for {odd[0]}"
            raise InputError(cause, "leave one of them out, or see what made it", stage="comparison")


def _aligned(first: Run, other: Run) -> list[evaluation.RecordedSlide]:
    by_id = {one.slide_id.casefold(): one for one in other.matches.slides}
    return [by_id.get(one.slide_id.casefold(), one) for one in first.matches.slides]


def _same(one: evaluation.RecordedSlide, other: evaluation.RecordedSlide) -> bool:
    """Tell whether two results of a slide agree as far as processors do."""
    ours, theirs = (
        [x.score, *(-1.0 if best is None else best for best in x.best), *sorted(x.false_positives)] for x in (one, other)
    )
    return len(ours) == len(theirs) and np.allclose(ours, theirs, rtol=0, atol=_SAME)


def _common(runs: Sequence[Run]) -> dict[str, str]:
    """Return what all runs have in common."""
    return {
        key: value
        for key, value in runs[0].params.items()
        if not _NO_SETTING.fullmatch(key) and all(run.params.get(key) == value for run in runs)
    }


def _short(keys: Sequence[str]) -> list[str]:
    """Return the last parts of dotted names, or the whole where that is not unique; a kind goes by its group."""
    last = [key.removesuffix(".method").removesuffix(".kind").rpartition(".")[2] for key in keys]
    return [part if last.count(part) == 1 else key for part, key in zip(last, keys, strict=True)]


def _short_values(values: Sequence[str]) -> dict[str, str]:
    """Return values by value, paths and digests cut short where that keeps them apart."""
    cut = {value: value.rpartition("/")[2][:40] for value in values}
    return cut if len(set(cut.values())) == len(cut) else {value: value for value in values}


def _natural(text: str) -> list[tuple[int, float, str]]:
    """Return a key by which 8 comes before 16."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(0, float(part), "") if place % 2 else (1, 0.0, part) for place, part in enumerate(parts) if part]


# --- results


def write(out: Path, found: Tradeoff) -> dict[str, bytes]:
    """Write every file of a comparison and return their bytes by name.

    Raises:
        EnvironmentFault: The folder cannot be written.
    """
    publish.preflight(out)
    pictures = tradeoff.figures(found)
    files = {name: text.encode() for name, text in tradeoff_report.texts(found, pictures).items()}
    files |= {f"{name}.png": data for name, data in pictures.items()}
    files |= {f"{name}.svg": data for name, data in tradeoff.figures(found, "svg").items()}
    for name, data in files.items():
        publish.write_view(out, name, data)
    return files


def record(params: TrackingParams, runs: Sequence[Run], found: Tradeoff, files: Mapping[str, bytes]) -> Logged:
    """Tell MLflow what was found about a sweep."""
    front = {where: row.pareto for row in found.rows for where in row.runs}
    ids = {run.where: run.where for run in runs}
    if any(Path(run.where).is_dir() for run in runs):
        by_identity = {one.tags.get("wsiflow.folder", ""): one.run_id for one in tracking.recorded(params)}
        ids = {run.where: by_identity.get(run.identity, "") for run in runs}
    best = max(found.rows, key=lambda row: np.nan_to_num(row.metrics[found.metric].value, nan=-1.0))
    costs = [row.cost.mean for row in found.rows]
    return tracking.log_comparison(
        params,
        ComparisonRecord(
            pareto={ids[where]: flag for where, flag in front.items() if ids[where]},
            metrics={
                "compare.n_settings": len(found.rows),
                "compare.n_runs": len(runs),
                "compare.n_pareto": len(found.pareto),
                "compare.best_score": best.metrics[found.metric].value,
                "compare.best_score_ci_low": best.metrics[found.metric].low,
                "compare.best_score_ci_high": best.metrics[found.metric].high,
                "compare.reference_score": found.base.metrics[found.metric].value,
                "compare.least_core_hours": min(costs),
                "compare.most_core_hours": max(costs),
            },
            tags={
                "wsiflow.metric": found.metric,
                "wsiflow.best": best.name,
                "wsiflow.reference": found.reference,
                "wsiflow.pareto_set": "; ".join(row.name for row in found.pareto),
                "wsiflow.protocol_hash": found.protocol[1],
            },
            common=found.common,
            description=files["compare.md"].decode(),
            files=files,
        ),
    )


def sweep_folder(out: Path, params: TrackingParams) -> tuple[Tradeoff, Logged] | None:
    """Compare the runs below a sweep's folder, write the comparison there and tell MLflow.

    Returns:
        What was found; None where there are fewer than two runs with scores.

    Raises:
        InputError: See `compare`.
        EnvironmentFault: The folder cannot be written.
    """
    if sum(_scores(one) is not None for one in out.iterdir() if one.is_dir()) < 2:
        return None
    found = in_folders([out])
    name = params.sweep or out.name
    result = compare(found, name, Options())
    return result, record(params, found.runs, result, write(out, result))


def told(found: Tradeoff, out: Path, logged: Logged | None) -> str:
    """Return what a user is told of a comparison."""
    lines = [f"{len(found.rows)} settings, differences to {found.reference}; Pareto set of {tradeoff.title(found.metric)}:"]
    lines += [f"  {line}" for line in tradeoff_report.front(found)]
    lines.append(f"comparison {out / 'report.html'}, compare.md, compare.csv, figures")
    if logged is not None:
        lines.append(f"MLflow     sweep's run {logged.run_id}" if logged.run_id else f"MLflow     {logged.reason}")
    return "\n".join(lines)
