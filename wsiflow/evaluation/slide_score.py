"""Score slides with a random forest: extract features of runs, train a forest on them, and score a run.

Input: folders of runs, a manifest, tables of features (CSV). Output: tables of features, a forest (JSON), scores (CSV).

A table of features has a row for each slide and threshold: ``slide_id``, ``threshold``, ``version`` (of the formulas,
see `forest.version_of`), ``cell_um`` (side of the heatmap's cells) and the thirty features with all their digits. A
table of scores has the header ``slide_id,score``, the format of `detections.read_scores`.
"""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError
from wsiflow.evaluation import forest
from wsiflow.evaluation.forest import Choices, Forest, TrainingData
from wsiflow.heatmap import features, files
from wsiflow.plan.slide_plan import SlidePlan
from wsiflow.slides import pyramid
from wsiflow.slides.manifest import Case, read_manifest
from wsiflow.system import publish, tables

COLUMNS = ("slide_id", "threshold", "version", "cell_um", *features.NAMES)
TEST = "test"
"""Split of the manifest whose slides are never used for training."""

Floats = NDArray[np.float64]


class FeatureRow(NamedTuple):
    """The features of a slide at one threshold: a row of the table of features."""

    slide_id: str
    threshold: float
    version: str
    cell_um: float
    values: Floats


def write_features(runs: Iterable[tuple[Path, Sequence[SlidePlan]]], out: Path, *, reference: bool = False) -> int:
    """Write the features of all slides of some runs at every threshold, and return the number of slides.

    Args:
        runs: Folders of runs over different slides, each with its planned slides.
        out: The CSV to write.
        reference: Whether the features have the quirks of the reference system.

    Raises:
        InputError: A slide has no heatmap, or a slide is in two of the runs.
        IntegrityError: A heatmap does not agree with its receipt.
    """
    seen: dict[str, Path] = {}
    rows: list[FeatureRow] = []
    for run, slides in runs:
        for planned in slides:
            if planned.slide_id in seen:
                cause = f"the slide is in {seen[planned.slide_id]} and in {run}"
                raise InputError(cause, "name one run for each slide", slide=planned.slide_id, stage="features")
            seen[planned.slide_id] = run
            rows += slide_rows(run, planned, features.LEVELS, reference=reference)
    cells = [dict(zip(COLUMNS, [*row[:-1], *row.values.tolist()], strict=True)) for row in rows]
    _write(out, tables.csv_text(cells, COLUMNS))
    return len(seen)


def slide_rows(run: Path, planned: SlidePlan, thresholds: Sequence[float], *, reference: bool) -> Iterator[FeatureRow]:
    """Yield the features of one slide of a run for each threshold; the run's tissue mask gives the area of the tissue.

    Raises:
        InputError: The slide has no heatmap.
        IntegrityError: A file does not agree with its receipt.
    """
    names = f"heatmaps/{planned.slide_id}.tif", f"tissue/{planned.slide_id}.png"
    for name in names:
        receipt = publish.read_receipt(run, name)
        if receipt is None:
            cause = f"{name} is not published"
            raise InputError(cause, "finish the run: wsiflow retry", slide=planned.slide_id, path=run)
        publish.check(run, receipt)
    heat, _ = files.read_heatmap(run / names[0])
    tissue_l0_px2 = np.count_nonzero(pyramid.read_level(run / names[1], 1)) * planned.overview_downsample**2
    frame = planned.frame
    cell_l0_px = frame.stride_px * frame.l0_per_px
    for threshold in thresholds:
        values = features.describe(
            heat, threshold=threshold, tissue_l0_px2=tissue_l0_px2, cell_l0_px=cell_l0_px, reference=reference
        )
        version, cell_um = forest.version_of(reference=reference), frame.stride_px * frame.um_px
        yield FeatureRow(planned.slide_id, threshold, version, cell_um, values)


def read_features(path: Path) -> list[FeatureRow]:
    """Read a table of features that `write_features` wrote.

    Raises:
        InputError: The file cannot be read, has other columns, holds text where a number is due, or states a size of
            the heatmap's cells that is not positive.
    """
    advice = "give a table that wsiflow features wrote"
    table = tables.read(path, "the table of features", advice)
    if tuple(table.header) != COLUMNS:
        raise InputError("the table of features has other columns", advice, path=path)
    rows = []
    for number, cells in table.lines:
        try:
            row = FeatureRow(cells[0], float(cells[1]), cells[2], float(cells[3]), np.array(cells[4:], np.float64))
        except ValueError as error:
            raise InputError(f"line {number}: {error}", advice, path=path) from error
        if not (math.isfinite(row.cell_um) and row.cell_um > 0):
            cause = f"line {number}: cell_um is {row.cell_um:g}, which is no size"
            raise InputError(cause, advice, path=path)
        rows.append(row)
    return rows


