"""Trials of a sweep share files: the bytes are those of single runs, and each folder is whole without the others."""

import itertools
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from damage import overwrite
from small_runs import COARSE, digests

from flows import cli, compose, line
from wsiflow.errors import IntegrityError
from wsiflow.run import cases, sharing
from wsiflow.run.results import cost
from wsiflow.run.stages import ingest, precisions
from wsiflow.slides import pyramid
from wsiflow.slides.manifest import load_dataset
from wsiflow.system import publish

DATA = b"pixels" * 1000
WIDEST = ["tiles.halo_px=widest", "tiles.group_tiles=4"]


def make(root: Path, shared: Path | None, data: bytes = DATA, key: str = "k" * 64) -> tuple[publish.Receipt, bool]:
    """Publish a file as a stage does, unless it is done."""
    place = sharing.SharedFile(shared, root, "patches/a/p1.h5", key)
    done = sharing.done(place)
    if done is not None:
        return done, False
    with sharing.publishing(place, {"kind": "patches"}, publish.accept) as attempt:
        attempt.path.write_bytes(data)
    return attempt.receipt, True


def test_a_second_trial_links_what_the_first_made(tmp_path: Path) -> None:
    """There is one file with two receipts; the second receipt has the seconds of the first, and is marked as shared."""
    first, made = make(tmp_path / "a", tmp_path / "shared")
    second, again = make(tmp_path / "b", tmp_path / "shared")
    assert (made, again) == (True, False)
    assert (tmp_path / "a/patches/a/p1.h5").samefile(tmp_path / "b/patches/a/p1.h5")
    assert second["shared"]
    assert "shared" not in first
    assert [second[name] for name in ("cpu_s", "wall_s", "path")] == [
        first[name] for name in ("cpu_s", "wall_s", "path")
    ]
    assert make(tmp_path / "b", tmp_path / "shared") == (second, False), "found done, as it was published"
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "shared")
    assert publish.done(tmp_path / "b", "patches/a/p1.h5", "k" * 64), "whole without the others"


@pytest.mark.parametrize("other", ["name", "key", "versions", "class"])
def test_nothing_else_has_the_same_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, other: str) -> None:
    """The address depends on the file, the settings, the libraries and the kind of machine."""
    place = sharing.SharedFile(tmp_path, tmp_path, "patches/a/p1.h5", "k")
    before = place.address
    if other == "versions":
        monkeypatch.setattr(sharing, "versions", lambda: {"numpy": "1"})
    elif other == "class":
        monkeypatch.setattr(sharing, "numeric_class", lambda: {"isa": "avx"})
    else:
        place = place._replace(**{other: "patches/b/p1.h5"})
    assert place.address != before


