"""Compare runs: the score and the cost of each setting, its difference from a reference, and the Pareto set.

Input: the runs of a sweep from MLflow, or folders of runs. Output: ``compare.md``, ``compare.csv``, figures as PNG and
SVG, and ``report.html``. In MLflow the runs of the Pareto set are tagged, and the rest is logged to the sweep's parent.

Runs with equal settings are repeats of one setting: their scores must be equal, and their costs have a standard
deviation. Only runs with the same slides, exclusions, protocol and truth are compared.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.analysis.runs import (
    FinishedRun,
    RunSelection,
    failure_notes,
    folder_identity,
    holds_runs,
    natural_key,
    runs_in_folders,
    runs_of_sweep,
    runs_of_trials,
    tracking_params,
)
from wsiflow.analysis.tradeoff import figures, report
from wsiflow.analysis.tradeoff.figures import NOT_MEASURED, CoreHours, SettingRow, Tradeoff, Verdict
from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.evaluation import matches, paired
from wsiflow.evaluation.margin import ALPHA, Power, noninferiority, power, slides_for_margin
from wsiflow.run import tracking
from wsiflow.run.tracking import ComparedRun, ComparisonRecord, LogResult, TrackingParams
from wsiflow.system import publish, tables

# Parameters that are not settings: names, folders, tracking and orchestration, and what distinguishes repeats.
_NO_SETTING = re.compile(
    r"(name|out|share|seed|repeat|subsampled_from|orchestrator|allow_partial|shard_slides|evaluation\.bootstrap"
    r"|tracking\..*|compare\..*)"
)
# Parameters that mostly follow from other settings; shown only where nothing else distinguishes two settings.
_FOLLOWS = re.compile(r"(tiles|dense|executor|digest)\..*")
_SAME = 1e-5  # the same settings on another processor give probabilities that agree to about 1e-6
_KINDS = (".method", ".kind")  # select the option of a group, on which the meaning of its other parameters depends
# The score of a setting that finds nothing.
_BY_GUESSING = {"froc.score": 0.0, "froc.strict_score": 0.0, "roc.auc": 0.5}
_COST_SPREAD = 0.05  # standard deviation of a cost as its share, assumed where no setting has repeats
_DRAWS_EACH = 100  # for each difference: the smallest corrected p-value is then 0.02
_SHOWN = 5
_MARGIN = 0.02  # of the numbers of slides, where no margin is named


class Options(NamedTuple):
    """How runs are compared.

    Attributes:
        reference: Name of the setting that others are compared with; empty: the finest stride in fp32.
        resamples: Bootstrap draws of the intervals, 0 for none; `_draws` takes more where there are many settings.
        seed: Seed of the draws.
        margin: Largest loss of the metric that is accepted; None: no verdicts.
        metric: Metric of the verdicts and of the Pareto set; empty: see `_metric`.
        families: Names of parameters by name of a family: settings that differ from the reference in these alone are
            one family, for which p-values and intervals are corrected; all others are another one.
        power: Whether to say how many slides a larger study needs.
    """

    reference: str = ""
    resamples: int = 2000
    seed: int = 0
    margin: float | None = None
    metric: str = ""
    families: Mapping[str, Sequence[str]] = MappingProxyType({})
    power: bool = False


# --- comparing


def compare_runs(selection: RunSelection, name: str, options: Options) -> Tradeoff:
    """Compare the settings of runs on the same cases.

    Args:
        selection: The runs, and notes on those that were left out.
        name: Name of the comparison: the sweep or the experiment.
        options: How the runs are compared.

    Raises:
        InputError: The runs differ in slides, exclusions, protocol or truth; repeats differ in their scores; no run has
            a score; or no setting has the name of the reference.
    """
    _refuse_incomparable(selection.runs)
    groups, following = _settings(selection.runs)
    settings = [one.runs[0].matches.setting(one.name) for one in groups]
    without_total = _without_total(selection.runs)
    totals, lines = _core_hours(groups, "core_hours"), _core_hours(groups, "line_core_hours")
    costs = lines if without_total else totals
    reference = _reference(options.reference, groups, costs)
    draws = _draws(options.resamples, len(settings))
    family = _families(options.families, groups, reference)
    compared = paired.bootstrap(settings, reference=reference, n=draws, seed=options.seed, families=family)
    metric = _metric(compared, options.metric)
    scores = [_worth(_value(compared, one.name, metric), metric) for one in settings]
    as_cheap = _as_cheap(costs)
    means = [one.mean for one in costs]
    front = paired.pareto(means, scores, as_cheap)
    membership = paired.pareto_membership(
        means, scores, _drawn(compared, [one.name for one in groups], metric), as_cheap
    )
    n_slides = _n_slides(selection.runs[0].matches, metric)
    verdicts = _verdicts(compared, family, options.margin, metric, n_slides)
    rows = [
        SettingRow(
            group.name,
            group.params,
            tuple(run.where for run in group.runs),
            cost,
            compared.intervals[group.name],
            compared.differences.get(group.name, {}),
            compared.delong.get(group.name),
            compared.bands[group.name],
            bool(on_front),
            group.dotted,
            float(share),
            family.get(group.name, ""),
            verdicts.get(group.name),
            _power(compared, group.name, family, options, metric, n_slides),
            line,
        )
        for group, cost, line, on_front, share in zip(groups, costs, lines, front, membership, strict=True)
    ]
    worthless = [row.name for row, score in zip(rows, scores, strict=True) if math.isnan(score)]
    first = selection.runs[0].matches
    return Tradeoff(
        name=name,
        reference=reference,
        metric=metric,
        rows=rows,
        common=_common(selection.runs),
        counts=_counts(first, draws),
        protocol=(str(first.protocol.get("name", "")), first.protocol_hash),
        notes=[
            *selection.notes,
            *following,
            *_of_the_line(without_total),
            *_worthless(worthless, metric),
            *_processors(selection.runs),
        ],
        margin=options.margin,
        of_line=bool(without_total),
    )


def _draws(requested: int, n_settings: int) -> int:
    """Return the number of bootstrap draws: enough for a corrected p-value of 0.02; 0 where none are requested.

    The smallest p-value is 2 / (draws + 1), and Holm's method multiplies it by the number of differences.
    """
    return max(requested, _DRAWS_EACH * (n_settings - 1)) if requested else 0


def _refuse_incomparable(runs: Sequence[FinishedRun]) -> None:
    reasons = paired.comparability_problems([run.matches.setting(run.name) for run in runs])
    if reasons:
        more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
        remedy = "compare runs over the same slides, exclusions, protocol and truth"
        raise InputError("; ".join(reasons[:_SHOWN]) + more, remedy, stage="comparison")


def _metric(compared: paired.PairedResults, requested: str) -> str:
    """Return the score of the Pareto set: that of FROC, unless no setting finds a lesion and the AUC tells them apart.

    Raises:
        InputError: No setting has a score, or none has the requested one.
    """
    if requested:
        values = [
            metrics.get(requested, paired.Interval(math.nan, math.nan, math.nan)).value
            for metrics in compared.intervals.values()
        ]
        if requested in _BY_GUESSING and any(map(math.isfinite, values)):
            return requested
        remedy = f"name one of {', '.join(_BY_GUESSING)} that the slides have"
        raise InputError(f"no run has the metric {requested!r}", remedy, stage="comparison")
    known = [
        name
        for name in ("froc.score", "roc.auc")
        if any(math.isfinite(_value(compared, one, name)) for one in compared.intervals)
    ]
    if not known:
        remedy = "compare runs over slides with truth, tumour and normal"
        raise InputError("no run has a score", remedy, stage="comparison")
    useful = [
        name for name in known if any(_value(compared, one, name) > _BY_GUESSING[name] for one in compared.intervals)
    ]
    return (useful or known)[0]


def _value(compared: paired.PairedResults, name: str, metric: str) -> float:
    return compared.intervals[name][metric].value


def _worth(score: float, metric: str) -> float:
    """Return a score that is worth a cost; NaN for one that guessing reaches for nothing."""
    return score if score > _BY_GUESSING[metric] else math.nan


def _worthless(names: Sequence[str], metric: str) -> list[str]:
    """Return a note on the settings that are not in the Pareto set although they may be the cheapest."""
    if not names:
        return []
    name = figures.title(metric)
    return [f"Not worth any cost, since their {name} is {_BY_GUESSING[metric]:g} or not defined: {'; '.join(names)}."]


def _without_total(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the names of the runs of which only the cost of the line is known."""
    return [run.name for run in runs if math.isnan(run.core_hours) and math.isfinite(run.line_core_hours)]


