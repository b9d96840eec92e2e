"""Permutation test: does a slide score detect one kind of tumour better than another?

Input: scores of slides with tumour of a first kind, of slides with tumour of a second kind, and of normal slides.
Output: the difference between the two AUCs, each kind against the same normal slides, and its p-value.

If the kind does not matter, every assignment of the two kinds to the tumour slides is as likely as the observed one.
The test is two-sided: it counts the assignments whose difference is at least as large, in absolute value, as the
observed one, ties included. Where there are few assignments all of them are counted, and p is exact. Otherwise n are
drawn, and p is (b + 1) / (n + 1) for b counted ones, because the observed assignment is one of those that are possible;
p is therefore never 0 (Phipson and Smyth 2010, doi 10.2202/1544-6115.1585).

An AUC is the mean, over tumour slides, of the share of normal slides that score lower, ties counting one half.
Differences are compared as integers, so that equal differences tie exactly.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import chain, combinations, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsiflow.errors import InputError

EXACT_UP_TO = 100_000
"""Largest number of assignments that are all counted; of more a sample is drawn."""

_CHUNK = 4096


class PermutationResult(NamedTuple):
    """The result of a permutation test.

    Attributes:
        value: AUC of the first kind minus AUC of the second kind.
        p: Two-sided p-value.
        labelings: Number of assignments of the kinds that were counted.
        exact: Whether these are all possible assignments.
    """

    value: float
    p: float
    labelings: int
    exact: bool


def permutation_test(
    first: ArrayLike, second: ArrayLike, normal: ArrayLike, *, n: int = 10_000, seed: int = 0
) -> PermutationResult:
    """Test whether the AUCs of two kinds of tumour, against the same normal slides, differ.

    Args:
        first: (k,), scores of slides of the first kind; higher means more likely tumour.
        second: (m,), scores of slides of the second kind.
        normal: (l,), scores of normal slides.
        n: Number of assignments to draw where there are more than `EXACT_UP_TO`.
        seed: Seed of the draws.

    Raises:
        InputError: A group is empty, a score is not finite, or ``n`` is below 1.
    """
    ones, others, normals = (_scores(name, values) for name, values in _named(first, second, normal))
    if n < 1:
        raise InputError(f"{n} assignments are to be drawn", "draw at least one", stage="permutation")
    wins = _twice_the_wins(np.concatenate([ones, others]), normals)
    k, total = len(ones), len(wins)
    observed = _distance(np.arange(k)[np.newaxis], wins)
    possible = math.comb(total, k)
    exact = possible <= EXACT_UP_TO
    groups = _all_groups(total, k) if exact else _drawn_groups(total, k, n, seed)
    reached = sum(int((_distance(chunk, wins) >= observed).sum()) for chunk in groups)
    value = float(wins[:k].mean() - wins[k:].mean()) / (2 * len(normals))
    p = reached / possible if exact else (reached + 1) / (n + 1)
    return PermutationResult(value, p, possible if exact else n, exact)


def _named(first: ArrayLike, second: ArrayLike, normal: ArrayLike) -> Iterator[tuple[str, ArrayLike]]:
    return zip(("first kind", "second kind", "normal"), (first, second, normal), strict=True)


def _scores(name: str, values: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(values, np.float64)
    if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all():
        cause = f"{name} has {scores.size} scores, {int((~np.isfinite(scores)).sum())} of them not finite"
        raise InputError(cause, "give at least one score per group, all finite", stage="permutation")
    return scores


def _twice_the_wins(tumour: NDArray[np.float64], normal: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return int64 (tumour,), for each tumour slide 2 for every normal slide that scores lower and 1 for every tie."""
    ranked = np.sort(normal)
    return (np.searchsorted(ranked, tumour, "left") + np.searchsorted(ranked, tumour, "right")).astype(np.int64)


def _distance(group: NDArray[np.int64], wins: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return int64 (n,), the absolute difference of the mean wins of both kinds times the sizes of both groups.

    Args:
        group: int64 (n, k), indices of the slides that each of n assignments calls the first kind.
        wins: int64 (slides,), from `_twice_the_wins`.
    """
    k, sums = group.shape[1], wins[group].sum(axis=1)
    distance: NDArray[np.int64] = np.abs(sums * (len(wins) - k) - (wins.sum() - sums) * k)
    return distance


def _all_groups(total: int, k: int) -> Iterator[NDArray[np.int64]]:
    """Yield every choice of ``k`` of ``total`` slides, in chunks of int64 (choices, k)."""
    choices: Iterator[Sequence[int]] = combinations(range(total), k)
    while chunk := list(islice(choices, _CHUNK)):
        yield np.fromiter(chain.from_iterable(chunk), np.int64).reshape(len(chunk), k)


def _drawn_groups(total: int, k: int, n: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield ``n`` random choices of ``k`` of ``total`` slides, in chunks of int64 (choices, k)."""
    random = np.random.default_rng(seed)
    for start in range(0, n, _CHUNK):
        yield random.random((min(_CHUNK, n - start), total)).argsort(axis=1)[:, :k]
