"""Image classifiers of the package transformers, which the extra ``wsiflow[hub]`` installs, as programs.

Input: what ``config.json`` says, and the weights. Output: a program of torch.export, so that the package is needed
where a model is added, and nowhere where it runs. Nothing is fetched, and no code that comes with a model is run.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.model.engines.spec import optional_package
from wsiflow.model.formats import export
from wsiflow.model.program import TRACING

# Keys of a configuration by which transformers would look for code or kernels elsewhere.
_ELSEWHERE = ("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal")
# What transformers reports of the weights, by its keys.
_PROBLEMS = {
    "missing_keys": "are missing",
    "unexpected_keys": "have no place in the network",
    "mismatched_keys": "are of another shape",
}
_SHOWN = 3


def is_classifier(kind: str, name: str) -> bool:
    """Return whether transformers has an image classifier.

    Args:
        kind: ``model_type`` of its configuration, as ``vit``.
        name: Name of the class, as ``ViTForImageClassification``.

    Raises:
        EnvironmentFault: transformers is not installed.
    """
    optional_package("transformers", "hub")
    classes = optional_package("transformers.models.auto.modeling_auto", "hub")
    names = classes.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(kind, ())
    return name in ((names,) if isinstance(names, str) else names)


def program(config: Mapping[str, Any], weights: dict[str, torch.Tensor], side: int) -> bytes:
    """Return an image classifier as a ``.pt2`` archive that returns its logits.

    Args:
        config: The content of ``config.json``; its first architecture `is_classifier`.
        weights: The weights by their names.
        side: Side of the images, px.

    Raises:
        InputError: The weights are not those of the network, or it cannot be exported.
        EnvironmentFault: transformers is not installed.
    """
    return export.write(_Logits(_network(config, weights)).eval(), side)


class _Logits(nn.Module):
    """A network of transformers that returns its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(x).logits
        return logits


def _network(config: Mapping[str, Any], weights: dict[str, torch.Tensor]) -> nn.Module:
    """Return the network of a configuration with its weights."""
    library = optional_package("transformers", "hub")
    library.logging.disable_progress_bar()
    library.logging.set_verbosity_error()  # what it would warn of is refused here
    name = config["architectures"][0]
    own = {key: value for key, value in config.items() if key not in _ELSEWHERE}
    try:
        settings = library.AutoConfig.for_model(**own)
        network, report = _class(library, name).from_pretrained(
            None,
            config=settings,
            state_dict=weights,
            dtype=torch.float32,  # weights may be stored in half precision, of which constants would be computed too
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except TRACING as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"{name} cannot be built from config.json and the weights: {reason}",
            "fetch the folder again, or use the version of transformers that config.json names",
        ) from error
    for keys, problem in _PROBLEMS.items():
        names = sorted(key if isinstance(key, str) else key[0] for key in report[keys])
        if names:
            raise InputError(
                f"the weights do not fit {name}: {len(names)} {problem} ({', '.join(names[:_SHOWN])})",
                "fetch the folder again: config.json and the weights are of different models",
            )
    return network  # type: ignore[no-any-return]


def _class(library: Any, name: str) -> Any:
    """Return a class of transformers, which imports it when its name is first used."""
    try:
        return getattr(library, name)
    except (ImportError, RuntimeError) as error:
        cause = f"the package transformers cannot be used: {str(error).splitlines()[0][:200]}"
        raise EnvironmentFault(cause, "install torchvision for the installed PyTorch, or remove it") from error
