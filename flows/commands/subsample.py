"""``wsiflow subsample``: what a run would score at coarser strides, from its own heatmaps."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from wsiflow.analysis.subsample import write

from ..options import positives
from ..terminal import say


def add_options(parser: ArgumentParser) -> None:
    """Add the run's folder, the strides, and the folder to write."""
    parser.add_argument("run", type=Path)
    parser.add_argument("--stride", type=positives, required=True, help="reading px, separated by commas")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets one for each stride")


def main(arguments: Namespace) -> int:
    """Score the run's heatmaps at each stride, and print where the scores are."""
    for folder in write(arguments.run, arguments.stride, arguments.out):
        say(f"scores     {folder / 'evaluation/summary.json'}")
    return 0
