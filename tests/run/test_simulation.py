"""The simulation against sums, waves and bounds that are known without it."""

import math
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiflow.run.forecast.simulation import (
    Cluster,
    Forecast,
    Share,
    Sizes,
    Step,
    numbered,
    shard,
    simulate,
    slide_tasks,
)
from wsiflow.run.stages.line import LOADING, ROUGH, STAGES

UNITS = {stage.name: stage.unit for stage in STAGES.values() if stage.name != "stain"}
WORKS = st.lists(st.floats(0.1, 100), min_size=1, max_size=40)


def one_stage(works: list[float], *, tasks: int = 1, loads: bool = False) -> list[list[Step]]:
    return [[Step("predict", tuple(Share(work, tasks) for work in works), loads)]]


def makespan(works: list[float], cluster: Cluster) -> float:
    return simulate(one_stage(works), cluster).makespan_s


@given(works=WORKS)
def test_one_worker_takes_the_sum(works: list[float]) -> None:
    """One worker takes the sum of all slices."""
    found = simulate(one_stage(works), Cluster(1))
    assert found.makespan_s == pytest.approx(sum(works))
    assert found.work_s == pytest.approx(sum(works))
    assert found.efficiency == pytest.approx(1)


@pytest.mark.parametrize(("count", "workers"), [(1, 1), (7, 3), (9, 3), (10, 3), (3, 10), (1000, 64)])
def test_equal_slices_take_whole_waves(count: int, workers: int) -> None:
    """N equal slices on W workers take ceil(N / W) waves."""
    assert makespan([2.5] * count, Cluster(workers)) == pytest.approx(2.5 * math.ceil(count / workers))


@given(works=WORKS, workers=st.integers(1, 12))
def test_list_scheduling_is_within_grahams_bounds(works: list[float], workers: int) -> None:
    """No order beats the mean load or the longest slice; Graham's bounds hold."""
    least = max(sum(works) / workers, max(works))
    assert least * (1 - 1e-9) <= makespan(works, Cluster(workers)) <= sum(works) / workers + max(works) + 1e-9
    best = makespan(sorted(works, reverse=True), Cluster(workers))
    # The optimum is not known; it is at least `least`, and at least two of the W + 1 largest share a worker.
    if len(works) > workers:
        least = max(least, sum(sorted(works, reverse=True)[workers - 1 : workers + 1]))
    assert best <= least * (2 - 1 / workers) + 1e-9


@given(works=WORKS, workers=st.integers(1, 12), cores=st.integers(1, 12))
@settings(max_examples=50)
def test_shared_cores_never_give_more_than_they_have(works: list[float], workers: int, cores: int) -> None:
    """Cores bound the rate, and sharing them loses nothing."""
    found = makespan(works, Cluster(workers, cores=cores))
    assert found >= sum(works) / min(workers, cores) * (1 - 1e-9)
    assert found >= makespan(works, Cluster(workers)) * (1 - 1e-9)
    if cores >= workers:
        assert found == pytest.approx(makespan(works, Cluster(workers)))


def test_workers_beyond_the_cores_share_them_evenly() -> None:
    """Four equal slices on two cores take twice as long with two or four workers."""
    assert makespan([10.0] * 4, Cluster(4, cores=2)) == pytest.approx(20)
    assert makespan([10.0] * 4, Cluster(2, cores=2)) == pytest.approx(20)
    # 3 workers on 2 cores: both short ones end at 15 with 10 each, the long one has 10 of 20 left, alone.
    assert makespan([10.0, 10.0, 20.0], Cluster(3, cores=2)) == pytest.approx(25)


def test_a_stage_waits_for_the_one_before_and_shards_do_not() -> None:
    """The stages of a shard are in order, and another shard fills the gap."""
    shard = [Step("extract", (Share(4, 1), Share(1, 1))), Step("predict", (Share(2, 1),))]
    assert simulate([shard], Cluster(2)).makespan_s == pytest.approx(6)
    assert simulate([shard, shard], Cluster(4)).makespan_s == pytest.approx(6)
    assert simulate([shard, shard], Cluster(4, side_by_side=1)).makespan_s == pytest.approx(12)
    assert simulate([[Step("stain", ()), *shard]], Cluster(2)).makespan_s == pytest.approx(6), "empty stages cost none"


def test_workers_that_live_start_and_load_once() -> None:
    """An element of an array pays for start and load each time, a persistent worker once."""
    works = [1.0] * 6
    assert simulate(one_stage(works), Cluster(2, start_s=2, load_s=3)).makespan_s == pytest.approx(2 + 3)
    lives = simulate(one_stage(works, loads=True), Cluster(2, start_s=2, load_s=3))
    assert lives.makespan_s == pytest.approx(5 + 3)
    assert lives.overhead_s == pytest.approx(2 * 5)
    fresh = simulate(one_stage(works, loads=True), Cluster(2, fresh=True, start_s=2, load_s=3))
    assert fresh.makespan_s == pytest.approx(3 * 6)
    assert fresh.overhead_s == pytest.approx(6 * 5)
    assert fresh.waves == pytest.approx(3)


