"""Simulate a run on other machines: a discrete-event simulation of its shards, stages, slices and workers.

Input: shards, each a list of stages, each a list of slices with their work in core-seconds; and a `Cluster`. Output: a
`Forecast`. Times are seconds from the start of the run. Nothing is measured or executed here.

The rules are those of `wsiflow.run.shards` and the executors. The stages of a shard run one after another, and shards
run in parallel. The slices of a stage start in the given order, as workers become free. Workers persist through the
run (``process``, Dask, and elements of array jobs, which take slice after slice until their time is up): they start
once and load the network once. Or they are started for every slice, as in the reference system, and pay for both each
time. Where there are fewer cores than workers, the busy workers share them evenly.

A persistent worker waits in the scheduler's queue before it starts; a submission of slices with workers of their own
waits once for all of them. Tasks that a lost worker had finished are kept, and the rest of its slice is submitted
again.
"""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.run.costs import Costs, first_of, slices
from wsiflow.run.plan import Unit


class Share(NamedTuple):
    """The work of one slice.

    Attributes:
        work_s: Expected core-seconds.
        tasks: Number of tasks, assumed to be equal; a finished task is kept if the worker is lost.
    """

    work_s: float
    tasks: int


class Step(NamedTuple):
    """A shard's part of a stage: its work between two barriers.

    Attributes:
        name: Name of the stage.
        shares: The slices, in the order in which they start.
        loads: Whether the tasks need the network.
        first_s: Extra seconds of a persistent worker in its first slice of the stage, for other networks or for the
            first block of each shape. Workers that are started for every slice only pay ``load_s``.
    """

    name: str
    shares: tuple[Share, ...]
    loads: bool = False
    first_s: float = 0.0


Shard = Sequence[Step]
"""The stages of a shard, one after another."""


Tasks = dict[str, dict[int, int]]
"""Number of tissue tiles of each task, by stage and by the task's place in the stage."""


class Sizes(NamedTuple):
    """Sizes of groups and parts, for slides of which only the number of tissue tiles is known.

    Attributes:
        group_tiles: Most tissue tiles of a group.
        part_tiles: Most tissue tiles of a part.
    """

    group_tiles: int
    part_tiles: int


def slide_tasks(tiles: int, stages: Mapping[str, Unit], sizes: Sizes) -> dict[str, list[int]]:
    """Return the number of tissue tiles of each task of a slide, by stage.

    Args:
        tiles: Number of tissue tiles of the slide.
        stages: Unit of a task (slide, part or group) by stage, in the order of the line.
        sizes: Sizes of groups and parts.
    """
    most = {"group": sizes.group_tiles, "part": sizes.part_tiles}
    return {name: _parts(tiles, most[unit]) if unit in most else [tiles] for name, unit in stages.items()}


