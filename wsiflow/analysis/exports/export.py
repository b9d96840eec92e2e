"""The options that the exports of a run have in common, and the loop over its slides."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path

from wsiflow.analysis.exports.findings import Findings, read_findings
from wsiflow.errors import InputError
from wsiflow.system import publish

Files = Mapping[str, bytes]
"""Contents of files by name, relative to the folder of the export."""

Note = Callable[[str], None]
"""Takes a sentence on what is left out."""


def add_run(parser: ArgumentParser, *, contours: bool = True) -> None:
    """Add the run, the folder, and where contours are drawn, for formats that have any."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, help="folder to write (RUN/exports/<format>)")
    parser.add_argument("--slide", nargs="+", metavar="ID", help="slides to export (all)")
    if contours:
        parser.add_argument(
            "--threshold",
            type=_probability,
            nargs="+",
            default=(),
            metavar="P",
            help="probabilities at which contours of the heatmap are drawn (lesions.threshold of the run)",
        )


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"{text!r} is not a probability from 0 to 1")
    return value


def each_slide(arguments: Namespace, files: Callable[[Findings, Note], Files]) -> list[str]:
    """Write the files of every slide, and return sentences about what was written and what was left out.

    Args:
        arguments: The options of `add_run`, and the name of the format as ``format``.
        files: Returns the files of a slide; none for one that the format cannot hold, which it notes.

    Raises:
        InputError: The folder holds no run, or not the slides that are asked for; or nothing could be written.
        EnvironmentFault: The folder cannot be written.
    """
    root: Path = arguments.run
    out = (arguments.out or root / "exports" / arguments.format).absolute()
    notes: list[str] = []
    n_slides = n_detections = 0
    for found in read_findings(root, getattr(arguments, "threshold", ()), notes.append, only=arguments.slide):
        if not n_slides:
            publish.preflight(out)
        written = files(found, notes.append)
        for name, data in written.items():
            publish.write_view(out, name, data)
        n_slides, n_detections = n_slides + bool(written), n_detections + len(found.detections) * bool(written)
    if not n_slides:
        raise InputError("nothing could be exported", "; ".join(notes) or "finish the run first", path=root)
    return [*notes, f"{n_slides} slides, {n_detections} detections: {out}"]
