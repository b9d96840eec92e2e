"""Measure networks that people use, dense against window by window, on the same tissue; OpenVINO, fp32, one thread.

A tile is 224 px a side and has 49 windows at stride 32. Dense engines run a region of 1,024 px with the context that a
run gives to networks that pad (640 px where windows share only a part, since the rest takes long); the window engine
runs a batch of eight. Both are charged for a tile. The networks need the extra ``wsiflow[zoo]``. Their weights are
random, since none are fetched: batch norms hold the statistics of synthetic tissue and of noise, and the last layer is
scaled so that the logits of windows have a standard deviation of one.
"""

import hashlib
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks import networks
from benchmarks.measuring import (
    Contestant,
    ResultTable,
    Spent,
    arguments,
    finish,
    interleave,
    machine,
    per_tile,
    ratio,
    say,
)
from wsiflow.errors import InputError, WsiflowError
from wsiflow.model import scorer, scoring
from wsiflow.model.architectures.registry import build
from wsiflow.model.certificate import score_deviation
from wsiflow.model.classifier import Classifier, normalise
from wsiflow.model.dense.facts import DenseFacts
from wsiflow.model.dense.network import describe
from wsiflow.model.outputs import Outputs
from wsiflow.system.usage import untimed

STRIDE_PX = 32
WINDOWS_PER_TILE = (networks.TILE_PX // STRIDE_PX) ** 2
BATCH = 8
_REGION_PX = 1024
_PART_PX = 640
_CONTEXT_PX = 96  # the default of dense.halo
_FITTED = 16  # windows of tissue on which batch norms and the last layer are fitted
_LEAST_SAVED = 0.1  # of the multiplications, for a run to share a part of a network
_SHIPPED = ("demo", "pcam", "googlenet")
_BARE = {"aux_logits": False, "init_weights": False}
NETWORKS: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "torchvision:resnet18": (224, {}),
    "torchvision:resnet34": (224, {}),
    "torchvision:resnet50": (224, {}),
    "torchvision:resnet101": (224, {}),
    "torchvision:resnext50_32x4d": (224, {}),
    "torchvision:wide_resnet50_2": (224, {}),
    "torchvision:vgg11_bn": (224, {}),
    "torchvision:vgg16": (224, {}),
    "torchvision:densenet121": (224, {}),
    "torchvision:googlenet": (224, _BARE),
    "torchvision:inception_v3": (299, _BARE),
    "timm:inception_v4": (299, {}),
    "torchvision:mobilenet_v2": (224, {}),
    "torchvision:mobilenet_v3_large": (224, {}),
    "torchvision:efficientnet_b0": (224, {}),
    "torchvision:regnet_x_400mf": (224, {}),
    "torchvision:regnet_y_400mf": (224, {}),
    "torchvision:convnext_tiny": (224, {}),
    "torchvision:squeezenet1_1": (224, {}),
    "torchvision:shufflenet_v2_x1_0": (224, {}),
    "timm:hrnet_w18_small": (224, {}),
    "timm:vit_small_patch16_224": (224, {}),
    "torchvision:swin_t": (224, {}),
}
"""Side of the windows, px, and arguments of each network."""


class Way(NamedTuple):
    """A way to run a network over regions.

    Attributes:
        shares: What the windows share, as text.
        facts: Properties of the network when it is run so.
        share_until: Layer up to which windows share the network; empty if they share all of it.
    """

    shares: str
    facts: DenseFacts
    share_until: str = ""


class Measured(NamedTuple):
    """What was measured of a network.

    Attributes:
        ways: The ways to run it over regions; none where windows can only run alone.
        obstacle: Why windows cannot share the whole network; empty where they can.
        rounds: Costs by way, ``window`` for windows that run alone.
        apart: Mean absolute difference of probability from windows that run alone, by way.
    """

    ways: list[Way]
    obstacle: str
    rounds: dict[str, list[Spent]]
    apart: dict[str, float]


