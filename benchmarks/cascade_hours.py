"""Extrapolate the core-hours of a cascade over the slides of CAMELYON16, from what other benchmarks have measured.

Input: the results of `benchmarks.core_hours` (what a run costs that looks at all tissue) and of `benchmarks.cascade`
(what part of that a cascade costs on slides with small lesions). Output: a table. Nothing is measured here, and the
two may have been measured on different processors.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.cascade import CERTIFICATES, FIRST, NONE, OWN, PCAM
from benchmarks.core_hours import between_text, factors
from benchmarks.measuring import ResultTable
from benchmarks.targets import CASCADE_CORE_H


class Shares(NamedTuple):
    """What a cascade costs, over what a run costs that looks at all tissue.

    Attributes:
        first, own: The first pass and the own pass, over the own pass on all tissue.
        certificates: Its certificates, over those of a run without a first pass.
    """

    first: float
    own: float
    certificates: float


def tables(results: Mapping[str, Any]) -> list[ResultTable]:
    """Return the table of core-hours by precision and stride; none where one of the two was not measured in full."""
    if not {"core_hours", "cascade"} <= results.keys() or any(
        results[name]["settings"]["quick"] for name in ("core_hours", "cascade")
    ):
        return []
    values, cascade = results["core_hours"]["values"], results["cascade"]["values"]
    both = [name for name in values["lines"] if f"{name}: {PCAM}" in cascade]
    rows = []
    for name in both:
        shares = _shares(cascade, name)
        hours, goal = _hours(values, name, shares), CASCADE_CORE_H.get(name)
        cells = [f"{shares.first:.2f}", f"{shares.own:.2f}", f"{shares.certificates:.1f}"]
        whole = between_text(values["core_h"][f"{name}, touching"])
        rows.append([name, *cells, whole, between_text(hours), f"{goal or ''}"])
    columns = [
        "",
        "measured: first pass, of the own pass on all tissue",
        "own pass, of the same",
        "certificates, times",
    ]
    columns += ["extrapolated: core-hours of all slides without a first pass", "with it", "goal"]
    title = f"Core-hours of {len(values['boxes'])} slides with a cascade, if all of them had small lesions at most"
    return [ResultTable(title, columns, rows)] if rows else []


def _shares(cascade: Mapping[str, Any], name: str) -> Shares:
    """Return what a cascade costs over the whole run, as measured."""
    one, whole = (cascade[f"{name}: {way}"]["parts_s"] for way in (PCAM, NONE))
    return Shares(one[FIRST] / whole[OWN], one[OWN] / whole[OWN], one[CERTIFICATES] / whole[CERTIFICATES])


def _hours(values: Mapping[str, Any], name: str, shares: Shares) -> dict[str, float]:
    """Return core-hours of all slides, by slides and by boxes: of pixels a share, of every slide its certificate."""
    line, counted = values["lines"][name], values["counted"][name.split()[-1]]
    of_pixels = counted["megapixels, touching"] * line["s_megapixel"][0] * (shares.first + shares.own)
    each_s = shares.certificates * line["certificate_s"][0] + line["other_s"][0]
    return {how: (of_pixels * times + len(values["boxes"]) * each_s) / 3600 for how, times in factors(values).items()}
