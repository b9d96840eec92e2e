"""Train the demo network on synthetic and real patches, and write its weights and card.

    python training/train_demonet.py --data ../shared/data --out wsiflow/model/weights --seed 0

Input: `wsiflow.synthetic` for as many drawn patches as asked, and two folders of real ones (`--data`, see README.md).
Output: `demonet.safetensors` and `demonet.json`. One process, some five minutes on one core.

Real patches are held out by slide where their names tell the slide, else by a hash of the name: see `held_out`.
"""

import argparse
import hashlib
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from wsiflow import roc, synthetic
from wsiflow.model.architectures import build
from wsiflow.model.save import save

WINDOW_PX = 224
PATCH_PX = 256
MEAN, STD = (0.7, 0.55, 0.7), (0.2, 0.22, 0.18)
FOLDERS = ("patches/camelyon16_256", "patches/dldp_256")
HELD_OUT_SLIDE = "tumor_073"
ARCHITECTURE_ARGS = {"dropout": 0.2}


class Patches(NamedTuple):
    """Labelled squares: pixels n x PATCH_PX x PATCH_PX x 3 (RGB, uint8) and labels n (1 = tumour)."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def held_out(path: Path) -> bool:
    """Tell whether a real patch is kept for testing: one slide of three, or a third of the names by their hash."""
    slide = re.match(r"(tumor|normal)_\d+", path.name)
    if slide:
        return slide.group() == HELD_OUT_SLIDE
    return hashlib.sha256(path.stem.encode()).digest()[0] % 3 == 0


def read_real(data: Path, *, test: bool, folders: Sequence[str] = FOLDERS) -> Patches:
    """Read the real patches of one side of the split; a file that cannot be decoded is named and left out."""
    pixels, labels = [], []
    for path in sorted(path for folder in folders for path in (data / folder).glob("*/*.*")):
        if held_out(path) != test:
            continue
        try:  # Pillow refuses a truncated file, where OpenCV would return the part that is there
            with Image.open(path) as image:
                pixels.append(np.asarray(image.convert("RGB")))
        except OSError as error:
            print(f"left out: {path.relative_to(data)}: {error}")
            continue
        labels.append(int(path.parent.name == "tumor"))
    return Patches(np.stack(pixels).astype(np.uint8), np.array(labels))


def draw_synthetic(n: int, seed: int) -> Patches:
    """Draw n synthetic patches, half of them tumour, each of a slide of its own."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    drawn = [synthetic.patch(rng, tumour=bool(label), size_px=PATCH_PX) for label in labels]
    return Patches(np.stack(drawn), labels.astype(np.int64))


def glass(n: int, seed: int) -> Patches:
    """Draw n patches of empty slide: not tumour."""
    rng = np.random.default_rng(seed)
    colour = rng.uniform(225, 250, (n, 1, 1, 1)) + rng.uniform(-4, 4, (n, 1, 1, 3))
    noise = rng.normal(0, rng.uniform(0.5, 4, (n, 1, 1, 1)), (n, PATCH_PX, PATCH_PX, 3))
    return Patches(np.clip(colour + noise, 0, 255).astype(np.uint8), np.zeros(n, np.int64))


