"""Points of the experiments on accuracy and cost: strides, stain normalisation, engines.

Strides are compared by whole runs of wsiflow on synthetic slides with known lesions; a run that several points use is
executed once. Stain normalisation and engines are compared on synthetic tissue without slides. Nothing here is a
clinical result.
"""

import csv
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks import networks, product
from flows.compose import compose_config
from wsiflow.errors import InputError
from wsiflow.heatmap import assembly
from wsiflow.model.choice import Choice, reason_scores_differ
from wsiflow.model.classifier import Classifier, load
from wsiflow.plan.geometry import Frame, subsampling
from wsiflow.run.plan import read_plan
from wsiflow.slides.stain import transfer
from wsiflow.slides.stain.params import StainFit, StainParams
from wsiflow.slides.synthetic import dataset

_WAYS = {
    "dense": (),
    "window": ("inference.engine=window",),
    "reference": ("geometry=reference", "tiles=patch"),
}
_REFERENCE = "reference loop"
_TISSUE_PX = 4 * networks.TILE_PX


class _StrideRun(NamedTuple):
    """Results of a run: the choice of its engine, transforms and heatmaps by slide id, and its metrics."""

    choice: Choice
    frames: dict[str, Frame]
    maps: dict[str, NDArray[np.float32]]
    metrics: dict[str, float]


@cache
def _folder() -> Path:
    """Return a temporary folder that all points share."""
    return Path(tempfile.mkdtemp(prefix="wsiflow-tradeoffs-"))


@cache
def _slides(size_px: int, seed: int) -> Path:
    return dataset.write_dataset(_folder() / f"slides-{size_px}-{seed}", size_px=size_px, seed=seed)


@cache
def _run(way: str, stride: int, size_px: int, seed: int) -> _StrideRun:
    """Run the line on synthetic slides at one stride."""
    manifest = _slides(size_px, seed)
    overrides = ["dataset=manifest", f"dataset.manifest={manifest}", f"inference.stride={stride}", "executor=inline"]
    with product.run(_folder(), *overrides, "store=none", *_WAYS[way]) as (out, metrics):
        run_plan = read_plan(out / "plan.json")
        frames = {planned.slide_id: planned.frame for planned in run_plan.slides}
        return _StrideRun(run_plan.settings.choice, frames, product.heatmaps(out), metrics)


def stride(settings: dict[str, Any], *, seed: int) -> dict[str, float]:
    """Run at a stride, and compare its heatmaps with the same cells of finer heatmaps that have the same windows."""
    way, stride_px, size_px = settings["way"], settings["stride"], settings["size_px"][settings["quick"]]
    result = _run(way, stride_px, size_px, seed)
    base = _run(way, settings["base"][way], size_px, seed)
    metrics = result.metrics
    windows = sum(np.isfinite(one).sum() for one in result.maps.values())
    infer_s = metrics["cost.infer_core_s"]
    squared = (settings["base"][way] / stride_px) ** 2
    return {
        "windows": float(windows),
        "infer_core_s": infer_s,
        "core_s": 3600 * metrics["throughput.core_hours"],
        "cost_ratio": infer_s / base.metrics["cost.infer_core_s"],
        "squared": squared,
        "froc": metrics["froc.score"],
        "froc_strict": metrics["froc.strict_score"],
        "auc": metrics["roc.auc"],
        "subsampled_diff": _subsampled_diff(result, settings | {"seed": seed}),
    }


def _subsampled_diff(result: _StrideRun, settings: dict[str, Any]) -> float:
    """Return the largest difference between a heatmap and the same cells of a finer one; NaN where there are none."""
    worst, way = np.nan, settings["way"]
    for fine_px in settings["fine"][way]:
        planned = {slide: frame._replace(stride_px=fine_px) for slide, frame in result.frames.items()}
        try:
            for slide, frame in result.frames.items():
                subsampling(planned[slide], frame)
        except InputError:
            continue
        fine = _run(way, fine_px, settings["size_px"][settings["quick"]], settings["seed"])
        if fine_px == settings["stride"] or reason_scores_differ(fine.choice, result.choice):
            continue
        for slide, heat in result.maps.items():
            taken = assembly.subsample(fine.maps[slide], fine.frames[slide], result.frames[slide])
            if not np.array_equal(np.isnan(taken), np.isnan(heat)):
                return np.inf
            worst = np.nanmax([worst, np.nanmax(np.abs(taken - heat), initial=0.0)])
    return float(worst)


def colours(settings: dict[str, Any], *, seed: int) -> dict[str, float]:
    """Normalise the stain of synthetic tissue patch by patch, with one fit for all patches or one for each."""
    side = settings["patch_px"]
    count = 3 if settings["quick"] else settings["patches"]
    first = 37 * seed  # another part of the tissue for each repeat
    pixels = networks.tissue((count + 1) * side)[first : first + count * side, : count * side].copy()
    params = compose_config([f"stain={settings['method']}"]).stain
    params = params.model_copy(update={"per_patch": settings["fitted"] == "patch", "on_failure": "raw"})
    clock = time.perf_counter()
    fitted = None if params.per_patch or params.method == "none" else transfer.fit(pixels, params)
    fit_s = time.perf_counter() - clock
    once, patch_s, failed = _normalised(pixels, fitted, params, side)
    again, *_ = _normalised(pixels, fitted, params, side)
    return {
        "patch_ms": 1e3 * patch_s,
        "fit_ms": 1e3 * fit_s,
        "same_again": float(np.array_equal(once, again)),
        "seam": _seam(once, side) / _seam(pixels, side),
        "failed": float(failed),
    }


