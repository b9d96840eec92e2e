"""Simulate what intervals, tests and margins are worth: how often they hold the truth, and how often they err.

Every set is drawn with a known truth. ``alone`` is what resamples, or the formula for independent slides, give by
themselves; ``now`` is what `wsiflow.evaluation.paired` makes of it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from benchmarks.measuring import ResultTable, arguments, finish, machine, say
from wsiflow.evaluation import discordance, froc, resampling, roc
from wsiflow.evaluation.froc import Matches
from wsiflow.evaluation.paired import bootstrap
from wsiflow.evaluation.setting import Setting

MARGIN = 0.02
METRICS = ("froc.score", "froc.sensitivity_at_0.25", "froc.sensitivity_at_1", "froc.sensitivity_at_8", "roc.auc")
SHIFTS, EQUAL = (1.5, 1.8), (1.7, 1.7)
"""Quality of the two settings of a comparison, where they differ and where they do not."""

_MORE_LESIONS = 1.25  # beside the first one of a slide, in the mean
_DRAWS, _WHOLE_DRAWS, _SLIDES = 600, 400, 120
_PATIENTS, _EACH, _CORRELATION = 25, 5, 0.6


class Sizes(NamedTuple):
    """Numbers of simulated sets: of tests, of intervals, of areas, of whole comparisons; and slides of the truth."""

    tests: int = 4000
    intervals: int = 1500
    areas: int = 2000
    comparisons: int = 300
    slides: int = 20_000


QUICK = Sizes(40, 20, 20, 2, 500)


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate all, and write ``intervals.json``."""
    given = arguments(__doc__ or "").parse_args(argv)
    about, sizes = machine(), QUICK if given.quick else Sizes()
    values: dict[str, Any] = {"sizes": sizes._asdict()}
    for name, simulation in {
        "errors": errors,
        "margins": margins,
        "shares": shares,
        "areas": areas,
        "comparisons": comparisons,
    }.items():
        say(f"{name} begins")
        values[name] = simulation(sizes)
    finish(given, "intervals", about, values, _tables(values, sizes))


# --- what is simulated


