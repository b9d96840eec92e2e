"""Describe the slides of a run for those who look at them: what the report and the viewer draw, as JSON values.

Input: the run's folder, its plan, and rows and findings of its slides. Output: JSON values and small pictures; the same
input gives the same bytes. ``viewer/viewer.js`` draws them.

Conventions: points are x, y in level-0 px.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from wsiflow.errors import WsiflowError
from wsiflow.evaluation import findings
from wsiflow.evaluation.detections import read_detections
from wsiflow.heatmap.files import open_preview
from wsiflow.plan import geometry
from wsiflow.plan.outline import png_bytes, thinned
from wsiflow.plan.slide_plan import SlidePlan
from wsiflow.run.cases import read_cases
from wsiflow.run.plan import Plan
from wsiflow.run.results.status import OWN_TABLE
from wsiflow.run.stages import overviews
from wsiflow.run.stages.ingest import remarks
from wsiflow.system import publish, tables

Row = Mapping[str, Any]

_HEAT_SIDE_PX = 1024  # of a heatmap within a page
_HEAT_SHARE = 0.35  # of the bytes of a slide's pictures, at most
_CELLS_PER_BYTE = 16  # of a compressed heatmap, hardly more: larger ones are not tried
_LEAST_SIDE_PX = 160  # of a picture: a smaller one shows nothing
_QUALITY = 78
_MOST_DETECTIONS = 500  # of a slide within a page
_RING_PARTS = 8192  # of a slide's long side: outlines within a page are as fine as this


class Described(NamedTuple):
    """The slides of a run, as they are listed and drawn.

    Attributes:
        entries: An entry for each slide, what went wrong first: id, name, truth, score and problem.
        slides: What is drawn of each, in the same order, without its picture and heatmap.
    """

    entries: list[dict[str, Any]]
    slides: list[dict[str, Any]]


def asset(name: str) -> str:
    """Return the text of a file of the viewer, such as ``viewer.js``."""
    return package_files(__package__).joinpath("viewer", name).read_text(encoding="utf-8")


def slide_rows(root: Path, plan: Plan, columns: Mapping[str, Row]) -> list[dict[str, Any]]:
    """Return a row for every slide of a run: how it ended, its name, label and remarks, and more columns by slide id.

    A run that has not ended yet has rows of the planned slides that do not say how they ended.
    """
    path = root / "process_list.csv"
    bare = [{"slide_id": planned.slide_id, "status": "", "reason": ""} for planned in plan.slides]
    listed: Sequence[Row] = list(tables.read(path, *OWN_TABLE).rows()) if path.is_file() else bare
    cases = read_cases(publish.generations(root, "cases.json")[-1])[1]
    about: dict[str, dict[str, Any]] = {case.slide_id: {"name": case.name} for case in cases}
    labels = {case.slide_id: "" if case.label is None else case.label for case in cases}
    for planned in plan.slides:
        about.setdefault(planned.slide_id, {})["remarks"] = remarks(root, planned.slide_id)
    return [
        {
            "label": labels.get(row["slide_id"], ""),
            **row,
            **columns.get(row["slide_id"], {}),
            **about.get(row["slide_id"], {}),
        }
        for row in listed
    ]


def read_findings(folder: Path) -> dict[str, Any]:
    """Return what became of the detections and regions of the slides in a folder of scores, by slide id.

    It is empty where nothing was scored, or an earlier version scored it.
    """
    path = folder / "findings.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def describe(root: Path, planned: Mapping[str, SlidePlan], rows: Sequence[Row], found: Mapping[str, Any]) -> Described:
    """Describe the slides of a run.

    Args:
        root: The run's folder.
        planned: The planned slides by id.
        rows: A row for every slide, as the report lists it.
        found: What became of detections and regions by slide id, see `read_findings`.
    """
    told = {row["slide_id"]: _problem(row, found.get(row["slide_id"])) for row in rows}
    order = sorted(rows, key=lambda row: (told[row["slide_id"]].rank, str(row["slide_id"])))
    entries = [_entry(row, told[row["slide_id"]].text) for row in order]
    slides = [
        entry | _drawn(root, planned.get(entry["id"]), row, found.get(entry["id"]))
        for entry, row in zip(entries, order, strict=True)
    ]
    return Described(entries, slides)


class _Problem(NamedTuple):
    """What went wrong with a slide as a text, and by what it is ordered."""

    rank: tuple[float, ...]
    text: str


def _problem(row: Row, found: Mapping[str, Any] | None) -> _Problem:
    """Return what went wrong: no result, then lesions that were missed, then false positives."""
    if row["reason"]:
        return _Problem((0,), str(row["status"]))
    if found is None:
        return _Problem((3,), "")
    lesions = [one for one in found["regions"] if one["kind"] == findings.LESION]
    missed = sum(one["best"] is None for one in lesions)
    false = [row[0] for row in found["detections"] if row[3] == findings.FALSE_POSITIVE]
    texts = [
        *(
            [f"{missed} of {len(lesions)} lesions missed" if len(lesions) > 1 else "its lesion is missed"]
            if missed
            else []
        ),
        *([f"{len(false)} false positive{'s' if len(false) > 1 else ''}, up to {max(false):.2f}"] if false else []),
    ]
    rank = 1.0 if missed else 2.0 if false else 3.0
    return _Problem((rank, -missed, -max(false, default=0.0)), "; ".join(texts))


def _entry(row: Row, problem: str) -> dict[str, Any]:
    score = row.get("score", "")
    return {
        "id": row["slide_id"],
        "name": str(row.get("name") or row["slide_id"]),
        "truth": {"1": "tumour", "0": "normal"}.get(str(row.get("label", "")), ""),
        "score": "" if score in ("", None) else f"{float(score):.3f}",
        "problem": problem,
    }


def _drawn(root: Path, planned: SlidePlan | None, row: Row, found: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what is drawn of a slide, and what is said of it."""
    told = [row["reason"], row.get("note", ""), row.get("missed", ""), *row.get("remarks", ())]
    if planned is None:
        return {"width": 0, "height": 0, "um_px": 1, "notes": _notes(told), "detections": [], "regions": []}
    frame = planned.frame
    shown = found if found is not None else {"detections": _unmatched(root, planned.slide_id), "regions": []}
    return {
        "width": frame.l0_width_px,
        "height": frame.l0_height_px,
        "um_px": planned.um_px_l0,
        "notes": _notes(told),
        "detections": shown["detections"],
        "regions": shown["regions"],
    }


