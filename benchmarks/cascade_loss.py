"""Measure what a cascade loses: its FROC score against that of whole runs, on many slides with one small lesion each.

The bound of a paired loss needs slides, because the lesions of a slide depend on each other: where none is lost, about
190 exclude a loss of 0.02 (score interval of Tango, 95 %). So the slides are small, and the run's own network is the
demo network. It scores whole slides once; what a cascade would pass over is then left out of its maps, since the scores
of a cascade are those of a whole run (`tests/run/test_cascade.py`). The first pass is `pcam`, and its threshold is the
highest that keeps every lesion of other slides. The slides are synthetic, so that nothing here is a clinical result.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import product
from benchmarks.cascade import NONE, PCAM, Slides, paired_loss, with_slides, write_slides
from benchmarks.measuring import ResultTable, arguments, finish, machine, say
from wsiflow.evaluation.detections import format_detections
from wsiflow.evaluation.evaluate import Existing, evaluate_existing
from wsiflow.evaluation.matches import read_matches
from wsiflow.evaluation.truth import planned_truth
from wsiflow.heatmap import files, lesions
from wsiflow.plan import cascade, geometry
from wsiflow.plan.slide_plan import SlidePlan
from wsiflow.run.config import evaluation_params
from wsiflow.run.plan import Plan, latest_plan
from wsiflow.run.stages import ingest, threshold
from wsiflow.run.stages.stitch import cell_um

_FULL, _QUICK = Slides(3072, 195, 5, 32), Slides(3072, 2, 1, 1)
_MARGIN_UM = 100.0

Mask = Callable[[SlidePlan, NDArray[np.float32]], NDArray[np.float32]]
"""``mask(planned, heat)`` returns the heatmap of a slide, (rows, cols), with NaN where nothing is scored."""


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the cascade with a whole run, and write ``cascade_loss.json``."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--lesions", type=int, help=f"number of slides with a lesion, default {_FULL.tumour}")
    parser.add_argument("--size-px", type=int, help=f"side of the slides, default {_FULL.size_px}")
    with_slides(parser)
    given = parser.parse_args(argv)
    slides, about = _QUICK if given.quick else _FULL, machine()
    slides = slides._replace(tumour=given.lesions or slides.tumour, size_px=given.size_px or slides.size_px)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = write_slides(folder, slides, given)
        common = ["inference.stride=32", "store=none", "executor=process", f"executor.workers={given.workers}"]
        common += ["dense.windows=0", "dataset=manifest"]
        others, tested = (f"dataset.manifest={each}" for each in (written.development, written.tested))
        with product.run(folder, *common, "model=pcam", others) as (development, _):
            least = threshold_of(development)
        with (
            product.run(folder, *common, "model=pcam", tested) as (first, _),
            product.run(folder, *common, "model=demo", tested) as (whole, _),
        ):
            values = compared(written.tested, whole, first, least, folder)
    finish(given, "cascade_loss", about, values, [table(values)])


def threshold_of(development: Path) -> float:
    """Return the highest threshold of a first pass that keeps all lesions of the slides of a run."""
    plan, highest = latest_plan(development), list[float]()
    for planned in plan.slides:
        truth = planned_truth(planned, ingest.case_of(planned), plan.settings.evaluation)
        if truth is not None:
            heat, _ = files.read_heatmap(development / f"heatmaps/{planned.slide_id}.tif")
            highest += threshold.highest_scores(
                heat, planned.frame, truth, downsample=plan.settings.evaluation.downsample
            )
    return float(threshold.threshold_that_keeps(highest, 1.0) or 0.0)


def compared(manifest: Path, whole: Path, first: Path, least: float, folder: Path) -> dict[str, Any]:
    """Return what whole runs and cascades find, and the paired loss with its bound.

    Args:
        manifest: The slides.
        whole: Folder of the run whose network scores all tissue.
        first: Folder of the run, or of the first pass, of the network of the first pass.
        least: The threshold of the first pass.
        folder: Folder to write to.
    """
    plan, frames = latest_plan(whole), {each.slide_id: each.frame for each in latest_plan(first).slides}
    cells, kept = [0, 0], [0, 0]

    def mask(planned: SlidePlan, heat: NDArray[np.float32]) -> NDArray[np.float32]:
        scores, _ = files.read_heatmap(first / f"heatmaps/{planned.slide_id}.tif")
        limits = {"threshold": least, "margin_um": _MARGIN_UM}
        looked = cascade.looked_at(scores, frames[planned.slide_id], planned.frame, **limits)
        is_normal = int(planned.label == 0)
        cells[is_normal] += int(np.isfinite(heat).sum())
        kept[is_normal] += int((np.isfinite(heat) & looked).sum())
        return np.where(looked, heat, np.float32(np.nan))

    ways: dict[str, Mask] = {NONE: lambda _planned, heat: heat, PCAM: mask}
    records = {}
    for name, masking in ways.items():
        say(f"first pass: {name}")
        _detect(plan, whole, masking, folder / name)
        existing = Existing(manifest, folder / name, None, None)
        evaluate_existing(
            existing, evaluation_params("own_spacing", {"bootstrap": 0}), seed=0, out=folder / f"of {name}"
        )
        records[name] = read_matches(folder / f"of {name}/matches.json")
    loss = paired_loss(records[NONE], records[PCAM])
    shares = [1 - mine / every if every else float("nan") for mine, every in zip(kept, cells, strict=True)]
    found = {name: record.setting(name).matches for name, record in records.items()}
    return {
        "slides": len(plan.slides),
        "lesions": sum(len(each.best) - each.n_itc for each in found[NONE]),
        "found": {name: sum(int(np.isfinite(each.best).sum()) for each in every) for name, every in found.items()},
        "threshold": least,
        "passed_over": dict(zip(("slides with a lesion", "normal slides"), shares, strict=True)),
        **loss,
    }


def _detect(plan: Plan, whole: Path, mask: Mask, folder: Path) -> None:
    """Write the detections on the masked heatmaps of a run, a file for each slide."""
    folder.mkdir()
    for planned in plan.slides:
        heat, _ = files.read_heatmap(whole / f"heatmaps/{planned.slide_id}.tif")
        found = lesions.detect(mask(planned, heat), plan.settings.lesions, cell_um=cell_um(planned.frame))
        l0 = np.column_stack([found[:, 0], geometry.l0_from_h(planned.frame, found[:, 1:3])])
        (folder / f"{planned.slide_id}.csv").write_text(format_detections(l0), encoding="utf-8")


def table(values: Mapping[str, Any]) -> ResultTable:
    """Return the table of the paired loss."""
    shares = values["passed_over"]
    row = [f"{values['slides']}", f"{values['lesions']}", f"{values['found'][NONE]}", f"{values['found'][PCAM]}"]
    row += [f"{values['scores'][way]:.4f}" for way in (0, 1)]
    row += [f"{values['froc_loss']:+.4f}", f"{values['froc_loss_at_most']:.4f}"]
    columns = ["slides", "lesions", "found by the whole run", "by the cascade", "strict FROC, whole run", "cascade"]
    columns += ["loss, paired", "a loss above is excluded (95 %)", *(f"passed over, {name}" for name in shares)]
    row += [f"{share:.1%}" for share in shares.values()]
    return ResultTable("Loss of a cascade on many small slides with one micrometastasis each", columns, [row])


if __name__ == "__main__":
    main()
