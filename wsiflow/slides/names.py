"""Names of slides: ids that are safe as file names, from whatever names files and spreadsheets have.

Output files are named after slides, so an id has few characters, on every file system. A name that has others, such as
letters with accents, commas or slashes, is written in these characters with a short hash of the name behind it: two
names never have one id by that, and the same name has the same id in every folder. People are shown the name itself.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import PurePath

_SLIDE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,99}")
_HASH_DIGITS = 6
_LONGEST = 100
# Letters that Unicode does not take apart into one of ASCII and an accent.
_LETTERS = str.maketrans(
    {"ß": "ss", "æ": "ae", "Æ": "AE", "ø": "o", "Ø": "O", "œ": "oe", "Œ": "OE", "ł": "l", "Ł": "L"}
)


def slide_id(name: str) -> str:
    """Return the id of the slide with a name: the name itself where it is safe, else an escaped one."""
    return name if _SLIDE_ID.fullmatch(name) else _escaped(name)


def _escaped(name: str) -> str:
    parts = unicodedata.normalize("NFKD", name.translate(_LETTERS))
    plain = "".join(letter for letter in parts if not unicodedata.combining(letter))
    safe = re.sub(r"[^A-Za-z0-9._ -]+", "_", plain)
    return _with_hash(re.sub(r"^[^A-Za-z0-9]+", "", safe), name)


def _with_hash(safe: str, name: str) -> str:
    # The same name is composed in one form by some file systems, and in another by others.
    composed = unicodedata.normalize("NFC", name)
    # Bytes of a file name that are no text are surrogates here.
    digest = hashlib.sha256(composed.encode("utf-8", "surrogateescape")).hexdigest()[:_HASH_DIGITS]
    kept = safe[: _LONGEST - _HASH_DIGITS - 1].rstrip("._ -")
    return f"{kept or 'slide'}-{digest}"


def folded(name: str) -> str:
    """Return a name in the form in which it is compared: some file systems ignore case and composition."""
    return unicodedata.normalize("NFC", name).casefold()


def distinct_names(places: Sequence[PurePath], stems: Sequence[str], taken: Collection[str] = ()) -> list[str]:
    """Return a name for each slide that no other has, ignoring case.

    A slide is named after its file. Slides whose files have one name get those of as many folders before it as they
    need to differ, then the extension, then a hash of the place.

    Args:
        places: Place of each slide, relative to the folder that all of them are in.
        stems: Name of each slide by itself.
        taken: Names that other slides have already.
    """
    names = list(stems)
    counts = Counter([*map(folded, names), *map(folded, taken)])
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        if counts[folded(name)] > 1:
            groups.setdefault(folded(name), []).append(index)
    used = {*map(folded, taken), *(folded(name) for name in names if counts[folded(name)] == 1)}
    for group in groups.values():
        for index, name in zip(group, _distinguished([(places[i], stems[i]) for i in group], used), strict=True):
            names[index] = name
            used.add(folded(name))
    return names


def _distinguished(slides: Sequence[tuple[PurePath, str]], used: Collection[str]) -> list[str]:
    """Return names for slides that have one name, none of which is used already."""
    for names in _longer_names(slides):
        keys = [folded(slide_id(name)) for name in names]
        if len(set(keys)) == len(keys) and not set(keys) & set(used):
            return names
    return [_with_hash(slide_id(stem), place.as_posix()) for place, stem in slides]


def _longer_names(slides: Sequence[tuple[PurePath, str]]) -> Iterator[list[str]]:
    deepest = max(len(place.parts) - 1 for place, _ in slides)
    for suffixed in (False, True):
        for depth in range(1 - suffixed, deepest + 1):
            yield [
                "_".join([*place.parts[:-1][-depth or len(place.parts) :], stem + place.suffix * suffixed])
                for place, stem in slides
            ]
