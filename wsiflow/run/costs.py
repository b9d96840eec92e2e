"""The costs of tasks, and slices of tasks of about equal cost.

The cost of a task has a fixed part and a part for each tissue tile. Costs only decide which tasks form a slice, and in
what order slices are started; no published byte depends on them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from wsiflow.errors import InputError
from wsiflow.system import faults


class StageCost(NamedTuple):
    """The time that a worker spends on a stage's tasks.

    Attributes:
        fixed_s: Seconds for each task.
        unit_s: Core-seconds for each of its tissue tiles.
        waited_s: How much of ``fixed_s`` the task waits for disks; the rest are core-seconds.
    """

    fixed_s: float
    unit_s: float
    waited_s: float = 0.0

    def core_s(self, tiles: float) -> float:
        """Return the core-seconds of a task of ``tiles`` tissue tiles."""
        return self.fixed_s - self.waited_s + self.unit_s * tiles


class Basis(NamedTuple):
    """What costs were measured on.

    Attributes:
        slides, blocks: Number of slides, and of their blocks.
        megapixels: Pixels of these blocks, halo included.
        least, most: Core-seconds of the cheapest and of the dearest group, divided by those that its costs say.
        cpu: Model of the processor.
    """

    slides: int
    blocks: int
    megapixels: float
    least: float
    most: float
    cpu: str


class Costs(NamedTuple):
    """The costs on one core of one kind of machine.

    Attributes:
        start_s: Seconds from the start of a worker process to its first task, for the interpreter and imports.
        load_s: Seconds for loading the network, once in each worker that predicts.
        spread: Standard deviation of the seconds of a task, relative to the expected seconds.
        stages: Costs by stage.
        basis: What they were measured on; None where that is not known.
    """

    start_s: float
    load_s: float
    spread: float
    stages: Mapping[str, StageCost]
    basis: Basis | None = None

    def task_s(self, stage: str, tiles: int) -> float:
        """Return the seconds that a worker spends on a task of ``tiles`` tissue tiles."""
        cost = self.stages[stage]
        return cost.fixed_s + cost.unit_s * tiles

    def once_s(self) -> dict[str, float]:
        """Return the seconds that each worker spends once, by what it spends them on."""
        first_s = sum(cost.fixed_s for name, cost in self.stages.items() if name.startswith(first_of("")))
        return {"start": self.start_s, "network": self.load_s, "first blocks": first_s}


def slices(tasks: Sequence[int], costs_s: Sequence[float], *, target_s: float) -> list[tuple[int, int]]:
    """Cut tasks into slices that cost about ``target_s`` each, the most expensive slice first.

    Args:
        tasks: Indices of tasks, in rising order.
        costs_s: Core-seconds of each task.
        target_s: Core-seconds of a slice; a more expensive task is a slice of its own. 0: every task is.

    Returns:
        Half-open ranges that together contain each of the tasks once, and no other index.
    """
    runs = list(_runs(tasks, costs_s, target_s))
    runs.sort(key=lambda item: -item[0])  # the sort is stable: slices of equal cost keep the order of the tasks
    return [span for _, span in runs]


def _runs(tasks: Sequence[int], costs_s: Sequence[float], target_s: float) -> Iterator[tuple[float, tuple[int, int]]]:
    """Yield the cost and the range of each slice, in the order of the tasks."""
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
    """Return the costs that were measured in a run's folder, or the rough ones where none were measured."""
    path = root / COSTS
    return read_costs(path, rough) if path.exists() else rough


def read_costs(path: Path, rough: Costs) -> Costs:
    """Read measured costs; stages that were not measured have their rough costs.

    Raises:
        InputError: The file cannot be read, or does not hold costs.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        measured = {stage: StageCost(**cost) for stage, cost in values.pop("stages").items()}
        basis = Basis(**found) if (found := values.pop("basis", None)) else None
        return Costs(**values, stages={**rough.stages, **measured}, basis=basis)
    except OSError as error:
        raise faults.unreadable(error, "it", "give a costs.json of wsiflow", path=path) from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"it holds no costs ({error!r})", "give a costs.json of wsiflow", path=path) from error


#: Name of the file of measured costs, relative to the run's folder.
COSTS = "costs.json"


def first_of(stage: str) -> str:
    """Return the name of the cost that the first task of a stage in a worker has in addition."""
    return f"first {stage}"
