"""The report of a run: one HTML page that needs nothing else, and the figures it shows.

Input: the run's metrics, rows per slide and curves as plain values, pictures as bytes. Output: text and PNG bytes. What
has no value (scores without truth) is said in words and never drawn. The same input gives the same text.
"""

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsiflow import export, froc, throughput, tracking

_INK, _BLUE, _ORANGE, _GREY = "#1f2328", "#1f5f99", "#c2571a", "#8a939c"
# Colours that keep their order in grey and for colour-blind readers.
_STEP_COLOURS = {
    "read": "#9ecae1",
    "stain": "#c994c7",
    "infer": "#1f5f99",
    "certify": "#e6a04b",
    "write": "#bdbdbd",
    "stitch": "#74a765",
}
# Twice the size shown, for fine screens.
_THUMBNAIL_PX = 240
_FROC_END = froc.RATES[-1] * 1.1
_NO_VALUE = "—"
_NO_TRUTH = "not defined: it needs truth for tumour and for normal slides"


@dataclass(frozen=True)
class ReportData:
    """What a report tells.

    Attributes:
        name: Name of the run.
        metrics: Every number of ``summary.json``; NaN where not defined.
        slides: A row per slide: slide_id, status, reason (empty unless the slide has no result), n_tiles,
            seconds_wall, and label, score, n_detections, n_lesions, n_found, n_false_positives, note where it was
            scored. Numbers may be text, as they come from a CSV file.
        overlays: Overlay PNG by slide id.
        figures: ``froc.png`` and ``roc.png``.
        settings: The resolved configuration by dotted name.
        versions: Versions of what can change a number; ``wsiflow`` is one.
        plan_hash: The plan's hash.
    """

    name: str
    metrics: Mapping[str, float]
    slides: Sequence[Mapping[str, Any]]
    overlays: Mapping[str, bytes]
    figures: Mapping[str, bytes]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    plan_hash: str


def froc_figure(curves: Mapping[str, Any]) -> bytes:
    """Draw the FROC curves of both modes, sensitivity against false positives per slide, as PNG.

    The curves are drawn as they are scored: straight between operating points, level beyond the last one. The axis is
    linear up to the first rate and logarithmic from there; thin lines mark the rates that make the score.

    Args:
        curves: ``official`` and ``strict``, each with lists ``fp_per_slide`` and ``sensitivity`` by rising threshold.
    """
    figure, axes = _axes("False positives per slide", "Sensitivity")
    for rate in froc.RATES:
        axes.axvline(rate, color="#d5dade", linewidth=0.8, zorder=0)
    for mode, colour, style in (("official", _BLUE, "-"), ("strict", _ORANGE, (0, (4, 2)))):
        points = _points(curves[mode]["fp_per_slide"], curves[mode]["sensitivity"])
        if len(points):
            level = [[max(_FROC_END, points[0, 0]), points[0, 1]]]
            along = _straight(np.vstack([level, points]))
            axes.plot(along[:, 0], along[:, 1], linestyle=style, color=colour, label=mode, linewidth=1.8)
    axes.set_xscale("symlog", base=2, linthresh=froc.RATES[0], linscale=0.6)
    axes.set_xticks([0, *froc.RATES], ["0", *(f"{rate:g}" for rate in froc.RATES)])
    axes.minorticks_off()
    axes.set_xlim(0, _FROC_END)
    return _figure_png(figure, axes)


def roc_figure(curve: Mapping[str, Sequence[float]]) -> bytes:
    """Draw the slide ROC curve as PNG.

    Args:
        curve: Lists ``fpr`` and ``tpr``.
    """
    figure, axes = _axes("False positive rate", "True positive rate")
    axes.plot([0, 1], [0, 1], color="#d5dade", linewidth=0.8, zorder=0)
    points = _points(curve["fpr"], curve["tpr"])
    if len(points):
        axes.plot(points[:, 0], points[:, 1], color=_BLUE, linewidth=1.8, label="slides", clip_on=False)
    axes.set(xlim=(0, 1), aspect="equal")
    return _figure_png(figure, axes)


def render(data: ReportData) -> str:
    """Return the page."""
    missing = [row for row in data.slides if row["reason"]]
    sections = [
        _header(data, len(missing)),
        _headline(data.metrics, len(data.slides), len(missing)),
        _missing(missing),
        _accuracy(data),
        _cost(data.metrics),
        _slides(data),
        _citation(data, len(missing)),
        _section("Every number", _pairs(data.metrics, _number)),
        _section("Settings", _pairs(tracking.redacted(data.settings), str)),
        _section("Versions", _pairs(data.versions, str)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(data.name)} · wsiflow</title>\n<style>{_STYLE}</style></head>\n"
        f"<body><main>\n{''.join(sections)}</main></body></html>\n"
    )


