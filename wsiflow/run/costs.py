"""What tasks cost, and slices of them that are worth handing out.

A task costs a fixed part and a part for each tissue tile. Costs only decide which tasks travel together and in what
order; no published byte depends on them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from wsiflow.errors import InputError
from wsiflow.system import faults


class StageCost(NamedTuple):
    """Core-seconds of a stage's tasks: ``fixed_s`` for each, and ``unit_s`` for each of its tissue tiles."""

    fixed_s: float
    unit_s: float


class Costs(NamedTuple):
    """What the work costs on one core of one kind of machine.

    Attributes:
        start_s: From the start of a fresh worker to its first task: interpreter and imports.
        load_s: Loading the network, once for each worker that predicts.
        spread: Standard deviation of a task's seconds over what is expected of it.
        stages: Costs by stage.
    """

    start_s: float
    load_s: float
    spread: float
    stages: Mapping[str, StageCost]

    def task_s(self, stage: str, tiles: int) -> float:
        """Return the core-seconds of a task of ``tiles`` tissue tiles."""
        cost = self.stages[stage]
        return cost.fixed_s + cost.unit_s * tiles


def slices(tasks: Sequence[int], costs_s: Sequence[float], *, target_s: float) -> list[tuple[int, int]]:
    """Cut tasks into slices of about so much work, the largest first.

    Args:
        tasks: Indices, rising.
        costs_s: Seconds of each.
        target_s: What a slice should hold; a dearer task is a slice of its own. 0: every task is.

    Returns:
        Half-open ranges that together hold each index once. A slice never spans an index that is not there.
    """
    found = list(_runs(tasks, costs_s, target_s))
    found.sort(key=lambda item: -item[0])  # stable: among equals the order of the tasks
    return [span for _, span in found]


def _runs(tasks: Sequence[int], costs_s: Sequence[float], target_s: float) -> Iterator[tuple[float, tuple[int, int]]]:
    """Yield cost and range of each slice, in the order of the tasks."""
    held, lo, hi = 0.0, 0, 0
    for index, cost in zip(tasks, costs_s, strict=True):
        if hi > lo and (index != hi or held + cost > target_s):
            yield held, (lo, hi)
            held, lo, hi = 0.0, index, index
        elif hi == lo:
            lo = hi = index
        held, hi = held + cost, index + 1
    if hi > lo:
        yield held, (lo, hi)


def costs_of(root: Path, rough: Costs) -> Costs:
    """Return what tasks cost here, as it was measured in this folder; rough values where it was not."""
    path = root / COSTS
    return read_costs(path, rough) if path.exists() else rough


def read_costs(path: Path, rough: Costs) -> Costs:
    """Read measured costs.

    Raises:
        InputError: The file holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        measured = {stage: StageCost(**cost) for stage, cost in found.pop("stages").items()}
        return Costs(**found, stages={**rough.stages, **measured})
    except OSError as error:
        raise faults.unreadable(error, "it", "give a costs.json of wsiflow", path=path) from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"it holds no costs ({error!r})", "give a costs.json of wsiflow", path=path) from error


#: Name of the result, relative to the run's folder.
COSTS = "costs.json"


def first_of(stage: str) -> str:
    """Return the name under which costs hold what a worker's first task of a stage takes besides."""
    return f"first {stage}"
