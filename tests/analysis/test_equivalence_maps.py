"""``wsiflow compare-maps`` on two real runs and on maps changed by hand."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import overwrite

from flows import cli
from wsiflow.analysis.equivalence.maps import (
    NOT_EQUIVALENT,
    LesionAgreement,
    MapComparison,
    compare_maps,
    lesion_sentence,
    reasons_not_equivalent,
    tally_files,
)
from wsiflow.errors import InputError
from wsiflow.evaluation.matches import read_matches
from wsiflow.heatmap.files import read_heatmap, write_heatmap


def compared(a: Path, b: Path, **more: Any) -> MapComparison:
    return compare_maps(a, b, **{"threshold": 0.5, "radius_um": 75.0, **more})


def changed(source: Path, out: Path, change: Any = None, **frame: Any) -> Path:
    """Write a heatmap with changed scores, or with another frame."""
    heat, about = read_heatmap(source)
    if change is not None:
        change(heat)
    write_heatmap(out, heat, um_px=1.0, description=about | {"frame": about["frame"] | frame})
    return out


@pytest.fixture
def copied(two_settings: tuple[Path, Path], tmp_path: Path) -> Path:
    """Return a copy of the first run that a test may change."""
    return Path(shutil.copytree(two_settings[0], tmp_path / "copy"))


@pytest.fixture(scope="module")
def tumour(two_settings: tuple[Path, Path]) -> Path:
    return two_settings[0] / "heatmaps/tumor_001.tif"


def test_two_runs_against_whole_arrays(two_settings: tuple[Path, Path]) -> None:
    """The numbers over bands and slides equal those of all cells in one array."""
    comparison = compared(*two_settings)
    assert len(comparison.slides) == 6
    maps = [
        np.concatenate([read_heatmap(path)[0].ravel() for path in sorted(run.glob("heatmaps/*_00?.tif"))])
        for run in two_settings
    ]
    known = np.isfinite(maps[0])
    d = maps[1][known].astype(np.float64) - maps[0][known]
    pooled = comparison.total
    assert pooled.n == known.sum() > 1000
    assert pooled.largest == np.abs(d).max() > 0
    assert pooled.total / pooled.n == pytest.approx(d.mean())
    assert (pooled.only_a, pooled.only_b) == (0, 0)


def test_lesions_of_two_runs(two_settings: tuple[Path, Path]) -> None:
    """Every detection has a partner, and both runs hit the same annotated lesions."""
    found = compared(*two_settings).pooled().lesions
    assert found is not None
    recorded = read_matches(two_settings[0] / "evaluation/matches.json").slides
    assert found.true == sum(len(one.best) - one.n_itc for one in recorded) > 0
    assert found.a == found.b > 0
    assert found.same


def test_the_command_writes_its_files(
    two_settings: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Markdown, CSV, JSON and PNG are written with the same sentence; within 0.05 the runs are equivalent."""
    arguments = ["compare-maps", *map(str, two_settings), "--out", str(tmp_path), "--bound", "0.05"]
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    assert "equivalent within 0.05" in output
    assert "other equals fp32 within" in output
    assert "over 6 slides: 0 of" in output
    values = json.loads((tmp_path / "equivalence.json").read_text())
    assert values["sentence"] in output
    assert values["sentence"] in (tmp_path / "equivalence.md").read_text()
    with (tmp_path / "equivalence.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["slide_id"] for row in rows][-1] == "all"
    assert float(rows[-1]["max"]) == values["pooled"]["max"]
    assert sum(values["histogram"]["below"]) + sum(values["histogram"]["above"]) == values["pooled"]["cells"]
    assert (tmp_path / "equivalence.png").read_bytes().startswith(b"\x89PNG")
    assert values["pooled"]["slides_with_flips_upper"] == pytest.approx(1 - 0.05 ** (1 / 6))


def test_a_run_equals_itself(two_settings: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A run is equivalent to itself with a bound of 0."""
    assert cli.main(["compare-maps", str(two_settings[0]), str(two_settings[0]), "--bound", "0"]) == 0
    assert "within 0 (max |dp|; mean 0)" in capsys.readouterr().out


def test_beyond_the_bound_the_exit_code_says_so(
    tumour: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One flipped cell is counted and named, and the exit code is 10."""

    def flip(heat: Any) -> None:
        heat[np.unravel_index(np.nanargmin(heat), heat.shape)] = 0.9

    other = changed(tumour, tmp_path / "other.tif", flip)
    assert cli.main(["compare-maps", str(tumour), str(other), "--bound", "0.01"]) == NOT_EQUIVALENT
    output = capsys.readouterr().out
    assert "differs from tumor_001.tif by at most" in output
    assert ": 1 of" in output
    assert "NOT EQUIVALENT within 0.01: the largest |dp| is" in output
    tally = compared(tumour, other).total
    assert (tally.up, tally.down) == (1, 0)


def test_cells_of_one_map_only_are_counted(tumour: Path, tmp_path: Path) -> None:
    """Cells that one map lacks are no difference of scores, but rule out equivalence."""

    def less(heat: Any) -> None:
        heat.ravel()[np.flatnonzero(np.isfinite(heat))[:7]] = np.nan

    comparison = compared(tumour, changed(tumour, tmp_path / "o.tif", less))
    assert (comparison.total.only_a, comparison.total.only_b) == (7, 0)
    assert comparison.total.largest == 0
    assert reasons_not_equivalent(comparison, 0.0) == ["7 cells are scored by one of the two only"]


def test_maps_that_begin_elsewhere_are_laid_on_one_grid(tumour: Path, tmp_path: Path) -> None:
    """A map of the lower right part of the slide is compared with the same cells."""
    heat, about = read_heatmap(tumour)
    frame = about["frame"]
    per_tile = frame["tile_px"] // frame["stride_px"]
    part = np.ascontiguousarray(heat[2 * per_tile :, 3 * per_tile :])
    moved = frame | {"t_row0": 2, "t_col0": 3, "t_rows": frame["t_rows"] - 2, "t_cols": frame["t_cols"] - 3}
    write_heatmap(tmp_path / "part.tif", part, um_px=1.0, description=about | {"frame": moved})
    for paths in ((tumour, tmp_path / "part.tif"), (tmp_path / "part.tif", tumour)):
        tally = tally_files(*paths, threshold=0.5)
        assert tally.n == np.isfinite(part).sum() > 0
        assert tally.largest == 0
        assert tally.only_a + tally.only_b == np.isfinite(heat).sum() - tally.n


def test_more_rows_than_a_band(tmp_path: Path) -> None:
    """Maps of several bands are compared whole, the short last band included."""
    rng = np.random.default_rng(0)
    a = rng.random((2500, 300), dtype=np.float32)
    b = np.clip(a + rng.normal(0, 0.01, a.shape), 0, 1).astype(np.float32)
    frame = {"convention": "centred", "l0_width_px": 9600, "l0_height_px": 80000, "l0_per_px": 1.0, "um_px": 0.25}
    frame |= {"stride_px": 32, "tile_px": 32, "t_row0": 0, "t_col0": 0}
    for name, heat in (("a", a), ("b", b)):
        write_heatmap(tmp_path / f"{name}.tif", heat, um_px=8.0, description={"frame": frame})
    tally = tally_files(tmp_path / "a.tif", tmp_path / "b.tif", threshold=0.5)
    assert tally.n == a.size
    assert tally.total_abs == pytest.approx(np.abs(b.astype(np.float64) - a).sum())
    assert tally.up == ((a < 0.5) & (b >= 0.5)).sum()


def test_other_grids_are_refused_by_name(tumour: Path, tmp_path: Path) -> None:
    """The message names both strides."""
    other = changed(tumour, tmp_path / "o.tif", stride_px=56)
    with pytest.raises(InputError, match=r"its grid is stride 112 px.*is stride 56 px.*compare maps of one grid"):
        compared(tumour, other)


def test_a_missing_slide_is_named(two_settings: tuple[Path, Path], copied: Path) -> None:
    """The other slides are compared, and the runs are not equivalent."""
    (copied / "heatmaps/tumor_002.tif").unlink()
    comparison = compared(two_settings[0], copied)
    assert len(comparison.slides) == 5
    assert comparison.missing == ["tumor_002 has no heatmap in copy"]
    assert reasons_not_equivalent(comparison, 1.0) == comparison.missing
    (reason,) = reasons_not_equivalent(dataclasses.replace(comparison, missing=[], neither=["tumor_002"]), 1.0)
    assert reason == "neither has a heatmap of 1 planned slides"


def test_lost_and_gained_lesions_are_told(two_settings: tuple[Path, Path], copied: Path) -> None:
    """A removed detection is lost, a distant one is gained, and a lesion without hit is lost."""
    name = "detections/tumor_001.csv"
    overwrite(copied / name, "0.9,2000,2000\n")
    path = copied / "evaluation/matches.json"
    matches = json.loads(path.read_text())
    (one,) = (one for one in matches["slides"] if one["slide_id"] == "tumor_001")
    one["best"] = [None for _ in one["best"]]
    path.write_text(json.dumps(matches))
    lost = len((two_settings[0] / name).read_text().splitlines())
    found = compared(two_settings[0], copied).pooled().lesions
    assert found is not None
    assert (found.lost, found.gained, found.true_lost, found.true_gained) == (lost, 1, 1, 0)
    assert "true lesions gained 0, lost 1 of" in reasons_not_equivalent(compared(two_settings[0], copied), 1.0)[0]


@pytest.mark.parametrize("what", ["lost", "gained", "true_lost", "true_gained"])
def test_each_difference_of_lesions_is_told(what: str) -> None:
    """By itself, each is a difference, and stands in the sentence."""
    none = LesionAgreement(5, 6, 0, 0, 7)
    one = none._replace(**{what: 3})
    assert (none.same, one.same) == (True, False)
    numbers = {"gained": 0, "lost": 0, "true_gained": 0, "true_lost": 0} | {what: 3}
    assert lesion_sentence(one) == (
        "lesions gained {gained}, lost {lost} of 5 detections; "
        "true lesions gained {true_gained}, lost {true_lost} of 7".format(**numbers)
    )


def test_other_truth_is_refused(two_settings: tuple[Path, Path], copied: Path) -> None:
    path = copied / "evaluation/matches.json"
    matches = json.loads(path.read_text())
    matches["slides"][-1]["truth"] = "0" * 64
    path.write_text(json.dumps(matches))
    with pytest.raises(InputError, match=r"tumor_003.*another truth"):
        compared(two_settings[0], copied)


def test_without_truth_detections_alone_are_compared(two_settings: tuple[Path, Path], copied: Path) -> None:
    (copied / "evaluation/matches.json").unlink()
    found = compared(two_settings[0], copied).pooled().lesions
    assert found is not None
    assert found.true is None
    assert found.same


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["nowhere", "nowhere"], "does not exist"),
        (["{run}", "{map}"], "one of the two is a folder"),
        (["{run}/tissue", "{run}"], "holds no plan"),
        (["{run}/plan.json", "{map}"], "not a readable heatmap"),
        (["{map}", "{map}", "--threshold", "2"], "give a probability"),
        (["{map}", "{map}", "--bound", "nan"], "the bound is nan"),
        (["{map}", "{map}", "--radius-um", "-1"], "give a distance in um"),
    ],
)
def test_what_cannot_be_compared_ends_in_one_line(
    two_settings: tuple[Path, Path], tumour: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], cause: str
) -> None:
    words = [word.format(run=two_settings[0], map=tumour) for word in arguments]
    assert cli.main(["compare-maps", *words]) == InputError.exit_code
    message = capsys.readouterr().err
    assert cause in message
    assert message.count("\n") == 1


def test_numbers_that_do_not_exist_are_null(tumour: Path, tmp_path: Path) -> None:
    """Maps without a common cell give null in JSON, and no error in figure and table."""
    comparison = compared(tumour, changed(tumour, tmp_path / "o.tif", lambda heat: heat.fill(np.nan)))
    from wsiflow.analysis.equivalence import report

    files = report.documents(comparison)
    assert json.loads(files["equivalence.json"])["pooled"]["max"] is None
    assert b"score no common cell" in files["equivalence.md"]
