"""The package from Python: the same results as the command line has."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wsiflow
from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.heatmap.files import Heatmap


def test_a_run_of_the_command_line_is_read(finished: Path, small_slides: Path) -> None:
    """Tissue as `find_tissue` finds it, scores as the run has them, and a detection at the cell that scored it."""
    run = wsiflow.Run(str(finished))
    assert (run.folder, repr(run)) == (finished, f"Run({str(finished)!r})")
    assert run.slides[0] == "normal_001"
    with wsiflow.open_slide(small_slides.parent / "tumor_001.tif") as slide:
        assert slide.facts.slide_id == "tumor_001"
        found = wsiflow.find_tissue(slide)
    looked_at = run.tissue("tumor_001")
    assert np.array_equal(found.mask, looked_at.mask)
    assert found.downsample == looked_at.downsample
    scores = wsiflow.evaluate(small_slides, finished / "detections", bootstrap=0)
    assert scores.metrics["froc.score"] == run.metrics["froc.score"]
    heatmap = run.heatmap("tumor_001")
    assert heatmap.values.shape == heatmap.frame.h_shape
    assert len(run.detections("tumor_001")) > 0


def test_what_a_run_does_not_have_is_named(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="the run has 6 slides; name one of normal_001"):
        wsiflow.Run(finished).heatmap()
    with pytest.raises(InputError, match="the run has no slide 'x'"):
        wsiflow.Run(finished).detections("x")
    with pytest.raises(InputError, match="holds no plan"):
        _ = wsiflow.Run(tmp_path).slides
    with pytest.raises(InputError, match="the run has no scores"):
        _ = wsiflow.Run(tmp_path).metrics
    with pytest.raises(InputError, match=r"float32 .* is expected; name a heatmaps/<slide>\.tif of a run"):
        wsiflow.read_heatmap(finished / "heatmaps/tumor_001.preview.tif")
    monkeypatch.setattr(wsiflow.Run, "slides", ())  # of a run all of whose slides were rejected
    with pytest.raises(InputError, match=r"no slide of the run could be planned; see process_list\.csv"):
        wsiflow.Run(finished).heatmap()


def test_evaluation_writes_its_files_where_asked(finished: Path, small_slides: Path, tmp_path: Path) -> None:
    wsiflow.evaluate(small_slides, finished / "detections", bootstrap=0, out=tmp_path / "scores")
    assert (tmp_path / "scores/cases.csv").is_file()


@pytest.mark.parametrize("convention", ["centred", "reference"])
def test_cells_and_places_are_inverse(convention: str) -> None:
    """A map that begins at tile (2, 1) of a slide read at 1.25 level-0 px per px."""
    names = ("convention", "l0_width_px", "l0_height_px", "l0_per_px", "um_px", "tile_px", "window_px", "stride_px")
    values = (convention, 9000, 9000, 1.25, 0.3, 224, 224, 16)
    frame = dict(zip(names, values, strict=True)) | {"halo_px": 112, "block_rows": 1, "block_cols": 1}
    frame |= {"t_col0": 2, "t_row0": 1, "t_cols": 3, "t_rows": 2}
    heatmap = Heatmap(np.zeros((28, 42), np.float32), {"frame": frame})
    rows, cols = np.indices(heatmap.values.shape)
    places = heatmap.l0_from_cells(rows, cols)
    half = 10.0 if convention == "centred" else 0.0
    assert places[0, 0].tolist() == [560 + half, 280 + half]
    assert places[1, 3].tolist() == [620 + half, 300 + half]
    assert np.array_equal(heatmap.cells_from_l0(places), np.stack([rows, cols], axis=-1))


def test_settings_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean inference\.stride"):
        wsiflow.predict(tmp_path, "inference.strid=3")


@pytest.mark.parametrize(
    ("exit_code", "written", "kind", "message"),
    [
        (
            20,
            "rejected: slide a, a.tif: it is empty; correct it",
            InputError,
            "slide a, a.tif: it is empty; correct it",
        ),
        (
            30,
            "failed: slide b, x: 1; y\nfailed: slide b, x: 1; y\nfailed: slide c: 2; z",
            EnvironmentFault,
            "failed: 2",
        ),
        (20, "", InputError, "the run ended with 20"),
    ],
)
def test_a_run_that_fails_says_why(
    exit_code: int, written: str, kind: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the command prints of its slides is the message, and the class is that of its exit code."""
    program = tmp_path / "command"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{written}\nEND\necho 'a warning' >&2\nexit {exit_code}\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    with pytest.raises(kind, match=message):
        wsiflow.predict(tmp_path, out=tmp_path / "out")