# --- sections


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>\n"


def _header(data: ReportData, n_missing: int) -> str:
    version = escape(data.versions["wsiflow"])
    partial = (
        f'<p class="partial"><b>PARTIAL</b> Scored without {n_missing} of {len(data.slides)} slides. '
        "These numbers must not be compared with those of a complete run.</p>"
    )
    return (
        f"<header><h1>{escape(data.name)}</h1>"
        f'<p class="soft">wsiflow {version} · plan <code>{escape(data.plan_hash[:12])}</code></p></header>\n'
        f"{partial if n_missing else ''}"
    )


def _headline(metrics: Mapping[str, float], n_slides: int, n_missing: int) -> str:
    cards = [
        ("FROC score, official", *_scored(metrics, "froc.score")),
        ("FROC score, strict", *_scored(metrics, "froc.strict_score")),
        ("Slide AUC", *_scored(metrics, "roc.auc")),
        ("Slides", f"{n_slides - n_missing} of {n_slides}", f"{n_missing} missing" if n_missing else "none missing"),
        ("Core-hours", _short(metrics, "throughput.core_hours"), f"wall time {_short(metrics, 'throughput.wall_s')} s"),
        (
            "Tiles per second",
            _short(metrics, "throughput.tiles_per_s"),
            f"{_short(metrics, 'throughput.core_seconds_per_tile')} core-seconds per tile",
        ),
    ]
    shown = (
        f"<div><dt>{escape(name)}</dt><dd><b>{escape(value)}</b><small>{escape(note)}</small></dd></div>\n"
        for name, value, note in cards
    )
    return f'<dl class="cards">\n{"".join(shown)}</dl>\n'


