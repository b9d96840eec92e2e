"""What running a window classifier over whole regions means and costs.

Input: the layers of a network. Output: `DenseFacts`, and at which stride each layer runs.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import fx

from wsiflow.model.dense.layers import cannot_run_dense
from wsiflow.model.dense.operations import Pair
from wsiflow.model.dense.receptive import Layer, with_layer_name


class DenseStride(NamedTuple):
    """How a layer runs when the map has to be finer than the network's own.

    Attributes:
        stride: Stride the op runs with.
        factors: Phases an axis of the result is split into, in the order of splitting.
    """

    stride: int
    factors: tuple[int, ...]


class SplitPoint(NamedTuple):
    """A layer up to which windows can share the network.

    Attributes:
        name: Its module.
        share: Share of a window's multiplications up to it, 0 to 1.
    """

    name: str
    share: float


class DenseFacts(NamedTuple):
    """What running a network over whole regions means.

    Attributes:
        grid_px: Distance of the scores that are computed; a coarser stride takes every n-th.
        native_px: Total stride of the network.
        padded: A score sees padding in its own window, so dense scores differ from the window's.
        overhang_px: How far a score sees beyond its window, before (top, left) and after.
        align_px: Context and positions of windows must be multiples of it.
        window_macs: Multiplications of one window on its own.
        dense_macs_px: Multiplications for each pixel of a large region.
        activation_bytes_px: Peak of float32 activations for each pixel of a large region.
        cuts: Layers up to which windows can share the network, deepest first.
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


def dense_facts(network: Sequence[Layer], stride: int) -> DenseFacts:
    """Return what running a network over regions at a stride means.

    Args:
        network: What `trace_layers` returned.
        stride: Distance of the wanted scores, px.

    Raises:
        InputError: Maps of different strides meet.
    """
    grid_px = _grid(network, stride)
    last, window_macs = network[-1], sum(layer.window_macs for layer in network)
    padded = any(span.last <= span.first for span in last.spans)
    before = max(0, *(-span.begin_px for span in last.spans))
    after = max(0, *(span.end_px for span in last.spans))
    return DenseFacts(
        grid_px,
        last.spacing_px,
        padded,
        (before, after) if padded else (0, 0),
        grid_px,
        window_macs,
        *_dense_costs(network, dense_strides(network, grid_px)),
        # Of cuts that share as much, the last: its map is the smallest.
        tuple({share: SplitPoint(layer.names[0], share) for layer, share in split_points(network)}.values())[::-1],
    )


def dense_strides(network: Sequence[Layer], grid_px: int) -> dict[fx.Node, DenseStride]:
    """Return how each layer runs where scores are `grid_px` apart.

    An op whose stride would pass the grid runs with the part of it that does not, and its result is split into phases.

    Raises:
        InputError: Maps that meet are split differently.
    """
    found: dict[fx.Node, DenseStride] = {}
    spacings = {layer.node: layer.spacing_px for layer in network}
    for layer in network:
        factors = {found[node].factors for node in layer.inputs} or {()}
        if len(factors) > 1:
            raise with_layer_name(layer.node, cannot_run_dense("maps of different strides meet in it"))
        (before,) = factors
        spacing_px = spacings[layer.inputs[0]] if layer.inputs else grid_px
        # Phases hold every n-th place already; only a map that is in one piece and on the grid can be thinned out.
        whole = not before and grid_px % spacing_px == 0
        stride = math.gcd(layer.stride, grid_px // spacing_px) if whole else 1
        split = layer.stride // stride
        found[layer.node] = DenseStride(stride, (*before, split) if split > 1 else before)
    return found


def split_points(network: Sequence[Layer]) -> Iterator[tuple[Layer, float]]:
    """Yield the named layers that all later ones depend on alone, with the share of multiplications up to them."""
    last_use = _last_uses(network)
    total, done, live = sum(layer.window_macs for layer in network), 0, 0
    for place, layer in enumerate(network):
        done += layer.window_macs
        if live <= place and layer.names and min(layer.side) > 1 and 0 < done < total and layer.op.kind != "flat":
            yield layer, done / total
        live = max(live, last_use[layer.node])


def _grid(network: Sequence[Layer], stride: int) -> int:
    """Return the largest of the network's strides so far that divides the wanted one."""
    return max(layer.spacing_px for layer in network if stride % layer.spacing_px == 0)


def _last_uses(network: Sequence[Layer]) -> dict[fx.Node, int]:
    """Return for each layer the place of the last one that needs it."""
    found = {layer.node: place for place, layer in enumerate(network)}
    for place, layer in enumerate(network):
        found.update(dict.fromkeys(layer.inputs, place))
    return found


def _dense_costs(network: Sequence[Layer], how: dict[fx.Node, DenseStride]) -> tuple[float, float]:
    """Return multiplications, and the peak of bytes, for each pixel of a large region."""
    macs = peak = 0.0
    held: dict[fx.Node, float] = {}
    last_use = _last_uses(network)
    for place, layer in enumerate(network):
        # Splitting keeps the number of elements, so they lie as close as where they were computed.
        density = (math.prod(how[layer.node].factors) / layer.spacing_px) ** 2
        macs += layer.macs * density
        size = 4 * layer.channels * density
        split = layer.inputs and how[layer.node].factors != how[layer.inputs[0]].factors
        # One position alone can be computed in place, where nothing needs the input any more.
        inplace = layer.op.kind in {"each", "flat"} and all(last_use[node] == place for node in layer.inputs)
        new = size * (2 if split else 0 if inplace and layer.inputs else 1)
        peak = max(peak, sum(held.values()) + new)
        held[layer.node] = size
        held = {node: held[node] for node in held if last_use[node] > place}
    return macs, peak
