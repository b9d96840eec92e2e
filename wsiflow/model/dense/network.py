"""A window classifier as a fully convolutional network: one pass over a region gives the score of every window in it.

Input: a classifier and the stride of the wanted scores. Output: a `DenseClassifier`. The global pool becomes a sliding
pool, the linear head a 1 x 1 convolution, taken before a mean, since it has fewer channels. Where scores are wanted
finer than the network's stride, ops run at a smaller stride and their result is split into phases along the batch,
which later layers treat as images of their own; at the end the phases are interleaved again. Nothing is computed twice.
(Giusti et al. 2013 call the phases fragments.)

Networks that do not pad give the window's scores to rounding. In networks that pad, a window's own padding is replaced
by what really lies around it, and only the border of the region is padded.

Everything but the region's height and width is a constant in these modules, so they can be traced and exported.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import fx, nn

from wsiflow.errors import InputError, WsiflowError
from wsiflow.model.classifier import Classifier
from wsiflow.model.dense import operations
from wsiflow.model.dense.facts import DenseFacts, DenseStride, dense_facts, dense_strides, split_points
from wsiflow.model.dense.layers import cannot_run_dense
from wsiflow.model.dense.operations import Pair
from wsiflow.model.dense.receptive import Layer, trace_layers
from wsiflow.model.dense.rewrite import dense_module

# Sums are taken in another order than in the window, which moves a probability by some 1e-6. Logits are compared too,
# relative to the largest: probabilities that are all 0 or 1 would hide any difference.
PROBABILITY_TOLERANCE = 1e-5
LOGIT_TOLERANCE = 1e-4


class Crops(NamedTuple):
    """Where the windows lie in the feature map of a shared stem.

    Attributes:
        step: Cells between neighbouring windows.
        every: Cells between neighbouring features of one window.
        side: Features of a window along an axis.
        first: Cells in front of the first window.
    """

    step: int
    every: int
    side: int
    first: int


@dataclass(frozen=True, eq=False)
class DenseClassifier:
    """A classifier for regions instead of windows.

    Element (i, j) of its map is the window whose top-left pixel is (context_px + j * stride, context_px + i * stride).

    Attributes:
        facts: What it computes and costs.
        stride: Distance of the windows, px.
        context_px: Context on each side of the region around the windows.
        window_px: Side of a window, px.
        module: Normalised pixels, float32 (n, 3, h, w), to probabilities, float32 (n, rows, cols); None if shared.
        stem: If shared: normalised pixels to features, float32 (n, channels, y, x).
        tail: If shared: features of windows, float32 (n, channels, side, side), to probabilities, float32 (n,).
        crops: If shared: where the windows lie in the features.
    """

    facts: DenseFacts
    stride: int
    context_px: int
    window_px: int
    module: nn.Module | None = None
    stem: nn.Module | None = None
    tail: nn.Module | None = None
    crops: Crops | None = None

    def map_shape(self, h: int, w: int) -> Pair:
        """Return rows and columns of the map of a region of h x w px; raise WsiflowError where no window fits."""
        rows, cols = ((side - 2 * self.context_px - self.window_px) // self.stride + 1 for side in (h, w))
        if rows < 1 or cols < 1:
            raise WsiflowError(
                f"no window of {self.window_px} px with {self.context_px} px of context fits a region of {w} x {h} px",
                "region, window and context do not fit together: please report this",
                stage="predict",
            )
        return rows, cols


def describe(classifier: Classifier, stride: int) -> DenseFacts:
    """Return what running a classifier over regions means; only shapes are computed.

    Args:
        classifier: The classifier.
        stride: Distance of the wanted scores, px.

    Raises:
        InputError: The classifier cannot run over whole regions; the layer and the reason are named.
    """
    return dense_facts(trace_layers(classifier)[1], stride)


def densify(classifier: Classifier, stride: int, *, context_px: int = 0, share_until: str = "") -> DenseClassifier:
    """Return a classifier as a network over whole regions, which shares its weights.

    Args:
        classifier: The classifier.
        stride: Distance of the wanted scores, px.
        context_px: Context around the windows on each side of a region, px: a multiple of ``facts.align_px``.
        share_until: Module up to which windows share the network, by its path or the last part of it. After it each
            window runs alone, with its own padding. Empty: everything is shared.

    Raises:
        InputError: The classifier cannot run over whole regions, or does not give there what it gives of a window; or
            there is no such module.
    """
    plan = _Plan(classifier, *trace_layers(classifier), stride)
    if context_px % plan.facts.align_px:
        raise InputError(
            f"a context of {context_px} px is not a multiple of the {plan.facts.align_px} px between scores",
            f"set dense.halo to a multiple of {plan.facts.align_px}",
        )
    build = _shared if share_until else _whole
    _check(classifier, build(plan, 0, share_until))
    return build(plan, context_px, share_until)


def window_crops(features: NDArray[np.float32], crops: Crops) -> NDArray[np.float32]:
    """Return the features of every window as the tail takes them, a view without copies.

    Args:
        features: float32 (n, channels, y, x), of a stem.
        crops: Where the windows lie in it.

    Returns:
        float32 (n, rows, cols, channels, side, side), read-only.
    """
    reach = (crops.side - 1) * crops.every + 1
    inside = slice(crops.first, -crops.first or None)
    view = sliding_window_view(features[:, :, inside, inside], (reach, reach), axis=(2, 3))
    return np.moveaxis(view[:, :, :: crops.step, :: crops.step, :: crops.every, :: crops.every], 1, 3)


class _Region(NamedTuple):
    """How the map of a network lies in the region it is given.

    Attributes:
        extent_px: Pixels of one window.
        grid_px: Distance of the windows that are computed.
        cell_px: Distance of the cells of the map; windows may be coarser.
        factors: Phases an axis was split into, in the order of splitting.
        side: Cells of one window.
    """

    extent_px: int
    grid_px: int
    cell_px: int
    factors: tuple[int, ...]
    side: int

    def run(self, network: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """Return the network's map, float32 (n, channels, y, x), for the windows that lie wholly in the region."""
        spare = [(side - self.extent_px) % self.grid_px for side in pixels.shape[2:]]
        # Maps of branches then always have equal sides.
        pixels = pixels[:, :, : pixels.shape[2] - spare[0], : pixels.shape[3] - spare[1]]
        cells: torch.Tensor = network(pixels)
        for factor in reversed(self.factors):
            cells = operations.interleave(cells, factor)
        reach = [(side - self.extent_px) // self.cell_px + self.side for side in pixels.shape[2:]]
        return cells[:, :, : reach[0], : reach[1]]


class DenseNetwork(nn.Module):
    """Pixels of regions to the probabilities of their windows."""

    def __init__(self, network: nn.Module, region: _Region, crops: Crops, positive_index: int) -> None:
        """Keep the network and where its windows lie."""
        super().__init__()
        self.network, self.region, self.crops, self.positive_index = network, region, crops, positive_index

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the logits, float32 (n, classes, rows, cols)."""
        wanted = slice(self.crops.first, -self.crops.first or None, self.crops.step)
        return self.region.run(self.network, pixels)[:, :, wanted, wanted]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return probabilities, float32 (n, rows, cols), of normalised pixels, float32 (n, 3, h, w)."""
        return torch.softmax(self.logits(pixels).float(), dim=1)[:, self.positive_index]


class Stem(nn.Module):
    """Pixels of regions to features that windows share."""

    def __init__(self, network: nn.Module, region: _Region) -> None:
        """Keep the network and where its windows lie."""
        super().__init__()
        self.network, self.region = network, region

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return features, float32 (n, channels, y, x), of normalised pixels, float32 (n, 3, h, w)."""
        return self.region.run(self.network, pixels)


class Tail(nn.Module):
    """Features of windows to their probabilities."""

    def __init__(self, network: nn.Module, positive_index: int) -> None:
        """Keep the network."""
        super().__init__()
        self.network, self.positive_index = network, positive_index

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return the logits, float32 (n, classes)."""
        logits: torch.Tensor = self.network(features)
        return logits[:, :, 0, 0]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return probabilities, float32 (n,), of features, float32 (n, channels, side, side)."""
        return torch.softmax(self.logits(features).float(), dim=1)[:, self.positive_index]


class _Plan:
    """What a conversion needs to know."""

    def __init__(self, classifier: Classifier, traced: fx.GraphModule, network: list[Layer], stride: int) -> None:
        self.classifier, self.traced, self.network, self.stride = classifier, traced, network, stride
        self.facts = dense_facts(network, stride)
        self.how = dense_strides(network, self.facts.grid_px)


def _whole(plan: _Plan, context_px: int, _share_until: str) -> DenseClassifier:
    """Return a classifier whose windows share the whole network."""
    grid_px, window_px = plan.facts.grid_px, plan.classifier.window_px
    factors = plan.how[plan.network[-1].node].factors
    module = DenseNetwork(
        dense_module(plan.traced, plan.network, plan.how),
        _Region(window_px, grid_px, grid_px, factors, 1),
        Crops(plan.stride // grid_px, 1, 1, context_px // grid_px),
        plan.classifier.positive_index,
    ).eval()
    return DenseClassifier(plan.facts, plan.stride, context_px, window_px, module)


def _shared(plan: _Plan, context_px: int, share_until: str) -> DenseClassifier:
    """Return a classifier whose windows share the network up to a module."""
    place = _cut(plan.network, share_until)
    last = plan.network[place]
    factors = plan.how[last.node].factors
    every = math.prod(factors)
    if last.side[0] != last.side[1] or last.spacing_px % every or plan.stride % (last.spacing_px // every):
        raise cannot_run_dense(f"features at {share_until} lie {last.spacing_px} px apart, windows {plan.stride} px")
    cell_px, side = last.spacing_px // every, last.side[0]
    stem = Stem(
        dense_module(plan.traced, plan.network[: place + 1], plan.how),
        _Region(plan.classifier.window_px, plan.facts.grid_px, cell_px, factors, (side - 1) * every + 1),
    )
    own = {layer.node: DenseStride(layer.stride, ()) for layer in plan.network}
    tail = Tail(dense_module(plan.traced, plan.network[place:], own), plan.classifier.positive_index)
    return DenseClassifier(
        plan.facts,
        plan.stride,
        context_px,
        plan.classifier.window_px,
        stem=stem.eval(),
        tail=tail.eval(),
        crops=Crops(plan.stride // cell_px, every, side, context_px // cell_px),
    )


def _cut(network: Sequence[Layer], name: str) -> int:
    """Return the place of the layer a module ends with.

    Raises:
        InputError: There is no such module, there are several, or windows cannot share the network up to it.
    """
    known = [layer for layer, _ in split_points(network)]
    whole = [layer for layer in known if name in layer.names]
    found = whole or [layer for layer in known if name in {path.rpartition(".")[2] for path in layer.names}]
    if len(found) == 1:
        return network.index(found[0])
    raise InputError(
        f"windows cannot share the network up to {name!r}",
        f"name one of {[layer.names[0] for layer in reversed(known)]}",
    )


def _check(classifier: Classifier, dense: DenseClassifier) -> None:
    """Refuse a conversion that gives other scores than the windows; all of them are compared where nothing pads.

    In a network that pads, the only window that sees the padding it is used to is one that fills the region.

    Raises:
        InputError: The scores differ.
    """
    side = classifier.window_px
    stride = 0 if dense.facts.padded or dense.stride > side else dense.stride
    pixels = torch.randn((1, 3, side + stride, side + stride), generator=torch.Generator().manual_seed(0))
    corners = [(y, x) for y in sorted({0, stride}) for x in sorted({0, stride})]
    with torch.inference_mode():
        wanted = torch.cat([classifier.module(pixels[:, :, y : y + side, x : x + side]) for y, x in corners])
        found = _logits(dense, pixels)
    if found.shape != wanted.shape:
        raise cannot_run_dense(f"the network over a region gives {len(found)} scores for {len(wanted)} windows")
    error = float((found.softmax(1) - wanted.softmax(1)).abs().max())
    logit_error = float((found - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
    if not (error <= PROBABILITY_TOLERANCE and logit_error <= LOGIT_TOLERANCE):
        raise cannot_run_dense(
            f"the network over a region gives other scores than over its windows: {error:.2g} apart in probability, "
            f"{logit_error:.2g} of the largest logit in logits"
        )


def _logits(dense: DenseClassifier, pixels: torch.Tensor) -> torch.Tensor:
    """Return the logits of the windows of one region, float32 (windows, classes)."""
    if isinstance(dense.module, DenseNetwork):
        return dense.module.logits(pixels)[0].flatten(1).T
    assert isinstance(dense.stem, Stem)
    assert isinstance(dense.tail, Tail)
    assert dense.crops is not None
    crops = window_crops(dense.stem(pixels).numpy(), dense.crops)
    return dense.tail.logits(torch.tensor(crops.reshape(-1, *crops.shape[3:])))
