"""What the command line does, from Python: tissue of a slide, a run and its results, scores of detections.

`wsiflow.predict` and the other names of this file are those of the package itself. A run goes on in a process of its
own, as if ``wsiflow run`` had been typed: how many threads the caller's libraries have, what it imported and whether it
guards its main module makes no difference, and an interrupt ends the run.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import PARTIAL, Failure, InputError
from wsiflow.evaluation.detections import read_detections
from wsiflow.evaluation.evaluate import Existing, Scores, evaluate_existing, evaluate_folder
from wsiflow.heatmap.files import Heatmap, read_heatmap
from wsiflow.plan.tissue import tissue_mask
from wsiflow.run.config import evaluation_params
from wsiflow.run.plan import latest_plan
from wsiflow.run.stages.ingest import tissue_of
from wsiflow.slides.manifest import read_manifest
from wsiflow.slides.slide import Slide

from .compose import compose_config

_SHIPPED = ("demo", "pcam", "googlenet")
# A call returns its results itself: no server is asked and no record kept, unless the settings say so.
_ERROR, _FAILED = "wsiflow: ", ("rejected: slide", "failed: slide")  # how lines about failures begin
_DEFAULTS = ("orchestrator=none", "tracking=off")


class Tissue(NamedTuple):
    """The tissue of a slide.

    Attributes:
        mask: bool (rows, cols), where tissue is.
        downsample: Level-0 pixels per pixel of the mask; pixel (row, col) begins at (col, row) times this.
    """

    mask: NDArray[np.bool_]
    downsample: float


class Run:
    """A run in its folder, whoever started it; results are read when they are asked for.

    Attributes:
        folder: The run's ``out=`` folder.
    """

    def __init__(self, folder: Path | str) -> None:
        """Store the folder; nothing is read yet."""
        self.folder = Path(folder)

    def __repr__(self) -> str:
        """Return how this run is written in Python."""
        return f"Run({str(self.folder)!r})"

    @property
    def slides(self) -> list[str]:
        """Ids of the slides that were planned."""
        return [planned.slide_id for planned in latest_plan(self.folder).slides]

    @property
    def metrics(self) -> dict[str, float]:
        """Every number of ``evaluation/summary.json`` by name; NaN where it is not defined."""
        found = next((path for path in map(self._summary, ("", "-PARTIAL")) if path.is_file()), None)
        if found is None:
            raise InputError("the run has no scores", "finish it first", path=self.folder)
        values: dict[str, float | None] = json.loads(found.read_text(encoding="utf-8"))
        return {name: float("nan") if value is None else float(value) for name, value in values.items()}

    def _summary(self, ending: str) -> Path:
        return self.folder / f"evaluation{ending}/summary.json"

    def heatmap(self, slide_id: str = "") -> Heatmap:
        """Return the heatmap of a slide; without an id, that of the only one."""
        return read_heatmap(self.folder / f"heatmaps/{self._one(slide_id)}.tif")

    def detections(self, slide_id: str = "") -> NDArray[np.float64]:
        """Return the detections of a slide, float64 (n, 3): prob, and x and y in level-0 px; highest prob first."""
        return read_detections(self.folder / f"detections/{self._one(slide_id)}.csv")

    def tissue(self, slide_id: str = "") -> Tissue:
        """Return the tissue that the run looked at."""
        name = self._one(slide_id)
        downsample = next(one.overview_downsample for one in latest_plan(self.folder).slides if one.slide_id == name)
        return Tissue(tissue_of(self.folder, name), downsample)

    def _one(self, slide_id: str) -> str:
        """Return the id of the slide that is meant.

        Raises:
            InputError: The run has no such slide, or none is named and it has several.
        """
        slides = self.slides
        if slide_id in slides:
            return slide_id
        if not slide_id and len(slides) == 1:
            return slides[0]
        cause = f"the run has no slide {slide_id!r}" if slide_id else f"the run has {len(slides)} slides"
        if not slides:
            raise InputError("no slide of the run could be planned", "see process_list.csv", path=self.folder)
        raise InputError(cause, f"name one of {', '.join(slides[:5])}", path=self.folder)


def find_tissue(slide: Slide, *settings: str) -> Tissue:
    """Return where tissue is on an open slide, as a run finds it.

    Args:
        slide: The slide, see `wsiflow.open_slide`.
        settings: Overrides as ``wsiflow run`` takes them, such as ``tissue=hsv_otsu`` or ``tissue.downsample=16``.

    Raises:
        InputError: A setting is wrong, or the slide cannot be read.
    """
    params = compose_config(["dataset=single", f"dataset.path={slide.facts.path}", *settings]).tissue
    return Tissue(tissue_mask(slide.overview(params.downsample), params), params.downsample)


def predict(
    slides: Path | str,
    *settings: str,
    model: Path | str = "demo",
    stride: int | None = None,
    out: Path | str | None = None,
) -> Run:
    """Take slides through the whole line, and return the run; one that is finished already is only read.

    Args:
        slides: A slide, a folder of slides, or a manifest (CSV).
        settings: Overrides as ``wsiflow run`` takes them, such as ``stain=macenko`` or ``executor.workers=4``.
        model: ``demo`` or ``pcam``, which ship with the package, or the path of a card.
        stride: Distance between window centres, px of the model's spacing; None for that of ``conf/``, 16.
        out: Folder of the run; None for ``runs/<slides>-<model>-<hash>``.

    Returns:
        The run. Where slides failed and ``allow_partial=true`` is set, it has the others.

    Raises:
        InputError: The slides, the model or a setting cannot be used; the message is the command's.
        EnvironmentFault: The machine cannot run it.
        IntegrityError: Files of the folder were damaged.
    """
    words = [*_source(Path(slides)), *_model(str(model))]
    words += [f"inference.stride={stride}"] if stride is not None else []
    words += [f"out={Path(out)}"] if out is not None else []
    words += [each for each in _DEFAULTS if not any(one.startswith(each.split("=")[0] + "=") for one in settings)]
    words += settings
    folder = compose_config(words).out
    _run(words)
    return Run(folder)


def _source(slides: Path) -> list[str]:
    if slides.is_dir():
        return ["dataset=folder", f"dataset.folder={slides}"]
    if slides.suffix.lower() == ".csv":
        return ["dataset=manifest", f"dataset.manifest={slides}"]
    return ["dataset=single", f"dataset.path={slides}"]


def _model(model: str) -> list[str]:
    return [f"model={model}"] if model in _SHIPPED else ["model=card", f"model.card={model}"]


def _run(words: Sequence[str]) -> None:
    """Run the command, and pass on its progress and its warnings, which it writes to standard error.

    Raises:
        WsiflowError: It failed; of the class that its exit code stands for.
    """
    errors: list[str] = []
    command = [sys.executable, "-m", "wsiflow.flows", "run", *words]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as result:
        with subprocess.Popen(command, stdout=result, stderr=subprocess.PIPE, text=True, encoding="utf-8") as process:
            try:
                for line in process.stderr or ():
                    if line.startswith(_ERROR):
                        errors.append(line)
                    else:
                        sys.stderr.write(line)
            except BaseException:
                process.terminate()  # it ends its workers, and what it has published stays
                raise
        if process.returncode in {0, PARTIAL}:
            return
        result.seek(0)
        errors += [line for line in result if line.startswith(_FAILED)]
    raise _failure(process.returncode, [line.removeprefix(_ERROR).strip() for line in errors]).error()


def _failure(exit_code: int, said: Sequence[str]) -> Failure:
    """Return how a run failed: what it said last, and of how many slides it said so."""
    by_slide = {line.split(",")[0]: line for line in said}  # a slide may be named twice
    *others, last = by_slide.values() or [f"the run ended with {exit_code}; see what it wrote to its folder"]
    cause, _, remedy = last.rpartition("; ")
    return Failure(exit_code, f"{cause} (slides that failed: {len(others) + 1})" if others else cause, remedy)


def evaluate(
    manifest: Path | str,
    detections: Path | str,
    *,
    protocol: str = "own_spacing",
    scores: Path | str | None = None,
    out: Path | str | None = None,
    seed: int = 0,
    **changes: Any,
) -> Scores:
    """Score detections, of a run or of any other program: FROC of lesions and ROC of slides, with intervals.

    Args:
        manifest: CSV of the slides with label, outlines or mask.
        detections: Folder with ``<slide_id>.csv`` for each of them: prob, and x and y in level-0 px, without a header.
        protocol: ``own_spacing``, or ``camelyon16`` for the challenge's spacing and exclusions.
        scores: CSV with ``slide_id,score``; None for the highest confidence of each slide.
        out: Folder for the files of the evaluation; None to write none.
        seed: Seed of the bootstrap.
        changes: Values of ``conf/evaluation`` by key, such as ``bootstrap=0`` or ``downsample=16``.

    Returns:
        The scores: ``metrics`` by name, a row for each case, and both curves.

    Raises:
        InputError: A file or a setting cannot be used.
        EnvironmentFault: The folder cannot be written.
    """
    params = evaluation_params(protocol, changes)
    existing = Existing(Path(manifest), Path(detections), None if scores is None else Path(scores), None)
    if out is not None:
        return evaluate_existing(existing, params, seed=seed, out=Path(out))
    cases = read_manifest(existing.manifest)
    return evaluate_folder(cases, existing.detections, params, seed=seed, scores=existing.scores)
