"""The stage ``stain``: it measures the colours of a slide."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError
from wsiflow.plan.slide_plan import SlidePlan, read_cut
from wsiflow.run import sharing
from wsiflow.run.costs import StageCost
from wsiflow.run.plan import Plan, Task, read_plan
from wsiflow.run.sharing import SharedFile
from wsiflow.run.stages import ingest
from wsiflow.run.stages.pixels import fit_key, fit_name, fits_slides, open_planned
from wsiflow.run.stages.stage import Stage
from wsiflow.slides.stain import transfer
from wsiflow.slides.stain.params import StainParams
from wsiflow.slides.stain.pixels import sample, stratified_indices
from wsiflow.system import publish
from wsiflow.system.provenance import facts


def tissue_sample(root: Path, planned: SlidePlan, params: StainParams) -> NDArray[np.uint8]:
    """Return a sample of the pixels of tissue tiles from all over a slide, uint8 (n, 3)."""
    cells = [(first + i, row) for row, first, length in read_cut(root, planned).tile_runs for i in range(length)]
    side = planned.frame.tile_px
    with open_planned(root, planned) as opened:
        tiles = [
            opened.read_scaled(col * side, row * side, (side, side), l0_per_px=planned.frame.l0_per_px).rgb
            for col, row in (cells[i] for i in stratified_indices(len(cells), params.sample_tiles).tolist())
        ]
    return sample(np.stack(tiles), None, params.sample_px)


def fit_stain(source: Path, index: int) -> tuple[publish.Receipt, bool]:
    """Measure the colours of a slide on a sample of its tissue, and publish them as ``stain/<slide>.json``.

    Raises:
        InputError: The slide cannot be read; or its colours cannot be measured, and the policy is to fail.
    """
    plan = read_plan(source)
    root, planned = source.parent, plan.slides[index]
    params, name = plan.settings.stain, fit_name(planned)
    key = STAGE.key_of(root, plan, index)
    place = SharedFile(ingest.shared_folder(root), root, name, key)
    done = sharing.done(place)
    if done is not None:
        return done, False
    record: dict[str, Any] = {"fit": None, "failure": ""}
    with sharing.publishing(place, facts("stain", planned.slide_id), publish.accept) as attempt:
        with attempt.timed("stain"):
            pixels = tissue_sample(root, planned, params)  # an unreadable slide fails whatever the policy
            try:
                record["fit"] = dataclasses.asdict(transfer.fit(pixels, params))
            except InputError as error:
                if params.on_failure == "fail":
                    raise
                record["failure"] = error.cause
                attempt.receipt["stain_failures"] = [(0, 0, f"the whole slide: {error.cause}")]
        attempt.path.write_text(json.dumps(record, sort_keys=True), encoding="utf-8")
    return attempt.receipt, True


def _is_due(plan: Plan, slide: int) -> bool:
    return fits_slides(plan.settings.stain) and plan.slides[slide].n_tiles > 0


def _key(root: Path, plan: Plan, task: Task) -> str:
    return fit_key(root, plan.slides[task.slide], plan.settings.stain)


STAGE = Stage(
    name="stain",
    unit="slide",
    work=fit_stain,
    product=lambda plan, task: fit_name(plan.slides[task.slide]),
    key=_key,
    cost=StageCost(2.0, 0.0),
    steps=("stain",),
    is_due=_is_due,
)
