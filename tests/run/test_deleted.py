"""Deleted files of a finished run are computed again with the same bytes: a stage is done when all its files exist."""

import itertools
import re
import shutil
from pathlib import Path

import pytest

from flows import cli
from wsiflow.system import publish

FAST = ["orchestrator=none", "tracking=off", "executor=inline", "inference.stride=56", "dense.windows=8"]


def start(manifest: Path, out: Path, *more: str) -> int:
    given = ["dataset=manifest", f"dataset.manifest={manifest}", "dataset.limit=1", "stain=macenko"]
    return cli.main(["run", f"out={out}", *FAST, "evaluation.bootstrap=0", *given, *more])


def published(root: Path) -> dict[str, str]:
    """Return the hash of every file that has a receipt, by name."""
    receipts = (root / publish.RECEIPTS).rglob("*.json")
    names = (str(path.relative_to(root / publish.RECEIPTS)).removesuffix(".json") for path in receipts)
    return {name: publish.file_sha256(root / name) for name in names if (root / name).exists()}


@pytest.fixture(scope="module")
def finished(tiny_slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run over one slide."""
    root = tmp_path_factory.mktemp("deleted") / "run"
    assert start(tiny_slides, root) == 0
    return root


def verified(root: Path) -> int:
    return cli.main(["verify", str(root)])


def test_what_is_deleted_is_made_again(tiny_slides: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files from which no other is computed are deleted alone, then as `verify` advises, then the receipts alone."""
    before = published(finished)
    leaves = [
        name for name in before if name.endswith((".png", ".preview.tif", ".geojson")) or name.startswith("cuts/")
    ]
    assert len(leaves) == 7
    for name in leaves:
        (finished / name).unlink()
    assert start(tiny_slides, finished) == 0
    assert published(finished) == before
    for name in leaves:
        (finished / name).unlink()
    capsys.readouterr()
    assert verified(finished) == 40
    advice = re.findall(r"; delete (\S+) and (\S+), then run again", capsys.readouterr().err)
    assert len(advice) == len(leaves)
    for each in itertools.chain(*advice):
        Path(each).unlink(missing_ok=True)
    assert start(tiny_slides, finished) == 0
    assert published(finished) == before
    for name in leaves:
        publish.receipt_path(finished, name).unlink()
    assert start(tiny_slides, finished) == 0
    assert published(finished) == before
    assert verified(finished) == 0


@pytest.mark.parametrize("files_too", [False, True])
def test_everything_can_be_made_again(tiny_slides: Path, finished: Path, files_too: bool) -> None:
    """All receipts of the run are deleted at once, with and without their files."""
    before = published(finished)
    for name in before:
        publish.receipt_path(finished, name).unlink()
        if files_too:
            (finished / name).unlink()
    assert start(tiny_slides, finished) == 0
    assert published(finished) == before
    assert verified(finished) == 0


def test_pixels_that_are_scored_are_dispensable(
    tiny_slides: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`patches/` may be deleted to save space; the files are computed again only for missing scores."""
    before = published(finished)
    shutil.rmtree(finished / "patches")
    assert start(tiny_slides, finished) == 0
    assert not (finished / "patches").exists()
    capsys.readouterr()
    assert verified(finished) == 0
    assert "2 files of pixels were deleted; nothing needs them" in capsys.readouterr().out
    (finished / "predictions/a/t1.h5").unlink()
    publish.receipt_path(finished, "predictions/a/t1.h5").unlink()
    assert verified(finished) == 40
    assert start(tiny_slides, finished) == 0
    assert published(finished) == before


def test_the_first_configuration_can_be_deleted(tiny_slides: Path, finished: Path) -> None:
    """Once there is a second configuration, the folder is identified by that."""
    assert start(tiny_slides, finished, "allow_partial=true") == 0
    (finished / "config.yaml").unlink()
    publish.receipt_path(finished, "config.yaml").unlink()
    assert start(tiny_slides, finished, "allow_partial=true") == 0
    assert verified(finished) == 0
