"""What a run is foretold to take: calibration on a few blocks, counts, and the command ``wsiflow plan``."""

import json
from pathlib import Path

import pytest

from flows import run as command
from wsiflow import executor, ingest, measure, plan, publish, shards
from wsiflow.executor import ExecutorParams

COARSE = ["inference.stride=112", "dense.windows=40", "executor=inline", "orchestrator=none", "tracking=off"]


def over(manifest: Path, out: Path, *more: str) -> list[str]:
    return ["dataset=manifest", f"dataset.manifest={manifest}", f"out={out}", *COARSE, *more]


@pytest.fixture(scope="module")
def calibrated(small_slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder that holds a plan and measured costs, and nothing else."""
    out = tmp_path_factory.mktemp("calibrated") / "run"
    config = command.compose_config(over(small_slides, out))
    cases = shards.begin(config)
    with executor.make(config.executor, cores=1, root=out) as pool:
        shards.choose(pool, cases)
        outcomes = shards.ingest_shard(pool, cases, range(6))
        plan_path = ingest.make_plan(cases, outcomes)
        [measured] = pool.run(shards.steps.run_slice, plan_path, "measure", [executor.Slice(0, 1)])
    assert measured.receipt, measured.error
    return out


def test_costs_are_measured_for_every_stage_of_the_run(calibrated: Path) -> None:
    """Starting, loading and each stage take some time, prediction more for more tiles; the run uses these costs."""
    costs = shards.costs_of(calibrated)
    print(costs)
    assert 0.05 < costs.start_s < 60
    assert 0 < costs.load_s < 60
    assert 0 <= costs.spread < 3
    written = json.loads((calibrated / measure.COSTS).read_text())["stages"]
    assert set(written) == {"ingest", "extract", "index", "predict", "certify", "stitch", "detect"}
    assert costs.stages["predict"].unit_s > 0
    assert all(cost["fixed_s"] >= 0 and cost["unit_s"] >= 0 for cost in written.values())


def test_nothing_but_the_costs_is_left_behind(calibrated: Path) -> None:
    """No file of the few blocks stays: the run's own stages are still to be done."""
    assert not list((calibrated / publish.ATTEMPTS).glob("costs_*"))
    assert not (calibrated / "predictions").exists()
    made = plan.read(calibrated / "plan.json")
    assert shards.ledger(calibrated, made).published == 0
