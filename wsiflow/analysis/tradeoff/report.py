"""Write a comparison as documents: Markdown and CSV to paste, and one self-contained HTML page.

Input: a `Tradeoff` and its figures. Output: texts. A missing value is a dash, and an empty cell in the CSV.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from wsiflow.analysis.tradeoff.figures import p_text, sensitivities
from wsiflow.analysis.tradeoff.values import CoreHours, SettingRow, Tradeoff, title
from wsiflow.evaluation.draws import Interval
from wsiflow.evaluation.paired import Difference
from wsiflow.run.results import page
from wsiflow.system import tables

_METRICS = ("froc.score", *sensitivities(), "froc.strict_score", "roc.auc")
_CAPTIONS = {
    "tradeoff": "Score against core-hours. Upright bars: 95 % intervals over cases; level bars: from the least to the "
    "most of the repeats, where there are any. Rings: the Pareto set.",
    "froc": "FROC curves, official scoring, with 95 % bands at each point by itself.",
    "differences": "Setting minus reference with 95 % intervals. Filled: corrected p below 0.05.",
}


def texts(tradeoff: Tradeoff, figures: Mapping[str, bytes]) -> dict[str, str]:
    """Return the texts of ``compare.md``, ``compare.csv`` and ``report.html`` by file name.

    Args:
        tradeoff: The comparison.
        figures: PNG bytes by name without suffix. The page embeds them; the Markdown refers to files beside it.
    """
    return {
        "compare.md": _markdown(tradeoff, figures),
        "compare.csv": _csv(tradeoff),
        "report.html": _html(tradeoff, figures),
    }


def columns(tradeoff: Tradeoff) -> dict[str, list[Any]]:
    """Return the comparison as columns of plain values by name, one value per setting; None where there is none."""
    rows = [dict(_cells(row)) for row in tradeoff.rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def main_table(tradeoff: Tradeoff) -> list[dict[str, str]]:
    """Return the main table as rows by column, rounded to be read."""
    return [dict(zip(_HEADS, _row(tradeoff, row), strict=True)) for row in tradeoff.rows]


def _csv(tradeoff: Tradeoff) -> str:
    table = columns(tradeoff)
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    return tables.csv_text(rows, list(table))


def _cells(row: SettingRow) -> Iterator[tuple[str, Any]]:
    """Yield name and value of every column of a setting."""
    yield "setting", row.name
    yield from row.params.items()
    for metric in _METRICS:
        for part, value in row.metrics[metric]._asdict().items():
            yield (metric if part == "value" else f"{metric}_ci_{part}"), _finite(value)
    for name, cost in (("core_hours", row.cost), ("line_core_hours", row.line)):
        for part, value in cost._asdict().items():
            yield f"{name}_{part}", _finite(value)
    for metric in ("froc.score", "roc.auc"):
        for part, value in row.differences[metric]._asdict().items() if row.differences else ():
            yield f"{metric}_difference{'' if part == 'value' else f'_{part}'}", _finite(value)
    for part, value in zip(("p", "p_corrected"), row.delong or (), strict=False):
        yield f"roc.auc_delong_{part}", _finite(value)
    yield from _study_cells(row)
    yield "pareto", "yes" if row.pareto else "no"
    yield "pareto_share", _finite(row.membership)
    yield "runs", " ".join(row.runs)


def _study_cells(row: SettingRow) -> Iterator[tuple[str, Any]]:
    """Yield name and value of the columns on the margin and on larger studies, as far as they are asked for."""
    if row.family:
        yield "family", row.family
    for part, value in row.verdict._asdict().items() if row.verdict else ():
        yield f"margin_{part}", value if isinstance(value, str | bool) else _finite(value)
    for part, value in row.power._asdict().items() if row.power else ():
        yield f"power_{part}", _finite(value)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- the main table


_HEADS = (
    "Setting",
    "FROC score",
    "Slide AUC",
    "Core-hours",
    "of the line",
    "Against the reference",
    "p",
    "corrected",
    "Pareto",
)


def _row(tradeoff: Tradeoff, row: SettingRow) -> list[str]:
    one = row.differences.get(tradeoff.metric)
    return [
        row.name,
        _interval(row.metrics["froc.score"]),
        _interval(row.metrics["roc.auc"]),
        _cost(row.cost),
        _cost(row.line),
        against(tradeoff, row),
        *((p_text(one.p), _corrected(one)) if one else ("", "")),
        _membership(row),
    ]


def _corrected(one: Difference) -> str:
    """Return the corrected p-value with the corrected interval."""
    ends = f" [{one.low_corrected:+.3f}, {one.high_corrected:+.3f}]" if math.isfinite(one.low_corrected) else ""
    return f"{p_text(one.p_corrected)}{ends}"


def _membership(row: SettingRow) -> str:
    """Return whether a setting is in the Pareto set, and in which share of the redraws it is."""
    share = f" [{row.membership:.0%}]".replace("%", " %") if math.isfinite(row.membership) else ""
    return f"{'yes' if row.pareto else 'no'}{share}"


_VERDICT_HEADS = ("Setting", "Not worse by more than the margin", "Bound", "p", "corrected", "Slides it takes")
_POWER_HEADS = (
    "Setting",
    "Power now",
    "corrected",
    "Slides for the difference",
    "corrected",
    "Slides for the margin if equal",
    "if as observed",
)


def verdict_rows(tradeoff: Tradeoff) -> list[tuple[str, ...]]:
    """Return the verdicts on the margin as rows of texts; empty where no margin was asked for."""
    return [
        (
            row.name,
            f"{one.verdict}{', equivalent' if one.equivalent else ''}",
            f"{one.bound:+.3f}" if math.isfinite(one.bound) else page.NO_VALUE,
            p_text(one.p),
            p_text(one.p_corrected),
            _slides(one.slides),
        )
        for row in tradeoff.rows
        if (one := row.verdict)
    ]


def power_rows(tradeoff: Tradeoff) -> list[tuple[str, ...]]:
    """Return power and numbers of slides as rows of texts; empty where they were not asked for."""
    return [
        (
            row.name,
            *(f"{share:.2f}" if math.isfinite(share) else page.NO_VALUE for share in one[:2]),
            *map(_slides, one[2:]),
        )
        for row in tradeoff.rows
        if (one := row.power)
    ]


def _slides(number: float) -> str:
    return f"{math.ceil(number):,}" if math.isfinite(number) else page.NO_VALUE


def _studies(tradeoff: Tradeoff) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Return title, heads and rows of the tables on the margin and on larger studies, as far as they are asked for."""
    name = title(tradeoff.metric)
    found = [
        (f"{name}: a loss of {tradeoff.margin:g} or more", _VERDICT_HEADS, verdict_rows(tradeoff))
        if tradeoff.margin is not None
        else ("", (), []),
        (f"{name}: slides of a larger study", _POWER_HEADS, power_rows(tradeoff)),
    ]
    return [one for one in found if one[2]]


