"""What runs a network: OpenVINO, ONNX Runtime or PyTorch itself, in 32 bit, bfloat16 or 8 bit.

Input: a torch module and an array it takes, mostly pixels, uint8 (n, h, w, 3). Output: an `Engine`, a function from
such arrays to float32 arrays. PyTorch in 32 bit is the measure of the others. Converting a network takes seconds, so
the converted graph is kept in a folder under a hash of all that decides it.

Bits depend on the array, the network, backend, precision, threads and the numeric class (`wsiflow.system.machine`), and
not on arrays that came before: graphs whose height and width stay open give the bits of graphs compiled for one shape.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import nn

from wsiflow.errors import EnvironmentFault, InputError, WsiflowError
from wsiflow.model.classifier import Classifier
from wsiflow.model.engines.cache import cache_folder, cached
from wsiflow.model.engines.pixels import FromPixels, WindowScores
from wsiflow.system import machine as cores
from wsiflow.system.publish import key_of

__all__ = [
    "PRECISIONS",
    "Backend",
    "Engine",
    "EngineSpec",
    "Network",
    "Precision",
    "available",
    "cache_folder",
    "choose",
    "converts",
    "cpu_supports_bf16",
    "prepare",
    "quantise",
    "scores_from_pixels",
]

Backend = Literal["torch", "openvino", "onnxruntime"]
Precision = Literal["fp32", "bf16", "int8"]
Engine = Callable[[NDArray[Any]], NDArray[np.float32]]
Candidate = TypeVar("Candidate")

PRECISIONS: dict[str, tuple[str, ...]] = {
    "openvino": ("fp32", "bf16", "int8"),
    "onnxruntime": ("fp32",),
    "torch": ("fp32", "bf16"),
}


class EngineSpec(NamedTuple):
    """What runs a network and in which number format."""

    backend: Backend
    precision: Precision


class Network(NamedTuple):
    """A module to run, and what decides its graph.

    Attributes:
        module: The module, in evaluation mode.
        key: Names the weights and everything else in which two modules of one structure may differ.
        example: An array the module takes; a small one, since converting runs the module on it.
        fixed: All arrays have the example's shape. Otherwise the second and third axis may have any length the module
            takes: height and width of pixels.
    """

    module: nn.Module
    key: str
    example: NDArray[Any]
    fixed: bool


def scores_from_pixels(classifier: Classifier, body: nn.Module | None = None) -> nn.Module:
    """Return the module from pixels, uint8 (n, h, w, 3), to scores.

    Args:
        classifier: Says how pixels are normalised.
        body: Normalised pixels, float32 (n, 3, h, w), to scores. None: the classifier's own network, for windows of
            window_px, to float32 (n,).
    """
    return FromPixels(classifier, body or WindowScores(classifier)).eval()


def converts(classifier: Classifier) -> bool:
    """Return whether backends other than PyTorch run a classifier and give its probabilities.

    They round resized windows differently, by a grey level, and TorchScript may hold what they do not know.
    """
    return classifier.input_px == classifier.window_px and not isinstance(classifier.module, torch.jit.ScriptModule)


def available() -> tuple[Backend, ...]:
    """Return the backends that are installed, the fastest first as a rule."""
    needed: dict[Backend, tuple[str, ...]] = {
        "openvino": ("openvino",),
        "onnxruntime": ("onnx", "onnxruntime"),
        "torch": ("torch",),
    }
    return tuple(name for name, packages in needed.items() if all(map(importlib.util.find_spec, packages)))


def cpu_supports_bf16() -> bool:
    """Return whether this CPU multiplies bfloat16 numbers itself.

    OpenVINO emulates them elsewhere without a word: three times slower than in 32 bit (measured with AVX512 alone).
    """
    return bool(cores.cpu_flags() & {"avx512_bf16", "amx_bf16"})


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
    _check_spec(spec)
    if spec.backend == "torch":
        run = _torch(network, spec)
    elif spec.backend == "openvino":
        run = _openvino(network, spec, threads, cache, quantised)
    else:
        run = _onnxruntime(network, threads, cache)
    return _Checked(network.example.shape, network.example.dtype, network.fixed, run)


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
    model.reshape(_shape(network))
    with _one_thread(), contextlib.redirect_stdout(io.StringIO()):  # progress bars
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


def choose(
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


@dataclass(frozen=True)
class _Checked:
    """An engine that refuses arrays it was not made for; backends would convert or read them as something else."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fixed: bool
    run: Engine

    def __call__(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        """Return what the network makes of an array."""
        open_axes = () if self.fixed else (1, 2)
        fits = inputs.ndim == len(self.shape) and all(
            axis in open_axes or found == wanted
            for axis, (found, wanted) in enumerate(zip(inputs.shape, self.shape, strict=True))
        )
        if not fits or inputs.dtype != self.dtype:
            raise WsiflowError(
                f"the network was made for {self.dtype} {self.shape}, not for {inputs.dtype} {inputs.shape}",
                "please report this",
                stage="predict",
            )
        return self.run(np.ascontiguousarray(inputs))


def _check_spec(spec: EngineSpec) -> None:
    """Refuse what a backend or this CPU does not have."""
    if spec.precision not in PRECISIONS[spec.backend]:
        able = [name for name, precisions in PRECISIONS.items() if spec.precision in precisions]
        raise InputError(
            f"backend {spec.backend} runs {' and '.join(PRECISIONS[spec.backend])}, not {spec.precision}",
            f"set inference.backend to {' or '.join(able)}, or inference.precision=fp32",
        )
    if spec.precision == "bf16" and not cpu_supports_bf16():
        raise EnvironmentFault(
            "this CPU has no bfloat16 products (avx512_bf16 or amx_bf16); emulated they are slower than fp32",
            "set inference.precision=fp32, or run on a CPU that has them",
        )


def _shape(network: Network) -> list[int]:
    """Return the shape a network is compiled for, -1 where it stays open."""
    shape = list(network.example.shape)
    return shape if network.fixed else [shape[0], -1, -1, *shape[3:]]


def _torch(network: Network, spec: EngineSpec) -> Engine:
    """Return the module itself; images keep their memory order, which is channels last."""

    def run(inputs: NDArray[Any]) -> NDArray[np.float32]:
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=spec.precision == "bf16")
        with torch.inference_mode(), autocast:
            # torch.tensor copies, so that a read-only array serves as well.
            return np.asarray(network.module(torch.tensor(inputs)).float().numpy(), np.float32)

    return run