def _normalised(
    pixels: NDArray[np.uint8], fitted: StainFit | None, params: StainParams, side: int
) -> tuple[NDArray[np.uint8], float, int]:
    """Return the pixels normalised patch by patch, the median seconds per patch, and the number of failed patches."""
    result, seconds, failed = np.empty_like(pixels), [], 0
    for y in range(0, pixels.shape[0], side):
        for x in range(0, pixels.shape[1], side):
            clock = time.perf_counter()
            outcome = transfer.normalise_block(pixels[y : y + side, x : x + side], fitted, params)
            seconds.append(time.perf_counter() - clock)
            result[y : y + side, x : x + side] = outcome.rgb
            failed += bool(outcome.failure)
    return result, statistics.median(seconds), failed


def _seam(pixels: NDArray[np.uint8], side: int) -> float:
    """Return the mean difference of grey across borders of patches over that between other neighbouring pixels."""
    grey = pixels.astype(np.float64).mean(axis=2)
    across, inside = [], []
    for axis in (0, 1):
        steps = np.abs(np.diff(grey, axis=axis))
        border = np.arange(steps.shape[axis]) % side == side - 1
        across.append(np.compress(border, steps, axis=axis).ravel())
        inside.append(np.compress(~border, steps, axis=axis).ravel())
    return float(np.concatenate(across).mean() / np.concatenate(inside).mean())


@cache
def _classifier(name: str) -> Classifier:
    return load(networks.spec("pkg:demo.json")) if name == "demo" else networks.random_classifier(name)


def _places(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows and columns of ``count`` windows, spread evenly over the map of the tissue."""
    side = (_TISSUE_PX - networks.WINDOW_PX) // networks.STRIDE_PX + 1
    rows, cols = np.divmod(np.linspace(0, side * side - 1, count).astype(np.int64), side)
    return rows, cols


@cache
def _tissue(count: int) -> tuple[NDArray[np.uint8], list[NDArray[np.uint8]]]:
    """Return synthetic tissue, uint8 (rows, cols, 3), and ``count`` windows spread evenly over it."""
    pixels, side = networks.tissue(_TISSUE_PX), networks.WINDOW_PX
    corners = [(networks.STRIDE_PX * row, networks.STRIDE_PX * col) for row, col in zip(*_places(count), strict=True)]
    return pixels, [pixels[y : y + side, x : x + side] for y, x in corners]


@cache
def _engine(name: str, way: str) -> Callable[[int], NDArray[np.float32]]:
    """Return a prepared function that scores a number of windows of the tissue, or in a dense engine all of them."""
    if way == _REFERENCE:
        loop = networks.Reference(_classifier(name))
        return lambda count: loop.run(_tissue(count)[1])
    engine, backend, precision = way.split()
    pixels = _tissue(1)[0]
    made = networks.prepared(_classifier(name), networks.choice(engine, backend, precision), pixels)
    if engine == "window":
        return lambda count: networks.run_windows(made, _tissue(count)[1])  # type: ignore[arg-type]
    return lambda _count: networks.run_region(made, pixels)  # type: ignore[arg-type]


@cache
def _expected(name: str, count: int) -> NDArray[np.float32]:
    """Return float32 (count,), the scores of the windows by the loop of the reference system."""
    return _engine(name, _REFERENCE)(count)


def engine(settings: dict[str, Any], *, seed: int) -> dict[str, float]:
    """Score windows of synthetic tissue with an engine, and compare with the reference's loop on the same windows."""
    count = 2 * networks.BATCH if settings["quick"] else networks.WINDOWS_PER_TILE // 2
    run, expected = _engine(settings["network"], settings["way"]), _expected(settings["network"], count)
    if not seed:
        run(count)  # the first run prepares caches, which are not part of the speed
    clock, cpu = time.perf_counter(), time.process_time()
    scores = run(count)
    wall_s, cpu_s = time.perf_counter() - clock, time.process_time() - cpu
    same = scores if scores.ndim == 1 else scores[_places(count)]
    core_s = cpu_s / scores.size
    return {
        "windows_s": scores.size / wall_s,
        "windows_core_s": 1 / core_s,
        "slide_core_h": core_s * networks.WINDOWS_PER_TILE * _mean_tiles(settings["table"]) / 3600,
        "score_range": float(np.ptp(expected)),
        "mean_diff": float(np.abs(same - expected).mean()),
        "max_diff": float(np.abs(same - expected).max()),
    }


@cache
def _mean_tiles(table: str) -> float:
    """Return the mean of the published numbers of tiles per slide."""
    with Path(table).open(newline="", encoding="utf-8") as stream:
        return statistics.fmean(float(row["n_tiles_224"]) for row in csv.DictReader(stream))


POINTS = {"stride": stride, "colours": colours, "engine": engine}