def _notes(told: Sequence[Any]) -> list[str]:
    return [str(text) for text in told if text]


def _unmatched(root: Path, slide_id: str) -> list[list[Any]]:
    """Return the detections of a slide that was not scored, as `findings.describe` does."""
    path = root / f"detections/{slide_id}.csv"
    if not path.is_file():
        return []
    return [[prob, round(x), round(y), findings.UNKNOWN, 0] for prob, x, y in read_detections(path).tolist()]


def cells_of(planned: SlidePlan) -> dict[str, float]:
    """Return where the heatmap of a slide lies: x and y of its corner, and the side of a cell, level-0 px."""
    x, y = geometry.l0_from_h_corner(planned.frame, 0, 0)
    return {"x": float(x), "y": float(y), "cell": planned.frame.stride_px * planned.frame.l0_per_px}


# --- within a page


def within_page(slide: Mapping[str, Any]) -> dict[str, Any]:
    """Return a slide with what a page holds: outlines that are as fine as its picture, all hits, the surest others."""
    rows = slide["detections"]
    least = sorted(range(len(rows)), key=lambda i: (rows[i][3] != findings.HIT, -rows[i][0], i))[_MOST_DETECTIONS:]
    left_out = set(least)
    kept = [row for i, row in enumerate(rows) if i not in left_out]
    tolerance_px = max(slide["width"], slide["height"]) / _RING_PARTS
    regions = [{**one, "rings": [_thinned(ring, tolerance_px) for ring in one["rings"]]} for one in slide["regions"]]
    return {**slide, "detections": kept, "regions": regions, **({"unlisted": len(left_out)} if left_out else {})}


