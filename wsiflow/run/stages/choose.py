"""The stage that chooses how scores are computed, once for a run (``choose``), and the name and key of that choice."""

import json
from pathlib import Path
from typing import Any

from wsiflow.model import card
from wsiflow.model.choice import Choice
from wsiflow.run import cases
from wsiflow.run.cases import read_cases
from wsiflow.run.config import RunConfig
from wsiflow.run.stages.network import classifier_of
from wsiflow.system import publish, usage
from wsiflow.system.provenance import facts, numeric_class, pixel_versions, thread_count


def is_chosen(source: Path) -> bool:
    """Tell whether it was chosen how the run computes scores."""
    config, _ = read_cases(source)
    return publish.done(source.parent, choice_name(config), choice_key(config)) is not None


def choice_key(config: RunConfig) -> str:
    """Return what identifies how scores are computed: the model, and what the configuration asks for.

    The machine is that of the worker that chooses: the one that asks may be of another kind.
    """
    asked = {name: getattr(config, name).model_dump() for name in ("inference", "tiles", "geometry")}
    asked["dense"] = config.dense.model_dump(exclude={"windows", "tolerance", "on_excess"})
    return publish.key_of(
        asked=asked, model=card.identity(card.read_card(config.model)), threads=config.executor.threads
    )


def choice_name(config: RunConfig) -> str:
    """Return the name of the file that says how scores are computed, relative to the run's folder."""
    return f"engine/{choice_key(config)[:12]}.json"


def describe_fallback(source: Path) -> str:
    """Return how scores are computed and why, where that is not what the configuration or the model asks for."""
    config, _ = read_cases(source)
    record = choice_record(source.parent, config)
    choice, asked = Choice(**record["choice"]), config.inference
    same = choice.engine == asked.engine and asked.backend in {choice.backend, "auto"}
    engine = "" if same else describe_choice(source)
    return "; ".join(filter(None, (engine, foreign_spacing(config))))


def describe_choice(source: Path) -> str:
    """Return how scores are computed and why."""
    record = choice_record(source.parent, read_cases(source)[0])
    choice = Choice(**record["choice"])
    return f"{choice.engine} engine, {choice.backend} {choice.precision}: {record['told']}"


def foreign_spacing(config: RunConfig) -> str:
    """Return that slides are read at a spacing the model was not trained for; nothing where they are not."""
    spacing, trained = config.geometry.spacing, card.read_card(config.model).spacing_um_px
    if isinstance(spacing, str) or abs(spacing / trained - 1) <= config.geometry.tolerance:
        return ""
    return (
        f"slides are read at {spacing:g} um/px, the model was trained at {trained:g}: its scores may mean nothing there"
    )


def choice_record(root: Path, config: RunConfig) -> dict[str, Any]:
    """Return what was chosen for a configuration, as it was published."""
    record: dict[str, Any] = json.loads((root / choice_name(config)).read_text(encoding="utf-8"))
    return record


def choose(source: Path, _index: int) -> tuple[publish.Receipt, bool]:
    """Choose how the run computes scores, and publish it as ``engine/<key>.json``; all of it counts as warm-up."""
    config, _ = cases.read_cases(source)
    root, name, key = source.parent, choice_name(config), choice_key(config)
    done = publish.done(root, name, key)
    if done is not None:
        return done, False
    with usage.warming_up(), publish.publishing(root, name, key, facts("choice", ""), publish.accept) as attempt:
        if (root / name).exists():  # measured before, by a run that died before its receipt
            attempt.path.write_bytes((root / name).read_bytes())
        else:
            from wsiflow.run.stages.fastest import (
                choose_engine,  # it needs torch: seconds, and threads that are limited
            )

            record = choose_engine(classifier_of(config.model), config, threads=thread_count())
            record |= {"numeric_class": numeric_class(), "pixels": pixel_versions()}
            attempt.path.write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
    return attempt.receipt, True
