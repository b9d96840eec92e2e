"""The engine of converted networks on OpenVINO, and their quantisation; nothing here imports PyTorch."""

import contextlib
import functools
import io
import logging
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from wsiflow.errors import InputError
from wsiflow.model.engines.spec import Engine, EngineSpec, Graph, optional_package, shape_of
from wsiflow.system.machine import cpu_supports_bf16


def quantise(graph: Graph, converted: bytes, samples: Iterable[NDArray[Any]]) -> bytes:
    """Return a network quantised to int8 for OpenVINO, with ranges of activations calibrated on samples.

    Weights have one scale per channel, and activations one per tensor. The same samples in the same order give the same
    bytes.

    Args:
        graph: What identifies the converted network.
        converted: The converted network.
        samples: Inputs of the network that are typical of later ones; all of them are used.

    Returns:
        The quantised OpenVINO model, serialised.

    Raises:
        InputError: There are no samples.
        EnvironmentFault: NNCF is missing.
    """
    kept = [np.ascontiguousarray(sample) for sample in samples]
    if not kept:
        raise InputError(
            "there are no pixels for the calibration of int8", "set inference.precision=fp32 in another out= folder"
        )
    nncf = _nncf()
    model = _read(converted)
    model.reshape(shape_of(graph))
    with one_thread(), contextlib.redirect_stdout(io.StringIO()):  # NNCF prints progress bars
        quantised = nncf.quantize(
            model,
            nncf.Dataset(kept),
            # Symmetric activations are more accurate and faster than the mixed preset on networks with ReLUs.
            preset=nncf.QuantizationPreset.PERFORMANCE,
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(kept),
        )
    return packed(quantised)


def require_int8() -> None:
    """Verify that the package for calibration is installed.

    Raises:
        EnvironmentFault: NNCF is missing.
    """
    _nncf()


@functools.cache
def core() -> Any:
    """Return the OpenVINO core of this process."""
    # OpenVINO and NNCF send usage reports over the internet as soon as they are imported. Without this package both use
    # substitutes that do nothing, and do not search the user's home for a consent file.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino.Core()


def computes_right() -> bool:
    """Tell whether OpenVINO gives the right result of a small convolution on this processor."""
    core()
    from openvino import Model, opset13

    image = opset13.parameter([1, 3, 8, 8])
    product = opset13.convolution(image, np.ones((2, 3, 3, 3), np.float32), [1, 1], [0, 0], [0, 0], [1, 1])
    compiled = core().compile_model(Model([product], [image], "probe"), "CPU")
    return bool((compiled(np.ones((1, 3, 8, 8), np.float32))[0] == 27.0).all())


def openvino_engine(graph: Graph, content: bytes, spec: EngineSpec, threads: int) -> Engine:
    """Return the engine that runs a converted network on OpenVINO.

    Args:
        graph: What identifies the network.
        content: The converted network, for int8 the result of `quantise`.
        spec: Backend and precision.
        threads: Number of threads.
    """
    model = _read(content)
    # With dynamic height and width the first call for a shape costs some 7 % more than later ones (measured on blocks
    # of GoogLeNet in bfloat16). Compiling for each shape would cost 30 %, and occupy memory for each.
    model.reshape(shape_of(graph))
    request = core().compile_model(model, "CPU", _options(spec, threads)).create_infer_request()

    def run(inputs: NDArray[Any]) -> NDArray[np.float32]:
        request.infer({0: inputs}, share_inputs=True)
        return np.array(request.get_output_tensor(0).data, np.float32)  # a copy, since the next call reuses the tensor

    return run


def _options(spec: EngineSpec, threads: int) -> dict[str, Any]:
    """Return the options with which OpenVINO compiles a network."""
    # In an int8 graph some layers stay in floating point; running these in bfloat16 saves a seventh of its time.
    narrow = spec.precision != "fp32" and cpu_supports_bf16()
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # all processes of a machine would be pinned to the same core
        # By default OpenVINO uses bfloat16 wherever the CPU supports it.
        "INFERENCE_PRECISION_HINT": "bf16" if narrow else "f32",
    }


def packed(model: Any) -> bytes:
    """Return an OpenVINO model serialised to bytes; equal graphs give equal bytes."""
    import openvino

    # The default names contain numbers that depend on what the process did before.
    model.set_friendly_name("network")
    for number, op in enumerate(model.get_ordered_ops()):
        op.set_friendly_name(f"op{number}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=False)
        parts = {part: np.fromfile(path.with_suffix(f".{part}"), np.uint8) for part in ("xml", "bin")}
    return safetensors.numpy.save(parts)


def _read(content: bytes) -> Any:
    """Return an OpenVINO model from its serialised form."""
    parts = safetensors.numpy.load(content)
    return core().read_model(parts["xml"].tobytes(), parts["bin"].tobytes())


def _nncf() -> Any:
    """Return the module of NNCF, limited to logging errors."""
    core()
    kind = logging.getLoggerClass()
    nncf = optional_package("nncf", "int8")
    logging.setLoggerClass(kind)  # because NNCF sets its own logger class for the whole process
    nncf.set_log_level(logging.ERROR)
    return nncf


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Make NNCF run networks with one thread; it would use all cores, whose number may change the last bits."""
    import openvino

    class Core(openvino.Core):  # type: ignore[misc]
        def compile_model(self, model: Any, device_name: str, config: Mapping[str, Any] | None = None) -> Any:
            options = {**(config or {}), **_options(EngineSpec("openvino", "fp32"), 1)}
            return super().compile_model(model, device_name, options)

    theirs, openvino.Core = openvino.Core, Core
    try:
        yield
    finally:
        openvino.Core = theirs