def _thinned(ring: Sequence[int], tolerance_px: float) -> list[int]:
    """Return a ring, x, y, x, y, ..., with fewer points."""
    points = thinned(np.array(ring, np.float64).reshape(-1, 2), tolerance_px)
    return [int(value) for value in points.ravel()]


def pictures(root: Path, planned: SlidePlan, budget_bytes: int) -> dict[str, Any]:
    """Return the picture of a slide and its heatmap as data, both within a number of bytes.

    Where the run has none of them, or they would be too small to be seen, there is no such entry.
    """
    shown: dict[str, Any] = {}
    try:
        heat = _heat(root / f"heatmaps/{planned.slide_id}.preview.tif", round(budget_bytes * _HEAT_SHARE))
    except WsiflowError:
        heat = None
    if heat is not None:
        shown["heat"] = cells_of(planned) | heat[1]
    path = root / overviews.picture_of(planned.slide_id)
    with suppress(OSError):  # a damaged file costs its picture and not the report: `wsiflow verify` names it
        picture = _picture(path, budget_bytes - (len(heat[0]) if heat else 0))
        if picture is not None:
            shown["picture"] = placed(picture, planned)
    return shown


def _heat(path: Path, budget_bytes: int) -> tuple[bytes, dict[str, Any]] | None:
    """Return a heatmap as a PNG, and the same as the JSON values of a single level of one tile."""
    if not path.is_file():
        return None
    with open_preview(path) as preview:
        for number, (rows, cols) in enumerate(preview.shapes):
            is_last = number == len(preview.shapes) - 1
            if not is_last and (max(rows, cols) > _HEAT_SIDE_PX or rows * cols > _CELLS_PER_BYTE * budget_bytes):
                continue
            png = png_bytes(Image.fromarray(preview.level(number)))
            if len(png) <= budget_bytes or is_last:
                level = {"rows": rows, "cols": cols, "scale": 2**number}
                return png, {"levels": [level], "tile": max(rows, cols), "src": _data("png", png)}
    return None


def _picture(path: Path, budget_bytes: int) -> bytes | None:
    """Return the picture of a slide as a JPEG, reduced as far as needed; None where there is none, or no room."""
    if not path.is_file() or budget_bytes <= 0:
        return None
    data = path.read_bytes()
    if len(data) <= budget_bytes:
        return data
    with Image.open(io.BytesIO(data)) as opened:
        side_px = round(max(opened.size) * (budget_bytes / len(data)) ** 0.5)
        opened.draft("RGB", (side_px, side_px))  # decoded at a fraction, which is far quicker
        image = opened.convert("RGB")
    while side_px >= _LEAST_SIDE_PX:
        small = image.copy()
        small.thumbnail((side_px, side_px), Image.Resampling.BOX)
        out = io.BytesIO()
        small.save(out, "JPEG", quality=_QUALITY)
        if out.tell() <= budget_bytes:
            return out.getvalue()
        side_px = round(side_px * 0.85)
    return None


def placed(jpeg: bytes, planned: SlidePlan) -> dict[str, Any]:
    """Return a picture of a whole slide as JSON values, with its scale."""
    with Image.open(io.BytesIO(jpeg)) as opened:
        width, height = opened.size
    frame = planned.frame
    along_x = frame.l0_width_px >= frame.l0_height_px
    downsample = frame.l0_width_px / width if along_x else frame.l0_height_px / height
    return {"src": _data("jpeg", jpeg), "width": width, "height": height, "downsample": downsample}


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def script(name: str, value: Any) -> str:
    """Return JSON values as an element of HTML that the viewer reads; no text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'
