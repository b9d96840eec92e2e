"""Render the report of a run: one self-contained HTML page, and its figures.

Input: the run's metrics, rows per slide and curves as plain values, pictures as bytes. Output: text and PNG bytes. A
score that is not defined, for lack of truth, is stated in words and not drawn. The same input gives the same text.

The page is for a pathologist first: after the scores come the slides, those with which most went wrong first, as
pictures that can be zoomed, with the heatmap, the detections and the true outlines; see `wsiflow.run.results.shown`.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from wsiflow import redaction
from wsiflow.evaluation import froc
from wsiflow.run.results import certified, page, shown
from wsiflow.run.stages.line import STEPS

# Colours that stay distinguishable in greyscale and for colour-blind readers.
_COLOURS = ("#c994c7", "#9ecae1", "#bdbdbd", "#1f5f99", "#e6a04b", "#74a765")
_STEP_COLOURS = dict(zip(STEPS, itertools.cycle(_COLOURS), strict=False))
_PAGE_BYTES = 18_000_000  # larger pages open slowly and are refused by mail
_MOST_PICTURE_BYTES = 4_000_000  # of one slide: no picture of a run is larger
_MOST_PICTURES = 1000  # within so many bytes, more of them would be too small to be seen
_USE_BINS = 240
_NO_TRUTH = "not defined: it needs truth for tumour and for normal slides"


@dataclass(frozen=True)
class ReportData:
    """The content of a report.

    Attributes:
        name: Name of the run.
        metrics: Every number of ``summary.json``; NaN where it is not defined. Without scores where slides are missing
            and nothing was scored.
        slides: A row per slide: slide_id, status, reason (empty where the slide has a result), n_tiles, seconds_wall;
            and for a scored slide label, score, n_detections, n_lesions, n_found, n_false_positives, note. Numbers may
            be text, as in the CSV files. Also its name, where that is not its id, and remarks on how it is read.
        described: The slides as they are listed and drawn, without their pictures.
        pictures: Returns the pictures of a slide, given its id, within a number of bytes; see `shown.pictures`.
        maps: File of the heatmap of each further class by its name, relative to the run's folder; ``{slide}`` stands
            for the slide's id.
        figures: Bytes of ``froc.png`` and ``roc.png`` by file name.
        settings: The resolved configuration by dotted name.
        versions: Versions of wsiflow and of the packages that can change a number.
        plan_hash: The plan's hash.
        inference: How scores are computed, and why.
        busy_s: When workers were busy: begin and end of each attempt in the last start of the run that did any work,
            seconds after the first of them.
    """

    name: str
    metrics: Mapping[str, float]
    slides: Sequence[Mapping[str, Any]]
    described: shown.Described
    pictures: Callable[[str, int], Mapping[str, Any]]
    maps: Mapping[str, str]
    figures: Mapping[str, bytes]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    plan_hash: str
    inference: str
    busy_s: Sequence[tuple[float, float]] = ()


def froc_figure(curves: Mapping[str, Any]) -> bytes:
    """Draw the FROC curves of both modes, sensitivity against false positives per slide, as PNG.

    Args:
        curves: ``official`` and ``strict``, each with lists ``fp_per_slide`` and ``sensitivity`` by rising threshold.
    """
    figure, axes = page.froc_axes()
    for mode, colour, style in (("official", page.BLUE, "-"), ("strict", page.ORANGE, (0, (4, 2)))):
        line = page.froc_line(curves[mode]["fp_per_slide"], curves[mode]["sensitivity"])
        if len(line):
            axes.plot(line[:, 0], line[:, 1], linestyle=style, color=colour, label=mode, linewidth=1.8)
    page.legend(axes)
    return page.picture(figure)


def roc_figure(curve: Mapping[str, Sequence[float]]) -> bytes:
    """Draw the slide ROC curve as PNG.

    Args:
        curve: Lists ``fpr`` and ``tpr``.
    """
    figure, axes = page.axes("False positive rate", "True positive rate")
    axes.plot([0, 1], [0, 1], color="#d5dade", linewidth=0.8, zorder=0)
    points = np.array([curve["fpr"], curve["tpr"]], dtype=np.float64)
    if points.size and np.isfinite(points).all():
        axes.plot(*points, color=page.BLUE, linewidth=1.8, label="slides", clip_on=False)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), aspect="equal")
    page.legend(axes)
    return page.picture(figure)


def render(data: ReportData) -> str:
    """Return the HTML page of a report."""
    missing = [row for row in data.slides if row["reason"]]
    is_scored = "froc.score" in data.metrics
    sections = [
        _header(data, len(missing), is_scored=is_scored),
        _headline(data.metrics, len(data.slides), len(missing)),
        _missing(missing, sum(row.get("status") == "no tissue" for row in data.slides)),
        _viewer(),
        _accuracy(data) if is_scored else "",
        _cost(data.metrics, data.inference) + _use(data.busy_s),
        _slides(data),
        _citation(data, len(missing)) if is_scored else "",
        page.section("Every number", page.pairs(data.metrics, _number)),
        page.section("Settings", page.pairs(redaction.redacted(data.settings), str)),
        page.section("Versions", page.pairs(data.versions, str)),
    ]
    style = shown.asset("viewer.css")
    script = "\n".join(map(shown.asset, ("openseadragon.min.js", "viewer.js")))
    body = "".join(sections)
    body += _looked_slides(data, _PAGE_BYTES - len(body) - len(style) - len(script))
    return page.document(data.name, body, style=style, script=script)


# --- sections


def _header(data: ReportData, n_missing: int, *, is_scored: bool) -> str:
    version = escape(data.versions["wsiflow"])
    partial = (
        f'<p class="partial"><b>PARTIAL</b> Scored without {n_missing} of {len(data.slides)} slides. '
        "These numbers must not be compared with those of a complete run.</p>"
    )
    if not is_scored:
        partial = (
            f'<p class="partial"><b>INCOMPLETE</b> {n_missing} of {len(data.slides)} slides have no result, so there '
            "are no scores over all slides. The maps and scores of the others are complete.</p>"
        )
    empty = [row for row in data.slides if row.get("status") == "no tissue" and not row["reason"]]
    labelled = [row for row in empty if _cell(row, "label") != page.NO_VALUE]
    return (
        f"<header><h1>{escape(data.name)}</h1>"
        f'<p class="soft">wsiflow {version} · plan <code>{escape(data.plan_hash[:12])}</code></p></header>\n'
        f"{partial if n_missing else ''}{_without_tissue(empty, labelled) if empty else ''}"
    )


def _without_tissue(empty: Sequence[Mapping[str, Any]], labelled: Sequence[Mapping[str, Any]]) -> str:
    """Return a box that names the slides on which no tissue was found, and says what became of those with a label."""
    names = ", ".join(_named(row) for row in empty)
    unscored = sum(_cell(row, "score") == page.NO_VALUE for row in labelled)
    became = [
        *([f"{unscored} with a label are not scored"] if unscored else []),
        *([f"{len(labelled) - unscored} with a label are scored with 0"] if len(labelled) > unscored else []),
    ]
    return (
        f'<p class="partial"><b>NO TISSUE</b> No tissue was found on {len(empty)} slides: {escape(names)}. Nothing was '
        f"looked at there{'; ' if became else ''}{escape(', '.join(became))}.</p>"
    )


def _named(row: Mapping[str, Any]) -> str:
    """Return the name of a slide, with its label where it has one."""
    label = {"1": " (tumour)", "0": " (normal)"}.get(_cell(row, "label"), "")
    return f"{_name(row)}{label}"


def _headline(metrics: Mapping[str, float], n_slides: int, n_missing: int) -> str:
    titles = {"froc.score": "FROC score, official", "froc.strict_score": "FROC score, strict", "roc.auc": "Slide AUC"}
    cards = [
        *((title, *_scored_over(metrics, name)) for name, title in titles.items() if name in metrics),
        ("Slides", f"{n_slides - n_missing} of {n_slides}", f"{n_missing} missing" if n_missing else "none missing"),
        _core_hours(metrics),
        (
            "Tiles per second",
            _short(metrics, "throughput.tiles_per_s"),
            f"{_short(metrics, 'throughput.core_seconds_per_tile')} core-seconds per tile",
        ),
    ]
    return page.cards(cards)


def _core_hours(metrics: Mapping[str, float]) -> tuple[str, str, str]:
    """Return what the run cost, the line alone beside it; runs of former versions know the line only."""
    wall, line = f"wall time {_short(metrics, 'throughput.wall_s')} s", _short(metrics, "throughput.core_hours")
    if not math.isfinite(metrics.get("cost.total_core_s", math.nan)):
        return "Core-hours of the line", line, wall
    return "Core-hours", _hours(metrics["cost.total_core_s"]), f"{line} of them the line; {wall}"


def _hours(core_s: float) -> str:
    return _short({"": core_s / 3600.0}, "")


def _missing(rows: Sequence[Mapping[str, Any]], n_empty: int) -> str:
    if not rows:
        everything = "Nothing: every slide has a result."
        text = f"No slide failed; no tissue was found on {n_empty} of them." if n_empty else everything
        return page.section("What is missing", f"<p>{text}</p>\n")
    body = (f"<tr><td>{escape(_name(row))}</td><td>{escape(row['reason'])}</td></tr>\n" for row in rows)
    return page.section(
        "What is missing",
        page.table(["Slide without result", "Reason"], body) + "<p>No score includes these slides.</p>\n",
    )


def _viewer() -> str:
    """Return the section in which the slides are looked at; scripts fill it."""
    return (
        '<section class="looked"><h2>The slides, what went wrong first</h2>\n'
        '<div id="wsiflow-viewer"><noscript>The pictures need JavaScript; the table of slides below does not.'
        "</noscript></div></section>\n"
    )


def _looked_slides(data: ReportData, most_bytes: int) -> str:
    """Return what is drawn of each slide as elements that scripts read, in about so many bytes."""
    index = {"runs": [{"name": data.name, "slides": data.described.entries}]}
    slides = [shown.within_page(slide) for slide in data.described.slides]
    words = sum(len(str(slide)) for slide in slides)
    n_pictures = min(_MOST_PICTURES, sum(bool(slide["width"]) for slide in slides))
    share = (most_bytes - words) * 3 // 4 // max(1, n_pictures)  # base64 writes three bytes as four characters
    elements = [shown.script("wsiflow-index", index)]
    left = n_pictures
    for number, slide in enumerate(slides):
        pictures: Mapping[str, Any] = {}
        if slide["width"] and left:
            pictures, left = data.pictures(slide["id"], min(_MOST_PICTURE_BYTES, share)), left - 1
        elements.append(shown.script(f"slide-0-{number}", {**slide, **pictures}))
    return "".join(elements)


def _accuracy(data: ReportData) -> str:
    parts = []
    for title, name, metric in (("FROC", "froc.png", "froc.score"), ("Slide ROC", "roc.png", "roc.auc")):
        if _defined(data.metrics, metric):
            figure = page.image(data.figures[name], "png", f"{title} curve")
            caption = f"{title}, {_froc_slides(data.metrics)}" if title == "FROC" else title
            parts.append(f"<figure><figcaption>{caption}</figcaption>{figure}</figure>\n")
        else:
            parts.append(f"<figure><figcaption>{title}</figcaption><p>{title} is {_NO_TRUTH}.</p></figure>\n")
    body = f'<div class="figures">\n{"".join(parts)}</div>\n'
    rates = _rates(data.metrics) if _defined(data.metrics, "froc.score") else ""
    return page.section("Accuracy", body + rates + _looked_at(data) + _certified(data))


def _certified(data: ReportData) -> str:
    """Return what the certificates say; empty where nothing was compared."""
    text = certified.sentence(data.metrics, float(data.settings.get("lesions.threshold", math.nan)))
    return f"<p>Certified: {escape(text)}.</p>\n" if text else ""


def _looked_at(data: ReportData) -> str:
    """Return how much of the lesions was looked at, and why lesions were missed; empty where no lesion is known."""
    area = data.metrics.get("tissue.lesion_recall_area", math.nan)
    if not math.isfinite(area):
        return ""
    recall = data.metrics["tissue.lesion_recall"]
    lesions = f"{recall:.1%} of the lesions and " if math.isfinite(recall) else ""
    text = f"<p>The tissue that was looked at holds {lesions}{area:.1%} of the annotated area.</p>\n"
    rows = [
        f"<tr><td>{escape(_name(row))}</td><td>{escape(row['missed'])}</td></tr>\n"
        for row in data.slides
        if row.get("missed")
    ]
    return text + (page.table(["Slide", "Lesions without a hit"], rows) if rows else "")


def _rates(metrics: Mapping[str, float]) -> str:
    """Return an HTML table of the sensitivities whose means are the FROC scores."""
    rows = (
        f"<tr><td>{mode}</td>"
        + "".join(f"<td>{_fixed(metrics, f'{prefix}sensitivity_at_{rate:g}')}</td>" for rate in froc.RATES)
        + f"<td><b>{_fixed(metrics, f'{prefix}score')}</b></td></tr>\n"
        for mode, prefix in (("official", "froc."), ("strict", "froc.strict_"))
    )
    heads = ["Sensitivity at", *(f"{rate:g} FP/slide" for rate in froc.RATES), "Score"]
    return page.table(heads, rows)


def _cost(metrics: Mapping[str, float], inference: str) -> str:
    how = f"<p>Scores: {escape(inference)}.</p>\n"
    spent = {step: metrics[f"cost.{step}_core_s"] for step in STEPS if metrics[f"cost.{step}_core_s"] > 0}
    total = sum(spent.values())
    if not total:
        return page.section("Cost", f"<p>No step was timed in the run that wrote these scores.</p>\n{how}")
    bars = "".join(
        f'<i style="width:{100 * seconds / total:.2f}%;background:{_STEP_COLOURS[step]}"></i>'
        for step, seconds in spent.items()
    )
    legend = "".join(
        f'<li><i style="background:{_STEP_COLOURS[step]}"></i>{step} <b>{100 * seconds / total:.1f} %</b> '
        f"{seconds:,.1f} core-s</li>\n"
        for step, seconds in spent.items()
    )
    efficiency = metrics["throughput.efficiency"]
    note = f"<p>The cores given to the run were busy for {efficiency:.0%} of its wall time.</p>\n"
    busy = note if math.isfinite(efficiency) else ""
    return page.section(
        "Cost", f'<div class="bar">{bars}</div>\n<ul class="legend">\n{legend}</ul>\n{_beside_line(metrics)}{busy}{how}'
    )


def _beside_line(metrics: Mapping[str, float]) -> str:
    """Return what the run cost beside the steps of the line; empty where a former version did not record it."""
    total, warmup = metrics.get("cost.total_core_s", math.nan), metrics.get("cost.warmup_core_s", math.nan)
    if not math.isfinite(total):
        return ""
    line_s = metrics["throughput.core_hours"] * 3600.0
    warm = f", {warmup:,.1f} of them workers that start and load" if math.isfinite(warmup) else ""
    return (
        f"<p>Everything cost {total:,.1f} core-s up to this page: the line {line_s:,.1f}, and {total - line_s:,.1f} "
        f"beside it{warm}; the rest is planning, scoring and what was tried again.</p>\n"
    )


def _use(busy_s: Sequence[tuple[float, float]]) -> str:
    """Return a figure of how many workers were busy over time; empty where nothing was executed."""
    spans = np.array(busy_s, np.float64).reshape(-1, 2)
    end_s = float(spans[:, 1].max(initial=0.0))
    if end_s <= 0:
        return ""
    busy = busy_workers(spans, np.linspace(0.0, end_s, _USE_BINS + 1))
    most = max(1.0, float(busy.max()))
    steps = " ".join(f"{i},{100 - 100 * b / most:.1f} {i + 1},{100 - 100 * b / most:.1f}" for i, b in enumerate(busy))
    drawn = (
        f'<svg viewBox="0 0 {_USE_BINS} 100" preserveAspectRatio="none" role="img" aria-label="busy workers over time">'
        f'<polygon points="0,100 {steps} {_USE_BINS},100" fill="{page.BLUE}"/></svg>'
    )
    caption = (
        f"Busy workers over the {end_s:,.0f} s in which tasks ran: at most {most:.3g}, {busy.mean():.3g} on average"
    )
    return f'<figure class="use">{drawn}<figcaption>{caption}</figcaption></figure>\n'


def busy_workers(spans: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how many workers are busy on average between each two edges, float64 (n - 1,).

    Args:
        spans: float64 (k, 2), when a worker began a task and when it ended it, s.
        edges: float64 (n,), ascending, s.
    """
    times = np.concatenate([spans[:, 0], spans[:, 1]])
    change = np.repeat([1.0, -1.0], len(spans))
    order = np.argsort(times, kind="stable")
    at, count = times[order], np.cumsum(change[order])
    worked = np.concatenate([[0.0], np.cumsum(count[:-1] * np.diff(at))])  # worker-seconds up to each time
    return np.asarray(np.diff(np.interp(edges, at, worked)) / np.diff(edges))


