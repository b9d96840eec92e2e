"""The Pareto front of cost and score, and how often a setting is on it where the cases are drawn anew.

Input: arrays of costs and scores. Output: which settings no other one beats.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsiflow.errors import InputError


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
