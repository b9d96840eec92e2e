"""What is asked of an engine, and what every backend needs."""

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from wsiflow.errors import EnvironmentFault, InputError, WsiflowError
from wsiflow.system import machine as cores
from wsiflow.system.publish import key_of

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
        build: Makes the module, in evaluation mode. To make it takes seconds for a network over whole regions, and
            where its converted graph is kept nobody needs it.
        key: Names the module: its structure, its weights and everything else in which two modules may differ.
        example: An array the module takes; a small one, since converting runs the module on it.
        fixed: All arrays have the example's shape. Otherwise the second and third axis may have any length the module
            takes: height and width of pixels.
    """

    build: Callable[[], nn.Module]
    key: str
    example: NDArray[Any]
    fixed: bool


def cpu_supports_bf16() -> bool:
    """Return whether this CPU multiplies bfloat16 numbers itself.

    OpenVINO emulates them elsewhere without a word: three times slower than in 32 bit (measured with AVX512 alone).
    """
    return bool(cores.cpu_flags() & {"avx512_bf16", "amx_bf16"})


@dataclass(frozen=True)
class CheckedEngine:
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


def check_spec(spec: EngineSpec) -> None:
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


def shape_of(network: Network) -> list[int]:
    """Return the shape a network is compiled for, -1 where it stays open."""
    shape = list(network.example.shape)
    return shape if network.fixed else [shape[0], -1, -1, *shape[3:]]


def optional_package(name: str, extra: str) -> Any:
    """Return an optional package."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        cause = f"the package {name} cannot be used: {error}"
        raise EnvironmentFault(cause, f"pip install 'wsiflow[{extra}]'") from error


def cannot_convert(form: str, error: Exception) -> InputError:
    """Return the error of a network that a backend cannot take."""
    cause = f"the network cannot be converted to {form}: {str(error)[:300]}"
    return InputError(cause, "set inference.backend=torch and inference.precision=fp32", stage="predict")


@cache
def code_sha256() -> str:
    """Return the hash of the code that reads and converts networks."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return code.hexdigest()


def graph_key(network: Network, form: str) -> str:
    """Return the hash of what decides a converted graph: the network, and the code and packages that convert it."""
    return key_of(
        form=form,
        network=network.key,
        example=[str(network.example.dtype), *network.example.shape],
        fixed=network.fixed,
        code=code_sha256(),
        versions={name: importlib.metadata.version(name) for name in ("torch", form)},
    )
