"""The specification of an engine, and the functions that all backends need; nothing here imports PyTorch."""

import hashlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from wsiflow.errors import EnvironmentFault, InputError, WsiflowError
from wsiflow.system import machine as cores
from wsiflow.system.publish import key_of

if TYPE_CHECKING:
    from torch import nn

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
    """The backend that runs a network, and its number format."""

    backend: Backend
    precision: Precision


class Network(NamedTuple):
    """A module to run, and everything that decides its graph.

    Attributes:
        build: Function that builds the module in evaluation mode. It is only called if there is no converted graph in
            the cache, because building a network over whole regions takes seconds.
        key: Text that identifies the module: its structure, its weights and all other properties of it.
        example: An example of the module's input, which should be small, since the conversion runs the module on it.
        fixed: Whether all inputs have the shape of the example. Otherwise the lengths of the second and third axis, the
            height and width of pixels, are dynamic.
    """

    build: "Callable[[], nn.Module]"
    key: str
    example: NDArray[Any]
    fixed: bool


class Graph(NamedTuple):
    """A network that was converted for a backend: its key in the cache, and the input that it takes.

    Attributes:
        key: Key of its content in the cache, see `wsiflow.model.engines.cache`.
        shape: Shape of the example of its input.
        dtype: Name of the type of its input, as NumPy has it.
        fixed: As for `Network`.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    fixed: bool


@dataclass(frozen=True)
class CheckedEngine:
    """An engine that refuses inputs of another shape or dtype, which backends would convert or misinterpret."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fixed: bool
    run: Engine

    def __call__(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        """Return the network's output for an array."""
        dynamic_axes = () if self.fixed else (1, 2)
        fits = inputs.ndim == len(self.shape) and all(
            axis in dynamic_axes or actual == expected
            for axis, (actual, expected) in enumerate(zip(inputs.shape, self.shape, strict=True))
        )
        if not fits or inputs.dtype != self.dtype:
            raise WsiflowError(
                f"the network takes {self.dtype} {self.shape}, not {inputs.dtype} {inputs.shape}",
                "please report this",
                stage="predict",
            )
        return self.run(np.ascontiguousarray(inputs))


def check_spec(spec: EngineSpec) -> None:
    """Refuse a precision that the backend or this CPU does not support."""
    if spec.precision not in PRECISIONS[spec.backend]:
        able = [name for name, precisions in PRECISIONS.items() if spec.precision in precisions]
        raise InputError(
            f"backend {spec.backend} runs {' and '.join(PRECISIONS[spec.backend])}, not {spec.precision}",
            f"set inference.backend to {' or '.join(able)}, or inference.precision=fp32",
        )
    if spec.precision == "bf16" and not cores.cpu_supports_bf16():
        raise EnvironmentFault(
            "this CPU has no bfloat16 instructions (avx512_bf16 or amx_bf16), and emulation is slower than fp32",
            "set inference.precision=fp32, or run on a CPU that has them",
        )


def shape_of(graph: Graph) -> list[int]:
    """Return the shape for which a graph is compiled, with -1 for dynamic axes."""
    shape = list(graph.shape)
    return shape if graph.fixed else [shape[0], -1, -1, *shape[3:]]


def optional_package(name: str, extra: str) -> Any:
    """Return the module of an optional package.

    Args:
        name: Name of the package.
        extra: The extra of wsiflow that installs it, for the message.

    Raises:
        EnvironmentFault: The package cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        cause = f"the package {name} cannot be used: {error}"
        raise EnvironmentFault(cause, f"pip install 'wsiflow[{extra}]'") from error


def cannot_convert(form: str, error: Exception) -> InputError:
    """Return the error of a network that cannot be converted to the form of a backend."""
    cause = f"the network cannot be converted to {form}: {str(error)[:300]}"
    return InputError(cause, "set inference.backend=torch and inference.precision=fp32", stage="predict")


@cache
def code_sha256(package: str = "model") -> str:
    """Return the SHA-256 of the source code of a package of wsiflow.

    Args:
        package: Its path; `wsiflow.model` reads and converts networks.
    """
    code = hashlib.sha256()
    for path in sorted((Path(__file__).parents[2] / package).rglob("*.py")):
        code.update(path.read_bytes())
    return code.hexdigest()


def graph_of(network: Network, form: str) -> Graph:
    """Return what identifies the converted graph of a network: its key hashes all that decides its content.

    Args:
        network: The network.
        form: The package that defines the form of the graph, ``openvino`` or ``onnx``.
    """
    example = network.example
    key = key_of(
        form=form,
        network=network.key,
        example=[str(example.dtype), *example.shape],
        fixed=network.fixed,
        code=code_sha256(),
        versions={name: importlib.metadata.version(name) for name in ("torch", form)},
    )
    return Graph(key, example.shape, str(example.dtype), network.fixed)
