"""A coarse map taken from a fine run is that of a coarse run: to the bit for windows, to rounding for dense maps."""

from pathlib import Path

import numpy as np
import pytest
from test_line import over

from flows import pipeline, run
from wsiflow import heatmap, plan, pyramid
from wsiflow.model.choice import Choice, alike


def finished(manifest: Path, out: Path, *more: str) -> plan.Plan:
    assert pipeline.direct(run.compose_config(over(manifest, out, "store=none", *more))).exit_code == 0
    return plan.latest(out)


@pytest.mark.parametrize(
    ("how", "fine", "coarse", "atol"),
    [
        (["inference.engine=window"], 32, 224, 0.0),
        (["inference.engine=dense"], 8, 56, 1e-5),
        (["geometry=reference", "tiles=patch"], 28, 56, 1e-5),
    ],
)
def test_a_coarse_map_need_not_be_computed(
    tiny_slides: Path, tmp_path: Path, how: list[str], fine: int, coarse: int, atol: float
) -> None:
    """X8: the cells, what is tissue among them, and the scores."""
    runs = {stride: tmp_path / str(stride) for stride in (fine, coarse)}
    plans = {s: finished(tiny_slides, out, *how, f"inference.stride={s}") for s, out in runs.items()}
    assert alike(*(Choice(**made.work["choice"]) for made in plans.values())) == ""
    seen = 0
    for one, other in zip(plans[fine].slides, plans[coarse].slides, strict=True):
        maps = [pyramid.read_heatmap(out / f"heatmaps/{one.slide_id}.tif")[0] for out in runs.values()]
        taken = heatmap.subsample(maps[0], one.frame, other.frame)
        np.testing.assert_allclose(taken, maps[1], rtol=0, atol=atol)
        seen += int(np.isfinite(taken).sum())
    assert seen > 4
