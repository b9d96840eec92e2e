"""Tune the lymph node classifier to the slides of `wsiflow synth --like camelyon16`, and write its weights and card.

    python training/like_camelyon16.py --data ../shared/data --out runs/like/model --seed 0

Output: `like_camelyon16.safetensors` and `like_camelyon16.json`. It starts from `pcam` and goes on with windows of
slides of the training part, whose pictures and outlines no test slide shares, and of one center alone, beside the
patches `pcam` was made of. Half of the windows have the scanner's colours, half are normalised by
`conf/stain/macenko.yaml`, so that a run may do either. One process, some twenty minutes on one core that has bfloat16.
"""

import sys
from pathlib import Path

import cv2
import numpy as np
import pcam
import yaml
from fit import Recipe, parsed, parser, scores, train, write
from numpy.typing import NDArray
from patches import Patches

from wsiflow import likeness, roc, stain
from wsiflow.atlas import Picture, read_atlas
from wsiflow.model.card import ModelSpec
from wsiflow.model.classifier import load

CENTER = "0"
DOWNSAMPLE = 4  # level 0 has 0.243 um/px, windows 0.97
MIDDLE_PX = 32  # a window is tumour where most of its middle is, and normal where none is
WINDOWS_PER_SLIDE = 300
KEPT_BACK = 4  # slides, half of them with metastases
STAIN = Path(__file__).parents[1] / "conf" / "stain" / "macenko.yaml"
PCAM = ModelSpec(card=Path("pkg:pcam.json"), trust_torchscript=False, sha256="", positive_class="")


def tumour_of(planned: likeness.Plan) -> NDArray[np.uint8]:
    """Return 1 inside the metastases of a slide, at level 0."""
    mask = np.zeros(planned.size_px[::-1], np.uint8)
    for lesion in planned.lesions:
        cv2.fillPoly(mask, [np.array(lesion.outline, np.int32)], 1)
        for island in lesion.islands:
            cv2.fillPoly(mask, [np.array(island, np.int32)], 0)
    return mask


def shrunk(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return level-0 pixels at the spacing of the windows."""
    size = (pixels.shape[1] // DOWNSAMPLE, pixels.shape[0] // DOWNSAMPLE)
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def windows(planned: likeness.Plan, pictures: tuple[Picture, ...]) -> tuple[Patches, Patches]:
    """Return windows of a slide at random places, both classes alike where there are both: as they are, normalised."""
    rng = np.random.default_rng(planned.seed)
    rgb, tumour = shrunk(likeness.paint(planned, pictures)), shrunk(255 * tumour_of(planned))
    params = stain.StainParams.model_validate(yaml.safe_load(STAIN.read_text()))
    tissue = rgb.min(axis=2) < 225
    fit = stain.fit(stain.sample(rgb, tissue, params), params)
    share = cv2.blur(tumour.astype(np.float32) / 255, (MIDDLE_PX, MIDDLE_PX))
    dense = cv2.blur(tissue.astype(np.float32), (MIDDLE_PX, MIDDLE_PX))
    half = pcam.WINDOW_PX // 2
    inner = np.s_[half:-half, half:-half]
    kinds = [np.argwhere((share[inner] == 0) & (dense[inner] > 0.2)), np.argwhere(share[inner] > 0.5)]
    raw, even, labels = [], [], []
    for label, places in enumerate(kinds):
        for row, col in places[rng.integers(len(places), size=WINDOWS_PER_SLIDE // 2)] if len(places) else ():
            square = np.s_[row : row + pcam.WINDOW_PX, col : col + pcam.WINDOW_PX]
            raw.append(rgb[square])
            even.append(stain.normalise(rgb[square], fit, params.target_fit))
            labels.append(label)
    classes = np.array(labels, np.int64)
    return Patches(np.stack(raw), classes), Patches(np.stack(even), classes)


def joined(parts: list[Patches]) -> Patches:
    """Return several sets of patches as one."""
    return Patches(np.concatenate([part.pixels for part in parts]), np.concatenate([part.labels for part in parts]))


def measured(found: NDArray[np.float64], test: Patches) -> str:
    """Return the area of scores of patches with DeLong's interval."""
    low, high = roc.auc_interval(found, test.labels)
    return f"AUC {roc.auc(found, test.labels):.3f} (95 % {low:.3f} to {high:.3f})"


def main() -> None:
    """Draw, tune, measure and write."""
    known_arguments = parser(__doc__ or "", steps=1200)
    known_arguments.add_argument("--slides", type=int, default=40, help="slides to lay out; one center's are used")
    known_arguments.add_argument("--scale", type=float, default=0.25, help="as for `wsiflow synth`")
    given = parsed(known_arguments)
    atlas = read_atlas(given.data)
    plans = likeness.plan(atlas, "train", slides=given.slides, scale=given.scale, seed=given.seed)
    plans = tuple(planned for planned in plans if planned.scanner == CENTER)
    if not any(planned.lesions for planned in plans[:-KEPT_BACK]):
        sys.exit("no slide has metastases: ask for more --slides")
    drawn = []
    for planned in plans:
        drawn.append(windows(planned, atlas.pictures))
        print(f"{planned.slide_id}: {len(drawn[-1][0].labels)} windows", flush=True)
    real, _ = pcam.read(given.data, "train")
    known, kept_back = drawn[:-KEPT_BACK], drawn[-KEPT_BACK:]
    sources = [joined([raw for raw, _ in known]), joined([even for _, even in known]), real]
    tests = {"as scanned": joined([raw for raw, _ in kept_back]), "normalised": joined([even for _, even in kept_back])}
    net = load(PCAM).module
    before = {name: measured(scores(net, test, pcam.WINDOW_PX), test) for name, test in tests.items()}
    recipe = Recipe(
        given.steps, (24, 24, 16), rate=1e-3, clip=5.0, bf16=True, seed=given.seed, window_px=pcam.WINDOW_PX
    )
    net = train(net, sources, recipe)
    after = {name: measured(scores(net, test, pcam.WINDOW_PX), test) for name, test in tests.items()}
    labels = tests["as scanned"].labels
    notes = (
        f"Windows of {KEPT_BACK} slides of the training part that were kept back ({len(labels)}, {labels.sum()} "
        "tumour): "
        + "; ".join(f"{name} {after[name]}, before the tuning {before[name]}" for name in tests)
        + ". Their pictures of tissue are known to the network; test slides have others. For synthetic slides, not for "
        "any clinical use."
    )
    print(notes)
    fields = {
        "name": "like_camelyon16",
        "architecture": "compact_valid",
        "architecture_args": pcam.ARCHITECTURE_ARGS,
        "window_px": pcam.WINDOW_PX,
        "spacing_um_px": pcam.SPACING_UM_PX,
        "trained_on": (
            f"What pcam was trained on; then {2 * len(sources[0].labels)} windows of {len(known)} slides of "
            f"wsiflow.likeness, training part, center {CENTER}, scale {given.scale:g}, half of them normalised "
            f"(Macenko), and {len(real.labels)} of PatchCamelyon: {given.steps} batches of 64, seed {given.seed}. "
            "All tissue is that of CAMELYON16 (CC0, Radboud University Medical Center; some by way of DIDSR/dldp)"
        ),
        "notes": notes,
    }
    write(net, fields, given.out)


if __name__ == "__main__":
    main()