def _slides(data: ReportData) -> str:
    heads = ["Slide", "Truth", "Score", "Detections", "Lesions found", "False positives", "Tiles", "Seconds"]
    rows = {row["slide_id"]: row for row in data.slides}
    shown_rows = (_slide(rows[entry["id"]], entry["problem"], data.maps) for entry in data.described.entries)
    left = sum(bool(slide["width"]) for slide in data.described.slides) - _MOST_PICTURES
    note = f"<p>The pictures of {left} more slides are in heatmaps/&lt;slide&gt;.png only.</p>\n" if left > 0 else ""
    return page.section("Slides", page.table(heads, shown_rows) + note)


def _slide(row: Mapping[str, Any], problem: str, maps: Mapping[str, str]) -> str:
    slide_id = row["slide_id"]
    own_id = f"files are named {slide_id}" if row.get("name") else ""
    told = problem if problem != row["status"] else ""
    remarks = "; ".join(filter(None, (row["status"], told, row.get("note", ""), own_id, *row.get("remarks", ()))))
    truth = {"1": "tumour", "0": "normal"}.get(_cell(row, "label"), page.NO_VALUE)
    lesions = _cell(row, "n_lesions")
    hits = lesions if lesions in (page.NO_VALUE, "0") else f"{_cell(row, 'n_found')} of {lesions}"
    cells = [
        truth,
        _cell(row, "score", "{:.3f}"),
        _cell(row, "n_detections"),
        page.NO_VALUE if hits == "0" else hits,
        _cell(row, "n_false_positives"),
        _cell(row, "n_tiles"),
        _cell(row, "seconds_wall", "{:.1f}"),
    ]
    name = (
        f'<a href="#slide={quote(slide_id, safe="")}"><b>{escape(_name(row))}</b></a>'
        f"<small>{escape(remarks)}{'' if row['reason'] else _links(slide_id, maps)}</small>"
    )
    return f"<tr><td>{name}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>\n"


