"""Engines of networks that are converted already, which need no PyTorch: importing it takes seconds and 200 MB."""

import numpy as np

from wsiflow.model.engines.onnxruntime import onnxruntime_engine
from wsiflow.model.engines.openvino import openvino_engine
from wsiflow.model.engines.spec import CheckedEngine, Engine, EngineSpec, Graph


def compiled(graph: Graph, content: bytes, spec: EngineSpec, *, threads: int) -> Engine:
    """Return the engine that runs a converted network.

    Args:
        graph: What identifies the network.
        content: The converted network, for int8 the result of `wsiflow.model.engines.openvino.quantise`.
        spec: Backend and precision; the backend is not PyTorch.
        threads: Number of threads of the backend.

    Returns:
        A function from arrays of the graph's shape to arrays that its caller may keep.

    Raises:
        EnvironmentFault: A package is missing.
    """
    if spec.backend == "openvino":
        run = openvino_engine(graph, content, spec, threads)
    else:
        run = onnxruntime_engine(content, threads)
    return CheckedEngine(graph.shape, np.dtype(graph.dtype), graph.fixed, run)
