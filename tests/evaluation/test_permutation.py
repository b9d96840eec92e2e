"""The permutation test against enumeration, another implementation, and its distribution under the null."""

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from wsiflow.errors import InputError
from wsiflow.evaluation import permutation, roc
from wsiflow.evaluation.permutation import permutation_test

MACRO, MICRO, NORMAL = [0.9, 0.8], [0.6, 0.3], [0.1, 0.5, 0.7]

scores = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=4)


def plain_differences(first: list[float], second: list[float], normal: list[float]) -> list[float]:
    """Return the difference of AUCs for every assignment of kinds, the observed one first."""
    both, k = [*first, *second], len(first)
    found = []
    for chosen in itertools.combinations(range(len(both)), k):
        groups = [both[i] for i in chosen], [both[i] for i in range(len(both)) if i not in chosen]
        one, other = (roc.auc([*group, *normal], [1] * len(group) + [0] * len(normal)) for group in groups)
        found.append(one - other)
    return found


def references_p(first: list[float], second: list[float], normal: list[float]) -> float:
    """Return the p-value of the reference's script: how often the observed difference is below a shuffled one."""
    observed, *_ = differences = plain_differences(first, second, normal)
    return float(np.mean([observed < abs(shuffled) for shuffled in differences]))


def test_the_worked_example_has_a_third_where_the_reference_has_zero() -> None:
    """O-14: two of six assignments differ by 1/2, so p is 1/3; the reference's strict comparison gives 0."""
    differences = plain_differences(MACRO, MICRO, NORMAL)
    assert sorted(np.abs(differences).round(4)) == [0.1667, 0.1667, 0.1667, 0.1667, 0.5, 0.5]
    assert permutation_test(MACRO, MICRO, NORMAL) == (0.5, 2 / 6, 6, True)
    assert references_p(MACRO, MICRO, NORMAL) == 0


def test_the_side_does_not_matter() -> None:
    """The reference gives p = 1 or p = 0 for the same difference, depending on its sign."""
    assert permutation_test(MICRO, MACRO, NORMAL) == (-0.5, 2 / 6, 6, True)
    assert references_p(MICRO, MACRO, NORMAL) == 1


@given(scores, scores, scores)
def test_exact_p_is_the_share_of_labelings(first: list[float], second: list[float], normal: list[float]) -> None:
    """Integer counts equal AUCs by pairs, ties included."""
    differences = plain_differences(first, second, normal)
    found = permutation_test(first, second, normal)
    assert found.value == pytest.approx(differences[0], abs=1e-12)
    assert found.p == np.mean(np.abs(differences) >= abs(differences[0]) - 1e-9)


def test_drawn_p_is_near_the_exact_one_and_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """The p-value of 20,000 draws is within four standard errors and depends on the seed alone."""
    random = np.random.default_rng(3)
    groups = random.normal(1.2, 1, 7), random.normal(0.6, 1, 8), random.normal(0, 1, 12)
    exact = permutation_test(*groups)
    assert exact.exact
    assert exact.labelings == 6435
    monkeypatch.setattr(permutation, "EXACT_UP_TO", 100)
    drawn = permutation_test(*groups, n=20_000, seed=1)
    assert (drawn.exact, drawn.labelings) == (False, 20_000)
    assert abs(drawn.p - exact.p) < 4 * np.sqrt(exact.p * (1 - exact.p) / 20_000)
    assert drawn == permutation_test(*groups, n=20_000, seed=1)
    assert drawn.p != permutation_test(*groups, n=20_000, seed=2).p


def test_a_drawn_p_is_never_zero() -> None:
    """The p-value is 1 / (n + 1) where no draw reaches the observed difference."""
    found = permutation_test(np.arange(20) + 100.0, np.arange(20) - 100.0, np.arange(20), n=99)
    assert found == (1.0, 0.01, 99, False)


def test_under_the_null_small_p_are_as_rare_as_they_say() -> None:
    """Of 1,000 data sets without a difference about 5 % have p <= 0.05, and never clearly more."""
    random = np.random.default_rng(0)
    p = [permutation_test(*(random.normal(size=n) for n in (5, 5, 10))).p for _ in range(1000)]
    assert 0.02 < np.mean(np.array(p) <= 0.05) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000)


def test_published_scores_agree_with_another_implementation(shared_data: Path) -> None:
    """Macro against micro on 129 test slides agrees with SciPy's test within four errors."""
    with (shared_data / "published/dldp/RF_results/reference_all_final_results_0515.csv").open() as file:
        rows = list(csv.DictReader(file))
    macro, micro, normal = (
        np.array([float(row["Method_II_noise_norm"]) for row in rows if row["category_2"] == kind])
        for kind in ("Macro", "Micro", "None")
    )
    assert (len(macro), len(micro), len(normal)) == (22, 27, 80)
    ours = permutation_test(macro, micro, normal, n=20_000)

    def difference(one: np.ndarray, other: np.ndarray) -> float:
        return sum(
            sign * roc.auc([*group, *normal], [1] * len(group) + [0] * len(normal))
            for sign, group in ((1, one), (-1, other))
        )

    theirs = stats.permutation_test(
        (macro, micro), difference, vectorized=False, n_resamples=2000, rng=np.random.default_rng(0)
    )
    assert ours.value == pytest.approx(theirs.statistic, abs=1e-12)
    assert abs(ours.p - theirs.pvalue) < 4 * np.sqrt(max(ours.p, 1e-3) / 2000)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (([], [1], [0]), "first kind has 0 scores"),
        (([1], [1], []), "normal has 0 scores"),
        (([1], [np.nan], [0]), "second kind has 1 scores, 1 of them not finite"),
    ],
)
def test_unusable_groups_are_refused(groups: tuple[list[float], ...], message: str) -> None:
    """The message names the group."""
    with pytest.raises(InputError, match=message):
        permutation_test(*groups)
    with pytest.raises(InputError, match="at least one"):
        permutation_test([1], [1], [1], n=0)
