"""Forecasts of what a run takes: calibration on a few blocks, counts, and the command ``wsiflow plan``."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from small_runs import over

from flows import compose as command
from flows.__main__ import main
from wsiflow.run import executor, shards
from wsiflow.run.costs import COSTS, Basis, costs_of
from wsiflow.run.executor import protocol
from wsiflow.run.forecast.forecast import core_hours_between
from wsiflow.run.plan import latest_plan
from wsiflow.run.stages import ingest, measure
from wsiflow.run.stages.line import ROUGH, STAGES
from wsiflow.system import publish


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
        [measured] = pool.run(shards.work.run_slice, plan_path, "measure", [protocol.Slice(0, 1)])
    assert measured.receipt, measured.failure
    return out


def test_costs_are_measured_for_every_stage_of_the_run(calibrated: Path) -> None:
    """Starting, loading and each stage take some time, prediction more for more tiles; the run uses these costs."""
    costs = costs_of(calibrated, ROUGH)
    assert 0.05 < costs.start_s < 600
    assert 0 < costs.load_s < 600
    assert 0 <= costs.spread < 3
    written = json.loads((calibrated / COSTS).read_text())["stages"]
    assert set(written) == {
        "ingest",
        "extract",
        "index",
        "predict",
        "first predict",
        "certify",
        "first certify",
        "stitch",
        "detect",
    }
    assert costs.stages["predict"].fixed_s + costs.stages["predict"].unit_s > 0
    assert all(cost["fixed_s"] >= 0 and cost["unit_s"] >= 0 for cost in written.values())


def test_core_hours_are_those_of_the_run_within_the_range_that_is_told(
    small_slides: Path, calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The estimate is the measured rate times the pixels of the plan, without what tasks wait; its basis is told."""
    report, costs = tmp_path / "report.json", costs_of(calibrated, ROUGH)
    assert main(["plan", *over(small_slides, calibrated), "--json", str(report)]) == 0
    plan, told, basis = latest_plan(calibrated), json.loads(report.read_text()), costs.basis
    assert basis is not None
    assert told["measured_on"] == basis._asdict()
    assert (basis.slides, basis.least <= basis.most) == (2, True)
    assert told["megapixels"] == pytest.approx(sum(measure.areas_px(calibrated, plan)) / 1e6)
    predict, tiles = costs.stages["predict"], sum(slide.n_tiles for slide in plan.slides)
    core_s = (predict.fixed_s - predict.waited_s) * plan.n_groups + predict.unit_s * tiles
    assert told["core_hours"]["predict"] * 3600 == pytest.approx(core_s)
    total, (least, most) = sum(told["core_hours"].values()), told["core_hours_between"]
    assert least < 0.71 * total
    assert most > 1.29 * total
    output = capsys.readouterr().out
    assert f"core-hours to do: {total:.3g}, between {least:.3g} and {most:.3g}" in output
    assert f"measured on {basis.blocks} blocks of 2 slides" in output
    assert "not in it: what each worker spends once (start " in output
    firsts = costs.stages["first predict"].fixed_s + costs.stages["first certify"].fixed_s
    assert told["worker_once_s"] == {"start": costs.start_s, "network": costs.load_s, "first blocks": firsts}


def test_the_range_holds_the_groups_that_were_measured() -> None:
    """It is that of the cheapest and the dearest of them for scores, and three tenths for all else, at least."""
    hours = {"predict": 10.0, "certify": 1.0}
    wide = Basis(slides=2, blocks=10, megapixels=30.0, least=0.6, most=1.5, cpu="")
    assert core_hours_between(hours, wide) == pytest.approx((6.7, 16.3))
    assert core_hours_between(hours, wide._replace(least=0.99, most=1.01)) == pytest.approx((7.7, 14.3))


def test_nothing_but_the_costs_is_left_behind(calibrated: Path) -> None:
    """Calibration leaves no file of its blocks, so that all stages of the run are still to do."""
    assert not list((calibrated / publish.ATTEMPTS).glob("costs_*"))
    assert not (calibrated / "predictions").exists()
    assert not list((calibrated / publish.RECEIPTS / "predictions").glob("*"))


