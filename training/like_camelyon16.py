"""Train a small network for the slides of `wsiflow synth --like camelyon16`, and write its weights and card.

    python training/like_camelyon16.py --data ../shared/data --out runs/like/model --seed 0

Output: `like_camelyon16.safetensors` and `like_camelyon16.json`. It sees windows of slides of the training part, whose
pictures and outlines no test slide shares, and of one center alone: the other center's colours are new to it. Half of
the windows have the scanner's colours, half are normalised by `conf/stain/macenko.yaml`, so that a run may do either.
One process, some ten minutes on one core that has bfloat16.
"""

import argparse
import math
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml
from fit import Recipe, scores, train
from numpy.typing import NDArray
from patches import MEAN, PATCH_PX, STD, WINDOW_PX, Patches, glass

from wsiflow import likeness, roc, stain
from wsiflow.atlas import Picture, read_atlas
from wsiflow.model.architectures import build
from wsiflow.model.save import save
from wsiflow.synthetic import UM_PX

CENTER = "0"
MIDDLE_PX = 64  # a window is tumour where most of its middle is, and normal where none is
WINDOWS_PER_SLIDE = 200
ARCHITECTURE_ARGS = {"width": 0.25, "dropout": 0.2}
STAIN = Path(__file__).parents[1] / "conf" / "stain" / "macenko.yaml"


def tumour_of(planned: likeness.Plan) -> NDArray[np.uint8]:
    """Return 1 inside the metastases of a slide, at level 0."""
    mask = np.zeros(planned.size_px[::-1], np.uint8)
    for lesion in planned.lesions:
        cv2.fillPoly(mask, [np.array(lesion.outline, np.int32)], 1)
        for island in lesion.islands:
            cv2.fillPoly(mask, [np.array(island, np.int32)], 0)
    return mask


def windows(planned: likeness.Plan, pictures: tuple[Picture, ...]) -> tuple[Patches, Patches]:
    """Return windows of a slide at random places, both classes alike where there are both: as they are, normalised."""
    rng = np.random.default_rng(planned.seed)
    rgb, tumour = likeness.paint(planned, pictures), tumour_of(planned)
    params = stain.StainParams.model_validate(yaml.safe_load(STAIN.read_text()))
    tissue = rgb.min(axis=2) < 225
    fit = stain.fit(stain.sample(rgb[::4, ::4], tissue[::4, ::4], params), params)
    share = cv2.blur(tumour.astype(np.float32), (MIDDLE_PX, MIDDLE_PX))
    dense = cv2.blur(tissue.astype(np.float32), (MIDDLE_PX, MIDDLE_PX))
    half = PATCH_PX // 2
    inner = np.s_[half:-half, half:-half]
    kinds = [np.argwhere((share[inner] == 0) & (dense[inner] > 0.2)), np.argwhere(share[inner] > 0.5)]
    raw, even, labels = [], [], []
    for label, places in enumerate(kinds):
        for row, col in places[rng.integers(len(places), size=WINDOWS_PER_SLIDE // 2)] if len(places) else ():
            square = np.s_[row : row + PATCH_PX, col : col + PATCH_PX]
            raw.append(rgb[square])
            even.append(stain.normalise(rgb[square], fit, params.target_fit))
            labels.append(label)
    classes = np.array(labels, np.int64)
    return Patches(np.stack(raw), classes), Patches(np.stack(even), classes)


def joined(parts: list[Patches]) -> Patches:
    """Return several sets of patches as one."""
    return Patches(np.concatenate([part.pixels for part in parts]), np.concatenate([part.labels for part in parts]))


def arguments() -> argparse.Namespace:
    """Return what the command line says, and take the number of threads from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds camelyon16/ and patches/")
    parser.add_argument("--out", type=Path, required=True, help="folder to write weights and card to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slides", type=int, default=16, help="slides to lay out; those of one center are used")
    parser.add_argument("--scale", type=float, default=0.125, help="as for `wsiflow synth`")
    parser.add_argument("--steps", type=int, default=700, help="number of batches of 32")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cv2.setNumThreads(1)
    return given


def main() -> None:
    """Draw, train, measure and write."""
    given = arguments()
    atlas = read_atlas(given.data)
    plans = likeness.plan(atlas, "train", slides=given.slides, scale=given.scale, seed=given.seed)
    plans = tuple(planned for planned in plans if planned.scanner == CENTER)
    if not any(planned.lesions for planned in plans[:-2]):
        sys.exit("no slide has metastases: ask for more --slides")
    drawn = []
    for planned in plans:
        drawn.append(windows(planned, atlas.pictures))
        print(f"{planned.slide_id}: {len(drawn[-1][0].labels)} windows", flush=True)
    known, kept_back = drawn[:-2], drawn[-2:]  # the last two: one without metastases, one with
    torch.manual_seed(given.seed)
    net = build("inception_valid", 2, **ARCHITECTURE_ARGS)
    sources = [joined([raw for raw, _ in known]), joined([even for _, even in known]), glass(64, given.seed)]
    net = train(net, sources, Recipe(given.steps, (15, 15, 2), rate=4e-3, clip=math.inf, bf16=True, seed=given.seed))
    test = joined([raw for raw, _ in kept_back])
    found = scores(net, test)
    low, high = roc.auc_interval(found, test.labels)
    notes = (
        f"Windows of two slides of the training part that were kept back ({len(test.labels)}, {test.labels.sum()} "
        f"tumour): AUC {roc.auc(found, test.labels):.3f} (95 % {low:.3f} to {high:.3f}). Their pictures of tissue are "
        "known to the network; test slides have others. For synthetic slides, not for any clinical use."
    )
    print(notes)
    fields = {
        "name": "like_camelyon16",
        "architecture": "inception_valid",
        "architecture_args": ARCHITECTURE_ARGS,
        "class_names": ("normal", "tumor"),
        "positive_class": "tumor",
        "window_px": WINDOW_PX,
        "input_px": WINDOW_PX,
        "spacing_um_px": UM_PX,
        "mean": MEAN,
        "std": STD,
        "licence": "Apache-2.0",
        "trained_on": (
            f"{2 * len(sources[0].labels)} windows of {len(known)} slides of wsiflow.likeness, training part, center "
            f"{CENTER}, scale {given.scale:g}, half of them normalised (Macenko); {given.steps} batches of 32, seed "
            f"{given.seed}. Their tissue is that of CAMELYON16 (CC0, Radboud University Medical Center; some by way of "
            "DIDSR/dldp)"
        ),
        "notes": notes,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    print(save(net, fields, given.out))


if __name__ == "__main__":
    main()
