"""Provide labelled patches for training and testing: real patches, synthetic ones and empty glass, and batches of them.

Input: `wsiflow.slides.synthetic.tissue` for synthetic patches, and folders of real patches (see README.md). Output: RGB
squares of 256 px with labels, or normalised batches of 224 px windows.

Real patches are held out by slide where their names state the slide, else by a hash of the name: see
`wsiflow.slides.synthetic.atlas.part_of`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from wsiflow.slides.synthetic import tissue
from wsiflow.slides.synthetic.atlas import HELD_OUT_SLIDE as HELD_OUT_SLIDE
from wsiflow.slides.synthetic.atlas import PATCH_FOLDERS as FOLDERS
from wsiflow.slides.synthetic.atlas import PATCH_PX as PATCH_PX
from wsiflow.slides.synthetic.atlas import part_of

WINDOW_PX = 224
MEAN, STD = (0.7, 0.55, 0.7), (0.2, 0.22, 0.18)


class Patches(NamedTuple):
    """Labelled patches: pixels, uint8 (n, side, side, 3), RGB; and labels, int64 (n,), 1 for tumour."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def read_real(data: Path, *, test: bool, folders: Sequence[str] = FOLDERS) -> Patches:
    """Read the real patches of the training or the test part; a file that cannot be decoded is printed and left out."""
    pixels, labels = [], []
    for path in sorted(path for folder in folders for path in (data / folder).glob("*/*.*")):
        if (part_of(path.stem) == "test") != test:
            continue
        try:  # Pillow refuses a truncated file, where OpenCV would return its readable part
            with Image.open(path) as image:
                pixels.append(np.asarray(image.convert("RGB")))
        except OSError as error:
            print(f"left out: {path.relative_to(data)}: {error}")
            continue
        labels.append(int(path.parent.name == "tumor"))
    return Patches(np.stack(pixels).astype(np.uint8), np.array(labels))


def draw_synthetic(n: int, seed: int) -> Patches:
    """Draw ``n`` synthetic patches, half of them tumour, each with the appearance of a different slide."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    drawn = [tissue.patch(rng, tumour=bool(label), size_px=PATCH_PX) for label in labels]
    return Patches(np.stack(drawn), labels.astype(np.int64))


def glass(n: int, seed: int) -> Patches:
    """Draw ``n`` patches of empty glass, labelled as normal."""
    rng = np.random.default_rng(seed)
    colour = rng.uniform(225, 250, (n, 1, 1, 1)) + rng.uniform(-4, 4, (n, 1, 1, 3))
    noise = rng.normal(0, rng.uniform(0.5, 4, (n, 1, 1, 1)), (n, PATCH_PX, PATCH_PX, 3))
    return Patches(np.clip(colour + noise, 0, 255).astype(np.uint8), np.zeros(n, np.int64))


def jitter(images: NDArray[np.uint8], rng: np.random.Generator, window_px: int) -> NDArray[np.uint8]:
    """Augment images: cut a random window, rotate and flip it, and change its stain, brightness and focus."""
    windows = []
    for image in images:
        x, y = rng.integers(0, len(image) - window_px + 1, 2)
        window = np.rot90(image[y : y + window_px, x : x + window_px], int(rng.integers(4)))
        window = window[:, ::-1] if rng.random() < 0.5 else window
        gain, offset = rng.uniform(0.7, 1.35) * rng.uniform(0.88, 1.12, 3), rng.uniform(-0.03, 0.03, 3)
        # a stain's strength scales optical density: one curve for each channel
        density = -np.log((np.arange(256)[:, None] + 1) / 256) * gain + offset
        curve = np.clip(256 * np.exp(-density) - 1, 0, 255).astype(np.uint8)
        window = np.stack([curve[window[..., channel], channel] for channel in range(3)], axis=-1)
        windows.append(cv2.GaussianBlur(window, (0, 0), rng.uniform(0.4, 1.4)) if rng.random() < 0.3 else window)
    return np.stack(windows)


def normalised(images: NDArray[np.uint8]) -> torch.Tensor:
    """Return the input of the network, float32 (n, 3, h, w), for RGB images, uint8 (n, h, w, 3)."""
    scaled = (images.astype(np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32))


def batch(
    sources: list[tuple[Patches, int]], rng: np.random.Generator, window_px: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a batch: a number of patches of each source, balanced between its classes, and augmented by `jitter`."""
    images, labels = [], []
    for patches, n in sources:
        classes = np.unique(patches.labels)
        drawn = classes[np.arange(n) % len(classes)]
        chosen = [int(rng.choice(np.flatnonzero(patches.labels == label))) for label in drawn]
        images.append(jitter(patches.pixels[chosen], rng, window_px))
        labels.append(drawn)
    return normalised(np.concatenate(images)), torch.from_numpy(np.concatenate(labels))
