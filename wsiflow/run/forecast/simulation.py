"""What a run would take on other machines: a discrete-event simulation of its shards, stages, slices and workers.

Input: shards, each a list of stages, each a list of slices with their work in core-seconds; and a `Cluster`. Output: a
`Forecast`. Times are seconds from the start of the run. Nothing is measured and nothing is run here.

The rules are those of `wsiflow.run.shards` and the executors. A shard's stages run one after another, shards side by
side; the slices of a stage start in the order given, as workers become free. Workers either live through the run
(``process`` and Dask: they start once, and load the network once) or are made for every slice (an array's element pays
for both). Where there are fewer cores than workers, those at work share them evenly.

A submission waits in the scheduler's queue once, for all of its slices: the elements of an array start in order. What
a lost worker had finished of its slice is kept, task by task, and the rest is submitted again.
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
        work_s: Core-seconds expected.
        tasks: Tasks it consists of, taken as equal; each is kept once it is done.
    """

    work_s: float
    tasks: int


class Step(NamedTuple):
    """What a shard does between two barriers: its part of a stage.

    Attributes:
        name: Its name.
        shares: Its slices, in the order in which they start.
        loads: Whether its tasks need the network.
        first_s: What a worker that lives through the run pays besides in the stage's first slices, such as other
            networks, or a network's first sight of each shape of block; for one that does not, ``load_s`` is all.
    """

    name: str
    shares: tuple[Share, ...]
    loads: bool = False
    first_s: float = 0.0


Shard = Sequence[Step]
"""Stages, one after another."""


Tasks = dict[str, dict[int, int]]
"""Tissue tiles of each task, by stage and place in it."""


class Sizes(NamedTuple):
    """How a slide of which only the tissue tiles are known is cut.

    Attributes:
        group_tiles: Tissue tiles of a group.
        part_tiles: Tissue tiles of a part.
    """

    group_tiles: int
    part_tiles: int


def slide_tasks(tiles: int, stages: Mapping[str, Unit], sizes: Sizes) -> dict[str, list[int]]:
    """Return the tissue tiles of each task of a slide, by stage.

    Args:
        tiles: Tissue tiles of the slide.
        stages: What one task of each stage works on, in the order of the line.
        sizes: How the slide is cut.
    """
    most = {"group": sizes.group_tiles, "part": sizes.part_tiles}
    return {name: _parts(tiles, most[unit]) if unit in most else [tiles] for name, unit in stages.items()}


