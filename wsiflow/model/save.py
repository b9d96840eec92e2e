"""Saving of a trained network as weights and model card, which `wsiflow.model.load` reads.

Input: a network of the registry. Output: two files in one folder, ``<name>.safetensors`` and ``<name>.json``.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from torch import nn

from wsiflow.model.card import ModelCard, Probe
from wsiflow.model.classifier import Classifier, as_classifier, probabilities, probe_image

N_CANDIDATES = 16  # a large network takes a second for each
N_PROBES = 3
_USUAL_PX = 224


def save(module: nn.Module, fields: Mapping[str, Any], folder: Path) -> Path:
    """Write the weights and the card of a network; existing files of the same names are replaced.

    Args:
        module: A trained network; it is put into evaluation mode.
        fields: The fields of `ModelCard` except ``weights``, ``sha256`` and ``probe``, which are computed here.
        folder: An existing folder.

    Returns:
        The path of the card.

    Raises:
        pydantic.ValidationError: The fields are not those of a valid card.
    """
    weights = safetensors.torch.save({key: tensor.contiguous() for key, tensor in module.state_dict().items()})
    file_name = f"{fields['name']}.safetensors"
    bare = ModelCard(**fields, weights=file_name, sha256=hashlib.sha256(weights).hexdigest(), probe=())
    card = bare.model_copy(update={"probe": probes(as_classifier(module, bare))})
    (folder / file_name).write_bytes(weights)
    return write_card(card, folder)


def write_card(card: ModelCard, folder: Path) -> Path:
    """Write a card into the folder of its weights, and return its path; what it does not say is left out."""
    path = folder / f"{card.name}.json"
    path.write_text(json.dumps(card.model_dump(mode="json", exclude_defaults=True), indent=2) + "\n", encoding="utf-8")
    return path


def probes(classifier: Classifier) -> tuple[Probe, ...]:
    """Return the probes for which the classifier is least certain, since saturated probabilities hide a wrong mean."""
    # Large windows take seconds each, and a few show a wrong card as well.
    n = max(N_PROBES, min(N_CANDIDATES, N_CANDIDATES * _USUAL_PX**2 // classifier.input_px**2))
    images = (probe_image(seed, classifier.window_px)[None] for seed in range(n))
    answers = np.concatenate([probabilities(classifier, image) for image in images])
    unsure = np.argsort(answers.max(axis=1), kind="stable")[:N_PROBES]
    return tuple(Probe(seed=int(seed), probabilities=tuple(answers[seed].tolist())) for seed in unsure)