def _name(row: Mapping[str, Any]) -> str:
    """Return the name that a slide was given, which its id may only resemble."""
    return str(row.get("name") or row["slide_id"])


def _links(slide_id: str, maps: Mapping[str, str]) -> str:
    """Return links to the heatmaps of a slide's further classes; empty where a run maps none."""
    files = {name: quote(file.format(slide=slide_id)) for name, file in maps.items()}
    links = ", ".join(f'<a href="{file}">{escape(name)}</a>' for name, file in files.items())
    return f"; maps: {links}" if links else ""


def _citation(data: ReportData, n_missing: int) -> str:
    """Return a section with the results as a sentence to quote, and notes on how to cite them."""
    m = data.metrics
    settings = ("geometry.convention", "inference.engine", "inference.stride")
    lesions = f"{_froc_slides(m)}, {_count(m, 'froc.n_lesions', 'lesion')}"
    slides = f"{_count(m, 'roc.n_tumour', 'tumour slide')}, {_count(m, 'roc.n_normal', 'normal slide')}"
    scores = {
        "froc.score": f"FROC score {_with_interval(m, 'froc.score')} (official CAMELYON16 scoring, {lesions})",
        "froc.strict_score": f"strict {_with_interval(m, 'froc.strict_score')}",
        "roc.auc": f"slide AUC {_with_interval(m, 'roc.auc')} ({slides})",
        "throughput.core_hours": f"{_short(m, 'throughput.core_hours')} core-hours of the line",
    }
    parts = [
        *(text for name, text in scores.items() if _defined(m, name)),
        *(f"{name} {data.settings[name]}" for name in settings),
        f"wsiflow {data.versions['wsiflow']}, plan {data.plan_hash[:12]}",
        *([f"PARTIAL: {n_missing} missing"] if n_missing else []),
    ]
    notes = [
        "Name the mode of a FROC score. <i>Official</i> follows the challenge's evaluator digit for digit, with its "
        "defects; <i>strict</i> corrects them. Compare scores of one mode only.",
        "Give the 95 % interval. That of FROC is a bootstrap over slides, that of the AUC follows DeLong.",
        "Give the hash of the plan: it identifies the slides, the tiles and every setting that can change a number.",
        "Cost counts the work of the run that wrote these scores, on its machine; name the processor.",
        "Sources: Ehteshami Bejnordi et al., JAMA 2017;318:2199 (CAMELYON16 and its FROC score); "
        "DeLong et al., Biometrics 1988;44:837 (variance of the AUC); "
        "Li, Mikailov, Chen, IEEE Trans. AI 2023, doi 10.1109/TAI.2023.3246032 (the reference system).",
    ]
    listed = "".join(f"<li>{note}</li>\n" for note in notes)
    return page.section(
        "How to cite these numbers", f"<blockquote>{escape('; '.join(parts))}.</blockquote>\n<ul>{listed}</ul>\n"
    )


