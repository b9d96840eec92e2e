"""``wsiflow features``: thirty features of every slide of some runs, from their heatmaps."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from wsiflow.evaluation import slide_score
from wsiflow.run.plan import latest_plan

from ..terminal import say


def add_options(parser: ArgumentParser) -> None:
    """Add the runs, and the file to write."""
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="CSV to write")
    parser.add_argument("--reference", action="store_true", help="with the quirks of the reference system")


def main(arguments: Namespace) -> int:
    """Write the features of every slide of the runs."""
    slides = [(run, latest_plan(run).slides) for run in arguments.runs]
    count = slide_score.write_features(slides, arguments.out, reference=arguments.reference)
    say(f"features of {count} slides: {arguments.out}")
    return 0
