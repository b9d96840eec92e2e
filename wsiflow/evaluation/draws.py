"""Draw the cases of a setting, and make intervals of what a metric is in every draw.

Input: a setting. Output: how often each case is in every draw, and intervals of percentiles, extended to exact ones
where almost all lesions are found, or almost none.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.evaluation import discordance, froc
from wsiflow.evaluation.resampling import case_draws, interval, left_out
from wsiflow.evaluation.setting import (
    Setting,
    case_names,
    clusters_of,
    matches_by_name,
    patients_of_lesions,
    regions_that_count,
)

LEAST_CASES = 2  # fewer cases do not show how much a metric varies from case to case


class Interval(NamedTuple):
    """A metric of the sample and its 95 % interval; NaN where they are not defined."""

    value: float
    low: float
    high: float


class Times(NamedTuple):
    """How often each case is in the sample (row 0) and in every draw, and in every jackknife sample; by case."""

    drawn: dict[str, NDArray[np.int64]]
    left_out: dict[str, NDArray[np.int64]]


def draw_cases(setting: Setting, n: int, seed: int) -> Times:
    """Draw the cases of a setting, ``n`` times with replacement, and leave each of them out once."""
    cases, clusters = case_names(setting), clusters_of(setting)
    times = case_draws(len(cases), n=n, seed=seed, clusters=clusters)
    whole = np.concatenate([np.ones((1, len(cases)), np.int64), times])
    without = left_out(len(cases), clusters=clusters)
    return Times(dict(zip(cases, whole.T, strict=True)), dict(zip(cases, without.T, strict=True)))


def times_of(times: Mapping[str, NDArray[np.int64]], slides: Sequence[str]) -> NDArray[np.int64]:
    """Return int64 (rows, slides), how often each of some slides is in each sample."""
    n_rows = len(next(iter(times.values()))) if times else 1
    columns = np.empty((n_rows, len(slides)), np.int64)
    for column, slide in enumerate(slides):
        columns[:, column] = times[slide.casefold()]
    return columns


def interval_of_classes(values: NDArray[np.float64], classes: Sequence[set[int]]) -> Interval:
    """Return a value with its interval of percentiles; without one where it rests on a single case."""
    if min(map(len, classes)) < LEAST_CASES:
        return Interval(float(values[0]), math.nan, math.nan)
    return Interval(float(values[0]), *interval(values[1:]).tolist())


def extended(one: Interval, found: NDArray[np.float64], setting: Setting) -> Interval:
    """Return an interval, extended to the exact one where almost all lesions are found or almost none."""
    exact = discordance.share_interval(found, patients_of_lesions(setting))
    if not exact or not math.isfinite(one.low):
        return one
    return Interval(one.value, min(one.low, exact[0]), max(one.high, exact[1]))


def lesion_weights(setting: Setting, mode: froc.Mode) -> dict[str, NDArray[np.float64]]:
    """Return how far each lesion is found, from 0 to 1, by FROC metric; lesions in the order of the slides' names."""
    stem = "froc." if mode == "official" else "froc.strict_"
    other: froc.Mode = "strict" if mode == "official" else "official"
    ordered = matches_by_name(setting)
    counts = regions_that_count(setting)
    at_rates, others = (
        np.concatenate([np.empty((0, len(froc.RATES))), *froc.lesion_weights(ordered, mode=one)])[counts]
        for one in (mode, other)
    )
    scores = {mode: at_rates.mean(axis=1), other: others.mean(axis=1)}
    return {
        "froc.score": scores["official"],
        "froc.strict_score": scores["strict"],
        **{f"{stem}sensitivity_at_{rate:g}": at_rates[:, k] for k, rate in enumerate(froc.RATES)},
    }
