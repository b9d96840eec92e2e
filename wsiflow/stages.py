"""The line's stages: their order, which of them a run asks for, and what their tasks publish."""

from wsiflow import certify, reading, scoring
from wsiflow.plan import Plan, SlidePlan

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
        "stain": reading.fit_name(planned),
        "extract": reading.part_name(planned, task.group),
        "index": f"patches/{planned.slide_id}.h5",
        "predict": scoring.prediction_name(made, task),
        "certify": certify.certificate_name(planned),
        "stitch": f"heatmaps/{planned.slide_id}.tif",
        "detect": f"detections/{planned.slide_id}.csv",
    }
    return names[stage]
