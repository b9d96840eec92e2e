"""Compare settings that were scored on the same cases: bootstrap intervals, paired differences and the Pareto front.

Input: per setting the matches, scores and labels of its slides. Output: an interval for every metric, paired
differences from one reference with p-values, bands of the FROC curves, and the settings on the Pareto front.

Everything comes from one set of bootstrap draws. The cases, those that count for FROC and those that count for the AUC
together, are drawn with replacement, and every metric of every setting is computed on each draw, so that a difference
always compares two settings on the same cases. Intervals of FROC metrics and of differences are percentile intervals;
where almost all lesions are found, or almost none, or few differ, they are extended to exact and score intervals
(`discordance`). The interval of an AUC is DeLong's on the scale of log odds, with slides of one patient kept together;
beside it stands the bias-corrected and accelerated one of the draws (BCa). A p-value is two-sided and counts the
exchanges of the two settings' results, slide by slide, also for the AUC; where it is 0.05 or more, the interval is
extended to 0. The p-value of DeLong's test is given beside it. For every metric p-values are corrected by Holm's
method, and intervals by Bonferroni's, for the number of settings of a family that are compared with the reference.
They are not corrected for the number of metrics: choose one metric beforehand.

docs/compare.md has the coverage of intervals and the errors of tests in simulated sets. A metric that depends on a
single case (one case with lesions, or one of a class for the AUC, where all slides of a patient are one case) is the
same in every draw: it has a value, but neither interval nor p-value.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsiflow.errors import InputError
from wsiflow.evaluation import discordance, froc, measures, roc
from wsiflow.evaluation.resampling import case_draws, corrected_interval, holm, interval, left_out

FP_GRID = np.linspace(0, 8, 129)
"""False positives per slide at which bands are computed; the six rates of the score are among them."""

_ALPHA = 0.05
_EXCHANGES_EACH = 10
_FEW = 5  # slides that change their place, below which draws say too little about the AUC
_LEAST_CASES = 2  # fewer cases do not show how much a metric varies from case to case
_DIGITS = 12  # equal metrics that were summed in another order differ after these


class Setting(NamedTuple):
    """The scored slides of one setting: a row of a comparison.

    Attributes:
        name: Name of the setting, unique in a comparison.
        matches: The slides that count for FROC.
        slide_ids: The slides that count for the AUC, in the order of scores and labels.
        scores: float64 (n,), higher means more likely tumour.
        labels: int64 (n,) of 0 and 1.
        protocol_hash: SHA-256 of the scoring protocol, or empty.
        truth: SHA-256 of each slide's truth, by slide id; a slide whose truth is not known is absent.
        clusters: Number of each slide's patient, by slide id: slides of one patient are drawn together. A slide without
            a number is drawn independently.
    """

    name: str
    matches: Sequence[froc.Matches]
    slide_ids: tuple[str, ...]
    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    protocol_hash: str = ""
    truth: Mapping[str, str] | None = None
    clusters: Mapping[str, int] | None = None


class Interval(NamedTuple):
    """A metric of the sample and its 95 % interval; NaN where they are not defined."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """The difference setting minus reference in the sample, its 95 % interval and its p-value, both also corrected.

    The corrected interval holds the truth together with those of all other settings of the family in 95 %.
    """

    value: float
    low: float
    high: float
    p: float
    p_corrected: float
    low_corrected: float
    high_corrected: float


class FrocBand(NamedTuple):
    """A FROC curve with a pointwise 95 % band; float64 (p,) each."""

    fp_per_slide: NDArray[np.float64]
    sensitivity: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


class PairedResults(NamedTuple):
    """The results of a paired bootstrap.

    Attributes:
        intervals: Interval by setting and metric; that of ``roc.auc`` is DeLong's, that of ``roc.auc_bootstrap`` BCa.
        differences: Difference from the reference by setting and metric; the reference is absent.
        delong: p-value of DeLong's test of the AUC against the reference's, uncorrected and corrected, by setting;
            slides of one patient are kept together.
        bands: FROC curve with its band, by setting.
        evidence: What the differences rest on, by setting and metric; the reference is absent.
    """

    intervals: dict[str, dict[str, Interval]]
    differences: dict[str, dict[str, Difference]]
    delong: dict[str, tuple[float, float]]
    bands: dict[str, FrocBand]
    evidence: dict[str, dict[str, "Evidence"]]


class Evidence(NamedTuple):
    """What the difference of a setting from the reference rests on.

    Attributes:
        drawn: float64 (n + 1,), the difference in the sample and in every draw.
        p: p-value by exchange of the results; NaN where there is none.
        units: What was gained and lost, where that bounds the difference; else None.
    """

    drawn: NDArray[np.float64]
    p: float
    units: discordance.Discordance | None


class _Drawn(NamedTuple):
    """Metrics of a setting in the sample (row 0) and in every draw, its FROC curve likewise, and its jackknifed AUC."""

    metrics: dict[str, NDArray[np.float64]]
    curve: NDArray[np.float64]
    jackknife: NDArray[np.float64]


class _Times(NamedTuple):
    """How often each case is in the sample (row 0) and in every draw, and in every jackknife sample; by case."""

    drawn: dict[str, NDArray[np.int64]]
    left_out: dict[str, NDArray[np.int64]]


def bootstrap(
    settings: Sequence[Setting],
    *,
    reference: str,
    mode: froc.Mode = "official",
    n: int = 2000,
    seed: int = 0,
    families: Mapping[str, str] | None = None,
) -> PairedResults:
    """Compare settings that were scored on the same cases, by a bootstrap over these cases.

    Metrics are ``froc.score``, ``froc.strict_score``, ``roc.auc`` and the six sensitivities of ``mode``
    (``froc.sensitivity_at_0.25`` or ``froc.strict_sensitivity_at_0.25``).

    Args:
        settings: The settings to compare.
        reference: Name of the setting that the others are compared with.
        mode: FROC mode of the sensitivities and bands.
        n: Number of draws; with 0 all intervals and p-values are NaN.
        seed: Seed of the draws.
        families: Name of the family of each setting, by setting: p-values and intervals are corrected for the settings
            of one family. None: all settings are one family.

    Raises:
        InputError: Two settings have the same name, none is the reference, they must not be compared, or a slide
            appears twice.
    """
    names = [one.name for one in settings]
    if len(set(names)) < len(names) or reference not in names:
        cause = f"settings {', '.join(names) or 'none'} with {reference!r} as the reference"
        remedy = "give each setting a unique name, and name one of them as the reference"
        raise InputError(cause, remedy, stage="comparison")
    reasons = comparability_problems(settings)
    if reasons:
        remedy = "compare runs over the same slides, protocol and truth"
        raise InputError("; ".join(reasons), remedy, stage="comparison")
    times = _draws(settings[0], n, seed)
    drawn = {one.name: _without_lone_cases(_drawn(one, times, mode), one) for one in settings}
    by_name = {one.name: one for one in settings}
    evidence = {
        name: _evidence(
            _Compared(by_name[reference], drawn[reference]), _Compared(one, drawn[name]), mode, _Exchange(n, seed)
        )
        for name, one in by_name.items()
        if name != reference
    }
    family = {name: (families or {}).get(name, "") for name in evidence}
    return PairedResults(
        {name: _intervals(drawn[name], one, mode) for name, one in by_name.items()},
        _differences(evidence, family),
        _delong(by_name, reference, family),
        {name: FrocBand(FP_GRID, one.curve[0], *interval(one.curve[1:])) for name, one in drawn.items()},
        evidence,
    )


def pareto(cost: ArrayLike, score: ArrayLike, as_cheap: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """Return which settings are on the Pareto front of cost and score.

    Args:
        cost: (n,), lower is better.
        score: (n,), higher is better.
        as_cheap: bool (n, n), pairs whose costs cannot be told apart. None: those whose costs are equal.

    Returns:
        bool (n,), True where no other setting is cheaper and at least as good, or as cheap and better. Equal settings
        are all on the front; a setting whose cost or score is NaN is not.

    Raises:
        InputError: The lengths differ.
    """
    costs, scores = np.asarray(cost, np.float64), np.asarray(score, np.float64)
    if costs.ndim != 1 or costs.shape != scores.shape:
        raise InputError(f"the costs have shape {costs.shape} and the scores {scores.shape}", "give one score per cost")
    known = ~(np.isnan(costs) | np.isnan(scores))
    equal = np.asarray(np.equal.outer(costs, costs) if as_cheap is None else as_cheap, np.bool_)
    cheaper = (costs[None, :] < costs[:, None]) & ~equal
    better, as_good = scores[None, :] > scores[:, None], scores[None, :] >= scores[:, None]
    beats = (cheaper & as_good) | (equal & better)
    beaten: NDArray[np.bool_] = np.any(beats, axis=1)
    return known & ~beaten


def comparability_problems(settings: Sequence[Setting]) -> list[str]:
    """Return the reasons why settings must not be compared; empty where they may.

    Settings must have the same protocol, the same slides for FROC and for the AUC, for every slide the same label,
    truth and number of lesions, and the same grouping of slides by patient. Upper and lower case of slide names are the
    same.
    """
    return [reason for one in settings[1:] for reason in _against(settings[0], one)]


def patients(setting: Setting) -> list[int] | None:
    """Return the number of the patient of each slide that counts for the AUC; None where no patient has two slides."""
    whose = _of_slides(setting)
    return whose if len(set(whose)) < len(whose) else None


def _of_slides(setting: Setting) -> list[int]:
    """Return the number of the patient, or of the slide, of each slide that counts for the AUC."""
    cluster = dict(zip(_cases(setting), _clusters(setting), strict=True))
    return [cluster[slide.casefold()] for slide in setting.slide_ids]


def pareto_membership(
    cost: ArrayLike, score: ArrayLike, drawn: NDArray[np.float64], as_cheap: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Return the share of redraws of the cases in which each setting is on the Pareto front.

    Args:
        cost: (n,), as for `pareto`.
        score: (n,), NaN for settings that are never on the front.
        drawn: float64 (draws, n), the score in each draw, or its difference from one reference.
        as_cheap: As for `pareto`.

    Returns:
        float64 (n,); NaN without draws.
    """
    known = drawn[~np.isnan(drawn[:, ~np.isnan(np.asarray(score, np.float64))]).any(axis=1)]
    if not len(known):
        return np.full(drawn.shape[1], np.nan)
    worth = np.where(np.isnan(np.asarray(score, np.float64)), np.nan, known)
    shares: NDArray[np.float64] = np.mean([pareto(cost, one, as_cheap) for one in worth], axis=0, dtype=np.float64)
    return shares