def against(tradeoff: Tradeoff, row: SettingRow) -> str:
    """Return what a setting saves and loses, such as ``saves 0.0006 core-h (32 %), FROC score -0.083 [-0.167, 0]``."""
    if row.name == tradeoff.reference:
        return "reference"
    base, one = tradeoff.base.cost.mean, row.differences.get(tradeoff.metric)
    saved = base - row.cost.mean
    parts = []
    if math.isfinite(saved):
        share = f" ({abs(saved) / base:.0%})".replace("%", " %") if base > 0 else ""
        parts.append(
            f"{'saves' if saved >= 0 else 'takes'} {abs(saved):.2g} core-h{'' if saved >= 0 else ' more'}{share}"
        )
    if one is not None and math.isfinite(one.value):
        parts.append(f"{title(tradeoff.metric).removesuffix(' score')} {_difference(one)}")
    return ", ".join(parts) or page.NO_VALUE


def rounded(value: float) -> float:
    """Return a number with four significant digits."""
    return float(f"{value:.4g}")


def _interval(one: Interval) -> str:
    if not math.isfinite(one.value):
        return page.NO_VALUE
    return f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]" if math.isfinite(one.low) else f"{one.value:.3f}"


def _difference(one: Difference) -> str:
    if not math.isfinite(one.value):
        return page.NO_VALUE
    text = f"{one.value:+.3f}"
    return f"{text} [{one.low:+.3f}, {one.high:+.3f}]" if math.isfinite(one.low) else text


def _cost(cost: CoreHours) -> str:
    if not math.isfinite(cost.mean):
        return page.NO_VALUE
    return f"{cost.mean:.3g} ± {cost.sd:.2g} (n = {cost.n})" if cost.n > 1 else f"{cost.mean:.3g}"


# --- sentences


def _what(tradeoff: Tradeoff) -> str:
    name, digest = tradeoff.protocol
    counts = ", ".join(f"{number:,} {what}" for what, number in tradeoff.counts.items())
    return f"{counts}; protocol {name} ({digest[:12]})"