@functools.cache
def _core() -> Any:
    """Return OpenVINO's core, one for the process."""
    # OpenVINO reports its use over the network as soon as it is imported, and NNCF likewise. Without this package both
    # fall back on stand-ins that do nothing; no consent file is looked for in the user's home.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino.Core()


def _openvino(network: Network, spec: EngineSpec, threads: int, cache: Path | None, quantised: bytes | None) -> Engine:
    """Return a network compiled by OpenVINO."""
    if (spec.precision == "int8") != (quantised is not None):
        raise WsiflowError("int8 and a calibrated network go together", "please report this")
    model = _read(quantised or _converted(network, cache))
    # With height and width open the first call for a shape costs some 7 % more than later ones (measured on blocks of
    # GoogLeNet in bfloat16); compiling for each shape would cost 30 %, and keep memory for each.
    model.reshape(_shape(network))
    request = _core().compile_model(model, "CPU", _options(spec, threads)).create_infer_request()

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
    _core()
    import openvino

    def convert() -> bytes:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, about shapes that are constants on purpose
            try:
                # Tracing runs the network in PyTorch: a whole batch would take as much memory as all the rest.
                model = openvino.convert_model(network.module, example_input=torch.tensor(network.example[:2]))
            except (RuntimeError, openvino.frontend.OpConversionFailure) as error:
                raise _cannot_convert("OpenVINO", error) from error
        return _packed(model)

    return cached(cache, _graph_key(network, "openvino"), convert)


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
    return _core().read_model(parts["xml"].tobytes(), parts["bin"].tobytes())


def _nncf() -> Any:
    """Return NNCF, quiet."""
    _core()
    kind = logging.getLoggerClass()
    nncf = _package("nncf", "int8")
    logging.setLoggerClass(kind)  # NNCF sets its own for the whole process
    nncf.set_log_level(logging.ERROR)
    return nncf


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
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


def _onnxruntime(network: Network, threads: int, cache: Path | None) -> Engine:
    """Return a network run by ONNX Runtime."""
    # Its Linux builds report their use over the network and keep a number for the machine in the user's home.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    ort = _package("onnxruntime", "onnxruntime")
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
    """Return the ONNX graph of a network."""
    _package("onnx", "onnxruntime")
    open_axes = {} if network.fixed else {"inputs": {1: "rows", 2: "cols"}}

    def export() -> bytes:
        stream = io.BytesIO()
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, and that this exporter is the older one
            try:
                # The newer one takes ten times as long and warns on standard error.
                torch.onnx.export(
                    network.module,
                    (torch.tensor(network.example),),
                    stream,  # type: ignore[arg-type]
                    dynamo=False,
                    input_names=["inputs"],
                    output_names=["outputs"],
                    dynamic_axes=open_axes,
                )
            except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
                raise _cannot_convert("ONNX", error) from error
        return stream.getvalue()

    return cached(cache, _graph_key(network, "onnx"), export)


def _package(name: str, extra: str) -> Any:
    """Return an optional package."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        cause = f"the package {name} cannot be used: {error}"
        raise EnvironmentFault(cause, f"pip install 'wsiflow[{extra}]'") from error


def _cannot_convert(form: str, error: Exception) -> InputError:
    """Return the error of a network that a backend cannot take."""
    cause = f"the network cannot be converted to {form}: {str(error)[:300]}"
    return InputError(cause, "set inference.backend=torch and inference.precision=fp32", stage="predict")


def _graph_key(network: Network, form: str) -> str:
    """Return the hash of what decides a converted graph: the network, and the code and packages that convert it."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return key_of(
        form=form,
        network=network.key,
        module=repr(network.module),
        example=[str(network.example.dtype), *network.example.shape],
        fixed=network.fixed,
        code=code.hexdigest(),
        versions={name: importlib.metadata.version(name) for name in ("torch", form)},
    )
