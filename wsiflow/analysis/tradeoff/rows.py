"""Compare the settings of runs: score, cost, difference from a reference and place in the Pareto set of each.

Input: finished runs. Output: a `Tradeoff`, with a row for each setting. Only runs with the same slides, exclusions,
protocol and truth are compared.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.analysis.runs import FinishedRun, RunSelection
from wsiflow.analysis.tradeoff.settings import Group, common_settings, group_runs, is_named
from wsiflow.analysis.tradeoff.values import NOT_MEASURED, CoreHours, SettingRow, Tradeoff, Verdict, title
from wsiflow.errors import InputError
from wsiflow.evaluation import matches, paired
from wsiflow.evaluation.draws import Interval
from wsiflow.evaluation.margin import ALPHA, Power, noninferiority, power, slides_for_margin
from wsiflow.evaluation.pareto import pareto, pareto_membership
from wsiflow.evaluation.setting import comparability_problems

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
    groups, following = group_runs(selection.runs)
    without_total = _without_total(selection.runs)
    lines = _core_hours(groups, "line_core_hours")
    costs = lines if without_total else _core_hours(groups, "core_hours")
    reference = _reference(options.reference, groups, costs)
    draws = _draws(options.resamples, len(groups))
    family = _families(options.families, groups, reference)
    settings = [one.runs[0].matches.setting(one.name) for one in groups]
    compared = paired.bootstrap(settings, reference=reference, n=draws, seed=options.seed, families=family)
    metric = _metric(compared, options.metric)
    scores = [_worth(_value(compared, one.name, metric), metric) for one in groups]
    first = selection.runs[0].matches
    rows = _rows(groups, costs, lines, compared, family)
    rows = _with_pareto(rows, scores, _drawn(compared, [one.name for one in groups], metric))
    rows = _with_margin(rows, compared, options, metric, _n_slides(first, metric))
    worthless = [row.name for row, score in zip(rows, scores, strict=True) if math.isnan(score)]
    return Tradeoff(
        name=name,
        reference=reference,
        metric=metric,
        rows=rows,
        common=common_settings(selection.runs),
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


def _rows(
    groups: Sequence[Group],
    costs: Sequence[CoreHours],
    lines: Sequence[CoreHours],
    compared: paired.PairedResults,
    family: Mapping[str, str],
) -> list[SettingRow]:
    """Return a row for each setting, without its place in the Pareto set and what a margin says."""
    return [
        SettingRow(
            group.name,
            group.params,
            tuple(run.where for run in group.runs),
            cost,
            compared.intervals[group.name],
            compared.differences.get(group.name, {}),
            compared.delong.get(group.name),
            compared.bands[group.name],
            dotted=group.dotted,
            family=family.get(group.name, ""),
            line=line,
        )
        for group, cost, line in zip(groups, costs, lines, strict=True)
    ]


def _with_pareto(rows: Sequence[SettingRow], scores: Sequence[float], drawn: NDArray[np.float64]) -> list[SettingRow]:
    """Return rows with their place in the Pareto set, also where the cases are drawn anew, (draws, settings)."""
    means, as_cheap = [row.cost.mean for row in rows], _as_cheap([row.cost for row in rows])
    front = pareto(means, scores, as_cheap)
    membership = pareto_membership(means, scores, drawn, as_cheap)
    return [
        row._replace(pareto=bool(on_front), membership=float(share))
        for row, on_front, share in zip(rows, front, membership, strict=True)
    ]


def _with_margin(
    rows: Sequence[SettingRow], compared: paired.PairedResults, options: Options, metric: str, n_slides: int
) -> list[SettingRow]:
    """Return rows with their verdicts on the margin, and what the slides say of a larger study."""
    family = {row.name: row.family for row in rows if row.name in compared.evidence}
    verdicts = _verdicts(compared, family, options.margin, metric, n_slides)
    return [
        row._replace(
            verdict=verdicts.get(row.name), power=_power(compared, row.name, family, options, metric, n_slides)
        )
        for row in rows
    ]


def _draws(requested: int, n_settings: int) -> int:
    """Return the number of bootstrap draws: enough for a corrected p-value of 0.02; 0 where none are requested.

    The smallest p-value is 2 / (draws + 1), and Holm's method multiplies it by the number of differences.
    """
    return max(requested, _DRAWS_EACH * (n_settings - 1)) if requested else 0


def _refuse_incomparable(runs: Sequence[FinishedRun]) -> None:
    reasons = comparability_problems([run.matches.setting(run.name) for run in runs])
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
            metrics.get(requested, Interval(math.nan, math.nan, math.nan)).value
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
    name = title(metric)
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


def _core_hours(groups: Sequence["Group"], which: Literal["core_hours", "line_core_hours"]) -> list[CoreHours]:
    return [_over_repeats(getattr(run, which) for run in one.runs) for one in groups]


def _over_repeats(core_hours: Iterable[float]) -> CoreHours:
    known = np.array([value for value in core_hours if math.isfinite(value)])
    if not known.size:
        return NOT_MEASURED
    sd = float(known.std(ddof=1)) if known.size > 1 else math.nan
    return CoreHours(float(known.mean()), sd, float(known.min()), float(known.max()), known.size)


def _reference(requested: str, groups: Sequence["Group"], costs: Sequence[CoreHours]) -> str:
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


def _families(families: Mapping[str, Sequence[str]], groups: Sequence["Group"], reference: str) -> dict[str, str]:
    """Return the family of each setting but the reference: the first one that has all parameters in which they differ.

    Raises:
        InputError: A family names a parameter that does not differ in the comparison.
    """
    base = next(one for one in groups if one.name == reference)
    for name, keys in families.items():
        odd = [key for key in keys if not any(is_named(key, dotted) for dotted in base.dotted)]
        if odd:
            remedy = f"name some of {', '.join(base.dotted)}"
            raise InputError(f"family {name} has {odd[0]!r}, in which no settings differ", remedy, stage="comparison")

    def family(one: Group) -> str:
        differing = [key for key, value in one.dotted.items() if base.dotted[key] != value]
        fits = (
            name
            for name, keys in families.items()
            if all(any(is_named(key, dotted) for key in keys) for dotted in differing)
        )
        return next(fits, "")

    return {one.name: family(one) for one in groups if one.name != reference}


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