# --- pieces


def _defined(metrics: Mapping[str, float], name: str) -> bool:
    return math.isfinite(metrics[name])


def _scored(metrics: Mapping[str, float], name: str) -> tuple[str, str]:
    """Return a score and a remark on its interval as texts; a dash and the reason where it is not defined."""
    if not _defined(metrics, name):
        return page.NO_VALUE, _NO_TRUTH
    low, high = metrics[f"{name}_ci_low"], metrics[f"{name}_ci_high"]
    interval = f"95 % interval {low:.3f} to {high:.3f}" if math.isfinite(low) else "without an interval"
    return f"{metrics[name]:.3f}", interval


def _scored_over(metrics: Mapping[str, float], name: str) -> tuple[str, str]:
    """Return a score and a remark on its interval, with the slides of a FROC score; see `_scored`."""
    score, remark = _scored(metrics, name)
    is_froc = name.startswith("froc.") and _defined(metrics, name)
    return score, f"{remark}; {_froc_slides(metrics)}" if is_froc else remark


def _froc_slides(metrics: Mapping[str, float]) -> str:
    """Return how many slides count for FROC, and how many are normal: most false positives come from those."""
    slides = _count(metrics, "froc.n_slides", "slide")
    return slides + (f", {metrics['froc.n_normal']:.0f} of them normal" if "froc.n_normal" in metrics else "")


def _with_interval(metrics: Mapping[str, float], name: str) -> str:
    score, interval = _scored(metrics, name)
    return f"{score} [{interval}]"


def _count(metrics: Mapping[str, float], name: str, what: str) -> str:
    n = int(metrics[name])
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _short(metrics: Mapping[str, float], name: str) -> str:
    """Return a metric with three significant digits, or without decimals from 100 on."""
    value = metrics[name]
    if not math.isfinite(value):
        return page.NO_VALUE
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _fixed(metrics: Mapping[str, float], name: str) -> str:
    return f"{metrics[name]:.4f}" if _defined(metrics, name) else page.NO_VALUE


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else "not defined"


def _cell(row: Mapping[str, Any], name: str, form: str = "") -> str:
    """Return the text of a table cell, formatted by ``form`` where it is given; a dash where there is no value."""
    value = row.get(name)
    if value is None or value == "" or value != value:  # NaN
        return page.NO_VALUE
    return form.format(float(value)) if form else str(value)