def _of_the_line(without_total: Sequence[str]) -> list[str]:
    """Return a note on costs of the line alone, which stand for all settings where some runs have no others."""
    if not without_total:
        return []
    more = f" and {len(without_total) - _SHOWN} more" if len(without_total) > _SHOWN else ""
    names = f"{'; '.join(without_total[:_SHOWN])}{more}"
    return [
        "Core-hours are those of the line alone, for all settings, without start, planning, failed attempts and "
        f"scoring: former versions, which recorded no others, have run {names}."
    ]


def _core_hours(groups: Sequence["_Group"], which: Literal["core_hours", "line_core_hours"]) -> list[CoreHours]:
    return [_over_repeats(getattr(run, which) for run in one.runs) for one in groups]


def _over_repeats(core_hours: Iterable[float]) -> CoreHours:
    known = np.array([value for value in core_hours if math.isfinite(value)])
    if not known.size:
        return NOT_MEASURED
    sd = float(known.std(ddof=1)) if known.size > 1 else math.nan
    return CoreHours(float(known.mean()), sd, float(known.min()), float(known.max()), known.size)


def _reference(requested: str, groups: Sequence["_Group"], costs: Sequence[CoreHours]) -> str:
    """Return the requested setting, else the one that leaves out least: single precision, and the finest stride.

    It has no first pass that passes over tissue, if that is possible. Where several have these, it is the one with
    unchanged colours, then the one that runs every window by itself, then the one that costs most.
    """
    names = [one.name for one in groups]
    if requested:
        if requested not in names:
            remedy = f"name one with --reference: {'; '.join(names)}"
            raise InputError(f"there is no setting {requested!r}", remedy, stage="comparison")
        return requested

    def preference(place: int) -> tuple[bool, bool, float, bool, bool, float]:
        params = groups[place].runs[0].params
        stride, cost = params.get("inference.stride", ""), costs[place].mean
        return (
            params.get("inference.precision") == "fp32",
            not params.get("inference.cascade.threshold"),
            -float(stride) if stride.isdecimal() else -math.inf,
            params.get("stain.method") == "none",
            params.get("inference.engine") == "window",
            -1.0 if math.isnan(cost) else cost,
        )

    return names[max(range(len(names)), key=preference)]


