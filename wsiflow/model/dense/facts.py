"""The properties and costs of running a window classifier over whole regions.

Input: the layers of a network. Output: `DenseFacts`, and the stride with which each layer runs.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import fx

from wsiflow.model.dense.layers import NCHW, cannot_run_dense
from wsiflow.model.dense.operations import Pair
from wsiflow.model.dense.receptive import Layer, Network, with_layer_name


class DenseStride(NamedTuple):
    """How a layer runs if the map must be finer than the total stride of the network.

    Attributes:
        stride: Stride with which the operation runs.
        factors: Numbers of phases into which each axis of the result is split, in the order of splitting.
    """

    stride: int
    factors: tuple[int, ...]


class SplitPoint(NamedTuple):
    """A layer up to which overlapping windows can share the network.

    Attributes:
        name: Path of its module.
        share: Fraction of a window's multiplications that are shared, 0 to 1.
    """

    name: str
    share: float


class DenseFacts(NamedTuple):
    """The properties of a network that is run over whole regions.

    Where only a part of it can, they are those of the network up to the deepest of ``cuts``, behind which each window
    runs alone.

    Attributes:
        grid_px: Distance between the scores that are computed; a coarser stride uses every n-th of them.
        native_px: Total stride of the network.
        padded: Whether scores depend on padding within their windows, so that dense scores differ from window scores.
        overhang_px: How far the receptive field of a score extends beyond its window, before (top, left) and after.
        align_px: Context and positions of windows must be multiples of this.
        window_macs: Multiplications for one window that is run alone.
        dense_macs_px: Multiplications per pixel of a large region, with those of windows behind the deepest cut.
        activation_bytes_px: Peak memory of float32 activations per pixel of a large region, bytes.
        cuts: Layers up to which windows can share the network, the deepest first.
        obstacle: The first layer that cannot run over regions, and the reason; empty where the whole network can.
        local: Whether means over the window are taken around every place.
    """

    grid_px: int
    native_px: int
    padded: bool
    overhang_px: Pair
    align_px: int
    window_macs: int
    dense_macs_px: float
    activation_bytes_px: float
    cuts: tuple[SplitPoint, ...]
    obstacle: str = ""
    local: bool = False


def dense_facts(network: Network, stride: int) -> DenseFacts:
    """Return the properties of a network that is run over regions with a stride.

    Args:
        network: The network.
        stride: Required distance between scores, px.

    Raises:
        InputError: No part of the network can run over regions, or a layer joins maps with different strides.
    """
    points = list(split_points(network))
    layers, window_macs = shared_layers(network, points), total_macs(network)
    grid_px, last = _grid(layers, stride), layers[-1]
    padded = any(span.first > 0 or span.last < span.side for span in last.spans)
    before = max(0, *(-span.begin_px for span in last.spans))
    after = max(0, *(span.end_px + (span.side - 1) * last.spacing_px for span in last.spans))
    macs_px, bytes_px = _dense_costs(layers, dense_strides(layers, grid_px))
    alone = window_macs - sum(layer.window_macs for layer in layers)
    return DenseFacts(
        grid_px,
        last.spacing_px,
        padded,
        (before, after) if padded else (0, 0),
        grid_px,
        window_macs,
        macs_px + alone / stride**2,
        bytes_px,
        # Of several layers with the same share, the last one is used, because its map is the smallest.
        tuple({share: SplitPoint(layer.names[0], share) for layer, share in points}.values())[::-1],
        network.obstacle.cause if network.obstacle else "",
        any(layer.map.everywhere for layer in layers),
    )


def shared_layers(network: Network, points: Sequence[tuple[Layer, float]]) -> list[Layer]:
    """Return the layers that windows can share: all, or those up to the deepest of the split points.

    Raises:
        InputError: There is no such layer.
    """
    if network.obstacle is None:
        return network.layers
    if not points:
        raise network.obstacle
    return network.layers[: network.layers.index(points[-1][0]) + 1]


def total_macs(network: Network) -> int:
    """Return the multiplications of a network for one window."""
    return sum(layer.window_macs for layer in network.layers) + sum(call.window_macs for call in network.rest)


def dense_strides(network: Sequence[Layer], grid_px: int) -> dict[fx.Node, DenseStride]:
    """Return how each layer runs if scores are `grid_px` apart.

    An operation whose stride would make the map coarser than the grid runs with a divisor of that stride, and its
    result is split into phases.

    Raises:
        InputError: A layer joins maps that are split differently.
    """
    strides: dict[fx.Node, DenseStride] = {}
    spacings = {layer.node: layer.spacing_px for layer in network}
    for layer in network:
        factors = {strides[node].factors for node in layer.inputs} or {()}
        if len(factors) > 1:
            raise with_layer_name(layer.node, cannot_run_dense("it joins maps of different strides"))
        (before,) = factors
        spacing_px = spacings[layer.inputs[0]] if layer.inputs else grid_px
        # Phases already consist of every n-th place; only a map that is not split and is on the grid can be subsampled.
        whole = not before and grid_px % spacing_px == 0
        stride = math.gcd(layer.stride, grid_px // spacing_px) if whole else 1
        split = layer.stride // stride
        strides[layer.node] = DenseStride(stride, (*before, split) if split > 1 else before)
    return strides


def split_points(network: Network) -> Iterator[tuple[Layer, float]]:
    """Yield the named layers on which alone all later ones depend, with the fraction of multiplications up to each."""
    last_use = _last_uses(network.layers)
    for call in network.rest:
        last_use.update({node: len(network.layers) for node in call.node.all_input_nodes if node in last_use})
    total, done, live = total_macs(network), 0, 0
    for place, layer in enumerate(network.layers):
        done += layer.window_macs
        if live <= place and layer.names and _is_image(layer) and 0 < done < total:
            yield layer, done / total
        live = max(live, last_use[layer.node])


def _is_image(layer: Layer) -> bool:
    """Tell whether the result of a layer is one map with the axes of an image, and is not only a change of shape."""
    result = layer.map
    return (
        min(layer.side) > 1
        and layer.op.kind != "flat"
        and not (result.everywhere or layer.is_tuple)
        and (result.axes, len(result.shape)) == (NCHW, 4)
    )


def _grid(network: Sequence[Layer], stride: int) -> int:
    """Return the largest distance between elements of any layer's map, px, that divides the required stride."""
    return max(layer.spacing_px for layer in network if stride % layer.spacing_px == 0)