def sample_of(rows: Iterable[FeatureRow], cases: Sequence[Case]) -> TrainingData:
    """Return the training slides: those of the manifest that have a label and are not of the split ``test``.

    Args:
        rows: Features of these slides; rows of other slides are ignored.
        cases: Slides of the manifest with label, patient and split. A slide without patient is a patient of its own.

    Raises:
        InputError: A training slide has no features, features differ in version, cell size or thresholds, or there is
            no training slide.
    """
    chosen = [case for case in cases if case.label is not None and case.split.lower() != TEST]
    by_slide: dict[str, dict[float, FeatureRow]] = {case.slide_id: {} for case in chosen}
    for row in rows:
        if row.slide_id in by_slide and by_slide[row.slide_id].setdefault(row.threshold, row) is not row:
            cause = "the features of the slide are given twice"
            raise InputError(cause, "give them once", slide=row.slide_id, stage="forest")
    missing = [slide_id for slide_id, each in by_slide.items() if not each]
    if missing or not chosen:
        some = ", ".join(missing[:5]) + " ..." * (len(missing) > 5)
        cause = f"there are no features of {some}" if missing else "the manifest has no labelled slides for training"
        raise InputError(cause, "name labelled slides that were run, or take them out of the manifest", stage="forest")
    every = [row for each in by_slide.values() for row in each.values()]
    version, cell_um, thresholds = _common(every)
    incomplete = [slide_id for slide_id, each in by_slide.items() if each.keys() != thresholds]
    if incomplete:
        cause = "the slide has no features at some of the thresholds"
        raise InputError(cause, "compute its features again", slide=incomplete[0], stage="forest")
    return TrainingData(
        slide_ids=tuple(by_slide),
        labels=np.array([case.label for case in chosen], np.int64),
        groups=tuple(case.patient_id or f"slide {case.slide_id}" for case in chosen),
        features={t: np.array([each[t].values for each in by_slide.values()]) for t in sorted(thresholds)},
        version=version,
        cell_um=cell_um,
    )


def train(table: Path, manifest: Path, out: Path, *, seed: int, choices: Choices | None = None) -> Forest:
    """Train a forest on the features of labelled slides, write it and return it.

    Args:
        table: Table of features, see `write_features`.
        manifest: Manifest with the labels, patients and splits.
        out: The JSON file to write.
        seed: Seed of folds and trees.
        choices: The grid of hyperparameters; None for the default grid.

    Raises:
        InputError: See `sample_of` and `forest.train`.
        EnvironmentFault: The file cannot be written.
    """
    sample = sample_of(read_features(table), read_manifest(manifest))
    trained = forest.train(sample, seed=seed, choices=choices)
    publish.preflight(out.parent)
    forest.save(trained, out)
    return trained


def score_slide(trained: Forest, run: Path, planned: SlidePlan) -> float:
    """Return a forest's score of one slide of a run.

    Raises:
        InputError: The forest was trained on other features or on heatmaps with cells of another size, or the slide has
            no heatmap.
        IntegrityError: A file does not agree with its receipt.
    """
    card = trained.card
    reference = card.version == forest.version_of(reference=True)
    (row,) = slide_rows(run, planned, [card.settings.threshold], reference=reference)
    if row.version != card.version:
        cause = f"the forest was trained on features of version {card.version!r}, not {row.version!r}"
        raise InputError(cause, "train the forest again", stage="forest")
    if not forest.is_same_cell(row.cell_um, card.cell_um):
        cause = f"the heatmap has cells of {row.cell_um:.4g} um where the forest was trained on {card.cell_um:.4g} um"
        raise InputError(cause, "train a forest for this stride and spacing", slide=row.slide_id, stage="forest")
    return float(trained.predict(row.values[np.newaxis])[0])


def write_scores(
    path: Path, run: Path, slides: Sequence[SlidePlan], out: Path, *, also_training: bool = False
) -> dict[str, float]:
    """Score every slide of a run with a forest, write the scores, and return them by slide id.

    Args:
        path: The forest's file.
        run: The run's folder.
        slides: Its planned slides.
        out: The CSV to write.
        also_training: Whether slides that the forest was trained on are scored too.

    Raises:
        InputError: The forest was trained on a slide of the run, or cannot score a slide.
        IntegrityError: A file does not agree with its receipt or its hash.
    """
    trained = forest.load(path)
    known = [planned.slide_id for planned in slides if planned.slide_id in set(trained.card.training)]
    if known and not also_training:
        cause = f"the forest was trained on {len(known)} of these slides: {', '.join(known[:5])}"
        remedy = "score slides that it was not trained on, or give --also-training and do not report their AUC"
        raise InputError(cause, remedy, stage="forest", path=path)
    scores = {planned.slide_id: score_slide(trained, run, planned) for planned in slides}
    _write(out, "slide_id,score\n" + "".join(f"{slide_id},{score!r}\n" for slide_id, score in scores.items()))
    return scores


def _common(rows: Sequence[FeatureRow]) -> tuple[str, float, set[float]]:
    """Return version, median cell size in um, and thresholds of features.

    Raises:
        InputError: The features differ in version or in cell size.
    """
    versions, cell_um = {row.version for row in rows}, statistics.median(row.cell_um for row in rows)
    other = next((row for row in rows if not forest.is_same_cell(row.cell_um, cell_um)), None)
    if len(versions) > 1:
        cause = f"the features are of the versions {', '.join(sorted(versions))}"
        raise InputError(cause, "use features of one version", stage="forest")
    if other is not None:
        cause = f"the heatmap has cells of {other.cell_um:.4g} um where most have {cell_um:.4g} um"
        raise InputError(cause, "use maps of one stride and spacing", slide=other.slide_id, stage="forest")
    return versions.pop(), cell_um, {row.threshold for row in rows}


def _write(out: Path, text: str) -> None:
    publish.preflight(out.parent)
    publish.write_view(out.parent, out.name, text.encode())
