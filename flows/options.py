"""Types of options: functions that turn the text of an option into its value, or refuse it."""

from argparse import ArgumentTypeError


def natural(text: str) -> int:
    """Return a whole number from 0."""
    return _at_least(0, text)


def positive(text: str) -> int:
    """Return a whole number from 1."""
    return _at_least(1, text)


def positives(text: str) -> tuple[int, ...]:
    """Return whole numbers from 1 that are separated by commas."""
    return tuple(positive(part) for part in text.split(","))


def group(text: str) -> tuple[str, str]:
    """Return the name of a group of annotations and what it encloses, from ``name=meaning``."""
    name, separator, meaning = text.rpartition("=")
    if not separator or not meaning:
        raise ArgumentTypeError(f"{text!r} is not NAME=MEANING, as in Necrosis=ignore")
    return name, meaning


def scale(text: str) -> float:
    """Return a number above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"{value} is not above 0 and at most 1")
    return value


def shares(text: str) -> tuple[float, ...]:
    """Return a share or two, the least and the most, that are separated by a comma."""
    found = tuple(scale(part) for part in text.split(","))
    if len(found) > len(("least", "most")):
        raise ArgumentTypeError(f"{text!r} is not a share, or the least and the most one, as in 0.05,0.2")
    return found


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise ArgumentTypeError(f"{value} is below {least}")
    return value