def _families(families: Mapping[str, Sequence[str]], groups: Sequence["_Group"], reference: str) -> dict[str, str]:
    """Return the family of each setting but the reference: the first one that has all parameters in which they differ.

    Raises:
        InputError: A family names a parameter that does not differ in the comparison.
    """
    base = next(one for one in groups if one.name == reference)
    for name, keys in families.items():
        odd = [key for key in keys if not any(_is_named(key, dotted) for dotted in base.dotted)]
        if odd:
            remedy = f"name some of {', '.join(base.dotted)}"
            raise InputError(f"family {name} has {odd[0]!r}, in which no settings differ", remedy, stage="comparison")

    def family(one: _Group) -> str:
        differing = [key for key, value in one.dotted.items() if base.dotted[key] != value]
        fits = (
            name
            for name, keys in families.items()
            if all(any(_is_named(key, dotted) for key in keys) for dotted in differing)
        )
        return next(fits, "")

    return {one.name: family(one) for one in groups if one.name != reference}


def _is_named(key: str, dotted: str) -> bool:
    """Tell whether a key names a parameter: by its dotted name, or by the end or the group of that."""
    return dotted in {key, f"{key}{_KINDS[0]}", f"{key}{_KINDS[1]}"} or dotted.endswith(f".{key}")


