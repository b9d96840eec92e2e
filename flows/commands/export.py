"""``wsiflow export``: a run in one of several formats, for reviewers and for other programs."""

from argparse import ArgumentParser, Namespace

from wsiflow.analysis.exports import asap, coordinates, dicom_seg, ome_tiff, qupath, wsinfer
from wsiflow.analysis.reviewers import imrmc, regulatory
from wsiflow.analysis.reviewers.format import Format

from ..terminal import say

#: The formats by name, each described in its own file.
FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        imrmc.FORMAT,
        regulatory.FORMAT,
        qupath.FORMAT,
        asap.FORMAT,
        coordinates.CLAM,
        coordinates.TRIDENT,
        wsinfer.FORMAT,
        ome_tiff.FORMAT,
        dicom_seg.FORMAT,
    )
}


def add_options(parser: ArgumentParser) -> None:
    """Add the formats, each with its options."""
    parser.epilog = f"The format may stand behind --to instead: wsiflow export RUN --to qupath. {parser.epilog}"
    names = parser.add_subparsers(required=True, metavar="FORMAT")
    for each in FORMATS.values():
        one = names.add_parser(each.name, help=each.about, description=each.about)
        one.set_defaults(export=each.export, format=each.name)
        each.add_options(one)


def main(arguments: Namespace) -> int:
    """Write the files of the chosen format, and print what was written."""
    for sentence in arguments.export(arguments):
        say(sentence)
    return 0