def classifier(name: str) -> Classifier:
    """Return a network by name with weights as described above; the networks that ship have their own."""
    if name in {"demo", "pcam"}:
        return networks.demo() if name == "demo" else networks.load(networks.spec("pkg:pcam.json"))
    if name == "googlenet":
        return networks.random_classifier(name)
    side, options = NETWORKS[name]
    torch.manual_seed(0)
    module = build(name, 2, **options).eval().to(memory_format=torch.channels_last)
    bare = Classifier(
        module, ("normal", "tumor"), Outputs("logits", 2, (1,)), side, side, 0.5, (0.7,) * 3, (0.2,) * 3, "", ""
    )
    pixels = networks.tissue(_REGION_PX)
    far = _REGION_PX - side
    corners = np.random.default_rng(0).integers(0, far, (_FITTED, 2)).tolist()
    _fit(module, normalise(bare, np.stack([pixels[y : y + side, x : x + side] for y, x in corners])))
    weights = hashlib.sha256(b"".join(value.numpy().tobytes() for value in module.state_dict().values()))
    return Classifier(**{**vars(bare), "identity": f"{name} {weights.hexdigest()}"})


def _fit(module: nn.Module, windows: torch.Tensor) -> None:
    """Give batch norms the statistics of windows and of noise, and the logits of windows a deviation of one.

    Without noise, on which conversions are checked, norms would amplify what tissue does not have without bound.
    """
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    last = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)][-1]
    with torch.no_grad():
        if norms:
            module(torch.cat([windows, torch.randn_like(windows)]))
        module.eval()
        nn.init.normal_(last.weight, std=0.05)  # some libraries leave it zero
        logits = module(windows)
        last.weight /= logits.std(0).view(-1, *[1] * (last.weight.dim() - 1))
        if last.bias is not None:
            last.bias.copy_((last.bias - logits.mean(0)) / logits.std(0))


def ways(network: Classifier) -> tuple[list[Way], str]:
    """Return the ways to run a network over regions, and what keeps windows from sharing the whole network."""
    try:
        facts = describe(network, STRIDE_PX)
    except InputError as error:
        found, obstacle = [], error.cause
    else:
        if not facts.obstacle:
            return [Way("all", facts)], ""
        layer, obstacle = facts.cuts[0].name, facts.obstacle
        saves = facts.dense_macs_px * STRIDE_PX**2 <= (1 - _LEAST_SAVED) * facts.window_macs
        found = [Way(f"up to {layer}", facts, layer)] if saves else []
    try:
        around = describe(network, STRIDE_PX, local=True)
    except InputError:
        return found, obstacle
    return [*found, Way("all, dense.local=true", around)] if not around.obstacle else found, obstacle


def measure(network: Classifier, *, region_px: int, rounds: int) -> Measured:
    """Measure a network in every way."""
    found, obstacle = ways(network)
    pixels = networks.tissue(region_px)
    alone = networks.choice("window", "openvino", "fp32", stride_px=STRIDE_PX)._replace(batch=BATCH)
    windows = scorer.make_scorer(network, alone, threads=1)
    assert isinstance(windows, scoring.WindowScorer)
    cut = _cut(pixels, network.window_px, [(0, n * STRIDE_PX) for n in range(BATCH)])
    contestants: dict[str, Contestant] = {"window": lambda: networks.run_windows(windows, cut).size / WINDOWS_PER_TILE}
    windows.run(cut, untimed)
    apart = {}
    for way in found:
        dense, context_px = _dense(network, way)
        seen = pixels[:_PART_PX, :_PART_PX] if way.share_until else pixels
        scores = networks.run_region(dense, seen)
        apart[way.shares] = _apart(windows, scores, seen, network.window_px, context_px)
        contestants[way.shares] = _run(dense, seen)
    return Measured(found, obstacle, interleave(contestants, rounds=rounds), apart)