def _sentences(tradeoff: Tradeoff) -> list[str]:
    """Return the sentences that explain the table: intervals, p-values, core-hours and the Pareto set."""
    others = len(tradeoff.rows) - 1
    return [
        f"Intervals hold 95 % of {tradeoff.counts['resamples']:,} resamples of the cases, extended to exact ones where "
        "almost all lesions are found or almost none; those of the AUC are DeLong's. Slides of a patient stay "
        "together.",
        f"Differences of {title(tradeoff.metric)} are to {tradeoff.reference}, on the same resamples. Their intervals "
        "are extended to those of a score test (Tango 1998): of few slides that differ resamples say too little.",
        "p is two-sided, by exchange of the results of the slides, and corrected by Holm's method for "
        f"{_comparisons(tradeoff, others)}, each metric by itself; the interval beside it holds with all of these at "
        "once.",
        *_of_margin(tradeoff),
        f"{_of_what(tradeoff)}: the mean ± the standard deviation over n repeats, where there are any. One repeat says "
        "nothing of the spread.",
        f"The Pareto set is of {title(tradeoff.metric)} and mean core-hours. The share beside it is that of the "
        "resamples in which a setting is in the set. Costs nearer than twice their standard error count as equal "
        "(a deviation of 5 % is assumed where nothing was repeated).",
        *tradeoff.notes,
    ]


def _of_what(tradeoff: Tradeoff) -> str:
    of_line = "what its tasks took, the comparison of its scores with single windows in fp32 included"
    if tradeoff.of_line:
        return f"Core-hours are those of the line alone: {of_line}"
    return (
        "Core-hours are all that a setting costs by itself, as the kernel counts it: start, planning, failed attempts "
        f"and scoring included; those of the line are {of_line}"
    )


def _comparisons(tradeoff: Tradeoff, others: int) -> str:
    sizes = Counter(row.family for row in tradeoff.rows if row.name != tradeoff.reference)
    if set(sizes) <= {""}:
        return f"{others} {'comparison' if others == 1 else 'comparisons'}"
    return "families of comparisons: " + ", ".join(f"{name or 'others'} ({n})" for name, n in sizes.items())


def _of_margin(tradeoff: Tradeoff) -> list[str]:
    if tradeoff.margin is None:
        return []
    return [
        f"A loss of {tradeoff.margin:g} or more is excluded (shown) where the one-sided p, corrected for the family, "
        "is at most 0.025, by the resamples and by the score test; equivalent: a gain of as much is excluded too. The "
        "number of slides is that which shows it with a power of 80 % if there is no true difference."
    ]


def front(tradeoff: Tradeoff) -> list[str]:
    """Return a line of score and core-hours for each setting of the Pareto set, cheapest first."""
    return [
        f"{row.name}: {_interval(row.metrics[tradeoff.metric])}, {_cost(row.cost)} core-hours{_share(row)}"
        for row in tradeoff.pareto
    ]


def _share(row: SettingRow) -> str:
    share = f"{row.membership:.0%}".replace("%", " %")
    return f", in the set in {share} of the resamples" if math.isfinite(row.membership) else ""


# --- Markdown


def _markdown(tradeoff: Tradeoff, figures: Mapping[str, bytes]) -> str:
    table = [_HEADS, *(_row(tradeoff, row) for row in tradeoff.rows)]
    lines = [_piped(table[0]), _piped(["---"] * len(table[0])), *map(_piped, table[1:])]
    pictures = [f"![{_CAPTIONS[name]}]({name}.png)\n" for name in _CAPTIONS if name in figures]
    parts = [
        f"# {tradeoff.name}: accuracy against core-hours\n",
        f"{_what(tradeoff)}.\n",
        "\n".join(lines) + "\n",
        "## Pareto set, cheapest first\n",
        (
            "\n".join(f"- {line}" for line in front(tradeoff))
            if tradeoff.pareto
            else "None: it needs core-hours, and scores that guessing does not reach."
        )
        + "\n",
        *(
            "\n".join([f"## {name}\n", *map(_piped, [heads, ["---"] * len(heads), *rows])]) + "\n"
            for name, heads, rows in _studies(tradeoff)
        ),
        *pictures,
        "\n".join(f"- {sentence}" for sentence in _sentences(tradeoff)),
    ]
    return "\n".join(parts) + "\n"


