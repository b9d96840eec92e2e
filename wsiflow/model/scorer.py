"""Scorers of a classifier, whose network PyTorch converts to what a `Choice` says; see `wsiflow.model.scoring`.

Where a network was converted before, `wsiflow.model.prepared` finds its scorer without PyTorch.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from wsiflow.errors import InputError, WsiflowError
from wsiflow.model import prepared
from wsiflow.model.choice import Choice
from wsiflow.model.classifier import Classifier, resized
from wsiflow.model.dense import network
from wsiflow.model.dense.crops import Crops, window_crops
from wsiflow.model.dense.facts import DenseFacts, SplitPoint
from wsiflow.model.dense.network import densify
from wsiflow.model.engines.cache import cache_folder, cached
from wsiflow.model.engines.conversion import graph_for
from wsiflow.model.engines.engine import prepare, scores_from_pixels
from wsiflow.model.engines.engine import quantise as quantise_network
from wsiflow.model.engines.spec import Backend, Engine, EngineSpec, Graph, Network, Precision, code_sha256
from wsiflow.model.prepared import Parts, assemble
from wsiflow.model.scoring import DenseScorer, WindowScorer
from wsiflow.system.publish import key_of
from wsiflow.system.usage import untimed


def make_scorer(
    classifier: Classifier, choice: Choice, *, threads: int, quantised: bytes | None = None, keep_as: str = ""
) -> WindowScorer | DenseScorer:
    """Return the scorer for a choice.

    Args:
        classifier: The classifier.
        choice: How scores are computed.
        threads: Number of threads with which the network runs.
        quantised: The calibrated network if the precision is int8, otherwise None.
        keep_as: What identifies a classifier that was loaded from its card and verified, see
            `wsiflow.model.prepared.model_key`: its scorer can be found from now on. Empty: it is not kept.

    Raises:
        InputError: The network or the backend does not support the choice.
        EnvironmentFault: A package is missing, or this CPU does not support the precision.
    """
    spec = EngineSpec(cast("Backend", choice.backend), cast("Precision", choice.precision))
    graphs: list[Graph] = []

    def engine(network: Network) -> Engine:
        ready = prepare(network, spec, threads=threads, cache=cache_folder(), quantised=quantised)
        if spec.backend != "torch":
            graphs.append(graph_for(network, spec.backend))
        return ready

    engines, crops = _engines(classifier, choice, engine)
    parts = Parts(tuple(graphs), crops, classifier.window_px, classifier.input_px, classifier.resize)
    if keep_as and graphs:
        prepared.keep(parts, keep_as, choice, threads=threads)
    return assemble(parts, engines, choice)


def _engines(
    classifier: Classifier, choice: Choice, engine: Callable[[Network], Engine]
) -> tuple[list[Engine], Crops | None]:
    """Return the engines of a choice, and where windows lie in what they share; None where that is not a part.

    Args:
        classifier: The classifier.
        choice: How scores are computed.
        engine: Function that prepares a network.
    """
    if choice.engine == "window":
        return [engine(_window_network(classifier, choice))], None
    if not choice.share_until:
        return [engine(_dense_network(classifier, choice))], None
    dense = densify(
        classifier,
        choice.stride_px,
        context_px=choice.context_px,
        share_until=choice.share_until,
        local=choice.local,
    )
    if choice.precision == "int8" or dense.stem is None or dense.tail is None or dense.crops is None:
        cause = "int8 is not supported for a network of which windows share only a part"
        raise InputError(cause, "set inference.precision=fp32 or bf16, or dense.share_until=''")
    stem_module, tail_module = dense.stem, dense.tail
    pixels = _pixel_network(classifier, lambda: stem_module, choice, "stem")
    stem = engine(pixels)
    like = window_crops(stem(pixels.example), dense.crops)[0, 0, :1]
    example = np.repeat(like, choice.batch, axis=0)
    tail = engine(Network(lambda: tail_module, _key(classifier, choice, "tail"), example, fixed=True))
    return [stem, tail], dense.crops


def engine_to_time(classifier: Classifier, choice: Choice, *, threads: int) -> Engine:
    """Return an engine that runs one region, or one batch of equal windows, to measure the time of a choice.

    The engine takes uint8 (rows, cols, 3): a region, or the window with which a batch is filled.
    """
    scorer = make_scorer(classifier, choice, threads=threads)
    if isinstance(scorer, DenseScorer):
        return lambda pixels: scorer.run(pixels, untimed)
    return lambda pixels: scorer.run([pixels] * choice.batch, untimed)


def quantise(classifier: Classifier, choice: Choice, samples: Sequence[NDArray[np.uint8]]) -> bytes:
    """Return the network in int8, calibrated on uint8 (n, rows, cols, 3): regions, or windows of ``window_px``."""
    network = _window_network if choice.engine == "window" else _dense_network
    fitted = (resized(classifier, sample) for sample in samples)  # dense networks do not resize
    return quantise_network(network(classifier, choice), fitted, cache=cache_folder())


def _window_network(classifier: Classifier, choice: Choice) -> Network:
    side = classifier.input_px
    example = np.zeros((choice.batch, side, side, 3), np.uint8)
    return Network(lambda: scores_from_pixels(classifier), _key(classifier, choice, "window"), example, fixed=True)


def _dense_network(classifier: Classifier, choice: Choice) -> Network:
    def whole() -> nn.Module:
        module = densify(classifier, choice.stride_px, context_px=choice.context_px, local=choice.local).module
        if module is None:
            raise WsiflowError("a network that is not split has no module", "please report this", stage="predict")
        return module

    return _pixel_network(classifier, whole, choice, "dense")


def _pixel_network(classifier: Classifier, body: Callable[[], nn.Module], choice: Choice, part: str) -> Network:
    """Return a network over regions of any size; its example is large enough for four windows."""
    side = classifier.window_px + 2 * choice.context_px + choice.stride_px
    example = np.zeros((1, side, side, 3), np.uint8)
    return Network(lambda: scores_from_pixels(classifier, body()), _key(classifier, choice, part), example, fixed=False)


def describe(classifier: Classifier, stride: int, *, local: bool = False) -> DenseFacts:
    """Return the properties of a classifier that is run over regions.

    See `wsiflow.model.dense.network.describe`, which takes seconds; its result is cached like converted graphs.

    Raises:
        InputError: The network cannot run over whole regions.
    """
    versions = {"torch": importlib.metadata.version("torch")}
    key = key_of(facts=_identity(classifier), stride=stride, local=local, code=code_sha256(), versions=versions)

    def described() -> bytes:
        return json.dumps(network.describe(classifier, stride, local=local)._asdict()).encode()

    facts: dict[str, Any] = json.loads(cached(cache_folder(), key, described))
    facts |= {"overhang_px": tuple(facts["overhang_px"]), "cuts": tuple(SplitPoint(*cut) for cut in facts["cuts"])}
    return DenseFacts(**facts)


def _identity(classifier: Classifier) -> str:
    """Return a text that identifies a network: hashes of its weights and its structure."""
    return f"{classifier.identity} {hashlib.sha256(repr(classifier.module).encode()).hexdigest()}"


def _key(classifier: Classifier, choice: Choice, part: str) -> str:
    """Return a text that identifies a converted network: the network, its part, and the settings of the conversion."""
    also = " local" if choice.local else ""
    also += f" maps {classifier.outputs.maps}" if classifier.outputs.maps else ""
    return f"{_identity(classifier)} {part} {choice.stride_px} {choice.context_px} {choice.share_until}{also}"
