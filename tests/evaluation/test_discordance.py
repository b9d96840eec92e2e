"""Exchange of two settings and score intervals: values by hand, published ones, and simulations with known truth."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.intervals import lesion_changes
from wsiflow.evaluation import discordance, froc
from wsiflow.evaluation.discordance import Discordance
from wsiflow.evaluation.froc import Matches
from wsiflow.evaluation.paired import bootstrap
from wsiflow.evaluation.setting import Setting


def found_of(best, false=0.5):
    """Return a setting of slides, each of which has the hits given for it (0: missed) and one false positive."""
    matches = [
        Matches(f"s{i:03d}", np.array([x or -np.inf for x in own]), 0, np.array([false])) for i, own in enumerate(best)
    ]
    ids = tuple(one.slide_id for one in matches)
    labels = np.array([int(bool(own)) for own in best])
    return Setting("a", matches, ids, np.array([max([0.1, *own]) for own in best]), labels)


def lost(n, n_lost, n_normal=20):
    """Return a reference that finds one lesion in each of n slides, and a setting that misses some of them."""
    normal = [[] for _ in range(n_normal)]
    good = found_of([[0.9]] * n + normal)
    bad = found_of([[0.0 if i < n_lost else 0.9] for i in range(n)] + normal)._replace(name="b")
    return [good, bad]


# --- exchange


@pytest.mark.parametrize(("n_lost", "p"), [(4, 0.125), (5, 0.0625), (6, 0.03125), (0, 1.0)])
def test_p_of_lost_lesions_is_exact(n_lost, p):
    """Of 20 lesions some are lost: p is that of the sign test, and the interval agrees with it."""
    one = bootstrap(lost(20, n_lost), reference="a", n=300).differences["b"]["froc.score"]
    assert one.value == pytest.approx(-n_lost / 20)
    assert one.p == pytest.approx(p)
    assert (one.low <= 0 <= one.high) == (p >= 0.05)


def test_exchanges_are_all_assignments_or_many_draws():
    """All assignments of three units are counted once up to their mirror image; cases of one unit go together."""
    cluster, differs = np.array([0, 0, 1, 2, 3]), np.array([True, False, True, True, False])
    found = discordance.exchanges(differs, cluster, seed=0)
    assert found.exact
    assert len({tuple(row) for row in found.swapped.tolist()}) == len(found.swapped) == 4
    assert not found.swapped[:, [0, 1, 4]].any(), "the first unit stays, and what is the same stays"
    many = discordance.exchanges(np.ones(40, bool), np.repeat(np.arange(20), 2), seed=0)
    assert not many.exact
    assert not many.swapped[0].any()
    assert len(many.swapped) == 20_001
    assert (many.swapped[:, ::2] == many.swapped[:, 1::2]).all()
    assert many.swapped[1:].mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("n_false", [(3, 0, 9, 4), (40, 60, 9, 90)])
def test_exchanged_sensitivities_are_those_of_the_exchanged_slides(n_false):
    """An assignment is scored as its slides would be, ties, missed lesions and needless false positives included."""
    rng = np.random.default_rng(0)
    settings = [
        [
            Matches(
                f"s{i}",
                np.where(rng.random(2) < 0.3, -np.inf, rng.integers(1, 9, 2) / 10),
                0,
                rng.integers(1, 9 if n < 10 else 99, n) / (10 if n < 10 else 100),
            )
            for i, n in enumerate(n_false)
        ]
        for _ in range(2)
    ]
    patterns = np.array(list(itertools.product([False, True], repeat=4)))
    found = froc.exchange(*settings, patterns)
    for row, pattern in zip(found, patterns, strict=True):
        mixed = [settings[int(other)][i] for i, other in enumerate(pattern)]
        numbers = froc.score(mixed, mode="strict")
        assert row == pytest.approx([numbers[f"froc.strict_sensitivity_at_{rate:g}"] for rate in froc.RATES])


@pytest.mark.parametrize("mode", ["official", "strict"])
def test_weights_of_lesions_add_up_to_the_sensitivities(mode):
    """The mean weight of the lesions is the sensitivity, between operating points too; ITC count for nothing."""
    rng = np.random.default_rng(1)
    matches = [
        Matches(f"s{i}", np.append(rng.random(2), -np.inf), 1, rng.random(rng.integers(0, 12)), (2,)) for i in range(9)
    ]
    weights = np.concatenate(froc.lesion_weights(matches, mode=mode)).sum(axis=0) / 18
    stem = "froc." if mode == "official" else "froc.strict_"
    numbers = froc.score(matches, mode=mode)
    assert weights == pytest.approx([numbers[f"{stem}sensitivity_at_{rate:g}"] for rate in froc.RATES])


# --- intervals


def test_score_interval_solves_its_equation():
    """The ends are 1.96 deviations away, the statistic at 0 is McNemar's, and of 44 equal pairs the ends are known."""
    low, high = discordance.score_interval(Discordance(6, 1, 50))
    assert discordance.score_z(Discordance(6, 1, 50), low) == pytest.approx(1.959964, abs=1e-4)
    assert discordance.score_z(Discordance(6, 1, 50), high) == pytest.approx(-1.959964, abs=1e-4)
    assert discordance.score_z(Discordance(6, 1, 50), 0.0) == pytest.approx(5 / math.sqrt(7)), "McNemar's at 0"
    low, high = discordance.score_interval(Discordance(0, 0, 44))
    assert [-low, high] == pytest.approx([1.96**2 / (44 + 1.96**2)] * 2, rel=1e-3)


