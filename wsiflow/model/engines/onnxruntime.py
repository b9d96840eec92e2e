"""Export of networks to ONNX, and their engine on ONNX Runtime."""

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wsiflow.model.engines.cache import cached
from wsiflow.model.engines.spec import Engine, Network, cannot_convert, graph_key, optional_package


def onnxruntime_engine(network: Network, threads: int, cache: Path | None) -> Engine:
    """Return the engine that runs a network on ONNX Runtime.

    Args:
        network: The network.
        threads: Number of threads.
        cache: Cache folder for converted networks, or None.

    Raises:
        InputError: The network cannot be converted.
        EnvironmentFault: A package is missing.
    """
    # Its Linux builds send usage reports over the internet and store a machine id in the user's home.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    ort = optional_package("onnxruntime", "onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors
    session = ort.InferenceSession(_exported(network, cache), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(inputs: NDArray[Any]) -> NDArray[np.float32]:
        return np.asarray(session.run(None, {name: inputs})[0], np.float32)

    return run


def _exported(network: Network, cache: Path | None) -> bytes:
    """Return the ONNX graph of a network, serialised."""
    optional_package("onnx", "onnxruntime")
    open_axes = {} if network.fixed else {"inputs": {1: "rows", 2: "cols"}}

    def export() -> bytes:
        stream = io.BytesIO()
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of the tracer, and that this exporter is the older one
            try:
                # The newer exporter takes ten times as long and prints warnings to standard error.
                torch.onnx.export(
                    network.build(),
                    (torch.tensor(network.example),),
                    stream,  # type: ignore[arg-type]
                    dynamo=False,
                    input_names=["inputs"],
                    output_names=["outputs"],
                    dynamic_axes=open_axes,
                )
            except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
                raise cannot_convert("ONNX", error) from error
        return stream.getvalue()

    return cached(cache, graph_key(network, "onnx"), export)