def lesion_changes(
    rng: np.random.Generator, n_slides: int, *, whole: bool, p_lost: float, p_gained: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the slide of each lesion and its change: lesions by themselves, or all of a slide together."""
    whose = np.repeat(np.arange(n_slides), 1 + rng.poisson(_MORE_LESIONS, n_slides))
    u = rng.random(n_slides)[whose] if whole else rng.random(len(whose))
    return whose, np.where(u < p_lost, -1.0, np.where(u < p_lost + p_gained, 1.0, 0.0))


def detected(
    rng: np.random.Generator, n_slides: int, shift: Sequence[float], share: float = 0.5
) -> tuple[NDArray[np.int64], list[list[Matches]], list[NDArray[np.float64]]]:
    """Return the labels and, per classifier, the matches and slide scores of slides as a detector would see them.

    Confidences of lesions and false positives are logistic normals with an effect of the slide, a part common to all
    classifiers and one of their own; what is below 1/2 is not detected. 40 % of the slides hold one lesion or more, and
    false positives come in very uneven numbers, 8 per slide on average.
    """
    labels = (rng.random(n_slides) < 0.4).astype(np.int64)
    found: list[list[Matches]] = [[] for _ in shift]
    for i, label in enumerate(labels):
        n_lesions, n_false = (1 + rng.poisson(2) if label else 0), rng.poisson(rng.gamma(1.5, 16 / 1.5))
        slide, lesions, false = rng.normal(), rng.normal(size=n_lesions), rng.normal(size=n_false)
        for k, mu in enumerate(shift):
            own = math.sqrt(share) * lesions + math.sqrt(1 - share) * rng.normal(size=n_lesions)
            other = math.sqrt(share) * false + math.sqrt(1 - share) * rng.normal(size=n_false)
            z, f = mu + 0.7 * slide + own, 0.3 * slide + other
            best = np.where(z > 0, 1 / (1 + np.exp(-z)), -np.inf)
            found[k].append(Matches(f"s{i}", best, 0, 1 / (1 + np.exp(-f[f > 0]))))
    common = rng.normal(size=n_slides)
    scores = [apart(mu) * labels + math.sqrt(0.6) * common + math.sqrt(0.4) * rng.normal(size=n_slides) for mu in shift]
    return labels, found, scores


def apart(shift: float) -> float:
    """Return the distance of the slide scores of both classes in standard deviations."""
    return 0.8 * shift


def two(rng: np.random.Generator, n_slides: int, shift: Sequence[float]) -> list[Setting]:
    """Return two settings over the same simulated slides."""
    labels, found, scores = detected(rng, n_slides, shift)
    ids = tuple(f"s{i}" for i in range(n_slides))
    return [Setting(name, m, ids, s, labels) for name, m, s in zip("ab", found, scores, strict=True)]


def true_values(n_slides: int, shift: Sequence[float] = SHIFTS) -> list[dict[str, float]]:
    """Return the metrics of settings over very many slides."""
    _, found, _ = detected(np.random.default_rng(99), n_slides, shift)
    area = [(1 + math.erf(apart(mu) / 2)) / 2 for mu in shift]  # of normals one standard deviation wide
    return [froc.score(m, mode="official") | {"roc.auc": one} for m, one in zip(found, area, strict=True)]


# --- how often they hold and err


def errors(sizes: Sizes) -> dict[str, dict[str, list[float]]]:
    """Return how often equal settings differ at 0.05 and at 0.005: 20 tumour slides, 30 % of the lesions discordant."""
    results = {}
    draws = resampling.case_draws(20, n=_DRAWS, seed=1)
    for name, whole in _KINDS.items():
        alone, now = [], []
        for seed in range(sizes.tests):
            rng = np.random.default_rng([seed, 7])
            whose, changes = lesion_changes(rng, 20, whole=whole, p_lost=0.15, p_gained=0.15)
            of_slide = np.bincount(whose, changes, 20)
            drawn = draws @ of_slide / (draws @ np.bincount(whose, minlength=20))
            alone.append(2 * min(resampling.one_sided_p(drawn, 0.0), resampling.one_sided_p(-drawn, 0.0)))
            swapped = discordance.exchanges(of_slide != 0, np.arange(20), seed=seed, most=4096).swapped
            now.append(discordance.exchange_p((1 - 2.0 * swapped) @ of_slide))
        results[name] = {"alone": _below(alone), "now": _below(now)}
    return results


def margins(sizes: Sizes) -> dict[str, dict[str, dict[str, float]]]:
    """Return how often a true loss of the margin is called none, by number of slides, half of which have tumour."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, whole in _KINDS.items():
        for n in (20, 64, 200):
            draws, alone, now = resampling.case_draws(n, n=_DRAWS, seed=1), 0, 0
            for seed in range(sizes.intervals):
                rng = np.random.default_rng([seed, n, 3])
                whose, changes = lesion_changes(rng, n, whole=whole, p_lost=MARGIN, p_gained=0.0)
                drawn = draws @ np.bincount(whose, changes, n) / (draws @ np.bincount(whose, minlength=n))
                low = float(resampling.interval(drawn)[0])
                least = discordance.score_interval(discordance.discordance(changes, whose))[0]
                alone, now = alone + (low > -MARGIN), now + (min(low, least) > -MARGIN)
            results.setdefault(str(2 * n), {})[name] = {
                "alone": alone / sizes.intervals,
                "now": now / sizes.intervals,
            }
    return results


def shares(sizes: Sizes) -> list[dict[str, float]]:
    """Return how often the interval of a sensitivity holds it."""
    results = []
    for share, n in ((0.98, 40), (0.995, 40), (0.9, 128)):
        draws, alone, now = resampling.case_draws(n, n=_DRAWS, seed=1), 0, 0
        for seed in range(sizes.intervals):
            rng = np.random.default_rng([seed, n, round(share * 1000)])
            whose, _ = lesion_changes(rng, n, whole=False, p_lost=0.0, p_gained=0.0)
            found = (rng.random(len(whose)) < share) * 1.0
            drawn = draws @ np.bincount(whose, found, n) / (draws @ np.bincount(whose, minlength=n))
            low, high = resampling.interval(drawn).tolist()
            alone += low <= share <= high
            exact = discordance.share_interval(found, whose) or (low, high)
            now += min(low, exact[0]) <= share <= max(high, exact[1])
        results.append({"share": share, "slides": n, "alone": alone / sizes.intervals, "now": now / sizes.intervals})
    return results


def areas(sizes: Sizes) -> list[dict[str, float]]:
    """Return how often the interval of an AUC holds it where each patient has several slides that resemble each other.

    ``alone`` takes slides as independent. Sets in which a class has fewer than two patients are drawn again.
    """
    rng, results = np.random.default_rng(1), []
    whose = np.repeat(np.arange(_PATIENTS), _EACH)
    for area in (0.75, 0.9, 0.97):
        mu, alone, now = math.sqrt(2) * float(special.ndtri(area)), 0, 0
        for _ in range(sizes.areas):
            sick = np.zeros(_PATIENTS, np.int64)
            while not 2 <= sick.sum() <= _PATIENTS - 2:
                sick = (rng.random(_PATIENTS) < 0.5).astype(np.int64)
            labels = sick[whose]
            own = math.sqrt(1 - _CORRELATION) * rng.normal(size=len(whose))
            scores = mu * labels + math.sqrt(_CORRELATION) * rng.normal(size=_PATIENTS)[whose] + own
            low, high = roc.auc_interval(scores, labels)
            alone += low <= area <= high
            low, high = roc.auc_interval(scores, labels, whose)
            now += low <= area <= high
        results.append({"area": area, "alone": alone / sizes.areas, "now": now / sizes.areas})
    return results


def comparisons(sizes: Sizes) -> dict[str, dict[str, float]]:
    """Return for whole comparisons, by metric, how often intervals hold the truth and equal settings differ at 0.05."""
    truth = true_values(sizes.slides)
    held: dict[str, list[tuple[bool, bool, bool]]] = {metric: [] for metric in METRICS}
    for k in range(sizes.comparisons):
        pairs = (
            two(np.random.default_rng([11, k]), _SLIDES, SHIFTS),
            two(np.random.default_rng([13, k]), _SLIDES, EQUAL),
        )
        different, alike = (bootstrap(pair, reference="a", n=_WHOLE_DRAWS, seed=k) for pair in pairs)
        for metric in METRICS:
            one, change = different.intervals["a"][metric], different.differences["b"][metric]
            held[metric].append(
                (
                    one.low <= truth[0][metric] <= one.high,
                    change.low <= truth[1][metric] - truth[0][metric] <= change.high,
                    alike.differences["b"][metric].p < 0.05,
                )
            )
    names = ("metric", "difference", "errs")
    return {metric: dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True)) for metric, rows in held.items()}