def test_a_plan_foretells_what_the_run_does(small_slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The run uses the published plan, runs exactly the tasks that were counted, and leaves nothing to do."""
    out, report = tmp_path / "run", tmp_path / "report.json"
    arguments = over(small_slides, out, "dataset.limit=4")
    assert main(["plan", *arguments, "--workers", "1,2,40", "--scheduler", "slurm", "--json", str(report)]) == 0
    output = capsys.readouterr().out
    assert "slides: 4 planned, 0 rejected" in output
    assert "rough values" in output
    before = json.loads(report.read_text())
    assert [one["workers"] for one in before["forecasts"]] == [1, 2, 40]
    assert before["forecasts"][0]["makespan_s"] > before["forecasts"][2]["makespan_s"]
    published = (out / "plan.json").read_bytes()
    assert main(["run", *arguments]) == 0
    assert (out / "plan.json").read_bytes() == published
    assert not (out / "plan.2.json").exists()
    with (out / "trace.csv").open(newline="") as stream:
        done = Counter(row["stage"] for row in csv.DictReader(stream))
    assert {stage: done[stage] for stage in before["tasks"]} == before["tasks"]
    assert main(["plan", *arguments, "--json", str(report)]) == 0
    after = json.loads(report.read_text())
    assert after["published"] == after["tasks"] == before["tasks"]
    assert after["core_hours"] == {}
    assert after["forecasts"][0]["makespan_s"] == 0
    files = [path for path in out.rglob("*") if path.is_file()]
    assert before["files"] * 0.5 < len(files) < before["files"] * 1.5
    stored = sum(path.stat().st_size for path in (out / "patches").rglob("*.h5"))
    assert before["scratch_bytes"]["patches"] == pytest.approx(stored, rel=0.1)


def test_costs_measured_elsewhere_are_used(calibrated: Path, tmp_path: Path) -> None:
    """The costs in the file of a calibration are used for the forecast of another plan."""
    (tmp_path / "t.csv").write_text("slide,n_tiles_224\na,100000\n")
    report, costs = tmp_path / "report.json", costs_of(calibrated, ROUGH)
    arguments = ["--tiles", str(tmp_path / "t.csv"), "--costs", str(calibrated / COSTS), "--json", str(report)]
    assert main(["plan", *arguments, "store=none"]) == 0
    forecast = json.loads(report.read_text())
    predict = costs.stages["predict"]
    expected = 250 * (predict.fixed_s - predict.waited_s) + 100_000 * predict.unit_s
    assert forecast["core_hours"]["predict"] * 3600 == pytest.approx(expected)
    assert forecast["costs"] == "measured, costs.json"


def test_399_slides_are_planned_from_their_tile_counts(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """CAMELYON16 without its slides: tiles, groups and hours are those of the published counts, in seconds."""
    table, report = shared_data / "camelyon16/tables/patch_counts_dldp.csv", tmp_path / "report.json"
    arguments = [
        "--tiles",
        str(table),
        "--tissue",
        "0.12",
        "--workers",
        "64,4000",
        "--scheduler",
        "sge",
        "executor.slice_s=60",
    ]
    assert main(["plan", *arguments, "--json", str(report), "store=none"]) == 0
    forecast = json.loads(report.read_text())
    assert forecast["slides"] == 399
    assert forecast["tiles"] == pytest.approx(0.12 * 79_262_454, rel=1e-4)
    assert forecast["tasks"]["predict"] == pytest.approx(forecast["tiles"] / 400, rel=0.02)
    assert forecast["core_hours"]["predict"] == pytest.approx(0.067 * forecast["tiles"] / 3600, rel=0.02)
    few, many = forecast["forecasts"]
    least_s = sum(forecast["core_hours"].values()) * 3600 / 64
    assert least_s < few["makespan_s"] < 1.35 * least_s
    assert many["makespan_s"] < few["makespan_s"]
    assert "rough" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiles", "nowhere.csv"], "nowhere.csv"),
        (["--tiles", "{here}/t.csv", "--calibrate"], "no pixels"),
        (["--tiles", "{here}/t.csv", "--costs", "{here}/t.csv"], "no costs"),
        (["--tiles", "{here}/t.csv", "tiles.group_tiles=0"], "group_tiles"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    """The command ends with exit code 20, and names the cause."""
    (tmp_path / "t.csv").write_text("slide,n_tiles_224\na,100\n")
    assert main(["plan", *(word.format(here=tmp_path) for word in arguments)]) == 20
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_clock_that_does_not_move_is_no_division_by_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CPU time comes in steps of 10 ms a short task takes none of it."""
    monkeypatch.setattr(measure.time, "process_time", lambda: 1.0)
    timed = [measure._timed(lambda _source, _task: ({}, True), Path(), 0, tiles) for tiles in (1.0, 4.0)]
    for stage in ("predict", "stitch"):
        cost = measure._fit(STAGES[stage], timed)
        assert cost.fixed_s + cost.unit_s > 0
        assert measure._spread(cost, timed) < 10
