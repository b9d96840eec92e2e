"""Run wsiflow itself on slides that are written for the purpose, and read the cost of the runs from their receipts."""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flows import line
from flows.compose import compose_config
from wsiflow.heatmap import files
from wsiflow.run.plan import read_plan
from wsiflow.run.results import cost as throughput
from wsiflow.run.stages.measure import areas_px
from wsiflow.slides import pyramid
from wsiflow.slides.synthetic import dataset
from wsiflow.slides.synthetic.tissue import UM_PX, SlideSpec, render
from wsiflow.system.machine import limit_threads

STEPS = (*throughput.STEPS, "other")
_BAND_PX = 512
QUIET = ("orchestrator=none", "tracking=off", "evaluation.bootstrap=0")


class RunCost(NamedTuple):
    """The cost of a run.

    Attributes:
        tiles: Number of predicted tissue tiles.
        core_s: Core-seconds by step; ``other`` is that of receipts without steps (tables, previews, detections).
        stored_bytes: Size of the files of patches.
        area_overhead: Pixels read for blocks over pixels of tissue tiles.
        slide_span_s: Wall seconds from the start of the first task after the plan to the end of the last one.
        worker_bytes: Peak memory of each worker process.
    """

    tiles: int
    core_s: dict[str, float]
    stored_bytes: int
    area_overhead: float
    slide_span_s: float
    worker_bytes: list[int]

    @property
    def line_s_tile(self) -> float:
        """Core-seconds per tile of all steps except the certificate."""
        return sum(seconds for step, seconds in self.core_s.items() if step != "certify") / self.tiles


def write_slide(path: Path, side_px: int, *, seed: int = 0, workers: int = 1) -> Path:
    """Write a square synthetic slide, less than half of which is tissue; ``workers`` processes draw it."""
    drawn = dataset.plan_slide("micro", width_px=side_px, height_px=side_px, seed=seed)
    pyramid.write_rgb(path, _bands(drawn, workers), shape=(side_px, side_px), um_px=UM_PX, quality=85)
    return path


def _bands(drawn: SlideSpec, workers: int) -> Iterator[NDArray[np.uint8]]:
    jobs = [(drawn, y, min(_BAND_PX, drawn.height_px - y)) for y in range(0, drawn.height_px, _BAND_PX)]
    if workers == 1:
        yield from map(_band, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_band, jobs)


def _band(job: tuple[SlideSpec, int, int]) -> NDArray[np.uint8]:
    drawn, y, height_px = job
    return render(drawn, 0, y, drawn.width_px, height_px)


def write_manifest(folder: Path, slides: Sequence[Path]) -> Path:
    """Write a manifest of synthetic slides and return its path."""
    path = folder / "manifest.csv"
    lines = [f"{slide.stem},{slide},{UM_PX}" for slide in slides]
    path.write_text("\n".join(["slide_id,path,mpp", *lines]) + "\n", encoding="utf-8")
    return path


@contextlib.contextmanager
def run(folder: Path, *overrides: str) -> Iterator[tuple[Path, dict[str, float]]]:
    """Run the whole line in this process, without Prefect and MLflow.

    Args:
        folder: Parent of the run's folder. Every run has its own folder, since a process caches files by path.
        overrides: Overrides of the configuration, as on the command line.

    Yields:
        The run's folder, which is deleted at the end, and the metrics.

    Raises:
        RuntimeError: The exit code of the run is not 0.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        config = compose_config([f"out={name}/run", *QUIET, *overrides])
        limit_threads(config.executor.threads)
        summary = line.direct(config)
        if summary.exit_code:
            raise RuntimeError(f"the run ended with {summary.exit_code}: {summary.text}")
        yield config.out, summary.metrics


def run_command(out: Path, *overrides: str) -> None:
    """Run the whole line as a command in a process of its own."""
    command = Path(sys.executable).with_name("wsiflow")
    subprocess.run([command, "run", f"out={out}", *QUIET, *overrides], check=True, stdout=subprocess.DEVNULL)


def receipts(out: Path) -> list[dict[str, Any]]:
    """Return every receipt of a run."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "receipts").rglob("*.json"))]


def cost(out: Path) -> RunCost:
    """Return the cost of a run from the receipts of its slides; work that is done once per run is left out."""
    run_plan = read_plan(out / "plan.json")
    slides = [receipt for receipt in receipts(out) if receipt.get("slide") and "cpu_s" in receipt]
    steps = throughput.step_core_seconds(slides)
    tiles = sum(planned.n_tiles for planned in run_plan.slides)
    pixels_read = sum(areas_px(out, run_plan))
    after = [receipt for receipt in slides if receipt["kind"] != "tissue"]
    peaks: dict[int, int] = {}
    for receipt in slides:
        peaks[receipt["pid"]] = max(peaks.get(receipt["pid"], 0), receipt["max_rss_bytes"])
    return RunCost(
        tiles,
        steps | {"other": sum(receipt["cpu_s"] for receipt in slides) - sum(steps.values())},
        sum(receipt["bytes"] for receipt in slides if receipt["kind"] == "patches"),
        pixels_read / (tiles * run_plan.slides[0].frame.tile_px ** 2),
        max(_time(receipt, "ended") for receipt in after) - min(_time(receipt, "started") for receipt in after),
        sorted(peaks.values()),
    )


def tiles_per_s(out: Path) -> float:
    """Return the tiles per second that all workers predict together, each from its second task on."""
    own: dict[int, list[dict[str, Any]]] = {}
    for receipt in receipts(out):
        if receipt["kind"] == "prediction":
            own.setdefault(receipt["pid"], []).append(receipt)
    rate = 0.0
    for done in own.values():
        done.sort(key=lambda receipt: receipt["started"])
        rest = done[1:]  # the first task loads the network
        rate += sum(receipt["counts"]["tiles"] for receipt in rest) / (
            _time(rest[-1], "ended") - _time(rest[0], "started")
        )
    return rate


def _time(receipt: dict[str, Any], which: str) -> float:
    return datetime.fromisoformat(receipt[which]).timestamp()


def median_steps(costs: Sequence[RunCost]) -> dict[str, float]:
    """Return the median core-seconds per tile of each step."""
    return {step: statistics.median(each.core_s[step] / each.tiles for each in costs) for step in STEPS}


def heatmaps(out: Path) -> dict[str, NDArray[np.float32]]:
    """Return the heatmaps of a run by slide."""
    paths = [path for path in sorted((out / "heatmaps").glob("*.tif")) if "." not in path.stem]
    return {path.stem: files.read_heatmap(path)[0] for path in paths}