# --- why not


def _against(first: Setting, other: Setting) -> list[str]:
    """Return sentences on each difference between two settings that rules out a comparison."""
    both = f"{first.name} and {other.name}"
    reasons = []
    if first.protocol_hash != other.protocol_hash:
        hashes = " and ".join(one.protocol_hash[:12] or "none" for one in (first, other))
        reasons.append(f"{both} were scored by different protocols ({hashes})")
    for what, ours, theirs in (
        ("FROC", _lesions(first), _lesions(other)),
        ("the AUC", _labels(first), _labels(other)),
    ):
        odd = sorted(set(ours) ^ set(theirs))
        reasons += [f"{both} have different slides for {what}: {_listed(odd)} in one of them only"] if odd else []
        kind = "numbers of lesions" if what == "FROC" else "labels"
        reasons += _unequal(both, kind, ours, theirs)
    reasons += _unequal(both, "truth", _folded(first.truth or {}), _folded(other.truth or {}))
    return reasons + _unequal(both, "patients", _patients(first), _patients(other))


def _unequal(both: str, kind: str, ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[str]:
    """Return a sentence that names the slides whose values differ between two settings, if there are any."""
    odd = sorted(slide for slide in set(ours) & set(theirs) if ours[slide] != theirs[slide])
    return [f"{both} have different {kind} for {_listed(odd)}"] if odd else []


_SHOWN = 5


def _listed(slides: Sequence[str]) -> str:
    more = f" and {len(slides) - _SHOWN} more" if len(slides) > _SHOWN else ""
    return ", ".join(slides[:_SHOWN]) + more


def _lesions(setting: Setting) -> dict[str, tuple[int, int]]:
    return {one.slide_id.casefold(): (len(one.best), one.n_itc) for one in setting.matches}


def _labels(setting: Setting) -> dict[str, int]:
    return {slide.casefold(): int(label) for slide, label in zip(setting.slide_ids, setting.labels, strict=True)}


def _scores(setting: Setting) -> dict[str, float]:
    return {slide.casefold(): float(score) for slide, score in zip(setting.slide_ids, setting.scores, strict=True)}


def _patients(setting: Setting) -> dict[str, str]:
    """Return the first slide of each slide's patient, which identifies the patient whatever its number."""
    patients, first = {}, dict[int, str]()
    for case, number in zip(_cases(setting), _clusters(setting), strict=True):
        patients[case] = first.setdefault(number, case)
    return patients


def _folded(by_slide: Mapping[str, str]) -> dict[str, str]:
    return {slide.casefold(): value for slide, value in by_slide.items()}


# --- draws


def _cases(setting: Setting) -> list[str]:
    """Return every case of a setting once, in an order that does not depend on the order of its slides."""
    return sorted({one.slide_id.casefold() for one in setting.matches} | {one.casefold() for one in setting.slide_ids})


def _clusters(setting: Setting) -> list[int]:
    """Return the cluster of each case: its patient's number, or an unused number for a slide without patient."""
    given = {slide.casefold(): number for slide, number in (setting.clusters or {}).items()}
    free = max(given.values(), default=-1) + 1
    return [given.get(case, free + index) for index, case in enumerate(_cases(setting))]


def _draws(setting: Setting, n: int, seed: int) -> _Times:
    """Draw the cases of a setting, ``n`` times with replacement, and leave each of them out once."""
    cases, clusters = _cases(setting), _clusters(setting)
    times = case_draws(len(cases), n=n, seed=seed, clusters=clusters)
    whole = np.concatenate([np.ones((1, len(cases)), np.int64), times])
    without = left_out(len(cases), clusters=clusters)
    return _Times(dict(zip(cases, whole.T, strict=True)), dict(zip(cases, without.T, strict=True)))


def _columns(times: Mapping[str, NDArray[np.int64]], slides: Sequence[str]) -> NDArray[np.int64]:
    """Return int64 (rows, slides), how often each of some slides is in each sample."""
    n_rows = len(next(iter(times.values()))) if times else 1
    columns = np.empty((n_rows, len(slides)), np.int64)
    for column, slide in enumerate(slides):
        columns[:, column] = times[slide.casefold()]
    return columns


def _delong(
    settings: Mapping[str, Setting], reference: str, family: Mapping[str, str]
) -> dict[str, tuple[float, float]]:
    """Return DeLong's p-values of the AUCs against the reference's, uncorrected and corrected by Holm's method."""
    labels = _labels(settings[reference])
    scores = {name: _scores(one) for name, one in settings.items()}
    in_order = {name: [own[slide] for slide in labels] for name, own in scores.items()}
    others = [name for name in settings if name != reference]
    whose = patients(settings[reference])
    p = [roc.paired_test(in_order[name], in_order[reference], list(labels.values()), whose).p for name in others]
    corrected = within_families(dict(zip(others, p, strict=True)), family)
    return {name: (alone, corrected[name]) for name, alone in zip(others, p, strict=True)}


def within_families(p: Mapping[str, float], family: Mapping[str, str]) -> dict[str, float]:
    """Return p-values corrected by Holm's method within each family of settings, by setting."""
    corrected: dict[str, float] = {}
    for one in dict.fromkeys(family.values()):
        names = [name for name in p if family[name] == one]
        corrected |= dict(zip(names, holm([p[name] for name in names]), strict=True))
    return corrected


def _drawn(setting: Setting, times: _Times, mode: froc.Mode) -> _Drawn:
    """Compute every metric of a setting in the sample and in every draw."""
    of_froc = _columns(times.drawn, [one.slide_id for one in setting.matches])
    curve = froc.resample(setting.matches, of_froc, mode=mode, rates=FP_GRID)
    at_rates = curve[:, np.searchsorted(FP_GRID, froc.RATES)]
    other: froc.Mode = "strict" if mode == "official" else "official"
    scores = {
        mode: at_rates.mean(axis=1),
        other: froc.resample(setting.matches, of_froc, mode=other).mean(axis=1),
    }
    stem = "froc." if mode == "official" else "froc.strict_"
    area, without = (roc.resample(setting.scores, setting.labels, _columns(one, setting.slide_ids)) for one in times)
    return _Drawn(
        {
            "froc.score": scores["official"],
            "froc.strict_score": scores["strict"],
            **{f"{stem}sensitivity_at_{rate:g}": at_rates[:, k] for k, rate in enumerate(froc.RATES)},
            "roc.auc": area,
        },
        curve,
        without,
    )


def _without_lone_cases(drawn: _Drawn, setting: Setting) -> _Drawn:
    """Replace the draws of metrics that depend on a single case by NaN: they are all equal and show no uncertainty."""
    of_class, with_lesions = _classes(setting), _with_lesions(setting)
    for metric, values in drawn.metrics.items():
        if min(map(len, of_class if metric == "roc.auc" else [with_lesions])) < _LEAST_CASES:
            values[1:] = np.nan
    if len(with_lesions) < _LEAST_CASES:
        drawn.curve[1:] = np.nan
    return drawn


def _classes(setting: Setting) -> list[set[int]]:
    """Return the patients, or slides, with normal slides, and those with tumour slides."""
    labelled = list(zip(_of_slides(setting), setting.labels.tolist(), strict=True))
    return [{whose for whose, label in labelled if label == kind} for kind in (0, 1)]


def _with_lesions(setting: Setting) -> set[int]:
    """Return the patients, or slides, with lesions that count."""
    cluster = dict(zip(_cases(setting), _clusters(setting), strict=True))
    return {cluster[one.slide_id.casefold()] for one in setting.matches if one.n_lesions}


def _intervals(drawn: _Drawn, setting: Setting, mode: froc.Mode) -> dict[str, Interval]:
    """Return the 95 % intervals of all metrics: DeLong's and BCa for the AUC, percentiles for the others.

    Where almost all lesions are found, or almost none, an interval of percentiles is extended to the exact one.
    """
    intervals = {metric: Interval(float(x[0]), *interval(x[1:]).tolist()) for metric, x in drawn.metrics.items()}
    intervals |= {
        metric: _extended(intervals[metric], found, setting) for metric, found in _weights(setting, mode).items()
    }
    area = drawn.metrics["roc.auc"]
    corrected = corrected_interval(float(area[0]), area[1:], drawn.jackknife)
    delong = roc.auc_interval(setting.scores, setting.labels, patients(setting))
    return intervals | {
        "roc.auc": Interval(float(area[0]), *delong),
        "roc.auc_bootstrap": Interval(float(area[0]), *corrected.tolist()),
    }


# --- further measures


class FurtherMeasures(NamedTuple):
    """Measures beside FROC score and AUC: interval by metric, and number of lesions by size class."""

    intervals: dict[str, Interval]
    n_lesions: dict[str, int]


def further_measures(setting: Setting, *, n: int, seed: int, join_um: float = froc.JOIN_UM) -> FurtherMeasures:
    """Return average precision, the scores of each size class, and the slides' sensitivities at specificities.

    They come from the draws of `bootstrap`. Metrics are ``froc.average_precision``, ``froc.macro_score``,
    ``froc.micro_score``, ``froc.itc_score`` and ``roc.sensitivity_at_specificity_0.95``; see `measures`.

    Args:
        setting: The slides.
        n: Number of draws; with 0 all intervals are NaN.
        seed: Seed of the draws.
        join_um: Joining distance of the protocol.
    """
    times = _draws(setting, n, seed).drawn
    of_froc = _columns(times, [one.slide_id for one in setting.matches])
    of_auc = _columns(times, setting.slide_ids)
    intervals = {
        "froc.average_precision": _of_classes(
            measures.average_precision(setting.matches, of_froc), [_with_lesions(setting)]
        )
    }
    n_lesions = {}
    for size in measures.SIZES:
        chosen = measures.of_size(setting.matches, size, join_um=join_um)
        if chosen is None:
            continue
        own = setting._replace(matches=chosen)
        n_lesions[size] = _n_lesions(own)
        values = froc.resample(chosen, of_froc, mode="strict").mean(axis=1)
        drawn = _of_classes(values, [_with_lesions(own)])
        intervals[f"froc.{size}_score"] = _extended(drawn, _weights(own, "strict")["froc.strict_score"], own)
    for specificity in measures.SPECIFICITIES:
        values = measures.sensitivity_at_specificity(setting.scores, setting.labels, of_auc, specificity)
        intervals[f"roc.sensitivity_at_specificity_{specificity:g}"] = _of_tumour_slides(values, setting)
    return FurtherMeasures(intervals, n_lesions)


def _of_classes(values: NDArray[np.float64], classes: Sequence[set[int]]) -> Interval:
    """Return a value with its interval of percentiles; without one where it rests on a single case."""
    if min(map(len, classes)) < _LEAST_CASES:
        return Interval(float(values[0]), math.nan, math.nan)
    return Interval(float(values[0]), *interval(values[1:]).tolist())


def _of_tumour_slides(values: NDArray[np.float64], setting: Setting) -> Interval:
    """Return a share of the tumour slides with its interval, extended where almost all are found or almost none."""
    one = _of_classes(values, _classes(setting))
    whose = np.array(_of_slides(setting), np.int64)[setting.labels == 1]
    if not math.isfinite(one.low):
        return one
    n_patients = len(set(whose.tolist()))
    exact = discordance.share_interval(np.full(n_patients, one.value), np.arange(n_patients))
    return Interval(one.value, min(one.low, exact[0]), max(one.high, exact[1])) if exact else one


def _extended(one: Interval, found: NDArray[np.float64], setting: Setting) -> Interval:
    """Return an interval, extended to the exact one where almost all lesions are found or almost none."""
    exact = discordance.share_interval(found, _of_lesions(setting))
    if not exact or not math.isfinite(one.low):
        return one
    return Interval(one.value, min(one.low, exact[0]), max(one.high, exact[1]))


# --- differences


class _Compared(NamedTuple):
    """A setting with its draws."""

    setting: Setting
    drawn: _Drawn


def _weights(setting: Setting, mode: froc.Mode) -> dict[str, NDArray[np.float64]]:
    """Return how far each lesion is found, from 0 to 1, by FROC metric; lesions in the order of the slides' names."""
    stem = "froc." if mode == "official" else "froc.strict_"
    other: froc.Mode = "strict" if mode == "official" else "official"
    ordered = _by_name(setting)
    at_rates, others = (
        np.concatenate([np.empty((0, len(froc.RATES))), *froc.lesion_weights(ordered, mode=one)])[_counts(setting)]
        for one in (mode, other)
    )
    scores = {mode: at_rates.mean(axis=1), other: others.mean(axis=1)}
    return {
        "froc.score": scores["official"],
        "froc.strict_score": scores["strict"],
        **{f"{stem}sensitivity_at_{rate:g}": at_rates[:, k] for k, rate in enumerate(froc.RATES)},
    }


def _by_name(setting: Setting) -> list[froc.Matches]:
    return sorted(setting.matches, key=lambda one: one.slide_id.casefold())


def _of_lesions(setting: Setting) -> NDArray[np.int64]:
    """Return the patient, or the slide, of each lesion in the order of `_weights`."""
    cluster = dict(zip(_cases(setting), _clusters(setting), strict=True))
    ordered = _by_name(setting)
    return np.repeat([cluster[one.slide_id.casefold()] for one in ordered], [one.n_lesions for one in ordered])


def _counts(setting: Setting) -> NDArray[np.bool_]:
    """Return which regions are lesions that count, and not isolated tumour cells; regions in the order of the names."""
    counts = [~np.isin(np.arange(len(one.best)), one.itc) for one in _by_name(setting)]
    return np.concatenate([np.empty(0, np.bool_), *counts])


def _n_lesions(setting: Setting) -> int:
    return sum(one.n_lesions for one in setting.matches)


def _evidence(base: _Compared, other: _Compared, mode: froc.Mode, draw: "_Exchange") -> dict[str, Evidence]:
    """Return what the differences of a setting from the reference rest on, by metric."""
    p = _exchange_p(base.setting, other.setting, mode, draw) if draw.n else {}
    units = _discordances(base.setting, other.setting, mode)
    evidence = {}
    for metric, values in other.drawn.metrics.items():
        drawn = np.round(values - base.drawn.metrics[metric], _DIGITS)
        known = not np.isnan(drawn[1:]).all()
        evidence[metric] = Evidence(drawn, p.get(metric, math.nan) if known else math.nan, units.get(metric))
    return evidence


def _discordances(base: Setting, other: Setting, mode: froc.Mode) -> dict[str, discordance.Discordance]:
    """Return what was gained and lost by metric; of the AUC only where it hangs on few slides."""
    ours, theirs = _weights(base, mode), _weights(other, mode)
    whose = _of_lesions(base)
    changes = {metric: theirs[metric] - ours[metric] for metric in ours} if len(whose) else {}
    found = {metric: discordance.discordance(one, whose) for metric, one in changes.items()}
    area = _discordant_placements(base, other)
    return found | ({"roc.auc": area} if area else {})


def _discordant_placements(base: Setting, other: Setting) -> discordance.Discordance | None:
    """Return what was gained and lost of the slides of the smaller class; None where many slides of both change."""
    labels = _labels(base)
    truth = np.array(list(labels.values()))
    if len(set(truth.tolist())) < 2:
        return None
    ours, theirs = (roc.placements([_scores(one)[slide] for slide in labels], truth) for one in (base, other))
    cluster = dict(zip(_cases(base), _clusters(base), strict=True))
    whose, changes = np.array([cluster[slide] for slide in labels]), np.round(theirs - ours, _DIGITS)
    few = [len(np.unique(whose[(truth == kind) & (changes != 0)])) < _FEW for kind in (0, 1)]
    if not any(few):
        return None
    of_class = [discordance.discordance(changes[truth == kind], whose[truth == kind]) for kind in (0, 1)]
    return min(of_class, key=lambda one: one.n)


class _Exchange(NamedTuple):
    """How exchanges are drawn: ten for each resample, and at most `discordance.MOST`."""

    n: int
    seed: int

    def swapped(self, differs: NDArray[np.bool_], cluster: NDArray[np.int64]) -> NDArray[np.bool_]:
        most = min(_EXCHANGES_EACH * self.n, discordance.MOST)
        return discordance.exchanges(differs, cluster, seed=self.seed, most=most).swapped


def _exchange_p(base: Setting, other: Setting, mode: froc.Mode, draw: _Exchange) -> dict[str, float]:
    """Return p-values by exchange of the results of the cases.

    All FROC metrics are compared by strict curves: the official ones differ in the lowest threshold alone.
    """
    stem = "froc." if mode == "official" else "froc.strict_"
    cluster = dict(zip(_cases(base), _clusters(base), strict=True))
    ours, theirs = _by_name(base), _by_name(other)
    differs = np.array([not _alike(one, its) for one, its in zip(ours, theirs, strict=True)], np.bool_)
    whose = np.array([cluster[one.slide_id.casefold()] for one in ours], np.int64)
    swapped = draw.swapped(differs, whose)
    change = froc.exchange(theirs, ours, swapped) - froc.exchange(ours, theirs, swapped)
    score = discordance.exchange_p(change.mean(axis=1))
    return {
        "froc.score": score,
        "froc.strict_score": score,
        **{
            f"{stem}sensitivity_at_{rate:g}": discordance.exchange_p(one)
            for rate, one in zip(froc.RATES, change.T, strict=True)
        },
        "roc.auc": _exchange_p_of_area(base, other, cluster, draw),
    }


def _exchange_p_of_area(base: Setting, other: Setting, cluster: Mapping[str, int], draw: _Exchange) -> float:
    labels, theirs = _labels(base), _scores(other)
    ours = _scores(base)
    whose = np.array([cluster[slide] for slide in labels], np.int64)
    differs = np.array([ours[slide] != theirs[slide] for slide in labels], np.bool_)
    swapped = draw.swapped(differs, whose)
    both = [one[slide] for one in (theirs, ours) for slide in labels]
    truth = [*labels.values()] * 2
    taken = np.concatenate([~swapped, swapped], axis=1).astype(np.int64)
    return discordance.exchange_p(roc.resample(both, truth, taken) - roc.resample(both, truth, 1 - taken))


def _alike(one: froc.Matches, other: froc.Matches) -> bool:
    """Tell whether a slide has the same hits and false positives in two settings."""
    return np.array_equal(one.best, other.best) and np.array_equal(
        np.sort(one.false_positives), np.sort(other.false_positives)
    )


def _differences(
    evidence: Mapping[str, Mapping[str, Evidence]], family: Mapping[str, str]
) -> dict[str, dict[str, Difference]]:
    """Return the differences of the settings from the reference; corrected within each metric and family."""
    differences: dict[str, dict[str, Difference]] = {name: {} for name in evidence}
    sizes = Counter(family.values())
    for metric in next(iter(evidence.values()), {}):
        own = {name: metrics[metric] for name, metrics in evidence.items()}
        corrected = within_families({name: one.p for name, one in own.items()}, family)
        for name, one in own.items():
            differences[name][metric] = Difference(
                float(one.drawn[0]),
                *_difference_interval(one, one.p, 0.95),
                one.p,
                corrected[name],
                *_difference_interval(one, corrected[name], 1 - 0.05 / sizes[family[name]]),
            )
    return differences


def _difference_interval(one: Evidence, p: float, level: float) -> tuple[float, float]:
    """Return the interval of the draws, extended to that of the score test, and to 0 where p does not exclude it."""
    low, high = interval(one.drawn[1:], level).tolist()
    if math.isnan(low):
        return low, high
    if one.units is not None:
        least, most = discordance.score_interval(one.units, level)
        low, high = min(low, least), max(high, most)
    return (min(low, 0.0), max(high, 0.0)) if p >= _ALPHA else (low, high)
