"""Classifiers and the engines that run them: cards, architectures, loading, certificates; the only package with torch.

Importing this package is cheap: torch, which takes seconds to import, is imported by the modules that need it.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from wsiflow.model.add import from_module
    from wsiflow.model.card import ModelCard, ModelSpec, read_card
    from wsiflow.model.choice import Choice
    from wsiflow.model.classifier import Classifier, load

__all__ = ["Choice", "Classifier", "ModelCard", "ModelSpec", "from_module", "load", "read_card"]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "add": ["from_module"],
        "card": ["ModelCard", "ModelSpec", "read_card"],
        "choice": ["Choice"],
        "classifier": ["Classifier", "load"],
    },
)
