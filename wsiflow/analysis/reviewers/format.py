"""What an export format is: one record, in the format's own file, says all that ``wsiflow export`` knows of it."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import NamedTuple


class Format(NamedTuple):
    """A format in which reviewers are handed runs.

    Attributes:
        name: What a user types for it.
        about: Its line in the help.
        add_options: Adds its options: which runs, what to write, and where.
        export: Writes it, and returns sentences about what was written.
    """

    name: str
    about: str
    add_options: Callable[[ArgumentParser], None]
    export: Callable[[Namespace], list[str]]


def names(text: str) -> tuple[str, ...]:
    """Return names that are separated by commas: a type of options."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
