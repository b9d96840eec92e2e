"""Train the lymph node classifier on the patches of PatchCamelyon, and write its weights and card.

    python training/pcam.py --data ../shared/data --out wsiflow/model/weights --seed 0

Output: `pcam.safetensors` and `pcam.json`. It takes one process and some ten minutes on one core with bfloat16. With
``--tune`` a sixth of the training patches is held out for evaluation and nothing is written: recipes are compared
there, so that the validation patches are used only once, for the card.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from fit import Recipe, parsed, parser, scores, train, write
from numpy.typing import NDArray
from patches import Patches
from PIL import Image

from wsiflow.evaluation import roc
from wsiflow.model.architectures.registry import build

WINDOW_PX = 96
SPACING_UM_PX = 0.97
ARCHITECTURE_ARGS = {"width": 1.0, "dropout": 0.3}
CALIBRATION_BINS = 10


def read(data: Path, split: str) -> tuple[Patches, list[str]]:
    """Return the patches of a split and their names, sorted by name so that batches are reproducible."""
    folder = data / "patches" / "pcam" / split
    paths = sorted(folder.glob("[01]/*.webp"), key=lambda path: path.name)
    if not paths:
        sys.exit(f"{folder} holds no patches: --data names the folder that has patches/pcam/{split}/0 and 1")
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    labels = np.array([int(path.parent.name) for path in paths], np.int64)
    return Patches(np.stack(pixels), labels), [path.stem for path in paths]


def kept_back(names: list[str]) -> NDArray[np.bool_]:
    """Return bool (n,), which training patches are held out to choose a recipe: a sixth, by a hash of the name."""
    return np.array([hashlib.sha256(name.encode()).digest()[0] % 6 == 0 for name in names])


def measured(prob: NDArray[np.float64], labels: NDArray[np.int64]) -> str:
    """Return a sentence with AUC and DeLong's interval, accuracy, Brier score and expected calibration error.

    The expected calibration error (Naeini et al. 2015) is the mean gap between probability and share of tumour over ten
    bins of equal width, weighted by the number of patches in each.

    Args:
        prob: float64 (n,), probability of tumour of each patch.
        labels: int64 (n,), 1 for tumour.
    """
    low, high = roc.auc_interval(prob, labels)
    bins = np.minimum((prob * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gap = sum(abs(prob[bins == one].sum() - labels[bins == one].sum()) for one in range(CALIBRATION_BINS)) / len(prob)
    return (
        f"{len(prob)} patches, {labels.sum()} tumour: "
        f"AUC {roc.auc(prob, labels):.3f} (95 % {low:.3f} to {high:.3f}), "
        f"accuracy {np.mean((prob > 0.5) == labels):.3f} at 0.5, "
        f"Brier score {np.mean((prob - labels) ** 2):.3f}, expected calibration error {gap:.3f}."
    )


def notes(prob: NDArray[np.float64], labels: NDArray[np.int64]) -> str:
    """Return the notes of the network's card; arguments as for `measured`."""
    return (
        f"Held-out PatchCamelyon validation patches: {measured(prob, labels)} "
        "The splits are not by slide: patches of one slide, which share its stain, can be on both sides, so these "
        "numbers are optimistic for slides of another laboratory. A patch counts as tumour where its middle 32 px hold "
        "any. Spacing matters: the patches are at 0.97 um/px, and at others the answers are not to be trusted. "
        "For tests and teaching, not for any clinical use."
    )


def main() -> None:
    """Train, evaluate and write the network."""
    options = parser(__doc__ or "", steps=2000)
    options.add_argument("--rate", type=float, default=4e-3, help="highest learning rate")
    options.add_argument("--tune", action="store_true", help="measure on a sixth of the patches, write nothing")
    given = parsed(options)
    known, names = read(given.data, "train")
    if given.tune:
        back = kept_back(names)
        known, test = Patches(known.pixels[~back], known.labels[~back]), Patches(known.pixels[back], known.labels[back])
    else:
        test, _ = read(given.data, "val")
    torch.manual_seed(given.seed)
    net = build("compact_valid", 2, **ARCHITECTURE_ARGS)
    recipe = Recipe(given.steps, (64,), rate=given.rate, clip=5.0, bf16=True, seed=given.seed, window_px=WINDOW_PX)
    net = train(net, [known], recipe)
    prob = scores(net, test, WINDOW_PX)
    if given.tune:
        print(f"held out: {measured(prob, test.labels)}")
        return
    about = notes(prob, test.labels)
    print(about)
    fields = {
        "name": "pcam",
        "architecture": "compact_valid",
        "architecture_args": ARCHITECTURE_ARGS,
        "window_px": WINDOW_PX,
        "spacing_um_px": SPACING_UM_PX,
        "trained_on": (
            f"{len(known.labels)} training patches of PatchCamelyon (CC0; Veeling et al., 2018, from CAMELYON16, "
            "Radboud University Medical Center), "
            f"{given.steps} batches of 64, seed {given.seed}"
        ),
        "notes": about,
    }
    write(net, fields, given.out)


if __name__ == "__main__":
    main()