@pytest.mark.parametrize(
    "found",
    [
        Discordance(0, 10, 10),
        Discordance(10, 0, 10),
        Discordance(3.5, 0.25, 7.25),
        Discordance(0, 0, 1),
        Discordance(0, 1, 1),
        Discordance(0.3, 0.3, 1),
    ],
)
def test_score_interval_holds_its_value(found):
    """The interval lies within -1 and 1, mirrors with the sign and holds what was found."""
    low, high = discordance.score_interval(found)
    assert -1 <= low <= (found.gained - found.lost) / found.n <= high <= 1
    mirrored = discordance.score_interval(Discordance(found.lost, found.gained, found.n))
    assert mirrored == pytest.approx((-high, -low), abs=1e-6)
    wider = discordance.score_interval(found, 0.99)
    assert wider[0] <= low
    assert wider[1] >= high


def test_design_effect_is_that_of_whole_cases_and_of_single_units():
    """Four units a case that change together count as one, and those that change alone as four; without change, one."""
    whose = np.repeat(np.arange(50), 4)
    rng = np.random.default_rng(0)
    together, alone = np.repeat(rng.random(50) < 0.3, 4) * 1.0, (rng.random(200) < 0.3) * 1.0
    assert discordance.design_effect(together, whose) == pytest.approx(4, rel=0.05)
    assert discordance.design_effect(alone, whose) == pytest.approx(1, abs=0.35)
    assert discordance.design_effect(np.zeros(200), whose) == 4


def test_all_lesions_found_is_not_certain():
    """A FROC score of 1 has a lower end by the slides with lesions, and one of 0 an upper end."""
    normal = [[] for _ in range(20)]
    for best, value in ((0.9, 1.0), (0.0, 0.0)):
        found = bootstrap([found_of([[best] * 3] * 20 + normal)], reference="a", n=200).intervals["a"]
        for metric in ("froc.score", "froc.strict_score", "froc.sensitivity_at_8"):
            one = found[metric]
            assert one.value == value
            assert one.high - one.low == pytest.approx(1 - 0.025 ** (1 / 20)), "of 20 slides, not of 60 lesions"


def with_itc(setting, n_itc):
    """Return a setting with isolated tumour cells on each slide that has lesions."""
    matches = [
        replace(
            one, best=np.append(one.best, [-np.inf] * n_itc), n_itc=n_itc, itc=tuple(len(one.best) + np.arange(n_itc))
        )
        if len(one.best)
        else one
        for one in setting.matches
    ]
    return setting._replace(matches=matches)


@pytest.mark.parametrize("n_slides", [2, 20])
def test_isolated_tumour_cells_widen_and_narrow_no_interval(n_slides):
    """They are no lesions: intervals of scores and of differences are the same with any number of them."""
    few, none = [[0.9] * 3] * n_slides + [[]] * 20, [[0.9, 0.9, 0.0]] * n_slides + [[]] * 20
    settings = [found_of(few), found_of(few)._replace(name="b"), found_of(none)._replace(name="c")]
    plain, beside = (bootstrap([with_itc(one, n) for one in settings], reference="a", n=100, seed=0) for n in (0, 4))
    for metric in ("froc.strict_score", "froc.sensitivity_at_8"):
        assert beside.intervals["a"][metric] == pytest.approx(plain.intervals["a"][metric])
        for name in "bc":
            assert beside.differences[name][metric] == pytest.approx(plain.differences[name][metric])


def test_equal_settings_may_still_differ_in_other_slides():
    """Where no slide differs, the interval of the AUC's difference is that of as many slides, not a point."""
    one = bootstrap(lost(30, 0, n_normal=25), reference="a", n=200).differences["b"]["roc.auc"]
    assert one.value == 0
    assert [-one.low, one.high] == pytest.approx([1.96**2 / (25 + 1.96**2)] * 2, rel=1e-3)


# --- what they are worth


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("n", "p_lost", "p_gained"), [(20, 0.02, 0.0), (64, 0.02, 0.0), (200, 0.04, 0.02)])
def test_a_loss_of_the_margin_is_seldom_called_none(n, whole, p_lost, p_gained):
    """With a true loss of 0.02 the interval lies above -0.02 in at most 2.5 % of the data sets, however few differ."""
    above = 0
    for seed in range(400):
        whose, changes = lesion_changes(
            np.random.default_rng([seed, n]), n, whole=whole, p_lost=p_lost, p_gained=p_gained
        )
        above += discordance.score_interval(discordance.discordance(changes, whose))[0] > -0.02
    assert above / 400 <= 0.025 + 2.6 * math.sqrt(0.025 * 0.975 / 400)


@pytest.mark.parametrize("whole", [False, True])
def test_exchange_errs_as_often_as_it_says(whole):
    """Of equal settings with few discordant slides at most 5 % differ at 0.05, and 0.5 % at 0.005."""
    p = []
    for seed in range(1500):
        whose, changes = lesion_changes(np.random.default_rng([seed, 7]), 20, whole=whole, p_lost=0.15, p_gained=0.15)
        of_case = np.bincount(whose, changes)
        swapped = discordance.exchanges(of_case != 0, np.arange(20), seed=seed).swapped
        p.append(discordance.exchange_p((1 - 2.0 * swapped) @ of_case))
    for alpha in (0.05, 0.005):
        assert np.mean(np.array(p) < alpha) <= alpha + 2.6 * math.sqrt(alpha * (1 - alpha) / 1500)
    assert np.mean(np.array(p) < 0.05) > 0.01, "the test must be able to refuse"
