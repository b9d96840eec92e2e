"""``wsiflow export``: runs for reviewers, in one of several formats."""

from argparse import ArgumentParser, Namespace

from wsiflow.analysis.reviewers import imrmc, qupath, regulatory
from wsiflow.analysis.reviewers.format import Format

from ..terminal import say

#: The formats by name, each described in its own file.
FORMATS: dict[str, Format] = {each.name: each for each in (imrmc.FORMAT, regulatory.FORMAT, qupath.FORMAT)}


def add_options(parser: ArgumentParser) -> None:
    """Add the formats, each with its options."""
    names = parser.add_subparsers(required=True, metavar="FORMAT")
    for each in FORMATS.values():
        one = names.add_parser(each.name, help=each.about)
        one.set_defaults(export=each.export)
        each.add_options(one)


def main(arguments: Namespace) -> int:
    """Write the files of the chosen format, and print what was written."""
    for sentence in arguments.export(arguments):
        say(sentence)
    return 0