def _piped(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


# --- MLflow

_LONGEST_TABLE = 5000  # characters: the description of a run in MLflow has at most 8000


def description(tradeoff: Tradeoff, names: Collection[str]) -> str:
    """Return the comparison as Markdown for the page of an MLflow run.

    The whole comparison is the artifact ``compare.md``.

    Args:
        tradeoff: The comparison.
        names: Names of the run's files. The address of a figure has ``{run}`` for the id of the run.
    """
    shown = {
        name: f"![{name}](get-artifact?path={name}.png&run_uuid={{run}})\n"
        for name in _CAPTIONS
        if f"{name}.png" in names
    }
    lines = [_piped(_HEADS), _piped(["---"] * len(_HEADS))]
    for place, row in enumerate(tradeoff.rows):
        if sum(map(len, lines)) > _LONGEST_TABLE:
            lines.append(_piped([f"and {len(tradeoff.rows) - place} more: see compare.md", *[""] * (len(_HEADS) - 1)]))
            break
        lines.append(_piped(_row(tradeoff, row)))
    parts = [
        "**Worth their cost, cheapest first:**\n",
        "\n".join(f"- {line}" for line in front(tradeoff) or ["none"]) + "\n",
        f"{_what(tradeoff)}.\n",
        shown.pop("tradeoff", ""),
        "\n".join(lines) + "\n",
        *(f"- {note}" for note in tradeoff.notes),
        "",
        *shown.values(),
    ]
    return "\n".join(parts)


# --- HTML


def _html(tradeoff: Tradeoff, figures: Mapping[str, bytes]) -> str:
    sections = [
        f"<header><h1>{escape(tradeoff.name)}</h1>"
        f'<p class="soft">Accuracy against core-hours · {escape(_what(tradeoff))}</p></header>\n',
        page.cards(_cards(tradeoff)),
        page.section("Tradeoff", _figure(figures, "tradeoff") + _main_table(tradeoff)),
        page.section("Differences", _figure(figures, "differences")) if "differences" in figures else "",
        *(page.section(name, _plain_table(heads, rows)) for name, heads, rows in _studies(tradeoff)),
        page.section("FROC", _figure(figures, "froc") + _rates(tradeoff)) if "froc" in figures else "",
        page.section("How to read and cite this", _list(_sentences(tradeoff))),
        page.section("What all settings have in common", page.pairs(tradeoff.common, str)),
    ]
    return page.document(tradeoff.name, "".join(sections))


def _cards(tradeoff: Tradeoff) -> list[tuple[str, str, str]]:
    best = max(tradeoff.rows, key=lambda row: _or_least(row.metrics[tradeoff.metric].value))
    shown = [
        ("Settings", str(len(tradeoff.rows)), f"{sum(len(row.runs) for row in tradeoff.rows)} runs"),
        ("Pareto set", str(len(tradeoff.pareto)), "nothing is cheaper and as good"),
        (f"Best {title(tradeoff.metric)}", _interval(best.metrics[tradeoff.metric]).partition(" ")[0], best.name),
    ]
    if tradeoff.pareto:
        least = tradeoff.pareto[0]
        score = _interval(least.metrics[tradeoff.metric])
        shown.append(("Least core-hours", f"{least.cost.mean:.3g}", f"{least.name}: {score}"))
    return shown


def _or_least(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _figure(figures: Mapping[str, bytes], name: str) -> str:
    if name not in figures:
        return "<p>There is nothing to draw: it needs scores and core-hours.</p>\n"
    picture = page.image(figures[name], "png", _CAPTIONS[name])
    return f'<figure class="broad">{picture}<figcaption>{escape(_CAPTIONS[name])}</figcaption></figure>\n'


def _main_table(tradeoff: Tradeoff) -> str:
    return _by_parameter(tradeoff, _HEADS[1:], [_row(tradeoff, row)[1:] for row in tradeoff.rows])


def _rates(tradeoff: Tradeoff) -> str:
    """Return an HTML table of the sensitivities whose mean is the score, and of the strict score, with intervals."""
    metrics = [*sensitivities(), "froc.strict_score"]
    heads = [*(f"at {name.rpartition('_')[2]} FP" for name in metrics[:-1]), "Strict score"]
    return _by_parameter(tradeoff, heads, [[_interval(row.metrics[name]) for name in metrics] for row in tradeoff.rows])


def _by_parameter(tradeoff: Tradeoff, heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return an HTML table: the parameters of each setting, those of the Pareto set in bold, then its ``cells``."""
    names = list(tradeoff.rows[0].params) or ["setting"]
    rows = (
        _marked(row, [*row.params.values()] or [row.name], own) for row, own in zip(tradeoff.rows, cells, strict=True)
    )
    return page.table([*names, *heads], rows)


def _marked(row: SettingRow, names: Sequence[str], cells: Sequence[str]) -> str:
    """Return a row of the HTML table; an interval or a deviation stands in small type under its value."""
    html = [f"<b>{escape(name)}</b>" if row.pareto else escape(name) for name in names]
    html += [re.sub(r" ((\[|±).*)", r"<small>\1</small>", escape(cell)) for cell in cells]
    return "<tr>" + "".join(f'<td class="number">{cell}</td>' for cell in html) + "</tr>\n"


def _plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return page.table(
        heads, ["<tr>" + "".join(f'<td class="number">{escape(cell)}</td>' for cell in row) + "</tr>\n" for row in rows]
    )


def _list(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>\n"
