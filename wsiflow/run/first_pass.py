"""The first pass of a cascade: a run of its own, in the folder ``first`` of the run whose slides it looks through.

Its configuration follows from that of the run. It goes through the line as far as the heatmaps, `STAGES` names the
stages, with its own choice of the engine, plan and receipts, so that it resumes, verifies and is charged as any run.
It is given no truth. Trials of a sweep that differ in the run's own pass alone share its scores.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError
from wsiflow.heatmap import files
from wsiflow.model.cascade import CascadeParams
from wsiflow.plan.geometry import Frame
from wsiflow.run.config import RunConfig
from wsiflow.run.plan import latest_plan
from wsiflow.run.settings import Cascade
from wsiflow.slides.manifest import Case
from wsiflow.system import faults, publish

FOLDER = "first"
"""Folder of the first pass over the run's slides, in the run's folder."""

DEVELOPMENT = "development"
"""Folder of the first pass over other slides, on which the threshold is chosen, in the run's folder."""

THRESHOLD = "threshold.json"
"""Name of the file of the chosen threshold, in that folder."""

_NAMES = {FOLDER: "first pass", DEVELOPMENT: "first pass over development slides"}

#: Names of the stages of the line that a first pass goes through.
STAGES = ("stain", "predict", "stitch")


def folder_of(root: Path) -> Path:
    """Return the folder of the first pass of a run."""
    return root / FOLDER


def folder_at_work(root: Path) -> Path:
    """Return the folder in which a run does its work at present: its own, or that of a first pass before it has a plan.

    The threshold is chosen on the development slides before those under test are looked through.
    """
    if publish.generations(root, "plan.json"):
        return root
    development = root / DEVELOPMENT
    unchosen = [development] if not (development / THRESHOLD).exists() else []
    begun = (folder for folder in (*unchosen, folder_of(root)) if publish.generations(folder, "cases.json"))
    return next(begun, root)


def name_of(root: Path) -> str:
    """Return what a user calls the run in a folder where it is a first pass; empty where it is not."""
    return _NAMES[root.name] if is_first_pass(root) else ""


def is_first_pass(root: Path) -> bool:
    """Tell whether a folder is that of a first pass, in the folder of a run."""
    return root.name in {FOLDER, DEVELOPMENT} and bool(publish.generations(root.parent, "cases.json"))


def config_of(config: RunConfig, out: Path) -> RunConfig:
    """Return the configuration of the first pass of a run, in a folder.

    Pixels are read from the slides, since the run's own pass reads others. The first pass has the precision, colours
    and tissue of the run, and blocks of its own.
    """
    cascade, model = config.inference.cascade, config.model.model_copy(update={"maps": ()})
    if cascade.model is not None:
        model = model.model_copy(update={"card": cascade.model, "sha256": "", "positive_class": ""})
    changes: dict[str, Any] = {
        "out": out,
        "model": model,
        "geometry": {"spacing": cascade.um_px},
        "inference": {"cascade": CascadeParams(), "stride": cascade.stride},
        "dense": {"share_until": ""},
        "store": {"kind": "none"},
        "lesions": {"second": None, "gate": None, "slide_scores": None},
    }
    if not config.tiles.block_rows == config.tiles.block_cols == 1:
        changes["tiles"] = {"halo_px": "auto", "block_cols": "auto"}
    return config.model_copy(
        update={
            name: getattr(config, name).model_copy(update=change) if isinstance(change, dict) else change
            for name, change in changes.items()
        }
    )


def without_truth(cases: Sequence[Case]) -> list[Case]:
    """Return cases without their labels and annotations, which a first pass must not know."""
    return [dataclasses.replace(case, label=None, annotation_path=None, mask_path=None) for case in cases]


def settings_of(root: Path, config: RunConfig) -> Cascade | None:
    """Return what of the cascade decides where a run looks; None where it has no first pass.

    Raises:
        InputError: The first pass has no plan yet.
    """
    cascade = config.inference.cascade
    if not cascade.is_on or is_first_pass(root):
        return None
    first = latest_plan(folder_of(root)).settings
    threshold, development = cascade.threshold, ()
    if threshold == "auto":
        record = chosen_threshold(root)
        threshold, development = record["threshold"], record["development"]
    return Cascade(
        threshold=threshold,
        margin_um=cascade.margin_um,
        first=publish.key_of(cut=first.of_tiles, predict=first.of_scores),
        development=development,
    )


def chosen_threshold(root: Path) -> dict[str, Any]:
    """Return the record of the threshold that was chosen on development slides.

    Raises:
        InputError: It was not chosen.
    """
    path = root / DEVELOPMENT / THRESHOLD
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise faults.unreadable(error, "the threshold of the first pass", "run again", path=path) from error
    return record


def has_heatmap(root: Path, slide_id: str) -> bool:
    """Tell whether the first pass of a run has a heatmap of a slide."""
    return publish.read_receipt(folder_of(root), f"heatmaps/{slide_id}.tif") is not None


def heatmap_receipt(root: Path, slide_id: str) -> publish.Receipt:
    """Return the receipt of the first pass's heatmap of a slide of a run.

    Raises:
        InputError: The first pass has none.
    """
    name = f"heatmaps/{slide_id}.tif"
    receipt = publish.read_receipt(folder_of(root), name)
    if receipt is None:
        cause, remedy = "the first pass has no scores of the slide", "fix what it failed for, and run again"
        raise InputError(cause, remedy, slide=slide_id, path=folder_of(root) / name)
    return receipt


def read_heatmap(root: Path, slide_id: str) -> tuple[NDArray[np.float32], Frame]:
    """Return the first pass's heatmap of a slide of a run, float32 (rows, cols), and its transform.

    Raises:
        InputError: The first pass has no heatmap of the slide.
        IntegrityError: The heatmap differs from its receipt.
    """
    receipt = heatmap_receipt(root, slide_id)
    publish.check(folder_of(root), receipt)
    heat, about = files.read_heatmap(folder_of(root) / receipt["path"])
    return heat, Frame(**about["frame"])


def known_sha256(root: Path, slide_id: str, signature: str) -> str:
    """Return the SHA-256 that the first pass has found of a slide; empty where it has none, or files were touched."""
    for folder in (folder_of(root), folder_of(root.parent)):  # the latter of a run that is planned in its place
        path = folder / f"tissue/{slide_id}.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if record.get("signature") == signature:
            return str(record["sha256"])
    return ""
