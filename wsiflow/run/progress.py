"""Report the progress of a run: how much is done, how fast, and how long the rest will take.

Everything is read from the files of the run's folder, so that any process can ask. Published files show what is done,
and the log of attempts shows how fast. Tasks are weighted by their costs, as they were measured in the folder or by
rough values, to compare what is left with what was done over the last minutes.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from wsiflow.run import first_pass, trace
from wsiflow.run import plan as plans
from wsiflow.run.cases import read_cases
from wsiflow.run.costs import Costs, costs_of
from wsiflow.run.executor import waiting
from wsiflow.run.plan import Plan
from wsiflow.run.stages import ingest, predict
from wsiflow.run.stages.line import LOADING, ROUGH, STAGES, Census, ingested
from wsiflow.system import publish
from wsiflow.system.usage import now

_WINDOW_S = 300.0  # over which a speed is averaged
_STALE_S = 900.0  # so long after the last task ended, the speed is unknown
_TICK_S = 0.001  # resolution of the times in the log of attempts
_SCORING = predict.STAGE.name
_MINUTE_S, _HOUR_S, _DAY_S = 60.0, 3600.0, 86400.0


class Snapshot(NamedTuple):
    """The progress of a run at one moment.

    Attributes:
        stages: Numbers of published and of planned tasks by stage; before there is a plan, the numbers of ingested and
            of listed slides as ``ingest``.
        slides: Numbers of finished and of planned slides.
        tiles: Numbers of scored and of planned tissue tiles.
        share: Share of the planned work that is done, weighted by the costs of tasks, 0 to 1.
        tiles_per_s: Tissue tiles that were scored per second over the last minutes; None where unknown.
        left_s: Seconds until the rest is done at the speed of the last minutes; None where unknown.
        elements: What waits and runs in the queue of a scheduler, in words; empty without array jobs.
        which: Name of the first pass that this is the progress of; empty where it is that of the run itself.
    """

    stages: Mapping[str, tuple[int, int]]
    slides: tuple[int, int] = (0, 0)
    tiles: tuple[int, int] = (0, 0)
    share: float = 0.0
    tiles_per_s: float | None = None
    left_s: float | None = None
    elements: str = ""
    which: str = ""

    def as_text(self) -> str:
        """Return the progress in one line: ``12 of 40 slides, 1,203 of 4,000 tiles, 85 tiles/s, about 32 min left``.

        That of a first pass has its name in front.
        """
        return f"{self.which}: {self._counts()}" if self.which else self._counts()

    def _counts(self) -> str:
        if not self.slides[1]:
            parts = [f"{stage} {_of(counts)} slides" for stage, counts in self.stages.items()]
            return "; ".join(filter(None, (", ".join(parts), self.elements)))
        parts = [f"{_of(self.slides)} slides", f"{_of(self.tiles)} tiles"]
        if self.tiles_per_s is not None:
            parts.append(f"{self.tiles_per_s:,.{0 if self.tiles_per_s >= 10 else 1}f} tiles/s")
        if self.left_s:
            parts.append(f"about {_duration(self.left_s)} left")
        return "; ".join(filter(None, (", ".join(parts), self.elements)))


def _of(counts: tuple[int, int]) -> str:
    return f"{counts[0]:,} of {counts[1]:,}"


def _duration(seconds: float) -> str:
    """Return a duration as text, in seconds, minutes, hours or days as fits."""
    if seconds < 2 * _MINUTE_S:
        return f"{max(1, round(seconds))} s"
    if seconds < 2 * _HOUR_S:
        return f"{round(seconds / _MINUTE_S)} min"
    if seconds < 2 * _DAY_S:
        return f"{seconds / _HOUR_S:.1f} h"
    return f"{seconds / _DAY_S:.1f} days"


def snapshot(root: Path, plan: Plan, since: str | None) -> Snapshot:
    """Return the progress of a run that has a plan.

    Args:
        root: The run's folder.
        plan: The plan.
        since: When the driver of the run started, as a time of the log of attempts; None where no driver runs: the
            speed is then unknown.
    """
    planned = _Planned(root, plan)
    if since is not None:
        planned.add(trace.LogReader(root).rows(), since)
    return planned.snapshot(time.time())


class Follower:
    """Follows the progress of a running run; what was complete is not counted again."""

    def __init__(self, root: Path) -> None:
        """Begin now; earlier attempts do not count for the speed."""
        self._root, self._since = root, now()
        self._follow(root)

    def _follow(self, folder: Path) -> None:
        self._folder, self._log = folder, trace.LogReader(folder)
        self._planned: _Planned | None = None
        self._path: Path | None = None

    def snapshot(self) -> Snapshot | None:
        """Return the progress by now, that of a first pass while it runs; None where the slides are not listed yet."""
        if (folder := first_pass.folder_at_work(self._root)) != self._folder:
            self._follow(folder)
        files = publish.generations(folder, "plan.json")
        if not files:
            return self._before_plan()
        if self._planned is None or files[-1] != self._path:  # the plan has a new generation where a slide joins
            self._path, self._planned = files[-1], _Planned(folder, plans.read_plan(files[-1]))
        self._planned.add(self._log.rows(), self._since)
        return self._planned.snapshot(time.time())._replace(elements=waiting.text(self._root))

    def _before_plan(self) -> Snapshot | None:
        source = ingest.newest_cases(self._folder)
        if source is None:
            return None
        slides = [case.slide_id for case in read_cases(source)[1]]
        counts = {"ingest": (ingested(self._folder, slides), len(slides))}
        return Snapshot(counts, elements=waiting.text(self._root), which=first_pass.name_of(self._folder))


class _EndedTask(NamedTuple):
    """A task that ended well: its begin and end (Unix time), its stage and the index of its slide."""

    began_s: float
    ended_s: float
    stage: str
    slide: int


class _Planned:
    """The counts and the attempts of a run with a plan."""

    def __init__(self, root: Path, plan: Plan) -> None:
        self._root, self._plan, self._census = root, plan, Census(root, plan)
        self._places = {planned.slide_id: index for index, planned in enumerate(plan.slides)}
        self._sums = {
            stage: (sum(slides.values()), sum(plan.slides[slide].n_tiles for slide in slides))
            for stage, slides in self._census.planned.items()
        }
        self._failed: set[int] = set()  # slides that are given up until the run is started again
        self._attempts: list[_EndedTask] = []

    def add(self, rows: Iterable[Mapping[str, Any]], since: str) -> None:
        """Add rows of the log of attempts; those of attempts before ``since`` are ignored."""
        for row in rows:
            slide = self._places.get(row["slide"], -1)
            if slide not in self._census.planned.get(row["stage"], {}):
                continue
            if (row.get("started") or row.get("submitted", "")) < since:
                continue
            if row["error"]:
                self._failed.add(slide)
            elif row["exit_class"] == "ok":
                began_s, ended_s = (datetime.fromisoformat(row[name]).timestamp() for name in ("started", "ended"))
                self._attempts.append(_EndedTask(began_s, ended_s, row["stage"], slide))
        begin_s = max((one.ended_s for one in self._attempts), default=0.0) - _WINDOW_S
        self._attempts = [one for one in self._attempts if one.ended_s > begin_s]

    def snapshot(self, now_s: float) -> Snapshot:
        """Return the progress from what is published by now."""
        stages, costs, slides = self._census.count(), costs_of(self._root, ROUGH), self._plan.slides
        missing = self._census.missing
        unfinished = {slide for name in missing if not STAGES[name].serves_scores for slide in missing[name]}
        n_tiles = sum(planned.n_tiles for planned in slides)
        unscored = sum(self._tiles(_SCORING, *one) for one in missing.get(_SCORING, {}).items())
        undone = self._seconds_missing(costs)
        left_s = sum(seconds for slide, seconds in undone.items() if slide not in self._failed)
        tiles_per_s, speed = self._speeds(costs, now_s)
        return Snapshot(
            stages,
            (len(slides) - len(unfinished), len(slides)),
            (n_tiles - round(unscored), n_tiles),
            max(0.0, 1 - sum(undone.values()) / self._seconds_planned(costs)),
            tiles_per_s,
            left_s / speed if speed else None,
            which=first_pass.name_of(self._root),
        )

    def _tiles(self, stage: str, slide: int, tasks: int) -> float:
        """Return the approximate number of tissue tiles that ``tasks`` tasks of a slide work on."""
        return self._plan.slides[slide].n_tiles * tasks / self._census.planned[stage][slide]

    def _seconds(self, costs: Costs, stage: str, slide: int, tasks: int) -> float:
        """Return the expected core-seconds of ``tasks`` tasks of a slide."""
        cost = costs.stages[stage]
        return cost.fixed_s * tasks + cost.unit_s * self._tiles(stage, slide, tasks)

    def _seconds_planned(self, costs: Costs) -> float:
        """Return the expected core-seconds of all planned tasks; 1 where there are none, so that shares are defined."""
        sums = ((costs.stages[stage], *counts) for stage, counts in self._sums.items())
        return sum(cost.fixed_s * tasks + cost.unit_s * tiles for cost, tasks, tiles in sums) or 1.0

    def _seconds_missing(self, costs: Costs) -> dict[int, float]:
        """Return the expected core-seconds of missing tasks by slide; pixels are counted only for missing scores."""
        missing, seconds = self._census.missing, defaultdict[int, float](float)
        unscored = {slide for name in missing.keys() & LOADING for slide in missing[name]}
        for stage, slides in missing.items():
            for slide, tasks in slides.items():
                if slide in unscored or not STAGES[stage].serves_scores:
                    seconds[slide] += self._seconds(costs, stage, slide, tasks)
        return seconds

    def _speeds(self, costs: Costs, now_s: float) -> tuple[float | None, float]:
        """Return tiles per second (None where unknown) and core-seconds of ended tasks per second, recently."""
        latest_s = max((one.ended_s for one in self._attempts), default=0.0)
        if now_s - latest_s > _STALE_S:
            return None, 0.0
        scoring = [one for one in self._attempts if one.stage == _SCORING]
        tiles = sum(self._tiles(one.stage, one.slide, 1) for one in scoring)
        done_s = sum(self._seconds(costs, one.stage, one.slide, 1) for one in self._attempts)
        return tiles / _span_s(scoring) if scoring else None, done_s / _span_s(self._attempts)


def _span_s(attempts: Sequence[_EndedTask]) -> float:
    """Return the seconds from the first begin of some attempts to the last end, at most `_WINDOW_S`."""
    span_s = max(one.ended_s for one in attempts) - min(one.began_s for one in attempts)
    return min(_WINDOW_S, max(_TICK_S, span_s))
