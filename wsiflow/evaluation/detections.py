"""Read and write the files of detections and of slide scores."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import InputError
from wsiflow.slides import names
from wsiflow.system import tables

_NAMED_LINES = 10


def read_detections(path: Path) -> NDArray[np.float64]:
    """Read the detections of one slide.

    Args:
        path: CSV without header: ``prob,x,y`` with prob from 0 to 1 and x and y in level-0 px; the file may be empty.

    Returns:
        float64 (n, 3): prob, x, y, in the order of the file.

    Raises:
        InputError: The file cannot be read, a line is not three finite numbers, or a confidence is outside 0 to 1; the
            message names the line.
    """
    lines = tables.read_lines(path, "the list of detections", "correct the path")
    detections = np.array([_numbers(line, cells, path) for line, cells in lines], np.float64).reshape(-1, 3)
    bad = np.flatnonzero(~np.isfinite(detections).all(axis=1)).tolist()
    if bad:
        first = lines[bad[0]].cells[int(np.argmin(np.isfinite(detections[bad[0]])))]
        cause = f"line {lines[bad[0]].number}: {first!r} is not finite"
        if len(bad) > 1:
            cause += f", and so in {len(bad)} of {len(lines)} lines ({_listed([lines[i].number for i in bad])})"
        raise InputError(cause, "write finite numbers, or leave these lines out", path=path)
    _require_probabilities(detections, [line.number for line in lines], path)
    return detections


def _require_probabilities(detections: NDArray[np.float64], lines: Sequence[int], path: Path) -> None:
    """Refuse confidences outside 0 to 1.

    Raises:
        InputError: There are some; the message says so where another column holds them.
    """
    within = np.all((detections >= 0) & (detections <= 1), axis=0)
    bad = np.flatnonzero((detections[:, 0] < 0) | (detections[:, 0] > 1))
    if not bad.size:
        return
    first = detections[bad[0], 0]
    cause = f"line {lines[bad[0]]}: {bad.size} of {len(lines)} confidences lie outside 0 to 1, the first is {first:.9g}"
    order = " (column 3 holds numbers from 0 to 1: is it x,y,prob?)" if within[2] and not within[1] else ""
    remedy = "write prob,x,y in this order, with confidences from 0 to 1 (of logits their sigmoid)"
    raise InputError(cause + order, remedy, path=path)


def _listed(numbers: Sequence[int]) -> str:
    """Return the first of some numbers of lines, as a message names them."""
    shown = ", ".join(map(str, numbers[:_NAMED_LINES]))
    return shown + (", ..." if len(numbers) > _NAMED_LINES else "")


def format_detections(detections: NDArray[np.float64]) -> str:
    """Return the text of a detection file.

    Coordinates are floored to whole level-0 px. Confidences are rounded to float32 and written with all digits that are
    needed to read the same number again: the evaluator of CAMELYON16 compares float32 with the values it reads, and
    equal confidences must stay equal there. Lines are ordered by falling confidence, then y, then x.

    Args:
        detections: float64 (n, 3): prob, x, y in level-0 px.
    """
    prob = detections[:, 0].astype(np.float32).astype(np.float64)
    x, y = np.floor(detections[:, 1:]).astype(np.int64).T
    order = np.lexsort((x, y, -prob))
    return "".join(f"{p!r},{i},{j}\n" for p, i, j in zip(*(v[order].tolist() for v in (prob, x, y)), strict=True))


def read_scores(path: Path) -> dict[str, float]:
    """Read a CSV of slide scores with the header ``slide_id,score``.

    Raises:
        InputError: The file cannot be read, has another header, names a slide twice, or a score is outside 0 to 1.
    """
    rows = tables.read_lines(path, "the list of slide scores", "correct the path")
    if not rows or [cell.strip().lower() for cell in rows[0][1]] != ["slide_id", "score"]:
        header = ",".join(rows[0][1]) if rows else ""
        raise InputError(f"the first line is {header!r}", "begin the file with slide_id,score", path=path)
    scores: dict[str, float] = {}
    for line, cells in rows[1:]:
        slide_id = names.slide_id(cells[0])
        if len(cells) != 2 or slide_id in scores:
            what = "is a second score of one slide" if len(cells) == 2 else f"has {len(cells)} cells"
            raise InputError(f"line {line} {what}", "give one line slide_id,score per slide", path=path)
        scores[slide_id] = _probability(cells[1], line, path)
    return scores


def detection_files(slide_ids: Sequence[str], folder: Path) -> dict[str, Path]:
    """Return the path of every slide's detection file by slide id.

    Raises:
        InputError: ``folder`` is not a folder, a slide has no file in it, or a file belongs to no slide.
    """
    if not folder.is_dir():
        raise InputError("this is not a folder", "give the folder that holds <slide_id>.csv", path=folder)
    files = (path for path in sorted(folder.glob("*.csv")) if path.name[0] != ".")
    paths = {names.slide_id(path.name.removesuffix(".csv")): path for path in files}
    require_same_slides(slide_ids, paths, "detection file", folder)
    return paths


def require_same_slides(expected: Iterable[str], actual: Iterable[str], what: str, path: Path) -> None:
    """Check that files or lines exist for exactly the slides of the manifest.

    Args:
        expected: Slide ids of the manifest.
        actual: Slide ids of the files or lines.
        what: What each of them is, for the message.
        path: The folder or file, for the message.

    Raises:
        InputError: They differ; the message lists every missing and every additional slide.
    """
    missing, stray = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    if not (missing or stray):
        return
    parts = [f"there is no {what} for {', '.join(missing)}"] if missing else []
    parts += [f"there is a {what} for {', '.join(stray)}, which the manifest does not have"] if stray else []
    remedy = "give exactly the slides of the manifest (an empty file where nothing was detected)"
    raise InputError(" and ".join(parts), remedy, path=path)


def _numbers(line: int, cells: list[str], path: Path) -> list[float]:
    """Return the three numbers of a line of a detection file."""
    if len(cells) != 3:
        hint = " (an index column?)" if len(cells) == 4 else ""
        cause = f"line {line} has {len(cells)} cells{hint}, expected prob,x,y"
        raise InputError(cause, "write prob,x,y without header and index", path=path)
    return [_number(cell, line, path) for cell in cells]


def _probability(cell: str, line: int, path: Path) -> float:
    """Return the score from 0 to 1 that a cell holds."""
    value = _number(cell, line, path)
    if not math.isfinite(value):
        raise InputError(f"line {line}: {cell!r} is not finite", "write finite numbers", path=path)
    if not 0 <= value <= 1:
        remedy = "write scores from 0 to 1 (of logits their sigmoid)"
        raise InputError(f"line {line}: {cell!r} is outside 0 to 1", remedy, path=path)
    return value


def _number(cell: str, line: int, path: Path) -> float:
    """Return the number that a cell holds; NaN for an empty cell, as which tables write it."""
    try:
        return float(cell) if cell.strip() else math.nan
    except ValueError as error:
        hint = " (a header?)" if line == 1 else ""
        raise InputError(f"line {line}: {cell!r} is not a number{hint}", "write numbers only", path=path) from error
