"""Permutation test: does a slide score find one kind of tumour better than another?

Input: scores of slides with tumour of one kind, of another kind, and of normal slides. Output: the difference between
the two areas under the ROC curve, each kind against the same normal slides, and its p-value.

If the kind does not matter, every way to call some of the tumour slides the first kind is as likely as the one
observed. The test is two-sided: it counts the labelings whose difference is at least as large, in absolute value, as
the observed one, ties included. All labelings are counted where there are few; p is then exact. Otherwise n of them
are drawn, and p is (b + 1) / (n + 1) for b counted ones, since the observed labeling is one of the possible ones: a p
of 0 cannot come out (Phipson and Smyth, 2010, doi 10.2202/1544-6115.1585).

An area is the mean, over tumour slides, of the share of normal slides that score lower, ties counting one half.
Differences are compared as whole numbers, so equal ones are equal.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import chain, combinations, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsiflow.errors import InputError

EXACT_UP_TO = 100_000
"""Labelings that are all counted rather than drawn from."""

_CHUNK = 4096


class PermutationResult(NamedTuple):
    """How much better one kind is told from normal than another.

    Attributes:
        value: AUC of the first kind minus AUC of the second.
        p: Two-sided p-value.
        labelings: How many labelings were looked at.
        exact: Whether these are all.
    """

    value: float
    p: float
    labelings: int
    exact: bool


def permutation_test(
    first: ArrayLike, second: ArrayLike, normal: ArrayLike, *, n: int = 10_000, seed: int = 0
) -> PermutationResult:
    """Compare how well two kinds of tumour are told from normal slides.

    Args:
        first: (k,) scores of slides of the first kind, higher means more likely tumour.
        second: (m,) scores of slides of the second kind.
        normal: (l,) scores of normal slides.
        n: Labelings to draw where there are more than `EXACT_UP_TO`.
        seed: Seed of the draws.

    Raises:
        InputError: A group is empty, a score is not finite, or ``n`` is below 1.
    """
    ones, others, normals = (_scores(name, values) for name, values in _named(first, second, normal))
    if n < 1:
        raise InputError(f"{n} labelings to draw", "draw at least one", stage="permutation")
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
        cause = f"{name}: {scores.size} scores, {int((~np.isfinite(scores)).sum())} of them not finite"
        raise InputError(cause, "give at least one score per group, all finite", stage="permutation")
    return scores


def _twice_the_wins(tumour: NDArray[np.float64], normal: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return, for each tumour slide, how many normal slides score lower, twice, and once for each that ties."""
    ranked = np.sort(normal)
    return (np.searchsorted(ranked, tumour, "left") + np.searchsorted(ranked, tumour, "right")).astype(np.int64)


def _distance(group: NDArray[np.int64], wins: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the absolute difference of the two means times both sizes, a whole number.

    Args:
        group: int64 (n, k), which slides each of n labelings calls the first kind.
        wins: int64 (slides,).
    """
    k, sums = group.shape[1], wins[group].sum(axis=1)
    found: NDArray[np.int64] = np.abs(sums * (len(wins) - k) - (wins.sum() - sums) * k)
    return found


def _all_groups(total: int, k: int) -> Iterator[NDArray[np.int64]]:
    """Yield every choice of ``k`` slides, some thousand at a time, as int64 (choices, k)."""
    choices: Iterator[Sequence[int]] = combinations(range(total), k)
    while chunk := list(islice(choices, _CHUNK)):
        yield np.fromiter(chain.from_iterable(chunk), np.int64).reshape(len(chunk), k)


def _drawn_groups(total: int, k: int, n: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield ``n`` random choices of ``k`` slides."""
    random = np.random.default_rng(seed)
    for start in range(0, n, _CHUNK):
        yield random.random((min(_CHUNK, n - start), total)).argsort(axis=1)[:, :k]
