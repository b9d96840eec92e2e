"""Build the HTML pages and figures of wsiflow: one style for all, and no file loaded from elsewhere.

Input: texts, plain values, pictures as bytes, curves as arrays. Output: HTML text, and figures as PNG or SVG bytes. The
same input gives the same text and, with the same version of matplotlib, the same bytes.
"""

import base64
import importlib
import io
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsiflow.evaluation import froc

INK, BLUE, ORANGE, GREY = "#1f2328", "#1f5f99", "#c2571a", "#8a939c"
PALETTE = (BLUE, ORANGE, "#2e8b57", "#8e5ea2", "#b8860b", "#4aa3c7", "#b03a5b", "#5f6b76")
"""Colours of the series of a figure, distinguishable for colour-blind readers too."""

NO_VALUE = "—"
_GUIDE = "#d5dade"
_FROC_END = froc.RATES[-1] * 1.1


# --- text


def document(title: str, body: str, *, style: str = "", script: str = "", asks: bool = False) -> str:
    """Return a self-contained HTML page.

    Args:
        title: Its title.
        body: Its HTML.
        style: Further CSS.
        script: JavaScript that runs once the page is there.
        asks: Whether it may ask the server that the page came from; it can never ask another one.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    policy += " 'self'; connect-src 'self'" if asks else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)} · wsiflow</title>\n<style>{STYLE}{style}</style></head>\n"
        f"<body><main>\n{body}</main>{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def section(title: str, body: str) -> str:
    """Return a section of HTML under its heading."""
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>\n"


def cards(items: Iterable[tuple[str, str, str]]) -> str:
    """Return the headline numbers of a page as HTML; each item is a name, a value and a note."""
    shown = (
        f"<div><dt>{escape(name)}</dt><dd><b>{escape(value)}</b><small>{escape(note)}</small></dd></div>\n"
        for name, value, note in items
    )
    return f'<dl class="cards">\n{"".join(shown)}</dl>\n'


def table(heads: Sequence[str], rows: Iterable[str]) -> str:
    """Return an HTML table; ``rows`` are HTML already."""
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>\n{"".join(rows)}</tbody></table></div>\n'


def pairs(items: Mapping[str, Any], shown: Callable[[Any], str]) -> str:
    """Return a list of names and values as HTML, ordered by name; ``shown`` formats a value."""
    rows = (f"<div><dt>{escape(key)}</dt><dd>{escape(shown(items[key]))}</dd></div>\n" for key in sorted(items))
    return f'<dl class="pairs">\n{"".join(rows)}</dl>\n'


def image(data: bytes, kind: str, about: str) -> str:
    """Return a picture as HTML that contains its bytes; ``about`` is the alternative text."""
    return f'<img alt="{escape(about)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


# --- figures


def axes(x: str, y: str, *, size_in: tuple[float, float] = (5, 4)) -> tuple[Any, Any]:
    """Return a new matplotlib figure and its axes with the labels ``x`` and ``y``."""
    from matplotlib.figure import Figure

    _wait_for_ipython()
    figure = Figure(figsize=size_in, dpi=160, layout="constrained")
    return figure, plain(figure.add_subplot(), x, y)


def plain(axes: Any, x: str, y: str) -> Any:
    """Label axes, set the common style, and return them."""
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(axis="y", color="#e8ebee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, length=3, color=GREY)
    return axes


def froc_axes(*, size_in: tuple[float, float] = (5, 4)) -> tuple[Any, Any]:
    """Return a figure and axes for FROC curves; the x axis is linear up to the first rate and logarithmic beyond.

    Thin lines mark the rates of false positives at which the score reads the sensitivity.
    """
    figure, panel = axes("False positives per slide", "Sensitivity", size_in=size_in)
    for rate in froc.RATES:
        panel.axvline(rate, color=_GUIDE, linewidth=0.8, zorder=0)
    panel.set_xscale("symlog", base=2, linthresh=froc.RATES[0], linscale=0.6)
    panel.set_xticks([0, *froc.RATES], ["0", *(f"{rate:g}" for rate in froc.RATES)])
    panel.minorticks_off()
    panel.set(xlim=(0, _FROC_END), ylim=(0, 1.02))
    return figure, panel


def froc_line(fp_per_slide: Sequence[float], sensitivity: Sequence[float]) -> NDArray[np.float64]:
    """Return a FROC curve as the score interpolates it: linear between operating points, constant beyond the last one.

    Args:
        fp_per_slide: False positives per slide, by rising threshold.
        sensitivity: Share of the lesions that are hit, by rising threshold.

    Returns:
        float64 (n, 2), x and y of points dense enough for a logarithmic axis; empty where a point has no value.
    """
    points = np.array([fp_per_slide, sensitivity], dtype=np.float64).T
    if not len(points) or not np.isfinite(points).all():
        return np.empty((0, 2))
    points = np.vstack([[[max(_FROC_END, points[0, 0]), points[0, 1]]], points])
    at = np.linspace(0, len(points) - 1, 16 * (len(points) - 1) + 1)
    return np.column_stack([np.interp(at, np.arange(len(points)), column) for column in points.T])


def legend(axes: Any, **where: Any) -> None:
    """Add a legend to axes, or a remark where nothing is drawn; ``where`` overrides arguments of the legend."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**{"frameon": True, "edgecolor": "none", "framealpha": 0.9, "loc": "lower right", **where})
    else:
        axes.text(0.5, 0.5, "not defined: no truth", transform=axes.transAxes, ha="center", color=GREY)


def picture(figure: Any, kind: Literal["png", "svg"] = "png") -> bytes:
    """Return a figure as the bytes of a PNG or SVG file."""
    from matplotlib import rc_context

    _wait_for_ipython()
    out = io.BytesIO()
    # Version, date and random names are left out, so that the same figure has the same bytes.
    bare: dict[str, Any] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
    with rc_context({"svg.hashsalt": "wsiflow"}):
        figure.savefig(out, format=kind, metadata=bare)
    return out.getvalue()


def _wait_for_ipython() -> None:
    """Wait for another thread that imports IPython, whose version a new figure asks for even while it has none.

    MLflow imports it, where it is installed, at its first request to a server.
    """
    if "IPython" in sys.modules:
        importlib.import_module("IPython")


STYLE = """
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
.broad{max-width:820px;margin-bottom:1.4rem}.broad figcaption{margin:.5rem 0 0;max-width:46rem}
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
td.number{white-space:nowrap;padding-right:.9rem}
td img{display:block;max-width:120px;max-height:120px;border-radius:3px}
blockquote{padding:.9rem 1.1rem;background:var(--tint);border-radius:4px;max-width:46rem}
section ul:not(.legend){margin:.9rem 0 0 1.1rem;max-width:46rem}li{margin:.25rem 0}
.pairs{columns:2 340px;column-gap:2.5rem;font-size:.86rem}
.pairs div{display:flex;justify-content:space-between;gap:1.2rem;padding:.22rem 0;border-bottom:1px solid var(--line);
break-inside:avoid}
.pairs dt{color:var(--soft);white-space:nowrap}
.pairs dd{text-align:right;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.looked{width:min(96vw,1700px);margin-left:calc(50% - min(48vw,850px))}
td.use{width:100%}.use svg{display:block;width:100%;height:90px}
@media print{:root{--ink:#000;--soft:#444;--line:#bbb;--paper:#fff;--tint:#f5f7f8;--mark:#a8480f}
main{max-width:none;padding:0}section{break-inside:avoid-page}.looked,.long{break-inside:auto;width:auto;margin-left:0}
.wide{overflow:visible}thead{display:table-header-group}tr{break-inside:avoid}}
"""
