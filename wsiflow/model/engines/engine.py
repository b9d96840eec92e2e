"""Engines: networks run by OpenVINO, ONNX Runtime or PyTorch in fp32, bfloat16 or int8.

Input: a torch module and an example of its input, mostly pixels, uint8 (n, h, w, 3). Output: an `Engine`, a function
from such arrays to float32 arrays. PyTorch in fp32 is the reference for the others. Converting a network takes seconds,
so the converted graph is cached under a hash of everything that decides it.

The bits of a result depend on the array, the network, the backend, the precision, the number of threads and the numeric
class (`wsiflow.system.machine`), but not on former arrays: graphs with dynamic height and width give the same bits as
graphs that were compiled for one shape.
"""

import importlib
import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from wsiflow.errors import WsiflowError
from wsiflow.model.classifier import Classifier
from wsiflow.model.engines import openvino
from wsiflow.model.engines.compiled import compiled
from wsiflow.model.engines.conversion import converted, graph_for
from wsiflow.model.engines.onnxruntime import runtime
from wsiflow.model.engines.pixels import FromPixels, WindowScores
from wsiflow.model.engines.spec import Backend, Candidate, CheckedEngine, Engine, EngineSpec, Network, check_spec
from wsiflow.model.formats.torchscript import is_script


def scores_from_pixels(classifier: Classifier, body: nn.Module | None = None) -> nn.Module:
    """Return a module from pixels, uint8 (n, h, w, 3), to scores.

    Args:
        classifier: The classifier, which defines the normalisation.
        body: Module from normalised pixels, float32 (n, 3, h, w), to scores. None for the classifier's own network,
            from windows of ``input_px`` to probabilities of the positive class, float32 (n,).
    """
    return FromPixels(classifier, body or WindowScores(classifier)).eval()


def is_convertible(classifier: Classifier) -> bool:
    """Return whether backends other than PyTorch can run a classifier.

    They cannot for TorchScript programs that could not be converted, which may contain operations that they do not
    support.
    """
    return not is_script(classifier.module)


def installed_backends() -> tuple[Backend, ...]:
    """Return the backends that are installed, the usually fastest one first."""
    needed: dict[Backend, tuple[str, ...]] = {
        "openvino": ("openvino",),
        "onnxruntime": ("onnx", "onnxruntime"),
        "torch": ("torch",),
    }
    return tuple(name for name, packages in needed.items() if all(map(importlib.util.find_spec, packages)))


def prepare(
    network: Network, spec: EngineSpec, *, threads: int, cache: Path | None = None, quantised: bytes | None = None
) -> Engine:
    """Return the engine that runs a network.

    Args:
        network: The network.
        spec: Backend and precision.
        threads: Number of threads of the backend; PyTorch uses that of its process.
        cache: Cache folder for converted networks, or None.
        quantised: For int8, the result of `quantise` for this network; otherwise None.

    Returns:
        A function from arrays like the network's example to arrays that its caller may keep.

    Raises:
        InputError: The backend does not support this precision, or cannot convert this network.
        EnvironmentFault: A package is missing, or this CPU has no bfloat16 instructions.
        WsiflowError: A quantised network is missing or not needed.
    """
    check_spec(spec)
    if (spec.precision == "int8") != (quantised is not None):
        raise WsiflowError("a calibrated network must be given for int8, and only then", "please report this")
    if spec.backend == "torch":
        run = _torch(network, spec)
        return CheckedEngine(network.example.shape, network.example.dtype, network.fixed, run)
    if spec.backend == "onnxruntime":
        runtime()  # before the conversion, which would be for nothing where it is missing
    graph, content = (
        converted(network, spec.backend, cache) if quantised is None else (graph_for(network, spec.backend), quantised)
    )
    return compiled(graph, content, spec, threads=threads)


def quantise(network: Network, samples: Iterable[NDArray[Any]], *, cache: Path | None = None) -> bytes:
    """Return a network quantised to int8 for OpenVINO; see `wsiflow.model.engines.openvino.quantise`.

    Args:
        network: The network.
        samples: Inputs of the network that are typical of later ones; all of them are used.
        cache: Cache folder for converted networks, or None.

    Raises:
        InputError: There are no samples, or the network cannot be converted.
        EnvironmentFault: NNCF is missing.
    """
    openvino.require_int8()  # before the conversion, which would be for nothing where it is missing
    return openvino.quantise(*converted(network, "openvino", cache), samples)


def median_seconds(
    candidates: Mapping[Candidate, Engine],
    inputs: NDArray[Any],
    *,
    seconds: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Candidate, float]:
    """Return the median seconds per call of each candidate, the fastest first.

    The candidates take turns, so that a disturbance of the machine affects all of them. Each runs once before the
    measurement, and then all run equally often, at least once, until the time is over.

    Args:
        candidates: Engines by name.
        inputs: Input of the engines, which must have the shape of later inputs.
        seconds: Duration of the measurement.
        clock: Function that returns the time in seconds.
    """
    for engine in candidates.values():
        engine(inputs)
    measured: dict[Candidate, list[float]] = {name: [] for name in candidates}
    end = clock() + seconds
    while True:
        for name, engine in candidates.items():
            start = clock()
            engine(inputs)
            measured[name].append(clock() - start)
        if clock() >= end:
            break
    medians = {name: statistics.median(times) for name, times in measured.items()}
    return dict(sorted(medians.items(), key=lambda item: item[1]))


def _torch(network: Network, spec: EngineSpec) -> Engine:
    """Return the engine of PyTorch, which runs the module itself; images stay in channels-last memory order."""
    module = network.build()

    def run(inputs: NDArray[Any]) -> NDArray[np.float32]:
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=spec.precision == "bf16")
        with torch.inference_mode(), autocast:
            # torch.tensor copies, so read-only arrays are accepted too.
            return np.asarray(module(torch.tensor(inputs)).float().numpy(), np.float32)

    return run
