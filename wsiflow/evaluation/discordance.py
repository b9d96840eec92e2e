"""Test and bound paired differences where few cases differ, and shares where few cases are missed or found.

Input: what changes from a reference to a setting, by lesion or slide, and which of these belong together. Output:
p-values by exchange of the two settings, and score intervals.

A percentile bootstrap says too little here: where no case differs all draws are equal and its interval has no width,
and of a handful of cases that differ it counts too many draws on one side. Two things stand in for it.

**Exchange.** If two settings are equally good, it is as likely that each case had the results of the one as those of
the other. All exchanges of the cases that differ are counted where there are at most `MOST`, else as many are
drawn, and the observed assignment counts as one of them (Phipson and Smyth 2010). Slides of a patient are exchanged
together.

**Score intervals.** Of n paired units some are gained and some are lost. The interval has the differences that a score
test does not refuse (Tango 1998, Statistics in Medicine 17:891): its variance is that under the difference in question,
so that it has a width even where nothing was gained or lost, close to the rule of three. Units of one slide or patient
depend on each other: all counts are divided by a design effect (Rao and Scott 1992, Biometrics 48:577), the ratio of
the sums of squares of cases and of units. One unit that depends on its case entirely is added to both sums: with no
unit gained or lost the effect is the largest that is possible, as if whole cases changed.
"""

import math
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray

MOST = 20_000
"""Largest number of exchanges that are all counted; of more, as many are drawn."""

_ROUNDING = 1e-9
_NO_VARIANCE = 1e-12
_FEW = 5  # units missed or found, below which draws say too little about a share


class Discordance(NamedTuple):
    """What was gained and lost of paired units, in independent units: counts divided by the design effect.

    Attributes:
        gained: Units that the setting has and the reference has not; parts of units count in part.
        lost: Units that the reference has and the setting has not.
        n: All units.
    """

    gained: float
    lost: float
    n: float


class Exchanges(NamedTuple):
    """Assignments of the results of two settings.

    Attributes:
        swapped: bool (k, cases), whether each case has the results of the other setting. The observed assignment, in
            which none has, comes first.
        exact: Whether these are all assignments, but for those that mirror another one.
    """

    swapped: NDArray[np.bool_]
    exact: bool


def exchanges(differs: NDArray[np.bool_], cluster: NDArray[np.int64], *, seed: int, most: int = MOST) -> Exchanges:
    """Return assignments of the results of two settings to the cases.

    Args:
        differs: bool (cases,), cases whose results are not the same in both settings.
        cluster: int64 (cases,), cases of one cluster are exchanged together.
        seed: Seed of the draws.
        most: Largest number of assignments that are all counted; of more, as many are drawn.
    """
    units = np.unique(cluster[differs])
    exact = len(units) - 1 <= math.log2(most)
    if exact:  # the first unit stays: to exchange everything only turns the sign of the difference
        numbers = np.arange(2 ** max(len(units) - 1, 0))
        flips = (numbers[:, None] >> np.arange(len(units) - 1, -1, -1)) % 2 > 0
    else:
        flips = np.random.default_rng(seed).random((most + 1, len(units))) < 0.5
        flips[0] = False
    swapped = np.zeros((len(flips), len(cluster)), np.bool_)
    if len(units):
        place = np.searchsorted(units, cluster).clip(0, len(units) - 1)
        belongs = units[place] == cluster
        swapped[:, belongs] = flips[:, place[belongs]]
    return Exchanges(swapped, exact)


def exchange_p(differences: NDArray[np.float64]) -> float:
    """Return the two-sided p-value of a difference, from those of all `exchanges`, the observed one first.

    It is the share of assignments whose difference is at least as large, in absolute value; NaN where the observed
    difference is.
    """
    if not differences.size or math.isnan(differences[0]):
        return math.nan
    return float((np.abs(differences) >= abs(differences[0]) - _ROUNDING).mean())


def discordance(changes: NDArray[np.float64], cluster: NDArray[np.int64]) -> Discordance:
    """Return what was gained and lost, in independent units.

    Args:
        changes: float64 (u,), what each unit changes from the reference to the setting, from -1 (lost) to 1 (gained).
        cluster: int64 (u,), case or patient of each unit.
    """
    n_units = len(changes)
    gained, lost = float(changes.clip(min=0).sum()), float(-changes.clip(max=0).sum())
    effect = design_effect(changes, cluster)
    return Discordance(gained / effect, lost / effect, n_units / effect)


def design_effect(values: NDArray[np.float64], cluster: NDArray[np.int64]) -> float:
    """Return how many times the variance of a mean of units is that of as many independent units; at least 1."""
    if not len(values):
        return 1.0
    group = np.unique(cluster, return_inverse=True)[1]
    sizes = np.bincount(group)
    centred = values - values.mean()
    of_cases, of_units = float((np.bincount(group, centred) ** 2).sum()), float((centred**2).sum())
    largest = float((sizes**2).sum() / sizes.sum())
    return max(1.0, (of_cases + largest) / (of_units + 1))


def score_z(found: Discordance, difference: float) -> float:
    """Return Tango's test statistic of the hypothesis that the true difference is ``difference``."""
    gained, lost, n = found
    a = 2 * n
    b = -gained - lost + (2 * n - gained + lost) * difference
    c = -lost * difference * (1 - difference)
    share_lost = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = n * (2 * share_lost + difference * (1 - difference))
    distance = gained - lost - n * difference
    return distance / math.sqrt(variance) if variance > _NO_VARIANCE else math.copysign(math.inf, distance)


def score_interval(found: Discordance, level: float = 0.95) -> tuple[float, float]:
    """Return Tango's score interval of a paired difference of shares; NaN without units."""
    if not found.n > 0:
        return math.nan, math.nan
    z = -float(scipy.special.ndtri((1 - level) / 2))
    value = (found.gained - found.lost) / found.n

    def end(sign: int) -> float:
        inner, outer = value + sign * _ROUNDING, sign * (1 - _ROUNDING)
        if abs(inner) >= abs(outer) and value * sign > 0:
            return float(sign)
        return float(scipy.optimize.brentq(lambda at: abs(score_z(found, at)) - z, inner, outer))

    return end(-1), end(1)


def share_interval(shares: NDArray[np.float64], cluster: NDArray[np.int64]) -> tuple[float, float] | None:
    """Return the exact 95 % interval of a share of units in independent units; None where draws say enough.

    It is Clopper and Pearson's (1934) of as many units as are independent (Korn and Graubard 1998, Survey Methodology
    24:193). Draws say enough where at least five units were found, and five were missed.

    Args:
        shares: float64 (u,), how far each unit is found, from 0 to 1.
        cluster: int64 (u,), case or patient of each unit.
    """
    effect = design_effect(shares, cluster)
    n, hits = len(shares) / effect, float(shares.sum()) / effect
    if not len(shares) or min(hits, n - hits) >= _FEW:
        return None
    low = float(scipy.special.betaincinv(hits, n - hits + 1, 0.025)) if hits > _ROUNDING else 0.0
    high = float(scipy.special.betaincinv(hits + 1, n - hits, 0.975)) if n - hits > _ROUNDING else 1.0
    return low, high
