"""Real slides end with a heatmap or with a reason, and the exit code shows which."""

import csv
from pathlib import Path

import numpy as np
import pytest
from small_runs import COARSE

from flows import cli as command
from wsiflow.heatmap import files


def started(*arguments: str) -> int:
    return command.main(["run", *arguments, *COARSE])


def listed(out: Path) -> dict[str, tuple[str, str]]:
    with (out / "process_list.csv").open(newline="") as stream:
        return {row["slide_id"]: (row["status"], row["reason"]) for row in csv.DictReader(stream)}


def test_a_folder_of_real_slides(shared_data: Path, tmp_path: Path) -> None:
    """Aperio, Hamamatsu, DICOM and TIFF, good and broken: each is done, empty, or rejected with a reason."""
    out = tmp_path / "run"
    folder = ["dataset=folder", f"dataset.folder={shared_data / 'wsi'}"]
    assert started(*folder, f"out={out}", "geometry.max_upsample=2.1") == 20
    found = listed(out)
    assert {name: status for name, (status, _) in found.items()} == {
        "CMU-1-Small-Region": "done",
        "test3-DAPI-2-387": "done",
        "boxes_dicom": "no tissue",
        "CMU-1-Small-Region.generic.jpeg": "rejected",
        "boxes": "rejected",
        "broken": "rejected",
        "unopenable": "rejected",
        "multi_frame_jpeg2000_camelyon_challenge_image": "rejected",
    }
    assert "0.00499" in found["CMU-1-Small-Region.generic.jpeg"][1]
    assert "28.9685 um/px" in found["multi_frame_jpeg2000_camelyon_challenge_image"][1]
    assert "not a slide" in found["broken"][1]
    heat, _ = files.read_heatmap(out / "heatmaps/CMU-1-Small-Region.tif")
    assert np.isfinite(heat).sum() > 1000
    assert not (out / "evaluation").exists(), "nothing is scored while slides are missing"


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("multi_frame_jpeg2000_camelyon_challenge_image.dcm", ["geometry.spacing=native"]),
        ("CMU-1-Small-Region.svs", ["geometry.spacing=native"]),
        ("CMU-1-Small-Region.svs", ["geometry=reference", "tiles=patch"]),
    ],
)
def test_single_real_slides(shared_data: Path, tmp_path: Path, name: str, more: list[str]) -> None:
    """A slide that is read unchanged or in the reference's geometry has a heatmap and exit code 0."""
    out = tmp_path / "run"
    assert started("dataset=single", f"dataset.path={shared_data / 'wsi/good' / name}", f"out={out}", *more) == 0
    slide_id = name.rsplit(".", 1)[0]
    assert listed(out)[slide_id] == ("done", "")
    heat, about = files.read_heatmap(out / f"heatmaps/{slide_id}.tif")
    assert heat.shape == (about["frame"]["t_rows"] * 2, about["frame"]["t_cols"] * 2)
    assert np.isfinite(heat).any()


def test_the_manifest_corrects_a_wrong_pixel_size(shared_data: Path, tmp_path: Path) -> None:
    """The generic TIFF states 0.00499 um/px; with the true value in the manifest it equals the SVS."""
    path = shared_data / "wsi/good/CMU-1-Small-Region.generic.jpeg.tiff"
    (tmp_path / "m.csv").write_text(f"slide_id,path,mpp\ncmu,{path},0.499\n")
    out = tmp_path / "run"
    manifest = ["dataset=manifest", f"dataset.manifest={tmp_path / 'm.csv'}"]
    assert started(*manifest, f"out={out}", "geometry.max_upsample=2.1", "store=none") == 0
    assert listed(out)["cmu"] == ("done", "")
