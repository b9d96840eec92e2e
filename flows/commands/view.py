"""``wsiflow view``: look at the slides of a run, or of two side by side, in a browser on this machine."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from wsiflow.analysis.viewer.served import ServedRun
from wsiflow.analysis.viewer.server import listening

from .. import stopping
from ..terminal import remark, say

_MOST_NAMED = 5


def add_options(parser: ArgumentParser) -> None:
    """Add the folders of the runs and the port."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("other", type=Path, metavar="RUN2", nargs="?", help="folder of a run to show beside it")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1, for a tunnel; any free one by default")


def main(arguments: Namespace) -> int:
    """Serve the viewer until a signal ends it."""
    roots = [arguments.run, *([arguments.other] if arguments.other else [])]
    names = _names(roots)
    runs = {name: ServedRun(root) for name, root in zip(names, roots, strict=True)}
    for run in runs.values():
        run.warm_up()
    missing = {slide_id: reason for run in runs.values() for slide_id, reason in run.missing.items()}
    if missing:
        some = "; ".join(f"slide {slide_id}: {reason}" for slide_id, reason in list(missing.items())[:_MOST_NAMED])
        more = f"; and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
        remark(f"overviews are shown of {len(missing)} slides: {some}{more}")
    with listening(runs, arguments.port) as viewer, stopping.at_stop(lambda: "the viewer has ended"):
        say(f"open {viewer.link}  (Ctrl-C ends it)")
        viewer.serve_forever()
    return 0


def _names(roots: list[Path]) -> list[str]:
    """Return a name for each run: the last parts of its folder's path, as many as tell them apart."""
    paths = [root.absolute() for root in roots]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {paths[0].name}" for number in range(1, len(paths) + 1)]
