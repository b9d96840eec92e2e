"""Scorers from what the user's cache folder holds: graphs that were converted before, and how they fit together.

To prepare a scorer from its classifier, PyTorch loads the weights, verifies the probes of the card and converts the
network, see `wsiflow.model.scorer`. A process that does so keeps what the scorer is made of, under a hash of all that
decides it: the model, the choice, the code and the numeric class. Another process on such a machine needs no PyTorch,
whose import takes longer than all else that a process does before its first block. The bits are the same, since the
graphs are.
"""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from wsiflow.model.card import ModelCard, Resize
from wsiflow.model.choice import Choice
from wsiflow.model.dense.crops import Crops, window_crops
from wsiflow.model.engines import cache
from wsiflow.model.engines.compiled import compiled
from wsiflow.model.engines.spec import Backend, Engine, EngineSpec, Graph, Precision, check_spec, code_sha256
from wsiflow.model.scoring import DenseScorer, Fit, WindowScorer, in_batches, timed_run
from wsiflow.system import machine
from wsiflow.system.publish import key_of
from wsiflow.system.usage import Timer

_ZOO = ("timm", "torchvision", "transformers")  # packages that build networks for weights that come without one


class Parts(NamedTuple):
    """What a scorer is made of.

    Attributes:
        graphs: The graph of the network, or those of the stem that windows share and of the tail; none where PyTorch
            runs it.
        crops: Positions of the windows in what the stem returns; None without a stem.
        window_px: Side of a window, px.
        input_px: Side of the network's input, px.
        resize: How windows are resized where the two differ.
    """

    graphs: tuple[Graph, ...]
    crops: Crops | None
    window_px: int
    input_px: int
    resize: Resize


def model_key(card: ModelCard, maps: Sequence[int]) -> str:
    """Return a text that identifies a network as it is built and verified here.

    Args:
        card: The whole card: other probes have to be verified again.
        maps: Indices of the further classes that are mapped.
    """
    versions = {name: machine.installed_version(name) for name in _ZOO}
    return key_of(card=card.model_dump(mode="json"), maps=list(maps), versions=versions)


def keep(parts: Parts, model: str, choice: Choice, *, threads: int) -> None:
    """Keep what a scorer is made of, which `find` looks for; its graphs are in the cache already.

    Args:
        parts: What it is made of.
        model: What identifies the network, see `model_key`.
        choice: How scores are computed.
        threads: Number of threads with which the network runs.
    """
    cache.cached(cache.cache_folder(), _key(model, choice, threads), lambda: json.dumps(parts).encode())


def find(
    model: str, choice: Choice, *, threads: int, quantised: bytes | None = None
) -> WindowScorer | DenseScorer | None:
    """Return the scorer for a choice from the cache, or None where a part of it is not there.

    Args:
        model: What identifies the network, see `model_key`.
        choice: How scores are computed.
        threads: Number of threads with which the network runs.
        quantised: The calibrated network if the precision is int8, otherwise None.

    Raises:
        EnvironmentFault: A package is missing, or this CPU does not support the precision.
    """
    folder = cache.cache_folder()
    content = cache.kept(folder, _key(model, choice, threads))
    if content is None:
        return None
    parts = _parts(json.loads(content))
    contents = [quantised or cache.kept(folder, graph.key) for graph in parts.graphs]
    spec = EngineSpec(cast("Backend", choice.backend), cast("Precision", choice.precision))
    check_spec(spec)
    engines = [
        compiled(graph, each, spec, threads=threads)
        for graph, each in zip(parts.graphs, contents, strict=True)
        if each is not None
    ]
    return assemble(parts, engines, choice) if len(engines) == len(contents) else None


def _key(model: str, choice: Choice, threads: int) -> str:
    """Return the key of what a scorer is made of."""
    settings, numeric_class = choice.score_settings(), machine.numeric_class(threads)
    return key_of(scorer=model, choice=settings, code=code_sha256(), numeric_class=numeric_class)


def _parts(values: list[Any]) -> Parts:
    """Return what a scorer is made of from its JSON."""
    graphs, crops, *sides = values
    read = tuple(Graph(key, tuple(shape), dtype, fixed) for key, shape, dtype, fixed in graphs)
    return Parts(read, None if crops is None else Crops(*crops), *sides)


def assemble(parts: Parts, engines: Sequence[Engine], choice: Choice) -> WindowScorer | DenseScorer:
    """Return the scorer for a choice from the engines of its networks.

    Args:
        parts: What the scorer is made of.
        engines: The engines of its graphs.
        choice: How scores are computed.
    """
    if choice.engine == "window":
        return WindowScorer(engines[0], choice, parts.window_px, _fit(parts))
    crops = parts.crops
    if crops is None:
        return DenseScorer(lambda pixels, timed: timed_run(engines[0], pixels[None], timed)[0], choice)
    stem, tail = engines

    def run_map(pixels: NDArray[np.uint8], timed: Timer) -> NDArray[np.float32]:
        windows = window_crops(timed_run(stem, pixels[None], timed), crops)[0]
        rows, cols = windows.shape[:2]
        each = (windows[row, col] for row in range(rows) for col in range(cols))
        scores = in_batches(tail, each, choice.batch, timed)
        return scores.reshape(rows, cols, *scores.shape[1:])

    return DenseScorer(run_map, choice)


def _fit(parts: Parts) -> Fit:
    """Return the function that gives windows the side of the network's input."""
    if parts.input_px == parts.window_px:
        return lambda images: images
    from wsiflow.model.resize import resize  # it imports PyTorch, which resizes windows where the card says so

    return partial(resize, side=parts.input_px, how=parts.resize)
