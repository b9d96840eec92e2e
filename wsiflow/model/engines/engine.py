"""What runs a network: OpenVINO, ONNX Runtime or PyTorch itself, in 32 bit, bfloat16 or 8 bit.

Input: a torch module and an array it takes, mostly pixels, uint8 (n, h, w, 3). Output: an `Engine`, a function from
such arrays to float32 arrays. PyTorch in 32 bit is the measure of the others. Converting a network takes seconds, so
the converted graph is kept in a folder under a hash of all that decides it.

Bits depend on the array, the network, backend, precision, threads and the numeric class (`wsiflow.system.machine`), and
not on arrays that came before: graphs whose height and width stay open give the bits of graphs compiled for one shape.
"""

import importlib
import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from wsiflow.model.classifier import Classifier
from wsiflow.model.engines.onnxruntime import onnxruntime_engine
from wsiflow.model.engines.openvino import openvino_engine
from wsiflow.model.engines.pixels import FromPixels, WindowScores
from wsiflow.model.engines.spec import Backend, Candidate, CheckedEngine, Engine, EngineSpec, Network, check_spec


def scores_from_pixels(classifier: Classifier, body: nn.Module | None = None) -> nn.Module:
    """Return the module from pixels, uint8 (n, h, w, 3), to scores.

    Args:
        classifier: Says how pixels are normalised.
        body: Normalised pixels, float32 (n, 3, h, w), to scores. None: the classifier's own network, for windows of
            window_px, to float32 (n,).
    """
    return FromPixels(classifier, body or WindowScores(classifier)).eval()


def is_convertible(classifier: Classifier) -> bool:
    """Return whether backends other than PyTorch run a classifier and give its probabilities.

    They round resized windows differently, by a grey level, and TorchScript may hold what they do not know.
    """
    return classifier.input_px == classifier.window_px and not isinstance(classifier.module, torch.jit.ScriptModule)


def installed_backends() -> tuple[Backend, ...]:
    """Return the backends that are installed, the fastest first as a rule."""
    needed: dict[Backend, tuple[str, ...]] = {
        "openvino": ("openvino",),
        "onnxruntime": ("onnx", "onnxruntime"),
        "torch": ("torch",),
    }
    return tuple(name for name, packages in needed.items() if all(map(importlib.util.find_spec, packages)))


def prepare(
    network: Network, spec: EngineSpec, *, threads: int, cache: Path | None = None, quantised: bytes | None = None
) -> Engine:
    """Return what runs a network.

    Args:
        network: The network.
        spec: Backend and precision.
        threads: Threads of the backend; PyTorch has those of its process.
        cache: Folder of converted networks, None for none.
        quantised: For int8: what `quantise` returned for this network.

    Returns:
        A function for arrays of the example's type, whose results are its caller's own.

    Raises:
        InputError: The backend does not have this precision, or cannot convert this network.
        EnvironmentFault: A package is missing, or this CPU has no bfloat16.
    """
    check_spec(spec)
    if spec.backend == "torch":
        run = _torch(network, spec)
    elif spec.backend == "openvino":
        run = openvino_engine(network, spec, threads, cache, quantised)
    else:
        run = onnxruntime_engine(network, threads, cache)
    return CheckedEngine(network.example.shape, network.example.dtype, network.fixed, run)


def median_seconds(
    candidates: Mapping[Candidate, Engine],
    inputs: NDArray[Any],
    *,
    seconds: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Candidate, float]:
    """Return the median seconds of each candidate, the fastest first.

    Candidates take turns, so that a disturbance of the machine meets all of them. Each runs once before anything is
    measured, and then as often as the others until the time is over, at least once.

    Args:
        candidates: Engines by what names them.
        inputs: What they are run on: of the shape they will meet.
        seconds: How long to measure.
        clock: The time, s.
    """
    for engine in candidates.values():
        engine(inputs)
    found: dict[Candidate, list[float]] = {name: [] for name in candidates}
    end = clock() + seconds
    while True:
        for name, engine in candidates.items():
            start = clock()
            engine(inputs)
            found[name].append(clock() - start)
        if clock() >= end:
            break
    medians = {name: statistics.median(times) for name, times in found.items()}
    return dict(sorted(medians.items(), key=lambda item: item[1]))


def _torch(network: Network, spec: EngineSpec) -> Engine:
    """Return the module itself; images keep their memory order, which is channels last."""
    module = network.build()

    def run(inputs: NDArray[Any]) -> NDArray[np.float32]:
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=spec.precision == "bf16")
        with torch.inference_mode(), autocast:
            # torch.tensor copies, so that a read-only array serves as well.
            return np.asarray(module(torch.tensor(inputs)).float().numpy(), np.float32)

    return run
