"""The table of readers, and how a file finds the one that reads it."""

from pathlib import Path

from wsiflow.errors import InputError
from wsiflow.slides.readers import image, openslide_file, tiff
from wsiflow.slides.readers.conversion import unknown_file
from wsiflow.slides.readers.reader import Declined, Format, Reader

FORMATS: tuple[Format, ...] = (openslide_file.FORMAT, tiff.FORMAT, image.FORMAT)
"""All readers, in the order in which they are tried. What reads a file first, reads it."""

SUFFIXES = frozenset[str]().union(*(each.suffixes for each in FORMATS))
"""Endings of the files that are taken for slides where a folder is searched."""

FOLDERS = frozenset[str]().union(*(each.folders for each in FORMATS))
"""Endings of the folders that are slides."""


def open_file(path: Path) -> Reader:
    """Open a file with the first reader that reads it.

    Raises:
        InputError: None of them does; the reason is that of the last reader that knows the format.
        EnvironmentFault: The system refuses to read the file.
    """
    reason = Declined()
    for each in FORMATS:
        try:
            return each.open(path)
        except Declined as declined:
            reason = declined if declined.cause else reason
    if reason.cause:
        raise InputError(reason.cause, reason.remedy, path=path)
    raise unknown_file(path)
