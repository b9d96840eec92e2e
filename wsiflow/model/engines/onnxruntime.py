"""The engine of converted networks on ONNX Runtime; nothing here imports PyTorch."""

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsiflow.model.engines.spec import Engine, optional_package


def onnxruntime_engine(content: bytes, threads: int) -> Engine:
    """Return the engine that runs a network on ONNX Runtime.

    Args:
        content: The network as an ONNX graph.
        threads: Number of threads.

    Raises:
        EnvironmentFault: A package is missing.
    """
    ort = runtime()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(inputs: NDArray[Any]) -> NDArray[np.float32]:
        return np.asarray(session.run(None, {name: inputs})[0], np.float32)

    return run


def runtime() -> Any:
    """Return the package.

    Raises:
        EnvironmentFault: It is missing.
    """
    # Its Linux builds send usage reports over the internet and store a machine id in the user's home.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    return optional_package("onnxruntime", "onnxruntime")
