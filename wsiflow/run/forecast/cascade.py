"""Forecast a cascade: its first pass as any run, its own pass by the share of the tissue that it looks at.

That share is known only after the first pass. Before, it is a range: what the user says, or what the first pass leaves
of development slides whose scores are in the run's folder, or anything. A run without the first pass is planned in the
folder `WHOLE` of the run, to measure what the own pass costs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from wsiflow.heatmap import files
from wsiflow.model.cascade import CascadeParams
from wsiflow.plan import cascade
from wsiflow.run import first_pass
from wsiflow.run.config import RunConfig
from wsiflow.run.costs import Costs, StageCost
from wsiflow.run.forecast.forecast import TaskCounts, count_tasks_of_tiles
from wsiflow.run.plan import read_plan
from wsiflow.run.stages import certify, stitch
from wsiflow.system import publish

WHOLE = "whole"
"""Folder of the plan of a run without the first pass, in the run's folder."""

_HALOS = 2.0  # blocks around few places read and compute about twice the share of the cells, see docs/performance.md


class LookedAt(NamedTuple):
    """The share of the tissue's cells at which the own pass of a cascade looks, and where that is known from."""

    least: float
    most: float
    origin: str

    def shares_of_cost(self) -> tuple[float, float]:
        """Return the least and the most that this costs, as shares of a run without the first pass."""
        return self.least, min(1.0, _HALOS * self.most)


def without_first_pass(config: RunConfig) -> RunConfig:
    """Return the configuration of the run in `WHOLE`, which looks at all tissue."""
    inference = config.inference.model_copy(update={"cascade": CascadeParams()})
    return config.model_copy(update={"out": config.out / WHOLE, "inference": inference})


def looked_at(config: RunConfig, given: Sequence[float]) -> LookedAt:
    """Return at which share of the tissue the own pass of a cascade will look.

    Args:
        config: The configuration of the run.
        given: What the user says, one share or the least and the most; empty where nothing is said.
    """
    if given:
        return LookedAt(min(given), max(given), "as given with --looked-at")
    shares = _shares_of_development(config)
    if shares:
        return LookedAt(min(shares), max(shares), f"as on the development slides ({len(shares)})")
    return LookedAt(0.0, 1.0, "not known before the first pass: say what you expect with --looked-at")


def _shares_of_development(config: RunConfig) -> list[float]:
    """Return the share that is looked at of each development slide whose first scores are in the run's folder."""
    root, params = config.out / first_pass.DEVELOPMENT, config.inference.cascade
    plans = publish.generations(root, "plan.json")
    if params.threshold != "auto" or not plans or not (root / first_pass.THRESHOLD).exists():
        return []
    plan, threshold = read_plan(plans[-1]), first_pass.chosen_threshold(config.out)["threshold"]
    shares = []
    for index, planned in enumerate(plan.slides):
        path = root / stitch.STAGE.product_of(plan, index)
        if path.exists():
            heat, _ = files.read_heatmap(path)
            limits = {"threshold": threshold, "margin_um": params.margin_um}
            looked, known = cascade.looked_at(heat, planned.frame, planned.frame, **limits), np.isfinite(heat)
            shares.append(float((looked & known).sum() / max(1, known.sum())))
    return shares


def own_pass(config: RunConfig, whole: TaskCounts, costs: Costs, share: float) -> tuple[TaskCounts, Costs]:
    """Return the tasks of the own pass, and their costs: as many windows are certified again of what is passed over.

    Args:
        config: The configuration of the run.
        whole: The tasks of a run without the first pass.
        costs: What these cost.
        share: Share of their cost that the own pass has.
    """
    counts = count_tasks_of_tiles(config, [max(1, round(share * tiles)) for tiles in whole.tiles])
    one = costs.stages[certify.STAGE.name]
    twice = StageCost(2 * one.fixed_s - one.waited_s, 2 * one.unit_s, one.waited_s)
    return counts, costs._replace(stages={**costs.stages, certify.STAGE.name: twice})
