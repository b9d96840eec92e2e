"""Paths as people write them in a manifest: of this machine, of Windows, of a home folder, or addresses.

Input: a text. Output: a path of this machine, or a message that says what was written instead of one.
"""

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/|(https?|s3|gs|ftp|az):", re.IGNORECASE)
_DRIVE = re.compile(r"(?P<letter>[A-Za-z]):[\\/]")
_SHARE = re.compile(r"\\\\[^\\]+\\")
_VARIABLE = re.compile(r"\$\{?\w+\}?|%\w+%")
_QUOTES = "'\""


def located(text: str, folder: Path) -> Path:
    """Return the path that a text names; where there is such a file it is taken as it is, whatever its name looks like.

    Args:
        text: What was written.
        folder: Folder from which relative paths start.

    Raises:
        ValueError: The text names nothing on this machine by its form.
    """
    literal = folder / text
    if os.path.lexists(literal):
        return literal
    if len(text) > 1 and text[0] == text[-1] and text[0] in _QUOTES:
        return located(text[1:-1], folder)
    if text.lower().startswith("file:/"):
        return _of_address(text)
    _refuse_other_machines(text)
    if text.startswith("~"):
        return _below_home(text)
    forward = folder / text.replace("\\", "/")
    return forward if "\\" in text and os.path.lexists(forward) else literal


def _of_address(text: str) -> Path:
    """Return the path of an address that begins with ``file:``.

    Raises:
        ValueError: It names another machine, or is none.
    """
    try:
        machine, path = urlsplit(text)[1:3]
    except ValueError as error:
        raise ValueError(f"{text!r} is no address of a file ({error}); write its path") from error
    if machine not in {"", "localhost"}:
        raise ValueError(f"{text!r} is a file of the machine {machine!r}; write the path that it has on this one")
    return Path(unquote(path))


def _refuse_other_machines(text: str) -> None:
    """Refuse what cannot be the path of a file on this machine.

    Raises:
        ValueError: It is an address, a path of Windows, or has variables, which are not replaced.
    """
    drive = _DRIVE.match(text)
    if drive or _SHARE.match(text):
        here = f"/mnt/{text[0].lower()}/{text[3:]}".replace("\\", "/")
        hint = f", perhaps {here}" if drive and os.path.lexists(here) else ""
        raise ValueError(f"{text!r} is a path of Windows; write the path that the file has on this machine{hint}")
    if _ADDRESS.match(text):
        raise ValueError(f"{text!r} is an address; copy the file to this machine and write its path")
    if _VARIABLE.match(text):
        raise ValueError(f"{text!r} begins with a variable, which is not replaced here; write the whole path")


def _below_home(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        user = text.partition("/")[0]
        raise ValueError(f"{text!r}: there is no home folder {user} on this machine; write the whole path") from error