def test_the_first_slice_of_a_stage_may_take_longer() -> None:
    """A persistent worker pays extra once per stage; an array's element does not."""
    stages = [Step("predict", (Share(1, 1),) * 4, loads=True), Step("certify", (Share(1, 1),) * 4, first_s=5)]
    assert simulate([stages], Cluster(2)).makespan_s == pytest.approx(2 + 5 + 2)
    assert simulate([stages], Cluster(2, fresh=True)).makespan_s == pytest.approx(2 + 2)


@given(works=WORKS, workers=st.integers(1, 12), cores=st.integers(1, 4))
def test_workers_that_stay_are_allocated_to_the_end(works: list[float], workers: int, cores: int) -> None:
    """From their arrival to the end of the run, with the cores that they share."""
    found = simulate(one_stage(works), Cluster(workers, start_s=3.0, cores=cores))
    assert found.allocated_s == pytest.approx(found.cores * found.makespan_s)
    assert simulate(one_stage(works), Cluster(workers, fresh=True)).allocated_s == pytest.approx(sum(works))


def test_elements_that_idle_are_allocated_so_long() -> None:
    """One of two elements has nothing to do after ten seconds; it ends where elements may idle for twenty."""
    stages = [Step("a", (Share(50, 1), Share(10, 1))), Step("b", (Share(5, 1),))]
    of = [simulate([stages], Cluster(2, array_limit=9, idle_s=idle_s)).allocated_s for idle_s in (0, 20)]
    assert of == [2 * 55, 55 + 10 + 20]


def test_arrays_are_counted_under_the_limit() -> None:
    """2,500 elements with a limit of 1,001 are three array jobs."""
    found = simulate(one_stage([1.0] * 2500), Cluster(10, fresh=True, array_limit=1001))
    assert (found.arrays, found.elements) == (3, 2500)


def test_a_scheduler_starts_no_faster_than_it_can() -> None:
    """The last of 100 elements at 10 per second starts after 9.9 s."""
    found = simulate(one_stage([1.0] * 100), Cluster(1000, fresh=True, starts_per_s=10))
    assert found.makespan_s == pytest.approx(10.9)


def test_an_end_is_seen_at_the_next_look() -> None:
    """A driver that polls every 10 s begins the next stage at a poll."""
    shard = [Step("extract", (Share(11, 1),)), Step("predict", (Share(3, 1),))]
    assert simulate([shard], Cluster(1, fresh=True, poll_s=10)).makespan_s == pytest.approx(30)


def test_the_tail_begins_when_a_worker_has_nothing_left() -> None:
    """Two workers with 5 s and 9 s have a tail of 4 s."""
    assert simulate(one_stage([9.0, 5.0]), Cluster(2)).tail_s == pytest.approx(4)
    assert simulate(one_stage([3.0] * 40 + [9.0, 5.0]), Cluster(2)).tail_s == pytest.approx(4)
    assert simulate(one_stage([3.0] * 40), Cluster(2)).tail_s == 0


@pytest.mark.parametrize("rate", [3.0, 7.0, 49.0, 999.0])
def test_rates_that_round_badly_end(rate: float) -> None:
    """The simulation reaches the time at which the scheduler may start again despite rounding."""
    found = simulate(one_stage([0.1] * 500), Cluster(8, fresh=True, starts_per_s=rate, poll_s=0.3, queue_s=7))
    assert found.elements == 500


def test_a_window_bounds_what_is_submitted() -> None:
    """With a window of one slice, eight workers run one at a time."""
    assert makespan([2.0] * 5, Cluster(8, window=1)) == pytest.approx(10)


def test_the_queue_is_paid_once_per_submission() -> None:
    """Every stage of a shard waits once, with the mean of the exponential distribution."""
    shard = [Step(str(i), (Share(1, 1),) * 3) for i in range(4)]
    found = [simulate([shard], Cluster(3, fresh=True, queue_s=50, seed=seed)) for seed in range(300)]
    assert np.mean([each.makespan_s for each in found]) == pytest.approx(4 + 4 * 50, rel=0.1)
    assert np.mean([each.queue_s for each in found]) == pytest.approx(50, rel=0.1)


@given(seed=st.integers(0, 99), failure=st.floats(0, 0.4))
@settings(max_examples=30)
def test_lost_workers_lose_time_and_no_work(seed: int, failure: float) -> None:
    """All work is done in the end, and less than a task is lost each time."""
    cluster = Cluster(7, fresh=True, failure=failure, attempts=60, seed=seed)
    found = simulate(one_stage([20.0] * 50, tasks=10), cluster)
    assert found.work_s == pytest.approx(50 * 20)
    assert found.failed == 0
    assert found.elements == 50 + found.retried
    assert found.lost_s <= 2.0 * found.retried + 1e-9


