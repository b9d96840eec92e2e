"""The line's stages: their order, which of them a run asks for, and what their tasks publish."""

import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from wsiflow import certify, publish, reading, scoring
from wsiflow.plan import Plan

#: Stages after the plan, in order.
LINE = ("stain", "extract", "index", "predict", "certify", "stitch", "detect")

#: Stages that hand pixels on, for runs that store them.
STORES = frozenset({"extract", "index"})


def is_due(made: Plan, stage: str, slide: int) -> bool:
    """Tell whether the run's settings ask for a stage of a slide."""
    if stage in STORES:
        return bool(made.work["store"]["kind"] == "hdf5")
    if stage == "stain":
        return reading.fits_slides(reading.stain_params(made)) and made.slides[slide].n_tiles > 0
    return stage != "certify" or certify.is_needed(made)


def product(made: Plan, stage: str, index: int) -> str:
    """Return the name of the file that a task of a stage publishes, relative to the run's folder."""
    task = made.task(stage, index)
    planned = made.slides[task.slide]
    names = {
        "stain": reading.fit_name(planned),
        "extract": reading.part_name(planned, task.group),
        "index": f"patches/{planned.slide_id}.h5",
        "predict": scoring.prediction_name(made, task),
        "certify": certify.certificate_name(planned),
        "stitch": f"heatmaps/{planned.slide_id}.tif",
        "detect": f"detections/{planned.slide_id}.csv",
    }
    return names[stage]


def census(root: Path, made: Plan) -> dict[str, tuple[int, int]]:
    """Return how many tasks of each stage are published, and how many were planned, as the receipts' names tell.

    Each folder of receipts is looked at once, however many tasks there are.
    """
    there = _listing(root)
    found = {}
    for stage in LINE:
        slides = (slide for slide in range(len(made.slides)) if is_due(made, stage, slide))
        if stage in STORES:  # a slide without tissue may have no pixels to store
            slides = (slide for slide in slides if made.slides[slide].n_tiles)
        names = (product(made, stage, task) for slide in slides for task in made.tasks_of(stage, slide))
        done = [there(name) for name in names]
        if done:
            found[stage] = (sum(done), len(done))
    return found


def ingested(root: Path, slides: Iterable[str]) -> int:
    """Return how many slides have been looked at."""
    there = _listing(root)
    return sum(there(f"tissue/{slide}.json") for slide in slides)


def _listing(root: Path) -> Callable[[str], bool]:
    """Return a function that tells whether a name has a receipt."""

    @cache
    def names(folder: str) -> frozenset[str]:
        try:
            with os.scandir(root / publish.RECEIPTS / folder) as found:
                return frozenset(item.name for item in found)
        except (FileNotFoundError, NotADirectoryError):
            return frozenset()

    def there(name: str) -> bool:
        folder, _, last = name.rpartition("/")
        return f"{last}.json" in names(folder)

    return there