def _missing(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return _section("What is missing", "<p>Nothing: every slide has a result.</p>\n")
    body = (f"<tr><td>{escape(row['slide_id'])}</td><td>{escape(row['reason'])}</td></tr>\n" for row in rows)
    return _section(
        "What is missing", _table(["Slide without result", "Reason"], body) + "<p>Nothing stands in for them.</p>\n"
    )


def _accuracy(data: ReportData) -> str:
    parts = []
    for title, name, metric in (("FROC", "froc.png", "froc.score"), ("Slide ROC", "roc.png", "roc.auc")):
        if _defined(data.metrics, metric):
            figure = _image(data.figures[name], "png", f"{title} curve")
            parts.append(f"<figure><figcaption>{title}</figcaption>{figure}</figure>\n")
        else:
            parts.append(f"<figure><figcaption>{title}</figcaption><p>{title} is {_NO_TRUTH}.</p></figure>\n")
    body = f'<div class="figures">\n{"".join(parts)}</div>\n'
    return _section("Accuracy", body + (_rates(data.metrics) if _defined(data.metrics, "froc.score") else ""))


def _rates(metrics: Mapping[str, float]) -> str:
    """Return the sensitivities that make the FROC scores."""
    rows = (
        f"<tr><td>{mode}</td>"
        + "".join(f"<td>{_fixed(metrics, f'{prefix}sensitivity_at_{rate:g}')}</td>" for rate in froc.RATES)
        + f"<td><b>{_fixed(metrics, f'{prefix}score')}</b></td></tr>\n"
        for mode, prefix in (("official", "froc."), ("strict", "froc.strict_"))
    )
    heads = ["Sensitivity at", *(f"{rate:g} FP/slide" for rate in froc.RATES), "Score"]
    return _table(heads, rows)


def _cost(metrics: Mapping[str, float]) -> str:
    spent = {step: metrics[f"cost.{step}_core_s"] for step in throughput.STEPS if metrics[f"cost.{step}_core_s"] > 0}
    total = sum(spent.values())
    if not total:
        return _section("Cost", "<p>No step was timed in the run that wrote these scores.</p>\n")
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
    shown = note if math.isfinite(efficiency) else ""
    return _section("Cost", f'<div class="bar">{bars}</div>\n<ul class="legend">\n{legend}</ul>\n{shown}')


def _slides(data: ReportData) -> str:
    heads = ["", "Slide", "Truth", "Score", "Detections", "Lesions found", "False positives", "Tiles", "Seconds"]
    return _section("Slides", _table(heads, (_slide(row, data.overlays.get(row["slide_id"])) for row in data.slides)))


def _slide(row: Mapping[str, Any], overlay: bytes | None) -> str:
    slide_id = row["slide_id"]
    picture = (
        _image(export.thumbnail(overlay, side_px=_THUMBNAIL_PX), "jpeg", f"scores on {slide_id}") if overlay else ""
    )
    remarks = "; ".join(filter(None, (row["status"], row.get("note", ""))))
    truth = {"1": "tumour", "0": "normal"}.get(_cell(row, "label"), _NO_VALUE)
    lesions = _cell(row, "n_lesions")
    found = lesions if lesions in (_NO_VALUE, "0") else f"{_cell(row, 'n_found')} of {lesions}"
    cells = [
        truth,
        _cell(row, "score", "{:.3f}"),
        _cell(row, "n_detections"),
        _NO_VALUE if found == "0" else found,
        _cell(row, "n_false_positives"),
        _cell(row, "n_tiles"),
        _cell(row, "seconds_wall", "{:.1f}"),
    ]
    name = f"<b>{escape(slide_id)}</b><small>{escape(remarks)}</small>"
    return f"<tr><td>{picture}</td><td>{name}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>\n"


def _citation(data: ReportData, n_missing: int) -> str:
    """Return the numbers as a sentence that can be quoted, and what belongs to it."""
    m = data.metrics
    settings = ("geometry.convention", "inference.engine", "inference.stride")
    lesions = f"{_count(m, 'froc.n_slides', 'slide')}, {_count(m, 'froc.n_lesions', 'lesion')}"
    slides = f"{_count(m, 'roc.n_tumour', 'tumour slide')}, {_count(m, 'roc.n_normal', 'normal slide')}"
    scores = {
        "froc.score": f"FROC score {_told(m, 'froc.score')} (official CAMELYON16 scoring, {lesions})",
        "froc.strict_score": f"strict {_told(m, 'froc.strict_score')}",
        "roc.auc": f"slide AUC {_told(m, 'roc.auc')} ({slides})",
        "throughput.core_hours": f"{_short(m, 'throughput.core_hours')} core-hours",
    }
    parts = [
        *(told for name, told in scores.items() if _defined(m, name)),
        *(f"{name} {data.settings[name]}" for name in settings),
        f"wsiflow {data.versions['wsiflow']}, plan {data.plan_hash[:12]}",
        *([f"PARTIAL: {n_missing} missing"] if n_missing else []),
    ]
    notes = [
        "Name the mode of a FROC score. <i>Official</i> follows the challenge's evaluator digit for digit, with its "
        "defects; <i>strict</i> mends them. Compare like with like.",
        "Give the interval. The one of FROC is a bootstrap over slides, the one of the AUC follows DeLong; both 95 %.",
        "Give the plan's hash: it stands for the slides, the tiles and every setting that can change a number.",
        "Cost counts what the run that wrote these scores executed, on its own machine; name the processor.",
        "Sources: Ehteshami Bejnordi et al., JAMA 2017;318:2199 (CAMELYON16 and its FROC score); "
        "DeLong et al., Biometrics 1988;44:837 (variance of the AUC); "
        "Li, Mikailov, Chen, IEEE Trans. AI 2023, doi 10.1109/TAI.2023.3246032 (the reference system).",
    ]
    listed = "".join(f"<li>{note}</li>\n" for note in notes)
    return _section(
        "How to cite these numbers", f"<blockquote>{escape('; '.join(parts))}.</blockquote>\n<ul>{listed}</ul>\n"
    )


# --- pieces


def _table(heads: Sequence[str], rows: Iterable[str]) -> str:
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>\n{"".join(rows)}</tbody></table></div>\n'


def _pairs(items: Mapping[str, Any], shown: Callable[[Any], str]) -> str:
    rows = (f"<div><dt>{escape(key)}</dt><dd>{escape(shown(items[key]))}</dd></div>\n" for key in sorted(items))
    return f'<dl class="pairs">\n{"".join(rows)}</dl>\n'


def _image(data: bytes, kind: str, about: str) -> str:
    return f'<img alt="{escape(about)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _defined(metrics: Mapping[str, float], name: str) -> bool:
    return math.isfinite(metrics[name])


def _scored(metrics: Mapping[str, float], name: str) -> tuple[str, str]:
    """Return a score and its interval as texts."""
    if not _defined(metrics, name):
        return _NO_VALUE, _NO_TRUTH
    low, high = metrics[f"{name}_ci_low"], metrics[f"{name}_ci_high"]
    interval = f"95 % interval {low:.3f} to {high:.3f}" if math.isfinite(low) else "without an interval"
    return f"{metrics[name]:.3f}", interval


def _told(metrics: Mapping[str, float], name: str) -> str:
    score, interval = _scored(metrics, name)
    return f"{score} [{interval}]"


def _count(metrics: Mapping[str, float], name: str, what: str) -> str:
    n = int(metrics[name])
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _short(metrics: Mapping[str, float], name: str) -> str:
    """Return three digits, or more before the point where there are."""
    value = metrics[name]
    if not math.isfinite(value):
        return _NO_VALUE
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _fixed(metrics: Mapping[str, float], name: str) -> str:
    return f"{metrics[name]:.4f}" if _defined(metrics, name) else _NO_VALUE


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else "not defined"


def _cell(row: Mapping[str, Any], name: str, form: str = "") -> str:
    """Return a cell's text, in the form given, or the sign for no value."""
    value = row.get(name)
    if value is None or value == "" or value != value:  # NaN
        return _NO_VALUE
    return form.format(float(value)) if form else str(value)


# --- figures


def _points(x: Sequence[float], y: Sequence[float]) -> NDArray[np.float64]:
    """Return the points of a curve, float64 (n, 2); none where any has no value."""
    points = np.array([x, y], dtype=np.float64).T
    return points if np.isfinite(points).all() else points[:0]


def _straight(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the points with more between them, so that a straight line is drawn right on a logarithmic axis."""
    at = np.linspace(0, len(points) - 1, 16 * (len(points) - 1) + 1)
    return np.column_stack([np.interp(at, np.arange(len(points)), column) for column in points.T])


def _axes(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.set_ylim(0, 1.02)
    axes.grid(axis="y", color="#e8ebee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(colors=_INK, length=3, color=_GREY)
    return figure, axes


def _figure_png(figure: Any, axes: Any) -> bytes:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=True, edgecolor="none", framealpha=0.9, loc="lower right")
    else:
        axes.text(0.5, 0.5, "not defined: no truth", transform=axes.transAxes, ha="center", color=_GREY)
    out = io.BytesIO()
    # Without the version of matplotlib in it, the same curve stays the same bytes for longer.
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


_STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#5c6670;--line:#dde2e6;--paper:#fff;--tint:#f5f7f8;--mark:#a8480f}
@media(prefers-color-scheme:dark){
:root{--ink:#e4e7ea;--soft:#9aa4ae;--line:#31373d;--paper:#15181b;--tint:#1d2125;--mark:#f0a36b}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1040px;margin:0 auto;padding:3rem 1.5rem 5rem}
h1,h2{font-weight:600;line-height:1.2;letter-spacing:-.01em}
h1{font-size:1.9rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:0 0 .8rem}
section{margin-top:2.6rem;padding-top:1.4rem;border-top:1px solid var(--line)}
p{margin:.5rem 0;max-width:46rem}.soft,small{color:var(--soft)}small{display:block;font-size:.82rem;line-height:1.35}
code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
dl,dd,dt,ul,figure,blockquote{margin:0;padding:0}
.partial{margin-top:1.4rem;padding:.7rem 1rem;border-left:3px solid var(--mark);background:var(--tint);max-width:none}
.partial b{color:var(--mark);margin-right:.5rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:1.6rem 2rem;margin-top:2.2rem}
.cards dt{color:var(--soft);font-size:.85rem}
.cards b{display:block;font-size:2rem;font-weight:600;line-height:1.25;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:1.5rem;
margin-bottom:1rem}
figcaption{color:var(--soft);font-size:.85rem;margin-bottom:.4rem}
figure img{display:block;width:100%;background:#fff;border-radius:4px}
.bar{display:flex;height:22px;border-radius:3px;overflow:hidden;gap:1px;max-width:none}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.3rem 1.8rem;margin:.8rem 0 .4rem;color:var(--soft);
font-variant-numeric:tabular-nums}
.legend b{color:var(--ink);font-weight:600}
.legend i{display:inline-block;width:.7em;height:.7em;border-radius:2px;margin-right:.45em}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{color:var(--soft);font-weight:500;font-size:.85rem;white-space:nowrap;vertical-align:bottom}
td,th{text-align:left;padding:.45rem 1.2rem .45rem 0;border-bottom:1px solid var(--line)}
td{vertical-align:top}td small{max-width:22rem}td b{font-weight:600;overflow-wrap:anywhere}
td img{display:block;max-width:120px;max-height:120px;border-radius:3px}
blockquote{padding:.9rem 1.1rem;background:var(--tint);border-radius:4px;max-width:46rem}
section ul:not(.legend){margin:.9rem 0 0 1.1rem;max-width:46rem}li{margin:.25rem 0}
.pairs{columns:2 340px;column-gap:2.5rem;font-size:.86rem}
.pairs div{display:flex;justify-content:space-between;gap:1.2rem;padding:.22rem 0;border-bottom:1px solid var(--line);
break-inside:avoid}
.pairs dt{color:var(--soft);white-space:nowrap}
.pairs dd{text-align:right;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
@media print{main{max-width:none;padding:0}section{break-inside:avoid-page}}
"""