_KINDS = {"lesions": False, "whole slides": True}


def _below(p: Sequence[float]) -> list[float]:
    values = np.array(p)
    return [float((values < alpha).mean()) for alpha in (0.05, 0.005)]


# --- tables


def _tables(values: Mapping[str, Any], sizes: Sizes) -> list[ResultTable]:
    first = ResultTable(
        f"Errors and coverage in simulated sets: {sizes.tests:,} for p, {sizes.areas:,} for each AUC, "
        f"{sizes.intervals:,} for all others",
        ["", "nominal", "resamples alone", "now"],
        [*_error_rows(values), *_margin_rows(values), *_share_rows(values), *_area_rows(values)],
    )
    second = ResultTable(
        f"Whole comparisons of {_SLIDES} simulated slides, {sizes.comparisons:,} sets with {_WHOLE_DRAWS} resamples",
        ["metric", "interval holds the truth", "that of a difference does", "equal settings have p < 0.05"],
        [[metric, *(f"{value:.3f}" for value in one.values())] for metric, one in values["comparisons"].items()],
    )
    return [first, second]


def _error_rows(values: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            f"equal settings, 30 % of the lesions of 20 tumour slides discordant, {kind} change: p < {alpha}",
            f"{alpha}",
            f"{one['alone'][place]:.4f}",
            f"{one['now'][place]:.4f}",
        ]
        for kind, one in values["errors"].items()
        for place, alpha in enumerate((0.05, 0.005))
    ]


def _margin_rows(values: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            f"true loss {MARGIN}, margin {MARGIN}, {slides} slides, {kind} change: called not worse",
            "0.025",
            f"{one['alone']:.3f}",
            f"{one['now']:.3f}",
        ]
        for slides, kinds in values["margins"].items()
        for kind, one in kinds.items()
    ]


def _share_rows(values: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            f"interval of a sensitivity of {one['share']} holds it, {one['slides']:.0f} tumour slides",
            "0.95",
            f"{one['alone']:.3f}",
            f"{one['now']:.3f}",
        ]
        for one in values["shares"]
    ]


def _area_rows(values: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            f"interval of an AUC of {one['area']} holds it, {_PATIENTS} patients of {_EACH} slides, "
            f"correlation {_CORRELATION}",
            "0.95",
            f"{one['alone']:.3f}",
            f"{one['now']:.3f}",
        ]
        for one in values["areas"]
    ]


if __name__ == "__main__":
    main()
