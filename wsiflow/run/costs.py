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


# Of GoogLeNet at stride 16 in fp32 on one Zen 4 core. Measured: a tile of extract and of predict, and a certificate
# (docs/performance.md). The rest is assumed, on the cautious side: start and load are at the upper end of what was seen
# (docs/scaling.md, X3b), and what a task costs besides its tiles is what the demo's slides take.
ROUGH = Costs(
    start_s=4.0,
    load_s=3.0,
    spread=0.2,
    stages={
        "ingest": StageCost(2.0, 0.0),
        "stain": StageCost(2.0, 0.0),
        "extract": StageCost(0.04, 0.0015),
        "index": StageCost(0.05, 0.0),
        "predict": StageCost(0.2, 0.067),
        "certify": StageCost(7.5, 0.0),
        "stitch": StageCost(0.5, 0.0005),
        "detect": StageCost(1.0, 0.0005),
    },
)


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


def costs_of(root: Path) -> Costs:
    """Return what tasks cost here, as it was measured in this folder; rough values where it was not."""
    path = root / COSTS
    return read_costs(path) if path.exists() else ROUGH


def read_costs(path: Path) -> Costs:
    """Read measured costs.

    Raises:
        InputError: The file holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        measured = {stage: StageCost(**cost) for stage, cost in found.pop("stages").items()}
        return Costs(**found, stages={**ROUGH.stages, **measured})
    except OSError as error:
        raise faults.unreadable(error, "it", "give a costs.json of wsiflow", path=path) from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"it holds no costs ({error!r})", "give a costs.json of wsiflow", path=path) from error


#: Name of the result, relative to the run's folder.
COSTS = "costs.json"


def first_of(stage: str) -> str:
    """Return the name under which costs hold what a worker's first task of a stage takes besides."""
    return f"first {stage}"
