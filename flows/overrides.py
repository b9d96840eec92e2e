"""Overrides as users type them: how a text is quoted in one, and what is said of those that cannot be used.

Hydra's own advice is for applications that take any key: a key that is added is refused by the next check. What is said
here names the key or the choice that was probably meant, in one line.
"""

import difflib
import re
from collections.abc import Sequence
from importlib import resources

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from wsiflow.errors import InputError
from wsiflow.model.choice import FORMER_EXCESS
from wsiflow.run import config
from wsiflow.slides.kinds import misplaced

_ALL = "wsiflow run --help shows every key"
_KEY = re.compile(r"[A-Za-z0-9_./@:-]+")
_ADVICE = re.compile(
    r"\n?\s*(To append to your config use|See https|Set the environment variable|Either remove).*", re.DOTALL
)
_NO_TEXT = "Config group override must be a string or a list"
# Keys that earlier versions had, each with its name of now, and with the words of now by the former ones.
_RENAMED = {"dense.beyond": ("dense.on_excess", FORMER_EXCESS)}
_BRACKETS = {"[": "]", "{": "}", "(": ")"}


def quoted(text: str) -> str:
    """Return a text as the value of an override, whatever characters it has."""
    return QuotedString(text, Quote.single).with_quotes()


def is_refusal(error: Exception) -> bool:
    """Tell whether Hydra refused overrides; of a choice that is no text it says so as Python does of any value."""
    return isinstance(error, HydraException | OmegaConfBaseException) or _NO_TEXT in str(error)


def refused(error: Exception, overrides: Sequence[str]) -> InputError:
    """Return what is wrong with the overrides that Hydra refused, and what to write instead."""
    text = str(error).strip()
    cause, remedy = (
        _unread(overrides)
        or _of_other_slides(error)
        or _unknown(text)
        or _meant_otherwise(text, overrides)
        or (_short(text), _ALL)
    )
    return InputError(cause, remedy, stage="configuration")


def _short(text: str) -> str:
    return _ADVICE.sub("", text) or text


# --- what cannot be read


def _unread(overrides: Sequence[str]) -> tuple[str, str] | None:
    """Return cause and remedy of the first override that has not the form of one."""
    parser = OverridesParser.create()
    for text in overrides:
        try:
            parser.parse_overrides([text])
        except HydraException:
            return _form(text)
        if text.startswith("="):
            return f"{text!r} has no key before its '='", "write key=value, such as inference.stride=32"
    return None


def _form(text: str) -> tuple[str, str]:
    given, equals, value = text.partition("=")
    key = given.strip().lstrip("+~")
    if not equals:
        example = f"{key}=VALUE" if key in config.known_keys() else "key=value, such as inference.stride=32"
        return f"{text!r} has no '='", f"write {example}; a value with blanks is quoted: \"name='a b'\""
    if not _KEY.fullmatch(given.lstrip("+~")):
        return f"{given!r} is no key", f"write {key}={value.strip()}" if _KEY.fullmatch(key) else _ALL
    open_one = _open(value)
    if open_one and value.startswith(open_one) and open_one in "[{":
        form = "{a: 1, b: 2}" if open_one == "{" else "[a,b]"
        return f"{text!r} has {open_one!r} without its other half", f"close it, such as '{key}={form}', or quote it"
    bare = value.strip().strip("'\"") if open_one in {"'", '"'} else value
    why = f"{open_one} without its other half" if open_one else "a value that needs quotes"
    return f"{text!r} has {why}", f'write "{key}={quoted(bare)}"'


def _open(value: str) -> str:
    """Return the bracket or quote of a value that has no other half, or an empty text."""
    waiting: list[str] = []
    quote = ""
    for one in re.sub(r"\\.", "", value):
        if quote:
            quote = "" if one == quote else quote
        elif one in "'\"":
            quote = one
        elif one in _BRACKETS:
            waiting.append(one)
        elif one in _BRACKETS.values():
            if not waiting or _BRACKETS[waiting[-1]] != one:
                return next(opening for opening, closing in _BRACKETS.items() if closing == one)
            waiting.pop()
    return quote or (waiting[-1] if waiting else "")


# --- what is not there


def _of_other_slides(error: Exception) -> tuple[str, str] | None:
    """Return cause and remedy where Hydra found no such key of these slides, and others have it."""
    origin = error.__cause__
    if not isinstance(origin, OmegaConfBaseException) or not isinstance(origin.parent_node, DictConfig):
        return None
    section, _, name = str(origin.full_key).partition(".")
    return misplaced(name, str(origin.parent_node.get("kind"))) if section == "dataset" else None


def _unknown(text: str) -> tuple[str, str] | None:
    """Return cause and remedy where Hydra found no such key or choice."""
    if found := re.search(r"Could not find '([^']+)/([^'/]*)'", text):
        listed = re.search(r"Available options in '[^']*':((?:\n\t\S+)+)", text)
        return _no_choice(found[1], found[2], listed[1].split() if listed else choices(found[1]))
    if found := re.search(r"Multiple values for ([^.\s]+)\.", text):
        return f"{found[1]} is a choice that is made already", f"write {found[1]}=NAME: {', '.join(choices(found[1]))}"
    if found := re.search(r"An item is already at '([^']+)'", text):
        return f"{found[1]} is a key that has a value", f"write {found[1]}=VALUE to change it"
    if found := re.search(
        r"Could not (?:override|append to config\. No match[^']*|delete from config\.)\s*'([^']+)'", text
    ):
        return _no_key(found[1])
    return None


def _no_choice(group: str, name: str, known: Sequence[str]) -> tuple[str, str]:
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"did you mean {group}={near[0]}? choices" if near else "choices"
    return f"Could not find '{group}/{name}', there is no such choice", f"{meant}: {', '.join(known)}"


def _no_key(key: str) -> tuple[str, str]:
    if key in _RENAMED:
        now, words = _RENAMED[key]
        meant = ", ".join(f"{now}={word} for {former}" for word, former in words.items())
        return f"{key} was renamed {now}", f"write {meant}"
    if key in config.known_keys() or any(one.startswith(f"{key}.") for one in config.known_keys()):
        section = key.partition(".")[0]
        return f"there is no key {key} with this {section}", f"choose another: {section}={'|'.join(choices(section))}"
    near = config.nearest(key)
    return f"there is no key {key}", f"did you mean {near}?" if near else _ALL


def choices(group: str) -> list[str]:
    """Return the choices of a group of ``conf/``, none where there is no such group."""
    folder = resources.files("wsiflow.conf").joinpath(*group.split("/"))
    if not folder.is_dir():
        return []
    return sorted(one.name.removesuffix(".yaml") for one in folder.iterdir() if one.name.endswith(".yaml"))


def _meant_otherwise(text: str, overrides: Sequence[str]) -> tuple[str, str] | None:
    """Return cause and remedy of values of another kind than the key takes."""
    if found := re.search(r"Ambiguous value for argument '([^=]+)=(.*?)'\n", text):
        key, value = found.groups()
        ways = f"quote it: \"{key}={quoted(value)}\"; list them: '{key}=[{value}]'; or add -m for a run of each"
        return f"{key}={value} names several values", ways
    if _NO_TEXT in text:
        for one in overrides:
            group, _, value = one.partition("=")
            if choices(group) and value not in choices(group):
                return _no_choice(group, value, choices(group))
    return None
