"""Compare settings that were scored on the same cases: bootstrap intervals and paired differences.

Input: per setting the matches, scores and labels of its slides. Output: an interval for every metric, paired
differences from one reference with p-values, and bands of the FROC curves.

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
from numpy.typing import NDArray

from wsiflow.errors import InputError
from wsiflow.evaluation import discordance, froc, roc
from wsiflow.evaluation.draws import LEAST_CASES, Interval, Times, draw_cases, extended, lesion_weights, times_of
from wsiflow.evaluation.resampling import corrected_interval, holm, interval
from wsiflow.evaluation.setting import (
    Setting,
    case_names,
    clusters_of,
    comparability_problems,
    labels_of,
    matches_by_name,
    patients,
    patients_of_classes,
    patients_of_lesions,
    patients_with_lesions,
    scores_of,
)

FP_GRID = np.linspace(0, 8, 129)
"""False positives per slide at which bands are computed; the six rates of the score are among them."""
_ALPHA = 0.05
_EXCHANGES_EACH = 10
_FEW = 5  # slides that change their place, below which draws say too little about the AUC
_DIGITS = 12  # equal metrics that were summed in another order differ after these


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
    times = draw_cases(settings[0], n, seed)
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


def _delong(
    settings: Mapping[str, Setting], reference: str, family: Mapping[str, str]
) -> dict[str, tuple[float, float]]:
    """Return DeLong's p-values of the AUCs against the reference's, uncorrected and corrected by Holm's method."""
    labels = labels_of(settings[reference])
    scores = {name: scores_of(one) for name, one in settings.items()}
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


def _drawn(setting: Setting, times: Times, mode: froc.Mode) -> _Drawn:
    """Compute every metric of a setting in the sample and in every draw."""
    of_froc = times_of(times.drawn, [one.slide_id for one in setting.matches])
    curve = froc.resample(setting.matches, of_froc, mode=mode, rates=FP_GRID)
    at_rates = curve[:, np.searchsorted(FP_GRID, froc.RATES)]
    other: froc.Mode = "strict" if mode == "official" else "official"
    scores = {
        mode: at_rates.mean(axis=1),
        other: froc.resample(setting.matches, of_froc, mode=other).mean(axis=1),
    }
    stem = "froc." if mode == "official" else "froc.strict_"
    area, without = (roc.resample(setting.scores, setting.labels, times_of(one, setting.slide_ids)) for one in times)
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
    of_class, with_lesions = patients_of_classes(setting), patients_with_lesions(setting)
    for metric, values in drawn.metrics.items():
        if min(map(len, of_class if metric == "roc.auc" else [with_lesions])) < LEAST_CASES:
            values[1:] = np.nan
    if len(with_lesions) < LEAST_CASES:
        drawn.curve[1:] = np.nan
    return drawn


def _intervals(drawn: _Drawn, setting: Setting, mode: froc.Mode) -> dict[str, Interval]:
    """Return the 95 % intervals of all metrics: DeLong's and BCa for the AUC, percentiles for the others.

    Where almost all lesions are found, or almost none, an interval of percentiles is extended to the exact one.
    """
    intervals = {metric: Interval(float(x[0]), *interval(x[1:]).tolist()) for metric, x in drawn.metrics.items()}
    intervals |= {
        metric: extended(intervals[metric], found, setting) for metric, found in lesion_weights(setting, mode).items()
    }
    area = drawn.metrics["roc.auc"]
    corrected = corrected_interval(float(area[0]), area[1:], drawn.jackknife)
    delong = roc.auc_interval(setting.scores, setting.labels, patients(setting))
    return intervals | {
        "roc.auc": Interval(float(area[0]), *delong),
        "roc.auc_bootstrap": Interval(float(area[0]), *corrected.tolist()),
    }


class _Compared(NamedTuple):
    """A setting with its draws."""

    setting: Setting
    drawn: _Drawn


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
    ours, theirs = lesion_weights(base, mode), lesion_weights(other, mode)
    whose = patients_of_lesions(base)
    changes = {metric: theirs[metric] - ours[metric] for metric in ours} if len(whose) else {}
    found = {metric: discordance.discordance(one, whose) for metric, one in changes.items()}
    area = _discordant_placements(base, other)
    return found | ({"roc.auc": area} if area else {})


def _discordant_placements(base: Setting, other: Setting) -> discordance.Discordance | None:
    """Return what was gained and lost of the slides of the smaller class; None where many slides of both change."""
    labels = labels_of(base)
    truth = np.array(list(labels.values()))
    if len(set(truth.tolist())) < 2:
        return None
    ours, theirs = (roc.placements([scores_of(one)[slide] for slide in labels], truth) for one in (base, other))
    cluster = dict(zip(case_names(base), clusters_of(base), strict=True))
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
    cluster = dict(zip(case_names(base), clusters_of(base), strict=True))
    ours, theirs = matches_by_name(base), matches_by_name(other)
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
    labels, theirs = labels_of(base), scores_of(other)
    ours = scores_of(base)
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
