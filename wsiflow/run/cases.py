"""The cases of a run: ``cases.json`` holds its slides and its configuration."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from wsiflow import redaction
from wsiflow.errors import InputError
from wsiflow.model import card
from wsiflow.plan import geometry
from wsiflow.run.config import RunConfig
from wsiflow.slides.kinds import RECORDED
from wsiflow.slides.manifest import Case
from wsiflow.system import publish
from wsiflow.system.paths import is_same
from wsiflow.system.reread import cached_by_content

_SCORE_COPIES = 3  # while the scores of a group's blocks are joined and divided by class
#: File of a trial's folder that names its sweep's overrides, ``key=value`` separated by commas, and so the trial.
CLAIM = "receipts/trial"

_CHECKED_FOLDERS = 32
_LATER = frozenset({"name", "columns", "mpp_if_none", "tissue_mask_path", "roi_path"})
_NEXT_OVERRIDE = re.compile(r",(?=[\w./@:+-]+=)")
_CASES = TypeAdapter(tuple[Case, ...])


def write_cases(root: Path, config: RunConfig, cases: Sequence[Case]) -> Path:
    """Publish the cases with the resolved configuration, and ``config.yaml``, both with secrets redacted.

    Returns:
        The file of the cases.
    """
    resolved = _as_spelled(root, config).model_dump(mode="json")  # fields that may hold secrets redact them
    publish.publish_generation(
        root, "config.yaml", yaml.safe_dump(redaction.redacted(resolved), sort_keys=False).encode(), {"kind": "config"}
    )
    listed = [_without_unset(case) for case in _CASES.dump_python(tuple(cases), mode="json")]
    data = {"config": resolved, "cases": listed}
    return publish.publish_generation(root, "cases.json", json.dumps(data, indent=1).encode(), {"kind": "cases"})


def _without_unset(case: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a case what earlier versions did not know, unless it is given: files of their runs stay the same."""
    return {name: value for name, value in case.items() if value or name not in _LATER}


def _as_spelled(root: Path, config: RunConfig) -> RunConfig:
    """Return the configuration with the path of the run's folder as it was first written: a folder has many paths.

    Where the folder was moved or copied, the new path is kept.
    """
    files = publish.generations(root, "cases.json")
    former = Path(json.loads(files[-1].read_text(encoding="utf-8"))["config"]["out"]) if files else config.out
    return config.model_copy(update={"out": former}) if is_same(former, root) else config


@cached_by_content(files=4)
def read_cases(path: Path) -> tuple[RunConfig, tuple[Case, ...]]:
    """Return the configuration and the cases of a run."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return RunConfig.model_validate(data["config"], context=RECORDED), _CASES.validate_python(data["cases"])


def needed_paths(path: Path) -> list[Path]:
    """Return what every machine that works on a run has to see besides its folder.

    Args:
        path: The ``cases.json`` of the run.

    Returns:
        The model's card and weights, and the first slide of each of some folders; what is not here either is left out.
    """
    config, cases = read_cases(path)
    first = {case.path.parent: case.path for case in reversed(cases)}
    model = [] if str(config.model.card).startswith(card.PACKAGED) else [config.model.card, config.model.card.parent]
    return [each for each in (*model, *[*first.values()][:_CHECKED_FOLDERS]) if each.exists()]


def check_model(config: RunConfig) -> None:
    """Check the model's card and weights before any slide is opened, and that windows fit into blocks.

    Raises:
        InputError: The card or the weights cannot be used, or the halo is too small for the model's window.
    """
    model = card.read_card(config.model)
    card.read_weights(config.model, model)
    _check_maps(config, model)
    needed_px = max(geometry.window_reach_px(model.window_px, config.inference.stride, config.geometry.convention))
    if isinstance(config.tiles.halo_px, int) and config.tiles.halo_px < needed_px:
        cause = f"tiles.halo_px is {config.tiles.halo_px}, windows of {model.window_px} px need at least {needed_px}"
        raise InputError(cause, "set tiles.halo_px=auto and geometry=centred", stage="configuration")


def _check_maps(config: RunConfig, model: card.ModelCard) -> None:
    """Refuse further classes of which the scores of a group would take more than half of ``tiles.memory_mb``."""
    cells = config.tiles.group_tiles * (config.tiles.tile_px // config.inference.stride) ** 2
    count = len(card.map_indices(model, config.model))
    needed_mb = _SCORE_COPIES * 4 * cells * count / 1e6
    if count and needed_mb > config.tiles.memory_mb / 2:
        group = f"a group of {config.tiles.group_tiles} tiles"
        cause = f"the scores of model.maps take {needed_mb:.0f} MB for {group}, more than half of "
        cause += f"tiles.memory_mb={config.tiles.memory_mb}"
        remedy = "name fewer classes in model.maps, set a smaller tiles.group_tiles, "
        remedy += "or a larger inference.stride or tiles.memory_mb"
        raise InputError(cause, remedy, stage="configuration")


def swept(root: Path) -> dict[str, str]:
    """Return what a trial of a sweep was given that others were not: values by key; empty for any other run."""
    try:
        text = (root / CLAIM).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return {}
    return parse_swept(text)


def parse_swept(text: str) -> dict[str, str]:
    """Return the values by key that overrides name, which are separated by commas; a value may have commas as well."""
    named = (override.partition("=") for override in _NEXT_OVERRIDE.split(text) if override)
    return {key.lstrip("+"): value for key, _, value in named}


def folder_id(root: Path) -> str:
    """Return an identifier of a run's folder that stays when it is moved; empty where the folder has no receipt yet."""
    names = ("config.yaml", *(path.name for path in publish.generations(root, "config.yaml")))
    receipts = (publish.read_receipt(root, name) for name in names)  # the receipt is enough, where the file was deleted
    return next((str(receipt["attempt"]) for receipt in receipts if receipt), "")
