"""Throughput and cost: which receipts count, sums that agree, and undefined rates."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsiflow.run.results import cost

NO_TIME = dict.fromkeys(cost.STEPS, 0.0)


def receipt(kind: str = "prediction", **given: Any) -> dict[str, Any]:
    """Return a receipt of 120 tiles and 40 CPU seconds, with changes."""
    return {
        "kind": kind,
        "slide": "s1",
        "group": 1,
        "host": "node1",
        "counts": {"tiles": 120, "windows": 23520},
        "seconds": {"read": 10.0, "infer": 30.0},
        "cpu_s": 40.0,
        "wall_s": 41.0,
        "started": "2026-11-23T10:00:00.000+00:00",
        "ended": "2026-11-23T10:00:41.000+00:00",
        **given,
    }


def test_rates_of_one_prediction() -> None:
    """Every metric equals its definition by hand."""
    metrics = cost.summarise([receipt()], run_wall_s=60.0, workers=2, tile_mm2={"s1": 0.003})
    assert metrics == pytest.approx(
        {
            "throughput.tiles_per_s": 2.0,
            "throughput.windows_per_s": 392.0,
            "throughput.core_seconds_per_tile": 1 / 3,
            "throughput.core_hours": 1 / 90,
            "throughput.mm2_per_core_hour": 32.4,
            "throughput.wall_s": 60.0,
            "throughput.efficiency": 1 / 3,
            "cost.read_core_s": 10.0,
            "cost.stain_core_s": 0.0,
            "cost.infer_core_s": 30.0,
            "cost.certify_core_s": 0.0,
            "cost.write_core_s": 0.0,
            "cost.stitch_core_s": 0.0,
        }
    )


def test_extraction_costs_but_adds_no_tiles() -> None:
    """A tile that was extracted and predicted counts once and costs both."""
    extracted = receipt("patches", seconds={"read": 5.0, "write": 15.0}, cpu_s=20.0)
    metrics = cost.summarise([extracted, receipt()], run_wall_s=60.0, workers=1, tile_mm2={"s1": 1.0})
    assert metrics["throughput.tiles_per_s"] == 2.0
    assert metrics["throughput.core_seconds_per_tile"] == 0.5
    assert metrics["throughput.efficiency"] == 1.0


def test_nothing_executed_is_unknown_speed() -> None:
    """A run of cached work has NaN for speed and 0 for cost."""
    metrics = cost.summarise([], run_wall_s=3.0, workers=2, tile_mm2={})
    assert math.isnan(metrics["throughput.core_seconds_per_tile"])
    assert math.isnan(metrics["throughput.mm2_per_core_hour"])
    assert metrics["throughput.core_hours"] == 0.0
    assert metrics["throughput.efficiency"] == 0.0


def test_a_slide_without_a_tile_area_is_refused() -> None:
    """A missing area is an error of the caller, not 0 mm2."""
    with pytest.raises(KeyError, match="s1"):
        cost.summarise([receipt()], run_wall_s=1.0, workers=1, tile_mm2={})


def test_tile_area_of_the_reference() -> None:
    """A tile of 224 px at 0.243 um/px is 54.432 um a side."""
    assert cost.tile_area_mm2(224, 0.243) == pytest.approx(0.054432**2)


@given(
    st.lists(
        st.builds(
            lambda cpu_s, seconds: receipt(cpu_s=cpu_s, seconds=seconds),
            st.floats(0, 1e6),
            st.fixed_dictionaries({step: st.floats(1e-3, 1e6) for step in cost.STEPS}),
        )
    )
)
def test_the_split_adds_up(receipts: list[dict[str, Any]]) -> None:
    """The steps' core-seconds add up to the busy core-seconds of the run."""
    split = cost.step_core_seconds(receipts)
    assert sum(split.values()) == pytest.approx(sum(r["cpu_s"] for r in receipts))


def test_a_receipt_without_steps_belongs_to_none() -> None:
    """CPU time without timed steps is assigned to no step."""
    assert cost.step_core_seconds([receipt("tissue", seconds={})]) == NO_TIME


def test_seconds_by_slide_are_sums() -> None:
    """Two groups of a slide add up, another slide stays apart."""
    rows = cost.seconds_by_slide([receipt(), receipt(group=2), receipt(slide="s2", seconds={"stitch": 4.0})])
    assert rows["s1"]["seconds_infer"] == 60.0
    assert rows["s1"]["seconds_cpu"] == 80.0
    assert rows["s2"]["seconds_stitch"] == 4.0
    assert list(rows["s1"]) == list(rows["s2"])
