"""Every key of a run with its value and what it is, as ``wsiflow run --help`` shows them."""

import json
import textwrap
from typing import Any

from omegaconf import DictConfig, OmegaConf

from wsiflow.run import config

_ABSENT = object()


def listed(composed: DictConfig) -> str:
    """Return every key that a configuration has, as an override above its description, below that of its section."""
    values: Any = OmegaConf.to_container(composed, resolve=False)  # an interpolation is shown as it is written
    return "\n".join(
        _entry(key, value, about)
        for key, about in config.descriptions().items()
        if (value := _value(values, key)) is not _ABSENT
    )


def _value(values: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return _ABSENT  # the keys of a section depend on what is chosen for it
        values = values[part]
    return values


def _entry(key: str, value: Any, about: str) -> str:
    if key not in config.known_keys():
        return f"\n# {key}: {about}\n"
    shown = value if isinstance(value, str) else json.dumps(value)
    return f"{key}={shown}\n{textwrap.indent(textwrap.fill(about, 100), '    ')}"
