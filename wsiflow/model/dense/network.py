"""Window classifiers as fully convolutional networks: one pass over a region gives the scores of all its windows.

Input: a classifier and the required stride of the scores. Output: a `DenseClassifier`. The global pooling becomes a
sliding pooling, and the linear head a 1 x 1 convolution, which is computed before a mean, because it reduces the number
of channels. If scores must be finer than the network's stride, operations run with a smaller stride, and their results
are split into phases along the batch. Later layers process the phases as separate images, and at the end the phases are
interleaved. No value is computed twice. (Giusti et al. 2013 call the phases fragments.)

Where a layer needs a window as a whole (squeeze-and-excitation, attention, normalisation over the map), windows share
the network up to a layer before it, and run alone from there on.

For networks that do not pad, dense scores equal window scores except for rounding. In networks that pad, the padding of
a window is replaced by the actual pixels around it, and only the border of the region is padded.

In these modules only the height and the width of the region are variable, so they can be traced and exported.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx, nn

from wsiflow.errors import InputError
from wsiflow.model.classifier import Classifier
from wsiflow.model.dense import operations
from wsiflow.model.dense.alone import module_alone
from wsiflow.model.dense.crops import Crops, window_crops
from wsiflow.model.dense.facts import (
    DenseFacts,
    DenseStride,
    dense_facts,
    dense_strides,
    shared_layers,
    split_points,
)
from wsiflow.model.dense.layers import POOLINGS, cannot_run_dense
from wsiflow.model.dense.receptive import Network, read_network
from wsiflow.model.dense.rewrite import dense_module
from wsiflow.model.outputs import Outputs

# Sums are taken in another order than for a window, which changes a probability by about 1e-6. Logits are compared too,
# relative to the largest one, because probabilities that are all 0 or 1 would hide any difference.
PROBABILITY_TOLERANCE = 1e-5
LOGIT_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class DenseClassifier:
    """A classifier for regions instead of windows, either as one module or split into a shared stem and a tail.

    Element (i, j) of its map belongs to the window with the top-left pixel x = context_px + j * stride,
    y = context_px + i * stride.

    Attributes:
        facts: Its properties and costs.
        stride: Distance between windows, px.
        context_px: Width of the context around the windows on each side of a region, px.
        window_px: Side of a window, px.
        module: From normalised pixels, float32 (n, 3, h, w), to probabilities, float32 (n, rows, cols); None if split.
        stem: From normalised pixels to features, float32 (n, channels, y, x); None if not split.
        tail: From features of windows, float32 (n, channels, side, side), to probabilities, float32 (n,); None if not
            split.
        crops: Positions of the windows in the features; None if not split.
    """

    facts: DenseFacts
    stride: int
    context_px: int
    window_px: int
    module: nn.Module | None = None
    stem: nn.Module | None = None
    tail: nn.Module | None = None
    crops: Crops | None = None


def describe(classifier: Classifier, stride: int, *, local: bool = False) -> DenseFacts:
    """Return the properties of a classifier that is run over regions; only shapes are computed.

    Args:
        classifier: The classifier.
        stride: Required distance between scores, px.
        local: Whether means over the window are taken around every place, see `densify`.

    Raises:
        InputError: Not even a part of the classifier can run over regions; the message names the layer and the reason.
    """
    return dense_facts(read_network(classifier, local=local), stride)


def densify(
    classifier: Classifier, stride: int, *, context_px: int = 0, share_until: str = "", local: bool = False
) -> DenseClassifier:
    """Return a classifier as a network over whole regions, which shares the classifier's weights.

    Args:
        classifier: The classifier.
        stride: Required distance between scores, px.
        context_px: Width of the context around the windows on each side of a region, px: a multiple of
            ``facts.align_px``.
        share_until: Path, or last part of the path, of the module up to which windows share the network. After it each
            window runs alone, with its own padding. If empty, the whole network is shared.
        local: Whether a mean over the window that is combined with every place of a map, as in squeeze-and-excitation,
            is taken over an extent of the same size around each of these places instead. Scores then differ from those
            of windows by more than padding does.

    Raises:
        InputError: The classifier cannot run over whole regions, its dense scores differ from its window scores, or
            there is no such module.
    """
    network = read_network(classifier, local=local)
    conversion = _Conversion(classifier, network, stride)
    if conversion.obstacle and not share_until:
        raise _with_settings(conversion, local=local)
    if context_px % conversion.facts.align_px:
        raise InputError(
            f"a context of {context_px} px is not a multiple of the {conversion.facts.align_px} px between scores",
            f"set dense.halo to a multiple of {conversion.facts.align_px}",
        )
    build = _shared if share_until else _whole
    # Means around every place that reach over the whole window from each of them are those of the window.
    checked = _Conversion(classifier, _with_wide_means(network), stride) if conversion.facts.local else conversion
    _check(classifier, build(checked, 0, share_until))
    return build(conversion, context_px, share_until)


class _Region(NamedTuple):
    """The relation between the map of a network and the region from which it is computed.

    Attributes:
        extent_px: Side of a window, px.
        grid_px: Distance between the windows that are computed, px.
        cell_px: Distance between the cells of the map, px; the windows may be coarser.
        factors: Numbers of phases into which each axis was split, in the order of splitting.
        side: Side of a window, cells.
    """

    extent_px: int
    grid_px: int
    cell_px: int
    factors: tuple[int, ...]
    side: int

    def run(self, network: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """Return the network's map, float32 (n, channels, y, x), for the windows that are completely in the region."""
        spare = [(side - self.extent_px) % self.grid_px for side in pixels.shape[2:]]
        # The region is cropped to whole steps of the grid, so that the maps of all branches have equal sides.
        pixels = pixels[:, :, : pixels.shape[2] - spare[0], : pixels.shape[3] - spare[1]]
        cells: torch.Tensor = network(pixels)
        for factor in reversed(self.factors):
            cells = operations.interleave(cells, factor)
        reach = [(side - self.extent_px) // self.cell_px + self.side for side in pixels.shape[2:]]
        return cells[:, :, : reach[0], : reach[1]]


class DenseNetwork(nn.Module):
    """A fully convolutional network that maps the pixels of regions to the probabilities of their windows."""

    def __init__(self, network: nn.Module, region: _Region, crops: Crops, outputs: Outputs) -> None:
        """Build the module from a network and the positions of its windows."""
        super().__init__()
        self.network, self.region, self.crops, self.outputs = network, region, crops, outputs

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the logits, float32 (n, classes, rows, cols)."""
        windows = slice(self.crops.first, -self.crops.first or None, self.crops.step)
        return self.region.run(self.network, pixels)[:, :, windows, windows]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return probabilities, float32 (n, rows, cols), of normalised pixels, float32 (n, 3, h, w)."""
        return self.outputs.scores(self.logits(pixels))


class Stem(nn.Module):
    """The first part of a split network, which maps the pixels of regions to the features that windows share."""

    def __init__(self, network: nn.Module, region: _Region) -> None:
        """Build the module from a network and the positions of its windows."""
        super().__init__()
        self.network, self.region = network, region

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return features, float32 (n, channels, y, x), of normalised pixels, float32 (n, 3, h, w)."""
        return self.region.run(self.network, pixels)


class Tail(nn.Module):
    """The second part of a split network, which maps the features of each window to its probability."""

    def __init__(self, network: nn.Module, outputs: Outputs) -> None:
        """Build the module from a network and the meaning of its outputs."""
        super().__init__()
        self.network, self.outputs = network, outputs

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return the logits, float32 (n, classes)."""
        logits: torch.Tensor = self.network(features)
        return logits[:, :, 0, 0]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return probabilities, float32 (n,), of features, float32 (n, channels, side, side)."""
        return self.outputs.scores(self.logits(features))


class _Conversion:
    """The input of a conversion: the network, the layers that windows can share, and with which strides they run."""

    def __init__(self, classifier: Classifier, network: Network, stride: int) -> None:
        self.classifier, self.whole, self.stride = classifier, network, stride
        self.traced, self.obstacle = network.program, network.obstacle
        self.facts = dense_facts(network, stride)
        self.network = shared_layers(network, list(split_points(network)))
        self.strides = dense_strides(self.network, self.facts.grid_px)


def _with_settings(conversion: _Conversion, *, local: bool) -> InputError:
    """Return the obstacle of a network, with all settings that run it as its remedy."""
    assert conversion.obstacle is not None
    around = local or read_network(conversion.classifier, local=True).obstacle
    settings = [
        f"dense.share_until={conversion.facts.cuts[0].name}, up to which windows can share the network",
        *([] if around else ["dense.local=true, which takes means over the window around every place"]),
        "inference.engine=window, which runs any network",
    ]
    return InputError(conversion.obstacle.cause, f"set {'; or '.join(settings)}")


def _whole(conversion: _Conversion, context_px: int, _share_until: str) -> DenseClassifier:
    """Return a dense classifier as one module, whose windows share the whole network."""
    grid_px, window_px = conversion.facts.grid_px, conversion.classifier.window_px
    factors = conversion.strides[conversion.network[-1].node].factors
    module = DenseNetwork(
        dense_module(conversion.traced, conversion.network, conversion.strides),
        _Region(window_px, grid_px, grid_px, factors, 1),
        Crops(conversion.stride // grid_px, 1, 1, context_px // grid_px),
        conversion.classifier.outputs,
    ).eval()
    return DenseClassifier(conversion.facts, conversion.stride, context_px, window_px, module)


def _shared(conversion: _Conversion, context_px: int, share_until: str) -> DenseClassifier:
    """Return a dense classifier that is split after a module, up to which its windows share the network."""
    place = _split_index(conversion.whole, share_until)
    last = conversion.network[place]
    factors = conversion.strides[last.node].factors
    every = math.prod(factors)
    if last.side[0] != last.side[1] or last.spacing_px % every or conversion.stride % (last.spacing_px // every):
        raise cannot_run_dense(
            f"the features at {share_until}, {last.spacing_px} px apart, do not fit windows at {conversion.stride} px"
        )
    cell_px, side = last.spacing_px // every, last.side[0]
    stem = Stem(
        dense_module(conversion.traced, conversion.network[: place + 1], conversion.strides),
        _Region(conversion.classifier.window_px, conversion.facts.grid_px, cell_px, factors, (side - 1) * every + 1),
    )
    tail = Tail(_behind(conversion, place), conversion.classifier.outputs)
    return DenseClassifier(
        conversion.facts,
        conversion.stride,
        context_px,
        conversion.classifier.window_px,
        stem=stem.eval(),
        tail=tail.eval(),
        crops=Crops(conversion.stride // cell_px, every, side, context_px // cell_px),
    )


def _with_wide_means(network: Network) -> Network:
    """Return a network whose means around every place reach over all places of a window from each of its places."""
    wide = []
    for layer in network.layers:
        if layer.map.everywhere and layer.op.kind in POOLINGS and layer.op.kernel != (1, 1):
            rows, cols = layer.side
            op = layer.op._replace(kernel=(2 * rows - 1, 2 * cols - 1), before=(rows - 1, cols - 1))
            wide.append(layer._replace(op=op, behind=op.before))
        else:
            wide.append(layer)
    return network._replace(layers=wide)


def _behind(conversion: _Conversion, place: int) -> fx.GraphModule:
    """Return the network behind a layer, which each window runs alone."""
    if conversion.obstacle or conversion.facts.local:
        return module_alone(conversion.classifier, conversion.whole, conversion.network[place])
    own = {layer.node: DenseStride(layer.stride, ()) for layer in conversion.network}
    return dense_module(conversion.traced, conversion.network[place:], own)


def _split_index(network: Network, name: str) -> int:
    """Return the index of the layer that ends a module.

    Raises:
        InputError: There is no such module, there are several, or windows cannot share the network up to it.
    """
    known = [layer for layer, _ in split_points(network)]
    by_path = [layer for layer in known if name in layer.names]
    matches = by_path or [layer for layer in known if name in {path.rpartition(".")[2] for path in layer.names}]
    if len(matches) == 1:
        return network.layers.index(matches[0])
    raise InputError(
        f"windows cannot share the network up to {name!r}",
        f"name one of {[layer.names[0] for layer in reversed(known)]}",
    )


def _check(classifier: Classifier, dense: DenseClassifier) -> None:
    """Refuse a dense classifier whose scores differ from those of its windows on random pixels.

    If the network does not pad, a region with several windows is compared. If it pads, only a window that fills the
    region has the same padding in both.

    Raises:
        InputError: The scores differ.
    """
    side = classifier.window_px
    stride = 0 if dense.facts.padded or dense.stride > side else dense.stride
    pixels = torch.randn((1, 3, side + stride, side + stride), generator=torch.Generator().manual_seed(0))
    corners = [(y, x) for y in sorted({0, stride}) for x in sorted({0, stride})]
    with torch.inference_mode():
        expected = torch.cat([classifier.module(pixels[:, :, y : y + side, x : x + side]) for y, x in corners])
        actual = _logits(dense, pixels)
    if actual.shape != expected.shape:
        raise cannot_run_dense(f"the network over a region gives {len(actual)} scores for {len(expected)} windows")
    apart = classifier.outputs.probabilities(actual) - classifier.outputs.probabilities(expected)
    error = float(apart.abs().max())
    logit_error = float((actual - expected).abs().max()) / max(1.0, float(expected.abs().max()))
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
    features = torch.tensor(crops.reshape(-1, *crops.shape[3:]))
    # Another window beside them shows whether windows are apart in a part that need not be local.
    return dense.tail.logits(torch.cat([features, features[:1].flip(1, 2)]))[:-1]
