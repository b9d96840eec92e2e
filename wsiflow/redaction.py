"""Redaction of secrets from settings and messages before they are stored, printed or sent.

This module does not know the settings. It recognises secrets by the names of settings and options (``password``,
``api_key``, ``--token``) and by their place in longer texts: the user part of a URL, ``name=value`` in a query, a
connection string or an option, and the word after ``Bearer``. In doubt it redacts.
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
# The user part reaches to the last @ before the path, since a password may contain one. A password may also contain a
# slash: then what follows the colon is neither a port alone nor a port and a path.
_USER = re.compile(r"(?<=://)(?:[^\s/?#'\"]*|[^\s:/@'\"]+:(?!\d+(?:[/?#]|$))[^\s@'\"]*)@")
# A value continues after a comma or semicolon unless another name follows there.
_TEXT = r"(?P<value>\"[^\"]*\"|'[^']*'|(?:[^\s&;,\"'}]|[;,](?![\w.-]+=|[\s\"']|$))+)"
# A name is searched from its first character alone: from each of them, a text of 9,000 letters would take seconds.
_NAME = rf"(?<![\w.-])[\w.-]*(?:{_WORDS})[\w.-]*"
_ASSIGNMENT = re.compile(rf"(?P<name>{_NAME}(?:=|[\"']\s?[:,]\s?)){_TEXT}", re.IGNORECASE)
_HEADER = re.compile(rf"(?P<name>\b(?:authorization|cookie|x-api-key|passw\w*|\w*secret\w*):\s*){_TEXT}", re.IGNORECASE)
_QUERY = re.compile(r"(?P<name>[?&](?:sig|key|auth|code|sas|pw|pass)=)(?P<value>[^\s&\"']+)", re.IGNORECASE)
_SCHEME = re.compile(r"\b(?P<name>(?:Bearer|Basic)\s+)(?P<value>[\w.~+/=-]{8,})")
_OPTION = re.compile(rf"--?[\w-]*(?:{_WORDS})[\w-]*", re.IGNORECASE)


def redacted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with their secrets replaced by `REDACTED`.

    A value is replaced as a whole where its name is that of a secret; elsewhere only the secrets inside its text are.
    None, booleans and empty texts are kept, since they hold no secret.

    Args:
        values: Settings by name. Names may be dotted, and values may be nested.
    """
    return {key: _value(value, is_secret=_KEY.search(str(key)) is not None) for key, value in values.items()}


def redacted_list(values: Iterable[Any]) -> list[Any]:
    """Return command-line arguments without secrets; the argument after ``--password`` and its like is one."""
    arguments: list[Any] = []
    after_option = False
    for value in values:
        arguments.append(_value(value, is_secret=after_option and not str(value).startswith("-")))
        after_option = isinstance(value, str) and _OPTION.fullmatch(value) is not None
    return arguments


def without_secrets(text: str) -> str:
    """Return the text with `REDACTED` in place of everything that looks like a secret."""
    text = _USER.sub(f"{REDACTED}@", text)
    for pattern in (_SCHEME, _ASSIGNMENT, _HEADER, _QUERY):
        text = pattern.sub(rf"\g<name>{REDACTED}", text)
    return text


def holds_redacted(value: Any) -> bool:
    """Return whether a secret was redacted from the setting, at any depth."""
    if isinstance(value, Mapping):
        return any(holds_redacted(one) for one in value.values())
    if isinstance(value, list | tuple):
        return any(holds_redacted(one) for one in value)
    return isinstance(value, str) and REDACTED in value


def _value(value: Any, *, is_secret: bool) -> Any:
    if isinstance(value, Mapping):
        return {key: _value(one, is_secret=True) for key, one in value.items()} if is_secret else redacted(value)
    if isinstance(value, list | tuple):
        return [_value(one, is_secret=True) for one in value] if is_secret else redacted_list(value)
    if is_secret:
        return REDACTED if _can_be_secret(value) else value
    return without_secrets(value) if isinstance(value, str) else value


def _can_be_secret(value: Any) -> bool:
    return value is not None and not isinstance(value, bool) and value != ""
