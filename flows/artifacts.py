"""What the page of a flow run in Prefect shows of a run that has ended: its scores, figures, slides and failures.

The markdown holds its pictures itself, since Prefect shows no files. Keys of artifacts are those of a folder, so that
the page of one run never shows the artifacts of another, and a run that is started again has a history.
"""

import base64
import hashlib
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from wsiflow.errors import PARTIAL, Failure
from wsiflow.heatmap.overlay import thumbnail
from wsiflow.redaction import without_secrets
from wsiflow.run.config import RunConfig
from wsiflow.run.results import cost
from wsiflow.run.results.finish import Summary
from wsiflow.run.results.status import OWN_TABLE, missing_slides
from wsiflow.system import tables

_logger = logging.getLogger(__name__)

_SCORES = {"froc.score": "FROC score", "froc.strict_score": "FROC score, strict", "roc.auc": "Slide AUC"}
_SHORT = {"froc.score": "FROC", "froc.strict_score": "strict", "roc.auc": "AUC"}
_SPENT = {
    cost.TOTAL: "Core-hours",
    cost.LINE: "Core-hours of the line",
    "throughput.tiles_per_s": "Tiles per second",
}
_FIGURES = {"froc.score": ("FROC", "froc.png"), "roc.auc": ("Slide ROC", "roc.png")}
_WORST = 4  # slides that are pictured
_LISTED, _MOST_ROWS = 20, 1000  # slides without a result, in the text and in the table
_OVERLAY_PX, _FIGURE_PX = 200, 420  # so that they fit beside each other on the page
_NAME_CHARS = 60  # of a run, in a key
_URL = re.compile(r"https?://[^\s<>)]+")


def key_of(name: str, folder: Path, what: str) -> str:
    """Return the key of an artifact about a folder, of the characters that Prefect allows.

    Args:
        name: Name of what the folder holds, for people who read the key.
        folder: The folder.
        what: What the artifact shows.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())[:_NAME_CHARS].strip("-")
    digest = hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return "-".join(filter(None, ("wsiflow", slug, digest, what)))


def key(config: RunConfig, what: str) -> str:
    """Return the key of an artifact about a run."""
    return key_of(title(config), config.out, what)


def title(config: RunConfig) -> str:
    """Return the name of a run, behind that of its sweep where it is a trial."""
    return f"{config.name} {config.out.name}" if config.tracking.sweep else config.name


def show_result(config: RunConfig, summary: Summary, failures: Sequence[Failure]) -> None:
    """Show how a run ended on the page of the present flow run.

    Args:
        config: The configuration.
        summary: The run's summary.
        failures: Why slides have no result, as far as it is known in parts.
    """
    rows = failure_rows(config.out, summary, failures)
    try:
        create_markdown_artifact(_result(config, summary, rows), key=key(config, "result"), description=title(config))
        if rows:
            what = f"{title(config)}: slides without a result"
            create_table_artifact(rows[:_MOST_ROWS], key=key(config, "failures"), description=what)
    except (httpx.HTTPError, RuntimeError, OSError, ValueError) as error:
        _logger.info("Prefect's page does not show the results: %s", error)  # the run is complete without them


def show_scores(out: Path, metrics: Mapping[str, float]) -> None:
    """Show the scores of detections that existed already, whose files are in a folder."""
    text = [f"# {out.name}", _scores(metrics), _figures(out, metrics), f"Scores and curves: `{out.resolve()}`"]
    create_markdown_artifact("\n\n".join(text) + "\n", key=key_of(out.name, out, "result"), description=out.name)


def failure_rows(root: Path, summary: Summary, failures: Sequence[Failure]) -> list[dict[str, Any]]:
    """Return a row for each slide without a result: where and why it failed, what helps, and where to read more."""
    known = {failure.slide: failure for failure in failures}
    rows = []
    for status in missing_slides(summary.statuses):
        failure = known.get(status.slide_id)
        rows.append(
            {
                "slide": status.slide_id,
                "status": status.status,
                "stage": failure.stage if failure else "",
                "cause": without_secrets(failure.cause if failure else status.reason),
                "remedy": without_secrets(failure.remedy if failure else ""),
                "attempts": f"wsiflow explain {root} {status.slide_id}",
            }
        )
    return rows


def scores_line(metrics: Mapping[str, float]) -> str:
    """Return the main numbers of a run in one line.

    As in ``FROC 0.812 (12 normal slides), strict 0.790, AUC 0.951, 1.3 core-hours, 1.2 of them the line``.
    """
    parts = [
        f"{name} {_score(metrics, key)}{_normal(metrics, key)}"
        for key, name in _SHORT.items()
        if _is_defined(metrics, key)
    ]
    return ", ".join(filter(None, [*parts, cost.core_hours_text(metrics)]))


# --- the markdown


def _result(config: RunConfig, summary: Summary, failures: Sequence[Mapping[str, Any]]) -> str:
    """Return the markdown that shows everything about a run."""
    parts = [f"# {title(config)}", _headline(summary)]
    if summary.metrics:
        shown = config.out / ("evaluation-PARTIAL" if summary.exit_code == PARTIAL else "evaluation")
        parts += [_scores(summary.metrics), _figures(shown, summary.metrics), _worst_slides(config.out, shown)]
    if failures:
        parts += ["## Slides without a result", _failures(failures)]
    parts += ["## Where it is", _links(config.out, summary), f"```\n{without_secrets(summary.text)}\n```"]
    return "\n\n".join(filter(None, parts)) + "\n"


def _headline(summary: Summary) -> str:
    missing, total = len(missing_slides(summary.statuses)), len(summary.statuses)
    if not summary.metrics:
        return f"**Failed**: {missing} of {total} slides have no result, so nothing was scored."
    if missing:
        return f"**Partial**: {missing} of {total} slides have no result. Do not compare these scores with others."
    return f"Complete: {total} of {total} slides."


def _failures(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return slides without a result as a list, whose lines the page wraps, as it does not those of a table."""
    lines = []
    for row in rows[:_LISTED]:
        where = ", ".join(filter(None, (f"**{row['slide']}**", row["stage"])))
        remedy = f"; *{_plain(row['remedy'])}*" if row["remedy"] else ""
        lines.append(f"* {where}: {_plain(row['cause'])}{remedy}")
    more = [f"* and {len(rows) - _LISTED} more, in `process_list.csv`"] if len(rows) > _LISTED else []
    return "\n".join(lines + more)


