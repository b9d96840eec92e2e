"""The network of a plan, and the scorer that runs it; a process loads each once.

PyTorch is imported only where the cache folder lacks the converted network, or PyTorch runs it.
"""

import gc
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from wsiflow.errors import EnvironmentFault, IntegrityError
from wsiflow.model import card
from wsiflow.model.choice import Choice
from wsiflow.run.plan import Plan, read_plan
from wsiflow.system import publish, usage
from wsiflow.system.provenance import numeric_class, pixel_versions, thread_count

if TYPE_CHECKING:
    from wsiflow.model.classifier import Classifier
    from wsiflow.model.scoring import DenseScorer, WindowScorer


def check_numeric_class(plan: Plan) -> None:
    """Refuse to compute scores on another kind of machine than the plan names: the last bits could differ.

    Raises:
        EnvironmentFault: The processor, a library or the number of threads is another one.
    """
    planned = {**plan.settings.numeric_class, **plan.settings.pixel_versions}
    here = numeric_class() | pixel_versions()
    differing = [
        f"{name} is {here[name]!r}, planned {planned.get(name)!r}" for name in here if here[name] != planned.get(name)
    ]
    if differing:
        remedy = "run on the kind of machine the run was planned on, or choose another out= folder"
        raise EnvironmentFault(f"this machine gives other last bits: {'; '.join(differing)}", remedy, stage="predict")


def classifier_of(spec: card.ModelSpec) -> "Classifier":
    """Return the classifier; a process loads it once, and again only where its card has changed."""
    return _loaded(spec, card.identity(card.read_card(spec)))


@lru_cache(maxsize=1)
def _loaded(spec: card.ModelSpec, _identity: str) -> "Classifier":
    """Load the model; torch is imported here, after the threads of the worker were limited."""
    with usage.warming_up():
        from wsiflow.model.classifier import load

        return load(spec)


def planned_classifier(plan: Plan) -> "Classifier":
    """Return the classifier of a plan.

    Raises:
        IntegrityError: The card or the weights have changed since the run was planned.
    """
    _check_identity(plan)
    return classifier_of(plan.settings.model)


def _check_identity(plan: Plan) -> None:
    """Refuse a card that has changed.

    Raises:
        IntegrityError: It has, since the run was planned.
    """
    spec = plan.settings.model
    if card.identity(card.read_card(spec)) != plan.settings.model_identity:
        cause = "the model is another than when the run was planned"
        raise IntegrityError(cause, "restore card and weights, or choose another out= folder", path=spec.card)


def planned_scorer(root: Path, plan: Plan) -> "WindowScorer | DenseScorer":
    """Return the scorer of a plan; a process prepares it once.

    Raises:
        IntegrityError: The network was not calibrated for int8, or has changed since the run was planned.
    """
    choice = plan.settings.choice
    quantised = root / calibration(root, plan).name if choice.precision == "int8" else None
    if quantised is not None and not quantised.exists():
        raise IntegrityError("the network was not calibrated for int8", "run again", path=quantised)
    return scorer_for(plan, choice, quantised)


def timed_scorer(root: Path, plan: Plan) -> "tuple[WindowScorer | DenseScorer, float]":
    """Return the scorer of a plan, and the core-seconds that this call took to prepare it."""
    before = usage.warmup_s()
    return planned_scorer(root, plan), usage.warmup_s() - before


def scorer_for(plan: Plan, choice: Choice, quantised: Path | None = None) -> "WindowScorer | DenseScorer":
    """Return the scorer that runs the network of a plan as a choice says; a process prepares it once.

    Args:
        plan: The plan.
        choice: How scores are computed.
        quantised: The file of the network in int8; None for other precisions.

    Raises:
        IntegrityError: The card has changed since the run was planned.
    """
    _check_identity(plan)
    return _prepared(plan.settings.model, plan.settings.model_identity, choice, quantised)


@lru_cache(maxsize=4)
def _prepared(
    spec: card.ModelSpec, _identity: str, choice: Choice, quantised: Path | None
) -> "WindowScorer | DenseScorer":
    return fresh_scorer(spec, choice, quantised)


def cache_key(spec: card.ModelSpec) -> str:
    """Return what identifies the network in the cache folder; empty for one that its card's hashes do not say all of.

    Raises:
        InputError: The weights are missing or damaged, which loading them would find.
    """
    from wsiflow.model import prepared

    described = card.read_card(spec)
    if described.architecture.startswith(card.PYTHON):
        return ""  # what the module of a user's function imports is in no hash
    _verify_weights(spec, card.identity(described))
    return prepared.model_key(described, card.map_indices(described, spec))


@lru_cache(maxsize=1)
def _verify_weights(spec: card.ModelSpec, _identity: str) -> None:
    """Refuse a weights file that is missing or damaged; a process reads it once."""
    card.read_weights(spec, card.read_card(spec))


def fresh_scorer(spec: card.ModelSpec, choice: Choice, quantised: Path | None = None) -> "WindowScorer | DenseScorer":
    """Return a scorer that is not kept in memory; arguments as for `scorer_for`.

    Raises:
        InputError: The card or the weights are missing or damaged.
    """
    with usage.warming_up():
        from wsiflow.model import prepared

        data = None if quantised is None else quantised.read_bytes()
        key, threads = cache_key(spec), thread_count()
        ready = prepared.find(key, choice, threads=threads, quantised=data) if key else None
        if ready is not None:
            return ready
        from wsiflow.model import scorer  # it imports PyTorch, after the threads of the worker were limited

        return scorer.make_scorer(classifier_of(spec), choice, threads=threads, quantised=data, keep_as=key)


def release() -> None:
    """Free the memory of prepared networks; the next task of this process that needs one prepares it again."""
    _prepared.cache_clear()
    gc.collect()


class Calibration(NamedTuple):
    """The name, relative to the run's folder, and the key of the network in int8."""

    name: str
    key: str


def calibration(root: Path, plan: Plan) -> Calibration:
    """Return the name and the key of the network in int8.

    They follow from the settings, which hold the hashes of named slides, or from the slides of the run's first plan.
    """
    slides = {}
    if not plan.settings.calibration:
        first = read_plan(publish.generations(root, "plan.json")[0])
        slides = {"slides": [planned.key for planned in first.slides]}
    key = publish.key_of(predict=plan.settings.of_scores, **slides)
    return Calibration(f"engine/int8-{key[:12]}.zip", key)
