"""The line's stages: their order, which of them a run asks for, and what their tasks publish under which key."""

import os
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

from wsiflow.errors import IntegrityError
from wsiflow.heatmap.lesions import LesionParams
from wsiflow.plan import plan
from wsiflow.plan.plan import Plan, SlidePlan, Task
from wsiflow.run import store
from wsiflow.run.stages import certify, predict
from wsiflow.run.stages.pixels import fit_key, fit_name, fits_slides, part_name, stain_params
from wsiflow.system import publish

#: Stages after the plan, in order.
LINE = ("stain", "extract", "index", "predict", "certify", "stitch", "detect")

#: Stages that hand pixels on, for runs that store them.
STORES = frozenset({"extract", "index"})


def is_due(made: Plan, stage: str, slide: int) -> bool:
    """Tell whether the run's settings ask for a stage of a slide."""
    if stage in STORES:
        return bool(made.work["store"]["kind"] == "hdf5")
    if stage == "stain":
        return fits_slides(stain_params(made)) and made.slides[slide].n_tiles > 0
    return stage != "certify" or certify.is_needed(made)


def beside(made: Plan, stage: str, index: int) -> list[str]:
    """Return the names of what a task publishes beside its product, for people to look at."""
    return picture_names(made.slides[index]) if stage == "detect" else []


def picture_names(planned: SlidePlan) -> list[str]:
    """Return the names of the pictures of a slide's heatmap: the pyramid for viewers, and the overlay."""
    return [f"heatmaps/{planned.slide_id}.preview.tif", f"heatmaps/{planned.slide_id}.png"]


def product(made: Plan, stage: str, index: int) -> str:
    """Return the name of the file that a task of a stage publishes, relative to the run's folder."""
    task = made.task(stage, index)
    planned = made.slides[task.slide]
    names = {
        "stain": fit_name(planned),
        "extract": part_name(planned, task.group),
        "index": f"patches/{planned.slide_id}.h5",
        "predict": predict.prediction_name(made, task),
        "certify": certify.certificate_name(planned),
        "stitch": f"heatmaps/{planned.slide_id}.tif",
        "detect": f"detections/{planned.slide_id}.csv",
    }
    return names[stage]


def key(root: Path, made: Plan, stage: str, index: int) -> str:
    """Return the key under which a task of a stage publishes its file: what decides the file's content.

    Raises:
        IntegrityError: The file is made of others of the run, and one of those is not published.
    """
    return _KEYS[stage](root, made, made.task(stage, index))


def lesion_params(made: Plan) -> LesionParams:
    """Return how the plan finds lesions on a heatmap."""
    return LesionParams.model_validate(made.settings["lesions"])


def _fit_key(root: Path, made: Plan, task: Task) -> str:
    return fit_key(root, made.slides[task.slide], stain_params(made))


def _part_key(root: Path, made: Plan, task: Task) -> str:
    planned, params = made.slides[task.slide], store.StoreParams.model_validate(made.work["store"])
    pixels = plan.pixels_key(planned, plan.read_cut(root, planned))
    numbers = list(made.part(*task))
    return publish.key_of(pixels=pixels, groups=numbers, compression=params.compression, loss=params.loss)


def _index_key(root: Path, made: Plan, task: Task) -> str:
    return publish.key_of(slide=made.slides[task.slide].key, parts=_published(root, made, "extract", task.slide))


def _certificate_key(root: Path, made: Plan, task: Task) -> str:
    return certify.certificate_key(made, made.slides[task.slide], _published(root, made, "predict", task.slide))


def _heatmap_key(root: Path, made: Plan, task: Task) -> str:
    return publish.key_of(slide=made.slides[task.slide].key, scores=_published(root, made, "predict", task.slide))


def _detections_key(root: Path, made: Plan, task: Task) -> str:
    heatmap = _published(root, made, "stitch", task.slide)[0]
    return publish.key_of(heatmap=heatmap, lesions=lesion_params(made).model_dump())


_KEYS: Mapping[str, Callable[[Path, Plan, Task], str]] = {
    "stain": _fit_key,
    "extract": _part_key,
    "index": _index_key,
    "predict": plan.task_key,
    "certify": _certificate_key,
    "stitch": _heatmap_key,
    "detect": _detections_key,
}


def _published(root: Path, made: Plan, stage: str, slide: int) -> list[str]:
    """Return the SHA-256 of what a stage has published of a slide, as the receipts say, in the order of the tasks.

    Raises:
        IntegrityError: Something is missing.
    """
    names = [product(made, stage, index) for index in made.tasks_of(stage, slide)]
    receipts = {name: publish.read_receipt(root, name) for name in names}
    missing = next((name for name, receipt in receipts.items() if receipt is None), None)
    if missing:
        raise IntegrityError(f"{missing} was not published", "run again", slide=made.slides[slide].slide_id)
    return [receipt["sha256"] for receipt in receipts.values() if receipt]


def census(root: Path, made: Plan) -> dict[str, tuple[int, int]]:
    """Return how many tasks of each stage are published and not deleted, and how many were planned.

    The names of files and receipts tell: each folder is looked at once, however many tasks there are.
    """
    there = _listing(root)
    found = {}
    for stage in LINE:
        slides = (slide for slide in range(len(made.slides)) if is_due(made, stage, slide))
        if stage in STORES:  # a slide without tissue may have no pixels to store
            slides = (slide for slide in slides if made.slides[slide].n_tiles)
        tasks = (task for slide in slides for task in made.tasks_of(stage, slide))
        done = [all(map(there, [product(made, stage, task), *beside(made, stage, task)])) for task in tasks]
        if done:
            found[stage] = (sum(done), len(done))
    return found


def ingested(root: Path, slides: Iterable[str]) -> int:
    """Return how many slides have been looked at."""
    there = _listing(root)
    return sum(there(f"tissue/{slide}.json") for slide in slides)


def _listing(root: Path) -> Callable[[str], bool]:
    """Return a function that tells whether a name has a receipt and its file."""

    @cache
    def names(folder: Path) -> frozenset[str]:
        try:
            with os.scandir(folder) as found:
                return frozenset(item.name for item in found)
        except (FileNotFoundError, NotADirectoryError):
            return frozenset()

    def there(name: str) -> bool:
        folder, _, last = name.rpartition("/")
        return f"{last}.json" in names(root / publish.RECEIPTS / folder) and last in names(root / folder)

    return there