def _scores(metrics: Mapping[str, float]) -> str:
    rows = [
        {"": name + _normal(metrics, key), "value": _score(metrics, key), "95 % interval": _interval(metrics, key)}
        for key, name in _SCORES.items()
    ]
    rows += [
        {"": name, "value": f"{metrics[key]:.3g}", "95 % interval": ""}
        for key, name in _SPENT.items()
        if _is_defined(metrics, key) and metrics[key] > 0  # a start with nothing left to do has no speed
    ]
    return "## Scores\n\n" + table(rows)


def _normal(metrics: Mapping[str, float], name: str) -> str:
    """Return how many normal slides a FROC score is over, from which most false positives come, in brackets."""
    if name != "froc.score" or not _is_defined(metrics, "froc.n_normal"):
        return ""
    n = round(metrics["froc.n_normal"])
    return f" ({n} normal slide{'' if n == 1 else 's'})"


def _figures(shown: Path, metrics: Mapping[str, float]) -> str:
    """Return the curves of the scores that are defined, beside each other."""
    drawn = [(name, shown / file) for key, (name, file) in _FIGURES.items() if _is_defined(metrics, key)]
    row = {name: _small_picture(name, path, _FIGURE_PX) for name, path in drawn if path.exists()}
    return table([row]) if row else ""


def _worst_slides(root: Path, shown: Path) -> str:
    """Return the slides whose scores are furthest from the truth, beside each other, each with its overlay."""
    rows = tables.read(shown / "cases.csv", *OWN_TABLE).rows()
    worst = sorted((row for row in rows if row["label"] and row["score"]), key=_error, reverse=True)
    pictured = (row for row in worst if _overlay(root, row["slide_id"]).exists())
    chosen = {row["slide_id"]: row for row in islice(pictured, _WORST)}
    if not chosen:
        return ""
    cells: dict[str, Callable[[Mapping[str, str]], str]] = {"overlay": partial(_overlay_of, root), **_ABOUT_SLIDES}
    lines = [{"": head, **{slide: tell(row) for slide, row in chosen.items()}} for head, tell in cells.items()]
    return "## Slides furthest from the truth\n\n" + table(lines)


def _overlay_of(root: Path, row: Mapping[str, str]) -> str:
    return _small_picture(row["slide_id"], _overlay(root, row["slide_id"]), _OVERLAY_PX)


def _error(row: Mapping[str, str]) -> float:
    """Return how far a slide is from its truth: by its score, and by the share of its lesions that were missed."""
    score, lesions = float(row["score"]), int(row["n_lesions"] or 0)
    missed = 1 - int(row["n_found"] or 0) / lesions if lesions else 0.0
    return missed + (1 - score if row["label"] == "1" else score)


_ABOUT_SLIDES: dict[str, Callable[[Mapping[str, str]], str]] = {
    "truth": lambda row: "tumour" if row["label"] == "1" else "normal",
    "score": lambda row: f"{float(row['score']):.3f}",
    "lesions found": lambda row: f"{row['n_found']} of {row['n_lesions']}" if row["label"] == "1" else "",
    "false positives": lambda row: row["n_false_positives"],
}


def _overlay(root: Path, slide_id: str) -> Path:
    return root / "heatmaps" / f"{slide_id}.png"


def _links(root: Path, summary: Summary) -> str:
    """Return where the files and the record in MLflow are; a page of a server cannot link to files."""
    lines = [f"* Folder: `{root.resolve()}`"]
    if (root / "report.html").exists():
        lines.append(f"* Report: `{(root / 'report.html').resolve()}`")
    lines += [f"* MLflow: <{url}>" for url in dict.fromkeys(_URL.findall(without_secrets(summary.text)))]
    return "\n".join(lines)


# --- pieces


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of the same columns as a markdown table."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([_cell(row[head]) for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Return a text without what markdown takes for emphasis, code or HTML."""
    return re.sub(r"([*<`])", r"\\\1", text)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def picture(name: str, data: bytes, kind: str) -> str:
    """Return markdown that holds a picture."""
    return f"![{name}](data:image/{kind};base64,{base64.b64encode(data).decode()})"


def _small_picture(name: str, path: Path, side_px: int) -> str:
    return picture(name, thumbnail(path.read_bytes(), side_px=side_px), "jpeg")


def _is_defined(metrics: Mapping[str, float], name: str) -> bool:
    return math.isfinite(metrics.get(name, math.nan))


def _score(metrics: Mapping[str, float], name: str) -> str:
    return f"{metrics[name]:.3f}" if _is_defined(metrics, name) else "not defined"


def _interval(metrics: Mapping[str, float], name: str) -> str:
    low, high = f"{name}_ci_low", f"{name}_ci_high"
    if not _is_defined(metrics, low):
        return "—"
    return f"{metrics[low]:.3f} to {metrics[high]:.3f}"