def test_of_trials_at_once_all_have_the_file_of_one(tmp_path: Path) -> None:
    """Eight trials that compute the same file at once all succeed, and there is one file."""
    roots = [tmp_path / str(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        receipts = list(pool.map(lambda root: make(root, tmp_path / "shared")[0], roots))
    assert len({(root / "patches/a/p1.h5").stat().st_ino for root in roots}) == 1
    assert {receipt["sha256"] for receipt in receipts} == {publish.file_sha256(roots[0] / "patches/a/p1.h5")}
    assert all(publish.done(root, "patches/a/p1.h5", "k" * 64) for root in roots)


def test_where_links_cannot_be_files_are_copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files of a shared folder on another file system are copied."""
    link = os.link

    def refused(source: Path, target: Path) -> None:
        if str(source).startswith(str(tmp_path / "shared/")) and ".attempts" not in str(source):
            raise OSError(18, "Invalid cross-device link")
        link(source, target)

    monkeypatch.setattr(os, "link", refused)
    make(tmp_path / "a", tmp_path / "shared")
    assert make(tmp_path / "b", tmp_path / "shared")[1] is False
    assert not (tmp_path / "a/patches/a/p1.h5").samefile(tmp_path / "b/patches/a/p1.h5")
    assert publish.done(tmp_path / "b", "patches/a/p1.h5", "k" * 64)


@pytest.mark.parametrize("harm", [lambda path: overwrite(path, b"x" + DATA[1:]), lambda path: path.unlink()])
def test_damage_to_a_shared_file_is_not_passed_on(tmp_path: Path, harm) -> None:
    """The next trial fails with the name of the damaged file, and with the remedy."""
    receipt, _ = make(tmp_path / "a", None)
    place = sharing.SharedFile(tmp_path / "shared", tmp_path / "a", receipt["path"], receipt["key"])
    make(tmp_path / "c", place.shared)
    harm(tmp_path / "shared" / place.address)
    with pytest.raises(IntegrityError, match="delete"):
        make(tmp_path / "b", place.shared)
    assert not (tmp_path / "b/patches/a/p1.h5").exists()


def make_until(here: Path, last: int) -> None:
    """Publish a file in a process that ends before effect number ``last``."""
    seen = itertools.count()
    publish._effect = lambda *_: os._exit(137) if next(seen) == last else None
    make(here / "own", here / "shared")
    os._exit(0)


def test_ending_the_process_before_any_effect_loses_nothing(tmp_path: Path) -> None:
    """After a trial that computes or links was killed before any effect, the next start publishes the file."""
    for role in ("computes", "links"):
        survived, effects = False, 0
        while not survived:
            here = tmp_path / role / str(effects)
            if role == "links":
                make(here / "other", here / "shared")
            child = os.fork()
            if child == 0:
                make_until(here, effects)
            survived = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            make(here / "own", here / "shared")
            make(here / "third", here / "shared")
            for folder in ("own", "third"):
                assert (here / folder / "patches/a/p1.h5").read_bytes() == DATA
                assert publish.done(here / folder, "patches/a/p1.h5", "k" * 64)
            for folder in ("own", "shared"):
                publish.sweep_attempts(here / folder)
                assert not list((here / folder / publish.ATTEMPTS).glob("*"))
            effects += 1
        assert effects > 8, "the sweep reached every effect"


def trial(manifest: Path, out: Path, stride: int, *more: str) -> Path:
    """Run one trial of a sweep below ``out`` and return its folder."""
    overrides = ["dataset=manifest", f"dataset.manifest={manifest}", f"out={out}", *COARSE, *WIDEST]
    config = compose.compose_config([*overrides, f"inference.stride={stride}", *more], job=f"stride={stride}")
    assert line.direct(config).exit_code == 0
    return config.out


def receipts(root: Path, *kinds: str) -> list[publish.Receipt]:
    all_receipts = (publish.read_receipt(root, str(path.relative_to(root / "receipts"))[:-5]) for path in paths(root))
    return [receipt for receipt in all_receipts if receipt and receipt["kind"] in kinds]


def paths(root: Path) -> list[Path]:
    return sorted((root / "receipts").rglob("*.json"))


def test_a_sweep_over_strides_reads_every_slide_once(tiny_slides: Path, tmp_path: Path) -> None:
    """The bytes are those of trials that share nothing; tissue, colours and pixels are links with their first cost.

    The folder of the second trial is valid when the folder of the first one and the shared folder are deleted.
    """
    stained = ["stain=reinhard", "stain.on_failure=raw"]
    alone = [digests(trial(tiny_slides, tmp_path / "alone", stride, "share=null", *stained)) for stride in (112, 56)]
    first, second = (trial(tiny_slides, tmp_path / "sweep", stride, *stained) for stride in (112, 56))
    assert [digests(first), digests(second)] == alone
    common = ("patches", "stain", "tissue")
    own = {kind: receipts(second, kind) for kind in (*common, "prediction", "heatmap")}
    own["tissue"] = [receipt for receipt in own["tissue"] if receipt["path"] in {"tissue/a.json", "tissue/b.json"}]
    assert all(len(own[kind]) >= 2 and receipt.get("shared") for kind in common for receipt in own[kind])
    assert not any(receipt.get("shared") for kind in ("prediction", "heatmap") for receipt in own[kind])
    assert all((first / one["path"]).samefile(second / one["path"]) for one in own["patches"] + own["stain"])
    was, now = (json.loads((root / "evaluation/summary.json").read_text()) for root in (first, second))
    assert was["cost.cached_core_s"] == 0 < now["cost.cached_core_s"]
    costs = [cost.step_core_seconds(receipts(root, "patches", "stain")) for root in (first, second)]
    assert costs[0] == costs[1], "what it would have cost alone"
    for metrics in (was, now):
        whole_s = metrics["cost.executed_core_s"] + metrics["cost.cached_core_s"]
        assert whole_s == pytest.approx(3600 * metrics["throughput.core_hours"])
    shutil.rmtree(first)
    shutil.rmtree(tmp_path / "sweep/.shared")
    assert cli.main(["verify", str(second)]) == 0
    assert cli.main(["status", str(second)]) == 0


def test_a_slide_that_was_replaced_is_inspected_again(tiny_slides: Path, tmp_path: Path) -> None:
    """Shared files belong to the content of a slide, and not to its name."""
    folder = shutil.copytree(tiny_slides.parent, tmp_path / "slides")
    overrides = [
        "dataset=manifest",
        f"dataset.manifest={folder / 'manifest.csv'}",
        *COARSE,
        f"share={tmp_path / 'shared'}",
    ]
    records = []
    for number in range(2):
        config = compose.compose_config([*overrides, f"out={tmp_path / str(number)}"])
        config.out.mkdir()
        source = cases.write_cases(config.out, config, load_dataset(config.dataset))
        precisions.choose(source, 0)
        receipt, _ = ingest.ingest(source, 1)
        records.append((config.out / receipt["path"]).read_text())
        pixels = np.full((500, 600, 3), 240, np.uint8)
        pixels[100:400, 100:500] = (190, 120, 180)
        (folder / "b.tif").unlink()
        pyramid.write_rgb(folder / "b.tif", iter([pixels]), shape=(500, 600), um_px=0.243, quality=90)
    assert records[0] != records[1]