def test_a_time_limit_keeps_finished_tasks_and_ends_the_rest() -> None:
    """A slice of ten tasks passes a limit in pieces; a single longer task never does."""
    found = simulate(one_stage([100.0], tasks=10), Cluster(1, fresh=True, limit_s=35))
    assert (found.retried, found.failed) == (3, 0)
    assert found.lost_s == pytest.approx(3 * 5)
    found = simulate(one_stage([100.0]), Cluster(1, fresh=True, limit_s=35, attempts=2))
    assert (found.retried, found.failed) == (2, 1)
    assert found.lost_s == pytest.approx(70)


def test_spread_has_the_mean_and_deviation_it_says() -> None:
    """Single tasks have the given deviation, slices of 25 tasks a fifth of it, and the same mean."""
    for tasks, expected in ((1, 0.5), (25, 0.1)):
        total = simulate(one_stage([1.0] * 20_000, tasks=tasks), Cluster(20_000, spread=0.5)).work_s
        assert total == pytest.approx(20_000, rel=0.02)
        ends = [makespan_of_one(tasks, seed) for seed in range(1500)]
        assert np.std(ends) == pytest.approx(expected, rel=0.1)


def makespan_of_one(tasks: int, seed: int) -> float:
    return simulate(one_stage([1.0], tasks=tasks), Cluster(1, spread=0.5, seed=seed)).makespan_s


def test_the_seed_decides_and_nothing_else() -> None:
    """The seed decides the forecast, and the drawn work does not depend on the workers."""
    shards = [[Step("predict", tuple(Share(5.0, 4) for _ in range(200)), loads=True)] for _ in range(5)]

    def forecast(seed: int, workers: int = 9) -> Forecast:
        return simulate(shards, Cluster(workers, fresh=True, spread=0.3, queue_s=9, failure=0.05, seed=seed))

    assert forecast(1) == forecast(1)
    assert forecast(1) != forecast(2)
    assert forecast(1, 9).work_s == pytest.approx(forecast(1, 90).work_s)


def test_more_workers_are_never_much_worse() -> None:
    """With equal draws the makespan falls with the workers, within the bound of list scheduling."""
    works = np.random.default_rng(0).lognormal(3, 1, 3000)
    found = [makespan(sorted(works.tolist(), reverse=True), Cluster(workers)) for workers in (1, 4, 16, 64, 256, 1024)]
    assert all(later <= earlier for earlier, later in pairwise(found))


def test_thousands_of_workers_are_simulated_in_seconds() -> None:
    """30,000 slices on 4,000 workers in 40 shards are simulated quickly."""
    shards = [[Step("predict", tuple(Share(60.0, 4) for _ in range(750)), loads=True)] for _ in range(40)]
    begin = time.process_time()
    found = simulate(shards, Cluster(4000, fresh=True, spread=0.2, queue_s=30, poll_s=5, failure=0.01))
    assert time.process_time() - begin < 10
    assert found.elements >= 30_000


def test_a_slide_known_by_its_tiles_is_cut_like_one_that_is_read() -> None:
    """Groups and parts are as few as allowed, nearly equal, and cover every tile."""
    found = slide_tasks(1001, UNITS, Sizes(group_tiles=400, part_tiles=4000))
    assert found["predict"] == [333, 334, 334]
    assert found["extract"] == found["stitch"] == found["certify"] == [1001]
    assert "stain" not in found
    assert slide_tasks(0, UNITS, Sizes(400, 4000))["predict"] == []


def test_a_shard_holds_the_work_its_tasks_cost() -> None:
    """Slices keep the sum, are near the target, and only stages with a network load it."""
    tasks = slide_tasks(20_000, UNITS, Sizes(400, 4000))
    stages = {stage.name: stage for stage in shard(numbered([tasks, tasks]), ROUGH, loading=LOADING, target_s=60)}
    assert sum(share.work_s for share in stages["predict"].shares) == pytest.approx(100 * 0.2 + 40_000 * 0.067)
    assert sum(share.tasks for share in stages["predict"].shares) == 100
    works = [share.work_s for share in stages["predict"].shares]
    assert works == sorted(works, reverse=True)
    assert max(works) <= 60
    assert {name for name, stage in stages.items() if stage.loads} == {"predict", "certify"}


def test_slices_do_not_span_what_lies_between_them() -> None:
    """Only slides that are neighbours in the plan share a slice."""
    first, _, third = found = numbered([{"certify": [10]}] * 3)
    assert [list(tasks["certify"]) for tasks in found] == [[0], [1], [2]]
    assert len(shard([first, third], ROUGH, loading=LOADING, target_s=1000)[0].shares) == 2
    assert len(shard(found, ROUGH, loading=LOADING, target_s=1000)[0].shares) == 1
