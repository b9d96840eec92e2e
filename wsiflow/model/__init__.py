"""Classifiers: cards, architectures, loading and the engines that run them; the one place that knows torch.

Importing this package is cheap: torch, which takes seconds, is imported by what needs it.
"""

from typing import TYPE_CHECKING

from wsiflow.model.card import ModelCard, ModelSpec, read_card

if TYPE_CHECKING:
    from wsiflow.model.classifier import Classifier

__all__ = ["ModelCard", "ModelSpec", "load", "read_card"]


def load(spec: ModelSpec) -> "Classifier":
    """Load the classifier a run asks for; see `wsiflow.model.classifier.load`."""
    from wsiflow.model import classifier

    return classifier.load(spec)