def _as_cheap(costs: Sequence[CoreHours]) -> NDArray[np.bool_]:
    """Return bool (n, n), the pairs of settings whose costs cannot be told apart.

    Their means are nearer than twice the standard error of the difference. A cost that was measured once has the
    relative deviation of those that were measured repeatedly, or 5 % where none was.
    """
    relative = np.array([one.sd / one.mean for one in costs if one.n > 1 and one.mean > 0])
    usual = float(np.sqrt((relative**2).mean())) if relative.size else _COST_SPREAD
    mean = np.array([one.mean for one in costs])
    error = np.array([max(one.sd if one.n > 1 else 0.0, usual * one.mean) / math.sqrt(max(one.n, 1)) for one in costs])
    apart = np.abs(mean[:, None] - mean[None, :])
    near: NDArray[np.bool_] = apart <= 2 * np.hypot(error[:, None], error[None, :])
    return near


def _drawn(compared: paired.PairedResults, names: Sequence[str], metric: str) -> NDArray[np.float64]:
    """Return float64 (draws, settings), the difference of each setting from the reference in every draw."""
    evidence = compared.evidence
    n = max((len(metrics[metric].drawn) - 1 for metrics in evidence.values()), default=0)
    return np.array(
        [evidence[name][metric].drawn[1:] if name in evidence else np.zeros(n) for name in names], np.float64
    ).T.reshape(n, len(names))


def _n_slides(first: matches.EvaluationRecord, metric: str) -> int:
    return sum(one.in_auc if metric == "roc.auc" else one.in_froc for one in first.slides)


def _verdicts(
    compared: paired.PairedResults, family: Mapping[str, str], margin: float | None, metric: str, n_slides: int
) -> dict[str, Verdict]:
    """Return whether each setting is worse than the reference by more than the margin; nothing without a margin."""
    if margin is None:
        return {}
    tests = {name: noninferiority(metrics[metric], margin) for name, metrics in compared.evidence.items()}
    corrected = paired.within_families({name: one.p for name, one in tests.items()}, family)
    worse = paired.within_families({name: one.p_worse for name, one in tests.items()}, family)
    better = paired.within_families({name: one.p_better for name, one in tests.items()}, family)
    return {
        name: Verdict(
            "shown" if corrected[name] <= ALPHA else "worse" if worse[name] <= ALPHA else "not shown",
            corrected[name] <= ALPHA and better[name] <= ALPHA,
            compared.differences[name][metric].low_corrected,
            one.p,
            corrected[name],
            slides_for_margin(compared.evidence[name][metric], margin, n_slides),
        )
        for name, one in tests.items()
    }


def _power(
    compared: paired.PairedResults, name: str, family: Mapping[str, str], options: Options, metric: str, n_slides: int
) -> Power | None:
    """Return what the slides say of a larger study; None where it is not asked for, and for the reference."""
    if not options.power or name not in compared.evidence:
        return None
    size = sum(one == family[name] for one in family.values())
    margin = _MARGIN if options.margin is None else options.margin
    return power(compared.evidence[name][metric], margin, n_slides, size)


def _counts(first: matches.EvaluationRecord, resamples: int) -> dict[str, int]:
    froc = [one for one in first.slides if one.in_froc]
    return {
        "slides": len(first.slides),
        "for FROC": len(froc),
        "normal of these": sum(not one.best for one in froc),
        "for AUC": sum(one.in_auc for one in first.slides),
        "lesions": sum(len(one.best) - one.n_itc for one in froc),
        "resamples": resamples,
    }


