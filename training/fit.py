"""Train a network of the registry on patches, evaluate it, and write its weights and card.

Input: a network with random weights and the folder of real patches. Output: ``<name>.safetensors`` and ``<name>.json``.
Training runs in one process; the same seed, data and number of threads on one machine give the same weights.
"""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from patches import (
    FOLDERS,
    HELD_OUT_SLIDE,
    MEAN,
    STD,
    WINDOW_PX,
    Patches,
    batch,
    draw_synthetic,
    glass,
    normalised,
    read_real,
)
from torch import nn

from wsiflow.evaluation import roc
from wsiflow.model.save import save
from wsiflow.slides.synthetic import tissue

SYNTHETIC = 1600  # patches to draw


class Recipe(NamedTuple):
    """Hyperparameters of the training.

    Attributes:
        steps: Number of batches.
        mixture: Number of patches of each source in a batch.
        rate: Highest learning rate, reached after a fifth of the steps.
        clip: Largest norm of the gradient; larger gradients are scaled down to it.
        bf16: Whether layers compute in bfloat16, weights staying float32; twice as fast where the CPU has it.
        seed: Seed of weights, dropout and batches.
        window_px: Side of the windows cut from the patches.
    """

    steps: int
    mixture: tuple[int, ...]
    rate: float
    clip: float
    bf16: bool
    seed: int
    window_px: int = WINDOW_PX


def parser(about: str, *, steps: int) -> argparse.ArgumentParser:
    """Return a parser of the arguments of every training script; ``about`` is its description."""
    options = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True, help="folder that holds patches/")
    options.add_argument("--out", type=Path, required=True, help="folder to write weights and card to")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--steps", type=int, default=steps, help="number of batches")
    options.add_argument("--threads", type=int, default=1)
    return options


def parsed(options: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, and set the number of threads of torch and OpenCV."""
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    cv2.setNumThreads(1)
    return given


def train(net: nn.Module, sources: list[Patches], recipe: Recipe) -> nn.Module:
    """Train a network from its present weights; ``sources`` are in the order of the recipe's mixture."""
    rng = np.random.default_rng([recipe.seed, 1])
    net = net.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(net.parameters(), lr=recipe.rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=recipe.rate, total_steps=recipe.steps, pct_start=0.2
    )
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.03)
    start, mean_loss = time.perf_counter(), 0.7
    for step in range(1, recipe.steps + 1):
        images, labels = batch(list(zip(sources, recipe.mixture, strict=True)), rng, recipe.window_px)
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            logits = net(images.to(memory_format=torch.channels_last))
        loss = loss_of(logits.float(), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), recipe.clip)
        optimiser.step()
        schedule.step()
        mean_loss += 0.03 * (loss.item() - mean_loss)
        if step % 50 == 0:
            print(f"step {step}/{recipe.steps}, loss {mean_loss:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    return net.eval()


def scores(net: nn.Module, patches: Patches, window_px: int = WINDOW_PX) -> NDArray[np.float64]:
    """Return float64 (n,), the probability of tumour in the central window of each patch."""
    margin = (patches.pixels.shape[1] - window_px) // 2
    middle = patches.pixels[:, margin : margin + window_px, margin : margin + window_px]
    with torch.inference_mode():
        parts = [net(normalised(middle[i : i + 64])).softmax(dim=1)[:, 1] for i in range(0, len(middle), 64)]
    return torch.cat(parts).numpy().astype(np.float64)


def paleness(patches: Patches) -> NDArray[np.float64]:
    """Return float64 (n,), the 5th percentile of green of each patch, a baseline that needs no network."""
    return np.percentile(patches.pixels[..., 1], 5, axis=(1, 2)).astype(np.float64)


def report(net: nn.Module, data: Path, seed: int) -> str:
    """Evaluate a network on held-out patches, beside the baseline of `paleness`, and return the text for its card."""
    drawn = draw_synthetic(400, seed + 1_000_000)
    accuracy = float(np.mean((scores(net, drawn) > 0.5) == drawn.labels))
    lines = [f"Freshly drawn synthetic patches ({len(drawn.labels)}): accuracy {accuracy:.3f}."]
    for folders, about in ((FOLDERS, "all"), *(((folder,), Path(folder).name) for folder in FOLDERS)):
        real = read_real(data, test=True, folders=folders)
        prob, tumour = scores(net, real), real.labels == 1
        low, high = roc.auc_interval(prob, real.labels)
        lines.append(
            f"Held-out real patches, {about} ({tumour.size}, {tumour.sum()} tumour): "
            f"AUC {roc.auc(prob, real.labels):.3f} (95 % {low:.2f} to {high:.2f}), "
            f"{(prob[tumour] > 0.5).sum()} tumour and {(prob[~tumour] <= 0.5).sum()} normal right at 0.5; "
            f"AUC of the 5th percentile of green alone: {roc.auc(paleness(real), real.labels):.3f}."
        )
    lines.append(
        f"Only dldp_256 is held out by slide, and it is one slide ({HELD_OUT_SLIDE}). Much of the real AUC is that "
        "tumour patches are paler. The held-out patches were looked at before, for another network. "
        "A demonstration, not for any clinical use."
    )
    return " ".join(lines)


def write(net: nn.Module, about: Mapping[str, Any], folder: Path) -> None:
    """Write weights and card; ``about`` holds the fields that differ between these networks."""
    fields = {
        **about,
        "class_names": ("normal", "tumor"),
        "positive_class": "tumor",
        "input_px": about["window_px"],
        "mean": MEAN,
        "std": STD,
        "licence": "Apache-2.0",
    }
    folder.mkdir(parents=True, exist_ok=True)
    print(save(net, fields, folder))


def fit(net: nn.Module, about: Mapping[str, Any], recipe: Recipe, given: argparse.Namespace) -> None:
    """Train, evaluate and write a network; ``about`` holds name, architecture and architecture_args of its card."""
    real = read_real(given.data, test=False)
    print(f"{len(real.labels)} real patches to train on, {int(real.labels.sum())} of them tumour")
    net = train(net, [real, draw_synthetic(SYNTHETIC, given.seed), glass(64, given.seed)], recipe)
    notes = report(net, given.data, given.seed)
    print(notes)
    trained_on = (
        f"{SYNTHETIC} synthetic patches of wsiflow.slides.synthetic.tissue; {len(real.labels)} patches of CAMELYON16 "
        "lymph node slides (CC0, Radboud University Medical Center; some by way of DIDSR/dldp)"
    )
    scale = {"window_px": WINDOW_PX, "spacing_um_px": tissue.UM_PX}
    write(net, {**about, **scale, "trained_on": trained_on, "notes": notes}, given.out)
