"""Read XML files of annotations element by element, with limits and without entities."""

import math
from collections.abc import Generator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError  # what the hardened parser raises too

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import iterparse

from wsiflow.errors import InputError
from wsiflow.system import faults

MAX_BYTES = 256 * 2**20
"""Maximum size of a file of annotations; the largest of CAMELYON16 have a few MB."""

MAX_POINTS = 4_000_000
"""Maximum number of points of a file."""


def events(path: Path, remedy: str) -> Generator[tuple[str, Any]]:
    """Yield every ``start`` and ``end`` of an element with the element.

    Args:
        path: The file.
        remedy: The remedy where it cannot be parsed.

    Raises:
        InputError: The file is missing, too large or not well-formed XML.
        EnvironmentFault: The system refuses to read the file.
    """
    try:
        require_size(path)
        with path.open("rb") as file:
            yield from iterparse(file, ("start", "end"), forbid_dtd=True)
    except DefusedXmlException as error:
        raise InputError(f"the XML has a document type or entities ({error})", remedy, path=path) from error
    except (ParseError, LookupError, ValueError) as error:  # the last two for encodings that the parser does not know
        raise InputError(f"the annotation is not well-formed XML ({error})", remedy, path=path) from error
    except OSError as error:
        raise faults.unreadable(error, "the annotation", "correct the path", path=path) from error


def require_size(path: Path) -> None:
    """Refuse a file of annotations that is too large to be one.

    Raises:
        InputError: It is.
        OSError: The system refuses to tell.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        cause = f"the annotation has {size} bytes, at most {MAX_BYTES} are allowed"
        raise InputError(cause, "simplify the outlines", path=path)


def require_points(count: int, path: Path) -> None:
    """Refuse a file with more points than `MAX_POINTS`.

    Raises:
        InputError: It has.
    """
    if count > MAX_POINTS:
        raise InputError(f"the outlines have more than {MAX_POINTS} points", "simplify them", path=path)


def point(x: str | None, y: str | None, path: Path) -> tuple[float, float]:
    """Return the x, y of a point from their texts.

    Raises:
        InputError: They are not finite numbers.
    """
    try:
        pair = float(x or ""), float(y or "")
    except ValueError as error:
        cause = f"the coordinate X={x!r} Y={y!r} does not have numbers X and Y"
        raise InputError(cause, "write X and Y as in 12.5", path=path) from error
    if not all(map(math.isfinite, pair)):
        raise InputError(f"the coordinate X={x} Y={y} is not finite", "write finite numbers", path=path)
    return pair