def _processors(runs: Sequence[FinishedRun]) -> list[str]:
    names = sorted({run.processor for run in runs if run.processor})
    if len(names) < 2:
        return []
    return [f"Core-hours were measured on different processors and are not strictly comparable: {'; '.join(names)}."]


# --- settings


class _Group(NamedTuple):
    """The runs of one setting, its name, and the values of the parameters that differ, by short and by dotted name."""

    name: str
    params: Mapping[str, str]
    runs: Sequence[FinishedRun]
    dotted: Mapping[str, str]


def _settings(runs: Sequence[FinishedRun]) -> tuple[list[_Group], list[str]]:
    """Return the settings in natural order, and a note on differing parameters that the names do not show."""
    keys = _differing(runs)
    swept = _swept(runs, keys)
    shown = swept or _distinguishing(runs, keys)
    values_of = [run.swept if swept else run.params for run in runs]
    shown.sort(key=lambda key: len({values.get(key, "") for values in values_of}))
    groups: dict[tuple[str, ...], list[FinishedRun]] = {}
    for run, values in zip(runs, values_of, strict=True):
        groups.setdefault(tuple(values.get(key, "") for key in shown), []).append(run)
    for members in groups.values():
        _refuse_unlike_repeats(members)
    short = _short(shown)
    texts = {key: _short_values([own[place] for own in groups]) for place, key in enumerate(shown)}
    named = []
    for own, members in sorted(groups.items(), key=lambda item: [natural_key(value) for value in item[0]]):
        params = {name: texts[key][value] for name, key, value in zip(short, shown, own, strict=True)}
        name = ", ".join(f"{key}={value}" for key, value in params.items()) or members[0].name
        named.append(_Group(name, params, members, dict(zip(shown, params.values(), strict=True))))
    along = [key for key in keys if key not in shown]
    return named, [f"Differing along with the parameters shown: {', '.join(along)}."] if along else []


def _swept(runs: Sequence[FinishedRun], keys: Sequence[str]) -> list[str]:
    """Return the keys that the sweep of runs varied; none where these do not distinguish the runs as all settings do.

    What a user varied names a setting best: the choice of a group, for example, changes many parameters.
    """
    swept = [key for key in dict.fromkeys(key for run in runs for key in run.swept) if not _NO_SETTING.fullmatch(key)]
    pairs = {
        (tuple(run.swept.get(key, "") for key in swept), tuple(run.params.get(key, "") for key in keys)) for run in runs
    }
    by_sweep, by_settings = zip(*pairs, strict=True)
    return swept if len(pairs) == len(set(by_sweep)) == len(set(by_settings)) else []


def _differing(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the settings, by dotted name, whose values are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.params)
    return [
        key for key in keys if not _NO_SETTING.fullmatch(key) and len({run.params.get(key, "") for run in runs}) > 1
    ]


def _distinguishing(runs: Sequence[FinishedRun], keys: Sequence[str]) -> list[str]:
    """Return a small subset of the parameters that distinguishes the runs as well as all parameters do.

    Parameters with many values and those that select a method are preferred; greedy removal of the others.
    """

    def n_distinct(some: Sequence[str]) -> int:
        return len({tuple(run.params.get(key, "") for key in some) for run in runs})

    def least(key: str) -> tuple[int, bool, bool, int]:
        values = len({run.params.get(key, "") for run in runs})
        return values, not _FOLLOWS.fullmatch(key), key.endswith(_KINDS), -len(key)

    kept, needed = list(keys), n_distinct(keys)
    for key in sorted(keys, key=least):
        others = [one for one in kept if one != key]
        if n_distinct(others) == needed:
            kept = others
    return kept


