"""Paths in settings begin at the root from the moment they are read.

Workers, and whoever starts a run again, may be in other folders than whoever composed its settings.
"""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

SQLITE = "sqlite:///"
"""How the address of a database in a file begins."""


def _named(value: object) -> object:
    if value == "":
        raise ValueError("it is empty, it must name a file or folder")
    return value


def _absolute_store(uri: str) -> str:
    """Return the address of a store, the path of a file in it absolute and without detours."""
    path = uri.removeprefix(SQLITE)
    return uri if path in {uri, ""} else SQLITE + os.path.normpath(Path(path).absolute())


def is_same(a: Path, b: Path) -> bool:
    """Tell whether two paths are one file or folder, however they are spelled."""
    try:
        return a.samefile(b)
    except OSError:  # what cannot be reached is not what lies here
        return False


NamedPath = Annotated[Path, BeforeValidator(_named)]
AbsolutePath = Annotated[NamedPath, AfterValidator(Path.absolute)]
StoreAddress = Annotated[str, AfterValidator(_absolute_store)]
