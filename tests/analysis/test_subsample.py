"""A coarse map from a fine run equals that of a coarse run: to the bit for windows, up to rounding for dense maps."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_runs import over

from flows import cli, compose, line
from wsiflow.heatmap import assembly, files
from wsiflow.model.choice import reason_scores_differ
from wsiflow.run.plan import latest_plan

DENSE = ["inference.engine=dense", "dataset.limit=1"]


@pytest.fixture(scope="module")
def folder_of(tiny_slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of a run with some settings, which is run once for all tests."""

    @functools.cache
    def folder(*settings: str) -> Path:
        out = tmp_path_factory.mktemp("run")
        assert line.direct(compose.compose_config(over(tiny_slides, out, "store=none", *settings))).exit_code == 0
        return out

    return folder


@pytest.mark.parametrize(
    ("how", "fine", "coarse", "atol"),
    [
        (["inference.engine=window"], 32, 224, 0.0),
        (DENSE, 8, 56, 1e-5),
        (["geometry=reference", "tiles=patch", "dataset.limit=1"], 28, 56, 1e-5),
    ],
)
def test_a_coarse_map_need_not_be_computed(
    folder_of: Callable[..., Path], how: list[str], fine: int, coarse: int, atol: float
) -> None:
    """X8: cells, tissue and scores equal those of the coarse run."""
    runs = {stride: folder_of(*how, f"inference.stride={stride}") for stride in (fine, coarse)}
    plans = {stride: latest_plan(out) for stride, out in runs.items()}
    assert reason_scores_differ(*(plan.settings.choice for plan in plans.values())) == ""
    seen = 0
    for one, other in zip(plans[fine].slides, plans[coarse].slides, strict=True):
        maps = [files.read_heatmap(out / f"heatmaps/{one.slide_id}.tif")[0] for out in runs.values()]
        taken = assembly.subsample(maps[0], one.frame, other.frame)
        np.testing.assert_allclose(taken, maps[1], rtol=0, atol=atol)
        seen += int(np.isfinite(taken).sum())
    assert seen > 4


def test_a_run_scored_at_a_coarser_stride_equals_the_run_at_that_stride(
    folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    """`wsiflow subsample` gives the detections and scores of a coarse run."""
    fine, coarse = (folder_of("inference.engine=window", f"inference.stride={stride}") for stride in (32, 224))
    assert cli.main(["subsample", str(fine), "--stride", "224", "--out", str(tmp_path / "coarse")]) == 0
    taken = tmp_path / "coarse/stride=224"
    for slide in ("a", "b"):
        name = f"detections/{slide}.csv"
        assert (taken / name).read_bytes() == (coarse / name).read_bytes()
    found, expected = (json.loads((at / "evaluation/summary.json").read_text()) for at in (taken, coarse))
    assert found.items() <= expected.items()
    assert "throughput.core_hours" not in found  # nobody has measured it
    arguments = ["compare", str(fine), str(taken), "--out", str(tmp_path / "compared"), "--bootstrap", "20"]
    assert cli.main(arguments) == 0
    table = (tmp_path / "compared/compare.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table[1:]] == ["stride=32", "stride=224"]


@pytest.mark.parametrize(
    ("stride", "reason"),
    [(64, "does not divide the tile"), (16, "centres lie between"), (28, "is not a multiple of")],
)
def test_a_stride_that_has_other_windows_is_refused(
    folder_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], stride: int, reason: str
) -> None:
    """The refusal is one line, before anything is written."""
    fine = folder_of(*DENSE, "inference.stride=8")
    assert cli.main(["subsample", str(fine), "--stride", f"{stride}", "--out", str(tmp_path / "x")]) == 20
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert reason in said
    assert not (tmp_path / "x").exists()