def _refuse_unlike_repeats(members: Sequence[FinishedRun]) -> None:
    """Refuse repeats of one setting whose scores differ.

    Raises:
        InputError: Two of them differ in the result of a slide; the message names the first such slide.
    """
    first = members[0]
    for other in members[1:]:
        odd = [
            one.slide_id
            for one, its in zip(first.matches.slides, _aligned(first, other), strict=True)
            if not _same(one, its)
        ]
        if odd:
            cause = f"{first.name} and {other.name} have the same settings and other scores, first for {odd[0]}"
            raise InputError(cause, "leave one of them out, or find out why their scores differ", stage="comparison")


def _aligned(first: FinishedRun, other: FinishedRun) -> list[matches.SlideRecord]:
    by_id = {one.slide_id.casefold(): one for one in other.matches.slides}
    return [by_id.get(one.slide_id.casefold(), one) for one in first.matches.slides]


def _same(one: matches.SlideRecord, other: matches.SlideRecord) -> bool:
    """Tell whether two results of a slide agree within 1e-5, as the same settings on two processors do."""
    ours, theirs = (
        [x.score, *(-1.0 if best is None else best for best in x.best), *sorted(x.false_positives)]
        for x in (one, other)
    )
    return len(ours) == len(theirs) and np.allclose(ours, theirs, rtol=0, atol=_SAME)


def _common(runs: Sequence[FinishedRun]) -> dict[str, str]:
    """Return the settings that have the same value in all runs."""
    return {
        key: value
        for key, value in runs[0].params.items()
        if not _NO_SETTING.fullmatch(key) and all(run.params.get(key) == value for run in runs)
    }


def _short(keys: Sequence[str]) -> list[str]:
    """Return the last part of each dotted name, or the whole name where that is ambiguous.

    A parameter that selects the option of a group, such as ``stain.method``, is called by its group.
    """
    last = [key.removesuffix(_KINDS[0]).removesuffix(_KINDS[1]).rpartition(".")[2] for key in keys]
    return [part if last.count(part) == 1 else key for part, key in zip(last, keys, strict=True)]


def _short_values(values: Sequence[str]) -> dict[str, str]:
    """Return a short form of each value: paths and digests are cut where the short forms stay distinct."""
    cut = {value: value.rpartition("/")[2][:40] for value in values}
    return cut if len(set(cut.values())) == len(cut) else {value: value for value in values}


# --- results


def write_files(out: Path, tradeoff: Tradeoff) -> dict[str, bytes]:
    """Write every file of a comparison and return their bytes by name.

    Raises:
        EnvironmentFault: The folder cannot be written.
    """
    publish.preflight(out)
    pictures = figures.figures(tradeoff)
    files = {name: text.encode() for name, text in report.texts(tradeoff, pictures).items()}
    files |= {f"{name}.png": data for name, data in pictures.items()}
    files |= {f"{name}.svg": data for name, data in figures.figures(tradeoff, "svg").items()}
    for name, data in files.items():
        publish.write_view(out, name, data)
    return files


def log_to_mlflow(
    params: TrackingParams, folder: Path | None, runs: Sequence[FinishedRun], result: "ComparisonResult"
) -> LogResult:
    """Record a comparison in MLflow: mark the runs of the Pareto set and log the rest to the sweep's parent run.

    Args:
        params: Where the runs are recorded, and the name of their sweep.
        folder: Folder of the sweep; None where the runs come from MLflow.
        runs: The runs that were compared.
        result: The comparison, and the bytes of its files.
    """
    tradeoff = result.tradeoff
    if params.kind == "off":
        return LogResult(None, "tracking is off")
    identities = {run.where: run.identity for run in runs}
    rows = {identities[where]: row for row in tradeoff.rows for where in row.runs}
    try:
        tracked = [one for one in tracking.tracked_runs(params) if folder_identity(one) in rows]
    except (InputError, EnvironmentFault) as error:  # the comparison is complete on disk
        return LogResult(None, str(error))
    parents = {one.parent for one in tracked if one.parent}
    return tracking.log_comparison(
        params,
        ComparisonRecord(
            sweep_folder=str(folder or ""),
            parent=parents.pop() if len(parents) == 1 else "",
            runs={one.run_id: _compared(tradeoff, rows[folder_identity(one)]) for one in tracked},
            axes=list(tradeoff.rows[0].dotted),
            metrics=_metrics(tradeoff, len(runs)),
            tags={
                "wsiflow.metric": tradeoff.metric,
                "wsiflow.best": _best(tradeoff).name,
                "wsiflow.reference": tradeoff.reference,
                "wsiflow.pareto_set": "; ".join(row.name for row in tradeoff.pareto),
                "wsiflow.protocol_hash": tradeoff.protocol[1],
            },
            description=report.description(tradeoff, result.files),
            files={**result.files, "common.json": tables.json_text(tradeoff.common).encode()},
        ),
    )


