"""Decide whether a setting is worse than the reference by more than a margin, and how many slides that takes.

Input: what differences rest on (`paired.Evidence`), and a margin. Output: verdicts, bounds, p-values, power and numbers
of slides.

A difference is not worse than the margin where its one-sided 97.5 % bound, the low end of its 95 % interval, lies above
minus the margin. The draws and the score test have to agree on that: of few slides that differ the draws say too
little (see `discordance`).
"""

import math
from typing import NamedTuple

import numpy as np
import scipy

from wsiflow.evaluation import discordance
from wsiflow.evaluation.paired import Evidence
from wsiflow.evaluation.resampling import one_sided_p

ALPHA = 0.025
"""Level of each side."""

POWER = 0.8
"""Share of repeated studies in which the number of slides that is named shows what is to be shown."""


class Noninferiority(NamedTuple):
    """p-values of a margin.

    Attributes:
        p: Of the hypothesis that the setting is worse by at least the margin.
        p_worse: Of the hypothesis that it is worse by at most the margin.
        p_better: Of the hypothesis that it is better by at least the margin; with ``p`` it shows equivalence.
    """

    p: float
    p_worse: float
    p_better: float


class Power(NamedTuple):
    """What a pilot says of a larger study.

    Attributes:
        now: Power to show the observed difference with the slides of the pilot, two-sided at 5 %.
        now_corrected: The same at 5 % divided by the number of comparisons.
        slides: Slides that show the observed difference with a power of 80 %; infinite where there is none.
        slides_corrected: The same at 5 % divided by the number of comparisons.
        slides_if_equal: Slides that show the margin with a power of 80 % if the true difference is 0.
        slides_if_observed: The same if the true difference is the observed one; infinite where that exceeds the margin.
    """

    now: float
    now_corrected: float
    slides: float
    slides_corrected: float
    slides_if_equal: float
    slides_if_observed: float


def noninferiority(evidence: Evidence, margin: float) -> Noninferiority:
    """Test a difference against a margin; NaN where there are no draws."""
    return Noninferiority(
        _above(evidence, -margin), _above(_mirrored(evidence), margin), _above(_mirrored(evidence), -margin)
    )


def slides_for_margin(evidence: Evidence, margin: float, n_slides: int, difference: float = 0.0) -> float:
    """Return the number of slides that show with a power of 80 % that a setting is not worse than the margin.

    The variance of a unit is that of the sample, and under the hypothesis at least that of a loss of the margin, as in
    the score test.

    Args:
        evidence: The difference in a sample.
        margin: Largest loss that is accepted.
        n_slides: Slides of the sample.
        difference: True difference that is assumed.
    """
    distance = margin + difference
    if distance <= 0 or evidence.drawn.size < 2:
        return math.inf
    units = evidence.units.n if evidence.units is not None else float(n_slides)
    variance = _variance(evidence) * units
    refused = max(variance, margin) - margin**2
    needed = ((_z(ALPHA) * math.sqrt(refused) + _z(1 - POWER) * math.sqrt(variance)) / distance) ** 2
    return needed / units * n_slides


def power(evidence: Evidence, margin: float, n_slides: int, n_comparisons: int) -> Power:
    """Return what a pilot says of the number of slides; see `Power`."""
    value, error = float(evidence.drawn[0]), math.sqrt(_variance(evidence))
    limits = [_z(ALPHA), _z(ALPHA / max(n_comparisons, 1))]
    now = [float(scipy.special.ndtr(abs(value) / error - z)) for z in limits] if error > 0 else [math.nan, math.nan]
    slides = [
        n_slides * ((z + _z(1 - POWER)) * error / abs(value)) ** 2 if value and error > 0 else math.inf for z in limits
    ]
    return Power(
        now=now[0],
        now_corrected=now[1],
        slides=slides[0],
        slides_corrected=slides[1],
        slides_if_equal=slides_for_margin(evidence, margin, n_slides),
        slides_if_observed=slides_for_margin(evidence, margin, n_slides, min(value, 0.0)),
    )


def _above(evidence: Evidence, bound: float) -> float:
    """Return the p-value of the hypothesis that a difference is at most ``bound``: the larger one of both tests."""
    p = one_sided_p(evidence.drawn[1:], bound)
    if evidence.units is None or math.isnan(p):
        return p
    return max(p, float(scipy.special.ndtr(-discordance.score_z(evidence.units, bound))))


def _mirrored(evidence: Evidence) -> Evidence:
    """Return the evidence for the difference reference minus setting."""
    units = evidence.units
    turned = units and discordance.Discordance(units.lost, units.gained, units.n)
    return evidence._replace(drawn=-evidence.drawn, units=turned)


def _variance(evidence: Evidence) -> float:
    """Return the variance of a difference: that of the draws, or of the units that differ where that is larger."""
    drawn = evidence.drawn[1:]
    of_draws = float(drawn[~np.isnan(drawn)].var()) if not np.isnan(drawn).all() else 0.0
    units = evidence.units
    if units is None or not units.n > 0:
        return of_draws
    share, value = (units.gained + units.lost) / units.n, (units.gained - units.lost) / units.n
    return max(of_draws, (share - value**2) / units.n)


def _z(tail: float) -> float:
    return -float(scipy.special.ndtri(tail))
