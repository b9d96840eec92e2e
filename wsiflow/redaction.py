"""What looks like a secret, taken out of settings and sentences before anybody else can see them.

Nothing here knows which settings there are: names tell (``password``, ``api_key``, ``--token``), and the places where
secrets are put into longer texts: the user of an address, ``name=value`` of a query, a connection string or an option,
and the word after ``Bearer``. Too much is taken rather than too little.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

REDACTED = "[redacted]"

_WORDS = (
    r"passw|passphrase|pwd|secret|token|credential|bearer|cookie|signature|authorization"
    r"|(?<![a-z])auth(?![a-z])|auth[_-]?string|(?:api|access|private|account|shared|encryption|ssh|deploy)[_-]?key"
)
_KEY = re.compile(_WORDS, re.IGNORECASE)
# Up to the last @ before the path, since passwords may hold one; one with a slash is no port and a path.
_USER = re.compile(r"(?<=://)(?:[^\s/?#'\"]*|[^\s:/@'\"]+:(?!\d+(?:[/?#]|$))[^\s@'\"]*)@")
# A value goes on behind a comma or semicolon unless another name follows there.
_TEXT = r"(?P<value>\"[^\"]*\"|'[^']*'|(?:[^\s&;,\"'}]|[;,](?![\w.-]+=|[\s\"']|$))+)"
_SAID = re.compile(rf"(?P<name>[\w.-]*(?:{_WORDS})[\w.-]*(?:=|[\"']\s?[:,]\s?)){_TEXT}", re.IGNORECASE)
_HEADER = re.compile(rf"(?P<name>\b(?:authorization|cookie|x-api-key|passw\w*|\w*secret\w*):\s*){_TEXT}", re.IGNORECASE)
_QUERY = re.compile(r"(?P<name>[?&](?:sig|key|auth|code|sas|pw|pass)=)(?P<value>[^\s&\"']+)", re.IGNORECASE)
_SCHEME = re.compile(r"\b(?P<name>(?:Bearer|Basic)\s+)(?P<value>[\w.~+/=-]{8,})")
_OPTION = re.compile(rf"--?[\w-]*(?:{_WORDS})[\w-]*", re.IGNORECASE)


def redacted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without secrets: `REDACTED` stands for values of telling names, and within texts.

    A value that cannot be a secret stays: none, true, false, nothing.

    Args:
        values: Settings by name, nested or with dotted names.
    """
    return {key: _value(value, told=_KEY.search(str(key)) is not None) for key, value in values.items()}


def redacted_list(values: Iterable[Any]) -> list[Any]:
    """Return arguments without secrets, those behind an option such as ``--password`` included."""
    found: list[Any] = []
    after_option = False
    for value in values:
        found.append(_value(value, told=after_option and not str(value).startswith("-")))
        after_option = isinstance(value, str) and _OPTION.fullmatch(value) is not None
    return found


def without_secrets(text: str) -> str:
    """Return a text with `REDACTED` in the place of what looks like a secret."""
    text = _USER.sub(f"{REDACTED}@", text)
    for pattern in (_SCHEME, _SAID, _HEADER, _QUERY):
        text = pattern.sub(rf"\g<name>{REDACTED}", text)
    return text


def holds_redacted(value: Any) -> bool:
    """Tell whether something was taken out of a setting, at any depth."""
    if isinstance(value, Mapping):
        return any(holds_redacted(one) for one in value.values())
    if isinstance(value, list | tuple):
        return any(holds_redacted(one) for one in value)
    return isinstance(value, str) and REDACTED in value


def _value(value: Any, *, told: bool) -> Any:
    if isinstance(value, Mapping):
        return {key: _value(one, told=True) for key, one in value.items()} if told else redacted(value)
    if isinstance(value, list | tuple):
        return [_value(one, told=True) for one in value] if told else redacted_list(value)
    if told:
        return REDACTED if _is_any(value) else value
    return without_secrets(value) if isinstance(value, str) else value


def _is_any(value: Any) -> bool:
    return value is not None and not isinstance(value, bool) and value != ""