def _compared(tradeoff: Tradeoff, row: SettingRow) -> ComparedRun:
    return ComparedRun(row.pareto, row.dotted, report.against(tradeoff, row))


def _best(tradeoff: Tradeoff) -> SettingRow:
    return max(tradeoff.rows, key=lambda row: np.nan_to_num(row.metrics[tradeoff.metric].value, nan=-1.0))


def _metrics(tradeoff: Tradeoff, n_runs: int) -> dict[str, float]:
    best = _best(tradeoff).metrics[tradeoff.metric]
    costs = [row.cost.mean for row in tradeoff.rows if math.isfinite(row.cost.mean)]
    return {
        "compare.n_settings": len(tradeoff.rows),
        "compare.n_runs": n_runs,
        "compare.n_pareto": len(tradeoff.pareto),
        "compare.best_score": report.rounded(best.value),
        "compare.best_score_ci_low": report.rounded(best.low),
        "compare.best_score_ci_high": report.rounded(best.high),
        "compare.reference_score": report.rounded(tradeoff.base.metrics[tradeoff.metric].value),
        "compare.least_core_hours": report.rounded(min(costs, default=math.nan)),
        "compare.most_core_hours": report.rounded(max(costs, default=math.nan)),
    }


_NO_TAGS: Mapping[str, str] = MappingProxyType({})


class Request(NamedTuple):
    """What a user wants to have compared.

    Attributes:
        folders: Folders of runs; empty where the runs of an MLflow experiment are compared.
        params: The MLflow experiment and the sweep in it; None where folders are given.
        options: How the runs are compared.
        tags: Tags that the runs of the experiment have, by name, of whatever sweep; empty: the runs of the sweep.
    """

    folders: Sequence[Path]
    params: TrackingParams | None
    options: Options
    tags: Mapping[str, str] = _NO_TAGS


def parse_request(
    names: Sequence[str], uri: str, sweep: str | None, options: Options, tags: Mapping[str, str] = _NO_TAGS
) -> Request:
    """Decide whether names mean folders of runs, or one experiment of the MLflow store at ``uri``."""
    folders = [Path(name) for name in names]
    if not tags and (len(folders) > 1 or holds_runs(folders[0])):
        return Request(folders, None, options)
    return Request([], tracking_params(uri, names[0], sweep), options, tags)


class ComparisonResult(NamedTuple):
    """A comparison whose files are written.

    Attributes:
        tradeoff: The comparison.
        out: Folder of its files.
        files: Bytes of the files by name.
        logged: What came of recording it in MLflow; None where the runs did not come from MLflow.
        params: Where it is recorded; None where the runs did not come from MLflow.
    """

    tradeoff: Tradeoff
    out: Path
    files: Mapping[str, bytes]
    logged: LogResult | None
    params: TrackingParams | None