def _last_uses(network: Sequence[Layer]) -> dict[fx.Node, int]:
    """Return for each layer the index of the last layer that uses its map."""
    last_uses = {layer.node: place for place, layer in enumerate(network)}
    for place, layer in enumerate(network):
        last_uses.update(dict.fromkeys(layer.inputs, place))
    return last_uses


def _dense_costs(network: Sequence[Layer], strides: dict[fx.Node, DenseStride]) -> tuple[float, float]:
    """Return the multiplications, and the peak memory in bytes, per pixel of a large region."""
    macs = peak = 0.0
    held: dict[fx.Node, float] = {}
    last_use = _last_uses(network)
    for place, layer in enumerate(network):
        # Splitting keeps the number of elements, so their density is that of the map before splitting.
        density = (math.prod(strides[layer.node].factors) / layer.spacing_px) ** 2
        macs += layer.macs * density
        size = 4 * layer.channels * density
        split = layer.inputs and strides[layer.node].factors != strides[layer.inputs[0]].factors
        # Operations on single positions can run in place if no later layer uses the input.
        inplace = layer.op.kind in {"each", "flat"} and all(last_use[node] == place for node in layer.inputs)
        new = size * (2 if split else 0 if inplace and layer.inputs else 1)
        peak = max(peak, sum(held.values()) + new)
        held[layer.node] = size
        held = {node: held[node] for node in held if last_use[node] > place}
    return macs, peak
