"""Conversion of networks of PyTorch to the graphs that OpenVINO and ONNX Runtime run.

Converting a network takes seconds, so the converted graph is cached under a hash of everything that decides it.
"""

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from wsiflow.model.engines import openvino
from wsiflow.model.engines.cache import cached
from wsiflow.model.engines.spec import Backend, Graph, Network, cannot_convert, graph_of, optional_package


def converted(network: Network, backend: Backend, cache: Path | None) -> tuple[Graph, bytes]:
    """Return the graph of a network for a backend, and what identifies it.

    Args:
        network: The network.
        backend: The backend, which is not PyTorch.
        cache: Cache folder for converted networks, or None.

    Raises:
        InputError: The network cannot be converted.
        EnvironmentFault: A package is missing.
    """
    graph = graph_for(network, backend)
    return graph, cached(cache, graph.key, lambda: _FORMS[backend][1](network))


def graph_for(network: Network, backend: Backend) -> Graph:
    """Return what identifies the graph of a network for a backend, which is not PyTorch."""
    return graph_of(network, _FORMS[backend][0])


def _to_openvino(network: Network) -> bytes:
    """Return the OpenVINO graph of a network, serialised."""
    openvino.core()
    import openvino as library

    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of the tracer about shapes that are constants on purpose
        try:
            # OpenVINO also reads programs of torch.export. Those give the same bits at the same speed, but take ten
            # times as long, since torch.export has to reason about every phase of a map of any height and width:
            # 28.6 s of CPU time instead of 2.5 s for the demo network, 7.0 s instead of 0.7 s for pcam.
            # Tracing runs the network in PyTorch, where a whole batch would need as much memory as all the rest.
            model = library.convert_model(network.build(), example_input=torch.tensor(network.example[:2]))
        except (RuntimeError, library.frontend.OpConversionFailure) as error:
            raise cannot_convert("OpenVINO", error) from error
    return openvino.packed(model)


def _to_onnx(network: Network) -> bytes:
    """Return the ONNX graph of a network, serialised."""
    optional_package("onnx", "onnxruntime")
    open_axes = {} if network.fixed else {"inputs": {1: "rows", 2: "cols"}}
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


_FORMS: dict[Backend, tuple[str, Callable[[Network], bytes]]] = {
    "openvino": ("openvino", _to_openvino),
    "onnxruntime": ("onnx", _to_onnx),
}
