"""The table of readers, and how a file finds the one that reads it.

To add a reader: a file in this package with a function ``open_file``, and a line in the table. Everything else (folders
that are searched, messages, the whole line) follows from the line. A reader is imported when it is first tried, since
the libraries behind them take time.
"""

import importlib
from pathlib import Path
from typing import NamedTuple

from wsiflow.errors import InputError
from wsiflow.slides.readers.conversion import unknown_file
from wsiflow.slides.readers.reader import Declined, Reader
from wsiflow.system import faults


class Format(NamedTuple):
    """A reader as it stands in the table.

    Attributes:
        module: The file of this package that reads. Its ``open_file`` takes a path and returns a `Reader`, or raises
            `Declined` where another reader may read it, or an error where none can.
        suffixes: Endings, in lower case, of files that are taken for slides where a folder is searched.
        only: Endings without which the reader is not tried, also of files that are not searched for; empty for a reader
            that judges files by their content.
        folders: Endings of folders that are slides.
    """

    module: str
    suffixes: frozenset[str] = frozenset()
    only: frozenset[str] = frozenset()
    folders: frozenset[str] = frozenset()

    def may_read(self, path: Path) -> bool:
        """Return whether the reader is tried for a file, by its name."""
        if path.is_dir():
            return path.suffix.lower() in self.folders
        return not self.folders and (not self.only or path.suffix.lower() in self.only)


_VENDORS = (".svs", ".ndpi", ".mrxs", ".dcm", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi")
_TIFFS = (".tif", ".tiff", ".btf", ".tf2", ".tf8", ".qptiff")
_PNM = (".ppm", ".pgm", ".pbm")
_IMAGES = (*_PNM, ".png", ".jpg", ".jpeg", ".bmp", ".webp", ".jp2", ".j2k", ".gif", ".jxl", ".jxr", ".wdp")

FORMATS: tuple[Format, ...] = (
    Format("openslide_file", suffixes=frozenset((*_VENDORS, *_TIFFS))),
    Format("tiff"),
    Format("image", only=frozenset(_IMAGES)),
    Format("ome_zarr", folders=frozenset({".zarr"})),
)
"""All readers, in the order in which they are tried. The first that does not decline a file reads it."""

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
        if not each.may_read(path):
            continue
        try:
            opened: Reader = importlib.import_module(f"{__package__}.{each.module}").open_file(path)
        except Declined as declined:
            reason = declined if declined.cause else reason
        except OSError as error:
            raise faults.unreadable(error, "the slide", "correct its line, or remove it", path=path) from error
        else:
            return opened
    if reason.cause:
        raise InputError(reason.cause, reason.remedy, path=path)
    raise unknown_file(path)


def is_slide_folder(path: Path) -> bool:
    """Return whether a folder is a slide by its name."""
    return path.suffix.lower() in FOLDERS
