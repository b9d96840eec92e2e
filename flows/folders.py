"""Name the folder of a run without ``out=``: the same for the same command, another for other results."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from wsiflow.slides.kinds import FLAT

# Sections that decide the results of a run; others (executor, tracking, store) may change from start to start.
_DECISIVE_SECTIONS = ("dataset", "model", "geometry", "tissue", "tiles", "inference", "stain", "lesions", "evaluation")
_PATH_KEYS = ("manifest", "folder", "path", "data", "card", "calibration", "model", "development")


def default_name(values: Mapping[str, Any]) -> str:
    """Return the name of a run, or where it has none, one of its data set, its model and a short hash.

    Args:
        values: The configuration, in which values may be missing.
    """
    if values.get("name", "run") != "run":
        return str(values["name"])
    decisive: dict[str, Any] = {section: _normal(values.get(section, {})) for section in _DECISIVE_SECTIONS}
    parts = {"dense": ("halo", "share_until", "windows"), "store": ("compression", "quality", "part_tiles")}
    for section, keys in {**parts, "executor": ("threads",)}.items():
        decisive[section] = {key: values.get(section, {}).get(key) for key in keys}
    if values.get("dense", {}).get("local"):
        decisive["dense"]["local"] = True
    if decisive["inference"].get("stride_alone") == "auto":
        del decisive["inference"]["stride_alone"]  # so that folders keep the names that earlier versions gave
    if decisive["inference"].get("calibration") is None:  # likewise
        decisive["inference"].pop("calibration", None)
    cascade = decisive["inference"].pop("cascade", None) or {}
    if cascade.get("threshold") is not None:
        decisive["inference"]["cascade"] = _normal(cascade)
    decisive["dataset"] = {**FLAT, **decisive["dataset"]}  # so that folders keep the names that earlier versions gave
    if decisive["dataset"].get("mpp") is None:  # likewise
        decisive["dataset"].pop("mpp", None)
    decisive["model"] = {  # likewise
        key: value for key, value in decisive["model"].items() if key != "trust_python" and (key != "maps" or value)
    }
    decisive |= {key: values.get(key) for key in ("seed", "repeat")}
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()[:6]
    dataset = values.get("dataset", {})
    slides = next((dataset[key] for key in ("manifest", "path", "folder") if dataset.get(key)), "")
    slides = "synthetic" if dataset.get("kind") == "synthetic" else slides
    return f"{_stem(slides)}-{_stem(values.get('model', {}).get('card'))}-{digest}"


def _normal(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section with its paths as one text each, however they were typed."""
    return {
        key: os.path.normpath(value) if key in _PATH_KEYS and value and not str(value).startswith("pkg:") else value
        for key, value in section.items()
    }


def _stem(path: Any) -> str:
    """Return the stem of a path in the characters that a part of a folder's name may have."""
    stem = PurePath(str(path).removeprefix("pkg:")).stem
    return re.sub(r"[^A-Za-z0-9._]+", "_", stem).strip("._")[:40] or "run"
