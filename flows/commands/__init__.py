"""The commands of ``wsiflow``: a file for each, and a line in `COMMANDS`.

The file of a command has two functions, and imports what they need. It is imported only when somebody types the
command, so that no command waits for the modules of another.

    add_options(parser)     adds the arguments and options of the command
    main(arguments) -> int  runs the command, and returns its exit code
"""

import importlib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, cast


class Module(Protocol):
    """The functions that the file of a command defines."""

    def add_options(self, parser: ArgumentParser) -> None:
        """Add the arguments and options of the command."""
        ...

    def main(self, arguments: Namespace) -> int:
        """Run the command, and return its exit code."""
        ...


class Command(NamedTuple):
    """A command of the command line.

    Attributes:
        name: What a user types. The file of the command has the same name, with ``_`` for ``-``.
        about: Its line in the help.
        parse: Function that reads the words behind the name.
    """

    name: str
    about: str
    parse: Callable[[ArgumentParser, Sequence[str]], Namespace] = ArgumentParser.parse_args

    def load(self) -> Module:
        """Import the command's file."""
        return cast("Module", importlib.import_module(f"{__name__}.{self.name.replace('-', '_')}"))


def as_typed(_parser: ArgumentParser, words: Sequence[str]) -> Namespace:
    """Return the words as they were typed, for a command that has a parser and a help of its own."""
    return Namespace(words=words)


#: The commands by name, in the order of the help.
COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command("run", "the whole line: wsiflow run [overrides] [-m]; wsiflow run --help shows every key", as_typed),
        Command("evaluate", "score existing detections: FROC (official and strict) and slide AUC"),
        Command("synth", "write a synthetic data set with known lesions"),
        Command("status", "what a run has done, from the disk alone"),
        Command("explain", "why a task of a run is done, or is not, and every attempt at it"),
        Command(
            "plan",
            "what a run will take: wsiflow plan [overrides] [--workers 1,16] [--calibrate]",
            ArgumentParser.parse_intermixed_args,  # overrides stand before and behind options
        ),
        Command("retry", "start a run again from its folder alone: what is missing is done, and nothing else"),
        Command("verify", "compare every published file of a run with its receipt"),
        Command("task", "predict one array task of a plan by hand"),
        Command("element", "one element of an array job: what its job script calls"),
        Command("cancel", "cancel a run's array jobs and its driver, from its folder alone"),
        Command("model", "add a trained network, check its card on labelled patches, list models"),
        Command("completion", "a script that completes commands, keys, values and files in bash or zsh"),
        Command("doctor", "machine, versions, and what a run would miss"),
        Command("features", "thirty features of every slide of some runs, from their heatmaps"),
        Command("forest", "train a random forest on features, or score the slides of a run with it"),
        Command("compare", "what settings score and cost, with intervals, and which are worth their cost"),
        Command("compare-maps", "how far the heatmaps of two runs lie apart, and what that changes"),
        Command("export", "a run for reviewers: iMRMC text, case list, calibration, subgroups, repeat.json"),
        Command("subsample", "what a run would score at coarser strides, from its own heatmaps"),
    )
}