def _parts(tiles: int, most: int) -> list[int]:
    """Return the sizes of as few, nearly equal parts as possible with at most ``most`` tiles each."""
    count = -(-tiles // most)
    return [tiles * (i + 1) // count - tiles * i // count for i in range(count)]


def numbered(slides: Sequence[Mapping[str, Sequence[int]]]) -> list[Tasks]:
    """Return the tasks of slides by stage and place; the places of a stage count through all slides."""
    counts: dict[str, int] = {}
    numbered_slides = []
    for tasks in slides:
        places: Tasks = {}
        for stage, tiles in tasks.items():
            first = counts.get(stage, 0)
            counts[stage] = first + len(tiles)
            places[stage] = dict(enumerate(tiles, first))
        numbered_slides.append(places)
    return numbered_slides


def shard(slides: Sequence[Tasks], costs: Costs, *, loading: Collection[str], target_s: float) -> list[Step]:
    """Return a shard for `simulate`, divided into slices as a run divides it.

    Args:
        slides: The tasks of the shard's slides, stages in the order of the line.
        costs: Costs of tasks.
        loading: Stages whose tasks need the network.
        target_s: Core-seconds that a slice should have; with 0 every task is a slice.
    """
    names = dict.fromkeys(name for tasks in slides for name in tasks)
    return [_step(name, slides, costs, target_s)._replace(loads=name in loading) for name in names]


def _step(name: str, slides: Sequence[Tasks], costs: Costs, target_s: float) -> Step:
    works = {place: costs.task_s(name, tiles) for tasks in slides for place, tiles in tasks.get(name, {}).items()}
    places = sorted(works)
    spans = slices(places, [works[place] for place in places], target_s=target_s)
    shares = [Share(sum(works[place] for place in range(lo, hi)), hi - lo) for lo, hi in spans]
    first = costs.stages.get(first_of(name))
    return Step(name, tuple(shares), first_s=first.fixed_s if first else 0.0)


class Cluster(NamedTuple):
    """The cluster on which a run is simulated.

    Attributes:
        workers: Number of workers, each with one slice at a time.
        fresh: Whether a worker is started for every slice; else workers persist through the run.
        cores: Cores that the workers share; 0 for one core per worker.
        start_s: Seconds from the start of a worker to its first task: interpreter and imports.
        load_s: Seconds to load the network, once per worker that needs it.
        publish_s: Seconds of every task besides its work.
        spread: Standard deviation of a task's time over its mean; times are lognormal.
        queue_s: Mean seconds that a submission, or a persistent worker, waits in the queue; exponentially distributed.
        starts_per_s: Most slices that the scheduler starts per second, or most workers where these are elements of
            array jobs; 0 for no limit.
        poll_s: Seconds between two polls for ended slices; 0 where the driver learns of an end at once.
        array_limit: Most elements of an array job; 0 where there are no array jobs.
        window: Most slices of a stage that are submitted at the same time; 0 for all.
        side_by_side: Most shards in progress; 0 for all.
        failure: Probability that the worker of a slice is lost, at a uniformly distributed moment.
        limit_s: Time limit of a worker that is started for a slice; 0 for none.
        life_s: Seconds after which a persistent worker takes no more slices, and another one waits in the queue; 0 for
            none.
        idle_s: Seconds without work after which a persistent worker gives its core back; 0 where it keeps it to the
            end. Only what is allocated depends on it.
        attempts: Most attempts at a slice.
        seed: Seed of all random numbers.
    """

    workers: int
    fresh: bool = False
    cores: int = 0
    start_s: float = 0.0
    load_s: float = 0.0
    publish_s: float = 0.0
    spread: float = 0.0
    queue_s: float = 0.0
    starts_per_s: float = 0.0
    poll_s: float = 0.0
    array_limit: int = 0
    window: int = 0
    side_by_side: int = 0
    failure: float = 0.0
    limit_s: float = 0.0
    life_s: float = 0.0
    idle_s: float = 0.0
    attempts: int = 5
    seed: int = 0


class Forecast(NamedTuple):
    """The result of a simulated run.

    Attributes:
        makespan_s: Seconds from the start of the run to when the driver learns of the end of the last slice.
        work_s: Core-seconds of tasks that were kept.
        overhead_s: Core-seconds of starting workers and loading networks.
        lost_s: Core-seconds of tasks that were lost.
        allocated_s: Core-seconds that workers keep allocated, waiting for work included: what a scheduler charges.
        tail_s: Seconds from the last moment at which all workers were busy to the end of the run.
        queue_s: Mean seconds of a slice from submission to start.
        elements: Number of slices started, counting every attempt.
        arrays: Number of array jobs submitted.
        retried: Number of attempts that were lost.
        failed: Number of slices that were given up.
        cores: Number of cores.
        workers: Number of workers.
    """

    makespan_s: float
    work_s: float
    overhead_s: float
    lost_s: float
    allocated_s: float
    tail_s: float
    queue_s: float
    elements: int
    arrays: int
    retried: int
    failed: int
    cores: int
    workers: int

    @property
    def efficiency(self) -> float:
        """Share of the cores' time that was spent on work that was kept."""
        return self.work_s / (self.cores * self.makespan_s) if self.makespan_s else 1.0

    def then(self, after: "Forecast") -> "Forecast":
        """Return both, where all of this run ends before the other one starts on the same workers."""
        elements = self.elements + after.elements
        waited_s = self.queue_s * self.elements + after.queue_s * after.elements
        return after._replace(
            makespan_s=self.makespan_s + after.makespan_s,
            work_s=self.work_s + after.work_s,
            overhead_s=self.overhead_s + after.overhead_s,
            lost_s=self.lost_s + after.lost_s,
            allocated_s=self.allocated_s + after.allocated_s,
            queue_s=waited_s / elements if elements else 0.0,
            elements=elements,
            arrays=self.arrays + after.arrays,
            retried=self.retried + after.retried,
            failed=self.failed + after.failed,
        )

    @property
    def waves(self) -> float:
        """Number of slices per worker."""
        return self.elements / self.workers


class _Attempt(NamedTuple):
    """An attempt at a slice: its drawn core-seconds, its remaining tasks, and the time of its submission."""

    shard: int
    work_s: float
    tasks: int
    tries: int
    submitted_s: float


class _Running(NamedTuple):
    """An attempt on a worker: core-seconds of overhead, kept and lost work, and the attempt at the rest, if any."""

    attempt: _Attempt
    worker: int
    before_s: float
    kept_s: float
    lost_s: float
    left: _Attempt | None


_NEW, _STARTED, _LOADED = range(3)


def simulate(shards: Sequence[Shard], cluster: Cluster) -> Forecast:
    """Simulate a run on a cluster.

    Args:
        shards: The shards, in the order in which they begin.
        cluster: The cluster.

    Returns:
        The forecast; the same seed gives the same forecast.
    """
    return _Simulation(shards, cluster).run()


class _Simulation:
    """The state of a simulated run.

    There are two clocks. ``now_s`` is the time; ``turn_s`` is the core-seconds that each busy worker has received. They
    differ only while more workers are busy than there are cores. Attempts end by ``turn_s``, all other events happen by
    ``now_s``.
    """

    def __init__(self, shards: Sequence[Shard], cluster: Cluster) -> None:
        self._shards, self._cluster = shards, cluster
        self._rng = np.random.default_rng([cluster.seed, 0])
        self._order = itertools.count()
        self._now_s = self._turn_s = self._gate_s = self._full_s = self._waited_s = 0.0
        self._gated = False
        self._events: list[tuple[float, int, object]] = []
        self._running: list[tuple[float, int, _Running]] = []
        self._ready: deque[_Attempt] = deque()
        self._state = [_NEW] * cluster.workers
        self._born_s = [0.0] * cluster.workers
        self._busy_since_s = [0.0] * cluster.workers
        self._idle_since_s: list[float | None] = [None] * cluster.workers  # None: it is busy, or not there
        self._known: list[set[str]] = [set() for _ in range(cluster.workers)]
        self._idle: tuple[list[int], list[int], list[int]] = ([], [], [])
        self._to_begin = deque(range(len(shards)))
        self._stage = [-1] * len(shards)
        self._held: list[deque[_Attempt]] = [deque() for _ in shards]
        self._open = [0] * len(shards)
        self._sums = {"work": 0.0, "overhead": 0.0, "lost": 0.0, "allocated": 0.0}
        self._counts = {"elements": 0, "arrays": 0, "retried": 0, "failed": 0}

    def run(self) -> Forecast:
        self._workers_arrive()
        for _ in range(self._cluster.side_by_side or len(self._shards)):
            self._begin_shard()
        self._dispatch()
        while self._running or self._events:
            full = not any(self._idle)
            self._step()
            self._full_s = self._now_s if full else self._full_s
            self._dispatch()
        cluster, elements = self._cluster, self._counts["elements"]
        for worker in range(cluster.workers):
            self._charge_idle(worker)
        cores = min(cluster.cores or cluster.workers, cluster.workers)
        return Forecast(
            makespan_s=self._now_s,
            work_s=self._sums["work"],
            overhead_s=self._sums["overhead"],
            lost_s=self._sums["lost"],
            allocated_s=self._sums["allocated"] * cores / cluster.workers,
            tail_s=self._now_s - self._full_s,
            queue_s=self._waited_s / max(1, elements),
            **self._counts,
            cores=cores,
            workers=cluster.workers,
        )

    def _workers_arrive(self) -> None:
        """Let persistent workers wait in the queue; slots for workers that are started per slice are free at once."""
        cluster = self._cluster
        if cluster.array_limit and not cluster.fresh:
            self._counts["arrays"] = -(-cluster.workers // cluster.array_limit)
        for worker in reversed(range(cluster.workers)):
            if cluster.fresh or not cluster.queue_s:
                self._arrives(worker)
            else:
                self._at(self._wait_s(), worker)

    def _arrives(self, worker: int) -> None:
        """Let a worker be free; elements of array jobs are only submitted for work that waits, others wait for work."""
        self._idle[_NEW].append(worker)
        if not self._cluster.fresh and not self._cluster.array_limit:
            self._idle_since_s[worker] = self._now_s

    def _charge_idle(self, worker: int) -> None:
        """Charge the time for which a worker has waited for work."""
        since_s = self._idle_since_s[worker]
        if since_s is not None:
            self._sums["allocated"] += min(self._now_s - since_s, self._cluster.idle_s or math.inf)
        self._idle_since_s[worker] = None

    def _wait_s(self) -> float:
        return float(self._rng.exponential(self._cluster.queue_s)) if self._cluster.queue_s else 0.0

    def _at(self, then_s: float, event: object) -> None:
        heapq.heappush(self._events, (then_s, next(self._order), event))

    def _step(self) -> None:
        """Advance both clocks to the next event, and process it."""
        rate = min(1.0, self._cluster.cores / len(self._running)) if self._cluster.cores and self._running else 1.0
        end_s = self._now_s + (self._running[0][0] - self._turn_s) / rate if self._running else math.inf
        if self._events and self._events[0][0] <= end_s:
            then_s, _, event = heapq.heappop(self._events)
            self._turn_s += rate * (then_s - self._now_s)
            self._now_s = then_s
            self._happens(event)
        else:
            self._turn_s, _, ended = heapq.heappop(self._running)
            self._now_s = end_s
            self._ends(ended)

    def _happens(self, event: object) -> None:
        """Process an event.

        None: the scheduler may start slices again. int: this worker arrives. list: a submission leaves the queue.
        `_Running`: the driver learns of its end.
        """
        if event is None:
            self._gated = False
        elif isinstance(event, int):
            self._arrives(event)
        elif isinstance(event, list):
            self._ready.extend(event)
        elif isinstance(event, _Running):
            self._seen(event)

    def _begin_shard(self) -> None:
        if self._to_begin:
            self._advance(self._to_begin.popleft())

    def _advance(self, shard: int) -> None:
        """Submit the next stage of a shard that has slices; where none is left, begin another shard."""
        stages = self._shards[shard]
        while self._stage[shard] + 1 < len(stages):
            self._stage[shard] += 1
            if stages[self._stage[shard]].shares:
                attempts = deque(self._drawn(shard))
                self._open[shard], self._held[shard] = len(attempts), attempts
                self._submit(shard, self._cluster.window or len(attempts))
                return
        self._begin_shard()

    def _drawn(self, shard: int) -> Iterator[_Attempt]:
        """Yield the attempts at the slices of a shard's stage, with random durations that depend on the seed alone."""
        number = self._stage[shard]
        shares = self._shards[shard][number].shares
        rng = np.random.default_rng([self._cluster.seed, 1, shard, number])
        factors = _factors(rng, np.array([share.tasks for share in shares]), self._cluster.spread)
        for share, factor in zip(shares, factors.tolist(), strict=True):
            work_s = share.work_s * factor + share.tasks * self._cluster.publish_s
            yield _Attempt(shard, work_s, share.tasks, 1, self._now_s)

    def _submit(self, shard: int, count: int) -> None:
        """Submit up to ``count`` of a stage's slices to the scheduler."""
        held = self._held[shard]
        batch = [held.popleft()._replace(submitted_s=self._now_s) for _ in range(min(count, len(held)))]
        if not batch:
            return
        if self._cluster.array_limit and self._cluster.fresh:
            self._counts["arrays"] += -(-len(batch) // self._cluster.array_limit)
        if self._cluster.fresh and self._cluster.queue_s:
            self._at(self._now_s + self._wait_s(), batch)
        else:
            self._ready.extend(batch)

    def _dispatch(self) -> None:
        """Start slices on idle workers, at most at the scheduler's rate."""
        while self._ready and any(self._idle):
            if self._now_s < self._gate_s:
                if not self._gated:
                    self._at(self._gate_s, None)
                self._gated = True
                return
            self._start(self._ready.popleft())

    def _start(self, attempt: _Attempt) -> None:
        cluster, stage = self._cluster, self._shards[attempt.shard][self._stage[attempt.shard]]
        worker = next(idle for idle in reversed(self._idle) if idle).pop()
        self._charge_idle(worker)
        self._busy_since_s[worker] = self._now_s
        is_new = self._state[worker] == _NEW
        before_s = cluster.start_s if is_new else 0.0
        self._born_s[worker] = self._now_s if is_new else self._born_s[worker]
        before_s += cluster.load_s if stage.loads and self._state[worker] != _LOADED else 0.0
        before_s += stage.first_s if not cluster.fresh and stage.name not in self._known[worker] else 0.0
        self._known[worker].add(stage.name)
        self._state[worker] = _LOADED if stage.loads else max(self._state[worker], _STARTED)
        running = self._fate(attempt, worker, before_s)
        end = self._turn_s + before_s + running.kept_s + running.lost_s
        heapq.heappush(self._running, (end, next(self._order), running))
        self._counts["elements"] += 1
        self._waited_s += self._now_s - attempt.submitted_s
        if cluster.starts_per_s and (is_new or not cluster.array_limit):
            self._gate_s = self._now_s + 1 / cluster.starts_per_s

    def _fate(self, attempt: _Attempt, worker: int, before_s: float) -> _Running:
        """Decide how much of its work an attempt completes before it ends or its worker is lost."""
        cluster, reached = self._cluster, 1.0
        if cluster.failure and self._rng.random() < cluster.failure:
            reached = float(self._rng.random())
        if cluster.limit_s and before_s + reached * attempt.work_s > cluster.limit_s:
            reached = max(0.0, cluster.limit_s - before_s) / attempt.work_s
        if reached == 1.0:
            return _Running(attempt, worker, before_s, attempt.work_s, 0.0, None)
        done = math.floor(reached * attempt.tasks)
        kept_s = attempt.work_s * done / attempt.tasks
        left = attempt._replace(work_s=attempt.work_s - kept_s, tasks=attempt.tasks - done, tries=attempt.tries + 1)
        return _Running(attempt, worker, before_s, kept_s, reached * attempt.work_s - kept_s, left)

    def _ends(self, ended: _Running) -> None:
        """End an attempt: free its worker, or replace it by a new one if it was lost."""
        cluster, worker = self._cluster, ended.worker
        is_old = cluster.life_s > 0 and self._now_s - self._born_s[worker] > cluster.life_s
        if cluster.fresh or is_old or ended.left is not None:
            self._state[worker] = _NEW
            self._known[worker].clear()
        self._sums["allocated"] += self._now_s - self._busy_since_s[worker]
        if is_old and cluster.queue_s:
            self._at(self._now_s + self._wait_s(), worker)
        elif self._state[worker] == _NEW:
            self._arrives(worker)
        else:
            self._idle[self._state[worker]].append(worker)
            self._idle_since_s[worker] = self._now_s
        self._sums["work"] += ended.kept_s
        self._sums["overhead"] += ended.before_s
        self._sums["lost"] += ended.lost_s
        poll_s = cluster.poll_s
        if poll_s:
            self._at(max(self._now_s, math.ceil(self._now_s / poll_s) * poll_s), ended)
        else:
            self._seen(ended)

    def _seen(self, ended: _Running) -> None:
        """Continue after the driver has learnt of an end: retry the rest, submit a slice, or advance the shard."""
        shard, left = ended.attempt.shard, ended.left
        if left is not None:
            self._counts["retried"] += 1
            if left.tries <= self._cluster.attempts:
                self._held[shard].appendleft(left)
                self._submit(shard, 1)
                return
            self._counts["failed"] += 1
        self._open[shard] -= 1
        self._submit(shard, 1)
        if not self._open[shard]:
            self._advance(shard)


def _factors(rng: np.random.Generator, tasks: NDArray[np.int64], spread: float) -> NDArray[np.float64]:
    """Return lognormal factors of mean 1, one per slice; their variance falls with the number of tasks of the slice."""
    variance = np.log1p((spread**2) / tasks)
    factors: NDArray[np.float64] = np.exp(np.sqrt(variance) * rng.standard_normal(len(tasks)) - variance / 2)
    return factors
