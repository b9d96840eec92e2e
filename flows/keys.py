"""List every key of a run with its value and its meaning, as ``wsiflow run --help`` shows them."""

import json
import textwrap
from typing import Any

from omegaconf import DictConfig, OmegaConf

from wsiflow.run import config

_ABSENT = object()


def list_keys(composed: DictConfig) -> str:
    """Return a text of every key that a configuration has: an override with a description, section by section."""
    values: Any = OmegaConf.to_container(composed, resolve=False)  # an interpolation is shown as it is written
    return "\n".join(
        _entry(key, value, about)
        for key, about in config.descriptions().items()
        if (value := _value(values, key)) is not _ABSENT
    )


def _value(values: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return _ABSENT  # a section has other keys where another choice is made for it
        values = values[part]
    return values


def _entry(key: str, value: Any, about: str) -> str:
    if key not in config.known_keys():
        return f"\n# {key}: {about}\n"
    shown = value if isinstance(value, str) else json.dumps(value)
    return f"{key}={shown}\n{textwrap.indent(textwrap.fill(about, 100), '    ')}"