def _parts(tiles: int, most: int) -> list[int]:
    """Return parts as equal as can be."""
    count = -(-tiles // most)
    return [tiles * (i + 1) // count - tiles * i // count for i in range(count)]


def numbered(slides: Sequence[Mapping[str, Sequence[int]]]) -> list[Tasks]:
    """Return the tasks of slides with their places in their stages: each stage counts through all slides."""
    counts: dict[str, int] = {}
    found = []
    for tasks in slides:
        places: Tasks = {}
        for stage, tiles in tasks.items():
            first = counts.get(stage, 0)
            counts[stage] = first + len(tiles)
            places[stage] = dict(enumerate(tiles, first))
        found.append(places)
    return found


def shard(slides: Sequence[Tasks], costs: Costs, *, loading: Collection[str], target_s: float) -> list[Step]:
    """Return a shard for `simulate`, cut into slices as a run cuts it.

    Args:
        slides: The tasks of its slides, stages in the order of the line.
        costs: What tasks cost.
        loading: Stages whose tasks need the network.
        target_s: Work of a slice, 0: every task is one.
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
    """Where a run is simulated.

    Attributes:
        workers: Slices under way at a time.
        fresh: A worker for every slice, as with arrays; else workers live through the run.
        cores: Cores that the workers share, 0: one for each.
        start_s: From the start of a worker to its first task: interpreter and imports.
        load_s: Loading the network, once for each worker that needs it.
        publish_s: Besides the work, for every task.
        spread: Standard deviation of a task's time over its mean; times are lognormal.
        queue_s: Mean wait of a submission in the scheduler's queue, or of a worker that lives; exponential.
        starts_per_s: Slices the scheduler starts in a second, 0: any number.
        poll_s: Time between two looks at what has ended, 0: it is known at once.
        array_limit: Most elements of an array, 0: there are no arrays.
        window: Most slices of a stage that are submitted at a time, 0: all.
        side_by_side: Most shards under way, 0: all.
        failure: Probability that a slice's worker is lost before its end, at any moment.
        limit_s: A worker that is made for a slice is ended after this time, 0: never.
        attempts: How often a slice is tried.
        seed: Of everything that is drawn.
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
    attempts: int = 5
    seed: int = 0


class Forecast(NamedTuple):
    """How a simulated run went.

    Attributes:
        makespan_s: From the start to the end of the last slice, as the driver sees it.
        work_s: Core-seconds of tasks that were kept.
        overhead_s: Core-seconds of starting workers and loading networks.
        lost_s: Core-seconds of tasks that had to be done again or never ended.
        tail_s: Seconds from when every worker was last at work to the end.
        queue_s: Mean seconds from submission to start.
        elements: Slices started, with every attempt.
        arrays: Arrays submitted.
        retried: Attempts that were lost.
        failed: Slices given up.
        cores: Cores there were.
        workers: Workers there were.
    """

    makespan_s: float
    work_s: float
    overhead_s: float
    lost_s: float
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
        """The share of the cores' time that went into work that was kept."""
        return self.work_s / (self.cores * self.makespan_s) if self.makespan_s else 1.0

    @property
    def waves(self) -> float:
        """Slices per worker."""
        return self.elements / self.workers


class _Attempt(NamedTuple):
    """One try at a slice: work as drawn, tasks that are left, and since when it has waited."""

    shard: int
    work_s: float
    tasks: int
    tries: int
    submitted_s: float


class _Running(NamedTuple):
    """An attempt on a worker: core-seconds before the work, work that will be kept, and what is left after it."""

    attempt: _Attempt
    worker: int
    before_s: float
    kept_s: float
    lost_s: float
    left: _Attempt | None


_NEW, _STARTED, _LOADED = range(3)


def simulate(shards: Sequence[Shard], cluster: Cluster) -> Forecast:
    """Simulate a run.

    Args:
        shards: What there is to do, in the order in which shards begin.
        cluster: Where.

    Returns:
        How it went; the same for the same seed.
    """
    return _Simulation(shards, cluster).run()


class _Simulation:
    """The state of a simulated run.

    Two clocks: ``now_s`` is time, ``turn_s`` the core-seconds each worker at work has been given so far. They run
    alike unless there are fewer cores than workers at work. Attempts end by the second, everything else by the first.
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
        self._known: list[set[str]] = [set() for _ in range(cluster.workers)]
        self._idle: tuple[list[int], list[int], list[int]] = ([], [], [])
        self._to_begin = deque(range(len(shards)))
        self._stage = [-1] * len(shards)
        self._held: list[deque[_Attempt]] = [deque() for _ in shards]
        self._open = [0] * len(shards)
        self._sums = {"work": 0.0, "overhead": 0.0, "lost": 0.0}
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
        return Forecast(
            makespan_s=self._now_s,
            work_s=self._sums["work"],
            overhead_s=self._sums["overhead"],
            lost_s=self._sums["lost"],
            tail_s=self._now_s - self._full_s,
            queue_s=self._waited_s / max(1, elements),
            **self._counts,
            cores=min(cluster.cores or cluster.workers, cluster.workers),
            workers=cluster.workers,
        )

    def _workers_arrive(self) -> None:
        """Have workers that live through the run wait for their place in the queue; slots are there at once."""
        for worker in reversed(range(self._cluster.workers)):
            if self._cluster.fresh or not self._cluster.queue_s:
                self._idle[_NEW].append(worker)
            else:
                self._at(self._wait_s(), worker)

    def _wait_s(self) -> float:
        return float(self._rng.exponential(self._cluster.queue_s)) if self._cluster.queue_s else 0.0

    def _at(self, then_s: float, event: object) -> None:
        heapq.heappush(self._events, (then_s, next(self._order), event))

    def _step(self) -> None:
        """Go on to the next thing that happens."""
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
        """Let the scheduler start again, take a worker that has arrived, a submission, or an end that is seen."""
        if event is None:
            self._gated = False
        elif isinstance(event, int):
            self._idle[_NEW].append(event)
        elif isinstance(event, list):
            self._ready.extend(event)
        elif isinstance(event, _Running):
            self._seen(event)

    def _begin_shard(self) -> None:
        if self._to_begin:
            self._advance(self._to_begin.popleft())

    def _advance(self, shard: int) -> None:
        """Submit the next stage of a shard that has any work, or begin another shard."""
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
        """Yield the attempts of a shard's stage; the draws depend on nothing that happened before."""
        number = self._stage[shard]
        shares = self._shards[shard][number].shares
        rng = np.random.default_rng([self._cluster.seed, 1, shard, number])
        factors = _factors(rng, np.array([share.tasks for share in shares]), self._cluster.spread)
        for share, factor in zip(shares, factors.tolist(), strict=True):
            work_s = share.work_s * factor + share.tasks * self._cluster.publish_s
            yield _Attempt(shard, work_s, share.tasks, 1, self._now_s)

    def _submit(self, shard: int, count: int) -> None:
        """Hand some of a stage's slices to the scheduler."""
        held = self._held[shard]
        batch = [held.popleft()._replace(submitted_s=self._now_s) for _ in range(min(count, len(held)))]
        if not batch:
            return
        if self._cluster.array_limit:
            self._counts["arrays"] += -(-len(batch) // self._cluster.array_limit)
        if self._cluster.fresh and self._cluster.queue_s:
            self._at(self._now_s + self._wait_s(), batch)
        else:
            self._ready.extend(batch)

    def _dispatch(self) -> None:
        """Start what can start, no faster than the scheduler does."""
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
        before_s = cluster.start_s if self._state[worker] == _NEW else 0.0
        before_s += cluster.load_s if stage.loads and self._state[worker] != _LOADED else 0.0
        before_s += stage.first_s if not cluster.fresh and stage.name not in self._known[worker] else 0.0
        self._known[worker].add(stage.name)
        self._state[worker] = _LOADED if stage.loads else max(self._state[worker], _STARTED)
        running = self._fate(attempt, worker, before_s)
        end = self._turn_s + before_s + running.kept_s + running.lost_s
        heapq.heappush(self._running, (end, next(self._order), running))
        self._counts["elements"] += 1
        self._waited_s += self._now_s - attempt.submitted_s
        if cluster.starts_per_s:
            self._gate_s = self._now_s + 1 / cluster.starts_per_s

    def _fate(self, attempt: _Attempt, worker: int, before_s: float) -> _Running:
        """Decide how far an attempt gets."""
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
        """Free a worker; a lost one is replaced by a new one."""
        if self._cluster.fresh or ended.left is not None:
            self._state[ended.worker] = _NEW
            self._known[ended.worker].clear()
        self._idle[self._state[ended.worker]].append(ended.worker)
        self._sums["work"] += ended.kept_s
        self._sums["overhead"] += ended.before_s
        self._sums["lost"] += ended.lost_s
        poll_s = self._cluster.poll_s
        if poll_s:
            self._at(max(self._now_s, math.ceil(self._now_s / poll_s) * poll_s), ended)
        else:
            self._seen(ended)

    def _seen(self, ended: _Running) -> None:
        """Go on after an end that the driver knows of."""
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
    """Return lognormal factors of mean 1; over several tasks their times even out."""
    variance = np.log1p((spread**2) / tasks)
    factors: NDArray[np.float64] = np.exp(np.sqrt(variance) * rng.standard_normal(len(tasks)) - variance / 2)
    return factors
