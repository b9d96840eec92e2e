"""Conversion and quantisation of networks for OpenVINO, and their engine there."""

import contextlib
import functools
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray

from wsiflow.errors import InputError, WsiflowError
from wsiflow.model.engines.cache import cached
from wsiflow.model.engines.spec import (
    Engine,
    EngineSpec,
    Network,
    cannot_convert,
    graph_key,
    optional_package,
    shape_of,
)
from wsiflow.system.machine import cpu_supports_bf16


def quantise(network: Network, samples: Iterable[NDArray[Any]], *, cache: Path | None = None) -> bytes:
    """Return a network quantised to int8 for OpenVINO, with ranges of activations calibrated on samples.

    Weights have one scale per channel, and activations one per tensor. The same samples in the same order give the same
    bytes.

    Args:
        network: The network.
        samples: Inputs of the network that are typical of later ones; all of them are used.
        cache: Cache folder for converted networks, or None.

    Returns:
        The quantised OpenVINO model, serialised.

    Raises:
        InputError: There are no samples, or the network cannot be converted.
        EnvironmentFault: NNCF is missing.
    """
    kept = [np.ascontiguousarray(sample) for sample in samples]
    if not kept:
        raise InputError(
            "there are no pixels for the calibration of int8", "set inference.precision=fp32 in another out= folder"
        )
    nncf = _nncf()
    model = _read(_converted(network, cache))
    model.reshape(shape_of(network))
    with one_thread(), contextlib.redirect_stdout(io.StringIO()):  # NNCF prints progress bars
        quantised = nncf.quantize(
            model,
            nncf.Dataset(kept),
            # Symmetric activations are more accurate and faster than the mixed preset on networks with ReLUs.
            preset=nncf.QuantizationPreset.PERFORMANCE,
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(kept),
        )
    return _packed(quantised)


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


def openvino_engine(
    network: Network, spec: EngineSpec, threads: int, cache: Path | None, quantised: bytes | None
) -> Engine:
    """Return the engine that runs a network on OpenVINO.

    Args:
        network: The network.
        spec: Backend and precision.
        threads: Number of threads.
        cache: Cache folder for converted networks, or None.
        quantised: For int8, the result of `quantise`; otherwise None.

    Raises:
        InputError: The network cannot be converted.
        WsiflowError: A quantised network is missing or not needed.
    """
    if (spec.precision == "int8") != (quantised is not None):
        raise WsiflowError("a calibrated network must be given for int8, and only then", "please report this")
    model = _read(quantised or _converted(network, cache))
    # With dynamic height and width the first call for a shape costs some 7 % more than later ones (measured on blocks
    # of GoogLeNet in bfloat16). Compiling for each shape would cost 30 %, and occupy memory for each.
    model.reshape(shape_of(network))
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


def _converted(network: Network, cache: Path | None) -> bytes:
    """Return the OpenVINO graph of a network, serialised."""
    core()
    import openvino

    def convert() -> bytes:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of the tracer about shapes that are constants on purpose
            try:
                # OpenVINO also reads programs of torch.export. Those give the same bits at the same speed, but take ten
                # times as long, since torch.export has to reason about every phase of a map of any height and width:
                # 28.6 s of CPU time instead of 2.5 s for the demo network, 7.0 s instead of 0.7 s for pcam.
                # Tracing runs the network in PyTorch, where a whole batch would need as much memory as all the rest.
                model = openvino.convert_model(network.build(), example_input=torch.tensor(network.example[:2]))
            except (RuntimeError, openvino.frontend.OpConversionFailure) as error:
                raise cannot_convert("OpenVINO", error) from error
        return _packed(model)

    return cached(cache, graph_key(network, "openvino"), convert)


def _packed(model: Any) -> bytes:
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


def _read(packed: bytes) -> Any:
    """Return an OpenVINO model from its serialised form."""
    parts = safetensors.numpy.load(packed)
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
