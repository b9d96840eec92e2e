"""Quote texts in overrides, and explain in one line why overrides are refused.

Hydra's own advice is for applications that accept any key; here the next check would refuse a key that was added on
that advice. The messages of this module name the key or the choice that was probably meant.
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
# Keys of earlier versions, each with its present name, and with its present values by the former ones.
_RENAMED = {"dense.beyond": ("dense.on_excess", FORMER_EXCESS)}
# Choices of Hydra's own groups that need a package of an extra.
_EXTRAS = {
    "hydra/launcher=joblib": "hpc",
    "hydra/launcher=submitit_local": "hpc",
    "hydra/launcher=submitit_slurm": "hpc",
    "hydra/sweeper=optuna": "optuna",
}
_BRACKETS = {"[": "]", "{": "}", "(": ")"}


def quoted(text: str) -> str:
    """Return a text quoted as the value of an override, whatever characters it has."""
    return QuotedString(text, Quote.single).with_quotes()


def is_refusal(error: Exception) -> bool:
    """Tell whether Hydra refused overrides; the error for a choice that is no text is known by its message alone."""
    return isinstance(error, HydraException | OmegaConfBaseException) or _NO_TEXT in str(error)


def explain_refusal(error: Exception, overrides: Sequence[str]) -> InputError:
    """Return an error that says what is wrong with overrides that Hydra refused, and what to write instead."""
    text = str(error).strip()
    cause, remedy = (
        _malformed(overrides)
        or _of_other_slides(error)
        or _unknown(text)
        or _wrong_value(text, overrides)
        or (_without_advice(text), _ALL)
    )
    return InputError(cause, remedy, stage="configuration")


def _without_advice(text: str) -> str:
    return _ADVICE.sub("", text) or text


# --- overrides that cannot be parsed


def _malformed(overrides: Sequence[str]) -> tuple[str, str] | None:
    """Return cause and remedy of the first override that cannot be parsed."""
    parser = OverridesParser.create()
    for text in overrides:
        try:
            parser.parse_overrides([text])
        except HydraException:
            return _explain_form(text)
        if text.startswith("="):
            return f"{text!r} has no key before its '='", "write key=value, such as inference.stride=32"
    return None


def _explain_form(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    key = name.strip().lstrip("+~")
    if not equals:
        example = f"{key}=VALUE" if key in config.known_keys() else "key=value, such as inference.stride=32"
        return f"{text!r} has no '='", f"write {example}; a value with blanks is quoted: \"name='a b'\""
    if not _KEY.fullmatch(name.lstrip("+~")):
        return f"{name!r} is no key", f"write {key}={value.strip()}" if _KEY.fullmatch(key) else _ALL
    unmatched = _unmatched(value)
    if unmatched and value.startswith(unmatched) and unmatched in "[{":
        form = "{a: 1, b: 2}" if unmatched == "{" else "[a,b]"
        return f"{text!r} has an unmatched {unmatched!r}", f"close it, such as '{key}={form}', or quote it"
    bare = value.strip().strip("'\"") if unmatched in {"'", '"'} else value
    reason = f"an unmatched {unmatched}" if unmatched else "a value that needs quotes"
    return f"{text!r} has {reason}", f'write "{key}={quoted(bare)}"'


def _unmatched(value: str) -> str:
    """Return the bracket or quote of a value whose other half is missing, or an empty text."""
    open_brackets: list[str] = []
    quote = ""
    for character in re.sub(r"\\.", "", value):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in _BRACKETS:
            open_brackets.append(character)
        elif character in _BRACKETS.values():
            if not open_brackets or _BRACKETS[open_brackets[-1]] != character:
                return next(opening for opening, closing in _BRACKETS.items() if closing == character)
            open_brackets.pop()
    return quote or (open_brackets[-1] if open_brackets else "")


# --- keys and choices that do not exist


def _of_other_slides(error: Exception) -> tuple[str, str] | None:
    """Return cause and remedy where a data set of this kind lacks a key that other kinds have."""
    origin = error.__cause__
    if not isinstance(origin, OmegaConfBaseException) or not isinstance(origin.parent_node, DictConfig):
        return None
    section, _, name = str(origin.full_key).partition(".")
    return misplaced(name, str(origin.parent_node.get("kind"))) if section == "dataset" else None


def _unknown(text: str) -> tuple[str, str] | None:
    """Return cause and remedy where a key or choice does not exist, or exists already."""
    if match := re.search(r"Could not find '([^']+)/([^'/]*)'", text):
        listed = re.search(r"Available options in '[^']*':((?:\n\t\S+)+)", text)
        return _no_choice(match[1], match[2], listed[1].split() if listed else choices(match[1]))
    if match := re.search(r"Multiple values for ([^.\s]+)\.", text):
        return f"{match[1]} has a choice already", f"write {match[1]}=NAME: {', '.join(choices(match[1]))}"
    if match := re.search(r"An item is already at '([^']+)'", text):
        return f"{match[1]} has a value already", f"write {match[1]}=VALUE to change it"
    if match := re.search(
        r"Could not (?:override|append to config\. No match[^']*|delete from config\.)\s*'([^']+)'", text
    ):
        return _no_key(match[1])
    return None


def _no_choice(group: str, name: str, known: Sequence[str]) -> tuple[str, str]:
    extra = _EXTRAS.get(f"{group}={name}")
    if extra:
        return f"{group}={name} is not installed", f"pip install 'wsiflow[{extra}]'"
    near = difflib.get_close_matches(name, known, n=1)
    choices_are = f"did you mean {group}={near[0]}? choices" if near else "choices"
    return f"Could not find '{group}/{name}', there is no such choice", f"{choices_are}: {', '.join(known)}"


def _no_key(key: str) -> tuple[str, str]:
    if key in _RENAMED:
        new_key, words = _RENAMED[key]
        overrides = ", ".join(f"{new_key}={word} for {former}" for word, former in words.items())
        return f"{key} was renamed {new_key}", f"write {overrides}"
    if key in config.known_keys() or any(one.startswith(f"{key}.") for one in config.known_keys()):
        section = key.partition(".")[0]
        return f"there is no key {key} with this {section}", f"choose another: {section}={'|'.join(choices(section))}"
    near = config.nearest(key)
    return f"there is no key {key}", f"did you mean {near}?" if near else _ALL


def choice_groups() -> list[str]:
    """Return the groups of ``conf/``."""
    return sorted(one.name for one in resources.files("wsiflow.conf").iterdir() if choices(one.name))


def choices(group: str) -> list[str]:
    """Return the choices of a group of ``conf/``; an unknown group has none."""
    folder = resources.files("wsiflow.conf").joinpath(*group.split("/"))
    if not folder.is_dir():
        return []
    return sorted(one.name.removesuffix(".yaml") for one in folder.iterdir() if one.name.endswith(".yaml"))


def _wrong_value(text: str, overrides: Sequence[str]) -> tuple[str, str] | None:
    """Return cause and remedy where a value has a form that its key does not accept."""
    if match := re.search(r"Ambiguous value for argument '([^=]+)=(.*?)'\n", text):
        key, value = match.groups()
        ways = f"quote it: \"{key}={quoted(value)}\"; list them: '{key}=[{value}]'; or add -m for a run of each"
        return f"{key}={value} names several values", ways
    if _NO_TEXT in text:
        for override in overrides:
            group, _, value = override.partition("=")
            if choices(group) and value not in choices(group):
                return _no_choice(group, value, choices(group))
    return None
