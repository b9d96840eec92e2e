"""Types for paths in settings: relative paths become absolute as soon as the settings are validated.

Workers, and users who restart a run, may work in other folders than the user who composed its settings.
"""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from wsiflow.system import faults

SQLITE = "sqlite:///"
"""The prefix of the URI of a SQLite database file."""


def _named(value: object) -> object:
    if value == "":
        raise ValueError("it is empty, but it must name a file or folder")
    return value


def _of_text(path: Path) -> Path:
    """Refuse a path with bytes that are no text: it could not be written into a receipt."""
    if faults.as_text(str(path)) != str(path):
        raise ValueError(f"the name is no UTF-8 text ({faults.as_text(str(path))}), rename it")
    return path


def _below_home(path: Path) -> Path:
    """Return a path that begins with a home folder, such as ``~/slides``, in full; shells do so in some places only."""
    if not path.parts or not path.parts[0].startswith("~") or os.path.lexists(path):
        return path
    try:
        return path.expanduser()
    except RuntimeError:  # there is no such user
        return path


def _absolute_store(uri: str) -> str:
    """Return the URI of a tracking store; the path of a SQLite file is made absolute and normalised."""
    path = uri.removeprefix(SQLITE)
    return uri if path in {uri, ""} else SQLITE + os.path.normpath(Path(path).absolute())


def is_same(a: Path, b: Path) -> bool:
    """Return whether two paths lead to the same file or folder, however they are spelled."""
    try:
        return a.samefile(b)
    except OSError:  # a path that cannot be reached is not the same as one that can
        return False


NamedPath = Annotated[Path, BeforeValidator(_named), AfterValidator(_of_text), AfterValidator(_below_home)]
AbsolutePath = Annotated[NamedPath, AfterValidator(Path.absolute)]
StoreAddress = Annotated[str, AfterValidator(_absolute_store)]
