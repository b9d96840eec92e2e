"""Hold the tradeoff between score and core-hours as values, and draw it as figures for a paper.

Input: settings with their costs, intervals and differences. Output: figures as bytes. A setting without a value is not
drawn, and a cost that was measured once has no error bar.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from wsiflow.evaluation import froc
from wsiflow.evaluation.margin import Power
from wsiflow.evaluation.paired import Difference, FrocBand, Interval
from wsiflow.run.results import page

SHOWN = 4
"""Most FROC curves that are drawn in colour with their bands: the reference and part of the Pareto set."""

_MARKERS = "osD^vPX*"
_TITLES = {"froc.score": "FROC score", "froc.strict_score": "Strict FROC score", "roc.auc": "Slide AUC"}


class CoreHours(NamedTuple):
    """Core-hours of a setting over its repeats.

    Attributes:
        mean: Mean core-hours; NaN where none were measured.
        sd: Standard deviation over repeats; NaN for fewer than two.
        low, high: Least and most core-hours of a repeat.
        n: Number of repeats that were measured.
    """

    mean: float
    sd: float
    low: float
    high: float
    n: int


NOT_MEASURED = CoreHours(math.nan, math.nan, math.nan, math.nan, 0)


class SettingRow(NamedTuple):
    """One setting of a comparison.

    Attributes:
        name: Parameters that distinguish the setting from the others, such as ``stain=none, stride=16``.
        params: Values of the parameters that differ in the comparison, by short name; the parameter with most values is
            the last one.
        runs: Folders or MLflow run ids of the setting's runs.
        cost: Core-hours over the repeats, by which settings are compared.
        metrics: 95 % intervals by metric name.
        differences: Differences from the reference by metric name; empty for the reference itself.
        delong: p-values of DeLong's test of the AUC against the reference's, uncorrected and corrected; None for the
            reference itself.
        band: FROC curve with its 95 % band.
        pareto: Whether no other setting is cheaper and at least as good, or as cheap and better; a setting that finds
            nothing is not.
        dotted: Values of the parameters that differ in the comparison, by dotted name.
        membership: Share of the redraws of the cases in which the setting is in the Pareto set; NaN without draws.
        family: Family of comparisons that its p-value is corrected for; empty where none is named.
        verdict: Verdict on the margin; None for the reference, and where no margin is asked for.
        power: What the slides say of a larger study; None for the reference, and where it is not asked for.
        line: Core-hours of the line alone.
    """

    name: str
    params: Mapping[str, str]
    runs: tuple[str, ...]
    cost: CoreHours
    metrics: Mapping[str, Interval]
    differences: Mapping[str, Difference]
    delong: tuple[float, float] | None
    band: FrocBand
    pareto: bool
    dotted: Mapping[str, str] = MappingProxyType({})
    membership: float = math.nan
    family: str = ""
    verdict: "Verdict | None" = None
    power: Power | None = None
    line: CoreHours = NOT_MEASURED


class Verdict(NamedTuple):
    """Whether a setting is worse than the reference by more than the margin.

    Attributes:
        verdict: ``shown`` (not worse by more than the margin), ``not shown``, or ``worse`` (by more than the margin).
        equivalent: Whether it is also shown that it is not better by more than the margin.
        bound: One-sided 97.5 % bound of the difference, corrected for the family.
        p, p_corrected: p-value of the hypothesis that it is worse by the margin or more, also corrected by Holm's
            method within the family.
        slides: Slides that would show it with a power of 80 % if there is no true difference.
    """

    verdict: str
    equivalent: bool
    bound: float
    p: float
    p_corrected: float
    slides: float


@dataclass(frozen=True)
class Tradeoff:
    """A comparison of settings: score against core-hours.

    Attributes:
        name: Name of the sweep or the experiment.
        reference: Name of the setting that the others are compared with.
        metric: Metric of the Pareto set: ``froc.score``, or ``roc.auc`` where no lesions are annotated.
        rows: The settings.
        common: Settings that have the same value in all runs, by dotted name.
        counts: Numbers of slides, lesions and bootstrap draws by name.
        protocol: Name and hash of the scoring protocol.
        notes: Sentences for the reader, on runs that were left out and on processors that differ.
        margin: Largest loss of the metric that is accepted; None where none is asked for.
        of_line: Whether the costs are those of the line alone, since not all runs have others.
    """

    name: str
    reference: str
    metric: str
    rows: Sequence[SettingRow]
    common: Mapping[str, str]
    counts: Mapping[str, int]
    protocol: tuple[str, str]
    notes: Sequence[str]
    margin: float | None = None
    of_line: bool = False

    @property
    def pareto(self) -> list[SettingRow]:
        """The Pareto set, cheapest first."""
        return sorted((row for row in self.rows if row.pareto), key=lambda row: row.cost.mean)

    @property
    def base(self) -> SettingRow:
        """The reference."""
        return next(row for row in self.rows if row.name == self.reference)


def title(metric: str) -> str:
    """Return the name of a metric for readers."""
    return _TITLES[metric]


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


# --- FROC


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


# --- score against cost


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


# --- differences


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
