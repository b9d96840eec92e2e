"""``wsiflow compare-maps``: how far the heatmaps of two runs lie apart, and what that changes."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from wsiflow.analysis.equivalence import maps
from wsiflow.analysis.equivalence.report import table, write
from wsiflow.errors import InputError

from ..terminal import say


def add_options(parser: ArgumentParser) -> None:
    """Add the two runs or heatmaps, and what counts as equivalent."""
    parser.add_argument("a", type=Path, help="folder of a run, or a heatmap")
    parser.add_argument("b", type=Path, help="the same of another setting")
    parser.add_argument("--threshold", type=float, default=0.5, help="a cell is positive from this score on (0.5)")
    parser.add_argument("--radius-um", type=float, default=75.0, help="detections this near are one lesion (75)")
    parser.add_argument("--bound", type=float, help="largest |difference| of equivalent maps: exit code 10 beyond it")
    parser.add_argument("--map", default="", metavar="NAME", help="class of model.maps (that of the positive score)")
    parser.add_argument("--out", type=Path, help="folder to write equivalence.md, .csv, .json and .png to")


def main(arguments: Namespace) -> int:
    """Compare the heatmaps, and print how far they lie apart and whether that is within the bound."""
    bound = arguments.bound
    if bound is not None and not 0 <= bound <= 1:
        raise InputError(f"the bound is {bound}", "give a difference of probabilities, 0 to 1")
    comparison = maps.compare_maps(
        arguments.a,
        arguments.b,
        threshold=arguments.threshold,
        radius_um=arguments.radius_um,
        of_class=arguments.map,
    )
    say(table(comparison))
    say(maps.summary_sentence(comparison))
    if arguments.out is not None:
        write(comparison, arguments.out)
        say(f"written    {arguments.out / 'equivalence.md'}")
    if bound is None:
        return 0
    reasons = maps.reasons_not_equivalent(comparison, bound)
    say(f"NOT EQUIVALENT within {bound:g}: {'; '.join(reasons)}" if reasons else f"equivalent within {bound:g}")
    return maps.NOT_EQUIVALENT if reasons else 0
