"""The choice of how a run computes scores: it is made once by the stage ``choose``, published, and read from there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wsiflow.errors import InputError
from wsiflow.model import card
from wsiflow.model.choice import Choice
from wsiflow.model.engines import cache
from wsiflow.model.engines.spec import code_sha256
from wsiflow.run import cases
from wsiflow.run.cases import read_cases
from wsiflow.run.config import RunConfig
from wsiflow.run.stages.calibration_set import named_sha256
from wsiflow.run.stages.network import cache_key, classifier_of
from wsiflow.system import publish, usage
from wsiflow.system.machine import cpu_flags
from wsiflow.system.provenance import facts, numeric_class, pixel_versions, thread_count


def is_chosen(source: Path) -> bool:
    """Tell whether the choice of a run is published."""
    config, _ = read_cases(source)
    return publish.done(source.parent, choice_name(config), choice_key(config)) is not None


def choice_key(config: RunConfig) -> str:
    """Return the key of the choice: it follows from the model and from the settings of the configuration.

    The machine is no part of the key. The choice is made on the machine of a worker, and this process may run on
    another kind of machine.
    """
    settings = {name: getattr(config, name).model_dump(mode="json") for name in ("inference", "tiles", "geometry")}
    settings["inference"].pop("cascade", None)  # it decides where windows are, and not how they are scored
    if config.inference.calibration == "own":  # it decides nothing here
        del settings["inference"]["calibration"]
    settings["dense"] = config.dense.model_dump(exclude={"windows", "tolerance", "on_excess"})
    return publish.key_of(
        asked=settings, model=card.identity(card.read_card(config.model)), threads=config.executor.threads
    )


def choice_name(config: RunConfig) -> str:
    """Return the name of the file of the choice, relative to the run's folder."""
    return f"engine/{choice_key(config)[:12]}.json"


def describe_fallback(source: Path) -> str:
    """Return how scores are computed and why, where the configuration or the model asks for something else.

    The text is empty where the choice is as asked, and slides are read at the spacing of the model.
    """
    config, _ = read_cases(source)
    record = choice_record(source.parent, config)
    choice, requested = Choice(**record["choice"]), config.inference
    same = choice.engine == requested.engine and requested.backend in {choice.backend, "auto"}
    same = same and bool(choice.share_until) == bool(config.dense.share_until) and requested.precision != "auto"
    engine = "" if same else describe_choice(source)
    return "; ".join(filter(None, (engine, foreign_spacing(config))))


def describe_choice(source: Path) -> str:
    """Return in one line how scores are computed, and why."""
    record = choice_record(source.parent, read_cases(source)[0])
    choice = Choice(**record["choice"])
    return f"{choice.engine} engine, {choice.backend} {choice.precision}: {record['told']}"


def foreign_spacing(config: RunConfig) -> str:
    """Return a warning where slides are read at a spacing that the model was not trained for, else an empty text."""
    spacing, trained = config.geometry.spacing, card.read_card(config.model).spacing_um_px
    if isinstance(spacing, str) or abs(spacing / trained - 1) <= config.geometry.tolerance:
        return ""
    return (
        f"slides are read at {spacing:g} um/px, the model was trained at {trained:g}: its scores may mean nothing there"
    )


def choice_record(root: Path, config: RunConfig) -> dict[str, Any]:
    """Return the published record of the choice: the choice, its reason, and the machine that it was made on."""
    record: dict[str, Any] = json.loads((root / choice_name(config)).read_text(encoding="utf-8"))
    return record


def publish_choice(
    source: Path, complete: Callable[[Path, dict[str, Any]], dict[str, Any]]
) -> tuple[publish.Receipt, bool]:
    """Choose how the run computes scores, and publish the choice as ``engine/<key>.json``.

    All of the time counts as warm-up.

    Args:
        source: The ``cases.json`` of the run.
        complete: Function of ``source`` and the record of the choice, which is in fp32 where the precision is not
            given; it returns the record to publish.

    Raises:
        InputError: The configuration asks for what this network cannot do.
        EnvironmentFault: The configuration asks for what this machine cannot do.
    """
    config, _ = cases.read_cases(source)
    root, name, key = source.parent, choice_name(config), choice_key(config)
    done = publish.done(root, name, key)
    if done is not None:
        return done, False
    with usage.warming_up(), publish.publishing(root, name, key, facts("choice", ""), publish.accept) as attempt:
        if (root / name).exists():
            # A run that was killed before it wrote the receipt left it. Times that are measured again would differ.
            attempt.path.write_bytes((root / name).read_bytes())
        else:
            record = _choose(config)
            record = complete(source, record | {"numeric_class": numeric_class(), "pixels": pixel_versions()})
            record |= _calibration(config, record)
            attempt.path.write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
    return attempt.receipt, True


def _calibration(config: RunConfig, record: dict[str, Any]) -> dict[str, Any]:
    """Return the hashes of the named slides that int8 is calibrated on, as ``calibration``; nothing without any.

    Raises:
        InputError: Int8 was chosen, and it is not said on what it is calibrated.
    """
    named = config.inference.calibration
    if record["choice"]["precision"] != "int8" or named == "own":
        return {}
    if named is None:
        cause = "inference.calibration names no slides to calibrate int8 on"
        remedy = "name a manifest of slides that are not under test, or set inference.calibration=own to take those"
        raise InputError(cause, remedy, stage="configuration")
    return {"calibration": named_sha256(named)}


def _choose(config: RunConfig) -> dict[str, Any]:
    """Return how scores are computed, from the cache folder where such a machine has chosen before without measuring.

    Raises:
        InputError: The configuration asks for what this network cannot do.
        EnvironmentFault: The configuration asks for what this machine cannot do.
    """
    model = cache_key(config.model)
    key = _record_key(config, model)
    content = cache.kept(cache.cache_folder(), key) if key else None
    if content is not None:
        record: dict[str, Any] = json.loads(content)
        return record
    # It imports torch, which takes seconds, and before which a worker's threads have to be limited.
    from wsiflow.run.stages.fastest import choose_engine

    record = choose_engine(classifier_of(config.model), config, threads=thread_count(), keep_as=model)
    if key and not record["measured_s"] and "window_s" not in record:
        cache.cached(cache.cache_folder(), key, lambda: json.dumps(record).encode())
    return record


def _record_key(config: RunConfig, model: str) -> str:
    """Return a hash of all that decides a choice; empty where it is measured, or has to be tried on this machine.

    Args:
        config: The configuration.
        model: What identifies the network in the cache folder; empty for one that is not kept there.
    """
    inference = config.inference
    if not model or inference.backend == "auto" or inference.precision in {"auto", "int8"}:
        return ""
    sections = ("inference", "dense", "tiles", "geometry")
    choice = {name: getattr(config, name).model_dump(mode="json") for name in sections}
    choice["inference"].pop("cascade", None)
    return publish.key_of(
        choice=choice,
        model=model,
        code=[code_sha256(package) for package in ("model", "plan", "run/stages")],
        machine=[numeric_class(), sorted(cpu_flags())],
    )
