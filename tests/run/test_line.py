"""The whole line on small slides, from a manifest to scores: interrupted, repeated, and against a simple loop."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import openslide
import psutil
import pytest
from damage import overwrite
from PIL import Image
from small_runs import COARSE, attempts, digests, over, rows, wsiflow

from flows import compose as command
from wsiflow.heatmap.files import read_heatmap, write_heatmap
from wsiflow.model.card import ModelSpec
from wsiflow.run import executor, shards, store, trace
from wsiflow.run.executor import driver
from wsiflow.run.executor.inline import Inline
from wsiflow.run.plan import latest_plan, read_plan
from wsiflow.run.results import finish
from wsiflow.run.stages import choose, ingest
from wsiflow.slides import pyramid
from wsiflow.system import publish


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The folder of a copy of the finished run, which a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def tiny_run(tiny_slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run in one process over the tiny slides; to start it again changes nothing."""
    out = tmp_path_factory.mktemp("tiny run") / "run"
    assert wsiflow(*over(tiny_slides, out)) == 0
    return out


def test_every_slide_ends_with_heatmap_and_detections(finished: Path) -> None:
    """Each slide is done in the process list, and its files exist."""
    listed = rows(finished / "process_list.csv")
    assert len(listed) == 6
    assert {row["status"] for row in listed} == {"done"}
    for row in listed:
        heat, about = read_heatmap(finished / f"heatmaps/{row['slide_id']}.tif")
        assert 0.8 * 4 * int(row["n_tiles"]) < np.isfinite(heat).sum() <= 4 * int(row["n_tiles"])
        assert np.isnan(heat[2048 // 112 + 1 :]).all(), "no score beyond the slide"
        assert about["frame"]["stride_px"] == 112
        assert (finished / f"detections/{row['slide_id']}.csv").exists()
        with openslide.OpenSlide(finished / f"heatmaps/{row['slide_id']}.preview.tif") as preview:
            shown = np.array(preview.read_region((0, 0), 0, preview.dimensions))[..., 0]
        assert np.array_equal(shown == 0, np.isnan(heat)), "the preview is 0 exactly where there is no score"


def test_summary_has_the_names_others_rely_on(finished: Path) -> None:
    """The summary has scores, throughput, cost and ledger under the documented names."""
    summary = json.loads((finished / "evaluation/summary.json").read_text())
    names = """
        froc.score froc.strict_score froc.score_ci_low froc.n_lesions froc.n_itc
        froc.sensitivity_at_0.25 froc.sensitivity_at_8 froc.sensitivity_at_8_ci_low roc.auc roc.auc_ci_high
        roc.auc_bootstrap_ci_low throughput.tiles_per_s
        throughput.core_hours throughput.efficiency cost.read_core_s cost.infer_core_s cost.stitch_core_s
        ledger.planned ledger.published cache.hit_rate
    """
    for name in names.split():
        assert name in summary, name
    assert summary["ledger.planned"] == summary["ledger.published"] > 0
    assert 0 < summary["throughput.efficiency"] <= 1.1


def test_a_second_identical_run_does_no_work(tiny_slides: Path, tiny_run: Path) -> None:
    """No file is computed again: every receipt names the same attempt."""
    before, traced = attempts(tiny_run), rows(tiny_run / "trace.csv")
    assert len(before) > 20
    assert wsiflow(*over(tiny_slides, tiny_run)) == 0
    assert attempts(tiny_run) == before
    assert rows(tiny_run / "trace.csv") == traced


def test_the_cost_of_everything_is_what_the_kernel_counts(tiny_slides: Path, tmp_path: Path) -> None:
    """Of a command with workers: from its start to its scores, within three percent."""
    command = [sys.executable, "-m", "wsiflow.flows", "run", *over(tiny_slides, tmp_path, "executor=process")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    counted_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    metrics = json.loads((tmp_path / "evaluation/summary.json").read_text())
    line_s = 3600 * metrics["throughput.core_hours"] + metrics["cost.warmup_core_s"]
    assert line_s < metrics["cost.total_core_s"] < counted_s
    assert metrics["cost.total_core_s"] == pytest.approx(counted_s, rel=0.03, abs=1.0)
    assert subprocess.run(command, check=True, capture_output=True)
    again = json.loads((tmp_path / "evaluation/summary.json").read_text())
    assert again["cost.total_core_s"] == metrics["cost.total_core_s"], "a start that had nothing to do adds nothing"


def test_trials_of_one_process_are_charged_the_same_start(tiny_slides: Path, tmp_path: Path) -> None:
    """Each as in a process of its own; counted once, the start and both trials are what the kernel counts, or less."""
    command = [sys.executable, "-m", "wsiflow.flows", "run", "-m", *over(tiny_slides, tmp_path), "repeat=1,2"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    counted_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    trials = [json.loads((tmp_path / f"repeat={n}/evaluation/summary.json").read_text()) for n in (1, 2)]
    (start_s,) = {trial["cost.start_core_s"] for trial in trials}
    own_s = [trial["cost.total_core_s"] - start_s for trial in trials]
    assert min(start_s, *own_s) > 0
    assert counted_s / 2 < start_s + sum(own_s) < counted_s


def test_the_cost_of_a_start_without_scores_counts(tiny_slides: Path, tmp_path: Path) -> None:
    """Where a slide is broken and nothing is scored, the next start adds what it cost itself."""
    manifest = tmp_path / "manifest.csv"
    a, b = (tiny_slides.parent / name for name in ("a.tif", "b.tif"))
    shutil.copy(b, tmp_path / "b.tif")
    os.truncate(tmp_path / "b.tif", 100)
    manifest.write_text(f"slide_id,path,label,annotation_path\na,{a},tumor,{a.with_suffix('.xml')}\nb,b.tif,normal,\n")
    run = over(manifest, tmp_path / "run", "evaluation.bootstrap=0")
    assert wsiflow(*run) == 20
    (first,) = driver.spent(tmp_path / "run")
    assert first.core_s
    shutil.copy(b, tmp_path / "b.tif")
    assert wsiflow(*run) == 0
    both = driver.spent(tmp_path / "run")
    assert both[0] == first
    total = json.loads((tmp_path / "run/evaluation/summary.json").read_text())["cost.total_core_s"]
    assert total == pytest.approx(sum(one.core_s for one in both))


def test_pixels_straight_from_the_slide_give_the_same_scores(
    small_slides: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """Without the HDF5 store the heatmaps have the same bytes."""
    assert wsiflow(*over(small_slides, tmp_path / "run", "store=none", "dataset.limit=1")) == 0
    assert not (tmp_path / "run/patches").exists()
    maps = {name: digest for name, digest in digests(tmp_path / "run").items() if name.endswith(".tif")}
    assert len(maps) == 2
    assert maps.items() <= expected.items()


def first_maps(finished: Path, other: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the heatmap of the first small slide in the finished run and in another of this slide alone."""
    (path,) = (other / "heatmaps").glob("*_00?.tif")
    return read_heatmap(finished / "heatmaps" / path.name)[0], read_heatmap(path)[0]


@pytest.mark.parametrize("how", [["inference.engine=window"], ["tiles.block_rows=2", "tiles.block_cols=3"]])
def test_windows_and_strips_give_the_same_scores(
    small_slides: Path, finished: Path, tmp_path: Path, how: list[str]
) -> None:
    """The demo network does not pad: its map is the same to rounding, with any blocks and engine."""
    assert wsiflow(*over(small_slides, tmp_path / "run", "dataset.limit=1", *how)) == 0
    np.testing.assert_allclose(*first_maps(finished, tmp_path / "run"), atol=1e-5)


def test_windows_that_touch_tissue_have_the_scores_of_a_run_of_all(
    small_slides: Path, finished: Path, tmp_path: Path
) -> None:
    """Where fewer windows are scored, the others are NaN, and every score is that of a run that scores all windows."""
    assert wsiflow(*over(small_slides, tmp_path / "run", "dataset.limit=1", "tissue.windows=all")) == 0
    touching, every = first_maps(finished, tmp_path / "run")
    scored = ~np.isnan(touching)
    assert 0 < scored.sum() < np.isfinite(every).sum()
    np.testing.assert_allclose(touching[scored], every[scored], atol=1e-5)


def test_patches_of_the_reference_layout(small_slides: Path, finished: Path, tmp_path: Path) -> None:
    """With tiles=patch, patches of 448 px are stored with tile column, row and level-0 corner in groups t1 to tN.

    The map is that of strips to rounding.
    """
    assert wsiflow(*over(small_slides, tmp_path / "run", "tiles=patch", "dataset.limit=1")) == 0
    path = next((tmp_path / "run/patches").glob("*.h5"))
    with store.open_patches(path) as file:
        group = store.patch_group(file, 1)
        assert group.img.shape[1:] == (448, 448, 3)
        assert (group.coord[:, 2] == group.coord[:, 0] * 224 - 112).all()
        assert (group.coord[:, 3] == group.coord[:, 1] * 224 - 112).all()
    np.testing.assert_allclose(*first_maps(finished, tmp_path / "run"), atol=1e-5)


def test_another_split_into_groups_gives_the_same_bits(small_slides: Path, finished: Path, tmp_path: Path) -> None:
    """The scores of a block depend neither on its group nor on the blocks predicted before it."""
    assert wsiflow(*over(small_slides, tmp_path / "run", "tiles.group_tiles=9", "dataset.limit=1")) == 0
    (groups,) = (tmp_path / "run/predictions").iterdir()
    assert len(list(groups.iterdir())) > len(list((finished / "predictions" / groups.name).iterdir()))
    assert np.array_equal(*first_maps(finished, tmp_path / "run"), equal_nan=True)


@pytest.mark.parametrize("seed", range(int(os.environ.get("WSIFLOW_KILLS", "1"))))
def test_a_killed_run_finishes_with_the_same_bytes(
    tiny_slides: Path, tiny_run: Path, tmp_path: Path, seed: int
) -> None:
    """A run that was killed at random moments gives the same bytes, and repeats no finished task."""
    rng = np.random.default_rng(seed)
    out = tmp_path / "run"
    arguments = [sys.executable, "-m", "wsiflow.flows", "run", *over(tiny_slides, out, "executor=process")]
    kept: dict[str, str] = {}
    for _ in range(2):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
        enough = len(kept) + rng.integers(1, 10)
        while process.poll() is None and len(attempts(out)) < enough:
            time.sleep(0.05)
        time.sleep(rng.exponential(0.2))
        workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        assert psutil.wait_procs(workers, timeout=250)[1] == [], "workers whose parent is gone end"
        assert kept.items() <= attempts(out).items(), "a published file was computed again"
        kept = attempts(out)
    assert subprocess.run(arguments, stdout=subprocess.DEVNULL, check=False).returncode == 0
    assert kept.items() <= attempts(out).items()
    assert digests(out) == digests(tiny_run)


def test_a_missing_group_fails_its_slide_before_it_is_stitched(small_slides: Path, copied: Path) -> None:
    """A slide whose predictions file is missing fails by name, and nothing is scored."""
    victim = next((copied / "predictions").rglob("t1.h5"))
    victim.unlink()
    assert wsiflow(*over(small_slides, copied)) == 40
    bad = [row for row in rows(copied / "process_list.csv") if row["status"] == "failed"]
    assert [row["slide_id"] for row in bad] == [victim.parent.name]
    assert "t1.h5" in bad[0]["reason"]


def test_a_process_that_outlives_a_run_follows_the_next_one(tiny_slides: Path, tmp_path: Path) -> None:
    """A second run in a folder of the same name, after the first was deleted, uses only its own settings."""
    out = tmp_path / "run"
    found = {}
    for stride, threshold in ((112, 0.05), (56, 0.95)):
        settings = [f"inference.stride={stride}", f"lesions.threshold={threshold}"]
        assert wsiflow(*over(tiny_slides, out, "dataset.limit=1", *settings)) == 0
        _, about = read_heatmap(out / "heatmaps/a.tif")
        planned = latest_plan(out).settings
        assert (about["frame"]["stride_px"], planned.lesions.threshold) == (stride, threshold)
        found[threshold] = (out / "detections/a.csv").read_text()
        shutil.rmtree(out)
    assert found[0.05] != found[0.95]


class StaleWorkers:
    """An executor whose workers follow another plan in one stage, so that their files have other keys."""

    def __init__(self, stage: str) -> None:
        self._stage = stage

    def run(self, work, source, stage, slices):
        for outcome in Inline().run(work, source, stage, slices):
            receipt = outcome.receipt
            yield outcome._replace(receipt={**receipt, "key": "f" * 64}) if stage == self._stage else outcome


@pytest.mark.parametrize("stage", ["extract", "predict", "certify", "stitch", "detect"])
def test_the_driver_compares_every_receipt_with_its_plan(tiny_slides: Path, tmp_path: Path, stage: str) -> None:
    """A slide fails where a worker published a file with another key; receipts on disk are compared likewise."""
    config = command.compose_config(over(tiny_slides, tmp_path / "run", "dataset.limit=1"))
    cases = shards.begin(config)
    pool = Inline()
    shards.choose(pool, cases)
    planned = ingest.make_plan(cases, shards.ingest_shard(pool, cases, [0]))
    progress = shards.line(StaleWorkers(stage), planned, [0], 0)
    assert progress.slides == ()
    failed = [one for one in progress.ended if one.failure]
    assert {(one.stage, one.failure.exit_code) for one in failed} == {(stage, 40)}
    assert "the plan asks for" in failed[0].failure.cause


def test_lesions_of_two_maps_behind_a_gate(tiny_slides: Path, tiny_run: Path, tmp_path: Path) -> None:
    """The map of another run takes part in the confidences, and a slide that does not pass the gate has no lesion."""
    other, scores, out = tmp_path / "other", tmp_path / "scores.csv", tmp_path / "run"
    for name in ("a", "b"):
        heat, about = read_heatmap(tiny_run / f"heatmaps/{name}.tif")
        (other / "heatmaps").mkdir(parents=True, exist_ok=True)
        write_heatmap(other / f"heatmaps/{name}.tif", 1 - heat, um_px=1.0, description=about)
    scores.write_text("slide_id,score\na,0.75\nb,0.5\n")
    given = ["lesions.threshold=0", "lesions.gate=0.5", f"lesions.slide_scores={scores}", f"lesions.second={other}"]
    command = over(tiny_slides, out, *given, "evaluation.bootstrap=0")
    assert wsiflow(*command) == 0
    confidences = [float(line.split(",")[0]) for line in (out / "detections/a.csv").read_text().splitlines()]
    assert confidences
    assert set(confidences) == {0.375}  # the mean of p and 1 - p, times the slide's score
    assert (out / "detections/b.csv").read_text() == ""
    scores.write_text("slide_id,score\na,0.8\nb,0.5\n")
    assert wsiflow(*command) == 40, "detections of former scores are not mixed with those of new ones"
    shutil.rmtree(other)
    assert wsiflow(*over(tiny_slides, tmp_path / "without", *given)) == 20


def test_a_receipt_of_another_run_fails_its_slide(tiny_slides: Path, tiny_run: Path, tmp_path: Path) -> None:
    """Its slide fails with exit code 40, so that no file of other settings is scored."""
    out = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    receipt = out / "receipts/detections/a.csv.json"
    overwrite(receipt, receipt.read_text().replace('"key": "', '"key": "f'))
    assert wsiflow(*over(tiny_slides, out)) == 40
    bad = [row for row in rows(out / "process_list.csv") if row["status"] == "failed"]
    assert [row["slide_id"] for row in bad] == ["a"]
    assert "other inputs or settings" in bad[0]["reason"]


def test_the_end_of_a_run_reads_each_receipt_and_attempt_once(
    small_slides: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slide has ten receipts, and there are data sets of tens of thousands of slides."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    config = command.compose_config(over(small_slides, out))
    clock, names, logs = finish.Clock(config), [], []
    read, attempts_of = publish.read_receipt, trace.attempts
    monkeypatch.setattr(publish, "read_receipt", lambda root, name: names.append(name) or read(root, name))
    monkeypatch.setattr(trace, "attempts", lambda root: logs.append(root) or attempts_of(root))
    assert finish.finish(config, out / "plan.json", [], clock).exit_code == 0
    # Receipts of detections and heatmaps are read again, with those that their keys follow from.
    counted = [name for name in names if not name.startswith(("detections/", "heatmaps/", "predictions/"))]
    assert max(Counter(counted).values()) <= 2, "config.yaml tells where the folder was begun"
    assert max(Counter(names).values()) <= 4
    assert logs == [out]


def by_hand(path: Path, width: int, height: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the stride-16 map of a slide in the reference's geometry and its first tile, by OpenSlide and loops."""
    from wsiflow.model.classifier import load, predict
    from wsiflow.plan.tissue import reference_index
    from wsiflow.slides.slide import open_slide

    classifier = load(ModelSpec(card="pkg:demo.json", trust_torchscript=False, sha256="", positive_class=""))
    with open_slide(path, slide_id="s") as opened:
        index = reference_index(opened.reference_thumbnail())
    _, _, _, xmin, _, ymin, _, nrows, ncols = index.vector.tolist()
    expected = np.full((nrows * 14, ncols * 14), np.nan, np.float32)
    with openslide.OpenSlide(path) as slide:
        for row, col in np.argwhere(index.mask).tolist():
            x, y = (224 * k - 112 if k else 0 for k in (col, row))
            x = width - 447 if x + 448 > width else x
            y = height - 447 if y + 448 > height else y
            region = slide.read_region((x, y), 0, (448, 448))
            patch = Image.new("RGB", (448, 448), "white")
            patch.paste(region, (0, 0), region)
            pixels = np.array(patch)
            for i in range(14):
                windows = np.stack([pixels[16 * i : 16 * i + 224, 16 * j : 16 * j + 224] for j in range(14)])
                cells = slice((col - xmin) * 14, (col - xmin + 1) * 14)
                expected[(row - ymin) * 14 + i, cells] = predict(classifier, windows)
    return expected, (xmin, ymin)


@pytest.fixture(scope="module")
def slide_by_hand(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, tuple[int, int]]:
    """A slide whose last patches on both axes are shifted inwards, with its map and its first tile."""
    from wsiflow.slides.synthetic import dataset

    spec = dataset.plan_slide("micro", width_px=1000, height_px=910, seed=3)
    corner = np.ascontiguousarray(np.concatenate(list(dataset._bands(spec)))[:690, -780:])
    height, width = corner.shape[:2]
    path = tmp_path_factory.mktemp("by hand") / "s.tif"
    pyramid.write_rgb(path, iter([corner]), shape=(height, width), um_px=0.243, quality=90)
    return path, *by_hand(path, width, height)


@pytest.mark.parametrize("engine", ["window", "dense"])
def test_reference_geometry_equals_a_loop_over_openslide_reads(
    slide_by_hand: tuple[Path, np.ndarray, tuple[int, int]], tmp_path: Path, engine: str
) -> None:
    """With stride 16 and the reference geometry, every cell has the score of the window that the paper cuts there."""
    path, expected, first = slide_by_hand
    out = tmp_path / "run"
    reference = ["geometry=reference", "tiles=patch", "inference.stride=16", f"inference.engine={engine}"]
    assert wsiflow("dataset=single", f"dataset.path={path}", f"out={out}", *COARSE, *reference) == 0
    heat, about = read_heatmap(out / "heatmaps/s.tif")
    assert (about["frame"]["t_col0"], about["frame"]["t_row0"]) == first
    assert np.isfinite(expected[:, -14:]).any(), "the last column of tiles, which is shifted, has scores"
    np.testing.assert_allclose(heat, expected, atol=1e-5)


def test_the_certificate_is_part_of_every_dense_run(finished: Path) -> None:
    """Single windows agree to rounding for every slide and over all; the numbers are in the summary."""
    summary = json.loads((finished / "evaluation/summary.json").read_text())
    assert summary["dense.max_abs_diff"] <= 1e-5
    assert summary["dense.flips"] == 0
    listed = [row for row in rows(finished / "evaluation/certificates.csv") if row["windows"] == "all"]
    assert {row["slide_id"] for row in listed} == {row["slide_id"] for row in rows(finished / "process_list.csv")}
    assert sum(int(row["n"]) for row in listed) == summary["dense.n"] > 6 * 30
    assert (summary["certificate.froc_difference"], summary["certificate.lesions_lost"]) == (0, 0)
    assert summary["certificate.froc_difference_ci_low"] < 0, "three tumour slides do not exclude a loss"
    assert "windows run alone in fp32: mean |dp|" in (finished / "report.html").read_text()


def test_the_plan_names_the_workers_kind_of_machine(small_slides: Path, tmp_path: Path, monkeypatch) -> None:
    """The driver may have another processor than the workers: that of the workers is in every key."""
    config = command.compose_config([*over(small_slides, tmp_path / "run"), "dataset.limit=1"])
    cases = shards.begin(config)
    with executor.make(config.executor, cores=1, root=config.out) as pool:
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(choose, "numeric_class", lambda: {"isa": "of the nodes"})
            shards.choose(pool, cases)
        plan = read_plan(ingest.make_plan(cases, shards.ingest_shard(pool, cases, [0])))
    assert plan.settings.numeric_class == {"isa": "of the nodes"}
