"""The command line: it reads which command was typed, and runs it. The commands are in `flows.commands`."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from wsiflow import __version__

from . import logs
from .commands import COMMANDS, Module
from .terminal import bounded


def main(words: Sequence[str]) -> int:
    """Run the command that the words of the command line name, and return its exit code."""
    return bounded(lambda: _call(words))


def _call(words: Sequence[str]) -> int:
    command, arguments = read(words)
    return command.main(arguments)


def read(words: Sequence[str]) -> tuple[Module, Namespace]:
    """Return the command that was typed, and its parsed arguments; no other command is imported."""
    first = _parser()
    name = first.parse_known_args(words)[0].name
    if name != words[0]:
        first.error(f"unrecognized arguments: {words[0]}")
    command = COMMANDS[name]
    module = command.load()
    parser = ArgumentParser(prog=f"wsiflow {name}", description=command.about, epilog=logs.OPTIONS)
    module.add_options(parser)
    return module, command.parse(parser, words[1:])


def _parser() -> ArgumentParser:
    """Return a parser that knows the names of the commands and nothing of their arguments."""
    parser = ArgumentParser(prog="wsiflow", description="Test AI on whole-slide images.", epilog=logs.OPTIONS)
    parser.add_argument("--version", action="version", version=f"wsiflow {__version__}")
    names = parser.add_subparsers(required=True, metavar="COMMAND", dest="name")
    for command in COMMANDS.values():
        names.add_parser(command.name, help=command.about, add_help=False)
    return parser