def jitter(images: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Cut a window at a random place, turn and flip it, and change its stain and brightness."""
    windows = []
    for image in images:
        x, y = rng.integers(0, PATCH_PX - WINDOW_PX + 1, 2)
        window = np.rot90(image[y : y + WINDOW_PX, x : x + WINDOW_PX], int(rng.integers(4)))
        window = window[:, ::-1] if rng.random() < 0.5 else window
        gain, offset = rng.uniform(0.7, 1.35) * rng.uniform(0.88, 1.12, 3), rng.uniform(-0.03, 0.03, 3)
        # a stain's strength scales optical density: one curve for each channel
        density = -np.log((np.arange(256)[:, None] + 1) / 256) * gain + offset
        curve = np.clip(256 * np.exp(-density) - 1, 0, 255).astype(np.uint8)
        window = np.stack([curve[window[..., channel], channel] for channel in range(3)], axis=-1)
        windows.append(cv2.GaussianBlur(window, (0, 0), rng.uniform(0.4, 1.4)) if rng.random() < 0.3 else window)
    return np.stack(windows)


def normalised(images: NDArray[np.uint8]) -> torch.Tensor:
    """Return the network's input for RGB images n x h x w x 3."""
    scaled = (images.astype(np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32))


def batch(sources: list[tuple[Patches, int]], rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw so many patches of each source, both classes alike where it has both, changed by `jitter`."""
    images, labels = [], []
    for patches, n in sources:
        classes = np.unique(patches.labels)
        wanted = classes[np.arange(n) % len(classes)]
        chosen = [int(rng.choice(np.flatnonzero(patches.labels == label))) for label in wanted]
        images.append(jitter(patches.pixels[chosen], rng))
        labels.append(wanted)
    return normalised(np.concatenate(images)), torch.from_numpy(np.concatenate(labels))


def train(sources: list[tuple[Patches, int]], steps: int, seed: int) -> nn.Module:
    """Train the network from random weights; the sources say how many patches of each make a batch."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    net: nn.Module = build("demonet", 2, **ARCHITECTURE_ARGS).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=steps, pct_start=0.2)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.03)
    start, mean_loss = time.perf_counter(), 0.7
    for step in range(1, steps + 1):
        images, labels = batch(sources, rng)
        optimiser.zero_grad()
        loss = loss_of(net(images.to(memory_format=torch.channels_last)), labels)
        loss.backward()
        optimiser.step()
        schedule.step()
        mean_loss += 0.03 * (loss.item() - mean_loss)
        if step % 50 == 0:
            print(f"step {step}/{steps}, loss {mean_loss:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    return net.eval()


def scores(net: nn.Module, patches: Patches) -> NDArray[np.float64]:
    """Return the probability of tumour in the middle window of each patch."""
    margin = (PATCH_PX - WINDOW_PX) // 2
    middle = patches.pixels[:, margin : margin + WINDOW_PX, margin : margin + WINDOW_PX]
    with torch.inference_mode():
        parts = [net(normalised(middle[i : i + 64])).softmax(dim=1)[:, 1] for i in range(0, len(middle), 64)]
    return torch.cat(parts).numpy().astype(np.float64)


def paleness(patches: Patches) -> NDArray[np.float64]:
    """Return the 5th percentile of green: what can be told of a patch without any network."""
    return np.percentile(patches.pixels[..., 1], 5, axis=(1, 2)).astype(np.float64)


def report(net: nn.Module, data: Path, seed: int) -> str:
    """Measure the network on what it has not seen, beside one plain pixel statistic, and say so for its card."""
    drawn = draw_synthetic(400, seed + 1_000_000)
    accuracy = float(np.mean((scores(net, drawn) > 0.5) == drawn.labels))
    lines = [f"Freshly drawn synthetic patches ({len(drawn.labels)}): accuracy {accuracy:.3f}."]
    for folders, about in ((FOLDERS, "all"), *(((folder,), Path(folder).name) for folder in FOLDERS)):
        real = read_real(data, test=True, folders=folders)
        auc, pale = (roc.auc(found, real.labels) for found in (scores(net, real), paleness(real)))
        low, high = roc.auc_interval(scores(net, real), real.labels)
        lines.append(
            f"Held-out real patches, {about} ({len(real.labels)}, {int(real.labels.sum())} tumour): "
            f"AUC {auc:.3f} (95 % {low:.2f} to {high:.2f}); the 5th percentile of green alone: {pale:.3f}."
        )
    lines.append(
        f"Only dldp_256 is held out by slide, and it is one slide ({HELD_OUT_SLIDE}). Much of the real AUC is that "
        "tumour patches are paler. A demonstration, not for any clinical use."
    )
    return " ".join(lines)


def main() -> None:
    """Train, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds patches/")
    parser.add_argument("--out", type=Path, required=True, help="folder to write weights and card to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1200, help="batches of 52 patches")
    parser.add_argument("--synthetic", type=int, default=1600, help="synthetic patches to draw")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cv2.setNumThreads(1)
    real = read_real(given.data, test=False)
    print(f"{len(real.labels)} real patches to train on, {int(real.labels.sum())} of them tumour")
    sources = [(real, 24), (draw_synthetic(given.synthetic, given.seed), 24), (glass(64, given.seed), 4)]
    net = train(sources, given.steps, given.seed)
    notes = report(net, given.data, given.seed)
    print(notes)
    fields = {
        "name": "demonet",
        "architecture": "demonet",
        "architecture_args": ARCHITECTURE_ARGS,
        "class_names": ("normal", "tumor"),
        "positive_class": "tumor",
        "window_px": WINDOW_PX,
        "input_px": WINDOW_PX,
        "spacing_um_px": synthetic.UM_PX,
        "mean": MEAN,
        "std": STD,
        "licence": "Apache-2.0",
        "trained_on": (
            f"{given.synthetic} synthetic patches of wsiflow.synthetic; {len(real.labels)} patches of CAMELYON16 "
            "lymph node slides (CC0, Radboud University Medical Center; some by way of DIDSR/dldp)"
        ),
        "notes": notes,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    print(save(net, fields, given.out))


if __name__ == "__main__":
    main()