def _dense(network: Classifier, way: Way) -> tuple[scoring.DenseScorer, int]:
    """Return the scorer of a way, and its context, px."""
    seen, grid_px = max(way.facts.overhang_px), way.facts.grid_px
    context_px = -(-min(seen, _CONTEXT_PX) // grid_px) * grid_px
    plain = networks.choice("dense", "openvino", "fp32", stride_px=STRIDE_PX, context_px=context_px)
    chosen = plain._replace(batch=BATCH, share_until=way.share_until, local=way.facts.local)
    say(f"preparing dense, windows share {way.shares}")
    made = scorer.make_scorer(network, chosen, threads=1)
    assert isinstance(made, scoring.DenseScorer)
    return made, context_px


def _run(dense: scoring.DenseScorer, pixels: NDArray[np.uint8]) -> Contestant:
    return lambda: networks.run_region(dense, pixels).size / WINDOWS_PER_TILE


def _apart(
    windows: scoring.WindowScorer,
    scores: NDArray[np.float32],
    pixels: NDArray[np.uint8],
    window_px: int,
    context_px: int,
) -> float:
    """Return the mean absolute difference of 32 scores of a map from those of the same windows alone."""
    cells = np.random.default_rng(0).permutation(scores.size)[: 4 * BATCH]
    rows, cols = np.unravel_index(cells, scores.shape)
    corners = [
        (context_px + STRIDE_PX * int(y), context_px + STRIDE_PX * int(x)) for y, x in zip(rows, cols, strict=True)
    ]
    alone = windows.run(_cut(pixels, window_px, corners), untimed)
    return score_deviation(scores[rows, cols], alone).mean_abs_diff


def _cut(pixels: NDArray[np.uint8], side: int, corners: Sequence[tuple[int, int]]) -> list[NDArray[np.uint8]]:
    return [pixels[y : y + side, x : x + side] for y, x in corners]


def rows(name: str, measured: Measured) -> Iterator[list[str]]:
    """Yield the rows of a network: one for each way to run it over regions."""
    alone = measured.rounds["window"]
    if not measured.ways:
        yield [name, "nothing", "", "", per_tile(alone).text(1e3), "", ""]
    for way in measured.ways:
        own, exact = measured.rounds[way.shares], not way.facts.padded and not way.facts.local and not way.share_until
        yield [
            name,
            way.shares,
            str(way.facts.native_px),
            per_tile(own).text(1e3),
            per_tile(alone).text(1e3),
            ratio(alone, own).text(),
            f"{measured.apart[way.shares]:.1g}" + (" (does not pad)" if exact else ""),
        ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all networks, and write ``zoo.json``."""
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--only", nargs="+", choices=[*NETWORKS, *_SHIPPED], metavar="NAME", help="these networks alone"
    )
    given = parser.parse_args(argv)
    about, values, table = machine(), {}, []
    region_px, rounds = (512, 1) if given.quick else (_REGION_PX, 3)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torchvision's about the initial weights of its networks
    for name in given.only or [*_SHIPPED, *(["torchvision:resnet18"] if given.quick else NETWORKS)]:
        say(name)
        try:
            network = classifier(name)
        except WsiflowError as error:
            sys.exit(str(error))
        measured = measure(network, region_px=region_px, rounds=rounds)
        values[name] = {
            "obstacle": measured.obstacle,
            "rounds": measured.rounds,
            "apart": measured.apart,
            "facts": {way.shares: way.facts._asdict() for way in measured.ways},
        }
        table += rows(name, measured)
    columns = [
        "network",
        "windows share",
        "its own step, px",
        "dense, core-ms per tile",
        "window by window, core-ms per tile",
        "times faster",
        "mean abs dp",
    ]
    finish(given, "zoo", about, values, [ResultTable(f"OpenVINO fp32, stride {STRIDE_PX}", columns, table)])


if __name__ == "__main__":
    main()
