"""Networks that people use: from weights on disk through the card to the dense engine, and what it gives."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import zoo
from small_models import spec
from torch import nn

from wsiflow import model
from wsiflow.errors import InputError
from wsiflow.model.add import add, recognise
from wsiflow.model.architectures.registry import build
from wsiflow.model.certificate import score_deviation
from wsiflow.model.classifier import Classifier, predict
from wsiflow.model.dense.network import densify, describe


class Known(NamedTuple):
    """What is known of a network.

    Attributes:
        native_px: Distance between its own scores, px; 0 where windows cannot share the whole network.
        window_px: Side of a window, px.
        obstacle: What keeps windows from sharing the whole network, though they can with means around every place.
    """

    native_px: int
    window_px: int = 224
    obstacle: str = ""


NETWORKS: dict[str, Known] = {
    "torchvision:resnet18": Known(32),
    "timm:mobilenetv2_050": Known(32),
    "torchvision:shufflenet_v2_x0_5": Known(32),
    "timm:convnext_atto": Known(32),
    "timm:vit_tiny_patch16_224": Known(0),
    "torchvision:mobilenet_v3_small": Known(32, obstacle="squeeze-and-excite"),
    # The others in `make test-full`.
    "timm:resnet18": Known(32),
    "timm:resnet34": Known(32),
    "torchvision:resnet50": Known(32),
    "torchvision:resnet101": Known(32),
    "torchvision:resnext50_32x4d": Known(32),
    "torchvision:wide_resnet50_2": Known(32),
    "torchvision:vgg11_bn": Known(32),
    "timm:vgg11": Known(32),
    "timm:densenet121": Known(32),
    "torchvision:densenet121": Known(32),
    "torchvision:googlenet": Known(32),
    "torchvision:inception_v3": Known(32, 299),
    "timm:inception_v4": Known(32, 299),
    "timm:inception_resnet_v2": Known(32, 299),
    "torchvision:mobilenet_v2": Known(32),
    "torchvision:mnasnet0_5": Known(32),
    "torchvision:regnet_x_400mf": Known(32),
    "timm:regnetx_002": Known(32),
    "torchvision:convnext_tiny": Known(32),
    "torchvision:squeezenet1_1": Known(16),
    "torchvision:alexnet": Known(32),
    "timm:xception41": Known(32),
    "timm:repvgg_a0": Known(32),
    "timm:gernet_s": Known(32),
    "timm:res2net50_26w_4s": Known(32),
    "timm:dla34": Known(32),
    "torchvision:efficientnet_b0": Known(32, obstacle="squeeze-and-excite"),
    "torchvision:regnet_y_400mf": Known(32, obstacle="squeeze-and-excite"),
    "timm:seresnet18": Known(32, obstacle="squeeze-and-excite"),
    "timm:ghostnet_100": Known(32, obstacle="squeeze-and-excite"),
    "timm:resnest26d": Known(32, obstacle="squeeze-and-excite"),
    "torchvision:vit_b_16": Known(0),
    "torchvision:swin_t": Known(0),
}
_QUICK = 6
_ARGS = {"torchvision:googlenet": {"aux_logits": False, "init_weights": False}}
_ARGS["torchvision:inception_v3"] = _ARGS["torchvision:googlenet"]
CHOSEN = list(NETWORKS) if os.environ.get("WSIFLOW_ZOO_ALL") else list(NETWORKS)[:_QUICK]


def texture(h: int, w: int) -> np.ndarray:
    """Return an image that varies on every scale, like tissue: uint8 (h, w, 3)."""
    rng = np.random.default_rng(0)
    image = torch.zeros(1, 3, h, w)
    for cell in (4, 16, 64):
        coarse = torch.tensor(rng.normal(size=(1, 3, h // cell + 2, w // cell + 2)), dtype=torch.float32)
        image += nn.functional.interpolate(coarse, scale_factor=cell, mode="bilinear")[:, :, :h, :w]
    return (image[0].permute(1, 2, 0) * 30 + 128).clamp(0, 255).byte().numpy()


def loaded(name: str, folder: Path) -> Classifier:
    """Save weights of a network as training scripts do, add them, and load the card."""
    torch.manual_seed(0)
    window = NETWORKS[name].window_px
    args: dict[str, Any] = _ARGS.get(name, {})
    network = build(name, 2, **args).eval()
    torch.save({f"module.{key}": value for key, value in network.state_dict().items()}, folder / "weights.pth")
    fields = {
        "name": "net",
        "architecture": name,
        "architecture_args": args,
        "class_names": ["normal", "tumor"],
        "positive_class": "tumor",
        "window_px": window,
        "input_px": window,
        "spacing_um_px": 0.5,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    card = add(recognise(folder / "weights.pth"), fields, folder)
    return model.load(spec(card))


def obstacle(classifier: Classifier) -> str:
    """Return what keeps windows from sharing the whole network; empty where they can."""
    try:
        return describe(classifier, 32).obstacle
    except InputError as error:
        return error.cause


@pytest.mark.parametrize("name", CHOSEN)
def test_networks_that_people_use(name: str, tmp_path: Path) -> None:
    """From a file of weights to a card; dense where windows share a map, and then near to the scores of windows."""
    zoo.require()
    classifier, known = loaded(name, tmp_path), NETWORKS[name]
    assert ("attention" in obstacle(classifier)) == (not known.native_px)
    assert known.obstacle in obstacle(classifier)
    if not known.native_px:
        return
    local = bool(known.obstacle)
    facts = describe(classifier, 32, local=local)
    assert (facts.native_px, facts.obstacle) == (known.native_px, "")
    side, context = known.window_px, facts.grid_px * 2
    dense = densify(classifier, 32, context_px=context, local=local)  # it compares a window that fills the region
    assert dense.module is not None
    image = texture(side + 2 * context + 32, side + 2 * context)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (classifier.mean, classifier.std))
    with torch.inference_mode():
        pixels = (torch.tensor(image).permute(2, 0, 1)[None] / 255 - mean) / std
        scores = dense.module(pixels)[0].numpy()
    assert scores.shape == (2, 1)
    windows = np.stack([image[y : y + side, context : context + side] for y in (context, context + 32)])
    deviation = score_deviation(scores[:, 0], predict(classifier, windows))
    assert deviation.max_abs_diff < 0.2 if facts.padded else 1e-5
