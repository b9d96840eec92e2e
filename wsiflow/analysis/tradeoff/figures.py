"""Draw the tradeoff between score and core-hours as figures for a paper.

Input: a `Tradeoff`. Output: figures as bytes. A setting without a value is not drawn, and a cost that was measured once
has no error bar.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from wsiflow.analysis.tradeoff.values import SettingRow, Tradeoff, title
from wsiflow.evaluation import froc
from wsiflow.evaluation.paired import Difference
from wsiflow.run.results import page

SHOWN = 4
"""Most FROC curves that are drawn in colour with their bands: the reference and part of the Pareto set."""
_MARKERS = "osD^vPX*"


def figures(tradeoff: Tradeoff, kind: Literal["png", "svg"] = "png") -> dict[str, bytes]:
    """Return the figures for which there are values, by file name without suffix.

    * ``froc``: FROC curves with pointwise 95 % bands.
    * ``tradeoff``: score against core-hours with intervals, and the Pareto front.
    * ``differences``: differences to the reference on the same cases.
    """
    drawn = {}
    if any(np.isfinite(row.band.sensitivity).any() for row in tradeoff.rows):
        drawn["froc"] = _froc(tradeoff)
    if any(_has_both(row, tradeoff.metric) for row in tradeoff.rows):
        drawn["tradeoff"] = _score_against_cost(tradeoff)
    if any(_shown_differences(tradeoff)):
        drawn["differences"] = _forest(tradeoff)
    return {name: page.picture(figure, kind) for name, figure in drawn.items()}


def _froc(tradeoff: Tradeoff) -> Any:
    """Draw the FROC curves of all settings: those of `_chosen` in colour with their bands, the others in grey."""
    chosen = _chosen(tradeoff)
    figure, axes = page.froc_axes(size_in=(6.4, 4.8))
    for row in tradeoff.rows:
        if row.name not in chosen:
            axes.plot(*_line(row), color="#c9cfd4", linewidth=0.9, zorder=1)
    colours = iter(page.PALETTE)
    for row in sorted(
        (row for row in tradeoff.rows if row.name in chosen), key=lambda row: row.name != tradeoff.reference
    ):
        is_reference = row.name == tradeoff.reference
        colour = page.INK if is_reference else next(colours)
        axes.fill_between(row.band.fp_per_slide, row.band.low, row.band.high, color=colour, alpha=0.1, linewidth=0)
        style = "-" if is_reference else (0, (5, 1.5))  # dashes leave a reference curve below them visible
        label = f"{row.name}{' (reference)' if is_reference else ''}"
        axes.plot(*_line(row), color=colour, linewidth=1.8, linestyle=style, label=label)
    if len(tradeoff.rows) > len(chosen):
        axes.plot([], [], color="#c9cfd4", label=f"{len(tradeoff.rows) - len(chosen)} others")
    page.legend(axes, fontsize=8)
    return figure


def _line(row: SettingRow) -> tuple[Any, Any]:
    return row.band.fp_per_slide, row.band.sensitivity


def _chosen(tradeoff: Tradeoff) -> set[str]:
    """Return the names of the settings in colour: all where they are few, else the reference and part of the front."""
    if len(tradeoff.rows) <= SHOWN:
        return {row.name for row in tradeoff.rows}
    front = [row.name for row in tradeoff.pareto if row.name != tradeoff.reference]
    places = np.unique(np.linspace(0, len(front) - 1, min(SHOWN - 1, len(front))).round().astype(int))
    return {tradeoff.reference, *(front[place] for place in places)}


def _has_both(row: SettingRow, metric: str) -> bool:
    return math.isfinite(row.cost.mean) and row.cost.mean > 0 and math.isfinite(row.metrics[metric].value)


def _score_against_cost(tradeoff: Tradeoff) -> Any:
    """Draw each setting as a point with error bars; lines join settings that differ in the last parameter alone."""
    figure, axes = page.axes(
        f"Core-hours{' of the line' if tradeoff.of_line else ''}", title(tradeoff.metric), size_in=(6.4, 4.8)
    )
    axes.set_xscale("log")
    rows = [row for row in tradeoff.rows if _has_both(row, tradeoff.metric)]
    for number, (name, members) in enumerate(_series(rows).items()):
        colour = page.PALETTE[number % len(page.PALETTE)]
        style = {"color": colour, "marker": _MARKERS[number // len(page.PALETTE) % len(_MARKERS)]}
        _draw_series(axes, sorted(members, key=lambda row: row.cost.mean), tradeoff.metric, style, name)
    _draw_front(axes, [row for row in tradeoff.pareto if row in rows], tradeoff.metric)
    _number_ticks(axes)
    axes.margins(x=0.09, y=0.08)
    last = [list(row.params)[-1] for row in rows if row.params][:1]
    page.legend(axes, fontsize=8, title=f"numbers: {last[0]}" if last else None, title_fontsize=8)
    return figure


def _series(rows: Sequence[SettingRow]) -> dict[str, list[SettingRow]]:
    """Group the settings by all of their parameters except the last one."""
    series: dict[str, list[SettingRow]] = {}
    for row in rows:
        name = ", ".join(f"{key}={value}" for key, value in list(row.params.items())[:-1])
        series.setdefault(name, []).append(row)
    return series


def _draw_series(axes: Any, rows: Sequence[SettingRow], metric: str, style: Mapping[str, str], name: str) -> None:
    x = np.array([row.cost.mean for row in rows])
    y, low, high = np.array([row.metrics[metric] for row in rows]).T
    bars = np.array([[row.cost.mean - row.cost.low, row.cost.high - row.cost.mean] for row in rows]).T
    bars[:, [row.cost.n < 2 for row in rows]] = 0
    axes.errorbar(
        x,
        y,
        xerr=bars,
        yerr=np.nan_to_num(np.clip([y - low, high - y], 0, None)),
        color=style["color"],
        marker=style["marker"],
        markersize=5,
        linewidth=0.9,
        elinewidth=0.8,
        ecolor=_faded(style["color"]),
        label=name or None,
        zorder=3,
    )


def _draw_front(axes: Any, front: Sequence[SettingRow], metric: str) -> None:
    """Mark and label the settings of the Pareto set, and draw the front as a step line."""
    if not front:
        return
    x, y = np.array([(row.cost.mean, row.metrics[metric].value) for row in front]).T
    axes.step(x, y, where="post", color=page.INK, linewidth=1.1, linestyle=(0, (2, 2)), label="Pareto front", zorder=2)
    axes.scatter(x, y, s=95, facecolors="none", edgecolors=page.INK, linewidths=1.1, zorder=4)
    for row, at_x, at_y in zip(front, x, y, strict=True):
        text = ([*row.params.values()] or [""])[-1]
        axes.annotate(text, (at_x, at_y), (-6, 6), ha="right", **_SMALL, zorder=5)


_SMALL: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": page.INK}


def _faded(colour: str) -> tuple[float, float, float, float]:
    from matplotlib.colors import to_rgba

    red, green, blue, _ = to_rgba(colour)
    return red, green, blue, 0.55


def _number_ticks(axes: Any) -> None:
    """Label the logarithmic axis with plain numbers, three per decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _shown_differences(tradeoff: Tradeoff) -> list[str]:
    """Return the metrics for which some setting has a difference from the reference."""
    return [
        metric
        for metric in ("froc.score", "roc.auc")
        if any(math.isfinite(row.differences[metric].value) for row in tradeoff.rows if row.differences)
    ]


