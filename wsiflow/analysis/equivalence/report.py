"""Write a comparison of heatmaps as documents.

Input: a `MapComparison`. Output: ``equivalence.md`` to read, ``.csv`` with a row per slide and one for all slides
together, ``.json`` with the same numbers and the histogram, and ``.png`` with the figure.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np

from wsiflow.analysis.equivalence import agreement
from wsiflow.analysis.equivalence.agreement import Tally
from wsiflow.analysis.equivalence.maps import LesionAgreement, MapComparison, SlideAgreement, summary_sentence
from wsiflow.evaluation import proportions
from wsiflow.system import publish, tables


def documents(comparison: MapComparison) -> dict[str, bytes]:
    """Return the files of a comparison, bytes by name."""
    rows = [_row(one) for one in (*comparison.slides, comparison.pooled())]
    edges, counts = agreement.histogram(comparison.total)
    values = {
        "a": comparison.names[0],
        "b": comparison.names[1],
        "threshold": comparison.threshold,
        "radius_um": comparison.radius_um,
        "missing": comparison.missing,
        "neither": comparison.neither,
        "sentence": summary_sentence(comparison),
        "slides": rows[:-1],
        "pooled": rows[-1] | _slide_flips(comparison),
        "histogram": {"edges": edges.tolist(), "below": counts[0].tolist(), "above": counts[1].tolist()},
    }
    return {
        "equivalence.md": _markdown(comparison).encode(),
        "equivalence.csv": tables.csv_text(rows).encode(),
        "equivalence.json": tables.json_text(values).encode(),
        "equivalence.png": figure(comparison.total, comparison.names),
    }


def write(comparison: MapComparison, out: Path) -> None:
    """Write the files of a comparison.

    Raises:
        EnvironmentFault: ``out`` cannot be written.
    """
    publish.preflight(out)
    for name, data in documents(comparison).items():
        publish.write_view(out, name, data)


def figure(tally: Tally, names: tuple[str, str]) -> bytes:
    """Draw a histogram of the differences, and a Bland-Altman plot of difference against mean score, as PNG."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 4), dpi=160, layout="constrained")
    left, right = drawn.subplots(1, 2)
    edges, counts = agreement.histogram(tally)
    places = np.arange(len(edges) - 1)
    left.bar(places, counts[0], color="#1f5f99", label=f"{names[1]} lower")
    left.bar(places, counts[1], bottom=counts[0], color="#c2571a", label=f"{names[1]} equal or higher")
    left.set_yscale("symlog", linthresh=1)
    left.set_xticks(places[1::4], [f"2$^{{{k}}}$" for k in range(-24, 0, 4)])
    left.set_xlabel("|difference|, from")
    left.set_ylabel("cells")
    left.legend(frameon=False)
    centres, (mean, low, high, least, most) = agreement.strip_bounds(tally)
    right.vlines(centres, least, most, color="#9ecae1", linewidth=1.2, label="lowest to highest")
    right.vlines(centres, low, high, color="#1f5f99", linewidth=4, label="mean ± 1.96 SD")
    right.plot(centres, mean, "o", color="#1f2328", markersize=3, label="mean")
    right.axhline(0, color="#8a939c", linewidth=0.8)
    right.set_xlim(0, 1)
    right.set_xlabel("mean of both scores")
    right.set_ylabel(f"{names[1]} minus {names[0]}")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    drawn.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _row(one: SlideAgreement) -> dict[str, Any]:
    """Return the numbers of a slide by column name; None where nothing was compared."""
    lesions = one.lesions._asdict() if one.lesions is not None else dict.fromkeys(LesionAgreement._fields)
    if lesions["true"] is None:
        lesions |= {"true_lost": None, "true_gained": None}
    return {
        "slide_id": one.slide_id,
        **one.numbers,
        **{f"lesions_{name}": n for name, n in lesions.items()},
    }


def _slide_flips(comparison: MapComparison) -> dict[str, float]:
    """Return the number of slides with a flip and the bound of their share: slides are independent, unlike cells."""
    flipped, n = sum(one.numbers["flips"] > 0 for one in comparison.slides), len(comparison.slides)
    return {"slides": n, "slides_with_flips": flipped, "slides_with_flips_upper": proportions.upper_bound(flipped, n)}


_COLUMNS = {
    "slide_id": "slide",
    "cells": "cells",
    "max": "max",
    "mean": "mean",
    **{f"p{100 * share:g}": f"p{100 * share:g}" for share in agreement.QUANTILES},
    "bias": "bias",
    "correlation": "r",
    "flips_up": "flips up",
    "flips_down": "down",
    "only_a": "only A",
    "only_b": "only B",
    "lesions_gained": "gained",
    "lesions_lost": "lost",
    "lesions_true_gained": "true gained",
    "lesions_true_lost": "true lost",
}


def table(comparison: MapComparison) -> str:
    """Return a Markdown table with a row per slide, and one for all slides together."""
    rows = [_row(one) for one in (*comparison.slides, comparison.pooled())]
    return tables.markdown([*_COLUMNS.values()], [[row[name] for name in _COLUMNS] for row in rows])


def _markdown(comparison: MapComparison) -> str:
    """Return the comparison as a Markdown page."""
    flips = _slide_flips(comparison)
    a, b = comparison.names
    notes = [
        f"A is {a}, B is {b}. A difference is B minus A; max, mean and quantiles are of its",
        f"absolute value. A cell is positive from {comparison.threshold:g} on; "
        "a flip up is negative in A and positive in B.",
        f"Detections at most {comparison.radius_um:g} um apart are one lesion; "
        "true lesions count where the truth is known.",
        "The bound on the share of flips is one-sided, 95 %, of Clopper and Pearson, and takes cells as independent.",
        "Neighbouring cells are not: their windows overlap. The bound on slides does not need it:",
        f"{flips['slides_with_flips']} of {flips['slides']} slides have a flip, at most "
        f"{flips['slides_with_flips_upper']:.1%} at 95 %.",
    ]
    parts = ["# Equivalence of heatmaps", summary_sentence(comparison), table(comparison), "\n".join(notes)]
    left_out = [*comparison.missing, *(f"{slide_id} has no heatmap in either" for slide_id in comparison.neither)]
    if left_out:
        parts.insert(2, "Not compared: " + "; ".join(left_out) + ".")
    return "\n\n".join([*parts, "![differences](equivalence.png)"]) + "\n"
