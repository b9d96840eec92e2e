"""What the folder of a run is called that is given none: the same for the same command, another for other results."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from wsiflow.slides.kinds import FLAT

# Sections that decide what a run is of. How it is done (executor, tracking, store) may change from start to start.
_DECIDE = ("dataset", "model", "geometry", "tissue", "tiles", "inference", "stain", "lesions", "evaluation")
_PATHS = ("manifest", "folder", "path", "data", "card")


def default_name(values: Mapping[str, Any]) -> str:
    """Return the run's own name, or the data set, the model and a short hash where it has none.

    Args:
        values: The configuration; what is missing in it may be so.
    """
    if values.get("name", "run") != "run":
        return str(values["name"])
    decides: dict[str, Any] = {section: _normal(values.get(section, {})) for section in _DECIDE}
    parts = {"dense": ("halo", "share_until", "windows"), "store": ("compression", "quality", "part_tiles")}
    for section, keys in {**parts, "executor": ("threads",)}.items():
        decides[section] = {key: values.get(section, {}).get(key) for key in keys}
    decides["dataset"] = {**FLAT, **decides["dataset"]}  # so that folders keep the names that earlier versions gave
    decides |= {key: values.get(key) for key in ("seed", "repeat")}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:6]
    dataset = values.get("dataset", {})
    slides = next((dataset[key] for key in ("manifest", "path", "folder") if dataset.get(key)), "")
    slides = "synthetic" if dataset.get("kind") == "synthetic" else slides
    return f"{_word(slides)}-{_word(values.get('model', {}).get('card'))}-{digest}"


def _normal(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section with its paths as one text each, however they were typed."""
    return {
        key: os.path.normpath(value) if key in _PATHS and value and not str(value).startswith("pkg:") else value
        for key, value in section.items()
    }


def _word(path: Any) -> str:
    """Return what a file or folder is called, as a part of a name."""
    stem = PurePath(str(path).removeprefix("pkg:")).stem
    return re.sub(r"[^A-Za-z0-9._]+", "_", stem).strip("._")[:40] or "run"