def _forest(tradeoff: Tradeoff) -> Any:
    """Draw a forest plot of differences per metric; markers are filled where the corrected p is below 0.05."""
    from matplotlib.figure import Figure

    metrics, rows = _shown_differences(tradeoff), [row for row in tradeoff.rows if row.differences]
    figure = Figure(figsize=(2.4 + 3.6 * len(metrics), 1.3 + 0.3 * len(rows)), dpi=160, layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        page.plain(axes, f"{title(metric)}, difference", "")
        axes.axvline(0, color=page.INK, linewidth=0.9, zorder=1)
        for place, row in enumerate(rows):
            _draw_difference(axes, place, row.differences[metric])
        axes.margins(x=0.08)
    panels[0].set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    name = f"Differences to {tradeoff.reference} on the same cases, p corrected for {len(rows)}"
    figure.suptitle(name, fontsize=9, color=page.INK)
    return figure


def _draw_difference(axes: Any, place: int, one: Difference) -> None:
    if not math.isfinite(one.value):
        return
    differs = one.p_corrected < 0.05
    colour = page.ORANGE if differs else page.BLUE
    if math.isfinite(one.low):
        axes.plot([one.low, one.high], [place, place], color=colour, linewidth=1.4, zorder=2)
    face = colour if differs else "white"
    axes.plot(one.value, place, marker="o", markersize=5.5, color=colour, markerfacecolor=face, zorder=3)
    if math.isfinite(one.p_corrected):
        axes.annotate(
            f"p {p_text(one.p_corrected)}",
            (1.0, place),
            (2, 0),
            xycoords=("axes fraction", "data"),
            va="center",
            **_SMALL,
        )


def p_text(p: float) -> str:
    """Return a p-value as text with two or three decimals, ``<0.001``, or a dash for NaN."""
    if not math.isfinite(p):
        return page.NO_VALUE
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def sensitivities() -> list[str]:
    """Return the metric names of the six sensitivities whose mean is the FROC score."""
    return [f"froc.sensitivity_at_{rate:g}" for rate in froc.RATES]