def run_comparison(request: Request, out: Path) -> ComparisonResult:
    """Compare the requested runs and write the files to ``out``; a sweep from MLflow is also recorded there.

    Raises:
        InputError: A folder, experiment or sweep does not exist, or see `compare_runs`.
        EnvironmentFault: The store cannot be read, or the folder cannot be written.
    """
    if request.params is None:
        selection = runs_in_folders(request.folders)
        name = request.folders[0].name if len(request.folders) == 1 else out.name
        tradeoff = compare_runs(selection, name, request.options)
        return ComparisonResult(tradeoff, out, write_files(out, tradeoff), None, None)
    selection = runs_of_sweep(request.params, request.tags)
    sweeps = {(run.parent, run.sweep) for run in selection.runs}
    params = request.params.model_copy(update={"sweep": (len(sweeps) == 1 and sweeps.pop()[1]) or None})
    result = _compare(selection, params.sweep or params.experiment, request.options, out)
    return result._replace(logged=log_to_mlflow(params, None, selection.runs, result), params=params)


def compare_sweep_folder(
    out: Path, params: TrackingParams, options: Options, failed: Collection[str] = ()
) -> ComparisonResult | None:
    """Compare the runs below a sweep's folder, write the files there and record the comparison in MLflow.

    Args:
        out: The sweep's folder.
        params: Where the runs are recorded, and the name of their sweep.
        options: How the runs are compared.
        failed: Names of the trials that failed, which are left out whatever their folders hold; a mapping has their
            reasons as well.

    Returns:
        The comparison; None where fewer than two runs have scores.

    Raises:
        InputError: See `compare_runs`.
        EnvironmentFault: The folder cannot be written.
    """
    selection = runs_of_trials(out, failed)
    if len(selection.runs) < 2:
        return None
    result = _compare(selection, params.sweep or out.name, options, out)
    return result._replace(logged=log_to_mlflow(params, out, selection.runs, result), params=params)


def describe_sweep(out: Path, params: TrackingParams, reason: str, failed: Collection[str]) -> LogResult:
    """Say on the page of a sweep in MLflow why its runs were not compared, and which trials failed."""
    sentences = [f"The runs of this sweep were not compared: {reason}.", *failure_notes(failed)]
    return tracking.log_sweep(params, out, "\n\n".join(sentences))


def _compare(selection: RunSelection, name: str, options: Options, out: Path) -> ComparisonResult:
    tradeoff = compare_runs(selection, name, options)
    return ComparisonResult(tradeoff, out, write_files(out, tradeoff), None, None)


def summary_text(result: ComparisonResult) -> str:
    """Return the lines that a user sees once a comparison is done: Pareto set, files, and the record in MLflow."""
    tradeoff = result.tradeoff
    name = figures.title(tradeoff.metric)
    lines = [f"compared   {len(tradeoff.rows)} settings with {tradeoff.reference}; Pareto set of {name}:"]
    lines += (
        [] if tradeoff.pareto else ["           none: no setting has a cost and a score that guessing does not reach"]
    )
    lines += [f"           {line}" for line in report.front(tradeoff)]
    lines += [
        f"margin     {row[0]}: {row[1]}, bound {row[2]}, {row[5]} slides" for row in report.verdict_rows(tradeoff)
    ]
    lines += [
        f"power      {row[0]}: {row[1]} now, {row[3]} slides for the difference, {row[5]} for the margin if equal"
        for row in report.power_rows(tradeoff)
    ]
    lines.append(f"comparison {result.out / 'report.html'}, compare.md, compare.csv, figures")
    if result.logged is not None and result.params is not None:
        lines += mlflow_lines(result.params, result.logged)
    return "\n".join(lines)


def mlflow_lines(params: TrackingParams, logged: LogResult) -> list[str]:
    """Return the lines that say where a sweep is seen in MLflow, or why it was not recorded."""
    lines = tracking.opening_lines(params, logged, sweep=True) if logged.run_id else [logged.reason]
    return [f"{'' if place else 'MLflow':11}{line}" for place, line in enumerate(lines)]
