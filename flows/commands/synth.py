"""``wsiflow synth``: write a synthetic data set with known lesions."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from wsiflow.errors import InputError
from wsiflow.slides.synthetic import dataset
from wsiflow.system import publish

from ..options import natural, positive, scale
from ..terminal import say

_SMALLEST_PX = 1024


def add_options(parser: ArgumentParser) -> None:
    """Add the folder to write, and the options of the slides."""
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size-px", type=positive, default=6144, help="side of the slides, at least 1024 (6144)")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument(
        "--like", choices=["camelyon16"], help="slides like real ones, from outlines and tissue in --data"
    )
    parser.add_argument("--data", type=Path, help="folder that holds camelyon16/ and patches/")
    parser.add_argument("--slides", type=positive, default=40, help="with --like: how many (40)")
    parser.add_argument("--scale", type=scale, default=0.25, help="with --like: size of outlines, 1 is real (0.25)")


def main(arguments: Namespace) -> int:
    """Write the slides, and print where their manifest is."""
    say(f"manifest: {_write_like(arguments) if arguments.like else _write(arguments)}")
    return 0


def _write(arguments: Namespace) -> Path:
    if arguments.size_px < _SMALLEST_PX:
        cause = f"slides of {arguments.size_px} px are too small for tissue and lesions"
        raise InputError(cause, f"give --size-px of at least {_SMALLEST_PX}")
    publish.preflight(arguments.folder)
    return dataset.write_dataset(arguments.folder, size_px=arguments.size_px, seed=arguments.seed)


def _write_like(arguments: Namespace) -> Path:
    if arguments.data is None:
        raise InputError("--like needs --data", "name the folder that holds camelyon16/ and patches/")
    publish.preflight(arguments.folder)
    return dataset.write_like(
        arguments.folder, arguments.data, slides=arguments.slides, scale=arguments.scale, seed=arguments.seed
    )
