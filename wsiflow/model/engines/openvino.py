"""Networks on OpenVINO: converted, packed, quantised and run."""

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
    cpu_supports_bf16,
    graph_key,
    optional_package,
    shape_of,
)


def quantise(network: Network, samples: Iterable[NDArray[Any]], *, cache: Path | None = None) -> bytes:
    """Return a network in 8 bit for OpenVINO, its ranges taken from what it meets on samples.

    Weights have a scale per channel, activations one per tensor. The same samples in the same order give the same
    bytes.

    Args:
        network: The network.
        samples: Arrays it takes, typical of those it will run on; all of them are used.
        cache: Folder of converted networks, None for none.

    Raises:
        InputError: There are no samples, or the network cannot be converted.
        EnvironmentFault: NNCF is missing.
    """
    kept = [np.ascontiguousarray(sample) for sample in samples]
    if not kept:
        raise InputError(
            "there are no pixels to calibrate int8 with", "set inference.precision=fp32 in another out= folder"
        )
    nncf = _nncf()
    model = _read(_converted(network, cache))
    model.reshape(shape_of(network))
    with one_thread(), contextlib.redirect_stdout(io.StringIO()):  # progress bars
        made = nncf.quantize(
            model,
            nncf.Dataset(kept),
            # Symmetric activations: on networks of ReLUs more accurate than the mixed preset, and faster.
            preset=nncf.QuantizationPreset.PERFORMANCE,
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(kept),
        )
    return _packed(made)


def require_int8() -> None:
    """Refuse to calibrate where what it takes is not installed.

    Raises:
        EnvironmentFault: NNCF is missing.
    """
    _nncf()


@functools.cache
def core() -> Any:
    """Return OpenVINO's core, one for the process."""
    # OpenVINO reports its use over the network as soon as it is imported, and NNCF likewise. Without this package both
    # fall back on stand-ins that do nothing; no consent file is looked for in the user's home.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino.Core()


def openvino_engine(
    network: Network, spec: EngineSpec, threads: int, cache: Path | None, quantised: bytes | None
) -> Engine:
    """Return a network compiled by OpenVINO."""
    if (spec.precision == "int8") != (quantised is not None):
        raise WsiflowError("int8 and a calibrated network go together", "please report this")
    model = _read(quantised or _converted(network, cache))
    # With height and width open the first call for a shape costs some 7 % more than later ones (measured on blocks of
    # GoogLeNet in bfloat16); compiling for each shape would cost 30 %, and keep memory for each.
    model.reshape(shape_of(network))
    request = core().compile_model(model, "CPU", _options(spec, threads)).create_infer_request()

    def run(inputs: NDArray[Any]) -> NDArray[np.float32]:
        request.infer({0: inputs}, share_inputs=True)
        return np.array(request.get_output_tensor(0).data, np.float32)  # a copy: the next call writes there

    return run


def _options(spec: EngineSpec, threads: int) -> dict[str, Any]:
    """Return what OpenVINO is told to do."""
    # Of an 8-bit graph some layers stay in floating point: a seventh of its time is saved if they are bfloat16.
    narrow = spec.precision != "fp32" and cpu_supports_bf16()
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # the processes of one machine would all choose the same core
        # Left to itself OpenVINO takes bfloat16 wherever the CPU has it.
        "INFERENCE_PRECISION_HINT": "bf16" if narrow else "f32",
    }


def _converted(network: Network, cache: Path | None) -> bytes:
    """Return OpenVINO's graph of a network."""
    core()
    import openvino

    def convert() -> bytes:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, about shapes that are constants on purpose
            try:
                # Tracing runs the network in PyTorch: a whole batch would take as much memory as all the rest.
                model = openvino.convert_model(network.build(), example_input=torch.tensor(network.example[:2]))
            except (RuntimeError, openvino.frontend.OpConversionFailure) as error:
                raise cannot_convert("OpenVINO", error) from error
        return _packed(model)

    return cached(cache, graph_key(network, "openvino"), convert)


def _packed(model: Any) -> bytes:
    """Return an OpenVINO model as one string of bytes, the same for the same graph."""
    import openvino

    # Instead of names with numbers that depend on what the process did before.
    model.set_friendly_name("network")
    for number, op in enumerate(model.get_ordered_ops()):
        op.set_friendly_name(f"op{number}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=False)
        parts = {part: np.fromfile(path.with_suffix(f".{part}"), np.uint8) for part in ("xml", "bin")}
    return safetensors.numpy.save(parts)


def _read(packed: bytes) -> Any:
    """Return the OpenVINO model in a string of bytes."""
    parts = safetensors.numpy.load(packed)
    return core().read_model(parts["xml"].tobytes(), parts["bin"].tobytes())


def _nncf() -> Any:
    """Return NNCF, quiet."""
    core()
    kind = logging.getLoggerClass()
    nncf = optional_package("nncf", "int8")
    logging.setLoggerClass(kind)  # NNCF sets its own for the whole process
    nncf.set_log_level(logging.ERROR)
    return nncf


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let NNCF run networks with one thread; it would take every core, and other sums may give other last bits."""
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
