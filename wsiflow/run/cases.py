"""What a run is over: its slides and its configuration, ``cases.json``."""

import json
from collections.abc import Sequence
from pathlib import Path

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

_CASES = TypeAdapter(tuple[Case, ...])


def write_cases(root: Path, config: RunConfig, cases: Sequence[Case]) -> Path:
    """Publish what there is to ingest, and the resolved configuration beside it; neither has a secret in it."""
    resolved = _as_spelled(root, config).model_dump(mode="json")  # without those of places that are known to hold some
    publish.publish_generation(
        root, "config.yaml", yaml.safe_dump(redaction.redacted(resolved), sort_keys=False).encode(), {"kind": "config"}
    )
    data = {"config": resolved, "cases": _CASES.dump_python(tuple(cases), mode="json")}
    return publish.publish_generation(root, "cases.json", json.dumps(data, indent=1).encode(), {"kind": "cases"})


def _as_spelled(root: Path, config: RunConfig) -> RunConfig:
    """Return the configuration with the run's folder as it was first spelled: one folder has many paths.

    A folder that was moved or copied is told anew, once.
    """
    told = publish.generations(root, "cases.json")
    former = Path(json.loads(told[-1].read_text(encoding="utf-8"))["config"]["out"]) if told else config.out
    return config.model_copy(update={"out": former}) if is_same(former, root) else config


@cached_by_content(files=4)
def read_cases(path: Path) -> tuple[RunConfig, tuple[Case, ...]]:
    """Return the configuration and the cases of a run."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return RunConfig.model_validate(data["config"], context=RECORDED), _CASES.validate_python(data["cases"])


def check_model(config: RunConfig) -> None:
    """Read the model's card and hash its weights before any slide is opened; see that windows fit into blocks.

    Raises:
        InputError: Card or weights cannot be used, or the halo is too small for the model's window.
    """
    model = card.read_card(config.model)
    card.read_weights(config.model, model)
    needed = max(geometry.window_reach_px(model.window_px, config.inference.stride, config.geometry.convention))
    if isinstance(config.tiles.halo_px, int) and config.tiles.halo_px < needed:
        cause = f"tiles.halo_px is {config.tiles.halo_px}, windows of {model.window_px} px need at least {needed}"
        raise InputError(cause, "set tiles.halo_px=auto and geometry=centred", stage="configuration")


def folder_id(root: Path) -> str:
    """Return what stands for a run's folder wherever it lies; empty where nothing is known of its beginning."""
    names = ("config.yaml", *(path.name for path in publish.generations(root, "config.yaml")))
    receipts = (publish.read_receipt(root, name) for name in names)  # the file may be gone, its receipt still tells
    return next((str(receipt["attempt"]) for receipt in receipts if receipt), "")
