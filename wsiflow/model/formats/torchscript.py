"""TorchScript, a program that its author exported, and that can do anything: it runs only where settings trust it.

A program that consists of operations of ATen is converted to one of torch.export, which every backend can run, and
which can run over whole regions. Otherwise TorchScript runs it.
"""

import hashlib
import importlib.metadata
import io
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wsiflow.errors import InputError
from wsiflow.model.card import TORCHSCRIPT, ModelCard
from wsiflow.model.engines.cache import cache_folder, cached
from wsiflow.model.engines.spec import code_sha256
from wsiflow.model.formats import export
from wsiflow.model.formats.format import Format
from wsiflow.model.program import BATCH, TRACING
from wsiflow.system.publish import key_of

_logger = logging.getLogger(__name__)

#: The largest difference of outputs after a conversion, as a part of the largest output.
TOLERANCE = 1e-5
_N_IMAGES = 4
_SQUARES = 14  # along each side of the images on which a conversion is checked


def read(data: bytes, card: ModelCard, path: Path) -> nn.Module:
    """Return the program in a TorchScript file: converted if it can be, or as it is.

    The conversion takes seconds, and each worker loads the model, so the converted program is cached.

    Raises:
        InputError: The file is not TorchScript.
    """
    key = key_of(
        form=TORCHSCRIPT,
        program=hashlib.sha256(data).hexdigest(),
        card=[card.input_px, card.mean, card.std],
        code=code_sha256(),
        versions=importlib.metadata.version("torch"),
    )
    content = cached(cache_folder(), key, lambda: _converted(_loaded(data, path), card))
    return export.module_of(content, card.input_px) if content else _loaded(data, path)


def is_script(module: nn.Module) -> bool:
    """Return whether a network is, or contains, a program that TorchScript runs."""
    return any(isinstance(part, torch.jit.ScriptModule) for part in module.modules())


def _loaded(data: bytes, path: Path) -> torch.jit.ScriptModule:
    """Return the program as it is, in evaluation mode."""
    try:
        module: torch.jit.ScriptModule = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the file is not TorchScript: {str(error)[:200]}", "save the model with torch.jit.save", path=path
        ) from error
    return module.eval().float()


def _converted(script: torch.jit.ScriptModule, card: ModelCard) -> bytes:
    """Return the program as an archive of torch.export; empty if it cannot be converted."""
    try:
        content = _exported(script, card.input_px)
        _check(script, export.module_of(content, card.input_px), card)
    except (ImportError, InputError, *TRACING) as error:
        # The converter is not a public part of PyTorch, and a program may be more than operations on tensors.
        _logger.info(
            "the TorchScript program stays as it is: %s", str(error).splitlines()[0][:200] if str(error) else ""
        )
        return b""
    return content


def _exported(script: torch.jit.ScriptModule, side: int) -> bytes:
    """Return the program as an archive of torch.export."""
    from torch._export.converter import TS2EPConverter

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        converter = TS2EPConverter(script, (torch.zeros(BATCH, 3, side, side),))
        # Its own last step traces the network for images of any size, which takes ten times as long.
        converter.retrace_as_exported_program = lambda module, _: export.traced(module, side)  # type: ignore[assignment]
        program = converter.convert()
        outputs = script(torch.zeros(BATCH, 3, side, side))
        if isinstance(outputs, Mapping):  # of which the converter keeps the values alone
            return export.write(_Named(program.module(check_guards=False), tuple(outputs)), side)
        return export.packed(program)


class _Named(nn.Module):
    """A network that returns its outputs by their names."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, _tensors(self.module(x)), strict=True))


def _check(script: nn.Module, module: nn.Module, card: ModelCard) -> None:
    """Refuse a converted program whose outputs differ from those of the original, for several images or one.

    Raises:
        InputError: They differ.
    """
    generator = torch.Generator().manual_seed(0)
    squares = torch.rand((_N_IMAGES, 3, _SQUARES, _SQUARES), generator=generator)
    pixels = nn.functional.interpolate(squares, size=(card.input_px, card.input_px))
    pixels += 0.1 * torch.rand(pixels.shape, generator=generator)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (card.mean, card.std))
    images = ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        for batch in (images, images[:1]):
            outputs, others = script(batch), module(batch)
            expected, actual = _tensors(outputs), _tensors(others)
            names = [list(each) if isinstance(each, Mapping) else [] for each in (outputs, others)]
            if [each.shape for each in expected] != [each.shape for each in actual] or names[0] != names[1]:
                raise InputError("the converted program returns other outputs", "")
            for right, other in zip(expected, actual, strict=True):
                if not float((other - right).abs().max()) <= TOLERANCE * float(right.abs().max()):
                    raise InputError("the outputs of the converted program differ from those of the original", "")


def _tensors(outputs: Any) -> list[torch.Tensor]:
    """Return the outputs of a network as a list."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return list(outputs.values()) if isinstance(outputs, Mapping) else list(outputs)


FORMAT = Format(TORCHSCRIPT, read)
